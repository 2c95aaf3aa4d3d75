"""What requests' and urllib3's users rely on besides what every adapter does: sessions, raw responses, pools, TLS."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import os
import pickle
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import trustme
import urllib3
from urllib3 import exceptions

import meshlib
from meshlib.mesh import Mesh
from meshlib.model import Cluster, ConnectionLimits, RetryPolicy, TcpKeepalive
from meshlib.outbound import urllib3_exchange, urllib3_idle
from peers import Answer, Peer, Received, refusing_port
from promises import within
from snapshots import forward, mesh, publish, route, service, snapshot

URL = "http://reviews:9080/reviews/0"
AT_ONCE = RetryPolicy(attempts=1, on=frozenset({"5xx"}), base_interval=0.0001, max_interval=0.0001)


@pytest.fixture
def here() -> Iterator[Mesh]:
    made = mesh()
    yield made
    made.close()


@pytest.fixture
def session(here: Mesh) -> Iterator[requests.Session]:
    with requests.Session() as made:
        made.mount("http://", here.requests_adapter())
        made.mount("https://", here.requests_adapter())
        yield made


@pytest.fixture
def http(here: Mesh) -> Iterator[urllib3.PoolManager]:
    with here.urllib3() as made:
        yield made


def in_flight(here: Mesh, name: str = "reviews:9080") -> tuple[int, int]:
    cluster = here.live.clusters[name]
    return cluster.state.requests, cluster.targets[0].state.in_flight


def paths(received: Received) -> Answer:
    """A small site: /set gives a cookie, /from leads to /to, everything else echoes."""
    if received.target == "/set":
        return Answer(headers=[("set-cookie", "who=jason; path=/")], body=b"set")
    if received.target == "/from":
        return Answer(302, headers=[("location", "/to")])
    if received.target == "/see-other":
        return Answer(303, headers=[("location", "http://other:80/to")])
    return Answer(body=f"{received.method} {received.target}".encode())


def test_a_session_keeps_its_cookies_redirects_and_hooks(here: Mesh, session: requests.Session) -> None:
    """They are above the adapter, and it must not lose what they need."""
    hooked: list[int] = []
    session.hooks["response"].append(lambda response, **_: hooked.append(response.status_code))
    with Peer(paths) as peer:
        routes = {"reviews:9080": [route(forward("c"))], "other:80": [route(forward("c"))]}
        publish(here, snapshot(routes, {"c": [peer.address]}))
        session.get("http://reviews:9080/set")
        assert session.cookies.get_dict() == {"who": "jason"}
        response = session.get("http://reviews:9080/from", auth=("user", "pass"))
        assert (response.text, response.url) == ("GET /to", "http://reviews:9080/to")
        assert [each.status_code for each in response.history] == [302]
        assert peer.received[-1].header("cookie") == "who=jason"
        assert (peer.received[-1].header("authorization") or "").startswith("Basic ")
        response = session.post("http://reviews:9080/see-other", data={"a": "b"}, auth=("user", "pass"))
        assert (response.text, response.url) == ("GET /to", "http://other:80/to")
        assert (peer.received[-1].header("host"), peer.received[-1].header("authorization")) == ("other", None)
        assert peer.received[-2].body == b"a=b"
        assert hooked == [200, 302, 200, 303, 200]
        assert response.elapsed.total_seconds() > 0


def test_the_raw_response_is_urllib3s(here: Mesh, session: requests.Session) -> None:
    """Version, reason, headers, and a body that can be read as a file."""
    with Peer(lambda _: Answer(headers=[("x-a", "1"), ("x-a", "2")], body=b"line one\nline two\n")) as peer:
        publish(here, service("reviews:9080", [peer.address]))
        response = session.get(URL, stream=True)
        assert isinstance(response.raw, urllib3.HTTPResponse)
        assert (response.raw.version, response.reason, response.ok) == (11, "As told", True)
        assert response.raw.headers.getlist("x-a") == ["1", "2"]
        assert in_flight(here) == (1, 1)
        response.raw.auto_close = False  # urllib3's word for "used as a file"
        assert list(io.TextIOWrapper(response.raw)) == ["line one\n", "line two\n"]  # type: ignore[arg-type]
        assert in_flight(here) == (0, 0)
        assert list(session.get(URL, stream=True).iter_lines()) == [b"line one", b"line two"]
        assert peer.connections == 1


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("status", [200, 204, 304])
def test_a_response_without_a_body_gives_its_connection_back(
    here: Mesh, session: requests.Session, http: urllib3.PoolManager, method: str, status: int
) -> None:
    """As soon as it is there, for there is nothing to read."""
    with Peer(lambda _: Answer(status)) as peer:
        publish(here, service("reviews:9080", [peer.address]))
        for _ in range(2):
            assert session.request(method, URL).content == b""
            assert in_flight(here) == (0, 0)
        for _ in range(2):
            assert http.request(method, URL).data == b""
            assert in_flight(here) == (0, 0)
        assert peer.connections == 2


def test_a_response_that_is_dropped_unread_counts_no_longer(
    here: Mesh, session: requests.Session, http: urllib3.PoolManager
) -> None:
    """Nobody has to close anything for the counters to be right."""
    with Peer(lambda _: Answer(chunks=[b"x" * 1000] * 100)) as peer:
        publish(here, service("reviews:9080", [peer.address]))
        response = session.get(URL, stream=True)
        assert in_flight(here) == (1, 1)
        del response
        gc.collect()
        assert in_flight(here) == (0, 0)
        raw = http.request("GET", URL, preload_content=False)
        assert raw.read(10) == b"x" * 10
        raw.release_conn()  # with a body on the wire, so the connection is of no use any more
        assert in_flight(here) == (0, 0)
        assert http.request("GET", URL, preload_content=False).read(1) == b"x"


def test_answers_of_the_mesh_can_be_read_in_every_way(here: Mesh, session: requests.Session) -> None:
    """Whole, in pieces, as a stream without a size, or not at all."""
    publish(here, service("reviews:9080", []))
    assert session.get(URL).text == "no healthy upstream"
    assert session.head(URL).content == b""
    assert b"".join(session.get(URL, stream=True).iter_content(4)) == b"no healthy upstream"
    assert b"".join(session.get(URL, stream=True).iter_content(None)) == b"no healthy upstream"
    response = session.get(URL)
    assert (response.reason, response.extensions["meshlib.flag"]) == ("Service Unavailable", "UH")  # type: ignore[attr-defined]
    with pytest.raises(requests.HTTPError):
        response.raise_for_status()


def test_connect_and_read_timeouts_are_told_apart(here: Mesh, session: requests.Session) -> None:
    """As requests' tuple says; a float is both."""
    with Peer(lambda _: Answer(gate=asyncio.sleep(30))) as peer:
        publish(here, service("reviews:9080", [peer.address]))
        for timeout in (0.1, (5, 0.1)):
            with pytest.raises(requests.ReadTimeout) as caught:
                session.get(URL, timeout=timeout)
            assert isinstance(caught.value, meshlib.UpstreamTimeout)
            assert caught.value.request.url == URL
    # TEST-NET-1 (RFC 5737) answers nothing, if it can be reached at all.
    publish(here, service("reviews:9080", [("192.0.2.1", 80)]))
    with pytest.raises(requests.ConnectionError) as unreachable:
        session.get(URL, timeout=(0.1, 5))
    assert isinstance(unreachable.value, meshlib.UpstreamConnectionFailure)
    with pytest.raises(ValueError, match="timeout"):
        session.get(URL, timeout=(1, 2, 3))


