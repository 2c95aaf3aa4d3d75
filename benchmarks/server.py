"""A server that costs next to nothing: every request gets the same answer, after as many seconds as its argument says.
Prints its port, ends with its stdin."""

from __future__ import annotations

import asyncio
import sys

_SECONDS = float(sys.argv[1]) if __name__ == "__main__" and len(sys.argv) > 1 else 0.0
_BODY = b'{"id": 0, "ratings": {"Reviewer1": 5, "Reviewer2": 4}}'
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nserver: benchmark\r\ncontent-length: %d\r\n\r\n%b" % (
    len(_BODY),
    _BODY,
)


class Answering(asyncio.Protocol):
    """Requests have no body here, so each ends with its head."""

    def __init__(self) -> None:
        self._pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *heads, self._pending = (self._pending + data).split(b"\r\n\r\n")
        if heads and _SECONDS:
            asyncio.get_running_loop().call_later(_SECONDS, self._transport.write, _ANSWER * len(heads))
        elif heads:
            self._transport.write(_ANSWER * len(heads))


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answering, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(_serve())
