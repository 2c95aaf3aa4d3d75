"""What a gateway listens on, and which rules hold there."""

from __future__ import annotations

from dataclasses import replace

from views import PREFIX, decide, node, service, view, virtual_service

from meshlib.istio.translate import Translation
from meshlib.model import ListenerTls, NodeKind, Route, VirtualHost

INGRESS = node("istio-system", NodeKind.ROUTER, istio="ingressgateway", app="gw")
TO_A = "[{route: [{destination: {host: a}}]}]"


def gateway(*servers: str, name: str = "g", namespace: str = "default", selector: str = "{}") -> str:
    return (
        f"{PREFIX}kind: Gateway\nmetadata: {{name: {name}, namespace: {namespace}}}\n"
        f"spec: {{selector: {selector}, servers: [{', '.join(servers)}]}}\n"
    )


def http(hosts: str = "['*']", number: int = 80) -> str:
    return f"{{port: {{number: {number}, name: http, protocol: HTTP}}, hosts: {hosts}}}"


def https(hosts: str, name: str = "https", mode: str = "mode: SIMPLE") -> str:
    tls = f"{{{mode}, serverCertificate: /c, privateKey: /k}}"
    return f"{{port: {{number: 443, name: {name}, protocol: HTTPS}}, hosts: {hosts}, tls: {tls}}}"


def hosts(made: Translation, name: str = "http.80") -> dict[str, VirtualHost]:
    (found,) = (each for each in made.snapshot.route_configurations if each.name == name)
    return {host.name.rpartition(":")[0]: host for host in found.virtual_hosts}


def timeouts(routes: tuple[Route, ...]) -> list[float | None]:
    return [getattr(route.action, "timeout", None) for route in routes]


def test_matches_are_judged_for_the_gateway_they_come_through() -> None:
    """Two Gateways on one port: what a match says for one of them does not hold at the other."""
    rule = virtual_service(
        "[{match: [{gateways: [one]}], route: [{destination: {host: a}}], timeout: 1s},"
        " {match: [{gateways: [two]}], route: [{destination: {host: a}}], timeout: 2s}]",
        hosts="[x.e.com, y.e.com]",
        more="gateways: [one, two]",
    )
    made = view(
        service(), gateway(http("[x.e.com]"), name="one"), gateway(http("[y.e.com]"), name="two"), rule, given=INGRESS
    )
    assert {name: timeouts(host.routes) for name, host in hosts(made).items()} == {"x.e.com": [1.0], "y.e.com": [2.0]}


def test_a_rule_for_some_callers_does_not_hold_for_the_world() -> None:
    """sourceLabels are compared with the gateway's own labels; what is meant for a canary's callers stays in."""
    rule = virtual_service(
        "[{match: [{sourceLabels: {app: canary}}], route: [{destination: {host: a}}], timeout: 1s},"
        " {match: [{sourceLabels: {app: gw}}], route: [{destination: {host: a}}], timeout: 2s},"
        " {route: [{destination: {host: a}}], timeout: 3s}]",
        hosts="['x.e.com']",
        more="gateways: [mesh, g]",
    )
    made = view(service(), gateway(http()), rule, given=INGRESS)
    assert timeouts(hosts(made)["x.e.com"].routes) == [2.0]


def test_a_host_is_served_with_any_port_a_wildcard_with_its_own() -> None:
    """Callers of :8080 write the port in Host; Envoy has no wildcard at both ends."""
    rules = [
        virtual_service(TO_A, name=f"v{number}", hosts=f"['{host}']", more="gateways: [g]")
        for number, host in enumerate(("x.e.com", "*.y.com"))
    ]
    made = view(service(), gateway(http(number=8080)), *rules, given=INGRESS)
    assert {name: host.domains for name, host in hosts(made, "http.8080").items()} == {
        "x.e.com": ("x.e.com", "x.e.com:*"),
        "*.y.com": ("*.y.com", "*.y.com:8080"),
    }


