"""gRPC's own xDS client and server, in processes of their own: C-core reads one bootstrap for each process."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from typer.testing import CliRunner

from meshlib.cli.app import app
from meshlib.controlplane.server import ControlPlane
from meshlib.identity.folder import write_credentials
from meshlib.identity.pem import credentials_of
from meshlib.model import SpiffeId
from peers import other_grpcio, reserved_port

# Plaintext is what both fall back to where the control plane sends no TLS: so nothing may rest on it.
SERVER = """
import grpc, sys
from concurrent import futures
def who(request, context):
    return next((each for each in context.peer_identities() or () if each.startswith(b"spiffe:")), b"nobody")
server = grpc.server(futures.ThreadPoolExecutor(4), xds=True)
method = grpc.unary_unary_rpc_method_handler(who)
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", {"Say": method, "Other": method}),))
server.add_secure_port(sys.argv[1], grpc.xds_server_credentials(grpc.insecure_server_credentials()))
server.start()
sys.stdin.read()
server.stop(None)
"""
CLIENT = """
import grpc, grpc.experimental, json, sys
fallback = grpc.experimental.insecure_channel_credentials()
channel = grpc.secure_channel(
    f"xds:///{sys.argv[1]}", grpc.xds_channel_credentials(fallback), options=[("grpc.enable_http_proxy", 0)]
)
for line in sys.stdin:
    order = json.loads(line)
    try:
        told = channel.unary_unary(order["method"])(b"", timeout=20, metadata=order["metadata"]).decode()
    except grpc.RpcError as error:
        told = f"{error.code().name} {error.details()}"
    print(told, flush=True)
"""


class Stock:
    """A process of gRPC's own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def call(self, method: str = "/echo.Echo/Say", **metadata: str) -> str:
        """Whom the server saw, or the status and its message. A client's."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pairs = [(name.replace("_", "-"), value) for name, value in metadata.items()]
        self._process.stdin.write(json.dumps({"method": method, "metadata": pairs}).encode() + b"\n")
        return (await self._process.stdout.readline()).decode().strip()

    async def until(self, wanted: str, method: str = "/echo.Echo/Say") -> None:
        """A call is the only way to ask whether a rule has come."""
        async with asyncio.timeout(60):
            while not (await self.call(method)).startswith(wanted):  # noqa: ASYNC110
                await asyncio.sleep(0.02)


@asynccontextmanager
async def stock(program: str, *words: str, bootstrap: Path) -> AsyncIterator[Stock]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, *words),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **other_grpcio(), "GRPC_XDS_BOOTSTRAP": str(bootstrap)},
    )
    try:
        yield Stock(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 20)
        except TimeoutError:
            process.kill()
            await process.wait()


def write_bootstrap(plane: ControlPlane, file: Path, *words: str, **environment: str) -> Path:
    """By the command itself, in this process."""
    clean = {key: None for key in os.environ if key.startswith(("MESHLIB_", "MESHCTL_"))}
    ran = CliRunner().invoke(
        app,
        ["bootstrap", "-o", str(file), *words],
        env={**clean, "MESHLIB_CONTROL_PLANE": plane.xds_address, **environment},
    )
    assert ran.exit_code == 0, ran.output
    return file


class Admin:
    """The control plane's admin API, as far as the tests look at it."""

    def __init__(self, plane: ControlPlane) -> None:
        self._url = plane.admin_url

    async def get(self, path: str) -> Any:
        async with httpx.AsyncClient(base_url=self._url, trust_env=False, timeout=20) as client:
            return (await client.get(path)).raise_for_status().json()

    async def apply(self, text: str) -> None:
        async with httpx.AsyncClient(base_url=self._url, trust_env=False, timeout=20) as client:
            response = await client.post("/v1/apply", content=text, headers={"content-type": "application/yaml"})
            assert all(each["outcome"] in ("created", "configured") for each in response.json()["results"]), (
                response.text
            )

    async def until_serving(self, address: str) -> None:
        """A server that is not ours is registered once it has accepted its listener."""
        async with asyncio.timeout(60):
            while address not in {  # noqa: ASYNC110
                each["address"]
                for service in (await self.get("/v1/endpoints"))["services"]
                for each in service.get("endpoints", [])
            }:
                await asyncio.sleep(0.02)

    async def assert_accepted(self) -> None:
        """Nobody has refused anything."""
        refused = {each["id"]: each["errors"] for each in (await self.get("/v1/clients"))["clients"] if each["errors"]}
        assert refused == {}


class Village:
    """A control plane with its authority, and stock processes."""

    def __init__(self, plane: ControlPlane, folder: Path, stack: AsyncExitStack) -> None:
        self.plane, self.admin, self._folder, self._stack = plane, Admin(plane), folder, stack
        self.address = f"127.0.0.1:{reserved_port()}"

    def certificates(self, account: str) -> str:
        folder = self._folder / account
        if not folder.exists():
            assert self.plane.authority is not None
            chain, key = self.plane.authority.issue(SpiffeId.of("cluster.local", "default", account))
            write_credentials(folder, credentials_of(b"".join(chain[:-1]), key, chain[-1]))
        return str(folder)

    def bootstrap(self, name: str, *more: str, certificates: bool = True, **environment: str) -> Path:
        words: tuple[str, ...] = ()
        if certificates:
            words = ("--certificates", self.certificates(name))
        file = self._folder / f"{name}-{certificates}.json"
        return write_bootstrap(self.plane, file, *words, *more, MESHLIB_SERVICE_ACCOUNT=name, **environment)

    async def server(self, *, certificates: bool = True) -> None:
        file = self.bootstrap(
            "echo",
            certificates=certificates,
            MESHLIB_SERVICE="echo",
            MESHLIB_LABELS="app=echo",
            MESHLIB_ADDRESS=self.address,
        )
        await self._stack.enter_async_context(stock(SERVER, self.address, bootstrap=file))
        await self.admin.until_serving(self.address)

    @property
    def target(self) -> str:
        return f"echo:{self.address.rpartition(':')[2]}"

    async def client(self, name: str, *, certificates: bool = True) -> Stock:
        file = self.bootstrap(name, certificates=certificates)
        return await self._stack.enter_async_context(stock(CLIENT, self.target, bootstrap=file))
