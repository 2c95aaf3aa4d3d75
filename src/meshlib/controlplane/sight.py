"""What does one kind of client see of a view? The same configuration in the form that gRPC, or an Envoy, understands.

A client of ours, and one that nobody knows, sees the view itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from meshlib.controlplane.changes import ChangesByType, Comparable
from meshlib.controlplane.located import located
from meshlib.controlplane.resource import Resource, combined_version, resource_of
from meshlib.model import (
    INBOUND_PREFIX,
    NEVER,
    SERVER_PREFIX,
    Access,
    AccessRule,
    Action,
    Forward,
    Inbound,
    Listener,
    Node,
    NodeKind,
    RouteConfiguration,
    Snapshot,
    TlsMode,
)
from meshlib.xds import messages as m
from meshlib.xds import sidecar
from meshlib.xds.encode import encode_resource
from meshlib.xds.encode_inbound import server_listener, sidecar_listener
from meshlib.xds.forms import understood, understood_routes
from meshlib.xds.http_filters import not_carried_out
from meshlib.xds.reader import Dialect, Reader
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE
from meshlib.xds.upstreams import Upstreams
from meshlib.xds.xdstp import SCHEME

if TYPE_CHECKING:
    from meshlib.controlplane.cache import View

logger = logging.getLogger("meshlib.controlplane")

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

    def changes_since(self, before: Any) -> ChangesByType:
        """What a stream that was answered from `before`, another Seen, may have to be told now."""


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


class Form:
    """A view in one reader's form, as far as it is the same for all of them."""

    def __init__(self, view: View, reader: Reader, kind: NodeKind) -> None:
        self.view, self.reader, self.kind = view, reader, kind
        self.upstreams = Upstreams(view.snapshot)
        self._to_tell = tuple(not_carried_out(self.inbound.access, reader))
        snapshot, known = view.snapshot, view.resources
        if self.is_sidecar:
            self.upstreams.add_of(self.inbound.access)
        listeners = self._listeners()
        clusters, assignments = understood(snapshot, reader)
        same: set[int] = set()
        if not reader.discovery_cluster:
            same = {id(each) for each in snapshot.clusters if each.tls is None or not each.tls.is_mesh}
        same |= {id(each) for each in snapshot.assignments}
        self.resources: Mapping[str, Mapping[str, Resource]] = {
            CLUSTER: {
                each.name: known[CLUSTER][each.name]
                if id(each) in same
                else resource_of(CLUSTER, each.name, encode_resource(CLUSTER, each, reader))
                for each in (*clusters, *self.upstreams.clusters.values())
                if not self.is_sidecar or sidecar.is_reachable(each)
            },
            ENDPOINT: {
                each.cluster: known[ENDPOINT][each.cluster]
                if id(each) in same
                else resource_of(ENDPOINT, each.cluster, encode_resource(ENDPOINT, each))
                for each in (*assignments, *self.upstreams.assignments.values())
            },
            LISTENER: listeners,
            ROUTE: self._routes(),
        }
        self.versions = {
            type_url: combined_version(resources.values()) for type_url, resources in self.resources.items()
        }
        if reader.dialect is Dialect.GRPC:
            self.versions[LISTENER] = view.versions[LISTENER]  # which knows of the one that bears each server's name

    @property
    def is_sidecar(self) -> bool:
        return self.reader.dialect is Dialect.ENVOY and self.kind is NodeKind.SIDECAR

    @property
    def inbound(self) -> Inbound:
        """Who has not said how it may be called is not told that anybody may."""
        return next(iter(self.view.snapshot.inbound), _UNTOLD)

    def tell_of_rules(self) -> None:
        """To the log, once for each state of the configuration: what these servers do otherwise than it says."""
        told, self._to_tell = self._to_tell, ()
        for each in told:
            logger.warning("servers of %s: %s", self.reader.dialect, each)

    def _listeners(self) -> Mapping[str, Resource]:
        if self.is_sidecar:
            return {}
        if self.reader.dialect is Dialect.GRPC:
            return self.view.resources[LISTENER]
        return {each.name: self._gateway(each) for each in self.view.snapshot.listeners}

    def _gateway(self, listener: Listener) -> Resource:
        is_envoy = self.reader.dialect is Dialect.ENVOY
        if listener.access is None and not is_envoy:
            return self.view.resources[LISTENER][listener.name]
        if listener.access is not None:
            self.upstreams.add_of(listener.access)
        data = encode_resource(LISTENER, listener, self.reader, self.upstreams)
        return resource_of(LISTENER, listener.name, data)

    def _routes(self) -> Mapping[str, Resource]:
        if self.reader.dialect is Dialect.GRPC:
            return dict(self._grpc_routes())
        if self.reader.dialect is Dialect.ENVOY and not self.is_sidecar:
            return dict(self._gateway_routes())
        if not self.is_sidecar:
            return self.view.resources[ROUTE]
        table = sidecar.outbound_routes(self.view.snapshot)
        return {table.name: resource_of(ROUTE, table.name, encode_resource(ROUTE, table))}

    def _gateway_routes(self) -> Iterator[tuple[str, Resource]]:
        """An Envoy's own words for other origins; all else is the same for everybody."""
        known = self.view.resources[ROUTE]
        for table in self.view.snapshot.route_configurations:
            if any(route.cors is not None for host in table.virtual_hosts for route in host.routes):
                yield table.name, resource_of(ROUTE, table.name, encode_resource(ROUTE, table, self.reader))
            else:
                yield table.name, known[table.name]

    def _grpc_routes(self) -> Iterator[tuple[str, Resource]]:
        known = self.view.resources[ROUTE]
        for table in self.view.snapshot.route_configurations:
            found = understood_routes(table, self.reader)
            if found is table and not (self.reader.keeps_time and _has_timeouts(table)):
                yield table.name, known[table.name]
            else:
                yield table.name, resource_of(ROUTE, table.name, encode_resource(ROUTE, found, self.reader))


