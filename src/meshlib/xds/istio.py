"""How is an istiod spoken to? The node as its generator for gRPC wants it, and what its answers leave unsaid.

That generator (pilot/pkg/networking/grpcgen) writes for clients that can do less than we can: it secures a cluster only
where a DestinationRule says ISTIO_MUTUAL, since gRPC could not call a PERMISSIVE sidecar otherwise. Its endpoints tell
all the same which of them take the mesh's mTLS; so calls to those are secured, as a sidecar does it (auto-mTLS).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meshlib.model import Cluster, ClusterType, Node, RouteConfiguration, ServiceName, UpstreamTls, VirtualHost
from meshlib.xds.decode import Decoded, decode_resource
from meshlib.xds.encode import encode_node

GENERATOR = "grpc"
"""Without it an istiod sends an Envoy's whole configuration."""
_OURS = "MESHLIB_"


def encode_istio_node(node: Node) -> Any:
    """The node as Istio's agent writes it for gRPC. Without ISTIO_VERSION, which gates what older proxies are spared:
    to an istiod, who names none is the newest."""
    message = encode_node(node)
    for name in [name for name in message.metadata.fields if name.startswith(_OURS)]:
        del message.metadata.fields[name]
    message.metadata.update({"GENERATOR": GENERATOR, "MESH_ID": node.trust_domain})
    pod = node.id.split("~")[2].rpartition(".")[0] if node.id.count("~") == 3 else ""
    if pod:
        message.metadata.update({"NAME": pod})
    return message


def decode_istio_resource(type_url: str, data: bytes) -> Decoded:
    """`decode_resource`, with what an istiod's generator for gRPC means and does not write. Raises InvalidResource."""
    found = decode_resource(type_url, data)
    if isinstance(found, Cluster) and found.type is ClusterType.EDS:
        return _completed(found)
    if isinstance(found, RouteConfiguration):
        return _with_ports(found)
    return found


def _completed(cluster: Cluster) -> Cluster:
    """With auto-mTLS, the server name that Istio's clients ask for, and whose cluster it is."""
    parts = cluster.name.split("|")
    if len(parts) != 4:
        return cluster
    _, _, subset, host = parts
    name, _, rest = host.partition(".")
    service = ServiceName(host, name, rest.partition(".")[0])
    server_name = cluster.name.replace("|", "_.")
    tls = cluster.tls
    if tls is None:
        tls = UpstreamTls("ISTIO_MUTUAL", server_name, auto=True)
    elif tls.is_mesh and not tls.sni:
        tls = replace(tls, sni=server_name)
    return replace(cluster, tls=tls, service=cluster.service or service, subset=cluster.subset or subset)


def _with_ports(routes: RouteConfiguration) -> RouteConfiguration:
    """Later versions of Istio write domains without their port, and have Envoy leave out the caller's."""
    parts = routes.name.split("|")
    if len(parts) != 4 or not parts[1].isdecimal():
        return routes
    seen = {domain for host in routes.virtual_hosts for domain in host.domains}

    def completed(host: VirtualHost) -> VirtualHost:
        plain = (domain for domain in host.domains if "*" not in domain and ":" not in domain)
        added = (f"{domain}:{parts[1]}" for domain in plain)
        return replace(host, domains=(*host.domains, *(each for each in added if each not in seen)))

    return replace(routes, virtual_hosts=tuple(map(completed, routes.virtual_hosts)))
