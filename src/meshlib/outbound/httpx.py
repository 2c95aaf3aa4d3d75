"""How does an httpx call go through the mesh? Two transports, for httpx and for httpx2, which has the same classes.

A transport turns the native request into a view, drives the core, and sends attempts through an engine. What the user
wrote stays: Host, SNI and URL; only the address connected to changes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar, cast

from meshlib.errors import MeshError
from meshlib.identity.tls import NoCredentials, TlsContexts
from meshlib.model import Cluster, Endpoint, Headers, Outcome, Request
from meshlib.outbound.drive import drive, drive_async
from meshlib.outbound.mirrors import AsyncMirrors, ThreadMirrors
from meshlib.outbound.raising import failed
from meshlib.outbound.tls import Secured, default_context, secured
from meshlib.outbound.wire import (
    AsyncEngine,
    AsyncWireResponse,
    Engine,
    RawHeaders,
    SendFailed,
    WireRequest,
    WireResponse,
    apply,
    with_host,
)
from meshlib.policy import propagation
from meshlib.policy.call import CallContext, outbound_call
from meshlib.policy.observer import Call
from meshlib.policy.retry import CLIENT_TIMEOUT, CONNECT_FAILURE, LOCAL, RESET, TIMEOUT
from meshlib.policy.steps import Deliver, Flow, Reply, Send

if TYPE_CHECKING:
    import ssl

    import httpx

_NO_TIMEOUTS: Mapping[str, float | None] = {}
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})  # RFC 9110, 9.2.2
W = TypeVar("W", WireResponse, AsyncWireResponse)


class Home(Protocol):
    """What a transport needs of its Mesh. Callable from any thread; the first call starts the feeds.

    tls: what connections are secured with. call_context: made for each call. resolve: waits, bounded, until the feed
    has answered for an authority.
    """

    @property
    def tls(self) -> TlsContexts: ...
    def call_context(self, deadline: float | None, may_resend: bool) -> CallContext: ...
    def resolve(self, authority: str) -> None: ...
    async def resolve_async(self, authority: str) -> None: ...


class _Exchange(Generic[W]):
    """One call in httpx's terms: what the sync and the async exchange share (outbound/drive.Exchange)."""

    __slots__ = (
        "_body",
        "_call",
        "_carried",
        "_endpoint",
        "_error",
        "_own",
        "_raw",
        "_response",
        "_sent_timeouts",
        "_timeouts",
        "request",
        "transport",
        "view",
    )

    def __init__(self, transport: _Transport, request: httpx.Request) -> None:
        url = request.url
        self.transport = transport
        self.request = request
        self._carried = carried = propagation.current.get()
        self._raw: RawHeaders = request.headers.raw
        self._own = own = Headers(self._raw)  # httpx's own look-up takes three times as long
        headers = own if carried is None else propagation.CarryingHeaders(own, carried)
        self.view = Request(
            request.method, url.scheme, url.netloc.decode("ascii"), url.raw_path.decode("ascii"), headers
        )
        self._timeouts: Mapping[str, float | None] = request.extensions.get("timeout", _NO_TIMEOUTS)
        self._body: Any = request.stream
        if type(request.stream) is not transport.library.ByteStream:
            self._body = _Once(request.stream)
        self._error: SendFailed | None = None
        self._endpoint: Endpoint | None = None
        self._response: W | None = None
        self._call: Call | None = None

    @property
    def _is_replayable(self) -> bool:
        return type(self._body) is not _Once or not self._body.begun

    def flow(self) -> Flow:
        deadline = None if self._carried is None else self._carried.remaining_deadline()
        # A request with an Idempotency-Key may reach the server twice: that is what the key is for
        # (draft-ietf-httpapi-idempotency-key-header).
        may_resend = self.view.method not in _IDEMPOTENT and "idempotency-key" in self.request.headers
        context = self.transport.home.call_context(deadline, may_resend)
        self._call = context.call
        if context.call is not None and type(self._body) is _Once and "content-length" not in self.request.headers:
            self._body.call = context.call
        return outbound_call(self.view, context)

    def _wire_request(self, step: Send) -> WireRequest:
        cluster = step.cluster.cluster
        self._endpoint = step.endpoint
        headers: RawHeaders = self._raw
        if step.authority is not None:
            headers = with_host(headers, step.authority)
        if self._carried is not None or step.timeout is not None:
            headers = [*headers, *propagation.outbound_headers(self._carried, self._own, step.timeout)]
        if step.headers:
            headers = apply(step.headers, headers)
        # The engine looks at them again when the body is read, so that `deliver` may shorten them.
        timeouts: dict[str, float | None] = dict(self._timeouts)
        self._sent_timeouts: dict[str, float | None] = timeouts
        connect = timeouts.get("connect")
        timeouts["connect"] = cluster.connect_timeout if connect is None else min(connect, cluster.connect_timeout)
        if step.timeout is not None:
            for phase in ("connect", "read", "write"):
                limit = timeouts.get(phase)
                timeouts[phase] = step.timeout if limit is None else min(limit, step.timeout)
        scheme, tls, sni = self.view.scheme, None, self.request.url.host
        security = None if cluster.tls is None else self._secured(cluster, step.endpoint)
        if security is not None:
            scheme, (tls, sni) = "https", security
        elif scheme == "https":
            tls = self.transport.ssl_context or default_context()
        return WireRequest(
            step.cluster,
            step.endpoint,
            self.view.method.encode("ascii"),
            scheme.encode("ascii"),
            sni,
            self.request.url.raw_path if step.path is None else step.path.encode("ascii"),
            headers,
            self._body,
            timeouts,
            step.timeout,
            tls,
            type(self._body) is not _Once and self.view.method in _IDEMPOTENT,
            type(self._body) is not _Once,
        )

    def _secured(self, cluster: Cluster, endpoint: Endpoint) -> Secured | None:
        transport = self.transport
        try:
            return secured(transport.home.tls, cluster, endpoint, self.request.url.host, transport.engine.speaks_http2)
        except NoCredentials as error:  # ours is the fault, not the endpoint's
            raise SendFailed(LOCAL, "ConnectError", str(error)) from error
        except OSError as error:
            raise SendFailed(CONNECT_FAILURE, "ConnectError", str(error)) from error

    def _arrived(self, response: W) -> Outcome:
        self._response = response
        return Outcome(response.status, Headers(response.headers), "", self._is_replayable)

    def _failed(self, error: SendFailed) -> Outcome:
        self._error = error
        return Outcome(None, None, error.failure, self._is_replayable)

    def another(self) -> Self | None:
        return None if type(self._body) is _Once else type(self)(self.transport, self.request)

    def mirror(self, flow: Flow) -> bool:
        if type(self._body) is _Once:  # a body that can be sent once goes to the server that matters
            return False
        stream: Any = self.request.stream
        copy = self.transport.library.Request(
            self.request.method,
            self.request.url,
            headers=self.request.headers.raw,
            content=b"".join(stream),
            extensions=self.request.extensions,
        )
        return self.transport.start_mirror(flow, copy)

    def reply(self, step: Reply) -> httpx.Response:
        return cast(
            "httpx.Response",
            self.transport.library.Response(
                step.status,
                headers=[(name.encode("latin-1"), value.encode("latin-1")) for name, value in step.headers],
                content=step.body,
                extensions={"meshlib.flag": step.flag, "meshlib.reason": step.reason},
            ),
        )

    def deliver(self, step: Deliver, flow: Flow) -> httpx.Response:
        response, self._response = self._response, None
        library = self.transport.library
        if response is None:
            flow.close()
            assert self._error is not None
            kind = getattr(library, self._error.error, library.TransportError)
            error = kind(str(self._error), request=self.request)
            raise failed(error, self._error.failure, step.flag, step.reason, self._endpoint) from self._error.__cause__
        idle = step.idle_timeout
        if idle is not None:
            limit = self._sent_timeouts.get("read")
            self._sent_timeouts["read"] = idle if limit is None else min(limit, idle)
        return cast(
            "httpx.Response",
            library.Response(
                response.status,
                headers=apply(step.headers, response.headers) if step.headers else response.headers,
                stream=self.transport.body(response, flow, step.deadline, idle, self._call),
                extensions=dict(response.extensions),
            ),
        )


