"""A real admin API on a real port, for commands that block: it runs on a thread with a loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.admin import AdminServer, admin_app
from meshlib.controlplane.sources import ObjectStore


class View:
    """What a control plane would know besides objects; tests set it."""

    def __init__(self) -> None:
        self.connected: Sequence[api.Client] = ()
        self.services: Sequence[api.ServiceEndpoints] = ()
        self.found: Sequence[api.Problem] = ()

    def is_ready(self) -> bool:
        return True

    def clients(self) -> Sequence[api.Client]:
        return self.connected

    def endpoints(self) -> Sequence[api.ServiceEndpoints]:
        return self.services

    def problems(self) -> Sequence[api.Problem]:
        return self.found


@contextlib.contextmanager
def admin_in_thread(store: ObjectStore, view: View) -> Iterator[str]:
    """Yields its URL."""
    urls: list[str] = []
    serving, done = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        server = AdminServer(admin_app(store, view), "127.0.0.1", 0)
        await server.start()
        urls.append(server.url)
        serving.set()
        await done.wait()
        await server.stop()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert serving.wait(10)
    try:
        yield urls[0]
    finally:
        loops[0].call_soon_threadsafe(done.set)
        thread.join()
