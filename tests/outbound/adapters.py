"""Every adapter behind one face, so that one suite of claims holds for all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import httpx
import httpx2

from meshlib.mesh import Mesh

ADAPTERS = ("httpx", "httpx-async", "httpx-aiohttp", "httpx2", "httpx2-async", "httpx2-aiohttp")


class Caller:
    """Makes calls through `mesh` with one client of one library. `library`: whose exceptions it raises."""

    library: ModuleType

    def request(self, method: str, url: str, **options: Any) -> httpx.Response:
        raise NotImplementedError

    def stream(self, url: str, use: Callable[[Iterator[bytes]], Any]) -> Any:
        """What `use` returns for the body's chunks, read as they come; the body is closed after it."""
        raise NotImplementedError

    def upload(self, url: str, chunks: list[bytes], method: str = "POST") -> httpx.Response:
        """A body that can be sent only once."""
        raise NotImplementedError

    def get(self, url: str, **options: Any) -> httpx.Response:
        return self.request("GET", url, **options)

    def together(self, urls: list[str]) -> list[httpx.Response]:
        raise NotImplementedError


class SyncCaller(Caller):
    def __init__(self, mesh: Mesh, library: ModuleType) -> None:
        self.library = library
        self.client = library.Client(transport=mesh.transport(library), timeout=10)

    def request(self, method: str, url: str, **options: Any) -> httpx.Response:
        return self.client.request(method, url, **options)  # type: ignore[no-any-return]

    def stream(self, url: str, use: Callable[[Iterator[bytes]], Any]) -> Any:
        with self.client.stream("GET", url) as response:
            return use(response.iter_raw())

    def upload(self, url: str, chunks: list[bytes], method: str = "POST") -> httpx.Response:
        return self.client.request(method, url, content=iter(chunks))  # type: ignore[no-any-return]

    def together(self, urls: list[str]) -> list[httpx.Response]:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(len(urls)) as pool:
            return list(pool.map(self.client.get, urls))

    def close(self) -> None:
        self.client.close()


class AsyncCaller(Caller):
    def __init__(self, mesh: Mesh, library: ModuleType, engine: Any) -> None:
        self.library = library
        self.runner = asyncio.Runner()
        self.client = library.AsyncClient(transport=mesh.async_transport(library, engine=engine), timeout=10)

    def request(self, method: str, url: str, **options: Any) -> httpx.Response:
        async def call() -> Any:
            return await self.client.request(method, url, **options)

        return self.runner.run(call())  # type: ignore[no-any-return]

    def stream(self, url: str, use: Callable[[Iterator[bytes]], Any]) -> Any:
        async def call() -> Any:
            async with self.client.stream("GET", url) as response:
                chunks = response.aiter_raw()

                def pull() -> Iterator[bytes]:
                    while True:
                        found = yield_from(chunks)
                        if found is None:
                            return
                        yield found

                loop = asyncio.get_running_loop()

                def yield_from(source: AsyncIterator[bytes]) -> bytes | None:
                    return asyncio.run_coroutine_threadsafe(_next(source), loop).result(10)

                return await asyncio.to_thread(use, pull())

        return self.runner.run(call())

    def upload(self, url: str, chunks: list[bytes], method: str = "POST") -> httpx.Response:
        async def body() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk

        return self.request(method, url, content=body())

    def together(self, urls: list[str]) -> list[httpx.Response]:
        async def call() -> list[Any]:
            return await asyncio.gather(*(self.client.get(url) for url in urls))

        return self.runner.run(call())

    def close(self) -> None:
        async def leave() -> None:
            await self.client.aclose()

        self.runner.run(leave())
        self.runner.close()


async def _next(source: AsyncIterator[bytes]) -> bytes | None:
    return await anext(source, None)


@contextmanager
def caller(adapter: str, mesh: Mesh) -> Iterator[Caller]:
    library = httpx2 if adapter.startswith("httpx2") else httpx
    made: SyncCaller | AsyncCaller
    if adapter.endswith(("-async", "-aiohttp")):
        made = AsyncCaller(mesh, library, "aiohttp" if adapter.endswith("aiohttp") else "httpcore")
    else:
        made = SyncCaller(mesh, library)
    try:
        yield made
    finally:
        made.close()
