"""Attempts side by side: who is kept, who is given up, and that nothing of the losers stays."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from meshlib.model import Endpoint, Headers, HedgePolicy, Outcome, Request, RetryPolicy
from meshlib.outbound import races
from meshlib.outbound.drive import drive, drive_async
from meshlib.policy.call import CallContext, outbound_call
from meshlib.policy.cluster import LiveCluster
from meshlib.policy.live import Live
from meshlib.policy.steps import Deliver, Flow, Reply, Send
from snapshots import live, service

GOOD = Outcome(200, Headers())
BAD = Outcome(503, Headers())
THREE = [("10.0.0.1", 80), ("10.0.0.2", 80), ("10.0.0.3", 80)]
SOON = 0.001
WAIT = 15.0
"""Longer than any of these tests takes: reached only where something hangs."""


class Servers:
    """What the attempts of one call do, by their number: answer, or answer when they are told to."""

    def __init__(self, *answers: Outcome | Exception | threading.Event) -> None:
        self.answers = answers
        self.sent: list[Endpoint] = []
        self.released: list[int] = []
        self.third = asyncio.Event()
        self.lock = threading.Lock()

    def take(self, step: Send) -> tuple[int, Any]:
        with self.lock:
            self.sent.append(step.endpoint)
            number = len(self.sent) - 1
        return number, self.answers[min(number, len(self.answers) - 1)]

    def note(self, number: int) -> None:
        with self.lock:
            self.released.append(number)


class _Base:
    def __init__(self, servers: Servers, repeatable: bool = True) -> None:
        self.servers, self.repeatable = servers, repeatable
        self.number: int | None = None

    def another(self) -> Any:
        return type(self)(self.servers) if self.repeatable else None

    def mirror(self, flow: Flow) -> bool:
        return False

    def reply(self, step: Reply) -> Any:
        return step

    def deliver(self, step: Deliver, flow: Flow) -> Any:
        number, self.number = self.number, None
        return number, flow


class Sync(_Base):
    def send(self, step: Send) -> Outcome:
        self.release()
        number, answer = self.servers.take(step)
        if isinstance(answer, threading.Event):
            assert answer.wait(WAIT)
            answer = GOOD
        if isinstance(answer, BaseException):
            raise answer
        self.number = number
        return answer

    def release(self) -> None:
        number, self.number = self.number, None
        if number is not None:
            self.servers.note(number)

    def wait(self, seconds: float) -> None: ...
    def resolve(self, authority: str) -> None: ...


class Async(_Base):
    async def send(self, step: Send) -> Outcome:
        await self.release()
        number, answer = self.servers.take(step)
        if number == 2:
            self.servers.third.set()
        if isinstance(answer, threading.Event):
            try:
                await asyncio.Event().wait()
            finally:
                self.servers.note(number)
        if isinstance(answer, BaseException):
            raise answer
        self.number = number
        return answer

    async def release(self) -> None:
        await asyncio.sleep(0)
        number, self.number = self.number, None
        if number is not None:
            self.servers.note(number)

    async def wait(self, seconds: float) -> None: ...
    async def resolve(self, authority: str) -> None: ...


@pytest.fixture
def world() -> Live:
    hedge = HedgePolicy(delay=SOON, max_attempts=3)
    return live(service("reviews:80", THREE, hedge=hedge, retry=RetryPolicy(attempts=0, on=frozenset())))


def call(world: Live, timeout: float | None = None) -> Flow:
    deadline = None if timeout is None else time.monotonic() + timeout
    asked = CallContext(lambda: world, time.monotonic, random.Random(1), deadline)
    return outbound_call(Request("GET", "http", "reviews:80", "/", Headers()), asked)


def cluster(world: Live) -> LiveCluster:
    return world.clusters["reviews:80"]


def in_flight(world: Live) -> int:
    return sum(target.state.in_flight for target in cluster(world).targets)


def counts(world: Live) -> tuple[int, int, int]:
    state = cluster(world).state
    return state.requests, state.retries, in_flight(world)


def eventually(holds: Callable[[], bool]) -> None:
    """Other threads have a moment to come to their end."""
    pause = threading.Event()
    for _ in range(int(WAIT / 0.005)):
        if holds():
            return
        pause.wait(0.005)
    raise AssertionError("it never came to hold")


def test_a_slow_attempt_is_overtaken_on_another_thread(world: Live) -> None:
    """The caller has the second one's answer while the first still waits; the first is counted until it really ends."""
    stuck = threading.Event()
    servers = Servers(stuck, GOOD)
    number, flow = drive(call(world), Sync(servers))
    assert number == 1
    assert counts(world) == (1, 1, 2)
    flow.close()
    assert counts(world) == (0, 0, 1)
    stuck.set()
    eventually(lambda: counts(world) == (0, 0, 0))
    eventually(lambda: servers.released == [0])


def test_a_fast_first_attempt_needs_no_other(world: Live) -> None:
    """A hedge starts only when its delay has passed."""
    patient = live(service("reviews:80", THREE, hedge=HedgePolicy(delay=WAIT)))
    servers = Servers(GOOD)
    number, flow = drive(call(patient), Sync(servers))
    flow.close()
    assert (number, len(servers.sent), counts(patient)) == (0, 1, (0, 0, 0))


