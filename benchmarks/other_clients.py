"""What does the mesh add to a call by another client library? Each one meshed, as a ratio to itself bare."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from typing import Any, NamedTuple

import aiohttp
import requests
import urllib3

from benchmarks.httpx_overhead import URL, Round, Row, _async_round, _rows, _sync_round, meshed
from meshlib.mesh import Mesh

EVERY = 256
"""Connections that the bare clients keep: more than there are callers, which is their best case."""


class Member(NamedTuple):
    """A client, and the URL that it calls. `client.get(url)` is one call with its body read."""

    client: Any
    url: str
    close: Callable[[], Any]


class _Urllib3:
    def __init__(self, manager: urllib3.PoolManager) -> None:
        self.get = lambda url: manager.request("GET", url)


class _Aiohttp:
    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def get(self, url: str) -> bytes:
        async with self._session.get(url) as response:
            return await response.read()


def _session(adapter: requests.adapters.HTTPAdapter) -> requests.Session:
    made = requests.Session()
    made.mount("http://", adapter)
    return made


def _sync_members(library: str, mesh: Mesh, bare: str) -> dict[str, Member]:
    if library == "requests":
        kept = requests.adapters.HTTPAdapter(pool_maxsize=EVERY)
        ours = _session(kept), _session(mesh.requests_adapter())
        clients = {"requests": (ours[0], ours[0].close), "requests, meshed": (ours[1], ours[1].close)}
    else:
        managers = urllib3.PoolManager(maxsize=EVERY), mesh.urllib3()
        clients = {
            "urllib3": (_Urllib3(managers[0]), managers[0].clear),
            "urllib3, meshed": (_Urllib3(managers[1]), managers[1].clear),
        }
    urls = dict(zip(clients, (bare, URL), strict=True))
    return {name: Member(client, urls[name], close) for name, (client, close) in clients.items()}


def other_calls(port: int, concurrency: int, rounds: int, seconds: float) -> list[Row]:
    """requests and urllib3, each client shared by as many threads, and aiohttp, shared by as many tasks."""
    bare, rows = f"http://127.0.0.1:{port}/reviews/0", []
    with meshed([("127.0.0.1", port)]) as mesh:
        for library in ("requests", "urllib3"):
            members = _sync_members(library, mesh, bare)
            with ExitStack() as stack:
                for member in members.values():
                    stack.callback(member.close)
                played: dict[str, list[Round]] = {name: [] for name in members}
                for number in range(rounds + 1):
                    for name, member in members.items():
                        found = _sync_round(member.client, member.url, concurrency, seconds if number else 0.0)
                        if number:  # the first round opens the connections
                            played[name].append(found)
            rows += _rows(library, concurrency, played, [library])
        rows += asyncio.run(_aiohttp_calls(mesh, bare, concurrency, rounds, seconds))
    return rows


async def _aiohttp_calls(mesh: Mesh, bare: str, concurrency: int, rounds: int, seconds: float) -> list[Row]:
    async with AsyncExitStack() as stack:

        async def opened(*middlewares: Any) -> _Aiohttp:
            connector = aiohttp.TCPConnector(limit=0)
            return _Aiohttp(
                await stack.enter_async_context(aiohttp.ClientSession(connector=connector, middlewares=middlewares))
            )

        members: dict[str, tuple[Any, str]] = {
            "aiohttp": (await opened(), bare),
            "aiohttp, meshed": (await opened(mesh.aiohttp_middleware()), URL),
        }
        played: dict[str, list[Round]] = {name: [] for name in members}
        for number in range(rounds + 1):
            for name, (client, url) in members.items():
                found = await _async_round(client, url, concurrency, seconds if number else 0.0)
                if number:
                    played[name].append(found)
    return list(_rows("aiohttp", concurrency, played, ["aiohttp"]))
