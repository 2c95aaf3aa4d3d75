"""How do the values that stand in many messages look? What all encoders share."""

from __future__ import annotations

from typing import Any

from meshlib.model import Locality
from meshlib.xds.reader import Reader

_V3 = 2
_STATE_OF_THE_WORLD, _DELTA = 2, 3


def set_seconds(duration: Any, seconds: float) -> None:
    total = round(seconds * 1_000_000_000)
    duration.seconds, duration.nanos = divmod(total, 1_000_000_000)
    duration.SetInParent()


def set_locality(message: Any, locality: Locality) -> None:
    message.region, message.zone, message.sub_zone = locality.region, locality.zone, locality.subzone


def set_share(fraction: Any, per_million: int) -> None:
    fraction.numerator, fraction.denominator = per_million, 2


def refer(source: Any, reader: Reader) -> None:
    """Where to ask for what is named: on this very stream; an Envoy whose streams have one type each, at the service of
    the other type."""
    source.resource_api_version = _V3
    if not reader.discovery_cluster:
        source.ads.SetInParent()
        return
    service = source.api_config_source
    service.api_type = _DELTA if reader.is_delta else _STATE_OF_THE_WORLD
    service.transport_api_version = _V3
    service.set_node_on_first_message_only = True
    service.grpc_services.add().envoy_grpc.cluster_name = reader.discovery_cluster
