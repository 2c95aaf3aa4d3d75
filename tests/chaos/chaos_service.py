"""A service that can be made slow: `python chaos_service.py PORT`. Registers itself through the middleware."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import uvicorn

import meshlib

slow_for = 0.0


async def app(scope: Any, receive: Any, send: Any) -> None:
    """GET /?... answers who it is, after `slow_for` seconds; POST /slow?SECONDS sets them."""
    global slow_for
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    if scope["path"] == "/slow":
        slow_for = float(scope["query_string"])
    elif slow_for:
        await asyncio.sleep(slow_for)
    body = json.dumps({"instance": os.environ["HOSTNAME"]}).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    with meshlib.connect() as mesh:
        uvicorn.run(
            mesh.asgi(app), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", timeout_graceful_shutdown=5
        )
