"""Do HTTPRoutes and GRPCRoutes do what the Gateway API says, for callers in the mesh and at gateways?"""

from __future__ import annotations

import json
from typing import Any

import pytest
from views import decide, node, objects, service, view, weights

from meshlib.istio.gateway_api import conditions, convert
from meshlib.istio.gateway_kinds import GROUP
from meshlib.istio.parse import parse_text
from meshlib.istio.resources import CorsPolicy, Duration, StringMatch, VirtualService
from meshlib.istio.translate import Translation
from meshlib.model import DirectResponse, Forward, NodeKind, Redirect, Workload
from meshlib.policy.explain import request_of
from meshlib.policy.router import redirected, rewritten_path

PORTS = "[{name: http, port: 80}]"
WORLD = "---\n".join(service(name) for name in ("a", "b", "c"))
TO_B = {"backendRefs": [{"name": "b", "port": 80}]}


def route(
    *rules: dict[str, Any],
    kind: str = "HTTPRoute",
    name: str = "r",
    namespace: str = "default",
    parent: dict[str, Any] | None = None,
    created: str = "2026-01-01T00:00:00Z",
    **spec: Any,
) -> str:
    """YAML takes JSON. Its parent is the Service a."""
    parents = [parent or {"group": "", "kind": "Service", "name": "a", "port": 80}]
    return (
        json.dumps(
            {
                "apiVersion": f"{GROUP}/v1",
                "kind": kind,
                "metadata": {"name": name, "namespace": namespace, "creationTimestamp": created},
                "spec": {"parentRefs": parents, "rules": list(rules), **spec},
            }
        )
        + "\n"
    )


def mesh(*routes: str, namespace: str = "default", more: str = "") -> Translation:
    return view("---\n".join((WORLD, *routes)) + more, workloads=(), given=node(namespace))


def to(made: Translation, path: str = "/", method: str = "GET", **headers: str) -> str:
    """The service that a call on a goes to."""
    decision = decide(made.snapshot, f"http://a{path}", {k.replace("_", "-"): v for k, v in headers.items()}, method)
    (host,) = weights(decision)
    return host.partition(".")[0]


def matches(*given: dict[str, Any], **rule: Any) -> dict[str, Any]:
    return {"matches": list(given), **(rule or TO_B)}


def prefix(value: str) -> dict[str, Any]:
    return {"path": {"type": "PathPrefix", "value": value}}


def exact(value: str) -> dict[str, Any]:
    return {"path": {"type": "Exact", "value": value}}


def backend(name: str, **more: Any) -> dict[str, Any]:
    return {"backendRefs": [{"name": name, "port": 80, **more}]}


def told(*texts: str) -> dict[str, dict[str, tuple[str, str]]]:
    """By route: each condition's status and reason."""
    found = convert(objects("---\n".join(texts))).statuses
    return {
        given.name: {
            each["type"]: (each["status"], each["reason"])
            for parent in parents
            for each in parent["conditions"]  # type: ignore[attr-defined]
        }
        for given, parents in conditions(found)
    }


def test_a_route_of_a_service_is_for_those_who_call_it() -> None:
    """GAMMA. On the parent's port only; what no rule takes is 404."""
    made = mesh(route(matches(prefix("/b"))))
    assert made.problems == ()
    assert to(made, "/b") == "b"
    assert decide(made.snapshot, "http://a/b").route.origin.startswith("HTTPRoute default/r@a.default")
    assert decide(made.snapshot, "http://a/other").action == DirectResponse(404)


def test_prefixes_are_whole_segments() -> None:
    """/b takes /b and /b/c, and not /bc; a slash at its end means nothing."""
    made = mesh(route(matches(prefix("/b/")), backend("c")))
    assert [to(made, path) for path in ("/b", "/b/", "/b/c", "/bc", "/")] == ["b", "b", "b", "c", "c"]


