"""Does what is named exist? Hosts, subsets, gateways, namespaces. (IST0101, IST0132, IST0140, IST0165)"""

from __future__ import annotations

from collections.abc import Iterator

from meshlib.istio import resources as r
from meshlib.istio.analyze.messages import (
    INTERNAL_GATEWAY,
    NOT_AT_THE_GATEWAY,
    NOT_FOUND,
    NOT_IN_GATEWAY,
    Message,
    listed,
)
from meshlib.istio.analyze.scene import Scene, covers, full_name, shown
from meshlib.istio.checks.layer4 import MADE_BY_ISTIO
from meshlib.istio.documents import Path
from meshlib.istio.routes import MESH
from meshlib.istio.services import fqdn


def check(scene: Scene) -> Iterator[Message]:
    for each in scene.of("VirtualService"):
        assert isinstance(each.spec, r.VirtualService)
        yield from _gateways(scene, each, each.spec)
        for path, destination in destinations(each.spec):
            yield from _destination(scene, each, path, destination)
    yield from _without_subset(scene)
    for each in scene.of("Gateway"):
        if scene.is_whole and isinstance(each.spec, r.Gateway) and not scene.selected(each.spec.selector):
            yield NOT_FOUND.at(each, ("spec", "selector"), "selector", shown(each.spec.selector))
    for each in scene.of("AuthorizationPolicy"):
        assert isinstance(each.spec, r.AuthorizationPolicy)
        yield from _namespaces(scene, each, each.spec)


def _without_subset(scene: Scene) -> Iterator[Message]:
    """A gateway's route names a host, and a VirtualService of that host names subsets: at the gateway those do not
    hold, though who wrote both may think so."""
    owners: dict[str, list[r.Object]] = {}
    for each in scene.of("VirtualService"):
        assert isinstance(each.spec, r.VirtualService)
        weighted = (found.destination for rule in each.spec.http for found in rule.route)
        for host in {found.host for found in weighted if found.subset and found.host in each.spec.hosts}:
            owners.setdefault(host, []).append(each)
    for each in scene.of("VirtualService"):
        assert isinstance(each.spec, r.VirtualService)
        for path, destination in destinations(each.spec) if each.spec.gateways else ():
            for owner in owners.get(destination.host, ()) if not destination.subset and "route" in path else ():
                yield NOT_AT_THE_GATEWAY.at(each, (*path, "host"), full_name(owner), full_name(each))


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
        if MADE_BY_ISTIO in name:
            yield INTERNAL_GATEWAY.at(given, path, full_name(given), name)
            continue
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
            given_names = source.source or r.Source()
            for field, names in (("namespaces", given_names.namespaces), ("notNamespaces", given_names.not_namespaces)):
                for place, name in enumerate(names):
                    if not any(_fits(name, each) for each in known):
                        path: Path = ("spec", "rules", index, "from", number, "source", field, place)
                        yield NOT_FOUND.at(given, path, "namespace", name)


def _fits(pattern: str, name: str) -> bool:
    if pattern.startswith("*"):
        return name.endswith(pattern[1:])
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
