"""Claims about mTLS: who is refused, before a byte of a request; what is taken; and what a rotation leaves alone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
import werkzeug.serving
from inbound_servers import _Server

from certificates import TestCA
from meshlib.identity.credentials import Credentials
from meshlib.identity.tls import TlsContexts
from meshlib.inbound import serve
from meshlib.inbound.peer import of_environ, of_scope
from meshlib.inbound.serve import Listening
from meshlib.inbound.werkzeug import RequestHandler
from meshlib.model import TlsMode, UpstreamTls

CA = TestCA()
SERVER = CA.credentials("reviews")
RULES = UpstreamTls("ISTIO_MUTUAL", subject_alt_names=(SERVER.identity.uri,))


class Held:
    """Credentials that a test replaces, and the mode of every port."""

    def __init__(self, credentials: Credentials, mode: TlsMode = TlsMode.STRICT, handshake: float = 10.0) -> None:
        self.credentials, self.mode = credentials, mode
        self.tls = TlsContexts(lambda: self.credentials, has_identity=True)
        self.has_certificate = threading.Event()
        self.listening = Listening(self.tls, lambda port: self.mode, handshake, await_certificate=self.await_first)
        self.seen: list[str] = []

    def await_first(self, timeout: float) -> None:
        if self.credentials is None:
            self.has_certificate.wait(timeout)


@contextlib.contextmanager
def by_uvicorn(held: Held, graceful: int = 5) -> Iterator[int]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        held.seen.append(scope["path"])
        peer = of_scope(scope)
        body = str(peer.sni if scope["path"] == "/sni" else peer.identity).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-scheme", scope["scheme"].encode())]})
        await send({"type": "http.response.body", "body": body})

    config = uvicorn.Config(
        app, log_level="critical", lifespan="off", timeout_graceful_shutdown=graceful, http=held.listening.uvicorn
    )
    server = _Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), name="uvicorn")
        thread.start()
        try:
            assert server.is_up.wait(10)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@contextlib.contextmanager
def by_werkzeug(held: Held) -> Iterator[int]:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        held.seen.append(environ["PATH_INFO"])
        start_response("200 OK", [("x-scheme", environ["wsgi.url_scheme"])])
        peer = of_environ(environ)
        return [str(peer.sni if environ["PATH_INFO"] == "/sni" else peer.identity).encode()]

    serve.register(held.listening)
    server = werkzeug.serving.make_server("127.0.0.1", 0, app, threaded=True, request_handler=RequestHandler)
    thread = threading.Thread(target=server.serve_forever, name="werkzeug")
    thread.start()
    try:
        yield server.port
    finally:
        server.shutdown()
        thread.join(20)
        server.server_close()


SERVERS = pytest.mark.parametrize("serving", [by_uvicorn, by_werkzeug])


def ask(port: int, context: ssl.SSLContext | None, path: str = "/") -> httpx.Response:
    scheme = "http" if context is None else "https"
    with httpx.Client(verify=context or True, trust_env=False, timeout=20) as client:
        return client.get(f"{scheme}://127.0.0.1:{port}{path}", headers={"connection": "close"})


def context_of(credentials: Credentials, rules: UpstreamTls = RULES) -> ssl.SSLContext:
    clock = credentials.not_before + 1
    return TlsContexts(lambda: credentials, has_identity=True, clock=lambda: clock).client(rules)


def without_a_certificate() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=CA.root.decode())
    return context


def of_tls_1_1() -> ssl.SSLContext:
    context = without_a_certificate()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


def foreign(**options: Any) -> ssl.SSLContext:
    """Trusts us, and is not trusted."""
    other = TestCA(options.pop("trust_domain", "cluster.local"))
    made = other.credentials("ratings", **options)
    bundles = ((CA.trust_domain, CA.root),)
    return context_of(Credentials(made.identity, made.certificate_chain, made.private_key, bundles, 0, 2e9))


ATTACKS = {
    "no certificate": without_a_certificate,
    "foreign CA": foreign,
    "foreign CA, foreign trust domain": lambda: foreign(trust_domain="evil.example"),
    "expired": lambda: context_of(CA.expired("ratings")),
    "not yet valid": lambda: context_of(CA.not_yet_valid("ratings")),
    "wrong trust domain": lambda: context_of(CA.credentials("ratings", uris=("spiffe://evil/ns/default/sa/ratings",))),
    "identity in CN only": lambda: context_of(CA.credentials("r", uris=(), common_name=SERVER.identity.uri)),
    "identity as DNS name": lambda: context_of(CA.credentials("r", uris=(), dns=("ratings.default",))),
    "several URIs": lambda: context_of(CA.credentials("r", uris=(SERVER.identity.uri, "spiffe://cluster.local/x"))),
    "no SPIFFE ID": lambda: context_of(CA.credentials("r", uris=("https://cluster.local/ns/default/sa/r",))),
    "TLS 1.1": of_tls_1_1,
    "plaintext": lambda: None,
}


@SERVERS
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_strict_port_refuses_before_the_first_request_byte(
    serving: Any, attack: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with a caller, the application never hears of it, and the log does."""
    held = Held(SERVER)
    with caplog.at_level(logging.WARNING, "meshlib.inbound"), serving(held) as port:
        with pytest.raises(httpx.TransportError):
            ask(port, ATTACKS[attack]())
        assert ask(port, context_of(CA.credentials("ratings")), "/good").text.endswith("/sa/ratings")
    assert held.seen == ["/good"]
    assert [each for each in caplog.messages if f"to port {port} refused: " in each]


