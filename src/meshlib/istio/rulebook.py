"""What do objects say that is the same whoever runs? Settings, VirtualServices with their delegates, DestinationRules.

It follows from all objects but those of which only services are made (order.py), so a change of endpoints leaves it as
it is, and with it what was made of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshlib.errors import ConfigurationError
from meshlib.istio import resources as r
from meshlib.istio import targets
from meshlib.istio.clusters import HostRules
from meshlib.istio.delegates import Rule, rules_of
from meshlib.istio.gateway_api import convert
from meshlib.istio.mesh_settings import MeshSettings, mesh_settings
from meshlib.istio.order import in_order
from meshlib.istio.sameness import are_same
from meshlib.istio.services import is_exported


class Rulebook:
    """joined: hosts of services that are there by their processes, which routes of the Gateway API may name. settings:
    None asks the objects. objects: in their order, the Gateway API's as Istio's. problems: what is wrong
    whoever asks and whoever runs. targeting: the objects that name their targets. Immutable."""

    def __init__(
        self, given: tuple[r.Object, ...], joined: frozenset[str] = frozenset(), settings: MeshSettings | None = None
    ) -> None:
        self._given, self._settings_given = given, settings
        converted = convert(given, joined)
        self._joined = None if converted.objects is given else joined
        """None where nobody asks: convert() gives back what has nothing of the Gateway API."""
        self.objects = in_order(converted.objects)
        self.settings = mesh_settings(self.objects) if settings is None else settings
        self.problems: list[ConfigurationError] = list(converted.problems)
        self.targeting = [each for each in self.objects if targets.targets(each.spec)]
        self.virtual_services = [
            each for each in self.objects if isinstance(each.spec, r.VirtualService) and each.spec.hosts
        ]
        self.sidecars = [each for each in self.objects if isinstance(each.spec, r.Sidecar)]
        self.destinations = HostRules.of_destinations(self.objects, self.settings.destination_rule_export_to)
        self.backends = HostRules.of_backends(self.objects, self.problems.append)
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

    def is_of(self, given: Sequence[r.Object], joined: frozenset[str], settings: MeshSettings | None) -> bool:
        """Whether it would be made again of the very same."""
        is_asked = self._joined is None or self._joined == joined
        return is_asked and self._settings_given is settings and are_same(self._given, given)

    def rules_of(self, virtual_service: r.Object) -> tuple[Rule, ...]:
        return self._rules_of[virtual_service.key]

    def asks_who_calls(self, virtual_service: r.Object) -> bool:
        """Whether its routes depend on the caller's labels or namespace."""
        return any(
            match.source_labels or match.source_namespace
            for each in self.rules_of(virtual_service)
            for match in each.rule.match
        )

    def exported_to(self, namespace: str) -> list[r.Object]:
        """The VirtualServices that callers in `namespace` may see."""
        default = self.settings.virtual_service_export_to
        return [
            each
            for each in self.virtual_services
            if isinstance(each.spec, r.VirtualService)
            and is_exported(each.spec.export_to or default, each.namespace, namespace)
        ]

    def __repr__(self) -> str:
        return f"<Rulebook {len(self.objects)} objects>"
