"""What holds for the whole mesh? MeshConfig, from Istio's own place for it, as far as it is heeded."""

from __future__ import annotations

from collections.abc import Iterable

from meshlib.istio import resources as r
from meshlib.istio.mesh_config import mesh_config
from meshlib.istio.problems import Refused
from meshlib.model.values import dataclass

ROOT_NAMESPACE = "istio-system"
LOCALITY = r.LocalityLbSetting(enabled=True)
"""Istio's default (pkg/config/mesh/mesh.go): on, and of effect only with outlier detection."""


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """registry_only: hosts outside the registry get 502. The export_to of each kind: of objects that name none.
    trusted_proxies: how many stand in front of the gateways. normalization: of paths, before rules see them.

    origin: the object that says all this, "" for none.
    """

    registry_only: bool = False
    root_namespace: str = ROOT_NAMESPACE
    connect_timeout: float = 10.0
    tcp_keepalive: r.TCPKeepalive | None = None
    h2_upgrade: bool = False
    locality: r.LocalityLbSetting | None = LOCALITY
    zone_aware: r.ZoneAwareLbSetting | None = None
    retries: r.HTTPRetry | None = None
    connection_pool: r.ConnectionPool | None = None
    outlier_detection: r.OutlierDetection | None = None
    service_export_to: tuple[str, ...] = ()
    virtual_service_export_to: tuple[str, ...] = ()
    destination_rule_export_to: tuple[str, ...] = ()
    origin: str = ""
    trust_domain: str = "cluster.local"
    trust_domain_aliases: tuple[str, ...] = ()
    extension_providers: tuple[r.ExtensionProvider, ...] = ()
    auto_mtls: bool = True
    trusted_proxies: int = 0
    normalization: str = "BASE"


def mesh_settings(objects: Iterable[r.Object]) -> MeshSettings:
    """From ConfigMap `istio` of namespace `istio-system`, else the defaults."""
    for each in objects:
        if each.key == r.MESH_CONFIG_KEY and isinstance(each.spec, r.MeshConfigMap):
            try:
                found = mesh_config(each.spec)
            except Refused:
                return MeshSettings()  # parse_text has said so
            policy = found.default_traffic_policy or r.DefaultTrafficPolicy()
            outbound = found.outbound_traffic_policy
            topology = (found.default_config or r.ProxyConfig()).gateway_topology or r.GatewayTopology()
            paths = found.path_normalization or r.PathNormalization()
            return MeshSettings(
                outbound is not None and outbound.is_registry_only,
                found.root_namespace,
                10.0 if found.connect_timeout is None else found.connect_timeout.seconds,
                found.tcp_keepalive,
                found.h2_upgrade_policy == "UPGRADE",
                LOCALITY if found.locality_lb_setting is None else found.locality_lb_setting,
                found.zone_aware_lb_setting,
                found.default_http_retry_policy,
                policy.connection_pool,
                policy.outlier_detection,
                tuple(found.default_service_export_to),
                tuple(found.default_virtual_service_export_to),
                tuple(found.default_destination_rule_export_to),
                each.origin,
                found.trust_domain or "cluster.local",
                tuple(found.trust_domain_aliases),
                tuple(found.extension_providers),
                found.enable_auto_mtls,
                topology.num_trusted_proxies,
                "BASE" if paths.normalization == "DEFAULT" else paths.normalization,
            )
    return MeshSettings()