def test_a_server_that_trickles_its_head_is_cut_at_the_deadline(here: Mesh, session: requests.Session) -> None:
    """Each byte would renew a socket's timeout; the time that is left does not grow."""

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(b"HTTP/1.1 200 OK\r\nx-a: 1\r\n" if not writer.transport.get_write_buffer_size() else b"")
                await asyncio.sleep(0.02)
        except (ConnectionError, asyncio.CancelledError):
            writer.transport.abort()

    with Peer() as peer:

        async def start() -> asyncio.Server:
            return await asyncio.start_server(trickle, "127.0.0.1", 0)

        server = asyncio.run_coroutine_threadsafe(start(), peer.loop).result(10)
        port = server.sockets[0].getsockname()[1]
        publish(here, service("reviews:9080", [("127.0.0.1", port)], timeout=0.3))
        started = time.monotonic()
        response = session.get(URL)
        assert (response.status_code, response.text) == (504, "upstream request timeout")
        assert time.monotonic() - started < within(3)

        async def stop() -> None:
            server.close()
            for task in asyncio.all_tasks():
                if getattr(task.get_coro(), "__name__", "") == "trickle":
                    task.cancel()

        asyncio.run_coroutine_threadsafe(stop(), peer.loop).result(10)


def test_a_file_is_sent_again_from_where_it_stood(here: Mesh, session: requests.Session, tmp_path: Path) -> None:
    """Not from its start, and not from where the failed try left it."""
    file = tmp_path / "upload"
    file.write_bytes(b"skipped" + b"sent" * 1000)
    with Peer(lambda _: Answer(503 if len(peer.received) == 1 else 200)) as peer:
        publish(here, service("reviews:9080", [peer.address], retry=AT_ONCE))
        with file.open("rb") as body:
            body.seek(7)
            assert session.put(URL, data=body).status_code == 200
        assert [received.body for received in peer.received] == [b"sent" * 1000] * 2


