"""Who is sent away, for how long, and who never: Envoy's outlier detection, moment by moment."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.balancing import Target
from meshlib.model import Cluster, Endpoint, Headers, LoadAssignment, LoadBalancing, Outcome, OutlierDetection
from meshlib.policy.cluster import LiveCluster
from meshlib.policy.retry import CLIENT_TIMEOUT, CONNECT_FAILURE, LOCAL, TIMEOUT

GOOD, BAD, GATEWAY = (Outcome(status, Headers()) for status in (200, 500, 503))
UNREACHABLE = Outcome(None, None, CONNECT_FAILURE)


class Town:
    """A cluster under rules, and a clock."""

    def __init__(self, hosts: int, shadow: frozenset[str] = frozenset(), **rules: Any) -> None:
        given = {"interval": 10.0, "base_ejection_time": 30.0, "max_ejection_percent": 100, **rules}
        self.cluster = LiveCluster(
            Cluster(
                "c",
                load_balancing=LoadBalancing.ROUND_ROBIN,
                outlier_detection=OutlierDetection(**given),
                shadow=shadow,
            ),
            LoadAssignment("c", tuple(Endpoint(f"10.0.{i >> 8}.{i & 255}", 80) for i in range(hosts))),
            random.Random(5),
        )
        self.targets = self.cluster.targets

    def judge(self, target: Target, outcome: Outcome, times: int = 1, now: float = 1.0) -> None:
        for _ in range(times):
            self.cluster.judge(target, outcome, 0.01, now)

    def out(self, now: float) -> list[int]:
        """Who is not called at `now`; also what makes time pass."""
        called = {self.cluster.pick(now, (), 0) for _ in range(4 * len(self.targets))}
        return [number for number, target in enumerate(self.targets) if target not in called]


def test_errors_in_a_row_eject_and_a_good_answer_begins_anew() -> None:
    """Five of them; four and a good one and four are nothing."""
    town = Town(3)
    town.judge(town.targets[0], BAD, 4)
    town.judge(town.targets[0], GOOD)
    town.judge(town.targets[0], BAD, 4)
    assert town.out(1.0) == []
    town.judge(town.targets[0], BAD)
    assert town.out(1.0) == [0]


def test_ejections_grow_longer_and_quiet_shortens_them() -> None:
    """30 seconds, 60, and so on; each interval without a new one takes one back. Returns are at an interval's end."""
    town = Town(2)
    bad = town.targets[0]
    town.judge(bad, BAD, 5, now=1.0)
    assert town.out(39.9) == [0], "31 is over, but the interval ends at 40"
    assert town.out(40.0) == []
    town.judge(bad, BAD, 5, now=41.0)
    assert town.out(100.9) == [0]
    assert town.out(110.0) == [], "60 seconds from 41, at the next interval's end"
    assert bad.state.ejections == 2
    town.out(130.0)
    assert bad.state.ejections == 0
    town.judge(bad, BAD, 5, now=131.0)
    assert town.out(169.0) == [0]
    assert town.out(170.0) == []


def test_no_ejection_is_longer_than_the_longest() -> None:
    """max_ejection_time, and the multiplier stops with it."""
    town = Town(2, max_ejection_time=60.0)
    bad, now = town.targets[0], 0.0
    for _ in range(6):
        town.judge(bad, BAD, 5, now=now)
        assert town.out(now) == [0]
        now += 70.0
        assert town.out(now) == []
    assert bad.state.ejections <= 3


def test_gateway_errors_have_a_count_of_their_own() -> None:
    """502, 503 and 504; another 5xx begins anew. Off by default."""
    town = Town(3, consecutive_5xx=0, consecutive_gateway_errors=2)
    town.judge(town.targets[0], GATEWAY)
    town.judge(town.targets[0], BAD)
    town.judge(town.targets[0], GATEWAY)
    assert town.out(1.0) == []
    town.judge(town.targets[0], GATEWAY)
    assert town.out(1.0) == [0]


@pytest.mark.parametrize("failure", [CONNECT_FAILURE, TIMEOUT, "reset"])
def test_what_brings_no_answer_counts_as_a_gateway_error(failure: str) -> None:
    """Unless they are split."""
    town = Town(3, consecutive_gateway_errors=2, consecutive_5xx=0)
    town.judge(town.targets[0], Outcome(None, None, failure), 2)
    assert town.out(1.0) == [0]


def test_local_failures_are_counted_apart_when_they_are_split() -> None:
    """splitExternalLocalOriginErrors: connect failures eject by their own number, and answers do not reset 5xx."""
    town = Town(3, split_external_local_origin_errors=True, consecutive_local_origin_failures=3, consecutive_5xx=2)
    town.judge(town.targets[0], BAD)
    town.judge(town.targets[0], UNREACHABLE, 2)
    assert town.out(1.0) == []
    town.judge(town.targets[0], UNREACHABLE)
    assert town.out(1.0) == [0]


@pytest.mark.parametrize("failure", [CLIENT_TIMEOUT, LOCAL])
def test_what_the_caller_did_is_no_endpoints_fault(failure: str) -> None:
    """A client's own short timeout says nothing of the server."""
    town = Town(3)
    town.judge(town.targets[0], Outcome(None, None, failure), 20)
    assert town.out(1.0) == []


