"""What VirtualServices say: every kind of match, and everything that is done to a call."""

from __future__ import annotations

import random
from typing import Any

import pytest
from views import decide, destination_rule, node, service, view, virtual_service, weights

from meshlib.model import (
    DirectResponse,
    Forward,
    HeaderOperations,
    Mirror,
    Redirect,
    RetryPolicy,
    Rewrite,
    Snapshot,
    WeightedCluster,
)

A_HOST, B_HOST = "a.default.svc.cluster.local", "b.default.svc.cluster.local"
A, B = f"outbound|80||{A_HOST}", f"outbound|80||{B_HOST}"


def only(http: str, *more: str) -> Snapshot:
    """Services a and b, and one VirtualService for a, without a problem."""
    made = view(service(), service("b"), virtual_service(http), *more)
    assert made.problems == ()
    return made.snapshot


def action(rule: str) -> Any:
    """What one rule for everything does."""
    return decide(only(f"[{{{rule}}}]"), "http://a/").action


@pytest.mark.parametrize(
    ("match", "fits", "misses"),
    [
        ("uri: {exact: /x}", [("http://a/x", {}), ("http://a/x?q=1", {})], [("http://a/x/", {}), ("http://a/X", {})]),
        ("uri: {prefix: /x}", [("http://a/x/y", {}), ("http://a/xy", {})], [("http://a/y", {}), ("http://a/X", {})]),
        ("uri: {regex: '/[0-9]+'}", [("http://a/12", {})], [("http://a/12/x", {}), ("http://a/x", {})]),
        ("uri: {prefix: /X}, ignoreUriCase: true", [("http://a/xy", {})], [("http://a/y", {})]),
        ("scheme: {exact: https}", [("https://a:80/", {})], [("http://a/", {})]),
        ("method: {exact: GET}", [("http://a/", {})], []),
        ("method: {regex: 'P.*'}", [], [("http://a/", {})]),
        ("authority: {prefix: a.default}", [("http://a.default/", {})], [("http://a/", {})]),
        ("headers: {X-User: {exact: jason}}", [("http://a/", {"x-user": "jason"})], [("http://a/", {"x-user": "j"})]),
        ("headers: {x-user: {prefix: j}}", [("http://a/", {"x-user": "jason"})], [("http://a/", {})]),
        ("headers: {x-user: {regex: '.*son'}}", [("http://a/", {"x-user": "jason"})], [("http://a/", {})]),
        ("headers: {x-user: {}}", [("http://a/", {"x-user": "any"})], [("http://a/", {})]),
        ("headers: {x-user: {regex: '*'}}", [("http://a/", {"x-user": "any"})], [("http://a/", {})]),
        ("withoutHeaders: {x-user: {}}", [("http://a/", {})], [("http://a/", {"x-user": "any"})]),
        (
            "withoutHeaders: {x-user: {exact: jason}}",
            [("http://a/", {}), ("http://a/", {"x-user": "ann"})],
            [("http://a/", {"x-user": "jason"})],
        ),
        ("queryParams: {q: {exact: '1'}}", [("http://a/?p=0&q=1", {})], [("http://a/?q=2", {}), ("http://a/", {})]),
        ("queryParams: {q: {}}", [("http://a/?q", {})], [("http://a/?p=q", {})]),
        (
            "uri: {prefix: /x}, headers: {x-user: {exact: jason}}",
            [("http://a/x", {"x-user": "jason"})],
            [("http://a/x", {}), ("http://a/", {"x-user": "jason"})],
        ),
    ],
)
def test_a_match_decides(match: str, fits: list[tuple[str, dict[str, str]]], misses: list[Any]) -> None:
    """All conditions of one match together; what it does not take goes on to the next rule."""
    made = only(
        f"[{{match: [{{{match}}}], route: [{{destination: {{host: b}}}}]}}, {{route: [{{destination: {{host: a}}}}]}}]"
    )
    for url, headers in fits:
        assert weights(decide(made, url, headers)) == {B_HOST: 1}
    for url, headers in misses:
        assert weights(decide(made, url, headers)) == {A_HOST: 1}


