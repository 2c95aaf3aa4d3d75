"""What happens to a request that came in by a door? It becomes an outbound call on its listener's route configuration,
and what that brings goes back: streamed both ways, never gathered. Answers of our own have Envoy's words.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, Self

from meshlib.gateway import headers as h
from meshlib.gateway.limits import Limits
from meshlib.gateway.protocol import FILTER_CHAIN, TUNNEL, Tunnel
from meshlib.inbound import peer as peers
from meshlib.inbound.admit import answer_of, seen_by_application, without_params
from meshlib.inbound.body import ReplayedBody
from meshlib.model import NO_ACCESS_RULES, FilterChain, Headers, Listener, Outcome, Request
from meshlib.outbound.drive import drive_async
from meshlib.outbound.mirrors import AsyncMirrors
from meshlib.outbound.tls import secured
from meshlib.outbound.wire import (
    AsyncEngine,
    AsyncWireResponse,
    RawHeaders,
    SendFailed,
    WireRequest,
    apply,
    with_host,
)
from meshlib.policy.admission import ALLOW, Deny, RawPairs
from meshlib.policy.call import outbound_call
from meshlib.policy.cors import told_to_page
from meshlib.policy.observer import Served
from meshlib.policy.paths import normalized_target
from meshlib.policy.retry import CONNECT_FAILURE, LOCAL, TIMEOUT
from meshlib.policy.steps import Deliver, Flow, Reply, Send

if TYPE_CHECKING:
    from meshlib.mesh import Mesh
    from meshlib.policy.observer import Call
    from meshlib.telemetry.tracing import Tracer

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
SendMessage = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_log = logging.getLogger("meshlib.gateway")

_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})  # RFC 9110, 9.2.2
_TEXT = ("content-type", "text/plain")


class BodyEnded(Exception):
    """The request's body can't be sent to its end: the client has gone, or the limit is reached."""


class Proxy:
    """The ASGI application behind every door. Knows the mesh, the engine and nothing of sockets.

    A response that breaks off on the upstream's side is left unfinished; the protocol then closes the connection.
    """

    def __init__(self, mesh: Mesh, engine: AsyncEngine, limits: Limits, trusted_hops: int, server_name: str) -> None:
        self.engine = engine
        self._mesh, self.tls = mesh, mesh.tls
        self._reception = mesh.reception()
        self._limits = limits
        self._trusted_hops = trusted_hops
        self._server = (b"server", server_name.encode("ascii"))
        self._date = (0, (b"date", b""))
        self._mirrors = AsyncMirrors()

    async def __call__(self, scope: Scope, receive: Receive, send: SendMessage) -> None:
        chain: FilterChain | None = scope["state"][FILTER_CHAIN]
        tunnel: Tunnel | None = scope.get("extensions", {}).get(TUNNEL)
        raw: RawHeaders = scope["headers"]
        seen = ReplayedBody(receive)
        client = scope["client"][0] if scope["client"] else ""
        listener = self._listener(chain)
        access = NO_ACCESS_RULES if listener is None or listener.access is None else listener.access
        hops = self._trusted_hops or access.trusted_hops
        kept = h.to_upstream(raw, client, scope["scheme"] == "https", hops, tunnel is not None)
        query = scope["query_string"]
        path = scope["raw_path"] + (b"?" + query if query else b"")
        served, traced = self._entering(scope, kept)
        refused: Reply | None = None
        answer: _Answer | None = None
        call: Call | None = None
        # From here on the span has begun: who goes away while it is being admitted must not take it along.
        try:
            if traced is not None:
                kept = [*(pair for pair in kept if pair[0] != traced[0]), traced]
            request = Request(
                scope["method"],
                (h.first(kept, b"x-forwarded-proto") or b"http").decode("latin-1"),
                (h.first(kept, b"host") or b"").decode("latin-1").lower(),
                normalized_target(path.decode("latin-1"), access.normalization),
                Headers(kept),
            )
            told: RawPairs = ()
            if listener is not None:
                # As the listener is configured, whatever port is behind it here.
                remote = (h.first(kept, h.EXTERNAL_ADDRESS) or b"").decode("latin-1")
                peer = peers.of_scope(scope)._replace(local_port=listener.port, remote=remote)
                if served is not None:
                    served.peer = peer
                verdict = await self._reception.admit_async(request, peer, seen.take)
                if isinstance(verdict, Deny):
                    refused = _refusal(verdict, kept)
                elif verdict is not ALLOW:
                    told = verdict.answer
                    kept = seen_by_application(kept, verdict, peer)
                    bare, mark, asked = request.path.partition("?")
                    left = without_params(asked.encode("latin-1"), verdict).decode("latin-1")
                    target = f"{bare}{mark if left else ''}{left}"
                    request = request._replace(path=target, headers=Headers(kept), claims=verdict.claims)
            body = _Body.of(raw, seen.receive, self._limits.body)
            exchange = _Exchange(self, request, kept, body)
            if refused is not None:
                answer = exchange.reply(refused)
            elif body is not None and body.is_too_large:
                answer = exchange.reply(_TOO_LARGE)
            elif chain is None or listener is None:
                answer = exchange.reply(Reply(404, flag="NR", reason="the listener has changed"))
            else:
                may_resend = request.method not in _IDEMPOTENT and h.first(kept, b"idempotency-key") is not None
                context = self._mesh.call_context(None, may_resend)._replace(
                    route_configuration=chain.route_configuration
                )
                call = context.call
                page = told_to_page(self._mesh.live, chain.route_configuration, request)
                if page.answer is not None:
                    answer = exchange.reply(page.answer)
                else:
                    answer = await drive_async(outbound_call(request, context), exchange)
                    if page.operations:
                        answer.headers = apply((page.operations,), answer.headers)
            if answer.status == 101 and tunnel is not None and answer.response is not None:
                await _relay(answer, tunnel)
            else:
                answer.headers.extend(told)
                await self._respond(answer, request, send)
        finally:
            try:
                if answer is not None:
                    await answer.close()
            finally:
                if served is not None:
                    flags = "DC" if answer is None else refused.flag if refused is not None else ""
                    self._entered(served, 0 if answer is None else answer.status, flags or (call.flags if call else ""))

    def _entering(self, scope: Scope, headers: RawHeaders) -> tuple[Served | None, tuple[bytes, bytes] | None]:
        """Where spans are taken, the request as the span of it begins here, and the trace context that it goes on with;
        the call that is made of it is its child."""
        tracer = self._tracer
        if tracer is None:
            return None, None
        path, query = scope["raw_path"].decode("latin-1"), scope["query_string"].decode("latin-1")
        protocol = f"HTTP/{scope.get('http_version', '1.1')}"
        served = Served(
            scope["method"], f"{path}?{query}" if query else path, Headers(headers), time.monotonic(), protocol
        )
        served.authority = (h.first(headers, b"host") or b"").decode("latin-1").lower()
        if scope["client"]:
            served.client, served.client_port = scope["client"][0], scope["client"][1] or 0
        served.peer = peers.of_scope(scope)
        traced = tracer.entering(served)
        return (served if served.mark is not None else None), traced

    def _entered(self, served: Served, status: int, flags: str) -> None:
        served.ended, served.status, served.flags = time.monotonic(), status, flags
        if self._tracer is not None:
            self._tracer.entered(served)

    @property
    def _tracer(self) -> Tracer | None:
        telemetry = self._mesh.telemetry
        return None if telemetry is None else telemetry.tracer

    def _listener(self, chain: FilterChain | None) -> Listener | None:
        return next((each for each in self._mesh.live.snapshot.listeners if chain in each.filter_chains), None)

    async def _respond(self, answer: _Answer, request: Request, send: SendMessage) -> None:
        await send({"type": "http.response.start", "status": answer.status, "headers": self._finished(answer.headers)})
        if answer.response is None:
            await send({"type": "http.response.body", "body": answer.body})
            return
        chunks = aiter(answer.response.stream)
        while True:
            try:
                if answer.deadline is None:
                    chunk = await anext(chunks, None)
                else:
                    async with asyncio.timeout(answer.deadline - time.monotonic()):
                        chunk = await anext(chunks, None)
            except Exception as error:
                _log.info(
                    "%s %s%s: the response broke off: %s",
                    request.method,
                    request.authority,
                    h.for_logs(request.path),
                    f"{type(error).__name__} {error}".strip(),
                )
                return
            if chunk is None:
                break
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await answer.close()  # before a slow client's last bytes, and before a pipelined request needs the connection
        await send({"type": "http.response.body"})

    def _finished(self, headers: RawHeaders) -> RawHeaders:
        headers.append(self._server)
        if h.first(headers, b"date") is None:
            now = int(time.time())
            if self._date[0] != now:
                self._date = (now, (b"date", formatdate(now, usegmt=True).encode("ascii")))
            headers.append(self._date[1])
        return headers

    def start_mirror(self, flow: Flow, request: Request, headers: RawHeaders) -> bool:
        async def run() -> None:
            await (await drive_async(flow, _Exchange(self, request, headers, None))).close()

        return self._mirrors.start(f"{request.method} {request.authority}", run)

    async def aclose(self) -> None:
        """Give up the mirrors and close idle connections. Requests are the doors' to end."""
        await self._mirrors.aclose()
        await self.engine.aclose()
        await self._mesh.quotas.aclose()

    def __repr__(self) -> str:
        return f"<Proxy over {self.engine!r}>"


