"""Which kinds of objects do people write, and what do they hold? Istio's and Kubernetes' own field names.

Sources: istio.io/api (networking/v1: virtual_service, destination_rule, service_entry, gateway .proto) and the
Kubernetes API reference. Istio's kinds refuse unknown fields, as its validation does; Kubernetes' kinds have many more
fields than a mesh cares for, so theirs are passed over. A field whose type is `Unsupported` is valid and has no effect
yet: parse.py says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from meshlib.errors import ConfigurationError
from meshlib.istio import gateway_kinds
from meshlib.istio.documents import Path, is_text

NETWORKING = "networking.istio.io"
OWN = "meshlib.io"
"""The API group of the kinds that Istio has no word for."""
NETWORKING_KINDS = frozenset(
    {
        "VirtualService",
        "DestinationRule",
        "ServiceEntry",
        "Gateway",
        "Sidecar",
        "EnvoyFilter",
        "WorkloadEntry",
        "WorkloadGroup",
        "ProxyConfig",
    }
)
ISTIO_VERSIONS = ("v1alpha3", "v1beta1", "v1")
SECURITY = "security.istio.io"
SECURITY_VERSIONS = ("v1beta1", "v1")
TELEMETRY = "telemetry.istio.io"
TELEMETRY_VERSIONS = ("v1alpha1", "v1")
OWN_VERSIONS = ("v1alpha1",)
STRICT_GROUPS = (NETWORKING, SECURITY, TELEMETRY, OWN)
"""Their objects may hold no field that is not known."""
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")
NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
METADATA_FIELDS = frozenset(
    {
        "annotations",
        "creationTimestamp",
        "deletionGracePeriodSeconds",
        "deletionTimestamp",
        "finalizers",
        "generateName",
        "generation",
        "labels",
        "managedFields",
        "name",
        "namespace",
        "ownerReferences",
        "resourceVersion",
        "selfLink",
        "uid",
    }
)


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


class _Istio(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", omit_defaults=True):
    pass


class _Kubernetes(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    pass


# networking.istio.io: VirtualService


class StringMatch(_Istio, frozen=True):
    exact: str | None = None
    prefix: str | None = None
    regex: str | None = None


class HTTPMatchRequest(_Istio, frozen=True):
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


class PortSelector(_Istio, frozen=True):
    number: Port


class Destination(_Istio, frozen=True):
    host: str
    subset: str = ""
    port: PortSelector | None = None


class HeaderOperations(_Istio, frozen=True):
    set: dict[str, str] = {}
    add: dict[str, str] = {}
    remove: list[str] = []


class Headers(_Istio, frozen=True):
    request: HeaderOperations = HeaderOperations()
    response: HeaderOperations = HeaderOperations()


class HTTPRouteDestination(_Istio, frozen=True):
    destination: Destination
    weight: Count = 0
    headers: Headers = Headers()


class RegexRewrite(_Istio, frozen=True):
    match: str
    rewrite: str


class HTTPRewrite(_Istio, frozen=True):
    uri: str = ""
    authority: str = ""
    uri_regex_rewrite: RegexRewrite | None = None


class HTTPRedirect(_Istio, frozen=True):
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


class HTTPBody(_Istio, frozen=True):
    string: str | None = None
    bytes: str | None = None


class HTTPDirectResponse(_Istio, frozen=True):
    status: Annotated[int, Meta(ge=200, le=599)]
    body: HTTPBody | None = None


class Percent(_Istio, frozen=True):
    value: Percent100 = 0.0


class FaultDelay(_Istio, frozen=True):
    fixed_delay: Duration
    percentage: Percent | None = None
    percent: Annotated[int, Meta(ge=0, le=100)] | None = None
    exponential_delay: Unsupported = None


class FaultAbort(_Istio, frozen=True):
    http_status: Annotated[int, Meta(ge=200, le=599)] | None = None
    grpc_status: str | None = None
    percentage: Percent | None = None
    http2_error: Unsupported = msgspec.field(name="http2Error", default=None)


class HTTPFaultInjection(_Istio, frozen=True):
    delay: FaultDelay | None = None
    abort: FaultAbort | None = None


class HTTPRetry(_Istio, frozen=True):
    attempts: Count = 0
    per_try_timeout: Duration | None = None
    retry_on: str = ""
    retry_remote_localities: bool = False
    retry_ignore_previous_hosts: bool | None = None
    backoff: Duration | None = None


class HTTPMirrorPolicy(_Istio, frozen=True):
    destination: Destination
    percentage: Percent | None = None


class Delegate(_Istio, frozen=True):
    name: str
    namespace: str = ""


class HTTPRoute(_Istio, frozen=True):
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
    cors_policy: Unsupported = None
    delegate: Delegate | None = None


class VirtualService(_Istio, frozen=True):
    hosts: list[str] = []
    gateways: list[str] = []
    http: list[HTTPRoute] = []
    export_to: list[str] = []
    tls: Unsupported = None
    tcp: Unsupported = None


# networking.istio.io: DestinationRule


class TCPKeepalive(_Istio, frozen=True):
    probes: Count = 0
    time: Duration | None = None
    interval: Duration | None = None


class TCPSettings(_Istio, frozen=True):
    max_connections: Count | None = None
    connect_timeout: Duration | None = None
    tcp_keepalive: TCPKeepalive | None = None
    max_connection_duration: Duration | None = None
    idle_timeout: Duration | None = None


class HTTPSettings(_Istio, frozen=True):
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


class ConnectionPool(_Istio, frozen=True):
    tcp: TCPSettings = TCPSettings()
    http: HTTPSettings = HTTPSettings()


class OutlierDetection(_Istio, frozen=True):
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


class HTTPCookie(_Istio, frozen=True):
    name: str
    path: str = ""
    ttl: Duration | None = None
    attributes: Unsupported = None


class RingHash(_Istio, frozen=True):
    minimum_ring_size: Count = 0


class Maglev(_Istio, frozen=True):
    table_size: Count = 0


class ConsistentHash(_Istio, frozen=True):
    http_header_name: str = ""
    http_cookie: HTTPCookie | None = None
    use_source_ip: bool = False
    http_query_parameter_name: str = ""
    ring_hash: RingHash | None = None
    maglev: Maglev | None = None
    minimum_ring_size: Count = 0


class Distribute(_Istio, frozen=True):
    from_: str = msgspec.field(name="from", default="")
    to: dict[str, Count] = {}


class Failover(_Istio, frozen=True):
    from_: str = msgspec.field(name="from", default="")
    to: str = ""


class LocalityLbSetting(_Istio, frozen=True):
    enabled: bool | None = None
    distribute: list[Distribute] = []
    failover: list[Failover] = []
    failover_priority: list[str] = []


class ZoneAwareLbSetting(_Istio, frozen=True):
    enabled: bool | None = None
    failover: list[Failover] = []
    failover_priority: list[str] = []
    min_cluster_size: Count | None = None


class Warmup(_Istio, frozen=True):
    duration: Duration
    minimum_percent: Percent100 | None = None
    aggression: float | None = None


class LoadBalancer(_Istio, frozen=True):
    simple: Literal["UNSPECIFIED", "LEAST_CONN", "RANDOM", "PASSTHROUGH", "ROUND_ROBIN", "LEAST_REQUEST"] | None = None
    consistent_hash: ConsistentHash | None = None
    locality_lb_setting: LocalityLbSetting | None = None
    zone_aware_lb_setting: ZoneAwareLbSetting | None = None
    warmup: Warmup | None = None
    warmup_duration_secs: Duration | None = None


class ClientTLSSettings(_Istio, frozen=True):
    mode: Literal["DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL"] = "DISABLE"
    client_certificate: str = ""
    private_key: str = ""
    ca_certificates: str = ""
    credential_name: Unsupported = None
    subject_alt_names: list[str] = []
    sni: str = ""
    insecure_skip_verify: bool = False
    ca_crl: Unsupported = None


class RetryBudget(_Istio, frozen=True):
    percent: Percent100 = 20.0
    min_retry_concurrency: Count = 3
    budget_interval: Unsupported = None


class PortTrafficPolicy(_Istio, frozen=True):
    port: PortSelector
    load_balancer: LoadBalancer | None = None
    connection_pool: ConnectionPool | None = None
    outlier_detection: OutlierDetection | None = None
    tls: ClientTLSSettings | None = None


class TrafficPolicy(_Istio, frozen=True):
    load_balancer: LoadBalancer | None = None
    connection_pool: ConnectionPool | None = None
    outlier_detection: OutlierDetection | None = None
    tls: ClientTLSSettings | None = None
    retry_budget: RetryBudget | None = None
    port_level_settings: list[PortTrafficPolicy] = []
    tunnel: Unsupported = None
    proxy_protocol: Unsupported = None


class Subset(_Istio, frozen=True):
    name: str
    labels: Labels = {}
    traffic_policy: TrafficPolicy | None = None


class WorkloadSelector(_Istio, frozen=True):
    match_labels: Labels = {}
    labels: Labels = {}


class DestinationRule(_Istio, frozen=True):
    host: str
    traffic_policy: TrafficPolicy | None = None
    subsets: list[Subset] = []
    export_to: list[str] = []
    workload_selector: WorkloadSelector | None = None


# networking.istio.io: ServiceEntry, WorkloadEntry, Sidecar, Gateway


class ServiceEntryPort(_Istio, frozen=True):
    number: Port
    name: str = ""
    protocol: str = "TCP"
    target_port: Port | None = None


class WorkloadEntry(_Istio, frozen=True):
    address: str = ""
    ports: dict[str, Port] = {}
    labels: Labels = {}
    network: str = ""
    locality: str = ""
    weight: Count = 1
    service_account: str = ""


class ServiceEntry(_Istio, frozen=True):
    hosts: list[str]
    ports: list[ServiceEntryPort] = []
    addresses: list[str] = []
    location: Literal["MESH_EXTERNAL", "MESH_INTERNAL"] = "MESH_EXTERNAL"
    resolution: Literal["NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS"] = "NONE"
    endpoints: list[WorkloadEntry] = []
    workload_selector: WorkloadSelector | None = None
    export_to: list[str] = []
    subject_alt_names: list[str] = []


class SidecarPort(_Istio, frozen=True):
    number: Port
    protocol: str = ""
    name: str = ""
    target_port: Unsupported = None


class IstioEgressListener(_Istio, frozen=True):
    hosts: list[str]
    port: SidecarPort | None = None
    bind: str = ""
    capture_mode: Unsupported = None


class OutboundTrafficPolicy(_Istio, frozen=True):
    """The enum's zero is REGISTRY_ONLY: a policy that is there and names no mode is that (sidecar.proto)."""

    mode: Literal["REGISTRY_ONLY", "ALLOW_ANY", 0, 1] = "REGISTRY_ONLY"
    egress_proxy: Unsupported = None

    @property
    def is_registry_only(self) -> bool:
        return self.mode in ("REGISTRY_ONLY", 0)


