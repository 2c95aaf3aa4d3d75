"""Retry budgets keep their word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.model import RateBudget, RetryBudget
from meshlib.state import ClusterState
from meshlib.state.budget import TokenBudget, budget_of


def test_a_share_is_of_the_calls_that_do_not_retry() -> None:
    """Of a hundred calls of which sixteen retry, 20 percent are 16 (84 * 0.2); Envoy's would be 20."""
    state = ClusterState()
    budget = budget_of(RetryBudget(20.0, 3), 1, state)
    assert budget is not None
    state.requests = 100
    admitted = 0
    while budget.admits(0.0):
        state.retries += 1
        admitted += 1
    assert admitted == 16


def test_a_few_retries_are_always_allowed() -> None:
    """minRetryConcurrency."""
    state = ClusterState()
    budget = budget_of(RetryBudget(20.0, 3), None, state)
    assert budget is not None
    state.requests = 4
    for _ in range(3):
        assert budget.admits(0.0)
        state.retries += 1
    assert not budget.admits(0.0)


def test_max_retries_limits_where_there_is_no_budget() -> None:
    """And nothing does where there is neither (Istio's default)."""
    state = ClusterState()
    budget = budget_of(None, 1, state)
    assert budget is not None
    assert budget.admits(0.0)
    state.retries = 1
    assert not budget.admits(0.0)
    assert budget_of(None, None, state) is None


def test_calls_deposit_retries() -> None:
    """Five calls at 0.2 are one retry; Finagle's and Linkerd's budget."""
    budget = TokenBudget(RateBudget(ratio=0.2, min_per_second=0.0, ttl=10.0))
    for _ in range(4):
        budget.began(1.0)
    assert not budget.admits(1.0)
    budget.began(1.0)
    assert budget.admits(1.0)
    assert not budget.admits(1.0)


def test_deposits_expire() -> None:
    """What nobody needed within the ttl is gone, slot by slot."""
    budget = TokenBudget(RateBudget(ratio=1.0, min_per_second=0.0, ttl=10.0))
    budget.began(0.5)
    budget.began(5.5)
    assert budget.admits(10.5)
    assert not budget.admits(10.5)
    budget.began(20.5)
    assert not budget.admits(31.0)


def test_some_retries_a_second_come_for_free() -> None:
    """For services with few calls; a second's worth at a time, however long nobody asked."""
    budget = TokenBudget(RateBudget(ratio=0.0, min_per_second=2.0, ttl=10.0))
    assert [budget.admits(100.0) for _ in range(3)] == [True, True, False]
    assert [budget.admits(100.5), budget.admits(100.5)] == [True, False]


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 3)), max_size=200),
    st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]),
    st.sampled_from([0.0, 1.0, 10.0]),
)
def test_no_more_than_deposits_and_the_free_ones(events: list[tuple[bool, float]], ratio: float, free: float) -> None:
    """Whatever the order; and nothing in it is ever below zero."""
    budget = TokenBudget(RateBudget(ratio=ratio, min_per_second=free, ttl=10.0))
    now, calls, retries = 0.0, 0, 0
    for is_call, pause in events:
        now += pause
        if is_call:
            budget.began(now)
            calls += 1
        else:
            retries += budget.admits(now)
        assert min(budget._slots) >= 0
        assert budget._reserve >= 0
    assert retries <= calls * ratio + free * (1 + now) + 1e-6


@pytest.mark.parametrize("percent", [0.0, 5.0, 20.0, 100.0])
def test_an_outage_multiplies_the_load_by_no_more_than_the_budget(percent: float) -> None:
    """Every call fails and asks for retries until it gets none: the worst there can be."""
    state = ClusterState()
    budget = budget_of(RetryBudget(percent, 0), None, state)
    assert budget is not None
    state.requests = 1000
    while budget.admits(0.0):
        state.retries += 1
    firsts = state.requests - state.retries
    assert state.retries <= firsts * percent / 100 + 1
