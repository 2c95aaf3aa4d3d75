"""What interceptors of the mesh do among others, on channels that are not its own. (What they do alone is among the
claims of test_grpc_contract.)"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_peers import SERVICE, GrpcPeer

import meshlib
from meshlib.mesh import Mesh
from meshlib.model import BreakerRules, Cluster, RetryPolicy
from meshlib.policy import propagation
from snapshots import mesh, publish, service

TARGET = "ratings:9080"
LIMIT = 20.0


@pytest.fixture
def here() -> Iterator[Mesh]:
    with mesh() as made:
        yield made


@pytest.fixture
def peer() -> Iterator[GrpcPeer]:
    with GrpcPeer() as made:
        yield made


def _address(peer: GrpcPeer) -> str:
    return "{}:{}".format(*peer.address)


class Marking(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """An application's own: it counts, and passes calls on."""

    def __init__(self) -> None:
        self.count = 0

    def _pass(self, continuation: Any, details: Any, request: Any) -> Any:
        self.count += 1
        return continuation(details, request)

    intercept_unary_unary = intercept_unary_stream = _pass
    intercept_stream_unary = intercept_stream_stream = _pass


class AioMarking(grpc.aio.UnaryUnaryClientInterceptor):
    """The same; it touches the metadata, as grpc.aio.Metadata."""

    def __init__(self) -> None:
        self.count = 0

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        self.count += 1
        client_call_details.metadata.add("x-marked", "1")
        return await continuation(client_call_details, request)


class AioIterating(grpc.aio.UnaryStreamClientInterceptor):
    """One that gives messages of its own making instead of a call."""

    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        call = await continuation(client_call_details, request)

        async def messages() -> AsyncIterator[bytes]:
            async for message in call:
                yield b"<" + message + b">"

        return messages()


def test_tries_pass_the_interceptors_behind(here: Mesh, peer: GrpcPeer) -> None:
    """An application's own interceptor that stands behind the mesh's sees each attempt, one before it each call."""
    publish(here, service(TARGET, [peer.address], retry=RetryPolicy(attempts=2)))
    before, behind = Marking(), Marking()
    with grpc.insecure_channel(_address(peer)) as plain:
        channel = grpc.intercept_channel(plain, before, *here.grpc_client_interceptors(TARGET), behind)
        assert channel.unary_unary(f"/{SERVICE}/UnaryUnary")(b"fail 1") == b"peer:fail 1"
        assert list(channel.unary_stream(f"/{SERVICE}/UnaryStream")(b"fail 2")) == [b"0", b"1", b"2"]
    assert (before.count, behind.count) == (2, 2 + 3)


async def test_tries_pass_the_interceptors_behind_in_asyncio(here: Mesh, peer: GrpcPeer) -> None:
    """And what these make of a response is what is read."""
    publish(here, service(TARGET, [peer.address], retry=RetryPolicy(attempts=2)))
    before, behind = AioMarking(), AioMarking()
    interceptors = [before, *here.grpc_aio_client_interceptors(TARGET), behind, AioIterating()]
    async with grpc.aio.insecure_channel(_address(peer), interceptors=interceptors) as channel:
        call = channel.unary_unary(f"/{SERVICE}/UnaryUnary")(b"fail 1", metadata=(("x-own", "1"),))
        assert await call == b"peer:fail 1"
        assert (await call.code(), dict(tuple(await call.initial_metadata()))["x-peer"]) == (grpc.StatusCode.OK, "peer")
        assert (peer.metadata[-1]["x-own"], peer.metadata[-1]["x-marked"]) == ("1", "1")
        stream = channel.unary_stream(f"/{SERVICE}/UnaryStream")(b"a")
        assert [message async for message in stream] == [b"<0>", b"<1>", b"<2>"]
    assert (before.count, behind.count) == (1, 2)