def test_a_gateway_knows_only_the_clusters_its_rules_name() -> None:
    """Destinations and mirrors, with their subsets; nothing else of the mesh, and nothing it may not see."""
    rule = virtual_service(
        "[{route: [{destination: {host: a}}], mirror: {host: b}}]", hosts="['*']", more="gateways: [g]"
    )
    hidden = service("b").replace("metadata: {", "metadata: {annotations: {networking.istio.io/exportTo: '.'}, ")
    texts = (service(), service("c"), gateway(http()), rule)
    found = view(*texts, service("b"), given=INGRESS)
    assert {c.service.name for c in found.snapshot.clusters if c.service} == {"a", "b"}
    unseen = view(*texts, hidden, given=INGRESS)
    assert {c.service.name for c in unseen.snapshot.clusters if c.service} == {"a"}
    assert [problem.field for problem in unseen.problems] == ["spec.http[0].mirror.host"]


def test_a_gateway_without_rules_listens_and_knows_no_host() -> None:
    """404 for everything, rather than a closed port."""
    made = view(gateway(http()), given=INGRESS)
    assert [listener.name for listener in made.snapshot.listeners] == ["0.0.0.0_80"]
    assert hosts(made) == {}


def test_servers_that_collide_are_told_and_the_first_stands() -> None:
    """HTTPS on a port that serves HTTP, a host that two servers have."""
    made = view(gateway(http(number=443), https("[x.e.com]")), given=INGRESS)
    assert [problem.reason for problem in made.problems] == ["port 443 serves HTTP already: HTTPS is left out"]
    (listener,) = made.snapshot.listeners
    assert [chain.tls for chain in listener.filter_chains] == [None]
    same_host = view(gateway(https("[x.e.com]", "one"), https("[x.e.com, z.e.com]", "two")), given=INGRESS)
    assert [problem.reason for problem in same_host.problems] == ["port 443 serves x.e.com by another server already"]


def test_tls_for_every_host_asks_no_server_name() -> None:
    """MUTUAL asks for a certificate, OPTIONAL_MUTUAL lets in who has none; a secret is named, not read."""
    mutual = "mode: MUTUAL, caCertificates: /ca"
    made = view(gateway(https("['*']", mode=mutual)), given=INGRESS).snapshot
    (chain,) = made.listeners[0].filter_chains
    assert chain.server_names == ()
    assert chain.tls is not None
    assert (chain.tls.mutual, chain.tls.ca_file) == (True, "/ca")
    assert chain.route_configuration == "https.443.https.g.default"
    optional = gateway(https("['*']", mode="mode: OPTIONAL_MUTUAL, caCertificates: /ca"))
    (chain,) = view(optional, given=INGRESS).snapshot.listeners[0].filter_chains
    assert chain.tls == replace(chain.tls, mutual=False, optional=True, ca_file="/ca")
    by_name = gateway(
        https("['*']", mode="mode: MUTUAL").replace("serverCertificate: /c, privateKey: /k", "credentialName: shop")
    )
    (chain,) = view(by_name, given=INGRESS).snapshot.listeners[0].filter_chains
    assert chain.tls == ListenerTls("", "", mutual=True, credential="shop")


def test_a_selector_chooses_gateways_by_label() -> None:
    """All pairs must fit; none fits everybody."""
    chosen = gateway(http(number=1), name="one", selector="{istio: ingressgateway}")
    other = gateway(http(number=2), name="two", selector="{istio: ingressgateway, app: other}")
    every = gateway(http(number=3), name="three")
    made = view(chosen, other, every, given=INGRESS).snapshot
    assert [listener.port for listener in made.listeners] == [1, 3]


def test_a_service_sees_no_gateway() -> None:
    """Its listeners are names, not ports."""
    made = view(service(), gateway(http()), virtual_service(TO_A, more="gateways: [g]"))
    assert not any(listener.is_bound for listener in made.snapshot.listeners)
    assert decide(made.snapshot, "http://a/").route.origin == ""
