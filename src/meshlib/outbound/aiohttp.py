"""How does an aiohttp call go through the mesh? A client middleware, between the session and its own connector.

The session keeps what is its own: cookies, redirects, tracing, its connector and its limits. A copy of the request is
sent for each attempt, to the endpoint's address; Host, SNI and `response.url` stay what the caller wrote. The cluster
is part of a connection's key, so services behind one address share none, and a connection that the destination's rules
have outlived is closed before anything is sent on it.
"""

from __future__ import annotations

import asyncio
import copy
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache, partial
from http import HTTPStatus
from inspect import signature
from typing import Any, Protocol

import aiohttp
from aiohttp.base_protocol import BaseProtocol
from aiohttp.helpers import BaseTimerContext
from aiohttp.streams import StreamReader
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from meshlib.identity.tls import NoCredentials, TlsContexts
from meshlib.model import PASSTHROUGH, ConnectionLimits, Endpoint, Headers, Outcome, Request
from meshlib.outbound.connections import KEEPALIVE, is_readable, may_serve, socket_options
from meshlib.outbound.drive import drive_async
from meshlib.outbound.mirrors import AsyncMirrors
from meshlib.outbound.raising import failed
from meshlib.outbound.tls import secured
from meshlib.outbound.wire import RawHeaders, apply
from meshlib.policy import propagation
from meshlib.policy.call import CallContext, outbound_call
from meshlib.policy.observer import Call
from meshlib.policy.retry import CLIENT_TIMEOUT, CONNECT_FAILURE, LOCAL, RESET, TIMEOUT
from meshlib.policy.steps import Deliver, Flow, Reply, Send

Handler = Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]]
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})  # RFC 9110, 9.2.2


class Home(Protocol):
    """What the middleware needs of its Mesh. tls: what connections are secured with. call_context: for each call.
    resolve_async: waits, bounded, until the feed has answered for an authority."""

    @property
    def tls(self) -> TlsContexts: ...
    def call_context(self, deadline: float | None, may_resend: bool) -> CallContext: ...
    async def resolve_async(self, authority: str) -> None: ...


class _Outlived(Exception):
    """The connection that aiohttp chose may take no more requests; nothing was sent on it."""


class _Life:
    """What is known of a connection: when it was opened, how much it has served, since when it is idle."""

    __slots__ = ("idle_since", "opened", "served")

    def __init__(self, now: float) -> None:
        self.opened = self.idle_since = now
        self.served = 0

    def rest(self) -> None:
        self.idle_since = time.monotonic()


class _Attempt:
    """Where one attempt's request goes, and what is seen of its connection."""

    __slots__ = ("begun", "call", "cluster", "deadline", "limits", "lives", "reused", "timeout")

    def __init__(
        self,
        cluster: str,
        limits: ConnectionLimits,
        lives: weakref.WeakKeyDictionary[Any, _Life],
        seconds: float | None,
        call: Call | None,
    ) -> None:
        self.cluster, self.limits, self.lives, self.call = cluster, limits, lives, call
        self.deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
        self.begun = self.reused = False
        self.timeout: asyncio.Timeout | None = None

    def connected(self, connection: Any) -> None:
        """Before the first byte. Raises _Outlived."""
        now = time.monotonic()
        life = self.lives.get(connection.protocol)
        self.reused = life is not None
        if life is None:
            life = self.lives[connection.protocol] = _Life(now)
            set_options(connection.transport, self.limits)
        else:
            idle = KEEPALIVE if self.limits.idle_timeout is None else self.limits.idle_timeout
            if now - life.idle_since > idle or not may_serve(self.limits, life.served, life.opened, now):
                raise _Outlived
            if is_readable(connection.transport.get_extra_info("socket")):
                raise _Outlived  # the server has closed it; the loop has only not heard of it yet
        life.served += 1
        if not may_serve(self.limits, life.served, life.opened, now):
            connection.protocol.force_close()  # after this request, which is its last
        connection.add_callback(life.rest)
        self.begun = True
        if self.timeout is not None:
            self.timeout.reschedule(self.deadline)  # until here it was the time to connect in


def set_options(transport: Any, limits: ConnectionLimits) -> None:
    sock: Any = None if transport is None else transport.get_extra_info("socket")
    for option in socket_options(limits) if sock is not None else ():
        sock.setsockopt(*option)


