"""How does a Bookinfo service start, and how does it say what it served?

`python details.py 9080` serves until SIGTERM. HOST is the address to bind: 127.0.0.1 unless set, 0.0.0.0 in a
container. Port 0 lets the operating system choose. The first line on stdout names the address once it accepts
connections; one line follows for each request:

    reviews-v2 GET /reviews/0 200 4ms host=reviews:9080 user=jason trace=4bf92f3577b34da6a3ce929d0e0e4736

A mirrored request shows in `host`: Istio appends `-shadow` to it.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

IS_BARE = os.environ.get("BOOKINFO_MESH") == "off"
VERSION = os.environ.get("SERVICE_VERSION", "v1")

# Longer than any client keeps an idle connection: a server that closes first loses the request that is on its way.
KEEP_ALIVE = 75
# How long SIGTERM waits for requests in flight. productpage's slowest page takes 6 seconds.
GRACE = 8

out = logging.getLogger("bookinfo")


def write_lines_to_stdout() -> None:
    """Through logging and not print, which may tear the lines of two threads apart.

    With the lines of meshlib.guard: whom a rule has turned away, and which one.
    """
    stdout = logging.StreamHandler(sys.stdout)
    stdout.setFormatter(logging.Formatter("%(message)s"))
    for log in (out, logging.getLogger("meshlib.guard")):
        log.addHandler(stdout)
        log.setLevel(logging.INFO)
    out.propagate = False


def address() -> tuple[str, int]:
    return os.environ.get("HOST", "127.0.0.1"), int(sys.argv[1]) if len(sys.argv) > 1 else 9080


def announce(service: str, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    out.info("%s-%s listens on http://%s:%d", service, VERSION, f"[{host}]" if ":" in host else host, port)


def serve_asgi(service: str, create_app: Callable[[], ASGIApp]) -> None:
    """Serve with uvicorn, in this process."""
    import uvicorn

    write_lines_to_stdout()
    config = uvicorn.Config(
        create_app(),
        http="auto" if IS_BARE else "meshlib.inbound.serve:uvicorn_protocol",  # mTLS, where there is an identity
        access_log=False,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
    )
    host, port = address()
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        # asyncio turns Nagle's algorithm off only where it opens the socket itself; with it each answer, sent as head
        # and body, would wait 40 ms for the client's acknowledgement. Accepted connections inherit this.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        announce(service, listener)
        uvicorn.Server(config).run(sockets=[listener])


def serve_wsgi(service: str, create_app: Callable[[], WSGIApplication]) -> None:
    """Serve with gunicorn: one worker process with threads, which calls `create_app` itself, after the fork."""
    from gunicorn.app.base import BaseApplication

    write_lines_to_stdout()
    host, port = address()
    settings = {
        "bind": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        "worker_class": "gthread" if IS_BARE else "meshlib.inbound.gunicorn.Threads",
        "threads": 16,
        "keepalive": KEEP_ALIVE,
        "graceful_timeout": GRACE,
        "loglevel": "warning",
        "control_socket_disable": True,
        "when_ready": lambda arbiter: announce(service, arbiter.LISTENERS[0].sock),
    }

    class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
        def load_config(self) -> None:
            for name, value in settings.items():
                self.cfg.set(name, value)

        def load(self) -> WSGIApplication:
            return create_app()

    Server().run()


class AsgiAccessLog:
    """Wrap the app with it inside mesh.asgi(), to see requests as the mesh hands them on."""

    def __init__(self, app: ASGIApp, service: str) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 500

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            await self.app(scope, receive, note_status)
        finally:
            log_request(self.service, scope["method"], scope["path"], status, start, headers)


class WsgiAccessLog:
    """Wrap the app with it inside mesh.wsgi(), to see requests as the mesh hands them on."""

    def __init__(self, app: WSGIApplication, service: str) -> None:
        self.app, self.service = app, service

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start, status = time.perf_counter(), 500

        def note_status(line: str, headers: list[tuple[str, str]], *rest: Any) -> Callable[[bytes], object]:
            nonlocal status
            status = int(line[:3])
            return start_response(line, headers, *rest)

        headers = {
            name[5:].lower().replace("_", "-"): value for name, value in environ.items() if name.startswith("HTTP_")
        }
        try:
            return self.app(environ, note_status)
        finally:
            path = environ.get("PATH_INFO", "").encode("latin-1").decode("utf-8", "replace")
            log_request(self.service, environ["REQUEST_METHOD"], path, status, start, headers)


def log_request(service: str, method: str, path: str, status: int, start: float, headers: dict[str, str]) -> None:
    """Paths are quoted again and header values cut at white space, so a request can't forge a line."""
    fields = {
        "host": headers.get("host"),
        "user": headers.get("end-user"),
        "trace": (headers.get("traceparent") or "").split("-")[1:2],
    }
    fields["trace"] = fields["trace"][0] if fields["trace"] else None
    words = " ".join(f"{name}={quote(value, safe=':[]@!$&()*+,;') if value else '-'}" for name, value in fields.items())
    took = (time.perf_counter() - start) * 1000
    out.info("%s-%s %s %s %d %.0fms %s", service, VERSION, method, quote(path), status, took, words)
