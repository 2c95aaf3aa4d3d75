"""Once more? Judges the outcome of an attempt and says how long to wait before the next.

Entered only after an attempt has failed, so a call that goes well pays nothing for it. tenacity gives the vocabulary:
a policy is its `stop`, `wait` and `retry` strategies, asked through a RetryCallState; Envoy gives the meaning.
https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_filters/router_filter#x-envoy-retry-on
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from meshlib.model import HeaderView, Outcome, RetryPolicy
from meshlib.policy.matching import compile_header

if TYPE_CHECKING:
    import tenacity

    from meshlib.policy.backoff import Tries

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
CONDITIONS = frozenset(
    {*_ON_STATUS, *_ON_FAILURE, *_ON_GRPC, "retriable-status-codes", "retriable-headers", "envoy-ratelimited"}
)
"""Every condition that `RetryPolicy.on` may name."""

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})  # RFC 9110, 9.2.2

# What a caller asks for on its own request (Envoy's router takes these from its own service, too).
RETRY_ON = "x-envoy-retry-on"
MAX_RETRIES = "x-envoy-max-retries"
RETRIABLE_STATUS_CODES = "x-envoy-retriable-status-codes"
_NO_POLICY = RetryPolicy(attempts=1, on=frozenset(), host_selection_attempts=0)  # Envoy's num_retries


class Retrying:
    """A RetryPolicy, compiled. Immutable; shared by all calls on its routes."""

    __slots__ = (
        "_failures",
        "_grpc",
        "_headers",
        "_ratelimited",
        "_reads_heads",
        "_rng",
        "_statuses",
        "_tenacity",
        "_wall_clock",
        "policy",
    )

    def __init__(self, policy: RetryPolicy, rng: random.Random, wall_clock: Callable[[], float] = time.time) -> None:
        """wall_clock: seconds since 1970, for servers that name a point in time."""
        self.policy = policy
        self._rng, self._wall_clock = rng, wall_clock
        on = policy.on
        self._statuses = policy.status_codes.union(*(_ON_STATUS.get(name, frozenset()) for name in on))
        self._failures = frozenset[str]().union(*(_ON_FAILURE.get(name, frozenset()) for name in on))
        self._grpc = frozenset(_ON_GRPC[name] for name in on if name in _ON_GRPC)
        self._headers: tuple[Callable[[HeaderView], bool], ...] = ()
        if "retriable-headers" in on:
            self._headers = tuple(compile_header(each) for each in policy.retriable_headers)
        self._ratelimited = "envoy-ratelimited" in on
        self._reads_heads = bool(self._grpc or self._headers or self._ratelimited)
        self._tenacity: tenacity.Retrying | None = None

    def begin(self) -> Tries:
        """The bookkeeping of one call's tries, made when its first try has failed."""
        from meshlib.policy.backoff import Tries

        return Tries(self._strategies())

    def _strategies(self) -> tenacity.Retrying:
        """Made when they are needed first: tenacity takes its time to load, and a process may never have to retry."""
        if self._tenacity is None:
            import tenacity

            from meshlib.policy.backoff import Backoff, StopOnPushback

            self._tenacity = tenacity.Retrying(
                stop=tenacity.stop_after_attempt(self.policy.attempts + 1) | StopOnPushback(),
                wait=Backoff(self.policy, self._rng, self._wall_clock),
                retry=tenacity.retry_if_result(self.is_retriable),
            )
        return self._tenacity

    def again(self, tries: Tries, outcome: Outcome, method: str, resend: bool) -> float | None:
        """Seconds to wait before the next try, or None when `outcome` stands.

        resend: the caller vouches that the request may reach the server twice, whatever its method.
        """
        if not outcome.replayable:
            return None
        if not may_be_resent(method, outcome, resend or self.policy.resend_unsafe):
            return None
        tries.set_result(outcome)
        strategies: Any = self._strategies()
        if not strategies.retry(tries) or strategies.stop(tries):
            return None
        pause = float(strategies.wait(tries))
        tries.prepare_for_next_attempt()
        return pause

    def is_retriable(self, outcome: Outcome) -> bool:
        """Whether the conditions name this outcome. Asked after every attempt, so it is cheap for the good ones."""
        if outcome.status is None:
            return outcome.failure in self._failures
        # Envoy's conditions on the HTTP status see the 200 that every gRPC status comes with.
        named = outcome.status in self._statuses and outcome.grpc_status is None
        if not named and not self._reads_heads:
            return False
        headers = outcome.headers
        if headers is None:
            return named
        if not named and self._grpc:
            # A gRPC error without a message has its status in the head ("trailers-only").
            named = headers.get("grpc-status") in self._grpc
        if not named and self._headers:
            named = any(fits(headers) for fits in self._headers)
        if (named or self._ratelimited) and headers.get("x-envoy-ratelimited") is not None:
            # Envoy: a rate limit's answer is retried by this condition alone, whatever else its status would mean.
            return self._ratelimited
        return named

    def __repr__(self) -> str:
        return f"<Retrying {self.policy.attempts} on {','.join(sorted(self.policy.on))}>"


def may_be_resent(method: str, outcome: Outcome, resend: bool) -> bool:
    """Istio resends whatever it can, a complaint as old as Istio (istio/istio#13851). A POST that may have been carried
    out is not sent again unless its sender says that it may be.

    Every gRPC call is a POST. There the server itself has said that it failed, before its first message, and the policy
    names that very status: it is sent again, as gRPC does (gRFC A6)."""
    return method in IDEMPOTENT or outcome.failure in _UNSEEN or resend or outcome.grpc_status is not None


def asked_for(headers: HeaderView, configured: Retrying | None, rng: random.Random) -> Retrying | None:
    """The policy in force for a request that has failed: the route's, changed by what the request's own headers say.

    As in Envoy: x-envoy-retry-on adds conditions, x-envoy-max-retries replaces the number (0 is none), and names that
    are not known mean nothing.
    """
    on = headers.get(RETRY_ON)
    if on is None and configured is None:
        return None
    maximum = headers.get(MAX_RETRIES)
    if on is None and maximum is None:
        return configured
    policy = _NO_POLICY if configured is None else configured.policy
    conditions = policy.on | (CONDITIONS.intersection(name.strip() for name in on.split(",")) if on else frozenset())
    codes = policy.status_codes
    if "retriable-status-codes" in conditions and (more := headers.get(RETRIABLE_STATUS_CODES)) is not None:
        codes |= {int(code) for code in map(str.strip, more.split(",")) if code.isascii() and code.isdigit()}
    attempts = policy.attempts
    if maximum is not None and maximum.isascii() and maximum.isdigit():
        attempts = min(int(maximum), 1000)
    if attempts == 0 or not conditions:
        return None
    return Retrying(replace(policy, on=conditions, status_codes=codes, attempts=attempts), rng)
