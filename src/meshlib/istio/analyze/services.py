"""Do ports say which protocol they speak? (IST0118, IST0150)"""

from __future__ import annotations

from collections.abc import Iterator

from meshlib.istio import resources as r
from meshlib.istio.analyze.messages import EXTERNAL_PORT_NAME, PORT_NAME, Message
from meshlib.istio.analyze.scene import SYSTEM, Scene
from meshlib.istio.documents import Path

PROTOCOLS = ("grpc", "grpc-web", "http", "http2", "https", "mongo", "mysql", "redis", "tcp", "tls", "udp", "hbone")


def check(scene: Scene) -> Iterator[Message]:
    for each in scene.of("Service"):
        spec = each.spec
        assert isinstance(spec, r.Service)
        if each.namespace in SYSTEM:
            continue
        is_external = spec.type == "ExternalName"
        for index, port in enumerate(spec.ports):
            path: Path = ("spec", "ports", index)
            if is_external and (port.name == "tcp" or not _says_protocol(port)):
                yield EXTERNAL_PORT_NAME.at(each, path)
            elif not _says_protocol(port):
                yield PORT_NAME.at(each, path, port.name, port.port, port.target_port or 0)


def _says_protocol(port: r.ServicePort) -> bool:
    if port.protocol == "UDP" or port.app_protocol:
        return True
    name = port.name.lower()
    return any(name == each or name.startswith(f"{each}-") for each in PROTOCOLS)
