"""What does the mesh do around a gRPC service? Server interceptors, sync and aio, by one description of a call.

The rules:
- An interceptor sees neither peer nor deadline, so it wraps the handler: nothing of it runs before the verdict. A
  request that is one message has been received and parsed by then.
- To the guard a call is a POST of `/package.Service/Method`, as on the wire. A method that nobody implements is judged,
  too: who may not call learns nothing of what there is.
- gRPC's Python API tells neither the port that a call came in on, nor, in asyncio, the authority it was made for. The
  port is given by whoever makes the interceptors; a rule that reads an unknown authority denies.
- A call is over when gRPC says so, also for streams that nobody reads to their end.
"""

from __future__ import annotations

import base64
import inspect
import logging
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import aclosing
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio

from meshlib.identity.credentials import Credentials
from meshlib.identity.tls import NoCredentials, TlsContexts
from meshlib.inbound import threads
from meshlib.inbound.admit import Reception, seen_by_application
from meshlib.model import Headers, Peer, Request, SpiffeId
from meshlib.policy.admission import ALLOW, Allow, Deny, Verdict
from meshlib.policy.observer import Messages, Observer, Served, size_of
from meshlib.policy.propagation import REQUEST_ID, Carried, Intake, current

Pairs = list[tuple[bytes, bytes]]

_log = logging.getLogger("meshlib.inbound")

TOO_LATE = "upstream request timeout"
"""Envoy's words for a request whose time is over."""
_CONTENT_TYPE = (b"content-type", b"application/grpc")
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_KINDS = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


