"""Is this one call too many? RateLimits compiled, with their buckets, for calls that go out and calls that come in.

Every limit that concerns a call takes a token, in the order in which they are written, until one has none left. One in
shadow mode only counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from meshlib.model import Peer, RateLimit, Request
from meshlib.state.token_bucket import Buckets

BODY = b"local_rate_limited"
"""Envoy's words."""
Pairs = tuple[tuple[str, str], ...]


class Limited(NamedTuple):
    """One too many. headers: of the answer 429."""

    limit: RateLimit
    headers: Pairs
    reason: str


class Taken(NamedTuple):
    """headers: X-RateLimit-*, for the response, where the limit asks for them."""

    headers: Pairs


class Limiter:
    """Asked by any thread. Its buckets live as long as their limits say the same."""

    __slots__ = ("_limits",)

    def __init__(self, limits: Iterable[RateLimit], previous: Limiter | None = None) -> None:
        known: dict[RateLimit, Buckets] = dict(previous._limits) if previous is not None else {}
        self._limits: tuple[tuple[RateLimit, Buckets], ...] = tuple(
            (limit, known.get(limit) or Buckets(limit.tokens, limit.per_fill, limit.interval)) for limit in limits
        )

    def take(self, request: Request, peer: Peer | None, now: float) -> Limited | Taken | None:
        """None: the call may go on, and nothing is to be said about it. peer: who calls; None for this process's own
        calls. now: monotonic seconds."""
        headers: Pairs = ()
        for limit, buckets in self._limits:
            if limit.methods and request.method not in limit.methods:
                continue
            if limit.path_prefix and not request.path.startswith(limit.path_prefix):
                continue
            key = _key(limit, request, peer) if limit.keys else ()
            if key is None:
                continue
            taken, left, seconds = buckets.take(key, now)
            told = limit.answers or not taken
            if told and not limit.shadow:
                headers = _told(limit, left, seconds)
            if not taken and not limit.shadow:
                return Limited(limit, (*headers, ("retry-after", str(max(1, math.ceil(seconds))))), _reason(limit))
        return Taken(headers) if headers else None

    def counts(self) -> list[tuple[RateLimit, int, int]]:
        """(limit, allowed, limited) each; a limit in shadow mode has limited nobody, and says how many it would."""
        return [(limit, buckets.allowed, buckets.limited) for limit, buckets in self._limits]

    def __bool__(self) -> bool:
        return bool(self._limits)

    def __repr__(self) -> str:
        return f"<Limiter {', '.join(f'{limit.name} {buckets!r}' for limit, buckets in self._limits)}>"


def _key(limit: RateLimit, request: Request, peer: Peer | None) -> tuple[str, ...] | None:
    found = []
    for part in limit.keys:
        value: str | None
        if part.kind == "header":
            value = request.headers.get(part.name)
        elif part.kind == "principal":
            value = peer.identity.uri if peer is not None and peer.identity is not None else None
        elif part.kind == "address":
            value = peer.address if peer is not None else None
        elif part.kind == "method":
            value = request.method
        else:
            value = request.path.partition("?")[0]
        if not value:
            return None
        found.append(value)
    return tuple(found)


def _told(limit: RateLimit, left: int, seconds: float) -> Pairs:
    """The headers of draft 3 (draft-polli-ratelimit-headers-03), as Envoy sends them."""
    window = f"{limit.tokens}, {limit.tokens};w={max(1, math.ceil(limit.interval))}"
    return (
        ("x-ratelimit-limit", window),
        ("x-ratelimit-remaining", str(left)),
        ("x-ratelimit-reset", str(math.ceil(seconds))),
    )


def _reason(limit: RateLimit) -> str:
    said = f"{limit.name}: more than {limit.tokens} at once, or {limit.per_fill} in {limit.interval:g} s"
    return f"{said} ({limit.origin})" if limit.origin else said
