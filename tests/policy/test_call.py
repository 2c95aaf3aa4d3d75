"""What happens to an outbound call, step by step, without I/O."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from flows import Answer, Run, Timeline, failed, request, responded

from meshlib.errors import CircuitOpen
from meshlib.model import (
    CATCH_ALL,
    PASSTHROUGH,
    BreakerRules,
    Cluster,
    ClusterType,
    ConnectionLimits,
    DirectResponse,
    Endpoint,
    Fault,
    FaultAbort,
    FaultDelay,
    HashPolicy,
    HeaderMatch,
    HeaderOperations,
    HedgePolicy,
    LoadAssignment,
    LoadBalancing,
    Mirror,
    Outcome,
    Quota,
    QuotaService,
    Redirect,
    RetryPolicy,
    Rewrite,
    RouteMatch,
    Snapshot,
    StringMatch,
    WeightedCluster,
)
from meshlib.policy.call import CallContext, outbound_call
from meshlib.policy.live import Live, compile_live
from meshlib.policy.quota import Answer as Counted
from meshlib.policy.steps import Ask, Deliver, Finished, Queue, Race, Reply, Send, Wait, Win
from snapshots import Clock, context, endpoints, forward, live, route, service, snapshot

ONE = [("10.0.0.1", 9080)]
TWO = [("10.0.0.1", 9080), ("10.0.0.2", 9080)]
THREE = [("10.0.0.1", 9080), ("10.0.0.2", 9080), ("10.0.0.3", 9080)]
ALWAYS = 1_000_000


def test_a_good_call_is_one_send_and_one_deliver() -> None:
    """The whole path when nothing goes wrong; the caller's authority, path and headers stand."""
    run = Run(request(), context(service("reviews:9080", ONE)))
    send, deliver = run.steps
    assert isinstance(send, Send)
    assert isinstance(deliver, Deliver)
    assert (send.endpoint, send.authority, send.path, send.headers, send.timeout) == (
        endpoints(ONE)[0],
        None,
        None,
        (),
        None,
    )


def test_a_call_is_counted_until_its_body_is_closed() -> None:
    """Streaming holds the endpoint's and the cluster's count: least request sees long downloads."""
    given = live(service("reviews:9080", ONE))
    cluster = given.clusters["reviews:9080"]
    run = Run(request(), context(given))
    assert (cluster.state.requests, cluster.targets[0].state.in_flight) == (1, 1)
    run.flow.close()
    assert (cluster.state.requests, cluster.targets[0].state.in_flight) == (0, 0)


def test_a_cancelled_attempt_leaves_no_count_behind() -> None:
    """Cancellation arrives as close() while Send is out."""
    given = live(service("reviews:9080", ONE))
    flow = outbound_call(request(), context(given))
    assert isinstance(next(flow), Send)
    flow.close()
    cluster = given.clusters["reviews:9080"]
    assert (cluster.state.requests, cluster.targets[0].state.in_flight) == (0, 0)


def test_an_unknown_host_is_asked_for_once_and_then_sent_where_it_says() -> None:
    """Istio's ALLOW_ANY, when the feed does not answer in time."""
    run = Run(request("http://stranger:8000/x"), context(snapshot({}, {}, complete=False)))
    assert run.resolved == ["stranger:8000"]
    assert (run.sends[0].endpoint.address, run.sends[0].endpoint.port) == ("stranger", 8000)
    assert run.sends[0].cluster.name == PASSTHROUGH


@pytest.mark.parametrize(
    ("url", "listener"),
    [("http://echo/", "echo:80"), ("https://Echo/", "echo:443"), ("http://[::1]/", "[::1]:80")],
)
def test_a_host_is_asked_for_by_the_port_it_stands_for(url: str, listener: str) -> None:
    """Listeners are named with a port, which a URL may leave out."""
    run = Run(request(url), context(live(snapshot({}, {}, complete=False))))
    assert run.resolved == [listener]


def test_the_answer_to_resolve_is_used_by_the_very_call_that_asked() -> None:
    """The first call to a host is routed like every other."""
    rng = random.Random(1)
    lives = [live(snapshot({}, {}, complete=False))]
    flow = outbound_call(request(), CallContext(lambda: lives[-1], Clock(), rng))
    next(flow)
    lives.append(live(service("reviews:9080", ONE)))
    send = next(flow)
    assert isinstance(send, Send)
    assert send.endpoint == endpoints(ONE)[0]
    flow.close()


def test_a_host_outside_the_registry_gets_what_the_outbound_policy_says() -> None:
    """REGISTRY_ONLY is a catch-all route that answers 502 (Istio's BlackHole)."""
    blocked = snapshot({CATCH_ALL: [route(DirectResponse(502))]}, {})
    blocked_hosts = Run(request("http://stranger/"), context(blocked))
    assert blocked_hosts.reply.status == 502


