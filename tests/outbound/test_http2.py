"""HTTP/2 against a real server that does what servers do on a bad day: through every adapter that speaks it."""

from __future__ import annotations

import asyncio
import logging
import ssl
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import httpx
import pytest
import trustme
from adapters import Async, Caller, caller

import meshlib
from http2_peer import CANCEL, INTERNAL_ERROR, REFUSED_STREAM, Call, Http2Peer, plain
from meshlib.mesh import Mesh
from meshlib.model import Cluster, ConnectionLimits, LoadBalancing, RetryPolicy, UpstreamTls
from meshlib.outbound import engine_http2
from peers import Peer
from snapshots import Addresses, mesh, publish, service, snapshot

URL = "http://reviews:9080/reviews/0"
WAIT = 30.0
SPEAKING = ("httpx", "httpx-async", "httpx-aiohttp", "httpx2")
NO_RETRY = RetryPolicy(attempts=0)
QUICK = {"base_interval": 0.001, "max_interval": 0.001}


@pytest.fixture
def here() -> Iterator[Mesh]:
    made = mesh()
    yield made
    made.close()


@pytest.fixture(params=SPEAKING)
def call(request: pytest.FixtureRequest, here: Mesh) -> Iterator[Caller]:
    with caller(str(request.param), here) as made:
        yield made


def told(
    here: Mesh,
    *addresses: tuple[str, int],
    retry: RetryPolicy = NO_RETRY,
    tls: UpstreamTls | None = None,
    timeout: float | None = None,
    stalled: float | None = None,
    **limits: object,
) -> None:
    given: Addresses = list(addresses)
    cluster = Cluster(
        "reviews:9080",
        http2=True,
        tls=tls,
        limits=ConnectionLimits(**limits),  # type: ignore[arg-type]
        load_balancing=LoadBalancing.ROUND_ROBIN,
    )
    publish(here, service("reviews:9080", given, cluster=cluster, retry=retry, timeout=timeout, idle_timeout=stalled))


def in_flight(here: Mesh) -> tuple[int, int]:
    cluster = here.live.clusters["reviews:9080"]
    return cluster.state.requests, sum(target.state.in_flight for target in cluster.targets)


def test_a_request_and_its_answer_cross_whole(call: Caller, here: Mesh) -> None:
    """Authority, path, own fields; what HTTP/1.1 alone has stays behind; bodies larger than any window."""
    up, down = b"u" * 300_000, b"d" * 3_000_000

    async def echo(received: Call) -> None:
        if received.method == "HEAD":
            received.respond(end=True)
            return
        received.respond(201, (("x-answer", "1"), ("set-cookie", "a=1"), ("set-cookie", "b=2")))
        await received.data(down, end=True)

    with Http2Peer(echo) as peer:
        told(here, peer.address)
        got = call.request("POST", f"{URL}?a=1", content=up, headers={"X-Own": "1"})
        assert (got.status_code, got.content == down, got.every("set-cookie")) == (201, True, ["a=1", "b=2"])
        assert got.extensions["http_version"] == b"HTTP/2"
        (received,) = peer.calls
        assert (received.header(":authority"), received.header(":path")) == ("reviews:9080", "/reviews/0?a=1")
        assert (received.method, received.body == up, received.header("x-own")) == ("POST", True, "1")
        assert received.header("connection") is None
        assert call.upload(URL, [b"a" * 1000, b"b" * 1000]).status_code == 201
        assert peer.calls[1].body == b"a" * 1000 + b"b" * 1000
        assert call.request("HEAD", URL).status_code == 200
        assert in_flight(here) == (0, 0)


def test_calls_share_connections(call: Caller, here: Mesh) -> None:
    """On asyncio one carries all; on threads it carries one at a time, and is kept."""
    gate: asyncio.Event

    async def together(received: Call) -> None:
        if len(peer.calls) == 20:
            gate.set()
        await gate.wait()
        await received.ok((received.header(":path") or "").encode())

    with Http2Peer(together) as peer:
        gate = asyncio.Event()
        told(here, peer.address)
        urls = [f"http://reviews:9080/{number}" for number in range(20)]
        assert [got.text for got in call.together(urls)] == [f"/{number}" for number in range(20)]
        assert peer.connections == (1 if isinstance(call, Async) else 20)
        before = peer.connections
        assert [call.get(URL).status_code for _ in range(5)] == [200] * 5
        assert peer.connections == before