def test_multipart_and_json_arrive_as_they_were_meant(here: Mesh, http: urllib3.PoolManager) -> None:
    """urllib3 builds them above the pool."""
    with Peer() as peer:
        publish(here, service("reviews:9080", [peer.address]))
        http.request("POST", URL, fields={"file": ("name.txt", b"content")})
        assert b'filename="name.txt"' in peer.received[0].body
        http.request("POST", URL, json={"stars": 5})
        assert (peer.received[1].body, peer.received[1].header("content-type")) == (b'{"stars":5}', "application/json")
        http.request("GET", URL, fields={"q": "a b"}, headers={"user-agent": urllib3.util.SKIP_HEADER})
        assert peer.received[2].target == "/reviews/0?q=a+b"
        assert peer.received[2].header("user-agent") is None


def test_urllib3s_debug_log_goes_on(here: Mesh, http: urllib3.PoolManager, caplog: pytest.LogCaptureFixture) -> None:
    """The line that everybody looks for first."""
    with Peer() as peer:
        publish(here, service("reviews:9080", [peer.address]))
        with caplog.at_level(logging.DEBUG, "urllib3"):
            http.request("GET", URL)
    assert 'http://reviews:9080 "GET /reviews/0 HTTP/1.1" 200 2' in caplog.text


def test_urllib3_follows_redirects_and_counts_them(here: Mesh, http: urllib3.PoolManager) -> None:
    """The one thing its Retry is for here."""
    with Peer(paths) as peer:
        routes = {"reviews:9080": [route(forward("c"))], "other:80": [route(forward("c"))]}
        publish(here, snapshot(routes, {"c": [peer.address]}))
        response = http.request("POST", "http://reviews:9080/see-other", headers={"authorization": "secret"})
        assert (response.data, response.geturl()) == (b"GET /to", "http://other:80/to")
        assert peer.received[-1].header("authorization") is None
        response = http.connection_from_url("http://reviews:9080").request("GET", "/from")
        assert response.data == b"GET /to"
        peer.answer = lambda _: Answer(302, headers=[("location", "/again")])
        with pytest.raises(exceptions.MaxRetryError) as caught:
            http.request("GET", URL, retries=2)
        assert not isinstance(caught.value, meshlib.MeshError)
        assert http.request("GET", URL, redirect=False).status == 302


def test_urllib3s_retries_do_not_multiply_the_routes(here: Mesh, http: urllib3.PoolManager) -> None:
    """Two layers that both try three times make nine calls, at the worst possible moment."""
    with Peer(lambda _: Answer(503, headers=[("retry-after", "0")])) as peer:
        publish(here, service("reviews:9080", [peer.address], retry=AT_ONCE))
        eager = urllib3.Retry(5, status_forcelist=[503])
        assert http.request("GET", URL, retries=eager).status == 503
        assert len(peer.received) == 2


