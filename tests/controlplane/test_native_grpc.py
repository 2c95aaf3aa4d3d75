"""Does a gRPC client with its own xDS (`xds:///`) find its way by our control plane? C-core is the judge."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace

import grpc.aio
import pytest
from ads_server import Serving, mesh

from meshlib.model import Endpoint, LoadAssignment, LoadBalancing

# In a process of its own: C-core reads the bootstrap once, and its xDS client lives as long as the process.
CLIENT = """
import grpc, sys
channel = grpc.insecure_channel("xds:///web:80", options=[("grpc.enable_http_proxy", 0)])
say = channel.unary_unary("/echo.Echo/Say", lambda data: data, lambda data: data)
for line in sys.stdin:
    print(say(line.strip().encode(), timeout=20).decode(), flush=True)
"""


async def answering(word: str) -> tuple[grpc.aio.Server, int]:
    """A gRPC server that answers everything with `word`."""

    async def say(request: bytes, context: object) -> bytes:
        return word.encode()

    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(say)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", {"Say": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


@pytest.mark.processes
async def test_a_native_grpc_client_follows_endpoints_and_routes() -> None:
    """It asks by name, state of the world, and gets a new cluster because a route names it."""
    serving = Serving()
    await serving.server.start()
    (one, first), (two, second) = await answering("one"), await answering("two")

    async def publish(cluster: str, port: int) -> None:
        made = mesh(cluster)
        # Our default, LEAST_REQUEST, which C-core does not know: it takes the second choice.
        assert {each.load_balancing for each in made.clusters} == {LoadBalancing.LEAST_REQUEST}
        assignments = (LoadAssignment(cluster, (Endpoint("127.0.0.1", port),)),)
        await serving.publish(replace(made, assignments=assignments))

    bootstrap = {
        "xds_servers": [{"server_uri": serving.address, "channel_creds": [{"type": "insecure"}]}],
        "node": {"id": "sidecar~127.0.0.1~native.default~default.svc.cluster.local"},
    }
    await publish("a", first)
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CLIENT),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "GRPC_XDS_BOOTSTRAP_CONFIG": json.dumps(bootstrap)},
    )
    assert client.stdin is not None
    assert client.stdout is not None

    async def say() -> str:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(b"hello\n")
        return (await client.stdout.readline()).decode().strip()

    try:
        async with asyncio.timeout(60):
            assert await say() == "one"
            await publish("a", second)
            while await say() != "two":  # endpoints
                pass
            await publish("b", first)
            while await say() != "one":  # a route, to a cluster that was not there
                pass
        (shown,) = serving.ads.clients()
        assert shown.user_agent.startswith("gRPC C-core")
        assert shown.errors == ()
    finally:
        client.stdin.close()
        await client.wait()
        await serving.close()
        for server in (one, two):
            await server.stop(None)
