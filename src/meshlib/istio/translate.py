"""What must one node know? Objects and running workloads, seen from it -> Snapshot. Pure: the same in, the same out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from meshlib.errors import ConfigurationError
from meshlib.istio import gateways as gateway_rules
from meshlib.istio import resources as r
from meshlib.istio.clusters import DestinationRules, clusters_of
from meshlib.istio.problems import in_order
from meshlib.istio.routes import MESH, RouteMaker, cluster_name, default_route, destinations, qualified
from meshlib.istio.services import Registry, Service, fqdn, is_exported, names
from meshlib.model import (
    CATCH_ALL,
    PASSTHROUGH,
    Cluster,
    ClusterType,
    DirectResponse,
    Forward,
    Listener,
    LoadAssignment,
    Node,
    NodeKind,
    Route,
    RouteConfiguration,
    RouteMatch,
    Snapshot,
    VirtualHost,
    WeightedCluster,
    Workload,
)

ROOT_NAMESPACE = "istio-system"


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """What Istio's MeshConfig says, as far as it is heeded. registry_only: hosts outside the registry get 502."""

    registry_only: bool = False
    root_namespace: str = ROOT_NAMESPACE


@dataclass(frozen=True, slots=True)
class Translation:
    """problems: what the objects ask for and nothing answers (a subset that no rule defines), each once."""

    snapshot: Snapshot
    problems: tuple[ConfigurationError, ...]


def mesh_settings(objects: Iterable[r.Object]) -> MeshSettings:
    """From ConfigMap `istio` of the root namespace (Istio's own place for MeshConfig), else the defaults."""
    for each in objects:
        if each.key == ("ConfigMap", ROOT_NAMESPACE, "istio") and isinstance(each.spec, r.MeshConfigMap):
            try:
                found: Any = yaml.safe_load(each.spec.data.get("mesh", "")) or {}
            except yaml.YAMLError:
                return MeshSettings()
            policy = found.get("outboundTrafficPolicy") if isinstance(found, dict) else None
            mode = policy.get("mode") if isinstance(policy, dict) else None
            return MeshSettings(registry_only=mode == "REGISTRY_ONLY")
    return MeshSettings()


def translate(
    objects: Iterable[r.Object], workloads: Iterable[Workload], node: Node, settings: MeshSettings | None = None
) -> Translation:
    """Everything that `node` may need, complete. Raises nothing for objects that parse_text let through."""
    ordered = _in_order(objects)
    return _View(ordered, Registry(ordered, workloads), node, settings or mesh_settings(ordered)).translation()


def view_key(objects: Iterable[r.Object], node: Node) -> Hashable:
    """Nodes with equal keys get equal Snapshots: of a node's labels, only those count that some object asks for."""
    asked: set[str] = set()
    for each in objects:
        spec = each.spec
        if isinstance(spec, r.VirtualService):
            asked.update(key for rule in spec.http for match in rule.match for key in match.source_labels)
        elif isinstance(spec, r.DestinationRule) and spec.workload_selector is not None:
            asked.update(spec.workload_selector.match_labels or spec.workload_selector.labels)
        elif isinstance(spec, r.Gateway) and node.kind is NodeKind.ROUTER:
            asked.update(spec.selector)
    labels = tuple(pair for pair in sorted(node.workload.labels) if pair[0] in asked)
    return (node.kind, node.workload.namespace, labels)


def _in_order(objects: Iterable[r.Object]) -> list[r.Object]:
    """Oldest first, then by name and namespace: whoever comes first has the host (sortConfigByCreationTime). What gives
    no age counts as the oldest, so that files alone are ordered by name."""
    return sorted(objects, key=lambda each: (each.created, each.name, each.namespace, each.kind, each.api_version))


