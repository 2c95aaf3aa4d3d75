"""Whom does a rate limit turn away, and what is told? In calls that go out, and in those that come in."""

from __future__ import annotations

import random
from dataclasses import replace

import httpx
import pytest
from flows import Run, request

import meshlib
from meshlib.model import (
    UNKNOWN_PEER,
    Access,
    Cluster,
    HeaderMatch,
    Inbound,
    LimitKey,
    Peer,
    RateLimit,
    Snapshot,
    SpiffeId,
    StringMatch,
)
from meshlib.policy.admission import ALLOW, Allow, Deny
from meshlib.policy.call import CallContext
from meshlib.policy.guard import Guard
from meshlib.policy.live import compile_live
from meshlib.policy.rate_limit import Limited, Limiter
from meshlib.policy.steps import Deliver, Reply
from peers import Peer as Server
from snapshots import mesh, service

TWO = RateLimit("two", 2, 2, 60.0, origin="RateLimit default/two (a.yaml:1)")
BY_USER = RateLimit("by-user", 1, 1, 60.0, (LimitKey("header", "end-user"),))


def one_service(*limits: RateLimit, address: tuple[str, int] = ("10.0.0.1", 9080)) -> Snapshot:
    return service("reviews:9080", [address], cluster=Cluster("reviews:9080", rate_limits=limits))


def test_one_call_too_many_is_answered_429_and_never_sent() -> None:
    """With Envoy's flag and headers, and the limit that said so."""
    live = compile_live(one_service(TWO), None, random.Random(1))
    context = CallContext(lambda: live, lambda: 100.0, random.Random(1))
    steps = [Run(request(), context).last for _ in range(3)]
    assert [type(step) for step in steps] == [Deliver, Deliver, Reply]
    refused = steps[-1]
    assert isinstance(refused, Reply)
    assert (refused.status, refused.flag, refused.body) == (429, "RL", b"local_rate_limited")
    assert dict(refused.headers) == {
        "x-envoy-ratelimited": "true",
        "x-ratelimit-limit": "2, 2;w=60",
        "x-ratelimit-remaining": "0",
        "x-ratelimit-reset": "30",
        "retry-after": "30",
    }
    assert "RateLimit default/two (a.yaml:1)" in refused.reason


def test_a_new_configuration_keeps_what_was_taken() -> None:
    """An edit somewhere else must not give everybody a full bucket; an edit of the limit does."""
    first = compile_live(one_service(TWO), None, random.Random(1))
    limiter = first.clusters["reviews:9080"].limiter
    assert limiter is not None
    limiter.take(request(), None, 0.0)
    more = compile_live(one_service(TWO, BY_USER), first, random.Random(1)).clusters["reviews:9080"].limiter
    assert more is not None
    assert [(use.limit.name, use.allowed) for use in more.uses()] == [("two", 1), ("by-user", 0)]


def test_a_limit_is_the_same_wherever_it_is_written() -> None:
    """A file that gets another name fills nobody's bucket; two limits that say the same keep one each."""
    first = Limiter([TWO, TWO])
    for _ in range(2):
        first.take(request(), None, 0.0)
    moved = replace(TWO, origin="RateLimit default/two (b.yaml)")
    second = Limiter([moved, moved], known=first.known)
    assert [(use.limit.origin, use.allowed) for use in second.uses()] == [(moved.origin, 2)] * 2
    assert isinstance(second.take(request(), None, 0.0), Limited)
    assert [use.limited for use in second.uses()] == [1, 0]


def test_a_limit_may_be_for_the_calls_that_no_other_concerns() -> None:
    """Envoy's default bucket, where it is not always consumed."""
    theirs = RateLimit("jason", 1, 1, 60.0, (LimitKey("header", "end-user", value="jason"),), origin="o")
    limiter = Limiter([theirs, RateLimit("others", 1, 1, 60.0, origin="o", otherwise=True)])

    def asked(user: str) -> str:
        found = limiter.take(request(headers={"end-user": user}), None, 0.0)
        return found.limit.name if isinstance(found, Limited) else ""

    assert [asked(user) for user in ("jason", "jason", "anna", "bert")] == ["", "jason", "", "others"]


