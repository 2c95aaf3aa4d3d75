"""What does a mesh care for in Kubernetes' own kinds, and in the config map that holds Istio's MeshConfig?

Source: the Kubernetes API reference. Their kinds have many more fields, which are passed over.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from meshlib.istio.resources.base import Count, Duration, KubernetesStruct, Labels, Port
from meshlib.istio.resources.networking import (
    ConnectionPool,
    HTTPRetry,
    LocalityLbSetting,
    OutboundTrafficPolicy,
    OutlierDetection,
    TCPKeepalive,
    ZoneAwareLbSetting,
)


class ServicePort(KubernetesStruct, frozen=True):
    port: Port
    name: str = ""
    target_port: int | str | None = None
    protocol: str = "TCP"
    app_protocol: str = ""


class Service(KubernetesStruct, frozen=True):
    traffic_distribution: str = ""
    selector: Labels = {}
    ports: list[ServicePort] = []
    cluster_ip: str = msgspec.field(name="clusterIP", default="")
    type: str = "ClusterIP"
    external_name: str = ""
    ip_families: list[str] = []


class TargetReference(KubernetesStruct, frozen=True):
    kind: str = ""
    name: str = ""


class EndpointAddress(KubernetesStruct, frozen=True):
    ip: str
    target_ref: TargetReference | None = None


class EndpointPort(KubernetesStruct, frozen=True):
    port: Port
    name: str = ""


class EndpointSubset(KubernetesStruct, frozen=True):
    addresses: list[EndpointAddress] = []
    ports: list[EndpointPort] = []


class Endpoints(KubernetesStruct, frozen=True):
    subsets: list[EndpointSubset] = []


class SliceConditions(KubernetesStruct, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ForZone(KubernetesStruct, frozen=True):
    name: str = ""


class SliceHints(KubernetesStruct, frozen=True):
    """Whose calls the endpoint should take. for_nodes has no meaning to who does not know its node."""

    for_zones: list[ForZone] = []


class SliceEndpoint(KubernetesStruct, frozen=True):
    addresses: list[str]
    conditions: SliceConditions = SliceConditions()
    target_ref: TargetReference | None = None
    zone: str = ""
    node_name: str = ""
    hints: SliceHints = SliceHints()


class SlicePort(KubernetesStruct, frozen=True):
    port: Port | None = None
    name: str = ""


class EndpointSlice(KubernetesStruct, frozen=True):
    endpoints: list[SliceEndpoint] = []
    ports: list[SlicePort] = []
    address_type: str = "IPv4"


class ContainerPort(KubernetesStruct, frozen=True):
    container_port: Port
    name: str = ""


class Container(KubernetesStruct, frozen=True):
    name: str = ""
    ports: list[ContainerPort] = []


class PodSpec(KubernetesStruct, frozen=True):
    containers: list[Container] = []
    service_account_name: str = "default"
    node_name: str = ""


class Condition(KubernetesStruct, frozen=True):
    type: str = ""
    status: str = ""


class PodStatus(KubernetesStruct, frozen=True):
    pod_ip: str = msgspec.field(name="podIP", default="")
    phase: str = ""
    conditions: list[Condition] = []


class Pod(KubernetesStruct, frozen=True):
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


class Deployment(KubernetesStruct, frozen=True):
    """Accepted, so that manifests can be applied whole; endpoints come from what runs, not from what is wished for."""


class ServiceAccount(KubernetesStruct, frozen=True):
    pass


class KubernetesNode(KubernetesStruct, frozen=True):
    """Its labels say in which region and zone the pods are that run there."""


class MeshConfigMap(KubernetesStruct, frozen=True):
    """ConfigMap `istio` in `istio-system` holds MeshConfig; every other ConfigMap means nothing here."""

    data: dict[str, str] = {}


MESH_CONFIG_KEY = ("ConfigMap", "istio-system", "istio")
TOPOLOGY_LABELS = ("topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone")
"""Region, zone and subzone, as failoverPriority may name them."""


class DefaultTrafficPolicy(KubernetesStruct, frozen=True):
    connection_pool: ConnectionPool | None = None
    outlier_detection: OutlierDetection | None = None


class BodyInCheck(KubernetesStruct, frozen=True):
    max_request_bytes: Count = 0
    allow_partial_message: bool = False
    pack_as_bytes: bool = False


class ExtAuthz(KubernetesStruct, frozen=True):
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


class ExtensionProvider(KubernetesStruct, frozen=True):
    name: str
    envoy_ext_authz_http: ExtAuthz | None = None
    envoy_ext_authz_grpc: ExtAuthz | None = None


class PathNormalization(KubernetesStruct, frozen=True):
    normalization: Literal["DEFAULT", "NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES"] = "DEFAULT"


class GatewayTopology(KubernetesStruct, frozen=True):
    num_trusted_proxies: Count = 0


class ProxyConfig(KubernetesStruct, frozen=True):
    gateway_topology: GatewayTopology | None = None


class MeshConfig(KubernetesStruct, frozen=True):
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
