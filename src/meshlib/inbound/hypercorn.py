"""How does hypercorn serve the mesh's mTLS? Its connections are taken as `serve` says, before it reads from them.

`asyncio.run(meshlib.inbound.hypercorn.serve(mesh.asgi(app), config))`, in the place of hypercorn.asyncio.serve; from
the command line `meshctl run -- hypercorn app:app`. On asyncio and uvloop; HTTP/1.1, HTTP/2 and WebSocket.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal

from hypercorn.asyncio import run
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config
from hypercorn.utils import wrap_app

from meshlib.inbound.peer import present, told
from meshlib.inbound.serve import registered


class Secured:
    """An application, as hypercorn wraps it, whose connections the mesh takes. app: the wrapper."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any, sync_spawn: Any, call_soon: Any) -> None:
        await self.app(told(scope), receive, send, sync_spawn, call_soon)

    def __repr__(self) -> str:
        return f"<Secured {self.app!r}>"


class _Server(TCPServer):
    """One connection. It is hypercorn's name for it."""

    async def run(self) -> None:
        # With certificates of its own hypercorn has read from the connection before.
        if isinstance(self.app, Secured) and self.writer.get_extra_info("sslcontext") is None:
            try:
                present.set(await registered().take(self.reader, self.writer))  # in the task of this connection
            except OSError:
                return  # said and closed
        await super().run()


run.TCPServer = _Server  # type: ignore[attr-defined]  # hypercorn makes them by this name; others' are served as ever


async def serve(
    app: Any,
    config: Config,
    *,
    shutdown_trigger: Callable[..., Awaitable[None]] | None = None,
    mode: Literal["asgi", "wsgi"] | None = None,
) -> None:
    """hypercorn.asyncio.serve, for an application that is wrapped by `mesh.asgi`. `config` needs no certificates."""
    wrapped: Any = Secured(wrap_app(app, config.wsgi_max_body_size, mode))
    await run.worker_serve(wrapped, config, shutdown_trigger=shutdown_trigger)
