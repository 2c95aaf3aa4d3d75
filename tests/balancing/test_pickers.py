"""Each policy shares calls as its name says."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from meshlib.balancing import EMPTY, HASHING, Picker, Target, build_picker, client_weighted, peak_ewma
from meshlib.balancing.load_report import LoadReport
from meshlib.model import Cluster, Endpoint, LoadBalancing
from meshlib.state import EndpointState

KEYLESS = [policy for policy in LoadBalancing if policy not in HASHING]


def targets(*weights: int) -> list[Target]:
    return [Target(Endpoint(f"10.0.0.{i}", 80, weight), EndpointState()) for i, weight in enumerate(weights)]


def picker_of(policy: LoadBalancing, given: Sequence[Target], turn: list[int] | None = None) -> Picker:
    weights = [target.endpoint.weight for target in given]
    rng = random.Random(7)
    return build_picker(Cluster("c", load_balancing=policy), given, weights, [0] if turn is None else turn, rng)


def counted(policy: LoadBalancing, given: Sequence[Target], calls: int, now: float = 0.0) -> list[int]:
    picker = picker_of(policy, given)
    counts = Counter(picker.pick(now).endpoint for _ in range(calls))  # type: ignore[union-attr]
    return [counts[target.endpoint] for target in given]


def chi_square(found: Sequence[int], expected: Sequence[float]) -> float:
    """Standard deviations by which the statistic exceeds its mean (its degrees of freedom; variance twice that)."""
    freedom = len(found) - 1
    statistic = sum((count - wanted) ** 2 / wanted for count, wanted in zip(found, expected, strict=True))
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_round_robin_serves_each_in_turn() -> None:
    """Exactly as often."""
    assert counted(LoadBalancing.ROUND_ROBIN, targets(1, 1, 1), 300) == [100, 100, 100]


def test_round_robin_keeps_its_place_when_endpoints_change() -> None:
    """A deployment does not send every process back to the first endpoint."""
    turn = [0]
    picker_of(LoadBalancing.ROUND_ROBIN, targets(1, 1), turn).pick()
    following = picker_of(LoadBalancing.ROUND_ROBIN, targets(1, 1), turn).pick()
    assert following is not None
    assert following.endpoint.address == "10.0.0.1"


@pytest.mark.parametrize("weights", [(3, 1), (1, 2, 3, 4), (1, 100), (7, 7, 1)])
def test_weighted_round_robin_is_exact_over_a_round(weights: tuple[int, ...]) -> None:
    """Deterministic: each count is within one for each pass of what its weight asks for, and light ones don't wait."""
    calls = 200 * sum(weights)
    found = counted(LoadBalancing.ROUND_ROBIN, targets(*weights), calls)
    for count, weight in zip(found, weights, strict=True):
        assert abs(count - 200 * weight) <= max(2.0, 0.005 * calls)


@pytest.mark.parametrize("policy", [LoadBalancing.RANDOM, LoadBalancing.LEAST_REQUEST])
@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (3, 1), (1, 2, 3, 4), (10, 1, 1, 1, 1)])
def test_idle_endpoints_share_by_weight(policy: LoadBalancing, weights: tuple[int, ...]) -> None:
    """Chi-square against the exact expectation, four deviations."""
    calls = 20_000
    found = counted(policy, targets(*weights), calls)
    assert abs(chi_square(found, [calls * weight / sum(weights) for weight in weights])) < 4


@pytest.mark.parametrize("policy", [LoadBalancing.PEAK_EWMA, LoadBalancing.CLIENT_SIDE_WEIGHTED_ROUND_ROBIN])
def test_unknown_endpoints_share_evenly(policy: LoadBalancing) -> None:
    """Nothing is known of anyone yet."""
    calls = 20_000
    found = counted(policy, targets(1, 1, 1, 1), calls)
    assert max(found) - min(found) < 5 * math.sqrt(calls * 0.25 * 0.75)


