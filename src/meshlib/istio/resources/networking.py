"""What do VirtualService, DestinationRule, ServiceEntry, WorkloadEntry, Sidecar, Gateway and EnvoyFilter hold?

Source: istio.io/api, networking/v1 (virtual_service, destination_rule, service_entry, gateway .proto).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from meshlib.istio.resources.base import Count, Duration, IstioStruct, Labels, Percent100, Port, Unsupported


class StringMatch(IstioStruct, frozen=True):
    exact: str | None = None
    prefix: str | None = None
    regex: str | None = None


class HTTPMatchRequest(IstioStruct, frozen=True):
    name: str = ""
    uri: StringMatch | None = None
    scheme: StringMatch | None = None
    method: StringMatch | None = None
    authority: StringMatch | None = None
    headers: dict[str, StringMatch] = {}
    without_headers: dict[str, StringMatch] = {}
    query_params: dict[str, StringMatch] = {}
    port: Port | None = None
    source_labels: Labels = {}
    source_namespace: str = ""
    gateways: list[str] = []
    ignore_uri_case: bool = False
    stat_prefix: Unsupported = None


class PortSelector(IstioStruct, frozen=True):
    number: Port


class Destination(IstioStruct, frozen=True):
    host: str
    subset: str = ""
    port: PortSelector | None = None


class HeaderOperations(IstioStruct, frozen=True):
    set: dict[str, str] = {}
    add: dict[str, str] = {}
    remove: list[str] = []


class Headers(IstioStruct, frozen=True):
    request: HeaderOperations = HeaderOperations()
    response: HeaderOperations = HeaderOperations()


class HTTPRouteDestination(IstioStruct, frozen=True):
    destination: Destination
    weight: Count = 0
    headers: Headers = Headers()


class RegexRewrite(IstioStruct, frozen=True):
    match: str
    rewrite: str


class HTTPRewrite(IstioStruct, frozen=True):
    uri: str = ""
    authority: str = ""
    uri_regex_rewrite: RegexRewrite | None = None


class HTTPRedirect(IstioStruct, frozen=True):
    uri: str = ""
    authority: str = ""
    port: Port | None = None
    derive_port: Literal["FROM_PROTOCOL_DEFAULT", "FROM_REQUEST_PORT"] | None = None
    scheme: str = ""
    redirect_code: int = 301
    prefix_rewrite: str = ""


class PathRedirect(HTTPRedirect, frozen=True):
    """A redirect of the Gateway API's. regex: what is replaced in the path; Istio has no field for it."""

    regex: RegexRewrite | None = None


class HTTPBody(IstioStruct, frozen=True):
    string: str | None = None
    bytes: str | None = None


class HTTPDirectResponse(IstioStruct, frozen=True):
    status: Annotated[int, Meta(ge=200, le=599)]
    body: HTTPBody | None = None


class Percent(IstioStruct, frozen=True):
    value: Percent100 = 0.0


class FaultDelay(IstioStruct, frozen=True):
    fixed_delay: Duration
    percentage: Percent | None = None
    percent: Annotated[int, Meta(ge=0, le=100)] | None = None
    exponential_delay: Unsupported = None


class FaultAbort(IstioStruct, frozen=True):
    http_status: Annotated[int, Meta(ge=200, le=599)] | None = None
    grpc_status: str | None = None
    percentage: Percent | None = None
    http2_error: Unsupported = msgspec.field(name="http2Error", default=None)


class HTTPFaultInjection(IstioStruct, frozen=True):
    delay: FaultDelay | None = None
    abort: FaultAbort | None = None


class HTTPRetry(IstioStruct, frozen=True):
    attempts: Count = 0
    per_try_timeout: Duration | None = None
    retry_on: str = ""
    retry_remote_localities: bool = False
    retry_ignore_previous_hosts: bool | None = None
    backoff: Duration | None = None


class HTTPMirrorPolicy(IstioStruct, frozen=True):
    destination: Destination
    percentage: Percent | None = None


class Delegate(IstioStruct, frozen=True):
    name: str
    namespace: str = ""


class CorsPolicy(IstioStruct, frozen=True):
    """allow_origin: the old form of allow_origins."""

    allow_origin: list[str] = []
    allow_origins: list[StringMatch] = []
    allow_methods: list[str] = []
    allow_headers: list[str] = []
    expose_headers: list[str] = []
    max_age: Duration | None = None
    allow_credentials: bool | None = None
    unmatched_preflights: Literal["UNSPECIFIED", "FORWARD", "IGNORE"] = "UNSPECIFIED"


