"""How does an attempt reach the wire as HTTP/2? Connections of our own over outbound/http2, beside those of HTTP/1.1.

On asyncio all calls to an endpoint share a connection, as far as the server and `maxConcurrentStreams` let them; on
threads each connection carries one call at a time, since a thread that reads for others would have to wait for them.

HTTP/2 is spoken where the cluster says so (ports named http2 or grpc, Istio's h2UpgradePolicy), without TLS from the
first byte on, and with TLS where the server chooses it; and, where the application asks for it, to https hosts. A
server that chooses HTTP/1.1 gets it for a minute, then it is asked again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import time
import weakref
from collections.abc import AsyncIterator, Hashable, Iterator, Mapping
from typing import Any

from meshlib.model import ConnectionLimits
from meshlib.outbound.connections import KEEPALIVE, may_serve, socket_options
from meshlib.outbound.http2 import HAS_H2, Http2, Stream
from meshlib.outbound.idle import Held, Idle, reusable
from meshlib.outbound.wire import AsyncWireResponse, SendFailed, WireRequest, WireResponse
from meshlib.policy.retry import CLIENT_TIMEOUT, CONNECT_FAILURE, REFUSED_STREAM, RESET, TIMEOUT

_log = logging.getLogger("meshlib")
_ALPN = frozenset({"h2", "istio-h2"})
_HTTP1_FOR = 60.0
"""Seconds for which a server that chose HTTP/1.1 is not asked again."""
_BLOCK = 1 << 16
_BODY_FIELDS = frozenset({b"content-length", b"transfer-encoding"})
_warned: set[str] = set()


class _Choice:
    """Who is spoken to in HTTP/2. offers: to https hosts, too, of which the mesh says nothing."""

    def __init__(self, offers: bool) -> None:
        self._offers = offers
        self._http1: dict[Hashable, float] = {}

    def wants(self, request: WireRequest) -> bool:
        """Whether to try: a look at the configuration, no I/O."""
        is_told = request.cluster.cluster.http2
        if not is_told and not (self._offers and request.scheme == b"https"):
            return False
        if not HAS_H2:
            if request.cluster.name not in _warned:
                _warned.add(request.cluster.name)
                _log.warning("%s is HTTP/2, which needs the extra http2: HTTP/1.1 is spoken", request.cluster.name)
            return False
        until = self._http1.get(key_of(request)) if self._http1 else None
        return until is None or time.monotonic() >= until

    def declined(self, request: WireRequest) -> None:
        now = time.monotonic()
        kept = {key: until for key, until in self._http1.items() if until > now}
        self._http1 = {**kept, key_of(request): now + _HTTP1_FOR}


def key_of(request: WireRequest) -> tuple[str, str, int, object]:
    """What two attempts must agree on to share a connection."""
    return (request.cluster.name, request.endpoint.address, request.endpoint.port, request.tls)


class _Bounds:
    """How long one attempt may wait. timeouts: seconds by phase, looked at anew each time; until: monotonic seconds."""

    __slots__ = ("_timeouts", "_until")

    def __init__(self, timeouts: Mapping[str, float | None], seconds: float | None) -> None:
        self._timeouts = timeouts
        self._until = None if seconds is None else time.monotonic() + seconds

    def left(self, phase: str) -> float | None:
        """Seconds for the next step. Raises SendFailed when there are none."""
        limit = self._timeouts.get(phase)
        if self._until is None:
            return limit
        left = self._until - time.monotonic()
        if left <= 0:
            raise self.passed(phase)
        return left if limit is None else min(left, limit)

    def passed(self, phase: str) -> SendFailed:
        """The failure that a step was too slow is."""
        is_ours = self._until is not None and time.monotonic() >= self._until - 0.001
        if phase == "connect":
            return SendFailed(TIMEOUT if is_ours else CONNECT_FAILURE, "ConnectTimeout", "no connection in time")
        name = "WriteTimeout" if phase == "write" else "ReadTimeout"
        return SendFailed(TIMEOUT if is_ours else CLIENT_TIMEOUT, name, "no answer in time")


def _may_go_again(request: WireRequest, error: BaseException, wire: Http2, is_silent: bool) -> bool:
    """Whether an attempt on a kept connection is simply made on another: the server went away without having begun with
    it; or nothing at all came back, which is how a connection looks that was closed meanwhile."""
    if not isinstance(error, SendFailed):
        return False
    if error.failure == REFUSED_STREAM:
        return wire.is_going_away and request.replayable
    return error.failure == RESET and is_silent and request.resendable


def _no_http2(request: WireRequest) -> SendFailed:
    return SendFailed(CONNECT_FAILURE, "ConnectError", f"{request.endpoint.authority} does not speak HTTP/2")


def _unconnected(error: OSError) -> SendFailed:
    return SendFailed(CONNECT_FAILURE, "ConnectError", str(error) or type(error).__name__)


def _open(wire: Http2, request: WireRequest) -> tuple[Stream, bool]:
    has_body = any(name.lower() in _BODY_FIELDS for name, _ in request.headers)
    return wire.open(request.method, request.scheme, request.target, request.headers, has_body), has_body


def _offering(context: ssl.SSLContext) -> ssl.SSLContext:
    """Contexts of the mesh's own say by themselves what they offer (identity/tls)."""
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def _is_http2(tls: Any) -> bool:
    return tls is None or tls.selected_alpn_protocol() in _ALPN