@SERVERS
def test_a_handshake_that_stands_still_is_cut_and_holds_nobody_up(serving: Any) -> None:
    """Half a ClientHello, a byte at a time or none at all, ends at the limit, while others are served."""
    held = Held(SERVER, handshake=1.0)
    with serving(held) as port, contextlib.ExitStack() as open_ones:
        slow = [open_ones.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(3)]
        slow[1].send(b"\x16")
        slow[2].send(b"\x16\x03\x01\x02\x00\x01")
        assert ask(port, context_of(CA.credentials("ratings"))).status_code == 200
        for each in slow:
            each.settimeout(30)
            with contextlib.suppress(ConnectionError):
                assert each.recv(100) == b""


@SERVERS
def test_a_permissive_port_takes_both_and_a_mode_holds_at_once(serving: Any) -> None:
    """TLS and plaintext on one port, told apart by the first byte; a change of mode needs no restart."""
    held = Held(SERVER, TlsMode.PERMISSIVE)
    with serving(held) as port:
        secured, plain = ask(port, context_of(CA.credentials("ratings"))), ask(port, None)
        assert secured.text == "spiffe://cluster.local/ns/default/sa/ratings"
        assert plain.text == "None"
        assert secured.headers["x-scheme"] == plain.headers["x-scheme"] == "http"
        held.mode = TlsMode.STRICT
        with pytest.raises(httpx.TransportError):
            ask(port, None)
        held.mode = TlsMode.DISABLE
        assert ask(port, None).text == "None"


@pytest.mark.parametrize(
    "names", [("spiffe://cluster.local/ns/default/sa/ratings",), ("spiffe://other/ns/default/sa/reviews",)]
)
def test_a_server_with_another_identity_gets_no_request(names: tuple[str, ...]) -> None:
    """The right CA is not enough: the server must be the one that is called."""
    held = Held(SERVER)
    with by_uvicorn(held) as port:
        rules = UpstreamTls("ISTIO_MUTUAL", subject_alt_names=names)
        with pytest.raises(httpx.ConnectError, match="certificate is for"):
            ask(port, context_of(CA.credentials("ratings"), rules))
    assert held.seen == []


def test_a_root_speaks_for_its_own_trust_domain_only() -> None:
    """Where two domains trust each other, neither may issue the other's identities."""
    other = TestCA("other.example")
    held = Held(CA.credentials("reviews", trusts=[other]))
    good = other.credentials("ratings", trusts=[CA])
    bad = other.credentials("ratings", trusts=[CA], uris=("spiffe://cluster.local/ns/default/sa/ratings",))
    with by_uvicorn(held) as port:
        assert ask(port, context_of(good)).text == "spiffe://other.example/ns/default/sa/ratings"
        with pytest.raises(httpx.TransportError):
            ask(port, context_of(bad), "/bad")
    assert held.seen == ["/"]


def test_trust_that_is_taken_away_is_gone_and_open_connections_go_on() -> None:
    """A root rotation: old and new side by side, then the new alone; a kept-alive connection lives through it."""
    new = TestCA()
    held = Held(CA.credentials("reviews", trusts=[new]))
    with by_uvicorn(held) as port:
        with httpx.Client(verify=context_of(CA.credentials("ratings", trusts=[new])), trust_env=False) as kept:
            assert kept.get(f"https://127.0.0.1:{port}/").status_code == 200
            held.credentials = new.credentials("reviews")
            assert kept.get(f"https://127.0.0.1:{port}/").status_code == 200
        assert ask(port, context_of(new.credentials("ratings"))).status_code == 200
        with pytest.raises(httpx.TransportError):
            ask(port, context_of(CA.credentials("ratings", trusts=[new])))


