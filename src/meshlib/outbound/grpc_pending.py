"""How does a gRPC call run that must not block: a future, or a response that is a stream?

The first attempt starts on the caller's thread; whoever learns first how it went (the thread that reads, or gRPC's own)
takes the next step. Only where that step has to wait (a pause before a retry, a queue, a name that is not known yet)
does the call get a thread of its own.
"""

from __future__ import annotations

import contextvars
import functools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc

from meshlib.model import HeaderOperations, Outcome
from meshlib.outbound.drive import drive
from meshlib.outbound.grpc_replay import is_replayable
from meshlib.outbound.grpc_terms import (
    OK,
    Call,
    MetadataView,
    Refusal,
    answer,
    applied,
    as_told,
    late,
    pauses,
    refusal,
    reports_load,
    waits,
)
from meshlib.policy.retry import CONNECT_FAILURE, TIMEOUT
from meshlib.policy.steps import Deliver, Flow, Mirror, Reply, Send, Step


class _Cancelled(Exception):
    """The user has cancelled while the call was between two attempts."""


class Pending(grpc.Call, grpc.Future):  # type: ignore[type-arg]
    """A call in progress: a future of one response, or an iterator of many; what grpc's users get from `stub.Method`.

    start: makes an attempt: the native call, and what to call once it has ended.
    """

    def __init__(
        self,
        call: Call,
        request: Any,
        is_stream: bool,
        start: Callable[[Send, Any], tuple[Any, Callable[[], None]]],
        mirror: Callable[[Flow], bool],
        finds_its_way: bool = False,
    ) -> None:
        self._call, self._request, self._is_stream = call, request, is_stream
        self._start, self._mirror = start, mirror
        self._finds_its_way = finds_its_way
        self._changed = threading.Condition()
        self._pulling = threading.Lock()
        self._native: Any = None
        self._step: Send | None = None
        self._began = 0.0
        self._failure = ""
        self._settled: Any = None
        """The attempt whose outcome the core was told, or is being told."""
        self._final: Any = None
        """What answers from now on: a native call, or a Refusal."""
        self._is_on_thread = False
        """A thread that may wait drives the rest, and alone reads from attempts until there is a final one."""
        self._early: deque[Any] = deque()
        self._operations: tuple[HeaderOperations, ...] = ()
        self._is_cancelled = False
        self._is_over = False
        self._callbacks: list[Callable[[], None]] = []
        self._head_timer: threading.Timer | None = None
        self._idle_timeout: float | None = None
        self._flow = call.flow(finds_its_way)
        try:
            self._advance(next(self._flow), can_block=False)
        except Exception as error:
            self._fail(error)

    # Running

    def _advance(self, step: Step, can_block: bool) -> None:
        """Take `step` and all that follow. On any thread; can_block: this one may wait."""
        if isinstance(step, Send):
            try:
                native = self._begin(step)
            except OSError as error:
                self._native, self._step, self._failure = refusal(str(error)), step, CONNECT_FAILURE
                outcome = Outcome(None, None, CONNECT_FAILURE, is_replayable(self._request))
                self._follow(self._flow.send(outcome), can_block)
                return
            native.add_done_callback(self._told_of_end(Pending._attempt_ended))
            return
        self._follow(step, can_block)

    def _follow(self, step: Step, can_block: bool) -> None:
        while isinstance(step, Mirror):
            if not self._mirror(step.flow):
                step.cluster.dropped_mirror()
            step = next(self._flow)
        if isinstance(step, Send):
            self._advance(step, can_block)
        elif isinstance(step, Deliver):
            self._deliver(step)
        elif isinstance(step, Reply):
            self._flow.close()
            self._refuse(answer(step), can_block)
        elif can_block:
            self._run(step)
        else:
            self._is_on_thread = True
            run = contextvars.copy_context().run
            threading.Thread(target=run, args=(self._run, step), name="meshlib-grpc", daemon=True).start()

    def _told_of_end(self, method: Callable[[Pending, Any], None]) -> Callable[[Any], None]:
        """A callback for a native call. gRPC keeps it until the call ends, so it must not keep a stream that the user
        has dropped: dropping it is how he says that he wants no more of it."""
        if not self._is_stream:
            return functools.partial(method, self)
        mine = weakref.ref(self)

        def call_back(native: Any) -> None:
            pending = mine()
            if pending is not None:
                method(pending, native)

        return call_back

    def _run(self, step: Step) -> None:
        """The rest of the call, on a thread that may wait."""
        self._is_on_thread = True
        try:
            drive(self._flow, _Waiting(self), step)
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, Exception):
                raise

    def _begin(self, step: Send) -> Any:
        began = time.monotonic()
        native, ended = self._start(step, self._request)
        with self._changed:
            self._native, self._step, self._began, self._failure = native, step, began, ""
            cancelled = self._is_cancelled
        native.add_done_callback(lambda _: ended())
        if cancelled:
            native.cancel()
        if self._is_stream and step.timeout is not None:
            until_end = self._call.timeout(step, True)
            if until_end is None or step.timeout < until_end - 0.001:
                self._head_timer = timer = threading.Timer(step.timeout, self._head_is_late, (native,))
                timer.daemon = True
                timer.start()
        return native

    def _head_is_late(self, native: Any) -> None:
        with self._changed:
            if self._settled is native or self._native is not native:
                return
            self._failure = TIMEOUT
        native.cancel()

    def _claim(self, native: Any) -> bool:
        """Whether it is this thread that tells the core how `native` went."""
        with self._changed:
            if self._settled is native:
                return False
            self._settled = native
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        return True

    def _attempt_ended(self, native: Any) -> None:
        """Mostly on gRPC's own thread; at once, on this one, where an interceptor's call was a blocking one."""
        if self._claim(native):
            self._settle(self._outcome(native), can_block=native.__class__.__module__ == "grpc._interceptor")

    def _settle(self, outcome: Outcome, can_block: bool) -> None:
        try:
            if self._is_cancelled:
                raise _Cancelled
            self._advance(self._flow.send(outcome), can_block)
        except Exception as error:
            self._flow.close()
            self._fail(error)

    def _outcome(self, native: Any) -> Outcome:
        """How an attempt that is over went."""
        step = self._step
        assert step is not None
        if self._failure == TIMEOUT:
            return Outcome(None, None, TIMEOUT, is_replayable(self._request))
        if native.code() is not grpc.StatusCode.OK:
            outcome = self._call.outcome(native, step, self._began, is_replayable(self._request))
            self._failure = outcome.failure
            return outcome
        if reports_load(step):
            return Outcome(200, MetadataView(native.trailing_metadata()))
        return OK

    # The end, or at least the head

    def _deliver(self, step: Deliver) -> None:
        native, sent = self._native, self._step
        if (self._failure and not self._is_stream) or native.__class__ is Refusal:
            self._flow.close()
            native = as_told(_error_of(native), self._failure, step, None if sent is None else sent.endpoint)
            self._refuse(native, can_block=False, native=self._native)
            return
        self._operations = step.headers
        if self._is_stream:
            self._idle_timeout = step.idle_timeout
            with self._changed:
                self._final = native
                self._changed.notify_all()
            native.add_done_callback(self._told_of_end(Pending._end))
        else:
            if native.code() is grpc.StatusCode.OK:
                self._call.messages.responses = 1
            with self._changed:
                self._final = native
            self._end()

    def _refuse(self, error: Any, can_block: bool, native: Any = None) -> None:
        """It has failed; unless the user waits until the service is ready."""
        if waits(error, self._call) and not self._is_cancelled:
            self._is_on_thread = True
            if can_block:
                self._wait_until_ready(error)
            else:
                run = contextvars.copy_context().run
                threading.Thread(
                    target=run, args=(self._wait_until_ready, error), name="meshlib-grpc", daemon=True
                ).start()
            return
        self._fail(error)

    def _wait_until_ready(self, error: Any) -> None:
        for pause in pauses(self._call):
            try:
                self.pause(pause)
                if not waits(error, self._call):
                    raise late(self._call)
                self._flow = self._call.flow(self._finds_its_way)
                drive(self._flow, _Waiting(self))
                return
            except BaseException as another:
                error = another
                if not isinstance(error, Exception) or not waits(error, self._call):
                    self._fail(error)
                    return

    def _fail(self, error: BaseException) -> None:
        self._is_on_thread = True  # nobody reads any more
        if isinstance(error, _Cancelled):
            cancelled = refusal("Locally cancelled by application!", grpc.StatusCode.CANCELLED)
            self._final = cancelled
        elif isinstance(error, grpc.RpcError):
            self._final = error
        else:
            self._final = refusal(f"{type(error).__name__}: {error}", grpc.StatusCode.INTERNAL)
            self._final.__cause__ = error
        self._end()

    def _end(self, native: Any = None) -> None:
        self._flow.close()
        with self._changed:
            if self._is_over:
                return
            self._is_over = True
            callbacks, self._callbacks = self._callbacks, []
            self._changed.notify_all()
        for callback in callbacks:
            callback()

    # For _Waiting

    def pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_cancelled, seconds)
            if self._is_cancelled:
                raise _Cancelled

    def attempt(self, step: Send) -> Outcome:
        """One attempt on a thread that may wait, until its head is there."""
        native = self._begin(step)
        if self._is_stream:
            self._pull(native)
        else:
            over = threading.Event()
            native.add_done_callback(lambda _: over.set())
            over.wait()
        self._claim(native)
        if self._is_cancelled:
            raise _Cancelled
        if self._early:
            return OK
        return self._outcome(native)

    def _pull(self, native: Any) -> None:
        try:
            self._early.append(next(native))
        except StopIteration:
            pass
        except grpc.RpcError:
            pass

    # What the user sees: a future

    def _await_head(self) -> None:
        """Until it is known which attempt's response is the user's."""
        with self._changed:
            self._changed.wait_for(lambda: self._final is not None)

    def _await_end(self, timeout: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._is_over, timeout)

    def cancel(self) -> bool:
        with self._changed:
            if self._is_over:
                return False
            self._is_cancelled = True
            native = self._native
            self._changed.notify_all()
        if native is not None:
            native.cancel()
        return True

    def cancelled(self) -> bool:
        return self._is_cancelled

    def running(self) -> bool:
        return not self._is_over

    def is_active(self) -> bool:
        return not self._is_over

    def done(self) -> bool:
        return self._is_over

    def time_remaining(self) -> Any:
        deadline = self._call.deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def result(self, timeout: float | None = None) -> Any:
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self._final.result()

    def exception(self, timeout: float | None = None) -> Any:
        if not self._await_end(timeout):
            raise grpc.FutureTimeoutError
        if self.cancelled():
            raise grpc.FutureCancelledError
        if isinstance(self._final, Refusal):
            return self._final
        return None if self._final.code() is grpc.StatusCode.OK else self._final

    def traceback(self, timeout: float | None = None) -> Any:
        error = self.exception(timeout)
        return None if error is None else error.__traceback__

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        if not self.add_callback(lambda: fn(self)):
            fn(self)

    def add_callback(self, callback: Callable[[], None]) -> bool:
        with self._changed:
            if self._is_over:
                return False
            self._callbacks.append(callback)
            native = self._native
        if self._is_stream and native is not None:
            native.add_done_callback(lambda _: self)  # whoever waits for its end still wants it
        return True

    # What the user sees: a call

    def initial_metadata(self) -> Any:
        if self._is_stream:
            self._find_head(reading=False)
        else:
            self._await_end()
        metadata = self._final.initial_metadata()
        return applied(self._operations, metadata or ()) if self._operations else metadata

    def trailing_metadata(self) -> Any:
        self._await_end()
        return self._final.trailing_metadata()

    def code(self) -> Any:
        self._await_end()
        return self._final.code()

    def details(self) -> Any:
        self._await_end()
        return self._final.details()

    def debug_error_string(self) -> Any:
        self._await_end()
        return self._final.debug_error_string()

    # What the user sees: an iterator

    def __iter__(self) -> Pending:
        return self

    def __next__(self) -> Any:
        if self._final is None:
            self._find_head(reading=True)
        if self._early:
            message = self._early.popleft()
        else:
            final = self._final
            if isinstance(final, Refusal):
                raise final
            message = next(final) if self._idle_timeout is None else self._next_in_time(final, self._idle_timeout)
        self._call.messages.received()
        return message

    def _next_in_time(self, native: Any, idle_timeout: float) -> Any:
        idled = threading.Event()

        def cut() -> None:
            idled.set()
            native.cancel()

        timer = threading.Timer(idle_timeout, cut)
        timer.daemon = True
        timer.start()
        try:
            return next(native)
        except grpc.RpcError as error:
            if not idled.is_set():
                raise
            reason = f"{self._call.request.authority}: the route's idle timeout passed between two messages"
            raise answer(Reply(504, (), b"", "UT", reason)) from error
        finally:
            timer.cancel()

    def _find_head(self, reading: bool) -> None:
        """Learn from the attempt under way what it brings, unless somebody else has; then wait for what follows."""
        with self._pulling:
            while self._final is None:
                with self._changed:
                    native = self._native
                    if self._is_on_thread or native is None or self._settled is native:
                        self._changed.wait_for(self._has_news)
                        continue
                if reading:
                    self._pull(native)
                    has_head = bool(self._early)
                else:
                    metadata = native.initial_metadata()  # blocks until they are there, or the attempt is over
                    has_head = bool(metadata) or not native.done()
                if self._claim(native):
                    self._settle(OK if has_head else self._outcome(native), can_block=True)

    def _has_news(self) -> bool:
        if self._final is not None:
            return True
        return not self._is_on_thread and self._native is not None and self._settled is not self._native

    def __del__(self) -> None:
        # As grpc's own: whoever drops a stream that he has not read to its end wants no more of it.
        if getattr(self, "_native", None) is not None and self._is_stream and not self._is_over:
            self._native.cancel()

    def __repr__(self) -> str:
        return f"<Pending {self._call.request.path} {'done' if self._is_over else 'in progress'}>"


