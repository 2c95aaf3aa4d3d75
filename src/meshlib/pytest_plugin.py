"""What does pytest get from an installed meshlib? The fixture `mesh`. Nothing is loaded until a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from meshlib.testing import FakeMesh


@pytest.fixture
def mesh() -> Iterator[FakeMesh]:
    """A meshlib.testing.FakeMesh: the real engine, and services that fail as the test says. Closed with the test."""
    from meshlib.testing import FakeMesh

    with FakeMesh() as made:
        yield made