class _SyncExchange(_Exchange[WireResponse]):
    __slots__ = ()
    transport: _SyncTransport

    def send(self, step: Send) -> Outcome:
        self.release()
        try:
            return self._arrived(self.transport.engine.send(self._wire_request(step)))
        except SendFailed as error:
            return self._failed(error)

    def release(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.close()

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def resolve(self, authority: str) -> None:
        self.transport.home.resolve(authority)


class _AsyncExchange(_Exchange[AsyncWireResponse]):
    __slots__ = ()
    transport: _AsyncTransport

    async def send(self, step: Send) -> Outcome:
        await self.release()
        try:
            return self._arrived(await self.transport.engine.send(self._wire_request(step)))
        except SendFailed as error:
            return self._failed(error)

    async def release(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            await response.close()

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def resolve(self, authority: str) -> None:
        await self.transport.home.resolve_async(authority)


class _Once:
    """A request body that can be sent only once; remembers whether that was begun. call: is told how much was sent."""

    __slots__ = ("_stream", "begun", "call")

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.begun = False
        self.call: Call | None = None

    def __iter__(self) -> Iterator[bytes]:
        self.begun = True
        return iter(self._stream) if self.call is None else self._counted(self.call)

    def __aiter__(self) -> AsyncIterator[bytes]:
        self.begun = True
        return aiter(self._stream) if self.call is None else self._counted_async(self.call)

    def _counted(self, call: Call) -> Iterator[bytes]:
        for chunk in self._stream:
            call.sent(len(chunk))
            yield chunk

    async def _counted_async(self, call: Call) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            call.sent(len(chunk))
            yield chunk


class _Transport:
    """What both transports have. `library`: the module httpx or httpx2."""

    library: Any
    body: Any
    engine: Engine | AsyncEngine

    def __init__(self, home: Home, ssl_context: ssl.SSLContext | None) -> None:
        self.home = home
        self.ssl_context = ssl_context

    def start_mirror(self, flow: Flow, request: httpx.Request) -> bool:
        raise NotImplementedError

    def _read_error(self, error: Exception) -> Exception:
        """What httpx's users catch, for an engine's error while the body was read."""
        name = getattr(error, "error", type(error).__name__)
        kind = getattr(self.library, name, None)
        if kind is None or isinstance(error, MeshError):
            return error
        failure, flag = (CLIENT_TIMEOUT, "DC") if name.endswith("Timeout") else (RESET, "UC")
        return cast(Exception, failed(kind(str(error) or name), failure, flag, "while the response's body was read"))

    def _too_late(self) -> Exception:
        error = self.library.ReadTimeout("the response is late")
        return cast(
            Exception, failed(error, TIMEOUT, "UT", "the route's timeout passed while the response's body was read")
        )

    def _idled(self) -> Exception:
        error = self.library.ReadTimeout("the response has stalled")
        return cast(Exception, failed(error, TIMEOUT, "UT", "the route's idle timeout passed between two reads"))


class _SyncTransport(_Transport):
    engine: Engine

    def __init__(self, home: Home, engine: Engine, ssl_context: ssl.SSLContext | None = None) -> None:
        super().__init__(home, ssl_context)
        self.engine = engine
        self._mirrors = ThreadMirrors()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        exchange = _SyncExchange(self, request)
        return drive(exchange.flow(), exchange)

    def start_mirror(self, flow: Flow, request: httpx.Request) -> bool:
        def run() -> None:
            drive(flow, _SyncExchange(self, request)).close()

        return self._mirrors.start(f"{request.method} {request.url}", run)

    def close(self) -> None:
        self.engine.close()

    def __repr__(self) -> str:
        return f"<MeshTransport {self.engine!r}>"


class _AsyncTransport(_Transport):
    engine: AsyncEngine

    def __init__(self, home: Home, engine: AsyncEngine, ssl_context: ssl.SSLContext | None = None) -> None:
        super().__init__(home, ssl_context)
        self.engine = engine
        self._mirrors = AsyncMirrors()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        exchange = _AsyncExchange(self, request)
        return await drive_async(exchange.flow(), exchange)

    def start_mirror(self, flow: Flow, request: httpx.Request) -> bool:
        async def run() -> None:
            await (await drive_async(flow, _AsyncExchange(self, request))).aclose()

        return self._mirrors.start(f"{request.method} {request.url}", run)

    async def aclose(self) -> None:
        await self._mirrors.aclose()
        await self.engine.aclose()

    def __repr__(self) -> str:
        return f"<AsyncMeshTransport {self.engine!r}>"


@lru_cache(maxsize=4)
def sync_transport_class(library: ModuleType) -> type[Any]:
    """The sync transport over `library` (httpx or httpx2), whose BaseTransport it subclasses."""

    class Body(library.SyncByteStream):  # type: ignore[name-defined, misc]
        """A response's body. Closing it gives the connection back and ends the call's flow, in this order."""

        __slots__ = ("_call", "_deadline", "_flow", "_response", "_transport")

        def __init__(
            self,
            transport: _SyncTransport,
            response: WireResponse,
            flow: Flow,
            deadline: float | None,
            call: Call | None,
        ) -> None:
            self._transport, self._response, self._flow, self._deadline = transport, response, flow, deadline
            self._call = call

        def __iter__(self) -> Iterator[bytes]:
            try:
                for chunk in self._response.stream:
                    if self._deadline is not None and time.monotonic() > self._deadline:
                        raise self._transport._too_late()
                    if self._call is not None:
                        self._call.received(len(chunk))
                    yield chunk
            except Exception as error:
                raise self._transport._read_error(error) from error

        def close(self) -> None:
            try:
                self._response.close()
            finally:
                next(self._flow, None)

    class MeshTransport(_SyncTransport, library.BaseTransport):  # type: ignore[name-defined, misc]
        """An httpx transport whose calls go through the mesh. Thread-safe, as httpx.Client is."""

        def body(
            self, response: WireResponse, flow: Flow, deadline: float | None, idle: float | None, call: Call | None
        ) -> Body:
            return Body(self, response, flow, deadline, call)  # a read that takes longer than `idle` ends by itself

    MeshTransport.library = library
    return MeshTransport


@lru_cache(maxsize=4)
def async_transport_class(library: ModuleType) -> type[Any]:
    """The async transport over `library` (httpx or httpx2), whose AsyncBaseTransport it subclasses."""

    class Body(library.AsyncByteStream):  # type: ignore[name-defined, misc]
        __slots__ = ("_call", "_deadline", "_flow", "_idle", "_response", "_transport")

        def __init__(
            self,
            transport: _AsyncTransport,
            response: AsyncWireResponse,
            flow: Flow,
            deadline: float | None,
            idle: float | None,
            call: Call | None,
        ) -> None:
            self._transport, self._response, self._flow, self._deadline = transport, response, flow, deadline
            self._idle, self._call = idle, call

        async def __aiter__(self) -> AsyncIterator[bytes]:
            try:
                if self._deadline is None and self._idle is None:
                    async for chunk in self._response.stream:
                        if self._call is not None:
                            self._call.received(len(chunk))
                        yield chunk
                else:
                    chunks = aiter(self._response.stream)
                    while (part := await self._next(chunks)) is not None:
                        if self._call is not None:
                            self._call.received(len(part))
                        yield part
            except Exception as error:
                raise self._transport._read_error(error) from error

        async def _next(self, chunks: AsyncIterator[bytes]) -> bytes | None:
            left = None if self._deadline is None else self._deadline - time.monotonic()
            is_idle = self._idle is not None and (left is None or self._idle < left)
            try:
                async with asyncio.timeout(self._idle if is_idle else left):
                    return await anext(chunks, None)
            except TimeoutError:
                raise (self._transport._idled() if is_idle else self._transport._too_late()) from None

        async def aclose(self) -> None:
            try:
                await self._response.close()
            finally:
                next(self._flow, None)

    class AsyncMeshTransport(_AsyncTransport, library.AsyncBaseTransport):  # type: ignore[name-defined, misc]
        """An httpx async transport whose calls go through the mesh, on asyncio."""

        def body(
            self,
            response: AsyncWireResponse,
            flow: Flow,
            deadline: float | None,
            idle: float | None,
            call: Call | None,
        ) -> Body:
            return Body(self, response, flow, deadline, idle, call)

    AsyncMeshTransport.library = library
    return AsyncMeshTransport


__all__ = ["Home", "async_transport_class", "sync_transport_class"]
