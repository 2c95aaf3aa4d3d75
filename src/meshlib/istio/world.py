"""What is the same for every node that asks? Objects in their order, services, and what was made of them for one node
and serves the next.

A control plane translates the same objects for many nodes, and nearly all of what they see is the same. All that is
remembered here follows from the objects and workloads alone, so a World is as good as new at any time; two threads
that ask at once may make the same thing twice, and it is equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from meshlib.errors import ConfigurationError
from meshlib.istio import resources as r
from meshlib.istio import sidecars, targets
from meshlib.istio.clusters import Caller, HostRules, Made, Rules, clusters_of
from meshlib.istio.delegates import Rule, rules_of
from meshlib.istio.gateway_api import convert
from meshlib.istio.mesh_settings import MeshSettings, mesh_settings
from meshlib.istio.routes import destinations
from meshlib.istio.services import Directory, Registry, Service, is_exported, joined_hosts
from meshlib.model import Cluster, LoadAssignment, Workload

T = TypeVar("T")


class World:
    """settings: None asks the objects. before: the world before a change, of which is taken over what is the same.
    problems: what is wrong whoever asks."""

    def __init__(
        self,
        objects: Iterable[r.Object],
        workloads: Iterable[Workload],
        settings: MeshSettings | None = None,
        before: World | None = None,
    ) -> None:
        workloads = tuple(workloads)
        converted = convert(objects, joined_hosts(workloads))
        self.objects = _in_order(converted.objects)
        self.settings = mesh_settings(self.objects) if settings is None else settings
        known: Registry | None = before.registry if before is not None else None
        self.registry: Registry = Registry(self.objects, workloads, self.settings.service_export_to, known)
        self.problems: list[ConfigurationError] = [*self.registry.problems, *converted.problems]
        self.problems += targets.problems(self.objects, self.registry.services.values())
        self.virtual_services = [
            each for each in self.objects if isinstance(each.spec, r.VirtualService) and each.spec.hosts
        ]
        self._sidecars = [each for each in self.objects if isinstance(each.spec, r.Sidecar)]
        self._destinations = HostRules.of_destinations(self.objects, self.settings.destination_rule_export_to)
        self._backends = HostRules.of_backends(self.objects, self.problems.append)
        delegates = {
            (each.namespace, each.name): each
            for each in self.objects
            if isinstance(each.spec, r.VirtualService) and not each.spec.hosts
        }
        self._rules_of = {
            each.key: rules_of(each, delegates, self.settings.virtual_service_export_to, self.problems.append)
            for each in self.virtual_services
        }
        wanted = {
            (rule.delegate.namespace or each.namespace, rule.delegate.name)
            for each in self.virtual_services
            if isinstance(each.spec, r.VirtualService)
            for rule in each.spec.http
            if rule.delegate is not None
        }
        for place, unused in delegates.items():
            if place not in wanted:
                reason = "is missing, and no VirtualService delegates to this one: it has no effect"
                self.problems.append(ConfigurationError(unused.source, unused.title, "spec.hosts", reason))
        self._known: dict[tuple[object, ...], object] = {}

    def rules_of(self, virtual_service: r.Object) -> tuple[Rule, ...]:
        return self._rules_of[virtual_service.key]

    def destinations(self, virtual_service: r.Object) -> tuple[tuple[str, str], ...]:
        """Every host that its rules send to, and the namespace that names it."""
        key = ("destinations", virtual_service.key)
        return self.once(key, lambda: tuple(destinations(self.rules_of(virtual_service))))

    def asks_who_calls(self, virtual_service: r.Object) -> bool:
        """Whether its routes depend on the caller's labels or namespace."""
        return any(
            match.source_labels or match.source_namespace
            for each in self.rules_of(virtual_service)
            for match in each.rule.match
        )

    def seen_by(
        self, caller: Caller, *, is_gateway: bool, report: Callable[[ConfigurationError], None]
    ) -> tuple[Directory, Sequence[r.Object], r.Object | None]:
        """The services and the VirtualServices that are there for `caller`, and the Sidecar that says so, if any."""
        directory = self.once(("seen", caller.namespace), lambda: self.registry.seen_from(caller.namespace))
        rules = self.once(("rules", caller.namespace), lambda: self._exported_to(caller.namespace))
        if is_gateway:
            return directory, rules, None
        sidecar = sidecars.chosen(self._sidecars, caller.namespace, caller.labels, self.settings.root_namespace, report)
        if sidecar is None:
            return directory, rules, None

        def imported() -> tuple[Directory, list[r.Object]]:
            return sidecars.imported(sidecar, directory, rules, self.destinations, caller.namespace)

        wanted, wanted_rules = self.once(("imported", caller.namespace, sidecar.key), imported)
        return wanted, wanted_rules, sidecar

    def rules(self, service: Service, caller: Caller, directory: Directory) -> Rules:
        """What DestinationRules and BackendTrafficPolicies say to `caller` about a service."""
        root = self.settings.root_namespace

        def find() -> Rules:
            found = self._destinations.find(service, caller, root, directory)
            backends = self._backends.find(service, caller, root, directory)
            key = ("policies", *map(id, found), None, *map(id, backends))
            return self.once(key, lambda: Rules(found, backends, self.settings))

        if self._destinations.asks_who_calls:
            return find()
        return self.once(("policies of", id(service), id(directory), caller.namespace), find)

    def clusters(self, service: Service, rules: Rules) -> tuple[Made, ...]:
        return self.once(("clusters", id(service), id(rules)), lambda: tuple(clusters_of(service, rules)))

    def seen_from(self, made: Made, caller: Caller) -> tuple[Cluster, LoadAssignment | None]:
        if made.near is None:
            return made.cluster, made.assignment
        labels = tuple((name, caller.labels.get(name)) for name in sorted(made.near.labels))
        return self.once(("near", id(made), caller.locality, labels), lambda: made.seen_by(caller))

    def once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """What was made for this key, or is made now. A key may hold ids: of what lives as long as this World."""
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = make()
        return found  # type: ignore[return-value]  # a key belongs to one kind of thing

    def _exported_to(self, namespace: str) -> list[r.Object]:
        default = self.settings.virtual_service_export_to
        return [
            each
            for each in self.virtual_services
            if isinstance(each.spec, r.VirtualService)
            and is_exported(each.spec.export_to or default, each.namespace, namespace)
        ]

    def __repr__(self) -> str:
        return f"<World {len(self.objects)} objects, {len(self.registry.services)} services>"


def _in_order(objects: Iterable[r.Object]) -> list[r.Object]:
    """Oldest first, then by name and namespace: whoever comes first has the host (sortConfigByCreationTime). What gives
    no age counts as the oldest, so that files alone are ordered by name."""
    return sorted(objects, key=lambda each: (each.created, each.name, each.namespace, each.kind, each.api_version))
