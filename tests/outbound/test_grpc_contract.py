"""What gRPC calls through the mesh do, over real sockets: one suite of claims for channels and for interceptors, for
blocking calls, futures and asyncio."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_peers import FACES, Face, GrpcPeer, face

import meshlib
from certificates import TestCA
from meshlib.mesh import Mesh
from meshlib.model import (
    Cluster,
    ConnectionLimits,
    Fault,
    FaultAbort,
    FaultDelay,
    HeaderOperations,
    LimitKey,
    OutlierDetection,
    Quota,
    QuotaService,
    RateLimit,
    RetryBudget,
    RetryPolicy,
)
from meshlib.outbound.grpc_terms import Call, Terms
from meshlib.policy import propagation
from meshlib.policy.steps import Send
from meshlib.telemetry.label_sets import LABELS
from snapshots import Counted, counted, forward, mesh, publish, route, service, snapshot

TARGET = "ratings:9080"
OF_CHANNELS = tuple(name for name in FACES if "channel" in name)
Open = Callable[..., Face]


@pytest.fixture
def here() -> Iterator[Mesh]:
    made = mesh()
    yield made
    made.close()


@pytest.fixture
def peer() -> Iterator[GrpcPeer]:
    with GrpcPeer() as made:
        yield made


@pytest.fixture
def open_face(here: Mesh, peer: GrpcPeer) -> Iterator[Open]:
    faces = []

    def make(name: str, **options: Any) -> Face:
        faces.append(face(name, here, TARGET, peer, **options))
        return faces[-1]

    yield make
    for each in faces:
        each.close()


every_face = pytest.mark.parametrize("name", FACES)
every_channel = pytest.mark.parametrize("name", OF_CHANNELS)


def raised(call: Callable[..., Any], *arguments: Any, **terms: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **terms)
    return caught.value


@every_face
def test_all_four_arities_answer(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """Unary and streams, both ways, and metadata with them."""
    publish(here, service(TARGET, [peer.address]))
    call = open_face(name)
    sent = (("x-own", "1"), ("x-raw-bin", b"\x00\xff"))
    assert call.unary(b"a", metadata=sent) == b"peer:a"
    assert call.stream(b"a") == [b"0", b"1", b"2"]
    assert call.collect([b"a", b"b"]) == b"peer:a,b"
    assert call.echo([b"a", b"b", b"c"]) == [b"a", b"b", b"c"]
    assert (peer.metadata[0]["x-own"], peer.metadata[0]["x-raw-bin"]) == ("1", b"\x00\xff")
    assert call.metadata(b"a")["x-peer"] == "peer"


@every_face
def test_a_status_of_the_server_is_raised_as_it_came(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """Code, words and trailing metadata; it is an answer, so no MeshError."""
    publish(here, service(TARGET, [peer.address]))
    call = open_face(name)
    for arity in (call.unary, call.stream):
        error = raised(arity, b"status NOT_FOUND")
        assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "as asked")
        assert dict(tuple(error.trailing_metadata())) == {"x-reason": "asked for", "x-raw-bin": b"\x00\xff"}
        assert not isinstance(error, meshlib.MeshError)


@every_face
def test_calls_are_counted_with_their_grpc_status(name: str, peer: GrpcPeer) -> None:
    """As Istio's: protocol grpc, HTTP 200, and gRPC's own status in a label of its own."""
    with mesh(access_log="text") as here:  # so that somebody observes
        publish(here, service(TARGET, [peer.address]))
        call = face(name, here, TARGET, peer)
        try:
            call.unary(b"a")
            call.stream(b"a")
            raised(call.unary, b"status NOT_FOUND")
            publish(here, service(TARGET, []))
            if name in OF_CHANNELS:
                raised(call.unary, b"a")
        finally:
            call.close()
        assert here.telemetry is not None
        found = {}
        for each in here.telemetry.recorder.series():
            labels = dict(zip(LABELS, each.labels, strict=True))
            assert (labels["request_protocol"], labels["response_code"]) == ("grpc", "200")
            found[labels["grpc_response_status"], labels["response_flags"]] = each.count
        assert found == {("0", "-"): 2, ("5", "-"): 1} | ({("14", "UH"): 1} if name in OF_CHANNELS else {})


@every_face
def test_what_fails_before_the_first_message_is_tried_again(
    name: str, open_face: Open, here: Mesh, peer: GrpcPeer
) -> None:
    """By the status that the policy names, in every arity."""
    publish(here, service(TARGET, [peer.address], retry=RetryPolicy(attempts=2)))
    call = open_face(name)
    for arity, request in ((call.unary, b"fail 1"), (call.stream, b"fail 1"), (call.unary, b"fail 2")):
        peer.requests.clear()
        arity(request)
        assert len(peer.requests) == 1 + int(request[-1:])
    peer.requests.clear()
    more = [b"more"] * 3
    assert call.collect([b"fail 1", *more]) == b",".join((b"peer:fail 1", *more))
    peer.requests.clear()
    assert call.echo([b"fail 1", *more]) == [b"fail 1", *more]
    peer.requests.clear()
    assert raised(call.unary, b"status UNAVAILABLE").code() is grpc.StatusCode.UNAVAILABLE
    assert len(peer.requests) == 3
    peer.requests.clear()
    assert raised(call.unary, b"status INTERNAL").code() is grpc.StatusCode.INTERNAL
    assert len(peer.requests) == 1


@every_face
def test_the_servers_pushback_is_heeded(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """So many milliseconds, or not at all."""
    publish(here, service(TARGET, [peer.address], retry=RetryPolicy(attempts=2)))
    call = open_face(name)
    began = time.monotonic()
    assert call.unary(b"pushback 300") == b"peer:pushback 300"
    assert time.monotonic() - began >= 0.3
    assert raised(call.unary, b"pushback -1").code() is grpc.StatusCode.UNAVAILABLE
    assert peer.requests.count(b"pushback -1") == 1


@every_face
def test_a_spent_budget_ends_the_tries(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """Of which no part is left for retries, in every arity."""
    none = Cluster(TARGET, retry_budget=RetryBudget(0.0, 0))
    publish(here, service(TARGET, [peer.address], cluster=none, retry=RetryPolicy(attempts=2)))
    call = open_face(name)
    arities = (call.unary, call.stream, lambda request: call.collect([request]), lambda request: call.echo([request]))
    for number, arity in enumerate(arities, 1):
        assert raised(arity, b"status UNAVAILABLE").code() is grpc.StatusCode.UNAVAILABLE
        assert len(peer.requests) == number


@every_channel
def test_what_is_tried_again_is_the_routes_word_alone(
    name: str, open_face: Open, here: Mesh, peer: GrpcPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of a service config, which a program may bring along: two layers of three tries would make nine."""

    def refuse(request: bytes, context: Any) -> None:
        peer.requests.append(request)
        context.abort(grpc.StatusCode.UNAVAILABLE, "without a head, or gRPC would try nothing again")

    monkeypatch.setattr(peer, "_met", refuse)
    publish(here, service(TARGET, [peer.address]))
    policy = {"maxAttempts": 3, "initialBackoff": "0.01s", "maxBackoff": "0.01s", "backoffMultiplier": 1}
    policy["retryableStatusCodes"] = ["UNAVAILABLE"]
    config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})
    call = open_face(name, options=(("grpc.service_config", config),))
    assert raised(call.unary, b"status UNAVAILABLE").code() is grpc.StatusCode.UNAVAILABLE
    assert peer.requests == [b"status UNAVAILABLE"]


