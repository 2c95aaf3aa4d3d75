"""What may a client put on the wire? uvicorn's HTTP/1.1 protocol made strict, with a tunnel for upgraded connections.

llhttp refuses what smugglers live on (both Content-Length and Transfer-Encoding, bare LF, folded headers, a space
before the colon). What is left to do:
- bounds on a head's size, number of headers and time (431, 408);
- Host: exactly one, and valid (400); that of an absolute request target wins (RFC 9112, 3.2.2);
- HTTP/1.0 is answered 426, as by Envoy; a transfer coding other than `chunked` 501; an upgrade with a body 400;
- a response that ends before the request has ended closes the connection, since no one knows where the next request
  would begin;
- a request whose client has gone is cancelled;
- an application that returns before its response is complete has said all it knows: the connection is closed, so that
  the client can tell.
"""

from __future__ import annotations

import asyncio
import http
import logging
import re
from typing import TYPE_CHECKING, Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

if TYPE_CHECKING:
    from uvicorn.config import Config

    from meshlib.gateway.doors import Door
    from meshlib.outbound.wire import RawHeaders

_log = logging.getLogger("meshlib.gateway")

TUNNEL = "meshlib.tunnel"
"""ASGI extension of a request that asks for a WebSocket: its Tunnel."""
FILTER_CHAIN = "meshlib.filter_chain"
"""Key of scope["state"]: the FilterChain that took the connection."""

LINGER = 1.0
"""Seconds that a client which still sends is given to read why it was cut off (Envoy delayed_close_timeout)."""
FLUSH = 30.0
"""Seconds that a client is given to take what was written to it before its connection ended."""
BUFFERED = 65536
"""Bytes that may wait in a tunnel before its sender is held up."""
_AUTHORITY = re.compile(rb"(?:[A-Za-z0-9\-._~!$&'()*+,;=%]+|\[[0-9A-Fa-f:.%A-Za-z]+\])(?::[0-9]{0,5})?")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_WORDS = {408: b"request header timeout"}
"""Envoy's body for a refusal, where it is not the status's own phrase."""


