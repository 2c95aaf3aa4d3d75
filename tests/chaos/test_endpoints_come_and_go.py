"""Hundreds of calls a second, while endpoints are killed, restarted, slowed and added at random.

`make chaos` makes 500 a second for a minute, which takes two cores to itself; `make test` has a short form."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

import meshlib
from chaos.echoes import SERVICE, start_echo
from chaos.recording import IS_FULL, Promise, Promising
from e2e.town import Town

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

RATE, DURATION = (500, 60.0) if IS_FULL else (100, 0.0)
INTERVAL = 1.0
"""The detection interval, in seconds."""

RULES = f"""
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: echo}}
spec:
  host: echo
  trafficPolicy:
    outlierDetection:
      {{consecutive5xxErrors: 3, interval: {INTERVAL:g}s, baseEjectionTime: 2s, maxEjectionPercent: 50}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: echo}}
spec:
  hosts: [echo]
  http:
  - route: [{{destination: {{host: echo}}}}]
    retries: {{attempts: 5, perTryTimeout: 2s, retryOn: "connect-failure,refused-stream,reset,5xx"}}
"""


class Chaos:
    """The town's monkey. What it did is kept, for the message of a failure and for what is measured."""

    def __init__(self, town: Town, rng: random.Random) -> None:
        self.town, self.rng = town, rng
        self.running: list[str] = []
        self.made = 0
        self.done: list[tuple[float, str, str]] = []
        self.slowed: list[tuple[float, float, str, int]] = []
        """When it became slow and when quick again, who, and among how many."""

    def start(self) -> str:
        self.made += 1
        name = f"echo-{self.made}"
        start_echo(self.town, name)
        self.running.append(name)
        return name

    def end(self, name: str, number: signal.Signals) -> None:
        self.running.remove(name)
        self.town.kill(name, number)

    def slow(self, name: str, seconds: float) -> None:
        httpx.post(f"http://127.0.0.1:{self.town.ports[name]}/slow?{seconds:g}", trust_env=False, timeout=30)

    def act(self, act: str = "") -> None:
        """One thing, at random unless it is said; two healthy endpoints are always left."""
        acts = ["add"] if len(self.running) < 3 else ["kill", "terminate", "slow", "stall"]
        act = act or self.rng.choice(acts if len(self.running) > 5 else [*acts, "add"])
        name = self.rng.choice(self.running)
        began = time.monotonic()
        self.done.append((began, act, name))
        if act == "add":
            self.start()
        elif act == "kill":
            self.end(name, signal.SIGKILL)
            self.start()
        elif act == "terminate":
            self.end(name, signal.SIGTERM)
            self.start()
        else:
            others = len(self.running)
            self.slow(name, 0.3 if act == "slow" else 20.0)
            time.sleep((4 if IS_FULL else 2.5) * INTERVAL)  # the time for which it is slow, under load
            self.slow(name, 0.0)
            self.slowed.append((began, time.monotonic(), name, others))


async def load(client: httpx.AsyncClient, until: asyncio.Event) -> tuple[list[tuple[float, str]], list[str]]:
    """Calls at RATE, whatever becomes of those before (an open loop). Who answered when, and what failed."""
    answered: list[tuple[float, str]] = []
    failures: list[str] = []

    async def one() -> None:
        began = time.monotonic()
        try:
            response = await client.get("http://echo/")
        except httpx.HTTPError as error:
            failures.append(f"{error!r} after {time.monotonic() - began:.2f} s")
            return
        if response.status_code == 200:
            answered.append((began, response.json()["instance"]))
        else:
            failures.append(f"{response.status_code} {response.text} {response.extensions}")

    start = time.monotonic()
    async with asyncio.TaskGroup() as calls:
        number = 0
        while not until.is_set():
            number += 1
            calls.create_task(one())
            if (ahead := start + number / RATE - time.monotonic()) > 0:
                await asyncio.sleep(ahead)
    return answered, failures


async def test_no_idempotent_call_fails_while_endpoints_come_and_go(tmp_path: Path, promise: Promising) -> None:
    """And a slow endpoint's share of the calls falls within one detection interval."""
    async with promise(
        f"No idempotent call fails while endpoints come and go, and one that is slow has less than half of its share "
        f"of the calls after one detection interval ({INTERVAL:g} s)",
        f"processes behind a control plane killed, ended, started, slowed and stalled, at {RATE} calls a second",
    ) as told:
        await _come_and_go(tmp_path, told)


async def _come_and_go(folder: Path, told: Promise) -> None:
    with Town(folder / "town") as town:
        town.write("echo.yaml", SERVICE + RULES)
        town.start_control_plane()
        chaos = Chaos(town, random.Random(20261123))
        for _ in range(4 if IS_FULL else 3):
            chaos.start()
        mesh = meshlib.connect(town.target, workload="caller", cache_dir="-")
        until = asyncio.Event()
        with mesh:
            transport = mesh.async_transport(engine="aiohttp")
            async with httpx.AsyncClient(transport=transport, timeout=60) as client:
                assert (await client.get("http://echo/")).status_code == 200
                loading = asyncio.create_task(load(client, until))
                end = time.monotonic() + DURATION
                if IS_FULL:
                    while time.monotonic() < end:
                        await asyncio.to_thread(chaos.act)
                else:
                    for act in ("kill", "stall", "terminate"):
                        await asyncio.to_thread(chaos.act, act)
                until.set()
                answered, failures = await loading
    assert failures == [], chaos.done
    acts = Counter(act for _, act, _ in chaos.done)
    assert {"slow", "stall"} & set(acts) and {"kill", "terminate"} & set(acts)
    for began, ended, name, others in chaos.slowed:
        window = [who for when, who in answered if began + INTERVAL < when < ended]
        assert len(window) > RATE, "the load went on"
        share = window.count(name) / len(window)
        assert share < 0.5 / others, (name, others, Counter(window), chaos.done)
        told.measured("share of a slow one, of a fair share", 100 * share * others, "%", at_most=50)
    told.counted("calls", len(answered))
    told.counted("acts", len(chaos.done))
    told.counted("calls that failed", 0)
