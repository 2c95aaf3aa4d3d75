"""How does a call through any other library go through the mesh? `@mesh.outbound("ratings")` around the function that
makes it.

The function goes out by itself: no endpoint is chosen and nothing is rewritten. Everything else that the route and the
destination say holds: faults, rate limits, the breaker, limits, the timeout, retries and their budget. What the core
takes for a response is the function's result; what it takes for a failed attempt is an exception.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextvars import Token
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from meshlib.errors import (
    CircuitOpen,
    MeshError,
    SettingsError,
    UpstreamConnectionFailure,
    UpstreamFailure,
    UpstreamTimeout,
)
from meshlib.model import PASSTHROUGH, Headers, Outcome, Request
from meshlib.outbound.drive import drive, drive_async
from meshlib.outbound.raising import adopt, answered
from meshlib.policy import propagation
from meshlib.policy.call import CallContext, outbound_call
from meshlib.policy.retry import CONNECT_FAILURE, RESET, TIMEOUT
from meshlib.policy.steps import Deliver, Flow, Reply, Send

_log = logging.getLogger("meshlib")
_OK = Outcome(200, Headers())
_NO_HEADERS = Headers()
# Classes that mean "no connection was made" in the libraries that people wrap, by name: none is imported for this.
_NO_CONNECTION = frozenset(
    {
        *("ConnectError", "ConnectTimeout", "ConnectionTimeoutError", "ClientConnectorError"),
        *("NewConnectionError", "ConnectTimeoutError", "NameResolutionError"),
    }
)
_told: set[str] = set()
"""Destinations that turned out to be no service of the mesh; each is reported once."""
T = TypeVar("T")


class Home(Protocol):
    """What the decorator needs of its Mesh. Callable from any thread; the first call starts the feeds.

    call_context: made for each call. resolve: waits, bounded, until the feed has answered for an authority.
    """

    def call_context(self, deadline: float | None, may_resend: bool) -> CallContext: ...
    def resolve(self, authority: str) -> None: ...
    async def resolve_async(self, authority: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Destination:
    """What was said at the decorator. See Mesh.outbound."""

    home: Home
    authority: str
    path: str = "/"
    fallback: Callable[..., Any] | None = None
    failures: type[Exception] | tuple[type[Exception], ...] = Exception
    idempotent: bool = False

    def flow(self) -> Flow:
        carried = propagation.current.get()
        deadline = None if carried is None else carried.remaining_deadline()
        headers = _NO_HEADERS if carried is None else propagation.CarryingHeaders(_NO_HEADERS, carried)
        request = Request("GET" if self.idempotent else "POST", "http", self.authority, self.path, headers)
        context = self.home.call_context(deadline, self.idempotent)
        return outbound_call(request, context._replace(finds_its_way=True))

    def report_unknown(self, function: Callable[..., Any]) -> None:
        """Once; and not at all where no mesh is configured, since there every name is unknown."""
        snapshot = self.home.call_context(None, False).live().snapshot
        if snapshot.listeners or snapshot.absent:
            _told.add(self.authority)
            _log.warning(
                "outbound(%r): the mesh knows no such service, so none of its rules apply to %s (a port other than 80"
                " is part of the name: 'reviews:9080')",
                self.authority,
                getattr(function, "__qualname__", function),
            )


def outbound(destination: Destination) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorator. What it returns is of the same kind as what it is given."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        call = function if inspect.isroutine(function) or inspect.isclass(function) else type(function).__call__
        plain = inspect.unwrap(call.func if isinstance(call, functools.partial) else call)
        wrap: Callable[[Destination, Any], Callable[..., Any]] = _function
        if inspect.isasyncgenfunction(plain):
            wrap = _async_generator
        elif inspect.iscoroutinefunction(plain):
            wrap = _coroutine
        elif inspect.isgeneratorfunction(plain):
            wrap = _generator
        return functools.wraps(function)(wrap(destination, function))

    return decorate


def _function(to: Destination, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        exchange = _Call(to, function, args, kwargs)
        try:
            return drive(to.flow(), exchange)
        except Exception:
            if to.fallback is None or not exchange.given_up:
                raise
            return to.fallback(*args, **kwargs)

    return run


def _coroutine(to: Destination, function: Callable[..., Any]) -> Callable[..., Any]:
    async def run(*args: Any, **kwargs: Any) -> Any:
        exchange = _AsyncCall(to, function, args, kwargs)
        try:
            return await drive_async(to.flow(), exchange)
        except Exception:
            if to.fallback is None or not exchange.given_up:
                raise
            instead = to.fallback(*args, **kwargs)
            return await instead if inspect.isawaitable(instead) else instead

    return run


def _generator(to: Destination, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        exchange = _Stream(to, function, args, kwargs)
        try:
            items = drive(to.flow(), exchange)
        except Exception:
            if to.fallback is None or not exchange.given_up:
                raise
            return (yield from to.fallback(*args, **kwargs))
        return (yield from items)

    return run


def _async_generator(to: Destination, function: Callable[..., Any]) -> Callable[..., Any]:
    async def run(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        exchange = _AsyncStream(to, function, args, kwargs)
        try:
            items: Any = await drive_async(to.flow(), exchange)
        except Exception:
            if to.fallback is None or not exchange.given_up:
                raise
            items = to.fallback(*args, **kwargs)
            if inspect.isawaitable(items):
                items = await items
        if not hasattr(items, "__aiter__"):
            for item in items:
                yield item
            return
        try:
            async for item in items:
                yield item
        finally:
            if hasattr(items, "aclose"):
                await items.aclose()

    return run


class _Attempts(Generic[T]):
    """One call in a function's terms: what the four kinds share (outbound/drive.Exchange).

    given_up: whether what is raised is the mesh's last word, so that a fallback may be used. An exception that does not
    count as a failure is an answer: it is raised as it is, and no fallback hides it.
    """

    __slots__ = ("_error", "_is_failure", "_result", "_status", "arguments", "function", "given_up", "named", "to")

    def __init__(
        self, to: Destination, function: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        self.to, self.function, self.arguments, self.named = to, function, args, named
        self.given_up = False
        self._error: Exception | None = None
        self._is_failure = False
        self._result: Any = None
        self._status = 0

    def _enter(self, step: Send) -> Token[propagation.Carried | None] | None:
        """Meshed calls that the function makes inherit the time that this attempt has."""
        if step.cluster.name == PASSTHROUGH and self.to.authority not in _told:
            self.to.report_unknown(self.function)
        self._error, self._result = None, None
        if step.timeout is None:
            return None
        outer = propagation.current.get()
        headers = () if outer is None else outer.headers
        return propagation.current.set(propagation.Carried(headers, time.monotonic() + step.timeout, time.monotonic))

    def _leave(self, token: Token[propagation.Carried | None] | None) -> None:
        if token is not None:
            propagation.current.reset(token)

    def _raised(self, error: Exception) -> Outcome:
        self._error = error
        self._is_failure = isinstance(error, self.to.failures)
        return _outcome(error) if self._is_failure else _OK

    def _returned(self, result: Any) -> Outcome:
        self._result = result
        status = getattr(result, "status_code", None)
        self._status = status if isinstance(status, int) and not isinstance(status, bool) else 0
        if not self._status:
            return _OK
        headers = getattr(result, "headers", None)
        return Outcome(self._status, headers if hasattr(headers, "get") else _NO_HEADERS)

    def another(self) -> None:
        """A function is not run twice for one call at a time."""

    def mirror(self, flow: Flow) -> bool:
        return False  # a function is not run twice for one call

    def reply(self, step: Reply) -> T:
        self.given_up = True
        raise answered(step, _also)

    def _value(self, step: Deliver, flow: Flow) -> Any:
        """The result, or the function's exception, raised as it is or as a MeshError, too."""
        if self._error is not None:
            flow.close()
            raise self._given_up(self._error, step.flag) if self._is_failure else self._error
        if self._status >= 500 and self.to.fallback is not None:
            flow.close()
            self.given_up = True
            raise UpstreamFailure(f"{self.to.authority}: answered with {self._status}")
        return self._result

    def _late_failure(self, error: Exception) -> Exception:
        return self._given_up(error, "UC", ", after its first item")

    def _given_up(self, error: Exception, flag: str, when: str = "") -> Exception:
        self.given_up = True
        kind = UpstreamConnectionFailure if _outcome(error).failure == CONNECT_FAILURE else UpstreamFailure
        return adopt(error, kind, flag, f"{self.to.authority}{when}", "")


