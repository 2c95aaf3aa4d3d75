"""Services that count what they carry out, and a load whose every call has a number: what was lost, what came twice?"""

from __future__ import annotations

import asyncio
import itertools
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx

from chaos.recording import Promise
from e2e.town import eventually
from peers import unused_port

HOST = "http://ledger.example.com"

CONFIGURATION = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: ledger}}
spec:
  hosts: [ledger.example.com]
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  endpoints: [{endpoints}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: ledger}}
spec:
  host: ledger.example.com
  trafficPolicy:
    {policy}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: ledger}}
spec:
  hosts: [ledger.example.com]
  http:
  - route: [{{destination: {{host: ledger.example.com}}}}]
    timeout: {timeout}s
    retries: {{attempts: {attempts}, perTryTimeout: {per_try}s, retryOn: "connect-failure,refused-stream,reset,5xx"}}
"""
OUTLIER = "{{consecutive5xxErrors: 3, interval: 0.5s, baseEjectionTime: {ejection}s, maxEjectionPercent: 70}}"


def configuration(
    ports: Sequence[int],
    *,
    attempts: int = 5,
    per_try: float = 0.5,
    timeout: float = 30.0,
    ejection: float = 1.0,
) -> str:
    """YAML of a host behind these ports of this machine, whose calls are tried again."""
    endpoints = ", ".join(f"{{address: 127.0.0.1, ports: {{http: {port}}}}}" for port in ports)
    policy = "outlierDetection: " + OUTLIER.format(ejection=ejection)
    return CONFIGURATION.format(endpoints=endpoints, policy=policy, timeout=timeout, attempts=attempts, per_try=per_try)


class Ledgers:
    """Processes of ledger_service, which share one ledger. Each keeps its port for life, and comes back to it."""

    def __init__(self, folder: Path, count: int, addresses: Sequence[tuple[str, int]] = ()) -> None:
        """addresses: where each listens; default a port of 127.0.0.1 for each."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "ledger"
        self.path.touch()
        self.addresses = addresses or [("127.0.0.1", unused_port()) for _ in range(count)]
        self.ports = [port for _, port in self.addresses]
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, *numbers: int) -> None:
        """Returns once they accept."""
        for number in numbers:
            script = str(Path(__file__).with_name("ledger_service.py"))
            host, port = self.addresses[number]
            command = [sys.executable, "-S", "-E", script, host, str(port), str(self.path), f"ledger-{number}"]
            self.running[number] = subprocess.Popen(command)
        for number in numbers:
            eventually(lambda at=self.addresses[number]: _accepts(at), f"ledger-{number} accepts")  # type: ignore[misc]

    def signal(self, number: int, what: signal.Signals) -> None:
        self.running[number].send_signal(what)

    def kill(self, number: int) -> None:
        process = self.running.pop(number)
        process.kill()
        process.wait(20)

    def executed(self) -> Counter[tuple[str, int]]:
        """How often each call was carried out, by its method and number."""
        lines = (line.split() for line in self.path.read_text().splitlines())
        return Counter((method, int(number)) for _, method, number in lines)

    def __enter__(self) -> Self:
        self.start(*range(len(self.ports)))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running.values():
            process.kill()
        for process in self.running.values():
            process.wait(20)


def _accepts(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, 5).close()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Call:
    """One call of the load. instance: who answered with 200; "" where `failure` says why none did."""

    number: int
    method: str
    began: float
    seconds: float
    instance: str
    failure: str


@dataclass
class Calls:
    made: list[Call] = field(default_factory=list)
    begun: int = 0

    def since(self, at: float) -> list[Call]:
        return [each for each in self.made if each.began >= at]

    def failures(self, method: str) -> list[Call]:
        return [each for each in self.made if each.failure and each.method == method]

    async def more(self, calls: int, patience: float = 60.0) -> None:
        """Until so many more have ended."""
        wanted = len(self.made) + calls
        async with asyncio.timeout(patience):
            while len(self.made) < wanted:  # noqa: ASYNC110 -- counted by many tasks
                await asyncio.sleep(0.01)

    async def answered_by(self, instance: str, after: float, patience: float = 60.0) -> None:
        """Until it has answered a call that began after that."""
        async with asyncio.timeout(patience):
            while not any(each.instance == instance for each in self.since(after)):  # noqa: ASYNC110 -- as above
                await asyncio.sleep(0.01)

    def settle(self, told: Promise, executed: Counter[tuple[str, int]]) -> None:
        """No GET failed, no answered call is missing at the servers, and no POST was carried out twice."""
        assert not (failed := self.failures("GET")), failed[:5]
        lost = [each for each in self.made if not each.failure and not executed[each.method, each.number]]
        assert not lost, lost[:5]
        twice = [number for (method, number), times in executed.items() if method == "POST" and times > 1]
        assert not twice, twice[:5]
        told.counted("calls", len(self.made))
        told.counted("GET that failed", 0)
        told.counted("POST that failed", len(self.failures("POST")))
        told.counted("POST that was carried out twice", 0)


@asynccontextmanager
async def calling(
    client: httpx.AsyncClient,
    *,
    rate: float,
    size: int = 0,
    methods: Sequence[str] = ("GET", "GET", "POST", "GET"),
    host: str = HOST,
) -> AsyncIterator[Calls]:
    """Calls at `rate` a second, whatever becomes of those before (an open loop), until the block ends; then waits for
    those that are on their way. A body that is not its own call's, or not whole, is a failure."""
    calls, over = Calls(), asyncio.Event()

    async def one(number: int, method: str) -> None:
        began, instance, failure = time.monotonic(), "", ""
        try:
            response = await client.request(method, f"{host}/?{size}", headers={"x-call": str(number)})
            whole = f"{number} ".ljust(size, "x")
            if response.status_code != 200:
                failure = f"{response.status_code} {response.text} {response.extensions}"
            elif response.text != whole:
                failure = f"the body is {len(response.text)} bytes {response.text[:40]!r}, not {len(whole)}"
            else:
                instance = response.headers["x-instance"]
        except httpx.HTTPError as error:
            failure = repr(error)
        calls.made.append(Call(number, method, began, time.monotonic() - began, instance, failure))

    async def load() -> None:
        start = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in itertools.count(1):
                if over.is_set():
                    return
                calls.begun = number
                group.create_task(one(number, methods[number % len(methods)]))
                ahead = start + number / rate - time.monotonic()
                await asyncio.sleep(max(0.0, ahead))

    loading = asyncio.create_task(load())
    try:
        yield calls
    finally:
        over.set()
        await loading
