"""How do people and meshctl talk to the control plane? The admin API: HTTP on loopback, HTTPS elsewhere.

Who may come, and do what, is decided in gate.py. Requests that change something must be `application/yaml` besides: a
page of another origin may send that only after a preflight, and there is no CORS answer here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Collection, Generator, Mapping
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.access_rules import Powers, Role
from meshlib.controlplane.administrators import Administrators, certificate_of
from meshlib.controlplane.audit import AuditLog, redacted
from meshlib.controlplane.gate import JSON, READ_ONLY, Gate, SignIn, admission_of
from meshlib.controlplane.monitoring import health_routes
from meshlib.controlplane.sources import ObjectStore, StateError, UnknownKind, problem_of
from meshlib.version import __version__

logger = logging.getLogger("meshlib.controlplane.admin")

BODY_LIMIT = 8 * 1024 * 1024
"""Bytes. etcd refuses objects of more than 1.5 MB; a folder applied at once is several of them."""


def admin_app(
    store: ObjectStore,
    view: api.MeshView,
    *,
    allowed_hosts: Collection[str] = (),
    routes: Collection[Route] = (),
    administrators: Administrators | None = None,
    audit: AuditLog | None = None,
    is_loopback: bool = True,
    is_read_only: bool = False,
) -> Starlette:
    """The admin API over this store and this view of the mesh. allowed_hosts: Host names besides loopback's. routes:
    further ones, under the same guard. administrators: None lets anybody be one: for loopback only. is_read_only:
    whether objects can't be applied or deleted here: 409."""
    administrators = Administrators() if administrators is None else administrators

    async def version(request: Request) -> Response:
        return JSON(api.Version(__version__))

    async def objects(request: Request) -> Response:
        query = query_of(request, "kind", "namespace", "name")
        found = await run_in_threadpool(
            store.stored, kind=query["kind"], namespace=query["namespace"], name=query["name"]
        )
        powers = admission_of(request).powers
        return JSON(api.Objects(tuple(_shown(each, powers) for each in found if powers.sees(each.namespace))))

    async def problems(request: Request) -> Response:
        powers = admission_of(request).powers
        found = [*(problem_of(problem) for problem in store.problems()), *view.problems()]
        if (access := administrators.access) is not None and access.problem:
            reason = f"{access.problem.removeprefix(f'{access.file}: ')}; the rules of before stay in force"
            found.append(api.Problem(str(access.file), "", "", reason))
        return JSON(api.Problems(tuple(each for each in found if powers.sees(namespace_of(each.object)))))

    async def clients(request: Request) -> Response:
        powers = admission_of(request).powers
        return JSON(api.Clients(tuple(each for each in view.clients() if powers.sees(each.namespace))))

    async def endpoints(request: Request) -> Response:
        query = query_of(request, "namespace", "name")
        powers = admission_of(request).powers
        return JSON(
            api.Endpoints(
                tuple(
                    service
                    for service in view.endpoints()
                    if query["namespace"] in ("", service.namespace)
                    and query["name"] in ("", service.name)
                    and powers.sees(service.namespace)
                )
            )
        )

    def demand_writable() -> None:
        if is_read_only:
            raise HTTPException(409, READ_ONLY)

    async def apply(request: Request) -> Response:
        demand_writable()
        query = query_of(request, "source", "namespace")
        text = await yaml_body(request)
        source, namespace = query["source"] or "admin API", query["namespace"] or "default"
        who = admission_of(request)
        applied = await run_in_threadpool(
            store.apply, text, source, namespace=namespace, by=who.actor, check=who.check("apply")
        )
        return _results(applied)

    async def delete(request: Request) -> Response:
        demand_writable()
        query = query_of(request, "source", "kind", "namespace", "name")
        text = await yaml_body(request)
        namespace, who = query["namespace"] or "default", admission_of(request)
        if query["kind"] or query["name"]:
            if not (query["kind"] and query["name"]) or text.strip():
                raise HTTPException(400, "either kind and name, or a body with the objects to delete")
            deleted = await run_in_threadpool(
                store.delete_named, query["kind"], namespace, query["name"], by=who.actor, check=who.check("delete")
            )
            return _results(deleted)
        source = query["source"] or "admin API"
        deleted = await run_in_threadpool(
            store.delete, text, source, namespace=namespace, by=who.actor, check=who.check("delete")
        )
        return _results(deleted)

    async def failure(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSON(api.Failure(error.detail), status_code=error.status_code, headers=error.headers)

    async def unknown_kind(request: Request, error: Exception) -> Response:
        return JSON(api.Failure(str(error)), status_code=404)

    async def not_kept(request: Request, error: Exception) -> Response:
        logger.error("%s", error)
        return JSON(api.Failure(str(error)), status_code=507)

    return Starlette(
        routes=[
            *health_routes(view.is_ready),
            Route("/version", version),
            Route("/v1/objects", objects),
            Route("/v1/problems", problems),
            Route("/v1/clients", clients),
            Route("/v1/endpoints", endpoints),
            Route("/v1/apply", apply, methods=["POST"]),
            Route("/v1/delete", delete, methods=["POST"]),
            *SignIn(administrators, audit, is_read_only=is_read_only).routes(),
            *routes,
        ],
        middleware=[
            Middleware(Gate, administrators=administrators, hosts=allowed_hosts, is_loopback=is_loopback, audit=audit)
        ],
        exception_handlers={HTTPException: failure, UnknownKind: unknown_kind, StateError: not_kept},
    )


def namespace_of(title: str) -> str:
    """`VirtualService default/reviews` -> `default`; "" where there is no object, so that nobody but who sees all
    namespaces is told."""
    return title.partition(" ")[2].partition("/")[0] if "/" in title else ""


def _shown(stored: api.StoredObject, powers: Powers) -> api.StoredObject:
    """Credentials in headers are for those who may write them; a Secret's values are nobody's."""
    if stored.kind != "Secret" and powers.has(Role.OPERATOR, stored.namespace):
        return stored
    return msgspec.structs.replace(stored, yaml=redacted(stored.yaml))


def _results(results: api.Results) -> Response:
    return JSON(results, status_code=422 if results.problems else 200)


def query_of(request: Request, *names: str) -> Mapping[str, str]:
    """The named query parameters, "" for those left out. An unknown one is a mistake worth an answer."""
    unknown = set(request.query_params) - set(names)
    if unknown:
        raise HTTPException(400, f"unknown parameter {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    return {name: request.query_params.get(name, "") for name in names}


def check_yaml(request: Request) -> None:
    """Whether a request that changes something is of a type that no web page can send without being asked."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != api.YAML:
        raise HTTPException(415, f"content-type must be {api.YAML}, not {content_type or 'missing'}")


async def yaml_body(request: Request) -> str:
    """The body of a request that brings objects. Raises HTTPException: 400, 413, 415."""
    check_yaml(request)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT:
            # Closed, since the server would go on to read, and throw away, what is still coming.
            raise HTTPException(413, f"the body is larger than {BODY_LIMIT} bytes", {"connection": "close"})
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"the body is not UTF-8: {error}") from None


class _Server(uvicorn.Server):
    """uvicorn inside somebody else's process: signals are the process's own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class _Protocol(H11Protocol):
    """HTTP that tells the application which certificate the client has proven."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        certificate = certificate_of(transport.get_extra_info("ssl_object"))
        self.app_state = {**self.app_state, "certificate": certificate}


class AdminServer:
    """Serves an ASGI app on one address until stop(). Port 0 takes a free one; `url` says which. tls: None is plain
    HTTP.

    start() raises OSError when the address is taken.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._host, self._port, self._tls = host, port, tls
        config = uvicorn.Config(
            app,
            http=_Protocol,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )
        config.load()
        config.ssl = tls
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None

    async def start(self) -> None:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listening = socket.create_server((self._host, self._port), family=family, backlog=128)
        listening.setblocking(False)
        # asyncio switches Nagle's algorithm off only for sockets it has made itself; with it an answer waits 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = listening
        self._port = listening.getsockname()[1]
        # It accepts from here on: connections wait in the backlog until uvicorn's loop turns.
        self._serving = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listening]), name="admin")

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
            self._serving = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @property
    def port(self) -> int:
        return self._port

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'http' if self._tls is None else 'https'}://{host}:{self._port}"