def test_without_retries_urllib3s_own_exception_comes_bare(here: Mesh, http: urllib3.PoolManager) -> None:
    """`retries=False`, as ever; otherwise it is the reason of a MaxRetryError. Each is a MeshError, too."""
    publish(here, service("reviews:9080", [("127.0.0.1", refusing_port())]))
    with pytest.raises(exceptions.NewConnectionError) as bare:
        http.request("GET", URL, retries=False)
    assert isinstance(bare.value, meshlib.UpstreamConnectionFailure)
    with pytest.raises(exceptions.MaxRetryError) as wrapped:
        http.request("GET", URL)
    assert isinstance(wrapped.value, meshlib.UpstreamConnectionFailure)
    assert isinstance(wrapped.value.reason, exceptions.NewConnectionError)
    assert isinstance(wrapped.value.reason, meshlib.UpstreamConnectionFailure)
    assert wrapped.value.flag == wrapped.value.reason.flag == "UF"
    copy = pickle.loads(pickle.dumps(wrapped.value))
    assert isinstance(copy.reason, exceptions.NewConnectionError)


def test_the_answer_of_a_failed_try_leaves_the_connection_usable(here: Mesh, http: urllib3.PoolManager) -> None:
    """A short answer is read to its end; a long or slow one is not waited for."""
    policy = RetryPolicy(attempts=3, on=frozenset({"5xx"}), base_interval=0.0001, max_interval=0.0001)
    with Peer(lambda _: Answer(503 if len(peer.received) < 4 else 200, body=b"x" * 100)) as peer:
        publish(here, service("reviews:9080", [peer.address], retry=policy))
        assert http.request("GET", URL).status == 200
        assert (len(peer.received), peer.connections) == (4, 1)


def test_a_kept_connection_that_the_server_has_closed_meanwhile_costs_no_call(
    here: Mesh, http: urllib3.PoolManager
) -> None:
    """It is found dead before or while sending; idempotent calls are sent anew on another, without a retry policy."""
    with Peer(lambda _: Answer(drop=len(peer.received) == 2)) as peer:
        publish(here, service("reviews:9080", [peer.address]))
        assert http.request("GET", URL).status == 200
        assert http.request("GET", URL).status == 200  # the server drops the kept connection after the request
        assert peer.connections == 2
    with Peer(lambda _: Answer(drop=len(peer.received) == 2)) as peer:
        publish(here, service("reviews:9080", [peer.address]))
        assert http.request("POST", URL).status == 200
        with pytest.raises(exceptions.ProtocolError):
            http.request("POST", URL)


@pytest.mark.parametrize(
    ("limits", "connections"),
    [
        (ConnectionLimits(max_requests_per_connection=2), 3),
        (ConnectionLimits(max_connection_duration=0.0), 6),
        (ConnectionLimits(idle_timeout=0.0), 6),
        (ConnectionLimits(tcp_keepalive=TcpKeepalive(3, 60, 10)), 1),
    ],
    ids=["requests", "duration", "idle", "keepalive"],
)
def test_connections_live_as_long_as_the_destination_says(
    here: Mesh, http: urllib3.PoolManager, limits: ConnectionLimits, connections: int
) -> None:
    """maxRequestsPerConnection, maxConnectionDuration, idleTimeout, tcpKeepalive."""
    with Peer() as peer:
        publish(here, service("reviews:9080", [peer.address], cluster=Cluster("c", limits=limits)))
        for _ in range(6):
            http.request("GET", URL)
        assert peer.connections == connections


