"""Whoever gives up in the middle of a TLS handshake leaves no connection open behind him."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from meshlib.kube.client import KubeClient
from meshlib.kube.settings import KubeSettings
from snapshots import mesh, publish, service

PATIENCE = 20.0


async def by_the_mesh(port: int) -> None:
    with mesh() as made:
        publish(made, service(f"reviews:{port}", [("127.0.0.1", port)]))
        async with made.AsyncClient() as client:
            await client.get(f"https://reviews:{port}/", timeout=PATIENCE)


async def by_the_client_of_kubernetes(port: int) -> None:
    async with KubeClient(KubeSettings(f"https://127.0.0.1:{port}")) as client:
        await client.get("/version")


@contextlib.asynccontextmanager
async def silent() -> AsyncIterator[tuple[int, asyncio.Event, asyncio.Event]]:
    """A server that takes a greeting and says nothing: its port, whether it was greeted, and whether it was left."""
    greeted, left = asyncio.Event(), asyncio.Event()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.readexactly(1)
            greeted.set()
            await reader.read()
        left.set()
        writer.close()

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], greeted, left


@pytest.mark.parametrize("call", [by_the_mesh, by_the_client_of_kubernetes])
async def test_a_cancelled_handshake_closes_its_connection(call: Callable[[int], Awaitable[None]]) -> None:
    """At once, not when the garbage collector comes: the server holds something for each."""
    async with silent() as (port, greeted, left):
        calling = asyncio.ensure_future(call(port))
        await asyncio.wait_for(greeted.wait(), PATIENCE)
        calling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await calling
        await asyncio.wait_for(left.wait(), PATIENCE)
