"""What explain says is what calls then do, and it changes nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from flows import request
from hypothesis import given
from hypothesis import strategies as st

from meshlib.model import (
    Access,
    BreakerRules,
    Cluster,
    ConnectionLimits,
    DirectResponse,
    Endpoint,
    HeaderMatch,
    Health,
    Inbound,
    LimitKey,
    LoadAssignment,
    OutlierDetection,
    QueryMatch,
    RateLimit,
    RetryBudget,
    RetryPolicy,
    RouteMatch,
    Snapshot,
    StringMatch,
    VirtualHost,
    WeightedCluster,
)
from meshlib.policy.explain import Explanation, explain
from meshlib.policy.live import Live
from snapshots import forward, live, mesh, route, service, snapshot

TWO = [("10.0.0.1", 9080), ("10.0.0.2", 9080)]
JASON = HeaderMatch("end-user", StringMatch("exact", "jason"))


def routed(*routes: object) -> Live:
    return live(snapshot({"reviews:9080": routes}, {"v1": TWO, "v2": TWO}))  # type: ignore[dict-item]


def test_the_route_that_takes_the_request_is_told_and_why_the_others_do_not() -> None:
    """The first condition that fails, with what was found in its place; after the one that fits nobody is asked."""
    given = routed(
        route(forward("v2"), RouteMatch(headers=(JASON,)), name="testers", origin="VirtualService default/reviews"),
        route(forward("v2"), RouteMatch(StringMatch("prefix", "/api"), StringMatch("exact", "GET")), name="api"),
        route(forward("v2"), RouteMatch(query=(QueryMatch("v", StringMatch("present")),)), name="asked for"),
        route(forward("v1"), name="everybody"),
        route(DirectResponse(418), name="nobody"),
    )
    said = explain(given, request(headers={"end-user": "anne"}))
    assert [(each.name, each.fits, each.reason) for each in said.routes] == [
        ("testers", False, "wants header end-user exact 'jason'; it is 'anne'"),
        ("api", False, "wants path prefix '/api'; it is '/reviews/0'"),
        ("asked for", False, "wants query parameter v present; the query is ''"),
        ("everybody", True, "takes every request"),
        ("nobody", None, "an earlier one takes the request"),
    ]
    assert said.route is said.routes[3]
    assert said.outcome == "goes to v1"
    assert said.virtual_host == "reviews:9080"
    by_header = explain(given, request(headers={"end-user": "jason"}))
    assert by_header.route is not None
    assert (by_header.route.name, by_header.route.reason) == ("testers", "header end-user exact 'jason'")
    missing = explain(given, request())
    assert missing.routes[0].reason == "wants header end-user exact 'jason'; it is not there"


conditions = st.lists(
    st.sampled_from(
        [
            RouteMatch(),
            RouteMatch(StringMatch("prefix", "/a")),
            RouteMatch(StringMatch("regex", "/[ab]")),
            RouteMatch(method=StringMatch("exact", "POST")),
            RouteMatch(scheme=StringMatch("exact", "https")),
            RouteMatch(authority=StringMatch("prefix", "reviews")),
            RouteMatch(headers=(JASON,)),
            RouteMatch(headers=(replace(JASON, invert=True),)),
            RouteMatch(StringMatch("exact", "/b"), query=(QueryMatch("q", StringMatch("exact", "1")),)),
        ]
    ),
    max_size=4,
)


@given(
    conditions,
    st.sampled_from(["/a", "/b", "/b?q=1", "/c"]),
    st.sampled_from(["GET", "POST"]),
    st.sampled_from([{}, {"end-user": "jason"}, {"end-user": "anne"}]),
)
def test_an_explanation_names_the_route_that_a_call_takes(
    matches: list[RouteMatch], path: str, method: str, headers: dict[str, str]
) -> None:
    """Whatever the routes and the request: the same matchers decide."""
    given = routed(*(route(forward("v1"), each, name=f"r{i}") for i, each in enumerate(matches)))
    asked = request(f"http://reviews:9080{path}", method, headers)
    said = explain(given, asked)
    decision = given.router.match(asked)
    assert decision is not None
    assert (said.route.name if said.route else "no route") == decision.route.name
    assert sum(each.fits is True for each in said.routes) == (said.route is not None)


def test_candidates_are_told_with_what_keeps_them_from_serving() -> None:
    """The control plane's word, health checks, ejection, and a priority that waits."""
    endpoints = (
        Endpoint("10.0.0.1", 80, weight=3, workload="reviews-v1"),
        Endpoint("10.0.0.2", 80),
        Endpoint("10.0.0.3", 80, health=Health.UNHEALTHY),
        Endpoint("10.0.0.4", 80, health=Health.DRAINING),
        Endpoint("10.0.0.5", 80, priority=1),
    )
    cluster = Cluster("reviews:9080", outlier_detection=OutlierDetection(consecutive_5xx=1))
    given = replace(
        service("reviews:9080", [], cluster=cluster), assignments=(LoadAssignment("reviews:9080", endpoints),)
    )
    current = live(given)
    found = current.clusters["reviews:9080"]
    (told,) = explain(current, request()).destinations
    # One of three that are not draining is away: the two can carry 1.4 times their share, 93 percent.
    assert [each.verdict for each in told.candidates] == [
        "serves",
        "serves",
        "unhealthy, says the control plane",
        "draining, says the control plane",
        "serves",
    ]
    found.set_health("10.0.0.2:80", False, 0.0)
    found.everyone[0].state.is_ejected = True
    found.everyone[0].state.ejections = 2
    (told,) = explain(current, request()).destinations
    assert [each.verdict for each in told.candidates[:2]] == [
        "ejected by outlier detection",
        "failed its health checks",
    ]
    assert [each.serves for each in told.candidates] == [False, False, False, False, True]
    assert (told.candidates[0].ejections, told.candidates[0].is_ejected) == (2, True)


