"""What does the mesh do around an ASGI application? It takes up what each request brings, for the calls made in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextvars import Token
from typing import Any
from urllib.parse import quote

from meshlib.inbound import peer as peers
from meshlib.inbound import threads
from meshlib.inbound.admit import Reception, answer_of, seen_by_application, without_params
from meshlib.inbound.body import ReplayedBody
from meshlib.model import Headers, Peer, Request
from meshlib.policy.admission import PROBE, Allow, Deny
from meshlib.policy.observer import Observer, Served, size_of
from meshlib.policy.propagation import REQUEST_ID, Carried, Intake, current, is_grpc

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger("meshlib.inbound")

TOO_LATE = b"upstream request timeout"
"""Envoy's words for a request whose time is over."""
GRPC_TOO_LATE = [
    (b"content-type", b"application/grpc"),
    (b"grpc-status", b"4"),
    (b"grpc-message", TOO_LATE),
]


def nobody() -> None:
    """No observer."""


class MeshASGI:
    """An ASGI application around `app`.

    What a request brings is in force in `app` and in the tasks and threads that it starts. Messages pass through as
    they are, both ways. A request without x-request-id gets one, which the application sees. A request whose deadline
    has passed before the work begins is answered 504 (a gRPC request with DEADLINE_EXCEEDED).

    forward_headers: names of headers to hand on besides trace context. on_serving: called once the application has
    started up, or with the first request where the server tells of no startup; must neither block nor raise.
    reception: who may come in; None admits everybody. The application finds the caller in
      `scope["meshlib.peer"]`, and whom a verified token names in `scope["meshlib.principal"]` and `["meshlib.claims"]`.
    Raises SettingsError for a name in forward_headers that can't be used.
    """

    __slots__ = ("_clock", "_intake", "_is_serving", "_observer", "_on_serving", "_reception", "app")

    def __init__(
        self,
        app: ASGIApp,
        *,
        forward_headers: Iterable[str] = (),
        on_serving: Callable[[], None] | None = None,
        reception: Reception | None = None,
        clock: Callable[[], float] = time.monotonic,
        observer: Callable[[], Observer | None] = nobody,
    ) -> None:
        self.app = app
        self._reception = reception
        self._observer = observer
        self._intake = Intake(forward_headers)
        self._on_serving = on_serving
        self._is_serving = on_serving is None
        self._clock = clock
        threads.install()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        if not self._is_serving:
            self._serving()
        if kind not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        observer = self._observer()
        if observer is None or kind == "websocket":
            await self._serve(scope, receive, send, None, None)
            return
        served = _served(scope, self._clock())
        try:
            await self._serve(scope, _counting(served, receive), _watching(served, send), observer, served)
        except BaseException as error:
            if served.status == 0:
                # What is raised before the head is answered 500 by every server; a cancelled one has nobody to answer.
                served.status, served.flags = (500, "") if isinstance(error, Exception) else (0, "DC")
            raise
        finally:
            served.ended = self._clock()
            if not served.is_probe:
                observer.served(served)

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, observer: Observer | None, served: Served | None
    ) -> None:
        kind = scope["type"]
        if self._reception is not None:
            peer = peers.of_scope(scope)
            body = ReplayedBody(receive)
            verdict = await self._reception.admit_async(request_of(scope), peer, body.take if kind == "http" else None)
            receive = body.receive
            if isinstance(verdict, Deny):
                if served is not None:
                    served.flags, served.reason = verdict.flag, verdict.details
                await _refuse(scope, receive, send, verdict)
                return
            if verdict is PROBE and served is not None:
                served.is_probe = True
            if self._reception.is_enforced:
                scope = _admitted(scope, verdict, peer)
                send = _adding(verdict, send) if verdict.answer else send
        carried = self._intake.take_up(scope["headers"], self._clock, current.get())
        if observer is not None and served is not None and not served.is_probe:
            served.carried = carried
            carried = observer.serving(served) or carried
        if kind == "websocket":
            carried.finish()  # a timeout is for an answer, which a socket that stays open has not
        elif carried.remaining_deadline() is not None:
            if carried.has_expired():
                if served is not None:
                    served.flags = "UT"
                await _answer_too_late(scope, send)
                return
            send = _finishing(carried, send)
        token = current.set(carried)
        try:
            await self.app(_with_request_id(scope, carried), receive, send)
        finally:
            carried.finish()
            _reset(token)

    def _serving(self) -> None:
        self._is_serving = True
        if self._on_serving is not None:
            self._on_serving()

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete" and not self._is_serving:
                self._serving()

        try:
            await self.app(scope, receive, watched)
        except Exception:
            # The application knows no lifespan and servers go on without, or it failed to start and they exit: then
            # its port never answers, and on_serving has nothing to announce.
            if not self._is_serving:
                self._serving()
            raise

    def __repr__(self) -> str:
        return f"<MeshASGI {self.app!r}>"


