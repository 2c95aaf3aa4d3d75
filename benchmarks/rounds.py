"""How are calls measured? Contestants take turns round by round, so that a slow moment of the machine meets all of
them, and every comparison is made within a round.

A round is some callers that call as fast as they can for a while: threads that share a client, or tasks of one event
loop. It is a closed loop: a caller's next call begins when its last one has ended.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.processes import cpu_seconds

Call = Callable[[], Any]
"""One call, with its body read; where rounds are asynchronous, what it returns is awaited."""


class Round(NamedTuple):
    """elapsed: seconds. latencies: seconds of each call. cpu: seconds of this process, the client. others: seconds of
    CPU of the processes that it called, servers and proxies."""

    elapsed: float
    latencies: list[float]
    cpu: float
    others: float


class Row(NamedTuple):
    """A contestant, and its figures of each round, in the order that they were played in.

    microseconds: wall time of the round by its calls (at 32 at once, a 32nd of what a call takes). p50_ms, p99_ms:
    what one call takes. cpu, all_cpu: seconds of CPU of the client for 1,000 requests, and of the client, the proxies
    and the server together.
    """

    client: str
    contestant: str
    concurrency: int
    microseconds: list[float]
    p50_ms: list[float]
    p99_ms: list[float]
    cpu: list[float]
    all_cpu: list[float]


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Nearest rank."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def row(client: str, contestant: str, concurrency: int, rounds: Sequence[Round]) -> Row:
    latencies = [sorted(each.latencies) for each in rounds]
    return Row(
        client,
        contestant,
        concurrency,
        [each.elapsed / len(each.latencies) * 1e6 for each in rounds],
        [percentile(each, 50) * 1e3 for each in latencies],
        [percentile(each, 99) * 1e3 for each in latencies],
        [each.cpu / len(each.latencies) * 1e3 for each in rounds],
        [(each.cpu + each.others) / len(each.latencies) * 1e3 for each in rounds],
    )


def _tidy(seconds: float) -> None:
    """What the one before left is not the next one's to collect. Not for rounds that are shorter than this takes."""
    if seconds >= 0.05:
        gc.collect()


def sync_round(call: Call, concurrency: int, seconds: float, processes: Sequence[int] = ()) -> Round:
    """Threads share the client. With 0 seconds each makes one call, which opens the connections."""
    latencies: list[float] = []
    failures: list[BaseException] = []
    start = threading.Barrier(concurrency + 1)

    def work() -> None:
        mine = []
        try:
            start.wait()
            until = time.perf_counter() + seconds
            while True:
                before = time.perf_counter()
                call()
                after = time.perf_counter()
                mine.append(after - before)
                if after >= until:
                    break
        except Exception as error:
            failures.append(error)
        latencies.extend(mine)

    workers = [threading.Thread(target=work) for _ in range(concurrency)]
    for worker in workers:
        worker.start()
    _tidy(seconds)
    others, cpu = cpu_seconds(processes), time.process_time()
    start.wait()
    began = time.perf_counter()
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - began
    if failures:
        raise failures[0]
    return Round(elapsed, latencies, time.process_time() - cpu, cpu_seconds(processes) - others)


async def async_round(
    call: Callable[[], Awaitable[Any]], concurrency: int, seconds: float, processes: Sequence[int] = ()
) -> Round:
    latencies: list[float] = []
    _tidy(seconds)
    others, cpu = cpu_seconds(processes), time.process_time()
    began = time.perf_counter()
    until = began + seconds

    async def work() -> None:
        while True:
            before = time.perf_counter()
            await call()
            after = time.perf_counter()
            latencies.append(after - before)
            if after >= until:
                break

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    elapsed = time.perf_counter() - began
    return Round(elapsed, latencies, time.process_time() - cpu, cpu_seconds(processes) - others)


def play_sync(
    client: str, calls: Mapping[str, Call], concurrency: int, rounds: int, seconds: float, processes: Sequence[int] = ()
) -> Iterator[Row]:
    """processes: ids of all that the contestants call; each pays for what it uses."""
    played: dict[str, list[Round]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            found = sync_round(call, concurrency, seconds if number else 0.0, processes)
            if number:  # the first opens the connections
                played[name].append(found)
    for name, found_rounds in played.items():
        yield row(client, name, concurrency, found_rounds)


async def play_async(
    client: str, calls: Mapping[str, Call], concurrency: int, rounds: int, seconds: float, processes: Sequence[int] = ()
) -> list[Row]:
    played: dict[str, list[Round]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            found = await async_round(call, concurrency, seconds if number else 0.0, processes)
            if number:
                played[name].append(found)
    return [row(client, name, concurrency, found_rounds) for name, found_rounds in played.items()]


# What is read out of rows


def ratio(mine: Sequence[float], other: Sequence[float]) -> float:
    """The median over the rounds of one by the other in the same round."""
    return statistics.median(one / (base or 1e-9) for one, base in zip(mine, other, strict=True))


def difference(mine: Sequence[float], other: Sequence[float]) -> float:
    """The median over the rounds of what one has more than the other in the same round."""
    return statistics.median(one - base for one, base in zip(mine, other, strict=True))