class HTTPRoute(IstioStruct, frozen=True):
    name: str = ""
    match: list[HTTPMatchRequest] = []
    route: list[HTTPRouteDestination] = []
    redirect: HTTPRedirect | None = None
    direct_response: HTTPDirectResponse | None = None
    rewrite: HTTPRewrite | None = None
    timeout: Duration | None = None
    retries: HTTPRetry | None = None
    fault: HTTPFaultInjection | None = None
    mirror: Destination | None = None
    mirror_percentage: Percent | None = None
    mirror_percent: Annotated[int, Meta(ge=0, le=100)] | None = None
    mirrors: list[HTTPMirrorPolicy] = []
    headers: Headers = Headers()
    cors_policy: CorsPolicy | None = None
    delegate: Delegate | None = None


class RouteDestination(IstioStruct, frozen=True):
    destination: Destination
    weight: Count = 0


class L4MatchAttributes(IstioStruct, frozen=True):
    destination_subnets: list[str] = []
    port: Port | None = None
    source_subnet: str = ""
    source_labels: Labels = {}
    source_namespace: str = ""
    gateways: list[str] = []


class TLSMatchAttributes(IstioStruct, frozen=True):
    sni_hosts: list[str] = []
    destination_subnets: list[str] = []
    port: Port | None = None
    source_labels: Labels = {}
    source_namespace: str = ""
    gateways: list[str] = []


class TLSRoute(IstioStruct, frozen=True):
    """Read to be checked; nothing is routed by it."""

    match: list[TLSMatchAttributes] = []
    route: list[RouteDestination] = []


class TCPRoute(IstioStruct, frozen=True):
    """Read to be checked; nothing is routed by it."""

    match: list[L4MatchAttributes] = []
    route: list[RouteDestination] = []


class VirtualService(IstioStruct, frozen=True):
    hosts: list[str] = []
    gateways: list[str] = []
    http: list[HTTPRoute] = []
    export_to: list[str] = []
    tls: Unsupported = None
    tcp: Unsupported = None


# networking.istio.io: DestinationRule


class TCPKeepalive(IstioStruct, frozen=True):
    probes: Count = 0
    time: Duration | None = None
    interval: Duration | None = None


class TCPSettings(IstioStruct, frozen=True):
    max_connections: Count | None = None
    connect_timeout: Duration | None = None
    tcp_keepalive: TCPKeepalive | None = None
    max_connection_duration: Duration | None = None
    idle_timeout: Duration | None = None


class HTTPSettings(IstioStruct, frozen=True):
    http1_max_pending_requests: Count | None = msgspec.field(name="http1MaxPendingRequests", default=None)
    http2_max_requests: Count | None = msgspec.field(name="http2MaxRequests", default=None)
    max_requests_per_connection: Count = 0
    max_retries: Count | None = None
    idle_timeout: Duration | None = None
    h2_upgrade_policy: Literal["DEFAULT", "DO_NOT_UPGRADE", "UPGRADE"] | None = msgspec.field(
        name="h2UpgradePolicy", default=None
    )
    use_client_protocol: Unsupported = None
    http2_keep_alive: Unsupported = msgspec.field(name="http2KeepAlive", default=None)
    max_concurrent_streams: Count | None = None


NO_TCP_SETTINGS, NO_HTTP_SETTINGS = TCPSettings(), HTTPSettings()


class ConnectionPool(IstioStruct, frozen=True):
    tcp: TCPSettings = NO_TCP_SETTINGS
    http: HTTPSettings = NO_HTTP_SETTINGS

    @property
    def is_empty(self) -> bool:
        """Whether neither block is written, which Istio refuses; it takes `tcp: {}`."""
        return self.tcp is NO_TCP_SETTINGS and self.http is NO_HTTP_SETTINGS


class OutlierDetection(IstioStruct, frozen=True):
    consecutive_errors: Count | None = None
    consecutive5xx_errors: Count | None = msgspec.field(name="consecutive5xxErrors", default=None)
    consecutive_gateway_errors: Count | None = None
    consecutive_local_origin_failures: Count | None = None
    split_external_local_origin_errors: bool = False
    interval: Duration | None = None
    base_ejection_time: Duration | None = None
    max_ejection_percent: Annotated[int, Meta(ge=0, le=100)] | None = None
    min_health_percent: Annotated[int, Meta(ge=0, le=100)] = 0
    outlier_detection_http_error_codes: list[Annotated[int, Meta(ge=100, le=599)]] = []


class HTTPCookie(IstioStruct, frozen=True):
    name: str
    path: str = ""
    ttl: Duration | None = None
    attributes: Unsupported = None


class RingHash(IstioStruct, frozen=True):
    minimum_ring_size: Count = 0


class Maglev(IstioStruct, frozen=True):
    table_size: Count = 0


class ConsistentHash(IstioStruct, frozen=True):
    http_header_name: str = ""
    http_cookie: HTTPCookie | None = None
    use_source_ip: bool = False
    http_query_parameter_name: str = ""
    ring_hash: RingHash | None = None
    maglev: Maglev | None = None
    minimum_ring_size: Count = 0


