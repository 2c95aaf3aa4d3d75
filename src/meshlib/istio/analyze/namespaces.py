"""Are a namespace's pods put on the mesh when they are created? (IST0102, IST0123)"""

from __future__ import annotations

from collections.abc import Iterator

from meshlib.istio.analyze.messages import INJECTION_LABELS, NOT_INJECTED, Message
from meshlib.istio.analyze.scene import SYSTEM, Scene

INJECTION, REVISION, OURS = "istio-injection", "istio.io/rev", "meshlib-injection"


def check(scene: Scene) -> Iterator[Message]:
    for each in scene.of("Namespace"):
        if each.name in SYSTEM or each.name == scene.settings.root_namespace:
            continue
        if INJECTION in each.labels and REVISION in each.labels:
            yield INJECTION_LABELS.at(each, ("metadata", "name"), f"[{INJECTION} {REVISION}]")
        elif not {INJECTION, REVISION, OURS} & set(each.labels):
            yield NOT_INJECTED.at(each, ("metadata", "name"), each.name)
