"""How is a request that is a stream sent again? Its messages are kept, up to a limit, until the call commits.

Attempts read by iterating, each from the beginning; one reader waits for the user's iterator at a time, and what it
brings belongs to all. Past the limit only the newest message is kept: whoever is behind it can't go on, and the call is
not tried again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from meshlib.policy.observer import Messages

LIMIT = 256 * 1024
"""Bytes that are kept for another try: gRPC's own per-RPC retry buffer."""
_END: Any = object()


class _Kept:
    """The messages that are kept, and how many came before them. Changed under its owner's lock."""

    __slots__ = ("_first", "_messages", "_size")

    def __init__(self) -> None:
        self._first = self._size = 0
        """The number of the first message that is kept; bytes of all there were."""
        self._messages: list[Any] = []

    @property
    def is_whole(self) -> bool:
        return self._first == 0

    def has(self, number: int) -> bool:
        return number < self._first + len(self._messages)

    def get(self, number: int) -> Any:
        return self._messages[number - self._first]

    def add(self, message: Any) -> None:
        self._messages.append(message)
        self._size += _size(message)
        if self._size > LIMIT:
            self._first += len(self._messages) - 1
            self._messages = [message]


def _size(message: Any) -> int:
    measure = getattr(message, "ByteSize", None)
    if measure is not None:
        return int(measure())
    return len(message) if isinstance(message, (bytes, str)) else 1024


class Replay:
    """For attempts on threads. messages: counts what the user has sent."""

    def __init__(self, source: Iterable[Any], messages: Messages) -> None:
        self._source, self._messages = iter(source), messages
        self._lock = threading.Lock()
        self._kept = _Kept()
        self._is_over = False
        self._error: Exception | None = None
        self._newest = 0

    @property
    def is_replayable(self) -> bool:
        return self._kept.is_whole

    def __iter__(self) -> Iterator[Any]:
        self._newest += 1
        return self._read(self._newest)

    def _read(self, attempt: int) -> Iterator[Any]:
        number = 0
        while True:
            with self._lock:
                if not self._kept.has(number):
                    if self._error is not None:
                        raise self._error
                    if self._is_over or attempt != self._newest:
                        return
                    try:
                        self._kept.add(next(self._source))
                        self._messages.sent()
                    except StopIteration:
                        self._is_over = True
                        return
                    except Exception as error:
                        self._error = error
                        raise
                message = self._kept.get(number)
            number += 1
            yield message


class AsyncReplay:
    """For attempts on one event loop. An attempt that is cancelled while it waits for a message does not cancel the
    user's iterator: another may want what comes. `close` does, once nobody will."""

    def __init__(self, source: Any, messages: Messages) -> None:
        """source: an async iterable, or a plain one, as grpc.aio takes both."""
        self._messages = messages
        self._source: AsyncIterator[Any] = aiter(source) if hasattr(source, "__aiter__") else _asynchronous(source)
        self._lock = asyncio.Lock()
        self._kept = _Kept()
        self._coming: asyncio.Task[Any] | None = None
        self._is_over = self._is_committed = False
        self._newest = 0

    @property
    def is_replayable(self) -> bool:
        return self._kept.is_whole

    def commit(self) -> None:
        """There will be no other attempt."""
        self._is_committed = True

    def close(self) -> None:
        if self._coming is not None:
            self._coming.cancel()

    def __aiter__(self) -> AsyncIterator[Any]:
        self._newest += 1
        return self._read(self._newest)

    async def _read(self, attempt: int) -> AsyncIterator[Any]:
        number = 0
        while True:
            async with self._lock:
                if not self._kept.has(number):
                    if self._is_over or attempt != self._newest:
                        return
                    message = await self._next()
                    if message is _END:
                        self._is_over = True
                        return
                    self._kept.add(message)
                    self._messages.sent()
                message = self._kept.get(number)
            number += 1
            yield message

    async def _next(self) -> Any:
        if self._is_committed and self._coming is None:
            return await anext(self._source, _END)
        coming = self._coming
        if coming is None:
            coming = self._coming = asyncio.ensure_future(_one_of(self._source))
        message = await asyncio.shield(coming)
        self._coming = None
        return message


async def _one_of(source: AsyncIterator[Any]) -> Any:
    return await anext(source, _END)


async def _asynchronous(source: Iterable[Any]) -> AsyncIterator[Any]:
    for message in source:
        yield message


def is_replayable(request: Any) -> bool:
    """Whether a request can be sent once more: one message always can."""
    return not isinstance(request, (Replay, AsyncReplay)) or request.is_replayable


def sendable(request: Any) -> Any:
    """What gRPC is given for an attempt."""
    if isinstance(request, Replay):
        return iter(request)
    return aiter(request) if isinstance(request, AsyncReplay) else request
