"""What does one kind of client see of a view? The same configuration in the form that gRPC, or an Envoy, understands.

A client of ours, and one that nobody knows, sees the view itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from meshlib.controlplane.resource import Resource, combined_version, resource_of
from meshlib.model import (
    INBOUND_PREFIX,
    NEVER,
    SERVER_PREFIX,
    Access,
    AccessRule,
    Action,
    Inbound,
    Listener,
    Node,
    NodeKind,
    Snapshot,
    TlsMode,
)
from meshlib.xds import messages as m
from meshlib.xds import sidecar
from meshlib.xds.encode import encode_resource
from meshlib.xds.encode_inbound import server_listener, sidecar_listener
from meshlib.xds.forms import understood
from meshlib.xds.reader import Dialect, Reader
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE
from meshlib.xds.upstreams import Upstreams

if TYPE_CHECKING:
    from meshlib.controlplane.cache import View

SERVERS_LIMIT = 1000
"""Addresses of gRPC servers that are remembered; beyond that their listeners are made anew."""


class Seen(Protocol):
    """What a stream is answered from. All of it stays as it is; a change is another object."""

    @property
    def snapshot(self) -> Snapshot:
        """What it was made of."""

    @property
    def resources(self) -> Mapping[str, Mapping[str, Resource]]:
        """By type and name: what there is."""

    @property
    def versions(self) -> Mapping[str, str]:
        """By type."""

    @property
    def routed(self) -> frozenset[str]:
        """The clusters that any route leads to, whether they are there or not."""

    def find(self, type_url: str, name: str, *, has_catch_all: bool) -> Resource | None:
        """The resource that is asked for by name."""


@dataclass(frozen=True, slots=True)
class Standpoint:
    """What of a node decides on the form: nodes with equal ones see the same of one view."""

    reader: Reader
    kind: NodeKind = NodeKind.SIDECAR
    address: str = ""
    inbound: tuple[tuple[int, str], ...] = ()
    outbound: str = ""

    @classmethod
    def of(cls, node: Node, reader: Reader) -> Standpoint:
        if reader.dialect is not Dialect.ENVOY or node.kind is NodeKind.ROUTER:
            return cls(reader, node.kind)
        return cls(reader, node.kind, node.workload.address, node.inbound, node.outbound)


class Sight:
    """A view as gRPC or an Envoy sees it."""

    def __init__(self, view: View, standpoint: Standpoint) -> None:
        self._view, self._standpoint = view, standpoint
        self.snapshot = view.snapshot
        self._reader = standpoint.reader
        self._upstreams = Upstreams(view.snapshot)
        self._servers: dict[str, Resource | None] = {}
        self.resources: Mapping[str, Mapping[str, Resource]] = self._resources()
        self.versions = {
            type_url: combined_version(resources.values()) for type_url, resources in self.resources.items()
        }
        if self._reader.dialect is Dialect.GRPC:  # not by its own name: it bears each server's
            self.versions[LISTENER] = view.versions[LISTENER]

    @property
    def routed(self) -> frozenset[str]:
        return self._view.routed

    def find(self, type_url: str, name: str, *, has_catch_all: bool) -> Resource | None:
        found = self.resources.get(type_url, {}).get(name)
        if found is not None or type_url != LISTENER or self._reader.dialect is not Dialect.GRPC:
            return found
        for prefix in (INBOUND_PREFIX, SERVER_PREFIX):
            if name.startswith(prefix):
                if name not in self._servers:
                    if len(self._servers) >= SERVERS_LIMIT:
                        self._servers.clear()
                    self._servers[name] = self._server(name, name.removeprefix(prefix))
                return self._servers[name]
        return self._view.find(type_url, name, has_catch_all=has_catch_all)

    def _resources(self) -> dict[str, dict[str, Resource]]:
        view, reader = self._view, self._reader
        found = {type_url: dict(resources) for type_url, resources in view.resources.items()}
        clusters, assignments = understood(view.snapshot, reader)
        found[LISTENER], found[ROUTE] = self._listeners(), self._routes()
        clusters = (*clusters, *self._upstreams.clusters.values())
        assignments = (*assignments, *self._upstreams.assignments.values())
        known = {id(each): each.name for each in view.snapshot.clusters if each.tls is None or not each.tls.is_mesh}
        is_sidecar = self._is_sidecar
        found[CLUSTER] = {
            each.name: view.resources[CLUSTER][each.name]
            if id(each) in known
            else resource_of(CLUSTER, each.name, encode_resource(CLUSTER, each, reader))
            for each in clusters
            if not is_sidecar or sidecar.is_reachable(each)
        }
        same = {id(each) for each in view.snapshot.assignments}
        found[ENDPOINT] = {
            each.cluster: view.resources[ENDPOINT][each.cluster]
            if id(each) in same
            else resource_of(ENDPOINT, each.cluster, encode_resource(ENDPOINT, each))
            for each in assignments
        }
        if is_sidecar:
            for port, address in self._standpoint.inbound:
                host, _, application = address.rpartition(":")
                made = sidecar.inbound_cluster(port, host.strip("[]") or "127.0.0.1", int(application))
                found[CLUSTER][made.name] = _of_message(CLUSTER, made)
        return found

    @property
    def _is_sidecar(self) -> bool:
        return self._reader.dialect is Dialect.ENVOY and self._standpoint.kind is NodeKind.SIDECAR

    @property
    def _inbound(self) -> Inbound:
        """Who has not said how it may be called is not told that anybody may."""
        return next(iter(self._view.snapshot.inbound), _UNTOLD)

    def _listeners(self) -> dict[str, Resource]:
        view, reader, standpoint = self._view, self._reader, self._standpoint
        if reader.dialect is Dialect.GRPC:
            return dict(view.resources[LISTENER])
        made: list[Any] = []
        if self._is_sidecar:
            self._upstreams.add_of(self._inbound.access)
            for port, _ in standpoint.inbound:
                name = sidecar.inbound_cluster_name(port)
                host = standpoint.address or "0.0.0.0"
                made.append(sidecar_listener(self._inbound, reader, host, port, name, self._upstreams))
            if standpoint.outbound:
                host, _, port_text = standpoint.outbound.rpartition(":")
                made.append(sidecar.outbound_listener(host.strip("[]"), int(port_text)))
            return {each.name: _of_message(LISTENER, each) for each in made}
        return {each.name: self._gateway(each) for each in view.snapshot.listeners}

    def _gateway(self, listener: Listener) -> Resource:
        if listener.access is None:
            return self._view.resources[LISTENER][listener.name]
        self._upstreams.add_of(listener.access)
        data = encode_resource(LISTENER, listener, self._reader, self._upstreams)
        return resource_of(LISTENER, listener.name, data)

    def _routes(self) -> dict[str, Resource]:
        if not self._is_sidecar:
            return dict(self._view.resources[ROUTE])
        if not self._standpoint.outbound:
            return {}
        table = sidecar.outbound_routes(self._view.snapshot)
        return {table.name: resource_of(ROUTE, table.name, encode_resource(ROUTE, table))}

    def _server(self, name: str, address: str) -> Resource | None:
        """The listener of a gRPC server; None for what is no address."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            return None
        inbound = replace(self._inbound, name=name)
        message = server_listener(inbound, self._reader, host.strip("[]"), int(port), self._upstreams)
        return _of_message(LISTENER, message)

    def __repr__(self) -> str:
        return f"<Sight {self._standpoint.reader.dialect} of {self._view!r}>"


_UNTOLD = Inbound("", tls=TlsMode.STRICT, access=Access((AccessRule("nobody has said who may", Action.ALLOW, NEVER),)))


def _of_message(type_url: str, message: Any) -> Resource:
    return resource_of(type_url, message.name, m.serialize(message))