class Porch:
    """What all calls of one server have in common. Thread-safe.

    port: the one that the server listens on, for rules that name ports; 0 is unknown. forward_headers: as MeshASGI's.
    Raises SettingsError for a name in forward_headers that can't be used.
    """

    __slots__ = ("clock", "intake", "observer", "port", "reception")

    def __init__(
        self,
        reception: Reception,
        observer: Callable[[], Observer | None],
        port: int = 0,
        forward_headers: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.reception, self.observer, self.port, self.clock = reception, observer, port, clock
        self.intake = Intake(forward_headers)
        threads.install()


class Visit:
    """One call that came in, from before its verdict to its end."""

    __slots__ = ("carried", "context", "messages", "observer", "pairs", "peer", "porch", "request", "served", "verdict")

    def __init__(self, porch: Porch, method: str, context: Any, is_stream: bool) -> None:
        """is_stream: the request is one, or the response."""
        self.porch, self.context = porch, context
        self.pairs: Pairs = [_CONTENT_TYPE, *map(_raw, context.invocation_metadata() or ())]
        self.peer = peer_of(context, porch.port)
        scheme = "https" if self.peer.is_tls else "http"
        self.request = Request("POST", scheme, _authority(context), method, Headers(self.pairs))
        self.verdict: Allow = ALLOW
        self.carried: Carried | None = None
        self.messages = Messages(is_stream)
        self.observer = porch.observer()
        self.served: Served | None = None
        if self.observer is not None:
            self.served = served = Served("POST", method, self.request.headers, porch.clock(), "HTTP/2")
            served.authority, served.client, served.peer = self.request.authority, self.peer.address, self.peer
            served.client_port = _port(context.peer())
            served.request_bytes = size_of(self.request.headers)
            served.messages = self.messages

    def refusal(self, verdict: Verdict) -> tuple[grpc.StatusCode, str] | None:
        """How the call is turned away; None when it may begin."""
        served = self.served
        if isinstance(verdict, Deny):
            if served is not None:
                served.flags, served.reason = verdict.flag, verdict.details
            if verdict.told:
                self.context.set_trailing_metadata(tuple(map(_shown, verdict.told)))
            return self._refused(_CODES.get(verdict.grpc_status, grpc.StatusCode.UNKNOWN), _words(verdict.body))
        self.verdict = verdict
        now, remaining = self.porch.clock(), self.context.time_remaining()
        outer = None
        if remaining is not None and remaining < 1e9:  # without a deadline: None, or gRPC's end of time
            outer = Carried((), now + remaining, self.porch.clock)
        carried = self.porch.intake.take_up(self.pairs, self.porch.clock, outer)
        if self.observer is not None and served is not None:
            served.carried = carried
            carried = self.observer.serving(served) or carried
        self.carried = carried
        if carried.has_expired():
            if served is not None:
                served.flags = "UT"
            _log.info("%s: not started, the caller's deadline has passed", self.request.path)
            return self._refused(grpc.StatusCode.DEADLINE_EXCEEDED, TOO_LATE)
        return None

    def _refused(self, code: grpc.StatusCode, words: str) -> tuple[grpc.StatusCode, str]:
        self._answered(code)
        return code, words

    def _answered(self, code: grpc.StatusCode) -> None:
        if self.served is not None:
            self.served.status, self.served.grpc_status = 200, str(code.value[0])

    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """What the handler sees of the request's."""
        pairs = self.pairs[1:]
        if self.porch.reception.is_enforced:
            pairs = seen_by_application(pairs, self.verdict, self.peer)
        if self.carried is not None and self.carried.headers[-1][0] == REQUEST_ID:
            pairs = [pair for pair in pairs if pair[0] != REQUEST_ID] + [self.carried.headers[-1]]
        return tuple(map(_shown, pairs))

    def incoming(self, request: Any, is_stream: bool) -> Any:
        """The request as the handler gets it: one message, or a stream of them, which are counted as they are read."""
        if not is_stream:
            self.messages.requests = 1
            return request
        if self.served is None:
            return request
        if hasattr(request, "__aiter__"):
            return _counted_aio(request, self.messages)
        return _counted(request, self.messages)

    def enter(self) -> None:
        """What is carried holds from here on, in the context that gRPC has made for this very call."""
        current.set(self.carried)

    def leave(self, error: BaseException | None = None) -> None:
        """The handler is done: nobody waits any more."""
        if self.carried is not None:
            self.carried.finish()
        if self.served is not None and not self.served.status:
            if error is not None and not isinstance(error, Exception):
                return  # cancelled: there was no answer
            self._answered(_code_of(self.context, error))

    def end(self, *_: Any) -> None:
        """The call is over, whoever ended it."""
        if self.carried is not None:
            self.carried.finish()
        served, self.served = self.served, None
        if served is not None and self.observer is not None:
            if not served.status:
                served.flags = served.flags or "DC"
            served.ended = self.porch.clock()
            self.observer.served(served)


class Seen:
    """A handler's context: gRPC's own, with the metadata that the mesh lets through.

    meshlib_peer: who is calling. meshlib_principal, meshlib_claims: whom a verified token names; "" and None without.
    """

    def __init__(self, visit: Visit) -> None:
        self._context, self._metadata, self._messages = visit.context, visit.metadata(), visit.messages
        self._answer = tuple(map(_shown, visit.verdict.answer))
        self.meshlib_peer = visit.peer
        self.meshlib_principal, self.meshlib_claims = visit.verdict.principal, visit.verdict.claims

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._metadata

    def send_initial_metadata(self, initial_metadata: Any) -> Any:
        """In asyncio this is to be awaited, as gRPC's own."""
        answer, self._answer = self._answer, ()
        return self._context.send_initial_metadata((*initial_metadata, *answer))

    def __repr__(self) -> str:
        return f"<Seen {self._context!r}>"


class SyncSeen(Seen):
    def before_answer(self) -> None:
        """What the verdict adds to the answer goes out, where the handler has sent no metadata itself."""
        if self._answer:
            self.send_initial_metadata(())


class AioSeen(Seen):
    async def before_answer(self) -> None:
        if self._answer:
            await self.send_initial_metadata(())

    async def read(self) -> Any:
        message = await self._context.read()
        if message is not grpc.aio.EOF:
            self._messages.sent()
        return message

    async def write(self, message: Any) -> None:
        await self.before_answer()
        await self._context.write(message)
        self._messages.received()


def _counted(requests: Iterable[Any], messages: Messages) -> Iterator[Any]:
    for request in requests:
        messages.sent()
        yield request


async def _counted_aio(requests: AsyncIterable[Any], messages: Messages) -> AsyncIterator[Any]:
    async for request in requests:
        messages.sent()
        yield request


grpc.ServicerContext.register(SyncSeen)
grpc.aio.ServicerContext.register(AioSeen)


class MeshServerInterceptor(grpc.ServerInterceptor):
    """For `grpc.server(pool, interceptors=[...])`; the first there, so that others run for admitted calls only."""

    def __init__(self, porch: Porch) -> None:
        self._porch = porch

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        return _wrapped(continuation(handler_call_details) or _UNKNOWN, self._porch, handler_call_details.method)


class MeshAioServerInterceptor(grpc.aio.ServerInterceptor):
    """The same for `grpc.aio.server(interceptors=[...])`. Handlers that are plain functions run in its threads."""

    def __init__(self, porch: Porch) -> None:
        self._porch = porch

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details) or _AIO_UNKNOWN
        return _wrapped(handler, self._porch, handler_call_details.method)