@pytest.mark.parametrize("whose", ["the server's", "the rule's"])
def test_streams_beyond_what_is_allowed_get_another_connection(call: Caller, here: Mesh, whose: str) -> None:
    """SETTINGS_MAX_CONCURRENT_STREAMS, and maxConcurrentStreams of a DestinationRule: none is ever refused."""
    most: Counter[int] = Counter()

    async def slow(received: Call) -> None:
        number = peer.lines.index(received.line)
        open_ones = sum(not each.ended.is_set() for each in received.line.calls.values())
        most[number] = max(most[number], open_ones)
        await asyncio.sleep(0.05)
        received.ended.set()
        await received.ok()

    with Http2Peer(slow, streams=3 if whose == "the server's" else 100) as peer:
        told(here, peer.address, max_concurrent_streams=3 if whose == "the rule's" else None)
        assert {got.status_code for got in call.together([URL] * 12)} == {200}
        assert 1 <= max(most.values()) <= 3


def test_what_the_server_had_not_begun_goes_elsewhere_and_the_rest_is_finished(here: Mesh) -> None:
    """GOAWAY in the middle of streams: those beyond the last are sent again, POSTs too, without any retry policy; those
    before have their answers over the old connection."""
    arrived: asyncio.Event

    async def drain(received: Call) -> None:
        if received.line is not peer.lines[0] or received.header(":path") == "/first":
            await received.ok(b"new")
            return
        number = received.number
        if number == 9:  # the fourth of those that are under way
            received.go_away(5)
            arrived.set()
        await arrived.wait()
        if number <= 5:
            await received.ok(b"old")

    async def calls(client: httpx.AsyncClient) -> list[str]:
        await client.get("http://reviews:9080/first")
        return [
            response.text for response in await asyncio.gather(*(client.post(URL, content=str(n)) for n in range(4)))
        ]

    for engine in ("httpcore", "aiohttp"):
        with Http2Peer(drain) as peer:
            arrived = asyncio.Event()
            told(here, peer.address)

            async def run() -> list[str]:
                transport = here.async_transport(engine=engine)  # type: ignore[arg-type]  # noqa: B023
                async with httpx.AsyncClient(transport=transport, timeout=WAIT) as client:
                    return await calls(client)

            assert Counter(asyncio.run(run())) == {"old": 2, "new": 2}
            assert peer.connections == 2
            bodies = Counter(each.body for each in peer.calls if each.method == "POST")
            assert sum(bodies.values()) == 6  # two were seen, and not begun with
    assert in_flight(here) == (0, 0)


def test_a_connection_that_the_server_leaves_costs_no_call(call: Caller, here: Mesh) -> None:
    """A farewell that crosses with a POST, and one that comes while nothing is under way."""

    async def leaving(received: Call) -> None:
        if received.line is peer.lines[0] and received.method == "POST":
            received.go_away(received.number - 2)
        else:
            await received.ok()
            if received.header(":path") == "/last":
                received.go_away(received.number)

    with Http2Peer(leaving) as peer:
        told(here, peer.address)
        assert call.get(URL).status_code == 200
        assert call.request("POST", URL, content=b"order").status_code == 200
        assert [each.body for each in peer.calls if each.line is peer.lines[1]] == [b"order"]
        assert call.get("http://reviews:9080/last").status_code == 200
        assert call.request("POST", URL, content=b"order").status_code == 200
        assert peer.connections == 3


def test_a_refused_stream_is_tried_again_where_the_policy_says_so(call: Caller, here: Mesh) -> None:
    """retryOn refused-stream, for every method: nothing was processed. The connection goes on."""

    async def refusing(received: Call) -> None:
        if len(peer.calls) % 2:
            received.reset(REFUSED_STREAM)
        else:
            await received.ok()

    with Http2Peer(refusing) as peer:
        told(here, peer.address, retry=RetryPolicy(on=frozenset({"refused-stream"}), **QUICK))  # type: ignore[arg-type]
        assert call.request("POST", URL, content=b"order").status_code == 200
        assert ([each.body for each in peer.calls], peer.connections) == ([b"order"] * 2, 1)
        told(here, peer.address, retry=NO_RETRY)
        with pytest.raises(call.errors.reset, match="refused") as caught:
            call.request("POST", URL, content=b"order")
        assert isinstance(caught.value, meshlib.UpstreamReset)
        assert len(peer.calls) == 3


