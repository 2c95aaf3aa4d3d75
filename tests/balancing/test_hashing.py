"""Ring hash and maglev choose as Envoy's do, spread evenly, and move few keys when an endpoint goes."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import xxhash

from meshlib.balancing import Target
from meshlib.balancing.hashing import HashPicker, Maglev, Ring, Table, build_table
from meshlib.model import Cluster, Endpoint, HashTable, LoadBalancing
from meshlib.state import EndpointState

SIX = [f"127.0.0.1:{port}" for port in range(90, 96)]
HUNDRED = [f"10.0.0.{number}:80" for number in range(100)]
KEYS = [xxhash.xxh64_intdigest(f"user-{number}".encode()) for number in range(20_000)]


def ring(addresses: list[str], weights: list[float] | None = None, minimum: int = 1024) -> Ring:
    return Ring(addresses, weights or [1.0] * len(addresses), minimum, 8 << 20)


def maglev(addresses: list[str], weights: list[float] | None = None, size: int = 65537) -> Maglev:
    return Maglev(addresses, weights or [1.0] * len(addresses), size)


def owners(table: Table, addresses: list[str]) -> list[str]:
    return [addresses[table.index(key, 0)] for key in KEYS]


def test_maglev_has_envoys_table() -> None:
    """The expectation of Envoy's own test (maglev_lb_test.cc, Basic): six endpoints in a table of seven."""
    table = maglev(SIX, size=7)
    assert [table.index(slot, 0) for slot in range(21)] == [2, 4, 0, 1, 5, 0, 3] * 3


def test_a_ring_has_envoys_hashes() -> None:
    """Those of Envoy's own test (ring_hash_lb_test.cc, Basic): six endpoints, two hashes each; the first hash that is
    not below the key is the one, and after the last comes the first."""
    expected = {
        833437586790550860: 94,
        928266305478181108: 92,
        1033482794131418490: 90,
        3551244743356806947: 95,
        3851675632748031481: 93,
        5583722120771150861: 91,
        6311230543546372928: 91,
        7700377290971790572: 93,
        13144177310400110813: 95,
        13444792449719432967: 92,
        15516499411664133160: 94,
        16117243373044804889: 90,
    }
    table = ring(SIX, minimum=12)
    assert len(table) == 12
    for point, port in expected.items():
        assert SIX[table.index(point, 0)] == f"127.0.0.1:{port}"
    assert SIX[table.index(0, 0)] == SIX[table.index((1 << 64) - 1, 0)] == "127.0.0.1:94"
    assert SIX[table.index(0, 1)] == "127.0.0.1:92", "a retry goes one further"
    assert SIX[table.index(833437586790550861, 0)] == "127.0.0.1:92"


def test_maglev_shares_as_weights_say() -> None:
    """Slots of a table, counted: within two percent of the share."""
    table = maglev(HUNDRED[:4], [1.0, 2.0, 3.0, 4.0])
    counts = Counter(table.index(slot, 0) for slot in range(65537))
    for owner, weight in enumerate((1, 2, 3, 4)):
        assert counts[owner] == pytest.approx(65537 * weight / 10, rel=0.02)


def test_a_ring_shares_as_weights_say() -> None:
    """A ring is rougher: with 40,000 hashes, within five percent."""
    table = ring(HUNDRED[:4], [1.0, 2.0, 3.0, 4.0], minimum=40_000)
    assert len(table) == pytest.approx(40_000, abs=4)
    counts = Counter(owners(table, HUNDRED[:4]))
    for address, weight in zip(HUNDRED[:4], (1, 2, 3, 4), strict=True):
        assert counts[address] == pytest.approx(len(KEYS) * weight / 10, rel=0.05)


