"""How does a gRPC call of asyncio run? As a task from its first moment, as gRPC's own do: it drives the core until the
response, or the first message of a response that is a stream, is there. After that the native call is read directly.

How an attempt begins is its maker's affair: a channel of the mesh (grpc_aio), or an interceptor (grpc_interceptors).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from typing import Any

import grpc
from grpc import aio

from meshlib.model import Outcome
from meshlib.outbound.drive import drive_async
from meshlib.outbound.grpc_replay import AsyncReplay, is_replayable, sendable
from meshlib.outbound.grpc_terms import (
    OK,
    Call,
    MetadataView,
    applied,
    as_told,
    code_of,
    metadata_of,
    pauses,
    reports_load,
    waits,
)
from meshlib.outbound.raising import answered
from meshlib.policy.retry import CONNECT_FAILURE, TIMEOUT
from meshlib.policy.steps import Deliver, Flow, Reply, Send

Start = Callable[[Send, Any], Awaitable[Any]]
"""Begins an attempt with what is sent: the native call."""

_END: Any = object()


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


def _plain(words: str, code: grpc.StatusCode) -> aio.AioRpcError:
    return aio.AioRpcError(code, aio.Metadata(), aio.Metadata(), words)


class _Written:
    """A request that is a stream and comes by `write`: one message is on its way at a time."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue(1)
        self._ended = asyncio.get_running_loop().create_future()
        self.is_over = False

    async def put(self, message: Any) -> None:
        """Until there is a place for it, or nobody will read any more."""
        if not self._queue.full():
            self._queue.put_nowait(message)
            return
        placed = asyncio.ensure_future(self._queue.put(message))
        try:
            await asyncio.wait({placed, self._ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not placed.done():
                placed.cancel()

    def end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self._queue.get()) is not _END:
            yield message


# How a call ended


class _Ending:
    """What a call whose request is a stream came to.

    grpc.aio ends such a call with an INTERNAL of its own when a message can't be sent any more. That is so because the
    call has ended, with another status, which is told before that one, and lost, or a moment after it. That other one
    is the call's.
    """

    _WORDS = "Internal error from Core"
    _LOOK, _LOOKS = 0.005, 400
    """Seconds between two looks for the status that is still to come: it is on its way to this very loop."""

    __slots__ = ("_native", "error", "told")

    def __init__(self, native: Any) -> None:
        self._native = native
        self.told: aio.AioRpcError | None = None
        self.error: aio.AioRpcError | None = None
        """What the native call no longer tells."""
        native.add_done_callback(self._note)

    def _note(self, native: Any) -> None:
        if self.told is None or self._is_made_up(self.told):
            self.told = _at_once(_error_of(native))

    async def of(self, error: aio.AioRpcError) -> aio.AioRpcError:
        """The status behind `error`, which the native call has raised; OK can be among them."""
        if not self._is_made_up(error):
            return error
        found, looks = self.told, self._LOOKS
        while (found is None or self._is_made_up(found)) and looks:
            await asyncio.sleep(self._LOOK)
            found, looks = await _error_of(self._native), looks - 1
        self.error = found or error
        return self.error

    def _is_made_up(self, error: aio.AioRpcError) -> bool:
        return error.code() is grpc.StatusCode.INTERNAL and error.details() == self._WORDS


async def _error_of(native: Any) -> aio.AioRpcError:
    """The status of a finished call, whatever it is."""
    initial, trailing = await native.initial_metadata(), await native.trailing_metadata()
    code, details = await native.code(), await native.details()
    return aio.AioRpcError(code, initial or aio.Metadata(), trailing or aio.Metadata(), details or "")


def _at_once(asked: Coroutine[Any, Any, aio.AioRpcError]) -> aio.AioRpcError | None:
    """What a coroutine gives that has nothing to wait for; None if it had."""
    try:
        asked.send(None)
    except StopIteration as answered_it:
        return answered_it.value  # type: ignore[no-any-return]
    except Exception:  # an interceptor's own call
        return None
    asked.close()
    return None


# Running


class Exchange:
    """One call in gRPC's terms (outbound/drive.AsyncExchange). Gives the exchange itself, with the native call and its
    response, or its first message."""

    __slots__ = (
        "_call",
        "_endpoint",
        "_error",
        "_failure",
        "_is_stream",
        "_mirror",
        "_request",
        "_start",
        "ending",
        "first",
        "native",
        "step",
    )

    def __init__(self, call: Call, request: Any, is_stream: bool, start: Start, mirror: Callable[[Flow], bool]) -> None:
        """is_stream: the response is one."""
        self._call, self._request, self._is_stream = call, request, is_stream
        self._start, self._mirror = start, mirror
        self._endpoint: Any = None
        self._error: Any = None
        self._failure = ""
        self.native: Any = None
        self.first: Any = None
        self.ending: _Ending | None = None
        self.step = Deliver()

    async def send(self, step: Send) -> Outcome:
        await self.release()
        call, request, began = self._call, self._request, time.monotonic()
        self._endpoint, self._error, self._failure = step.endpoint, None, ""
        self.ending = None
        try:
            native = self.native = await self._start(step, sendable(request))
            if _is_streamed(request):
                self.ending = _Ending(native)
            if self._is_stream:
                async with asyncio.timeout(step.timeout):
                    self.first = await self.read()
            else:
                self.first = await native
                call.messages.responses = 1
        except aio.AioRpcError as error:
            self._error = error if self.ending is None else await self.ending.of(error)
            outcome = call.outcome(self._error, step, began, is_replayable(request))
            self._failure = outcome.failure
            return outcome
        except TimeoutError:
            self._failure, self._error = TIMEOUT, _plain("no message in time", grpc.StatusCode.DEADLINE_EXCEEDED)
            return Outcome(None, None, TIMEOUT, is_replayable(request))
        except OSError as error:  # TLS files that can't be read
            self._failure, self._error = CONNECT_FAILURE, _plain(str(error), grpc.StatusCode.UNAVAILABLE)
            return Outcome(None, None, CONNECT_FAILURE, is_replayable(request))
        if reports_load(step) and native.done():
            return Outcome(200, MetadataView(await native.trailing_metadata()))
        return OK

    async def read(self) -> Any:
        """The next message, or EOF."""
        native = self.native
        try:
            message = await native.read()
        except NotImplementedError:  # an interceptor's own messages, which can only be iterated
            message = await anext(aiter(native), aio.EOF)
        except aio.AioRpcError as error:
            if self.ending is None:
                raise
            found = await self.ending.of(error)
            if found.code() is grpc.StatusCode.OK:
                return aio.EOF
            raise found from None
        if message is not aio.EOF:
            self._call.messages.received()
        return message

    async def release(self) -> None:
        native, self.native = self.native, None
        if native is not None:
            native.cancel()

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def resolve(self, authority: str) -> None:
        await self._call.home.resolve_async(authority)

    def mirror(self, flow: Flow) -> bool:
        return not _is_streamed(self._request) and self._mirror(flow)

    def another(self) -> Exchange | None:
        if self._is_stream or _is_streamed(self._request):
            return None
        return Exchange(self._call, self._request, self._is_stream, self._start, self._mirror)

    def reply(self, step: Reply) -> Any:
        raise answer(step)

    def deliver(self, step: Deliver, flow: Flow) -> Exchange:
        self.step = step
        if self._error is not None:
            flow.close()
            raise as_told(self._error, self._failure, step, self._endpoint)
        if self._is_stream:
            _when_done(self.native, flow.close)
        else:
            flow.close()
        return self


def never(flow: Flow) -> bool:
    """For calls of which no copies are sent."""
    return False


def _is_streamed(request: Any) -> bool:
    return isinstance(request, AsyncReplay)


def _when_done(native: Any, call_back: Callable[[], None]) -> None:
    try:
        native.add_done_callback(lambda _: call_back())
    except (AttributeError, NotImplementedError):  # an interceptor's own answer, which has no call
        call_back()


# What the user sees


class _Call:
    """What the four kinds of call share (grpc.aio.Call)."""

    _is_stream = False
    _takes_stream = False
    _channel = None
    """Of none: a channel of grpcio before 1.83 that is closed asks every call that a task is at work for, and raises
    InternalError at one that does not say. What goes out for this call is a call of the channel itself."""

    def __init__(
        self, call: Call, request: Any, start: Start, mirror: Callable[[Flow], bool], finds_its_way: bool = False
    ) -> None:
        """finds_its_way: the channel connects by itself, and waits for that by itself, too."""
        self._call, self._finds_its_way = call, finds_its_way
        self._written: _Written | None = None
        if self._takes_stream:
            self._written = _Written() if request is None else None
            request = AsyncReplay(self._written or request, call.messages)
        else:
            call.messages.requests = 1
        self._request, self._start, self._mirror = request, start, mirror
        self._exchange: Exchange | None = None
        self._task: asyncio.Task[Any] = asyncio.create_task(self._run())
        if self._takes_stream:
            self.add_done_callback(_Call._read_no_more)

    async def _run(self) -> Any:
        """Until the response, or its first message, is there."""
        again = pauses(self._call)
        request = self._request
        while True:
            try:
                exchange = Exchange(self._call, request, self._is_stream, self._start, self._mirror)
                won = await drive_async(self._call.flow(self._finds_its_way), exchange)
                self._exchange = won
                if isinstance(request, AsyncReplay):
                    request.commit()
                return won.first
            except aio.AioRpcError as error:
                if not waits(error, self._call):
                    # As gRPC: a deadline that passes while it waits is a deadline.
                    raise
            await asyncio.sleep(next(again))
            if self._call.deadline is not None and time.monotonic() >= self._call.deadline:
                reason = f"{self._call.request.authority}: not ready within the call's own timeout"
                raise answer(Reply(504, (), b"", "UT", reason))

    def _read_no_more(self) -> None:
        """The call has ended: whoever writes, or makes the messages of the request, waits for nobody."""
        self._request.close()
        if self._written is not None:
            self._written.end()

    @property
    def _native(self) -> Any:
        """The attempt whose response is the user's; None as long as there is none."""
        return None if self._exchange is None else self._exchange.native

    async def _ended(self) -> Any:
        """What answers for the call: the native one, or the error that ended it."""
        await asyncio.wait([self._task])
        if self._task.cancelled():
            return _plain("Locally cancelled by application!", grpc.StatusCode.CANCELLED)
        return self._task.exception() or self._native

    async def _asked(self, name: str) -> Any:
        asked = getattr(await self._ended(), name)()
        found = await asked if asyncio.iscoroutine(asked) else asked
        if self._exchange is not None and self._exchange.ending is not None and self._exchange.ending.error is not None:
            return getattr(self._exchange.ending.error, name)()
        return found

    async def initial_metadata(self) -> Any:
        found = await self._asked("initial_metadata")
        operations = () if self._exchange is None else self._exchange.step.headers
        return aio.Metadata(*applied(operations, found)) if operations else found

    async def trailing_metadata(self) -> Any:
        return await self._asked("trailing_metadata")

    async def code(self) -> Any:
        return await self._asked("code")

    async def details(self) -> Any:
        return await self._asked("details")

    async def debug_error_string(self) -> Any:
        return await self._asked("debug_error_string")

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
                _when_done(self._native, lambda: callback(self))

        self._task.add_done_callback(head)

    async def write(self, request: Any) -> None:
        if self.done():
            raise asyncio.InvalidStateError("RPC already finished.")
        if self._written is None or self._written.is_over:
            raise asyncio.InvalidStateError('RPC is half closed after calling "done_writing".')
        await self._written.put(request)
        if self.done():
            raise asyncio.InvalidStateError("RPC already finished.")

    async def done_writing(self) -> None:
        if self._written is not None and not self._written.is_over:
            self._written.is_over = True
            await self._written.put(_END)

    @property
    def _done_writing_flag(self) -> bool:
        """Asked for by grpc.aio's own calls around interceptors: their writes come to us as an iterator."""
        return self._written is not None and self._written.is_over


class _Response(_Call):
    def __await__(self) -> Generator[Any, None, Any]:
        return self._task.__await__()


class _Responses(_Call):
    _is_stream = True
    _has_begun = False

    async def read(self) -> Any:
        if not self._has_begun:
            first = await self._task
            if not self._has_begun:
                self._has_begun = True
                return first
        exchange = self._exchange
        if exchange is None:  # it has failed, and goes on to say so
            return await self._task
        idle = exchange.step.idle_timeout
        if idle is None:
            return await exchange.read()
        try:
            async with asyncio.timeout(idle):
                return await exchange.read()
        except TimeoutError:
            exchange.native.cancel()
            reason = f"{self._call.request.authority}: the route's idle timeout passed between two messages"
            raise answer(Reply(504, (), b"", "UT", reason)) from None

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not aio.EOF:
            yield message


class _UnaryUnaryCall(_Response, aio.UnaryUnaryCall):  # type: ignore[type-arg]
    pass


class _StreamUnaryCall(_Response, aio.StreamUnaryCall):  # type: ignore[type-arg]
    _takes_stream = True


class _UnaryStreamCall(_Responses, aio.UnaryStreamCall):  # type: ignore[type-arg]
    pass


class _StreamStreamCall(_Responses, aio.StreamStreamCall):  # type: ignore[type-arg]
    _takes_stream = True


CALLS: dict[str, Any] = {
    "unary_unary": _UnaryUnaryCall,
    "unary_stream": _UnaryStreamCall,
    "stream_unary": _StreamUnaryCall,
    "stream_stream": _StreamStreamCall,
}
"""By kind: the call that a user gets, made of (call, request, start, mirror)."""