@lru_cache(maxsize=16)
def _routed(kind: type[aiohttp.ClientRequest]) -> type[Any]:
    """The session's class of requests, for requests that go to an endpoint."""

    class Routed(kind):  # type: ignore[misc, valid-type]
        mesh_attempt: _Attempt

        @property
        def connection_key(self) -> Any:
            # The field is free: a request to an endpoint has no proxy.
            return super().connection_key._replace(proxy_headers_hash=self.mesh_attempt.cluster)

        async def send(self, conn: Any) -> Any:
            self.mesh_attempt.connected(conn)
            return await super().send(conn)

        async def write_bytes(self, writer: Any, *rest: Any) -> None:
            call, write = self.mesh_attempt.call, writer.write
            if call is not None and "content-length" not in self.headers:

                def counted(chunk: Any, *options: Any, **named: Any) -> Any:
                    call.sent(len(chunk))
                    return write(chunk, *options, **named)

                writer.write = counted
            await super().write_bytes(writer, *rest)

    return Routed


class _Bounds(BaseTimerContext):
    """In the place of a body's timer, which it asks: how long each read may take. call: is told what comes."""

    __slots__ = ("_timer", "call", "deadline", "endpoint", "idle")

    def __init__(
        self, timer: Any, deadline: float | None, idle: float | None, endpoint: Endpoint | None, call: Call | None
    ) -> None:
        self._timer, self.deadline, self.idle, self.endpoint, self.call = timer, deadline, idle, endpoint, call

    def __enter__(self) -> BaseTimerContext:
        self._timer.__enter__()
        return self

    def __exit__(self, *exit: Any) -> Any:
        return self._timer.__exit__(*exit)

    def assert_timeout(self) -> None:
        self._timer.assert_timeout()

    def next(self) -> tuple[float | None, bool]:
        """Seconds for the next read, and whether it is the idle timeout that bounds it."""
        left = None if self.deadline is None else self.deadline - time.monotonic()
        if self.idle is not None and (left is None or self.idle < left):
            return self.idle, True
        return left, False

    def blamed(self, error: Exception) -> Exception:
        failure, flag = (CLIENT_TIMEOUT, "DC") if isinstance(error, TimeoutError) else (RESET, "UC")
        return failed(error, failure, flag, "while the response's body was read", self.endpoint)


class _Body(StreamReader):
    """A response's body under the route's deadline and idle timeout; its errors are MeshErrors, too. It has the very
    layout of aiohttp's, whose object becomes one; what is ours is in its timer."""

    __slots__ = ()

    async def _wait(self, func_name: str) -> None:
        bounds: Any = self._timer
        seconds, is_idle = bounds.next()
        bound = asyncio.timeout(seconds)
        try:
            async with bound:
                await super()._wait(func_name)
        except TimeoutError as error:
            if not bound.expired():
                raise bounds.blamed(error) from error.__cause__
            which = "idle timeout passed between two reads" if is_idle else "timeout passed"
            late = aiohttp.SocketTimeoutError("the response is late")
            told = f"the route's {which} while the response's body was read"
            raise failed(late, TIMEOUT, "UT", told, bounds.endpoint) from None

    def feed_data(self, data: bytes, *size: Any) -> Any:
        bounds: Any = self._timer
        if bounds.call is not None:
            bounds.call.received(len(data))
        return super().feed_data(data, *size)

    def set_exception(self, exc: Any, *cause: Any) -> None:
        bounds: Any = self._timer
        super().set_exception(bounds.blamed(exc) if isinstance(exc, Exception) else exc, *cause)


