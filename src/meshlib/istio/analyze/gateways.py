"""Do two Gateways claim the same hosts on the same port of the same pods? (IST0145)"""

from __future__ import annotations

from collections.abc import Iterator

from meshlib.istio import resources as r
from meshlib.istio.analyze.messages import SAME_SERVERS, Message
from meshlib.istio.analyze.scene import Scene, full_name, shown
from meshlib.istio.documents import Path


def check(scene: Scene) -> Iterator[Message]:
    gateways = [(each, each.spec) for each in scene.of("Gateway") if isinstance(each.spec, r.Gateway)]
    for each, spec in gateways:
        others = [(other, found) for other, found in gateways if other is not each and found.selector == spec.selector]
        for index, server in enumerate(spec.servers):
            rivals = [full_name(other) for other, found in others if _claims(found, server)]
            if rivals:
                path: Path = ("spec", "servers", index)
                hosts = ",".join(server.hosts)
                words = ",".join(rivals), shown(spec.selector), server.port.number, hosts
                yield SAME_SERVERS.at(each, path, *words)


def _claims(spec: r.Gateway, server: r.Server) -> bool:
    return any(
        other.port.number == server.port.number and other.bind == server.bind and set(other.hosts) & set(server.hosts)
        for other in spec.servers
    )
