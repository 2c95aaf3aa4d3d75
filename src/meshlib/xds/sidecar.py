"""What does an Envoy beside a service need? Listeners on addresses of its own, without any capture of traffic: one for
each port that others call, and one that the service sends its own calls to, as to an HTTP proxy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from meshlib.model import (
    CATCH_ALL,
    ClusterType,
    DirectResponse,
    Forward,
    Listener,
    Route,
    RouteConfiguration,
    RouteMatch,
    Snapshot,
    VirtualHost,
)
from meshlib.model import Cluster as ModelCluster
from meshlib.xds import messages as m
from meshlib.xds.encode import outbound_manager
from meshlib.xds.encode_clusters import HTTP_OPTIONS
from meshlib.xds.encode_inbound import MANAGER_FILTER
from meshlib.xds.pieces import set_seconds
from meshlib.xds.reader import Reader

OUTBOUND = "outbound"
"""The listener for calls that go out, and its routes."""
_STATIC = 0
CONNECT_TIMEOUT = 10.0
UNLIMITED = 0xFFFFFFFF


def inbound_cluster_name(port: int) -> str:
    """Istio's."""
    return f"inbound|{port}||"


def inbound_cluster(port: int, host: str, application_port: int) -> Any:
    """The service behind the Envoy; spoken to in the protocol in which it is called."""
    message = m.Cluster(name=inbound_cluster_name(port), type=_STATIC)
    set_seconds(message.connect_timeout, CONNECT_TIMEOUT)
    thresholds = message.circuit_breakers.thresholds.add()
    for name in ("max_connections", "max_pending_requests", "max_requests", "max_retries"):
        getattr(thresholds, name).value = UNLIMITED  # the callers' limits hold
    options = m.HttpProtocolOptions()
    options.use_downstream_protocol_config.http_protocol_options.SetInParent()
    options.use_downstream_protocol_config.http2_protocol_options.SetInParent()
    message.typed_extension_protocol_options[HTTP_OPTIONS].CopyFrom(m.pack(options))
    message.load_assignment.cluster_name = message.name
    address = message.load_assignment.endpoints.add().lb_endpoints.add().endpoint.address.socket_address
    address.address, address.port_value = host, application_port
    return message


def outbound_listener(host: str, port: int, reader: Reader) -> Any:
    """Where the service sends its calls: `http_proxy=http://<host>:<port>`, or by the Host header alone."""
    message = m.Listener(name=OUTBOUND)
    message.address.socket_address.address, message.address.socket_address.port_value = host, port
    manager = outbound_manager(OUTBOUND, OUTBOUND, reader=reader)
    manager.upgrade_configs.add(upgrade_type="websocket")
    filters = message.filter_chains.add().filters
    filters.add(name=MANAGER_FILTER).typed_config.CopyFrom(m.pack(manager))
    return message


def is_reachable(cluster: ModelCluster) -> bool:
    """Without capture there is no original destination: such a cluster would lead back to the Envoy itself."""
    return cluster.type is not ClusterType.ORIGINAL_DST


def outbound_routes(snapshot: Snapshot) -> RouteConfiguration:
    """Every host that may be called, in one table. A name without a port means port 80, or the lowest that there is.

    What the mesh does not know is answered 502: there is no original destination to pass it on to.
    """
    tables = {each.name: each for each in snapshot.route_configurations}
    listeners = [each for each in snapshot.listeners if not each.is_bound and each.name != CATCH_ALL]
    taken: set[str] = {"*"}
    hosts: list[VirtualHost] = []
    for table in dict.fromkeys(each.route_configuration for each in sorted(listeners, key=_port)):
        for host in tables[table].virtual_hosts if table in tables else ():
            domains = tuple(_free(host.domains, taken))
            if domains:
                hosts.append(VirtualHost(host.name, domains, _routes(host.routes), host.require_tls))
    unknown = Route(RouteMatch(), DirectResponse(502), "block_all")
    return RouteConfiguration(OUTBOUND, (*hosts, VirtualHost("block_all", ("*",), (unknown,))))


def _port(listener: Listener) -> tuple[int, str]:
    port = listener.name.rpartition(":")[2]
    number = int(port) if port.isdecimal() else 0
    return (0 if number == 80 else number, listener.name)


def _free(domains: Iterable[str], taken: set[str]) -> Iterator[str]:
    """One domain in two places is refused by Envoy: the first has it."""
    for domain in domains:
        if domain.lower() not in taken:
            taken.add(domain.lower())
            yield domain


def _routes(routes: tuple[Route, ...]) -> tuple[Route, ...]:
    return tuple(each for each in routes if not (isinstance(each.action, Forward) and not each.action.clusters))