def _error_of(native: Any) -> Any:
    """The exception of a finished call: futures of grpc are their own."""
    if isinstance(native, grpc.RpcError):
        return native
    return native.exception()


class _Waiting:
    """A Pending on a thread that may wait (outbound/drive.Exchange)."""

    __slots__ = ("_pending",)

    def __init__(self, pending: Pending) -> None:
        self._pending = pending

    def send(self, step: Send) -> Outcome:
        pending = self._pending
        try:
            return pending.attempt(step)
        except OSError as error:
            pending._native, pending._step, pending._failure = refusal(str(error)), step, CONNECT_FAILURE
            return Outcome(None, None, CONNECT_FAILURE, is_replayable(pending._request))

    def release(self) -> None:
        pending = self._pending
        if pending._final is None and pending._native is not None and not isinstance(pending._native, Refusal):
            pending._native.cancel()
        pending._early.clear()

    def wait(self, seconds: float) -> None:
        self._pending.pause(seconds)

    def resolve(self, authority: str) -> None:
        self._pending._call.home.resolve(authority)

    def mirror(self, flow: Flow) -> bool:
        return self._pending._mirror(flow)

    def another(self) -> None:
        """Futures and streams are not sent twice at a time."""

    def reply(self, step: Reply) -> None:
        self._pending._refuse(answer(step), can_block=True)

    def deliver(self, step: Deliver, flow: Flow) -> None:
        self._pending._deliver(step)
