"""Do selectors choose anything, and not the same twice? (IST0101, IST0110, IST0111, IST0127, IST0159, IST0160)

A policy of access that selects nobody leaves open what it was meant to close, and nothing fails by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

from meshlib.istio import resources as r
from meshlib.istio.analyze.messages import (
    NO_SELECTORS,
    NO_WORKLOADS,
    NOT_FOUND,
    SAME_PODS,
    TELEMETRY_OF_SAME_PODS,
    TELEMETRY_WITHOUT_SELECTORS,
    Kind,
    Message,
    listed,
)
from meshlib.istio.analyze.scene import Scene, Workload, full_name, selector_of, shown, workloads_of
from meshlib.istio.by_label import ByLabel
from meshlib.istio.problems import ConfigurationWarning
from meshlib.istio.targets import targets

_Policy = r.AuthorizationPolicy | r.PeerAuthentication | r.RequestAuthentication | r.RateLimitPolicy
_OfNamespaces = r.Sidecar | r.Telemetry
"""Their selectors are looked at beside those of their kind, too."""


def check(scene: Scene) -> Iterator[Message]:
    yield from _conflicts(scene, "Sidecar", NO_SELECTORS, SAME_PODS)
    yield from _conflicts(scene, "Telemetry", TELEMETRY_WITHOUT_SELECTORS, TELEMETRY_OF_SAME_PODS)
    known = _Known(scene.workloads, scene.settings.root_namespace)
    for each in scene.objects:
        if isinstance(each.spec, r.AuthorizationPolicy) and _is_of_nobody(scene, each):
            yield NO_WORKLOADS.at(each, ("metadata", "namespace"), "")
        if not scene.workloads:
            continue  # nobody has said what runs: outside Kubernetes processes say it themselves
        selector = selector_in(each)
        if selector and not known.fits(each, selector):
            if isinstance(each.spec, _OfNamespaces):
                yield NOT_FOUND.at(each, ("spec", _selector_field(each)), "selector", shown(selector))
            else:
                yield NO_WORKLOADS.at(each, ("spec", "selector"), shown(selector))


def idle(objects: Iterable[r.Object], running: Iterable[Workload], root: str) -> Iterator[ConfigurationWarning]:
    """Objects whose selectors fit nothing that is known: no pod, no WorkloadEntry, nothing of `running`. root: the root
    namespace. Nothing is told of namespaces in which nobody is known, since who is to come is not there yet."""
    given = tuple(objects)
    workloads = (*workloads_of(given), *running)
    homes, known = {each.namespace for each in workloads}, _Known(workloads, root)
    for each in given:
        selector = selector_in(each)
        is_early = each.namespace not in homes and not (each.namespace == root and homes)
        if not selector or is_early or each.unusable is not None or known.fits(each, selector):
            continue
        reason = f"fits no workload that is known here ({shown(selector)}): what it says is in force for nobody"
        yield ConfigurationWarning(each.source, each.title, f"spec.{_selector_field(each)}", reason)


def selector_in(given: r.Object) -> Mapping[str, str]:
    """The labels that an object selects workloads by; none where it is for a whole namespace, or for what it names."""
    spec = given.spec
    if isinstance(spec, r.Sidecar):
        return selector_of(spec.workload_selector)
    return selector_of(spec.selector) if isinstance(spec, _Policy | r.Telemetry) else {}


class _Known:
    """Who runs, found by label: a cluster's policies are many, and so are its pods. root: the root namespace."""

    def __init__(self, workloads: Iterable[Workload], root: str) -> None:
        self._workloads, self._root = tuple(workloads), root

    @cached_property
    def _of_namespaces(self) -> ByLabel[Workload]:
        return ByLabel((each.namespace, each.labels, each) for each in self._workloads)

    @cached_property
    def _of_all(self) -> ByLabel[Workload]:
        return ByLabel(("", each.labels, each) for each in self._workloads)

    def fits(self, given: r.Object, selector: Mapping[str, str]) -> bool:
        """Whether an object's selector chooses anybody. In the root namespace policies are for all namespaces; Sidecars
        and Telemetry objects with a selector are not."""
        if given.namespace == self._root and not isinstance(given.spec, _OfNamespaces):
            return bool(self._of_all.chosen("", selector))
        return bool(self._of_namespaces.chosen(given.namespace, selector))


def _is_of_nobody(scene: Scene, given: r.Object) -> bool:
    """A policy for the whole of a namespace in which nothing runs."""
    if not scene.is_whole or given.namespace == scene.settings.root_namespace:
        return False
    return not selector_in(given) and not targets(given.spec) and not scene.selected({}, given.namespace)


def _conflicts(scene: Scene, kind: str, without: Kind, same: Kind) -> Iterator[Message]:
    whole: dict[str, list[r.Object]] = {}
    chosen: dict[tuple[str, str], list[r.Object]] = {}
    for each in scene.of(kind):
        selector = selector_in(each)
        if not selector and not targets(each.spec):
            whole.setdefault(each.namespace, []).append(each)
        for workload in scene.selected(selector, each.namespace) if selector else ():
            chosen.setdefault((workload.namespace, workload.name), []).append(each)
    for namespace, found in whole.items():
        if len(found) > 1:
            for each in found:
                yield without.at(each, ("metadata", "name"), listed([one.name for one in found]), namespace)
    for (namespace, pod), found in chosen.items():
        if len(found) > 1:
            names = listed([full_name(each) for each in found])
            for each in found:
                yield same.at(each, ("spec", _selector_field(each)), names, namespace, pod)


def _selector_field(given: r.Object) -> str:
    return "workloadSelector" if isinstance(given.spec, r.Sidecar) else "selector"
