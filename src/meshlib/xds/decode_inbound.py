"""How are calls taken, as a gRPC server's listener says it? A Listener of Istio's generator for gRPC -> Inbound.

Such a listener is one filter chain, or one with TLS and one without; each is an HTTP connection manager with RBAC
filters and a router, whose one route takes everything. What is more than that, and may turn somebody away, is refused.
"""

from __future__ import annotations

from typing import Any

from meshlib.model import Access, AccessRule, Action, Inbound, TlsMode
from meshlib.xds import fields as read
from meshlib.xds import messages as m
from meshlib.xds.decode_rbac import filter_rules
from meshlib.xds.decode_tls import is_secured, mesh_server_tls
from meshlib.xds.fields import Wrong

_DEFAULT_FILTER_CHAIN, _FILTER_CHAIN_MATCHER, _DISCOVERED_FILTER_CHAINS = 25, 32, 36
_RESTRICTING = (_DEFAULT_FILTER_CHAIN, _FILTER_CHAIN_MATCHER, _DISCOVERED_FILTER_CHAINS)
_OF_ALL_HOSTS, _DISCOVERED_HOSTS, _OF_ALL_ROUTES = 16, 9, 15
"""typed_per_filter_config of a RouteConfiguration, its vhds, and the first of a VirtualHost."""
_CHAIN_TIMEOUT, _CHAIN_METADATA = 9, 5
_PASSED_OVER = frozenset({m.type_url(m.Router), m.type_url(m.HTTPFault)})
_TRANSPORTS = {True: ("", "tls"), False: ("", "raw_buffer")}


def server_inbound(message: Any) -> Inbound:
    """Raises Wrong.

    Istio writes PERMISSIVE for gRPC as it writes DISABLE, a chain without TLS, since gRPC can't take both on one port.
    Here a port can, so both are PERMISSIVE: that lets in nobody who might not come in plaintext anyway.
    """
    read.without(message, "filter_chains", *_RESTRICTING)
    if message.listener_filters:
        raise Wrong("listener_filters", "must be empty for a gRPC server (gRFC A36)")
    if not message.filter_chains:
        raise Wrong("filter_chains", "is empty")
    address = message.address.socket_address
    if not 0 < address.port_value < 65536:
        raise Wrong("address", f"is no address: {address.address!r} port {address.port_value}")
    found: dict[bool, Access] = {}
    for index, chain in enumerate(message.filter_chains):
        is_tls, access = _chain(chain, f"filter_chains[{index}]")
        if is_tls in found:
            raise Wrong(f"filter_chains[{index}]", f"is the second {'with' if is_tls else 'without'} TLS")
        found[is_tls] = access
    accesses = list(found.values())
    if any(each != accesses[0] for each in accesses):
        raise Wrong("filter_chains", "have rules of their own: here they are a port's")
    mode = TlsMode.PERMISSIVE if False in found else TlsMode.STRICT
    return Inbound(message.name, address.address, int(address.port_value), mode, access=accesses[0])


def _chain(message: Any, field: str) -> tuple[bool, Access]:
    """Whether it is one with TLS, and its rules."""
    read.closed(message, field, _CHAIN_TIMEOUT, _CHAIN_METADATA)
    is_tls = is_secured(message)
    match = message.filter_chain_match
    read.closed(match, f"{field}.filter_chain_match")
    if match.server_names or match.transport_protocol not in _TRANSPORTS[is_tls]:
        raise Wrong(f"{field}.filter_chain_match", "must take every connection of its kind")
    if is_tls:
        place = f"{field}.transport_socket.typed_config"
        context = read.unpacked(message.transport_socket.typed_config, m.DownstreamTlsContext, place)
        mesh_server_tls(context, place)
    if len(message.filters) != 1:
        raise Wrong(f"{field}.filters", f"must be one HttpConnectionManager; found {len(message.filters)}")
    place = f"{field}.filters[0].typed_config"
    manager = read.unpacked(message.filters[0].typed_config, m.HttpConnectionManager, place)
    _check_routes(manager, place)
    return is_tls, Access(tuple(_rules(manager, place)), trusted_hops=manager.xff_num_trusted_hops)


def _rules(manager: Any, field: str) -> list[AccessRule]:
    found: list[AccessRule] = []
    allowing = set[bool]()
    for index, each in enumerate(manager.http_filters):
        place, url = f"{field}.http_filters[{index}]", each.typed_config.type_url
        if each.disabled or url in _PASSED_OVER:
            continue
        if url != m.type_url(m.RbacFilter):
            if each.is_optional:  # gRFC A39: it is left out
                continue
            raise Wrong(place, f"{each.name!r} is not known here: {url or 'without a type'}")
        rules = filter_rules(read.unpacked(each.typed_config, m.RbacFilter, place), place)
        kinds = {rule.dry_run for rule in rules if rule.action is Action.ALLOW}
        if kinds & allowing:  # both would have to allow; here any rule that allows is enough
            raise Wrong(place, "is the second that allows")
        allowing |= kinds
        found += rules
    return found


def _check_routes(manager: Any, field: str) -> None:
    """One route that takes everything: calls that no route takes would be refused, and a route may have filters of its
    own."""
    if manager.WhichOneof("route_specifier") != "route_config":
        raise Wrong(f"{field}.route_specifier", "must be route_config: a server's routes come with its listener")
    place = f"{field}.route_config"
    hosts = manager.route_config.virtual_hosts
    read.without(manager.route_config, place, _OF_ALL_HOSTS, _DISCOVERED_HOSTS)
    for each in hosts:
        read.without(each, f"{place}.virtual_hosts", _OF_ALL_ROUTES)
    if len(hosts) != 1 or list(hosts[0].domains) != ["*"] or len(hosts[0].routes) != 1:
        raise Wrong(f"{place}.virtual_hosts", "must be one with one route, for every domain")
    route = hosts[0].routes[0]
    if route.typed_per_filter_config:
        raise Wrong(f"{place}.virtual_hosts[0].routes[0].typed_per_filter_config", "is not known here")
    # Istio's is `non_forwarding_action` without a value, which some write as nothing at all.
    if route.WhichOneof("action") not in (None, "non_forwarding_action"):
        raise Wrong(f"{place}.virtual_hosts[0].routes[0]", "must be non_forwarding_action: a server answers by itself")
    read.closed(route.match, f"{place}.virtual_hosts[0].routes[0].match")
    is_everything = route.match.WhichOneof("path_specifier") == "prefix" and route.match.prefix in ("", "/")
    if not is_everything or route.match.headers or route.match.query_parameters or route.match.dynamic_metadata:
        raise Wrong(f"{place}.virtual_hosts[0].routes[0].match", "must take every path")
