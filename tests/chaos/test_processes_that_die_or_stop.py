"""What does a caller notice of an endpoint that is killed, or that stops and says nothing?"""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

import meshlib
from chaos.ledgers import Ledgers, calling, configuration
from chaos.recording import IS_FULL, Promising
from promises import within

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

RATE = 300.0 if IS_FULL else 60.0
KILLS = 12 if IS_FULL else 2
PER_TRY, EJECTION = 0.5, 1.0


async def test_a_kill_fails_no_get_and_repeats_no_post(tmp_path: Path, promise: Promising) -> None:
    """A POST on its way to a process that dies may be lost with it: then it fails, and is not sent again."""
    async with promise(
        "A process that is killed fails no idempotent call, and no POST is carried out twice",
        f"one of three endpoints killed by SIGKILL and started again, {KILLS} times, at {RATE:g} calls a second; "
        "the next one once that is called again",
    ) as told:
        with Ledgers(tmp_path / "servers", 3) as servers:
            (tmp_path / "mesh.yaml").write_text(configuration(servers.ports))
            with meshlib.connect(tmp_path) as mesh:
                async with mesh.AsyncClient(timeout=60) as client, calling(client, rate=RATE) as calls:
                    await calls.more(20)
                    slowest = 0.0
                    for turn in range(KILLS):
                        killed = time.monotonic()
                        await asyncio.to_thread(servers.kill, turn % 3)
                        await calls.more(30)
                        await asyncio.to_thread(servers.start, turn % 3)
                        # The next one dies when this one is called again: of three, two are there at any time.
                        await calls.answered_by(f"ledger-{turn % 3}", time.monotonic())
                        await calls.more(30)
                        hit = [each for each in calls.since(killed - 1) if each.seconds > 0.4 or each.failure]
                        slowest = max([slowest, *(each.began + each.seconds - killed for each in hit)])
            calls.settle(told, servers.executed())
            # Only those that the dead process had in hand; each kill meets a few of them at most.
            assert len(calls.failures("POST")) <= KILLS * 10
            told.measured("calls as quick as before, after a kill, within", slowest, at_most=within(5.0))


async def test_a_paused_process_is_left_alone_and_comes_back(tmp_path: Path, promise: Promising) -> None:
    """It still has its port, and the kernel still accepts for it: only time tells."""
    async with promise(
        f"A process that stops (SIGSTOP) costs a GET one try of {PER_TRY} s, is ejected after three of them, and gets "
        f"calls again once it runs; no POST is carried out twice",
        f"one of three endpoints stopped for some seconds at {RATE:g} calls a second, then continued",
    ) as told:
        with Ledgers(tmp_path / "servers", 3) as servers:
            (tmp_path / "mesh.yaml").write_text(configuration(servers.ports, per_try=PER_TRY, ejection=EJECTION))
            with meshlib.connect(tmp_path) as mesh:
                async with mesh.AsyncClient(timeout=60) as client, calling(client, rate=RATE) as calls:
                    await calls.more(30)
                    stopped = time.monotonic()
                    servers.signal(0, signal.SIGSTOP)
                    try:
                        await asyncio.sleep(6.0 if IS_FULL else 1.5)
                        await calls.more(int(RATE / 2))
                    finally:
                        servers.signal(0, signal.SIGCONT)
                    continued = time.monotonic()
                    until = continued + within(4 * EJECTION + 10)
                    # An ejection lasts longer each time; what it had in hand before does not count as coming back.
                    while not any(each.instance == "ledger-0" for each in calls.since(continued)):
                        assert time.monotonic() < until, "it gets calls again"
                        await calls.more(1)
            calls.settle(told, servers.executed())
            back = [each.began for each in calls.since(continued) if each.instance == "ledger-0"]
            slow = [each for each in calls.since(stopped) if each.began < continued and each.seconds >= PER_TRY]
            told.counted("calls that met the stopped one", len(slow))
            first = [each for each in slow if each.began < stopped + PER_TRY]
            told.measured("share of all calls", 100 * len(slow) / len(calls.since(stopped)), "%")
            assert len(first) < 3 * PER_TRY * RATE + 10
            told.measured("it gets calls again after", min(back) - continued, at_most=within(4 * EJECTION + 10))
