"""What do the kinds of meshlib.io hold, which say what a call may need and Istio has no word for?"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from meshlib.istio.resources.base import Count, Duration, IstioStruct, Percent100, Port
from meshlib.istio.resources.networking import WorkloadSelector


class Breaker(IstioStruct, frozen=True):
    consecutive_failures: Count = 0
    failure_rate: Percent100 = 0.0
    slow_call_rate: Percent100 = 0.0
    slow_call: Duration | None = None
    window: Duration | None = None
    minimum_calls: Annotated[int, Meta(ge=1)] | None = None
    open_for: Duration | None = None
    probes: Annotated[int, Meta(ge=1)] | None = None
    forced: Literal["OPEN", "CLOSED"] | None = None


class RateBudget(IstioStruct, frozen=True):
    ratio: Annotated[float, Meta(ge=0, le=1000)] | None = None
    min_per_second: Annotated[float, Meta(ge=0)] | None = None
    ttl: Duration | None = None


class Hedge(IstioStruct, frozen=True):
    delay: Duration
    max_attempts: Annotated[int, Meta(ge=2, le=5)] = 2


class HTTPHealthCheck(IstioStruct, frozen=True):
    path: str = "/"
    host: str = ""
    expected_statuses: list[int | str] = []


class GRPCHealthCheck(IstioStruct, frozen=True):
    service: str = ""


class TCPHealthCheck(IstioStruct, frozen=True):
    pass


class HealthCheck(IstioStruct, frozen=True):
    http: HTTPHealthCheck | None = None
    grpc: GRPCHealthCheck | None = None
    tcp: TCPHealthCheck | None = None
    port: Port | None = None
    interval: Duration | None = None
    timeout: Duration | None = None
    healthy_threshold: Annotated[int, Meta(ge=1)] | None = None
    unhealthy_threshold: Annotated[int, Meta(ge=1)] | None = None


class StatisticalDetection(IstioStruct, frozen=True):
    """Envoy's detectors beyond those that Istio exposes, by the names of model.OutlierDetection."""

    success_rate_enforcing: Annotated[int, Meta(ge=0, le=100)] | None = None
    success_rate_minimum_hosts: Count | None = None
    success_rate_request_volume: Count | None = None
    success_rate_stdev_factor: Annotated[float, Meta(gt=0)] | None = None
    failure_percentage_enforcing: Annotated[int, Meta(ge=0, le=100)] | None = None
    failure_percentage_threshold: Annotated[int, Meta(ge=0, le=100)] | None = None
    failure_percentage_minimum_hosts: Count | None = None
    failure_percentage_request_volume: Count | None = None
    max_ejection_time: Duration | None = None
    max_ejection_jitter: Duration | None = None
    always_eject_one: bool | None = None


class Limit(IstioStruct, frozen=True):
    """One rate limit. keys: `header:NAME`, `principal`, `address`, `method`, `path`."""

    requests: Annotated[int, Meta(ge=1, le=1_000_000_000)]
    per: Duration
    name: str = ""
    burst: Annotated[int, Meta(ge=1, le=1_000_000_000)] | None = None
    keys: list[str] = []
    methods: list[str] = []
    path_prefix: str = ""
    answers: bool = False
    shadow: bool = False


class DescriptorEntry(IstioStruct, frozen=True):
    """One of `from`, as in Limit.keys, and `value`."""

    key: str
    from_: str = msgspec.field(name="from", default="")
    value: str = ""


class QuotaRule(IstioStruct, frozen=True):
    """One of `redis`, a URL, with requests, per and keys; and `service`, host:port, with domain and descriptors."""

    name: str = ""
    redis: str = ""
    service: str = ""
    requests: Annotated[int, Meta(ge=1, le=1_000_000_000)] | None = None
    per: Duration | None = None
    keys: list[str] = []
    domain: str = ""
    descriptors: list[list[DescriptorEntry]] = []
    hits: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    timeout: Duration | None = None
    failure_mode_deny: bool = False
    methods: list[str] = []
    path_prefix: str = ""
    answers: bool = False
    shadow: bool = False


class RateLimitPolicy(IstioStruct, frozen=True):
    limits: list[Limit] = []
    selector: WorkloadSelector | None = None
    quotas: list[QuotaRule] = []


class BackendTrafficPolicy(IstioStruct, frozen=True):
    host: str
    subset: str = ""
    breaker: Breaker | None = None
    retry_budget: RateBudget | None = None
    hedge: Hedge | None = None
    load_balancer: Literal["PEAK_EWMA", "CLIENT_SIDE_WEIGHTED_ROUND_ROBIN"] | None = None
    health_checks: list[HealthCheck] = []
    outlier_detection: StatisticalDetection | None = None
    resend_unsafe: bool | None = None
    rate_limits: list[Limit] = []
    quotas: list[QuotaRule] = []
    shadow: list[str] = []
