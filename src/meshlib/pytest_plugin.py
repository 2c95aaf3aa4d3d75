"""What does pytest get from meshlib? The fixture `mesh`, for who names this module in `pytest_plugins`. Nothing else is
loaded until a test asks for it.

It is no entry point: pytest rewrites the assertions of all modules that such a plugin is installed with, which costs
every test run in that environment, and CPython 3.11 can't do it on two threads at once."""

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