# On threads


class _Line:
    """A connection for one call at a time."""

    __slots__ = ("_idle_since", "_keepalive", "sock", "wire")

    def __init__(self, sock: socket.socket, limits: ConnectionLimits) -> None:
        self.sock, self.wire = sock, Http2(limits.max_concurrent_streams)
        self._keepalive = KEEPALIVE if limits.idle_timeout is None else limits.idle_timeout
        self._idle_since = time.monotonic()

    def flush(self, seconds: float | None) -> None:
        """Raises TimeoutError; a connection that breaks is noticed by who reads."""
        data = self.wire.outgoing()
        if data:
            self.sock.settimeout(seconds)
            try:
                self.sock.sendall(data)
            except TimeoutError:
                self.wire.lose("what was to be written was not taken in time")
                raise
            except OSError:
                pass  # the server may have answered before it had read all

    def pump(self, seconds: float | None) -> None:
        """Take in what comes next. Raises TimeoutError."""
        self.sock.settimeout(seconds)
        try:
            data = self.sock.recv(_BLOCK)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise TimeoutError from None
        except TimeoutError:
            raise
        except OSError as error:
            self.wire.lose(str(error) or type(error).__name__)
            return
        if data:
            self.wire.receive(data)
            self.flush(seconds or 1.0)
        else:
            self.wire.lose("Server disconnected")

    def is_idle(self) -> bool:
        self._idle_since = time.monotonic()
        return not self.wire.at_once and not self.wire.is_done

    def has_expired(self) -> bool:
        """Takes in what came while it was idle: the server's farewell, mostly."""
        if time.monotonic() - self._idle_since > self._keepalive:
            return True
        try:
            while not self.wire.is_done:
                self.pump(0.0)
        except TimeoutError:
            pass
        return self.wire.is_done

    def close(self) -> None:
        self.sock.close()


