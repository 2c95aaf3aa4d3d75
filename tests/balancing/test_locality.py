"""Who gets which part of the load: priorities, zones, and endpoints that are new."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.balancing import Picker, Target
from meshlib.balancing.locality import Pool, Share, priority_shares, weights_now
from meshlib.model import (
    NOWHERE,
    Cluster,
    Endpoint,
    Health,
    LoadBalancing,
    Locality,
    LocalityWeight,
    SlowStart,
    ZoneAware,
)
from meshlib.state import ClusterState, EndpointState

A, B, C = (Locality("eu", zone) for zone in "abc")


def endpoints(places: Mapping[tuple[int, Locality], int]) -> list[Endpoint]:
    """How many endpoints each (priority, locality) has."""
    made = []
    for number, ((priority, locality), count) in enumerate(places.items()):
        made += [Endpoint(f"10.0.{number}.{i}", 80, priority=priority, locality=locality) for i in range(count)]
    return made


class Town:
    """A pool over endpoints, with whoever is ejected."""

    def __init__(
        self,
        given: Sequence[Endpoint],
        cluster: Cluster | None = None,
        weights: Sequence[LocalityWeight] = (),
        here: Locality = NOWHERE,
    ) -> None:
        self.targets = [Target(e, EndpointState()) for e in given if e.health is Health.HEALTHY]
        self.pool = Pool(
            cluster or Cluster("c", load_balancing=LoadBalancing.RANDOM),
            given,
            self.targets,
            weights,
            here,
            ClusterState(),
            random.Random(11),
        )

    def eject(self, count: int, **place: object) -> None:
        for target in self.targets:
            if count and all(getattr(target.endpoint, name) == value for name, value in place.items()):
                target.state.is_ejected = True
                count -= 1
        assert not count

    def picker(self, panic: int = 0) -> Picker:
        return self.pool.picker(lambda target: target.state.is_ready, panic, 0.0)

    def shares(self, by: str, calls: int = 10_000, panic: int = 0, **how: object) -> dict[object, float]:
        """Percent of the calls that went to each value of the endpoint's attribute."""
        picker = self.picker(panic)
        picked = [picker.pick(**how) for _ in range(calls)]  # type: ignore[arg-type]
        counts = Counter(getattr(target.endpoint, by) for target in picked if target is not None)
        return {value: 100 * count / calls for value, count in counts.items()}


@pytest.mark.parametrize(
    ("healthy", "expected"),
    [
        ((100, 100), (100, 0)),
        ((72, 100), (100, 0)),
        ((71, 100), (99, 1)),
        ((50, 100), (70, 30)),
        ((25, 100), (35, 65)),
        ((0, 100), (0, 100)),
        ((25, 25), (50, 50)),
        ((0, 0), (0, 0)),
    ],
)
def test_load_overflows_as_in_envoys_table(healthy: tuple[int, int], expected: tuple[int, int]) -> None:
    """Of a hundred endpoints in either priority (priority.rst)."""
    found = priority_shares([(count, 100) for count in healthy], 0)
    assert tuple(share.percent for share in found) == expected


