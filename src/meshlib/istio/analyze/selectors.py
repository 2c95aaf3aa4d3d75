"""Do selectors choose anything, and not the same twice? (IST0110, IST0111, IST0127)"""

from __future__ import annotations

from collections.abc import Iterator

from meshlib.istio import resources as r
from meshlib.istio.analyze.messages import NO_SELECTORS, NO_WORKLOADS, SAME_PODS, Message, listed
from meshlib.istio.analyze.scene import Scene, full_name, selector_of, shown


def check(scene: Scene) -> Iterator[Message]:
    yield from _sidecars(scene)
    if not scene.workloads:
        return  # nobody has said what runs: outside Kubernetes processes say it themselves
    for each in scene.objects:
        spec = each.spec
        if not isinstance(
            spec, r.AuthorizationPolicy | r.PeerAuthentication | r.RequestAuthentication | r.RateLimitPolicy
        ):
            continue
        selector = selector_of(spec.selector)
        anywhere = each.namespace == scene.settings.root_namespace
        if selector and not scene.selected(selector, "" if anywhere else each.namespace):
            yield NO_WORKLOADS.at(each, ("spec", "selector"), shown(selector))


def _sidecars(scene: Scene) -> Iterator[Message]:
    whole: dict[str, list[r.Object]] = {}
    chosen: dict[tuple[str, str], list[r.Object]] = {}
    for each in scene.of("Sidecar"):
        assert isinstance(each.spec, r.Sidecar)
        selector = selector_of(each.spec.workload_selector)
        if not selector:
            whole.setdefault(each.namespace, []).append(each)
        for workload in scene.selected(selector, each.namespace) if selector else ():
            chosen.setdefault((workload.namespace, workload.name), []).append(each)
    for namespace, sidecars in whole.items():
        if len(sidecars) > 1:
            for each in sidecars:
                yield NO_SELECTORS.at(each, ("metadata", "name"), listed([s.name for s in sidecars]), namespace)
    for (namespace, pod), sidecars in chosen.items():
        if len(sidecars) > 1:
            names = listed([full_name(each) for each in sidecars])
            for each in sidecars:
                yield SAME_PODS.at(each, ("spec", "workloadSelector"), names, namespace, pod)
