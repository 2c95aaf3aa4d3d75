"""How calls of asyncio whose request is a stream end, when a message can't be sent any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_peers import SERVICE, GrpcPeer

from meshlib.model import RetryPolicy
from meshlib.outbound.grpc_aio_calls import _Ending
from meshlib.outbound.grpc_replay import LIMIT, AsyncReplay, Replay
from meshlib.policy.observer import Messages
from snapshots import mesh, service

TARGET = "ratings:9080"
WAIT = 20.0


class Native:
    """A call of grpc.aio's, with the status that it was given last."""

    def __init__(self) -> None:
        self.status, self.words = grpc.StatusCode.OK, ""
        self.call_back: Callable[[Any], None] = lambda native: None

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.call_back = callback

    def becomes(self, status: grpc.StatusCode, words: str) -> None:
        self.status, self.words = status, words
        self.call_back(self)

    async def initial_metadata(self) -> Any:
        return aio.Metadata()

    async def trailing_metadata(self) -> Any:
        return aio.Metadata()

    async def code(self) -> grpc.StatusCode:
        return self.status

    async def details(self) -> str:
        return self.words


MADE_UP = aio.AioRpcError(grpc.StatusCode.INTERNAL, aio.Metadata(), aio.Metadata(), "Internal error from Core")


@pytest.mark.parametrize("comes_first", [True, False])
async def test_the_status_that_ended_the_call_is_its_status(comes_first: bool) -> None:
    """And not the one that grpc.aio makes up, whichever of the two it tells first."""
    native = Native()
    ending = _Ending(native)
    if comes_first:
        native.becomes(grpc.StatusCode.UNAVAILABLE, "not now")
        native.becomes(grpc.StatusCode.INTERNAL, "Internal error from Core")
    else:
        native.becomes(grpc.StatusCode.INTERNAL, "Internal error from Core")
        asyncio.get_running_loop().call_later(0.05, native.becomes, grpc.StatusCode.UNAVAILABLE, "not now")
    async with asyncio.timeout(WAIT):
        found = await ending.of(MADE_UP)
    assert (found.code(), found.details()) == (grpc.StatusCode.UNAVAILABLE, "not now")
    real = aio.AioRpcError(grpc.StatusCode.INTERNAL, aio.Metadata(), aio.Metadata(), "a bug")
    assert await ending.of(real) is real


@pytest.mark.parametrize("method", ["StreamUnary", "StreamStream"])
async def test_a_call_that_fails_while_it_sends_is_tried_again(method: str) -> None:
    """A server that says UNAVAILABLE to the first of many messages: a retry, every time."""

    async def messages(number: int) -> AsyncIterator[bytes]:
        yield b"fail 1"
        for _ in range(20):
            yield b"%d" % number

    with GrpcPeer() as peer, mesh(service(TARGET, [peer.address], retry=RetryPolicy(attempts=2))) as here:
        async with asyncio.timeout(WAIT), here.grpc_aio_channel(TARGET) as channel:
            for number in range(20):
                peer.requests.clear()
                if method == "StreamUnary":
                    response = await channel.stream_unary(f"/{SERVICE}/{method}")(messages(number))
                    assert response.count(b",%d" % number) == 20
                else:
                    call = channel.stream_stream(f"/{SERVICE}/{method}")(messages(number))
                    assert [each async for each in call] == [b"fail 1", *[b"%d" % number] * 20]
                assert peer.requests == [b"fail 1"] * 2
            for one in channel.subchannels._open.values():
                assert one.calls == 0


async def test_an_attempt_that_is_given_up_leaves_the_users_iterator_alone() -> None:
    """It waits for a message when its time is over; the next attempt gets that message, and those before it."""
    comes = asyncio.Event()

    async def messages() -> AsyncIterator[bytes]:
        yield b"a"
        await comes.wait()
        yield b"b"

    replay = AsyncReplay(messages(), Messages())
    first = aiter(replay)
    assert await anext(first) == b"a"
    waiting = asyncio.ensure_future(anext(first))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    comes.set()
    async with asyncio.timeout(WAIT):
        assert [each async for each in replay] == [b"a", b"b"]


async def test_what_is_kept_is_bounded() -> None:
    """Past 256 KiB a request is not sent again, and goes on all the same."""
    messages = [bytes(LIMIT // 2), bytes(LIMIT // 2), b"c", b"d"]
    for replay in (Replay(messages, Messages()), AsyncReplay(messages, Messages())):
        if isinstance(replay, Replay):
            assert list(replay) == messages
        else:
            assert [each async for each in replay] == messages
        assert not replay.is_replayable


async def test_who_writes_to_a_call_that_has_ended_is_told() -> None:
    """And does not wait for ever for somebody who reads."""
    with GrpcPeer() as peer, mesh(service(TARGET, [peer.address])) as here:
        async with asyncio.timeout(WAIT), here.grpc_aio_channel(TARGET) as channel:
            call = channel.stream_stream(f"/{SERVICE}/StreamStream")()
            with pytest.raises(asyncio.InvalidStateError):
                for _ in range(100_000):
                    await call.write(b"status NOT_FOUND")
            assert await call.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("how", ["cancel", "status"])
async def test_the_users_messages_are_given_up_with_the_call(how: str) -> None:
    """A generator that waits for what to send next is closed, and its `finally` runs, however the call ended."""
    closed, met = asyncio.Event(), asyncio.Event()

    async def messages() -> AsyncIterator[bytes]:
        try:
            yield b"status NOT_FOUND" if how == "status" else b"a"
            met.set()
            await asyncio.Event().wait()
        finally:
            closed.set()

    with GrpcPeer() as peer, mesh(service(TARGET, [peer.address])) as here:
        async with asyncio.timeout(WAIT), here.grpc_aio_channel(TARGET) as channel:
            call = channel.stream_stream(f"/{SERVICE}/StreamStream")(messages())
            await met.wait()
            if how == "cancel":
                call.cancel()
            else:
                assert await call.code() is grpc.StatusCode.NOT_FOUND
            await closed.wait()
