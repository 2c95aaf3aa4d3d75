"""Who is asking for configuration, and what does it serve? The node of xDS and the workload behind it."""

from __future__ import annotations

from enum import StrEnum

from meshlib.model.cluster import NOWHERE, Locality
from meshlib.model.values import dataclass

TLS_MODE = "security.istio.io/tlsMode"
"""Istio's label; `istio` says that a workload serves the mesh's mTLS."""


class NodeKind(StrEnum):
    """Istio's node types, as they stand at the front of a node id."""

    SIDECAR = "sidecar"
    """A service: gets outbound listeners by name, on demand."""
    ROUTER = "router"
    """A gateway: gets bound listeners, by wildcard subscription."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One running process that may serve: what Kubernetes would call a pod, seen by the mesh.

    name: the workload's name (`reviews-v2`), shared by its replicas. service: the Service it joins by name; "" joins
    only those whose selector matches `labels`. labels: sorted (key, value) pairs.
    address, port: where it serves; port 0 serves nothing. port_names: sorted (Service port name, port) pairs where
    several ports are served; `port` answers for every other.
    """

    name: str
    namespace: str = "default"
    service: str = ""
    service_account: str = "default"
    labels: tuple[tuple[str, str], ...] = ()
    address: str = ""
    port: int = 0
    port_names: tuple[tuple[str, int], ...] = ()
    locality: Locality = NOWHERE


@dataclass(frozen=True, slots=True)
class Node:
    """An xDS client. `id` is Istio's form, `sidecar~<ip>~<instance>.<namespace>~<namespace>.svc.cluster.local`, and
    names one process. `user_agent`: `meshlib/0.1.0`, `gRPC C-core/...`, `envoy/1.40.0`; decides the forms it is sent.
    ready: the workload's port accepts connections, so it may be registered as an endpoint.
    certificates: where the process itself has its certificate of the mesh, if it has one: the provider of gRPC's
      bootstrap (`default`), or the folder of an Envoy (tls.crt, tls.key, ca.crt). inbound: of an Envoy beside a
      service, (port that it takes calls on, `host:port` of the service) pairs. outbound: `host:port` where that Envoy
      takes calls that go out.
    discovery_cluster: of an Envoy without ADS, what its bootstrap calls the cluster of the control plane.
    metrics_port: where Prometheus may scrape it; 0 is nowhere.
    takes_ttl: it lets go of a resource whose time to live has passed.
    """

    id: str
    workload: Workload
    kind: NodeKind = NodeKind.SIDECAR
    user_agent: str = ""
    trust_domain: str = "cluster.local"
    cluster_id: str = "Kubernetes"
    ready: bool = False
    certificates: str = ""
    inbound: tuple[tuple[int, str], ...] = ()
    outbound: str = ""
    metrics_port: int = 0
    discovery_cluster: str = ""
    takes_ttl: bool = False
