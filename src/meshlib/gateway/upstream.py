"""How does a request reach its upstream? An engine (outbound/wire) for proxying, on asyncio's transports and llhttp.

What a proxy needs beyond the client libraries' engines: a request's body goes out while the response already comes
in, so that a server's early word (401, 413) is heard; an upgraded connection is handed over as bytes; and what stands
between the two sockets is a parser and no more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import httptools

from meshlib.outbound.wire import AsyncWireResponse, RawHeaders, SendFailed, WireRequest
from meshlib.policy.retry import CONNECT_FAILURE, LOCAL, RESET, TIMEOUT

KEEPALIVE = 4.0
"""Seconds an idle connection is kept: less than uvicorn's 5, so that the gateway is the one who closes."""
MAX_IDLE = 128
"""Idle connections kept for one endpoint; one more is closed when it comes back."""
MAX_HEAD = 60 * 1024
"""Bytes of a response's head (Envoy max_response_headers_kb: 60)."""
BUFFERED = 65536
"""Bytes of a response that may wait here before its server is held up."""

_Key = tuple[str, str, int, object]


def _broken(message: str) -> SendFailed:
    return SendFailed(RESET, "RemoteProtocolError", message)


class UpstreamEngine:
    """Sends attempts and keeps connections, one pool for each (cluster, endpoint). Belongs to one event loop."""

    speaks_http2 = False

    def __init__(self) -> None:
        self._idle: dict[_Key, list[_Connection]] = {}
        self._is_closed = False

    async def send(self, request: WireRequest) -> AsyncWireResponse:
        try:
            async with asyncio.timeout(request.timeout):
                return await self._send(request)
        except TimeoutError as error:
            raise SendFailed(TIMEOUT, "ReadTimeout", f"no response within {request.timeout or 0:.3g} s") from error

    async def _send(self, request: WireRequest) -> AsyncWireResponse:
        key = (request.cluster.name, request.endpoint.address, request.endpoint.port, request.tls)
        connection = await self._exchange(key, request)

        async def close() -> None:
            self._give_back(key, connection, request)

        return AsyncWireResponse(
            connection.status, connection.headers, connection, {"network_stream": connection}, close
        )

    async def _exchange(self, key: _Key, request: WireRequest) -> _Connection:
        """A connection on which the response's head has come."""
        head = _head(request)
        while True:
            reused = self._take(key)
            connection = reused or await _connect(request)
            try:
                await connection.exchange(head, request)
                return connection
            except SendFailed:
                connection.abort()
                if reused is not None and request.resendable and not connection.has_spoken:
                    continue  # it was closed at the other end while we wrote
                raise
            except BaseException:
                connection.abort()
                raise

    def _take(self, key: _Key) -> _Connection | None:
        stack = self._idle.get(key)
        while stack:
            connection = stack.pop()
            connection.stop_idling()
            if connection.is_reusable:
                return connection
        return None

    def _give_back(self, key: _Key, connection: _Connection, request: WireRequest) -> None:
        limits = request.cluster.cluster.limits
        most = limits.max_requests_per_connection
        stack = self._idle.setdefault(key, [])
        if self._is_closed or len(stack) >= MAX_IDLE or (most and connection.requests >= most):
            connection.end()
        elif connection.finish():
            stack.append(connection)

            def expire() -> None:
                connection.end()
                if connection in stack:
                    stack.remove(connection)
                if not stack and self._idle.get(key) is stack:
                    del self._idle[key]

            connection.idle(min(KEEPALIVE, limits.idle_timeout or KEEPALIVE), expire)

    async def aclose(self) -> None:
        self._is_closed = True
        for stack in self._idle.values():
            for connection in stack:
                connection.stop_idling()
                connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # transports close on the loop's next turn

    def __repr__(self) -> str:
        return f"<UpstreamEngine {sum(map(len, self._idle.values()))} idle connections to {len(self._idle)} endpoints>"


