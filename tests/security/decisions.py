"""Which calls does an AuthorizationPolicy let in? A table written from Istio's specification; every edge runs it."""

from __future__ import annotations

from typing import NamedTuple

from meshlib.istio.parse import parse_text
from meshlib.istio.translate import translate
from meshlib.model import Inbound, Node, Peer, SpiffeId, Workload

SLEEP = Peer(SpiffeId.of("cluster.local", "foo", "sleep"), True, "10.0.0.9", 8080, "reviews.foo")
OTHER = Peer(SpiffeId.of("cluster.local", "bar", "other"), True, "10.1.0.9", 8080)
PLAIN = Peer(None, False, "192.168.0.7", 8080)


class Decision(NamedTuple):
    """spec: of the policy, in YAML's flow style. is_allowed: what must come of it."""

    spec: str
    target: str
    peer: Peer
    is_allowed: bool
    host: str = "reviews"
    headers: tuple[tuple[str, str], ...] = ()


def _table() -> list[Decision]:
    found = [
        Decision("{}", "GET /", SLEEP, False),
        Decision("{rules: [{}]}", "GET /", PLAIN, True),
        Decision("{action: DENY}", "GET /", PLAIN, True),
        Decision("{action: DENY, rules: [{}]}", "GET /", SLEEP, False),
        Decision("{action: AUDIT, rules: [{}]}", "GET /", PLAIN, True),
        Decision("{action: CUSTOM, provider: {name: nobody}, rules: [{}]}", "GET /", SLEEP, False),
    ]
    for values, seen in (
        ("principals: ['cluster.local/ns/foo/sa/sleep']", (True, False, False)),
        ("principals: ['*/sa/sleep']", (True, False, False)),
        ("principals: ['cluster.local/ns/*']", (True, True, False)),
        ("principals: ['*']", (True, True, False)),
        ("principals: ['spiffe://cluster.local/ns/foo/sa/sleep']", (False, False, False)),
        ("notPrincipals: ['cluster.local/ns/foo/sa/sleep']", (False, True, True)),
        ("namespaces: [foo]", (True, False, False)),
        ("namespaces: ['f*']", (True, False, False)),
        ("notNamespaces: [foo]", (False, True, True)),
        ("serviceAccounts: ['foo/sleep']", (True, False, False)),
        ("serviceAccounts: [sleep]", (False, False, False)),
        ("notServiceAccounts: ['foo/sleep']", (False, True, True)),
        ("trustDomains: [cluster.local]", (True, True, False)),
        ("notTrustDomains: [cluster.local]", (False, False, True)),
        ("ipBlocks: ['10.0.0.0/16']", (True, False, False)),
        ("ipBlocks: ['192.168.0.7']", (False, False, True)),
        ("notIpBlocks: ['10.0.0.0/8']", (False, False, True)),
        ("requestPrincipals: ['*']", (False, False, False)),
        ("notRequestPrincipals: ['*']", (True, True, True)),
        ("namespaces: [foo], notPrincipals: ['*/sa/sleep']", (False, False, False)),
    ):
        for peer, holds in zip((SLEEP, OTHER, PLAIN), seen, strict=True):
            found.append(Decision(f"{{rules: [{{from: [{{source: {{{values}}}}}]}}]}}", "GET /", peer, holds))
            deny = f"{{action: DENY, rules: [{{from: [{{source: {{{values}}}}}]}}]}}"
            found.append(Decision(deny, "GET /", peer, not holds))
    for values, target, host, holds in (
        ("methods: [GET]", "GET /", "reviews", True),
        ("methods: [GET]", "POST /", "reviews", False),
        ("notMethods: [GET]", "POST /", "reviews", True),
        ("paths: ['/a']", "GET /a", "reviews", True),
        ("paths: ['/a']", "GET /a?b=c", "reviews", True),
        ("paths: ['/a']", "GET /A", "reviews", False),
        ("paths: ['/a']", "GET /a/", "reviews", False),
        ("paths: ['/a*']", "GET /a/b", "reviews", True),
        ("paths: ['*/b']", "GET /a/b", "reviews", True),
        ("paths: ['/a*b']", "GET /axb", "reviews", False),
        ("paths: ['/a/{*}/c']", "GET /a/b/c", "reviews", True),
        ("paths: ['/a/{*}/c']", "GET /a/b/b/c", "reviews", False),
        ("paths: ['/a/{*}/c']", "GET /a//c", "reviews", False),
        ("paths: ['/a/{**}']", "GET /a/b/c", "reviews", True),
        ("paths: ['/a/{**}']", "GET /b/a", "reviews", False),
        ("notPaths: ['/a']", "GET /b", "reviews", True),
        ("hosts: [reviews]", "GET /", "REVIEWS", True),
        ("hosts: [reviews]", "GET /", "reviews:8080", False),
        ("hosts: ['reviews:8080']", "GET /", "reviews:8080", True),
        ("hosts: ['*.example.com']", "GET /", "a.Example.com", True),
        ("notHosts: [reviews]", "GET /", "ratings", True),
        ("ports: ['8080']", "GET /", "reviews", True),
        ("ports: ['9080']", "GET /", "reviews", False),
        ("notPorts: ['9080']", "GET /", "reviews", True),
        ("methods: [GET], paths: ['/a']", "GET /b", "reviews", False),
    ):
        for action in ("ALLOW", "DENY"):
            spec = f"{{action: {action}, rules: [{{to: [{{operation: {{{values}}}}}]}}]}}"
            found.append(Decision(spec, target, PLAIN, holds == (action == "ALLOW"), host))
    for key, values, holds in (
        ("request.headers[X-Version]", "values: [v1]", True),
        ("request.headers[x-version]", "values: ['v*']", True),
        ("request.headers[x-version]", "notValues: [v1]", False),
        ("request.headers[x-other]", "values: ['*']", False),
        ("source.ip", "values: ['10.0.0.9']", True),
        ("source.namespace", "values: [foo]", True),
        ("source.principal", "values: ['cluster.local/ns/foo/sa/sleep']", True),
        ("destination.port", "values: ['8080']", True),
        ("destination.port", "values: ['81']", False),
        ("connection.sni", "values: [a]", False),
        ("connection.sni", "values: ['reviews.*']", True),
        ("request.auth.claims[group]", "values: [admin]", False),
        ("request.auth.claims[group]", "notValues: [admin]", True),
    ):
        for action in ("ALLOW", "DENY"):
            spec = f"{{action: {action}, rules: [{{when: [{{key: '{key}', {values}}}]}}]}}"
            allowed = holds == (action == "ALLOW")
            found.append(Decision(spec, "GET /", SLEEP, allowed, headers=(("x-version", "v1"),)))
    deny_admin = "{action: DENY, rules: [{to: [{operation: {paths: ['/admin*']}}]}]}"
    for trick in (
        "/admin", "//admin", "/./admin", "/x/../admin", "/%61dmin", "/x/%2e%2e/admin", "/x/..%2fadmin", "/%2Fadmin",
        "/\\admin", "/x\\..\\admin", "/admin;x", "/admin?x", "/x/%2E./admin", "/admin/..%2f..%2fadmin",
    ):  # fmt: skip
        found.append(Decision(deny_admin, f"GET {trick}", SLEEP, False))
    return found


DECISIONS = tuple(_table())


def inbound(spec: str, metadata: str = "") -> Inbound:
    """The rules of a workload that this policy selects."""
    text = (
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
        f"metadata: {{name: p, namespace: default{metadata}}}\nspec: {spec}\n"
    )
    parsed = parse_text(text, "p.yaml")
    assert not parsed.problems, parsed.problems
    snapshot = translate(parsed.objects, (), Node("sidecar~10.0.0.1~r.default~x", Workload("reviews"))).snapshot
    return snapshot.inbound[0]
