"""How do the clients of an application that knows no mesh come to call through it?

Each where it would have made connections of its own. A transport, adapter, connector or proxy that the application
chose itself stays what it is, and so do the clients of meshlib's own parts.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from meshlib.instrumentation.patches import Patches, is_ours


def _httpx(library: ModuleType, patches: Patches) -> None:
    def chosen(make: str, original: Any, client: Any, *args: Any, transport: Any = None, **options: Any) -> Any:
        # Above: patched, the client's __init__, who makes the client.
        if transport is not None or args or is_ours(4):
            return original(client, *args, transport=transport, **options)
        tls = {name: options[name] for name in ("verify", "cert", "trust_env") if name in options}
        http2 = bool(options.get("http2"))
        return getattr(patches.mesh(), make)(library, ssl_context=library.create_ssl_context(**tls), http2=http2)

    def sync(original: Any, client: Any, *args: Any, **options: Any) -> Any:
        return chosen("transport", original, client, *args, **options)

    def asynchronous(original: Any, client: Any, *args: Any, **options: Any) -> Any:
        return chosen("async_transport", original, client, *args, **options)

    patches.around(library.Client, "_init_transport", sync)
    patches.around(library.AsyncClient, "_init_transport", asynchronous)


def _requests(sessions: ModuleType, patches: Patches) -> None:
    def init(original: Any, session: Any, *args: Any, **options: Any) -> None:
        original(session, *args, **options)
        for prefix, adapter in list(session.adapters.items()):
            if type(adapter) is sessions.HTTPAdapter:
                session.mount(prefix, patches.mesh().requests_adapter())

    patches.around(sessions.Session, "__init__", init)


def _urllib3(poolmanager: ModuleType, patches: Patches) -> None:
    plain = poolmanager.pool_classes_by_scheme

    def new_pool(original: Any, manager: Any, scheme: str, *args: Any, **options: Any) -> Any:
        # A ProxyManager is another type, and an application's own pools are other classes.
        if type(manager) is not poolmanager.PoolManager or manager.pool_classes_by_scheme is not plain:
            return original(manager, scheme, *args, **options)
        within = vars(manager).get("_meshlib")
        if within is None:
            within = manager._meshlib = patches.mesh().urllib3()
        manager.pool_classes_by_scheme = within.pool_classes_by_scheme
        try:
            pool = original(manager, scheme, *args, **options)
        finally:
            manager.pool_classes_by_scheme = plain
        pool.edge = within.edge
        return pool

    def clear(original: Any, manager: Any) -> None:
        original(manager)
        if (within := vars(manager).get("_meshlib")) is not None:
            within.clear()

    patches.around(poolmanager.PoolManager, "_new_pool", new_pool)
    patches.around(poolmanager.PoolManager, "clear", clear)


def _aiohttp(client: ModuleType, patches: Patches) -> None:
    ours: list[Any] = []

    async def request(original: Any, session: Any, *args: Any, middlewares: Any = None, **options: Any) -> Any:
        if middlewares is None:
            middlewares = session._middlewares
        # A connector of another type, as for a socket file, says itself where it leads to; and the mesh's own sends
        # what is routed already.
        if type(session.connector) is client.TCPConnector and not _has_ours(middlewares):
            if not ours:
                ours.append(patches.mesh().aiohttp_middleware())
            middlewares = (*middlewares, ours[0])
        return await original(session, *args, middlewares=middlewares, **options)

    patches.around(client.ClientSession, "_request", request)


def _has_ours(middlewares: Any) -> bool:
    from meshlib.outbound.aiohttp import MeshMiddleware

    return any(isinstance(each, MeshMiddleware) for each in middlewares)


PATCHES = {
    "httpx": _httpx,
    "httpx2": _httpx,
    "requests.sessions": _requests,
    "urllib3.poolmanager": _urllib3,
    "aiohttp.client": _aiohttp,
}
"""By the module that holds what is patched."""