def test_connections_to_an_endpoint_that_left_are_closed(
    here: Mesh, http: urllib3.PoolManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked for when a new connection is opened anyway; `clear` closes the others."""
    for each in (urllib3_exchange, urllib3_idle):
        monkeypatch.setattr(each, "KEEPALIVE", 0.05)
    with Peer() as gone, Peer() as there:
        publish(here, service("reviews:9080", [gone.address]))
        http.request("GET", URL)
        publish(here, service("reviews:9080", [there.address]))
        deadline = time.monotonic() + 5
        while gone.open_connections and time.monotonic() < deadline:
            http.request("GET", URL, headers={"connection": "close"})
        assert gone.open_connections == 0
        assert "to 1 endpoints" in repr(http)
        http.request("GET", URL)
        http.clear()
        while there.open_connections and time.monotonic() < deadline:
            time.sleep(0.005)
        assert there.open_connections == 0


def test_a_proxy_is_used_for_what_the_mesh_does_not_know(
    here: Mesh, session: requests.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP_PROXY in the environment is meant for the world outside."""
    with Peer(paths) as peer, Peer(lambda received: Answer(body=b"by proxy " + received.target.encode())) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        publish(here, service("reviews:9080", [peer.address]))
        assert session.get(URL).text == "GET /reviews/0"
        assert session.get("http://example.test/x").text == "by proxy http://example.test/x"
        assert [received.header("host") for received in proxy.received] == ["example.test"]


def test_https_to_a_host_outside_the_mesh_is_checked_as_the_session_says(
    here: Mesh, session: requests.Session, tmp_path: Path
) -> None:
    """verify is a bundle, False or True; connections are not shared between the three."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    publish(here, snapshot({}, {}))
    with Peer(tls=server) as peer:
        url = f"https://localhost:{peer.port}/"
        assert session.get(url, verify=str(tmp_path / "ca.pem")).text == "ok"
        with pytest.raises(requests.exceptions.SSLError, match="certificate") as caught:
            session.get(url)
        assert isinstance(caught.value, meshlib.UpstreamConnectionFailure)
        with pytest.warns(urllib3.exceptions.InsecureRequestWarning):
            assert session.get(url, verify=False).text == "ok"
        assert session.get(url, verify=str(tmp_path / "ca.pem")).text == "ok"
        with pytest.raises(OSError, match="CA certificate bundle"):
            session.get(url, verify=str(tmp_path / "absent.pem"))
        assert peer.received[0].header("host") == f"localhost:{peer.port}"


def test_a_client_certificate_is_shown_where_the_session_has_one(
    here: Mesh, session: requests.Session, tmp_path: Path
) -> None:
    """`cert=`, for hosts whose cluster says nothing about TLS."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("client.example").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "client.pem"))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(server)
    server.verify_mode = ssl.CERT_REQUIRED
    publish(here, snapshot({}, {}))
    with Peer(tls=server) as peer:
        url = f"https://localhost:{peer.port}/"
        bundle = str(tmp_path / "ca.pem")
        assert session.get(url, verify=bundle, cert=str(tmp_path / "client.pem")).text == "ok"
        with pytest.raises(requests.ConnectionError):
            session.get(url, verify=bundle)


def test_a_session_can_be_sent_to_another_process(here: Mesh, session: requests.Session) -> None:
    """There it finds that process's Mesh with the same settings; here, this one."""
    with Peer() as peer:
        publish(here, service("reviews:9080", [peer.address]))
        session.headers["x-own"] = "1"
        with pickle.loads(pickle.dumps(session)) as copy:
            assert copy.get(URL).text == "ok"
            assert peer.received[0].header("x-own") == "1"
            assert copy.get_adapter(URL).home is here
        response = pickle.loads(pickle.dumps(session.get(URL)))
        assert (response.status_code, response.text) == (200, "ok")


def test_connections_end_with_their_manager_or_their_mesh() -> None:
    """Whichever ends first; nothing is left for the garbage collector to complain about."""
    with Peer() as peer:
        with mesh(service("reviews:9080", [peer.address])) as made:
            manager = made.urllib3()
            manager.request("GET", URL)
            made.urllib3().request("GET", URL)  # dropped at once
            gc.collect()
            deadline = time.monotonic() + 5
            while peer.open_connections > 1 and time.monotonic() < deadline:
                time.sleep(0.005)
            assert peer.open_connections == 1
        while peer.open_connections and time.monotonic() < deadline:
            time.sleep(0.005)
        assert peer.open_connections == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_opens_connections_of_its_own(here: Mesh, http: urllib3.PoolManager) -> None:
    """Two processes on one connection would read each other's answers."""
    with Peer() as peer:
        publish(here, service("reviews:9080", [peer.address]))
        http.request("GET", URL)
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if http.request("GET", URL).data == b"ok" else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert http.request("GET", URL).data == b"ok"
        assert [received.connection for received in peer.received] == [1, 2, 1]


def test_they_say_what_they_hold(here: Mesh) -> None:
    """For people in a debugger."""
    text = "<Edge <IdleConnections 0 idle to 0 endpoints>>"
    assert repr(here.urllib3()) == f"<MeshPoolManager {text}>"
    assert repr(here.requests_adapter()) == f"<MeshAdapter <MeshPoolManager {text}>>"
