"""A real HTTP/1.1 server on loopback, in a thread, that answers as a test tells it and remembers what it was sent."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import h11


@dataclass
class Received:
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: int
    """Counts the connections of this peer, from 1."""

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name.lower()), None)


@dataclass
class Answer:
    """drop: close the connection instead of answering. chunks: a chunked body, each sent by itself, after which
    `break_off` cuts the connection short. gate: awaited before the head is sent. raw: these bytes and nothing else,
    after which the connection ends, or stays open and silent if `stall` is set. trickle: such bytes one by one, with so
    many seconds between them."""

    status: int = 200
    body: bytes = b""
    headers: list[tuple[str, str]] = field(default_factory=list)
    chunks: Iterable[bytes] | AsyncIterator[bytes] | None = None
    drop: bool = False
    break_off: bool = False
    gate: Awaitable[Any] | None = None
    close: bool = False
    raw: bytes | None = None
    stall: bool = False
    trickle: tuple[bytes, float] | None = None


def plain(_: Received) -> Answer:
    return Answer(body=b"ok")


async def close(server: asyncio.Server) -> None:
    """No more is accepted, and what has been becomes a transport before the server closes: asyncio fails between the
    two, and leaves the socket open."""
    for each in server.sockets:
        asyncio.get_running_loop().remove_reader(each.fileno())
    await asyncio.sleep(0)
    server.close()


class Peer:
    """`with Peer(answer) as peer: ... peer.address`. `answer` may return an awaitable; it runs on the peer's loop."""

    def __init__(
        self,
        answer: Callable[[Received], Answer | Awaitable[Answer]] = plain,
        *,
        tls: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.answer = answer
        self.received: list[Received] = []
        self.connections = 0
        self.open_connections = 0
        self._tls = tls
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peer")
        self.loop: asyncio.AbstractEventLoop
        self.host, self.port = host, port

    @property
    def address(self) -> tuple[str, int]:
        return (self.host, self.port)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connection, self.host, self.port, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        await close(server)
        # A connection that was being accepted becomes a task, which registers itself as it begins: cancelled before
        # that, it would close nothing. One that is still shaking hands after a second is cancelled all the same.
        this, patience = asyncio.current_task(), 10
        while others := asyncio.all_tasks() - {this}:
            for task in others & self._tasks if patience else others:
                task.cancel()
            await asyncio.wait(others, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
            patience -= 1 if others == asyncio.all_tasks() - {this} and patience else 0

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        self.open_connections += 1
        number = self.connections
        try:
            await self._talk(reader, writer, number)
        except (OSError, h11.RemoteProtocolError):
            pass
        except asyncio.CancelledError:  # the peer is stopped
            writer.transport.abort()
        finally:
            writer.close()
            with suppress(OSError, TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(writer.wait_closed(), 1)  # TLS may have nobody to say goodbye to
            # What nobody reads is never sent, and until it is, close() leaves the socket open.
            writer.transport.abort()
            self.open_connections -= 1  # last: who waits for it to be closed goes on now

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        wire = h11.Connection(h11.SERVER)

        async def next_event() -> Any:
            while (event := wire.next_event()) is h11.NEED_DATA:
                wire.receive_data(await reader.read(65536))
            return event

        while True:
            head = await next_event()
            if not isinstance(head, h11.Request):
                return
            body = b""
            while isinstance(part := await next_event(), h11.Data):
                body += bytes(part.data)
            received = Received(
                head.method.decode(),
                head.target.decode(),
                [(name.decode(), value.decode("latin-1")) for name, value in head.headers],
                body,
                number,
            )
            self.received.append(received)
            answer = self.answer(received)
            if not isinstance(answer, Answer):
                answer = await answer
            if answer.gate is not None:
                await answer.gate
            if answer.drop:
                return
            if answer.trickle is not None:
                data, pause = answer.trickle
                for at in range(len(data)):
                    writer.write(data[at : at + 1])
                    await writer.drain()
                    await asyncio.sleep(pause)
                return
            if answer.raw is not None:
                writer.write(answer.raw)
                await writer.drain()
                if answer.stall:
                    await self._stop.wait()
                return
            headers = list(answer.headers)
            if answer.chunks is None:
                headers.append(("content-length", str(len(answer.body))))
            else:
                headers.append(("transfer-encoding", "chunked"))
            if answer.close:
                headers.append(("connection", "close"))
            out = wire.send(h11.Response(status_code=answer.status, headers=headers, reason=b"As told"))
            if answer.chunks is None:
                out += wire.send(h11.Data(data=answer.body)) if head.method != b"HEAD" else b""
            else:
                writer.write(out)
                out = b""
                if hasattr(answer.chunks, "__aiter__"):
                    async for chunk in answer.chunks:
                        writer.write(wire.send(h11.Data(data=chunk)))
                        await writer.drain()
                else:
                    for chunk in answer.chunks:
                        writer.write(wire.send(h11.Data(data=chunk)))
                        await writer.drain()
                if answer.break_off:
                    await writer.drain()
                    return
            writer.write(out + wire.send(h11.EndOfMessage()))
            await writer.drain()
            if wire.our_state is h11.MUST_CLOSE:
                return
            wire.start_next_cycle()


_held: list[socket.socket] = []
"""Bound, and not listening, as long as this process lives."""


def refusing_port() -> int:
    """A port that refuses connections, and that no other process can take."""
    _held.append(socket.socket())
    _held[-1].bind(("127.0.0.1", 0))
    return int(_held[-1].getsockname()[1])


def reserved_port() -> int:
    """A port for a server that shares its port, as gRPC's and Envoy's do (SO_REUSEPORT): nobody else is given it."""
    _held.append(socket.socket())
    _held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    _held[-1].bind(("127.0.0.1", 0))
    return int(_held[-1].getsockname()[1])


def unused_port() -> int:
    """A port that was free a moment ago: for servers that can neither bind port 0 and be asked, nor share one
    (`reserved_port`). Where nobody is to listen, `refusing_port`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def other_grpcio() -> dict[str, str]:
    """Environment of a process whose grpcio is not the installed one but the one in the folder MESHLIB_TEST_GRPCIO,
    where that is set (`make test-versions`)."""
    folder = os.environ.get("MESHLIB_TEST_GRPCIO")
    return {"PYTHONPATH": folder} if folder else {}


def envoy_binary() -> Path:
    """The one that `make test` installs, or MESHLIB_TEST_ENVOY's."""
    return Path(os.environ.get("MESHLIB_TEST_ENVOY") or Path(__file__).parents[1] / ".venv" / "envoy" / "bin" / "envoy")