def test_a_priority_that_gets_no_load_waits() -> None:
    """As long as the first can carry all."""
    endpoints = (Endpoint("10.0.0.1", 80), Endpoint("10.0.0.5", 80, priority=1))
    given = replace(service("reviews:9080", []), assignments=(LoadAssignment("reviews:9080", endpoints),))
    (told,) = explain(live(given), request()).destinations
    assert [each.verdict for each in told.candidates] == ["serves", "waits: no load is left for priority 1"]


def test_policies_are_told_with_their_origin() -> None:
    """What is not as by default, of the route and of each destination; what is in shadow is marked."""
    cluster = Cluster(
        "reviews:9080",
        breaker=BreakerRules(consecutive_failures=5),
        outlier_detection=OutlierDetection(),
        shadow=frozenset({"outlier-detection"}),
        origin="DestinationRule default/reviews (reviews.yaml)",
    )
    action = forward("reviews:9080", timeout=2.5, retry=RetryPolicy(3, frozenset({"5xx"}), per_try_timeout=0.5))
    given = snapshot(
        {"reviews:9080": [route(action, name="all", origin="VirtualService default/reviews (reviews.yaml)")]},
        {"reviews:9080": (cluster, TWO)},
    )
    said = explain(live(given), request())
    assert {each.name: each.value for each in said.policies} == {
        "timeout": "2.5 s",
        "retry": "attempts=3, on=5xx, per_try_timeout=0.5 s",
    }
    assert {each.origin for each in said.policies} == {"VirtualService default/reviews (reviews.yaml)"}
    (told,) = said.destinations
    assert {each.name: (each.value, each.is_shadow) for each in told.policies} == {
        "breaker": ("consecutive_failures=5", False),
        "outlier-detection": ("consecutive_5xx=5, interval=10 s, base_ejection_time=30 s", True),
    }
    assert {each.origin for each in told.policies} == {"DestinationRule default/reviews (reviews.yaml)"}
    assert "outlier-detection (in shadow: it counts, and does nothing)" in str(said)


def test_what_was_refused_so_far_is_told() -> None:
    """By whom, as far as there is any; a breaker that another process has opened says so."""
    cluster = Cluster(
        "reviews:9080",
        breaker=BreakerRules(consecutive_failures=5),
        limits=ConnectionLimits(max_requests=1),
        retry_budget=RetryBudget(0.0, 0),
    )
    current = live(service("reviews:9080", TWO, cluster=cluster))
    found = current.clusters["reviews:9080"]
    (told,) = explain(current, request()).destinations
    assert told.refused == ()
    assert (found.admit(0.0), found.admit(0.0), found.admit_retry(0.0)) == (True, False, False)
    found.dropped_mirror()
    assert found.breaker is not None
    found.breaker.adopt("open", 0.0)
    assert found.breaker.acquire(time.monotonic()) is None
    said = explain(current, request())
    assert said.destinations[0].refused == (
        ("calls by a limit", 1),
        ("calls by the breaker", 1),
        ("retries by the budget", 1),
        ("mirrored copies", 1),
    )
    assert "  Refused so far: 1 calls by a limit, 1 calls by the breaker, 1 retries by the budget" in str(said)
    assert "as another process says" in str(said)


