"""How does an attempt reach the wire through httpcore? Its connections, under pools of our own.

httpcore's own pool scans every connection for every request, twice, and collapses with concurrency (encode/httpcore
#1035); it also shares a connection between two services behind one address. Here each (cluster, endpoint) has a stack
of idle connections: take one, or open one; give it back when the body ends. `httpcore2` has the same classes, so both
use this file.

HTTP/2 has connections of its own (outbound/engine_http2).
"""

from __future__ import annotations

import asyncio
import time
import weakref
from types import ModuleType
from typing import Any

from meshlib.outbound.connections import KEEPALIVE, socket_options
from meshlib.outbound.engine_http2 import AsyncHttp2Connections, Http2Connections, key_of
from meshlib.outbound.http2 import HAS_H2
from meshlib.outbound.idle import Held, Idle, reusable
from meshlib.outbound.wire import AsyncWireResponse, SendFailed, WireRequest, WireResponse
from meshlib.policy.retry import CLIENT_TIMEOUT, CONNECT_FAILURE, LOCAL, RESET, TIMEOUT

_FAILURES = {
    "ConnectError": CONNECT_FAILURE,
    "ConnectTimeout": CONNECT_FAILURE,
    "ReadError": RESET,
    "WriteError": RESET,
    "RemoteProtocolError": RESET,
    "ReadTimeout": CLIENT_TIMEOUT,
    "WriteTimeout": CLIENT_TIMEOUT,
}
_TIMEOUTS = frozenset({"ConnectTimeout", "ReadTimeout", "WriteTimeout"})
_STALE = frozenset({"ReadError", "WriteError", "RemoteProtocolError", "ConnectionNotAvailable"})


def _native(core: Any, request: WireRequest) -> Any:
    return core.Request(
        method=request.method,
        url=core.URL(
            scheme=request.scheme,
            host=request.endpoint.address.encode("ascii"),
            port=request.endpoint.port,
            target=request.target,
        ),
        headers=request.headers,
        content=request.content,
        extensions={"timeout": request.timeouts, "sni_hostname": request.host},
    )


def _failed(error: Exception, request: WireRequest, started: float) -> SendFailed:
    name = type(error).__name__
    failure = _FAILURES.get(name, LOCAL)
    if name in _TIMEOUTS and request.timeout is not None and time.monotonic() - started >= request.timeout - 0.001:
        failure = TIMEOUT  # the phase was cut to the call's remaining time, so it is the mesh's timeout that passed
    return SendFailed(failure, name, str(error) or name)


def _options(request: WireRequest) -> dict[str, Any]:
    """What httpcore's connections are made with, besides the origin."""
    limits = request.cluster.cluster.limits
    return {
        "ssl_context": request.tls,
        "keepalive_expiry": KEEPALIVE if limits.idle_timeout is None else limits.idle_timeout,
        "socket_options": socket_options(limits),
    }


class _Deadline:
    """Until when a connection's attempt may read and write, in monotonic seconds; None is no limit."""

    __slots__ = ("until",)

    def __init__(self) -> None:
        self.until: float | None = None


class _Timed:
    """A stream, or the backend that opens it, each step of which ends with the attempt's time: httpcore bounds single
    reads, and a server that sends its head byte by byte could go on for ever. Stands for httpcore's NetworkStream and
    NetworkBackend."""

    __slots__ = ("_core", "_deadline", "_inner")

    def __init__(self, core: Any, inner: Any, deadline: _Deadline) -> None:
        self._core, self._inner, self._deadline = core, inner, deadline

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **options: Any) -> _Timed:
        return _Timed(self._core, self._inner.connect_tcp(host, port, timeout, **options), self._deadline)

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> _Timed:
        return _Timed(self._core, self._inner.start_tls(ssl_context, server_hostname, timeout), self._deadline)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data: bytes = self._inner.read(max_bytes, self._left(timeout))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._left(timeout))

    def close(self) -> None:
        self._inner.close()

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)

    def _left(self, timeout: float | None) -> float | None:
        until = self._deadline.until
        if until is None:
            return timeout
        left = until - time.monotonic()
        if left <= 0:
            raise self._core.ReadTimeout("timed out")
        return left if timeout is None else min(left, timeout)


class _Opening:
    """Opens connections for https, for httpcore, which leaves one open whose TLS handshake is cancelled until the
    garbage collector finds it. Stands for its AsyncNetworkBackend, and for the stream before the handshake."""

    __slots__ = ("_inner",)

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def connect_tcp(self, host: str, port: int, **options: Any) -> _Opening:
        return _Opening(await self._inner.connect_tcp(host, port, **options))

    async def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> Any:
        try:
            return await self._inner.start_tls(ssl_context, server_hostname, timeout)
        except BaseException:
            await self._inner.aclose()
            raise


class _Timely(Held):
    """A connection, and the deadline of the attempt that has it."""

    __slots__ = ("deadline",)

    def __init__(self, connection: Any, deadline: _Deadline, now: float) -> None:
        super().__init__(connection, now)
        self.deadline = deadline


def _has_more(connection: Any) -> bool:
    """Whether the server has sent more than its response. httpcore keeps it, and takes it for the next one's."""
    wire = getattr(getattr(connection, "_connection", None), "_h11_state", None)
    return wire is not None and bool(wire.trailing_data[0])


