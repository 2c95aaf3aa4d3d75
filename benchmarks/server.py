"""A server that costs next to nothing: every request gets the same answer. `python -m benchmarks.server SECONDS
[FOLDER]`: the answer comes after so many seconds; with a folder of tls.crt, tls.key and ca.crt a second port speaks
mTLS. Prints its ports, ends with its stdin.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

_BODY = b'{"id": 0, "ratings": {"Reviewer1": 5, "Reviewer2": 4}}'
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nserver: benchmark\r\ncontent-length: %d\r\n\r\n%b" % (
    len(_BODY),
    _BODY,
)


class Answering(asyncio.Protocol):
    """Requests have no body here, so each ends with its head."""

    seconds = 0.0

    def __init__(self) -> None:
        self._pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *heads, self._pending = (self._pending + data).split(b"\r\n\r\n")
        if heads and self.seconds:
            asyncio.get_running_loop().call_later(self.seconds, self._transport.write, _ANSWER * len(heads))
        elif heads:
            self._transport.write(_ANSWER * len(heads))


async def _serve(folder: str) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Answering, "127.0.0.1", 0, backlog=1024)]
    if folder:
        from benchmarks.identities import credentials
        from meshlib.identity.tls import TlsContexts

        own = credentials(Path(folder))
        context = TlsContexts(lambda: own).server()
        servers.append(await loop.create_server(Answering, "127.0.0.1", 0, backlog=1024, ssl=context))
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    for server in servers:
        server.close()


if __name__ == "__main__":
    Answering.seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
    asyncio.run(_serve(sys.argv[2] if len(sys.argv) > 2 else ""))
