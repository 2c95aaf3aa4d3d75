"""What must one node know? Objects and running workloads, seen from it -> Snapshot. Pure: the same in, the same out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

from meshlib.errors import ConfigurationError
from meshlib.istio import gateways as gateway_rules
from meshlib.istio import resources as r
from meshlib.istio import targets
from meshlib.istio.access import access_of, inbound_of
from meshlib.istio.clusters import Caller, Rules
from meshlib.istio.gateway_api import convert
from meshlib.istio.localities import NODE_LABEL
from meshlib.istio.mesh_settings import ROOT_NAMESPACE, MeshSettings, mesh_settings
from meshlib.istio.order import Parts
from meshlib.istio.problems import in_order
from meshlib.istio.routes import MESH, RouteMaker, default_route, qualified
from meshlib.istio.sameness import are_same
from meshlib.istio.services import Service, cluster_name, fqdn, names
from meshlib.istio.telemetry import reporting_of
from meshlib.istio.world import World
from meshlib.model import (
    CATCH_ALL,
    PASSTHROUGH,
    Cluster,
    ClusterType,
    DirectResponse,
    Forward,
    Inbound,
    Listener,
    LoadAssignment,
    Node,
    NodeKind,
    Quota,
    Route,
    RouteConfiguration,
    RouteMatch,
    Snapshot,
    VirtualHost,
    WeightedCluster,
    Workload,
)
from meshlib.model.values import dataclass

__all__ = [
    "ROOT_NAMESPACE",
    "MeshSettings",
    "Translation",
    "mesh_settings",
    "parts_of",
    "translate",
    "translated",
    "view_key",
    "world_of",
]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Translation:
    """problems: what the objects ask for and nothing answers (a subset that no rule defines), each once."""

    snapshot: Snapshot
    problems: tuple[ConfigurationError, ...]


def translate(
    objects: Iterable[r.Object], workloads: Iterable[Workload], node: Node, settings: MeshSettings | None = None
) -> Translation:
    """Everything that `node` may need, complete. Raises nothing for objects that parse_text let through.

    Fast for one node after another where `objects` and `workloads` are the very same tuples.
    """
    return translated(world_of(objects, workloads, settings), node)


def translated(world: World, node: Node) -> Translation:
    """What `translate` says, of a World that is there."""
    return _View(world, node).translation()


def world_of(objects: Iterable[r.Object], workloads: Iterable[Workload], settings: MeshSettings | None = None) -> World:
    """What `translate` makes its views of; the one that it had last, where the very same tuples come again."""
    before = _worlds.latest
    return _worlds.of((objects, workloads, settings), lambda: World(parts_of(objects), workloads, settings, before))


def parts_of(objects: Iterable[r.Object]) -> Parts:
    """What a change has left alone is the very same tuple as before."""
    before = _parts.latest
    return _parts.of((objects,), lambda: Parts.of(objects, before))


def view_key(objects: Iterable[r.Object], node: Node) -> Hashable:
    """Nodes with equal keys get equal Snapshots: of a node's labels, only those count that some object asks for, and
    its locality only where endpoints are chosen by theirs."""
    before = _asked.latest
    asked = _asked.of((objects,), lambda: _Asked.by(parts_of(objects).rules, before))
    counted = asked.labels | asked.gateway_labels if node.kind is NodeKind.ROUTER else asked.labels
    labels = tuple(pair for pair in sorted(node.workload.labels) if pair[0] in counted)
    service = node.workload.service if asked.service else None
    return (node.kind, node.workload.namespace, labels, node.workload.locality if asked.locality else None, service)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What of a node some object asks for. given: which objects. locality, service: whether they count."""

    given: tuple[r.Object, ...]
    labels: frozenset[str]
    gateway_labels: frozenset[str]
    locality: bool
    service: bool

    @classmethod
    def by(cls, given: tuple[r.Object, ...], before: _Asked | None = None) -> _Asked:
        """given: all but those of which only services are made. before: what was asked for before a change."""
        if before is not None and are_same(before.given, given):
            return before
        settings = mesh_settings(objects := convert(given).objects)
        labels: set[str] = set()
        gateway: set[str] = set()
        locality = settings.outlier_detection is not None or settings.zone_aware is not None
        settings_near = [each for each in (settings.locality, settings.zone_aware) if each is not None]
        locality = locality or any(each.distribute for each in [settings.locality] if each is not None)
        for each in objects:
            spec = each.spec
            if isinstance(spec, r.VirtualService):
                labels.update(key for rule in spec.http for match in rule.match for key in match.source_labels)
            elif isinstance(spec, r.EnvoyFilter):
                labels.update(_selected(spec.workload_selector))
            elif isinstance(spec, r.DestinationRule):
                labels.update(_selected(spec.workload_selector))
                for policy in _policies(spec):
                    locality = locality or policy.outlier_detection is not None
                    if policy.load_balancer is not None:
                        balancer = policy.load_balancer
                        settings_near += [
                            near
                            for near in (balancer.locality_lb_setting, balancer.zone_aware_lb_setting)
                            if near is not None
                        ]
                        locality = locality or bool(settings_near)
            elif isinstance(spec, r.Sidecar | r.PeerAuthentication):
                labels.update(_selected(spec.workload_selector if isinstance(spec, r.Sidecar) else spec.selector))
            elif isinstance(spec, r.AuthorizationPolicy | r.RequestAuthentication | r.RateLimitPolicy | r.Telemetry):
                labels.update(_selected(spec.selector))
            elif isinstance(spec, r.BackendTrafficPolicy):
                locality = locality or spec.outlier_detection is not None
            elif isinstance(spec, r.Service):
                annotations = (each.raw.get("metadata") or {}).get("annotations") or {}
                if spec.traffic_distribution or "networking.istio.io/traffic-distribution" in annotations:
                    locality = True
                    labels.add(NODE_LABEL)
            elif isinstance(spec, r.Gateway):
                gateway.update(spec.selector)
        labels.update(label for near in settings_near for label in near.failover_priority if "=" not in label)
        if locality:
            labels.update(r.TOPOLOGY_LABELS)
        targeted, service = targets.asked_labels(objects)
        return cls(given, frozenset(labels | targeted), frozenset(gateway), locality, service)


