"""A real HTTP/2 server on loopback, in a thread, that does to each stream what a test tells it."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Self

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings

from peers import close

CANCEL, REFUSED_STREAM, INTERNAL_ERROR = 8, 7, 2


class Call:
    """One stream, as its server sees it. body is whole when `answer` is called."""

    def __init__(self, line: _Connection, number: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.line, self.number = line, number
        self.headers = [(name.decode(), value.decode("latin-1")) for name, value in headers]
        self.body = b""
        self.reset_by_client: int | None = None
        self.ended = asyncio.Event()

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def method(self) -> str | None:
        return self.header(":method")

    def respond(self, status: int = 200, headers: tuple[tuple[str, str], ...] = (), end: bool = False) -> None:
        lines = [(":status", str(status)), *headers]
        self.line.wire.send_headers(self.number, lines, end_stream=end)
        self.line.flush()

    async def data(self, data: bytes, end: bool = False) -> None:
        """As the client's windows let it."""
        wire = self.line.wire
        while data and self.reset_by_client is None:
            room = min(wire.local_flow_control_window(self.number), wire.max_outbound_frame_size)
            if room:
                wire.send_data(self.number, data[:room])
                data = data[room:]
                self.line.flush()
                await self.line.writer.drain()
            else:
                self.line.window.clear()
                await self.line.window.wait()
        if end and self.reset_by_client is None:
            wire.end_stream(self.number)
            self.line.flush()

    async def ok(self, body: bytes = b"ok") -> None:
        self.respond()
        await self.data(body, end=True)

    def reset(self, code: int) -> None:
        self.line.wire.reset_stream(self.number, code)
        self.line.flush()

    def go_away(self, last: int, code: int = 0) -> None:
        """A GOAWAY by hand, after which the connection goes on, which h2 can't. What comes beyond `last` is ignored."""
        self.line.last = last
        frame = last.to_bytes(4, "big") + code.to_bytes(4, "big")
        self.line.writer.write(len(frame).to_bytes(3, "big") + b"\x07\x00" + (0).to_bytes(4, "big") + frame)

    def cut(self) -> None:
        """End the connection, now."""
        self.line.writer.transport.abort()


async def plain(call: Call) -> None:
    await call.ok()


Answering = Callable[[Call], Awaitable[None]]


class Http2Peer:
    """`with Http2Peer(answer) as peer: ... peer.address`. streams: its MAX_CONCURRENT_STREAMS."""

    def __init__(self, answer: Answering = plain, *, tls: ssl.SSLContext | None = None, streams: int = 100) -> None:
        self.answer, self.streams, self._tls = answer, streams, tls
        self.calls: list[Call] = []
        self.lines: list[_Connection] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="http2-peer")
        self.loop: asyncio.AbstractEventLoop
        self.port = 0

    @property
    def address(self) -> tuple[str, int]:
        return ("127.0.0.1", self.port)

    @property
    def connections(self) -> int:
        return len(self.lines)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        await close(server)
        await asyncio.sleep(0)  # what was being accepted has its task now, and will have begun
        await asyncio.sleep(0)
        this = asyncio.current_task()
        for _ in range(50):
            others = asyncio.all_tasks() - {this}
            if not others:
                break
            for task in others:
                task.cancel()
            await asyncio.wait(others, timeout=0.1)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = _Connection(self, reader, writer)
        self.lines.append(line)
        try:
            await line.run()
        except (OSError, h2.exceptions.ProtocolError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            with suppress(OSError, asyncio.CancelledError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), 1)


class _Connection:
    def __init__(self, peer: Http2Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.peer, self.reader, self.writer = peer, reader, writer
        self.wire = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        self.window = asyncio.Event()
        self.calls: dict[int, Call] = {}
        self.is_open = True
        self.last = 1 << 31

    def flush(self) -> None:
        self.writer.write(self.wire.data_to_send())

    async def run(self) -> None:
        codes = h2.settings.SettingCodes
        self.wire.local_settings = h2.settings.Settings(
            client=False, initial_values={codes.MAX_CONCURRENT_STREAMS: self.peer.streams}
        )
        self.wire.initiate_connection()
        self.flush()
        tasks: set[asyncio.Task[Any]] = set()
        try:
            while data := await self.reader.read(65536):
                for event in self.wire.receive_data(data):
                    self._take(event, tasks)
                self.flush()
        finally:
            self.is_open = False
            for call in self.calls.values():
                call.ended.set()
            for task in tasks:
                task.cancel()

    def _take(self, event: Any, tasks: set[asyncio.Task[Any]]) -> None:
        events = h2.events
        if isinstance(event, events.RequestReceived):
            call = self.calls[event.stream_id] = Call(self, event.stream_id, event.headers)
            self.peer.calls.append(call)
        elif isinstance(event, events.DataReceived):
            self.calls[event.stream_id].body += event.data
            self.wire.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, events.StreamEnded) and event.stream_id <= self.last:
            task = asyncio.ensure_future(self._answer(self.calls[event.stream_id]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        elif isinstance(event, events.StreamReset):
            call = self.calls[event.stream_id]
            call.reset_by_client = int(event.error_code)
            call.ended.set()
            self.window.set()
        elif isinstance(event, events.WindowUpdated):
            self.window.set()

    async def _answer(self, call: Call) -> None:
        try:
            await self.peer.answer(call)
        except (h2.exceptions.ProtocolError, OSError):
            pass  # its client has gone