class Sight(Comparable):
    """A view as one gRPC client or server, or one Envoy, sees it."""

    def __init__(self, form: Form, standpoint: Standpoint) -> None:
        self._form, self._standpoint = form, standpoint
        self._servers: dict[str, Resource | None] = {}
        self.snapshot = form.view.snapshot
        self.resources, self.versions = form.resources, form.versions
        # A gRPC server's listener may name clusters, and depends on which there are.
        self.unnamed = (form.view.unnamed, form.reader, form.versions[CLUSTER], form.versions[LISTENER])
        if form.is_sidecar:
            self._add_sockets()

    @property
    def routed(self) -> frozenset[str]:
        return self._form.view.routed

    def find(self, type_url: str, name: str, *, has_catch_all: bool) -> Resource | None:
        found = self.resources.get(type_url, {}).get(name)
        if found is None and name.startswith(SCHEME):
            return located(type_url, name, partial(self.find, type_url, has_catch_all=has_catch_all))
        if found is not None or type_url != LISTENER or self._form.reader.dialect is not Dialect.GRPC:
            return found
        for prefix in (INBOUND_PREFIX, SERVER_PREFIX):
            if name.startswith(prefix):
                if name not in self._servers:
                    if len(self._servers) >= SERVERS_LIMIT:
                        self._servers.clear()
                    self._servers[name] = self._server(name, name.removeprefix(prefix))
                return self._servers[name]
        return self._form.view.find(type_url, name, has_catch_all=has_catch_all)

    def _add_sockets(self) -> None:
        """The Envoy's own: where it takes calls, and for whom."""
        form, standpoint = self._form, self._standpoint
        if standpoint.inbound:
            form.tell_of_rules()
        clusters, listeners = [], []
        for port, address in standpoint.inbound:
            clusters.append(sidecar.inbound_cluster(port, *_host_and_port(address)))
            host, name = standpoint.address or "0.0.0.0", sidecar.inbound_cluster_name(port)
            listeners.append(sidecar_listener(form.inbound, form.reader, host, port, name, form.upstreams))
        if standpoint.outbound:
            listeners.append(sidecar.outbound_listener(*_host_and_port(standpoint.outbound), form.reader))
        own = {CLUSTER: clusters, LISTENER: listeners}
        added = {kind: {each.name: _of_message(kind, each) for each in messages} for kind, messages in own.items()}
        self.resources = {
            **form.resources,
            **{kind: {**form.resources[kind], **resources} for kind, resources in added.items()},
        }
        self.versions = {
            **form.versions,
            **{kind: combined_version(self.resources[kind].values()) for kind in added},
        }

    def _server(self, name: str, address: str) -> Resource | None:
        """The listener of a gRPC server; None for what is no address."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            return None
        form = self._form
        form.tell_of_rules()
        inbound = replace(form.inbound, name=name)
        return _of_message(LISTENER, server_listener(inbound, form.reader, *_host_and_port(address), form.upstreams))

    def __repr__(self) -> str:
        return f"<Sight {self._form.reader.dialect} of {self._form.view!r}>"


def _has_timeouts(table: RouteConfiguration) -> bool:
    routes = (route for host in table.virtual_hosts for route in host.routes)
    return any(isinstance(each.action, Forward) and each.action.timeout is not None for each in routes)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


_UNTOLD = Inbound("", tls=TlsMode.STRICT, access=Access((AccessRule("nobody has said who may", Action.ALLOW, NEVER),)))


def _of_message(type_url: str, message: Any) -> Resource:
    return resource_of(type_url, message.name, m.serialize(message))