def test_the_most_specific_match_wins_wherever_it_stands() -> None:
    """Exact, longest prefix, method, most headers, most parameters; then the older route."""
    made = mesh(
        route(
            backend("a"),
            matches(prefix("/x"), **backend("b")),
            matches(prefix("/x/y"), **backend("c")),
            matches(exact("/x/y/z"), **backend("b")),
            matches({**prefix("/m"), "method": "POST"}, **backend("b")),
            matches({**prefix("/m"), "headers": [{"name": "v", "value": "2"}]}, **backend("c")),
            matches({**prefix("/q"), "queryParams": [{"name": "v", "value": "2"}]}, **backend("c")),
        ),
        route(matches(prefix("/x")), name="younger", created="2026-02-01T00:00:00Z"),
    )
    expected = {"/": "a", "/x": "b", "/x/y": "c", "/x/y/w": "c", "/x/y/z": "b", "/q?v=2": "c", "/q?v=3": "a"}
    assert {path: to(made, path) for path in expected} == expected
    assert to(made, "/m", "POST", v="2") == "b"
    assert to(made, "/m", "GET", v="2") == "c"
    older = mesh(route(matches(prefix("/x"), **backend("c")), created="2025-01-01T00:00:00Z", name="older"),
                 route(matches(prefix("/x"), **backend("b"))))  # fmt: skip
    assert to(older, "/x") == "c"


def test_traffic_is_split_by_weight() -> None:
    """A weight of 0 gets nothing; all of them 0, or no backend at all, is a 500."""
    split = {"backendRefs": [{"name": n, "port": 80, "weight": w} for n, w in (("a", 0), ("b", 1), ("c", 3))]}
    made = mesh(route(split))
    assert weights(decide(made.snapshot, "http://a/")) == {
        "b.default.svc.cluster.local": 1,
        "c.default.svc.cluster.local": 3,
    }
    for rule in ({"backendRefs": []}, backend("b", weight=0)):
        assert decide(mesh(route(rule)).snapshot, "http://a/").action == DirectResponse(500)


def test_filters_times_and_retries() -> None:
    """Headers, rewrites, mirrors, redirects, request and backendRequest, retry."""
    rule = {
        **matches(prefix("/old")),
        "backendRefs": [{"name": "b", "port": 80}],
        "timeouts": {"request": "5s", "backendRequest": "1500ms"},
        "retry": {"attempts": 3, "codes": [503], "backoff": "100ms"},
        "filters": [
            {"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "X-A", "value": "1"}]}},
            {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"remove": ["server"]}},
            {
                "type": "URLRewrite",
                "urlRewrite": {
                    "hostname": "other.example.com",
                    "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"},
                },
            },
            {"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "c", "port": 80}, "percent": 10}},
        ],
    }
    made = mesh(route(rule))
    assert made.problems == ()
    decision = decide(made.snapshot, "http://a/old/x")
    action = decision.action
    assert isinstance(action, Forward)
    assert (action.timeout, action.mirrors[0].per_million) == (5, 100_000)
    assert action.retry is not None
    assert (action.retry.attempts, action.retry.per_try_timeout, action.retry.base_interval) == (3, 1.5, 0.1)
    assert 503 in action.retry.status_codes
    assert action.rewrite is not None
    assert action.rewrite.authority == "other.example.com"
    (given,) = [each for each in made.snapshot.route_configurations if each.name.startswith("outbound|80||a.")]
    assert given.virtual_hosts[0].routes[0].request_headers.set == (("x-a", "1"),)
    assert given.virtual_hosts[0].routes[0].response_headers.remove == ("server",)
    redirect = {"type": "RequestRedirect", "requestRedirect": {"scheme": "https", "hostname": "x.com"}}
    found = decide(mesh(route({"filters": [redirect]})).snapshot, "http://a/").action
    assert found == Redirect(302, "https", "x.com", -1, None)