@given(
    st.lists(st.integers(0, 50).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1, max_size=5),
    st.integers(0, 100),
)
def test_shares_sum_to_a_hundred_or_to_nothing(health: list[tuple[int, int]], panic: int) -> None:
    """Nobody who is down gets any but in panic, and nothing is lost by rounding."""
    found = priority_shares(health, panic)
    total = sum(share.percent for share in found)
    reachable = any(healthy for healthy, _ in health) or (panic > 0 and any(total for _, total in health))
    able = min(100, sum(min(100, 140 * h // n) if n else 0 for h, n in health))
    assert total == (100 if reachable and (able or panic) else 0)
    for share, (healthy, _) in zip(found, health, strict=True):
        assert share.percent >= 0
        assert healthy or share.is_panicking or not share.percent


def test_all_down_is_total_panic_where_panic_is_on() -> None:
    """By the number of endpoints; Istio's default (0) lets nobody serve."""
    assert priority_shares([(0, 3), (0, 1)], 50) == (Share(75, True), Share(25, True))
    assert priority_shares([(0, 3), (0, 1)], 0) == (Share(0, False), Share(0, False))


def test_a_lower_priority_serves_when_the_first_is_half_gone() -> None:
    """70 to 30, counted."""
    town = Town(endpoints({(0, A): 4, (1, B): 4}))
    assert town.shares("priority") == {0: 100.0}
    town.eject(2, priority=0)
    found = town.shares("priority")
    assert found[0] == pytest.approx(70, abs=2.5)
    assert found[1] == pytest.approx(30, abs=2.5)


def test_ill_endpoints_count_for_their_priority() -> None:
    """What the control plane calls unhealthy is not called, but is missed; what drains is neither."""
    given = endpoints({(0, A): 2, (1, B): 2})
    ill = [*given[:1], Endpoint("10.9.9.9", 80, health=Health.UNHEALTHY), *given[2:]]
    assert Town(ill).shares("priority")[1] == pytest.approx(30, abs=2.5)
    draining = [*given[:1], Endpoint("10.9.9.9", 80, health=Health.DRAINING), *given[2:]]
    assert Town(draining).shares("priority") == {0: 100.0}


def test_a_retry_leaves_tried_priorities_out_while_there_are_others() -> None:
    """retryRemoteLocalities."""
    town = Town(endpoints({(0, A): 2, (1, B): 2, (2, C): 2}))
    assert town.shares("priority", avoid=(0,)) == {1: 100.0}
    assert town.shares("priority", avoid=(0, 1)) == {2: 100.0}
    assert town.shares("priority", avoid=(0, 1, 2)) == {0: 100.0}


def test_localities_share_by_weight() -> None:
    """Istio's distribute, 70 to 20 to 10; one without a weight gets nothing."""
    cluster = Cluster("c", load_balancing=LoadBalancing.RANDOM, locality_weighted=True)
    weights = [LocalityWeight(A, 0, 70), LocalityWeight(B, 0, 30)]
    town = Town(endpoints({(0, A): 1, (0, B): 5, (0, C): 3}), cluster, weights)
    found = town.shares("locality")
    assert set(found) == {A, B}
    assert found[A] == pytest.approx(70, abs=2.5)
    town.eject(4, locality=B)  # 1 of 5 left: 30 * 1.4 * 0.2 = 8.4 to 70
    assert town.shares("locality")[B] == pytest.approx(100 * 8.4 / 78.4, abs=1.5)


@pytest.mark.parametrize("policy", [LoadBalancing.RING_HASH, LoadBalancing.MAGLEV])
def test_hash_tables_hold_the_weights_of_localities(policy: LoadBalancing) -> None:
    """Keys are spread as the localities' weights say."""
    cluster = Cluster("c", load_balancing=policy, locality_weighted=True)
    weights = [LocalityWeight(A, 0, 3), LocalityWeight(B, 0, 1)]
    town = Town(endpoints({(0, A): 2, (0, B): 4}), cluster, weights)
    assert town.shares("locality")[A] == pytest.approx(75, abs=5)


def test_zone_awareness_stays_at_home_as_far_as_home_can_carry_it() -> None:
    """Half the callers' share of endpoints at home: half of the calls leave."""
    cluster = Cluster("c", load_balancing=LoadBalancing.RANDOM, zone_aware=ZoneAware())
    even = Town(endpoints({(0, A): 4, (0, B): 4}), cluster, here=A)
    assert even.shares("locality") == {A: 100.0}
    poor = Town(endpoints({(0, A): 2, (0, B): 6}), cluster, here=A)
    assert poor.shares("locality")[A] == pytest.approx(50, abs=2.5)
    few = Town(endpoints({(0, A): 2, (0, B): 2}), cluster, here=A)
    assert few.shares("locality")[B] == pytest.approx(50, abs=2.5), "below min_cluster_size it is off"
    stranger = Town(endpoints({(0, A): 4, (0, B): 4}), cluster, here=C)
    assert stranger.shares("locality")[B] == pytest.approx(50, abs=2.5)


def test_a_new_endpoint_warms_up() -> None:
    """10 percent at first, in proportion to its age then, and its whole weight in the end."""
    old, new = (Target(Endpoint(f"10.0.0.{i}", 80), EndpointState(joined)) for i, joined in enumerate((-1000.0, 0.0)))
    rules = SlowStart(window=100.0)
    assert weights_now(rules, [old, new], 5.0) == [1000, 100]
    assert weights_now(rules, [old, new], 50.0) == [1000, 500]
    assert weights_now(rules, [old, new], 100.0) == [1, 1]
    assert weights_now(SlowStart(100.0, aggression=2.0), [old, new], 25.0) == [1000, 500]
    assert weights_now(None, [old, new], 5.0) == [1, 1]
