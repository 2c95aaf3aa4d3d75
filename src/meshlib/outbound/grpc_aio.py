"""How does a gRPC call of asyncio go through the mesh? A `grpc.aio.Channel`, as outbound/grpc is a `grpc.Channel`.

A call is a task from its first moment, as gRPC's own are: it drives the core until the response, or the first message
of a response that is a stream, is there. After that the native call is read directly.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from typing import Any

import grpc
from grpc import aio

from meshlib.model import Outcome
from meshlib.outbound.drive import drive_async
from meshlib.outbound.grpc_subchannels import Open, SubChannel, SubChannels
from meshlib.outbound.grpc_terms import (
    OK,
    Call,
    Home,
    MetadataView,
    Terms,
    applied,
    as_told,
    code_of,
    metadata_of,
    pauses,
    reports_load,
    waits,
)
from meshlib.outbound.mirrors import AsyncMirrors
from meshlib.outbound.raising import answered
from meshlib.policy.retry import CONNECT_FAILURE, TIMEOUT
from meshlib.policy.steps import Deliver, Flow, Reply, Send

_END: Any = object()
_REPLAY_LIMIT = 256 * 1024


class AioRefusal(aio.AioRpcError):
    """What the mesh says in a server's place, as asyncio's users catch it."""

    def __init__(self, words: str) -> None:
        super().__init__(grpc.StatusCode.UNAVAILABLE, aio.Metadata(), aio.Metadata(), words)
        self.words = words
        self.grpc_code = grpc.StatusCode.UNAVAILABLE
        self.metadata: Any = aio.Metadata()

    def code(self) -> grpc.StatusCode:
        return self.grpc_code

    def trailing_metadata(self) -> Any:
        return self.metadata

    def __str__(self) -> str:
        return self.words


def answer(reply: Reply) -> Any:
    """The exception for an answer of the mesh."""
    error: Any = answered(reply, lambda kind: AioRefusal)
    error.grpc_code = code_of(reply, error)
    error.metadata = aio.Metadata(*metadata_of(reply))
    return error


class _Replay:
    """A request that is a stream: kept, up to a limit, until it can't be sent again."""

    def __init__(self, source: Any) -> None:
        self._source = aiter(source) if hasattr(source, "__aiter__") else _asynchronous(source)
        self._lock = asyncio.Lock()
        self._kept: list[Any] = []
        self._first = self._size = self._newest = 0
        self._is_over = False

    @property
    def is_replayable(self) -> bool:
        return self._first == 0

    def __aiter__(self) -> AsyncIterator[Any]:
        self._newest += 1
        return self._read(self._newest)

    async def _read(self, attempt: int) -> AsyncIterator[Any]:
        number = 0
        while True:
            async with self._lock:
                if number >= self._first + len(self._kept):
                    if self._is_over or attempt != self._newest:
                        return
                    message = await anext(self._source, _END)
                    if message is _END:
                        self._is_over = True
                        return
                    self._kept.append(message)
                    measure = getattr(message, "ByteSize", None)
                    self._size += measure() if measure is not None else len(message)
                    if self._size > _REPLAY_LIMIT:
                        self._first += len(self._kept) - 1
                        self._kept = [message]
                message = self._kept[number - self._first]
            number += 1
            yield message


async def _asynchronous(source: Iterable[Any]) -> AsyncIterator[Any]:
    for message in source:
        yield message