def _head(request: WireRequest) -> bytes:
    lines = [b"%b %b HTTP/1.1" % (request.method, request.target)]
    lines += [b"%b: %b" % pair for pair in request.headers]
    head = b"\r\n".join((*lines, b"", b""))
    # What users write in YAML (a rewrite, a header's value) may not add a line.
    if head.count(b"\n") != len(lines) + 1 or head.count(b"\r") != len(lines) + 1 or b"\0" in head:
        raise SendFailed(LOCAL, "LocalProtocolError", "a line break in a header or in the request's target")
    if b" " in request.target or not request.target:
        raise SendFailed(LOCAL, "LocalProtocolError", f"request target {request.target!r}")
    return head


async def _connect(request: WireRequest) -> _Connection:
    loop = asyncio.get_running_loop()
    endpoint, limit = request.endpoint, request.timeouts.get("connect")
    try:
        async with asyncio.timeout(limit):
            _, connection = await loop.create_connection(
                _Connection,
                endpoint.address,
                endpoint.port,
                ssl=request.tls,
                server_hostname=request.host if request.tls is not None else None,
            )
            return connection
    except TimeoutError as error:
        raise SendFailed(CONNECT_FAILURE, "ConnectTimeout", f"no connection within {limit or 0:.3g} s") from error
    except (OSError, ValueError) as error:  # ValueError: a host name that can't be one
        raise SendFailed(CONNECT_FAILURE, "ConnectError", str(error) or type(error).__name__) from error