class Http2Connections(_Choice):
    """For HttpcoreEngine. Thread-safe."""

    def __init__(self, offers: bool = False) -> None:
        super().__init__(offers)
        self._idle = Idle()

    def send(self, request: WireRequest) -> WireResponse | None:
        """None when the server prefers HTTP/1.1. Raises SendFailed."""
        bounds, key = _Bounds(request.timeouts, request.timeout), key_of(request)
        limits = request.cluster.cluster.limits
        stack = self._idle.stack(key)
        while True:
            held = reusable(stack, limits, _Line.close)
            reused = held is not None
            if held is None:
                for expired in self._idle.expired():
                    expired.close()
                line = self._connect(request, limits, bounds)
                if line is None:
                    self.declined(request)
                    return None
                held = Held(line, time.monotonic())
            line = held.connection
            held.served += 1
            before = line.wire.received
            stream: Stream | None = None
            try:
                stream, has_body = _open(line.wire, request)
                if has_body:
                    self._upload(line, stream, request, bounds)
                head = self._head(line, stream, bounds)
            except BaseException as error:
                is_silent = line.wire.received == before
                if stream is not None:
                    line.wire.leave(stream)
                if not isinstance(error, SendFailed) or is_silent or line.wire.is_broken:
                    line.close()
                else:  # the stream was refused, or reset, or slow: the connection lives
                    self._give_back(key, held, limits)
                if reused and _may_go_again(request, error, line.wire, is_silent):
                    continue
                raise
            break

        def close() -> None:
            line.wire.leave(stream)
            self._give_back(key, held, limits)

        extensions = {"http_version": b"HTTP/2", "stream_id": stream.id, "network_stream": _Socket(line.sock)}
        return WireResponse(*head, self._body(line, stream, _Bounds(request.timeouts, None)), extensions, close)

    def _connect(self, request: WireRequest, limits: ConnectionLimits, bounds: _Bounds) -> _Line | None:
        sock: socket.socket | None = None
        try:
            sock = socket.create_connection(
                (request.endpoint.address, request.endpoint.port), timeout=bounds.left("connect")
            )
            for option in ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *socket_options(limits)):
                sock.setsockopt(*option)
            if request.tls is not None:
                sock.settimeout(bounds.left("connect"))
                sock = _offering(request.tls).wrap_socket(sock, server_hostname=request.host)
                if not _is_http2(sock):
                    sock.close()
                    return None
            line = _Line(sock, limits)
            line.flush(bounds.left("connect"))
            while not line.wire.is_ready and not line.wire.is_broken:
                line.pump(bounds.left("connect"))
            if line.wire.is_broken:
                raise _no_http2(request)
            return line
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, TimeoutError):
                raise bounds.passed("connect") from error
            if isinstance(error, OSError):
                raise _unconnected(error) from error
            raise

    def _upload(self, line: _Line, stream: Stream, request: WireRequest, bounds: _Bounds) -> None:
        wire = line.wire
        for chunk in request.content:
            rest = memoryview(chunk)
            while rest and not stream.is_over:
                room = wire.room(stream)
                try:
                    if room:
                        wire.send(stream, bytes(rest[:room]))
                        rest = rest[room:]
                        line.flush(bounds.left("write"))
                    else:
                        line.pump(bounds.left("write"))
                except TimeoutError:
                    raise bounds.passed("write") from None
            if stream.is_over:
                return
        wire.finish(stream)

    def _head(self, line: _Line, stream: Stream, bounds: _Bounds) -> tuple[int, Any]:
        try:
            line.flush(bounds.left("write"))
            while stream.head is None and not stream.is_over:
                line.pump(bounds.left("read"))
        except TimeoutError:
            raise bounds.passed("read") from None
        return _head_of(stream)

    def _body(self, line: _Line, stream: Stream, bounds: _Bounds) -> Iterator[bytes]:
        while True:
            try:
                while not stream.is_readable:
                    line.pump(bounds.left("read"))
                chunk = line.wire.take(stream)
                line.flush(bounds.left("write"))
            except TimeoutError:
                raise bounds.passed("read") from None
            if chunk is None:
                return
            if chunk:
                yield chunk

    def _give_back(self, key: Hashable, held: Held, limits: ConnectionLimits) -> None:
        try:
            held.connection.flush(1.0)
        except TimeoutError:
            pass
        if held.is_good(limits, len(self._idle.stack(key))):
            self._idle.keep(key, held)
        else:
            held.connection.close()

    def close(self) -> None:
        for line in self._idle.drain():
            line.close()

    def __repr__(self) -> str:
        return f"<Http2Connections {self._idle!r}>"


def _head_of(stream: Stream) -> tuple[int, Any]:
    if stream.failure is not None and stream.head is None:
        raise stream.failure
    if stream.head is None:
        raise SendFailed(RESET, "RemoteProtocolError", "the response ended before it began")
    return stream.head


class _Socket:
    """httpcore's `network_stream`, as far as it says something about the connection."""

    __slots__ = ("_found",)

    def __init__(self, sock: Any) -> None:
        self._found = sock

    def get_extra_info(self, info: str) -> Any:
        found = self._found
        if info == "ssl_object":
            return found if isinstance(found, ssl.SSLSocket) else None
        if info == "socket":
            return found
        return {"client_addr": found.getsockname, "server_addr": found.getpeername}.get(info, lambda: None)()


# On asyncio


