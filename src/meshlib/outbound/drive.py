"""Who runs the core's generator? Two loops, the only place where sync and async differ.

They do the I/O that `outbound_call` asks for and know no policy. What differs between client libraries is behind
`Exchange`: one call in the library's own terms.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from meshlib.model import Outcome
from meshlib.policy.steps import Deliver, Flow, Mirror, Reply, Resolve, Send, Wait

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


class Exchange(Protocol[R_co]):
    """One call, in a client library's terms, for `drive`.

    send: does one attempt; releases what an earlier one left; returns an Outcome and keeps the native response or
      error. Raises only what must end the call (KeyboardInterrupt, cancellation).
    release: gives up whatever response is held; never raises.
    deliver: the native response, whose close also closes `flow`; or raises the library's own error.
    reply: a native response that the mesh made itself.
    mirror: runs `flow` beside the call; never blocks, never raises.
    """

    def send(self, step: Send) -> Outcome: ...
    def release(self) -> None: ...
    def wait(self, seconds: float) -> None: ...
    def resolve(self, authority: str) -> None: ...
    def mirror(self, flow: Flow) -> None: ...
    def reply(self, step: Reply) -> R_co: ...
    def deliver(self, step: Deliver, flow: Flow) -> R_co: ...


class AsyncExchange(Protocol[R_co]):
    """Exchange, for asyncio."""

    async def send(self, step: Send) -> Outcome: ...
    async def release(self) -> None: ...
    async def wait(self, seconds: float) -> None: ...
    async def resolve(self, authority: str) -> None: ...
    def mirror(self, flow: Flow) -> None: ...
    def reply(self, step: Reply) -> R_co: ...
    def deliver(self, step: Deliver, flow: Flow) -> R_co: ...


def drive(flow: Flow, exchange: Exchange[R]) -> R:
    """Run one call to its response; raise what the client library would."""
    try:
        step = next(flow)
        while True:
            if isinstance(step, Send):
                step = flow.send(exchange.send(step))
            elif isinstance(step, Deliver):
                return exchange.deliver(step, flow)
            elif isinstance(step, Reply):
                exchange.release()
                flow.close()
                return exchange.reply(step)
            elif isinstance(step, Wait):
                exchange.release()
                exchange.wait(step.seconds)
                step = next(flow)
            elif isinstance(step, Mirror):
                exchange.mirror(step.flow)
                step = next(flow)
            elif isinstance(step, Resolve):
                exchange.resolve(step.authority)
                step = next(flow)
    except BaseException:
        exchange.release()
        flow.close()
        raise


async def drive_async(flow: Flow, exchange: AsyncExchange[R]) -> R:
    """`drive`, for asyncio. Cancellation ends the call and frees all that it held."""
    try:
        step = next(flow)
        while True:
            if isinstance(step, Send):
                step = flow.send(await exchange.send(step))
            elif isinstance(step, Deliver):
                return exchange.deliver(step, flow)
            elif isinstance(step, Reply):
                await exchange.release()
                flow.close()
                return exchange.reply(step)
            elif isinstance(step, Wait):
                await exchange.release()
                await exchange.wait(step.seconds)
                step = next(flow)
            elif isinstance(step, Mirror):
                exchange.mirror(step.flow)
                step = next(flow)
            elif isinstance(step, Resolve):
                await exchange.resolve(step.authority)
                step = next(flow)
    except BaseException:
        flow.close()
        await exchange.release()
        raise
