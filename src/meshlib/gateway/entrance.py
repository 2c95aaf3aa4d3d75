"""How does a TLS client come in? Its ClientHello is read, and the server that it names decides on certificate and on
whether the client must show one; so servers of every mode stand on one port, as behind Envoy's TLS inspector."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshlib.gateway.hello import NoHello, server_name
from meshlib.inbound.serve import GOODBYE, start_tls

if TYPE_CHECKING:
    import ssl

_log = logging.getLogger("meshlib.gateway")


class Entrance(asyncio.Protocol):
    """One client's connection until its handshake is done.

    context: for the name that it asks for. make: the protocol that serves it then. timeout: seconds for all of it.
    left: called when it ends here.
    """

    def __init__(
        self,
        context: Callable[[str], ssl.SSLContext],
        make: Callable[[], Any],
        timeout: float,
        left: Callable[[Entrance], None],
    ) -> None:
        self._context, self._make, self._timeout, self._left = context, make, timeout, left
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._early: list[bytes] = []
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._transport: Any = None
        self._is_aborted = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        if self._is_aborted:  # its door was closed since it was let in
            transport.abort()
            return
        self._timer = self._loop.call_later(self._timeout, self.abort)

    def data_received(self, data: bytes) -> None:
        if self._task is not None:  # what comes right behind the handshake
            self._early.append(data)
            return
        self._received += data
        try:
            name = server_name(self._received)
        except NoHello as error:
            _log.debug("a client is sent away: %s", error)
            self.abort()
            return
        if name is not None:
            self._transport.pause_reading()
            self._task = self._loop.create_task(self._secure(name), name="meshlib-gateway-handshake")

    async def _secure(self, name: str) -> None:
        transport = self._transport
        try:
            starting = self._loop.start_tls(
                transport,
                self,
                self._context(name),
                server_side=True,
                ssl_handshake_timeout=self._timeout,
                ssl_shutdown_timeout=GOODBYE,
            )
            secured: Any = await start_tls(starting, transport, self._received)
            if secured is None:
                raise ConnectionResetError("it was closed in the handshake")
        except OSError as error:
            _log.debug("no handshake with a client that asks for %r: %s", name, error)
            self.abort()
            return
        inner = self._make()
        self._ends()
        secured.set_protocol(inner)
        inner.connection_made(secured)
        for chunk in self._early:
            inner.data_received(chunk)

    def abort(self) -> None:
        self._is_aborted = True
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        if self._transport is not None:
            self._transport.abort()
        self._ends()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ends()

    def _ends(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._left(self)