class _Sync(_Attempts[T]):
    __slots__ = ()

    def release(self) -> None:
        result, self._result = self._result, None
        if self._status and hasattr(result, "close"):  # a response that is not wanted
            try:
                result.close()
            except Exception:
                pass

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def resolve(self, authority: str) -> None:
        self.to.home.resolve(authority)


class _Async(_Attempts[T]):
    __slots__ = ()

    async def release(self) -> None:
        result, self._result = self._result, None
        close = getattr(result, "aclose", None) or getattr(result, "close", None)
        if self._status and close is not None:
            try:
                closing = close()
                if inspect.isawaitable(closing):
                    await closing
            except Exception:
                pass

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def resolve(self, authority: str) -> None:
        await self.to.home.resolve_async(authority)

    def _late(self) -> Outcome:
        return Outcome(None, None, TIMEOUT)


class _Call(_Sync[Any]):
    """A function. It can't be interrupted, so a timeout that has passed only keeps it from being tried again."""

    __slots__ = ()

    def send(self, step: Send) -> Outcome:
        self.release()
        token = self._enter(step)
        try:
            return self._returned(self.function(*self.arguments, **self.named))
        except Exception as error:
            return self._raised(error)
        finally:
            self._leave(token)

    def deliver(self, step: Deliver, flow: Flow) -> Any:
        value = self._value(step, flow)
        self._result = None
        next(flow, None)
        return value


