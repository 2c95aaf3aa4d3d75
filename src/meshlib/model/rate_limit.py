"""How many calls may come, or go, in which time? Token buckets, as Envoy's local rate limit filter has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KeyKind = Literal["header", "principal", "address", "method", "path"]


@dataclass(frozen=True, slots=True)
class LimitKey:
    """What tells callers apart. header: the value of `name`. principal: the verified identity. address: the peer's IP
    address. path: without its query."""

    kind: KeyKind
    name: str = ""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A bucket holds `tokens` at most, is full at first, and gets `per_fill` more in each `interval` seconds,
    evenly; a call takes one, or is answered 429.

    name: for logs and metrics. keys: each combination of their values has a bucket of its own; a call without one of
    them is not limited. methods: () is all. path_prefix: "" is all. answers: X-RateLimit-* headers on every response.
    shadow: decides and counts, and lets the call go on. origin: the object and its file.
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
