"""Channels of the mesh and fork: gunicorn's preload with a control plane, and what becomes of asyncio's."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from grpc_peers import GrpcPeer

from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from peers import unused_port

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
WORLD = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: ratings, namespace: default}}
spec:
  hosts: [ratings]
  resolution: STATIC
  ports: [{{number: 9080, name: grpc, protocol: GRPC}}]
  endpoints: [{{address: 127.0.0.1, ports: {{grpc: {port}}}}}]
"""
# Each worker answers with its process and what it was told; the channel was made, and used, before the fork.
APPLICATION = """
import os
import meshlib
mesh = meshlib.connect()
channel = mesh.grpc_channel("ratings:9080")
say = channel.unary_unary("/test.Echo/UnaryUnary")
tell = channel.unary_stream("/test.Echo/UnaryStream")
PARENT = say(b"parent", timeout=60)

def app(environ, start_response):
    one, many = say(b"child", timeout=60), list(tell(b"child", timeout=60))
    start_response("200 OK", [("content-type", "text/plain")])
    return [f"{os.getpid()} {PARENT.decode()} {one.decode()} {len(many)}".encode()]
"""


@pytest.fixture
def peer() -> Iterator[GrpcPeer]:
    with GrpcPeer() as made:
        yield made


async def test_workers_of_a_preloaded_application_call_by_its_channel(peer: GrpcPeer, tmp_path: Path) -> None:
    """The master has called by it, over a feed of its own from the control plane; each worker has its own of both."""
    (tmp_path / "mesh").mkdir()
    (tmp_path / "mesh" / "world.yaml").write_text(WORLD.format(port=peer.port))
    (tmp_path / "calling.py").write_text(APPLICATION)
    port = unused_port()
    plane = ControlPlane(
        ControlPlaneSettings(folders=(tmp_path / "mesh",), xds=("127.0.0.1", 0), admin=("127.0.0.1", 0))
    )
    await plane.start()
    words = ("-m", "gunicorn", "--preload", "-w", "2", "-b", f"127.0.0.1:{port}", "calling:app")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *words),
        cwd=tmp_path,
        env={
            **os.environ,
            "MESHLIB_CONTROL_PLANE": plane.xds_address,
            "MESHLIB_CACHE_DIR": "-",
            "MESHLIB_TELEMETRY": "off",
            "GRPC_VERBOSITY": "NONE",
        },
    )
    try:
        workers: set[str] = set()
        async with asyncio.timeout(90), httpx.AsyncClient(trust_env=False, timeout=60) as client:
            while len(workers) < 2:
                try:
                    # Not on one connection, which one worker would serve.
                    found = await client.get(f"http://127.0.0.1:{port}/", headers={"connection": "close"})
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
                    continue
                assert found.status_code == 200
                worker, *told = found.text.split()
                assert told == ["peer:parent", "peer:child", "3"]
                workers.add(worker)
    finally:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 40)
        except TimeoutError:
            process.kill()
            await process.wait()
        await plane.stop()


FORKING = """
    import asyncio, os, sys
    import meshlib

    mesh = meshlib.connect(sys.argv[1], telemetry="off")
    state = sys.argv[2]
    channel = mesh.grpc_aio_channel("ratings:9080") if state == "made" else None

    kept = []

    async def call(keep):
        made = channel or mesh.grpc_aio_channel("ratings:9080")
        kept.append(made)
        try:
            return (await made.unary_unary("/test.Echo/UnaryUnary")(b"a", timeout=30)).decode()
        finally:
            if not keep:
                await made.close()

    async def main():
        if state != "made":
            print(await call(keep=state == "open"), flush=True)
        child = os.fork()
        if child == 0:
            return child
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print(await call(keep=False), flush=True)
        return child

    if state == "made":
        child = os.fork()
        if child:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            print(asyncio.run(call(keep=False)), flush=True)
    else:
        loop = asyncio.new_event_loop()
        child = loop.run_until_complete(main())
    if child == 0:
        try:
            print(asyncio.run(call(keep=False)), flush=True)
        except RuntimeError as error:
            print("refused:", str(error).partition(",")[0], flush=True)
        os._exit(0)
    mesh.close()
"""


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("made", ["peer:a", "peer:a"]),
        ("closed", ["peer:a", "peer:a", "peer:a"]),
        ("open", ["peer:a", "refused: a channel of grpc.aio was open when this process was forked", "peer:a"]),
    ],
)
def test_asyncios_channels_work_in_a_child_or_say_why_not(
    state: str, told: list[str], peer: GrpcPeer, tmp_path: Path
) -> None:
    """One that was made and not used, or closed, before the fork is no harm; one that was open would wait for ever."""
    (tmp_path / "world.yaml").write_text(WORLD.format(port=peer.port))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKING), str(tmp_path), state],
        env={**os.environ, "GRPC_VERBOSITY": "NONE"}, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()) == (0, told), done.stderr