class Sidecar(_Istio, frozen=True):
    workload_selector: WorkloadSelector | None = None
    egress: list[IstioEgressListener] = []
    outbound_traffic_policy: OutboundTrafficPolicy | None = None
    ingress: Unsupported = None
    inbound_connection_pool: Unsupported = None


class GatewayPort(_Istio, frozen=True):
    number: Port
    protocol: str
    name: str = ""
    target_port: Unsupported = None


class ServerTLSSettings(_Istio, frozen=True):
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


class Server(_Istio, frozen=True):
    port: GatewayPort
    hosts: list[str]
    bind: str = ""
    tls: ServerTLSSettings | None = None
    default_endpoint: Unsupported = None
    name: str = ""


class Gateway(_Istio, frozen=True):
    servers: list[Server] = []
    selector: Labels = {}


# Kubernetes


class ServicePort(_Kubernetes, frozen=True):
    port: Port
    name: str = ""
    target_port: int | str | None = None
    protocol: str = "TCP"
    app_protocol: str = ""


class Service(_Kubernetes, frozen=True):
    traffic_distribution: str = ""
    selector: Labels = {}
    ports: list[ServicePort] = []
    cluster_ip: str = msgspec.field(name="clusterIP", default="")
    type: str = "ClusterIP"
    external_name: str = ""
    ip_families: list[str] = []


