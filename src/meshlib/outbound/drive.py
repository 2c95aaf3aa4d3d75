"""Who runs the core's generator? Two loops, the only place where sync and async differ.

They do the I/O that `outbound_call` asks for and know no policy. What differs between client libraries is behind
`Exchange`: one call in the library's own terms.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Protocol, Self, TypeVar

from meshlib.model import Outcome
from meshlib.outbound.races import Tasks, Threads
from meshlib.policy.steps import Ask, Deliver, Flow, Mirror, Queue, Race, Reply, Resolve, Send, Step, Wait, Win

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


class Exchange(Protocol[R_co]):
    """One call, in a client library's terms, for `drive`.

    send: does one attempt; releases what an earlier one left; returns an Outcome and keeps the native response or
      error. Raises only what must end the call (KeyboardInterrupt, cancellation).
    release: gives up whatever response is held; never raises.
    deliver: the native response, whose close also closes `flow`; or raises the library's own error.
    reply: a native response that the mesh made itself.
    mirror: runs `flow` beside the call; never blocks, never raises. False when it is not run: the request can be sent
      once only, or too many are under way.
    another: a second exchange of the same call, to be run beside this one; shares nothing with it that changes. None
      when the request can be sent only once, or when the library can't send it twice at a time. Never raises.
    """

    def send(self, step: Send) -> Outcome: ...
    def release(self) -> None: ...
    def wait(self, seconds: float) -> None: ...
    def resolve(self, authority: str) -> None: ...
    def mirror(self, flow: Flow) -> bool: ...
    def reply(self, step: Reply) -> R_co: ...
    def deliver(self, step: Deliver, flow: Flow) -> R_co: ...
    def another(self) -> Self | None: ...


class AsyncExchange(Protocol[R_co]):
    """Exchange, for asyncio."""

    async def send(self, step: Send) -> Outcome: ...
    async def release(self) -> None: ...
    async def wait(self, seconds: float) -> None: ...
    async def resolve(self, authority: str) -> None: ...
    def mirror(self, flow: Flow) -> bool: ...
    def reply(self, step: Reply) -> R_co: ...
    def deliver(self, step: Deliver, flow: Flow) -> R_co: ...
    def another(self) -> Self | None: ...


def drive(flow: Flow, exchange: Exchange[R], step: Step | None = None) -> R:
    """Run one call to its response; raise what the client library would. step: taken from `flow` before."""
    race: Threads[R] | None = None
    try:
        step = step or next(flow)
        while True:
            if isinstance(step, Send):
                step = flow.send(exchange.send(step))
            elif isinstance(step, Deliver):
                return exchange.deliver(step, flow)
            elif isinstance(step, Reply):
                if race is not None:
                    race.give_up()
                exchange.release()
                next(flow, None)
                return exchange.reply(step)
            elif isinstance(step, Wait):
                exchange.release()
                exchange.wait(step.seconds)
                step = next(flow)
            elif isinstance(step, Queue):
                wait_for_turn(step)
                step = next(flow)
            elif isinstance(step, Ask):
                step = flow.send(step.quotas.ask(step.question))
            elif isinstance(step, Mirror):
                if not exchange.mirror(step.flow):
                    step.cluster.dropped_mirror()
                step = next(flow)
            elif isinstance(step, Resolve):
                exchange.resolve(step.authority)
                step = next(flow)
            elif isinstance(step, Race):
                race = race or Threads(exchange)
                step = flow.send(race.run(step))
            elif isinstance(step, Win):
                assert race is not None
                exchange, race = race.win(step.number), None
                step = next(flow)
    except BaseException:
        if race is not None:
            race.give_up()
        exchange.release()
        flow.close()
        raise


async def drive_async(flow: Flow, exchange: AsyncExchange[R]) -> R:
    """`drive`, for asyncio. Cancellation ends the call and frees all that it held."""
    race: Tasks[R] | None = None
    try:
        step = next(flow)
        while True:
            if isinstance(step, Send):
                step = flow.send(await exchange.send(step))
            elif isinstance(step, Deliver):
                return exchange.deliver(step, flow)
            elif isinstance(step, Reply):
                if race is not None:
                    await race.give_up()
                await exchange.release()
                next(flow, None)
                return exchange.reply(step)
            elif isinstance(step, Wait):
                await exchange.release()
                await exchange.wait(step.seconds)
                step = next(flow)
            elif isinstance(step, Queue):
                await wait_for_turn_async(step)
                step = next(flow)
            elif isinstance(step, Ask):
                step = flow.send(await step.quotas.ask_async(step.question))
            elif isinstance(step, Mirror):
                if not exchange.mirror(step.flow):
                    step.cluster.dropped_mirror()
                step = next(flow)
            elif isinstance(step, Resolve):
                await exchange.resolve(step.authority)
                step = next(flow)
            elif isinstance(step, Race):
                race = race or Tasks(exchange)
                step = flow.send(await race.run(step))
            elif isinstance(step, Win):
                assert race is not None
                exchange, race = race.win(step.number), None
                step = next(flow)
    except BaseException:
        flow.close()
        if race is not None:
            await race.give_up()
        await exchange.release()
        raise


def wait_for_turn(step: Queue) -> None:
    """Block until a connection is free, or the call's time is over."""
    turn = threading.Event()
    step.ticket.on_grant(turn.set)
    turn.wait(step.seconds)


async def wait_for_turn_async(step: Queue) -> None:
    """`wait_for_turn`, for asyncio. Whoever ends a call grants the next, from any thread and any loop."""
    loop = asyncio.get_running_loop()
    turn = asyncio.Event()

    def wake() -> None:
        try:
            loop.call_soon_threadsafe(turn.set)
        except RuntimeError:  # that loop is closed, and its call with it
            pass

    step.ticket.on_grant(wake)
    try:
        async with asyncio.timeout(step.seconds):
            await turn.wait()
    except TimeoutError:
        pass
