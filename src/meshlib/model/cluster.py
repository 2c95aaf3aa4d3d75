"""Which endpoints serve a name, and how are they treated? Clusters, endpoints and localities, as xDS names them.

Every time is in seconds. None means no limit.
"""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum
from typing import Literal

from meshlib.model.rate_limit import Quota, RateLimit
from meshlib.model.values import dataclass

PASSTHROUGH = "PassthroughCluster"
"""Istio's name of the cluster that sends a request to the very address its caller named."""


SHADOWABLE = frozenset({"breaker", "limits", "outlier-detection", "rate-limit", "retry-budget"})
"""What can be run in shadow mode."""


class ClusterType(StrEnum):
    EDS = "EDS"
    STATIC = "STATIC"
    STRICT_DNS = "STRICT_DNS"
    LOGICAL_DNS = "LOGICAL_DNS"
    ORIGINAL_DST = "ORIGINAL_DST"


class LoadBalancing(StrEnum):
    """The first five are Envoy's and Istio's. PEAK_EWMA is Linkerd's and Finagle's; CLIENT_SIDE_WEIGHTED_ROUND_ROBIN
    takes its weights from the servers' ORCA load reports (gRFC A58)."""

    ROUND_ROBIN = "ROUND_ROBIN"
    LEAST_REQUEST = "LEAST_REQUEST"
    RANDOM = "RANDOM"
    RING_HASH = "RING_HASH"
    MAGLEV = "MAGLEV"
    PEAK_EWMA = "PEAK_EWMA"
    CLIENT_SIDE_WEIGHTED_ROUND_ROBIN = "CLIENT_SIDE_WEIGHTED_ROUND_ROBIN"


class Health(StrEnum):
    """What the control plane says. `draining` endpoints get no new call."""

    HEALTHY = "HEALTHY"
    UNHEALTHY = "UNHEALTHY"
    DRAINING = "DRAINING"


@dataclass(frozen=True, slots=True, order=True)
class Locality:
    region: str = ""
    zone: str = ""
    subzone: str = ""

    def __str__(self) -> str:
        return "/".join((self.region, self.zone, self.subzone)).rstrip("/")


NOWHERE = Locality()


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """One address that serves a cluster.

    address: an IP address; a host name only in STRICT_DNS and LOGICAL_DNS clusters, where it is to be resolved.
    workload: name of the workload behind it (`reviews-v2`), "" when unknown; for logs, metrics and explain.
    peer: what metrics say of it besides, as Istio writes it behind the name: `namespace;service;revision;cluster`, and
      `;app;version` where a control plane of ours says it; "" when unknown.
    hash_key: what ring hash and maglev hash in place of the address (Envoy's `envoy.lb` metadata); "" is the address.
    is_meshed: it serves the mesh's mTLS (Istio's `security.istio.io/tlsMode: istio`).
    """

    address: str
    port: int
    weight: int = 1
    locality: Locality = NOWHERE
    priority: int = 0
    health: Health = Health.HEALTHY
    workload: str = ""
    hash_key: str = ""
    peer: str = ""
    is_meshed: bool = False

    @property
    def authority(self) -> str:
        """`10.0.0.1:9080`, `[::1]:9080`."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    def __str__(self) -> str:
        return self.authority


@dataclass(frozen=True, slots=True)
class LocalityWeight:
    locality: Locality
    priority: int
    weight: int


@dataclass(frozen=True, slots=True)
class LoadAssignment:
    """The endpoints of one cluster (xDS: ClusterLoadAssignment). None is a service without endpoints."""

    cluster: str
    endpoints: tuple[Endpoint, ...] = ()
    locality_weights: tuple[LocalityWeight, ...] = ()


@dataclass(frozen=True, slots=True)
class TcpKeepalive:
    """Socket options; 0 leaves the operating system's. time, interval: whole seconds (TCP_KEEPIDLE, TCP_KEEPINTVL)."""

    probes: int = 0
    time: int = 0
    interval: int = 0


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """DestinationRule.trafficPolicy.connectionPool. Istio's defaults are no limits; they hold per client process.

    max_requests_per_connection: 0 is unlimited, 1 switches keep-alive off. max_concurrent_streams: of one HTTP/2
    connection; None is the server's word. idle_timeout: seconds a connection is kept without a request; None is the
    engine's own choice (Istio's default is an hour, which loses races with servers that close after 5 seconds).
    max_connection_duration: seconds after which a connection takes no new request.
    """

    max_connections: int | None = None
    max_pending_requests: int | None = None
    max_requests: int | None = None
    max_retries: int | None = None
    max_requests_per_connection: int = 0
    max_concurrent_streams: int | None = None
    idle_timeout: float | None = None
    max_connection_duration: float | None = None
    tcp_keepalive: TcpKeepalive | None = None

    @property
    def told(self) -> str:
        """For logs: `limit reached (1 connections, 1 pending)`."""
        named = (
            (self.max_connections, "connections"),
            (self.max_pending_requests, "pending"),
            (self.max_requests, "requests"),
        )
        return f"limit reached ({', '.join(f'{limit} {what}' for limit, what in named if limit is not None)})"


