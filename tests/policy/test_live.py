"""A new Live takes over what has not changed, by reference, and counters whatever changes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from flows import failed, request, responded

from meshlib.model import (
    Cluster,
    Endpoint,
    HeaderMatch,
    Health,
    LoadAssignment,
    LoadBalancing,
    OutlierDetection,
    QueryMatch,
    RouteMatch,
    StringMatch,
)
from meshlib.model.expressions import compile_string
from meshlib.policy.cluster import LiveCluster
from meshlib.policy.live import compile_live
from meshlib.policy.matching import compile_match
from snapshots import live, service

TWO = [("10.0.0.1", 9080), ("10.0.0.2", 9080)]


def test_unchanged_clusters_and_tables_are_the_same_objects() -> None:
    """An update costs what changed."""
    first = live(service("reviews:9080", TWO))
    second = compile_live(replace(first.snapshot, version="2"), first, random.Random(1))
    assert second.clusters["reviews:9080"] is first.clusters["reviews:9080"]
    assert second.router.tables["reviews:9080"] is first.router.tables["reviews:9080"]


def test_counters_survive_an_update_of_the_endpoints() -> None:
    """Calls in flight and ejections are not forgotten; a new weight is the same endpoint."""
    first = live(service("reviews:9080", TWO))
    before = first.clusters["reviews:9080"]
    before.begin(before.targets[0])
    heavier = Endpoint("10.0.0.1", 9080, weight=7)
    changed = replace(first.snapshot, assignments=(LoadAssignment("reviews:9080", (heavier,)),))
    after = compile_live(changed, first, random.Random(1)).clusters["reviews:9080"]
    assert after is not before
    assert after.state is before.state
    assert after.targets[0].state is before.targets[0].state
    assert after.targets[0].endpoint.weight == 7


def test_only_healthy_endpoints_of_the_first_priority_are_picked() -> None:
    """Draining ones get no new call; lower priorities wait."""
    assignment = LoadAssignment(
        "c",
        (
            Endpoint("10.0.0.1", 80, health=Health.DRAINING),
            Endpoint("10.0.0.2", 80, health=Health.UNHEALTHY),
            Endpoint("10.0.0.3", 80, priority=1),
            Endpoint("10.0.0.4", 80, priority=2),
        ),
    )
    cluster = LiveCluster(Cluster("c"), assignment, random.Random(1))
    picked = {cluster.pick(0.0, (), 0).endpoint.address for _ in range(20)}  # type: ignore[union-attr]
    assert picked == {"10.0.0.3"}


def test_five_failures_in_a_row_eject_and_time_brings_back() -> None:
    """Istio's outlierDetection as in its circuit-breaking task, on Envoy's grid of intervals."""
    rules = OutlierDetection(consecutive_5xx=5, interval=1.0, base_ejection_time=30.0, max_ejection_percent=100)
    cluster = LiveCluster(
        Cluster("c", load_balancing=LoadBalancing.ROUND_ROBIN, outlier_detection=rules),
        LoadAssignment("c", (Endpoint("10.0.0.1", 80), Endpoint("10.0.0.2", 80))),
        random.Random(1),
    )
    bad, good = cluster.targets
    for _ in range(5):
        cluster.judge(bad, responded(503), 0.1, 100.0)
    assert {cluster.pick(100.1, (), 0) for _ in range(10)} == {good}
    assert {cluster.pick(129.9, (), 0) for _ in range(10)} == {good}
    assert {cluster.pick(130.0, (), 0) for _ in range(10)} == {good, bad}


def test_the_share_of_ejected_endpoints_is_bounded() -> None:
    """Ten percent of two is none (Envoy, Istio's default)."""
    cluster = LiveCluster(
        Cluster("c", outlier_detection=OutlierDetection()),
        LoadAssignment("c", (Endpoint("10.0.0.1", 80), Endpoint("10.0.0.2", 80))),
        random.Random(1),
    )
    for _ in range(20):
        cluster.judge(cluster.targets[0], failed("reset"), 0.1, 100.0)
    assert cluster.state.ejected == 0


def test_below_the_minimum_health_everything_is_called() -> None:
    """Envoy's panic: ejection would do more harm than good."""
    rules = OutlierDetection(consecutive_5xx=1, max_ejection_percent=100, min_health_percent=60)
    cluster = LiveCluster(
        Cluster("c", load_balancing=LoadBalancing.ROUND_ROBIN, outlier_detection=rules),
        LoadAssignment("c", (Endpoint("10.0.0.1", 80), Endpoint("10.0.0.2", 80))),
        random.Random(1),
    )
    cluster.judge(cluster.targets[0], responded(500), 0.1, 1.0)
    assert {cluster.pick(1.1, (), 0) for _ in range(10)} == set(cluster.targets)


@pytest.mark.parametrize(
    ("match", "text", "expected"),
    [
        (StringMatch("exact", "/a"), "/a", True),
        (StringMatch("exact", "/a"), "/A", False),
        (StringMatch("exact", "/a", ignore_case=True), "/A", True),
        (StringMatch("prefix", "/foo"), "/foobar", True),
        (StringMatch("path-prefix", "/foo"), "/foobar", False),
        (StringMatch("path-prefix", "/foo/"), "/foo", True),
        (StringMatch("path-prefix", "/foo"), "/foo/bar", True),
        (StringMatch("suffix", "bar"), "foobar", True),
        (StringMatch("contains", "ob"), "foobar", True),
        (StringMatch("regex", "a+"), "aaa", True),
        (StringMatch("regex", "a+"), "aaab", False),
        (StringMatch("regex", "A+", ignore_case=True), "aaa", True),
        (StringMatch("present"), "", True),
    ],
)
def test_strings_match_as_in_envoy(match: StringMatch, text: str, expected: bool) -> None:
    """Regular expressions are RE2 and must match the whole string."""
    assert compile_string(match)(text) is expected


def test_a_regular_expression_cannot_take_exponential_time() -> None:
    """What `re` needs centuries for; RE2 is linear. The test's own time limit is the proof."""
    assert not compile_string(StringMatch("regex", "(a|aa)+$"))("a" * 5000 + "b")


def test_route_matches_look_at_path_without_query_headers_and_query() -> None:
    """All given conditions must hold; an inverted one holds for a missing header."""
    fits = compile_match(
        RouteMatch(
            path=StringMatch("exact", "/p"),
            method=StringMatch("exact", "GET"),
            headers=(HeaderMatch("x-no", StringMatch("exact", "1"), invert=True),),
            query=(QueryMatch("v", StringMatch("prefix", "b")),),
        )
    )
    assert fits is not None
    assert fits(request("http://h/p?v=beta"))
    assert not fits(request("http://h/p?v=alpha&v=beta"))
    assert not fits(request("http://h/p?v=beta", "POST"))
    assert not fits(request("http://h/p?v=beta", headers={"X-No": "1"}))
    assert compile_match(RouteMatch(path=StringMatch("prefix", "/"))) is None