def test_least_request_prefers_the_idle() -> None:
    """The busy one is picked only when both draws fall on it: one in four."""
    given = targets(1, 1)
    given[0].state.in_flight = 5
    busy, idle = counted(LoadBalancing.LEAST_REQUEST, given, 4000)
    assert abs(busy - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5
    assert idle == 4000 - busy


def test_least_request_counts_calls_by_weight() -> None:
    """Four calls on a weight of 4 are as much as one on 1: they tie, so the draw decides, 4 to 1."""
    given = targets(4, 1)
    given[0].state.in_flight, given[1].state.in_flight = 4, 1
    heavy, light = counted(LoadBalancing.LEAST_REQUEST, given, 20_000)
    assert abs(chi_square([heavy, light], [16_000, 4_000])) < 4


@pytest.mark.parametrize("policy", KEYLESS)
def test_no_endpoint_picks_none_and_one_picks_itself(policy: LoadBalancing) -> None:
    """The edges of every policy."""
    assert picker_of(policy, []) is EMPTY
    assert EMPTY.pick() is None
    only = targets(5)
    assert picker_of(policy, only).pick() is only[0]


def test_peak_ewma_heeds_a_slow_answer_at_once_and_forgets_it_slowly() -> None:
    """Peaks are taken over whole; what is better counts by the time since."""
    state = EndpointState()
    peak_ewma.observe(state, 0.010, 100.0)
    assert state.latency == 0.010
    peak_ewma.observe(state, 1.0, 101.0)
    assert state.latency == 1.0
    peak_ewma.observe(state, 0.010, 111.0)  # one DECAY later
    assert state.latency == pytest.approx(math.exp(-1) + 0.010 * (1 - math.exp(-1)))


def test_peak_ewma_sends_the_slow_one_almost_nothing() -> None:
    """Of two distinct draws the quicker wins: with two endpoints, always; and a queue makes the quick one wait, too."""
    given = targets(1, 1)
    peak_ewma.observe(given[0].state, 1.0, 100.0)
    peak_ewma.observe(given[1].state, 0.010, 100.0)
    assert counted(LoadBalancing.PEAK_EWMA, given, 100, 100.0) == [0, 100]
    given[1].state.in_flight = 150
    assert counted(LoadBalancing.PEAK_EWMA, given, 100, 100.0) == [100, 0]


def test_peak_ewma_lets_a_slow_one_be_tried_again() -> None:
    """Unused, its estimate decays, until it looks as good as the other."""
    given = targets(1, 1)
    peak_ewma.observe(given[0].state, 1.0, 100.0)
    peak_ewma.observe(given[1].state, 0.010, 100.0)
    peak_ewma.observe(given[1].state, 0.010, 160.0)
    assert counted(LoadBalancing.PEAK_EWMA, given, 100, 160.0)[0] == 100


def test_reported_weights_share_the_calls() -> None:
    """gRFC A58: qps / utilization, here 1 to 3; not before the black-out is over, and no longer than three minutes."""
    given = targets(1, 1)
    for now in (0.0, 11.0):
        client_weighted.observe(given[0].state, LoadReport(cpu_utilization=0.9, qps=90), now)
        client_weighted.observe(given[1].state, LoadReport(cpu_utilization=0.3, qps=90), now)
    policy = LoadBalancing.CLIENT_SIDE_WEIGHTED_ROUND_ROBIN
    assert counted(policy, given, 400, 5.0) == [200, 200]
    slow, quick = counted(policy, given, 4000, 12.0)
    assert abs(slow - 1000) <= 2
    assert slow + quick == 4000
    assert counted(policy, given, 400, 11.0 + 181.0) == [200, 200]


def test_errors_that_a_server_reports_lower_its_weight() -> None:
    """eps / qps is added to the utilization; application utilization comes before the processor's."""
    state = EndpointState()
    client_weighted.observe(state, LoadReport(0.1, 0.5, qps=100, eps=50), 1.0)
    assert state.reported_weight == pytest.approx(100 / (0.5 + 0.5))


def test_an_endpoint_without_a_report_gets_the_mean() -> None:
    """So a new one is neither starved nor flooded."""
    given = targets(1, 1, 1)
    for now in (0.0, 11.0):
        client_weighted.observe(given[0].state, LoadReport(cpu_utilization=1, qps=100), now)
        client_weighted.observe(given[1].state, LoadReport(cpu_utilization=1, qps=300), now)
    found = counted(LoadBalancing.CLIENT_SIDE_WEIGHTED_ROUND_ROBIN, given, 6000, 12.0)
    assert [round(count / 1000) for count in found] == [1, 3, 2]