class TargetReference(_Kubernetes, frozen=True):
    kind: str = ""
    name: str = ""


class EndpointAddress(_Kubernetes, frozen=True):
    ip: str
    target_ref: TargetReference | None = None


class EndpointPort(_Kubernetes, frozen=True):
    port: Port
    name: str = ""


class EndpointSubset(_Kubernetes, frozen=True):
    addresses: list[EndpointAddress] = []
    ports: list[EndpointPort] = []


class Endpoints(_Kubernetes, frozen=True):
    subsets: list[EndpointSubset] = []


class SliceConditions(_Kubernetes, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class SliceEndpoint(_Kubernetes, frozen=True):
    addresses: list[str]
    conditions: SliceConditions = SliceConditions()
    target_ref: TargetReference | None = None
    zone: str = ""
    node_name: str = ""


class SlicePort(_Kubernetes, frozen=True):
    port: Port | None = None
    name: str = ""


class EndpointSlice(_Kubernetes, frozen=True):
    endpoints: list[SliceEndpoint] = []
    ports: list[SlicePort] = []
    address_type: str = "IPv4"


class ContainerPort(_Kubernetes, frozen=True):
    container_port: Port
    name: str = ""


class Container(_Kubernetes, frozen=True):
    name: str = ""
    ports: list[ContainerPort] = []


class PodSpec(_Kubernetes, frozen=True):
    containers: list[Container] = []
    service_account_name: str = "default"
    node_name: str = ""


class Condition(_Kubernetes, frozen=True):
    type: str = ""
    status: str = ""


class PodStatus(_Kubernetes, frozen=True):
    pod_ip: str = msgspec.field(name="podIP", default="")
    phase: str = ""
    conditions: list[Condition] = []


class Pod(_Kubernetes, frozen=True):
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


class Deployment(_Kubernetes, frozen=True):
    """Accepted, so that manifests can be applied whole; endpoints come from what runs, not from what is wished for."""


class ServiceAccount(_Kubernetes, frozen=True):
    pass


class KubernetesNode(_Kubernetes, frozen=True):
    """Its labels say in which region and zone the pods are that run there."""


class MeshConfigMap(_Kubernetes, frozen=True):
    """ConfigMap `istio` in `istio-system` holds MeshConfig; every other ConfigMap means nothing here."""

    data: dict[str, str] = {}


MESH_CONFIG_KEY = ("ConfigMap", "istio-system", "istio")
TOPOLOGY_LABELS = ("topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone")
"""Region, zone and subzone, as failoverPriority may name them."""


class DefaultTrafficPolicy(_Kubernetes, frozen=True):
    connection_pool: ConnectionPool | None = None
    outlier_detection: OutlierDetection | None = None


class BodyInCheck(_Kubernetes, frozen=True):
    max_request_bytes: Count = 0
    allow_partial_message: bool = False
    pack_as_bytes: bool = False


class ExtAuthz(_Kubernetes, frozen=True):
    service: str
    port: Port
    timeout: Duration | None = None
    fail_open: bool = False
    status_on_error: str = "403"
    path_prefix: str = ""
    include_request_headers_in_check: list[str] = []
    include_additional_headers_in_check: dict[str, str] = {}
    include_request_body_in_check: BodyInCheck | None = None
    headers_to_upstream_on_allow: list[str] = []
    headers_to_downstream_on_deny: list[str] = []
    headers_to_downstream_on_allow: list[str] = []


class ExtensionProvider(_Kubernetes, frozen=True):
    name: str
    envoy_ext_authz_http: ExtAuthz | None = None
    envoy_ext_authz_grpc: ExtAuthz | None = None


class PathNormalization(_Kubernetes, frozen=True):
    normalization: Literal["DEFAULT", "NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES"] = "DEFAULT"


class GatewayTopology(_Kubernetes, frozen=True):
    num_trusted_proxies: Count = 0


class ProxyConfig(_Kubernetes, frozen=True):
    gateway_topology: GatewayTopology | None = None


class MeshConfig(_Kubernetes, frozen=True):
    """Istio's MeshConfig, as far as it is heeded; its other fields are for what a mesh without sidecars has not got."""

    root_namespace: str = "istio-system"
    outbound_traffic_policy: OutboundTrafficPolicy | None = None
    connect_timeout: Duration | None = None
    tcp_keepalive: TCPKeepalive | None = None
    h2_upgrade_policy: Literal["DO_NOT_UPGRADE", "UPGRADE"] = msgspec.field(
        name="h2UpgradePolicy", default="DO_NOT_UPGRADE"
    )
    locality_lb_setting: LocalityLbSetting | None = None
    zone_aware_lb_setting: ZoneAwareLbSetting | None = None
    default_http_retry_policy: HTTPRetry | None = None
    default_traffic_policy: DefaultTrafficPolicy | None = None
    default_service_export_to: list[str] = []
    default_virtual_service_export_to: list[str] = []
    default_destination_rule_export_to: list[str] = []
    trust_domain: str = ""
    trust_domain_aliases: list[str] = []
    enable_auto_mtls: bool = True
    path_normalization: PathNormalization | None = None
    default_config: ProxyConfig | None = None
    extension_providers: list[ExtensionProvider] = []


# security.istio.io


class TargetRef(_Istio, frozen=True):
    kind: str
    name: str
    group: str = ""
    namespace: str = ""


class MutualTls(_Istio, frozen=True):
    mode: Literal["UNSET", "DISABLE", "PERMISSIVE", "STRICT"] = "UNSET"


class PeerAuthentication(_Istio, frozen=True):
    selector: WorkloadSelector | None = None
    mtls: MutualTls | None = None
    port_level_mtls: dict[str, MutualTls] = {}


class Source(_Istio, frozen=True):
    principals: list[str] = []
    not_principals: list[str] = []
    request_principals: list[str] = []
    not_request_principals: list[str] = []
    namespaces: list[str] = []
    not_namespaces: list[str] = []
    service_accounts: list[str] = []
    not_service_accounts: list[str] = []
    trust_domains: list[str] = []
    not_trust_domains: list[str] = []
    ip_blocks: list[str] = []
    not_ip_blocks: list[str] = []
    remote_ip_blocks: list[str] = []
    not_remote_ip_blocks: list[str] = []


class Operation(_Istio, frozen=True):
    hosts: list[str] = []
    not_hosts: list[str] = []
    ports: list[str] = []
    not_ports: list[str] = []
    methods: list[str] = []
    not_methods: list[str] = []
    paths: list[str] = []
    not_paths: list[str] = []


class From(_Istio, frozen=True):
    source: Source | None = None


class To(_Istio, frozen=True):
    operation: Operation | None = None


class When(_Istio, frozen=True):
    key: str
    values: list[str] = []
    not_values: list[str] = []


class AccessRule(_Istio, frozen=True):
    from_: list[From] | None = msgspec.field(name="from", default=None)
    to: list[To] | None = None
    when: list[When] = []


class Provider(_Istio, frozen=True):
    name: str


class AuthorizationPolicy(_Istio, frozen=True):
    selector: WorkloadSelector | None = None
    target_ref: TargetRef | None = None
    target_refs: list[TargetRef] = []
    rules: list[AccessRule] = []
    action: Literal["ALLOW", "DENY", "AUDIT", "CUSTOM"] = "ALLOW"
    provider: Provider | None = None


class JwtHeader(_Istio, frozen=True):
    name: str
    prefix: str = ""


class ClaimToHeader(_Istio, frozen=True):
    header: str
    claim: str


class JwtRule(_Istio, frozen=True):
    issuer: str
    audiences: list[str] = []
    jwks_uri: str = ""
    jwks: str = ""
    from_headers: list[JwtHeader] = []
    from_params: list[str] = []
    from_cookies: list[str] = []
    output_payload_to_header: str = ""
    output_claim_to_headers: list[ClaimToHeader] = []
    forward_original_token: bool = False
    space_delimited_claims: list[str] = []
    timeout: Duration | None = None


class RequestAuthentication(_Istio, frozen=True):
    selector: WorkloadSelector | None = None
    target_ref: TargetRef | None = None
    target_refs: list[TargetRef] = []
    jwt_rules: list[JwtRule] = []


# telemetry.istio.io

TelemetryMode = Literal["CLIENT_AND_SERVER", "CLIENT", "SERVER"]


class TelemetryMatch(_Istio, frozen=True):
    mode: TelemetryMode = "CLIENT_AND_SERVER"


class ProviderRef(_Istio, frozen=True):
    name: str


class LiteralTag(_Istio, frozen=True):
    value: str


class NamedTag(_Istio, frozen=True):
    name: str
    default_value: str = ""


class CustomTag(_Istio, frozen=True):
    literal: LiteralTag | None = None
    environment: NamedTag | None = None
    header: NamedTag | None = None
    formatter: LiteralTag | None = None


class Tracing(_Istio, frozen=True):
    match: TelemetryMatch | None = None
    providers: list[ProviderRef] = []
    random_sampling_percentage: Percent100 | None = None
    disable_span_reporting: bool | None = None
    custom_tags: dict[str, CustomTag] = {}
    enable_istio_tags: bool | None = None
    use_request_id_for_trace_sampling: bool | None = None
    disable_context_propagation: Unsupported = None


class MetricSelector(_Istio, frozen=True):
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


class TagOverride(_Istio, frozen=True):
    operation: Literal["UPSERT", "REMOVE"] = "UPSERT"
    value: str = ""


class MetricsOverride(_Istio, frozen=True):
    match: MetricSelector | None = None
    disabled: bool | None = None
    tag_overrides: dict[str, TagOverride] = {}


class TelemetryMetrics(_Istio, frozen=True):
    providers: list[ProviderRef] = []
    overrides: list[MetricsOverride] = []
    reporting_interval: Unsupported = None


class AccessLogFilter(_Istio, frozen=True):
    expression: str = ""


class AccessLogging(_Istio, frozen=True):
    match: TelemetryMatch | None = None
    providers: list[ProviderRef] = []
    disabled: bool | None = None
    filter: AccessLogFilter | None = None


class Telemetry(_Istio, frozen=True):
    selector: WorkloadSelector | None = None
    target_ref: TargetRef | None = None
    target_refs: list[TargetRef] = []
    tracing: list[Tracing] = []
    metrics: list[TelemetryMetrics] = []
    access_logging: list[AccessLogging] = []


# meshlib.io: what a call may need and Istio has no word for


class Breaker(_Istio, frozen=True):
    consecutive_failures: Count = 0
    failure_rate: Percent100 = 0.0
    slow_call_rate: Percent100 = 0.0
    slow_call: Duration | None = None
    window: Duration | None = None
    minimum_calls: Annotated[int, Meta(ge=1)] | None = None
    open_for: Duration | None = None
    probes: Annotated[int, Meta(ge=1)] | None = None
    forced: Literal["OPEN", "CLOSED"] | None = None


class RateBudget(_Istio, frozen=True):
    ratio: Annotated[float, Meta(ge=0, le=1000)] | None = None
    min_per_second: Annotated[float, Meta(ge=0)] | None = None
    ttl: Duration | None = None


class Hedge(_Istio, frozen=True):
    delay: Duration
    max_attempts: Annotated[int, Meta(ge=2, le=5)] = 2


class HTTPHealthCheck(_Istio, frozen=True):
    path: str = "/"
    host: str = ""
    expected_statuses: list[int | str] = []


class GRPCHealthCheck(_Istio, frozen=True):
    service: str = ""


class TCPHealthCheck(_Istio, frozen=True):
    pass


class HealthCheck(_Istio, frozen=True):
    http: HTTPHealthCheck | None = None
    grpc: GRPCHealthCheck | None = None
    tcp: TCPHealthCheck | None = None
    port: Port | None = None
    interval: Duration | None = None
    timeout: Duration | None = None
    healthy_threshold: Annotated[int, Meta(ge=1)] | None = None
    unhealthy_threshold: Annotated[int, Meta(ge=1)] | None = None


class StatisticalDetection(_Istio, frozen=True):
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


class Limit(_Istio, frozen=True):
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


class DescriptorEntry(_Istio, frozen=True):
    """One of `from`, as in Limit.keys, and `value`."""

    key: str
    from_: str = msgspec.field(name="from", default="")
    value: str = ""


class QuotaRule(_Istio, frozen=True):
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


class RateLimitPolicy(_Istio, frozen=True):
    limits: list[Limit] = []
    selector: WorkloadSelector | None = None
    quotas: list[QuotaRule] = []


class BackendTrafficPolicy(_Istio, frozen=True):
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


class EnvoyConfigPatch(_Istio, frozen=True):
    """match, patch: read by envoy_filters.py, as far as they are understood."""

    apply_to: str = ""
    match: dict[str, Any] = {}
    patch: dict[str, Any] = {}


class EnvoyFilter(_Istio, frozen=True):
    workload_selector: WorkloadSelector | None = None
    target_refs: list[Any] = []
    config_patches: list[EnvoyConfigPatch] = []
    priority: int = 0


Spec = (
    VirtualService
    | DestinationRule
    | ServiceEntry
    | WorkloadEntry
    | Sidecar
    | Gateway
    | BackendTrafficPolicy
    | RateLimitPolicy
    | EnvoyFilter
    | Service
    | Endpoints
    | EndpointSlice
    | Pod
    | Deployment
    | ServiceAccount
    | KubernetesNode
    | MeshConfigMap
    | PeerAuthentication
    | AuthorizationPolicy
    | RequestAuthentication
    | gateway_kinds.HTTPRoute
    | gateway_kinds.GRPCRoute
    | gateway_kinds.Gateway
    | gateway_kinds.GatewayClass
    | gateway_kinds.ReferenceGrant
    | Telemetry
)


@dataclass(frozen=True, slots=True)
class KindShape:
    """Where an API kind's content stands: under `spec`, or beside `metadata` (whole)."""

    spec: type[msgspec.Struct]
    group: str
    versions: tuple[str, ...]
    whole: bool = False


SHAPES: Mapping[str, KindShape] = {
    "VirtualService": KindShape(VirtualService, NETWORKING, ISTIO_VERSIONS),
    "DestinationRule": KindShape(DestinationRule, NETWORKING, ISTIO_VERSIONS),
    "ServiceEntry": KindShape(ServiceEntry, NETWORKING, ISTIO_VERSIONS),
    "WorkloadEntry": KindShape(WorkloadEntry, NETWORKING, ISTIO_VERSIONS),
    "Sidecar": KindShape(Sidecar, NETWORKING, ISTIO_VERSIONS),
    "Gateway": KindShape(Gateway, NETWORKING, ISTIO_VERSIONS),
    "BackendTrafficPolicy": KindShape(BackendTrafficPolicy, OWN, OWN_VERSIONS),
    "PeerAuthentication": KindShape(PeerAuthentication, SECURITY, SECURITY_VERSIONS),
    "AuthorizationPolicy": KindShape(AuthorizationPolicy, SECURITY, SECURITY_VERSIONS),
    "RequestAuthentication": KindShape(RequestAuthentication, SECURITY, SECURITY_VERSIONS),
    "Telemetry": KindShape(Telemetry, TELEMETRY, TELEMETRY_VERSIONS),
    "RateLimit": KindShape(RateLimitPolicy, OWN, OWN_VERSIONS),
    "EnvoyFilter": KindShape(EnvoyFilter, NETWORKING, ("v1alpha3",)),
    "Service": KindShape(Service, "", ("v1",)),
    "Endpoints": KindShape(Endpoints, "", ("v1",), whole=True),
    "EndpointSlice": KindShape(EndpointSlice, "discovery.k8s.io", ("v1",), whole=True),
    "Pod": KindShape(Pod, "", ("v1",), whole=True),
    "Deployment": KindShape(Deployment, "apps", ("v1",)),
    "Node": KindShape(KubernetesNode, "", ("v1",), whole=True),
    "ServiceAccount": KindShape(ServiceAccount, "", ("v1",), whole=True),
    "ConfigMap": KindShape(MeshConfigMap, "", ("v1",), whole=True),
}


GATEWAY_API: Mapping[str, KindShape] = {
    kind: KindShape(spec, gateway_kinds.GROUP, gateway_kinds.VERSIONS) for kind, spec in gateway_kinds.KINDS.items()
}


def shape_of(kind: str, group: str) -> KindShape | None:
    """Istio and the Gateway API both have a Gateway."""
    return GATEWAY_API.get(kind) if group == gateway_kinds.GROUP else SHAPES.get(kind)


@dataclass(frozen=True, slots=True)
class Object:
    """One object that was read. source: `file.yaml:12`. spec: None for a kind that means nothing to the mesh yet.

    raw: the mapping as written. created: metadata.creationTimestamp, "" where none is given; the older of two objects
    that claim the same wins.
    """

    api_version: str
    kind: str
    namespace: str
    name: str
    source: str
    spec: Spec | None
    raw: Mapping[str, Any] = field(compare=False, repr=False)
    labels: Mapping[str, str] = field(default_factory=dict, repr=False)
    created: str = ""
    rule_sources: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """`file.yaml:15` of each of `spec.rules`."""
    place: Callable[[Path], str] | None = field(default=None, compare=False, repr=False)
    """Where what a path names stands; None where there are no lines."""
    unusable: ConfigurationError | None = field(default=None, repr=False)
    """Why the object itself is not in force; then `spec` is what stands in its place (closing.py). namespace: "" is
    every one."""

    def at(self, path: Path) -> str:
        """`file.yaml:17`: where the field stands, or what is nearest to it."""
        return self.source if self.place is None else self.place(path)

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.kind, self.namespace, self.name)

    @property
    def title(self) -> str:
        """`VirtualService default/reviews`"""
        return f"{self.kind} {self.namespace}/{self.name}"

    @property
    def origin(self) -> str:
        """`VirtualService default/reviews (reviews.yaml)`: what a person would look for. The line is left out, or an
        edit of one object would be a change of all that stand below it."""
        file = self.source.rpartition(":")[0].rpartition("/")[2]
        return f"{self.title} ({file})" if file else self.title

    def same_content(self, other: Object) -> bool:
        """Whether only the place differs where it was read, or how its namespace was given."""
        return self.whole == other.whole

    @property
    def whole(self) -> dict[str, Any]:
        """`raw`, with the namespace in it."""
        return {**self.raw, "metadata": dict(self.raw.get("metadata") or {}, namespace=self.namespace)}

    def __hash__(self) -> int:
        return hash((self.key, self.source))


def dump_yaml(given: Object) -> str:
    """The object as YAML text that parse_text reads to an equal object."""
    return str(yaml.dump(given.whole, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


class _Dumper(yaml.SafeDumper):
    """PyYAML's reader and Kubernetes' do not agree on what is text without quotes: a label `12e4567` is a number to
    the latter. Quoted is what either of them takes for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        odd = not is_text(text) or any(character in text for character in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if odd else "|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_text)
