"""How does an attempt reach the wire through httpcore? Its connections, under pools of our own.

httpcore's own pool scans every connection for every request, twice, and collapses with concurrency (encode/httpcore
#1035); it also shares a connection between two services behind one address. Here each (cluster, endpoint) has a stack
of idle connections: take one, or open one; give it back when the body ends. `httpcore2` has the same classes, so both
use this file.
"""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from meshlib.outbound.wire import AsyncWireResponse, SendFailed, WireRequest, WireResponse
from meshlib.policy.retry import CLIENT_TIMEOUT, CONNECT_FAILURE, LOCAL, RESET, TIMEOUT

KEEPALIVE = 4.0
"""Seconds an idle connection is kept: less than uvicorn's 5, so that the client is the one who closes."""
MAX_IDLE = 128
"""Idle connections kept for one endpoint; one more is closed when it comes back."""

_Key = tuple[str, str, int, bytes]

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
_STALE = frozenset({"ReadError", "WriteError", "RemoteProtocolError"})


def _key(request: WireRequest) -> _Key:
    return (request.cluster.name, request.endpoint.address, request.endpoint.port, request.scheme)


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


class _Idle:
    """Stacks of idle connections by key. Pushing to and popping from a list is atomic, so no lock is needed."""

    __slots__ = ("_owner", "_stacks", "_swept")

    def __init__(self) -> None:
        self._stacks: dict[_Key, list[Any]] = {}
        self._owner = os.getpid()
        self._swept = time.monotonic()

    def stack(self, key: _Key) -> list[Any]:
        if os.getpid() != self._owner:
            # A fork: the sockets belong to the parent. They are neither used nor closed here (closing a TLS
            # connection would speak on the parent's behalf), just kept from being collected with a warning.
            _ORPHANS.extend(connection for stack in self._stacks.values() for connection in stack)
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
        for stack in list(self._stacks.values()):
            try:
                while stack[0].has_expired():
                    yield stack.pop(0)
            except IndexError:  # empty, or another thread was faster
                continue

    def drain(self) -> Iterator[Any]:
        for stack in list(self._stacks.values()):
            while stack:
                yield stack.pop()

    def __repr__(self) -> str:
        return f"<Idle {sum(map(len, self._stacks.values()))} connections to {len(self._stacks)} endpoints>"


_ORPHANS: list[Any] = []


class HttpcoreEngine:
    """The engine of the sync transports. core: the module httpcore or httpcore2."""

    def __init__(self, core: ModuleType) -> None:
        self._core: Any = core
        self._idle = _Idle()

    def send(self, request: WireRequest) -> WireResponse:
        started = time.monotonic()
        key = _key(request)
        stack = self._idle.stack(key)
        native = _native(self._core, request)
        while True:
            connection = _reusable(stack)
            reused = connection is not None
            if connection is None:
                for expired in self._idle.expired():
                    expired.close()
                connection = self._core.HTTPConnection(
                    native.url.origin, ssl_context=request.tls, keepalive_expiry=KEEPALIVE
                )
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

        def close() -> None:
            try:
                response.close()
            except Exception:
                connection.close()
            if connection.is_idle() and len(stack) < MAX_IDLE:
                stack.append(connection)
            else:
                connection.close()

        return WireResponse(response.status, response.headers, response.stream, response.extensions, close)

    def close(self) -> None:
        for connection in self._idle.drain():
            connection.close()

    def __repr__(self) -> str:
        return f"<HttpcoreEngine {self._idle!r}>"


def _reusable(stack: list[Any]) -> Any | None:
    """The connection used last that is still good; those found dead on the way are closed."""
    while stack:
        try:
            connection = stack.pop()
        except IndexError:  # another thread was faster
            return None
        if not connection.has_expired():
            return connection
        connection.close()
    return None


class AsyncHttpcoreEngine:
    """The engine of the async transports. Idle connections belong to the event loop that opened them; a loop that
    finds another's leaves them alone."""

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
        stack = idle.stack(_key(request))
        native = _native(self._core, request)
        while True:
            connection = await _reusable_async(stack)
            reused = connection is not None
            if connection is None:
                for expired in idle.expired():
                    await expired.aclose()
                connection = self._core.AsyncHTTPConnection(
                    native.url.origin, ssl_context=request.tls, keepalive_expiry=KEEPALIVE
                )
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
            if connection.is_idle() and len(stack) < MAX_IDLE:
                stack.append(connection)
            else:
                await connection.aclose()

        return AsyncWireResponse(response.status, response.headers, response.stream, response.extensions, close)

    async def aclose(self) -> None:
        for connection in self._of_this_loop().drain():
            await connection.aclose()

    def __repr__(self) -> str:
        return f"<AsyncHttpcoreEngine {list(self._idle.values())!r}>"


async def _reusable_async(stack: list[Any]) -> Any | None:
    while stack:
        connection = stack.pop()
        if not connection.has_expired():
            return connection
        await connection.aclose()
    return None
