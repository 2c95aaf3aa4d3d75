"""What do all checks look at? The objects by kind, the services that they make, and the pods that are known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from meshlib.istio import gateway_kinds
from meshlib.istio import resources as r
from meshlib.istio.mesh_settings import MeshSettings, mesh_settings
from meshlib.istio.services import Registry, Service, fqdn, is_exported

SYSTEM = frozenset({"kube-system", "kube-public", "kube-node-lease", "local-path-storage", "istio-system"})
"""Namespaces in which nobody wants to be told anything (Istio: IsSystemNamespace)."""


class Workload(NamedTuple):
    """A pod, or what a Deployment makes its pods of."""

    namespace: str
    name: str
    labels: Mapping[str, str]


class Scene:
    """is_whole: see analyze."""

    def __init__(self, objects: Iterable[r.Object], *, is_whole: bool) -> None:
        self.objects = tuple(sorted(objects, key=lambda each: (each.kind, each.namespace, each.name)))
        self.is_whole = is_whole
        self.settings: MeshSettings = mesh_settings(self.objects)
        registry = Registry(self.objects, (), self.settings.service_export_to)
        self.services: Mapping[str, Service] = registry.services
        self.workloads: tuple[Workload, ...] = tuple(workloads_of(self.objects))
        self._subsets: dict[str, set[str]] = {}
        """By the host that DestinationRules name, whole or with a wildcard."""
        for each in self.objects:
            if isinstance(each.spec, r.DestinationRule):
                known = self._subsets.setdefault(fqdn(each.spec.host, each.namespace), set())
                known.update(subset.name for subset in each.spec.subsets)
        self._wild_rules = [host for host in self._subsets if host.startswith("*")]

    def of(self, kind: str) -> Iterator[r.Object]:
        """Those that could be read. Istio and the Gateway API both have a Gateway: Istio's is meant."""
        return (
            each
            for each in self.objects
            if each.kind == kind
            and (each.spec is not None or kind == "Namespace")
            and not each.api_version.startswith(f"{gateway_kinds.GROUP}/")
        )

    def service(self, host: str, namespace: str) -> Service | None:
        """What a rule of `namespace` means by `host`: by its very name, else the wildcard of a ServiceEntry."""
        name = fqdn(host, namespace)
        found = self.services.get(name) or self.services.get(host.lower())
        if found is None:
            wild = [each for each in self.services if each.startswith("*") and covers(each, name)]
            found = self.services[max(wild, key=len)] if wild else None
        return found if found is not None and is_exported(found.export_to, found.namespace, namespace) else None

    def has_subset(self, host: str, subset: str) -> bool:
        """Whether any DestinationRule defines it, whoever may see that one. host: a full name."""
        hosts = (host, *(wild for wild in self._wild_rules if covers(wild, host)))
        return any(subset in self._subsets.get(each, ()) for each in hosts)

    def labels_of(self, given: r.Object) -> Mapping[str, str]:
        """Of the pods that a Deployment or its like makes; none where that is not known."""
        place = given.namespace, given.name
        return next((each.labels for each in self.workloads if (each.namespace, each.name) == place), {})

    def selected(self, selector: Mapping[str, str], namespace: str = "") -> list[Workload]:
        return [
            each
            for each in self.workloads
            if namespace in ("", each.namespace)
            and all(each.labels.get(key) == value for key, value in selector.items())
        ]


def full_name(given: r.Object) -> str:
    return f"{given.namespace}/{given.name}"


def selector_of(given: r.WorkloadSelector | None) -> Mapping[str, str]:
    return {} if given is None else {**given.match_labels, **given.labels}


def shown(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def covers(wide: str, narrow: str) -> bool:
    """Whether a host, or a wildcard, takes in another one."""
    if wide in ("*", narrow):
        return True
    return wide.startswith("*.") and narrow.removeprefix("*").endswith(wide[1:]) and len(narrow) > len(wide) - 1


def workloads_of(objects: Iterable[r.Object]) -> Iterator[Workload]:
    """What the objects say to be running."""
    for each in objects:
        if isinstance(each.spec, r.Pod):
            yield Workload(each.namespace, each.name, each.labels)
        elif each.kind in ("Deployment", "StatefulSet", "DaemonSet"):
            spec = each.raw.get("spec")
            template = spec.get("template") if isinstance(spec, dict) else None
            metadata = template.get("metadata") if isinstance(template, dict) else None
            labels = metadata.get("labels") if isinstance(metadata, dict) else None
            if isinstance(labels, dict):
                yield Workload(each.namespace, each.name, {str(key): str(value) for key, value in labels.items()})
        elif isinstance(each.spec, r.WorkloadEntry):
            yield Workload(each.namespace, each.name, {**each.spec.labels, **each.labels})