async def test_requests_can_be_written_through_interceptors(here: Mesh, peer: GrpcPeer) -> None:
    """The style of write and read, in both arities that take a stream."""
    publish(here, service(TARGET, [peer.address]))
    interceptors = here.grpc_aio_client_interceptors(TARGET)
    async with (
        asyncio.timeout(LIMIT),
        grpc.aio.insecure_channel(_address(peer), interceptors=interceptors) as channel,
    ):
        both = channel.stream_stream(f"/{SERVICE}/StreamStream")()
        for message in (b"a", b"b"):
            await both.write(message)
            assert await both.read() == message
        await both.done_writing()
        assert await both.read() is grpc.aio.EOF
        one = channel.stream_unary(f"/{SERVICE}/StreamUnary")()
        await one.write(b"a")
        await one.done_writing()
        assert await one == b"peer:a"


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_without_a_service_only_what_was_brought_goes_along(kind: str, here: Mesh, peer: GrpcPeer) -> None:
    """Trace and deadline; no route is looked up, so the service need not be known."""
    trace = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    carried = propagation.Carried(((b"traceparent", trace),), time.monotonic() + 0.4, time.monotonic)
    token = propagation.current.set(carried)

    def sync(request: bytes) -> bytes:
        with grpc.insecure_channel(_address(peer)) as plain:
            channel = grpc.intercept_channel(plain, *here.grpc_client_interceptors())
            return bytes(channel.unary_unary(f"/{SERVICE}/UnaryUnary")(request))

    async def aio(request: bytes) -> bytes:
        interceptors = here.grpc_aio_client_interceptors()
        async with grpc.aio.insecure_channel(_address(peer), interceptors=interceptors) as channel:
            return bytes(await channel.unary_unary(f"/{SERVICE}/UnaryUnary")(request))

    def call(request: bytes) -> bytes:
        return sync(request) if kind == "sync" else asyncio.run(aio(request))

    try:
        assert call(b"a") == b"peer:a"
        with pytest.raises(grpc.RpcError) as raised:
            call(b"hold")
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    finally:
        propagation.current.reset(token)
    assert peer.metadata[0]["traceparent"] == trace.decode()


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_a_breaker_opens_around_any_channel(kind: str, here: Mesh, peer: GrpcPeer) -> None:
    """Failed calls are told to the destination's breaker, whoever connects."""
    broken = Cluster(TARGET, breaker=BreakerRules(consecutive_failures=2))
    publish(here, service(TARGET, [peer.address], cluster=broken))

    async def aio() -> None:
        interceptors = here.grpc_aio_client_interceptors(TARGET)
        async with grpc.aio.insecure_channel(_address(peer), interceptors=interceptors) as channel:
            await channel.unary_unary(f"/{SERVICE}/UnaryUnary")(b"status INTERNAL")

    def call() -> None:
        if kind == "aio":
            asyncio.run(aio())
            return
        with grpc.insecure_channel(_address(peer)) as plain:
            channel = grpc.intercept_channel(plain, *here.grpc_client_interceptors(TARGET))
            channel.unary_unary(f"/{SERVICE}/UnaryUnary")(b"status INTERNAL")

    for expected in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE):
        with pytest.raises(grpc.RpcError) as raised:
            call()
        assert raised.value.code() is expected  # type: ignore[attr-defined]
    assert isinstance(raised.value, meshlib.errors.CircuitOpen)
    assert len(peer.requests) == 2


def _met(peer: GrpcPeer, request: bytes) -> None:
    deadline = time.monotonic() + LIMIT
    while request not in peer.requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)


class _Noting:
    """Notes the kind of each call that passes, and adds to its metadata."""

    def __init__(self, noted: list[str]) -> None:
        self.noted = noted

    async def _note(self, kind: str, continuation: Any, details: Any, request: Any) -> Any:
        self.noted.append(kind)
        details.metadata.add("x-noted", kind)
        return await continuation(details, request)


class NotingUnary(_Noting, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._note("unary_unary", continuation, client_call_details, request)


class NotingStream(_Noting, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._note("unary_stream", continuation, client_call_details, request)


class NotingCollect(_Noting, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._note("stream_unary", continuation, client_call_details, request_iterator)


class NotingBoth(_Noting, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._note("stream_stream", continuation, client_call_details, request_iterator)


async def test_a_channel_of_asyncio_runs_interceptors_of_ones_own(here: Mesh, peer: GrpcPeer) -> None:
    """Of each arity, once for a call that is tried twice; requests may be written, and calls be cancelled."""
    publish(here, service(TARGET, [peer.address], retry=RetryPolicy(attempts=2)))
    noted: list[str] = []
    own: list[Any] = [make(noted) for make in (NotingUnary, NotingStream, NotingCollect, NotingBoth)]
    async with asyncio.timeout(LIMIT), here.grpc_aio_channel(TARGET, interceptors=[*own, AioIterating()]) as channel:
        call = channel.unary_unary(f"/{SERVICE}/UnaryUnary")(b"fail 1", metadata=(("x-own", "1"),))
        assert await call == b"peer:fail 1"
        assert (await call.code(), dict(tuple(await call.initial_metadata()))["x-peer"]) == (grpc.StatusCode.OK, "peer")
        assert (peer.metadata[-1]["x-own"], peer.metadata[-1]["x-noted"]) == ("1", "unary_unary")
        stream = channel.unary_stream(f"/{SERVICE}/UnaryStream")(b"a")
        assert [message async for message in stream] == [b"<0>", b"<1>", b"<2>"]
        assert await channel.stream_unary(f"/{SERVICE}/StreamUnary")(iter([b"a", b"b"])) == b"peer:a,b"
        both = channel.stream_stream(f"/{SERVICE}/StreamStream")()
        await both.write(b"a")
        assert await both.read() == b"a"
        await both.done_writing()
        assert await both.read() is grpc.aio.EOF
        with pytest.raises(grpc.RpcError) as raised:
            await channel.unary_unary(f"/{SERVICE}/UnaryUnary")(b"status NOT_FOUND")
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
        held = channel.unary_unary(f"/{SERVICE}/UnaryUnary")(b"hold")
        await asyncio.to_thread(_met, peer, b"hold")
        held.cancel()
        assert await held.code() is grpc.StatusCode.CANCELLED
    assert noted == ["unary_unary", "unary_stream", "stream_unary", "stream_stream", "unary_unary", "unary_unary"]
    with pytest.raises(ValueError, match="none of"):
        here.grpc_aio_channel(TARGET, interceptors=[object()])  # type: ignore[list-item]