def request_of(scope: Scope) -> Request:
    """The request, as the caller wrote it."""
    path = scope.get("raw_path")
    if path is None:
        path = quote(scope["path"]).encode("ascii")
    query: bytes = scope.get("query_string", b"")
    headers = Headers(scope["headers"])
    return Request(
        scope.get("method", "GET"),
        scope.get("scheme", "http"),
        (headers.get("host") or "").lower(),
        (path + b"?" + query if query else path).decode("latin-1"),
        headers,
    )


def _admitted(scope: Scope, verdict: Allow, peer: Peer) -> Scope:
    admitted = {
        **scope,
        "headers": seen_by_application(scope["headers"], verdict, peer),
        "query_string": without_params(scope.get("query_string", b""), verdict),
        peers.PEER: peer,
    }
    if verdict.claims is not None:
        admitted |= {peers.PRINCIPAL: verdict.principal, peers.CLAIMS: verdict.claims}
    return admitted


def _adding(verdict: Allow, send: Send) -> Send:
    async def adding(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *verdict.answer]}
        await send(message)

    return adding


async def _refuse(scope: Scope, receive: Receive, send: Send, denied: Deny) -> None:
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})  # the server answers 403
            return
    content_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    status, headers, body = answer_of(denied, content_type)
    kind = "http.response" if scope["type"] == "http" else "websocket.http.response"
    await send({"type": f"{kind}.start", "status": status, "headers": list(headers)})
    await send({"type": f"{kind}.body", "body": body})


def _served(scope: Scope, now: float) -> Served:
    headers = Headers(scope["headers"])
    raw, query = scope.get("raw_path"), scope.get("query_string")
    path = scope["path"] if raw is None else raw.decode("latin-1")
    if query:
        path += f"?{query.decode('latin-1')}"
    served = Served(scope["method"], path, headers, now, f"HTTP/{scope.get('http_version', '1.1')}")
    served.authority = headers.get("host") or ""
    client = scope.get("client")
    if client:
        served.client, served.client_port = client[0], client[1] or 0
    served.peer = peers.of_scope(scope)
    served.request_bytes = size_of(headers)
    return served


def _watching(served: Served, send: Send) -> Send:
    """`send` that counts what goes back. gRPC's status is in the trailers, or in a head without a body."""

    async def watching(message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            served.status = message["status"]
            served.response_bytes += size_of(Headers(headers := list(message.get("headers", ()))))
            served.grpc_status = _grpc_status(headers)
        elif kind == "http.response.body":
            served.response_bytes += len(message.get("body", b""))
        elif kind == "http.response.trailers":
            served.grpc_status = _grpc_status(message.get("headers", ())) or served.grpc_status
        await send(message)

    return watching


def _counting(served: Served, receive: Receive) -> Receive:
    async def counting() -> Message:
        message = await receive()
        kind = message["type"]
        if kind == "http.request":
            served.request_bytes += len(message.get("body", b""))
        elif kind == "http.disconnect" and served.status == 0:
            served.flags = "DC"
        return message

    return counting


def _grpc_status(headers: Iterable[tuple[bytes, bytes]]) -> str:
    return next((value.decode("latin-1") for name, value in headers if name == b"grpc-status"), "")


def _with_request_id(scope: Scope, carried: Carried) -> Scope:
    """The application sees the id that was made for the request, as it would behind Envoy."""
    made = carried.headers[-1]
    if made[0] != REQUEST_ID or made in scope["headers"]:
        return scope
    headers = [pair for pair in scope["headers"] if pair[0] != REQUEST_ID]
    return {**scope, "headers": [*headers, made]}


def _finishing(carried: Carried, send: Send) -> Send:
    """`send` that lifts the deadline with the last part of the response: work after it keeps nobody waiting."""

    async def finishing(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            carried.finish()
        await send(message)

    return finishing


def _reset(token: Token[Carried | None]) -> None:
    try:
        current.reset(token)
    except ValueError:  # a coroutine that a closed loop left behind is finished by the collector, somewhere else
        pass


async def _answer_too_late(scope: Scope, send: Send) -> None:
    _log.info("%s %r: not started, the caller's deadline has passed", scope["method"], scope["path"])
    content_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    if is_grpc(content_type):  # a gRPC client reads its status from a head without a body
        await send({"type": "http.response.start", "status": 200, "headers": GRPC_TOO_LATE})
        await send({"type": "http.response.body", "body": b""})
        return
    length = str(len(TOO_LATE)).encode("ascii")
    headers = [(b"content-type", b"text/plain"), (b"content-length", length)]
    await send({"type": "http.response.start", "status": 504, "headers": headers})
    await send({"type": "http.response.body", "body": TOO_LATE})