def test_shares_of_the_destinations_are_told() -> None:
    """By weight; a destination without weight gets nothing and is not told, and one that is missing is."""
    given = routed(
        route(forward(WeightedCluster("v1", 30), WeightedCluster("v2", 0), WeightedCluster("gone", 10), timeout=1.0))
    )
    said = explain(given, request())
    assert [(each.cluster, each.percent, each.problem) for each in said.destinations] == [
        ("v1", 75.0, ""),
        ("gone", 25.0, "no such cluster is configured: calls get 503"),
    ]


@pytest.mark.parametrize(
    ("given", "outcome"),
    [
        (snapshot({"reviews:9080": []}, {}), "is answered here with 404: no route takes it"),
        (snapshot({"reviews:9080": [route(DirectResponse(204))]}, {}), "is answered here with 204"),
        (Snapshot("1", complete=True), "goes to reviews:9080 as it is: the mesh does not know the host"),
        (service("reviews:9080", []), "goes to reviews:9080"),
    ],
    ids=["no route", "answered here", "unknown host", "no endpoint"],
)
def test_what_becomes_of_the_request_is_said_in_a_sentence(given: Snapshot, outcome: str) -> None:
    """Also where nothing is called."""
    said = explain(live(given), request())
    assert said.outcome == outcome
    assert str(said).startswith(f"GET http://reviews:9080/reviews/0 {outcome}.\n")


def test_plain_http_that_is_redirected_first_is_said_so() -> None:
    """A virtual host that wants TLS looks at no route."""
    made = service("reviews:9080", TWO)
    (table,) = made.route_configurations
    (host,) = table.virtual_hosts
    assert isinstance(host, VirtualHost)
    strict = replace(table, virtual_hosts=(replace(host, require_tls=True),))
    said = explain(live(replace(made, route_configurations=(strict,))), request())
    assert said.outcome == "is redirected (301) to https://reviews:9080/reviews/0, since this host wants TLS"
    assert [each.fits for each in said.routes] == [None]


def test_an_explanation_counts_nothing() -> None:
    """No call is counted in, no turn is taken, no endpoint is judged."""
    current = live(service("reviews:9080", TWO))
    state = current.clusters["reviews:9080"].state
    before = (state.requests, state.retries, dict(state.turns))
    assert isinstance(explain(current, request()), Explanation)
    assert (state.requests, state.retries, dict(state.turns)) == before


def test_mesh_explain_takes_a_url_and_headers() -> None:
    """As a client would; what is no absolute URL is refused."""
    with mesh(service("reviews:9080", TWO)) as here:
        said = here.explain("get", "http://user@Reviews:9080?x=1", {"End-User": "jason"})
        assert said.request == "GET http://reviews:9080/?x=1"
        assert said.outcome == "goes to reviews:9080"
        with pytest.raises(ValueError, match="absolute URL"):
            here.explain("GET", "/reviews")


@pytest.mark.processes
def test_the_example_of_the_documentation_prints_what_is_shown(tmp_path: Path) -> None:
    """Line by line."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "explain.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shown, *_ = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout == shown


def test_limits_are_told_with_what_is_used_of_them() -> None:
    """Of a destination, of a route that answers by itself, and of what comes in here."""
    limit = RateLimit("two", 2, 2, 60.0, origin="BackendTrafficPolicy default/c (a.yaml)")
    asleep = RateLimit("shy", 1, 1, 60.0, (LimitKey("header", "end-user"),), shadow=True)
    routes = {"a:80": [route(forward("c"))], "b:80": [route(DirectResponse(418), limited_by="c")]}
    given_snapshot = snapshot(routes, {"c": (Cluster("c", rate_limits=(limit, asleep)), TWO)})
    inbound = Inbound("inbound", access=Access(rate_limits=(RateLimit("in", 5, 5, 1.0),)))
    now = live(replace(given_snapshot, inbound=(inbound,)))
    limiter = now.clusters["c"].limiter
    assert limiter is not None
    for _ in range(3):
        limiter.take(request("http://a/", headers={"end-user": "jason"}), None, 0.0)
    told = str(explain(now, request("http://a/")))
    assert (
        "limit two: 2 in 60 s, 2 at once: 2 passed, 1 turned away, 0 left [BackendTrafficPolicy default/c (a.yaml)"
        in told
    )
    assert "limit shy: 1 in 60 s, 1 at once by end-user: 1 passed, 1 would be turned away" in told
    assert "Calls that come in here are limited, too:\n  limit in: 5 in 1 s, 5 at once: 0 passed" in told
    answered = explain(now, request("http://b/"))
    assert [(use.limit.name, use.allowed, use.limited) for use in answered.limits] == [("two", 2, 1), ("shy", 1, 1)]