class _Exchange:
    """One call in aiohttp's terms (outbound/drive.AsyncExchange)."""

    __slots__ = (
        "_begun",
        "_call",
        "_carried",
        "_endpoint",
        "_error",
        "_failure",
        "_is_replayable",
        "_response",
        "handler",
        "middleware",
        "request",
        "view",
    )

    def __init__(self, middleware: MeshMiddleware, request: aiohttp.ClientRequest, handler: Handler) -> None:
        self.middleware, self.request, self.handler = middleware, request, handler
        self._carried = carried = propagation.current.get()
        own = _View(request.headers)
        url = request.url
        self.view = Request(
            request.method,
            url.scheme,
            url.raw_authority.rpartition("@")[2].lower(),
            url.raw_path_qs,
            own if carried is None else propagation.CarryingHeaders(own, carried),
        )
        body = request.body
        self._is_replayable = not body or isinstance(body, aiohttp.BytesPayload)
        self._begun = False
        self._call: Call | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._endpoint: Endpoint | None = None
        self._error: Exception | None = None
        self._failure = ""

    def flow(self) -> Flow:
        deadline = None if self._carried is None else self._carried.remaining_deadline()
        # A request with an Idempotency-Key may reach the server twice: that is what the key is for
        # (draft-ietf-httpapi-idempotency-key-header).
        may_resend = self.view.method not in _IDEMPOTENT and "Idempotency-Key" in self.request.headers
        context = self.middleware.home.call_context(deadline, may_resend)
        self._call = context.call
        return outbound_call(self.view, context)

    def _routed(self, step: Send, attempt: _Attempt) -> aiohttp.ClientRequest:
        made: Any = copy.copy(self.request)
        made.__dict__.pop("_ClientRequest__writer", None)  # one attempt's writer is not the next one's
        kind: Any = type(self.request)
        made.__class__ = _routed(kind)
        made.mesh_attempt = attempt
        headers = made.headers = CIMultiDict(made.headers)
        if self._carried is not None or step.timeout is not None or step.headers:
            raw: RawHeaders = [(name.encode("utf-8"), value.encode("utf-8")) for name, value in headers.items()]
            if self._carried is not None or step.timeout is not None:
                raw += propagation.outbound_headers(self._carried, Headers(raw), step.timeout)
            if step.headers:
                raw = apply(step.headers, raw)
            headers = made.headers = CIMultiDict((_text(name), _text(value)) for name, value in raw)
        if step.authority is not None:
            headers["Host"] = step.authority
        url: URL = made.url
        if step.cluster.name == PASSTHROUGH and step.path is None:
            return made  # type: ignore[no-any-return]  # where it says, by the session's proxy if it has one
        cluster = step.cluster.cluster
        security = None
        if cluster.tls is not None:
            security = secured(self.middleware.home.tls, cluster, step.endpoint, url.raw_host or "", False)
        scheme = url.scheme
        if security is not None:
            scheme, (made._ssl, made.server_hostname) = "https", security
        elif made.is_ssl():
            made.server_hostname = made.server_hostname or url.raw_host
        path = url.raw_path_qs if step.path is None else step.path
        made.url = URL(f"{scheme}://{step.endpoint.authority}{path}", encoded=True)
        made.proxy = made.proxy_auth = made.proxy_headers = None
        return made  # type: ignore[no-any-return]

    async def send(self, step: Send) -> Outcome:
        await self.release()
        self._endpoint, self._error = step.endpoint, None
        cluster = step.cluster.cluster
        attempt = _Attempt(step.cluster.name, cluster.limits, self.middleware.lives, step.timeout, self._call)
        connecting = cluster.connect_timeout if step.timeout is None else min(cluster.connect_timeout, step.timeout)
        resendable = self._is_replayable and self.view.method in _IDEMPOTENT
        while True:
            attempt.begun = False
            attempt.timeout = bound = asyncio.timeout(connecting)
            try:
                routed = self._routed(step, attempt)
                async with bound:
                    response = await self.handler(routed)
                break
            except _Outlived:
                continue
            except Exception as error:
                self._begun = self._begun or attempt.begun
                failure = LOCAL if isinstance(error, NoCredentials) else _classified(error, attempt.begun)
                if failure == RESET and attempt.reused and resendable:
                    continue  # it was dead, which only sending could show
                if bound.expired():
                    failure = TIMEOUT if attempt.begun or connecting == step.timeout else CONNECT_FAILURE
                    error = aiohttp.ConnectionTimeoutError(f"no answer of {step.endpoint.authority} in time")
                elif failure == CONNECT_FAILURE and not isinstance(error, aiohttp.ClientError):
                    # TLS files that can't be read
                    told = error if isinstance(error, OSError) else OSError(str(error))
                    key: Any = self.request.connection_key
                    wrapped = aiohttp.ClientConnectorError(key, told)
                    wrapped.__cause__ = error
                    error = wrapped
                self._error, self._failure = error, failure
                return Outcome(None, None, failure, self._is_replayable or not self._begun)
        self._begun = True
        self._response = response
        return Outcome(response.status, _View(response.headers), "", self._is_replayable)

    async def release(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.close()

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def resolve(self, authority: str) -> None:
        await self.middleware.home.resolve_async(authority)

    def another(self) -> _Exchange | None:
        return _Exchange(self.middleware, self.request, self.handler) if self._is_replayable else None

    def mirror(self, flow: Flow) -> bool:
        other = self.another()
        if other is None:  # a body that can be sent once goes to the server that matters
            return False

        async def run() -> None:
            (await drive_async(flow, other)).close()

        return self.middleware.mirrors.start(f"{self.view.method} {self.request.url}", run)

    def reply(self, step: Reply) -> aiohttp.ClientResponse:
        request: Any = self.request
        body = b"" if self.view.method == "HEAD" else step.body
        made: Any = request.response_class(
            request.method,
            request.original_url,
            writer=None,
            continue100=None,
            timer=request._timer,
            request_info=request.request_info,
            traces=request._traces,
            loop=request.loop,
            session=request.session,
            **_WRITER,
        )
        made.version, made.status, made.reason = aiohttp.HttpVersion11, step.status, _phrase(step.status)
        lines = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in step.headers]
        lines.append((b"Content-Length", str(len(step.body)).encode()))
        _set_headers(made, lines)
        content = StreamReader(BaseProtocol(request.loop), 2**16, loop=request.loop)
        content.feed_data(body)
        content.feed_eof()
        made.content = content
        made.extensions = {"meshlib.flag": step.flag, "meshlib.reason": step.reason}
        return made  # type: ignore[no-any-return]

    def deliver(self, step: Deliver, flow: Flow) -> aiohttp.ClientResponse:
        response: Any = self._response
        self._response = None
        if response is None:
            flow.close()
            assert self._error is not None
            error = self._error
            raise failed(error, self._failure, step.flag, step.reason, self._endpoint) from error.__cause__
        if step.headers:
            _set_headers(response, apply(step.headers, list(response.raw_headers)))
        response.extensions = {"meshlib.flag": step.flag, "meshlib.reason": step.reason}
        content = response.content
        if self._call is not None and (arrived := getattr(content, "_size", 0)):
            self._call.received(arrived)
        if type(content) is StreamReader:
            bounds = _Bounds(content._timer, step.deadline, step.idle_timeout, self._endpoint, self._call)
            content._timer = bounds
            content.__class__ = _Body
            if isinstance(broken := content.exception(), Exception):
                content._exception = bounds.blamed(broken)
        if response.connection is None:  # the body is there already
            next(flow, None)
        else:
            response.connection.add_callback(partial(next, flow, None))
        return response  # type: ignore[no-any-return]


