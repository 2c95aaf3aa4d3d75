"""How do attempts run side by side? On daemon threads, or as tasks; made only for calls that are hedged.

The rules of both:
- Each attempt has an exchange of its own (Exchange.another), so nothing of one reaches another.
- An attempt that has lost is released by whoever sees its end, and `ended` is called after that, exactly once.
- A task is cancelled; a thread can't be, so it goes on until its own timeout, and until then counts as in flight, which
  is the truth.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from meshlib.model import Outcome
from meshlib.policy.retry import LOCAL
from meshlib.policy.steps import Finished, Race, Send

if TYPE_CHECKING:
    from meshlib.outbound.drive import AsyncExchange, Exchange

MAX_THREADS = 128
"""Attempts of hedged calls that are on threads at once, in this process. Beyond it calls are sent without hedges."""

R = TypeVar("R")
_threads = threading.BoundedSemaphore(MAX_THREADS)
"""A forked child has none of the parent's threads, and all of their places."""
_background: set[asyncio.Task[None]] = set()
_IMPOSSIBLE = Outcome(None, None, LOCAL, False)


def _in_child() -> None:
    global _threads
    _threads = threading.BoundedSemaphore(MAX_THREADS)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


class _Racer(Generic[R]):
    __slots__ = ("ended", "exchange", "has_lost", "is_over")

    def __init__(self, exchange: Exchange[R] | None, ended: Callable[[], None]) -> None:
        self.exchange, self.ended = exchange, ended
        self.is_over = self.has_lost = False

    def leave(self) -> None:
        if self.exchange is not None:
            self.exchange.release()
        self.ended()


class Threads(Generic[R]):
    """The race of one call, on threads. Used by the calling thread alone."""

    def __init__(self, exchange: Exchange[R]) -> None:
        self._exchange = exchange
        self._racers: list[_Racer[R]] = []
        self._finished: queue.SimpleQueue[tuple[int, Outcome | BaseException]] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def run(self, step: Race) -> Finished | None:
        if step.start is not None and step.ended is not None:
            self._start(step.start, step.ended)
        try:
            number, result = self._finished.get(timeout=step.seconds)
        except queue.Empty:
            return None
        if isinstance(result, BaseException):
            raise result
        return Finished(number, result)

    def _start(self, send: Send, ended: Callable[[], None]) -> None:
        number = len(self._racers)
        exchange = self._exchange if number == 0 else self._exchange.another()
        racer = _Racer(exchange, ended)
        self._racers.append(racer)
        if exchange is not None and _threads.acquire(blocking=False):
            run = contextvars.copy_context().run
            thread = threading.Thread(target=run, args=(self._send, number, send), name="meshlib-hedge", daemon=True)
            try:
                thread.start()
                return
            except RuntimeError:  # the process has no thread left
                _threads.release()
        racer.is_over = True
        if number == 0:
            self._finished.put((0, self._exchange.send(send)))
        else:
            racer.has_lost = True
            ended()
            self._finished.put((number, _IMPOSSIBLE))

    def _send(self, number: int, send: Send) -> None:
        racer = self._racers[number]
        assert racer.exchange is not None
        result: Outcome | BaseException
        try:
            result = racer.exchange.send(send)
        except BaseException as error:
            result = error
        finally:
            _threads.release()
        with self._lock:
            racer.is_over = True
            if not racer.has_lost:
                self._finished.put((number, result))
                return
        racer.leave()

    def win(self, number: int) -> Exchange[R]:
        """End the race; the winner's exchange."""
        self._give_up(number)
        exchange = self._racers[number].exchange
        assert exchange is not None
        return exchange

    def give_up(self) -> None:
        """End the race without a winner. Never blocks, never raises."""
        self._give_up(None)

    def _give_up(self, winner: int | None) -> None:
        over = []
        with self._lock:
            for number, racer in enumerate(self._racers):
                if number != winner and not racer.has_lost:
                    racer.has_lost = True
                    if racer.is_over:
                        over.append(racer)
        for racer in over:
            racer.leave()


class Tasks(Generic[R]):
    """The race of one call, on the running event loop."""

    def __init__(self, exchange: AsyncExchange[R]) -> None:
        self._exchange = exchange
        self._racers: list[tuple[AsyncExchange[R] | None, asyncio.Task[Outcome] | None, Callable[[], None]]] = []
        self._unanswered: dict[asyncio.Task[Outcome], int] = {}

    async def run(self, step: Race) -> Finished | None:
        if step.start is not None and step.ended is not None:
            number = len(self._racers)
            exchange = self._exchange if number == 0 else self._exchange.another()
            if exchange is None:
                self._racers.append((None, None, _nothing))
                step.ended()
                return Finished(number, _IMPOSSIBLE)
            task: asyncio.Task[Outcome] = asyncio.ensure_future(_sent(exchange, step.start))
            self._racers.append((exchange, task, step.ended))
            self._unanswered[task] = number
        await asyncio.wait(self._unanswered, timeout=step.seconds, return_when=asyncio.FIRST_COMPLETED)
        for task, number in self._unanswered.items():
            if task.done():
                del self._unanswered[task]
                return Finished(number, task.result())
        return None

    def win(self, number: int) -> AsyncExchange[R]:
        """End the race; the winner's exchange. The winner does not wait for the losers to be released."""
        exchange, _, _ = self._racers[number]
        assert exchange is not None
        for each, racer in enumerate(self._racers):
            if each != number:
                _abandon(*racer)
        self._racers.clear()
        return exchange

    async def give_up(self) -> None:
        """End the race without a winner; returns when all is released, and raises nothing but another cancellation."""
        racers, self._racers = self._racers, []
        ending = [_abandon(*racer) for racer in racers]
        if ending:
            await asyncio.wait(ending)


def _nothing() -> None: ...


async def _sent(exchange: AsyncExchange[R], send: Send) -> Outcome:
    return await exchange.send(send)


def _abandon(
    exchange: AsyncExchange[R] | None, task: asyncio.Task[Outcome] | None, ended: Callable[[], None]
) -> asyncio.Task[None]:
    abandoning: asyncio.Task[None] = asyncio.ensure_future(_released(exchange, task))
    _background.add(abandoning)

    def over(task: asyncio.Task[None]) -> None:
        # Here and not in the task: one that is cancelled before it has begun, by a loop that ends, runs nothing.
        _background.discard(task)
        ended()

    abandoning.add_done_callback(over)
    return abandoning


async def _released(exchange: AsyncExchange[R] | None, task: asyncio.Task[Outcome] | None) -> None:
    if exchange is None or task is None:
        return
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # seen: it is nobody's any more
    await exchange.release()
