"""Are a namespace's pods put on the mesh when they are created? (IST0102, IST0123)"""

from __future__ import annotations

from collections.abc import Iterator

from meshlib.istio.analyze.messages import INJECTION_LABELS, NOT_INJECTED, Message, listed
from meshlib.istio.analyze.scene import SYSTEM, Scene

INJECTION, REVISION, OURS = "istio-injection", "istio.io/rev", "meshlib-injection"
AMBIENT = "istio.io/dataplane-mode"


def check(scene: Scene) -> Iterator[Message]:
    for each in scene.of("Namespace"):
        if each.name in SYSTEM or each.name == scene.settings.root_namespace:
            continue
        given = [name for name in (INJECTION, REVISION, AMBIENT) if name in each.labels]
        is_switched_off = each.labels.get(INJECTION, "enabled") != "enabled"
        if len(given) > 1 and not is_switched_off:
            told = [f"{name}={each.labels[name]}" for name in given]
            yield INJECTION_LABELS.at(each, ("metadata", "name"), listed(told))
        elif not given and OURS not in each.labels:
            yield NOT_INJECTED.at(each, ("metadata", "name"), each.name)