def test_one_of_several_matches_is_enough_and_rules_are_tried_in_order() -> None:
    """Each match is a route of its own, named after its rule and itself; a request that none takes gets 404."""
    made = only(
        "[{name: first, match: [{name: one, uri: {exact: /1}}, {uri: {exact: /2}}], route: [{destination: {host: b}}]},"
        " {match: [{uri: {prefix: /1}}], route: [{destination: {host: a}}]}]"
    )
    assert decide(made, "http://a/1").route.name == "first.one"
    assert decide(made, "http://a/2").route.name == "first"
    assert weights(decide(made, "http://a/11")) == {A_HOST: 1}
    assert decide(made, "http://a/3").action == DirectResponse(404)


def test_gateways_named_in_a_match_decide_alone() -> None:
    """The source is not looked at beside them, and a rule for a gateway alone is none for the mesh."""
    gateway = (
        "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: g}\n"
        "spec: {servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}\n"
    )
    rule = virtual_service(
        "[{match: [{gateways: [g]}], route: [{destination: {host: a}}], timeout: 1s},"
        " {match: [{gateways: [mesh], sourceLabels: {app: nobody}}], route: [{destination: {host: a}}], timeout: 2s}]",
        more="gateways: [mesh, g]",
    )
    assert decide(view(service(), gateway, rule, given=node(app="x")).snapshot, "http://a/").timeout == 2.0


def test_weights_are_kept_and_nothing_goes_where_the_weight_is_nothing() -> None:
    """A lone destination gets everything, whatever its weight."""
    shared = action("route: [{destination: {host: a}, weight: 75}, {destination: {host: b}, weight: 25}]")
    assert shared.clusters == (WeightedCluster(A, 75), WeightedCluster(B, 25))
    assert action("route: [{destination: {host: a}, weight: 100}, {destination: {host: b}}]").clusters == (
        WeightedCluster(A, 100),
    )
    assert action("route: [{destination: {host: a}, weight: 0}]").clusters == (WeightedCluster(A, 1),)


def test_a_destination_means_its_own_port_or_the_one_that_was_called() -> None:
    """A service of one port needs no port; of several, the caller's is taken; one that is not there is told."""
    two = service("b", ports="[{name: http, port: 80}, {name: admin, port: 81}]")
    rule = "[{match: [{uri: {exact: /admin}}], route: [{destination: {host: b, port: {number: 81}}}]}, %s]"
    made = view(service(), two, virtual_service(rule % "{route: [{destination: {host: b}}]}"))
    assert made.problems == ()
    admin, rest = (decide(made.snapshot, f"http://a/{path}").action for path in ("admin", ""))
    assert isinstance(admin, Forward)
    assert isinstance(rest, Forward)
    assert (admin.clusters[0].cluster, rest.clusters[0].cluster) == (f"outbound|81||{B_HOST}", f"outbound|80||{B_HOST}")
    single = service(ports="[{name: http, port: 9080}]")
    elsewhere = view(single, two, virtual_service("[{route: [{destination: {host: b}}]}]"))
    assert [(problem.field, problem.reason) for problem in elsewhere.problems] == [
        ("spec.http[0].route[0].destination.port", f"{B_HOST} has several ports, so one must be named")
    ]
    missing = view(service(), two, virtual_service("[{route: [{destination: {host: b, port: {number: 7}}}]}]"))
    assert [problem.reason for problem in missing.problems] == [f"{B_HOST} has no port 7; there are 80, 81"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", RetryPolicy()),
        (", retries: {attempts: 0}", None),
        (", retries: {attempts: 3}", RetryPolicy(attempts=3)),
        (
            ", retries: {attempts: 3, perTryTimeout: 2s, retryOn: '5xx,503, reset'}",
            RetryPolicy(3, frozenset({"5xx", "reset", "retriable-status-codes"}), frozenset({503}), 2.0),
        ),
        (
            ", retries: {attempts: 1, backoff: 100ms, retryRemoteLocalities: true, retryIgnorePreviousHosts: false}",
            RetryPolicy(
                1, base_interval=0.1, max_interval=1.0, host_selection_attempts=0, retry_remote_localities=True
            ),
        ),
    ],
)
def test_retries(given: str, expected: RetryPolicy | None) -> None:
    """Two attempts of what never reached the server unless said otherwise; attempts: 0 switches them off."""
    assert action(f"route: [{{destination: {{host: a}}}}]{given}").retry == expected


