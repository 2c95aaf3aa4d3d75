"""Which part of the mesh does one workload want to know? Sidecar -> the services and VirtualServices it imports.

Source of the rules: istio/istio pilot/pkg/model/sidecar.go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from meshlib.errors import ConfigurationError
from meshlib.istio import resources as r
from meshlib.istio.services import Directory, Service, fqdn

Report = Callable[[ConfigurationError], None]
Hosts = Mapping[str, Sequence[str]]
"""The hosts that are imported from each namespace; `*` is any."""
_NOT = "~"
EVERYTHING: Hosts = {"*": ("*",)}


def chosen(
    sidecars: Iterable[r.Object], namespace: str, labels: Mapping[str, str], root: str, report: Report
) -> r.Object | None:
    """The one whose selector fits, else the namespace's, else the root namespace's; the oldest of each."""
    own: list[r.Object] = []
    default: list[r.Object] = []
    for each in sidecars:
        spec = each.spec
        assert isinstance(spec, r.Sidecar)
        selector = spec.workload_selector
        wanted = (selector.labels or selector.match_labels) if selector is not None else {}
        if each.namespace == namespace and wanted and all(labels.get(key) == value for key, value in wanted.items()):
            return each
        if not wanted and each.namespace == namespace:
            own.append(each)
        elif not wanted and each.namespace == root:
            default.append(each)
    for other in own[1:]:
        reason = f"{own[0].title} is for the whole namespace already"
        report(ConfigurationError(other.source, other.title, "spec.workloadSelector", reason))
    return next(iter([*own, *default]), None)


def imported(
    sidecar: r.Object,
    directory: Directory,
    virtual_services: Sequence[r.Object],
    destinations: Callable[[r.Object], Iterable[tuple[str, str]]],
    namespace: str,
) -> tuple[Directory, list[r.Object]]:
    """What of all that `namespace` may see is wanted.

    destinations: of a VirtualService, as host and the namespace that names it; what a rule sends to is imported with
    the rule. A listener with a port imports that port alone, and the last listener every port that has none of its own.
    """
    spec = sidecar.spec
    assert isinstance(spec, r.Sidecar)
    listeners = [(_number(each), _hosts(each, namespace)) for each in spec.egress] or [(None, EVERYTHING)]
    by_port = dict(reversed(listeners))  # the first of a port is it
    for_all = [hosts for number, hosts in listeners if number is None]
    if for_all:
        by_port[None] = _together(for_all)

    wanted_rules: list[r.Object] = []
    through: dict[str, set[int | None]] = {}
    for rule in virtual_services:
        assert isinstance(rule.spec, r.VirtualService)
        ports = [port for port, hosts in listeners if _wants_rule(hosts, rule)]
        if ports:
            wanted_rules.append(rule)
            for host, home in destinations(rule):
                service = directory.find(host, home)
                if service is not None:
                    through.setdefault(service.host, set()).update(ports)

    services: dict[str, Service] = {}
    for service in directory.services.values():
        kept = []
        for port in service.ports:
            listener = port.number if port.number in by_port else None
            if listener not in by_port:
                continue
            if _wants(by_port[listener], service.namespace, service.host) or listener in through.get(service.host, ()):
                kept.append(port)
        if kept:
            services[service.host] = service if len(kept) == len(service.ports) else replace(service, ports=tuple(kept))
    return Directory(services), wanted_rules


def _number(listener: r.IstioEgressListener) -> int | None:
    """None for every port: of the listener without a port, and of a socket, where the Host alone says who is meant."""
    return (listener.port.number or None) if listener.port else None


def _hosts(listener: r.IstioEgressListener, namespace: str) -> Hosts:
    """`~ns/host` is what is left out of what other entries import: it stands under `~ns`."""
    found: dict[str, list[str]] = {}
    for each in listener.hosts:
        owner, _, host = each.rpartition("/")
        if owner in (".", f"{_NOT}."):
            owner = owner.removesuffix(".") + namespace
        owner = f"{_NOT}*" if owner == _NOT else owner
        found.setdefault(owner, []).append(host.lower())
    return found


def _together(listeners: Sequence[Hosts]) -> Hosts:
    owners = dict.fromkeys(owner for hosts in listeners for owner in hosts)
    return {owner: [host for hosts in listeners for host in hosts.get(owner, ())] for owner in owners}


def _wants(hosts: Hosts, namespace: str, host: str) -> bool:
    if _is_left_out(hosts, namespace, host):
        return False
    return any(_covers(wanted, host) for owner in (namespace, "*") for wanted in hosts.get(owner, ()))


def _is_left_out(hosts: Hosts, namespace: str, host: str) -> bool:
    owners = (f"{_NOT}{namespace}", f"{_NOT}*")
    return any(_covers(wide, host) for owner in owners for wide in hosts.get(owner, ()))


def _wants_rule(hosts: Hosts, rule: r.Object) -> bool:
    """A rule for `*.example.com` is wanted by who wants `a.example.com`, and the other way round."""
    spec = rule.spec
    assert isinstance(spec, r.VirtualService)
    names = [fqdn(host, rule.namespace) for host in spec.hosts]
    return any(
        _covers(wanted, name) or _covers(name, wanted)
        for owner in (rule.namespace, "*")
        for wanted in hosts.get(owner, ())
        for name in names
    )


def _covers(wide: str, narrow: str) -> bool:
    return wide in ("*", narrow) or (wide.startswith("*.") and narrow.removeprefix("*").endswith(wide[1:]))