class _Unsent:
    output_size = 0


# aiohttp asks for it from 3.14 on, and takes none before.
_WRITER = {"stream_writer": _Unsent()} if "stream_writer" in signature(aiohttp.ClientResponse).parameters else {}


class _View:
    """A HeaderView over aiohttp's headers."""

    __slots__ = ("_headers",)

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers: Any = headers

    @property
    def raw(self) -> RawHeaders:
        """For whoever measures, at the end of a call; made anew each time."""
        return [(_bytes(name), _bytes(value)) for name, value in self._headers.items()]

    def get(self, name: str, /) -> str | None:
        found = self._headers.getall(name, None)
        return None if found is None else ", ".join(found)

    def __contains__(self, name: str) -> bool:
        return name in self._headers


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _bytes(value: str) -> bytes:
    return value.encode("utf-8", "surrogateescape")


def _set_headers(response: Any, lines: RawHeaders) -> None:
    headers = CIMultiDict((_text(name), _text(value)) for name, value in lines)
    response._headers, response._raw_headers = CIMultiDictProxy(headers), tuple(lines)
    response._raw_cookie_headers = tuple(headers.getall("Set-Cookie", ())) or None
    response._cache.clear()


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _classified(error: Exception, begun: bool) -> str:
    """The core's name of a failure."""
    if isinstance(error, (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError)):
        return CONNECT_FAILURE
    if isinstance(error, TimeoutError):
        return CLIENT_TIMEOUT
    if isinstance(error, (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError, aiohttp.ClientResponseError)):
        return RESET
    if isinstance(error, OSError):
        return RESET if begun else CONNECT_FAILURE
    return LOCAL


class MeshMiddleware:
    """`aiohttp.ClientSession(middlewares=[middleware])`. Put it last, so that what other middlewares add is sent with
    each attempt. One may serve several sessions."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.mirrors = AsyncMirrors()
        self.lives: weakref.WeakKeyDictionary[Any, _Life] = weakref.WeakKeyDictionary()
        self._given_up: weakref.WeakKeyDictionary[Any, tuple[Any, Exception]] = weakref.WeakKeyDictionary()

    async def __call__(self, request: aiohttp.ClientRequest, handler: Handler) -> aiohttp.ClientResponse:
        # aiohttp sends an idempotent request again, once, when a connection was lost. The route has had its word on
        # that; the second round, which has the same list of traces, ends as the first one did.
        traces, task = request._traces, asyncio.current_task()
        of, earlier = self._given_up.pop(task, (None, None))
        if earlier is not None and of is traces:
            raise earlier
        exchange = _Exchange(self, request, handler)
        try:
            return await drive_async(exchange.flow(), exchange)
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
            if task is not None:
                self._given_up[task] = traces, error
            raise

    def __repr__(self) -> str:
        return f"<MeshMiddleware {len(self.lives)} connections, {self.mirrors!r}>"


__all__ = ["Home", "MeshMiddleware"]
