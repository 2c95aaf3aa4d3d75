"""Each policy shares calls as its name says."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from meshlib.balancing import EMPTY, Target, build_picker
from meshlib.model import Endpoint, LoadBalancing
from meshlib.state import ClusterState, EndpointState


def targets(*weights: int) -> list[Target]:
    return [Target(Endpoint(f"10.0.0.{i}", 80, weight), EndpointState()) for i, weight in enumerate(weights)]


def counted(policy: LoadBalancing, given: list[Target], calls: int) -> list[int]:
    picker = build_picker(policy, given, ClusterState(), random.Random(7))
    picked = [picker.pick() for _ in range(calls)]
    counts = Counter(target.endpoint for target in picked if target is not None)
    return [counts[target.endpoint] for target in given]


def test_round_robin_serves_each_in_turn() -> None:
    """Exactly as often."""
    assert counted(LoadBalancing.ROUND_ROBIN, targets(1, 1, 1), 300) == [100, 100, 100]


def test_round_robin_keeps_its_place_when_endpoints_change() -> None:
    """A deployment does not send every process back to the first endpoint."""
    cluster = ClusterState()
    build_picker(LoadBalancing.ROUND_ROBIN, targets(1, 1), cluster, random.Random(1)).pick()
    following = build_picker(LoadBalancing.ROUND_ROBIN, targets(1, 1), cluster, random.Random(1)).pick()
    assert following is not None
    assert following.endpoint.address == "10.0.0.1"


@pytest.mark.parametrize("policy", list(LoadBalancing)[:3])
def test_weights_are_kept(policy: LoadBalancing) -> None:
    """3 to 1, within five standard deviations (least request compares two idle draws, which favours the heavy)."""
    heavy, light = counted(policy, targets(3, 1), 8000)
    assert heavy + light == 8000
    if policy is LoadBalancing.LEAST_REQUEST:
        assert light < 2000
    else:
        assert abs(light - 2000) < 5 * (8000 * 0.25 * 0.75) ** 0.5


def test_random_shares_evenly() -> None:
    """Four endpoints, within five standard deviations."""
    for count in counted(LoadBalancing.RANDOM, targets(1, 1, 1, 1), 8000):
        assert abs(count - 2000) < 5 * (8000 * 0.25 * 0.75) ** 0.5


def test_least_request_prefers_the_idle() -> None:
    """The busy one is picked only when both draws fall on it: one in four."""
    given = targets(1, 1)
    given[0].state.in_flight = 5
    busy, idle = counted(LoadBalancing.LEAST_REQUEST, given, 4000)
    assert abs(busy - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5
    assert idle == 4000 - busy


@pytest.mark.parametrize("policy", list(LoadBalancing)[:3])
def test_no_endpoint_picks_none_and_one_picks_itself(policy: LoadBalancing) -> None:
    """The edges of every policy."""
    rng = random.Random(1)
    assert build_picker(policy, [], ClusterState(), rng) is EMPTY
    assert EMPTY.pick() is None
    only = targets(5)
    assert build_picker(policy, only, ClusterState(), rng).pick() is only[0]