class _Shared(asyncio.Protocol):
    """A connection for many calls at a time."""

    transport: asyncio.Transport

    def __init__(self, limits: ConnectionLimits) -> None:
        self.wire = Http2(limits.max_concurrent_streams)
        self.changed = asyncio.Event()
        self.writable = asyncio.Event()
        self.writable.set()
        self.opened = self.idle_since = time.monotonic()
        self.served = 0
        self.is_leaving = False
        """Whether it takes no more calls: those under way are its last."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.wire.receive(data)
        self.changed.set()
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.wire.lose("Server disconnected" if exc is None else str(exc) or type(exc).__name__)
        self.changed.set()
        self.writable.set()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def flush(self) -> None:
        data = self.wire.outgoing()
        if data and not self.transport.is_closing():
            self.transport.write(data)
        if self.wire.is_done or (self.is_leaving and not self.wire.at_once):
            self.transport.close()

    def leave(self, stream: Stream) -> None:
        self.wire.leave(stream)
        self.idle_since = time.monotonic()
        self.flush()

    def is_usable(self, limits: ConnectionLimits, now: float) -> bool:
        """Whether a call may go out here now. One that has grown too old leaves."""
        if self.is_leaving or not self.wire.may_open or self.transport.is_closing():
            return False
        keepalive = KEEPALIVE if limits.idle_timeout is None else limits.idle_timeout
        if not may_serve(limits, self.served, self.opened, now) or (
            not self.wire.at_once and now - self.idle_since > keepalive
        ):
            self.retire()
            return False
        return True

    def retire(self) -> None:
        self.is_leaving = True
        self.flush()


class _OfLoop:
    """The connections of one event loop."""

    def __init__(self) -> None:
        self.lines: dict[Hashable, list[_Shared]] = {}
        self.opening: dict[Hashable, asyncio.Lock] = {}
        self.owner = os.getpid()
        self.swept = time.monotonic()

    def usable(self, key: Hashable, limits: ConnectionLimits) -> _Shared | None:
        lines, now = self.lines.get(key, ()), time.monotonic()
        return next((line for line in lines if line.is_usable(limits, now)), None)

    def sweep(self) -> None:
        """Forget what has ended, and end what nobody has used for long; at most once in KEEPALIVE seconds."""
        now = time.monotonic()
        if now - self.swept < KEEPALIVE:
            return
        self.swept = now
        for key, lines in list(self.lines.items()):
            for line in lines:
                if not line.wire.at_once and now - line.idle_since > KEEPALIVE:
                    line.retire()
            self.lines[key] = [line for line in lines if not line.transport.is_closing()]
            if not self.lines[key] and not self.opening[key].locked():
                del self.lines[key], self.opening[key]


class AsyncHttp2Connections(_Choice):
    """For the async engines. Connections belong to the event loop that opened them."""

    def __init__(self, offers: bool = False) -> None:
        super().__init__(offers)
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _OfLoop] = weakref.WeakKeyDictionary()

    async def send(self, request: WireRequest) -> AsyncWireResponse | None:
        """None when the server prefers HTTP/1.1. Raises SendFailed."""
        bounds, key = _Bounds(request.timeouts, request.timeout), key_of(request)
        limits = request.cluster.cluster.limits
        while True:
            found = await self._line(key, request, limits, bounds)
            if found is None:
                return None
            line, reused = found
            before = line.wire.received
            line.served += 1
            stream: Stream | None = None
            try:
                stream, has_body = _open(line.wire, request)
                changed = asyncio.Event()
                stream.wake = changed.set
                line.flush()
                if has_body:
                    await self._upload(line, stream, changed, request, bounds)
                while stream.head is None and not stream.is_over:
                    await _until(changed, bounds, "read")
                head = _head_of(stream)
                break
            except BaseException as error:
                if stream is None:
                    line.flush()
                else:
                    line.leave(stream)
                is_silent = line.wire.received == before
                if is_silent and isinstance(error, SendFailed) and error.failure in (TIMEOUT, CLIENT_TIMEOUT):
                    line.retire()  # a dead connection looks like this; a slow server gets another
                if reused and _may_go_again(request, error, line.wire, is_silent):
                    continue
                raise

        async def close() -> None:
            line.leave(stream)

        found_socket = line.transport.get_extra_info("socket")
        extensions = {"http_version": b"HTTP/2", "stream_id": stream.id, "network_stream": _Socket(found_socket)}
        body = _AsyncBody(line, stream, changed, _Bounds(request.timeouts, None))
        return AsyncWireResponse(*head, body, extensions, close)

    async def _line(
        self, key: Hashable, request: WireRequest, limits: ConnectionLimits, bounds: _Bounds
    ) -> tuple[_Shared, bool] | None:
        """A connection that takes a call now, and whether it was there before."""
        here = self._here()
        line = here.usable(key, limits)
        if line is not None:
            return line, line.served > 0
        try:
            async with asyncio.timeout(bounds.left("connect")):
                async with here.opening.setdefault(key, asyncio.Lock()):
                    line = here.usable(key, limits)
                    if line is not None:
                        return line, line.served > 0
                    here.sweep()
                    opened = await self._connect(request, limits)
                    if opened is None:
                        self.declined(request)
                        return None
                    here.lines.setdefault(key, []).append(opened)
                    return opened, False
        except TimeoutError as error:
            raise bounds.passed("connect") from error
        except OSError as error:
            raise _unconnected(error) from error

    async def _connect(self, request: WireRequest, limits: ConnectionLimits) -> _Shared | None:
        endpoint, tls = request.endpoint, request.tls
        _, line = await asyncio.get_running_loop().create_connection(
            lambda: _Shared(limits),
            endpoint.address,
            endpoint.port,
            ssl=None if tls is None else _offering(tls),
            server_hostname=request.host if tls is not None else None,
        )
        try:
            if not _is_http2(line.transport.get_extra_info("ssl_object")):
                line.transport.close()
                return None
            sock: Any = line.transport.get_extra_info("socket")
            for option in socket_options(limits):
                sock.setsockopt(*option)
            line.flush()
            while not line.wire.is_ready and not line.wire.is_broken:
                line.changed.clear()
                await line.changed.wait()
            if line.wire.is_broken:
                raise _no_http2(request)
            return line
        except BaseException:
            line.transport.abort()
            raise

    async def _upload(
        self, line: _Shared, stream: Stream, changed: asyncio.Event, request: WireRequest, bounds: _Bounds
    ) -> None:
        async for chunk in request.content:
            rest = memoryview(chunk)
            while rest and not stream.is_over:
                room = line.wire.room(stream)
                if room:
                    line.wire.send(stream, bytes(rest[:room]))
                    rest = rest[room:]
                    line.flush()
                    if not line.writable.is_set():
                        await _until(line.writable, bounds, "write", clears=False)
                else:
                    await _until(changed, bounds, "write")
            if stream.is_over:
                return
        line.wire.finish(stream)
        line.flush()

    def _here(self) -> _OfLoop:
        loop = asyncio.get_running_loop()
        found = self._loops.get(loop)
        if found is None or found.owner != os.getpid():
            found = self._loops[loop] = _OfLoop()
        return found

    async def aclose(self) -> None:
        for lines in self._here().lines.values():
            for line in lines:
                line.transport.abort()
        self._here().lines.clear()
        await asyncio.sleep(0)  # in which the transports close their sockets

    def __repr__(self) -> str:
        lines = [line for here in self._loops.values() for each in here.lines.values() for line in each]
        return f"<AsyncHttp2Connections {len(lines)} connections, {sum(line.wire.at_once for line in lines)} streams>"


async def _until(changed: asyncio.Event, bounds: _Bounds, phase: str, clears: bool = True) -> None:
    """Wait for something to happen to a stream."""
    if clears:
        changed.clear()
    try:
        async with asyncio.timeout(bounds.left(phase)):
            await changed.wait()
    except TimeoutError:
        raise bounds.passed(phase) from None


class _AsyncBody:
    __slots__ = ("_bounds", "_changed", "_line", "_stream")

    def __init__(self, line: _Shared, stream: Stream, changed: asyncio.Event, bounds: _Bounds) -> None:
        self._line, self._stream, self._changed, self._bounds = line, stream, changed, bounds

    async def __aiter__(self) -> AsyncIterator[bytes]:
        line, stream = self._line, self._stream
        while True:
            while not stream.is_readable:
                await _until(self._changed, self._bounds, "read")
            chunk = line.wire.take(stream)
            line.flush()
            if chunk is None:
                return
            if chunk:
                yield chunk


__all__ = ["AsyncHttp2Connections", "Http2Connections", "key_of"]
