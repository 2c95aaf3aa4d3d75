"""What does a gateway listen on, and where does it send what comes in? Gateway and VirtualService -> bound listeners.

Source of the rules: istio/istio pilot/pkg/networking/core/gateway.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from meshlib.errors import ConfigurationError
from meshlib.istio import resources as r
from meshlib.istio.routes import MESH, Report, RouteMaker, is_catch_all, qualified
from meshlib.model import FilterChain, Listener, ListenerTls, Route, RouteConfiguration, VirtualHost

ANY_ADDRESS = "0.0.0.0"


def selected(gateways: Iterable[r.Object], labels: Mapping[str, str]) -> list[r.Object]:
    """The Gateways whose selector fits a node's labels. An empty selector selects every gateway."""
    return [
        each
        for each in gateways
        if isinstance(each.spec, r.Gateway)
        and all(labels.get(key) == value for key, value in each.spec.selector.items())
    ]


def listeners(
    gateways: Iterable[r.Object],
    virtual_services: Iterable[r.Object],
    make: RouteMaker,
    report: Report,
) -> tuple[list[Listener], list[RouteConfiguration]]:
    """Bound listeners, and their route configurations."""
    rules = list(virtual_services)
    plain: dict[tuple[str, int], list[tuple[r.Object, r.Server]]] = {}
    secure: dict[tuple[str, int], list[tuple[r.Object, r.Server]]] = {}
    for gateway in gateways:
        assert isinstance(gateway.spec, r.Gateway)
        for server in gateway.spec.servers:
            place = (server.bind or ANY_ADDRESS, server.port.number)
            (secure if server.port.protocol.upper() == "HTTPS" else plain).setdefault(place, []).append(
                (gateway, server)
            )
    found_listeners: list[Listener] = []
    found_routes: list[RouteConfiguration] = []
    for place in sorted({*plain, *secure}):
        address, port = place
        chains: list[FilterChain] = []
        if place in plain and place in secure:
            for gateway, _ in secure[place]:
                report(
                    ConfigurationError(
                        gateway.source,
                        gateway.title,
                        "spec.servers",
                        f"port {port} serves HTTP already: HTTPS is left out",
                    )
                )
        if place in plain:
            name = f"http.{port}" if address == ANY_ADDRESS else f"http.{port}.{address}"
            chains.append(FilterChain(name))
            found_routes.append(RouteConfiguration(name, _virtual_hosts(plain[place], rules, make, port)))
        else:
            taken: set[str] = set()
            for gateway, server in secure[place]:
                names = sorted({_host(host) for host in server.hosts})
                if doubles := taken.intersection(names):
                    reason = f"port {port} serves {sorted(doubles)[0]} by another server already"
                    report(ConfigurationError(gateway.source, gateway.title, "spec.servers", reason))
                    continue
                taken.update(names)
                label = server.port.name or "https"
                name = f"https.{port}.{label}.{gateway.name}.{gateway.namespace}"
                tls = server.tls
                assert tls is not None
                chains.append(
                    FilterChain(
                        name,
                        () if "*" in names else tuple(names),
                        ListenerTls(
                            tls.server_certificate,
                            tls.private_key,
                            "" if tls.mode == "SIMPLE" else tls.ca_certificates,
                            tls.mode == "MUTUAL",
                            optional=tls.mode == "OPTIONAL_MUTUAL",
                            credential=tls.credential_name,
                        ),
                    )
                )
                found_routes.append(RouteConfiguration(name, _virtual_hosts([(gateway, server)], rules, make, port)))
        found_listeners.append(Listener(f"{address}_{port}", "", address, port, tuple(chains)))
    return found_listeners, found_routes


def attached(virtual_service: r.Object, gateways: frozenset[str]) -> bool:
    """Whether it names one of `gateways` (`ns/name`), as a whole or in a match."""
    spec = virtual_service.spec
    assert isinstance(spec, r.VirtualService)
    named = qualified(spec.gateways or [MESH], virtual_service.namespace)
    return bool(named & gateways)


def _virtual_hosts(
    servers: list[tuple[r.Object, r.Server]], rules: list[r.Object], make: RouteMaker, port: int
) -> tuple[VirtualHost, ...]:
    """One virtual host a host; several VirtualServices of one host are merged, routes that take everything last."""
    routes: dict[str, list[Route]] = {}
    redirected: dict[str, bool] = {}
    for gateway, server in servers:
        redirects = server.tls is not None and server.tls.https_redirect
        name = f"{gateway.namespace}/{gateway.name}"
        own: list[str] = []
        for rule in rules:
            spec = rule.spec
            assert isinstance(spec, r.VirtualService)
            if not attached(rule, frozenset({name})):
                continue
            hosts = [host for wanted in spec.hosts for host in _common(server.hosts, wanted, rule, gateway)]
            if not hosts:
                continue
            made = make.routes(rule, port, name)
            if not made:
                continue
            for host in dict.fromkeys(hosts):
                known = routes.setdefault(host, [])
                known.extend(route for route in made if route not in known)
                redirected[host] = redirected.get(host, False) or redirects
                own.append(host)
        if redirects:
            for host in server.hosts:
                if _host(host) not in own:
                    routes.setdefault(_host(host), [])
                    redirected[_host(host)] = True
    return tuple(
        VirtualHost(
            f"{host}:{port}",
            _domains(host, port),
            tuple(sorted(routes[host], key=lambda route: is_catch_all(route.match))),
            redirected.get(host, False),
        )
        for host in sorted(routes)
    )


def _domains(host: str, port: int) -> tuple[str, ...]:
    """A wildcard can't stand at both ends (Envoy), so a wildcard host has its own port alone."""
    if host == "*":
        return ("*",)
    return (host, f"{host}:{port}" if "*" in host else f"{host}:*")


def _host(host: str) -> str:
    return host.rpartition("/")[2].lower()


def _common(server_hosts: Iterable[str], wanted: str, rule: r.Object, gateway: r.Object) -> Iterator[str]:
    """Where a server's hosts and a VirtualService's meet: the narrower of the two."""
    wanted = wanted.lower()
    for given in server_hosts:
        namespace, slash, host = given.rpartition("/")
        host = host.lower()
        if slash:
            allowed = gateway.namespace if namespace == "." else namespace
            if allowed not in ("*", rule.namespace):
                continue
        if _covers(host, wanted):
            yield wanted
        elif _covers(wanted, host):
            yield host


def _covers(wide: str, narrow: str) -> bool:
    if wide in ("*", narrow):
        return True
    return wide.startswith("*.") and narrow.removeprefix("*").endswith(wide[1:]) and len(narrow) > len(wide) - 1
