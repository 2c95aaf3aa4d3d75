"""Do ServiceEntries of one host agree about the protocol of its port? (IST0177)"""

from __future__ import annotations

from collections.abc import Iterator

from meshlib.istio import resources as r
from meshlib.istio.analyze.messages import TWO_ENTRIES, Message
from meshlib.istio.analyze.scene import Scene, full_name


def check(scene: Scene) -> Iterator[Message]:
    found: dict[tuple[str, str, int], list[tuple[str, r.Object]]] = {}
    """(protocol, object), by whom it is exported to, host and port."""
    for each in scene.of("ServiceEntry"):
        spec = each.spec
        assert isinstance(spec, r.ServiceEntry)
        export_to = spec.export_to or list(scene.settings.service_export_to) or ["*"]
        scopes = ["*"] if "*" in export_to else [each.namespace if name == "." else name for name in export_to]
        for scope in scopes:
            for host in spec.hosts:
                for port in spec.ports:
                    found.setdefault((scope, host, port.number), []).append((port.protocol.upper(), each))
    told: set[tuple[str, str, str]] = set()
    for (scope, host, number), entries in found.items():
        together = entries if scope == "*" else [*entries, *found.get(("*", host, number), ())]
        protocols = sorted({protocol for protocol, _ in together})
        if len(protocols) < 2:
            continue
        names = ", ".join(sorted({full_name(each) for _, each in together}))
        for _, each in together:
            if each.key not in told:
                told.add(each.key)
                yield TWO_ENTRIES.at(each, ("metadata", "name"), names, host, number, ", ".join(protocols))
