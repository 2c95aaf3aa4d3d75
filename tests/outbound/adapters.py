"""Every adapter behind one face, so that one suite of claims holds for all, and no adapter is weaker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import aiohttp
import httpx
import httpx2
import requests
from urllib3 import exceptions

from meshlib.mesh import Mesh

ADAPTERS = (
    "httpx",
    "httpx-async",
    "httpx-aiohttp",
    "httpx2",
    "httpx2-async",
    "httpx2-aiohttp",
    "requests",
    "urllib3",
    "aiohttp",
)


@dataclass(frozen=True)
class Errors:
    """What users of the library catch. every: its root for what goes wrong on the wire. cut, late: while the body is
    read."""

    every: type[Exception]
    connect: type[Exception]
    reset: type[Exception]
    timeout: type[Exception]
    cut: type[Exception]
    late: type[Exception]


@dataclass(frozen=True)
class Got:
    """A response with its body read. headers: as they came, names in lower case."""

    status_code: int
    content: bytes
    url: str
    headers: list[tuple[str, str]]
    extensions: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.content.decode()

    def every(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


class Caller:
    """Makes calls through a mesh with one client of one library.

    request: redirects are not followed; options are headers (a dict), content, timeout (as the library takes it).
    stream: what `use` returns for the body's chunks, read as they come; the body is closed after it.
    upload: a body that can be sent only once.
    """

    errors: Errors

    def request(self, method: str, url: str, **options: Any) -> Got:
        raise NotImplementedError

    def get(self, url: str, **options: Any) -> Got:
        return self.request("GET", url, **options)

    def stream(self, url: str, use: Callable[[Iterator[bytes]], Any]) -> Any:
        raise NotImplementedError

    def upload(self, url: str, chunks: list[bytes], method: str = "POST") -> Got:
        return self.request(method, url, content=iter(chunks))

    def together(self, urls: list[str]) -> list[Got]:
        with ThreadPoolExecutor(len(urls)) as pool:
            return list(pool.map(self.get, urls))

    def close(self) -> None:
        raise NotImplementedError


def _httpx_errors(library: ModuleType) -> Errors:
    late = library.ReadTimeout
    return Errors(
        library.TransportError,
        library.ConnectError,
        library.RemoteProtocolError,
        library.ReadTimeout,
        library.RemoteProtocolError,
        late,
    )


def _of_httpx(response: Any) -> Got:
    headers = [(name.lower().decode(), value.decode("latin-1")) for name, value in response.headers.raw]
    return Got(response.status_code, response.content, str(response.url), headers, response.extensions)


class Httpx(Caller):
    def __init__(self, mesh: Mesh, library: ModuleType) -> None:
        self.errors = _httpx_errors(library)
        self.client = library.Client(transport=mesh.transport(library), timeout=10)

    def request(self, method: str, url: str, **options: Any) -> Got:
        return _of_httpx(self.client.request(method, url, **options))

    def stream(self, url: str, use: Callable[[Iterator[bytes]], Any]) -> Any:
        with self.client.stream("GET", url) as response:
            return use(response.iter_raw())

    def close(self) -> None:
        self.client.close()


class Async(Caller):
    """What asyncio clients share: a loop of their own, entered for each call."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()

    async def send(self, method: str, url: str, **options: Any) -> Got:
        raise NotImplementedError

    async def leave(self) -> None:
        raise NotImplementedError

    def request(self, method: str, url: str, **options: Any) -> Got:
        # The runner has a context of its own; a call is made in the caller's, as a task of his would be.
        return self.runner.run(self.send(method, url, **options), context=copy_context())

    def upload(self, url: str, chunks: list[bytes], method: str = "POST") -> Got:
        async def body() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk

        return self.request(method, url, content=body())

    def together(self, urls: list[str]) -> list[Got]:
        async def call() -> list[Got]:
            return await asyncio.gather(*(self.send("GET", url) for url in urls))

        return self.runner.run(call())

    async def use_in_thread(self, chunks: AsyncIterator[bytes], use: Callable[[Iterator[bytes]], Any]) -> Any:
        """`use` reads synchronously; each chunk is awaited on this loop."""
        loop = asyncio.get_running_loop()

        async def following() -> bytes | None:
            return await anext(chunks, None)

        def pull() -> Iterator[bytes]:
            while (chunk := asyncio.run_coroutine_threadsafe(following(), loop).result(10)) is not None:
                yield chunk

        return await asyncio.to_thread(use, pull())

    def close(self) -> None:
        self.runner.run(self.leave())
        self.runner.close()


class HttpxAsync(Async):
    def __init__(self, mesh: Mesh, library: ModuleType, engine: Any) -> None:
        super().__init__()
        self.errors = _httpx_errors(library)
        self.client = library.AsyncClient(transport=mesh.async_transport(library, engine=engine), timeout=10)

    async def send(self, method: str, url: str, **options: Any) -> Got:
        return _of_httpx(await self.client.request(method, url, **options))

    def stream(self, url: str, use: Callable[[Iterator[bytes]], Any]) -> Any:
        async def call() -> Any:
            async with self.client.stream("GET", url) as response:
                return await self.use_in_thread(response.aiter_raw(), use)

        return self.runner.run(call())

    async def leave(self) -> None:
        await self.client.aclose()


