"""What do both API servers of the tests do alike? They note who asks what, and refuse or break off at a test's word."""

from __future__ import annotations

import asyncio
import ssl
from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, Self, TypeVar

from aiohttp import web

Object = dict[str, Any]


class Refusal(Exception):
    def __init__(self, status: int, reason: str, message: str = "") -> None:
        super().__init__(reason)
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": reason,
            "message": message or reason,
            "code": status,
        }


class Watching(Protocol):
    """A watch that is open. queue: what is still to be sent on it; None ends it in good order."""

    queue: asyncio.Queue[Any]

    @property
    def plural(self) -> str: ...

    @property
    def request(self) -> web.Request: ...


W = TypeVar("W", bound=Watching)


class Front(ABC, Generic[W]):
    """`async with` serves on 127.0.0.1 until the end.

    tokens: what a bearer may say, and who that is; without any, everybody may come. requests: (method, path with query)
    of all that were served. forbidden: plurals that RBAC denies. page: the longest page it gives, however many are
    asked for. list_gate: lists wait for it. forgets_pages: nobody gets a second one.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.port = 0
        self.tokens: dict[str, str] = {}
        self.forbidden: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.authorizations: list[str] = []
        self.failures: list[tuple[int, dict[str, str]]] = []
        """Statuses with which the next requests are answered."""
        self.page = 1_000_000
        self.forgets_pages = False
        self.list_gate = asyncio.Event()
        self.list_gate.set()
        self._watches: set[W] = set()
        self._watched = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    # Life

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Again after stop(), on the same port: a restart of the server, whose etcd has kept everything."""
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._tls)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        self.reset_watches()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # What happens to it

    def reset_watches(self) -> None:
        """Their connections break in the middle."""
        for watch in list(self._watches):
            if watch.request.transport is not None:
                watch.request.transport.abort()
            watch.queue.put_nowait(None)

    def end_watches(self) -> None:
        """They end in good order, as after timeoutSeconds."""
        for watch in list(self._watches):
            watch.queue.put_nowait(None)

    # What tests wait for

    async def asked(self, number: int) -> None:
        """Wait until it has been asked so often in all."""
        async with self._watched:
            await self._watched.wait_for(lambda: len(self.requests) >= number)

    async def watched(self, *plurals: str) -> None:
        """Wait until each of them is being watched."""
        async with self._watched:
            await self._watched.wait_for(lambda: set(plurals) <= {watch.plural for watch in self._watches})

    def watchers(self, plural: str) -> int:
        return sum(watch.plural == plural for watch in self._watches)

    async def connected(self, number: int) -> int:
        """How many connections there are, once that is `number`, or after some seconds."""
        assert self._runner is not None and self._runner.server is not None
        for _ in range(1000):
            if len(self._runner.server.connections) == number:
                break
            await asyncio.sleep(0.01)
        return len(self._runner.server.connections)

    async def _opened(self, watch: W) -> None:
        self._watches.add(watch)
        await self._news()

    async def _news(self) -> None:
        async with self._watched:
            self._watched.notify_all()

    # HTTP

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        self.authorizations.append(request.headers.get("authorization", ""))
        await self._news()
        try:
            if self.failures:
                status, headers = self.failures.pop(0)
                refusal = Refusal(status, "InternalError", "asked to fail")
                return web.json_response(refusal.body, status=status, headers=headers)
            if self.tokens and request.headers.get("authorization", "").removeprefix("Bearer ") not in self.tokens:
                raise Refusal(401, "Unauthorized")
            return await self._answer(request)
        except Refusal as refusal:
            return web.json_response(refusal.body, status=refusal.body["code"])

    @abstractmethod
    async def _answer(self, request: web.Request) -> web.StreamResponse:
        """To somebody who may ask. Raises Refusal."""

    def _check_right(self, plural: str) -> None:
        if plural in self.forbidden:
            raise Refusal(403, "Forbidden", f'{plural} is forbidden: cannot list resource "{plural}"')
