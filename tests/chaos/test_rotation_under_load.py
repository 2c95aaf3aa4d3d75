"""Certificates and then the root are replaced under load, on both sides, by the control plane: no call fails.

`make chaos` takes two minutes of it, with new certificates each five seconds.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from chaos.recording import IS_FULL, Promising
from e2e.town import member
from inbound.inbound_servers import Witness, uvicorn_server
from meshlib.controlplane.ca_service import CertificateService
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.identity import ca_client
from meshlib.identity.credentials import Credentials
from meshlib.identity.tls import TlsContexts
from meshlib.mesh import Mesh
from meshlib.model import UpstreamTls

RATE, DURATION, PERIOD = (200, 120.0, 5.0) if IS_FULL else (200, 4.0, 0.5)
"""Calls a second, seconds of renewals, and seconds between two of them."""
THREADS = 4
pytestmark = pytest.mark.timeout(300)


class Load:
    """Calls from several threads, until stop(). Each failure is kept with its reason."""

    def __init__(self, client: httpx.Client, url: str) -> None:
        self.done, self.failures = Counter[str](), list[str]()
        self._client, self._url = client, url
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._over.is_set():
            try:
                answer = self._client.get(self._url)
                self.done[answer.text] += 1
                if answer.status_code != 200:
                    self.failures.append(f"{answer.status_code} {answer.text}")
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            due += THREADS / RATE
            self._over.wait(max(0.0, due - time.monotonic()))

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)


async def until(condition: Any, what: str, seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 -- another thread's state
            await asyncio.sleep(0.02)
    assert condition(), what


async def test_certificates_and_then_the_root_are_replaced_and_no_call_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promise: Promising
) -> None:
    """A connection that is kept lives through it all; what the old root vouched for is refused in the end."""
    monkeypatch.setattr(ca_client, "renew_after", lambda remaining, rng: PERIOD)
    async with promise(
        "No call fails while certificates and the root itself are replaced; what the old root signed is refused then",
        f"{RATE} calls a second by mTLS for {DURATION:g} s, new certificates each {PERIOD:g} s, then another root",
    ) as told:
        told.counted("calls that failed", 0)
        told.counted("calls", await _rotation(tmp_path))


async def _rotation(tmp_path: Path) -> int:
    """Returns the number of calls."""
    made = ControlPlaneSettings(state=tmp_path / "state", xds=("127.0.0.1", 0), admin=("127.0.0.1", 0), tls=True)
    plane = ControlPlane(made)
    await plane.start()
    try:
        return await _rotate(plane, tmp_path)
    finally:
        await plane.stop()


async def _rotate(plane: ControlPlane, folder: Path) -> int:
    witness = Witness()

    with (
        uvicorn_server(witness, http=witness.http, timeout_keep_alive=600) as url,
        member(plane, folder, "reviews", service="reviews", address=url[7:]) as reviews,
        member(plane, folder, "caller") as caller,
        caller.Client(timeout=20) as client,
    ):
        witness.mesh = reviews
        reviews.serve()
        shown: list[Credentials] = []
        reviews.on_rotation(shown.append)
        caller.on_rotation(shown.append)
        address = f"http://reviews:{url.rpartition(':')[2]}/"

        def secured() -> bool:
            try:
                return client.get(address).text.endswith("/sa/caller")
            except httpx.HTTPError:
                return False  # the mesh does not know it yet

        async with asyncio.timeout(60):
            while not await asyncio.to_thread(secured):  # noqa: ASYNC110 -- another process' word, asked for by a call
                await asyncio.sleep(0.05)
        first = caller.credentials
        assert first is not None
        load = Load(client, address)
        try:
            one = httpx.Limits(max_connections=1, keepalive_expiry=600)
            with httpx.Client(verify=_context(first), trust_env=False, timeout=20, limits=one) as kept:
                ask = f"https://{url[7:]}/"
                assert (await asyncio.to_thread(kept.get, ask)).status_code == 200
                await asyncio.sleep(DURATION)
                await _replace_root(plane, [reviews, caller])
                # Enough calls with what is trusted now, on connections that are new.
                before = load.done.total()
                await until(lambda: load.done.total() > before + RATE or load.failures, "calls go on")
                assert (await asyncio.to_thread(kept.get, ask)).text.endswith("/sa/caller")
        finally:
            await asyncio.to_thread(load.stop)
        assert load.failures == []
        assert set(load.done) == {"spiffe://cluster.local/ns/default/sa/caller"}
        assert load.done.total() >= DURATION * 10  # however slow the machine is
        assert len({each.certificate_chain for each in shown}) >= DURATION / PERIOD / 2
        with httpx.Client(verify=_context(first), trust_env=False, timeout=20) as old, pytest.raises(httpx.HTTPError):
            await asyncio.to_thread(old.get, ask)
        return load.done.total()


def _context(credentials: Credentials) -> ssl.SSLContext:
    return TlsContexts(lambda: credentials, has_identity=True).client(UpstreamTls("ISTIO_MUTUAL"))


async def _replace_root(plane: ControlPlane, members: list[Mesh]) -> None:
    """In the three steps, each when everybody has followed the one before."""
    authority, certificates = plane.authority, plane._certificates
    assert authority is not None and isinstance(certificates, CertificateService)
    old = authority.roots[0]
    authority.rotate("begin")
    await until(lambda: not certificates.late(), "everybody trusts the new root")
    authority.rotate("switch", certificates.late)
    before = [each.credentials for each in members]

    def renewed() -> bool:
        # Twice: the one that was under way may have been signed by the old root.
        return all(
            each.credentials is not None and known is not None and each.credentials.not_before > known.not_before + 1
            for each, known in zip(members, before, strict=True)
        )

    await until(renewed, "everybody has a certificate of the new root")
    authority.rotate("finish", force=True)
    assert old not in authority.roots
    await until(lambda: not certificates.late(), "nobody trusts the old root")
