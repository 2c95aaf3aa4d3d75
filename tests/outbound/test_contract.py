"""What every adapter does, over real sockets: one suite of claims, run against each."""

from __future__ import annotations

import asyncio
import gzip
import pickle
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme
from adapters import ADAPTERS, Caller, caller

import meshlib
from meshlib.mesh import Mesh
from meshlib.model import (
    Cluster,
    ConnectionLimits,
    DirectResponse,
    Fault,
    FaultAbort,
    FaultDelay,
    HeaderMatch,
    HeaderOperations,
    LimitKey,
    LoadBalancing,
    Mirror,
    Quota,
    QuotaService,
    RateLimit,
    RetryPolicy,
    Rewrite,
    RouteMatch,
    StringMatch,
    UpstreamTls,
)
from meshlib.policy import propagation
from peers import Answer, Peer, Received, plain, refusing_port
from snapshots import Counted, counted, forward, mesh, publish, route, service, snapshot

URL = "http://reviews:9080/reviews/0"


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def here() -> Iterator[Mesh]:
    made = mesh()
    yield made
    made.close()


@pytest.fixture
def call(adapter: str, here: Mesh) -> Iterator[Caller]:
    with caller(adapter, here) as made:
        yield made


def test_a_name_of_the_mesh_reaches_its_endpoint_and_stays_in_the_host(call: Caller, here: Mesh) -> None:
    """No DNS knows `reviews`; only the address connected to changes."""
    with Peer() as peer:
        publish(here, service("reviews:9080", [peer.address]))
        response = call.get(URL + "?a=1", headers={"x-own": "1"})
        assert (response.status_code, response.text, response.url) == (200, "ok", URL + "?a=1")
        assert (peer.received[0].target, peer.received[0].header("host")) == ("/reviews/0?a=1", "reviews:9080")
        assert peer.received[0].header("x-own") == "1"
        assert [name for name, _ in peer.received[0].headers].count("host") == 1


def test_connections_are_kept_and_used_again(call: Caller, here: Mesh) -> None:
    """Ten calls, one connection."""
    with Peer() as peer:
        publish(here, service("reviews:9080", [peer.address]))
        for _ in range(10):
            assert call.get(URL).status_code == 200
        assert peer.connections == 1


def test_services_behind_one_address_share_no_connection(call: Caller, here: Mesh) -> None:
    """Limits and TLS are per service, so connections are."""
    with Peer() as peer:
        routes = {"a:80": [route(forward("a"))], "b:80": [route(forward("b"))]}
        publish(here, snapshot(routes, {"a": [peer.address], "b": [peer.address]}))
        call.get("http://a/")
        call.get("http://b/")
        assert {received.connection for received in peer.received} == {1, 2}


def test_a_header_beyond_ascii_arrives_byte_for_byte(call: Caller, here: Mesh) -> None:
    """UTF-8, as people write names."""
    with Peer() as peer:
        publish(here, service("reviews:9080", [peer.address]))
        call.get(URL, headers={"x-name": "Zoë".encode()})
        assert peer.received[0].header("x-name") == "Zoë".encode().decode("latin-1")


def test_many_calls_at_once_all_come_back(call: Caller, here: Mesh) -> None:
    """Each answer belongs to its request."""

    async def slow(received: Received) -> Answer:
        await asyncio.sleep(0)
        return Answer(body=received.target.encode())

    with Peer(slow) as peer:
        publish(here, service("reviews:9080", [peer.address]))
        answers = call.together([f"http://reviews:9080/{i}" for i in range(40)])
        assert [answer.text for answer in answers] == [f"/{i}" for i in range(40)]


def test_calls_are_spread_over_endpoints(call: Caller, here: Mesh) -> None:
    """Round robin over real servers."""
    with Peer() as one, Peer() as two:
        cluster = Cluster("c", load_balancing=LoadBalancing.ROUND_ROBIN)
        publish(here, service("reviews:9080", [one.address, two.address], cluster=cluster))
        for _ in range(10):
            call.get(URL)
        assert (len(one.received), len(two.received)) == (5, 5)


