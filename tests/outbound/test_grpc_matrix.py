"""Every arity in every way that there is to call, under what can happen to a call: one table.

The ways: channels of the mesh and interceptors of the mesh on a channel of one's own; blocking, by futures, of asyncio;
and channels of the mesh with interceptors of one's own around them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import grpc
import pytest
from grpc import aio
from grpc_peers import SERVICE, GrpcPeer, Wire

from meshlib.mesh import Mesh
from meshlib.model import RetryPolicy
from snapshots import mesh, publish, service

TARGET = "ratings:9080"
WAIT = 30.0
MB = 1024 * 1024
ARITIES = {
    "unary_unary": "UnaryUnary",
    "unary_stream": "UnaryStream",
    "stream_unary": "StreamUnary",
    "stream_stream": "StreamStream",
}
Options = tuple[tuple[str, Any], ...]


class Started:
    """A call under way, to be asked on any thread."""

    is_stream: bool

    def next(self) -> bytes:
        """The response, or the next message of it. Raises grpc.RpcError."""
        raise NotImplementedError

    def rest(self) -> list[bytes]:
        raise NotImplementedError

    def cancel(self) -> bool:
        raise NotImplementedError

    def code(self) -> grpc.StatusCode:
        """Once it is over."""
        raise NotImplementedError

    def all(self) -> list[bytes]:
        return [self.next(), *(self.rest() if self.is_stream else ())]


class _Sync(Started):
    def __init__(self, call: Any, is_stream: bool) -> None:
        self._call, self.is_stream = call, is_stream

    def next(self) -> bytes:
        return bytes(next(self._call) if self.is_stream else self._call.result(WAIT))

    def rest(self) -> list[bytes]:
        return list(self._call)

    def cancel(self) -> bool:
        return bool(self._call.cancel())

    def code(self) -> grpc.StatusCode:
        return self._call.code()  # type: ignore[no-any-return]


class _Blocking(Started):
    """On a thread, since this one has to see to the server meanwhile."""

    is_stream = False

    def __init__(self, pool: ThreadPoolExecutor, call: Callable[[], Any]) -> None:
        self._future: Future[Any] = pool.submit(call)

    def next(self) -> bytes:
        return bytes(self._future.result(WAIT))

    def code(self) -> grpc.StatusCode:
        error: Any = self._future.exception(WAIT)
        return grpc.StatusCode.OK if error is None else error.code()


class _Aio(Started):
    def __init__(self, run: Callable[[Awaitable[Any]], Any], call: Any, is_stream: bool) -> None:
        self._run, self._call, self.is_stream = run, call, is_stream

    def next(self) -> bytes:
        async def message() -> bytes:
            return bytes(await (self._call.read() if self.is_stream else self._call))

        return self._run(message())  # type: ignore[no-any-return]

    def rest(self) -> list[bytes]:
        async def messages() -> list[bytes]:
            return [each async for each in self._call]

        return self._run(messages())  # type: ignore[no-any-return]

    def cancel(self) -> bool:
        async def cancelled() -> bool:
            return bool(self._call.cancel())

        return self._run(cancelled())  # type: ignore[no-any-return]

    def code(self) -> grpc.StatusCode:
        async def found() -> Any:
            return await self._call.code()

        return self._run(found())  # type: ignore[no-any-return]


class Passes(
    grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor, grpc.StreamStreamClientInterceptor,
):  # fmt: skip
    """An interceptor of one's own that changes nothing."""

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(client_call_details, request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(client_call_details, request)

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return continuation(client_call_details, request_iterator)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return continuation(client_call_details, request_iterator)


async def _passes(self: Any, continuation: Any, client_call_details: Any, request: Any) -> Any:
    return await continuation(client_call_details, request)


AIO_PASSES = tuple(
    type(f"Passes{kind}", (base,), {f"intercept_{kind}": _passes})()
    for kind, base in (
        ("unary_unary", aio.UnaryUnaryClientInterceptor), ("unary_stream", aio.UnaryStreamClientInterceptor),
        ("stream_unary", aio.StreamUnaryClientInterceptor), ("stream_stream", aio.StreamStreamClientInterceptor),
    )
)  # fmt: skip


class Way:
    """One way to call, at a wire. name: `channel`, `interceptors` or `around`, with `-futures` or `-aio`."""

    def __init__(self, name: str, to: Mesh, wire: Wire, options: Options = ()) -> None:
        kind, _, self._style = name.partition("-")
        address = "{}:{}".format(*wire.address)
        self._pool = ThreadPoolExecutor(8)
        if self._style == "aio":
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever)
            self._thread.start()
            own = {"channel": (), "around": AIO_PASSES}.get(kind)

            async def opened() -> Any:
                if own is not None:
                    return to.grpc_aio_channel(TARGET, options=options, interceptors=own)
                return aio.insecure_channel(address, options, interceptors=to.grpc_aio_client_interceptors(TARGET))

            self.channel = self._run(opened())
            return
        if kind == "interceptors":
            plain = grpc.insecure_channel(address, options)
            self.channel = grpc.intercept_channel(plain, *to.grpc_client_interceptors(TARGET))
        else:
            self.channel = to.grpc_channel(TARGET, options=options)
        if kind == "around":
            self.channel = grpc.intercept_channel(self.channel, Passes())

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT)

    def start(self, arity: str, messages: list[bytes], **terms: Any) -> Started:
        method = getattr(self.channel, arity)(f"/{SERVICE}/{ARITIES[arity]}")
        request: Any = iter(messages) if arity.startswith("stream") else messages[0]
        is_stream = arity.endswith("stream")
        if self._style == "aio":

            async def made() -> Any:
                return method(request, **terms)

            return _Aio(self._run, self._run(made()), is_stream)
        if is_stream:
            return _Sync(method(request, **terms), True)
        if self._style == "futures":
            return _Sync(method.future(request, **terms), False)
        return _Blocking(self._pool, lambda: method(request, **terms))

    def close(self) -> None:
        if self._style == "aio":
            self._run(self.channel.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(WAIT)
            self._loop.close()
        else:
            self.channel.close()
        self._pool.shutdown()


WAYS = [f"{kind}{style}" for kind in ("channel", "interceptors", "around") for style in ("", "-futures", "-aio")]
TABLE = [
    (way, arity) for way in WAYS for arity in ARITIES if not (way.endswith("futures") and arity.endswith("stream"))
]
every_call = pytest.mark.parametrize(("way", "arity"), TABLE, indirect=["way"])
every_way = pytest.mark.parametrize(
    ("way", "arities"), [(way, [arity for each, arity in TABLE if each == way]) for way in WAYS], indirect=["way"]
)
"""All arities of a way at once."""


class Ground(NamedTuple):
    """A mesh whose one service has one endpoint: a peer at the end of a wire."""

    mesh: Mesh
    peer: GrpcPeer
    wire: Wire

    def is_idle(self) -> bool:
        cluster = self.mesh.live.cluster(TARGET)
        return cluster is not None and not cluster.state.requests


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    """One for all: each test leaves it as it was."""
    with mesh() as made, GrpcPeer() as peer, Wire(peer) as wire:
        publish(made, service(TARGET, [wire.address], retry=RetryPolicy(attempts=2)))
        yield Ground(made, peer, wire)


@pytest.fixture(scope="module")
def ways(ground: Ground) -> Iterator[Callable[[str, Options], Way]]:
    made: dict[tuple[str, Options], Way] = {}

    def found(name: str, options: Options = ()) -> Way:
        if (name, options) not in made:
            made[name, options] = Way(name, ground.mesh, ground.wire, options)
        return made[name, options]

    yield found
    for each in made.values():
        each.close()


@pytest.fixture
def way(request: pytest.FixtureRequest, ways: Callable[[str, Options], Way]) -> Way:
    return ways(request.param, ())


@pytest.fixture(autouse=True)
def _afresh(ground: Ground) -> Iterator[None]:
    ground.peer.requests.clear()
    ground.peer.released.clear()
    while ground.peer.ended.acquire(blocking=False):
        pass
    yield
    ground.peer.released.set()


def eventually(holds: Callable[[], object]) -> None:
    over = threading.Event()
    for _ in range(int(WAIT / 0.01)):
        if holds():
            return
        over.wait(0.01)
    raise AssertionError("not within the time that there is")


def failed(call: Callable[[], object]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def messages_of(arity: str, first: bytes) -> list[bytes]:
    return [first, b"more"] if arity.startswith("stream") else [first]


@pytest.mark.parametrize(
    ("way", "arity"),
    [(way, arity) for way, arity in TABLE if "-" in way or arity.endswith("stream")],  # who blocks can't cancel
    indirect=["way"],
)
def test_a_cancelled_call_ends_at_both_ends(way: Way, arity: str, ground: Ground) -> None:
    """Before the first message and, of a stream, after it; the server learns of it, and nothing stays in flight."""
    for command in (b"hold", b"stall") if arity.endswith("stream") else (b"hold",):
        call = way.start(arity, messages_of(arity, command))
        eventually(lambda command=command: command in ground.peer.requests)
        if command == b"stall":
            call.next()
        assert call.cancel()
        assert call.code() is grpc.StatusCode.CANCELLED
        assert ground.peer.ended.acquire(timeout=WAIT)
        eventually(ground.is_idle)
    assert len(ground.peer.requests) == (2 if arity.endswith("stream") else 1)


@every_way
def test_a_deadline_ends_the_call_at_both_ends(way: Way, arities: list[str], ground: Ground) -> None:
    """Before the response or, of a stream, after its first message; it is not tried again."""
    commands = {arity: b"stall" if arity.endswith("stream") else b"hold" for arity in arities}
    calls = [way.start(arity, messages_of(arity, commands[arity]), timeout=0.3) for arity in arities]
    for call in calls:
        assert failed(call.all).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(ground.is_idle)
    assert len(ground.peer.requests) <= len(calls)  # fewer, where the machine is that slow


@every_call
def test_a_server_that_dies_takes_the_call_along(way: Way, arity: str, ground: Ground) -> None:
    """Its connection is reset while it works on the call. The call is not sent once more: it may have been carried out.
    What came of a stream is kept, and the next call finds a new connection."""
    is_stream = arity.endswith("stream")
    call = way.start(arity, messages_of(arity, b"stall" if is_stream else b"hold"))
    if is_stream:
        assert call.next() == (b"stall" if arity == "stream_stream" else b"0")
    eventually(lambda: ground.peer.requests)
    ground.wire.cut()
    assert failed(call.rest if is_stream else call.next).code() is grpc.StatusCode.UNAVAILABLE
    assert call.code() is grpc.StatusCode.UNAVAILABLE
    assert len(ground.peer.requests) == 1
    ground.peer.released.set()
    eventually(ground.is_idle)

    def answers() -> bool:
        # gRPC may give a call to the connection that it has told the last one to be lost.
        again = way.start(arity, messages_of(arity, b"a"), wait_for_ready=True, timeout=WAIT)
        try:
            return len(again.all()) == {"unary_stream": 3, "stream_stream": 2}.get(arity, 1)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
            return False

    eventually(answers)


@every_way
def test_metadata_have_grpcs_limits(
    way: Way, arities: list[str], ways: Callable[[str, Options], Way], request: pytest.FixtureRequest
) -> None:
    """8 KB pass, either way; 20 KB are refused by whoever receives them, until he allows for more."""
    many, too_many = ((("x-sent", "v" * size),) for size in (7_500, 20_000))
    generous = ways(
        request.node.callspec.params["way"],
        (("grpc.max_metadata_size", 64 << 10), ("grpc.absolute_max_metadata_size", 64 << 10)),
    )
    passing, refused = [], []
    for arity in arities:
        passing += [
            way.start(arity, messages_of(arity, b"large 3500"), metadata=many),
            generous.start(arity, messages_of(arity, b"large 20000")),
        ]
        refused += [
            way.start(arity, messages_of(arity, b"large 20000")),
            way.start(arity, messages_of(arity, b"a"), metadata=too_many),
        ]
    for call in passing:
        assert call.all()
    for call in refused:
        assert failed(call.all).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@every_call
def test_messages_are_compressed(way: Way, arity: str, ground: Ground) -> None:
    """As the call says: a megabyte of one letter is little on the wire, and whole at the other end."""
    large = bytes(MB)
    before = ground.wire.bytes
    way.start(arity, messages_of(arity, large), compression=grpc.Compression.Gzip).all()
    assert [each for each in ground.peer.requests if each] == [large]  # a stream that ended before it began has none
    assert ground.wire.bytes - before < MB / 10
    before = ground.wire.bytes
    way.start(arity, messages_of(arity, large)).all()
    assert ground.wire.bytes - before > MB


@every_call
def test_four_megabytes_are_the_limit_of_a_message(way: Way, arity: str, ground: Ground) -> None:
    """Both ways; and not one byte more."""
    large = b"\x01" * (4 * MB - 64)
    found = way.start(arity, messages_of(arity, large)).all()
    if arity != "unary_stream":
        assert sum(map(len, found)) >= len(large)
    too_large = way.start(arity, messages_of(arity, b"\x01" * (4 * MB + 1)))
    assert failed(too_large.all).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert [each for each in ground.peer.requests if each] == [large]  # a stream that ended before it began has none


@pytest.mark.parametrize("name", ["channel", "channel-aio"])
def test_a_server_that_gives_up_connections_fails_no_call(name: str) -> None:
    """Its GOAWAY turns away calls that are on their way; none of them was looked at, so gRPC sends them once more."""
    options = (("grpc.max_connection_age_ms", 20), ("grpc.max_connection_age_grace_ms", 10_000))
    with mesh() as made, GrpcPeer(options=options) as peer, Wire(peer) as wire, ExitStack() as stack:
        publish(made, service(TARGET, [peer.address], retry=RetryPolicy(attempts=0)))
        way = Way(name, made, wire)
        stack.callback(way.close)
        over = threading.Event()

        def calls() -> int:
            count = 0
            while not over.is_set() or not count:
                assert way.start("unary_unary", [b"a"], timeout=WAIT).all() == [b"peer:a"]
                count += 1
            return count

        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(calls) for _ in range(8)]
            over.wait(1.5)
            over.set()
            assert sum(each.result(WAIT) for each in running) >= 8