@pytest.mark.parametrize(("build", "allowed"), [(maglev, 0.02), (ring, 0.02)])
def test_one_of_a_hundred_that_leaves_moves_its_keys_and_hardly_another(build: object, allowed: float) -> None:
    """At most 2 percent of all keys for maglev; of a ring only those of the one that left, which are about 1."""
    assert callable(build)
    before = owners(build(HUNDRED), HUNDRED)
    left = [address for address in HUNDRED if address != HUNDRED[37]]
    after = owners(build(left), left)
    moved = sum(a != b for a, b in zip(before, after, strict=True))
    assert moved / len(KEYS) <= allowed
    if build is ring:
        assert moved == before.count(HUNDRED[37])


def test_the_order_of_endpoints_makes_no_difference() -> None:
    """Processes that learn of endpoints in different orders agree."""
    shuffled = random.Random(3).sample(HUNDRED, 100)
    for build in (maglev, ring):
        assert owners(build(HUNDRED), HUNDRED) == owners(build(shuffled), shuffled)


@pytest.mark.parametrize("policy", [LoadBalancing.RING_HASH, LoadBalancing.MAGLEV])
def test_an_ejected_endpoint_is_passed_over_and_other_keys_stay(policy: LoadBalancing) -> None:
    """Its keys are spread over the others, everyone else's stay where they were, and come back with it."""
    targets = [Target(Endpoint(f"10.0.0.{i}", 80), EndpointState()) for i in range(10)]
    table = build_table(Cluster("c", load_balancing=policy), targets, [1.0] * 10)

    def chosen() -> list[int]:
        picker = HashPicker("h", table, targets, lambda target: target.state.is_ready, random.Random(1))
        return [targets.index(picker.pick(0.0, key)) for key in KEYS]  # type: ignore[arg-type]

    before = chosen()
    targets[4].state.is_ejected = True
    during = chosen()
    assert 4 not in during
    assert all(a == b for a, b in zip(before, during, strict=True) if a != 4)
    heirs = Counter(b for a, b in zip(before, during, strict=True) if a == 4)
    assert len(heirs) == 9
    targets[4].state.is_ejected = False
    assert chosen() == before


def test_few_that_are_ready_still_serve_every_key() -> None:
    """Also when no look meets one."""
    targets = [Target(Endpoint(f"10.0.{i >> 8}.{i & 255}", 80), EndpointState()) for i in range(1000)]
    table = build_table(Cluster("c", load_balancing=LoadBalancing.RING_HASH), targets, [1.0] * 1000)
    picker = HashPicker("h", table, targets, lambda target: target is targets[5], random.Random(1))
    assert {picker.pick(0.0, key) for key in KEYS[:500]} == {targets[5]}
    assert HashPicker("h", table, targets, lambda _: False, random.Random(1)).pick(0.0, 1) is None


def test_calls_without_a_key_go_anywhere() -> None:
    """Envoy's random hash."""
    targets = [Target(Endpoint(f"10.0.0.{i}", 80), EndpointState()) for i in range(4)]
    table = build_table(Cluster("c", load_balancing=LoadBalancing.MAGLEV), targets, [1.0] * 4)
    picker = HashPicker("h", table, targets, lambda _: True, random.Random(1))
    counts = Counter(picker.pick() for _ in range(8000))
    assert all(abs(count - 2000) < 5 * (8000 * 0.25 * 0.75) ** 0.5 for count in counts.values())


def test_a_hash_key_stands_in_for_the_address() -> None:
    """So a pod that came back at another address has the keys of the one before it."""
    sizes = HashTable(minimum_ring_size=64)
    cluster = Cluster("c", load_balancing=LoadBalancing.RING_HASH, hash_table=sizes)

    def table(last: str) -> Table:
        named = [Target(Endpoint(f"10.0.0.{last}{i}", 80, hash_key=f"pod-{i}"), EndpointState()) for i in range(5)]
        return build_table(cluster, named, [1.0] * 5)

    assert [table("1").index(key, 0) for key in KEYS[:100]] == [table("2").index(key, 0) for key in KEYS[:100]]
