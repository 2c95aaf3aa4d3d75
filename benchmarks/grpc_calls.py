"""What does the mesh add to a gRPC call? A channel of the mesh, and a bare one with its interceptors, as ratios to a
bare one, in plaintext and with mTLS, blocking and on asyncio. One message of 64 bytes each way, to a server in a
process of its own. What gRPC's own xDS client costs beside it is measured by grpc_overhead.py.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # C-core tells of each connection that ends

import grpc
import grpc.aio

from benchmarks.effort import Effort
from benchmarks.identities import CLIENT, SERVER, write_identities
from benchmarks.mesh_config import PLAIN, SECURED, mesh_of, mesh_yaml
from benchmarks.processes import module
from benchmarks.rounds import Call, Row, play_async, play_sync
from meshlib.mesh import Mesh

METHOD = "/benchmark.Echo/Say"
MESSAGE = b"x" * 64
CLIENTS = ("grpcio, sync", "grpcio, aio")
BARE, INTERCEPTORS, CHANNEL, TLS = "bare", "bare, the mesh's interceptors", "meshed", ", mTLS"
_NO_PROXY = (("grpc.enable_http_proxy", 0),)


def _parts(folder: Path) -> tuple[bytes, bytes, bytes]:
    """(root, key, chain)"""
    root, key, chain = ((folder / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt"))
    return root, key, chain


async def _serve(folder: Path) -> None:
    async def say(request: bytes, context: Any) -> bytes:
        return request

    server = grpc.aio.server()
    handlers = {"Say": grpc.unary_unary_rpc_method_handler(say)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark.Echo", handlers),))
    root, key, chain = _parts(folder)
    mutual = grpc.ssl_server_credentials([(key, chain)], root, require_client_auth=True)
    print(server.add_insecure_port("127.0.0.1:0"), server.add_secure_port("127.0.0.1:0", mutual), flush=True)
    await server.start()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


def _calls(channels: dict[str, Any]) -> dict[str, Call]:
    return {name: partial(channel.unary_unary(METHOD), MESSAGE, timeout=60) for name, channel in channels.items()}


def _sync(mesh: Mesh, folder: Path, ports: tuple[int, ...], stack: ExitStack) -> dict[str, Call]:
    plain, secured = (f"127.0.0.1:{port}" for port in ports)
    mutual = grpc.ssl_channel_credentials(*_parts(folder / CLIENT))
    channels = {
        BARE: grpc.insecure_channel(plain, _NO_PROXY),
        INTERCEPTORS: grpc.insecure_channel(plain, _NO_PROXY),
        CHANNEL: mesh.grpc_channel(f"{PLAIN}:80"),
        BARE + TLS: grpc.secure_channel(secured, mutual, _NO_PROXY),
        CHANNEL + TLS: mesh.grpc_channel(f"{SECURED}:80"),
    }
    for channel in channels.values():
        stack.enter_context(channel)
    interceptors = mesh.grpc_client_interceptors(f"{PLAIN}:80")
    channels[INTERCEPTORS] = grpc.intercept_channel(channels[INTERCEPTORS], *interceptors)
    return _calls(channels)


async def _aio(
    mesh: Mesh, folder: Path, ports: tuple[int, ...], concurrency: int, effort: Effort, pid: int
) -> list[Row]:
    plain, secured = (f"127.0.0.1:{port}" for port in ports)
    mutual = grpc.ssl_channel_credentials(*_parts(folder / CLIENT))
    interceptors = mesh.grpc_aio_client_interceptors(f"{PLAIN}:80")
    channels = {
        BARE: grpc.aio.insecure_channel(plain, _NO_PROXY),
        INTERCEPTORS: grpc.aio.insecure_channel(plain, _NO_PROXY, None, interceptors),
        CHANNEL: mesh.grpc_aio_channel(f"{PLAIN}:80"),
        BARE + TLS: grpc.aio.secure_channel(secured, mutual, _NO_PROXY),
        CHANNEL + TLS: mesh.grpc_aio_channel(f"{SECURED}:80"),
    }
    try:
        return await play_async(
            CLIENTS[1], _calls(channels), concurrency, effort.rounds, effort.length(concurrency), (pid,)
        )
    finally:
        for channel in channels.values():
            await channel.close()


def measure(effort: Effort) -> dict[str, Any]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as outer:
        folder = Path(name)
        write_identities(folder)
        server = outer.enter_context(module("benchmarks.grpc_calls", str(folder / SERVER)))
        mesh = outer.enter_context(mesh_of(folder, mesh_yaml(*server.ports, protocol="GRPC")))
        for concurrency in effort.concurrency:
            with ExitStack() as stack:
                calls = _sync(mesh, folder, server.ports, stack)
                length = effort.length(concurrency)
                rows += play_sync(CLIENTS[0], calls, concurrency, effort.rounds, length, (server.process,))
            rows += asyncio.run(_aio(mesh, folder, server.ports, concurrency, effort, server.process))
    return {"rows": [row._asdict() for row in rows]}


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
