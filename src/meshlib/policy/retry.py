"""Once more? Judges the outcome of an attempt and says how long to wait before the next.

Entered only after an attempt has failed, so a call that goes well pays nothing for it. tenacity gives the vocabulary:
a policy is its `stop`, `wait` and `retry` strategies, asked through a RetryCallState; Envoy gives the meaning.
https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_filters/router_filter#x-envoy-retry-on
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from meshlib.model import Outcome, RetryPolicy

if TYPE_CHECKING:
    import tenacity

# Why an attempt brought no response head. Names after Envoy's retry_on where it has one.
CONNECT_FAILURE = "connect-failure"
"""No connection, so the server has seen nothing."""
REFUSED_STREAM = "refused-stream"
"""The server said that it has not processed the request (HTTP/2 REFUSED_STREAM, GOAWAY)."""
RESET_BEFORE_REQUEST = "reset-before-request"
"""The connection ended before the request's head was written in full."""
RESET = "reset"
"""The connection ended after the request was sent, before a response's head."""
TIMEOUT = "timeout"
"""The attempt's own timeout passed."""
CLIENT_TIMEOUT = "client-timeout"
"""A timeout that the application set on its client passed; the application's word is final."""
LOCAL = "local"
"""The client library refused the request; another try would end the same."""

_UNSEEN = frozenset({CONNECT_FAILURE, REFUSED_STREAM, RESET_BEFORE_REQUEST})
_FAILED = _UNSEEN | {RESET, TIMEOUT}
_ON_STATUS: dict[str, frozenset[int]] = {
    "5xx": frozenset(range(500, 600)),
    "gateway-error": frozenset({502, 503, 504}),
    "retriable-4xx": frozenset({409}),
}
_ON_FAILURE: dict[str, frozenset[str]] = {
    "5xx": _FAILED,
    "gateway-error": _FAILED,
    "reset": _FAILED,
    CONNECT_FAILURE: frozenset({CONNECT_FAILURE}),
    REFUSED_STREAM: frozenset({REFUSED_STREAM}),
    RESET_BEFORE_REQUEST: frozenset({CONNECT_FAILURE, RESET_BEFORE_REQUEST}),
}
_ON_GRPC = {
    "cancelled": "1",
    "deadline-exceeded": "4",
    "resource-exhausted": "8",
    "internal": "13",
    "unavailable": "14",
}

_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})  # RFC 9110, 9.2.2


class Retrying:
    """A RetryPolicy, compiled. Immutable; shared by all calls on its routes."""

    __slots__ = ("_failures", "_grpc", "_statuses", "_tenacity", "policy")

    def __init__(self, policy: RetryPolicy, rng: random.Random) -> None:
        import tenacity

        class Backoff(tenacity.wait.wait_base):
            """Retry n waits for a random part of (2^n - 1) * base, at most max (Envoy's JitteredExponentialBackOff).
            tenacity's wait_random_exponential would allow 2^(n-1) * base."""

            def __call__(self, retry_state: tenacity.RetryCallState) -> float:
                ceiling: float = (2**retry_state.attempt_number - 1) * policy.base_interval
                return rng.random() * min(ceiling, policy.max_interval)

        self.policy = policy
        self._statuses = policy.status_codes.union(*(_ON_STATUS.get(name, frozenset()) for name in policy.on))
        self._failures = frozenset[str]().union(*(_ON_FAILURE.get(name, frozenset()) for name in policy.on))
        self._grpc = frozenset(_ON_GRPC[name] for name in policy.on if name in _ON_GRPC)
        self._tenacity = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(policy.attempts + 1),
            wait=Backoff(),
            retry=tenacity.retry_if_result(self.is_retriable),
        )

    def begin(self) -> tenacity.RetryCallState:
        """The bookkeeping of one call's tries, made when its first try has failed."""
        import tenacity

        return tenacity.RetryCallState(self._tenacity, None, (), {})

    def again(self, tries: tenacity.RetryCallState, outcome: Outcome, method: str, resend: bool) -> float | None:
        """Seconds to wait before the next try, or None when `outcome` stands.

        resend: the caller vouches that the request may reach the server twice, whatever its method.
        """
        if not outcome.replayable:
            return None
        if method not in _IDEMPOTENT and outcome.failure not in _UNSEEN and not resend:
            # Istio resends here, a complaint as old as Istio (istio/istio#13851). A POST that may have been carried
            # out is not sent again unless its sender says that it may be.
            return None
        tries.set_result(outcome)
        strategies: Any = self._tenacity
        if not strategies.retry(tries) or strategies.stop(tries):
            return None
        pause = float(strategies.wait(tries))
        tries.prepare_for_next_attempt()
        return pause

    def is_retriable(self, outcome: Outcome) -> bool:
        """Whether the conditions name this outcome. Asked after every attempt, so it is cheap for the good ones."""
        if outcome.status is None:
            return outcome.failure in self._failures
        if outcome.status in self._statuses:
            return True
        if outcome.status == 200 and self._grpc and outcome.headers is not None:
            # A gRPC error without a message has its status in the head ("trailers-only").
            return outcome.headers.get("grpc-status") in self._grpc
        return False

    def __repr__(self) -> str:
        return f"<Retrying {self.policy.attempts} on {','.join(sorted(self.policy.on))}>"