@pytest.mark.parametrize("code", [CANCEL, INTERNAL_ERROR])
def test_a_reset_stream_is_a_reset(call: Caller, here: Mesh, code: int) -> None:
    """Sent again only if that is harmless; other calls on the connection do not notice."""

    async def resetting(received: Call) -> None:
        if received.header(":path") == "/bad" and len(peer.calls) % 2 == 0:
            received.reset(code)
        else:
            await received.ok()

    with Http2Peer(resetting) as peer:
        told(here, peer.address, retry=RetryPolicy(on=frozenset({"reset"}), **QUICK))  # type: ignore[arg-type]
        assert call.get(URL).status_code == 200
        assert call.get("http://reviews:9080/bad").status_code == 200
        assert len(peer.calls) == 3
        with pytest.raises(call.errors.reset) as caught:
            call.request("POST", "http://reviews:9080/bad", content=b"order")
        assert isinstance(caught.value, meshlib.UpstreamReset)
        assert (len(peer.calls), peer.connections, in_flight(here)) == (4, 1, (0, 0))


def test_a_response_that_is_reset_in_its_body_is_never_taken_for_whole(call: Caller, here: Mesh) -> None:
    """By RST_STREAM, or with the connection."""

    async def breaking(received: Call) -> None:
        received.respond()
        await received.data(b"part")
        if len(peer.calls) == 1:
            received.reset(INTERNAL_ERROR)
        else:
            await received.line.writer.drain()
            await asyncio.sleep(0.05)
            received.cut()

    with Http2Peer(breaking) as peer:
        told(here, peer.address, retry=RetryPolicy(on=frozenset({"5xx"})))
        for _ in range(2):
            with pytest.raises(call.errors.cut) as caught:
                call.get(URL)
            assert isinstance(caught.value, meshlib.UpstreamReset)
        assert (len(peer.calls), in_flight(here)) == (2, (0, 0))


def test_a_connection_that_breaks_before_the_answer_is_a_reset(call: Caller, here: Mesh) -> None:
    """For a POST; what is idempotent is tried again by policy."""

    async def cutting(received: Call) -> None:
        if len(peer.calls) < 3:
            received.cut()
        else:
            await received.ok()

    with Http2Peer(cutting) as peer:
        told(here, peer.address, retry=RetryPolicy(on=frozenset({"reset"}), **QUICK))  # type: ignore[arg-type]
        with pytest.raises(call.errors.every) as caught:
            call.request("POST", URL, content=b"order")
        assert isinstance(caught.value, meshlib.UpstreamReset)
        assert len(peer.calls) == 1
        assert call.get(URL).status_code == 200
        assert len(peer.calls) == 3


def test_a_stall_ends_with_the_routes_timeout(call: Caller, here: Mesh) -> None:
    """Before the head it is a 504, in the body a timeout; a connection on which nothing moved takes no more calls."""

    async def stalling(received: Call) -> None:
        if received.header(":path") == "/half":
            received.respond()
            await received.data(b"half")
        elif received.header(":path") != "/stall":
            await received.ok()

    with Http2Peer(stalling) as peer:
        told(here, peer.address, timeout=0.3)
        assert call.get(URL).status_code == 200
        got = call.get("http://reviews:9080/stall")
        assert (got.status_code, got.extensions["meshlib.flag"]) == (504, "UT")
        with pytest.raises(call.errors.late) as caught:
            call.get("http://reviews:9080/half")
        assert isinstance(caught.value, meshlib.UpstreamTimeout)
        assert call.get(URL).status_code == 200
        assert in_flight(here) == (0, 0)
        assert peer.calls[2].line is not peer.calls[1].line
        told(here, peer.address, stalled=0.2)
        with pytest.raises(call.errors.late):
            call.get("http://reviews:9080/half")


def test_the_clients_own_timeout_is_final(call: Caller, here: Mesh) -> None:
    """As over HTTP/1.1."""

    async def never(received: Call) -> None: ...

    with Http2Peer(never) as peer:
        told(here, peer.address, retry=RetryPolicy(on=frozenset({"5xx"})), timeout=WAIT)
        with pytest.raises(call.errors.timeout) as caught:
            call.get(URL, timeout=0.2)
        assert isinstance(caught.value, meshlib.UpstreamTimeout)
        assert len(peer.calls) == 1


def test_a_body_left_unread_is_cancelled_and_its_window_given_back(call: Caller, here: Mesh) -> None:
    """Forty times a megabyte that nobody reads: more than the connection's window, over one connection."""

    async def large(received: Call) -> None:
        received.respond()
        await received.data(b"x" * 3_000_000, end=True)

    with Http2Peer(large) as peer:
        told(here, peer.address)
        for _ in range(40):
            call.stream(URL, next)
        peer.answer = plain
        assert call.get(URL).text == "ok"
        assert (peer.connections, in_flight(here)) == (1, (0, 0))
        assert Counter(each.reset_by_client for each in peer.calls)[CANCEL] > 0