def _selected(selector: r.WorkloadSelector | None) -> Iterable[str]:
    return () if selector is None else (*selector.match_labels, *selector.labels)


def _policies(spec: r.DestinationRule) -> Iterable[r.TrafficPolicy | r.PortTrafficPolicy]:
    for policy in (spec.traffic_policy, *(subset.traffic_policy for subset in spec.subsets)):
        if policy is not None:
            yield policy
            yield from policy.port_level_settings


class _Last(Generic[T]):
    """What was made of the last inputs, for as long as the very same come again. Only tuples are known not to have
    changed meanwhile."""

    def __init__(self) -> None:
        self._known: tuple[tuple[object, ...], T] | None = None

    @property
    def latest(self) -> T | None:
        known = self._known
        return None if known is None else known[1]

    def of(self, inputs: tuple[object, ...], make: Callable[[], T]) -> T:
        known = self._known
        if known is not None and all(one is two for one, two in zip(known[0], inputs, strict=True)):
            return known[1]
        made = make()
        if all(isinstance(each, (tuple, MeshSettings)) or each is None for each in inputs):
            self._known = (inputs, made)
        return made


_worlds: _Last[World] = _Last()
_asked: _Last[_Asked] = _Last()
_parts: _Last[Parts] = _Last()
_ANYWHERE = Cluster(PASSTHROUGH, ClusterType.ORIGINAL_DST)


class _Said(NamedTuple):
    """All that a node is told but clusters and their endpoints: it outlives a change of who runs. Sorted by name."""

    listeners: tuple[Listener, ...]
    configurations: tuple[RouteConfiguration, ...]
    inbound: tuple[Inbound, ...]
    problems: tuple[ConfigurationError, ...]


