"""How do the values that stand in many messages look? What all encoders share."""

from __future__ import annotations

from typing import Any

from meshlib.model import Locality


def set_seconds(duration: Any, seconds: float) -> None:
    total = round(seconds * 1_000_000_000)
    duration.seconds, duration.nanos = divmod(total, 1_000_000_000)
    duration.SetInParent()


def set_locality(message: Any, locality: Locality) -> None:
    message.region, message.zone, message.sub_zone = locality.region, locality.zone, locality.subzone


def set_share(fraction: Any, per_million: int) -> None:
    fraction.numerator, fraction.denominator = per_million, 2


def ads(source: Any) -> None:
    source.ads.SetInParent()
    source.resource_api_version = 2