class _Written:
    """A request that is a stream and comes by `write`: one message is on its way at a time."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue(1)
        self.is_over = False

    async def put(self, message: Any) -> None:
        await self._queue.put(message)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._read()

    async def _read(self) -> AsyncIterator[Any]:
        while (message := await self._queue.get()) is not _END:
            yield message


class _Method:
    __slots__ = ("channel", "deserializer", "is_registered", "kind", "path", "serializer")

    def __init__(
        self, channel: MeshAioChannel, kind: str, path: str, serializer: Any, deserializer: Any, is_registered: Any
    ) -> None:
        self.channel, self.kind, self.path = channel, kind, path
        self.serializer, self.deserializer, self.is_registered = serializer, deserializer, bool(is_registered)

    def start(self, call: Call, request: Any, step: Send, is_stream: bool) -> Any:
        channel = self.channel
        one = channel.subchannel(step)
        try:
            native = one.callable(
                self.kind, step.path or self.path, self.serializer, self.deserializer, self.is_registered
            )
            sent = aiter(request) if isinstance(request, _Replay) else request
            timeout, metadata = call.timeout(step, is_stream), call.sent(step)
            started = native(
                sent,
                timeout=timeout,
                metadata=metadata,
                credentials=call.terms.credentials,
                compression=call.terms.compression,
            )
        except BaseException:
            channel.subchannels.give_back(one)
            raise
        started.add_done_callback(lambda _: channel.subchannels.give_back(one))
        return started


class _Exchange:
    """One call in gRPC's terms (outbound/drive.AsyncExchange). Gives the native call, its response or first message."""

    __slots__ = ("_call", "_endpoint", "_error", "_failure", "_is_stream", "_method", "_request", "first", "native")

    def __init__(self, method: _Method, request: Any, call: Call) -> None:
        self._method, self._request, self._call = method, request, call
        self._is_stream = method.kind.endswith("stream")
        self._endpoint: Any = None
        self._error: Any = None
        self._failure = ""
        self.native: Any = None
        self.first: Any = None

    async def send(self, step: Send) -> Outcome:
        await self.release()
        call, began = self._call, time.monotonic()
        self._endpoint, self._error, self._failure = step.endpoint, None, ""
        request = self._request
        replayable = not isinstance(request, _Replay) or request.is_replayable
        limit = asyncio.timeout(step.timeout if self._is_stream else None)
        try:
            native = self.native = self._method.start(call, request, step, self._is_stream)
            async with limit:
                self.first = await (native.read() if self._is_stream else native)
        except aio.AioRpcError as error:
            self._error = error
            if isinstance(request, _Replay):
                replayable = request.is_replayable
            outcome = call.outcome(error, step, began, replayable)
            self._failure = outcome.failure
            return outcome
        except TimeoutError:
            self._failure, self._error = TIMEOUT, _plain("no message in time", grpc.StatusCode.DEADLINE_EXCEEDED)
            return Outcome(None, None, TIMEOUT, replayable)
        except OSError as error:  # TLS files that can't be read
            self._failure, self._error = CONNECT_FAILURE, _plain(str(error), grpc.StatusCode.UNAVAILABLE)
            return Outcome(None, None, CONNECT_FAILURE, replayable)
        if reports_load(step) and native.done():
            return Outcome(200, MetadataView(await native.trailing_metadata()))
        return OK

    async def release(self) -> None:
        native, self.native = self.native, None
        if native is not None:
            native.cancel()

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def resolve(self, authority: str) -> None:
        await self._call.home.resolve_async(authority)

    def mirror(self, flow: Flow) -> bool:
        if isinstance(self._request, (_Replay, _Written)):
            return False
        method = self._method
        copy = Call(self._call.home, self._call.request.authority, method.path, self._call.terms)

        async def run() -> None:
            mirrored = _Exchange(method, self._request, copy)
            await drive_async(flow, mirrored)
            if mirrored._is_stream:
                while await mirrored.native.read() is not aio.EOF:
                    pass

        return method.channel.mirrors.start(method.path, run)

    def another(self) -> _Exchange | None:
        if self._is_stream or isinstance(self._request, (_Replay, _Written)):
            return None
        return _Exchange(self._method, self._request, self._call)

    def reply(self, step: Reply) -> Any:
        raise answer(step)

    def deliver(self, step: Deliver, flow: Flow) -> Any:
        if self._error is not None:
            flow.close()
            error = self._error
            raise as_told(error, self._failure, step, self._endpoint) if self._failure else error
        if self._is_stream:
            self.native.add_done_callback(lambda _: flow.close())
        else:
            flow.close()
        return self.native, self.first, step


