"""Is this one call too many? Limits compiled, with their buckets, for calls that go out and calls that come in.

Every limit that concerns a call takes a token, in the order in which they are written, until one has none left; then
the quotas are asked that others count, in their order. So who is turned away here costs nobody a question. One in
shadow mode only counts.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Hashable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from meshlib.model import Peer, Quota, QuotaService, RateLimit, Request
from meshlib.model.values import dataclass
from meshlib.policy.descriptors import Describe, compile_concerns, compile_key
from meshlib.policy.quota import Answer, Pairs, Question
from meshlib.state.quota import QuotaUse
from meshlib.state.token_bucket import Buckets

BODY = b"local_rate_limited"
"""Envoy's words."""
RATELIMITED = ("x-envoy-ratelimited", "true")
"""Of every 429 by a limit, so that who retries knows whose it is (Envoy)."""


class Limited(NamedTuple):
    """One too many, or nobody there to say that it is not. headers: of the answer; flag, details: Envoy's."""

    limit: RateLimit | Quota
    reason: str
    status: int
    headers: Pairs
    body: bytes = BODY
    flag: str = "RL"
    details: str = "local_rate_limited"
    grpc_status: int = 8


class Taken(NamedTuple):
    """It may go on. headers: for the response. request_headers: for whoever serves it."""

    headers: Pairs
    request_headers: Pairs = ()


Asking = Generator[Question, Answer | None, "Limited | Taken | None"]


@dataclass(frozen=True, slots=True)
class Use:
    """How much of a limit is used, by this process. failed: questions that nobody answered. remaining: in a bucket
    that all calls share, or by the last answer; None is unknown."""

    limit: RateLimit | Quota
    allowed: int
    limited: int
    failed: int = 0
    remaining: int | None = None


class _Bucketed:
    """One RateLimit, compiled."""

    __slots__ = ("buckets", "concerns", "limit", "readers")

    def __init__(self, limit: RateLimit, buckets: Buckets) -> None:
        self.limit, self.buckets = limit, buckets
        self.concerns = compile_concerns(limit)
        self.readers = tuple(compile_key(key) for key in limit.keys)

    def key(self, request: Request, peer: Peer | None) -> tuple[str, ...] | None:
        """Whose bucket it is; None when the call is none that the limit is for."""
        if self.concerns is not None and not self.concerns(request, peer):
            return None
        found = []
        for read in self.readers:
            value = read(request, peer)
            if value is None:
                return None
            found.append(value)
        return tuple(found)


class _Asked:
    """One Quota, compiled."""

    __slots__ = ("concerns", "describe", "quota", "use")

    def __init__(self, quota: Quota, use: QuotaUse) -> None:
        self.quota, self.use = quota, use
        self.concerns = compile_concerns(quota)
        self.describe = tuple(Describe(keys) for keys in quota.descriptors)

    def question(self, request: Request, peer: Peer | None) -> Question | None:
        """None when there is nothing to ask about this call."""
        if self.concerns is not None and not self.concerns(request, peer):
            return None
        found = tuple(each for describe in self.describe if (each := describe(request, peer)) is not None)
        return Question(self.quota, found) if found else None