class _View:
    """One translation, while it is made."""

    def __init__(self, objects: list[r.Object], registry: Registry, node: Node, settings: MeshSettings) -> None:
        self._objects, self._node, self._settings = objects, node, settings
        self._namespace = node.workload.namespace
        self._labels = dict(node.workload.labels)
        self._problems: list[ConfigurationError] = []
        self._directory = registry.seen_from(self._namespace)
        self._rules = DestinationRules(objects, self._directory, self._namespace, self._labels, settings.root_namespace)
        self._clusters: dict[str, Cluster] = {}
        self._assignments: dict[str, LoadAssignment] = {}
        self._subsets: dict[str, frozenset[str]] = {}
        self._make = RouteMaker(self._directory, self._subsets, self._namespace, self._labels, self._problems.append)
        self._virtual_services = [
            each
            for each in objects
            if isinstance(each.spec, r.VirtualService)
            and is_exported(each.spec.export_to, each.namespace, self._namespace)
        ]

    def translation(self) -> Translation:
        visible = list(self._directory.services.values())
        for service in visible:
            self._subsets[service.host] = frozenset(subset.name for subset in self._rules.find(service).subsets)
        self._report_missing_gateways()
        if self._node.kind is NodeKind.ROUTER:
            listeners, configurations = self._gateway()
        else:
            listeners, configurations = self._outbound(visible)
            for service in visible:
                self._add_clusters(service)
        return Translation(
            Snapshot(
                "",
                tuple(sorted(listeners, key=lambda each: each.name)),
                tuple(sorted(configurations, key=lambda each: each.name)),
                tuple(self._clusters[name] for name in sorted(self._clusters)),
                tuple(self._assignments[name] for name in sorted(self._assignments)),
                complete=True,
            ),
            in_order(self._problems),
        )

    def _add_clusters(self, service: Service) -> None:
        rules = self._rules.find(service)
        for port in service.ports:
            for cluster, assignment in clusters_of(service, port, rules):
                self._clusters[cluster.name] = cluster
                if assignment is not None:
                    self._assignments[cluster.name] = assignment

    # A service's outbound side

    def _outbound(self, visible: list[Service]) -> tuple[list[Listener], list[RouteConfiguration]]:
        listeners: dict[str, Listener] = {}
        configurations: dict[str, RouteConfiguration] = {}

        def add(host: str, hosts: Iterable[str], port: int, routes: Iterable[Route]) -> None:
            name = cluster_name(host, port)
            if name not in configurations:
                configurations[name] = _configuration(name, hosts, port, routes)
                for each in hosts:
                    listeners.setdefault(_authority(each, port), Listener(_authority(each, port), name))

        claims = self._claims()
        ports_of_owner: dict[tuple[str, str, str], list[int]] = {}
        for service in visible:
            owner = self._owner(claims, service.host)
            hosts = (*service.aliases(self._namespace), *(each for each in service.addresses if "/" not in each))
            for port in service.ports:
                if not port.is_http:
                    continue
                routes: list[Route] = []
                if owner is not None:
                    routes = self._make.routes(owner, port.number)
                    ports_of_owner.setdefault(owner.key, []).append(port.number)
                # A rule that says nothing about this port, or to this caller, is none (route.go, "no routes matched").
                add(service.host, hosts, port.number, routes or [default_route(service, port.number)])
        # A VirtualService may give a host that no service has: it exists then, on the ports of the services that the
        # same VirtualService is for, on port 80 if there are none (route.go, buildSidecarVirtualHosts...).
        for host, owner in claims.items():
            if host == "*" or host in self._directory.services:
                continue
            if host.startswith("*.") and any(each.endswith(host[1:]) for each in self._directory.services):
                continue
            for number in sorted(set(ports_of_owner.get(owner.key, (80,)))):
                if routes := self._make.routes(owner, number):
                    add(host, names(host, self._namespace), number, routes)
        listeners[CATCH_ALL], catch_all = self._catch_all()
        configurations[catch_all.name] = catch_all
        return list(listeners.values()), list(configurations.values())

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
                if winner is not each:
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
        if not spec.export_to or "*" in spec.export_to:
            return 2
        return int(virtual_service.namespace != self._namespace)

    def _report_missing_gateways(self) -> None:
        known = {f"{each.namespace}/{each.name}" for each in self._objects if isinstance(each.spec, r.Gateway)}
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

    def _catch_all(self) -> tuple[Listener, RouteConfiguration]:
        if self._settings.registry_only:
            route = Route(RouteMatch(), DirectResponse(502), "block_all")
        else:
            route = Route(RouteMatch(), Forward((WeightedCluster(PASSTHROUGH),)), "allow_any")
            self._clusters[PASSTHROUGH] = Cluster(PASSTHROUGH, ClusterType.ORIGINAL_DST)
        name = route.name
        return Listener(CATCH_ALL, name), RouteConfiguration(name, (VirtualHost(name, ("*",), (route,)),))

    # A gateway

    def _gateway(self) -> tuple[list[Listener], list[RouteConfiguration]]:
        chosen = gateway_rules.selected(self._objects, self._labels)
        chosen_names = frozenset(f"{each.namespace}/{each.name}" for each in chosen)
        attached = [each for each in self._virtual_services if gateway_rules.attached(each, chosen_names)]
        for each in attached:
            spec = each.spec
            assert isinstance(spec, r.VirtualService)
            for destination in destinations(spec):
                service = self._directory.find(destination.host, each.namespace)
                if service is not None:
                    self._add_clusters(service)
        return gateway_rules.listeners(chosen, attached, self._make, self._problems.append)


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _configuration(name: str, hosts: Iterable[str], port: int, routes: Iterable[Route]) -> RouteConfiguration:
    domains: dict[str, None] = {}
    for host in hosts:
        whole = _authority(host, port)
        domains[whole.rpartition(":")[0]] = None
        domains[whole] = None
    host = name.rpartition("|")[2]
    return RouteConfiguration(name, (VirtualHost(f"{host}:{port}", tuple(domains), tuple(routes)),))
