"""Which control plane is called next, and may it be?"""

from __future__ import annotations

import random

import pytest

from meshlib.errors import SettingsError
from meshlib.identity.access import Access, NoAccess, addresses_of
from meshlib.mesh import Mesh
from meshlib.settings import Settings


def test_several_addresses_are_taken_in_turn_from_anywhere() -> None:
    """The second one is off this machine, where plaintext is refused: that tells which one was taken."""

    def refused(access: Access) -> bool:
        try:
            access.channel(()).close()
        except NoAccess as error:
            assert "192.0.2.1:15010" in str(error)
            return True
        return False

    orders = set()
    for seed in range(16):
        access = Access("127.0.0.1:15010, 192.0.2.1:15010", rng=random.Random(seed))
        orders.add(tuple(refused(access) for _ in range(4)))
    assert orders == {(False, True, False, True), (True, False, True, False)}


def test_one_address_is_taken_always() -> None:
    """Commas at the ends mean nothing."""
    assert addresses_of("127.0.0.1:15010") == ("127.0.0.1:15010",)
    assert addresses_of("a:1,b:2,") == ("a:1", "b:2")


def test_each_of_several_addresses_has_to_be_one() -> None:
    """Said when the feed starts."""
    with (
        Mesh(Settings("127.0.0.1:15010,nonsense", telemetry="off")) as mesh,
        pytest.raises(SettingsError, match="comma"),
    ):
        mesh.start()