class Requests(Caller):
    errors = Errors(
        requests.RequestException,
        requests.ConnectionError,
        requests.ConnectionError,
        requests.ReadTimeout,
        requests.exceptions.ChunkedEncodingError,
        requests.ConnectionError,
    )

    def __init__(self, mesh: Mesh) -> None:
        self.session = requests.Session()
        adapter = mesh.requests_adapter()
        self.session.mount("http://", adapter)
        self.session.mount("https://", adapter)

    def request(self, method: str, url: str, *, headers: Any = None, content: Any = None, timeout: Any = 10) -> Got:
        response = self.session.request(
            method, url, headers=headers, data=content, timeout=timeout, allow_redirects=False
        )
        extensions: Any = response.extensions  # type: ignore[attr-defined]
        raw = [(name.lower(), value) for name, value in response.raw.headers.items()]
        return Got(response.status_code, response.content, response.url, raw, extensions)

    def stream(self, url: str, use: Callable[[Iterator[bytes]], Any]) -> Any:
        with self.session.get(url, stream=True, timeout=10) as response:
            return use(response.iter_content(None))

    def close(self) -> None:
        self.session.close()


class Urllib3(Caller):
    errors = Errors(
        exceptions.HTTPError,
        exceptions.MaxRetryError,
        exceptions.ProtocolError,
        exceptions.MaxRetryError,
        exceptions.MaxRetryError,
        exceptions.MaxRetryError,
    )

    def __init__(self, mesh: Mesh) -> None:
        self.manager = mesh.urllib3()

    def request(self, method: str, url: str, *, headers: Any = None, content: Any = None, timeout: Any = 10) -> Got:
        response = self.manager.request(method, url, headers=headers, body=content, timeout=timeout, redirect=False)
        extensions: Any = response.extensions  # type: ignore[attr-defined]
        raw = [(name.lower(), value) for name, value in response.headers.items()]
        return Got(response.status, response.data, url, raw, extensions)

    def stream(self, url: str, use: Callable[[Iterator[bytes]], Any]) -> Any:
        response = self.manager.request("GET", url, preload_content=False, timeout=10)
        try:
            return use(response.stream(None))
        finally:
            response.close()

    def close(self) -> None:
        self.manager.clear()


class Aiohttp(Async):
    errors = Errors(
        aiohttp.ClientError,
        aiohttp.ClientConnectorError,
        aiohttp.ServerDisconnectedError,
        TimeoutError,
        aiohttp.ClientPayloadError,
        TimeoutError,
    )

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.middleware = mesh.aiohttp_middleware()
        self.session: aiohttp.ClientSession | None = None

    def opened(self) -> aiohttp.ClientSession:
        if self.session is None:
            self.session = aiohttp.ClientSession(middlewares=[self.middleware], timeout=aiohttp.ClientTimeout(total=10))
        return self.session

    async def send(
        self, method: str, url: str, *, headers: Any = None, content: Any = None, timeout: float = 10
    ) -> Got:
        plain = {name: value.decode() if isinstance(value, bytes) else value for name, value in (headers or {}).items()}
        limit = aiohttp.ClientTimeout(total=timeout)
        async with self.opened().request(
            method, url, headers=plain, data=content, timeout=limit, allow_redirects=False
        ) as response:
            raw = [(name.lower(), value) for name, value in response.headers.items()]
            extensions: Any = response.extensions  # type: ignore[attr-defined]
            return Got(response.status, await response.read(), str(response.url), raw, extensions)

    def stream(self, url: str, use: Callable[[Iterator[bytes]], Any]) -> Any:
        async def call() -> Any:
            async with self.opened().get(url) as response:
                return await self.use_in_thread(response.content.iter_any().__aiter__(), use)

        return self.runner.run(call())

    async def leave(self) -> None:
        if self.session is not None:
            await self.session.close()


_MAKERS: dict[str, Callable[[Mesh], Caller]] = {
    "httpx": lambda mesh: Httpx(mesh, httpx),
    "httpx-async": lambda mesh: HttpxAsync(mesh, httpx, "httpcore"),
    "httpx-aiohttp": lambda mesh: HttpxAsync(mesh, httpx, "aiohttp"),
    "httpx2": lambda mesh: Httpx(mesh, httpx2),
    "httpx2-async": lambda mesh: HttpxAsync(mesh, httpx2, "httpcore"),
    "httpx2-aiohttp": lambda mesh: HttpxAsync(mesh, httpx2, "aiohttp"),
    "requests": Requests,
    "urllib3": Urllib3,
    "aiohttp": Aiohttp,
}
assert tuple(_MAKERS) == ADAPTERS


@contextmanager
def caller(adapter: str, mesh: Mesh) -> Iterator[Caller]:
    made = _MAKERS[adapter](mesh)
    try:
        yield made
    finally:
        made.close()