@every_face
def test_a_stream_that_has_begun_is_not_tried_again(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """The server dies after its first message: the caller keeps that one and learns of the end."""
    publish(here, service(TARGET, [peer.address], retry=RetryPolicy(attempts=2)))
    error = raised(open_face(name).stream, b"die")
    assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert peer.requests == [b"die"]


@every_face
def test_a_call_ends_at_its_own_deadline(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """In every arity, with the status that gRPC has for it; it is not tried again."""
    publish(here, service(TARGET, [peer.address], retry=RetryPolicy(attempts=2, on=frozenset({"deadline-exceeded"}))))
    call = open_face(name)
    assert raised(call.unary, b"hold", timeout=0.2).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert raised(call.stream, b"hold", timeout=0.2).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert raised(call.collect, [b"hold"], timeout=0.2).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert raised(call.echo, [b"hold"], timeout=0.2).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(peer.requests) <= 4  # fewer, where the machine is so slow that one comes late


@every_face
def test_a_route_has_a_timeout(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """As in Envoy for the whole response, so a stream that has begun ends with it, too."""
    publish(here, service(TARGET, [peer.address], timeout=0.3))
    call = open_face(name)
    for arity, request in ((call.unary, b"hold"), (call.stream, b"hold"), (call.stream, b"stall")):
        assert raised(arity, request).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert isinstance(raised(call.unary, b"hold"), meshlib.MeshError)


@every_face
def test_each_try_has_a_timeout_until_its_first_message(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """perTryTimeout: a stream that has begun goes on without it."""
    retry = RetryPolicy(attempts=1, per_try_timeout=0.3, on=frozenset({"gateway-error"}), resend_unsafe=True)
    publish(here, service(TARGET, [peer.address], timeout=20.0, retry=retry))
    call = open_face(name)
    for arity in (call.unary, call.stream):
        peer.requests.clear()
        assert raised(arity, b"hold").code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(peer.requests) == 2
    release = threading.Timer(0.8, peer.released.set)
    release.start()
    assert call.first_of(b"stall", lambda: None) == [b"0", b"1", b"2"]
    release.join()


@every_face
def test_a_call_can_be_cancelled(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """While the server works on it; the server learns of it, and nothing stays counted as in flight."""
    publish(here, service(TARGET, [peer.address]))
    call = open_face(name)

    def met() -> None:
        while not peer.requests:
            time.sleep(0.01)

    assert call.cancelled(b"hold", met) is grpc.StatusCode.CANCELLED
    assert peer.ended.acquire(timeout=20)
    cluster = here.live.cluster(TARGET)
    assert cluster is not None
    while cluster.state.requests:
        time.sleep(0.01)


@every_face
def test_faults_are_injected(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """A delay, and an abort with a gRPC status or an HTTP one; the server sees nothing of an abort."""
    abort = Fault(abort=FaultAbort(1_000_000, 503, grpc_status=8))
    publish(here, snapshot({TARGET: [route(forward(TARGET), fault=abort)]}, {TARGET: [peer.address]}))
    call = open_face(name)
    for arity in (call.unary, call.stream):
        error = raised(arity, b"a")
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(error, meshlib.errors.FaultInjected)
    abort = Fault(delay=FaultDelay(0.2, 1_000_000), abort=FaultAbort(1_000_000, 503))
    publish(here, snapshot({TARGET: [route(forward(TARGET), fault=abort)]}, {TARGET: [peer.address]}))
    began = time.monotonic()
    assert raised(call.unary, b"a").code() is grpc.StatusCode.UNAVAILABLE
    assert raised(call.stream, b"a").code() is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - began >= 0.4
    assert peer.requests == []


@every_face
def test_limits_turn_calls_away(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """Over max_requests: UNAVAILABLE, as a sidecar answers; and the place is free again after the call."""
    limited = Cluster(TARGET, limits=ConnectionLimits(max_requests=1))
    publish(here, service(TARGET, [peer.address], cluster=limited))
    call, other = open_face(name), open_face(name)

    def second() -> None:
        error = raised(other.unary, b"a")
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert isinstance(error, meshlib.errors.Overflow)
        assert ("x-envoy-overloaded", "true") in tuple(error.trailing_metadata())
        peer.released.set()

    assert call.first_of(b"stall", second) == [b"0", b"1", b"2"]
    while True:  # a stream's end is known to gRPC's thread a moment later
        try:
            assert call.unary(b"a") == b"peer:a"
            break
        except meshlib.errors.Overflow:
            time.sleep(0.01)


@every_face
def test_a_rate_limit_turns_calls_away(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """RESOURCE_EXHAUSTED, with the limit's headers as metadata; the server never sees it."""
    limited = Cluster(TARGET, rate_limits=(RateLimit("one", 1, 1, 3600.0),))
    publish(here, service(TARGET, [peer.address], cluster=limited))
    call = open_face(name)
    assert call.unary(b"a") == b"peer:a"
    error = raised(call.unary, b"a")
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert isinstance(error, meshlib.RateLimited)
    assert {("x-envoy-ratelimited", "true"), ("x-ratelimit-remaining", "0")} <= set(error.trailing_metadata())
    assert len(peer.requests) == 1


@every_face
def test_a_quota_turns_calls_away(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """Whoever counts is asked in every form, of streams too; what he adds is metadata, both ways."""
    quota = Quota("shared", QuotaService("envoy", "counts:1", "shop"), ((LimitKey("header", ":path", "method"),),))
    publish(here, service(TARGET, [peer.address], cluster=Cluster(TARGET, quotas=(quota,))))
    counted(here, by := Counted(2))
    call = open_face(name)
    assert call.unary(b"a") == b"peer:a"
    assert peer.metadata[0]["x-counted"] == "yes"
    assert call.stream(b"a") == [b"0", b"1", b"2"]
    error = raised(call.unary, b"a")
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert {("x-envoy-ratelimited", "true"), ("x-told", "yes")} <= set(error.trailing_metadata())
    assert len(by.asked) == 3
    assert len(peer.requests) == 2


@every_face
def test_metadata_is_changed_both_ways(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """A route's header operations are operations on metadata."""
    operations = {
        "request_headers": HeaderOperations(set=(("x-set", "by the route"),), remove=("x-own",)),
        "response_headers": HeaderOperations(add=(("x-added", "1"),), remove=("x-peer",)),
    }
    publish(here, snapshot({TARGET: [route(forward(TARGET), **operations)]}, {TARGET: [peer.address]}))
    found = open_face(name).metadata(b"a", metadata=(("x-own", "1"),))
    assert (peer.metadata[0].get("x-own"), peer.metadata[0]["x-set"]) == (None, "by the route")
    assert (found.get("x-peer"), found["x-added"]) == (None, "1")


@every_face
def test_what_a_request_brought_goes_along(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """Trace context and deadline of the request being served; the deadline is gRPC's own."""
    publish(here, service(TARGET, [peer.address]))
    call = open_face(name)
    trace = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    carried = propagation.Carried(((b"traceparent", trace),), time.monotonic() + 0.4, time.monotonic)
    token = propagation.current.set(carried)
    try:
        assert call.unary(b"a") == b"peer:a"
        assert raised(call.unary, b"hold").code() is grpc.StatusCode.DEADLINE_EXCEEDED
    finally:
        propagation.current.reset(token)
    assert peer.metadata[0]["traceparent"] == trace.decode()


@every_face
def test_large_messages_and_compression(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """4 MB is gRPC's own limit for what is received, and an option of the channel; compressed or not."""
    publish(here, service(TARGET, [peer.address]))
    large = b"\x01" * (4 * 1024 * 1024 - 64)
    assert len(open_face(name).unary(large, compression=grpc.Compression.Gzip)) == len(large) + 5
    limited = open_face(name, options=(("grpc.max_receive_message_length", 1000),))
    assert raised(limited.unary, b"\x01" * 1001).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@every_channel
def test_ones_own_tls_is_for_where_the_destination_says_nothing(name: str, here: Mesh) -> None:
    """The certificate must bear the name that the target has, whatever address is called; an option of one's own may
    name another."""
    ca = TestCA()
    shown = ca.credentials("ratings", dns=("ratings",))
    with GrpcPeer(credentials=grpc.ssl_server_credentials([(shown.private_key, shown.certificate_chain)])) as peer:
        publish(here, snapshot({each: [route(forward("c"))] for each in (TARGET, "other:9080")}, {"c": [peer.address]}))
        credentials = grpc.ssl_channel_credentials(ca.root)
        override = (("grpc.ssl_target_name_override", "ratings"),)
        other = "other:9080"
        for target, options, is_verified in ((TARGET, (), True), (other, (), False), (other, override, True)):
            call = face(name, here, target, peer, options=options, credentials=credentials)
            if is_verified:
                assert call.every(b"a") == [b"peer:a", b"0", b"peer:a", b"a"]
            else:
                assert raised(call.unary, b"a").code() is grpc.StatusCode.UNAVAILABLE
            call.close()


@every_channel
def test_hosts_outside_of_the_mesh_are_called_as_ever(name: str, here: Mesh) -> None:
    """By the target's own address and name, with one's own TLS."""
    ca = TestCA()
    shown = ca.credentials("ratings", dns=("localhost",))
    credentials = grpc.ssl_channel_credentials(ca.root)
    with (
        GrpcPeer(credentials=grpc.ssl_server_credentials([(shown.private_key, shown.certificate_chain)])) as secured,
        GrpcPeer() as plain,
    ):
        options = (("grpc.enable_http_proxy", 0),)
        for call in (
            face(name, here, f"localhost:{secured.port}", secured, options=options, credentials=credentials),
            face(name, here, f"127.0.0.1:{plain.port}", plain, options=options),
        ):
            assert call.every(b"a") == [b"peer:a", b"0", b"peer:a", b"a"]
            call.close()


@every_channel
def test_no_endpoint_is_unavailable_and_a_patient_call_waits(
    name: str, open_face: Open, here: Mesh, peer: GrpcPeer
) -> None:
    """UH without wait_for_ready; with it the call goes out once there is an endpoint."""
    publish(here, service(TARGET, []))
    call = open_face(name)
    for arity in (call.unary, call.stream):
        error = raised(arity, b"a")
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert isinstance(error, meshlib.errors.NoHealthyEndpoint)
        assert raised(arity, b"a", wait_for_ready=True, timeout=0.2).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    comes = threading.Timer(0.2, lambda: publish(here, service(TARGET, [peer.address])))
    comes.start()
    assert call.unary(b"a", wait_for_ready=True, timeout=20) == b"peer:a"
    comes.join()


@every_channel
def test_an_endpoint_that_is_not_there_is_passed_over(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """connect-failure is tried elsewhere, in every arity; alone it is a failed connection."""
    publish(here, service(TARGET, [("127.0.0.1", 1), peer.address], retry=RetryPolicy(attempts=2)))
    call = open_face(name)
    for _ in range(4):
        assert call.every(b"a") == [b"peer:a", b"0", b"peer:a", b"a"]
    publish(here, service(TARGET, [("127.0.0.1", 1)]))
    error = raised(call.unary, b"a")
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert isinstance(error, meshlib.errors.UpstreamConnectionFailure)


@every_channel
def test_an_endpoint_that_fails_is_ejected(name: str, open_face: Open, here: Mesh, peer: GrpcPeer) -> None:
    """A gRPC status counts as the HTTP status that Envoy makes of it: INTERNAL is a 500, NOT_FOUND is none."""
    rules = OutlierDetection(consecutive_5xx=2, max_ejection_percent=100)
    publish(here, service(TARGET, [peer.address], cluster=Cluster(TARGET, outlier_detection=rules)))
    call = open_face(name)
    for status in ("NOT_FOUND", "INTERNAL", "NOT_FOUND", "INTERNAL"):
        raised(call.unary, b"status " + status.encode())
    assert call.unary(b"a") == b"peer:a"
    for _ in range(2):
        raised(call.stream, b"status INTERNAL")
    cluster = here.live.cluster(TARGET)
    assert cluster is not None
    assert cluster.state.ejected == 1


def test_judging_a_failure_waits_for_no_metadata(here: Mesh) -> None:
    """gRPC tells of a call's end, now and then, before it tells of its initial metadata, on one and the same thread:
    whoever asks for these there waits for ever."""

    class Failed:
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

        def details(self) -> str:
            return "not now"

        def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
            return (("grpc-retry-pushback-ms", "10"),)

    publish(here, service(TARGET, [("127.0.0.1", 1)]))
    call = Call(here, TARGET, "/a/b", Terms())
    step = next(call.flow())
    assert isinstance(step, Send)
    outcome = call.outcome(Failed(), step, time.monotonic())
    assert (outcome.status, outcome.grpc_status) == (503, 14)
    assert outcome.headers is not None
    assert outcome.headers.get("grpc-retry-pushback-ms") == "10"