@pytest.mark.parametrize(
    ("given", "replacement", "path", "expected"),
    [
        ("/foo", "/bar", "/foo", "/bar"),
        ("/foo", "/bar", "/foo/x?y=1", "/bar/x?y=1"),
        ("/foo/", "/bar/", "/foo/x", "/bar/x"),
        ("/foo", "/", "/foo", "/"),
        ("/foo", "/", "/foo/x", "/x"),
        ("/foo", "", "/foo/x", "/x"),
        ("/", "/bar", "/x", "/bar/x"),
    ],
)
def test_a_prefix_is_replaced_with_one_slash_between(given: str, replacement: str, path: str, expected: str) -> None:
    """Neither //x nor barx."""
    modifier = {"type": "ReplacePrefixMatch", "replacePrefixMatch": replacement}
    rule = {**matches(prefix(given)), "filters": [{"type": "URLRewrite", "urlRewrite": {"path": modifier}}]}
    decision = decide(mesh(route(rule)).snapshot, f"http://a{path}")
    assert isinstance(decision.action, Forward)
    assert decision.action.rewrite is not None
    assert rewritten_path(decision.action.rewrite, decision.route.match, path) == expected


def test_a_route_of_another_namespace_is_for_its_own_callers() -> None:
    """A consumer's route: before the producer's, and for nobody else."""
    parent = {"group": "", "kind": "Service", "name": "a", "namespace": "default", "port": 80}
    texts = (
        route(backend("b"), name="producer"),
        route(backend("mine"), name="consumer", namespace="shop", parent=parent),
        service("mine", "shop"),
    )
    outside = mesh(*texts)
    assert to(outside) == "b"
    inside = mesh(*texts, namespace="shop")
    assert inside.problems == ()
    (host,) = weights(decide(inside.snapshot, "http://a.default/"))
    assert host == "mine.shop.svc.cluster.local"


CORS = {
    "type": "CORS",
    "cors": {
        "allowOrigins": ["https://a.com", "https://*.b.com"],
        "allowMethods": ["GET", "PUT"],
        "allowHeaders": ["x-one"],
        "exposeHeaders": ["x-seen"],
        "allowCredentials": True,
        "maxAge": 60,
    },
}


def test_what_pages_may_read_is_the_filter_cors() -> None:
    """Of a gateway's routes; an asterisk is a part of a host, and other origins' preflights reach nobody."""
    web = {"name": "gw", "group": GROUP, "kind": "Gateway"}
    text = route({"filters": [CORS], **TO_B}, parent=web)
    door = gateway({"name": "http", "port": 80, "protocol": "HTTP"})
    made = [each.spec for each in convert(objects("---\n".join((WORLD, door, text)))).objects]
    (spec,) = (each for each in made if isinstance(each, VirtualService))
    assert spec.http[0].cors_policy == CorsPolicy(
        allow_origins=[StringMatch(exact="https://a.com"), StringMatch(regex=r"https://[^/:@]+\.b\.com")],
        allow_methods=["GET", "PUT"],
        allow_headers=["x-one"],
        expose_headers=["x-seen"],
        max_age=Duration(60),
        allow_credentials=True,
        unmatched_preflights="IGNORE",
    )


def test_cors_within_the_mesh_is_told_to_have_no_effect() -> None:
    """No page calls from there; the route holds all the same."""
    made = mesh(route({"filters": [CORS], **TO_B}))
    assert to(made) == "b"
    assert [each.reason for each in made.problems] == [
        "CORS has no effect within the mesh: its calls come from no page"
    ]


def test_grpc_routes_match_services_and_methods() -> None:
    """Exact, one of the two alone, expressions, and metadata."""
    made = mesh(
        route(
            matches({"method": {"service": "shop.Cart", "method": "Add"}}, **backend("b")),
            matches({"method": {"service": "shop.Cart"}, "headers": [{"name": "v", "value": "2"}]}, **backend("c")),
            matches({"method": {"type": "RegularExpression", "service": "shop[.].*"}}, **backend("a")),
            kind="GRPCRoute",
        )
    )
    assert made.problems == ()
    assert to(made, "/shop.Cart/Add", "POST") == "b"
    assert to(made, "/shop.Cart/Remove", "POST", v="2") == "c"
    assert to(made, "/shop.Other/X", "POST") == "a"


