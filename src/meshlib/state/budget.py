"""May a call be tried again? Budgets that keep retries from multiplying the load of a service that is down.

Asked with the cluster's lock held; the clock comes in as an argument. Neither can go below nothing.
"""

from __future__ import annotations

from typing import Protocol

from meshlib.model import RateBudget, RetryBudget
from meshlib.state.counters import ClusterState


class Budget(Protocol):
    """began: a call has begun. admits: whether one more retry may go out now; if so, it is spent."""

    def began(self, now: float) -> None: ...
    def admits(self, now: float) -> bool: ...


class ShareBudget:
    """Retries in flight may be so many percent of the calls in flight that are not themselves retrying.

    Envoy counts retries among the requests, so that its 20 percent allow a quarter more load while tries are long. Here
    20 percent are 20 percent: a service that is down sees at most 1.2 times the calls.
    """

    __slots__ = ("_rules", "_state")

    def __init__(self, rules: RetryBudget, state: ClusterState) -> None:
        self._rules, self._state = rules, state

    def began(self, now: float) -> None: ...

    def admits(self, now: float) -> bool:
        state, rules = self._state, self._rules
        firsts = state.requests - state.retries
        return state.retries < max(rules.min_concurrency, int(firsts * rules.percent / 100))


class RetriesBudget:
    """A plain limit of retries in flight (Envoy's max_retries)."""

    __slots__ = ("_most", "_state")

    def __init__(self, most: int, state: ClusterState) -> None:
        self._most, self._state = most, state

    def began(self, now: float) -> None: ...

    def admits(self, now: float) -> bool:
        return self._state.retries < self._most


class TokenBudget:
    """Linkerd's, after Finagle's RetryBudget and tower's retry/budget: each call deposits `ratio` of a retry, and
    `min_per_second` come for free; what is not spent within `ttl` is lost.

    Deposits are kept in ten slots of a tenth of the ttl each, the oldest of which is spent first.
    """

    __slots__ = ("_at", "_reserve", "_reserve_at", "_rules", "_slots", "_width")

    _SLOTS = 10

    def __init__(self, rules: RateBudget) -> None:
        self._rules = rules
        self._width = rules.ttl / self._SLOTS
        self._slots = [0.0] * self._SLOTS
        self._at = 0
        self._reserve = rules.min_per_second
        """What comes for free: at most a second's worth at a time."""
        self._reserve_at = 0.0

    def began(self, now: float) -> None:
        self._expire(now)
        self._slots[self._at % self._SLOTS] += self._rules.ratio

    def admits(self, now: float) -> bool:
        self._expire(now)
        rate = self._rules.min_per_second
        self._reserve = min(rate, self._reserve + max(0.0, now - self._reserve_at) * rate)
        self._reserve_at = now
        if self._reserve >= 1.0 - 1e-9:
            self._reserve = max(0.0, self._reserve - 1.0)
            return True
        if sum(self._slots) < 1.0 - 1e-9:  # a sum of tenths is a hair less than 1
            return False
        left = 1.0
        for age in range(self._SLOTS - 1, -1, -1):
            slot = (self._at - age) % self._SLOTS
            spent = min(left, self._slots[slot])
            self._slots[slot] -= spent
            left -= spent
        return True

    def _expire(self, now: float) -> None:
        at = int(now / self._width)
        for old in range(max(self._at + 1, at - self._SLOTS + 1), at + 1):
            self._slots[old % self._SLOTS] = 0.0
        self._at = max(self._at, at)

    def __repr__(self) -> str:
        return f"<TokenBudget {sum(self._slots):.1f} retries deposited>"


def budget_of(rules: RetryBudget | RateBudget | None, max_retries: int | None, state: ClusterState) -> Budget | None:
    """None where nothing limits retries. A budget overrides max_retries (Envoy)."""
    if isinstance(rules, RateBudget):
        return TokenBudget(rules)
    if rules is not None:
        return ShareBudget(rules, state)
    return None if max_retries is None else RetriesBudget(max_retries, state)