class Distribute(IstioStruct, frozen=True):
    from_: str = msgspec.field(name="from", default="")
    to: dict[str, Count] = {}


class Failover(IstioStruct, frozen=True):
    from_: str = msgspec.field(name="from", default="")
    to: str = ""


class LocalityLbSetting(IstioStruct, frozen=True):
    enabled: bool | None = None
    distribute: list[Distribute] = []
    failover: list[Failover] = []
    failover_priority: list[str] = []


class ZoneAwareLbSetting(IstioStruct, frozen=True):
    enabled: bool | None = None
    failover: list[Failover] = []
    failover_priority: list[str] = []
    min_cluster_size: Count | None = None


class Warmup(IstioStruct, frozen=True):
    duration: Duration
    minimum_percent: Percent100 | None = None
    aggression: float | None = None


class LoadBalancer(IstioStruct, frozen=True):
    simple: Literal["UNSPECIFIED", "LEAST_CONN", "RANDOM", "PASSTHROUGH", "ROUND_ROBIN", "LEAST_REQUEST"] | None = None
    consistent_hash: ConsistentHash | None = None
    locality_lb_setting: LocalityLbSetting | None = None
    zone_aware_lb_setting: ZoneAwareLbSetting | None = None
    warmup: Warmup | None = None
    warmup_duration_secs: Duration | None = None


class ClientTLSSettings(IstioStruct, frozen=True):
    mode: Literal["DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL"] = "DISABLE"
    client_certificate: str = ""
    private_key: str = ""
    ca_certificates: str = ""
    credential_name: Unsupported = None
    subject_alt_names: list[str] = []
    sni: str = ""
    insecure_skip_verify: bool = False
    ca_crl: Unsupported = None


class RetryBudget(IstioStruct, frozen=True):
    percent: Percent100 = 20.0
    min_retry_concurrency: Count = 3
    budget_interval: Unsupported = None


class PortTrafficPolicy(IstioStruct, frozen=True):
    port: PortSelector
    load_balancer: LoadBalancer | None = None
    connection_pool: ConnectionPool | None = None
    outlier_detection: OutlierDetection | None = None
    tls: ClientTLSSettings | None = None


class TrafficPolicy(IstioStruct, frozen=True):
    load_balancer: LoadBalancer | None = None
    connection_pool: ConnectionPool | None = None
    outlier_detection: OutlierDetection | None = None
    tls: ClientTLSSettings | None = None
    retry_budget: RetryBudget | None = None
    port_level_settings: list[PortTrafficPolicy] = []
    tunnel: Unsupported = None
    proxy_protocol: Unsupported = None


class Subset(IstioStruct, frozen=True):
    name: str
    labels: Labels = {}
    traffic_policy: TrafficPolicy | None = None


class WorkloadSelector(IstioStruct, frozen=True):
    match_labels: Labels = {}
    labels: Labels = {}


class DestinationRule(IstioStruct, frozen=True):
    host: str
    traffic_policy: TrafficPolicy | None = None
    subsets: list[Subset] = []
    export_to: list[str] = []
    workload_selector: WorkloadSelector | None = None


# networking.istio.io: ServiceEntry, WorkloadEntry, Sidecar, Gateway


class ServiceEntryPort(IstioStruct, frozen=True):
    number: Port
    name: str = ""
    protocol: str = "TCP"
    target_port: Port | None = None


class WorkloadEntry(IstioStruct, frozen=True):
    address: str = ""
    ports: dict[str, Port] = {}
    labels: Labels = {}
    network: str = ""
    locality: str = ""
    weight: Count = 1
    service_account: str = ""


class ProbeHeader(IstioStruct, frozen=True):
    name: str
    value: str = ""


class HttpProbe(IstioStruct, frozen=True):
    port: Port
    path: str = ""
    host: str = ""
    scheme: Literal["", "HTTP", "HTTPS"] = ""
    http_headers: list[ProbeHeader] = []


class TcpProbe(IstioStruct, frozen=True):
    port: Port
    host: str = ""


class ExecProbe(IstioStruct, frozen=True):
    command: list[str] = []


class GrpcProbe(IstioStruct, frozen=True):
    port: Port | None = None
    service: str = ""


class ReadinessProbe(IstioStruct, frozen=True):
    initial_delay_seconds: Count = 0
    timeout_seconds: Count = 0
    period_seconds: Count = 0
    success_threshold: Count = 0
    failure_threshold: Count = 0
    http_get: HttpProbe | None = None
    tcp_socket: TcpProbe | None = None
    exec: ExecProbe | None = None
    grpc: GrpcProbe | None = None