GATEWAY = (
    json.dumps(
        {
            "apiVersion": f"{GROUP}/v1",
            "kind": "Gateway",
            "metadata": {"name": "gw", "namespace": "default"},
            "spec": {
                "gatewayClassName": "meshlib",
                "listeners": [
                    {"name": "shop", "port": 8080, "protocol": "HTTP", "hostname": "*.shop.com"},
                    {
                        "name": "all",
                        "port": 8081,
                        "protocol": "HTTP",
                        "allowedRoutes": {"namespaces": {"from": "All"}},
                    },
                ],
            },
        }
    )
    + "\n"
)
INGRESS = node("istio-system", NodeKind.ROUTER, **{"gateway.networking.k8s.io/gateway-name": "gw"})


def gateway(*listeners: dict[str, Any], **spec: Any) -> str:
    """Of the name gw, in the namespace default."""
    spec = {"gatewayClassName": "meshlib", "listeners": list(listeners), **spec}
    metadata = {"name": "gw", "namespace": "default"}
    return json.dumps({"apiVersion": f"{GROUP}/v1", "kind": "Gateway", "metadata": metadata, "spec": spec}) + "\n"


def https(*secrets: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "secure", "port": 443, "protocol": "HTTPS", "tls": {"certificateRefs": list(secrets)}, **more}


HTTP = {"name": "plain", "port": 80, "protocol": "HTTP"}


def listened(*texts: str) -> dict[str, Any]:
    """What the Gateway gw is told, with an address."""
    (status,) = convert(objects("---\n".join((WORLD, *texts)))).gateways
    return status.told([{"type": "IPAddress", "value": "10.0.0.1"}])


def reasons(told: dict[str, Any]) -> dict[str, str]:
    """A condition that is not as it should be has its reason here, one that is has its status."""
    return {each["type"]: each["reason"] for each in told["conditions"]}


def test_an_https_listener_shows_the_certificate_of_a_secret() -> None:
    """By its name, which the gateway itself looks up; its hostname is the server name."""
    gw = gateway(https({"name": "shop-cert"}, hostname="*.shop.com"))
    one = route(TO_B, parent={"name": "gw"}, hostnames=["a.shop.com"])
    made = view("---\n".join((WORLD, gw, one)), workloads=(), given=INGRESS)
    assert made.problems == ()
    (listener,) = made.snapshot.listeners
    (chain,) = listener.filter_chains
    assert chain.server_names == ("*.shop.com",)
    assert chain.tls is not None
    assert (chain.tls.credential, chain.tls.mutual, chain.tls.optional) == ("shop-cert", False, False)
    (configuration,) = made.snapshot.route_configurations
    assert [each.name for each in configuration.virtual_hosts] == ["a.shop.com:443"]


GRANT = {
    "apiVersion": f"{GROUP}/v1beta1",
    "kind": "ReferenceGrant",
    "metadata": {"name": "g", "namespace": "vault"},
    "spec": {
        "from": [{"group": GROUP, "kind": "Gateway", "namespace": "default"}],
        "to": [{"group": "", "kind": "Secret"}],
    },
}
FAR = {"name": "c", "namespace": "vault"}