class _AsyncCall(_Async[Any]):
    """A coroutine function; cancelled when its time is up."""

    __slots__ = ()

    async def send(self, step: Send) -> Outcome:
        await self.release()
        token = self._enter(step)
        limit = asyncio.timeout(step.timeout)
        try:
            async with limit:
                result = await self.function(*self.arguments, **self.named)
            return self._returned(result)
        except Exception as error:
            return self._late() if limit.expired() else self._raised(error)
        finally:
            self._leave(token)

    def deliver(self, step: Deliver, flow: Flow) -> Any:
        value = self._value(step, flow)
        self._result = None
        next(flow, None)
        return value


class _Stream(_Sync[Generator[Any, Any, Any]]):
    """A generator function. Its first item is the response's head: what fails before it is tried again, what fails
    after it is not, since the caller has seen a part."""

    __slots__ = ("_first", "_stop")

    def send(self, step: Send) -> Outcome:
        self.release()
        token = self._enter(step)
        self._first, self._stop = None, None
        try:
            self._result = items = self.function(*self.arguments, **self.named)
            self._first = next(items)
        except StopIteration as stop:  # it has no item
            self._stop = stop
        except Exception as error:
            return self._raised(error)
        finally:
            self._leave(token)
        return _OK

    def release(self) -> None:
        result, self._result = self._result, None
        if result is not None:
            result.close()

    def deliver(self, step: Deliver, flow: Flow) -> Generator[Any, Any, Any]:
        items = self._value(step, flow)
        self._result = None
        return self._rest(items, self._first, self._stop, step.deadline, flow)

    def _rest(self, items: Any, item: Any, stop: Any, deadline: float | None, flow: Flow) -> Generator[Any, Any, Any]:
        try:
            if stop is not None:
                return stop.value
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    raise
                except BaseException as error:
                    item = items.throw(error)
                else:
                    if deadline is not None and time.monotonic() > deadline:
                        raise _too_late(self.to)
                    item = next(items) if sent is None else items.send(sent)
        except StopIteration as end:
            return end.value
        except Exception as error:
            if isinstance(error, self.to.failures) and (told := self._late_failure(error)) is not error:
                raise told from error
            raise
        finally:
            items.close()
            flow.close()


