"""What does a client that is not ours have to know before it calls the control plane? The bootstrap files of gRPC (gRFC
A27, A29, A36, A65, A97) and of Envoy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meshlib.model import SERVER_PREFIX, Node
from meshlib.model.values import dataclass
from meshlib.xds.encode import node_cluster, node_metadata
from meshlib.xds.encode_clusters import HTTP_OPTIONS
from meshlib.xds.encode_tls import PROVIDER

CERTIFICATE, KEY, ROOTS = "tls.crt", "tls.key", "ca.crt"
REFRESH = 60
"""Seconds after which gRPC looks at its certificate's files again; its own default is 600."""
_XDS = "xds"
_TLS_SOCKET = "envoy.transport_sockets.tls"


@dataclass(frozen=True, slots=True)
class ControlPlaneAddress:
    """target: `host:port`, or `unix:/path` of a relay on this machine. roots_file: of who vouches for it; "" is
    plaintext. token_file: a JWT that proves who calls, read anew by gRPC before it expires; "" shows none."""

    target: str
    roots_file: str = ""
    token_file: str = ""


def grpc_bootstrap(node: Node, server: ControlPlaneAddress, folder: str = "") -> dict[str, Any]:
    """folder: where the certificate, its key and the roots are; "" where there are none."""
    if server.roots_file:
        credentials: dict[str, Any] = {"type": "tls", "config": {"ca_certificate_file": server.roots_file}}
    else:
        credentials = {"type": "insecure"}
    entry: dict[str, Any] = {
        "server_uri": server.target,
        "channel_creds": [credentials],
        "server_features": ["xds_v3"],
    }
    if server.token_file:
        entry["call_creds"] = [{"type": "jwt_token_file", "config": {"jwt_token_file": server.token_file}}]
    found: dict[str, Any] = {
        "xds_servers": [entry],
        "node": _node(node),
        "server_listener_resource_name_template": f"{SERVER_PREFIX}%s",
    }
    if folder:
        where = Path(folder)
        found["certificate_providers"] = {
            PROVIDER: {
                "plugin_name": "file_watcher",
                "config": {
                    "certificate_file": str(where / CERTIFICATE),
                    "private_key_file": str(where / KEY),
                    "ca_certificate_file": str(where / ROOTS),
                    "refresh_interval": f"{REFRESH}s",
                },
            }
        }
    return found


def envoy_bootstrap(
    node: Node, server: ControlPlaneAddress, admin: tuple[str, int], *, delta: bool = False
) -> dict[str, Any]:
    """Everything comes over one ADS stream: listeners, routes, clusters, endpoints, and secrets. admin: where Envoy
    serves its own admin interface; for this machine only, since whoever reaches it may stop it."""
    ads = {"ads": {}, "resource_api_version": "V3"}
    service: dict[str, Any] = {"envoy_grpc": {"cluster_name": _XDS}}
    if server.token_file:
        raise ValueError("an Envoy does not read tokens from files: give it a relay")
    return {
        "node": _node(node),
        "admin": {"address": _address(*admin)},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC" if delta else "GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": True,
                "grpc_services": [service],
            },
            "lds_config": ads,
            "cds_config": ads,
        },
        "static_resources": {"clusters": [_xds_cluster(server)]},
    }


def _node(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = {"id": node.id, "cluster": node_cluster(node), "metadata": node_metadata(node)}
    place = node.workload.locality
    named = {"region": place.region, "zone": place.zone, "sub_zone": place.subzone}
    if locality := {name: value for name, value in named.items() if value}:
        found["locality"] = locality
    return found


def _xds_cluster(server: ControlPlaneAddress) -> dict[str, Any]:
    http = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    if server.target.startswith("unix:"):
        host, address = "", {"pipe": {"path": server.target.removeprefix("unix:")}}
    else:
        host, _, port = server.target.rpartition(":")
        host = host.strip("[]")
        address = _address(host, int(port))
    cluster: dict[str, Any] = {
        "name": _XDS,
        "type": "STRICT_DNS" if host else "STATIC",
        "connect_timeout": "5s",
        "typed_extension_protocol_options": {
            HTTP_OPTIONS: {
                "@type": http,
                "explicit_http_config": {
                    # Pings, since a control plane whose machine is gone says nothing.
                    "http2_protocol_options": {"connection_keepalive": {"interval": "30s", "timeout": "10s"}}
                },
            }
        },
        "load_assignment": {
            "cluster_name": _XDS,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }
    if server.roots_file:
        cluster["transport_socket"] = {
            "name": _TLS_SOCKET,
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "sni": host,
                "common_tls_context": {
                    "alpn_protocols": ["h2"],
                    "validation_context": {
                        "trusted_ca": {"filename": server.roots_file},
                        "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": host}}],
                    },
                },
            },
        }
    return cluster


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}
