"""Can each rule of a VirtualService be reached, and is it clear what it means? (IST0109, IST0112, IST0130, IST0131)"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from meshlib.istio import resources as r
from meshlib.istio.analyze.messages import INEFFECTIVE, SAME_HOST, UNREACHABLE, WHICH_PORT, Message, listed
from meshlib.istio.analyze.references import destinations
from meshlib.istio.analyze.scene import Scene, covers, full_name
from meshlib.istio.documents import Path
from meshlib.istio.routes import MESH
from meshlib.istio.services import fqdn


def check(scene: Scene) -> Iterator[Message]:
    yield from _same_hosts(scene)
    for each in scene.of("VirtualService"):
        assert isinstance(each.spec, r.VirtualService)
        yield from _reachable(each, each.spec)
        for path, destination in destinations(each.spec):
            yield from _port(scene, each, path, destination)


def _same_hosts(scene: Scene) -> Iterator[Message]:
    """For the callers in the mesh; on a gateway the routes of one host are merged."""
    found: dict[tuple[str, str], dict[tuple[str, str], r.Object]] = {}
    for each in scene.of("VirtualService"):
        spec = each.spec
        assert isinstance(spec, r.VirtualService)
        if spec.gateways and MESH not in spec.gateways:
            continue
        export_to = spec.export_to or list(scene.settings.virtual_service_export_to) or ["*"]
        scopes = ["*"] if "*" in export_to else [each.namespace if name == "." else name for name in export_to]
        for scope in scopes:
            for host in spec.hosts:
                found.setdefault((scope, fqdn(host, each.namespace)), {})[each.namespace, each.name] = each
    for (scope, host), claimed in found.items():
        owners = dict(claimed)
        for (other, wide), more in found.items() if scope != "*" else ():
            if other == "*" and covers(host, wide):
                owners |= more  # what everybody sees is seen here, too
        if len(owners) > 1:
            names = ",".join(full_name(each) for each in owners.values())
            for each in owners.values():
                yield SAME_HOST.at(each, ("metadata", "name"), names, f"{scope}/{host}")


def _port(scene: Scene, given: r.Object, path: Path, destination: r.Destination) -> Iterator[Message]:
    service = scene.service(destination.host, given.namespace)
    if service is not None and destination.port is None and len(service.ports) > 1:
        numbers = [port.number for port in service.ports]
        yield WHICH_PORT.at(given, (*path, "host"), destination.host, listed(numbers))


def _reachable(given: r.Object, spec: r.VirtualService) -> Iterator[Message]:
    taken: list[tuple[int, r.HTTPMatchRequest]] = []
    takes_all: int | None = None
    for index, rule in enumerate(spec.http):
        path: Path = ("spec", "http", index)
        if takes_all is not None:
            reason = (
                "route without conditions defined before" if rule.match else "only the last rule can have no matches"
            )
            yield UNREACHABLE.at(given, path, _named(rule.name, index), reason)
            continue
        if not rule.match:
            takes_all = index
            continue
        unused = 0
        for number, match in enumerate(rule.match):
            before = next((other for other, known in taken if _takes_in(known, match)), None)
            if before is None:
                taken.append((index, match))
                continue
            unused += 1
            words = _named(rule.name, index), _named(match.name, number), _named(spec.http[before].name, before)
            yield INEFFECTIVE.at(given, (*path, "match", number), *words)
        if unused == len(rule.match):
            yield UNREACHABLE.at(given, path, _named(rule.name, index), "all matches used by prior rules")


def _named(name: str, index: int) -> str:
    return f'"{name}"' if name else f"#{index}"


def _takes_in(wide: r.HTTPMatchRequest, narrow: r.HTTPMatchRequest) -> bool:
    """Whether every request that fits `narrow` fits `wide`. False where that is not plain to see."""
    if wide.ignore_uri_case != narrow.ignore_uri_case and wide.uri is not None:
        return False
    for name in ("uri", "scheme", "method", "authority"):
        if not _string_takes_in(getattr(wide, name), getattr(narrow, name)):
            return False
    for name in ("headers", "query_params"):
        ours: Mapping[str, r.StringMatch] = getattr(wide, name)
        theirs: Mapping[str, r.StringMatch] = getattr(narrow, name)
        if not all(key in theirs and _string_takes_in(value, theirs[key]) for key, value in ours.items()):
            return False
    absent: Mapping[str, r.StringMatch] = narrow.without_headers
    if any(absent.get(key) != value for key, value in wide.without_headers.items()):
        return False
    if any(narrow.source_labels.get(key) != value for key, value in wide.source_labels.items()):
        return False
    if wide.gateways and not set(narrow.gateways) <= set(wide.gateways):
        return False
    if wide.gateways and not narrow.gateways:
        return False
    return wide.port in (None, narrow.port) and wide.source_namespace in ("", narrow.source_namespace)


def _string_takes_in(wide: r.StringMatch | None, narrow: r.StringMatch | None) -> bool:
    if wide is None or wide == narrow:
        return True
    if narrow is None:
        return False
    if wide == r.StringMatch():
        return True  # it need only be there
    begins = narrow.exact if narrow.exact is not None else narrow.prefix
    return wide.prefix is not None and begins is not None and begins.startswith(wide.prefix)
