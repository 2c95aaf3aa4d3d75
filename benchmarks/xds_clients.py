"""How many clients does a control plane hold, and how soon do all of them have a change? `python -m
benchmarks.xds_clients`.

One control plane in a process of its own; here, clients that do what xDS asks for and nothing else: each a connection
of its own, every answer acknowledged. Then some endpoints change, one of each of so many services, by the admin API and
round by round; a round ends when the last client that has asked for any of them has acknowledged. Rows are Markdown.
Linux only: CPU and memory of the control plane are read from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache
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
FEW = 10
"""Services that a client asks for in the profile `few`."""
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


def cluster(number: int) -> str:
    return f"outbound|80||service-{number}.example"


class Case(NamedTuple):
    """profile: `all`, by wildcard, and the endpoints of all by name; or `few`, ten services by their names, as who asks
    on demand. changed: in each round, so many services."""

    variant: str
    profile: str
    clients: int
    services: int
    endpoints: int
    changed: tuple[int, ...]
    rounds: int
    seconds: float
    """After so many no further round begins."""

    @property
    def endpoints_of_each(self) -> int:
        return max(1, self.endpoints // self.services)

    def wanted_by(self, client: int) -> range | list[int]:
        if self.profile == "all":
            return range(self.services)
        return sorted({(client * FEW + number) % self.services for number in range(FEW)})

    def concerned(self, changed: int) -> int:
        """How many clients have asked for any of the first services."""
        return sum(self.wanted_by(client)[0] < changed for client in range(self.clients))


class Client:
    """One client on one stream. told: called at each acknowledgement of endpoints."""

    def __init__(self, address: str, number: int, case: Case, told: Callable[[], None]) -> None:
        self._is_delta, self._told = case.variant == "delta", told
        self._endpoints = tuple(cluster(each) for each in case.wanted_by(number))
        self._clusters = self._endpoints if case.profile == "few" else ()
        self._channel = grpc.aio.insecure_channel(address, OPTIONS)
        self._call: Any = self._channel.stream_stream(m.ADS_DELTA if self._is_delta else m.ADS_STREAM)()
        self._node = m.Node(id=f"sidecar~127.0.0.1~client-{number}.default~default.svc.cluster.local")

    async def run(self) -> None:
        await self._ask(CLUSTER, self._clusters)
        has_clusters = False
        while (data := await self._call.read()) is not grpc.aio.EOF:
            response = (m.DeltaDiscoveryResponse if self._is_delta else m.DiscoveryResponse).FromString(data)
            is_endpoints = response.type_url == ENDPOINT
            await self._accept(response, self._endpoints if is_endpoints else self._clusters)
            if is_endpoints:
                self._told()
            elif not has_clusters:
                has_clusters = True
                await self._ask(ENDPOINT, self._endpoints)

    async def _ask(self, kind: str, names: tuple[str, ...]) -> None:
        head = (m.DeltaDiscoveryRequest if self._is_delta else m.DiscoveryRequest)(type_url=kind, node=self._node)
        await self._call.write(m.serialize(head) + _serialized(names, self._is_delta))

    async def _accept(self, response: Any, names: tuple[str, ...]) -> None:
        kind = m.DeltaDiscoveryRequest if self._is_delta else m.DiscoveryRequest
        head: bytes = m.serialize(kind(type_url=response.type_url, response_nonce=response.nonce))
        await self._call.write(head if self._is_delta else head + _serialized(names, False))

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()


@lru_cache(10_000)
def _serialized(names: tuple[str, ...], is_delta: bool) -> bytes:
    """A message may come in pieces (protobuf concatenates them), so what clients repeat is made once: they are not what
    is measured."""
    if is_delta:
        return m.serialize(m.DeltaDiscoveryRequest(resource_names_subscribe=names))
    return m.serialize(m.DiscoveryRequest(resource_names=names))


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
    kilobytes: of the control plane, for each client. cpu: its milliseconds for each change, all clients together."""

    case: Case
    changed: int
    seconds: float
    p50: float
    p99: float
    kilobytes: float
    cpu: float

    def __str__(self) -> str:
        case = self.case
        sizes = f"{case.clients} | {case.profile} of {case.services} | {self.changed}"
        took = f"{self.seconds:.1f} | {self.p50:.0f} | {self.p99:.0f}"
        return f"| {case.variant} | {sizes} | {took} | {self.cpu:.0f} | {self.kilobytes:.0f} |"


