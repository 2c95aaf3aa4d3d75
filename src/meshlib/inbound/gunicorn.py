"""How does gunicorn serve the mesh's mTLS? Workers that take each connection as `serve` says.

`gunicorn -k meshlib.inbound.gunicorn.Sync app:app`, with the application wrapped by `mesh.wsgi`. The names are short
because gunicorn puts its own gthread in the place of what ends in SyncWorker where there are threads.
"""

from __future__ import annotations

import errno
from typing import Any

from gunicorn.workers.gthread import ThreadWorker as GunicornThreads  # type: ignore[import-untyped]
from gunicorn.workers.sync import SyncWorker as GunicornSync  # type: ignore[import-untyped]

from meshlib.inbound.serve import registered


class Sync(GunicornSync):  # type: ignore[misc]
    """One connection at a time, as gunicorn's: a client that only opens one holds it up for the handshake's limit."""

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        if (taken := take(client)) is not None:
            super().handle(listener, taken, addr)


class Threads(GunicornThreads):  # type: ignore[misc]
    """gthread; the handshake is made on a thread of the pool."""

    def enqueue_req(self, conn: Any) -> None:
        secure(conn)
        super().enqueue_req(conn)


def take(client: Any) -> Any:
    """The socket to serve from; None for a connection that is not taken, which is said and closed then."""
    try:
        return registered().accept(client)
    except OSError:
        return None


def secure(conn: Any) -> None:
    """Have a connection of gthread's taken when it is first served."""
    if conn.initialized or "init" in vars(conn):
        return
    begin = conn.init

    def init() -> None:
        if not conn.initialized:
            if (taken := take(conn.sock)) is None:  # gthread keeps silent about this error alone
                raise ConnectionResetError(errno.ECONNRESET, "the connection was not taken")
            conn.sock = taken
        begin()

    conn.init = init
