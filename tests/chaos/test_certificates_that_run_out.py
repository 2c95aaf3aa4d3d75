"""The control plane is down for so long that certificates run out: is anything let through, and does it come back?"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from chaos.recording import IS_FULL, Promise, Promising
from chaos.secured import CALLER, Pair, control_plane, pair
from e2e.town import eventually
from meshlib.controlplane.ca import CertificateAuthority
from meshlib.controlplane.server import ControlPlane
from peers import unused_port
from promises import within

pytestmark = pytest.mark.timeout(300)

LIFETIME = 20.0 if IS_FULL else 3.0
"""Seconds of a certificate, in place of a day."""


async def test_a_certificate_that_ran_out_denies_and_never_unlocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promise: Promising
) -> None:
    """The port is PERMISSIVE, so plaintext would be answered: nobody must fall back to it."""
    sign = CertificateAuthority.sign
    monkeypatch.setattr(CertificateAuthority, "sign", lambda self, csr, who, _=0.0: sign(self, csr, who, LIFETIME))
    async with promise(
        "While the control plane is down calls go on by mTLS until the certificate has run out; after that each fails "
        "with an error that says so, none goes out in plaintext, and a kept connection is no way around; they go on "
        "once the control plane is back and a join token was given",
        f"certificates of {LIFETIME:g} s, the control plane stopped until they have run out, then started again",
    ) as told:
        port = unused_port()
        plane = control_plane(tmp_path, port)
        await plane.start()
        try:
            with pair(plane, tmp_path) as town:
                try:
                    plane = await _through(plane, port, tmp_path, town, told)
                finally:
                    # On a thread: both say goodbye to a control plane that runs on this loop.
                    await asyncio.to_thread(town.caller.close)
                    await asyncio.to_thread(town.reviews.close)
        finally:
            await plane.stop()


async def _through(plane: ControlPlane, port: int, folder: Path, town: Pair, told: Promise) -> ControlPlane:
    await asyncio.to_thread(eventually, lambda: not town.failure(), "calls go by mTLS")
    town.seen.clear()
    await plane.stop()
    held = town.caller.credentials
    assert held is not None
    good = failed = 0
    failures: set[str] = set()
    while time.time() < held.not_after + 1.5:
        began = time.time()
        failure = await asyncio.to_thread(town.failure)
        if time.time() < held.not_after - 0.5:  # the server's was made at about the same time
            assert failure == ""
            good += 1
        elif began > held.not_after:
            assert "has expired" in failure
            failures.add(failure)
            failed += 1
        await asyncio.sleep(0.01)
    assert failed > 10
    told.counted("calls by mTLS without a control plane", good)
    told.counted("calls denied after the end", failed)
    assert set(town.seen) == {CALLER}
    back = control_plane(folder, port)
    await back.start()
    town.rejoin(back, folder)
    began = time.monotonic()
    await asyncio.to_thread(eventually, lambda: not town.failure(), "calls go by mTLS again")
    # A failed try waits up to twice as long as the outage was until the next.
    told.measured("calls again after", time.monotonic() - began, at_most=within(2 * LIFETIME + 20))
    assert set(town.seen) == {CALLER}
    told.counted("requests in plaintext", 0)
    return back
