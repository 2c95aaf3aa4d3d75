"""What are the fields of objects made of? Durations, ports, shares, and how strictly a kind is read.

Istio's kinds refuse unknown fields, as its validation does; Kubernetes' are passed over. A field whose type is
`Unsupported` is valid and has no effect yet: effects.py says so.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta


class Duration:
    """`7s`, `0.5s`, `1h30m`, `250ms`: Go's durations, as Istio's YAML has them. seconds: at least 0."""

    __slots__ = ("seconds",)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and other.seconds == self.seconds

    def __hash__(self) -> int:
        return hash(self.seconds)

    def __repr__(self) -> str:
        return f"Duration({self.seconds:g})"


Unsupported = Any
Port = Annotated[int, Meta(ge=1, le=65535)]
Count = Annotated[int, Meta(ge=0, le=0x7FFFFFFF)]
Percent100 = Annotated[float, Meta(ge=0, le=100)]
Labels = dict[str, str]


class IstioStruct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", omit_defaults=True):
    pass


class KubernetesStruct(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    pass
