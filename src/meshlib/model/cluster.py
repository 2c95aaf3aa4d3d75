"""Which endpoints serve a name, and how are they treated? Clusters, endpoints and localities, as xDS names them.

Every time is in seconds. None means no limit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

PASSTHROUGH = "PassthroughCluster"
"""Istio's name of the cluster that sends a request to the very address its caller named."""


class ClusterType(StrEnum):
    EDS = "EDS"
    STATIC = "STATIC"
    STRICT_DNS = "STRICT_DNS"
    LOGICAL_DNS = "LOGICAL_DNS"
    ORIGINAL_DST = "ORIGINAL_DST"


class LoadBalancing(StrEnum):
    ROUND_ROBIN = "ROUND_ROBIN"
    LEAST_REQUEST = "LEAST_REQUEST"
    RANDOM = "RANDOM"


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
    """

    address: str
    port: int
    weight: int = 1
    locality: Locality = NOWHERE
    priority: int = 0
    health: Health = Health.HEALTHY
    workload: str = ""

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
class ConnectionLimits:
    """DestinationRule.trafficPolicy.connectionPool. Istio's defaults are no limits; they hold per client process.

    max_requests_per_connection: 0 is unlimited, 1 switches keep-alive off.
    """

    max_connections: int | None = None
    max_pending_requests: int | None = None
    max_requests: int | None = None
    max_retries: int | None = None
    max_requests_per_connection: int = 0
    idle_timeout: float = 3600.0


@dataclass(frozen=True, slots=True)
class RetryBudget:
    """Retries in flight may be `percent` of the requests in flight; `min_concurrency` are always allowed."""

    percent: float = 20.0
    min_concurrency: int = 3


@dataclass(frozen=True, slots=True)
class OutlierDetection:
    """Istio's defaults where the block is present. 0 switches a detector off."""

    consecutive_5xx: int = 5
    consecutive_gateway_errors: int = 0
    consecutive_local_origin_failures: int = 5
    split_external_local_origin_errors: bool = False
    interval: float = 10.0
    base_ejection_time: float = 30.0
    max_ejection_percent: int = 10
    min_health_percent: int = 0


@dataclass(frozen=True, slots=True)
class UpstreamTls:
    """TLS that the client originates. mode: SIMPLE or MUTUAL.

    sni: "" sends the request's host. subject_alt_names: () accepts any certificate valid for the SNI name.
    ca_file: "" uses the system's roots.
    """

    mode: str = "SIMPLE"
    sni: str = ""
    subject_alt_names: tuple[str, ...] = ()
    ca_file: str = ""
    certificate_file: str = ""
    private_key_file: str = ""
    insecure_skip_verify: bool = False


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
    """

    name: str
    type: ClusterType = ClusterType.EDS
    load_balancing: LoadBalancing = LoadBalancing.LEAST_REQUEST
    connect_timeout: float = 10.0
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    retry_budget: RetryBudget | None = None
    outlier_detection: OutlierDetection | None = None
    tls: UpstreamTls | None = None
    http2: bool = False
    endpoints: tuple[Endpoint, ...] = ()
    service: ServiceName | None = None
    subset: str = ""