def test_no_matching_route_is_404() -> None:
    """Envoy's answer, flag NR, no body."""
    only = RouteMatch(path=StringMatch("exact", "/known"))
    given = snapshot({"reviews:9080": [route(forward("c"), only)]}, {"c": ONE})
    reply = Run(request(), context(given)).reply
    assert (reply.status, reply.flag, reply.body) == (404, "NR", b"")


def test_a_cluster_that_is_not_configured_is_503() -> None:
    """A route that names a missing subset: flag NC, and the reason names route and cluster."""
    reply = Run(request(), context(snapshot({"reviews:9080": [route(forward("missing"))]}, {}))).reply
    assert (reply.status, reply.flag) == (503, "NC")
    assert "'missing'" in reply.reason
    only = route(replace(forward("missing"), missing_status=500))  # as the Gateway API wants it
    assert Run(request(), context(snapshot({"reviews:9080": [only]}, {}))).reply.status == 500


def test_no_endpoint_is_503_with_envoys_text() -> None:
    """What a service scaled to zero answers."""
    reply = Run(request(), context(service("reviews:9080", []))).reply
    assert (reply.status, reply.flag, reply.body) == (503, "UH", b"no healthy upstream")


def test_calls_queue_for_a_connection_and_beyond_the_queue_are_503_overflow() -> None:
    """connectionPool's limits: one connection, one waiting; the next is turned away; a finished call makes room."""
    limited = Cluster("c", limits=ConnectionLimits(max_connections=1, max_pending_requests=1))
    given = live(snapshot({"reviews:9080": [route(forward("c"))]}, {"c": (limited, ONE)}))
    first, second, third = (Run(request(), context(given)) for _ in range(3))
    assert isinstance(first.last, Deliver)
    waits = second.steps[-1]
    assert isinstance(waits, Queue)
    assert (third.reply.status, third.reply.flag, third.sends) == (503, "UO", [])
    assert ("x-envoy-overloaded", "true") in third.reply.headers
    first.flow.close()
    assert waits.ticket.is_granted
    second.go_on()
    assert isinstance(second.last, Deliver)
    second.flow.close()
    assert given.clusters["c"].state.requests == 0


def test_a_turn_that_does_not_come_in_time_is_a_504() -> None:
    """The route's timeout holds for the queue, too; and a caller that goes leaves the queue to others."""
    limited = Cluster("c", limits=ConnectionLimits(max_connections=1, max_pending_requests=2))
    given = live(snapshot({"reviews:9080": [route(forward("c", timeout=0.5))]}, {"c": (limited, ONE)}))
    first, late, gone = (Run(request(), context(given)) for _ in range(3))
    waits = late.steps[-1]
    assert isinstance(waits, Queue)
    assert waits.seconds == 0.5
    late.go_on()
    assert (late.reply.status, late.reply.flag) == (504, "UT")
    gone.flow.close()
    state = given.clusters["c"].state
    assert (state.requests, len(state.queue)) == (1, 0)
    first.flow.close()
    assert state.requests == 0


def test_http2_multiplexes_so_connections_do_not_bound_its_calls() -> None:
    """There http2MaxRequests does."""
    both = ConnectionLimits(max_connections=1, max_pending_requests=1, max_requests=2)
    given = live(snapshot({"reviews:9080": [route(forward("c"))]}, {"c": (Cluster("c", http2=True, limits=both), ONE)}))
    runs = [Run(request(), context(given)) for _ in range(3)]
    assert [isinstance(run.last, Deliver) for run in runs] == [True, True, False]
    assert runs[2].reply.flag == "UO"
    for run in runs:
        run.flow.close()


