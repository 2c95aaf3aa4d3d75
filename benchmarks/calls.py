"""What does the mesh add to a call? Each client library meshed, as a ratio to itself bare, in plaintext and with
mTLS.

The server is a process of its own, which answers at once: what a call takes is the client, the loopback, and a small
server, on whatever cores there are. Of bare httpx there are two, with its default pool and with one that keeps every
connection; ratios are to the faster.
"""

from __future__ import annotations

import asyncio
import ssl
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import httpx
import requests
import urllib3

from benchmarks.effort import Effort
from benchmarks.identities import CLIENT, SERVER, stock_context, write_identities
from benchmarks.mesh_config import PLAIN_URL, SECURED_URL, mesh_of, mesh_yaml
from benchmarks.processes import module
from benchmarks.rounds import Call, Row, play_async, play_sync
from meshlib.mesh import Mesh

KEEP = 3600.0
"""Seconds for which an idle connection is kept, by everybody: contestants take turns, and httpx would close after 5
seconds what the next round needs."""
DEFAULT = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=KEEP)
"""httpx's own numbers: a 21st concurrent call pays for a new connection."""
EVERY = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP)
"""Bare httpx's best case."""
KEPT = 256
"""Connections that bare requests and urllib3 keep: more than there are callers, which is their best case."""
TLS = ", mTLS"
DEFAULT_POOL = "bare, default pool"
BARE, MESHED, MESHED_AIOHTTP = "bare", "meshed", "meshed, aiohttp engine"


class Place(NamedTuple):
    """Where the servers are, and how to call them without a mesh."""

    plain: str
    secured: str
    context: ssl.SSLContext
    roots: str
    mesh: Mesh
    server: int


def _httpx_sync(stack: ExitStack, place: Place) -> dict[str, Call]:
    def client(**options: Any) -> httpx.Client:
        options = {"verify": place.context, "timeout": 60, "trust_env": False, "limits": DEFAULT, **options}
        return stack.enter_context(httpx.Client(**options))

    meshed = client(transport=place.mesh.transport())
    return {
        DEFAULT_POOL: partial(client().get, place.plain),
        BARE: partial(client(limits=EVERY).get, place.plain),
        MESHED: partial(meshed.get, PLAIN_URL),
        DEFAULT_POOL + TLS: partial(client().get, place.secured),
        BARE + TLS: partial(client(limits=EVERY).get, place.secured),
        MESHED + TLS: partial(meshed.get, SECURED_URL),
    }


async def _httpx_async(stack: AsyncExitStack, place: Place) -> dict[str, Call]:
    async def client(**options: Any) -> httpx.AsyncClient:
        options = {"verify": place.context, "timeout": 60, "trust_env": False, "limits": DEFAULT, **options}
        return await stack.enter_async_context(httpx.AsyncClient(**options))

    core = await client(transport=place.mesh.async_transport())
    aio = await client(transport=place.mesh.async_transport(engine="aiohttp"))
    return {
        DEFAULT_POOL: partial((await client()).get, place.plain),
        BARE: partial((await client(limits=EVERY)).get, place.plain),
        MESHED: partial(core.get, PLAIN_URL),
        MESHED_AIOHTTP: partial(aio.get, PLAIN_URL),
        DEFAULT_POOL + TLS: partial((await client()).get, place.secured),
        BARE + TLS: partial((await client(limits=EVERY)).get, place.secured),
        MESHED + TLS: partial(core.get, SECURED_URL),
        MESHED_AIOHTTP + TLS: partial(aio.get, SECURED_URL),
    }


class _Secured(requests.adapters.HTTPAdapter):
    """As requests' documentation gives it a context of one's own."""

    def __init__(self, context: ssl.SSLContext, **options: Any) -> None:
        self._context = context
        super().__init__(**options)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> Any:
        return super().init_poolmanager(*arguments, **options, ssl_context=self._context)  # type: ignore[no-untyped-call]


