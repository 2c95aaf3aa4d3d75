"""How does the application that a server loads come behind the mesh's middleware? Where the server has just loaded it.

That is in the process that serves: after gunicorn's fork, in uvicorn's spawned workers. An application that was wrapped
by its author already is left alone.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

from meshlib.instrumentation.patches import Patches


def _is_wrapped(app: Any) -> bool:
    """Whether the mesh's middleware is somewhere around the application already."""
    from meshlib.inbound.asgi import MeshASGI
    from meshlib.inbound.wsgi import MeshWSGI

    for _ in range(32):
        if isinstance(app, MeshASGI | MeshWSGI):
            return True
        app = getattr(app, "app", None) or getattr(app, "wsgi_app", None)
    return False


def _is_asgi(app: Any) -> bool:
    return inspect.iscoroutinefunction(app) or inspect.iscoroutinefunction(getattr(app, "__call__", None))  # noqa: B004


def _gunicorn(base: ModuleType, patches: Patches) -> None:
    def load_wsgi(original: Any, worker: Any) -> None:
        original(worker)
        # An ASGI application is its worker's: uvicorn's loads it by a uvicorn.Config, below.
        if not _is_asgi(worker.wsgi) and not _is_wrapped(worker.wsgi):
            worker.wsgi = patches.mesh().wsgi(worker.wsgi)

    patches.around(base.Worker, "load_wsgi", load_wsgi)


def _uvicorn(config: ModuleType, patches: Patches) -> None:
    def load(original: Any, settings: Any) -> None:
        original(settings)
        if not _is_wrapped(settings.loaded_app):
            settings.loaded_app = patches.mesh().asgi(settings.loaded_app)

    patches.around(config.Config, "load", load)


def _werkzeug(serving: ModuleType, patches: Patches) -> None:
    def make_server(original: Any, host: str, port: int, app: Any, *args: Any, **options: Any) -> Any:
        if not _is_wrapped(app):
            app = patches.mesh().wsgi(app)
        return original(host, port, app, *args, **options)

    patches.around(serving, "make_server", make_server)


PATCHES = {"gunicorn.workers.base": _gunicorn, "uvicorn.config": _uvicorn, "werkzeug.serving": _werkzeug}
"""By the module that holds what is patched."""