class WorkloadGroupMetadata(IstioStruct, frozen=True):
    labels: Labels = {}
    annotations: Labels = {}


class WorkloadGroup(IstioStruct, frozen=True):
    """What Istio's control plane makes WorkloadEntry objects of when a sidecar of a virtual machine registers itself.
    Nothing does so here: read to be checked."""

    template: WorkloadEntry
    metadata: WorkloadGroupMetadata | None = None
    probe: ReadinessProbe | None = None


class ProxyImage(IstioStruct, frozen=True):
    image_type: str = ""


class ProxyConfigOfWorkloads(IstioStruct, frozen=True):
    """The kind ProxyConfig: what a sidecar is started with. There are none: read to be checked."""

    selector: WorkloadSelector | None = None
    concurrency: Count | None = None
    environment_variables: Labels = {}
    image: ProxyImage | None = None


class ServiceEntry(IstioStruct, frozen=True):
    hosts: list[str]
    ports: list[ServiceEntryPort] = []
    addresses: list[str] = []
    location: Literal["MESH_EXTERNAL", "MESH_INTERNAL"] = "MESH_EXTERNAL"
    resolution: Literal["NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS"] = "NONE"
    endpoints: list[WorkloadEntry] = []
    workload_selector: WorkloadSelector | None = None
    export_to: list[str] = []
    subject_alt_names: list[str] = []


class SidecarPort(IstioStruct, frozen=True):
    """number: 0 goes with a `bind` that is a socket."""

    number: Annotated[int, Meta(ge=0, le=65535)] = 0
    protocol: str = ""
    name: str = ""
    target_port: Unsupported = None


class IstioEgressListener(IstioStruct, frozen=True):
    hosts: list[str]
    port: SidecarPort | None = None
    bind: str = ""
    capture_mode: Unsupported = None


class OutboundTrafficPolicy(IstioStruct, frozen=True):
    """The enum's zero is REGISTRY_ONLY: a policy that is there and names no mode is that (sidecar.proto)."""

    mode: Literal["REGISTRY_ONLY", "ALLOW_ANY", 0, 1] = "REGISTRY_ONLY"
    egress_proxy: Unsupported = None

    @property
    def is_registry_only(self) -> bool:
        return self.mode in ("REGISTRY_ONLY", 0)


class Sidecar(IstioStruct, frozen=True):
    workload_selector: WorkloadSelector | None = None
    egress: list[IstioEgressListener] = []
    outbound_traffic_policy: OutboundTrafficPolicy | None = None
    ingress: Unsupported = None
    inbound_connection_pool: Unsupported = None


class GatewayPort(IstioStruct, frozen=True):
    number: Port
    protocol: str
    name: str = ""
    target_port: Unsupported = None


class ServerTLSSettings(IstioStruct, frozen=True):
    https_redirect: bool = False
    mode: Literal["PASSTHROUGH", "SIMPLE", "MUTUAL", "AUTO_PASSTHROUGH", "ISTIO_MUTUAL", "OPTIONAL_MUTUAL"] | None = (
        None
    )
    server_certificate: str = ""
    private_key: str = ""
    ca_certificates: str = ""
    credential_name: str = ""
    credential_names: Unsupported = None
    tls_certificates: Unsupported = None
    subject_alt_names: Unsupported = None
    verify_certificate_spki: Unsupported = None
    verify_certificate_hash: Unsupported = None
    min_protocol_version: Unsupported = None
    max_protocol_version: Unsupported = None
    cipher_suites: Unsupported = None
    ca_cert_credential_name: Unsupported = None
    ca_crl: Unsupported = None
    insecure_skip_verify: Unsupported = None


class SidecarIngress(IstioStruct, frozen=True):
    """Read to be checked: a process listens where it listens."""

    port: SidecarPort
    bind: str = ""
    capture_mode: Unsupported = None
    default_endpoint: str = ""
    tls: ServerTLSSettings | None = None
    connection_pool: ConnectionPool | None = None


class Server(IstioStruct, frozen=True):
    port: GatewayPort
    hosts: list[str]
    bind: str = ""
    tls: ServerTLSSettings | None = None
    default_endpoint: Unsupported = None
    name: str = ""


class Gateway(IstioStruct, frozen=True):
    servers: list[Server] = []
    selector: Labels = {}


class EnvoyConfigPatch(IstioStruct, frozen=True):
    """match, patch: read by envoy_filters.py, as far as they are understood."""

    apply_to: str = ""
    match: dict[str, Any] = {}
    patch: dict[str, Any] = {}


class EnvoyFilter(IstioStruct, frozen=True):
    workload_selector: WorkloadSelector | None = None
    target_refs: list[Any] = []
    config_patches: list[EnvoyConfigPatch] = []
    priority: int = 0