def test_further_codes_can_count_as_errors() -> None:
    """outlierDetectionHttpErrorCodes: a 429, say."""
    town = Town(3, error_codes=frozenset({429}))
    town.judge(town.targets[0], Outcome(429, Headers()), 5)
    assert town.out(1.0) == [0]


@pytest.mark.parametrize(
    ("hosts", "percent", "always", "expected"), [(2, 10, False, 0), (2, 10, True, 1), (10, 30, False, 3)]
)
def test_the_share_of_the_ejected_is_bounded(hosts: int, percent: int, always: bool, expected: int) -> None:
    """Refused before it would be exceeded, and counted; gRPC (A50) would eject one more."""
    town = Town(hosts, max_ejection_percent=percent, always_eject_one=always)
    for target in town.targets:
        town.judge(target, BAD, 5)
    assert len(town.out(1.0)) == expected == town.cluster.state.ejected
    assert town.cluster.state.ejections_refused == hosts - expected
    assert town.cluster.state.ejections == expected


def test_a_rate_far_below_the_others_ejects() -> None:
    """Envoy's example: four with 100 percent and one with 50 give a mean of 90, a deviation of 20: 52."""
    town = Town(5, consecutive_5xx=0, success_rate_enforcing=100, success_rate_request_volume=100)
    for number, target in enumerate(town.targets):
        for call in range(100):
            town.judge(target, BAD if number == 2 and call % 2 else GOOD)
    assert town.out(9.9) == [], "the interval is not over"
    assert town.out(10.0) == [2]


def test_a_rate_needs_enough_calls_and_enough_hosts() -> None:
    """One call too few, or one host: nothing is judged, and the next interval begins at nothing."""
    town = Town(5, consecutive_5xx=0, success_rate_enforcing=100, success_rate_request_volume=100)
    for number, target in enumerate(town.targets):
        town.judge(target, BAD if number == 2 else GOOD, 99)
    assert town.out(10.0) == []
    for number, target in enumerate(town.targets):
        town.judge(target, BAD if number == 2 else GOOD, 99, now=11.0)
    assert town.out(20.0) == []


def test_a_share_of_failures_ejects_however_the_others_do() -> None:
    """85 percent and more, of at least 50 calls (Envoy's `>=`; gRPC's text says `>`)."""
    town = Town(5, consecutive_5xx=0, failure_percentage_enforcing=100)
    for number, target in enumerate(town.targets):
        bad = {0: 85, 1: 84}.get(number, 0)
        town.judge(target, BAD, bad)
        town.judge(target, GOOD, 100 - bad)
    assert town.out(10.0) == [0]


def test_enforcement_is_a_share_of_the_cases() -> None:
    """Half of a thousand, within five deviations."""
    town = Town(1000, consecutive_5xx=0, failure_percentage_enforcing=50)
    for target in town.targets:
        town.judge(target, BAD, 50)
    assert abs(len(town.out(10.0)) - 500) < 5 * 250**0.5


def test_jitter_spreads_returns() -> None:
    """They do not all come back in one interval."""
    town = Town(40, max_ejection_jitter=50.0)
    for target in town.targets:
        town.judge(target, BAD, 5)
    left = [len(town.out(float(now))) for now in range(40, 101, 10)]
    assert left == sorted(left, reverse=True)
    assert left[0] > 0
    assert left[-1] == 0
    assert len(set(left)) > 3


def test_shadow_mode_decides_and_ejects_nobody() -> None:
    """For a roll-out: what would have been is counted."""
    town = Town(3, shadow=frozenset({"outlier-detection"}))
    town.judge(town.targets[0], BAD, 10)
    assert town.out(1.0) == []
    assert town.cluster.state.shadowed_ejections == 2


def test_a_health_check_that_succeeds_brings_back() -> None:
    """Envoy's successful_active_health_check_uneject_host; one that fails takes out, whatever calls say."""
    town = Town(3)
    name = town.targets[0].endpoint.authority
    town.judge(town.targets[0], BAD, 5)
    assert town.out(2.0) == [0]
    town.cluster.set_health(name, True, 2.0)
    assert town.out(2.0) == []
    town.cluster.set_health(name, False, 3.0)
    assert town.out(3.0) == [0]
    town.cluster.set_health(name, True, 4.0)
    assert town.out(4.0) == []


def test_an_attempt_that_began_before_an_update_ejects_after_it() -> None:
    """Its verdict reaches the picker that calls use now."""
    old = Town(3)
    new = LiveCluster(old.cluster.cluster, old.cluster.assignment, random.Random(1), previous=old.cluster, now=1.0)
    old.judge(old.targets[0], BAD, 5)
    assert {new.pick(1.0, (), 0) for _ in range(20)} == set(new.targets[1:])


@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from([GOOD, BAD, GATEWAY, UNREACHABLE]), st.floats(0, 30))),
    st.integers(0, 100),
)
def test_counters_stay_true_whatever_happens(events: list[tuple[int, Outcome, float]], percent: int) -> None:
    """The number of the ejected is that of endpoints that are, never above the bound; someone is always called."""
    town = Town(5, max_ejection_percent=percent, consecutive_5xx=2, consecutive_gateway_errors=1)
    now = 0.0
    for number, outcome, pause in events:
        now += pause
        town.judge(town.targets[number], outcome, now=now)
        out = town.out(now)
        assert len(out) == town.cluster.state.ejected == sum(t.state.is_ejected for t in town.targets)
        assert 100 * len(out) <= percent * 5
        assert all(t.state.ejections >= 0 for t in town.targets)
