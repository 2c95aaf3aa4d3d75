"""A service that writes down what it carries out: `python ledger_service.py HOST PORT LEDGER NAME`. Needs no library.

Each request has a number in `x-call`. Before it is answered the ledger gets the line `NAME METHOD NUMBER`, in one
write: it is there whatever becomes of this process. `/?SIZE` answers so many bytes, which begin with the number.
"""

from __future__ import annotations

import asyncio
import os
import sys


async def serve(host: str, port: int, ledger: int, name: str) -> None:
    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, target, _ = head.partition(b"\r\n")[0].split(b" ")
                headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
                await reader.readexactly(int(headers.get(b"content-length", 0)))
                call = headers.get(b"x-call", b"0")
                os.write(ledger, b"%s %s %s\n" % (name.encode(), method, call))
                size = int(target.partition(b"?")[2] or 0)
                body = (call + b" ").ljust(size, b"x")
                fields = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nx-instance: %s\r\n\r\n"
                writer.write(fields % (len(body), name.encode()) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connection, host, port, backlog=4096)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    kept = os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), kept, sys.argv[4]))
