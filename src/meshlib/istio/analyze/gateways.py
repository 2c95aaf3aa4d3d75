"""Do two Gateways claim the same hosts on the same port of the same pods, or show the same certificate? Does a Service
lead to their ports, and does anybody verify the tokens that they route by? (IST0138, IST0145, IST0149, IST0162)"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from meshlib.istio import resources as r
from meshlib.istio.analyze.messages import (
    NOBODY_VERIFIES,
    PORT_OF_NO_SERVICE,
    SAME_CERTIFICATE,
    SAME_SERVERS,
    Message,
    listed,
)
from meshlib.istio.analyze.scene import Scene, full_name, selector_of, shown
from meshlib.istio.claims import CLAIMS
from meshlib.istio.documents import Path

_Found = Iterator[Message]


def check(scene: Scene) -> Iterator[Message]:
    yield from _tokens(scene)
    gateways = [(each, each.spec) for each in scene.of("Gateway") if isinstance(each.spec, r.Gateway)]
    for each, spec in gateways:
        others = [
            (other, found)
            for other, found in gateways
            if other is not each and _meet(scene, spec.selector, found.selector)
        ]
        yield from _same_certificates(each, spec, gateways)
        yield from _ports(scene, each, spec)
        for index, server in enumerate(spec.servers):
            rivals = [full_name(other) for other, found in others if _claims(found, server)]
            if rivals:
                path: Path = ("spec", "servers", index)
                hosts = ",".join(server.hosts)
                words = ",".join(rivals), shown(spec.selector), server.port.number, hosts
                yield SAME_SERVERS.at(each, path, *words)


def _meet(scene: Scene, one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether there are processes that both choose: those with the same labels, or one that bears all of them."""
    return one == other or bool(one and other and scene.selected({**one, **other}) and not _contradict(one, other))


def _contradict(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    return any(other.get(key, value) != value for key, value in one.items())


def _same_certificates(given: r.Object, spec: r.Gateway, all_of_them: list[tuple[r.Object, r.Gateway]]) -> _Found:
    for other, found in all_of_them:
        is_within = all(found.selector.get(key) == value for key, value in spec.selector.items())
        if other is given or not is_within:
            continue
        shown_here = {_certificate(server.tls) for server in spec.servers} - {None}
        if any(_certificate(server.tls) in shown_here for server in found.servers):
            yield SAME_CERTIFICATE.at(given, ("metadata", "name"), listed([full_name(given), full_name(other)]))


def _certificate(tls: r.ServerTLSSettings | None) -> tuple[str, ...] | None:
    if tls is None:
        return None
    if tls.credential_name:
        return (tls.credential_name,)
    return (tls.server_certificate, tls.private_key) if tls.server_certificate and tls.private_key else None


def _ports(scene: Scene, given: r.Object, spec: r.Gateway) -> _Found:
    """Where a Service stands before the gateway's pods, it leads to the ports that servers are at."""
    ports: set[int] = set()
    for pod in scene.selected(spec.selector):
        for service in scene.of("Service"):
            found = service.spec
            if not isinstance(found, r.Service) or service.namespace != pod.namespace or not found.selector:
                continue
            if all(pod.labels.get(key) == value for key, value in found.selector.items()):
                for port in found.ports:
                    ports |= {port.port, port.target_port if isinstance(port.target_port, int) else port.port}
    for index, server in enumerate(spec.servers) if ports else ():
        if server.port.number not in ports:
            path: Path = ("spec", "servers", index, "port")
            yield PORT_OF_NO_SERVICE.at(given, path, server.port.number, shown(spec.selector))


def _tokens(scene: Scene) -> _Found:
    """Claims that routes ask for are there where a RequestAuthentication makes the gateway verify tokens."""
    root = scene.settings.root_namespace
    policies = [
        (each.namespace, selector_of(each.spec.selector))
        for each in scene.of("RequestAuthentication")
        if isinstance(each.spec, r.RequestAuthentication)
    ]
    gateways = {full_name(each): each.spec for each in scene.of("Gateway") if isinstance(each.spec, r.Gateway)}
    for each in scene.of("VirtualService"):
        assert isinstance(each.spec, r.VirtualService)
        key = next(_claims_in(each.spec), "")
        for name in each.spec.gateways if key else ():
            wanted = name if "/" in name else f"{each.namespace}/{name}"
            for pod in scene.selected(gateways[wanted].selector) if wanted in gateways else ():
                if not any(
                    home in (root, pod.namespace) and all(pod.labels.get(one) == value for one, value in labels.items())
                    for home, labels in policies
                ):
                    yield NOBODY_VERIFIES.at(each, ("metadata", "name"), key, wanted, pod.name)


def _claims_in(spec: r.VirtualService) -> Iterator[str]:
    for rule in spec.http:
        for match in rule.match:
            yield from (name for name in (*match.headers, *match.without_headers) if name.startswith(CLAIMS))


def _claims(spec: r.Gateway, server: r.Server) -> bool:
    return any(
        other.port.number == server.port.number and other.bind == server.bind and set(other.hosts) & set(server.hosts)
        for other in spec.servers
    )
