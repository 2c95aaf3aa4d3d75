"""What do sources have in common that follow each called host by itself? Wishes that come in, answers that go out."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue

from meshlib.model import (
    Cluster,
    ClusterType,
    Endpoint,
    Forward,
    Listener,
    LoadAssignment,
    RetryPolicy,
    Route,
    RouteConfiguration,
    RouteMatch,
    Snapshot,
    VirtualHost,
    WeightedCluster,
)

MAX_WANTED = 2000
"""Hosts that are kept up to date. Beyond that the one asked for first is let go."""

Answer = tuple[Endpoint, ...] | None
"""Sorted; () is a host that nobody serves now, None one that is not known here."""


class HostsSource(ABC):
    """A Source that knows each host's endpoints, and no rules. A subclass says where from.

    It runs an event loop of its own on the feed's thread.
    """

    name = "hosts"
    """What Snapshots' versions begin with."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[str] = SimpleQueue()
        self._stopped = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event
        self._wanted: dict[str, asyncio.Task[None]] = {}
        self._answers: dict[str, Answer] = {}

    # What a subclass has

    @abstractmethod
    async def _keep(self, authority: str) -> None:
        """Keep the answer about one host up to date, by _answered; ends for a host that will never be known. It is
        cancelled when nobody wants the host any more."""

    def _opened(self) -> contextlib.AbstractAsyncContextManager[object]:
        """Entered on the feed's loop before the first host is asked for, left after the last."""
        return contextlib.nullcontext()

    def _answered(self, authority: str, answer: Answer) -> None:
        if authority not in self._answers or self._answers[authority] != answer:
            self._answers[authority] = answer
            self._news.set()

    # From any thread

    def want(self, authority: str) -> None:
        if authority not in self._wanted:
            self._asked.put(authority)
            self._wake()

    def stop(self) -> None:
        self._stopped.set()
        self._wake()

    def _wake(self) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it was stopped
                loop.call_soon_threadsafe(self._news.set)

    # On the feed's thread

    def run(self, publish: Callable[[Snapshot], None]) -> None:
        with asyncio.Runner() as runner:
            runner.run(self._run(publish))

    async def _run(self, publish: Callable[[Snapshot], None]) -> None:
        self._news = asyncio.Event()
        published: dict[str, Answer] = {}
        number = 0
        async with self._opened():
            self._loop = asyncio.get_running_loop()  # from here on others wake us; what they said before is read first
            try:
                while not self._stopped.is_set():
                    self._take_wishes()
                    if self._answers != published:
                        published = dict(self._answers)
                        number += 1
                        publish(snapshot(published, f"{self.name}-{number}"))
                    await self._news.wait()
                    self._news.clear()
            finally:
                for task in self._wanted.values():
                    task.cancel()
                await asyncio.gather(*self._wanted.values(), return_exceptions=True)

    def _take_wishes(self) -> None:
        while True:
            try:
                authority = self._asked.get_nowait()
            except Empty:
                return
            if authority in self._wanted:
                continue
            if len(self._wanted) >= MAX_WANTED:
                oldest = next(iter(self._wanted))
                self._wanted.pop(oldest).cancel()
                self._answers.pop(oldest, None)
            self._wanted[authority] = asyncio.create_task(self._keep(authority))


def snapshot(answers: Mapping[str, Answer], version: str) -> Snapshot:
    """Hosts that are not known are absent: calls on them go the way they would without us, where /etc/hosts counts."""
    known = {authority: endpoints for authority, endpoints in sorted(answers.items()) if endpoints is not None}
    clusters = {authority: "outbound|{1}||{0}".format(*authority.rsplit(":", 1)) for authority in known}
    return Snapshot(
        version,
        tuple(Listener(authority, authority) for authority in known),
        tuple(
            RouteConfiguration(
                authority,
                (
                    VirtualHost(
                        authority,
                        ("*",),
                        (Route(RouteMatch(), Forward((WeightedCluster(clusters[authority]),), retry=RetryPolicy())),),
                    ),
                ),
            )
            for authority in known
        ),
        tuple(Cluster(name, ClusterType.EDS) for name in sorted(clusters.values())),
        tuple(
            LoadAssignment(name, known[authority])
            for name, authority in sorted((name, authority) for authority, name in clusters.items())
        ),
        absent=tuple(sorted(authority for authority, endpoints in answers.items() if endpoints is None)),
    )