def test_a_slow_reader_slows_its_own_server_and_nobody_else(here: Mesh) -> None:
    """Backpressure: at most a window's worth is sent ahead, while another call on the connection goes through."""
    sent = 0

    async def large(received: Call) -> None:
        nonlocal sent
        received.respond()
        if received.header(":path") == "/quick":
            await received.data(b"quick", end=True)
            return
        for _ in range(80):
            await received.data(b"x" * 100_000)
            sent += 100_000
        await received.data(b"", end=True)

    async def run() -> None:
        async with here.AsyncClient(timeout=WAIT) as client, client.stream("GET", URL) as slow:
            for _ in range(20):
                assert (await client.get("http://reviews:9080/quick")).text == "quick"
            assert sent < 3_000_000
            assert len(await slow.aread()) == 8_000_000

    with Http2Peer(large) as peer:
        told(here, peer.address)
        asyncio.run(run())
        assert peer.connections == 1


def test_a_server_of_http1_is_no_connection(call: Caller, here: Mesh) -> None:
    """The port said http2, and the server does not speak it: a connect error, tried elsewhere if there is another."""
    with Peer() as old, Http2Peer() as peer:
        told(here, old.address)
        with pytest.raises(call.errors.connect, match="does not speak HTTP/2") as caught:
            call.get(URL)
        assert isinstance(caught.value, meshlib.UpstreamConnectionFailure)
        told(here, old.address, peer.address, retry=RetryPolicy())
        assert [call.get(URL).status_code for _ in range(4)] == [200] * 4


def certified(folder: Path, *alpn: str) -> tuple[ssl.SSLContext, UpstreamTls]:
    folder = Path(tempfile.mkdtemp(dir=folder))  # contexts are kept by the names of their files
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.set_alpn_protocols(alpn)
    authority.issue_cert("secure.example", "localhost").configure_cert(server)
    return server, UpstreamTls(sni="secure.example", ca_file=str(folder / "ca.pem"))


def test_with_tls_the_server_chooses(call: Caller, here: Mesh, tmp_path: Path) -> None:
    """ALPN: HTTP/2 where it can, HTTP/1.1 where it can't, which is not asked for each call anew."""
    both, trusted = certified(tmp_path, "h2", "http/1.1")
    with Http2Peer(tls=both) as peer:
        told(here, peer.address, tls=trusted)
        got = call.get(URL)
        assert (got.text, got.extensions["http_version"]) == ("ok", b"HTTP/2")
        assert peer.calls[0].header(":scheme") == "https"
        told(here, peer.address, tls=UpstreamTls(sni="other.example", ca_file=trusted.ca_file))
        with pytest.raises(call.errors.connect, match="certificate"):
            call.get(URL)
    old, trusted = certified(tmp_path, "http/1.1")
    with Peer(tls=old) as old_peer:
        told(here, old_peer.address, tls=trusted)
        assert [call.get(URL).extensions["http_version"] for _ in range(3)] == [b"HTTP/1.1"] * 3
        assert len(old_peer.received) == 3
        assert old_peer.connections == 2  # one that asked, one that serves


@pytest.mark.parametrize("kind", ["sync", "httpcore", "aiohttp"])
def test_an_application_may_offer_it_to_hosts_outside_of_the_mesh(here: Mesh, tmp_path: Path, kind: str) -> None:
    """http2=True, as httpx has it; without it, HTTP/1.1."""
    server, trusted = certified(tmp_path, "h2", "http/1.1")
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.load_verify_locations(trusted.ca_file)
    publish(here, snapshot({}, {}))
    with Http2Peer(tls=server) as peer:
        url = f"https://localhost:{peer.port}/"
        if kind == "sync":
            with httpx.Client(transport=here.transport(ssl_context=trusting, http2=True), timeout=WAIT) as client:
                assert client.get(url).http_version == "HTTP/2"
            return

        async def run() -> str:
            transport = here.async_transport(engine=kind, ssl_context=trusting, http2=True)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, timeout=WAIT) as client:
                return (await client.get(url)).http_version

        assert asyncio.run(run()) == "HTTP/2"


