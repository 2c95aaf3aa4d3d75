"""What does each client see? One View for all nodes that see the same; a resource is serialised once, for all."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from meshlib.controlplane.changes import Comparable
from meshlib.controlplane.located import located
from meshlib.controlplane.resource import Resource, combined_version, digest, resource_of
from meshlib.controlplane.sight import Form, Seen, Sight, Standpoint
from meshlib.errors import ConfigurationError
from meshlib.istio.problems import in_order
from meshlib.istio.resources import Object
from meshlib.istio.sameness import are_same
from meshlib.istio.translate import Translation, translate, view_key
from meshlib.model import (
    CATCH_ALL,
    INBOUND_PREFIX,
    SERVER_PREFIX,
    Cluster,
    Inbound,
    Listener,
    LoadAssignment,
    Locality,
    Node,
    NodeKind,
    RouteConfiguration,
    Snapshot,
    Workload,
)
from meshlib.model.domains import DomainTable
from meshlib.xds.encode import encode_resource
from meshlib.xds.reader import Dialect, Reader
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE
from meshlib.xds.xdstp import SCHEME

logger = logging.getLogger("meshlib.controlplane")
Value = Listener | Inbound | RouteConfiguration | Cluster | LoadAssignment
RENAMED_LIMIT = 10_000
"""Names that no service has and that clients asked for all the same; beyond that they are made anew each time."""
VIEWS_LIMIT, KEYS_LIMIT = 100, 10_000
"""Views, and labels of nodes, of clients that came since the last change. They may be gone, and until the next change
nobody says so; beyond this the oldest views are forgotten, and made anew for who is still there."""


SPARE = 200
"""Values and resources of earlier views that are kept for a while: a change of one endpoint makes two."""
SIGHTS_LIMIT = 1000
"""Forms of one view that are remembered: an Envoy beside a service has one for itself."""


class View(Comparable):
    """What one group of nodes sees. Immutable, but for answers that are made when they are first asked for.

    before: what the same nodes saw before a change, of which is taken over what is the same.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        problems: tuple[ConfigurationError, ...],
        encode: Encoder,
        before: View | None = None,
    ) -> None:
        self.problems = problems
        old: Mapping[str, Sequence[Value]] = {} if before is None else _values(before.snapshot)
        found: dict[str, Mapping[str, Resource]] = {}
        versions: dict[str, str] = {}
        for type_url, values in _values(snapshot).items():
            if before is not None and are_same(old[type_url], values):
                found[type_url], versions[type_url] = before.resources[type_url], before.plain_versions[type_url]
            else:
                found[type_url] = {_name(each): encode(type_url, _name(each), each) for each in values}
                versions[type_url] = combined_version(found[type_url].values())
        self.resources: Mapping[str, Mapping[str, Resource]] = found
        self.plain_versions: Mapping[str, str] = versions
        """By type, of all resources that bear their own names."""
        self.versions: dict[str, str] = dict(versions)
        if snapshot.inbound:  # not by its own name: it bears each client's
            inbound = "".join(_resource(LISTENER, each.name, each).version for each in snapshot.inbound)
            self.versions[LISTENER] = digest(f"{self.versions[LISTENER]} {inbound}".encode())
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        told = "".join(version for _, version in sorted(self.versions.items()))
        self.snapshot: Snapshot = replace(snapshot, version=f"{made}/{digest(told.encode())[:8]}")
        """Its version: when the last change for these nodes was made, and of what it all consists; for people."""
        is_kept = before is not None and self.resources[LISTENER] is before.resources[LISTENER]
        self._unnamed: _Unnamed
        self._unnamed = before._unnamed if before is not None and is_kept else _Unnamed(found[LISTENER], snapshot)
        self.unnamed = (self._unnamed.versions, snapshot.inbound)
        self._renamed: dict[tuple[str, bool], Resource | None] = {}
        self._forms: dict[tuple[Reader, NodeKind], Form] = {}
        self._sights: dict[Standpoint, Sight] = {}

    def known_sight(self, standpoint: Standpoint) -> Seen | None:
        """What clients at this standpoint see; None where it has to be made first."""
        if standpoint.reader.dialect in (Dialect.MESHLIB, Dialect.OTHER):
            return self
        return self._sights.get(standpoint)

    def sight(self, standpoint: Standpoint) -> Seen:
        """The same, made where it is not there. From any thread; takes as long as a translation."""
        found = self.known_sight(standpoint)
        if found is None:
            if len(self._sights) >= SIGHTS_LIMIT:
                self._sights = {}
            key = (standpoint.reader, standpoint.kind)
            if key not in self._forms:
                self._forms[key] = Form(self, *key)
            found = self._sights[standpoint] = Sight(self._forms[key], standpoint)
        return found

    @cached_property
    def routed(self) -> frozenset[str]:
        """The clusters that any route leads to, whether they are there or not."""
        return frozenset(
            cluster
            for configuration in self.snapshot.route_configurations
            for host in configuration.virtual_hosts
            for route in host.routes
            for cluster in route.clusters
        )

    def find(self, type_url: str, name: str, *, has_catch_all: bool) -> Resource | None:
        """The resource that a client asked for by name.

        A listener that is not there by that very name is one with a wildcard that covers it, or, for clients that know
        the catch-all, that; in both cases it bears the name that was asked for. So does the one for calls that come in.
        """
        found = self.resources.get(type_url, {}).get(name)
        if found is None and name.startswith(SCHEME):
            return located(type_url, name, partial(self.find, type_url, has_catch_all=has_catch_all))
        if found is not None or type_url != LISTENER:
            return found
        asked = (name, has_catch_all)
        if asked not in self._renamed:
            if len(self._renamed) >= RENAMED_LIMIT:
                self._renamed.clear()
            host, _, port = name.rpartition(":")
            listener: Listener | Inbound | None
            wild = self._unnamed.wild.get(port)
            listener = wild.find(host) if wild is not None else None
            if name.startswith((INBOUND_PREFIX, SERVER_PREFIX)):
                # In our own form; gRPC's servers see another (sight.py), and who is neither has none.
                listener = next(iter(self.snapshot.inbound), None) if has_catch_all else None
            elif listener is None and has_catch_all:
                listener = self._unnamed.catch_all
            self._renamed[asked] = None if listener is None else _resource(LISTENER, name, replace(listener, name=name))
        return self._renamed[asked]

    def __repr__(self) -> str:
        return f"<View {self.snapshot!r}>"