def _requests(stack: ExitStack, place: Place) -> dict[str, Call]:
    def session(prefix: str, adapter: requests.adapters.BaseAdapter) -> requests.Session:
        made = stack.enter_context(requests.Session())
        made.trust_env, made.verify = False, place.roots
        made.mount(prefix, adapter)
        return made

    meshed = session("http://", place.mesh.requests_adapter())
    bare = session("http://", requests.adapters.HTTPAdapter(pool_maxsize=KEPT))
    secured = session("https://", _Secured(place.context, pool_maxsize=KEPT))
    return {
        BARE: partial(bare.get, place.plain),
        MESHED: partial(meshed.get, PLAIN_URL),
        BARE + TLS: partial(secured.get, place.secured),
        MESHED + TLS: partial(meshed.get, SECURED_URL),
    }


def _urllib3(stack: ExitStack, place: Place) -> dict[str, Call]:
    def manager(made: urllib3.PoolManager) -> urllib3.PoolManager:
        stack.callback(made.clear)
        return made

    meshed = manager(place.mesh.urllib3())
    bare = manager(urllib3.PoolManager(maxsize=KEPT))
    secured = manager(urllib3.PoolManager(maxsize=KEPT, ssl_context=place.context))
    return {
        BARE: partial(bare.request, "GET", place.plain),
        MESHED: partial(meshed.request, "GET", PLAIN_URL),
        BARE + TLS: partial(secured.request, "GET", place.secured),
        MESHED + TLS: partial(meshed.request, "GET", SECURED_URL),
    }


async def _aiohttp(stack: AsyncExitStack, place: Place) -> dict[str, Call]:
    async def session(*middlewares: Any) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, ssl=place.context, keepalive_timeout=KEEP)
        return await stack.enter_async_context(aiohttp.ClientSession(connector=connector, middlewares=middlewares))

    async def get(through: aiohttp.ClientSession, url: str) -> bytes:
        async with through.get(url) as response:
            return await response.read()

    bare, meshed = await session(), await session(place.mesh.aiohttp_middleware())
    return {
        BARE: partial(get, bare, place.plain),
        MESHED: partial(get, meshed, PLAIN_URL),
        BARE + TLS: partial(get, bare, place.secured),
        MESHED + TLS: partial(get, meshed, SECURED_URL),
    }


SYNC: dict[str, Callable[[ExitStack, Place], dict[str, Call]]] = {
    "httpx, sync": _httpx_sync,
    "requests": _requests,
    "urllib3": _urllib3,
}
ASYNC: dict[str, Any] = {"httpx, async": _httpx_async, "aiohttp": _aiohttp}
CLIENTS = ("httpx, sync", "httpx, async", "requests", "urllib3", "aiohttp")


async def _async_calls(client: str, place: Place, concurrency: int, effort: Effort) -> list[Row]:
    async with AsyncExitStack() as stack:
        calls = await ASYNC[client](stack, place)
        return await play_async(client, calls, concurrency, effort.rounds, effort.length(concurrency), (place.server,))


def measure(effort: Effort) -> dict[str, Any]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as outer:
        folder = Path(name)
        write_identities(folder)
        server = outer.enter_context(module("benchmarks.server", "0", str(folder / SERVER)))
        mesh = outer.enter_context(mesh_of(folder, mesh_yaml(*server.ports)))
        plain, secured = (
            f"{kind}://127.0.0.1:{port}/reviews/0" for kind, port in zip(("http", "https"), server.ports, strict=True)
        )
        own = folder / CLIENT
        place = Place(plain, secured, stock_context(own), str(own / "ca.crt"), mesh, server.process)
        for client in CLIENTS:
            for concurrency in effort.concurrency:
                if client in ASYNC:
                    rows += asyncio.run(_async_calls(client, place, concurrency, effort))
                    continue
                with ExitStack() as stack:
                    calls = SYNC[client](stack, place)
                    length = effort.length(concurrency)
                    rows += play_sync(client, calls, concurrency, effort.rounds, length, (server.process,))
    return {"rows": [row._asdict() for row in rows]}