@dataclass(frozen=True, slots=True)
class RetryBudget:
    """Retries in flight may be `percent` of the requests in flight; `min_concurrency` are always allowed."""

    percent: float = 20.0
    min_concurrency: int = 3


@dataclass(frozen=True, slots=True)
class RateBudget:
    """Linkerd's and Finagle's form: each request deposits `ratio` of a retry, `min_per_second` come for free, and what
    is not used within `ttl` seconds is lost."""

    ratio: float = 0.2
    min_per_second: float = 10.0
    ttl: float = 10.0


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """When a destination's circuit opens, for the whole cluster (outlier detection is for single endpoints).

    consecutive_failures: 0 switches it off. failure_rate, slow_call_rate: percent of the calls of the last `window`
    seconds, judged from `minimum_calls` on; 0 switches them off. slow_call: seconds from which a call counts as slow.
    open_for: seconds before probes are let through. probes: how many at a time, and how many successes close it again.
    forced: `open` or `closed`, whatever is counted: an operator has said so; "" is by what is counted.
    """

    consecutive_failures: int = 0
    failure_rate: float = 0.0
    slow_call_rate: float = 0.0
    slow_call: float = 60.0
    window: float = 10.0
    minimum_calls: int = 20
    open_for: float = 30.0
    probes: int = 1
    forced: str = ""


@dataclass(frozen=True, slots=True)
class SlowStart:
    """A new endpoint's weight grows over `window` seconds from `min_weight_percent` of it, as
    (age / window) ** (1 / aggression); round robin and least request only (Envoy)."""

    window: float
    aggression: float = 1.0
    min_weight_percent: float = 10.0


@dataclass(frozen=True, slots=True)
class HashTable:
    """Envoy's limits of a ring, and the (prime) size of a maglev table; Istio's defaults."""

    minimum_ring_size: int = 1024
    maximum_ring_size: int = 8 * 1024 * 1024
    maglev_size: int = 65537


@dataclass(frozen=True, slots=True)
class ZoneAware:
    """Envoy's zone-aware routing: prefer the own zone as far as it can carry its callers. routing_percent: of the
    requests; min_cluster_size: endpoints below which it is off."""

    routing_percent: float = 100.0
    min_cluster_size: int = 6


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """An active check, made from this process in the background. Times in seconds, thresholds in results in a row.

    kind: `http` (`path`, answer in `expected_statuses`), `grpc` (grpc.health.v1, `service`) or `tcp` (a connection).
    host: the Host header; "" is the cluster's service. port: 0 is the endpoint's own.
    """

    kind: Literal["http", "grpc", "tcp"] = "http"
    path: str = "/"
    host: str = ""
    service: str = ""
    port: int = 0
    expected_statuses: tuple[tuple[int, int], ...] = ((200, 299),)
    interval: float = 5.0
    timeout: float = 1.0
    healthy_threshold: int = 2
    unhealthy_threshold: int = 3


