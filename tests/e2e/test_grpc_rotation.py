"""Certificates and then the root are replaced under gRPC calls, sync and asyncio, between processes: no call fails."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from town import give_token

from meshlib.controlplane.ca_service import CertificateService
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from peers import reserved_port

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]
MEMBER = Path(__file__).parent / "grpc_member.py"
PERIOD = 0.6
"""Seconds after which a certificate is renewed."""
PATIENCE = 60.0
RULES = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: echo, namespace: default}
spec:
  rules:
  - from: [{source: {principals: [cluster.local/ns/default/sa/caller]}}]
    to: [{operation: {paths: [/echo.Echo/Say]}}]
"""


class Member:
    """A process, and what it said last of its certificate."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.is_ready = False
        self.certificates: list[tuple[str, int]] = []
        """(issuer, number of roots that are trusted), of each that it had."""
        self.result: Any = None
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            words = line.decode().split()
            if words[0] == "ready":
                self.is_ready = True
            elif words[0] == "shows":
                self.certificates.append((words[1], int(words[3])))
            else:
                self.result = json.loads(line)

    async def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), PATIENCE)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reading


async def until(holds: Any, what: str) -> None:
    try:
        async with asyncio.timeout(PATIENCE):
            while not holds():  # noqa: ASYNC110 -- other processes' state
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"not in time: {what}")


@asynccontextmanager
async def member(plane: ControlPlane, folder: Path, role: str, kind: str, **environment: str) -> AsyncIterator[Member]:
    account = "caller" if role == "call" else f"echo-{kind}"
    name = f"{account}-{kind}"
    give_token(plane, folder, account)
    token = (folder / account).rename(folder / f"{name}.token")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MESHLIB_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(MEMBER), role, kind, str(PERIOD)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={
            **clean,
            "MESHLIB_CONTROL_PLANE": plane.xds_address,
            "MESHLIB_WORKLOAD": name,
            "MESHLIB_SERVICE_ACCOUNT": account,
            "MESHLIB_IDENTITY": "control-plane",
            "MESHLIB_TOKEN_FILE": str(token),
            "MESHLIB_CACHE_DIR": "-",
            "MESHLIB_TELEMETRY": "off",
            **environment,
        },
    )
    found = Member(process)
    try:
        yield found
    finally:
        await found.end()


async def test_certificates_and_the_root_are_replaced_under_calls_between_processes(tmp_path: Path) -> None:
    """Two servers and two callers, sync and asyncio, each renewing all the time; then a new root, in the three steps
    that an administrator takes. In the end nobody trusts the old one, and no call has failed, but the one that a policy
    forbids."""
    (tmp_path / "mesh").mkdir()
    (tmp_path / "mesh" / "rules.yaml").write_text(RULES)
    made = ControlPlaneSettings(
        folders=(tmp_path / "mesh",),
        state=tmp_path / "state",
        xds=("127.0.0.1", 0),
        admin=("127.0.0.1", 0),
        tls=True,
    )
    plane = ControlPlane(made)
    await plane.start()
    try:
        async with AsyncExitStack() as stack:
            targets, members = [], []
            for kind in ("sync", "aio"):
                address = f"127.0.0.1:{reserved_port()}"
                targets.append(f"echo-{kind}:{address.rpartition(':')[2]}")
                serving = {"MESHLIB_SERVICE": f"echo-{kind}", "MESHLIB_ADDRESS": address}
                members.append(await stack.enter_async_context(member(plane, tmp_path, "serve", kind, **serving)))
            async with AsyncExitStack() as calling:
                callers = [
                    await calling.enter_async_context(member(plane, tmp_path, "call", kind, TARGETS=",".join(targets)))
                    for kind in ("sync", "aio")
                ]
                await until(lambda: all(each.is_ready for each in (*members, *callers)), "all are up")
                await _replace_root(plane, [*members, *callers])
        for caller in callers:
            assert caller.result["failures"] == []
            assert caller.result["denials"] == ["PERMISSION_DENIED"] * 2
            whom = "spiffe://cluster.local/ns/default/sa/caller"
            assert set(caller.result["done"]) == {f"{kind} {whom}" for kind in ("sync", "aio")}
            assert min(caller.result["done"].values()) >= 20
    finally:
        await plane.stop()


async def _replace_root(plane: ControlPlane, members: list[Member]) -> None:
    authority, certificates = plane.authority, plane._certificates
    assert authority is not None and isinstance(certificates, CertificateService)
    old = authority.roots[0]

    async def until_all(issuer: bytes, roots: int, what: str) -> None:
        name = x509.load_pem_x509_certificate(issuer).subject.rfc4514_string().replace(" ", "")
        # Twice, so that there were calls with it.
        await until(
            lambda: all(each.certificates[-2:] == [(name, roots)] * 2 for each in members), f"{what}: {name} {roots}"
        )

    await until_all(old, 1, "everybody's certificate is renewed")
    authority.rotate("begin")
    await until(lambda: not certificates.late(), "everybody trusts the new root")
    authority.rotate("switch", certificates.late)
    new = authority.roots[0]
    assert new != old
    await until_all(new, 2, "everybody has a certificate of the new root")
    authority.rotate("finish", force=True)
    await until(lambda: not certificates.late(), "nobody trusts the old root")
    await until_all(new, 1, "everybody goes on")