class _Unnamed:
    """The listeners that are there for names that none bears. wild: by port."""

    def __init__(self, listeners: Mapping[str, Resource], snapshot: Snapshot) -> None:
        wild: dict[str, list[tuple[str, Listener]]] = {}
        for listener in snapshot.listeners:
            host, _, port = listener.name.rpartition(":")
            if host.startswith("*"):
                wild.setdefault(port, []).append((host, listener))
        self.wild = {port: DomainTable(entries) for port, entries in wild.items()}
        self.catch_all = next((each for each in snapshot.listeners if each.name == CATCH_ALL), None)
        self.versions = tuple(each.version for name, each in listeners.items() if name.startswith("*"))


class Encoder:
    """Encodes what is new, and knows what it has encoded: nodes that see different things have most of them in common,
    and so have one version of the configuration and the next.
    """

    def __init__(self) -> None:
        self._known: dict[Value, Resource] = {}
        self._same: dict[int, tuple[Value, Resource]] = {}
        """By the value's id: to hash one takes as long as to find out that most views hold the very same."""
        self._kept = 0
        """How much was known after it was last looked through."""

    def __call__(self, type_url: str, name: str, value: Value) -> Resource:
        same = self._same.get(id(value))
        if same is not None:
            return same[1]
        resource = self._known.get(value)
        if resource is None:
            resource = self._known[value] = _resource(type_url, name, value)
        self._same[id(value)] = (value, resource)
        return resource

    @property
    def spare(self) -> int:
        """How much has come since it was last looked through: to find what no view has takes a look at all that views
        have."""
        return len(self._known) + len(self._same) - self._kept

    def keep_only(self, views: Iterable[View]) -> None:
        """Forget what no view has."""
        kept: set[int] = set()
        held: set[int] = set()
        for view in views:
            for values in _values(view.snapshot).values():
                held.update(map(id, values))
            for found in view.resources.values():
                kept.update(map(id, found.values()))
        for value in [value for value, resource in self._known.items() if id(resource) not in kept]:
            del self._known[value]
        for each in self._same.keys() - held:
            del self._same[each]
        self._kept = len(self._known) + len(self._same)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What all views are made of. tapped: (namespace, name) of the workloads whose every call leaves its spans."""

    objects: tuple[Object, ...] = ()
    workloads: tuple[Workload, ...] = ()
    tapped: frozenset[tuple[str, str]] = frozenset()

    def is_tapped(self, node: Node) -> bool:
        return bool(self.tapped) and (node.workload.namespace, node.workload.name) in self.tapped

    def key(self, node: Node) -> Hashable:
        """Nodes with equal ones see the same."""
        return (view_key(self.objects, node), self.is_tapped(node))


NodeLabels = tuple[NodeKind, str, tuple[tuple[str, str], ...], Locality, str, bool]


Translate = Callable[[tuple[Object, ...], tuple[Workload, ...], Node], Translation]


class Cache:
    """The views of all nodes that are connected. Belongs to one event loop; translates on other threads."""

    def __init__(self, translate: Translate = translate) -> None:
        self._translate = translate
        self._inputs = Inputs()
        self._views: dict[Hashable, View] = {}
        self._keys: dict[NodeLabels, Hashable] = {}
        self._added: dict[Hashable, None] = {}
        """Views that were made since the last change, the oldest first."""
        self._making: dict[Hashable, asyncio.Task[None]] = {}
        """Views that somebody waits for. Those who come meanwhile wait too: after a restart all come at once."""
        self._encode = Encoder()
        self._encoding = threading.Lock()
        self._listeners: set[Callable[[], None]] = set()
        self._update = asyncio.Lock()
        self.changed_at = 0.0
        """Monotonic seconds: when the change began that the views have now."""

    def on_change(self, tell: Callable[[], None]) -> Callable[[], None]:
        """`tell` is called, on the loop, after views may have changed. Returns what ends that."""
        self._listeners.add(tell)
        return lambda: self._listeners.discard(tell)

    async def view(self, node: Node) -> View:
        """What this node sees now. The same object as before when nothing has changed for it."""
        while True:
            key = self._key(node)
            found = self._views.get(key)
            if found is not None:
                return found
            making = self._making.get(key)
            if making is None:
                making = self._making[key] = asyncio.create_task(self._add(key, node), name="a view for a new client")
            await asyncio.wait((making,))  # it goes on if this client gives up
            making.result()

    async def seen(self, node: Node, reader: Reader) -> Seen:
        """The same in the form that the client understands."""
        view, standpoint = await self.view(node), Standpoint.of(node, reader)
        found = view.known_sight(standpoint)
        return found if found is not None else await asyncio.to_thread(view.sight, standpoint)

    def known(self, node: Node, reader: Reader) -> Seen | None:
        """The same at once; None where it has to be made first."""
        view = self._views.get(self._key(node))
        return view.known_sight(Standpoint.of(node, reader)) if view is not None else None

    async def _add(self, key: Hashable, node: Node) -> None:
        """Make a view that update() did not know to be needed. If there is news meanwhile, it is made again."""
        inputs = self._inputs
        try:
            made = await asyncio.to_thread(self._make, inputs, node, None)
        finally:
            del self._making[key]
        if inputs is self._inputs:
            self._views[key] = made
            self._added[key] = None
            if len(self._added) > VIEWS_LIMIT:
                for oldest in list(self._added)[: VIEWS_LIMIT // 2]:
                    del self._added[oldest], self._views[oldest]
                await asyncio.to_thread(self._forget_resources, tuple(self._views.values()))

    def _forget_resources(self, views: Collection[View]) -> None:
        with self._encoding:
            if self._encode.spare > SPARE:
                self._encode.keep_only(views)

    async def update(
        self,
        objects: tuple[Object, ...],
        workloads: tuple[Workload, ...],
        nodes: Collection[Node],
        tapped: frozenset[tuple[str, str]] = frozenset(),
    ) -> None:
        """The objects or the workloads have changed. nodes: whose views are needed; all others are forgotten. tapped:
        (namespace, name) of the workloads whose every call leaves its spans."""
        async with self._update:
            began = time.monotonic()
            inputs = Inputs(objects, workloads, tapped)
            views, keys = await asyncio.to_thread(self._make_all, inputs, dict(self._views), tuple(nodes))
            self._inputs, self._views, self._keys, self.changed_at = inputs, views, keys, began
            self._added.clear()
        for tell in tuple(self._listeners):
            try:
                tell()
            except Exception:
                logger.exception("one stream can't look at a change; all others are told of it")

    def problems(self) -> tuple[ConfigurationError, ...]:
        """What the translations found, once each."""
        return in_order(problem for view in self._views.values() for problem in view.problems)

    def _key(self, node: Node) -> Hashable:
        labels = _labels_of(node, self._inputs)
        if labels not in self._keys:
            if len(self._keys) >= KEYS_LIMIT:
                self._keys.clear()
            self._keys[labels] = self._inputs.key(node)
        return self._keys[labels]

    def _make_all(
        self, inputs: Inputs, old: Mapping[Hashable, View], nodes: Collection[Node]
    ) -> tuple[dict[Hashable, View], dict[NodeLabels, Hashable]]:
        views: dict[Hashable, View] = {}
        keys: dict[NodeLabels, Hashable] = {}
        for labels, node in {_labels_of(node, inputs): node for node in nodes}.items():
            key = keys[labels] = inputs.key(node)
            if key not in views:
                views[key] = self._make(inputs, node, old.get(key))
        self._forget_resources(views.values())
        return views, keys

    def _make(self, inputs: Inputs, node: Node, old: View | None) -> View:
        translation = self._translate(inputs.objects, inputs.workloads, node)
        snapshot = translation.snapshot.tapped() if inputs.is_tapped(node) else translation.snapshot
        if old is not None and old.problems == translation.problems and old.snapshot.same_content(snapshot):
            return old
        with self._encoding:
            return View(snapshot, translation.problems, self._encode, old)

    def __repr__(self) -> str:
        return f"<Cache {len(self._views)} views of {len(self._inputs.objects)} objects>"


def _values(snapshot: Snapshot) -> Mapping[str, Sequence[Value]]:
    """By type, in their order."""
    return {
        CLUSTER: snapshot.clusters,
        ENDPOINT: snapshot.assignments,
        LISTENER: snapshot.listeners,
        ROUTE: snapshot.route_configurations,
    }


def _name(value: Value) -> str:
    return value.cluster if isinstance(value, LoadAssignment) else value.name


def _resource(type_url: str, name: str, value: Value) -> Resource:
    return resource_of(type_url, name, encode_resource(type_url, value))


def _labels_of(node: Node, inputs: Inputs) -> NodeLabels:
    workload = node.workload
    return (
        node.kind,
        workload.namespace,
        workload.labels,
        workload.locality,
        workload.service,
        inputs.is_tapped(node),
    )