@pytest.mark.parametrize(
    ("given", "seconds"), [("", None), (", timeout: 0s", None), (", timeout: 1m30s", 90.0), (", timeout: 250ms", 0.25)]
)
def test_a_timeout_of_nothing_is_no_timeout(given: str, seconds: float | None) -> None:
    """Istio's default is none."""
    assert action(f"route: [{{destination: {{host: a}}}}]{given}").timeout == seconds


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("rewrite: {uri: /y}", Rewrite(prefix="/y")),
        ("rewrite: {authority: b.e.com}", Rewrite(authority="b.e.com")),
        ("rewrite: {uri: /y, authority: b}", Rewrite(prefix="/y", authority="b")),
        (
            "rewrite: {uriRegexRewrite: {match: '/x/(.*)', rewrite: '/\\1'}}",
            Rewrite(regex="/x/(.*)", substitution="/\\1"),
        ),
        ("headers: {request: {set: {Host: b.e.com}}}", Rewrite(authority="b.e.com")),
        ("rewrite: {authority: b}, headers: {request: {set: {':authority': c}}}", Rewrite(authority="b")),
    ],
)
def test_rewrites(given: str, expected: Rewrite) -> None:
    """Setting Host is a rewrite of the authority, which the rewrite's own overrides."""
    assert action(f"route: [{{destination: {{host: a}}}}], {given}").rewrite == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("uri: /y", Redirect(path="/y")),
        ("prefixRewrite: /y", Redirect(prefix="/y")),
        ("scheme: https, authority: e.com, redirectCode: 308", Redirect(308, "https", "e.com")),
        ("port: 8443", Redirect(port=8443)),
        ("derivePort: FROM_PROTOCOL_DEFAULT, scheme: https", Redirect(scheme="https", port=-1)),
        ("derivePort: FROM_REQUEST_PORT", Redirect()),
    ],
)
def test_redirects(given: str, expected: Redirect) -> None:
    """301 unless said otherwise; what is not given is kept."""
    assert action(f"redirect: {{{given}}}") == expected


def test_direct_responses() -> None:
    """With text, with bytes, with nothing."""
    assert action("directResponse: {status: 503}") == DirectResponse(503)
    assert action("directResponse: {status: 200, body: {string: hé}}") == DirectResponse(200, "hé".encode())
    assert action("directResponse: {status: 200, body: {bytes: AAE=}}") == DirectResponse(200, b"\x00\x01")


def test_mirrors_go_to_all_unless_a_share_is_given() -> None:
    """Absent is everything, 0 is nothing; several have a share each."""
    to_a = "route: [{destination: {host: a}}]"
    assert action(f"{to_a}, mirror: {{host: b}}").mirrors == (Mirror(B),)
    assert action(f"{to_a}, mirror: {{host: b}}, mirrorPercentage: {{value: 0.5}}").mirrors == (Mirror(B, 5_000),)
    assert action(f"{to_a}, mirror: {{host: b}}, mirrorPercentage: {{value: 0}}").mirrors == ()
    several = "mirrors: [{destination: {host: b}, percentage: {value: 10}}, {destination: {host: a}}]"
    assert action(f"{to_a}, {several}").mirrors == (Mirror(B, 100_000), Mirror(A))


def test_faults_affect_nobody_unless_a_share_is_given() -> None:
    """The opposite of a mirror (virtual_service.proto); delay and abort are independent."""

    def fault(given: str) -> Any:
        return decide(only(f"[{{route: [{{destination: {{host: a}}}}], fault: {{{given}}}}}]"), "http://a/").fault

    assert fault("abort: {httpStatus: 500}") is None
    assert fault("delay: {fixedDelay: 1s}") is None
    both = fault(
        "delay: {fixedDelay: 1s, percentage: {value: 0.0001}}, abort: {grpcStatus: UNAVAILABLE, percentage: {value: 5}}"
    )
    assert (both.delay.seconds, both.delay.per_million) == (1.0, 1)
    assert (both.abort.grpc_status, both.abort.per_million) == (14, 50_000)


def test_headers_are_changed_for_the_route_and_for_each_destination() -> None:
    """Names in lower case; set overwrites, add appends."""
    made = only(
        "[{headers: {request: {set: {X-A: '1'}, remove: [X-B]}, response: {add: {X-C: '2'}}},"
        " route: [{destination: {host: a}, headers: {request: {add: {X-D: '3'}, set: {host: other}}}}]}]"
    )
    decision = decide(made, "http://a/")
    destination = decision.choose(random.Random(0))
    assert destination.request_headers == (
        HeaderOperations(add=(("x-d", "3"),)),
        HeaderOperations(set=(("x-a", "1"),), remove=("x-b",)),
    )
    assert destination.response_headers == (HeaderOperations(add=(("x-c", "2"),)),)
    assert destination.authority == "other"


