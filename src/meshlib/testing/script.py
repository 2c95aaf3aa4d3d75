"""What does a fake service do next? Script: what is said for so many times first, in order; then what is said for good.

No I/O: the endpoints ask it once for each request.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Response:
    """An answer over HTTP."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Received:
    """One request as it reached a fake service; each try of a call is one. Where a client finds that a connection it
    had kept was reset, what it sends anew on another is one more, although it is the same try.

    path: with its query; of a gRPC call `/package.Service/Method`. headers: by their lower-case name, the last of those
    that came twice; of a gRPC call its metadata. body: of a gRPC call the first message. messages: of a gRPC call, all.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""
    messages: tuple[bytes, ...] = ()

    def json(self) -> Any:
        """The body. Raises ValueError where it is no JSON."""
        return json.loads(self.body)


class Reset:
    """In place of an answer: the connection is reset."""


RESET = Reset()


class _Queue(Generic[T]):
    """Counted entries, used up in order, in front of one that stays."""

    def __init__(self, standing: T) -> None:
        self.standing = standing
        self.counted: deque[T] = deque()

    def add(self, entry: T, times: int | None) -> None:
        if times is None:
            self.standing = entry
        elif times < 1:
            raise ValueError(f"times={times}: once is the least")
        else:
            self.counted.extend([entry] * times)

    def take(self) -> T:
        return self.counted.popleft() if self.counted else self.standing


Answer = Callable[[Received], Any]
"""Makes what is sent back: a Response, a gRPC answer or RESET."""


class Script:
    """Delays and answers, each in its own order. Thread-safe."""

    def __init__(self, answer: Answer) -> None:
        self._lock = threading.Lock()
        self._answers: _Queue[Answer] = _Queue(answer)
        self._delays = _Queue(0.0)

    def answer(self, answer: Answer, times: int | None) -> None:
        """Raises ValueError for `times` below 1."""
        with self._lock:
            self._answers.add(answer, times)

    def delay(self, seconds: float, times: int | None) -> None:
        """Raises ValueError for `times` below 1 and for less than no time."""
        if not seconds >= 0:
            raise ValueError(f"a delay is 0 seconds or more; found {seconds}")
        with self._lock:
            self._delays.add(float(seconds), times)

    def take(self) -> tuple[float, Answer]:
        """Seconds to wait, and then the answer, for the request that has come now."""
        with self._lock:
            return self._delays.take(), self._answers.take()