def test_without_the_library_it_is_said_and_http1_spoken(
    call: Caller, here: Mesh, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The extra http2 is missing: a warning, once; and who asks for it in code is told at once."""
    monkeypatch.setattr(engine_http2, "HAS_H2", False)
    monkeypatch.setattr(engine_http2, "_warned", set())
    monkeypatch.setattr("meshlib.outbound.http2.HAS_H2", False)
    with Peer() as peer, caplog.at_level(logging.WARNING, "meshlib"):
        told(here, peer.address)
        assert [call.get(URL).status_code for _ in range(2)] == [200] * 2
    assert [record.message for record in caplog.records] == [
        "reviews:9080 is HTTP/2, which needs the extra http2: HTTP/1.1 is spoken"
    ]
    with pytest.raises(meshlib.SettingsError, match="extra http2"):
        here.transport(http2=True)


def test_rules_for_connections_hold(call: Caller, here: Mesh) -> None:
    """maxRequestsPerConnection, maxConnectionDuration, idleTimeout."""
    for rules, used in (
        ({"max_requests_per_connection": 2}, [0, 0, 1, 1]),
        ({"max_connection_duration": 1e-9}, [0, 1, 2, 3]),
        ({"idle_timeout": 1e-9}, [0, 1, 2, 3]),
        ({"idle_timeout": 60.0}, [0, 0, 0, 0]),
    ):
        with Http2Peer() as peer:
            told(here, peer.address, **rules)
            assert [call.get(URL).status_code for _ in range(4)] == [200] * 4
            assert [peer.lines.index(each.line) for each in peer.calls] == used, rules


def test_http2_max_requests_turns_away(call: Caller, here: Mesh) -> None:
    """Connections do not bound what is multiplexed; http2MaxRequests does."""

    async def slow(received: Call) -> None:
        await asyncio.sleep(0.3)
        await received.ok()

    with Http2Peer(slow) as peer:
        told(here, peer.address, max_requests=2, max_connections=1)
        assert Counter(got.status_code for got in call.together([URL] * 6)) == {200: 2, 503: 4}


def test_a_request_that_can_not_be_sent_hurts_nobody(call: Caller, here: Mesh) -> None:
    """The application's mistake: its exception, and the next call goes through."""
    with Http2Peer() as peer:
        told(here, peer.address)
        assert call.get(URL).status_code == 200
        with pytest.raises(call.errors.every) as caught:
            call.get(URL, headers={"te": "gzip"})
        assert isinstance(caught.value, meshlib.RequestRefused)
        assert [call.get(URL, headers={f"x-{n}": "1"}).status_code for n in range(3)] == [200] * 3
        assert (len(peer.calls), in_flight(here)) == (4, (0, 0))


def test_connections_end_with_their_client(here: Mesh) -> None:
    """And those to an endpoint that has left end, too, when another is called."""
    with Http2Peer() as peer:
        told(here, peer.address)
        for adapter in SPEAKING:
            with caller(adapter, here) as made:
                made.get(URL)
        pause, deadline = threading.Event(), time.monotonic() + WAIT
        while any(line.is_open for line in peer.lines) and time.monotonic() < deadline:
            pause.wait(0.01)
        assert [line.is_open for line in peer.lines] == [False] * len(SPEAKING)


def test_a_server_of_another_make_is_understood(call: Caller, here: Mesh) -> None:
    """grpcio's, over its own C core: a call of gRPC by hand, with its trailers passed over."""

    class Echo(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(lambda request, context: request[::-1])

    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[Echo()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        told(here, ("127.0.0.1", port))
        payload = b"x" * 200_000 + b"end"
        framed = b"\0" + len(payload).to_bytes(4, "big") + payload
        headers = {"content-type": "application/grpc", "te": "trailers"}
        for _ in range(3):
            got = call.request("POST", "http://reviews:9080/echo.Echo/Echo", content=framed, headers=headers)
            assert (got.status_code, got.content[5:] == payload[::-1]) == (200, True)
    finally:
        server.stop(None).wait(WAIT)
    with pytest.raises(call.errors.connect):
        call.get(URL)


@pytest.mark.parametrize("said", ["the port's name", "h2UpgradePolicy"])
def test_yaml_says_who_speaks_it(tmp_path: Path, said: str) -> None:
    """A port that is named for it, or a DestinationRule that upgrades."""
    with Http2Peer() as peer:
        by_port = said == "the port's name"
        (tmp_path / "mesh.yaml").write_text(f"""
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: reviews}}
spec:
  hosts: [reviews.example]
  ports: [{{number: 80, name: web, protocol: {"HTTP2" if by_port else "HTTP"}}}]
  resolution: STATIC
  endpoints: [{{address: 127.0.0.1, ports: {{web: {peer.port}}}}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: reviews}}
spec:
  host: reviews.example
  trafficPolicy: {{connectionPool: {{http: {{h2UpgradePolicy: {"DEFAULT" if by_port else "UPGRADE"}}}}}}}
""")
        with meshlib.connect(tmp_path) as connected, connected.Client() as client:
            assert client.get("http://reviews.example/").http_version == "HTTP/2"
