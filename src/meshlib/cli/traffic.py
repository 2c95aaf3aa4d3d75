"""How does the page fare under gentle traffic? A fixed number of requests each second, and what came back lately."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import NamedTuple

import httpx

WINDOW = 60.0
IN_FLIGHT = 50
"""At most so many requests at a time: a page that hangs is not to be buried under more."""


class Answer(NamedTuple):
    """at: monotonic seconds. status: 0 for none. took: seconds."""

    at: float
    status: int
    took: float


class Traffic:
    """`rate` GETs of `url` each second, until run() is cancelled. Open loop: a slow answer delays no other request."""

    def __init__(self, url: str, rate: float) -> None:
        self.url, self.rate = url, rate
        self.sent = 0
        self._recent: deque[Answer] = deque()

    async def run(self) -> None:
        places = asyncio.Semaphore(IN_FLIGHT)
        async with (
            httpx.AsyncClient(timeout=15.0, trust_env=False, limits=httpx.Limits(max_connections=IN_FLIGHT)) as client,
            asyncio.TaskGroup() as tasks,
        ):
            due = time.monotonic()
            while True:
                await places.acquire()
                self.sent += 1
                tasks.create_task(self._send(client)).add_done_callback(lambda _: places.release())
                due = max(due + 1 / self.rate, time.monotonic() - 1)  # after a stall no burst to catch up
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _send(self, client: httpx.AsyncClient) -> None:
        began, status = time.monotonic(), 0
        try:
            status = (await client.get(self.url)).status_code
        except httpx.HTTPError:
            pass
        now = time.monotonic()
        self._recent.append(Answer(now, status, now - began))

    def line(self) -> str:
        """`5/s, 1234 sent; last 60 s: 300 answers, 100.0 % ok, p50 31 ms, p99 80 ms`."""
        now = time.monotonic()
        while self._recent and self._recent[0].at < now - WINDOW:
            self._recent.popleft()
        begin = f"{self.rate:g}/s, {self.sent} sent"
        if not self._recent:
            return f"{begin}; no answer yet"
        times = sorted(answer.took * 1000 for answer in self._recent)
        good = sum(200 <= answer.status < 400 for answer in self._recent)
        count = len(times)
        return (
            f"{begin}; last {WINDOW:.0f} s: {count} answers, {100 * good / count:.1f} % ok, "
            f"p50 {times[count // 2]:.0f} ms, p99 {times[min(count - 1, count * 99 // 100)]:.0f} ms"
        )
