"""What must hold in a VirtualService's tls and tcp, and in its gateways' names? As Istio's webhook has it.

Nothing is routed by tls and tcp; what can't be right is refused all the same, since others read the object, too.
"""

from __future__ import annotations

from collections.abc import Mapping

from meshlib.istio import resources as r
from meshlib.istio.checks.labels import check_labels
from meshlib.istio.checks.parts import LABEL, check_host, is_address, is_network, read
from meshlib.istio.problems import Refused


def check_gateways(names: list[str], at: str) -> None:
    """Raises Refused. A name is `namespace/name`, `name`, or the old `name.namespace.svc.cluster.local`."""
    for index, name in enumerate(names):
        namespace, slash, gateway = name.partition("/")
        if not slash:
            check_host(name, f"{at}[{index}]", wildcard=False)
        elif not LABEL.match(namespace) or not LABEL.match(gateway):
            raise Refused(f"{at}[{index}]", f"must be namespace/name, name, or mesh: {name!r}")


def lies_within(host: str, other: str) -> bool:
    """Whether every name that is meant by `host` is meant by `other`, too."""
    host, other = host.lower(), other.lower()
    if not other.startswith("*"):
        return host == other
    return host.removeprefix("*").endswith(other[1:])


def check_tls_routes(spec: r.VirtualService) -> None:
    """Raises Refused."""
    for index, route in enumerate(read(spec.tls or [], list[r.TLSRoute], "tls")):
        at = f"tls[{index}]"
        if not route.match:
            raise Refused(f"{at}.match", "is missing: TLS is told apart by sniHosts")
        for number, match in enumerate(route.match):
            place = f"{at}.match[{number}]"
            if not match.sni_hosts:
                raise Refused(f"{place}.sniHosts", "is missing")
            for position, host in enumerate(match.sni_hosts):
                if is_address(host):
                    continue
                check_host(host, f"{place}.sniHosts[{position}]")
                if not any(lies_within(host, each) for each in spec.hosts):
                    raise Refused(f"{place}.sniHosts[{position}]", f"lies within none of the hosts: {host!r}")
            _check_layer4(match.destination_subnets, match.source_labels, match.gateways, place)
        _check_destinations(route.route, f"{at}.route")


def check_tcp_routes(spec: r.VirtualService) -> None:
    """Raises Refused."""
    for index, route in enumerate(read(spec.tcp or [], list[r.TCPRoute], "tcp")):
        at = f"tcp[{index}]"
        for number, match in enumerate(route.match):
            _check_layer4(match.destination_subnets, match.source_labels, match.gateways, f"{at}.match[{number}]")
        _check_destinations(route.route, f"{at}.route")


def _check_layer4(subnets: list[str], labels: Mapping[str, str], gateways: list[str], at: str) -> None:
    for index, subnet in enumerate(subnets):
        if not is_network(subnet):
            raise Refused(f"{at}.destinationSubnets[{index}]", f"must be an IP address or a CIDR: {subnet!r}")
    check_labels(labels, f"{at}.sourceLabels")
    check_gateways(gateways, f"{at}.gateways")


def _check_destinations(route: list[r.RouteDestination], at: str) -> None:
    if not route:
        raise Refused(at, "is missing")
    for index, each in enumerate(route):
        check_host(each.destination.host, f"{at}[{index}].destination.host", wildcard=False)
    if len(route) > 1 and not any(each.weight for each in route):
        raise Refused(at, "the weights of several destinations must not all be 0")