def test_a_body_that_can_be_sent_once_is_not_sent_beside_itself(world: Live) -> None:
    """Then the first attempt is the only one, and nothing of the second remains."""
    stuck = threading.Event()
    threading.Timer(0.05, stuck.set).start()
    servers = Servers(stuck)
    number, flow = drive(call(world), Sync(servers, repeatable=False))
    flow.close()
    assert (number, len(servers.sent), counts(world)) == (0, 1, (0, 0, 0))


def test_without_a_free_thread_calls_go_out_without_hedges(world: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound holds for the whole process; the call itself is made."""
    none = threading.BoundedSemaphore(1)
    none.acquire()
    monkeypatch.setattr(races, "_threads", none)
    servers = Servers(GOOD)
    number, flow = drive(call(world), Sync(servers))
    flow.close()
    assert (number, len(servers.sent), counts(world)) == (0, 1, (0, 0, 0))


@pytest.mark.parametrize("hedged", [False, True])
def test_what_must_end_a_call_ends_it_from_any_thread(world: Live, hedged: bool) -> None:
    """An exchange raises only what ends the call (KeyboardInterrupt, a bug); it reaches the caller."""
    stuck = threading.Event()
    servers = Servers(stuck, ZeroDivisionError()) if hedged else Servers(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        drive(call(world), Sync(servers))
    stuck.set()
    eventually(lambda: counts(world) == (0, 0, 0))


def test_nobody_waits_beyond_the_deadline_for_a_race(world: Live) -> None:
    """All attempts are stuck, on threads that can't be interrupted: the caller is answered 504 nevertheless."""
    stuck = threading.Event()
    servers = Servers(stuck)
    reply = drive(call(world, timeout=0.05), Sync(servers))
    assert (reply.status, reply.flag) == (504, "UT")
    assert cluster(world).state.requests == 0
    assert in_flight(world) == len(servers.sent) == 3
    stuck.set()
    eventually(lambda: counts(world) == (0, 0, 0))


def test_the_last_bad_answer_is_the_calls_when_no_good_one_comes(world: Live) -> None:
    """It is delivered as it is, since the route retries nothing; all others are released."""
    servers = Servers(BAD)
    number, flow = drive(call(world), Sync(servers))
    flow.close()
    assert number == len(servers.sent) - 1
    assert counts(world) == (0, 0, 0)


async def test_a_slow_task_is_overtaken_and_cancelled(world: Live) -> None:
    """The loser is cancelled, released and counted out, while the caller already has its answer."""
    servers = Servers(threading.Event(), GOOD)
    number, flow = await drive_async(call(world), Async(servers))
    assert number == 1
    await asyncio.gather(*races._background)
    assert servers.released == [0]
    assert counts(world) == (1, 1, 1)
    flow.close()
    assert counts(world) == (0, 0, 0)


async def test_a_bad_answer_waits_for_a_good_one(world: Live) -> None:
    """A server that fails fast does not win against one that works."""
    servers = Servers(BAD, GOOD)
    patient = live(service("reviews:80", THREE, hedge=HedgePolicy(delay=SOON, max_attempts=2)))
    slow = Slow(servers)
    number, flow = await drive_async(call(patient), slow)
    assert number == 1
    await asyncio.gather(*races._background)
    flow.close()
    assert servers.released == [0]
    assert counts(patient) == (0, 0, 0)


class Slow(Async):
    """The first attempt answers when the second has been sent, and before it."""

    gate: asyncio.Event = asyncio.Event()

    async def send(self, step: Send) -> Outcome:
        if not self.servers.sent:
            outcome = await super().send(step)
            await self.gate.wait()
            return outcome
        self.gate.set()
        for _ in range(10):
            await asyncio.sleep(0)
        return await super().send(step)


async def test_a_cancelled_call_frees_all_its_attempts_before_it_ends(world: Live) -> None:
    """Cancellation has come back to the caller only when nothing is in flight any more."""
    servers = Servers(threading.Event())
    task = asyncio.create_task(drive_async(call(world), Async(servers)))
    await asyncio.wait_for(servers.third.wait(), WAIT)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(servers.released) == [0, 1, 2]
    assert counts(world) == (0, 0, 0)


async def test_a_deadline_ends_an_async_race(world: Live) -> None:
    """504, and all attempts are cancelled before it is given."""
    servers = Servers(threading.Event())
    reply = await drive_async(call(world, timeout=0.05), Async(servers))
    assert reply.status == 504
    assert sorted(servers.released) == [0, 1, 2]
    assert counts(world) == (0, 0, 0)


async def test_a_body_that_can_be_sent_once_is_not_raced_on_a_loop(world: Live) -> None:
    """As on threads."""
    servers = Servers(BAD)
    number, flow = await drive_async(call(world), Late(servers, repeatable=False))
    flow.close()
    assert (number, len(servers.sent), counts(world)) == (0, 1, (0, 0, 0))


class Late(Async):
    async def send(self, step: Send) -> Outcome:
        await asyncio.sleep(0.02)
        return await super().send(step)


async def test_what_must_end_a_call_ends_an_async_race(world: Live) -> None:
    """From whichever task it came."""
    servers = Servers(threading.Event(), ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await drive_async(call(world), Async(servers))
    assert counts(world) == (0, 0, 0)


def test_a_loop_that_ends_leaves_no_count_behind(world: Live) -> None:
    """asyncio.run() ends with the winner's answer, before the loser's task has had its turn."""
    servers = Servers(threading.Event(), GOOD)

    async def main() -> Flow:
        _, flow = await drive_async(call(world), Async(servers))
        return flow

    asyncio.run(main()).close()
    assert counts(world) == (0, 0, 0)
