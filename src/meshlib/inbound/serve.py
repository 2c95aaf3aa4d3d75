"""How does this process take a connection: TLS, plaintext, or not at all? By the first byte and PeerAuthentication's
mode of the port, asked anew for each connection: for servers that hand out accepted sockets, and, as a protocol that
stands before theirs (Door), for those on asyncio.

- A peer is verified within the handshake, so a server never sees a byte of one that is refused.
- From accept to the end of the handshake a connection has `HANDSHAKE` seconds, however it trickles.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import selectors
import socket
import ssl
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from meshlib.identity.tls import TlsContexts, secured
from meshlib.inbound.peer import PEER, present
from meshlib.model import Peer, TlsMode

_log = logging.getLogger("meshlib.inbound")
_T = TypeVar("_T")
HANDSHAKE = 10.0
"""Seconds."""
GOODBYE = 1.0
"""Seconds for which the end of a connection waits for the other side's close_notify. An idle one in a caller's pool
reads nothing, and asyncio's 30 seconds would be a server's whole time to stop in; Envoy waits for none."""
_CLIENT_HELLO = b"\x16"
"""The first byte of a TLS record that holds a handshake; no HTTP request begins with it."""


class Listening:
    """The connections of one process.

    mode: of a port, now; never blocks. takes_plaintext: also where it is STRICT, for probes; the middleware must deny
    what is none. await_certificate: blocks until there is a first one, at most so many seconds; a server that has just
    begun lets its callers wait for it.
    """

    def __init__(
        self,
        tls: TlsContexts,
        mode: Callable[[int], TlsMode],
        handshake: float = HANDSHAKE,
        *,
        takes_plaintext: bool = False,
        await_certificate: Callable[[float], object] = lambda timeout: None,
    ) -> None:
        self.tls, self.mode, self.handshake = tls, mode, handshake
        self.takes_plaintext, self._await_certificate = takes_plaintext, await_certificate

    def is_tls(self, first: bytes, mode: TlsMode) -> bool:
        """Raises ConnectionRefusedError for a connection that is not taken."""
        is_tls = first == _CLIENT_HELLO
        if mode is TlsMode.STRICT and not is_tls and not self.takes_plaintext:
            raise ConnectionRefusedError("it is plaintext, and the port takes only mutual TLS (STRICT)")
        return is_tls

    def accept(self, accepted: socket.socket) -> socket.socket:
        """The socket to serve from, in the place of one that was just accepted; blocks, at most `handshake` seconds.
        Raises OSError after it has closed and logged a connection that is not taken."""
        mode = self.mode(accepted.getsockname()[1])
        if mode is TlsMode.DISABLE:
            return accepted
        deadline = time.monotonic() + self.handshake
        address, port = accepted.getpeername()[0], accepted.getsockname()[1]
        serving = accepted
        try:
            accepted.setblocking(False)
            _await(accepted, selectors.EVENT_READ, deadline)
            first = accepted.recv(1, socket.MSG_PEEK)
            if not first:
                raise ConnectionResetError(_CLOSED)
            if self.is_tls(first, mode):
                serving = self._shake(accepted, deadline)
            serving.setblocking(True)
            return serving
        except OSError as error:
            serving.close()
            accepted.close()
            log_refusal(address, port, error)
            raise
        except BaseException:
            serving.close()
            accepted.close()
            raise

    def _shake(self, accepted: socket.socket, deadline: float) -> ssl.SSLSocket:
        if not self.tls.is_ready:
            self._await_certificate(max(0.0, deadline - time.monotonic()))
        context = self.tls.server()
        secured = context.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)
        try:
            while True:
                try:
                    secured.do_handshake()
                    return secured
                except ssl.SSLWantReadError:
                    _await(secured, selectors.EVENT_READ, deadline)
                except ssl.SSLWantWriteError:
                    _await(secured, selectors.EVENT_WRITE, deadline)
        except BaseException:
            secured.close()
            raise

    def uvicorn(self, inner: Callable[..., Any] | None = None, **options: Any) -> asyncio.Protocol:
        """A protocol for uvicorn: `uvicorn.run(app, http=mesh.listening.uvicorn)`. inner: the one behind it."""
        from uvicorn.protocols.http.auto import AutoHTTPProtocol

        serve = inner or AutoHTTPProtocol

        def made(peer: Peer | None) -> Any:
            if peer is None:
                return serve(**options)
            return serve(**{**options, "app_state": {**options["app_state"], PEER: peer}})

        return Door(self, made, options["server_state"].connections, _as_http)

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Peer:
        """Who is at the other end of a stream that was just accepted, of which nothing has been read; secured where it
        has to be, within `handshake` seconds. Raises OSError for one that is not taken, after it has logged it."""
        transport: Any = writer.transport
        address, local = writer.get_extra_info("peername"), writer.get_extra_info("sockname")
        if not isinstance(local, tuple):
            return Peer()  # a Unix socket
        peer = Peer(None, False, address[0] if address else "", local[1], "", local[0])
        mode = self.mode(peer.local_port)
        if mode is TlsMode.DISABLE:
            return peer
        try:
            async with asyncio.timeout(self.handshake):
                if not (first := await reader.read(1)):
                    raise ConnectionResetError(_CLOSED)
                transport.pause_reading()
                # What came with it: there is no other way to take back what a StreamReader holds, or to give it back.
                held: bytearray = reader._buffer  # type: ignore[attr-defined]
                held[:0] = first
                if not self.is_tls(first, mode):
                    transport.resume_reading()
                    return peer
                early = bytes(held)
                held.clear()
                context = await self.server_context(http2=True)
                await start_tls(_secure(writer, context, self.handshake), transport, early)
            return secured(peer, writer.get_extra_info("ssl_object"))
        except OSError as error:
            transport.abort()
            log_refusal(peer.address, peer.local_port, error)
            raise
        except BaseException:  # the server stops
            transport.abort()
            raise

    async def server_context(self, http2: bool = False) -> ssl.SSLContext:
        """Of the certificate there is, waited for at most `handshake` seconds. Raises NoCredentials."""
        if not self.tls.is_ready:
            await asyncio.to_thread(self._await_certificate, self.handshake)
        return self.tls.server(http2)

    def __repr__(self) -> str:
        return f"<Listening {self.tls!r}>"


_CLOSED = "it was closed before its first byte"


async def _secure(writer: asyncio.StreamWriter, context: ssl.SSLContext, handshake: float) -> None:
    """writer.start_tls, which before Python 3.12 can't be told how long a goodbye may last."""
    if sys.version_info >= (3, 12):
        await writer.start_tls(context, ssl_handshake_timeout=handshake, ssl_shutdown_timeout=GOODBYE)
        return
    transport = writer.transport
    protocol: Any = transport.get_protocol()
    await writer.drain()
    loop = asyncio.get_running_loop()
    secured = await loop.start_tls(
        transport,
        protocol,
        context,
        server_side=True,
        ssl_handshake_timeout=handshake,
        ssl_shutdown_timeout=GOODBYE,
    )
    writer._transport = secured  # type: ignore[attr-defined]
    protocol._replace_writer(writer)


