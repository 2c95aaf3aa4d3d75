"""Every way in, behind real sockets: an application that tells what it was given, behind ASGI, WSGI and the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import unquote

from gateway.gateways import everything_to, gateway, url
from inbound.inbound_servers import uvicorn_server, werkzeug_server
from meshlib.model import Inbound, Snapshot
from peers import Answer, Peer, Received
from snapshots import mesh

T = TypeVar("T")


def _told(headers: dict[str, str], body: bytes, path: str, query: str) -> bytes:
    return json.dumps({"headers": headers, "body": body.decode("latin-1"), "path": path, "query": query}).encode()


async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    told = _told(headers, body, scope["path"], scope["query_string"].decode())
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(told))]})
    await send({"type": "http.response.body", "body": told})


def wsgi_app(environ: Any, start_response: Any) -> list[bytes]:
    length = int(environ.get("CONTENT_LENGTH") or 0)
    headers = {key[5:].lower().replace("_", "-"): value for key, value in environ.items() if key.startswith("HTTP_")}
    body = environ["wsgi.input"].read(length) if length else b""
    told = _told(headers, body, environ["PATH_INFO"], environ["QUERY_STRING"])
    start_response("200 OK", [("Content-Length", str(len(told)))])
    return [told]


def _behind(received: Received) -> Answer:
    path, _, query = received.target.partition("?")
    return Answer(body=_told(dict(received.headers), received.body, unquote(path), query))


@contextlib.contextmanager
def by_asgi(given: Inbound) -> Iterator[str]:
    with mesh(Snapshot(inbound=(given,), complete=True)) as made, uvicorn_server(made.asgi(asgi_app)) as at:
        yield at


@contextlib.contextmanager
def by_wsgi(given: Inbound) -> Iterator[str]:
    with mesh(Snapshot(inbound=(given,), complete=True)) as made, werkzeug_server(made.wsgi(wsgi_app)) as at:
        yield at


@contextlib.contextmanager
def by_gateway(given: Inbound) -> Iterator[str]:
    with Peer(_behind) as behind:
        plain = everything_to(behind.address)
        ruled = replace(plain, listeners=(replace(plain.listeners[0], access=given.access),))
        with in_a_thread(gateway(ruled)) as made:
            yield url(made, "")


EDGES = [by_asgi, by_wsgi, by_gateway]


@contextlib.contextmanager
def in_a_thread(entered: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """An asynchronous context, on an event loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="loop")
    thread.start()
    try:
        value = asyncio.run_coroutine_threadsafe(entered.__aenter__(), loop).result(30)
        try:
            yield value
        finally:
            asyncio.run_coroutine_threadsafe(entered.__aexit__(None, None, None), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def exchange(at: str, head: bytes, body: bytes = b"") -> tuple[int, bytes]:
    """Sends just these bytes to `at` (a URL); status and body of the first answer, 0 where there is none."""
    host, _, port = at.removeprefix("http://").rstrip("/").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head + body)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                answer += chunk
    status, _, rest = answer.partition(b"\r\n")
    return (int(status.split()[1]) if status else 0), rest.partition(b"\r\n\r\n")[2]
