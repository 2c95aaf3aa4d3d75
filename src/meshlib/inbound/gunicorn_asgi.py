"""How does gunicorn's own ASGI worker serve the mesh's mTLS? By its protocol behind our door.

`gunicorn -k meshlib.inbound.gunicorn_asgi.Asgi app:app`, with the application wrapped by `mesh.asgi`.
"""

from __future__ import annotations

from typing import Any

from gunicorn.workers import gasgi  # type: ignore[import-untyped]

from meshlib.inbound.peer import WithPeer
from meshlib.inbound.serve import Door, registered

_Protocol = gasgi.ASGIProtocol


class Asgi(gasgi.ASGIWorker):  # type: ignore[misc]
    """gunicorn's worker."""

    def load_wsgi(self) -> None:
        super().load_wsgi()
        loaded: Any = vars(self)["asgi"]
        self.asgi = WithPeer(loaded)


def _protocol(worker: Any) -> Any:
    """One connection's; behind the door where the worker's application is to be told who is there."""
    if not isinstance(worker.asgi, WithPeer):
        return _Protocol(worker)
    return Door(registered(), lambda _: _Protocol(worker))


gasgi.ASGIProtocol = _protocol  # the worker makes its protocols by this name, and has no other place for it