@pytest.mark.parametrize(
    ("listener", "more", "condition", "reason"),
    [
        ({"name": "t", "port": 1, "protocol": "TCP"}, "", "Accepted", "UnsupportedProtocol"),
        ({"name": "t", "port": 1, "protocol": "TLS"}, "", "Accepted", "UnsupportedProtocol"),
        (https({"name": "c"}, tls={"mode": "Passthrough"}), "", "Accepted", "UnsupportedValue"),
        (https(tls={"certificateRefs": [{"name": "c"}], "frontendValidation": {"caCertificateRefs": []}}), "",
         "Accepted", "UnsupportedValue"),
        (https(), "", "ResolvedRefs", "InvalidCertificateRef"),
        (https({"name": "a"}, {"name": "b"}), "", "ResolvedRefs", "InvalidCertificateRef"),
        (https({"name": "a", "kind": "ConfigMap"}), "", "ResolvedRefs", "InvalidCertificateRef"),
        (https(FAR), "", "ResolvedRefs", "RefNotPermitted"),
        (https(FAR), json.dumps(GRANT) + "\n", "ResolvedRefs", "InvalidCertificateRef"),
        ({**HTTP, "name": "odd", "port": 81, "allowedRoutes": {"kinds": [{"kind": "TCPRoute"}]}}, "", "ResolvedRefs",
         "InvalidRouteKinds"),
        (https({"name": "c"}, port=80), "", "Conflicted", "ProtocolConflict"),
        ({**HTTP, "name": "again"}, "", "Conflicted", "HostnameConflict"),
    ],
)  # fmt: skip
def test_a_listener_that_can_not_be_served_says_why(
    listener: dict[str, Any], more: str, condition: str, reason: str
) -> None:
    """By the specification's reasons, in `meshctl problems` too. Nothing listens there: no route is half in force."""
    gw = gateway(HTTP, listener)
    told = listened(gw, *([more] if more else []), route(TO_B, parent={"name": "gw", "sectionName": listener["name"]}))
    of = {each["name"]: reasons(each) for each in told["listeners"]}
    assert of[listener["name"]] | {condition: reason, "Programmed": "Invalid"} == of[listener["name"]]
    assert reasons(told)["Accepted"] == "ListenersNotValid"
    made = convert(objects("---\n".join((WORLD, gw, *([more] if more else [])))))
    assert any(f"the listener '{listener['name']}' is not served" in str(each) for each in made.problems)
    served = {each.name for each in made.objects if each.kind == "Gateway"}
    assert f"gw~{listener['name']}" not in served
    assert ("gw~plain" in served) is (condition != "Conflicted")


def test_a_gateway_is_told_what_it_serves() -> None:
    """Accepted, Programmed, addresses; by listener the kinds it takes and how many routes it has."""
    shop = {**HTTP, "name": "shop", "port": 81, "allowedRoutes": {"kinds": [{"kind": "GRPCRoute"}]}}
    routes = [route(TO_B, kind=kind, name=kind.lower(), parent={"name": "gw"}) for kind in ("HTTPRoute", "GRPCRoute")]
    told = listened(gateway(HTTP, shop), *routes)
    assert reasons(told) == {"Accepted": "Accepted", "Programmed": "Programmed"}
    assert [(each["name"], each["attachedRoutes"]) for each in told["listeners"]] == [("plain", 2), ("shop", 1)]
    assert [[kind["kind"] for kind in each["supportedKinds"]] for each in told["listeners"]] == [
        ["HTTPRoute", "GRPCRoute"],
        ["GRPCRoute"],
    ]
    assert told["addresses"] == [{"type": "IPAddress", "value": "10.0.0.1"}]
    (status,) = convert(objects(gateway(HTTP))).gateways
    assert reasons(status.told([])) == {"Accepted": "Accepted", "Programmed": "AddressNotAssigned"}


@pytest.mark.parametrize(
    ("selector", "takes"),
    [
        ({"matchLabels": {"team": "a"}}, True),
        ({"matchLabels": {"team": "b"}}, False),
        ({"matchLabels": {"kubernetes.io/metadata.name": "shop"}}, True),
        ({"matchExpressions": [{"key": "team", "operator": "In", "values": ["a", "b"]}]}, True),
        ({"matchExpressions": [{"key": "team", "operator": "NotIn", "values": ["a"]}]}, False),
        ({"matchExpressions": [{"key": "team", "operator": "Exists"}]}, True),
        ({"matchExpressions": [{"key": "team", "operator": "DoesNotExist"}]}, False),
        ({"matchExpressions": [{"key": "team", "operator": "Like", "values": ["a"]}]}, False),
        ({"matchLabels": {"team": "a"}, "matchExpressions": [{"key": "x", "operator": "Exists"}]}, False),
    ],
)
def test_a_selector_chooses_the_namespaces_of_routes(selector: dict[str, Any], takes: bool) -> None:
    """All of it has to fit; the name is a label that every namespace has."""
    shop = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": {"team": "a"}}}
    listener = {**HTTP, "allowedRoutes": {"namespaces": {"from": "Selector", "selector": selector}}}
    made = told(
        WORLD,
        json.dumps(shop) + "\n",
        gateway(listener),
        route(backend("b", namespace="default"), parent={"name": "gw", "namespace": "default"}, namespace="shop"),
    )
    assert made["r"]["Accepted"] == (("True", "Accepted") if takes else ("False", "NotAllowedByListeners"))