def test_private_rules_come_before_public_ones() -> None:
    """Of VirtualServices for one host: those private to the caller's namespace, those exported to it, the public."""

    def rule(seconds: int, name: str, namespace: str, export: str) -> str:
        return virtual_service(
            f"[{{route: [{{destination: {{host: {A_HOST}}}}}], timeout: {seconds}s}}]",
            name=name,
            namespace=namespace,
            hosts=f"[{A_HOST}]",
            more=f"exportTo: {export}",
        )

    public, exported = rule(1, "a", "default", "['*']"), rule(2, "b", "default", "[client]")
    private, own_public = rule(3, "c", "client", "['.']"), rule(4, "z", "client", "['*']")

    def timeout(*texts: str) -> float | None:
        return decide(view(service(), *texts, given=node("client")).snapshot, "http://a.default/").timeout

    assert timeout(public, exported, private) == 3.0
    assert timeout(public, exported) == 2.0
    assert timeout(public, own_public) == 1.0  # both are public, so the first by name: its namespace is no merit


def test_a_gateway_that_is_not_there_is_told() -> None:
    """The commonest reason why a rule has no effect at all."""
    made = view(service(), virtual_service("[{route: [{destination: {host: a}}]}]", more="gateways: [mesh, lost, x/g]"))
    assert [(problem.field, problem.reason) for problem in made.problems] == [
        ("spec.gateways[1]", "no Gateway default/lost"),
        ("spec.gateways[2]", "no Gateway x/g"),
    ]


def test_the_services_own_namespace_comes_before_the_roots_for_who_lives_there() -> None:
    """Gateways live in istio-system: its rules are for those who have none of their own."""
    own = destination_rule("{host: a, trafficPolicy: {loadBalancer: {simple: RANDOM}}}")
    root = destination_rule(
        f"{{host: {A_HOST}, trafficPolicy: {{loadBalancer: {{simple: ROUND_ROBIN}}}}}}", namespace="istio-system"
    )
    made = view(service(), own, root, given=node("istio-system")).snapshot
    assert next(str(c.load_balancing) for c in made.clusters if c.service) == "RANDOM"


def test_a_rule_for_one_workload_stands_alone() -> None:
    """It beats those for all, and is not merged with them; it is for clients of its own namespace."""
    general = destination_rule(
        "{host: a, trafficPolicy: {loadBalancer: {simple: RANDOM}}, subsets: [{name: v1}]}", name="all"
    )
    special = destination_rule(
        "{host: a, workloadSelector: {matchLabels: {app: x}}, trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}}",
        name="special",
    )

    def found(namespace: str, **labels: str) -> dict[str, str]:
        made = view(service(), general, special, given=node(namespace, **labels)).snapshot
        return {c.subset: str(c.load_balancing) for c in made.clusters if c.service and c.service.name == "a"}

    assert found("default", app="x") == {"": "ROUND_ROBIN"}
    assert found("default", app="y") == {"": "RANDOM", "v1": "RANDOM"}
    assert found("other", app="x") == {"": "RANDOM", "v1": "RANDOM"}


def test_a_rule_that_says_nothing_about_a_port_or_a_caller_is_none() -> None:
    """Calls go where they would go without it, not to a 404 ("no routes matched", route.go)."""
    two = service(ports="[{name: http, port: 80}, {name: admin, port: 81}]")
    for match in ("port: 81", "sourceLabels: {app: x}", "sourceNamespace: other", "gateways: [g]"):
        rule = virtual_service(f"[{{match: [{{{match}}}], route: [{{destination: {{host: a}}}}], timeout: 1s}}]")
        decision = decide(view(two, rule).snapshot, "http://a/")
        assert (weights(decision), decision.timeout) == ({A_HOST: 1}, None)
    tcp = virtual_service("[]", more="tcp: [{route: [{destination: {host: a}}]}]")
    assert weights(decide(view(two, tcp).snapshot, "http://a/")) == {A_HOST: 1}
