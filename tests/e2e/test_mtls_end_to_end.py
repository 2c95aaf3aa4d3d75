"""mTLS from a process that serves, by the control plane, to one that calls: sockets, our CA's certificates, xDS."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from town import eventually

import meshlib
from inbound.inbound_servers import uvicorn_server
from meshlib.controlplane.ca import fingerprint
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.inbound.peer import of_scope
from meshlib.mesh import Mesh
from meshlib.model import SpiffeId

pytestmark = pytest.mark.timeout(120)


def member(plane: ControlPlane, folder: Path, name: str, **settings: Any) -> Mesh:
    """A process with nothing but a join token for its service account."""
    assert plane.tokens is not None and plane.authority is not None
    token = plane.tokens.create(
        SpiffeId.of("cluster.local", "default", name), 3600.0, fingerprint(plane.authority.roots[0])
    )[0]
    (folder / name).write_text(token)
    return meshlib.connect(
        plane.xds_address,
        workload=name,
        service_account=name,
        cache_dir="-",
        identity="control-plane",
        token_file=str(folder / name),
        **settings,
    )


async def test_a_process_that_serves_mtls_is_called_by_mtls(tmp_path: Path) -> None:
    """It says so once its port has shown its certificate; callers do the rest, with no setting but an identity."""
    plane = ControlPlane(
        ControlPlaneSettings(state=tmp_path / "state", xds=("127.0.0.1", 0), admin=("127.0.0.1", 0), tls=True)
    )
    await plane.start()
    try:
        await asyncio.to_thread(_serve_and_call, plane, tmp_path)
    finally:
        await plane.stop()


def _serve_and_call(plane: ControlPlane, folder: Path) -> None:
    seen: list[str] = []
    serving: list[Mesh] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen.append(str(of_scope(scope).identity))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"well"})
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    def http(**options: Any) -> Any:
        return serving[0].listening.uvicorn(**options)

    with (
        uvicorn_server(app, http=http) as url,
        member(plane, folder, "reviews", service="reviews", address=url[7:]) as reviews,
        member(plane, folder, "caller") as caller,
        caller.Client(timeout=20) as client,
    ):
        serving.append(reviews)
        reviews.serve()

        def is_there() -> bool:
            with contextlib.suppress(httpx.ConnectError):  # a name that the mesh does not know yet
                return client.get(f"http://reviews:{url.rpartition(':')[2]}/").status_code == 200
            return False

        eventually(is_there, "reviews is called")
        assert set(seen) == {"spiffe://cluster.local/ns/default/sa/caller"}
        plain = httpx.get(url, trust_env=False, timeout=20)  # PERMISSIVE: curl goes on to work
        assert (plain.status_code, seen[-1]) == (200, "None")