class _AsyncStream(_Async[AsyncGenerator[Any, None]]):
    """An async generator function; as _Stream."""

    __slots__ = ("_first", "_has_item")

    async def send(self, step: Send) -> Outcome:
        await self.release()
        token = self._enter(step)
        self._first, self._has_item = None, True
        limit = asyncio.timeout(step.timeout)
        try:
            async with limit:
                self._result = items = self.function(*self.arguments, **self.named)
                self._first = await anext(items)
        except StopAsyncIteration:
            self._has_item = False
        except Exception as error:
            return self._late() if limit.expired() else self._raised(error)
        finally:
            self._leave(token)
        return _OK

    async def release(self) -> None:
        result, self._result = self._result, None
        if result is not None:
            await result.aclose()

    def deliver(self, step: Deliver, flow: Flow) -> AsyncGenerator[Any, None]:
        items = self._value(step, flow)
        self._result = None
        return self._rest(items, step.deadline, flow)

    async def _rest(self, items: Any, deadline: float | None, flow: Flow) -> AsyncGenerator[Any, None]:
        limit: asyncio.Timeout | None = None
        try:
            item, more = self._first, self._has_item
            while more:
                yield item
                limit = asyncio.timeout(None if deadline is None else deadline - time.monotonic())
                try:
                    async with limit:
                        item = await anext(items)
                except StopAsyncIteration:
                    more = False
        except Exception as error:
            if limit is not None and limit.expired():
                raise _too_late(self.to) from None
            if isinstance(error, self.to.failures) and (told := self._late_failure(error)) is not error:
                raise told from error
            raise
        finally:
            await items.aclose()
            flow.close()


def _also(kind: type[MeshError]) -> type[Exception] | None:
    """What code that was there before the mesh catches for this."""
    if kind is UpstreamTimeout:
        return TimeoutError
    if kind is CircuitOpen and "pybreaker" in sys.modules:
        error: type[Exception] = sys.modules["pybreaker"].CircuitBreakerError
        return error
    return None


def _too_late(to: Destination) -> Exception:
    reason = f"{to.authority}: the route's timeout passed between two items"
    return adopt(TimeoutError(reason), UpstreamTimeout, "UT", "", "")


def _outcome(error: Exception) -> Outcome:
    """What the retry conditions of the route are asked about."""
    response_status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(response_status, int):  # raise_for_status() of httpx and requests
        return Outcome(response_status, getattr(error.response, "headers", _NO_HEADERS))  # type: ignore[attr-defined]
    code = getattr(error, "code", None)
    if callable(code):  # grpc.RpcError
        value = getattr(code(), "value", None)
        if isinstance(value, tuple) and value and isinstance(value[0], int):
            return Outcome(200, Headers([(b"grpc-status", b"%d" % value[0])]))
    if isinstance(error, MeshError):
        return Outcome(None, None, CONNECT_FAILURE if isinstance(error, UpstreamConnectionFailure) else RESET)
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status <= 599:  # aiohttp.ClientResponseError
        return Outcome(status, Headers())
    return Outcome(None, None, CONNECT_FAILURE if _is_unseen(error) else RESET)


def _is_unseen(error: BaseException) -> bool:
    """Whether the exception, or what it wraps, says that no connection was made, so that nobody has seen anything."""
    first = error.args[0] if error.args else None
    for each in (error, error.__cause__, first, getattr(first, "reason", None)):
        if isinstance(each, (ConnectionRefusedError, socket.gaierror)):
            return True
        names = (kind.__name__ for kind in type(each).__mro__)
        if isinstance(each, BaseException) and not _NO_CONNECTION.isdisjoint(names):
            return True
    return False


def authority(destination: str) -> str:
    """Raises SettingsError for what is no `host` or `host:port`."""
    host = destination.strip().lower()
    if not host or any(mark in host for mark in "/?#@ "):
        raise SettingsError(f"outbound({destination!r}): a destination is a service's name, as 'ratings:9080'")
    return host


__all__ = ["Destination", "Home", "authority", "outbound"]
