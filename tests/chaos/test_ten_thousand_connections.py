"""Do the inbound middleware and the gateway hold a crowd that says nothing, and still serve who comes in?"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chaos.recording import IS_FULL, Promise, Promising
from promises import within

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

CROWD = 10_000 if IS_FULL else 300
AT_ONCE = 200
"""Connections that are being made at a time."""
NEW = 200 if IS_FULL else 30
MEMORY = 64.0
"""kB for each idle connection: uvicorn's protocol, asyncio's transport, and what is ours of it."""


@contextmanager
def many_files(count: int) -> Iterator[None]:
    """For this process and its children. Skips where the system allows no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, count) if soft != resource.RLIM_INFINITY else soft
    if hard != resource.RLIM_INFINITY and wanted > hard:
        pytest.skip(f"needs {count} open files, and {hard} are allowed: ulimit -n {count}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Member:
    """One connection of the crowd."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def joined(cls, host: str, port: int) -> Member:
        return cls(*await asyncio.open_connection(host, port, limit=4096))

    async def ask(self, path: str = "/") -> bytes:
        self.writer.write(f"GET {path} HTTP/1.1\r\nhost: app.example.com\r\n\r\n".encode())
        async with asyncio.timeout(60):
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            size = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            body = await self.reader.readexactly(size)
        assert head.startswith(b"http/1.1 200"), head
        return body

    async def leave(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


@pytest.mark.parametrize("kind", ["gateway", *["middleware"] * IS_FULL])
async def test_a_silent_crowd_is_held_and_newcomers_are_served(tmp_path: Path, promise: Promising, kind: str) -> None:
    """Each has asked once and kept its connection, as browsers and pools of other services do."""
    async with promise(
        f"The {'inbound middleware' if kind == 'middleware' else 'gateway'} holds {CROWD:,} idle connections with at "
        f"most {MEMORY:g} kB for each, serves newcomers meanwhile, and each of the idle ones when it speaks again",
        f"{CROWD:,} keep-alive connections that asked once, then {NEW} new ones, then all again",
    ) as told:
        # The gateway's process holds the application's end as well.
        with many_files(CROWD + 1000):
            script = Path(__file__).with_name("crowd_server.py")
            server = await asyncio.create_subprocess_exec(
                *(sys.executable, str(script), kind, str(tmp_path)),
                env={**os.environ, "MESHLIB_CACHE_DIR": "-"},
                stdout=asyncio.subprocess.PIPE,
            )
            try:
                assert server.stdout is not None
                async with asyncio.timeout(60):
                    host, port = (await server.stdout.readline()).decode().split()
                await _crowd(host, int(port), told)
            finally:
                server.kill()
                await server.communicate()


async def _crowd(host: str, port: int, told: Promise) -> None:
    door = asyncio.Semaphore(AT_ONCE)

    async def joins() -> Member:
        async with door:
            member = await Member.joined(host, port)
            assert await member.ask() == b"ok"
            return member

    async def asks_again(member: Member) -> None:
        async with door:
            assert await member.ask() == b"ok"

    watcher = await Member.joined(host, port)
    for _ in range(20):  # what is imported and made once
        await watcher.ask()
    before, files = json.loads(await watcher.ask("/memory"))
    crowd = await asyncio.gather(*(joins() for _ in range(CROWD)))
    try:
        after, held = json.loads(await watcher.ask("/memory"))
        assert held - files >= CROWD
        told.counted("connections held", CROWD)
        slowest = 0.0
        for _ in range(NEW):
            began = time.monotonic()
            newcomer = await Member.joined(host, port)
            assert await newcomer.ask() == b"ok"
            slowest = max(slowest, time.monotonic() - began)
            await newcomer.leave()
        await asyncio.gather(*(asks_again(each) for each in crowd))
        told.counted("idle connections that were lost", 0)
        told.measured("a newcomer is answered within", slowest, at_most=within(2.0))
        # Of a few hundred the first ones' share is no measure.
        bound = MEMORY if IS_FULL else 10 * MEMORY
        told.measured("memory of a connection", (after - before) / CROWD / 1024, "kB", at_most=bound)
    finally:
        await asyncio.gather(*(each.leave() for each in crowd), watcher.leave(), return_exceptions=True)
