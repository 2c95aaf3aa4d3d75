"""What does the mesh cost a gRPC call, and what does gRPC's own xDS client? `python -m benchmarks.grpc_overhead`.

One blocking or awaited call of one message each way, over a kept connection, in plaintext, to a server in a process
of its own. Contestants take turns round by round: a bare channel, the same with the mesh's interceptors, a channel of
the mesh, the same with metrics, and gRPC's `xds:///` channel. The mesh and gRPC's xDS client are told by one and the
same control plane, in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # C-core tells of each connection that ends

import grpc
import grpc.aio

import meshlib
from benchmarks.rounds import Call, Row, play_async, play_sync, ratio
from meshlib.cli.ports import free_port

BOOTSTRAP = "GRPC_XDS_BOOTSTRAP_CONFIG"
"""Read by gRPC as it is first asked for an xds: target."""
METHOD = "/benchmark.Echo/Say"
MESSAGE = b"x" * 64
SERVICE = "ratings.example:9080"
MESH = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: ratings, namespace: default}}
spec:
  hosts: [ratings.example]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{{number: 9080, name: grpc, protocol: GRPC, targetPort: {port}}}]
  endpoints: [{{address: 127.0.0.1}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: ratings, namespace: default}}
spec: {{host: ratings.example, trafficPolicy: {{loadBalancer: {{simple: ROUND_ROBIN}}}}}}
"""
"""ROUND_ROBIN, since gRPC's client has no LEAST_REQUEST; Istio's default retries and no timeout."""
NODE = "sidecar~127.0.0.1~benchmark.default~default.svc.cluster.local"
READY = 30.0


def _calls(channels: Sequence[Any]) -> dict[str, Call]:
    """One call of one stub each."""
    return {
        name: partial(channel.unary_unary(METHOD), MESSAGE, timeout=60)
        for name, channel in zip(NAMES, channels, strict=True)
    }


async def _serve() -> None:
    async def say(request: bytes, context: Any) -> bytes:
        return request

    server = grpc.aio.server()
    handlers = {"Say": grpc.unary_unary_rpc_method_handler(say)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark.Echo", handlers),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


@contextmanager
def running(folder: Path) -> Iterator[tuple[int, str]]:
    """The server's port, and the control plane's address."""
    command = [sys.executable, "-m", "benchmarks.grpc_overhead", "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        port = int(server.stdout.readline())
        (folder / "mesh").mkdir()
        (folder / "mesh" / "mesh.yaml").write_text(MESH.format(port=port))
        xds = free_port(0, set())
        admin = free_port(0, {xds})
        addresses = ["--xds", f"127.0.0.1:{xds}", "--admin", f"127.0.0.1:{admin}", "--log-level", "error"]
        with subprocess.Popen(
            [sys.executable, "-m", "meshlib.cli", "control-plane", str(folder / "mesh"), *addresses],
            stdout=subprocess.DEVNULL,
        ) as control_plane:
            try:
                _await_port(xds)
                yield port, f"127.0.0.1:{xds}"
            finally:
                control_plane.terminate()
                server.stdin.close()


def _await_port(port: int) -> None:
    deadline = time.monotonic() + READY
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def tell_grpc(control_plane: str) -> None:
    """Once for each process: gRPC's own xDS client reads this and never again."""
    server = {"server_uri": control_plane, "channel_creds": [{"type": "insecure"}]}
    os.environ[BOOTSTRAP] = json.dumps({"xds_servers": [server], "node": {"id": NODE}})


def meshes(control_plane: str, folder: Path, stack: ExitStack) -> tuple[meshlib.Mesh, meshlib.Mesh]:
    """Without telemetry, which gRPC's client has none of, and with metrics."""
    cache = str(folder / "cache")
    return (
        stack.enter_context(meshlib.connect(control_plane, telemetry="off", cache_dir=cache)),
        stack.enter_context(meshlib.connect(control_plane, telemetry_interval=3600.0, cache_dir=cache)),
    )


_NO_PROXY = (("grpc.enable_http_proxy", 0),)
NAMES = ("grpcio", "grpcio, interceptors", "channel of the mesh", "channel of the mesh, measured", "grpcio, xds:///")


def sync_calls(port: int, control_plane: str, folder: Path, concurrency: int, rounds: int, seconds: float) -> list[Row]:
    """Blocking calls, one channel shared by as many threads."""
    with ExitStack() as stack:
        mesh, measured = meshes(control_plane, folder, stack)

        def plain() -> grpc.Channel:
            return stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}", _NO_PROXY))

        channels: list[grpc.Channel] = [
            plain(),
            grpc.intercept_channel(plain(), *mesh.grpc_client_interceptors(SERVICE)),
            stack.enter_context(mesh.grpc_channel(SERVICE)),
            stack.enter_context(measured.grpc_channel(SERVICE)),
            stack.enter_context(grpc.insecure_channel(f"xds:///{SERVICE}", _NO_PROXY)),
        ]
        return list(play_sync("sync", _calls(channels), concurrency, rounds, seconds))


async def aio_calls(
    port: int, control_plane: str, folder: Path, concurrency: int, rounds: int, seconds: float
) -> list[Row]:
    """Awaited calls, one channel shared by as many tasks."""
    with ExitStack() as stack:
        mesh, measured = meshes(control_plane, folder, stack)

        def plain(interceptors: Sequence[Any] = ()) -> grpc.aio.Channel:
            return grpc.aio.insecure_channel(f"127.0.0.1:{port}", _NO_PROXY, None, interceptors)

        channels = [
            plain(),
            plain(mesh.grpc_aio_client_interceptors(SERVICE)),
            mesh.grpc_aio_channel(SERVICE),
            measured.grpc_aio_channel(SERVICE),
            grpc.aio.insecure_channel(f"xds:///{SERVICE}", _NO_PROXY),
        ]
        try:
            return await play_async("async", _calls(channels), concurrency, rounds, seconds)
        finally:
            for channel in channels:
                await channel.close()


def _printed(rows: Sequence[Row]) -> str:
    lines = [f"{'mode':8} {'at once':>7}  {'':30} {'us/call':>9} {'p50 ms':>9} {'p99 ms':>9} {'x bare':>7}"]
    for row in rows:
        bare = next(
            each
            for each in rows
            if (each.client, each.concurrency) == (row.client, row.concurrency) and each.contestant == NAMES[0]
        )
        told = [statistics.median(each) for each in (row.microseconds, row.p50_ms, row.p99_ms)]
        lines.append(
            f"{row.client:8} {row.concurrency:7}  {row.contestant:30} {told[0]:9.0f} {told[1]:9.2f} {told[2]:9.2f}"
            f" {ratio(row.microseconds, bare.microseconds):7.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpc_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16], metavar="N")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that each contestant plays (default 7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a round (default 1)")
    parser.add_argument("--quick", action="store_true", help="only see that it runs; the numbers mean nothing")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too; - is the standard output, alone")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.serve:
        asyncio.run(_serve())
        return
    rounds, seconds = (1, 0.02) if chosen.quick else (chosen.rounds, chosen.seconds)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, running(Path(name)) as (port, control_plane):
        tell_grpc(control_plane)
        for mode in ("sync", "async"):
            for concurrency in chosen.concurrency:
                where = port, control_plane, Path(name), concurrency, rounds, seconds
                rows += sync_calls(*where) if mode == "sync" else asyncio.run(aio_calls(*where))
    if chosen.json != "-":
        print(_printed(rows))
    if chosen.json:
        text = json.dumps([row._asdict() for row in rows], indent=1) + "\n"
        sys.stdout.write(text) if chosen.json == "-" else Path(chosen.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