def _wrapped(handler: Any, porch: Porch, method: str) -> Any:
    kind, make = _KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
    behavior, streams = getattr(handler, kind), bool(handler.request_streaming)
    if inspect.isasyncgenfunction(behavior):
        serve: Any = _aio_stream(behavior, porch, method, streams)
    elif inspect.iscoroutinefunction(behavior):
        serve = _aio_call(behavior, porch, method, streams, kind != "unary_unary")
    elif handler.response_streaming:
        serve = _stream(behavior, porch, method, streams)
    else:
        serve = _call(behavior, porch, method, streams)
    return make(serve, handler.request_deserializer, handler.response_serializer)


def _admitted(porch: Porch, method: str, context: Any, is_stream: bool) -> Visit:
    """Raises what gRPC's abort raises where the call is turned away."""
    visit = Visit(porch, method, context, is_stream)
    is_active = context.add_callback(visit.end)
    refused = visit.refusal(porch.reception.admit(visit.request, visit.peer))
    if is_active is False:  # it ended before it began; in asyncio's threads gRPC answers None, and calls back
        visit.end()
    if refused is not None:
        context.abort(*refused)
    visit.enter()
    return visit


def _call(behavior: Callable[[Any, Any], Any], porch: Porch, method: str, streams: bool) -> Callable[[Any, Any], Any]:
    def serve(request: Any, context: Any) -> Any:
        visit = _admitted(porch, method, context, streams)
        seen = SyncSeen(visit)
        try:
            response = behavior(visit.incoming(request, streams), seen)
            seen.before_answer()
        except BaseException as error:
            visit.leave(error)
            raise
        visit.messages.responses = 1
        visit.leave()
        return response

    return serve


def _stream(
    behavior: Callable[[Any, Any], Iterable[Any]], porch: Porch, method: str, streams: bool
) -> Callable[[Any, Any], Iterator[Any]]:
    def serve(request: Any, context: Any) -> Iterator[Any]:
        visit = _admitted(porch, method, context, True)
        seen = SyncSeen(visit)
        try:
            for response in behavior(visit.incoming(request, streams), seen):
                seen.before_answer()
                visit.messages.received()
                yield response
        except BaseException as error:
            visit.leave(error)
            raise
        visit.leave()

    return serve


async def _admitted_aio(porch: Porch, method: str, context: Any, is_stream: bool) -> Visit:
    visit = Visit(porch, method, context, is_stream)
    context.add_done_callback(visit.end)
    refused = visit.refusal(await porch.reception.admit_async(visit.request, visit.peer))
    if refused is not None:
        await context.abort(*refused)
    visit.enter()
    return visit


def _aio_call(
    behavior: Callable[[Any, Any], Awaitable[Any]], porch: Porch, method: str, streams: bool, is_stream: bool
) -> Callable[[Any, Any], Awaitable[Any]]:
    async def serve(request: Any, context: Any) -> Any:
        visit = await _admitted_aio(porch, method, context, is_stream)
        seen = AioSeen(visit)
        try:
            response = await behavior(visit.incoming(request, streams), seen)
            if response is not None:  # a stream that was written by context.write has sent it
                await seen.before_answer()
                visit.messages.responses = 1
        except BaseException as error:
            visit.leave(error)
            raise
        visit.leave()
        return response

    return serve