class GatewayProtocol(HttpToolsProtocol):
    """One client's connection."""

    def __init__(self, config: Config, door: Door) -> None:
        super().__init__(config=config, server_state=door.state, app_state={})
        self.access_log = False
        self._door = door
        self._limits = door.limits
        self._outgoing = cast("asyncio.Transport", _Outgoing(self))
        self._task: asyncio.Task[None] | None = None
        self._running: RequestResponseCycle | None = None
        self._tunnel: Tunnel | None = None
        self._is_hung_up = False
        self._refusal = 0
        self._heads = 0
        self._head_size = 0
        self._is_in_head = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._door.is_closed:  # meanwhile, during the handshake
            transport.abort()
        self.filter_chain = self._door.filter_chain(transport.get_extra_info("ssl_object"))
        self.app_state = {FILTER_CHAIN: self.filter_chain}
        self._await_head()
        if self.filter_chain is not None and self.filter_chain not in self._door.listener.filter_chains:
            self.shutdown()  # it went during the handshake

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.pipeline.clear()
        for timer in (self._head_timer, self._linger_timer, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()
        if self._running is not None:
            self._running.disconnected = True
        if self._tunnel is not None:
            self._tunnel.lost()
        if self._task is not None:
            self._task.cancel()
        self._door.left()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        if self._tunnel is not None and self._tunnel.is_open and self.transport.can_write_eof():
            self._tunnel.lost()
            return True
        return None

    def data_received(self, data: bytes) -> None:
        if self._is_hung_up:
            return
        if self._tunnel is not None:
            self._tunnel.feed(data)
            return
        self._unset_keepalive_if_required()
        heads = self._heads
        was_between = not self._is_in_head and (not heads or not self.cycle.more_body)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._enter_tunnel(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            self._refuse(self._refusal or 400, str(error))
            return
        if self._is_in_head and self._heads == heads + was_between:
            # All of `data` is of one head. (What came with the end of a body before it, one read, goes uncounted.)
            self._head_size += len(data)
            if self._head_size > self._limits.head:
                self._refuse(431, "head too large")
        elif self._head_timer is None and (self._running is None or self._running.response_complete):
            self._await_head()  # an empty line between requests is no reason to wait for ever

    def _enter_tunnel(self, data: bytes) -> None:
        if self._tunnel is not None:
            self._tunnel.feed(data)

    def shutdown(self) -> None:
        """Close when idle, else after the response in flight, which says so if it can."""
        if self._running is not None and not self._running.response_complete:
            self._running.keep_alive = False
        super().shutdown()

    # The head

    def _await_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self._limits.head_timeout, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._is_in_head:
            self._refuse(408, "head not complete in time")
        else:
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._heads += 1
        self._head_size = 0
        self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        # llhttp reports trailers in the same way. One that was merged could be a second Host, after all checks.
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        is_upgrade = self.parser.should_upgrade()
        self._refusal = self._verdict(is_upgrade)
        if self._refusal:
            raise ValueError(f"refused with {self._refusal}")
        if not self.url.startswith(b"/"):
            self._take_authority_of_target()
        super().on_headers_complete()
        # super() has only scheduled the task, so what is changed here is there when it begins.
        self.cycle.transport = self._outgoing
        if is_upgrade:
            # llhttp reads no further request after this one, whatever becomes of the upgrade.
            self.cycle.keep_alive = False
            if self._asks_for_websocket():
                self._tunnel = Tunnel(self)
                cast("dict[str, Any]", self.scope)["extensions"] = {TUNNEL: self._tunnel}

    def _verdict(self, is_upgrade: bool) -> int:
        """The status that refuses this head; 0 when it will do."""
        headers: RawHeaders = self.headers
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in headers)
        if size > self._limits.head or len(headers) > self._limits.headers:
            return 431
        if self.parser.get_http_version() != "1.1":
            return 426
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not _AUTHORITY.fullmatch(hosts[0]):
            return 400
        if any(_CONTROL.search(value) for _, value in headers):
            return 400
        lengths = [value for name, value in headers if name == b"content-length"]
        codings = [value for name, value in headers if name == b"transfer-encoding"]
        if (lengths and codings) or len(lengths) > 1:
            return 400
        if codings and [coding.strip().lower() for coding in codings] != [b"chunked"]:
            return 501
        if is_upgrade and (codings or any(length.strip() != b"0" for length in lengths)):
            return 400
        if self.parser.get_method() == b"CONNECT":
            return 404  # Envoy: no route matches it
        return 0

    def _take_authority_of_target(self) -> None:
        """RFC 9112, 3.2.2: "a proxy MUST ignore the received Host header field (if any)" of an absolute-form target."""
        url = httptools.parse_url(self.url)
        if url.schema not in (b"http", b"https") or not url.host or b"@" in self.url.partition(b"?")[0]:
            self._refusal = 400
            raise ValueError("request target")
        host = b"[%b]" % url.host if b":" in url.host else url.host
        authority = host if not url.port else b"%b:%d" % (host, url.port)
        self.headers[:] = [pair if pair[0] != b"host" else (b"host", authority) for pair in self.headers]
        if not url.path:
            self.url = b"/" + (b"?" + url.query if url.query else b"")

    def _asks_for_websocket(self) -> bool:
        return any(name == b"upgrade" and value.lower() == b"websocket" for name, value in self.headers)

    # The request and its response

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        task = self.loop.create_task(self._serve(cycle, app), name="meshlib-gateway-request")
        self._task = task
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _serve(self, cycle: RequestResponseCycle, app: Any) -> None:
        async def send(message: Any) -> None:
            if cycle.more_body and message["type"] == "http.response.start":
                cycle.keep_alive = False
            await cycle.send(message)

        try:
            await app(cycle.scope, cycle.receive, send)
        except asyncio.CancelledError:
            if not self._is_hung_up:
                self.transport.abort()
            raise
        except Exception:
            _log.exception("%s %s failed in the gateway", cycle.scope["method"], self._door)
            if cycle.response_started:
                self._cut_off()
            else:
                await cycle.send_500_response()
        else:
            if not cycle.response_complete:
                self._cut_off()
        finally:
            cycle.on_response = lambda: None

    def on_response_complete(self) -> None:
        if not self._is_hung_up:
            super().on_response_complete()

    # The end

    def _refuse(self, status: int, why: str) -> None:
        """The client broke the rules. What is in flight before that is finished, if it can be."""
        _log.info("%s refused with %d: %s", self.client, status, why)
        self._is_in_head = False
        running = self._running
        if running is None or running.response_complete:
            self._answer_and_hang_up(status)
        elif running is self.cycle and running.more_body:
            # Its own body is broken.
            if running.response_started:
                self._is_hung_up = True
                self.transport.abort()
            else:
                running.disconnected = True
                self._answer_and_hang_up(status)
            if self._task is not None:
                self._task.cancel()
        else:
            self.pipeline.clear()
            running.keep_alive = False
            self.flow.pause_reading()

    def _answer_and_hang_up(self, status: int) -> None:
        phrase = http.HTTPStatus(status).phrase.encode("ascii")
        body = _WORDS.get(status, phrase)
        self.transport.write(
            b"HTTP/1.1 %d %b\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nserver: %b\r\n"
            b"connection: close\r\n\r\n%b" % (status, phrase, len(body), self._door.server_name, body)
        )
        self.hang_up(still_sends=True)

    def hang_up(self, still_sends: bool | None = None) -> None:
        """Close, after what was written has gone. A client that still sends would be reset and lose the answer, so it
        is told that nothing more comes, and given a moment."""
        if self._is_hung_up:
            return
        self._is_hung_up = True
        if still_sends is None:
            still_sends = self._running is not None and self._running.more_body
        if still_sends and self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()
            self.flow.resume_reading()
            self._linger_timer = self.loop.call_later(LINGER, self._linger, self.loop.time() + FLUSH)
        else:
            self._cut_off()

    def _linger(self, until: float) -> None:
        if self.transport.get_write_buffer_size() and self.loop.time() < until:
            self._linger_timer = self.loop.call_later(LINGER, self._linger, until)
        else:
            self.transport.abort()

    def _cut_off(self) -> None:
        """Close once what was written has gone; a client that takes none of it gets FLUSH seconds."""
        self._is_hung_up = True
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._linger_timer = self.loop.call_later(FLUSH, self.transport.abort)

    def __repr__(self) -> str:
        return f"<GatewayProtocol {self.client} at {self._door!r}>"


class _Outgoing:
    """What a response is written to: the transport, whose close is the protocol's."""

    __slots__ = ("_protocol",)

    def __init__(self, protocol: GatewayProtocol) -> None:
        self._protocol = protocol

    def write(self, data: bytes) -> None:
        self._protocol.transport.write(data)

    def is_closing(self) -> bool:
        return self._protocol._is_hung_up or self._protocol.transport.is_closing()

    def close(self) -> None:
        self._protocol.hang_up()


class Tunnel:
    """The client's side of an upgraded connection: bytes with flow control both ways; one reader, one writer."""

    __slots__ = ("_arrived", "_chunks", "_is_at_end", "_protocol", "_size", "is_open")

    def __init__(self, protocol: GatewayProtocol) -> None:
        self._protocol = protocol
        self._chunks: list[bytes] = []
        self._size = 0
        self._arrived = asyncio.Event()
        self._is_at_end = False
        self.is_open = False
        """Whether the upgrade was accepted."""

    def accept(self, headers: RawHeaders) -> None:
        """Answer 101. What follows is the tunnel's."""
        self.is_open = True
        lines = b"".join(b"%b: %b\r\n" % pair for pair in headers)
        self._protocol.transport.write(b"HTTP/1.1 101 Switching Protocols\r\n%b\r\n" % lines)

    async def read(self) -> bytes:
        """What has arrived; waits for it; b"" when the client has ended."""
        while not self._chunks and not self._is_at_end:
            self._arrived.clear()
            await self._arrived.wait()
        data = b"".join(self._chunks)
        self._chunks, self._size = [], 0
        self._protocol.flow.resume_reading()
        return data

    async def write(self, data: bytes) -> None:
        """Waits while the client is slow."""
        if not self._protocol.transport.is_closing():
            self._protocol.transport.write(data)
            await self._protocol.flow.drain()

    def feed(self, data: bytes) -> None:
        if not data:
            return
        self._chunks.append(data)
        self._size += len(data)
        if self._size > BUFFERED:
            self._protocol.flow.pause_reading()
        self._arrived.set()

    def lost(self) -> None:
        self._is_at_end = True
        self._arrived.set()