def _refusal(denied: Deny, headers: RawHeaders) -> Reply:
    status, added, body = answer_of(denied, h.first(headers, b"content-type") or b"")
    pairs = tuple((n.decode("latin-1"), v.decode("latin-1")) for n, v in added if n != b"content-length")
    return Reply(status, pairs, body, denied.flag, f"{denied.details} {denied.origin}".rstrip())


async def _relay(answer: _Answer, tunnel: Tunnel) -> None:
    """An upgraded connection: bytes both ways, until either side has ended. What a WebSocket says at its end is in the
    bytes, so nothing of it is lost or changed."""
    assert answer.response is not None
    stream = answer.response.extensions["network_stream"]
    tunnel.accept(answer.headers)

    async def up() -> None:
        while data := await tunnel.read():
            await stream.write(data)

    async def down() -> None:
        while data := await stream.read(65536):
            await tunnel.write(data)

    ways = {asyncio.create_task(up()), asyncio.create_task(down())}
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        for ended in await asyncio.gather(*ways, return_exceptions=True):
            if isinstance(ended, Exception):
                _log.debug("a tunnel ended: %s", ended)


class _Body:
    """A request's body while it comes in: read once, in order, never held."""

    __slots__ = ("_limit", "_receive", "_size", "begun", "completed_at", "is_too_large", "when_complete")

    def __init__(self, receive: Receive, limit: int | None, is_too_large: bool) -> None:
        self._receive, self._limit = receive, limit
        self._size = 0
        self.begun = False
        self.completed_at: float | None = None
        """Monotonic seconds."""
        self.is_too_large = is_too_large
        self.when_complete: Callable[[], None] | None = None

    @classmethod
    def of(cls, raw: RawHeaders, receive: Receive, limit: int | None) -> Self | None:
        """None when the head says that there is none."""
        length = h.first(raw, b"content-length")
        if length is None:
            return cls(receive, limit, False) if h.first(raw, b"transfer-encoding") is not None else None
        size = int(length)
        return cls(receive, limit, limit is not None and size > limit) if size else None

    def __aiter__(self) -> AsyncIterator[bytes]:
        self.begun = True
        return self

    async def __anext__(self) -> bytes:
        if self.completed_at is not None:
            raise StopAsyncIteration
        message = await self._receive()
        if message["type"] != "http.request":
            raise BodyEnded("the client has gone")
        chunk: bytes = message.get("body", b"")
        self._size += len(chunk)
        if self._limit is not None and self._size > self._limit:
            self.is_too_large = True
            raise BodyEnded(f"more than {self._limit} bytes")
        if not message.get("more_body", False):
            self.completed_at = time.monotonic()
            if self.when_complete is not None:
                self.when_complete()
        return chunk