def _plain(words: str, code: grpc.StatusCode) -> aio.AioRpcError:
    return aio.AioRpcError(code, aio.Metadata(), aio.Metadata(), words)


class _Call:
    """What the four kinds of call share (grpc.aio.Call)."""

    def __init__(self, method: _Method, request: Any, terms: Terms) -> None:
        self._call = Call(method.channel.home, method.channel.authority, method.path, terms)
        self._written = None
        if method.kind.startswith("stream"):
            self._written = _Written() if request is None else None
            request = self._written or _Replay(request)
        self._method, self._request = method, request
        self._native: Any = None
        self._step = Deliver()
        self._task: asyncio.Task[Any] = asyncio.create_task(self._run())

    async def _run(self) -> Any:
        """Until the response, or its first message, is there."""
        again = pauses(self._call)
        while True:
            try:
                exchange = _Exchange(self._method, self._request, self._call)
                self._native, first, self._step = await drive_async(self._call.flow(), exchange)
                return first
            except aio.AioRpcError as error:
                if not waits(error, self._call):
                    # As gRPC: a deadline that passes while it waits is a deadline.
                    raise
            await asyncio.sleep(next(again))
            if self._call.deadline is not None and time.monotonic() >= self._call.deadline:
                reason = f"{self._call.request.authority}: not ready within the call's own timeout"
                raise answer(Reply(504, (), b"", "UT", reason))

    async def _ended(self) -> Any:
        """What answers for the call: the native one, or the error that ended it before there was one."""
        await asyncio.wait([self._task])
        if self._task.cancelled():
            return _plain("Locally cancelled by application!", grpc.StatusCode.CANCELLED)
        return self._task.exception() or self._native

    async def _asked(self, name: str) -> Any:
        asked = getattr(await self._ended(), name)()
        return await asked if asyncio.iscoroutine(asked) else asked

    async def initial_metadata(self) -> Any:
        found = await self._asked("initial_metadata")
        return aio.Metadata(*applied(self._step.headers, found)) if self._step.headers else found

    async def trailing_metadata(self) -> Any:
        return await self._asked("trailing_metadata")

    async def code(self) -> Any:
        return await self._asked("code")

    async def details(self) -> Any:
        return await self._asked("details")

    async def wait_for_connection(self) -> None:
        ended = await self._ended()
        if isinstance(ended, BaseException):
            raise ended

    def cancelled(self) -> bool:
        return self._task.cancelled() if self._native is None else bool(self._native.cancelled())

    def done(self) -> bool:
        return self._task.done() and (self._native is None or self._native.done())

    def time_remaining(self) -> Any:
        deadline = self._call.deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def cancel(self) -> bool:
        return self._task.cancel() if self._native is None else bool(self._native.cancel())

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        def head(_: object) -> None:
            if self._native is None:
                callback(self)
            else:
                self._native.add_done_callback(lambda _: callback(self))

        self._task.add_done_callback(head)

    async def write(self, request: Any) -> None:
        if self.done():
            raise asyncio.InvalidStateError("RPC already finished.")
        if self._written is None or self._written.is_over:
            raise asyncio.InvalidStateError('RPC is half closed after calling "done_writing".')
        await self._written.put(request)

    async def done_writing(self) -> None:
        if self._written is not None and not self._written.is_over:
            self._written.is_over = True
            await self._written.put(_END)


class _Response(_Call):
    def __await__(self) -> Generator[Any, None, Any]:
        return self._task.__await__()


class _UnaryUnaryCall(_Response, aio.UnaryUnaryCall):  # type: ignore[type-arg]
    pass


class _StreamUnaryCall(_Response, aio.StreamUnaryCall):  # type: ignore[type-arg]
    pass


