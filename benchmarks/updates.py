"""Does a change of configuration slow down the application? Calls at a steady rate, in peace, while the 1,000
endpoints of a service that it calls are replaced again and again, and while those of a service are that it never
asked for.

The last is the comparison that counts: control plane and machine have the same to do, and only this process is not
told. Control plane, server and who makes the changes are processes of their own. Calls begin when they are due,
whether the one before has ended or not, and latency counts from when a call was due: what waits for the interpreter
is not left out.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx

import meshlib
from benchmarks.effort import Effort
from benchmarks.processes import control_plane, module
from benchmarks.rounds import percentile
from meshlib.mesh import Mesh

CALLED, OURS, OTHERS = "plain.example", "ours.example", "others.example"
PEACE, NOT_TOLD, TOLD = "in peace", "while others' endpoints change", "while its own endpoints change"
RATE = 200.0
"""Calls a second: a fifth of what the client can do, so that a wait is seen as one and not hidden in a queue."""
EVERY = 0.25
"""Seconds between two changes, each of all endpoints, unless the control plane needs longer to take one in: far more
often than in a cluster, so that one call in a hundred, which is what p99 sees, meets one."""
PATIENCE = 60.0
SERVICE = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: default}}
spec:
  hosts: [{host}]
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: {port}}}]
  endpoints: [{endpoints}]
"""


def service(host: str, port: int, addresses: list[str]) -> str:
    endpoints = ", ".join(f"{{address: {address}}}" for address in addresses)
    return SERVICE.format(name=host.partition(".")[0], host=host, port=port, endpoints=endpoints)


def _first(number: int) -> str:
    return f"10.{number % 200 + 1}.0.0"


class Changer:
    """Makes changes, from a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    async def change(self, host: str, seconds: float) -> int:
        """For so long, at least once. Returns the number of the last change; each has endpoints of its own."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{host} {seconds}\n")
        self._process.stdin.flush()
        line = await asyncio.to_thread(self._process.stdout.readline)
        if not line:
            raise RuntimeError("no changes can be made: see what the process wrote")
        return int(line)


def _keep_changing(admin_url: str, count: int) -> None:
    number, headers = 0, {"content-type": "application/yaml"}
    with httpx.Client(base_url=admin_url, trust_env=False, timeout=PATIENCE) as admin:
        for line in sys.stdin:
            host, seconds = line.split()
            until = time.perf_counter() + float(seconds)
            while True:
                began, number = time.perf_counter(), number + 1
                text = service(host, 80, [f"10.{number % 200 + 1}.{n >> 8}.{n & 255}" for n in range(count)])
                admin.post("/v1/apply", content=text, headers=headers).raise_for_status()
                rest = began + EVERY - time.perf_counter()
                if time.perf_counter() + max(0.0, rest) >= until:
                    break
                time.sleep(max(0.0, rest))
            print(number, flush=True)


async def _calls(client: httpx.AsyncClient, seconds: float) -> list[float]:
    """Milliseconds of each call, from when it was due; sorted."""
    latencies: list[float] = []
    began = time.perf_counter()

    async def call(due: float) -> None:
        (await client.get(f"http://{CALLED}/reviews/0")).raise_for_status()
        latencies.append((time.perf_counter() - due) * 1e3)

    async with asyncio.TaskGroup() as group:
        for number in range(max(1, int(seconds * RATE))):
            due = began + number / RATE
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(call(due))
    return sorted(latencies)


async def _has_arrived(mesh: Mesh, number: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while not any(  # noqa: ASYNC110
            endpoint.address == _first(number)
            for assignment in mesh.live.snapshot.assignments
            for endpoint in assignment.endpoints
        ):
            await asyncio.sleep(0.05)


class Row(NamedTuple):
    """calls, changes: of all rounds together. The others: milliseconds, by round."""

    what: str
    calls: int
    changes: int
    p50_ms: list[float]
    p99_ms: list[float]
    longest_ms: list[float]


async def _measure(mesh: Mesh, changer: Changer, rounds: int, seconds: float) -> list[Row]:
    found = {what: Row(what, 0, 0, [], [], []) for what in (PEACE, NOT_TOLD, TOLD)}
    hosts = {NOT_TOLD: OTHERS, TOLD: OURS}
    async with mesh.AsyncClient(trust_env=False, timeout=PATIENCE) as client:
        await _calls(client, 10 / RATE)
        last = await changer.change(OURS, 0.0)
        await mesh.resolve_async(f"{OURS}:80")  # as its first call would, so that this process is told from now on
        await _has_arrived(mesh, last)
        for _ in range(rounds):
            for what in found:
                gc.collect()
                before, row = last, found[what]
                changing = asyncio.create_task(changer.change(hosts[what], seconds)) if what in hosts else None
                latencies = await _calls(client, seconds)
                if changing is not None:
                    last = await changing
                if what == TOLD:
                    await _has_arrived(mesh, last)
                found[what] = row._replace(calls=row.calls + len(latencies), changes=row.changes + last - before)
                for figures, figure in (
                    (row.p50_ms, percentile(latencies, 50)),
                    (row.p99_ms, percentile(latencies, 99)),
                    (row.longest_ms, latencies[-1]),
                ):
                    figures.append(figure)
    return list(found.values())


def measure(effort: Effort) -> dict[str, Any]:
    count, rounds, seconds = {"full": (1_000, 5, 4.0), "fast": (1_000, 3, 1.5)}.get(effort.name, (50, 1, 0.1))
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        server = stack.enter_context(module("benchmarks.server", "0"))
        configuration = folder / "mesh"
        configuration.mkdir()
        text = service(CALLED, server.ports[0], ["127.0.0.1"])
        (configuration / "mesh.yaml").write_text(text, encoding="utf-8")
        told = stack.enter_context(control_plane(configuration, folder / "log"))
        command = [sys.executable, "-m", "benchmarks.updates", told.admin, str(count)]
        process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert process.stdin is not None
        stack.callback(process.stdin.close)
        mesh = stack.enter_context(
            meshlib.connect(told.xds, telemetry_interval=3600.0, cache_dir=str(folder / "cache"))
        )
        rows = asyncio.run(_measure(mesh, Changer(process), rounds, seconds))
    return {"rows": [row._asdict() for row in rows], "endpoints": count, "rate": RATE, "every": EVERY}


if __name__ == "__main__":
    _keep_changing(sys.argv[1], int(sys.argv[2]))
