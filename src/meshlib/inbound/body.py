"""How much of a request's body is read before its verdict, and how does the application still get all of it?"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]


class ReplayedBody:
    """An ASGI request's body, of which a part may be looked at first. Holds no more than was asked for, and a message.

    receive: the server's, until `take` was called; then one that begins at the beginning.
    """

    __slots__ = ("_known", "_messages", "_receive", "receive")

    def __init__(self, receive: Callable[[], Awaitable[Message]]) -> None:
        self._receive = self.receive = receive
        self._messages: deque[Message] = deque()
        self._known: bytes | None = None

    async def take(self, limit: int) -> bytes:
        """The first `limit` bytes, and one more where there are more."""
        if self._known is None or len(self._known) <= limit:
            self.receive = self._replayed
            whole = any(not each.get("more_body", False) for each in self._messages)
            size = sum(len(each.get("body", b"")) for each in self._messages)
            while size <= limit and not whole:
                message = await self._receive()
                self._messages.append(message)
                size += len(message.get("body", b""))
                whole = not message.get("more_body", False)  # a disconnect ends it, too
            self._known = b"".join(each.get("body", b"") for each in self._messages)
        return self._known[: limit + 1]

    async def _replayed(self) -> Message:
        return self._messages.popleft() if self._messages else await self._receive()


class ReplayedInput:
    """A WSGI request's body, of which a part may be looked at first: a `wsgi.input` in the place of the server's."""

    __slots__ = ("_head", "_left", "_rest")

    def __init__(self, environ: MutableMapping[str, Any]) -> None:
        self._rest = environ["wsgi.input"]
        length = str(environ.get("CONTENT_LENGTH") or "")
        self._head = b""
        self._left: int | None = int(length) if length.isdecimal() else 0
        """Bytes that may be read of what the server has: some servers block for more than there are."""
        if not length and environ.get("wsgi.input_terminated"):
            self._left = None

    def take(self, limit: int) -> bytes:
        """As ReplayedBody's."""
        while len(self._head) <= limit and self._left != 0:
            wanted = limit + 1 - len(self._head)
            chunk = self._rest.read(wanted if self._left is None else min(wanted, self._left))
            if not chunk:
                self._left = 0
            elif self._left is not None:
                self._left -= len(chunk)
            self._head += chunk
        return self._head[: limit + 1]

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            head, self._head = self._head, b""
            return head + self._rest.read()  # type: ignore[no-any-return]
        found, self._head = self._head[:size], self._head[size:]
        if len(found) < size:
            found += self._rest.read(size - len(found))
        return found

    def readline(self, size: int | None = -1) -> bytes:
        end = self._head.find(b"\n") + 1 or len(self._head)
        if size is not None and 0 <= size < end:
            end = size
        found, self._head = self._head[:end], self._head[end:]
        if found.endswith(b"\n") or len(found) == size:
            return found
        if size is None or size < 0:
            return found + self._rest.readline()  # type: ignore[no-any-return]
        return found + self._rest.readline(size - len(found))  # type: ignore[no-any-return]

    def readlines(self, hint: int = -1) -> list[bytes]:
        return list(self)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")
