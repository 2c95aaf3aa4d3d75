"""Real servers on loopback, in a thread: uvicorn for ASGI, werkzeug (a thread for each connection) for WSGI."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
import werkzeug.serving


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


@contextlib.contextmanager
def uvicorn_server(app: Any, *, address: str = "127.0.0.1", **options: Any) -> Iterator[str]:
    """Serves `app`; yields its URL."""
    server = _Server(uvicorn.Config(app, log_level="critical", lifespan="on", timeout_graceful_shutdown=5, **options))
    with socket.create_server((address, 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), name="uvicorn")
        thread.start()
        try:
            assert server.is_up.wait(10)
            yield f"http://{address}:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


class _Quiet(werkzeug.serving.WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def werkzeug_server(app: Any) -> Iterator[str]:
    """Serves `app`; yields its URL."""
    server = werkzeug.serving.make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="werkzeug")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
        assert not thread.is_alive()
