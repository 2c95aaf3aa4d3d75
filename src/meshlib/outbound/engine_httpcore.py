"""How does an attempt reach the wire through httpcore? Its connections, under pools of our own.

httpcore's own pool scans every connection for every request, twice, and collapses with concurrency (encode/httpcore
#1035); it also shares a connection between two services behind one address. Here each (cluster, endpoint) has a stack
of idle connections: take one, or open one; give it back when the body ends. `httpcore2` has the same classes, so both
use this file.

HTTP/2 is spoken where the cluster says so (Istio's h2UpgradePolicy, ports named http2 or grpc), one call at a time on a
connection: httpcore's sends from several threads get in each other's way, and a stream that is given up there leaves
what still arrives for it uncounted, so that the connection's window shrinks until all its calls stand still.
"""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from meshlib.model import ConnectionLimits
from meshlib.outbound.connections import KEEPALIVE, may_serve, socket_options
from meshlib.outbound.wire import AsyncWireResponse, SendFailed, WireRequest, WireResponse
from meshlib.policy.retry import CLIENT_TIMEOUT, CONNECT_FAILURE, LOCAL, REFUSED_STREAM, RESET, TIMEOUT

MAX_IDLE = 128
"""Idle connections kept for one endpoint; one more is closed when it comes back."""

_Key = tuple[str, str, int, object]

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
_REFUSED = 7
"""HTTP/2's REFUSED_STREAM (RFC 9113, 7): the server has not looked at the request."""
_HAS_H2 = find_spec("h2") is not None


def _key(request: WireRequest) -> _Key:
    return (request.cluster.name, request.endpoint.address, request.endpoint.port, request.tls)


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
    if _is_refused(error):
        return SendFailed(
            REFUSED_STREAM, "RemoteProtocolError", f"the server has refused the stream: {str(error) or name}"
        )
    failure = _FAILURES.get(name, LOCAL)
    if name in _TIMEOUTS and request.timeout is not None and time.monotonic() - started >= request.timeout - 0.001:
        failure = TIMEOUT  # the phase was cut to the call's remaining time, so it is the mesh's timeout that passed
    return SendFailed(failure, name, str(error) or name)


def _is_refused(error: Exception) -> bool:
    """Whether the server says that it has not begun with this request, so that any method may be sent again: its stream
    was refused, or lies beyond the last one that a GOAWAY lets in (RFC 9113, 6.8)."""
    if type(error).__name__ == "ConnectionNotAvailable":
        return True
    (event, *_) = error.args or (None,)
    if type(event).__name__ == "ConnectionTerminated":
        return not getattr(event, "last_stream_id", 1)
    return type(event).__name__ == "StreamReset" and getattr(event, "error_code", None) == _REFUSED


def _protocols(request: WireRequest) -> dict[str, bool]:
    """How httpcore is told which HTTP to speak: with TLS the server chooses, without it knows beforehand."""
    if not request.cluster.cluster.http2 or not _HAS_H2:
        return {}
    return {"http1": request.scheme == b"https", "http2": True}


class _Body:
    """The body of an HTTP/2 response. A stream whose end was not seen still has data coming, for nobody."""

    __slots__ = ("_body", "is_whole")

    def __init__(self, body: Any) -> None:
        self._body = body
        self.is_whole = False

    def __iter__(self) -> Iterator[bytes]:
        yield from self._body
        self.is_whole = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._body:
            yield chunk
        self.is_whole = True


def _is_http2(response: Any) -> bool:
    return bool(response.extensions.get("http_version") == b"HTTP/2")


class _Held:
    """A connection, and what the destination's rules ask of it. Used by one call at a time."""

    __slots__ = ("connection", "opened", "served")

    def __init__(self, connection: Any, now: float) -> None:
        self.connection = connection
        self.opened = now
        self.served = 0


def _options(request: WireRequest) -> dict[str, Any]:
    """What httpcore's connections are made with, besides the origin."""
    limits = request.cluster.cluster.limits
    return {
        "ssl_context": request.tls,
        "keepalive_expiry": KEEPALIVE if limits.idle_timeout is None else limits.idle_timeout,
        "socket_options": socket_options(limits),
        **_protocols(request),
    }


class _Idle:
    """Stacks of idle connections by key. Pushing to and popping from a list is atomic, so no lock is needed."""

    __slots__ = ("_owner", "_stacks", "_swept")

    def __init__(self) -> None:
        self._stacks: dict[_Key, list[_Held]] = {}
        self._owner = os.getpid()
        self._swept = time.monotonic()

    def stack(self, key: _Key) -> list[_Held]:
        if os.getpid() != self._owner:
            # A fork: the sockets belong to the parent. They are neither used nor closed here (closing a TLS
            # connection would speak on the parent's behalf), just kept from being collected with a warning.
            _ORPHANS.extend(held for stack in self._stacks.values() for held in stack)
            self._stacks, self._owner = {}, os.getpid()
        found = self._stacks.get(key)
        return self._stacks.setdefault(key, []) if found is None else found

    def expired(self) -> Iterator[Any]:
        """Connections that have been idle too long, taken off; looked for at most once in KEEPALIVE seconds.

        A connection is otherwise only looked at when its endpoint is called, which for one that has left the mesh is
        never.
        """
        now = time.monotonic()
        if now - self._swept < KEEPALIVE:
            return
        self._swept = now
        for key, stack in list(self._stacks.items()):
            try:
                while stack[0].connection.has_expired():
                    yield stack.pop(0).connection
            except IndexError:  # empty, or another thread was faster
                if not stack:  # with it goes the TLS context, of which each rotation makes another
                    self._stacks.pop(key, None)

    def keep(self, key: _Key, held: _Held) -> None:
        """Push it where `stack` finds it, even if its stack was swept away meanwhile."""
        self.stack(key).append(held)

    def drain(self) -> Iterator[Any]:
        for stack in list(self._stacks.values()):
            while stack:
                yield stack.pop().connection

    def __repr__(self) -> str:
        return f"<Idle {sum(map(len, self._stacks.values()))} connections to {len(self._stacks)} endpoints>"


