"""Does an AuthorizationPolicy that is applied reach those who serve? Control plane, feed, middleware, real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.mesh import Mesh
from meshlib.settings import Settings

POLICY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: default}
spec: {selector: {matchLabels: {app: reviews}}}
"""


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    found = ControlPlane(ControlPlaneSettings(state=tmp_path / "state", xds=("127.0.0.1", 0), admin=("127.0.0.1", 0)))
    await found.start()
    yield found
    await found.stop()


def connected(plane: ControlPlane, app: str, **settings: Any) -> Mesh:
    return Mesh(
        Settings(
            control_plane=plane.xds_address, cache_dir="-", namespace="default", labels=(("app", app),), **settings
        )
    )


async def _asgi_app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def _wsgi_app(environ: Any, start_response: Any) -> Iterator[bytes]:
    start_response("200 OK", [])
    yield b""


def asgi(mesh: Mesh) -> Callable[[], Awaitable[int]]:
    app = mesh.asgi(_asgi_app)

    async def call() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://reviews") as client:
            return (await client.get("/")).status_code

    return call


def wsgi(mesh: Mesh) -> Callable[[], Awaitable[int]]:
    app = mesh.wsgi(_wsgi_app)

    def call() -> int:
        with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://reviews") as client:
            return client.get("/").status_code

    return lambda: asyncio.to_thread(call)


async def until(call: Callable[[], Awaitable[int]], status: int) -> None:
    """A request is the only way to ask whether a rule has come."""
    async with asyncio.timeout(30):
        while await call() != status:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("serve", [asgi, wsgi])
async def test_a_policy_denies_once_it_is_applied_and_no_longer_once_it_is_deleted(
    plane: ControlPlane, serve: Callable[[Mesh], Callable[[], Awaitable[int]]]
) -> None:
    """Who is not selected goes on."""
    with connected(plane, "reviews", failure_policy="deny") as reviews, connected(plane, "ratings") as ratings:
        call, other = serve(reviews), serve(ratings)
        await until(call, 200)
        async with httpx.AsyncClient(base_url=plane.admin_url, trust_env=False, timeout=20) as admin:
            applied = await admin.post("/v1/apply", content=POLICY, headers={"content-type": api.YAML})
            assert applied.json()["results"][0]["outcome"] == "created"
            await until(call, 403)
            assert await other() == 200
            deleted = await admin.post("/v1/delete", content=POLICY, headers={"content-type": api.YAML})
            assert deleted.is_success, deleted.text
            await until(call, 200)
