"""How is a Kubernetes API server asked? One request each, lists page by page, watches event by event. Over httpx."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
import msgspec

from meshlib.kube.errors import Gone, KubernetesError, NotFound, Unreachable, error_of
from meshlib.kube.settings import KubeSettings

PAGE = 500
"""Objects a page, as kubectl and client-go ask for."""
REQUEST_TIMEOUT = 60.0
"""Seconds. The API server's own bound for all but watches."""
MAX_EVENT = 32 * 1024 * 1024
"""Bytes of one watch event. etcd keeps no object above some 1.5 MB; a line beyond this is no event."""
JSON = "application/json"
METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"
"""Only what stands under `metadata`: a CRD's schemas are hundreds of kilobytes."""

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Resource:
    """One of the API server's collections. versions: those that we can read, the best first."""

    kind: str
    plural: str
    group: str = ""
    versions: tuple[str, ...] = ("v1",)
    namespaced: bool = True

    def path(self, version: str, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """The URL's path; a namespaced resource without a namespace is that of all namespaces."""
        parts = [f"apis/{self.group}/{version}" if self.group else f"api/{version}"]
        if self.namespaced and namespace:
            parts.append(f"namespaces/{namespace}")
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/" + "/".join(parts)

    def api_version(self, version: str) -> str:
        return f"{self.group}/{version}" if self.group else version

    @property
    def title(self) -> str:
        """`virtualservices.networking.istio.io`, as kubectl writes it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


class Listing(NamedTuple):
    """All objects at one moment. version: the resourceVersion from which a watch goes on."""

    items: list[Object]
    version: str


class Event(NamedTuple):
    """type: ADDED, MODIFIED, DELETED, BOOKMARK."""

    type: str
    object: Object


@dataclass(eq=False, slots=True)
class _Connections:
    """Made with the certificates of one moment. users: requests and watches that are under way on them. is_retired:
    nobody begins on them any more, and who ends last closes them."""

    http: httpx.AsyncClient
    users: int = 0
    is_retired: bool = False


class KubeClient:
    """Speaks to one API server. Belongs to one event loop. Raises KubernetesError's classes, and no others.

    The token is read from its file for each request; certificates are read again once TLS has failed with the old ones.
    The environment's proxies are not used: a pod's API server is never behind one. A kubeconfig's proxy-url is.
    """

    def __init__(self, settings: KubeSettings) -> None:
        self.settings = settings
        self._now: _Connections | None = None
        self._retired: set[_Connections] = set()

    async def __aenter__(self) -> KubeClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        for each in (self._now, *self._retired):
            if each is not None:
                await each.http.aclose()
        self._now = None
        self._retired.clear()

    # One object

    async def get(self, path: str, **params: str) -> Object:
        return await self.request("GET", path, params=params)

    async def create(self, path: str, body: Object) -> Object:
        return await self.request("POST", path, body=body)

    async def replace(self, path: str, body: Object) -> Object:
        """With the body's resourceVersion: raises Conflict when the object has changed since."""
        return await self.request("PUT", path, body=body)

    async def merge(self, path: str, body: Object) -> Object:
        """A JSON merge patch (RFC 7396)."""
        return await self.request("PATCH", path, body=body, content_type="application/merge-patch+json")

    async def apply(
        self, path: str, body: Object, *, manager: str, force: bool = True, dry_run: bool = False
    ) -> Object:
        """Server-side apply: what `body` says is `manager`'s from now on."""
        params = {"fieldManager": manager, "force": str(force).lower(), **({"dryRun": "All"} if dry_run else {})}
        return await self.request("PATCH", path, body=body, params=params, content_type="application/apply-patch+yaml")

    async def delete(self, path: str) -> None:
        """One that is not there is as good as deleted."""
        with contextlib.suppress(NotFound):
            await self.request("DELETE", path)

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Object | None = None,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        accept: str = JSON,
    ) -> Object:
        content = msgspec.json.encode(body) if body is not None else None
        headers = self._headers(accept) | ({"content-type": content_type} if content is not None else {})
        async with self._connected(method, path) as http:
            response = await http.request(
                method, path, params=dict(params or {}), content=content, headers=headers, extensions=self._extensions()
            )
        return _answer(response, f"{method} {path}")

    # Many

    async def list(self, path: str, *, accept: str = JSON, **params: str) -> Listing:
        """Every object, page by page, all of the same moment. Raises Gone only if the server forgets faster than the
        pages come even without pages. accept: JSON or METADATA."""
        limit = PAGE
        while True:
            try:
                return await self._pages(path, params, limit, accept)
            except Gone:
                # The token for the next page has expired: once more, and all in one, as client-go's pager does.
                if not limit:
                    raise
                limit = 0

    async def _pages(self, path: str, params: Mapping[str, str], limit: int, accept: str) -> Listing:
        items: list[Object] = []
        token = ""
        while True:
            query = {**params, **({"limit": str(limit)} if limit else {}), **({"continue": token} if token else {})}
            page = await self.request("GET", path, params=query, accept=accept)
            found = page.get("items") or []
            metadata = page.get("metadata") or {}
            # Items of a list bear no kind; whoever reads one alone needs it.
            kind, version = str(page.get("kind", "")).removesuffix("List"), str(page.get("apiVersion", ""))
            items += [{"apiVersion": version, "kind": kind, **item} for item in found]
            token = str(metadata.get("continue") or "")
            if not token:
                return Listing(items, str(metadata.get("resourceVersion") or ""))

    async def watch(
        self, path: str, version: str, *, seconds: float, silence: float, accept: str = JSON, **params: str
    ) -> AsyncGenerator[Event, None]:
        """What has happened since `version`, until the server ends it, which it does after `seconds`.

        silence: seconds without a word after which the connection counts as dead. Raises Gone when the server no
        longer knows `version`; close the iterator (contextlib.aclosing) to end it early.
        """
        query = {
            **params,
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(int(seconds)),
        }
        where = f"watch {path}"
        headers = self._headers(accept.replace("MetadataList", "Metadata"))
        async with (
            self._connected("watch", path) as http,
            http.stream(
                "GET",
                path,
                params=query,
                headers=headers,
                timeout=httpx.Timeout(REQUEST_TIMEOUT, read=silence),
                extensions=self._extensions(),
            ) as response,
        ):
            if response.status_code != 200:
                await response.aread()
                _answer(response, where)
            async for line in _lines(response):
                yield _event(line, where)

    def _headers(self, accept: str) -> dict[str, str]:
        authorization = self.settings.authorization()
        return {"accept": accept, **({"authorization": authorization} if authorization else {})}

    def _extensions(self) -> dict[str, Any]:
        name = self.settings.server_name
        return {"trace": _Handshake().follow, **({"sni_hostname": name} if name else {})}

    def _made(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.settings.server,
            verify=self.settings.tls() if self.settings.server.startswith("https:") else True,
            timeout=REQUEST_TIMEOUT,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),  # each watch holds one
            trust_env=False,
            proxy=self.settings.proxy or None,
            headers={"user-agent": "meshlib"},
        )

    @contextlib.asynccontextmanager
    async def _connected(self, method: str, path: str) -> AsyncIterator[httpx.AsyncClient]:
        """For one request or watch; httpx's errors become ours."""
        if self._now is None:
            self._now = _Connections(self._made())
        used = self._now
        used.users += 1
        try:
            yield used.http
        except httpx.HTTPError as error:
            if "certificate" in str(error).lower():  # the CA or our certificate may have been rotated
                self._retire(used)
            what = str(error) or type(error).__name__
            raise Unreachable(f"{method} {self.settings.server}{path}: {what}") from error
        finally:
            used.users -= 1
            if used.is_retired and not used.users:
                self._retired.discard(used)
                await used.http.aclose()

    def _retire(self, used: _Connections) -> None:
        used.is_retired = True
        self._retired.add(used)
        if self._now is used:
            self._now = None

    def __repr__(self) -> str:
        return f"<KubeClient {self.settings.server}>"


