"""Who calls when a server is to be measured? A client that does as little as can be, so that what is seen is the
server.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque


class _Connection(asyncio.Protocol):
    """One request at a time; responses have a content-length."""

    def __init__(self) -> None:
        self._received = b""
        self._waiting: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[int]:
        self._waiting = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._waiting

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, mark, body = self._received.partition(b"\r\n\r\n")
        if not mark or self._waiting is None:
            return
        _, found, rest = head.lower().partition(b"content-length:")
        if not found:
            self._waiting.set_exception(ValueError(f"a response without content-length: {head!r}"))
        elif len(body) >= int(rest.partition(b"\r\n")[0]):
            self._received = b""
            self._waiting.set_result(int(head.split(None, 2)[1]))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(ConnectionError(f"the server closed the connection: {exc}"))


class RawClient:
    """GETs over kept connections, as many as there are callers. Raises ValueError for another status than 200."""

    def __init__(self, port: int, host: str, context: ssl.SSLContext | None = None) -> None:
        self._port, self._context = port, context
        self._idle: deque[_Connection] = deque()
        self._all: list[_Connection] = []
        self._request = (
            f"GET /reviews/0 HTTP/1.1\r\nhost: {host}\r\naccept: */*\r\nuser-agent: benchmark\r\n"
            "x-request-id: 5f2c0a1e-7a4b-4d1c-8000-3c6ef372fe94\r\n\r\n"
        ).encode()

    async def get(self) -> None:
        connection = self._idle.pop() if self._idle else None
        if connection is None or connection.transport.is_closing():
            _, connection = await asyncio.get_running_loop().create_connection(
                _Connection,
                "127.0.0.1",
                self._port,
                ssl=self._context,
                server_hostname="127.0.0.1" if self._context else None,
            )
            self._all.append(connection)
        status = await connection.ask(self._request)
        if status != 200:
            raise ValueError(f"port {self._port} answered {status}")
        self._idle.append(connection)

    def close(self) -> None:
        for connection in self._all:
            connection.transport.abort()
