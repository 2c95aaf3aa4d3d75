"""Where do calls by HTTP/1.1 arrive? HttpEndpoint: a real port on loopback that answers as its script says."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import h11

from meshlib.testing.ports import HOST, bound
from meshlib.testing.script import RESET, Received, Response, Script

_DEADLINE = 10.0
"""Seconds for the loop to do as it is told: it only ever waits for itself."""


class LoopThread:
    """One event loop for all endpoints of a test, started with the first."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="meshlib-testing", daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(_DEADLINE)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_DEADLINE)
        self.loop.close()


class HttpEndpoint:
    """Listens from the beginning. `down` refuses connections and ends those there are; `up` is the way back."""

    def __init__(self, thread: LoopThread, script: Script, tell: Callable[[Received], None]) -> None:
        self._thread, self._script, self._tell = thread, script, tell
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket: socket.socket | None = bound()
        self.port: int = self._socket.getsockname()[1]
        self._server: asyncio.Server | None = None
        self.up()

    def up(self) -> None:
        if self._server is None:
            self._thread.run(self._listen())

    def down(self) -> None:
        if self._server is not None:
            self._thread.run(self._stop())
            self._socket = bound(self.port)

    def close(self) -> None:
        if self._server is not None:
            self._thread.run(self._stop())
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connection, sock=self._socket)
        self._socket = None  # the server's own, from here on

    async def _stop(self) -> None:
        assert self._server is not None
        server, self._server = self._server, None
        with suppress(NotImplementedError):  # Windows' own loop
            for each in server.sockets:
                asyncio.get_running_loop().remove_reader(each.fileno())
        await asyncio.sleep(0)  # what was being accepted is a transport now: without, asyncio would leave it open
        server.close()
        await asyncio.sleep(0)  # and has its task now,
        await asyncio.sleep(0)  # which begins: one that is cancelled before would close nothing
        while tasks := tuple(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # came in the moment it stopped
            writer.transport.abort()
            return
        wire = h11.Connection(h11.SERVER)
        try:
            while await self._one_request(wire, reader, writer):
                wire.start_next_cycle()
        except (OSError, h11.RemoteProtocolError):
            pass
        except asyncio.CancelledError:
            _reset(writer)
        finally:
            writer.close()
            with suppress(OSError, TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(writer.wait_closed(), 1.0)
            writer.transport.abort()

    async def _one_request(
        self, wire: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Whether another may follow on this connection."""

        async def event() -> Any:
            while (found := wire.next_event()) is h11.NEED_DATA:
                if wire.they_are_waiting_for_100_continue:
                    writer.write(wire.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
                wire.receive_data(await reader.read(65536))
            return found

        head = await event()
        if not isinstance(head, h11.Request):
            return False
        parts: list[bytes] = []
        while isinstance(part := await event(), h11.Data):
            parts.append(bytes(part.data))
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in head.headers}
        received = Received(head.method.decode(), head.target.decode("latin-1"), headers, b"".join(parts))
        delay, answer = self._script.take()
        self._tell(received)
        if delay:
            await asyncio.sleep(delay)
        try:
            response = answer(received)
        except Exception as error:  # the test's own function
            response = Response(500, repr(error).encode())
        if response is RESET:
            _reset(writer)
            return False
        writer.write(_response(wire, response, head.method == b"HEAD"))
        await writer.drain()
        return wire.our_state is not h11.MUST_CLOSE

    def __repr__(self) -> str:
        return f"<HttpEndpoint {HOST}:{self.port} {'up' if self._server else 'down'}>"


def _response(wire: h11.Connection, response: Response, is_head: bool) -> bytes:
    names = {name.lower() for name in response.headers}
    headers = list(response.headers.items())
    if "content-length" not in names and response.status not in (204, 304):
        headers.append(("content-length", str(len(response.body))))
    data = wire.send(h11.Response(status_code=response.status, headers=headers)) or b""
    if response.body and not is_head:
        data += wire.send(h11.Data(data=response.body)) or b""
    return data + (wire.send(h11.EndOfMessage()) or b"")


def _reset(writer: asyncio.StreamWriter) -> None:
    """An RST on the wire, as of a process that died: SO_LINGER 0 (socket(7))."""
    found = writer.get_extra_info("socket")
    if found is not None:
        with suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