async def start_tls(starting: Coroutine[Any, Any, _T], transport: Any, early: bytes) -> _T:
    """Runs `starting`, asyncio's start_tls on `transport`, which knows nothing of the bytes that came before: they are
    the first that its protocol gets, after it was connected and before the loop looks for more.

    (Looking at the first byte without taking it is no way: uvloop reads ahead.)
    """
    loop, before = asyncio.get_running_loop(), transport.get_protocol()

    def feed() -> None:
        left = memoryview(early)
        while left and not transport.is_closing():
            room = protocol.get_buffer(len(left))
            count = min(len(room), len(left))
            room[:count] = left[:count]
            protocol.buffer_updated(count)
            left = left[count:]

    task = loop.create_task(starting)
    try:
        while (protocol := transport.get_protocol()) is before and not task.done():  # noqa: ASYNC110 -- nothing tells it
            await asyncio.sleep(0)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not task.done():
        loop.call_soon(feed)  # behind connection_made and resume_reading, which start_tls has just scheduled
    return await task


def log_refusal(address: str, port: int, error: Exception) -> None:
    # One that only knocks is a probe's, mostly, and nothing was refused.
    level = logging.DEBUG if isinstance(error, ConnectionResetError) else logging.WARNING
    _log.log(level, "connection from %s to port %d refused: %s", address, port, str(error) or type(error).__name__)


def _await(sock: socket.socket, event: int, deadline: float) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(sock, event)
        if not selector.select(max(0.0, deadline - time.monotonic())):
            raise TimeoutError("the handshake takes too long")


def _as_http(protocol: Any) -> None:
    """What the caller wrote; the mesh's TLS is below, as a sidecar's is."""
    protocol.scheme = "http"