@dataclass(frozen=True, slots=True)
class OutlierDetection:
    """Istio's defaults where the block is present. 0 switches a detector off.

    success_rate_*, failure_percentage_*: Envoy's statistical detectors, which Istio does not expose and switches off;
    `success_rate_stdev_factor` is in standard deviations (Envoy's 1900 is 1.9). error_codes: further status codes
    that count as errors (Istio's outlierDetectionHttpErrorCodes).
    """

    consecutive_5xx: int = 5
    consecutive_gateway_errors: int = 0
    consecutive_local_origin_failures: int = 5
    split_external_local_origin_errors: bool = False
    interval: float = 10.0
    base_ejection_time: float = 30.0
    max_ejection_percent: int = 10
    min_health_percent: int = 0
    max_ejection_time: float = 300.0
    max_ejection_jitter: float = 0.0
    always_eject_one: bool = False
    success_rate_enforcing: int = 0
    success_rate_minimum_hosts: int = 5
    success_rate_request_volume: int = 100
    success_rate_stdev_factor: float = 1.9
    failure_percentage_enforcing: int = 0
    failure_percentage_threshold: int = 85
    failure_percentage_minimum_hosts: int = 5
    failure_percentage_request_volume: int = 50
    error_codes: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class UpstreamTls:
    """TLS that the client originates. mode: SIMPLE, MUTUAL or ISTIO_MUTUAL, which is the mesh's own mTLS.

    sni: "" sends the request's host. subject_alt_names: () accepts any certificate valid for the SNI name, with
    ISTIO_MUTUAL any identity of a trusted domain. ca_file: "" uses the system's roots. auto: only endpoints that serve
    the mesh's mTLS get it, others plaintext.
    """

    mode: str = "SIMPLE"
    sni: str = ""
    subject_alt_names: tuple[str, ...] = ()
    ca_file: str = ""
    certificate_file: str = ""
    private_key_file: str = ""
    insecure_skip_verify: bool = False
    auto: bool = False

    @property
    def is_mesh(self) -> bool:
        """Whether both sides prove an identity of the mesh, and no file is named."""
        return self.mode == "ISTIO_MUTUAL"


def mesh_alpn(http2: bool) -> tuple[str, ...]:
    """What Istio's clients offer (pilot/pkg/xds/filters): a sidecar takes TLS for the mesh's by it."""
    return ("istio-h2", "istio", "h2") if http2 else ("istio-http/1.1", "istio", "http/1.1")


@dataclass(frozen=True, slots=True)
class ServiceName:
    """The service a cluster belongs to: host `reviews.default.svc.cluster.local`, name `reviews`, namespace."""

    host: str
    name: str = ""
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A named set of endpoints with one policy. `name` is Istio's `outbound|9080|v1|reviews.default.svc.cluster.local`.

    endpoints: only for STATIC and the DNS types; an EDS cluster's come in its LoadAssignment.
    locality_weighted: share the load by LoadAssignment.locality_weights (Istio's `distribute`).
    shadow: policies that decide and count, but whose decision is not carried out: names of SHADOWABLE.
    origin: the objects that its policy came from, and their files (`DestinationRule default/reviews (reviews.yaml)`).
    """

    name: str
    type: ClusterType = ClusterType.EDS
    load_balancing: LoadBalancing = LoadBalancing.LEAST_REQUEST
    connect_timeout: float = 10.0
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    retry_budget: RetryBudget | RateBudget | None = None
    outlier_detection: OutlierDetection | None = None
    tls: UpstreamTls | None = None
    http2: bool = False
    endpoints: tuple[Endpoint, ...] = ()
    service: ServiceName | None = None
    subset: str = ""
    hash_table: HashTable = HashTable()
    slow_start: SlowStart | None = None
    locality_weighted: bool = False
    zone_aware: ZoneAware | None = None
    health_checks: tuple[HealthCheck, ...] = ()
    breaker: BreakerRules | None = None
    shadow: frozenset[str] = frozenset()
    origin: str = ""
    rate_limits: tuple[RateLimit, ...] = ()
    quotas: tuple[Quota, ...] = ()
