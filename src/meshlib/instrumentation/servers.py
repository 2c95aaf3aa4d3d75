"""How does the application that a server loads come behind the mesh's middleware, and its port by mTLS? Where the
server has just loaded it.

That is in the process that serves: after gunicorn's fork, in uvicorn's and hypercorn's spawned workers. An application
that was wrapped by its author already is left alone. Ports are taken by the mesh where this process has an identity;
one that has certificates of its own keeps them.
"""

from __future__ import annotations

import functools
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


def _takes_connections() -> bool:
    """Whether a Mesh serves in this process, and has something to show for itself."""
    from meshlib.inbound.serve import is_secured

    return is_secured()


# gunicorn


def _gunicorn(base: ModuleType, patches: Patches) -> None:
    def load_wsgi(original: Any, worker: Any) -> None:
        original(worker)
        # An ASGI application is its worker's: uvicorn's loads it by a uvicorn.Config, gunicorn's own by itself.
        if not _is_asgi(worker.wsgi) and not _is_wrapped(worker.wsgi):
            worker.wsgi = patches.mesh().wsgi(worker.wsgi)

    patches.around(base.Worker, "load_wsgi", load_wsgi)


def _gunicorn_sync(sync: ModuleType, patches: Patches) -> None:
    def handle(original: Any, worker: Any, listener: Any, client: Any, addr: Any) -> None:
        if type(worker) is sync.SyncWorker and not worker.cfg.is_ssl and _takes_connections():
            from meshlib.inbound.gunicorn import take

            if (client := take(client)) is None:
                return
        original(worker, listener, client, addr)

    patches.around(sync.SyncWorker, "handle", handle)


def _gunicorn_threads(gthread: ModuleType, patches: Patches) -> None:
    def enqueue_req(original: Any, worker: Any, conn: Any) -> None:
        if type(worker) is gthread.ThreadWorker and not worker.cfg.is_ssl and _takes_connections():
            from meshlib.inbound.gunicorn import secure

            secure(conn)
        original(worker, conn)

    patches.around(gthread.ThreadWorker, "enqueue_req", enqueue_req)


def _gunicorn_asgi(gasgi: ModuleType, patches: Patches) -> None:
    def load_wsgi(original: Any, worker: Any) -> None:
        original(worker)
        if not _is_wrapped(worker.asgi):
            worker.asgi = patches.mesh().asgi(worker.asgi)
        if type(worker) is gasgi.ASGIWorker and not worker.cfg.is_ssl and _takes_connections():
            import meshlib.inbound.gunicorn_asgi  # noqa: F401 -- the worker's connections pass its door from now on
            from meshlib.inbound.peer import WithPeer

            worker.asgi = WithPeer(worker.asgi)

    patches.around(gasgi.ASGIWorker, "load_wsgi", load_wsgi)


# uvicorn, hypercorn, werkzeug


def _uvicorn(config: ModuleType, patches: Patches) -> None:
    def load(original: Any, settings: Any) -> None:
        original(settings)
        if not _is_wrapped(settings.loaded_app):
            settings.loaded_app = patches.mesh().asgi(settings.loaded_app)
        protocol = settings.http_protocol_class
        if not settings.is_ssl and inspect.isclass(protocol) and _takes_connections():  # ours are functions
            from meshlib.inbound.serve import registered

            settings.http_protocol_class = functools.partial(registered().uvicorn, protocol)

    patches.around(config.Config, "load", load)


def _hypercorn(utils: ModuleType, patches: Patches) -> None:
    def wrap_app(original: Any, app: Any, *args: Any, **options: Any) -> Any:
        if _is_wrapped(app):
            wrapper = original(app, *args, **options)
        elif isinstance(wrapper := original(app, *args, **options), asgi_wrapper):
            wrapper.app = patches.mesh().asgi(app)
        else:
            wrapper = _Wsgi(wrapper, patches)
        if not _takes_connections():
            return wrapper
        from meshlib.inbound.hypercorn import Secured

        return Secured(wrapper)

    asgi_wrapper = utils.ASGIWrapper
    patches.around(utils, "wrap_app", wrap_app)


class _Wsgi:
    """hypercorn's wrapper of a WSGI application, judged before it gathers the body."""

    def __init__(self, wrapper: Any, patches: Patches) -> None:
        self._wrapper, self._patches = wrapper, patches
        self._asgi: Any = patches.mesh().asgi(self._serve)

    async def __call__(self, scope: Any, receive: Any, send: Any, sync_spawn: Any, call_soon: Any) -> None:
        await self._asgi({**scope, "meshlib.hypercorn": (sync_spawn, call_soon)}, receive, send)

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        await self._wrapper(scope, receive, send, *scope["meshlib.hypercorn"])


def _werkzeug(serving: ModuleType, patches: Patches) -> None:
    signature = inspect.signature(serving.make_server)

    def make_server(original: Any, *args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options)
        if not _is_wrapped(given.arguments["app"]):
            given.arguments["app"] = patches.mesh().wsgi(given.arguments["app"])
        own = given.arguments.get("request_handler"), given.arguments.get("ssl_context")
        if own == (None, None) and _takes_connections():
            from meshlib.inbound.werkzeug import RequestHandler

            given.arguments["request_handler"] = RequestHandler
        return original(*given.args, **given.kwargs)

    patches.around(serving, "make_server", make_server)


PATCHES = {
    "gunicorn.workers.base": _gunicorn,
    "gunicorn.workers.sync": _gunicorn_sync,
    "gunicorn.workers.gthread": _gunicorn_threads,
    "gunicorn.workers.gasgi": _gunicorn_asgi,
    "hypercorn.utils": _hypercorn,
    "uvicorn.config": _uvicorn,
    "werkzeug.serving": _werkzeug,
}
"""By the module that holds what is patched."""
