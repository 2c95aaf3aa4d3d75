"""Do the Services of one Deployment contradict each other? (IST0116, IST0137)"""

from __future__ import annotations

from collections.abc import Iterator

from meshlib.istio import resources as r
from meshlib.istio.analyze.messages import TWO_PORTS, TWO_PROTOCOLS, Message, listed
from meshlib.istio.analyze.scene import Scene, full_name
from meshlib.istio.documents import Path

_NAME: Path = ("metadata", "name")


def check(scene: Scene) -> Iterator[Message]:
    for each in scene.of("Deployment"):
        labels = scene.labels_of(each)
        services = [
            (service, service.spec)
            for service in scene.of("Service")
            if isinstance(service.spec, r.Service)
            and service.namespace == each.namespace
            and service.spec.selector
            and all(labels.get(key) == value for key, value in service.spec.selector.items())
        ]
        protocols: dict[int, dict[str, list[str]]] = {}
        ports: dict[str, dict[int, str]] = {}
        for service, spec in services:
            for port in spec.ports:
                protocols.setdefault(port.port, {}).setdefault(port.protocol or "TCP", []).append(full_name(service))
                ports.setdefault(str(port.target_port or port.port), {})[port.port] = full_name(service)
        for number, by_protocol in protocols.items():
            if len(by_protocol) > 1:
                names = sorted(name for names in by_protocol.values() for name in names)
                yield TWO_PROTOCOLS.at(each, _NAME, each.name, number, listed(names))
        for target, by_port in ports.items():
            if len(by_port) > 1:
                names, numbers = sorted(by_port.values()), sorted(by_port)
                yield TWO_PORTS.at(each, _NAME, each.name, listed(names), target, listed(numbers))
