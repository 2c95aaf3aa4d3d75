"""How many clients does a control plane hold, and how soon do all of them have a change? `python -m
benchmarks.xds_clients`.

One control plane in a process of its own; here, clients that do what xDS asks for and nothing else: each a connection
of its own, all clusters by wildcard and the endpoints of all of them by name, every answer acknowledged. Then one
endpoint of one service changes, by the admin API, round by round; a round ends when the last client has acknowledged.
Linux only: CPU and memory of the control plane are read from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # C-core tells of each connection that ends

import grpc.aio
import httpx

from benchmarks.grpc_overhead import _await_port
from meshlib.cli.ports import free_port
from meshlib.xds import messages as m
from meshlib.xds.resource_types import CLUSTER, ENDPOINT

LONGEST = 600.0
"""Seconds for all clients to have everything, or one change."""
OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)
SERVICE = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: service-{number}, namespace: default}}
spec:
  hosts: [service-{number}.example]
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  endpoints: [{endpoints}]
"""


def service(number: int, endpoints: int, last: int = 0) -> str:
    """last: of the last endpoint's address, which is what changes."""
    hosts = [f"10.{number >> 8 & 255}.{number & 255}.{host + 1}" for host in range(endpoints - 1)]
    hosts.append(f"11.0.0.{last % 250 + 1}")
    return SERVICE.format(number=number, endpoints=", ".join(f"{{address: {host}}}" for host in hosts))


class Client:
    """One client on one stream. told: called at each acknowledgement of endpoints."""

    def __init__(self, address: str, number: int, *, is_delta: bool, told: Callable[[], None]) -> None:
        self._is_delta, self._told = is_delta, told
        self._channel = grpc.aio.insecure_channel(address, OPTIONS)
        self._call: Any = self._channel.stream_stream(m.ADS_DELTA if is_delta else m.ADS_STREAM)()
        self._names: tuple[str, ...] = ()
        self._node = m.Node(id=f"sidecar~127.0.0.1~client-{number}.default~default.svc.cluster.local")

    async def run(self) -> None:
        await self._call.write(self._request(CLUSTER, node=self._node))
        while (data := await self._call.read()) is not grpc.aio.EOF:
            response = (m.DeltaDiscoveryResponse if self._is_delta else m.DiscoveryResponse).FromString(data)
            kind = response.type_url
            names = self._names if kind == ENDPOINT else ()
            await self._call.write(self._request(kind, response.nonce, () if self._is_delta else names))
            if kind == ENDPOINT:
                self._told()
            elif not self._names:
                self._names = tuple(
                    each.name if self._is_delta else m.Cluster.FromString(each.value).name
                    for each in response.resources
                )
                await self._call.write(self._request(ENDPOINT, names=self._names))

    def _request(self, kind: str, nonce: str = "", names: tuple[str, ...] = (), node: Any = None) -> bytes:
        if self._is_delta:
            request = m.DeltaDiscoveryRequest(
                type_url=kind, response_nonce=nonce, resource_names_subscribe=names, node=node
            )
        else:
            request = m.DiscoveryRequest(type_url=kind, response_nonce=nonce, resource_names=names, node=node)
        return m.serialize(request)

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()


class Used(NamedTuple):
    """Of a process: seconds of CPU, bytes of memory."""

    cpu: float
    memory: int

    @classmethod
    def by(cls, process: int) -> Used:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return cls(ticks / os.sysconf("SC_CLK_TCK"), int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))


class Row(NamedTuple):
    """seconds: until all clients had everything; p50, p99: milliseconds from a change to the last acknowledgement.
    kilobytes: of the control plane, for each client. microseconds: of its CPU, for each client and change."""

    variant: str
    seconds: float
    p50: float
    p99: float
    kilobytes: float
    microseconds: float


@contextmanager
def control_plane(services: int, endpoints: int) -> Iterator[tuple[int, str, str]]:
    """(process, xDS address, URL of the admin API)"""
    with tempfile.TemporaryDirectory() as folder:
        each = max(1, endpoints // services)
        Path(folder, "mesh.yaml").write_text("---".join(service(number, each) for number in range(1, services)))
        xds = free_port(0, set())
        admin = free_port(0, {xds})
        command = [sys.executable, "-m", "meshlib.cli", "control-plane", folder, "--log-level", "error"]
        addresses = ["--xds", f"127.0.0.1:{xds}", "--admin", f"127.0.0.1:{admin}"]
        with subprocess.Popen([*command, *addresses], stdout=subprocess.DEVNULL) as process:
            try:
                _await_port(admin)
                yield process.pid, f"127.0.0.1:{xds}", f"http://127.0.0.1:{admin}"
            finally:
                process.terminate()


async def measure(variant: str, count: int, services: int, endpoints: int, rounds: int) -> Row:
    each = max(1, endpoints // services)
    acknowledged, everybody = 0, asyncio.Event()

    def told() -> None:
        nonlocal acknowledged
        acknowledged += 1
        if acknowledged >= count:
            everybody.set()

    with control_plane(services, endpoints) as (process, address, url):
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=LONGEST) as admin:

            async def change(number: int) -> None:
                headers = {"content-type": "application/yaml"}
                (await admin.post("/v1/apply", content=service(0, each, number), headers=headers)).raise_for_status()

            async def all_have_it() -> None:
                nonlocal acknowledged
                async with asyncio.timeout(LONGEST):
                    await everybody.wait()
                everybody.clear()
                acknowledged = 0

            await change(0)
            async with asyncio.timeout(LONGEST):
                while True:
                    known = (await admin.get("/v1/endpoints")).raise_for_status().json()["services"]
                    if len(known) >= services:
                        break
                    await asyncio.sleep(0.1)
            before = Used.by(process)
            clients = [Client(address, number, is_delta=variant == "delta", told=told) for number in range(count)]
            began = time.perf_counter()
            running = [asyncio.create_task(client.run()) for client in clients]
            await all_have_it()
            seconds = time.perf_counter() - began
            connected, took = Used.by(process), []
            for number in range(1, rounds + 1):
                began = time.perf_counter()
                await change(number)
                await all_have_it()
                took.append((time.perf_counter() - began) * 1e3)
            after = Used.by(process)
            for client in clients:
                await client.close()
            await asyncio.gather(*running, return_exceptions=True)
    return Row(
        variant,
        seconds,
        statistics.median(took),
        statistics.quantiles(took, n=100, method="inclusive")[98],
        (after.memory - before.memory) / count / 1e3,
        (after.cpu - connected.cpu) / count / rounds * 1e6,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--services", type=int, default=1000)
    parser.add_argument("--endpoints", type=int, default=10_000, help="of all services together")
    parser.add_argument("--rounds", type=int, default=20, help="changes, two at least")
    parser.add_argument("--quick", action="store_true", help="only show that it runs")
    given = parser.parse_args()
    sizes = (5, 4, 8, 2) if given.quick else (given.clients, given.services, given.endpoints, given.rounds)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the control plane inherits it
    print("variant   all there  p50 ms  p99 ms  kB/client  CPU us/client/change")
    for variant in ("sotw", "delta"):
        row = asyncio.run(measure(variant, *sizes))
        print(
            f"{row.variant:7}  {row.seconds:8.2f} s  {row.p50:6.0f}  {row.p99:6.0f}  {row.kilobytes:9.0f}"
            f"  {row.microseconds:20.0f}"
        )


if __name__ == "__main__":
    main()