def _aio_stream(
    behavior: Callable[[Any, Any], AsyncGenerator[Any, None]], porch: Porch, method: str, streams: bool
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def serve(request: Any, context: Any) -> AsyncIterator[Any]:
        visit = await _admitted_aio(porch, method, context, True)
        seen = AioSeen(visit)
        try:
            async with aclosing(behavior(visit.incoming(request, streams), seen)) as responses:
                async for response in responses:
                    await seen.before_answer()
                    visit.messages.received()
                    yield response
        except BaseException as error:
            visit.leave(error)
            raise
        visit.leave()

    return serve


def _nobody_implements(requests: Any, context: Any) -> Iterator[bytes]:
    context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    yield b""


async def _nobody_implements_aio(requests: Any, context: Any) -> AsyncIterator[bytes]:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    yield b""


_UNKNOWN: Any = grpc.stream_stream_rpc_method_handler(_nobody_implements)
_AIO_UNKNOWN: Any = grpc.stream_stream_rpc_method_handler(_nobody_implements_aio)


def server_credentials(contexts: TlsContexts) -> grpc.ServerCredentials:
    """Credentials of a server that shows the present certificate at each handshake, and takes clients with one of our
    own trust domain only: gRPC would let every root vouch for every domain. Raises NoCredentials."""
    shown = contexts.present()

    def fetch() -> Any:
        # On a thread of gRPC's, at each handshake. What is expired is shown on: the client refuses it.
        nonlocal shown
        try:
            found = contexts.present()
        except NoCredentials:
            return None
        if found is shown:
            return None
        configuration, shown = _configuration(found), found
        return configuration

    return grpc.dynamic_ssl_server_credentials(_configuration(shown), fetch, require_client_authentication=True)


def _configuration(of: Credentials) -> Any:
    roots = dict(of.trust_bundles)[of.identity.trust_domain]
    return grpc.ssl_server_certificate_configuration([(of.private_key, of.certificate_chain)], roots)


def peer_of(context: Any, port: int = 0) -> Peer:
    """Who is calling, as the connection proves it: the one SPIFFE ID of a certificate that the server's credentials
    have verified. Any other name in it is nobody's identity."""
    auth = context.auth_context()
    ids: Sequence[bytes] = auth.get("peer_spiffe_id") or ()
    identity = None
    if len(ids) == 1:
        try:
            identity = SpiffeId.parse(ids[0].decode("ascii"))
        except ValueError:
            pass
    return Peer(identity, bool(auth.get("transport_security_type")), _address(context.peer()), port)


def _address(peer: str) -> str:
    """Of `ipv4:10.0.0.1:5000` and `ipv6:%5B::1%5D:5000`; "" of what is no address."""
    kind, _, rest = peer.partition(":")
    return unquote(rest).rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else ""


def _port(peer: str) -> int:
    """0 of what is no address."""
    port = peer.rpartition(":")[2]
    return int(port) if _address(peer) and port.isdecimal() else 0


def _authority(context: Any) -> str:
    """What the call was made for; "" where gRPC does not tell. No public API does; sync contexts hold the event."""
    details = getattr(getattr(context, "_rpc_event", None), "call_details", None)
    host = getattr(details, "host", None)
    return host.decode("latin-1").lower() if isinstance(host, bytes) else ""


def _code_of(context: Any, error: BaseException | None) -> grpc.StatusCode:
    """What gRPC will answer. Contexts of plain functions in asyncio's threads don't tell: then OK, or UNKNOWN."""
    code = context.code() if hasattr(context, "code") else None
    if not isinstance(code, grpc.StatusCode):
        code = _CODES.get(code) if isinstance(code, int) else None
    if error is not None:
        return code if code not in (None, grpc.StatusCode.OK) else grpc.StatusCode.UNKNOWN
    return code or grpc.StatusCode.OK


def _words(body: bytes) -> str:
    return body.decode("utf-8", "replace") or "denied"


def _raw(pair: Any) -> tuple[bytes, bytes]:
    """As on the wire."""
    name, value = pair
    if isinstance(value, str):
        return name.encode("latin-1"), value.encode("latin-1", "replace")
    return name.encode("latin-1"), base64.b64encode(value) if name.endswith("-bin") else value


def _shown(pair: tuple[bytes, bytes]) -> tuple[str, str | bytes]:
    """As gRPC's users see it."""
    name, value = pair[0].decode("latin-1"), pair[1]
    return name, base64.b64decode(value) if name.endswith("-bin") else value.decode("latin-1")