class _View:
    """One translation, while it is made."""

    def __init__(self, world: World, node: Node) -> None:
        self._world, self._node, self._settings = world, node, world.settings
        self._namespace = node.workload.namespace
        self._labels = dict(node.workload.labels)
        self._caller = Caller(self._namespace, self._labels, node.workload.locality)
        self._problems: list[ConfigurationError] = list(world.problems)
        self._directory, self._virtual_services, self._sidecar = world.seen_by(
            self._caller, is_gateway=node.kind is NodeKind.ROUTER, report=self._problems.append
        )
        self._rules: dict[str, Rules] = {}
        self._clusters: dict[str, Cluster] = {}
        self._assignments: dict[str, LoadAssignment] = {}

    def translation(self) -> Translation:
        if self._node.kind is NodeKind.ROUTER:
            said = self._said()
        else:
            workload = self._node.workload
            who = (self._node.kind, workload.namespace, workload.labels, workload.service)
            sidecar = None if self._sidecar is None else self._sidecar.key
            said = self._world.once_of_rules(("said", id(self._directory.shape), sidecar, *who), self._said)
            self._problems.extend(said.problems)
            for service in self._directory.services.values():
                self._add_clusters(service)
            if not self._is_registry_only:
                self._clusters[PASSTHROUGH] = _ANYWHERE
        return Translation(
            Snapshot(
                "",
                said.listeners,
                said.configurations,
                tuple(self._clusters[name] for name in sorted(self._clusters)),
                tuple(self._assignments[name] for name in sorted(self._assignments)),
                complete=True,
                inbound=said.inbound,
            ),
            in_order(self._problems),
        )

    def _said(self) -> _Said:
        known_problems = len(self._problems)
        inbound: tuple[Inbound, ...] = ()
        self._report_missing_gateways()
        if self._node.kind is NodeKind.ROUTER:
            listeners, configurations = self._gateway()
            access = access_of(self._world.objects, self._settings, self._node, self._problems.append)
            access = replace(
                access, quotas=tuple(self._asked_by_gateway(each, configurations) for each in access.quotas)
            )
            listeners = [replace(each, access=access) for each in listeners]
        else:
            inbound = (inbound_of(self._world.objects, self._settings, self._node, self._problems.append),)
            listeners, configurations = self._outbound(list(self._directory.services.values()))
        served = targets.services_of(self._world.objects, self._node.workload)
        reporting = reporting_of(self._world.objects, self._settings, self._node, served)
        if reporting is not None:
            listeners = [replace(each, reporting=reporting) for each in listeners]
            inbound = tuple(replace(each, reporting=reporting) for each in inbound)
        return _Said(
            tuple(sorted(listeners, key=lambda each: each.name)),
            tuple(sorted(configurations, key=lambda each: each.name)),
            inbound,
            tuple(self._problems[known_problems:]),
        )

    def _rules_for(self, service: Service) -> Rules:
        found = self._rules.get(service.host)
        if found is None:
            found = self._rules[service.host] = self._world.rules(service, self._caller, self._directory)
        return found

    def _add_clusters(self, service: Service) -> None:
        for made in self._world.clusters(service, self._rules_for(service)):
            cluster, assignment = self._world.seen_from(made, self._caller)
            self._clusters[cluster.name] = cluster
            if assignment is not None:
                self._assignments[cluster.name] = assignment

    # A service's outbound side

    def _outbound(self, visible: list[Service]) -> tuple[list[Listener], list[RouteConfiguration]]:
        listeners: dict[str, Listener] = {}
        configurations: dict[str, RouteConfiguration] = {}

        def add(host: str, hosts: tuple[str, ...], port: int, configuration: RouteConfiguration) -> None:
            name = configuration.name
            if name not in configurations:
                configurations[name] = configuration
                for listener in self._world.once_of_settings(
                    ("listeners", hosts, host, port), lambda: _listeners(hosts, port, name)
                ):
                    listeners.setdefault(listener.name, listener)

        claims = self._claims()
        ports_of_owner: dict[tuple[str, str, str], list[int]] = {}
        for service in visible:
            owner = self._owner(claims, service.host)
            hosts = (*service.aliases(self._namespace), *(each for each in service.addresses if "/" not in each))
            for port in service.ports:
                if not port.is_http:
                    continue
                ruled = None
                if owner is not None:
                    ruled = self._ruled(owner, service.host, hosts, port.number)
                    ports_of_owner.setdefault(owner.key, []).append(port.number)
                # A rule that says nothing about this port, or to this caller, is none (route.go, "no routes matched").
                add(service.host, hosts, port.number, ruled or self._default(service, hosts, port.number))
        # A VirtualService may give a host that no service has: it exists then, on the ports of the services that the
        # same VirtualService is for, on port 80 if there are none (route.go, buildSidecarVirtualHosts...).
        for host, owner in claims.items():
            if host == "*" or host in self._directory.services:
                continue
            if host.startswith("*.") and any(each.endswith(host[1:]) for each in self._directory.services):
                continue
            for number in sorted(set(ports_of_owner.get(owner.key, (80,)))):
                hosts = names(host, self._namespace)
                if ruled := self._ruled(owner, host, hosts, number):
                    add(host, hosts, number, ruled)
        listeners[CATCH_ALL], catch_all = self._catch_all()
        configurations[catch_all.name] = catch_all
        return list(listeners.values()), list(configurations.values())

    def _ruled(self, owner: r.Object, host: str, hosts: tuple[str, ...], port: int) -> RouteConfiguration | None:
        """What one VirtualService says about a host; None if it says nothing about this port, or to this caller."""

        def make() -> tuple[RouteConfiguration | None, list[ConfigurationError]]:
            problems: list[ConfigurationError] = []
            routes = self._maker(problems.append).routes(owner, port)
            return _configuration(host, hosts, port, routes) if routes else None, problems

        if self._world.asks_who_calls(owner):
            configuration, problems = make()
        else:
            # The same for all who mean the same services by the same names, and are told the same of them.
            found = (self._directory.find(name, home) for name, home in self._world.destinations(owner))
            meant = tuple((id(each), id(self._rules_for(each))) if each is not None else None for each in found)
            configuration, problems = self._world.once_of_rules(("ruled", id(owner), host, hosts, port, meant), make)
        self._problems.extend(problems)
        return None if configuration is None else self._limited(configuration, host, port)

    def _limited(self, configuration: RouteConfiguration, host: str, port: int) -> RouteConfiguration:
        """Calls that a route answers by itself count, too, against what is said of the host that they were made to."""
        service = self._directory.services.get(host)
        (virtual_host,) = configuration.virtual_hosts
        if service is None or all(isinstance(each.action, Forward) for each in virtual_host.routes):
            return configuration
        name = cluster_name(host, port)
        clusters = (made.cluster for made in self._world.clusters(service, self._rules_for(service)))
        if not any(each.name == name and (each.rate_limits or each.quotas) for each in clusters):
            return configuration
        routes = tuple(
            each if isinstance(each.action, Forward) else replace(each, limited_by=name) for each in virtual_host.routes
        )
        return replace(configuration, virtual_hosts=(replace(virtual_host, routes=routes),))

    def _maker(self, report: Callable[[ConfigurationError], None]) -> RouteMaker:
        return RouteMaker(
            self._directory,
            self._rules_for,
            self._world.rules_of,
            self._namespace,
            self._labels,
            self._settings.retries,
            report,
        )

    def _default(self, service: Service, hosts: tuple[str, ...], port: int) -> RouteConfiguration:
        rules = self._rules_for(service)

        def make() -> RouteConfiguration:
            return _configuration(service.host, hosts, port, [default_route(service, port, rules)])

        return self._world.once_of_settings(("default", id(service), hosts, port, id(rules)), make)

    def _claims(self) -> dict[str, r.Object]:
        """host -> the VirtualService that has it for this node. The first wins; the others are told so."""
        claims: dict[str, r.Object] = {}
        for each in sorted(self._virtual_services, key=self._reach):
            spec = each.spec
            assert isinstance(spec, r.VirtualService)
            if MESH not in qualified(spec.gateways or [MESH], each.namespace):
                continue
            for index, host in enumerate(spec.hosts):
                service = self._directory.find(host, each.namespace)
                found = service.host if service is not None else fqdn(host, each.namespace)
                winner = claims.setdefault(found, each)
                # Routes of the Gateway API may be private to callers of one namespace, before those for everybody.
                if winner is not each and "VirtualService" in (winner.kind, each.kind):
                    self._problems.append(
                        ConfigurationError(
                            each.source, each.title, f"spec.hosts[{index}]", f"{found} has {winner.title} already"
                        )
                    )
        return claims

    def _reach(self, virtual_service: r.Object) -> int:
        """Rules private to the node's namespace come before those exported to it, and those before the public ones
        (push_context.go, virtualServicesForGateway)."""
        spec = virtual_service.spec
        assert isinstance(spec, r.VirtualService)
        export_to = spec.export_to or self._settings.virtual_service_export_to
        if not export_to or "*" in export_to:
            return 2
        return int(virtual_service.namespace != self._namespace)

    def _report_missing_gateways(self) -> None:
        known = {f"{each.namespace}/{each.name}" for each in self._world.objects if isinstance(each.spec, r.Gateway)}
        for each in self._virtual_services:
            spec = each.spec
            assert isinstance(spec, r.VirtualService)
            for index, name in enumerate(spec.gateways):
                (wanted,) = qualified([name], each.namespace)
                if wanted != MESH and wanted not in known:
                    self._problems.append(
                        ConfigurationError(each.source, each.title, f"spec.gateways[{index}]", f"no Gateway {wanted}")
                    )

    def _owner(self, claims: Mapping[str, r.Object], host: str) -> r.Object | None:
        """The most specific rule: the host itself, else the longest wildcard that covers it."""
        if host in claims:
            return claims[host]
        wild = [name for name in claims if name == "*" or (name.startswith("*.") and host.endswith(name[1:]))]
        return claims[max(wild, key=len)] if wild else None

    @property
    def _is_registry_only(self) -> bool:
        sidecar = self._sidecar.spec if self._sidecar is not None else None
        own = sidecar.outbound_traffic_policy if isinstance(sidecar, r.Sidecar) else None
        return own.is_registry_only if own is not None else self._settings.registry_only

    def _catch_all(self) -> tuple[Listener, RouteConfiguration]:
        if self._is_registry_only:
            route = Route(RouteMatch(), DirectResponse(502), "block_all")
        else:
            route = Route(RouteMatch(), Forward((WeightedCluster(PASSTHROUGH),)), "allow_any")
        name = route.name
        return Listener(CATCH_ALL, name), RouteConfiguration(name, (VirtualHost(name, ("*",), (route,)),))

    # A gateway

    def _gateway(self) -> tuple[list[Listener], list[RouteConfiguration]]:
        chosen = gateway_rules.selected(self._world.objects, self._labels)
        chosen_names = frozenset(f"{each.namespace}/{each.name}" for each in chosen)
        attached = [each for each in self._virtual_services if gateway_rules.attached(each, chosen_names)]
        for each in attached:
            for host, namespace in self._world.destinations(each):
                service = self._directory.find(host, namespace)
                if service is not None:
                    self._add_clusters(service)
        make = self._maker(self._problems.append)
        return gateway_rules.listeners(chosen, attached, make, self._problems.append)

    def _asked_by_gateway(self, quota: Quota, configurations: list[RouteConfiguration]) -> Quota:
        """With a way to who counts: a gateway has routes for what comes in, and none for calls of its own."""
        host, _, port = quota.service.address.rpartition(":")
        service = self._directory.find(host, self._namespace) if quota.service.kind == "envoy" else None
        if service is None or not any(str(each.number) == port for each in service.ports):
            return quota
        self._add_clusters(service)
        way = self._default(service, service.aliases(self._namespace), int(port))
        if all(each.name != way.name for each in configurations):
            configurations.append(way)
        return replace(quota, service=replace(quota.service, route_configuration=way.name))


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listeners(hosts: Iterable[str], port: int, configuration: str) -> tuple[Listener, ...]:
    return tuple(Listener(_authority(host, port), configuration) for host in hosts)


def _configuration(host: str, hosts: Iterable[str], port: int, routes: Iterable[Route]) -> RouteConfiguration:
    domains: dict[str, None] = {}
    for each in hosts:
        whole = _authority(each, port)
        domains[whole.rpartition(":")[0]] = None
        domains[whole] = None
    virtual_host = VirtualHost(f"{host}:{port}", tuple(domains), tuple(routes))
    return RouteConfiguration(cluster_name(host, port), (virtual_host,))
