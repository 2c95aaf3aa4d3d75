"""An API server for those who have no event loop: on a thread of its own, with a kubeconfig."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Self

import yaml

from kube.api_server import ApiServer
from kube.real_api import RealApi
from kube.real_cluster import own_address

PATIENCE = 30.0


class Cluster:
    """An API server on a thread of its own."""

    def __init__(self, api: ApiServer | RealApi | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.api = api or ApiServer()

    def __enter__(self) -> Self:
        self._thread.start()
        self.do(self.api.start())
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self.api.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def host(self) -> str:
        """An address of this machine that an EndpointSlice may have here."""
        return own_address() if isinstance(self.api, RealApi) else "127.0.0.1"

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def call(self, work: Callable[[], object]) -> None:
        async def run() -> None:
            work()

        self.do(run())

    def put(self, *objects: dict[str, Any]) -> None:
        self.call(lambda: [self.api.put(each) for each in objects])

    def watched(self, *plurals: str) -> None:
        self.do(asyncio.wait_for(self.api.watched(*plurals), PATIENCE))

    def kubeconfig(self, file: Path) -> None:
        file.write_text(
            yaml.safe_dump(
                {
                    "current-context": "here",
                    "contexts": [{"name": "here", "context": {"cluster": "c", "namespace": "shop"}}],
                    "clusters": [{"name": "c", "cluster": {"server": self.api.url}}],
                }
            )
        )