class _Connection(asyncio.Protocol):
    """One connection to an endpoint, with one exchange at a time; also that exchange's response body, and after an
    upgrade the bytes."""

    def __init__(self) -> None:
        self.requests = 0
        self.headers: RawHeaders = []
        self.status = 0
        self.has_spoken = False
        """Whether the server has sent anything in this exchange."""
        self._transport: asyncio.Transport
        self._parser: Any = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._changed = asyncio.Event()
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._head_size = 0
        self._is_paused = False
        self._is_head = False
        self._asks_for_upgrade = False
        self._has_head = False
        self._ends_with_connection = False
        self._is_complete = True
        self._is_upgraded = False
        self._keeps_alive = False
        self._error: SendFailed | None = None
        self._upload: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    # The exchange

    async def exchange(self, head: bytes, request: WireRequest) -> None:
        """Send, and wait for the response's head. Raises SendFailed."""
        self.requests += 1
        self.headers, self.status = [], 0
        self.has_spoken = self._has_head = self._is_complete = self._ends_with_connection = False
        self._head_size = 0
        self._is_head = request.method == b"HEAD"
        self._asks_for_upgrade = any(name == b"upgrade" for name, _ in request.headers)
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(head)
        if request.content is not None:
            is_chunked = not any(name.lower() == b"content-length" for name, _ in request.headers)
            self._upload = asyncio.create_task(self._send_body(request.content, is_chunked), name="meshlib-upload")
        while not self._has_head:
            if self._error is not None:
                raise self._error
            await self._news()

    async def _send_body(self, content: Any, is_chunked: bool) -> None:
        try:
            async for chunk in content:
                if chunk and not self._transport.is_closing():
                    self._transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if is_chunked else chunk)
                    await self._writable.wait()
            if is_chunked and not self._transport.is_closing():
                self._transport.write(b"0\r\n\r\n")
        except Exception as error:
            # The client has gone or sends too much: the server must not take what it has for all there is.
            self._fail(SendFailed(LOCAL, "LocalProtocolError", f"the request's body broke off: {error}"))
            self._transport.abort()

    async def _news(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _fail(self, error: SendFailed) -> None:
        if not self._is_complete and self._error is None:
            self._error = error
        self._changed.set()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """The next part of the response's body. Raises SendFailed when it broke off."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._is_complete:
                raise StopAsyncIteration
            await self._news()
        return self._take_all()

    def _take_all(self) -> bytes:
        data = b"".join(self._chunks) if len(self._chunks) > 1 else self._chunks[0]
        self._chunks.clear()
        self._size = 0
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        return data

    def _keep(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)
        if self._size > BUFFERED and not self._is_paused and not self._transport.is_closing():
            self._is_paused = True
            self._transport.pause_reading()
        self._changed.set()

    # After an upgrade

    async def read(self, most: int) -> bytes:
        """Bytes of an upgraded connection, whatever has come; b"" at its end."""
        while not self._chunks:
            if self._error is not None or self._is_complete:
                return b""
            await self._news()
        return self._take_all()

    async def write(self, data: bytes) -> None:
        self._transport.write(data)
        await self._writable.wait()

    # The end

    @property
    def is_reusable(self) -> bool:
        return self._is_complete and self._keeps_alive and self._error is None and not self._transport.is_closing()

    def finish(self) -> bool:
        """The exchange is over. Whether the connection is as good as new; it is ended otherwise."""
        sent = self._upload is None or self._upload.done()
        if sent and self.is_reusable and not self._chunks:
            self._parser = self._upload = None
            return True
        self.end()
        return False

    def end(self) -> None:
        if self._upload is not None and not self._upload.done():
            self._upload.cancel()
        self._parser = None
        if self._is_upgraded:
            self._transport.close()  # what was said last goes out
            asyncio.get_running_loop().call_later(1.0, self._transport.abort)
        elif self._is_complete and self._upload is None:
            self._transport.close()
        else:
            self._transport.abort()

    def abort(self) -> None:
        self._is_upgraded = self._is_complete = False
        self.end()

    def idle(self, seconds: float, expire: Callable[[], None]) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, expire)

    def stop_idling(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        if self._is_upgraded:
            self._keep(data)
            return
        if self._parser is None or self._is_complete:
            self._spoil()
            return
        self.has_spoken = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._has_head and self.status == 101:
                self._is_upgraded = True
                if rest := data[upgrade.args[0] :]:
                    self._keep(rest)
            else:
                self._fail(_broken("an upgrade that was not asked for"))
            return
        except httptools.HttpParserError as error:
            self._keeps_alive = False
            self._fail(_broken(str(error)))
            return
        if not self._has_head:
            self._head_size += len(data)
            if self._head_size > MAX_HEAD:
                self._fail(_broken(f"a head of more than {MAX_HEAD} bytes"))

    def eof_received(self) -> None:
        self._ended("the server closed the connection")

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended(str(exc) if exc else "the server closed the connection")
        self._writable.set()

    def _ended(self, why: str) -> None:
        self._keeps_alive = False
        if self._is_complete:
            pass
        elif self._is_upgraded or (self._has_head and self._ends_with_connection):
            self._is_complete = True
        elif self._has_head:
            self._fail(SendFailed(RESET, "ReadError", f"{why} in the response's body"))
        else:
            self._fail(SendFailed(RESET, "ReadError", f"{why} before a response's head"))
        self._changed.set()

    def _spoil(self) -> None:
        """The server says more than it was asked: no one may take it for the next answer."""
        self._keeps_alive = False
        self._transport.abort()

    # llhttp's calls

    def on_message_begin(self) -> None:
        if self._has_head:  # a second response in the same bytes
            self._spoil()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:  # a trailer otherwise: no one behind us was promised one
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._has_head:
            return
        status = self._parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self.headers = []
            return
        if status >= 600 or (status == 101 and not self._asks_for_upgrade):
            self._keeps_alive = False
            self._fail(_broken(f"status {status}"))
            return
        self.status = status
        self._has_head = True
        self._keeps_alive = self._parser.should_keep_alive()
        lengths = [value for name, value in self.headers if name.lower() == b"content-length"]
        codings = [value.strip().lower() for name, value in self.headers if name.lower() == b"transfer-encoding"]
        if codings and codings != [b"chunked"]:  # we take chunks apart and nothing else
            self._fail(_broken(f"transfer coding {codings!r}"))
            self._has_head, self._keeps_alive = False, False
            return
        self._ends_with_connection = not lengths and not codings
        if self._is_head:
            self._is_complete = True  # llhttp does not know that this answers a HEAD and would wait for a body
        self._changed.set()

    def on_body(self, data: bytes) -> None:
        if not self._is_complete:
            self._keep(data)

    def on_message_complete(self) -> None:
        if self._has_head and self.status != 101:
            self._is_complete = True
            self._changed.set()

    def __repr__(self) -> str:
        return f"<_Connection {self.requests} requests>"
