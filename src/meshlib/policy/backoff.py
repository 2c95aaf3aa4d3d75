"""How long until the next try? tenacity's vocabulary, Envoy's and gRPC's numbers.

Imported only once a route has a retry policy; entered only once an attempt has failed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

import tenacity

from meshlib.model import HeaderView, Outcome, ResetHeader, RetryPolicy

PUSHBACK = "grpc-retry-pushback-ms"
_UNIX_TIME = 1_000_000_000
"""2001. A reset header that should be a point in time and is less is a number of seconds: nobody waits 30 years."""


class Tries(tenacity.RetryCallState):
    """The bookkeeping of one call's tries, made when its first try has failed.

    step: the number of the back-off to come; a server's pushback sets it to the first (gRFC A6).
    """

    def __init__(self, strategies: tenacity.Retrying) -> None:
        super().__init__(strategies, None, (), {})
        self.step = 1


class Backoff(tenacity.wait.wait_base):
    """What the server has asked for, else a random part of (2^n - 1) * base, at most max (Envoy's
    JitteredExponentialBackOff; tenacity's wait_random_exponential would allow 2^(n-1) * base)."""

    def __init__(self, policy: RetryPolicy, rng: random.Random, wall_clock: Callable[[], float]) -> None:
        self._policy, self._rng, self._wall_clock = policy, rng, wall_clock

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        assert isinstance(retry_state, Tries)
        outcome = _outcome(retry_state)
        if outcome.headers is not None:
            if (exactly := pushback(outcome)) is not None and exactly >= 0:
                retry_state.step = 1
                return exactly
            interval = reset_interval(self._policy, outcome.headers, self._wall_clock)
            if interval is not None:
                # Envoy's JitteredLowerBoundBackOffStrategy: never before, and not everybody at once.
                return interval * (1 + self._rng.random() / 2)
        ceiling = float((2 ** min(retry_state.step, 64)) - 1) * self._policy.base_interval
        retry_state.step += 1
        return self._rng.random() * min(ceiling, self._policy.max_interval)


class StopOnPushback(tenacity.stop.stop_base):
    """ "If the value for pushback is negative or unparseable, then it will be seen as the server asking the client not
    to retry at all" (gRFC A6)."""

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        asked = pushback(_outcome(retry_state))
        return asked is not None and asked < 0


def pushback(outcome: Outcome) -> float | None:
    """Seconds that a gRPC server asks for, -1 for "not again", None when it says nothing."""
    value = None if outcome.headers is None else outcome.headers.get(PUSHBACK)
    if value is None:
        return None
    return int(value) / 1000 if value.isascii() and value.isdigit() and len(value) < 10 else -1.0


def reset_interval(policy: RetryPolicy, headers: HeaderView, wall_clock: Callable[[], float]) -> float | None:
    """Seconds until the server wants to be asked again: the first header that says so, and no longer than max_reset."""
    for header in policy.reset_headers:
        value = headers.get(header.name)
        seconds = None if value is None else _seconds(header, value.strip(), wall_clock)
        if seconds is not None and 0 <= seconds <= policy.max_reset:
            return seconds
    return None


def _seconds(header: ResetHeader, value: str, wall_clock: Callable[[], float]) -> float | None:
    if value.isascii() and value.isdigit() and len(value) < 16:
        number = int(value)
        return number - wall_clock() if header.form == "unix-timestamp" and number >= _UNIX_TIME else float(number)
    if header.form == "seconds":
        try:
            date = parsedate_to_datetime(value)
            # "GMT" is the only zone that HTTP has; -0000 yields a date without one.
            return (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp() - wall_clock()
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    return None


def _outcome(retry_state: tenacity.RetryCallState) -> Outcome:
    assert retry_state.outcome is not None
    outcome: Any = retry_state.outcome.result()
    assert isinstance(outcome, Outcome)
    return outcome
