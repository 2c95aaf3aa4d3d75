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
        try:
            client = registered().accept(client)
        except OSError:
            return  # said and closed
        super().handle(listener, client, addr)


class Threads(GunicornThreads):  # type: ignore[misc]
    """gthread; the handshake is made on a thread of the pool."""

    def enqueue_req(self, conn: Any) -> None:
        if not conn.initialized and "init" not in vars(conn):
            begin = conn.init

            def init() -> None:
                if not conn.initialized:
                    try:
                        conn.sock = registered().accept(conn.sock)
                    except OSError as error:  # said and closed; gthread keeps silent about this one alone
                        raise ConnectionResetError(errno.ECONNRESET, "the connection was not taken") from error
                begin()

            conn.init = init
        super().enqueue_req(conn)