class _Responses(_Call):
    _has_begun = False

    async def read(self) -> Any:
        if not self._has_begun:
            first = await self._task
            if not self._has_begun:
                self._has_begun = True
                return first
        idle = self._step.idle_timeout
        try:
            async with asyncio.timeout(idle):
                return await self._native.read()
        except TimeoutError:
            self._native.cancel()
            reason = f"{self._call.request.authority}: the route's idle timeout passed between two messages"
            raise answer(Reply(504, (), b"", "UT", reason)) from None

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not aio.EOF:
            yield message


class _UnaryStreamCall(_Responses, aio.UnaryStreamCall):  # type: ignore[type-arg]
    pass


class _StreamStreamCall(_Responses, aio.StreamStreamCall):  # type: ignore[type-arg]
    pass


_CALLS: dict[str, Any] = {
    "unary_unary": _UnaryUnaryCall,
    "unary_stream": _UnaryStreamCall,
    "stream_unary": _StreamUnaryCall,
    "stream_stream": _StreamStreamCall,
}


class _MultiCallable:
    def __init__(self, method: _Method) -> None:
        self._method, self._made = method, _CALLS[method.kind]

    def __call__(
        self,
        request: Any = None,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
        *,
        request_iterator: Any = None,
    ) -> Any:
        terms = Terms(timeout, metadata, credentials, wait_for_ready, compression)
        return self._made(self._method, request if request_iterator is None else request_iterator, terms)


class MeshAioChannel(aio.Channel):
    """A channel to a service of the mesh, for asyncio. Made by Mesh.grpc_aio_channel; belongs to one event loop."""

    def __init__(
        self,
        home: Home,
        authority: str,
        options: Iterable[tuple[str, Any]] = (),
        compression: grpc.Compression | None = None,
    ) -> None:
        self.home, self.authority = home, authority
        self.subchannels = SubChannels(_opener(compression), tuple(options), home.tls)
        self.mirrors = AsyncMirrors()
        self._closing: set[asyncio.Task[Any]] = set()

    def _callable(self, kind: str, method: str, serializer: Any, deserializer: Any, registered: Any) -> Any:
        return _MultiCallable(_Method(self, kind, method, serializer, deserializer, registered))

    def unary_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self._callable("unary_unary", method, request_serializer, response_deserializer, _registered_method)

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self._callable("unary_stream", method, request_serializer, response_deserializer, _registered_method)

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self._callable("stream_unary", method, request_serializer, response_deserializer, _registered_method)

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self._callable("stream_stream", method, request_serializer, response_deserializer, _registered_method)

    def subchannel(self, step: Send) -> SubChannel:
        """Where an attempt goes; to be given back."""
        one, drained = self.subchannels.take(step, self.authority, self.home.live)
        for each in drained:
            task = asyncio.ensure_future(each.close(None))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        return one

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """READY once it has connections; connections are made by calls."""
        if self.subchannels.is_closed:
            return grpc.ChannelConnectivity.SHUTDOWN
        return grpc.ChannelConnectivity.READY if len(self.subchannels) else grpc.ChannelConnectivity.IDLE

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        raise NotImplementedError("a channel of the mesh has no one state: use wait_for_ready on a call")

    async def channel_ready(self) -> None:
        """Until the mesh knows the service."""
        await self.home.resolve_async(self.authority)

    async def close(self, grace: float | None = None) -> None:
        """As grpc.aio's: calls in flight have `grace` seconds. Idempotent."""
        await self.mirrors.aclose()
        await asyncio.gather(*(native.close(grace) for native in self.subchannels.close()), *self._closing)

    async def __aenter__(self) -> MeshAioChannel:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<MeshAioChannel {self.authority} {self.subchannels!r}>"


def _opener(compression: grpc.Compression | None) -> Open:
    def open_channel(target: str, options: Any, credentials: grpc.ChannelCredentials | None) -> aio.Channel:
        if credentials is None:
            return aio.insecure_channel(target, options, compression)
        return aio.secure_channel(target, credentials, options, compression)

    return open_channel


__all__ = ["MeshAioChannel"]
