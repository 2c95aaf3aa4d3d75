"""What is the same for every node that asks? Rules and services, and what was made of them for one node and serves the
next, and the next change.

A control plane translates the same objects for many nodes, and nearly all of what they see is the same; so it is of
what was before a change and what is after it. All that is remembered here follows from the objects and workloads
alone, so a World is as good as new at any time; two threads that ask at once may make the same thing twice, and it is
equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from meshlib.errors import ConfigurationError
from meshlib.istio import resources as r
from meshlib.istio import sidecars, targets
from meshlib.istio.clusters import Caller, Made, Rules, clusters_of
from meshlib.istio.delegates import Rule
from meshlib.istio.mesh_settings import MeshSettings
from meshlib.istio.order import Ordered, Parts
from meshlib.istio.routes import destinations
from meshlib.istio.rulebook import Rulebook
from meshlib.istio.services import Directory, Registry, Service, joined_hosts
from meshlib.model import Cluster, LoadAssignment, Workload

T = TypeVar("T")
Key = tuple[object, ...]


class _Past(NamedTuple):
    """What was made before a change. living: whose ids its keys hold, so that they are nobody else's."""

    known: Mapping[Key, object]
    is_same_rulebook: bool
    living: tuple[object, ...]


class World:
    """parts: of all objects. settings: None asks the objects. before: the world before a change, of which is taken over
    what is the same. problems: what is wrong whoever asks."""

    def __init__(
        self,
        parts: Parts,
        workloads: Iterable[Workload],
        settings: MeshSettings | None = None,
        before: World | None = None,
    ) -> None:
        workloads = tuple(workloads)
        given = (parts.rules, joined_hosts(workloads), settings)
        rulebook: Rulebook | None
        rulebook = before._rulebook if before is not None and before._rulebook.is_of(*given) else None
        self._rulebook: Rulebook = Rulebook(*given) if rulebook is None else rulebook
        self.objects, self.settings = self._rulebook.objects, self._rulebook.settings
        running = {} if before is None else before._running
        self._running: Mapping[str, Ordered] = {
            kind: Ordered(given, running.get(kind)) for kind, given in parts.running.items()
        }
        self.registry: Registry = Registry(
            self.objects,
            workloads,
            self.settings.service_export_to,
            None if before is None else before.registry,
            {kind: each.objects for kind, each in self._running.items()},
        )
        self.problems: list[ConfigurationError] = [*self.registry.problems, *self._rulebook.problems]
        if self._rulebook.targeting:
            self.problems += targets.problems(self._rulebook.targeting, self.registry.services.values())
        self._known: dict[Key, object] = {}
        self._past: _Past | None = None
        if before is not None and before.settings == self.settings:
            living = (before._rulebook, *before.registry.claimants())
            self._past = _Past(before._known, rulebook is not None, living)

    def rules_of(self, virtual_service: r.Object) -> tuple[Rule, ...]:
        return self._rulebook.rules_of(virtual_service)

    def destinations(self, virtual_service: r.Object) -> tuple[tuple[str, str], ...]:
        """Every host that its rules send to, and the namespace that names it."""
        key = ("destinations", virtual_service.key)
        return self.once_of_rules(key, lambda: tuple(destinations(self.rules_of(virtual_service))))

    def asks_who_calls(self, virtual_service: r.Object) -> bool:
        """Whether its routes depend on the caller's labels or namespace."""
        return self._rulebook.asks_who_calls(virtual_service)

    def seen_by(
        self, caller: Caller, *, is_gateway: bool, report: Callable[[ConfigurationError], None]
    ) -> tuple[Directory, Sequence[r.Object], r.Object | None]:
        """The services and the VirtualServices that are there for `caller`, and the Sidecar that says so, if any."""

        def seen() -> Directory:
            before = None if self._past is None else self._past.known.get(("seen", caller.namespace))
            return self.registry.seen_from(caller.namespace, before if isinstance(before, Directory) else None)

        directory = self.once(("seen", caller.namespace), seen)
        rules = self.once_of_rules(("rules", caller.namespace), lambda: self._rulebook.exported_to(caller.namespace))
        if is_gateway:
            return directory, rules, None
        root, written = self.settings.root_namespace, self._rulebook.sidecars
        sidecar = sidecars.chosen(written, caller.namespace, caller.labels, root, report)
        if sidecar is None:
            return directory, rules, None

        def imported() -> tuple[Directory, list[r.Object]]:
            found, wanted = sidecars.imported(sidecar, directory, rules, self.destinations, caller.namespace)
            before = None if self._past is None else self._past.known.get(key)
            return Directory(found.services, before[0] if isinstance(before, tuple) else None), wanted

        key = ("imported", caller.namespace, sidecar.key)
        wanted, wanted_rules = self.once(key, imported)
        return wanted, wanted_rules, sidecar

    def rules(self, service: Service, caller: Caller, directory: Directory) -> Rules:
        """What DestinationRules and BackendTrafficPolicies say to `caller` about a service."""
        book, root = self._rulebook, self.settings.root_namespace

        def find() -> Rules:
            found = book.destinations.find(service, caller, root, directory)
            backends = book.backends.find(service, caller, root, directory)
            forcing = book.backends.forcing(service, backends)
            key = ("policies", *map(id, found), None, *map(id, backends), None, *map(id, forcing))
            return self.once_of_settings(key, lambda: Rules(found, backends, self.settings, forcing))

        if book.destinations.asks_who_calls:
            return find()
        # Who serves it makes no difference, nor who serves others.
        key = ("policies of", service.host, service.namespace, id(directory.shape), caller.namespace)
        return self.once_of_rules(key, find)

    def clusters(self, service: Service, rules: Rules) -> tuple[Made, ...]:
        key = ("clusters", id(service), id(rules))
        return self.once_of_settings(key, lambda: tuple(clusters_of(service, rules)))

    def seen_from(self, made: Made, caller: Caller) -> tuple[Cluster, LoadAssignment | None]:
        if made.near is None:
            return made.cluster, made.assignment
        labels = tuple((name, caller.labels.get(name)) for name in sorted(made.near.labels))
        return self.once_of_settings(("near", id(made), caller.locality, labels), lambda: made.seen_by(caller))

    # What is made once. A key may hold ids: of what lives as long as this World, or as what was made for the key.

    def once(self, key: Key, make: Callable[[], T]) -> T:
        """What was made for this key, or is made now."""
        return self._once(key, make, False)

    def once_of_rules(self, key: Key, make: Callable[[], T]) -> T:
        """The same, where it follows from the key and what the rules say: it outlives a change of who runs."""
        return self._once(key, make, self._past is not None and self._past.is_same_rulebook)

    def once_of_settings(self, key: Key, make: Callable[[], T]) -> T:
        """The same, where it follows from the key and the mesh's settings: it outlives a change of other rules too."""
        return self._once(key, make, self._past is not None)

    def _once(self, key: Key, make: Callable[[], T], outlives: bool) -> T:
        found = self._known.get(key)
        if found is None:
            if outlives and self._past is not None:
                found = self._past.known.get(key)
            # Of two threads that make it at once the first has made it: ids in keys are of what is kept.
            found = self._known.setdefault(key, make() if found is None else found)
        return found  # type: ignore[return-value]  # a key belongs to one kind of thing

    def __repr__(self) -> str:
        return f"<World {len(self.objects)} rules, {len(self.registry.services)} services>"
