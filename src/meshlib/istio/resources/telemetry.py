"""What does Telemetry hold?

Source: istio.io/api, telemetry/v1.
"""

from __future__ import annotations

from typing import Literal

from meshlib.istio.resources.base import IstioStruct, Percent100, Unsupported
from meshlib.istio.resources.networking import WorkloadSelector
from meshlib.istio.resources.security import TargetRef

TelemetryMode = Literal["CLIENT_AND_SERVER", "CLIENT", "SERVER"]


class TelemetryMatch(IstioStruct, frozen=True):
    mode: TelemetryMode = "CLIENT_AND_SERVER"


class ProviderRef(IstioStruct, frozen=True):
    name: str


class LiteralTag(IstioStruct, frozen=True):
    value: str


class NamedTag(IstioStruct, frozen=True):
    name: str
    default_value: str = ""


class CustomTag(IstioStruct, frozen=True):
    literal: LiteralTag | None = None
    environment: NamedTag | None = None
    header: NamedTag | None = None
    formatter: LiteralTag | None = None


class Tracing(IstioStruct, frozen=True):
    match: TelemetryMatch | None = None
    providers: list[ProviderRef] = []
    random_sampling_percentage: Percent100 | None = None
    disable_span_reporting: bool | None = None
    custom_tags: dict[str, CustomTag] = {}
    enable_istio_tags: bool | None = None
    use_request_id_for_trace_sampling: bool | None = None
    disable_context_propagation: bool | None = None


class MetricSelector(IstioStruct, frozen=True):
    metric: Literal[
        "",
        "ALL_METRICS",
        "REQUEST_COUNT",
        "REQUEST_DURATION",
        "REQUEST_SIZE",
        "RESPONSE_SIZE",
        "TCP_OPENED_CONNECTIONS",
        "TCP_CLOSED_CONNECTIONS",
        "TCP_SENT_BYTES",
        "TCP_RECEIVED_BYTES",
        "GRPC_REQUEST_MESSAGES",
        "GRPC_RESPONSE_MESSAGES",
    ] = ""
    custom_metric: str = ""
    mode: TelemetryMode = "CLIENT_AND_SERVER"


class TagOverride(IstioStruct, frozen=True):
    operation: Literal["UPSERT", "REMOVE"] = "UPSERT"
    value: str = ""


class MetricsOverride(IstioStruct, frozen=True):
    match: MetricSelector | None = None
    disabled: bool | None = None
    tag_overrides: dict[str, TagOverride] = {}


class TelemetryMetrics(IstioStruct, frozen=True):
    providers: list[ProviderRef] = []
    overrides: list[MetricsOverride] = []
    reporting_interval: Unsupported = None


class AccessLogFilter(IstioStruct, frozen=True):
    expression: str = ""


class AccessLogging(IstioStruct, frozen=True):
    match: TelemetryMatch | None = None
    providers: list[ProviderRef] = []
    disabled: bool | None = None
    filter: AccessLogFilter | None = None


class Telemetry(IstioStruct, frozen=True):
    selector: WorkloadSelector | None = None
    target_ref: TargetRef | None = None
    target_refs: list[TargetRef] = []
    tracing: list[Tracing] = []
    metrics: list[TelemetryMetrics] = []
    access_logging: list[AccessLogging] = []
