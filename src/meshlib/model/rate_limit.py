"""How many calls may come, or go, in which time? Token buckets of this process, as Envoy's local rate limit filter has
them, and quotas that somebody counts for all processes together.
"""

from __future__ import annotations

from typing import Literal

from meshlib.model.route import HeaderMatch
from meshlib.model.values import dataclass

KeyKind = Literal["header", "principal", "address", "method", "path", "value", "match"]
QuotaKind = Literal["redis", "envoy"]


@dataclass(frozen=True, slots=True)
class LimitKey:
    """What tells callers apart: one entry of a descriptor (Envoy's word).

    kind: `header`: the value of `name`, which may be `:path` (with its query), `:method` or `:authority`. `principal`:
    the verified identity. `address`: the peer's IP address, or whom trusted
    proxies name, at a gateway. `path`: without its query. `value`: the same for all calls.
    `match`: the same for all calls whose headers fit `headers`, or don't where `invert`.
    value: of the last two; of the others the only one that is concerned, "" is any. entry: what a rate limit service
    knows it by. optional: a call without it is described by the other entries alone.
    """

    kind: KeyKind
    name: str = ""
    entry: str = ""
    value: str = ""
    optional: bool = False
    headers: tuple[HeaderMatch, ...] = ()
    invert: bool = False


@dataclass(frozen=True, slots=True)
class LimitAnswer:
    """What a call beyond a limit is told. grpc_status: of a gRPC call. headers: added to the answer."""

    status: int = 429
    grpc_status: int = 8
    headers: tuple[tuple[str, str], ...] = ()


TOO_MANY = LimitAnswer()


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A bucket holds `tokens` at most, is full at first, and gets `per_fill` more in each `interval` seconds,
    evenly; a call takes one, or is answered 429.

    name: for logs and metrics. keys: each combination of their values has a bucket of its own; a call without one of
    them is not limited. methods: () is all. path_prefix: "" is all. answers: X-RateLimit-* headers on every response.
    shadow: decides and counts, and lets the call go on. origin: the object and its file.
    port: that the call came in by; 0 is all. hosts: that it was made for (`*.example.com` too); () is all.
    otherwise: it holds only for calls that no limit of the same origin before it concerns.
    """

    name: str
    tokens: int
    per_fill: int
    interval: float
    keys: tuple[LimitKey, ...] = ()
    methods: tuple[str, ...] = ()
    path_prefix: str = ""
    answers: bool = False
    shadow: bool = False
    origin: str = ""
    port: int = 0
    hosts: tuple[str, ...] = ()
    otherwise: bool = False
    answer: LimitAnswer = TOO_MANY


@dataclass(frozen=True, slots=True)
class QuotaService:
    """Who counts for all processes together.

    kind: `redis`, by the library `limits`, or `envoy`, a service that speaks envoy.service.ratelimit.v3. address: a URL
    (`redis://host:6379/0`), or host:port of the gRPC server, a name of the mesh or of DNS. domain: for the latter.
    route_configuration: that leads to it, where a gateway asks, which knows no other names; "" is by the address alone.
    timeout: of one question, seconds. denies_on_failure: without an answer a call is turned away with
    `status_on_failure`; otherwise it goes on.
    """

    kind: QuotaKind
    address: str
    domain: str = ""
    timeout: float = 0.1
    denies_on_failure: bool = False
    status_on_failure: int = 500
    route_configuration: str = ""

    def __str__(self) -> str:
        """Without a password."""
        scheme, mark, rest = self.address.rpartition("://")
        return f"{scheme}{mark}{rest.rpartition('@')[2]}{f' domain {self.domain}' if self.domain else ''}"


@dataclass(frozen=True, slots=True)
class Quota:
    """A limit whose count all processes share.

    descriptors: what is counted. For Redis exactly one: each combination of its values has `requests` in a sliding
    window of `interval` whole seconds. A rate limit service is told all that a call has every entry of, and knows
    itself how many are too many (`requests` 0). hits: how many each call counts for. Everything else as in RateLimit;
    `answers` shows the service's own headers on good answers too.
    """

    name: str
    service: QuotaService
    descriptors: tuple[tuple[LimitKey, ...], ...] = ((),)
    requests: int = 0
    interval: int = 1
    hits: int = 1
    methods: tuple[str, ...] = ()
    path_prefix: str = ""
    answers: bool = False
    shadow: bool = False
    origin: str = ""
    port: int = 0
    hosts: tuple[str, ...] = ()
    answer: LimitAnswer = TOO_MANY
