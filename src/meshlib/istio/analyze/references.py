"""Does what is named exist? Hosts, subsets, gateways, namespaces. (IST0101, IST0132)"""

from __future__ import annotations

from collections.abc import Iterator

from meshlib.istio import resources as r
from meshlib.istio.analyze.messages import NOT_FOUND, NOT_IN_GATEWAY, Message, listed
from meshlib.istio.analyze.scene import Scene, covers, full_name, shown
from meshlib.istio.documents import Path
from meshlib.istio.routes import MESH
from meshlib.istio.services import fqdn


def check(scene: Scene) -> Iterator[Message]:
    for each in scene.of("VirtualService"):
        assert isinstance(each.spec, r.VirtualService)
        yield from _gateways(scene, each, each.spec)
        for path, destination in destinations(each.spec):
            yield from _destination(scene, each, path, destination)
    for each in scene.of("Gateway"):
        if scene.is_whole and isinstance(each.spec, r.Gateway) and not scene.selected(each.spec.selector):
            yield NOT_FOUND.at(each, ("spec", "selector"), "selector", shown(each.spec.selector))
    for each in scene.of("AuthorizationPolicy"):
        assert isinstance(each.spec, r.AuthorizationPolicy)
        yield from _namespaces(scene, each, each.spec)


def destinations(spec: r.VirtualService) -> Iterator[tuple[Path, r.Destination]]:
    """Every destination, mirrors too, and where it stands."""
    for index, route in enumerate(spec.http):
        here: Path = ("spec", "http", index)
        for number, weighted in enumerate(route.route):
            yield (*here, "route", number, "destination"), weighted.destination
        if route.mirror is not None:
            yield (*here, "mirror"), route.mirror
        for number, mirror in enumerate(route.mirrors):
            yield (*here, "mirrors", number, "destination"), mirror.destination


def _destination(scene: Scene, given: r.Object, path: Path, destination: r.Destination) -> Iterator[Message]:
    service = scene.service(destination.host, given.namespace)
    if service is None:
        yield NOT_FOUND.at(given, (*path, "host"), "host", destination.host)
    elif destination.subset and not scene.has_subset(fqdn(destination.host, given.namespace), destination.subset):
        what = f"{destination.host}+{destination.subset}"
        yield NOT_FOUND.at(given, (*path, "host"), "host+subset in destinationrule", what)


def _gateways(scene: Scene, given: r.Object, spec: r.VirtualService) -> Iterator[Message]:
    for index, name in enumerate(spec.gateways):
        if name == MESH:
            continue
        wanted = name if "/" in name else f"{given.namespace}/{name}"
        gateway = next((each for each in scene.of("Gateway") if full_name(each) == wanted), None)
        path: Path = ("spec", "gateways", index)
        if gateway is None:
            yield NOT_FOUND.at(given, path, "gateway", name)
        if gateway is None or not _has_host(gateway, spec.hosts, given.namespace):
            yield NOT_IN_GATEWAY.at(given, path, listed(spec.hosts), full_name(given), wanted)


def _has_host(gateway: r.Object, hosts: list[str], namespace: str) -> bool:
    assert isinstance(gateway.spec, r.Gateway)
    for server in gateway.spec.servers:
        for given in server.hosts:
            owner, slash, host = given.rpartition("/")
            allowed = gateway.namespace if owner == "." else owner
            if slash and allowed not in ("*", namespace):
                continue
            if any(covers(host.lower(), each.lower()) or covers(each.lower(), host.lower()) for each in hosts):
                return True
    return False


def _namespaces(scene: Scene, given: r.Object, spec: r.AuthorizationPolicy) -> Iterator[Message]:
    known = {each.name for each in scene.of("Namespace")}
    if not scene.is_whole or not known:
        return
    for index, rule in enumerate(spec.rules):
        for number, source in enumerate(rule.from_ or ()):
            for place, name in enumerate(source.source.namespaces if source.source else ()):
                if "*" not in name and name not in known:
                    path: Path = ("spec", "rules", index, "from", number, "source", "namespaces", place)
                    yield NOT_FOUND.at(given, path, "namespace", name)