def test_ports_and_hosts_narrow_a_limit() -> None:
    """As the port and the virtual host of an EnvoyFilter do."""
    limiter = Limiter([RateLimit("narrow", 1, 1, 60.0, port=8080, hosts=("*.example",))])
    at, elsewhere = Peer(local_port=8080), Peer(local_port=8081)
    calls = [("a.example:80", elsewhere), ("a.test", at), ("a.example", at), ("b.example:8080", at)]
    found = [isinstance(limiter.take(request(f"http://{host}/"), peer, 0.0), Limited) for host, peer in calls]
    assert found == [False, False, False, True]


def test_pseudo_headers_and_conditions_describe_calls() -> None:
    """`:path` with its query, as on the wire; `match` has one bucket for all that fit."""
    path = HeaderMatch(":path", StringMatch("prefix", "/api", ignore_case=True))
    limiter = Limiter(
        [
            RateLimit("path", 1, 1, 60.0, (LimitKey("header", ":path"),), ("GET",)),
            RateLimit("api", 1, 1, 60.0, (LimitKey("match", value="api", headers=(path,)),), ("POST",)),
        ]
    )
    calls = [
        ("GET", "/a?x"),
        ("GET", "/a"),
        ("GET", "/a?x"),
        ("POST", "/other"),
        ("POST", "/API/1"),
        ("POST", "/api/2"),
    ]
    found = [isinstance(limiter.take(request(f"http://a{path}", method), None, 0.0), Limited) for method, path in calls]
    assert found == [False, False, True, False, False, True]


def test_keys_tell_callers_apart_and_who_has_none_is_not_limited() -> None:
    """Envoy skips a descriptor that can't be built."""
    limiter = Limiter([BY_USER])

    def asked(user: str | None) -> bool:
        headers = {"end-user": user} if user else {}
        return isinstance(limiter.take(request(headers=headers), None, 0.0), Limited)

    assert [asked(user) for user in ("jason", "jason", "anna", None, None)] == [False, True, False, False, False]


def test_methods_and_paths_narrow_a_limit() -> None:
    """Other calls take no token."""
    limiter = Limiter([RateLimit("posts", 1, 1, 60.0, (), ("POST",), "/api/")])
    calls = [("GET", "/api/x"), ("POST", "/x"), ("POST", "/api/x"), ("POST", "/api/y")]
    asked = [request(f"http://a{path}", method) for method, path in calls]
    found = [isinstance(limiter.take(each, None, 0.0), Limited) for each in asked]
    assert found == [False, False, False, True]


def test_a_limit_in_shadow_counts_and_lets_pass() -> None:
    """For a safe roll-out."""
    limiter = Limiter([RateLimit("shy", 1, 1, 60.0, shadow=True, answers=True)])
    assert [limiter.take(request(), None, 0.0) for _ in range(3)] == [None] * 3
    assert [(use.allowed, use.limited) for use in limiter.uses()] == [(1, 2)]


def inbound(*limits: RateLimit) -> Guard:
    return Guard([Inbound("inbound", access=Access(rate_limits=limits))])


def test_each_identity_that_calls_has_a_quota() -> None:
    """By the certificate, not by what a header says; plaintext callers have no identity to be counted by."""
    guard = inbound(RateLimit("per-caller", 1, 1, 60.0, (LimitKey("principal"),)))
    one, two = (Peer(SpiffeId.of("cluster.local", "default", name), True) for name in ("a", "b"))
    found = [guard.admit(request(), peer, 0.0, 1.0) for peer in (one, one, two, UNKNOWN_PEER, UNKNOWN_PEER)]
    assert [isinstance(each, Deny) for each in found] == [False, True, False, False, False]
    denied = found[1]
    assert isinstance(denied, Deny)
    assert (denied.status, denied.flag, denied.grpc_status) == (429, "RL", 8)
    assert (b"x-envoy-ratelimited", b"true") in denied.headers