def test_the_servers_answer_comes_back_as_it_is(call: Caller, here: Mesh) -> None:
    """Status, repeated headers, and an encoded body that the client library decodes."""

    def compressed(_: Received) -> Answer:
        return Answer(
            404,
            gzip.compress(b"not here"),
            [("content-encoding", "gzip"), ("set-cookie", "a=1"), ("set-cookie", "b=2")],
        )

    with Peer(compressed) as peer:
        publish(here, service("reviews:9080", [peer.address]))
        response = call.get(URL)
        assert (response.status_code, response.text) == (404, "not here")
        assert response.every("set-cookie") == ["a=1", "b=2"]


def test_a_redirect_of_the_server_is_left_to_the_client(call: Caller, here: Mesh) -> None:
    """The mesh follows nothing."""
    with Peer(lambda _: Answer(302, headers=[("location", "/elsewhere")])) as peer:
        publish(here, service("reviews:9080", [peer.address]))
        assert call.get(URL).status_code == 302
        assert len(peer.received) == 1


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_every_method_goes_through(call: Caller, here: Mesh, method: str) -> None:
    """With the body that its caller gave, and no other framing."""
    with Peer() as peer:
        publish(here, service("reviews:9080", [peer.address]))
        body = b"x" * 100 if method in ("POST", "PUT", "PATCH") else None
        response = call.request(method, URL, content=body)
        assert response.status_code == 200
        received = peer.received[0]
        assert (received.method, received.body) == (method, body or b"")
        lengths = [name for name, _ in received.headers if name in ("content-length", "transfer-encoding")]
        assert len(lengths) <= 1


def test_a_streamed_upload_arrives_whole(call: Caller, here: Mesh) -> None:
    """Chunked, since no one knows its length."""
    with Peer() as peer:
        publish(here, service("reviews:9080", [peer.address]))
        assert call.upload(URL, [b"a" * 1000, b"b" * 1000]).status_code == 200
        assert peer.received[0].body == b"a" * 1000 + b"b" * 1000
        assert peer.received[0].header("transfer-encoding") == "chunked"


def test_a_response_streams_as_it_comes(call: Caller, here: Mesh) -> None:
    """The first chunk is there before the server has the second."""
    release: asyncio.Event

    async def answer(_: Received) -> Answer:
        nonlocal release
        release = asyncio.Event()

        async def chunks():  # type: ignore[no-untyped-def]
            yield b"first"
            await release.wait()
            yield b"second"

        return Answer(chunks=chunks())

    with Peer(answer) as peer:
        publish(here, service("reviews:9080", [peer.address]))

        def use(chunks: Iterator[bytes]) -> list[bytes]:
            first = next(chunks)
            peer.loop.call_soon_threadsafe(release.set)
            return [first, *chunks]

        assert call.stream(URL, use) == [b"first", b"second"]


def test_a_body_left_unread_frees_its_connection_and_its_count(call: Caller, here: Mesh) -> None:
    """Closing early closes the connection, which is not fit for another call."""
    with Peer(lambda _: Answer(chunks=[b"x" * 100_000] * 200)) as peer:
        publish(here, service("reviews:9080", [peer.address]))
        call.stream(URL, next)
        cluster = here.live.clusters["reviews:9080"]
        assert (cluster.state.requests, cluster.targets[0].state.in_flight) == (0, 0)
        peer.answer = plain
        assert call.get(URL).text == "ok"


def test_a_body_cut_short_raises_what_the_library_raises(call: Caller, here: Mesh) -> None:
    """Never a short answer taken for a whole one."""
    with Peer(lambda _: Answer(chunks=[b"part"], break_off=True)) as peer:
        publish(here, service("reviews:9080", [peer.address]))
        with pytest.raises(call.errors.cut) as caught:
            call.get(URL)
        assert isinstance(caught.value, meshlib.UpstreamReset)
        with pytest.raises(meshlib.UpstreamReset):
            call.stream(URL, list)