@pytest.mark.parametrize(
    ("path", "url", "expected"),
    [
        ({"type": "ReplaceFullPath", "replaceFullPath": "/new"}, "/old/x?a=1", "http://a/new?a=1"),
        ({"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}, "/old/x?a=1", "http://a/new/x?a=1"),
        ({"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new/"}, "/old", "http://a/new"),
        ({"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}, "/old/x", "http://a/x"),
        ({"type": "ReplacePrefixMatch", "replacePrefixMatch": ""}, "/old", "http://a/"),
    ],
)
def test_a_redirect_replaces_the_path_or_its_prefix(path: dict[str, str], url: str, expected: str) -> None:
    """The query stays, and one slash stands between what was given and what is left."""
    rule = {**matches(prefix("/old")), "filters": [{"type": "RequestRedirect", "requestRedirect": {"path": path}}]}
    del rule["backendRefs"]
    decision = decide(mesh(route(rule)).snapshot, f"http://a{url}")
    assert isinstance(decision.action, Redirect)
    request = request_of("GET", f"http://a{url}")
    assert redirected(decision.action, decision.route.match, request) == expected


def test_the_share_of_a_backend_that_is_none_is_answered_with_500() -> None:
    """The specification's status; for Istio's own rules it stays 503."""
    decision = decide(mesh(route({"backendRefs": [{"name": "b", "port": 80}, {"name": "gone", "port": 80}]})).snapshot,
                      "http://a/")  # fmt: skip
    assert isinstance(decision.action, Forward)
    assert decision.action.missing_status == 500
    assert sorted(weights(decision).values()) == [1, 1]


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (route({**TO_B, "sessionPersistence": {"sessionName": "x"}}), "spec.rules[0].sessionPersistence"),
        (gateway(HTTP, infrastructure={"labels": {"a": "b"}}), "spec.infrastructure"),
        (gateway(HTTP, addresses=[{"value": "10.0.0.1"}]), "spec.addresses"),
        (gateway({**HTTP, "new": 1}), "spec.listeners[0].new"),
    ],
)
def test_a_field_without_effect_is_told(text: str, field: str) -> None:
    """Nothing is dropped in silence."""
    found = [each.field for each in parse_text(text, "x.yaml").warnings]
    assert found == [field]
    assert parse_text(GATEWAY, "x.yaml").warnings == ()


def domains(*routes: str, given: Any = INGRESS) -> dict[str, list[str]]:
    made = view("---\n".join((WORLD, GATEWAY, *routes)), workloads=(), given=given)
    return {
        each.name: sorted(host.name.rpartition(":")[0] for host in each.virtual_hosts)
        for each in made.snapshot.route_configurations
    }


def test_a_gateway_listens_and_takes_routes_of_its_hosts() -> None:
    """The narrower of listener's and route's hostnames; a listener that is named alone."""
    parent = {"name": "gw"}
    one = route(TO_B, parent=parent, hostnames=["a.shop.com", "a.other.com"])
    assert domains(one) == {"http.8080": ["a.shop.com"], "http.8081": ["a.other.com", "a.shop.com"]}
    named = route(TO_B, parent={"name": "gw", "sectionName": "shop"})
    assert domains(named) == {"http.8080": ["*.shop.com"], "http.8081": []}
    assert domains(one, given=node("istio-system", NodeKind.ROUTER)) == {}


def test_routes_of_other_namespaces_need_leave() -> None:
    """A listener's allowedRoutes, and a ReferenceGrant for backends elsewhere."""
    parent = {"name": "gw", "namespace": "default"}
    backends = {"backendRefs": [{"name": "b", "namespace": "default", "port": 80}]}
    other = route(backends, parent=parent, namespace="shop", hostnames=["x.shop.com"])
    assert domains(other) == {"http.8080": [], "http.8081": ["x.shop.com"]}
    assert told(WORLD, GATEWAY, other)["r"]["ResolvedRefs"] == ("False", "RefNotPermitted")
    grant = {
        "apiVersion": f"{GROUP}/v1beta1",
        "kind": "ReferenceGrant",
        "metadata": {"name": "g", "namespace": "default"},
        "spec": {
            "from": [{"group": GROUP, "kind": "HTTPRoute", "namespace": "shop"}],
            "to": [{"group": "", "kind": "Service"}],
        },
    }
    assert told(WORLD, GATEWAY, other, json.dumps(grant))["r"]["ResolvedRefs"] == ("True", "ResolvedRefs")


@pytest.mark.parametrize(
    ("given", "accepted", "resolved"),
    [
        (route(TO_B), ("True", "Accepted"), ("True", "ResolvedRefs")),
        (route(backend("gone")), ("True", "Accepted"), ("False", "BackendNotFound")),
        (route({"backendRefs": [{"name": "b", "kind": "Bucket", "group": "x"}]}), ("True", "Accepted"),
         ("False", "InvalidKind")),
        (route(TO_B, parent={"group": "", "kind": "Service", "name": "gone"}), ("False", "NoMatchingParent"),
         ("True", "ResolvedRefs")),
        (route(TO_B, parent={"name": "gw", "sectionName": "gone"}), ("False", "NoMatchingParent"),
         ("True", "ResolvedRefs")),
        (route(TO_B, parent={"name": "gw", "sectionName": "shop"}, hostnames=["x.org"]),
         ("False", "NoMatchingListenerHostname"), ("True", "ResolvedRefs")),
        (route(TO_B, parent={"name": "gw"}, namespace="x", hostnames=["x.org"]), None, None),
        (route(TO_B, parent={"name": "gw", "namespace": "default", "sectionName": "shop"}, namespace="x"),
         ("False", "NotAllowedByListeners"), ("False", "BackendNotFound")),
        (route({"filters": [{"type": "ExtensionRef"}], **TO_B}), ("False", "UnsupportedValue"),
         ("True", "ResolvedRefs")),
        (route({"filters": [{"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [
            {"name": "x", "value": "a\r\nb"}]}}], **TO_B}), ("False", "UnsupportedValue"), ("True", "ResolvedRefs")),
        (route(matches({"path": {"type": "RegularExpression", "value": "("}})), ("False", "UnsupportedValue"),
         ("True", "ResolvedRefs")),
        (route(TO_B, parent={"name": "gw-of-others"}), None, None),
    ],
)  # fmt: skip
def test_a_route_is_told_what_became_of_it(
    given: str, accepted: tuple[str, str] | None, resolved: tuple[str, str] | None
) -> None:
    """Accepted and ResolvedRefs, by the specification's reasons; nothing of parents that are not ours. What is not
    accepted is not in force."""
    expected = {} if accepted is None else {"r": {"Accepted": accepted, "ResolvedRefs": resolved}}
    assert told(WORLD, GATEWAY, given) == expected
    made = convert(objects("---\n".join((WORLD, GATEWAY, given))))
    kinds = {each.kind for each in made.objects}
    assert ("HTTPRoute" in kinds) is (accepted is not None and accepted[0] == "True")


def test_what_has_none_of_it_stays_the_very_same() -> None:
    """Nobody pays for what they do not use."""
    given = objects(WORLD)
    assert all(one is two for one, two in zip(convert(given).objects, given, strict=True))


def test_a_service_that_is_there_by_its_processes_may_be_parent_and_backend() -> None:
    """Outside Kubernetes nobody writes Services: who joins one by name makes it."""
    joined = tuple(
        Workload(f"{name}-v1", service=name, address="127.0.0.1", port=port)
        for name, port in (("p", 7001), ("q", 7002))
    )
    sends = {"backendRefs": [{"name": "q", "port": 7002}]}
    made = view(route(sends, parent={"group": "", "kind": "Service", "name": "p"}), workloads=joined, given=node())
    assert made.problems == ()
    assert weights(decide(made.snapshot, "http://p:7001/")) == {"q.default.svc.cluster.local": 1}
    gone = view(route(sends, parent={"group": "", "kind": "Service", "name": "p"}), workloads=joined[1:], given=node())
    assert [each.reason for each in gone.problems] == ["there is no Service default/p"]
