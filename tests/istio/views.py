"""Translations in one line, and where a call would go under them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from meshlib.istio.parse import parse_text
from meshlib.istio.resources import Object
from meshlib.istio.translate import MeshSettings, Translation, translate
from meshlib.model import Forward, Headers, Node, NodeKind, Request, Snapshot, Workload
from meshlib.policy.live import compile_live
from meshlib.policy.router import Decision

PREFIX = "apiVersion: networking.istio.io/v1\n"
BOOKINFO = Path(__file__).parents[2] / "examples" / "bookinfo"

WORKLOADS = tuple(
    Workload(
        f"{service}-{version}",
        service=service,
        labels=(("app", service), ("version", version)),
        address="127.0.0.1",
        port=9000 + number,
    )
    for number, (service, version) in enumerate(
        [
            ("productpage", "v1"),
            ("details", "v1"),
            ("reviews", "v1"),
            ("reviews", "v2"),
            ("reviews", "v3"),
            ("ratings", "v1"),
        ]
    )
)


def objects(*texts: str) -> list[Object]:
    """The objects of YAML texts; a text without a line break names a file of examples/bookinfo."""
    found: list[Object] = []
    for text in texts:
        source = text if "\n" not in text else "test.yaml"
        parsed = parse_text((BOOKINFO / text).read_text() if "\n" not in text else text, source)
        assert parsed.problems == ()
        found.extend(parsed.objects)
    return found


def node(namespace: str = "default", kind: NodeKind = NodeKind.SIDECAR, **labels: str) -> Node:
    return Node("n", Workload("w", namespace, labels=tuple(sorted(labels.items()))), kind)


def view(
    *texts: str,
    workloads: tuple[Workload, ...] = WORKLOADS,
    given: Node | None = None,
    settings: MeshSettings | None = None,
) -> Translation:
    made = translate(objects(*texts), workloads, given or node(), settings)
    assert made.snapshot.inconsistencies() == ()
    return made


def decide(snapshot: Snapshot, url: str, headers: Mapping[str, str] | None = None, method: str = "GET") -> Decision:
    """What the data plane decides for a call under this snapshot."""
    scheme, _, rest = url.partition("://")
    authority, mark, path = rest.partition("/")
    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    request = Request(method, scheme, authority, mark + path, Headers(raw))
    decision = compile_live(snapshot, None, random.Random(1)).router.match(request)
    assert decision is not None
    return decision


def weights(decision: Decision) -> dict[str, int]:
    """{"v1": 90, "v2": 10}; the subset "" is written as the host."""
    assert isinstance(decision.action, Forward)
    found = {}
    for cluster in decision.action.clusters:
        _, _, subset, host = cluster.cluster.split("|")
        found[subset or host] = cluster.weight
    return found


def service(name: str = "a", namespace: str = "default", ports: str = "[{name: http, port: 80}]") -> str:
    return (
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\n"
        f"spec: {{selector: {{app: {name}}}, ports: {ports}}}\n"
    )


def virtual_service(
    http: str, *, name: str = "vs", namespace: str = "default", hosts: str = "[a]", more: str = ""
) -> str:
    return (
        f"{PREFIX}kind: VirtualService\nmetadata: {{name: {name}, namespace: {namespace}}}\n"
        f"spec:\n  hosts: {hosts}\n  http: {http}\n  {more}\n"
    )


def destination_rule(spec: str, *, name: str = "dr", namespace: str = "default") -> str:
    return f"{PREFIX}kind: DestinationRule\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