@pytest.mark.parametrize(
    "raw",
    [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\ncontent-le", b"", b"\x00" * 100, b"HTTP/1.1 abc OK\r\n\r\n"],
    ids=["another-protocol", "half-a-head", "nothing", "zeros", "no-status"],
)
def test_what_is_no_response_is_a_reset(call: Caller, here: Mesh, raw: bytes) -> None:
    """Whatever came instead: the library's error, and one class of ours."""
    with Peer(lambda _: Answer(raw=raw)) as peer:
        publish(here, service("reviews:9080", [peer.address]))
        with pytest.raises(call.errors.every) as caught:
            call.request("POST", URL, content=b"x")
        assert isinstance(caught.value, meshlib.UpstreamReset)
        assert (caught.value.endpoint, caught.value.flag) == (f"127.0.0.1:{peer.port}", "UC")


def test_a_body_shorter_than_its_length_is_not_taken_for_whole(call: Caller, here: Mesh) -> None:
    """The server promised ten bytes."""
    with Peer(lambda _: Answer(raw=b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort")) as peer:
        publish(here, service("reviews:9080", [peer.address]))
        with pytest.raises(call.errors.cut) as caught:
            call.get(URL)
        assert isinstance(caught.value, meshlib.UpstreamReset)
        cluster = here.live.clusters["reviews:9080"]
        assert (cluster.state.requests, cluster.targets[0].state.in_flight) == (0, 0)


def test_a_body_that_stalls_ends_with_the_clients_read_timeout(call: Caller, here: Mesh) -> None:
    """The head was there, so it is too late for another try."""
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\npart"
    with Peer(lambda _: Answer(raw=head, stall=True)) as peer:
        publish(here, service("reviews:9080", [peer.address], retry=RetryPolicy(on=frozenset({"5xx"}))))
        with pytest.raises(call.errors.late) as caught:
            call.get(URL, timeout=0.2)
        assert isinstance(caught.value, meshlib.UpstreamTimeout)
        assert len(peer.received) == 1
        cluster = here.live.clusters["reviews:9080"]
        assert (cluster.state.requests, cluster.targets[0].state.in_flight) == (0, 0)


def test_nobody_listening_is_the_librarys_connect_error(call: Caller, here: Mesh) -> None:
    """With the mesh's words in it: which host, which endpoint, which flag."""
    endpoint = ("127.0.0.1", refusing_port())
    publish(here, service("reviews:9080", [endpoint]))
    with pytest.raises(call.errors.connect, match=r"reviews:9080 at 127\.0\.0\.1:.*\[UF\]") as caught:
        call.get(URL)
    error = caught.value
    assert isinstance(error, meshlib.UpstreamConnectionFailure)
    assert (error.flag, error.endpoint, error.status) == ("UF", f"127.0.0.1:{endpoint[1]}", 503)
    assert call.errors.every in type(error).__mro__


def test_an_error_survives_being_sent_to_another_process(call: Caller, here: Mesh) -> None:
    """As multiprocessing and task queues do; what can't be sent (connections) stays behind."""
    publish(here, service("reviews:9080", [("127.0.0.1", refusing_port())]))
    with pytest.raises(meshlib.MeshError) as caught:
        call.get(URL)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is type(caught.value)
    assert isinstance(copy, call.errors.connect)
    assert (str(copy), copy.flag, copy.endpoint) == (str(caught.value), "UF", caught.value.endpoint)


def test_a_dead_endpoint_is_tried_around(call: Caller, here: Mesh) -> None:
    """Istio's default retry policy; no call fails while one endpoint of two is dead."""
    with Peer() as peer:
        dead = ("127.0.0.1", refusing_port())
        publish(here, service("reviews:9080", [peer.address, dead], retry=RetryPolicy()))
        assert [call.get(URL).status_code for _ in range(20)] == [200] * 20


def test_a_connection_dropped_before_the_answer_is_retried_for_get_only(call: Caller, here: Mesh) -> None:
    """The POST may have been carried out, so its caller is told."""
    policy = RetryPolicy(on=frozenset({"5xx"}), base_interval=0.001, max_interval=0.001)

    def first_fails(received: Received) -> Answer:
        return Answer(drop=len(peer.received) % 2 == 1)

    with Peer(first_fails) as peer:
        publish(here, service("reviews:9080", [peer.address], retry=policy))
        assert call.get(URL).status_code == 200
        assert len(peer.received) == 2
        with pytest.raises(call.errors.reset) as caught:
            call.request("POST", URL, content=b"order")
        assert isinstance(caught.value, meshlib.UpstreamReset)
        assert len(peer.received) == 3


def test_an_idempotency_key_lets_a_post_be_sent_again(call: Caller, here: Mesh) -> None:
    """That is what the key is for."""
    policy = RetryPolicy(on=frozenset({"5xx"}), base_interval=0.001, max_interval=0.001)
    with Peer(lambda _: Answer(drop=len(peer.received) == 1)) as peer:
        publish(here, service("reviews:9080", [peer.address], retry=policy))
        response = call.request("POST", URL, content=b"order", headers={"idempotency-key": "1"})
        assert (response.status_code, len(peer.received)) == (200, 2)


@contextmanager
def serving(*headers: tuple[bytes, bytes], deadline: float | None = None) -> Iterator[None]:
    """As inside of a request that brought these."""
    token = propagation.current.set(propagation.Carried(headers, deadline, time.monotonic))
    try:
        yield
    finally:
        propagation.current.reset(token)


def test_what_the_request_being_served_brought_goes_along(call: Caller, here: Mesh) -> None:
    """Routes can match on it; what the application sets itself wins."""
    jason = RouteMatch(headers=(HeaderMatch("end-user", StringMatch("exact", "jason")),))
    routes = {"reviews:9080": [route(forward("v2"), jason), route(forward("v1"))]}
    with Peer() as one, Peer() as two, serving((b"x-request-id", b"42"), (b"end-user", b"jason")):
        publish(here, snapshot(routes, {"v1": [one.address], "v2": [two.address]}))
        call.get(URL)
        call.get(URL, headers={"End-User": "nobody"})
        assert [(each.header("x-request-id"), each.header("end-user")) for each in two.received] == [("42", "jason")]
        assert [(each.header("x-request-id"), each.header("end-user")) for each in one.received] == [("42", "nobody")]


def test_the_time_that_is_left_goes_along_and_none_left_is_no_call(call: Caller, here: Mesh) -> None:
    """Work whose caller has gone is not started."""
    with Peer() as peer:
        publish(here, service("reviews:9080", [peer.address], timeout=5.0))
        call.get(URL)
        with serving(deadline=time.monotonic() + 2):
            call.get(URL)
        told = [int(each.header("x-envoy-expected-rq-timeout-ms") or 0) for each in peer.received]
        assert 4000 < told[0] <= 5000
        assert 1000 < told[1] <= 2000
        with serving(deadline=time.monotonic() - 1):
            assert call.get(URL).status_code == 504
        assert len(peer.received) == 2


def test_a_503_is_retried_and_the_good_answer_delivered(call: Caller, here: Mesh) -> None:
    """The discarded response gives its connection back before the next try."""
    policy = RetryPolicy(on=frozenset({"5xx"}), base_interval=0.001, max_interval=0.001)

    def third_time_lucky(_: Received) -> Answer:
        return Answer(200 if len(peer.received) == 3 else 503, body=str(len(peer.received)).encode())

    with Peer(third_time_lucky) as peer:
        publish(here, service("reviews:9080", [peer.address], retry=policy))
        response = call.get(URL)
        assert (response.status_code, response.text) == (200, "3")


def test_a_buffered_body_is_sent_again_and_a_streamed_one_never(call: Caller, here: Mesh) -> None:
    """PUT may be repeated; a consumed iterator can't be."""
    policy = RetryPolicy(attempts=1, on=frozenset({"5xx"}), base_interval=0.001, max_interval=0.001)
    with Peer(lambda _: Answer(503)) as peer:
        publish(here, service("reviews:9080", [peer.address], retry=policy))
        call.request("PUT", URL, content=b"all of it")
        assert [received.body for received in peer.received] == [b"all of it"] * 2
        call.upload(URL, [b"once"], "PUT")
        assert len(peer.received) == 3


def test_the_route_timeout_is_a_504_by_the_mesh(call: Caller, here: Mesh) -> None:
    """Envoy's words; the caller does not wait for the server."""
    with Peer(lambda _: Answer(gate=asyncio.sleep(30))) as peer:
        publish(here, service("reviews:9080", [peer.address], timeout=0.2))
        started = time.monotonic()
        response = call.get(URL)
        assert (response.status_code, response.text) == (504, "upstream request timeout")
        assert time.monotonic() - started < 5
        assert response.extensions["meshlib.flag"] == "UT"


def test_the_clients_own_timeout_stays_in_force(call: Caller, here: Mesh) -> None:
    """It raises what its library raises, and is not retried: the application's word is final."""
    with Peer(lambda _: Answer(gate=asyncio.sleep(30))) as peer:
        publish(here, service("reviews:9080", [peer.address], timeout=20.0, retry=RetryPolicy(on=frozenset({"5xx"}))))
        with pytest.raises(call.errors.timeout) as caught:
            call.get(URL, timeout=0.2)
        assert isinstance(caught.value, meshlib.UpstreamTimeout)
        assert len(peer.received) == 1


def test_the_timeout_covers_the_body_too(call: Caller, here: Mesh) -> None:
    """A server that trickles is cut off between two chunks."""

    async def trickle(_: Received) -> Answer:
        async def chunks():  # type: ignore[no-untyped-def]
            while True:
                yield b"x"
                await asyncio.sleep(0.02)

        return Answer(chunks=chunks())

    with Peer(trickle) as peer:
        publish(here, service("reviews:9080", [peer.address], timeout=0.3))
        with pytest.raises(call.errors.late) as caught:
            call.get(URL)
        assert isinstance(caught.value, meshlib.UpstreamTimeout)


def test_a_body_that_stalls_is_cut_by_the_idle_timeout(call: Caller, here: Mesh) -> None:
    """Forward.idle_timeout: without a byte for so long it is over; with one now and then it may take as long as it
    likes."""
    stalls = False

    async def some(_: Received) -> Answer:
        async def chunks():  # type: ignore[no-untyped-def]
            for _ in range(8):
                yield b"x"
                await asyncio.sleep(0.05)
            if stalls:
                await asyncio.sleep(60)

        return Answer(chunks=chunks())

    with Peer(some) as peer:
        publish(here, service("reviews:9080", [peer.address], idle_timeout=0.25))
        assert call.get(URL).text == "x" * 8
        stalls = True
        with pytest.raises(call.errors.late) as caught:
            call.get(URL)
        assert isinstance(caught.value, meshlib.UpstreamTimeout)


def test_answers_of_the_mesh_look_like_a_servers(call: Caller, here: Mesh) -> None:
    """Direct response, fault, empty service: responses, not exceptions, as behind a sidecar."""
    broken = Fault(abort=FaultAbort(1_000_000, 500))
    routes = {
        "fixed:80": [route(DirectResponse(203, b"fixed"))],
        "broken:80": [route(forward("c"), fault=broken)],
        "empty:80": [route(forward("c"))],
    }
    publish(here, snapshot(routes, {"c": []}))
    assert (call.get("http://fixed/").status_code, call.get("http://fixed/").text) == (
        203,
        "fixed",
    )
    assert (call.get("http://broken/").status_code, call.get("http://broken/").text) == (
        500,
        "fault filter abort",
    )
    assert (call.get("http://empty/").status_code, call.get("http://empty/").text) == (
        503,
        "no healthy upstream",
    )


def test_an_injected_delay_is_waited_for(call: Caller, here: Mesh) -> None:
    """And the call goes through after it."""
    with Peer() as peer:
        slow = Fault(delay=FaultDelay(0.2, 1_000_000))
        given = snapshot({"reviews:9080": [route(forward("c"), fault=slow)]}, {"c": [peer.address]})
        publish(here, given)
        started = time.monotonic()
        assert call.get(URL).status_code == 200
        assert time.monotonic() - started >= 0.2


def test_rewrites_and_header_operations_are_on_the_wire(call: Caller, here: Mesh) -> None:
    """Path, Host, added, set and removed headers, on request and response."""
    operations = HeaderOperations(set=(("x-set", "new"),), add=(("x-add", "2"),), remove=("x-gone",))
    changed = forward("c", rewrite=Rewrite(prefix="/inner/", authority="inner.example"))
    rule = route(changed, request_headers=operations, response_headers=operations)
    sent_back = [("x-set", "old"), ("x-gone", "1"), ("x-add", "1")]
    with Peer(lambda _: Answer(headers=sent_back)) as peer:
        publish(here, snapshot({"reviews:9080": [rule]}, {"c": [peer.address]}))
        response = call.get(URL, headers={"x-set": "old", "x-gone": "1", "x-add": "1"})
        received = peer.received[0]
        assert (received.target, received.header("host")) == ("/inner/reviews/0", "inner.example")
        assert received.header("x-set") == "new"
        assert received.header("x-gone") is None
        assert [value for name, value in received.headers if name == "x-add"] == ["1", "2"]
        assert response.every("x-set") == ["new"]
        assert response.every("x-gone") == []
        assert response.every("x-add") == ["1", "2"]


def test_a_mirror_gets_the_request_and_its_answer_matters_to_no_one(call: Caller, here: Mesh) -> None:
    """Body included, -shadow in the Host; a mirror that is down changes nothing."""
    copies: list[Received] = []
    arrived = threading.Event()

    def note(received: Received) -> Answer:
        if received.method == "POST":
            copies.append(received)
            arrived.set()
        return Answer(500)

    with Peer() as peer, Peer(note) as shadow:
        rule = route(forward("v1", mirrors=(Mirror("v2"), Mirror("down"))))
        clusters = {"v1": [peer.address], "v2": [shadow.address], "down": [("127.0.0.1", refusing_port())]}
        publish(here, snapshot({"reviews:9080": [rule]}, clusters))
        assert call.request("POST", URL, content=b"copied").status_code == 200
        call.together([URL])  # gives an event loop the turn in which its mirrors run; its own copy may overtake
        assert arrived.wait(10)
        assert copies[0].body == b"copied"
        assert copies[0].header("host") == "reviews-shadow:9080"


def test_an_overflowing_cluster_answers_503(call: Caller, here: Mesh) -> None:
    """maxConnections 1 and http1MaxPendingRequests 1, as in Istio's circuit-breaking task."""
    limits = Cluster("c", limits=ConnectionLimits(max_connections=1, max_pending_requests=1))

    async def slow(_: Received) -> Answer:
        await asyncio.sleep(0.3)
        return Answer()

    with Peer(slow) as peer:
        publish(here, service("reviews:9080", [peer.address], cluster=limits))
        statuses = Counter(answer.status_code for answer in call.together([URL] * 6))
        assert statuses[503] == 4
        assert statuses[200] == 2


def test_a_call_beyond_a_rate_limit_is_answered_429(call: Caller, here: Mesh) -> None:
    """With Envoy's words and headers, in the library's own response; the server never sees it."""
    limit = RateLimit("two", 2, 2, 3600.0)
    with Peer() as peer:
        publish(here, service("reviews:9080", [peer.address], cluster=Cluster("c", rate_limits=(limit,))))
        answers = [call.get(URL) for _ in range(3)]
        assert [each.status_code for each in answers] == [200, 200, 429]
        refused = answers[2]
        assert (refused.text, refused.every("x-envoy-ratelimited")) == ("local_rate_limited", ["true"])
        assert (refused.every("x-ratelimit-remaining"), refused.every("retry-after")) == (["0"], ["1800"])
        assert len(peer.received) == 2
        cluster = here.live.clusters["c"]
        assert (cluster.state.requests, cluster.targets[0].state.in_flight) == (0, 0)


def test_a_call_beyond_a_quota_is_answered_429(call: Caller, here: Mesh) -> None:
    """Whoever counts is asked once a call, retries or not; what he adds goes both ways."""
    user = LimitKey("header", "end-user", "user")
    quota = Quota("shared", QuotaService("envoy", "counts:1", "shop"), ((user,),))
    with Peer() as peer:
        publish(here, service("reviews:9080", [peer.address], cluster=Cluster("c", quotas=(quota,))))
        counted(here, by := Counted(1))
        good, refused = (call.get(URL, headers={"end-user": "jason"}) for _ in range(2))
        assert (good.status_code, good.every("x-told"), peer.received[0].header("x-counted")) == (200, ["yes"], "yes")
        assert (refused.status_code, refused.every("x-envoy-ratelimited")) == (429, ["true"])
        assert (refused.every("x-ratelimit-limit"), refused.every("retry-after")) == (["1, 1;w=60"], ["30"])
        assert [each.descriptors for each in by.asked] == [((("user", "jason"),),)] * 2
        assert len(peer.received) == 1


def test_a_call_that_a_route_answers_counts_against_the_limit_of_its_host(call: Caller, here: Mesh) -> None:
    """Envoy's filter comes before the router."""
    limit = RateLimit("one", 1, 1, 3600.0)
    answered = route(DirectResponse(418, b"teapot"), limited_by="c")
    publish(here, snapshot({"reviews:9080": [answered]}, {"c": (Cluster("c", rate_limits=(limit,)), [])}))
    assert [call.get(URL).status_code for _ in range(2)] == [418, 429]


def test_new_configuration_is_used_by_the_next_call(call: Caller, here: Mesh) -> None:
    """And connections to what is gone are not."""
    with Peer(lambda _: Answer(body=b"one")) as one, Peer(lambda _: Answer(body=b"two")) as two:
        publish(here, service("reviews:9080", [one.address]))
        assert call.get(URL).text == "one"
        publish(here, service("reviews:9080", [two.address]))
        assert call.get(URL).text == "two"


def test_a_connection_that_the_server_closed_is_not_used(call: Caller, here: Mesh) -> None:
    """Neither after `connection: close` nor after a silent close."""
    with Peer(lambda _: Answer(close=True)) as peer:
        publish(here, service("reviews:9080", [peer.address]))
        assert [call.get(URL).status_code for _ in range(5)] == [200] * 5
        assert peer.connections == 5


def test_a_host_outside_the_mesh_is_called_where_it_says(call: Caller, here: Mesh) -> None:
    """ALLOW_ANY: the transport can be the application's only one."""
    with Peer() as peer:
        publish(here, snapshot({}, {}))
        assert call.get(f"http://localhost:{peer.port}/x").text == "ok"
        assert peer.received[0].header("host") == f"localhost:{peer.port}"


def test_tls_is_originated_for_a_cluster_that_says_so(call: Caller, here: Mesh, tmp_path: Path) -> None:
    """The URL says http, the wire speaks TLS, the certificate is checked against the SNI name."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    import ssl

    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("secure.example").configure_cert(server)
    with Peer(tls=server) as peer:
        trusted = UpstreamTls(sni="secure.example", ca_file=str(tmp_path / "ca.pem"))
        publish(here, service("reviews:9080", [peer.address], cluster=Cluster("c", tls=trusted)))
        assert call.get(URL).text == "ok"
        assert peer.received[0].header("host") == "reviews:9080"
        stranger = UpstreamTls(sni="other.example", ca_file=str(tmp_path / "ca.pem"))
        publish(here, service("reviews:9080", [peer.address], cluster=Cluster("d", tls=stranger)))
        with pytest.raises(call.errors.connect, match="certificate"):
            call.get(URL)
        missing = UpstreamTls(sni="secure.example", ca_file=str(tmp_path / "absent.pem"))
        publish(here, service("reviews:9080", [peer.address], cluster=Cluster("e", tls=missing)))
        with pytest.raises(call.errors.connect):
            call.get(URL)


def test_a_call_is_as_large_as_it_was_on_the_wire(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever library makes it: head and body, with a content-length, in chunks, and where a length is told of a body
    that does not come."""
    monkeypatch.setattr("meshlib.telemetry.pipeline.Telemetry.start", lambda self: None)
    padding = ("x-padding", "z" * 100)
    answers = {
        "POST": (Answer(body=b"x" * 1000, headers=[padding]), (padding, ("content-length", "1000")), 1000),
        "GET": (
            Answer(chunks=[b"x" * 700, b"y" * 300], headers=[padding]),
            (padding, ("transfer-encoding", "chunked")),
            1000,
        ),
        "HEAD": (Answer(body=b"x" * 1000), (("content-length", "1000"),), 0),
    }

    def size(lines: Iterable[tuple[str, str]]) -> int:
        return sum(len(name) + len(value) + 4 for name, value in lines)

    with (
        mesh(telemetry="off", prometheus="127.0.0.1:1") as here,
        caller(adapter, here) as call,
        Peer(lambda received: answers[received.method][0]) as peer,
    ):
        publish(here, service("reviews:9080", [peer.address]))
        assert here.telemetry is not None
        for method, (_, head, body) in answers.items():
            here.telemetry.recorder.forget()
            upload = {"content": b"b" * 500} if method == "POST" else {}
            call.request(method, URL, headers={"x-told": "t" * 100}, **upload)
            [counted] = here.telemetry.recorder.series()
            assert counted.response_bytes == size(head) + body
            sent = peer.received[-1]
            # What the library, or this one, adds on the way is not of the caller's making.
            assert len(sent.body) + 110 <= counted.request_bytes <= len(sent.body) + size(sent.headers)


def test_an_upload_whose_length_nobody_told_counts_what_was_sent(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator, or what comes from somewhere else; there is no content-length to believe."""
    monkeypatch.setattr("meshlib.telemetry.pipeline.Telemetry.start", lambda self: None)
    with mesh(telemetry="off", prometheus="127.0.0.1:1") as here, caller(adapter, here) as call, Peer() as peer:
        publish(here, service("reviews:9080", [peer.address]))
        assert here.telemetry is not None
        call.upload(URL, [b"x" * 700, b"y" * 300])
        [counted] = here.telemetry.recorder.series()
        assert peer.received[-1].body == b"x" * 700 + b"y" * 300
        assert 1000 <= counted.request_bytes < 1500