def test_a_quota_tells_what_is_left_where_it_is_asked_to() -> None:
    """On good answers too."""
    guard = inbound(RateLimit("told", 2, 2, 60.0, answers=True))
    verdict = guard.admit(request(), UNKNOWN_PEER, 0.0, 1.0)
    assert isinstance(verdict, Allow)
    assert (b"x-ratelimit-remaining", b"1") in verdict.answer


def test_a_call_that_goes_out_is_told_what_is_left_too() -> None:
    """`answers` holds in both directions."""
    live = compile_live(one_service(replace(TWO, answers=True)), None, random.Random(1))
    step = Run(request(), CallContext(lambda: live, lambda: 100.0, random.Random(1))).last
    assert isinstance(step, Deliver)
    assert ("x-ratelimit-remaining", "1") in [pair for each in step.headers for pair in each.add]


@pytest.mark.parametrize("path", ["//reviews/1", "/%72eviews/1", "/x/../reviews/1", "/reviews%2f1", "/reviews/1?x=2"])
@pytest.mark.parametrize(
    "limit", [RateLimit("a", 1, 1, 60.0, path_prefix="/reviews"), RateLimit("b", 1, 1, 60.0, (LimitKey("path"),))]
)
def test_another_spelling_of_a_path_has_no_quota_of_its_own(path: str, limit: RateLimit) -> None:
    """A quota that `%72` gets around is none."""
    guard = inbound(limit)
    assert isinstance(guard.admit(request()._replace(path="/reviews/1"), UNKNOWN_PEER, 1.0, 5.0), Allow)
    assert isinstance(guard.admit(request()._replace(path=path), UNKNOWN_PEER, 1.0, 5.0), Deny)


def test_ports_with_the_same_limits_share_them() -> None:
    """A gateway's limit is one of all its doors; a new configuration keeps what was taken by any of them."""
    limited = Access(rate_limits=(TWO,))
    first = Guard((), [(80, limited), (443, limited)])
    assert isinstance(first.admit(request(), Peer(local_port=80), 0.0, 1.0), Allow)
    second = Guard((), [(443, limited), (8080, Access(rate_limits=(TWO, BY_USER)))], first)
    found = [second.admit(request(), Peer(local_port=port), 0.0, 1.0) for port in (443, 443)]
    assert [isinstance(each, Deny) for each in found] == [False, True]


def test_only_asking_takes_no_token() -> None:
    """What-if questions are no calls."""
    guard = inbound(RateLimit("one", 1, 1, 60.0))
    assert [guard.admit(request(), UNKNOWN_PEER, 0.0) for _ in range(3)] == [ALLOW] * 3
    assert guard.admit(request(), UNKNOWN_PEER, 0.0, 1.0) is ALLOW


@pytest.mark.parametrize("library", ["httpx", "requests"])
def test_clients_get_the_answer_that_a_sidecar_would_give(library: str) -> None:
    """A response, not an exception; the third is never seen by the server."""
    with Server() as server, mesh(one_service(TWO, address=server.address)) as made:
        if library == "httpx":
            with made.Client() as client:
                found = [client.get("http://reviews:9080/") for _ in range(3)]
        else:
            import requests

            with requests.Session() as session:
                session.mount("http://", made.requests_adapter())
                found = [session.get("http://reviews:9080/") for _ in range(3)]
        assert [each.status_code for each in found] == [200, 200, 429]
        assert found[-1].headers["x-envoy-ratelimited"] == "true"
        assert len(server.received) == 2


def test_a_function_under_outbound_raises_rate_limited() -> None:
    """It can't be given a response."""
    with mesh(one_service(TWO)) as made:

        @made.outbound("reviews:9080")
        def get_reviews() -> str:
            return "reviews"

        assert [get_reviews(), get_reviews()] == ["reviews"] * 2
        with pytest.raises(meshlib.RateLimited, match="two"):
            get_reviews()
    assert meshlib.RateLimited.status == httpx.codes.TOO_MANY_REQUESTS