class Limiter:
    """Asked by any thread. Buckets and counts live as long as their limits say the same, wherever it is written."""

    __slots__ = ("_asked", "_bucketed", "asks", "known")

    def __init__(
        self,
        limits: Iterable[RateLimit],
        quotas: Iterable[Quota] = (),
        known: Mapping[Hashable, Buckets | QuotaUse] | None = None,
    ) -> None:
        """known: of the Limiter that this one follows."""
        before = known or {}
        self.known: dict[Hashable, Buckets | QuotaUse] = {}
        bucketed, asked = [], []
        for limit in limits:
            name = self._name(limit)
            found = before.get(name)
            buckets = found if isinstance(found, Buckets) else Buckets(limit.tokens, limit.per_fill, limit.interval)
            self.known[name] = buckets
            bucketed.append(_Bucketed(limit, buckets))
        for quota in quotas:
            name = self._name(quota)
            found = before.get(name)
            use = found if isinstance(found, QuotaUse) else QuotaUse()
            self.known[name] = use
            asked.append(_Asked(quota, use))
        self._bucketed, self._asked = tuple(bucketed), tuple(asked)
        self.asks = bool(asked)
        """Whether a decision may take I/O: then `asking` has to be run, not `take`."""

    def _name(self, limit: RateLimit | Quota) -> Hashable:
        """What makes a limit the one it was: all that it says, but not where that is written."""
        same, number = replace(limit, origin=""), 0
        while (same, number) in self.known:
            number += 1
        return same, number

    def take(self, request: Request, peer: Peer | None, now: float) -> Limited | Taken | None:
        """What this process itself counts. None: the call may go on, and nothing is to be said about it. peer: who
        calls; None for this process's own calls. now: monotonic seconds."""
        headers: Pairs = ()
        least = -1  # what is left of the limit that is told: the one that is nearest to its end
        concerned = ""  # the origin of the last limit that was asked
        for each in self._bucketed:
            limit = each.limit
            if limit.otherwise and concerned == limit.origin:
                continue
            key = each.key(request, peer)
            if key is None:
                continue
            concerned = limit.origin
            taken, left, seconds = each.buckets.take(key, now)
            if not limit.shadow and (not taken or (limit.answers and (least < 0 or left < least))):
                least, headers = left, _told(limit.tokens, max(1, math.ceil(limit.interval)), left, seconds)
            if not taken and not limit.shadow:
                return Limited(
                    limit,
                    _reason(limit),
                    limit.answer.status,
                    (RATELIMITED, *headers, *_retry_after(seconds), *limit.answer.headers),
                    grpc_status=limit.answer.grpc_status,
                )
        return Taken(headers) if headers else None

    def asking(self, request: Request, peer: Peer | None, now: float) -> Asking:
        """`take`, and the quotas after it."""
        found = self.take(request, peer, now)
        if isinstance(found, Limited):
            return found
        headers: Pairs = found.headers if found is not None else ()
        added: Pairs = ()
        for each in self._asked:
            question = each.question(request, peer)
            if question is None:
                continue
            quota = each.quota
            answer = yield question
            each.use.count(answer)
            if quota.shadow:
                continue
            if answer is None:
                if quota.service.denies_on_failure:
                    return _unanswered(quota)
                continue
            told = answer.response_headers
            if answer.limit and (quota.answers or answer.is_over):
                told = (*_told(answer.limit, answer.window, answer.remaining, answer.reset), *told)
            if answer.is_over:
                said = (RATELIMITED, *told, *(_retry_after(answer.reset) if answer.limit else ()))
                return _over(quota, answer, (*said, *quota.answer.headers))
            headers, added = (*headers, *told), (*added, *answer.request_headers)
        return Taken(headers, added) if headers or added else None

    @property
    def services(self) -> list[QuotaService]:
        """Who is asked."""
        return [each.quota.service for each in self._asked]

    def uses(self) -> list[Use]:
        """Of all limits, in their order. One in shadow mode has limited nobody, and says how many it would."""
        buckets = [
            Use(
                each.limit,
                each.buckets.allowed,
                each.buckets.limited,
                remaining=None if each.readers else each.buckets.left,
            )
            for each in self._bucketed
        ]
        return buckets + [
            Use(each.quota, each.use.allowed, each.use.limited, each.use.failed, each.use.remaining)
            for each in self._asked
        ]

    def __bool__(self) -> bool:
        return bool(self._bucketed or self._asked)

    def __repr__(self) -> str:
        told = [f"{each.limit.name} {each.buckets!r}" for each in self._bucketed]
        return f"<Limiter {', '.join(told + [f'{each.quota.name} {each.use!r}' for each in self._asked])}>"


def _told(limit: int, window: int, left: int, seconds: float) -> Pairs:
    """The headers of draft 3 (draft-polli-ratelimit-headers-03), as Envoy sends them."""
    return (
        ("x-ratelimit-limit", f"{limit}, {limit};w={window}"),
        ("x-ratelimit-remaining", str(left)),
        ("x-ratelimit-reset", str(math.ceil(seconds))),
    )


def _retry_after(seconds: float) -> Pairs:
    return (("retry-after", str(max(1, math.ceil(seconds)))),)


def _reason(limit: RateLimit) -> str:
    said = f"{limit.name}: more than {limit.tokens} at once, or {limit.per_fill} in {limit.interval:g} s"
    return f"{said} ({limit.origin})" if limit.origin else said


def _over(quota: Quota, answer: Answer, headers: Pairs) -> Limited:
    said = f"{quota.name}: over the limit, says {quota.service}"
    reason = f"{said} ({quota.origin})" if quota.origin else said
    told = quota.answer
    return Limited(quota, reason, told.status, headers, answer.body, "RL", "request_rate_limited", told.grpc_status)


def _unanswered(quota: Quota) -> Limited:
    """Envoy: no body, and what went wrong in the details."""
    status = quota.service.status_on_failure
    reason = f"{quota.name}: no answer from {quota.service}, and without one it denies"
    unavailable = 14 if status in (429, 502, 503, 504) else 2  # Envoy, Grpc::Utility::httpToGrpcStatus
    return Limited(quota, reason, status, (), b"", "RLSE", "rate_limiter_error", unavailable)
