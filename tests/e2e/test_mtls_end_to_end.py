"""mTLS from a process that serves, by the control plane, to one that calls: sockets, our CA's certificates, xDS."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import httpx
import pytest
from town import eventually, give_token, member

import meshlib
from inbound.inbound_servers import Witness, uvicorn_server
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings

pytestmark = pytest.mark.timeout(120)


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
    witness = Witness()

    with (
        uvicorn_server(witness, http=witness.http) as url,
        member(plane, folder, "reviews", service="reviews", address=url[7:]) as reviews,
        member(plane, folder, "caller") as caller,
        caller.Client(timeout=20) as client,
    ):
        witness.mesh = reviews
        reviews.serve()

        def is_there() -> bool:
            with contextlib.suppress(httpx.ConnectError):  # a name that the mesh does not know yet
                return client.get(f"http://reviews:{url.rpartition(':')[2]}/").status_code == 200
            return False

        eventually(is_there, "reviews is called")
        assert set(witness.seen) == {"spiffe://cluster.local/ns/default/sa/caller"}
        plain = httpx.get(url, trust_env=False, timeout=20)  # PERMISSIVE: curl goes on to work
        assert (plain.status_code, witness.seen[-1]) == (200, "None")


async def test_a_certificate_that_comes_late_is_told_of(tmp_path: Path) -> None:
    """A pod whose way to the CA opens only after identity_timeout: what it says of itself then is that it serves mTLS,
    or in a STRICT namespace it would serve nobody."""
    plane = ControlPlane(
        ControlPlaneSettings(state=tmp_path / "state", xds=("127.0.0.1", 0), admin=("127.0.0.1", 0), tls=True)
    )
    await plane.start()
    try:
        await asyncio.to_thread(_serve_before_the_certificate, plane, tmp_path)
    finally:
        await plane.stop()


def _serve_before_the_certificate(plane: ControlPlane, folder: Path) -> None:
    witness = Witness()
    (folder / "roots.pem").write_text(plane.roots)
    with (
        uvicorn_server(witness, http=witness.http) as url,
        meshlib.connect(
            plane.xds_address,
            workload="reviews",
            service="reviews",
            address=url[7:],
            cache_dir="-",
            identity="control-plane",
            identity_timeout=0.2,
            ca_roots=str(folder / "roots.pem"),
            token_file=str(folder / "reviews"),
            service_account="reviews",
        ) as reviews,
        member(plane, folder, "caller") as caller,
        caller.Client(timeout=20) as client,
    ):
        witness.mesh = reviews
        reviews.serve()

        def called_by() -> str:
            with contextlib.suppress(httpx.ConnectError):
                if client.get(f"http://reviews:{url.rpartition(':')[2]}/").status_code == 200:
                    return witness.seen[-1]
            return ""

        assert reviews.wait_for_credentials(1.0) is None  # by then it is announced without
        give_token(plane, folder, "reviews")
        eventually(lambda: called_by().endswith("/sa/caller"), "reviews is called by mTLS")