class HttpcoreEngine:
    """The engine of the sync transports. core: the module httpcore or httpcore2. http2: offer it to https hosts."""

    speaks_http2 = HAS_H2

    def __init__(self, core: ModuleType, http2: bool = False) -> None:
        self._core: Any = core
        self._idle = Idle()
        self._http2 = Http2Connections(http2)

    def send(self, request: WireRequest) -> WireResponse:
        if self._http2.wants(request) and (answer := self._http2.send(request)) is not None:
            return answer
        started = time.monotonic()
        key = key_of(request)
        stack = self._idle.stack(key)
        native = _native(self._core, request)
        limits = request.cluster.cluster.limits
        while True:
            held: Any = reusable(stack, limits, _close)
            reused = held is not None
            if held is None:
                for expired in self._idle.expired():
                    expired.close()
                held = self._opened(native, request)
            connection, deadline = held.connection, held.deadline
            held.served += 1
            deadline.until = None if request.timeout is None else started + request.timeout
            try:
                response = connection.handle_request(native)
                deadline.until = None  # what bounds the body is the transport's
                break
            except Exception as error:
                connection.close()
                if reused and request.resendable and type(error).__name__ in _STALE:
                    continue
                raise _failed(error, request, started) from error
            except BaseException:
                connection.close()
                raise

        def close() -> None:
            try:
                response.close()
            except Exception:
                connection.close()
            if held.is_good(limits, len(stack)) and not _has_more(connection):
                self._idle.keep(key, held)
            else:
                connection.close()

        return WireResponse(response.status, response.headers, response.stream, response.extensions, close)

    def _opened(self, native: Any, request: WireRequest) -> _Timely:
        deadline = _Deadline()
        backend = _Timed(self._core, self._core.SyncBackend(), deadline)
        made = self._core.HTTPConnection(native.url.origin, network_backend=backend, **_options(request))
        return _Timely(made, deadline, time.monotonic())

    def close(self) -> None:
        self._http2.close()
        for connection in self._idle.drain():
            connection.close()

    def __repr__(self) -> str:
        return f"<HttpcoreEngine {self._idle!r}>"


def _close(connection: Any) -> None:
    connection.close()


class AsyncHttpcoreEngine:
    """The engine of the async transports. Idle connections belong to the event loop that opened them; a loop that
    finds another's leaves them alone."""

    speaks_http2 = HAS_H2

    def __init__(self, core: ModuleType, http2: bool = False) -> None:
        self._core: Any = core
        self._idle: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Idle] = weakref.WeakKeyDictionary()
        self._last: tuple[asyncio.AbstractEventLoop | None, Idle | None] = (None, None)
        self._http2 = AsyncHttp2Connections(http2)

    def _of_this_loop(self) -> Idle:
        loop = asyncio.get_running_loop()
        last, idle = self._last
        if last is loop and idle is not None:
            return idle
        idle = self._idle.setdefault(loop, Idle())
        self._last = (loop, idle)
        return idle

    async def send(self, request: WireRequest) -> AsyncWireResponse:
        if self._http2.wants(request) and (answer := await self._http2.send(request)) is not None:
            return answer
        started = time.monotonic()
        idle = self._of_this_loop()
        key = key_of(request)
        stack = idle.stack(key)
        native = _native(self._core, request)
        limits = request.cluster.cluster.limits
        while True:
            dead: list[Any] = []
            held = reusable(stack, limits, dead.append)
            for each in dead:
                await each.aclose()
            reused = held is not None
            if held is None:
                for expired in idle.expired():
                    await expired.aclose()
                held = Held(self._opened(native, request), time.monotonic())
            connection = held.connection
            held.served += 1
            try:
                if request.timeout is None:
                    response = await connection.handle_async_request(native)
                else:
                    async with asyncio.timeout(request.timeout):
                        response = await connection.handle_async_request(native)
                break
            except TimeoutError as error:
                await connection.aclose()
                raise SendFailed(TIMEOUT, "ReadTimeout", f"no response within {request.timeout:.3g} s") from error
            except Exception as error:
                await connection.aclose()
                if reused and request.resendable and type(error).__name__ in _STALE:
                    continue
                raise _failed(error, request, started) from error
            except BaseException:
                # Cancelled: httpcore has closed a connection that was in use; one that was still being opened is ours.
                await connection.aclose()
                raise

        async def close() -> None:
            try:
                await response.aclose()
            except Exception:
                await connection.aclose()
            if held.is_good(limits, len(stack)) and not _has_more(connection):
                idle.keep(key, held)
            else:
                await connection.aclose()

        return AsyncWireResponse(response.status, response.headers, response.stream, response.extensions, close)

    def _opened(self, native: Any, request: WireRequest) -> Any:
        options = _options(request)
        if request.tls is not None:
            options["network_backend"] = _Opening(self._core.AnyIOBackend())
        return self._core.AsyncHTTPConnection(native.url.origin, **options)

    async def aclose(self) -> None:
        await self._http2.aclose()
        for connection in self._of_this_loop().drain():
            await connection.aclose()

    def __repr__(self) -> str:
        return f"<AsyncHttpcoreEngine {list(self._idle.values())!r}>"
