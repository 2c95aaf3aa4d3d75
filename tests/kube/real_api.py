"""A real API server behind a proxy on loopback, which does at a test's word what a server does now and then.

Everything that is read and written, and every watch, is the real server's. The proxy adds what can't be had from it at
a moment of one's choice: resets, ended watches, lost history, refusals, slow lists, bookmarks, and being away. It
speaks plain HTTP and asks as the cluster's administrator. The same methods as kube.api_server.ApiServer, so that the
same tests run on both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import yaml
from aiohttp import web

from kube.front import Front, Refusal
from kube.real_cluster import RealCluster

Object = dict[str, Any]
_HOP_BY_HOP = ("connection", "content-length", "transfer-encoding", "content-encoding", "date", "server")


@dataclass(eq=False)
class _Watch:
    plural: str
    request: web.Request
    queue: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)


class RealApi(Front[_Watch]):
    """`async with RealApi(cluster) as api:` serves on 127.0.0.1 until the end. See kube.api_server.ApiServer."""

    def __init__(self, cluster: RealCluster) -> None:
        super().__init__()
        self.cluster = cluster
        self.revision = 0
        """Of what was last written through this object; others write too."""
        self._compacted = 0
        self._http: httpx.AsyncClient | None = None

    # Life

    async def start(self) -> None:
        self._http = httpx.AsyncClient(
            base_url=self.cluster.url,
            verify=self.cluster.settings().tls(),
            trust_env=False,
            timeout=None,
            limits=httpx.Limits(max_connections=None),
        )
        await super().start()

    async def stop(self) -> None:
        await super().stop()
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    # What happens to it

    def compact(self) -> None:
        self._compacted = self.revision

    def bookmark(self) -> str:
        place = self.cluster.find_collection("configmaps")
        listed = self.cluster.ask("GET", place.path("v1"), limit="1")
        version = str(listed["metadata"]["resourceVersion"])
        for watch in self._watches:
            found = self.cluster.find_collection(watch.plural)
            group = f"{found.group}/" if found.group else ""
            about = {"kind": found.kind, "apiVersion": group + found.versions[0]}
            self._tell(watch, {"type": "BOOKMARK", "object": {**about, "metadata": {"resourceVersion": version}}})
        return version

    def restore(self, revision: int) -> None:
        import pytest

        pytest.skip("a real etcd does not go back in time at a test's word")

    def tell(self, plural: str, event: Object) -> None:
        for watch in self._watches:
            if watch.plural == plural:
                self._tell(watch, event)

    def _tell(self, watch: _Watch, event: Object) -> None:
        watch.queue.put_nowait(json.dumps(event).encode() + b"\n")

    # Objects, for tests

    def put(self, given: Object) -> Object:
        made = self.cluster.put(given)
        self.revision = int(made["metadata"]["resourceVersion"])
        return made

    def put_all(self, text: str) -> None:
        for given in yaml.safe_load_all(text):
            if given:
                self.put(given)

    def remove(self, plural: str, name: str, namespace: str = "default") -> None:
        place = self.cluster.find_collection(plural)
        self.cluster.remove(place.kind, name, namespace, place.group)

    def find(self, plural: str, name: str, namespace: str = "default") -> Object | None:
        place = self.cluster.find_collection(plural)
        return self.cluster.find(place.kind, name, namespace, place.group)

    def everything(self) -> dict[tuple[str, str, str], Object]:
        return self.cluster.everything()

    # HTTP

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._served(request)
        except httpx.HTTPError:
            if request.transport is not None:
                request.transport.abort()
            raise

    async def _served(self, request: web.Request) -> web.StreamResponse:
        plural = _plural(request.path)
        self._check_right(plural)
        if request.query.get("watch") in ("true", "1"):
            if int(request.query.get("resourceVersion") or 0) < self._compacted:
                raise Refusal(410, "Expired", "too old resource version")
            return await self._watch(request, plural)
        if request.query.get("continue") and self.forgets_pages:
            raise Refusal(410, "Expired", "The provided continue parameter is too old")
        query = dict(request.query)
        if request.method == "GET":
            await self.list_gate.wait()
            if "limit" in query:
                query["limit"] = str(min(int(query["limit"]), self.page))
        async with self._asked(request, query) as answer:
            return web.Response(body=await answer.aread(), status=answer.status_code, headers=_passed_on(answer))

    @contextlib.asynccontextmanager
    async def _asked(self, request: web.Request, query: dict[str, str]) -> AsyncIterator[httpx.Response]:
        assert self._http is not None
        sent = {
            name: value for name, value in request.headers.items() if name.lower() in ("accept", "content-type")
        } | {"accept-encoding": "identity"}
        body = await request.read()
        async with self._http.stream(request.method, request.path, params=query, content=body, headers=sent) as answer:
            yield answer

    async def _watch(self, request: web.Request, plural: str) -> web.StreamResponse:
        async with self._asked(request, dict(request.query)) as answer:
            if answer.status_code != 200:
                return web.Response(body=await answer.aread(), status=answer.status_code, headers=_passed_on(answer))
            response = web.StreamResponse(headers=_passed_on(answer))
            response.enable_chunked_encoding()
            await response.prepare(request)
            watch = _Watch(plural, request)
            reading = asyncio.create_task(_read(answer, watch.queue))
            try:
                await self._opened(watch)
                while (line := await watch.queue.get()) is not None:
                    await response.write(line)
            except ConnectionError:
                pass
            finally:
                self._watches.discard(watch)
                reading.cancel()
                await asyncio.wait((reading,))
            return response

    def __repr__(self) -> str:
        return f"<RealApi {self.url} {self.cluster!r}>"


async def _read(answer: httpx.Response, queue: asyncio.Queue[bytes | None]) -> None:
    """Line by line: what a test tells in between must not stand in the middle of one."""
    rest = b""
    try:
        async for chunk in answer.aiter_raw():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                queue.put_nowait(line + b"\n")
    except httpx.HTTPError:
        pass
    queue.put_nowait(None)


def _plural(path: str) -> str:
    """Of the collection that is asked for, also where one object is."""
    parts = path.strip("/").split("/")
    rest = parts[3:] if parts[0] == "apis" else parts[2:]
    if rest[:1] == ["namespaces"] and len(rest) >= 3 and rest[2] not in ("status", "finalize"):
        rest = rest[2:]
    return rest[0] if rest else ""


def _passed_on(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