def _nothing(_: Any) -> None:
    """More need not be done."""


class Door(asyncio.Protocol):
    """Stands before a server's protocol until it is known how the connection is served.

    make: the protocol that serves it, given who is there; None for a Unix socket. connections: the server's, of which
    this is one meanwhile. opened: called with the protocol once that has its connection.
    """

    def __init__(
        self,
        listening: Listening,
        make: Callable[[Peer | None], Any],
        connections: set[Any] | None = None,
        opened: Callable[[Any], None] = _nothing,
    ) -> None:
        self._listening, self._make, self._opened = listening, make, opened
        self._connections: set[Any] = connections if connections is not None else set()
        self._loop = asyncio.get_running_loop()
        self._early: list[bytes] = []
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._has_ended = False
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        address, local = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        if not isinstance(local, tuple):  # a Unix socket: whoever may open it is trusted by the file's permissions
            self._hand_over(transport, None)
            return
        # asyncio does so only where a socket says that it is TCP's, which those that others have bound do not
        # (uvicorn's, with workers): head and body of an answer were then 40 ms apart.
        if (connection := transport.get_extra_info("socket")) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peer = Peer(None, False, address[0] if address else "", local[1], "", local[0])
        self._mode = self._listening.mode(local[1])
        if self._mode is TlsMode.DISABLE:
            self._hand_over(transport, self._peer)
            return
        self._connections.add(self)
        self._timer = self._loop.call_later(self._listening.handshake, self._refuse, TimeoutError("it says nothing"))

    def data_received(self, data: bytes) -> None:
        if self._task is not None:  # what comes right behind the handshake
            self._early.append(data)
            return
        self._stop_looking()
        try:
            is_tls = self._listening.is_tls(data[:1], self._mode)
        except OSError as error:
            self._refuse(error)
            return
        if is_tls:
            self._transport.pause_reading()
            self._task = self._loop.create_task(self._secure(data))
        else:
            self._connections.discard(self)
            self._hand_over(self._transport, self._peer).data_received(data)

    async def _secure(self, hello: bytes) -> None:
        listening = self._listening
        try:
            starting = self._loop.start_tls(
                self._transport,
                self,
                await listening.server_context(),
                server_side=True,
                ssl_handshake_timeout=listening.handshake,
                ssl_shutdown_timeout=GOODBYE,
            )
            transport: Any = await start_tls(starting, self._transport, hello)
            if transport is None or self._has_ended:
                raise ConnectionResetError("it was closed in the handshake")
            peer = secured(self._peer, transport.get_extra_info("ssl_object"))
        except (OSError, asyncio.CancelledError) as error:
            self._refuse(error if isinstance(error, OSError) else ConnectionAbortedError("the server stops"))
            return
        self._connections.discard(self)
        inner = self._hand_over(transport, peer)
        for chunk in self._early:
            inner.data_received(chunk)

    def _hand_over(self, transport: Any, peer: Peer | None) -> Any:
        inner = self._make(peer)
        transport.set_protocol(inner)
        # What serves may begin a task for the connection there; that one knows who it is for.
        context = contextvars.copy_context()
        context.run(present.set, peer)
        context.run(inner.connection_made, transport)
        self._opened(inner)
        return inner

    def _stop_looking(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _refuse(self, error: Exception) -> None:
        self._stop_looking()
        self._connections.discard(self)
        log_refusal(self._peer.address, self._peer.local_port, error)
        self._transport.abort()

    def shutdown(self) -> None:
        """The server stops (uvicorn): it asks all connections to end."""
        if self._task is not None:
            self._task.cancel()
        else:
            self._refuse(ConnectionAbortedError("the server stops"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_ended = True
        self._stop_looking()
        self._connections.discard(self)


_registered: list[Listening] = []


def register(listening: Listening) -> None:
    """What servers that make their workers themselves serve by, in this process (gunicorn)."""
    _registered[:] = [listening]


def is_secured() -> bool:
    """Whether a Mesh with an identity serves in this process."""
    return bool(_registered) and _registered[0].tls.has_identity


def registered() -> Listening:
    """Raises RuntimeError where no application of a mesh is served."""
    if not _registered:
        raise RuntimeError("no Mesh serves in this process: wrap the application with mesh.asgi or mesh.wsgi")
    return _registered[0]


def uvicorn_protocol(**options: Any) -> asyncio.Protocol:
    """`uvicorn app:app --http meshlib.inbound.serve:uvicorn_protocol`."""
    return registered().uvicorn(**options)