HEAD = """
| variant | clients | services | changed | all there, s | p50 ms | p99 ms | CPU ms/change | kB/client |
|---|---|---|---|---|---|---|---|---|""".strip()


@contextmanager
def control_plane(case: Case) -> Iterator[tuple[int, str, str]]:
    """(process, xDS address, URL of the admin API)"""
    with tempfile.TemporaryDirectory() as folder:
        kept = range(max(case.changed), case.services)
        Path(folder, "mesh.yaml").write_text("---".join(service(each, case.endpoints_of_each) for each in kept))
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


class Acknowledged:
    """Counts, and says when as many as wanted are there."""

    def __init__(self) -> None:
        self._count, self._wanted, self._enough = 0, 0, asyncio.Event()

    def __call__(self) -> None:
        self._count += 1
        if self._count >= self._wanted:
            self._enough.set()

    def expect(self, wanted: int) -> None:
        self._count, self._wanted = 0, wanted
        self._enough.clear()

    async def all(self) -> None:
        async with asyncio.timeout(LONGEST):
            await self._enough.wait()


@asynccontextmanager
async def connected(address: str, case: Case, told: Callable[[], None]) -> AsyncIterator[None]:
    clients = [Client(address, number, case, told) for number in range(case.clients)]
    running = [asyncio.create_task(client.run()) for client in clients]
    try:
        yield
    finally:
        for client in clients:
            await client.close()
        await asyncio.gather(*running, return_exceptions=True)


async def measure(case: Case) -> list[Row]:
    with control_plane(case) as (process, address, url):
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=LONGEST) as admin:

            async def change(count: int, last: int) -> None:
                text = "---".join(service(each, case.endpoints_of_each, last) for each in range(count))
                headers = {"content-type": "application/yaml"}
                (await admin.post("/v1/apply", content=text, headers=headers)).raise_for_status()

            await change(max(case.changed), 0)
            await _until_known(admin, case.services)
            before, told, rows = Used.by(process), Acknowledged(), []
            told.expect(case.clients)
            began = time.perf_counter()
            async with connected(address, case, told):
                await told.all()
                seconds = time.perf_counter() - began
                memory = (Used.by(process).memory - before.memory) / case.clients / 1e3
                number = 0
                for changed in case.changed:
                    took, since, used = [], time.perf_counter(), Used.by(process)
                    while len(took) < 2 or (len(took) < case.rounds and time.perf_counter() - since < case.seconds):
                        number += 1
                        told.expect(case.concerned(changed))
                        began = time.perf_counter()
                        await change(changed, number)
                        await told.all()
                        took.append((time.perf_counter() - began) * 1e3)
                    cpu = (Used.by(process).cpu - used.cpu) / len(took) * 1e3
                    last = statistics.quantiles(took, n=100, method="inclusive")[98]
                    rows.append(Row(case, changed, seconds, statistics.median(took), last, memory, cpu))
    return rows


async def _until_known(admin: httpx.AsyncClient, services: int) -> None:
    async with asyncio.timeout(LONGEST):
        while True:
            known = (await admin.get("/v1/endpoints")).raise_for_status().json()["services"]
            if len(known) >= services:
                return
            await asyncio.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--services", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--endpoints", type=int, default=10, help="of each service")
    parser.add_argument("--changed", type=int, nargs="+", default=[1, 10, 100], help="services, in each round")
    parser.add_argument("--profile", nargs="+", choices=("all", "few"), default=["all", "few"])
    parser.add_argument("--variant", nargs="+", choices=("sotw", "delta"), default=["sotw", "delta"])
    parser.add_argument("--rounds", type=int, default=20, help="changes, two at least")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no further round begins")
    parser.add_argument("--quick", action="store_true", help="only show that it runs")
    given = parser.parse_args()
    if given.quick:
        given.clients, given.services, given.endpoints, given.changed, given.rounds = 5, [12], 2, [1, 3], 2
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the control plane inherits it
    print(HEAD, flush=True)
    for variant in given.variant:
        for profile in given.profile:
            for services in given.services:
                sizes = (given.clients, services, services * given.endpoints)
                changed = tuple(each for each in given.changed if each <= services)
                case = Case(variant, profile, *sizes, changed, given.rounds, given.seconds)
                for row in asyncio.run(measure(case)):
                    print(row, flush=True)


if __name__ == "__main__":
    main()