class _Handshake:
    """httpcore leaves a connection open when its TLS handshake is cancelled, until the garbage collector finds it. By
    httpx's `trace` extension of one request, whose connection this is."""

    def __init__(self) -> None:
        self._connection: Any = None

    async def follow(self, event: str, info: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            self._connection = info["return_value"]
        elif event.startswith("connection.start_tls."):
            if event.endswith(".failed") and self._connection is not None:
                await self._connection.aclose()
            if not event.endswith(".started"):
                self._connection = None


def _answer(response: httpx.Response, where: str) -> Object:
    try:
        body = msgspec.json.decode(response.content) if response.content else {}
    except msgspec.DecodeError as error:
        if response.status_code < 300:
            raise KubernetesError(f"{where}: the answer is no JSON: {error}", status=response.status_code) from None
        body = {"message": response.text[:200]}
    if response.status_code >= 300:
        raise error_of(response.status_code, body, where, response.headers.get("retry-after", ""))
    if not isinstance(body, dict):
        raise KubernetesError(f"{where}: the answer is no object", status=response.status_code)
    return body


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """At newlines only: httpx's own reader splits at characters that stand unescaped in JSON's strings."""
    parts: list[bytes] = []
    size = 0
    async for chunk in response.aiter_bytes():
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield b"".join((*parts, line))
            parts, size = [], 0
        parts.append(rest)
        size += len(rest)
        if size > MAX_EVENT:
            raise Unreachable(f"a watch event of more than {MAX_EVENT} bytes")
    # What stands after the last newline is half an event: the connection broke, and the next watch brings it whole.


def _event(line: bytes, where: str) -> Event:
    try:
        found = msgspec.json.decode(line)
        kind, given = found["type"], found["object"]
        if not isinstance(given, dict):
            raise TypeError
    except (msgspec.DecodeError, TypeError, KeyError):
        raise Unreachable(f"{where}: no event: {line[:100]!r}") from None
    if kind == "ERROR":
        raise error_of(int(given.get("code") or 500), given, where)
    return Event(str(kind), given)
