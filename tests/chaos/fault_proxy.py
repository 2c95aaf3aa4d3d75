"""A network that misbehaves as told: a TCP proxy in front of one endpoint, on real sockets.

What it does to a segment is drawn from the seed, the number of the connection and the direction, so a run can be had
again. Loss is what TCP makes of it: bytes that come late, and everything after them, too.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from peers import close

SEGMENT = 1448
"""Bytes of one Ethernet frame's payload, of which TCP loses all or nothing."""
RETRANSMISSION = 0.2
"""Seconds until Linux sends a lost segment again (TCP_RTO_MIN); doubled each time that it is lost once more."""
AHEAD = 64
"""Segments on their way; then whoever sends has to wait."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What the network does, in both directions where nothing else is said.

    delay, jitter: seconds that each byte takes, and up to so many more. loss: share of the segments that is lost.
    bandwidth: bytes a second, 0 for no limit. resets: share of the stretches of `reset_within` bytes, of what a server
    says on one connection, within which that connection ends by RST. swallow: nothing arrives any more and nobody is
    told, as behind a machine that lost its power or a firewall that forgot; a connection that it hit stays dead.
    """

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    bandwidth: float = 0.0
    resets: float = 0.0
    reset_within: int = 4096
    swallow: bool = False


GOOD = Faults()


class FaultProxy:
    """`with FaultProxy(endpoint) as proxy: proxy.port`. `faults` may be replaced at any time, from any thread."""

    def __init__(self, endpoint: tuple[str, int], *, seed: int = 1, faults: Faults = GOOD) -> None:
        self.endpoint, self.seed, self.faults = endpoint, seed, faults
        self.connections = self.resets = self.lost = self.swallowed = 0
        """Counts: connections taken, ended by RST, segments lost, connections that nothing comes out of any more."""
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="fault-proxy")

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=AHEAD * SEGMENT)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        await close(server)
        await asyncio.sleep(0)  # what was being accepted has its task now, and will have begun
        await asyncio.sleep(0)
        while tasks := {*self._tasks}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(asyncio.CancelledError):  # the proxy is stopped
            await _Connection(self, self.connections, reader, writer).run()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()


class _Connection:
    def __init__(
        self, proxy: FaultProxy, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.proxy, self.number, self.reader, self.writer = proxy, number, reader, writer
        self.is_dead = False
        self.draw = random.Random(f"{proxy.seed} {number} resets")
        self.stretch = 0
        """Where the next stretch begins, in bytes that the server has said."""
        self.reset_at = 0

    async def run(self) -> None:
        ends = [self.writer]
        try:
            try:
                there, back = await asyncio.open_connection(*self.proxy.endpoint, limit=AHEAD * SEGMENT)
            except OSError:
                _reset(self.writer)
                return
            ends.append(back)
            await _first(self._carry(self.reader, back, "there"), self._carry(there, self.writer, "back"))
        finally:
            for each in ends:
                each.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        """Until one side has ended and everything before that has arrived."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(AHEAD)
        await _first(self._take(reader, waiting, direction), self._hand_on(writer, waiting, direction))

    async def _take(
        self, reader: asyncio.StreamReader, waiting: asyncio.Queue[tuple[float, bytes]], direction: str
    ) -> None:
        """Puts what comes into the queue with the time at which it arrives."""
        rng, loop, free = random.Random(f"{self.proxy.seed} {self.number} {direction}"), self.proxy._loop, 0.0
        while True:
            try:
                data = await reader.read(AHEAD * SEGMENT)
            except OSError:
                data = b""
            faults = self.proxy.faults
            if faults.swallow and not self.is_dead:
                self.is_dead = True
                self.proxy.swallowed += 1
            if self.is_dead:
                if data:
                    continue
                await self.proxy._stop.wait()  # the end is not told either
            for at in range(0, len(data), SEGMENT):
                segment = data[at : at + SEGMENT]
                arrives = loop.time() + faults.delay + faults.jitter * rng.random()
                pause = RETRANSMISSION
                while rng.random() < faults.loss:
                    self.proxy.lost += 1
                    arrives += pause
                    pause *= 2
                free = max(arrives, free)
                if faults.bandwidth:
                    free += len(segment) / faults.bandwidth
                await waiting.put((free, segment))
            if not data:
                await waiting.put((free, b""))
                await asyncio.Event().wait()  # whoever hands on ends it

    async def _hand_on(
        self, writer: asyncio.StreamWriter, waiting: asyncio.Queue[tuple[float, bytes]], direction: str
    ) -> None:
        said = 0
        while True:
            at, segment = await waiting.get()
            if (ahead := at - self.proxy._loop.time()) > 0:
                await asyncio.sleep(ahead)
            if self.is_dead:
                await self.proxy._stop.wait()
            if not segment:
                writer.close()
                return
            if direction == "back" and self._is_reset_within(said, said + len(segment)):
                writer.write(segment[: self.reset_at - said])
                await writer.drain()
                self.proxy.resets += 1
                _reset(writer)
                return
            said += len(segment)
            try:
                writer.write(segment)
                await writer.drain()
            except OSError:
                return

    def _is_reset_within(self, begin: int, end: int) -> bool:
        """Draws for each stretch that begins here; `reset_at` is then where the connection ends."""
        faults = self.proxy.faults
        while faults.resets and self.stretch < end:
            at = self.stretch + self.draw.randint(1, faults.reset_within)
            self.reset_at = at if self.draw.random() < faults.resets else 0
            if self.reset_at:
                self.stretch = 1 << 62
                break
            self.stretch += faults.reset_within
        return begin < self.reset_at <= end


def _reset(writer: asyncio.StreamWriter) -> None:
    """By RST: close() of a socket that does not linger."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _first(*parts: Coroutine[Any, Any, None]) -> None:
    """Until the first of them is over; the others are cancelled."""
    tasks = [asyncio.ensure_future(each) for each in parts]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