def test_weights_split_the_calls() -> None:
    """90/10 over 2,000 calls, within five standard deviations of the binomial."""
    chosen = (WeightedCluster("v1", 90), WeightedCluster("v2", 10))
    given = live(snapshot({"reviews:9080": [route(forward(*chosen))]}, {"v1": ONE, "v2": ONE}))
    called = context(given, seed=3)
    counts: Counter[str] = Counter()
    for _ in range(2000):
        run = Run(request(), called)
        counts[run.sends[0].cluster.name] += 1
        run.flow.close()
    assert abs(counts["v2"] - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5


def test_a_weight_of_zero_is_never_chosen_beside_others() -> None:
    """A subset that was drained."""
    chosen = (WeightedCluster("v1", 0), WeightedCluster("v2", 1))
    given = live(snapshot({"reviews:9080": [route(forward(*chosen))]}, {"v1": ONE, "v2": ONE}))
    for seed in range(50):
        assert Run(request(), context(given, seed=seed)).sends[0].cluster.name == "v2"


def test_headers_choose_the_route() -> None:
    """Istio's request-routing task: jason sees v2."""
    jason = RouteMatch(headers=(HeaderMatch("end-user", StringMatch("exact", "jason")),))
    given = live(
        snapshot({"reviews:9080": [route(forward("v2"), jason), route(forward("v1"))]}, {"v1": ONE, "v2": ONE})
    )
    assert Run(request(headers={"end-user": "jason"}), context(given)).sends[0].cluster.name == "v2"
    assert Run(request(headers={"end-user": "jasonx"}), context(given)).sends[0].cluster.name == "v1"
    assert Run(request(), context(given)).sends[0].cluster.name == "v1"


def test_an_injected_delay_comes_first_and_does_not_eat_the_timeout() -> None:
    """Envoy's fault filter sits above the router's timer."""
    clock = Clock()
    slow = Fault(delay=FaultDelay(7.0, ALWAYS))
    given = snapshot({"reviews:9080": [route(forward("c", timeout=3.0), fault=slow)]}, {"c": ONE})
    run = Run(request(), context(given, clock), clock=clock)
    assert run.waits == [7.0]
    assert run.sends[0].timeout == 3.0


def test_an_injected_abort_answers_without_sending() -> None:
    """Status and body are Envoy's, the flag FI."""
    broken = Fault(abort=FaultAbort(ALWAYS, 500))
    run = Run(request(), context(snapshot({"reviews:9080": [route(forward("c"), fault=broken)]}, {"c": ONE})))
    assert (run.reply.status, run.reply.body, run.reply.flag, run.sends) == (500, b"fault filter abort", "FI", [])


def test_an_abort_for_grpc_is_a_200_with_a_grpc_status() -> None:
    """A gRPC client reads headers, not the HTTP status."""
    broken = Fault(abort=FaultAbort(ALWAYS, grpc_status=14))
    reply = Run(request(), context(snapshot({"reviews:9080": [route(forward("c"), fault=broken)]}, {"c": ONE}))).reply
    assert (reply.status, dict(reply.headers)["grpc-status"]) == (200, "14")


def test_a_share_of_calls_is_aborted() -> None:
    """20 percent of 1,000, within five standard deviations; the others go through."""
    broken = Fault(abort=FaultAbort(200_000, 500))
    called = context(live(snapshot({"reviews:9080": [route(forward("c"), fault=broken)]}, {"c": ONE})), seed=5)
    aborted = 0
    for _ in range(1000):
        run = Run(request(), called)
        aborted += not run.sends
        run.flow.close()
    assert abs(aborted - 200) < 5 * (1000 * 0.2 * 0.8) ** 0.5


def test_a_direct_response_answers_by_itself() -> None:
    """With its body and the route's response headers."""
    fixed = route(DirectResponse(418, b"teapot"), response_headers=HeaderOperations(add=(("x-from", "mesh"),)))
    reply = Run(request(), context(snapshot({"reviews:9080": [fixed]}, {}))).reply
    assert (reply.status, reply.body) == (418, b"teapot")
    assert ("x-from", "mesh") in reply.headers


@pytest.mark.parametrize(
    ("redirect", "location"),
    [
        (Redirect(path="/new"), "http://reviews:9080/new?a=1"),
        (Redirect(authority="other"), "http://other/old?a=1"),
        (Redirect(scheme="https"), "https://reviews:9080/old?a=1"),
        (Redirect(scheme="https", port=-1), "https://reviews/old?a=1"),
        (Redirect(port=8443), "http://reviews:8443/old?a=1"),
    ],
)
def test_a_redirect_keeps_what_it_does_not_replace(redirect: Redirect, location: str) -> None:
    """Scheme, host, port, path and query, each on its own."""
    given = snapshot({"reviews:9080": [route(redirect)]}, {})
    reply = Run(request("http://reviews:9080/old?a=1"), context(given)).reply
    assert (reply.status, dict(reply.headers)["location"]) == (301, location)


@pytest.mark.parametrize(
    ("match", "rewrite", "path"),
    [
        (StringMatch("prefix", "/old"), Rewrite(prefix="/new"), "/new/x?q=1"),
        (StringMatch("prefix", "/old/"), Rewrite(prefix="/"), "/x?q=1"),
        (StringMatch("path-prefix", "/old"), Rewrite(prefix="/"), "/x?q=1"),
        (StringMatch("exact", "/old/x"), Rewrite(prefix="/new"), "/new?q=1"),
        (None, Rewrite(path="/fixed"), "/fixed?q=1"),
        (None, Rewrite(prefix="/new/"), "/new/old/x?q=1"),
        (None, Rewrite(prefix="/new"), "/newold/x?q=1"),
        (None, Rewrite(regex="^/old/(.*)$", substitution=r"/very/\1"), "/very/x?q=1"),
    ],
)
def test_a_rewrite_changes_the_path_and_keeps_the_query(match: StringMatch | None, rewrite: Rewrite, path: str) -> None:
    """Prefix, whole path and regular expression."""
    given = snapshot({"reviews:9080": [route(forward("c", rewrite=rewrite), RouteMatch(path=match))]}, {"c": ONE})
    assert Run(request("http://reviews:9080/old/x?q=1"), context(given)).sends[0].path == path


def test_an_authority_rewrite_changes_the_host_on_the_wire_only() -> None:
    """The endpoint is still the route's cluster."""
    given = snapshot({"reviews:9080": [route(forward("c", rewrite=Rewrite(authority="inner")))]}, {"c": ONE})
    send = Run(request(), context(given)).sends[0]
    assert (send.authority, send.endpoint) == ("inner", endpoints(ONE)[0])


def test_header_operations_run_from_the_specific_to_the_general() -> None:
    """The destination's first, then the route's, so that the route has the last word (Envoy)."""
    of_route, of_destination = HeaderOperations(set=(("x", "route"),)), HeaderOperations(set=(("x", "destination"),))
    chosen = WeightedCluster("c", 1, of_destination, of_destination)
    given = snapshot(
        {"reviews:9080": [route(forward(chosen), request_headers=of_route, response_headers=of_route)]}, {"c": ONE}
    )
    run = Run(request(), context(given))
    assert run.sends[0].headers == (of_destination, of_route)
    assert isinstance(run.last, Deliver)
    assert run.last.headers == (of_destination, of_route)


def test_a_failed_connection_is_retried_elsewhere() -> None:
    """Istio's default policy; the tried endpoint is avoided, however many calls the other one has in flight."""
    given = live(service("reviews:9080", TWO, retry=RetryPolicy()))
    cluster = given.cluster("reviews:9080")
    assert cluster is not None
    busy, refusing = cluster.targets
    for _ in range(200):
        busy.state.in_flight, refusing.state.in_flight = 10, 0
        run = Run(request(), context(given), failed("connect-failure"), responded())
        assert isinstance(run.last, Deliver)
        assert {send.endpoint for send in run.sends} == {busy.endpoint, refusing.endpoint}


def test_attempts_counts_retries_and_the_last_answer_stands() -> None:
    """attempts: 2 is three sends; then the caller gets the server's own 503."""
    policy = RetryPolicy(attempts=2, on=frozenset({"5xx"}))
    run = Run(request(), context(service("reviews:9080", TWO, retry=policy)), responded(503))
    assert len(run.sends) == 3
    assert isinstance(run.last, Deliver)
    assert run.last.flag == "URX"


def test_a_retry_sees_the_endpoints_of_today() -> None:
    """Configuration that came while the first attempt was out."""
    rng = random.Random(1)
    policy = RetryPolicy(host_selection_attempts=0)
    lives: list[Live] = [live(service("reviews:9080", ONE, retry=policy))]
    flow = outbound_call(request(), CallContext(lambda: lives[-1], Clock(), rng))
    next(flow)
    moved = service("reviews:9080", [("10.0.0.9", 9080)], retry=policy)
    lives.append(compile_live(moved, lives[-1], rng))
    assert isinstance(flow.send(failed("connect-failure")), Wait)
    send = next(flow)
    assert isinstance(send, Send)
    assert send.endpoint.address == "10.0.0.9"
    flow.close()


def test_a_call_that_waited_for_its_quota_sees_the_endpoints_of_then() -> None:
    """Configuration that came while who counts was asked."""
    rng = random.Random(1)
    quota = Quota("shared", QuotaService("redis", "redis://127.0.0.1:1"), requests=10)
    cluster = Cluster("reviews:9080", quotas=(quota,))
    lives: list[Live] = [live(service("reviews:9080", ONE, cluster=cluster))]
    nobody: Any = object()
    flow = outbound_call(request(), CallContext(lambda: lives[-1], Clock(), rng, quotas=nobody))
    assert isinstance(next(flow), Ask)
    lives.append(compile_live(service("reviews:9080", [("10.0.0.9", 9080)], cluster=cluster), lives[-1], rng))
    send = flow.send(Counted(is_over=False))
    assert isinstance(send, Send)
    assert send.endpoint.address == "10.0.0.9"
    flow.close()


def test_the_route_timeout_covers_all_tries() -> None:
    """What is left shrinks; when nothing is left the answer is 504."""
    clock = Clock()
    policy = RetryPolicy(attempts=10, on=frozenset({"5xx"}))
    flow = outbound_call(request(), context(service("reviews:9080", ONE, timeout=1.0, retry=policy), clock))
    send = next(flow)
    assert isinstance(send, Send)
    assert send.timeout == 1.0
    clock.now += 0.4
    wait = flow.send(responded(503))
    assert isinstance(wait, Wait)
    clock.now += wait.seconds
    again = next(flow)
    assert isinstance(again, Send)
    assert again.timeout == pytest.approx(0.6 - wait.seconds)
    clock.now += 0.7
    last = flow.send(failed("timeout"))
    assert (last.status, last.flag, last.body) == (504, "UT", b"upstream request timeout")  # type: ignore[union-attr]
    flow.close()


def test_a_per_try_timeout_bounds_each_try() -> None:
    """And is retried where the policy says so."""
    policy = RetryPolicy(attempts=1, on=frozenset({"5xx"}), per_try_timeout=0.2)
    run = Run(
        request(), context(service("reviews:9080", ONE, timeout=1.0, retry=policy)), failed("timeout"), responded()
    )
    assert [send.timeout for send in run.sends] == [0.2, 0.2]
    assert isinstance(run.last, Deliver)


def test_the_callers_own_deadline_is_kept() -> None:
    """What the inbound request has left is the most that an outbound one may take."""
    clock = Clock()
    given = service("reviews:9080", ONE, timeout=10.0)
    run = Run(request(), context(given, clock, deadline=clock.now + 2.0))
    assert run.sends[0].timeout == 2.0
    late = Run(request(), context(given, clock, deadline=clock.now - 0.1))
    assert (late.reply.status, late.sends) == (504, [])


def test_retries_stop_at_the_clusters_limit() -> None:
    """maxRetries: 0 allows no retry at any time."""
    none = Cluster("c", limits=ConnectionLimits(max_retries=0))
    policy = RetryPolicy(on=frozenset({"5xx"}))
    given = snapshot({"reviews:9080": [route(forward("c", retry=policy))]}, {"c": (none, ONE)})
    assert len(Run(request(), context(given), responded(503)).sends) == 1


def test_mirrors_go_out_beside_the_call() -> None:
    """With Istio's -shadow in the Host; their own counts end with them."""
    given = live(snapshot({"reviews:9080": [route(forward("v1", mirrors=(Mirror("v2"),)))]}, {"v1": ONE, "v2": TWO}))
    run = Run(request(), context(given))
    copy = run.mirrors[0].flow
    send = next(copy)
    assert isinstance(send, Send)
    assert (send.authority, send.cluster.name) == ("reviews-shadow:9080", "v2")
    assert isinstance(copy.send(responded()), Deliver)
    copy.close()
    run.flow.close()
    assert given.clusters["v2"].state.requests == 0


@pytest.mark.parametrize(("timeout", "seconds"), [(None, 15.0), (2.0, 2.0)])
def test_a_mirror_ends_by_itself_even_where_the_route_sets_no_time(timeout: float | None, seconds: float) -> None:
    """Nobody waits for it, so nobody else would end it: Envoy's 15 s."""
    action = forward("v1", mirrors=(Mirror("v2"),), timeout=timeout)
    run = Run(request(), context(live(snapshot({"reviews:9080": [route(action)]}, {"v1": ONE, "v2": TWO}))))
    copy = run.mirrors[0].flow
    send = next(copy)
    assert isinstance(send, Send)
    assert (send.timeout, send.deadline) == (seconds, 1000.0 + seconds)
    deliver = copy.send(responded())
    assert isinstance(deliver, Deliver)
    assert deliver.deadline == 1000.0 + seconds
    copy.close()
    run.flow.close()


def test_a_mirror_that_a_limit_turns_away_is_counted_and_does_not_queue() -> None:
    """The mirrored cluster's own limits hold for it."""
    busy = Cluster("v2", limits=ConnectionLimits(max_connections=1, max_pending_requests=5))
    action = forward("v1", mirrors=(Mirror("v2"),))
    given = live(snapshot({"reviews:9080": [route(action)]}, {"v1": ONE, "v2": (busy, TWO)}))
    held = given.clusters["v2"]
    assert held.admit(0.0) is True
    run = Run(request(), context(given))
    assert list(run.mirrors[0].flow) == []
    assert (held.state.mirrors_dropped, len(held.state.queue), held.state.requests) == (1, 0, 1)
    run.flow.close()


def test_a_gateway_matches_in_its_listeners_route_configuration() -> None:
    """The authority is the public host; no listener is named after it."""
    given = snapshot({"bookinfo.example": [route(forward("c"))]}, {"c": ONE})
    run = Run(
        request("http://bookinfo.example/productpage"),
        context(given, route_configuration="bookinfo.example"),
    )
    assert run.sends[0].cluster.name == "c"
    missing = Run(request(), context(given, route_configuration="gone"))
    assert missing.reply.status == 404


def test_passthrough_keeps_the_port_of_the_scheme() -> None:
    """https without a port is 443, IPv6 literals keep their brackets out of the address."""
    anywhere = snapshot({CATCH_ALL: [route(forward("any"))]}, {"any": (Cluster("any", ClusterType.ORIGINAL_DST), [])})
    for url, address in {
        "https://example.com/": ("example.com", 443),
        "http://example.com/": ("example.com", 80),
        "http://[::1]:81/": ("::1", 81),
        "http://[::1]/": ("::1", 80),
    }.items():
        endpoint = Run(request(url), context(anywhere)).sends[0].endpoint
        assert (endpoint.address, endpoint.port) == address


# Retries, once more


def answered(*pairs: tuple[Outcome, float]) -> list[Answer]:
    return [Answer(outcome, seconds) for outcome, seconds in pairs]


def test_the_answers_of_a_request_that_asks_for_retries_are_retried() -> None:
    """x-envoy-retry-on, on a route that has no policy."""
    asked = request(headers={"x-envoy-retry-on": "gateway-error"})
    run = Run(asked, context(service("reviews:9080", TWO)), responded(503), responded())
    assert len(run.sends) == 2
    assert isinstance(run.last, Deliver)


def test_a_server_that_says_when_is_asked_then() -> None:
    """Unless the caller has no time for it: then its answer stands."""
    policy = RetryPolicy(on=frozenset({"5xx"}))
    told = responded(503, {"retry-after": "2"})
    clock = Clock()
    run = Run(request(), context(service("reviews:9080", TWO, retry=policy), clock), told, responded(), clock=clock)
    assert 2.0 <= run.waits[0] < 3.0
    hurried = Run(request(), context(service("reviews:9080", TWO, retry=policy, timeout=1.5)), told, responded())
    assert (len(hurried.sends), hurried.waits) == (1, [])


def test_a_place_in_the_retry_budget_is_held_by_one_retry_at_a_time() -> None:
    """Taken before its pause, given back when it has ended: the call's third try needs no second place."""
    one = Cluster("c", limits=ConnectionLimits(max_retries=1))
    policy = RetryPolicy(attempts=3, on=frozenset({"5xx"}))
    given = live(snapshot({"reviews:9080": [route(forward("c", retry=policy))]}, {"c": (one, TWO)}))
    state = given.clusters["c"].state
    flow = outbound_call(request(), context(given))
    next(flow)
    assert isinstance(flow.send(responded(503)), Wait)
    assert state.retries == 1
    other = Run(request(), context(given), responded(503))
    assert (len(other.sends), state.retries) == (1, 1)
    next(flow)
    assert isinstance(flow.send(responded(503)), Wait)
    assert state.retries == 1
    next(flow)
    assert isinstance(flow.send(responded(200)), Deliver)
    assert state.retries == 1
    flow.close()
    other.flow.close()
    assert state.retries == 0


def test_remote_localities_are_tried_after_two_tries_in_this_one() -> None:
    """Istio's retryRemoteLocalities is Envoy's previous_priorities with an update_frequency of 2."""
    cluster = Cluster("c", load_balancing=LoadBalancing.ROUND_ROBIN)
    near = tuple(Endpoint(f"10.0.0.{n}", 80) for n in (1, 2, 3))
    far = tuple(Endpoint(f"10.1.0.{n}", 80, priority=1) for n in (1, 2, 3))
    policy = RetryPolicy(attempts=3, on=frozenset({"5xx"}), retry_remote_localities=True)
    given = snapshot({"reviews:9080": [route(forward("c", retry=policy))]}, {"c": (cluster, [])})
    given = replace(given, assignments=(LoadAssignment("c", near + far),))
    run = Run(request(), context(given), responded(503))
    assert [send.endpoint.priority for send in run.sends] == [0, 0, 1, 1]


# Deadlines


def test_a_call_whose_caller_has_gone_is_not_started_at_all() -> None:
    """Not routed, not delayed, not mirrored: one answer, 504."""
    clock = Clock()
    slow = Fault(delay=FaultDelay(7.0, ALWAYS))
    given = snapshot({"reviews:9080": [route(forward("c", mirrors=(Mirror("c"),)), fault=slow)]}, {"c": ONE})
    late = Run(request(), context(given, clock, deadline=clock.now))
    assert [type(step).__name__ for step in late.steps] == ["Reply"]
    assert (late.reply.status, late.reply.flag) == (504, "UT")
    soon = Run(request(), context(given, clock, deadline=clock.now + 2.0), clock=clock)
    assert soon.waits == [2.0]
    assert (soon.reply.status, soon.sends, soon.mirrors) == (504, [], [])


def test_the_body_has_the_deadline_and_the_idle_timeout() -> None:
    """For adapters, which read it."""
    clock = Clock()
    run = Run(request(), context(service("reviews:9080", ONE, timeout=3.0, idle_timeout=0.5), clock))
    assert isinstance(run.last, Deliver)
    assert (run.last.deadline, run.last.idle_timeout) == (clock.now + 3.0, 0.5)


def test_a_delay_is_flagged_on_what_it_delayed() -> None:
    """Envoy's DI, beside what else happened."""
    slow = Fault(delay=FaultDelay(7.0, ALWAYS))
    given = snapshot({"reviews:9080": [route(forward("c"), fault=slow)]}, {"c": ONE})
    for outcome, flag in (
        (responded(), "DI"),
        (failed("connect-failure"), "DI,UF"),
        (failed("client-timeout"), "DI,DC"),
    ):
        last = Run(request(), context(given), outcome).last
        assert last.flag == flag


# What stands before a call


def test_an_open_circuit_answers_at_once_and_tells_which_error_it_is() -> None:
    """503, UO, x-envoy-overloaded, nothing sent; in shadow mode the call goes on."""
    rules = BreakerRules(consecutive_failures=1, open_for=30.0)
    for shadow, sends in ((frozenset[str](), 0), (frozenset({"breaker"}), 1)):
        cluster = Cluster("c", breaker=rules, shadow=shadow)
        called = context(live(snapshot({"reviews:9080": [route(forward("c"))]}, {"c": (cluster, ONE)})))
        assert len(Run(request(), called, failed("client-timeout")).sends) == 1
        refused = Run(request(), called)
        assert len(refused.sends) == sends
        if not sends:
            assert (refused.reply.status, refused.reply.flag, refused.reply.error) == (503, "UO", CircuitOpen)
            assert ("x-envoy-overloaded", "true") in refused.reply.headers


@pytest.mark.parametrize(
    ("outcome", "counts"),
    [
        (responded(500), True),
        (failed("reset"), True),
        (failed("client-timeout"), True),
        (responded(404), False),
        (failed("local"), False),
    ],
)
def test_a_breaker_counts_how_a_call_ended_whatever_its_tries(outcome: Outcome, counts: bool) -> None:
    """One call, one verdict: two tries that failed before a good one are no failure."""
    cluster = Cluster("c", breaker=BreakerRules(consecutive_failures=1))
    policy = RetryPolicy(on=frozenset({"5xx"}))
    given = live(snapshot({"reviews:9080": [route(forward("c", retry=policy))]}, {"c": (cluster, ONE)}))
    called = context(given)
    Run(request(), called, responded(503), responded(503), responded(200))
    assert len(Run(request(), called, outcome).sends) >= 1
    assert (Run(request(), called).last.flag == "UO") is counts


def test_a_cancelled_call_says_nothing_to_the_breaker() -> None:
    """Neither good nor bad; and a half-open circuit gets its probe back."""
    clock = Clock()
    cluster = Cluster("c", breaker=BreakerRules(consecutive_failures=1, open_for=1.0, probes=1))
    given = live(snapshot({"reviews:9080": [route(forward("c"))]}, {"c": (cluster, ONE)}))
    called = context(given, clock)
    Run(request(), called, responded(503))
    clock.now += 2.0
    probe = outbound_call(request(), called)
    assert isinstance(next(probe), Send)
    assert Run(request(), called).last.flag == "UO"
    probe.close()
    assert isinstance(Run(request(), called).last, Deliver)


def test_a_generated_cookie_comes_with_the_response_and_keeps_its_endpoint() -> None:
    """Consistent hashing by a cookie that the client does not have yet."""
    ring = Cluster("c", load_balancing=LoadBalancing.RING_HASH)
    by_cookie = (HashPolicy("cookie", "session", ttl=0.0, path="/"),)
    many = [(f"10.0.0.{n}", 80) for n in range(8)]
    called = context(
        live(snapshot({"reviews:9080": [route(forward("c", hash_policies=by_cookie))]}, {"c": (ring, many)}))
    )
    first = Run(request(), called)
    assert isinstance(first.last, Deliver)
    ((name, cookie),) = first.last.headers[-1].add
    assert name == "set-cookie"
    for _ in range(5):
        again = Run(request(headers={"cookie": cookie.partition(";")[0]}), called)
        assert again.sends[0].endpoint == first.sends[0].endpoint
        assert isinstance(again.last, Deliver)
        assert again.last.headers == ()


def test_a_caller_that_finds_its_own_way_has_all_the_rules_but_an_endpoint() -> None:
    """No endpoint is needed, none is judged, nothing is mirrored; the limits hold."""
    limited = Cluster("c", limits=ConnectionLimits(max_requests=1))
    given = live(snapshot({"ratings:9080": [route(forward("c", mirrors=(Mirror("c"),)))]}, {"c": (limited, [])}))
    called = context(given, finds_its_way=True)
    run = Run(request("http://ratings:9080/"), called)
    assert (run.sends[0].endpoint, run.mirrors) == (Endpoint("ratings", 9080), [])
    assert Run(request("http://ratings:9080/"), called).last.flag == "UO"
    run.flow.close()


# Hedging


def hedged(delay: float = 0.1, attempts: int = 3, **fields: Any) -> Snapshot:
    cluster = fields.pop("cluster", Cluster("c"))
    action = forward("c", hedge=HedgePolicy(delay, attempts), **fields)
    return snapshot({"reviews:9080": [route(action)]}, {"c": (cluster, THREE)})


def raced(given: Snapshot, *pairs: tuple[Outcome, float], method: str = "GET") -> tuple[Timeline, Reply | Deliver]:
    clock = Clock()
    timeline = Timeline(request(method=method), context(given, clock), clock, answered(*pairs))
    last = timeline.run()
    assert last is not None
    timeline.flow.close()
    return timeline, last


def test_a_slow_call_is_sent_again_elsewhere_and_the_first_answer_wins() -> None:
    """After the delay, and again after another; each to an endpoint that has none of them."""
    timeline, last = raced(hedged(), (responded(), 9.0), (responded(), 9.0), (responded(), 0.05))
    assert [at - 1000.0 for at, _ in timeline.sent] == pytest.approx([0.0, 0.1, 0.2])
    assert len({send.endpoint for _, send in timeline.sent}) == 3
    assert isinstance(last, Deliver)
    assert (timeline.clock.now, timeline.lost) == (pytest.approx(1000.25), 2)


def test_a_call_that_is_fast_enough_is_sent_once() -> None:
    """Its answer is there before the delay has passed."""
    timeline, _ = raced(hedged(), (responded(), 0.09))
    assert (len(timeline.sent), timeline.lost) == (1, 0)


def test_what_must_not_be_carried_out_twice_is_not_hedged() -> None:
    """A POST, unless the policy allows to send it twice."""
    timeline, _ = raced(hedged(), (responded(), 9.0), method="POST")
    assert len(timeline.sent) == 1
    allowed = RetryPolicy(attempts=0, resend_unsafe=True)
    assert len(raced(hedged(retry=allowed), (responded(), 9.0), method="POST")[0].sent) == 1  # attempts: 0 is no policy
    allowed = RetryPolicy(resend_unsafe=True)
    assert len(raced(hedged(retry=allowed), (responded(), 9.0), method="POST")[0].sent) == 3


def test_hedges_stay_inside_the_retry_budget() -> None:
    """One place, one hedge."""
    one = Cluster("c", limits=ConnectionLimits(max_retries=1))
    timeline, _ = raced(hedged(cluster=one), (responded(), 9.0))
    assert len(timeline.sent) == 2


def test_a_server_that_fails_fast_does_not_win() -> None:
    """Its answer counts only when no other attempt is left."""
    timeline, last = raced(hedged(), (responded(), 0.5), (responded(503), 0.01))
    assert isinstance(last, Deliver)
    assert timeline.clock.now == pytest.approx(1000.5)
    assert last.flag == ""
    timeline, _ = raced(hedged(attempts=2), (responded(503), 0.15), (responded(500), 0.1))
    assert timeline.clock.now == pytest.approx(1000.2)


def test_a_bad_answer_starts_no_hedge_but_what_the_retry_policy_says() -> None:
    """With its pause; the retries themselves are not hedged."""
    policy = RetryPolicy(attempts=2, on=frozenset({"5xx"}))
    timeline, last = raced(hedged(retry=policy), (responded(503), 0.0), (responded(), 9.0))
    assert (len(timeline.sent), len(timeline.waits), timeline.lost) == (2, 1, 0)
    assert isinstance(last, Deliver)


def test_a_hedged_call_ends_at_its_deadline() -> None:
    """504, and what is out has lost."""
    timeline, last = raced(hedged(timeout=0.25), (responded(), 9.0))
    assert (last.flag, timeline.clock.now) == ("UT", pytest.approx(1000.25))
    assert [send.timeout for _, send in timeline.sent] == pytest.approx([0.25, 0.15, 0.05])


def test_who_has_lost_is_counted_until_it_is_over() -> None:
    """An attempt on a thread can't be interrupted; least request sees that its endpoint is still busy with it."""
    clock = Clock()
    given = live(hedged())
    cluster = given.clusters["c"]
    flow = outbound_call(request(), context(given, clock))
    first = next(flow)
    assert isinstance(first, Race)
    clock.now += 0.1
    second = flow.send(None)
    assert isinstance(second, Race)
    assert (first.ended is not None, second.ended is not None) == (True, True)
    assert isinstance(flow.send(Finished(1, responded())), Win)
    assert isinstance(next(flow), Deliver)
    assert (sum(t.state.in_flight for t in cluster.targets), cluster.state.retries) == (2, 1)
    flow.close()
    assert (sum(t.state.in_flight for t in cluster.targets), cluster.state.retries) == (1, 0)
    assert first.ended is not None
    first.ended()
    assert sum(t.state.in_flight for t in cluster.targets) == 0
