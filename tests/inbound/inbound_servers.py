"""Real servers on loopback, in a thread: uvicorn for ASGI, werkzeug (a thread for each connection) for WSGI."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
import werkzeug.serving

from meshlib.inbound.peer import of_scope
from meshlib.mesh import Mesh


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


class Witness:
    """An ASGI application that answers with who calls, by the certificate, and remembers it: `None` is plaintext.

    mesh: whose listeners the server has (`uvicorn_server(witness, http=witness.http)`): set once it is made, which
    needs the server's address.
    """

    def __init__(self) -> None:
        self.mesh: Mesh | None = None
        self.seen: list[str] = []

    def http(self, **options: Any) -> Any:
        assert self.mesh is not None
        return self.mesh.listening.uvicorn(**options)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.seen.append(str(of_scope(scope).identity))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": self.seen[-1].encode()})
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})


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