_ORPHANS: list[_Held] = []


class HttpcoreEngine:
    """The engine of the sync transports. core: the module httpcore or httpcore2."""

    speaks_http2 = _HAS_H2

    def __init__(self, core: ModuleType) -> None:
        self._core: Any = core
        self._idle = _Idle()

    def send(self, request: WireRequest) -> WireResponse:
        started = time.monotonic()
        key = _key(request)
        stack = self._idle.stack(key)
        native = _native(self._core, request)
        limits = request.cluster.cluster.limits
        while True:
            held = _reusable(stack, limits)
            reused = held is not None
            if held is None:
                for expired in self._idle.expired():
                    expired.close()
                held = _Held(self._core.HTTPConnection(native.url.origin, **_options(request)), time.monotonic())
            connection = held.connection
            held.served += 1
            try:
                response = connection.handle_request(native)
                break
            except Exception as error:
                connection.close()
                if reused and request.resendable and type(error).__name__ in _STALE:
                    continue
                raise _failed(error, request, started) from error
            except BaseException:
                connection.close()
                raise

        body = _Body(response.stream) if _is_http2(response) else None

        def close() -> None:
            try:
                response.close()
            except Exception:
                connection.close()
            if _is_good(held, stack, limits, body):
                self._idle.keep(key, held)
            else:
                connection.close()

        return WireResponse(response.status, response.headers, body or response.stream, response.extensions, close)

    def close(self) -> None:
        for connection in self._idle.drain():
            connection.close()

    def __repr__(self) -> str:
        return f"<HttpcoreEngine {self._idle!r}>"


def _reusable(stack: list[_Held], limits: ConnectionLimits) -> _Held | None:
    """The connection used last that is still good; those found dead on the way are closed."""
    while stack:
        try:
            held = stack.pop()
        except IndexError:  # another thread was faster
            return None
        if not held.connection.has_expired() and may_serve(limits, held.served, held.opened, time.monotonic()):
            return held
        held.connection.close()
    return None


def _is_good(held: _Held, stack: list[_Held], limits: ConnectionLimits, body: _Body | None) -> bool:
    """Whether a connection whose call has ended is kept for another."""
    return (
        held.connection.is_idle()
        and len(stack) < MAX_IDLE
        and (body is None or body.is_whole)
        and may_serve(limits, held.served, held.opened, time.monotonic())
    )


class AsyncHttpcoreEngine:
    """The engine of the async transports. Idle connections belong to the event loop that opened them; a loop that
    finds another's leaves them alone."""

    speaks_http2 = _HAS_H2

    def __init__(self, core: ModuleType) -> None:
        self._core: Any = core
        self._idle: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Idle] = weakref.WeakKeyDictionary()
        self._last: tuple[asyncio.AbstractEventLoop | None, _Idle | None] = (None, None)

    def _of_this_loop(self) -> _Idle:
        loop = asyncio.get_running_loop()
        last, idle = self._last
        if last is loop and idle is not None:
            return idle
        idle = self._idle.setdefault(loop, _Idle())
        self._last = (loop, idle)
        return idle

    async def send(self, request: WireRequest) -> AsyncWireResponse:
        started = time.monotonic()
        idle = self._of_this_loop()
        key = _key(request)
        stack = idle.stack(key)
        native = _native(self._core, request)
        limits = request.cluster.cluster.limits
        while True:
            held = await _reusable_async(stack, limits)
            reused = held is not None
            if held is None:
                for expired in idle.expired():
                    await expired.aclose()
                held = _Held(self._core.AsyncHTTPConnection(native.url.origin, **_options(request)), time.monotonic())
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

        body = _Body(response.stream) if _is_http2(response) else None

        async def close() -> None:
            try:
                await response.aclose()
            except Exception:
                await connection.aclose()
            if _is_good(held, stack, limits, body):
                idle.keep(key, held)
            else:
                await connection.aclose()

        stream = body or response.stream
        return AsyncWireResponse(response.status, response.headers, stream, response.extensions, close)

    async def aclose(self) -> None:
        for connection in self._of_this_loop().drain():
            await connection.aclose()

    def __repr__(self) -> str:
        return f"<AsyncHttpcoreEngine {list(self._idle.values())!r}>"


async def _reusable_async(stack: list[_Held], limits: ConnectionLimits) -> _Held | None:
    while stack:
        held = stack.pop()
        if not held.connection.has_expired() and may_serve(limits, held.served, held.opened, time.monotonic()):
            return held
        await held.connection.aclose()
    return None