class _Answer:
    """What goes back to the client: a head, and a body that is here or still on the upstream's wire."""

    __slots__ = ("_flow", "body", "deadline", "headers", "response", "status")

    def __init__(
        self,
        status: int,
        headers: RawHeaders,
        body: bytes = b"",
        response: AsyncWireResponse | None = None,
        flow: Flow | None = None,
        deadline: float | None = None,
    ) -> None:
        self.status, self.headers, self.body, self.response = status, headers, body, response
        self.deadline, self._flow = deadline, flow

    async def close(self) -> None:
        """Give back the connection and end the call's flow, in this order. Idempotent."""
        response, self.response = self.response, None
        try:
            if response is not None:
                await response.close()
        finally:
            if self._flow is not None:
                self._flow.close()


_TOO_LARGE = Reply(413, (_TEXT,), b"Payload Too Large", "", "request body beyond the limit")


class _Exchange:
    """One proxied call (outbound/drive.AsyncExchange)."""

    __slots__ = ("_attempts", "_body", "_error", "_headers", "_proxy", "_request", "_response", "_sent_at", "_started")

    def __init__(self, proxy: Proxy, request: Request, headers: RawHeaders, body: _Body | None) -> None:
        self._proxy, self._request, self._headers, self._body = proxy, request, headers, body
        self._attempts = 0
        self._started = self._sent_at = time.monotonic()
        self._error: SendFailed | None = None
        self._response: AsyncWireResponse | None = None

    # Attempts

    async def send(self, step: Send) -> Outcome:
        await self.release()
        self._attempts += 1
        self._sent_at = time.monotonic()
        try:
            response = await self._send(step)
        except SendFailed as error:
            self._error = error
            return Outcome(None, None, error.failure, self._is_replayable)
        except OSError as error:  # TLS files that can't be read
            self._error = SendFailed(CONNECT_FAILURE, "ConnectError", str(error))
            return Outcome(None, None, CONNECT_FAILURE, self._is_replayable)
        self._response = response
        return Outcome(response.status, Headers(response.headers), "", self._is_replayable)

    @property
    def _is_replayable(self) -> bool:
        return self._body is None or not self._body.begun

    async def _send(self, step: Send) -> AsyncWireResponse:
        wire = self._wire_request(step)
        body, engine = self._body, self._proxy.engine
        if body is None or step.timeout is None or body.completed_at is not None:
            return await engine.send(wire)
        # Envoy: "this timeout starts after the entire downstream request has been received". A slow upload is the
        # client's own business.
        loop, limit = asyncio.get_running_loop(), step.timeout
        try:
            async with asyncio.timeout(None) as timer:
                body.when_complete = lambda: timer.reschedule(loop.time() + limit)
                try:
                    return await engine.send(wire._replace(timeout=None))
                finally:
                    body.when_complete = None
        except TimeoutError as error:
            raise SendFailed(TIMEOUT, "ReadTimeout", f"no response within {limit:.3g} s") from error

    def _wire_request(self, step: Send) -> WireRequest:
        cluster, request, headers = step.cluster.cluster, self._request, list(self._headers)
        if step.timeout is not None:
            headers.append((b"x-envoy-expected-rq-timeout-ms", b"%d" % max(1, step.timeout * 1000)))
        headers.append((b"x-envoy-attempt-count", b"%d" % self._attempts))
        authority = request.authority
        if step.authority is not None and step.authority != authority:
            headers.append((b"x-forwarded-host", authority.encode("latin-1")))
            authority = step.authority
            headers = with_host(headers, authority)
        path = request.path
        if step.path is not None and step.path != path:
            headers.append((b"x-envoy-original-path", path.encode("latin-1")))
            path = step.path
        headers = apply(step.headers, headers)
        if self._body is not None and h.first(headers, b"content-length") is None:
            headers.append((b"transfer-encoding", b"chunked"))
        host = authority if authority.endswith("]") else authority.rpartition(":")[0] or authority
        name = host.strip("[]")
        security = None if cluster.tls is None else secured(self._proxy.tls, cluster, step.endpoint, name, False)
        return WireRequest(
            step.cluster,
            step.endpoint,
            request.method.encode("ascii"),
            b"http" if security is None else b"https",
            name if security is None else security.sni,
            path.encode("latin-1"),
            headers,
            self._body,
            {"connect": cluster.connect_timeout},
            step.timeout,
            None if security is None else security.context,
            self._body is None and request.method in _IDEMPOTENT,
        )

    async def release(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            await response.close()

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def resolve(self, authority: str) -> None:
        """Nothing to ask: a gateway's listeners say all there is."""

    def another(self) -> _Exchange | None:
        if self._body is not None or h.first(self._headers, b"upgrade") is not None:
            return None
        return _Exchange(self._proxy, self._request, self._headers, None)

    def mirror(self, flow: Flow) -> bool:
        # A body that can be sent once goes to the server that matters, and a tunnel can't be doubled.
        if self._body is not None or h.first(self._headers, b"upgrade") is not None:
            return False
        return self._proxy.start_mirror(flow, self._request, self._headers)

    # Answers

    def reply(self, step: Reply) -> _Answer:
        if step.reason:
            _log.log(
                logging.INFO if step.status >= 500 else logging.DEBUG,  # anyone can ask for what is not there
                "%s %s%s: %d %s: %s",
                self._request.method,
                self._request.authority,
                h.for_logs(self._request.path),
                step.status,
                step.flag,
                step.reason,
            )
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in step.headers]
        if step.body and h.first(headers, b"content-type") is None:
            headers.append((b"content-type", b"text/plain"))
        headers.append((b"content-length", b"%d" % len(step.body)))
        return _Answer(step.status, headers, step.body)

    def deliver(self, step: Deliver, flow: Flow) -> _Answer:
        response, self._response = self._response, None
        body = self._body
        if response is None:
            flow.close()
            if body is not None and body.is_too_large:
                return self.reply(_TOO_LARGE)
            assert self._error is not None
            return self.reply(_upstream_error(self._error, step))
        taken = b"%d" % ((time.monotonic() - self._sent_at) * 1000)
        headers = apply(step.headers, [*response.headers, (b"x-envoy-upstream-service-time", taken)])
        deadline = step.deadline
        if deadline is not None and body is not None:
            # The policy counts from the call's beginning; see _send.
            deadline = None if body.completed_at is None else deadline + body.completed_at - self._started
        return _Answer(
            response.status,
            h.to_client(headers, response.status),
            response=response,
            flow=flow,
            deadline=deadline,
        )


def _upstream_error(error: SendFailed, step: Deliver) -> Reply:
    """Envoy's answer when an upstream gave none (source/common/router/router.cc, onUpstreamReset)."""
    detail = ""
    status = 503
    if error.error == "ConnectTimeout":
        reason = "connection timeout"
    elif error.failure == CONNECT_FAILURE:
        reason = "remote connection failure"
        if _is_refused(error):
            detail = ", transport failure reason: delayed connect error: Connection refused"
    elif error.error == "RemoteProtocolError":
        reason, status = "protocol error", 502
    elif error.failure == LOCAL:
        reason = "local reset"
    else:
        reason = "connection termination"
    again = "retried and the latest " if "URX" in step.flag else ""
    text = f"upstream connect error or disconnect/reset before headers. {again}reset reason: {reason}{detail}"
    return Reply(status, (_TEXT,), text.encode("ascii"), step.flag, f"{step.reason}: {error}")


def _is_refused(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ECONNREFUSED:
            return True
        if isinstance(error, BaseExceptionGroup):
            return any(_is_refused(each) for each in error.exceptions)
        error = error.__cause__ or error.__context__
    return False
