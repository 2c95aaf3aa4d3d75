"""How does a server that is not ours take calls? Inbound -> the Listener of a gRPC server, or of an Envoy in front of a
service.

- Every rule is a filter of that listener; a server that has none of them has no listener, and serves nobody.
- STRICT never rests on what a server falls back to: without a certificate it gets a listener that denies every call.
- gRPC can't take TLS and plaintext on one port. As in Istio, PERMISSIVE is mutual TLS for one that has a certificate,
  and plaintext for one that has none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meshlib.model import NEVER, Access, AccessRule, Action, Inbound, TlsMode
from meshlib.xds import messages as m
from meshlib.xds.encode_tls import set_mesh_server
from meshlib.xds.http_filters import Upstreams, http_filters
from meshlib.xds.reader import Dialect, Reader

MANAGER_FILTER = "envoy.filters.network.http_connection_manager"
ROUTER_FILTER = "envoy.filters.http.router"
CLOSED = "no certificate for a STRICT port"
"""The name of the rule that stands for it."""
_SANITIZE, _SANITIZE_SET = 0, 3


def server_listener(inbound: Inbound, reader: Reader, host: str, port: int, upstreams: Upstreams) -> Any:
    """Of a gRPC server at `host:port`, which answers by itself."""
    message = _listener(inbound.name, host, port)
    modes = _modes(inbound.tls_mode(port), reader)
    access = _access(inbound, port, reader)
    for is_tls in modes[:1]:
        manager = _manager(inbound.name, access, reader, upstreams, port)
        _everything(manager, inbound.name).non_forwarding_action.SetInParent()
        _add_chain(message, manager, reader, is_tls)
    return message


def sidecar_listener(inbound: Inbound, reader: Reader, host: str, port: int, cluster: str, upstreams: Upstreams) -> Any:
    """Of an Envoy at `host:port`, which hands on to `cluster`."""
    message = _listener(f"inbound_{host}_{port}", host, port)
    modes = _modes(inbound.tls_mode(port), reader)
    if True in modes:
        inspector = message.listener_filters.add(name="envoy.filters.listener.tls_inspector")
        inspector.typed_config.CopyFrom(m.pack(m.TlsInspector()))
    access = _access(inbound, port, reader)
    for is_tls in modes:
        manager = _manager(f"inbound_{port}", access, reader, upstreams, port)
        # As a sidecar: whom remoteIpBlocks mean is the last entry of x-forwarded-for, which a gateway has written.
        manager.use_remote_address.value = False
        set_normalization(manager, access)
        # Whoever calls may say what it likes in this header; what is true is told by the handshake alone.
        manager.forward_client_cert_details = _SANITIZE_SET if is_tls else _SANITIZE
        if is_tls:
            manager.set_current_client_cert_details.uri = True
        manager.upgrade_configs.add(upgrade_type="websocket")
        action = _everything(manager, cluster).route
        action.cluster = cluster
        action.timeout.SetInParent()  # the caller's timeouts hold
        _add_chain(message, manager, reader, is_tls)
    return message


def set_normalization(manager: Any, access: Access) -> None:
    """Which path it is that rules judge."""
    manager.xff_num_trusted_hops = access.trusted_hops
    manager.normalize_path.value = access.normalization != "NONE"
    manager.merge_slashes = access.normalization in ("MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES")
    if access.normalization == "DECODE_AND_MERGE_SLASHES":
        manager.path_with_escaped_slashes_action = manager.UNESCAPE_AND_FORWARD


def _modes(mode: TlsMode, reader: Reader) -> tuple[bool, ...]:
    """Whether TLS, one for each filter chain; gRPC takes the first."""
    if mode is TlsMode.DISABLE or not reader.has_certificates:
        return (False,)
    return (True,) if mode is TlsMode.STRICT else (True, False)


def _access(inbound: Inbound, port: int, reader: Reader) -> Access:
    if inbound.tls_mode(port) is TlsMode.STRICT and not reader.has_certificates:
        closed = AccessRule(CLOSED, Action.ALLOW, NEVER)
        return replace(inbound.access, rules=(closed,), jwt=(), authorizers=())
    return inbound.access


def _listener(name: str, host: str, port: int) -> Any:
    message = m.Listener(name=name)
    message.address.socket_address.address, message.address.socket_address.port_value = host, port
    return message


def _manager(name: str, access: Access, reader: Reader, upstreams: Upstreams, port: int) -> Any:
    manager = m.HttpConnectionManager(stat_prefix=name)
    for filter_name, config in http_filters(access, reader, upstreams, port):
        manager.http_filters.add(name=filter_name).typed_config.CopyFrom(m.pack(config))
    manager.http_filters.add(name=ROUTER_FILTER).typed_config.CopyFrom(m.pack(m.Router()))
    return manager


def _everything(manager: Any, name: str) -> Any:
    """The one route."""
    manager.route_config.name = name
    manager.route_config.validate_clusters.value = False
    host = manager.route_config.virtual_hosts.add(name=name, domains=["*"])
    route = host.routes.add(name="default")
    route.match.prefix = "/"
    return route


def _add_chain(listener: Any, manager: Any, reader: Reader, is_tls: bool) -> None:
    chain = listener.filter_chains.add()
    chain.filters.add(name=MANAGER_FILTER).typed_config.CopyFrom(m.pack(manager))
    if is_tls:
        set_mesh_server(chain.transport_socket, reader)
    if reader.dialect is Dialect.ENVOY:
        chain.name = "tls" if is_tls else "plaintext"
        chain.filter_chain_match.transport_protocol = "tls" if is_tls else "raw_buffer"