def test_an_answer_does_not_wait_for_the_callers_acknowledgement() -> None:
    """asyncio leaves Nagle's algorithm on where a socket was bound without TCP's number, as uvicorn's workers do it."""
    seen: list[int] = []

    class Inner(asyncio.Protocol):
        def __init__(self, **_: Any) -> None:
            pass

        def connection_made(self, transport: Any) -> None:
            seen.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            transport.close()

    async def connect() -> None:
        state = SimpleNamespace(connections=set())
        held = Held(SERVER, TlsMode.DISABLE)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = await asyncio.get_running_loop().create_server(
                lambda: held.listening.uvicorn(Inner, server_state=state, app_state={}), sock=listening
            )
            async with server:
                reader, writer = await asyncio.open_connection(*listening.getsockname())
                assert await reader.read() == b""
                writer.close()

    asyncio.run(asyncio.wait_for(connect(), 30))
    assert seen == [1]


@SERVERS
def test_the_name_that_the_handshake_asks_for_is_known(serving: Any) -> None:
    """Rules about connection.sni look at it."""
    with (
        serving(Held(SERVER)) as port,
        httpx.Client(verify=context_of(CA.credentials("ratings")), trust_env=False, timeout=20) as client,
    ):
        asked = {"sni_hostname": "outbound_.9080_._.reviews.default.svc.cluster.local"}
        told = client.get(f"https://127.0.0.1:{port}/sni", headers={"connection": "close"}, extensions=asked)
        assert told.text == asked["sni_hostname"]


def test_without_valid_credentials_nothing_secured_is_served_or_called() -> None:
    """Expired credentials fail closed on both sides."""
    held = Held(CA.expired("reviews"))
    with by_uvicorn(held) as port, pytest.raises(httpx.TransportError):
        ask(port, context_of(CA.credentials("ratings")))
    with pytest.raises(OSError, match="has expired"):
        held.tls.client(RULES)
    with pytest.raises(OSError, match="no certificate of the mesh"):
        TlsContexts().client(RULES)


def test_a_server_that_stops_does_not_wait_for_idle_callers() -> None:
    """A caller's pool does not read what an idle connection says. Its goodbye is waited for a moment, not the half
    minute that asyncio has: Kubernetes gives a pod no longer."""
    context = context_of(CA.credentials("ratings"))
    with contextlib.ExitStack() as callers, by_uvicorn(Held(SERVER), graceful=60) as port:
        idle = callers.enter_context(context.wrap_socket(socket.create_connection(("127.0.0.1", port), 20)))
        idle.sendall(b"GET / HTTP/1.1\r\nhost: reviews\r\n\r\n")
        assert idle.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_stream_that_ends_does_not_wait_for_an_idle_caller() -> None:
    """As hypercorn has them, on every Python: StreamWriter.start_tls knows of no such bound before 3.12."""
    held, ended = Held(SERVER), threading.Event()
    context = context_of(CA.credentials("ratings"))

    def call(port: int) -> None:
        with context.wrap_socket(socket.create_connection(("127.0.0.1", port), 20)):
            ended.wait(20)  # and reads nothing

    async def serve() -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                peer = await held.listening.take(reader, writer)
                assert str(peer.identity) == "spiffe://cluster.local/ns/default/sa/ratings"
                writer.close()
                with contextlib.suppress(OSError):  # that the goodbye was not answered
                    await writer.wait_closed()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
            caller = asyncio.create_task(asyncio.to_thread(call, server.sockets[0].getsockname()[1]))
            try:
                await asyncio.wait_for(done, 15)
            finally:
                ended.set()
                await caller

    asyncio.run(serve())


@SERVERS
def test_who_calls_before_the_first_certificate_waits_for_it(serving: Any) -> None:
    """A server that has just begun costs its callers a moment and no error."""
    held = Held(SERVER)
    held.credentials, there = None, held.credentials  # type: ignore[assignment]
    with serving(held) as port:
        answers: list[str] = []
        caller = threading.Thread(
            target=lambda: answers.append(ask(port, context_of(CA.credentials("ratings")), "/early").text)
        )
        caller.start()
        assert ask_plainly(port) == ""  # while it waits, others are turned away at once
        assert caller.is_alive()
        held.credentials = there
        held.has_certificate.set()
        caller.join(20)
    assert answers == ["spiffe://cluster.local/ns/default/sa/ratings"]


def ask_plainly(port: int) -> str:
    try:
        return ask(port, None).text
    except httpx.TransportError:
        return ""


def test_no_session_can_be_resumed() -> None:
    """A ticket would bring the identity that was proven before a rotation."""
    held = Held(SERVER)
    with (
        by_uvicorn(held) as port,
        socket.create_connection(("127.0.0.1", port)) as plain,
        context_of(CA.credentials("ratings")).wrap_socket(plain, server_hostname="x") as secured,
    ):
        secured.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        while secured.recv(4096):
            pass
        assert secured.session is None or not secured.session.has_ticket
