"""Claims about a process that was never told who may call it: it lets nobody in, unless its owner wants otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import meshlib
from ads_peer import AdsPeer
from meshlib.mesh import Mesh
from meshlib.model import Access, AccessRule, Action, Inbound
from meshlib.xds.encode import encode_resource
from meshlib.xds.resource_types import LISTENER
from peers import refusing_port

NOBODY_KNOWS = 0.2
"""Seconds that a request waits for the first rules."""


async def _asgi_app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def _wsgi_app(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b""]


Ask = Callable[[Mesh, str], Awaitable[int]]


async def asgi(mesh: Mesh, path: str = "/") -> int:
    transport = httpx.ASGITransport(mesh.asgi(_asgi_app))
    async with httpx.AsyncClient(transport=transport, base_url="http://reviews") as client:
        return (await client.get(path)).status_code


async def wsgi(mesh: Mesh, path: str = "/") -> int:
    def ask() -> int:
        with httpx.Client(transport=httpx.WSGITransport(mesh.wsgi(_wsgi_app)), base_url="http://reviews") as client:
            return client.get(path).status_code

    return await asyncio.to_thread(ask)


ASKED = pytest.mark.parametrize("ask", [asgi, wsgi])


def connected(control_plane: str, **settings: Any) -> Mesh:
    settings = {"resolve_timeout": NOBODY_KNOWS, "cache_dir": "-", "telemetry": "off", **settings}
    return meshlib.connect(control_plane, service="reviews", **settings)


@ASKED
async def test_before_the_control_plane_was_ever_reached_nobody_comes_in(ask: Ask) -> None:
    """The default. What a kubelet asks for is answered; `allow` is its owner's word."""
    nowhere = f"127.0.0.1:{refusing_port()}"
    with connected(nowhere, probe_paths=("/healthz",)) as mesh:
        assert (await ask(mesh, "/"), await ask(mesh, "/healthz")) == (503, 200)
    with connected(nowhere, failure_policy="allow") as mesh:
        assert await ask(mesh, "/") == 200


@ASKED
async def test_a_request_waits_for_the_first_rules(ask: Ask, tmp_path: Path) -> None:
    """So a start costs nobody an error: a folder is read within that time, and so is a control plane."""
    with connected(str(tmp_path), resolve_timeout=20.0) as mesh:
        assert await ask(mesh, "/") == 200
    with AdsPeer() as peer, connected(peer.target, resolve_timeout=20.0) as mesh:
        asked = asyncio.create_task(ask(mesh, "/"))
        stream = await asyncio.to_thread(peer.accept)
        name = (await asyncio.to_thread(stream.next_of, LISTENER)).resource_names_subscribe[0]
        assert not asked.done()
        stream.send(LISTENER, raw={name: encode_resource(LISTENER, Inbound(name))})
        assert await asked == 200


@ASKED
@pytest.mark.parametrize("control_plane", ["", "dns:"])
async def test_where_no_rules_can_come_everybody_comes_in(ask: Ask, control_plane: str) -> None:
    """Without a control plane, and with name servers alone."""
    with connected(control_plane) as mesh:
        assert await ask(mesh, "/") == 200


@ASKED
@pytest.mark.parametrize("policy", ["deny", "allow"])
async def test_rules_that_cannot_be_used_open_nothing(ask: Ask, policy: str) -> None:
    """Whatever the policy: the control plane was reached, and meant to say something. Good ones put it right; and
    damaged ones that follow change nothing."""
    with AdsPeer() as peer, connected(peer.target, resolve_timeout=20.0, failure_policy=policy) as mesh:
        app = asyncio.create_task(ask(mesh, "/"))
        stream = await asyncio.to_thread(peer.accept)
        name = (await asyncio.to_thread(stream.next_of, LISTENER)).resource_names_subscribe[0]
        everybody = Access((AccessRule("everybody", Action.ALLOW),))
        good = encode_resource(LISTENER, Inbound(name, access=everybody))
        before = mesh.live
        stream.send(LISTENER, raw={name: good.replace(b"ALLOW", b"ALLOT")})
        await asyncio.to_thread(peer.nacks.get, timeout=20)
        async with asyncio.timeout(20):
            await mesh.next_live(before)
        await app
        assert await ask(mesh, "/") == 403
        before = mesh.live
        stream.send(LISTENER, raw={name: good})
        async with asyncio.timeout(20):
            await mesh.next_live(before)
        assert await ask(mesh, "/") == 200
        stream.send(LISTENER, raw={name: good[:-1]})
        await asyncio.to_thread(peer.nacks.get, timeout=20)
        assert await ask(mesh, "/") == 200
