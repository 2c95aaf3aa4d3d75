"""Which requests leave a trace? Spans for sampled requests: server, client, and one for each try of several.

Sampling is decided where a trace begins; everyone after that heeds the parent's flag. An unsampled request costs the
reading of its traceparent, or the making of one that says so to those who are called next. What the application's own
OpenTelemetry has begun is the parent of what it calls.

A client span takes the id of its only attempt, or is the parent of all of them; so the server's parent is right before
anyone can know how many attempts there will be.
"""

from __future__ import annotations

import os
import random
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from meshlib.model import AS_SET, HeaderOperations, HeaderView, Request, Told
from meshlib.policy.observer import Attempt, Call, Observer, Served
from meshlib.policy.propagation import TRACE_CONTEXT, Carried
from meshlib.state import forks
from meshlib.telemetry.command_values import Seen, filled_in, seen_call, seen_request
from meshlib.telemetry.labels import UNKNOWN, Described, is_grpc, of_endpoint, peer_of
from meshlib.telemetry.scrub import scrubbed

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

MAX_SPANS = 2048
"""As many wait to be pushed; OpenTelemetry's default (OTEL_BSP_MAX_QUEUE_SIZE)."""
_B3 = re.compile(r"([0-9a-f]{16}|[0-9a-f]{32})-([0-9a-f]{16})(?:-([01d]))?")
_W3C = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_SERVER, _CLIENT = 2, 3


class Trace(NamedTuple):
    """Where a span stands. parent: "" begins the trace."""

    trace_id: str
    span_id: str
    parent: str = ""


class Ended(NamedTuple):
    """A span that is over. began, ended: monotonic seconds."""

    at: Trace
    kind: int
    name: str
    began: float
    ended: float
    attributes: tuple[tuple[str, object], ...]
    error: str


class Tracer:
    """An Observer around `inner`, which is told the same. sampling: percent of the traces that begin here.

    epoch: Unix seconds at monotonic zero. names: attributes of every span that say who this is. rules: what the
    configuration says; it has the last word, and may be replaced at any time.
    """

    def __init__(
        self,
        inner: Observer,
        sampling: float,
        rng: random.Random,
        epoch: float,
        names: tuple[tuple[str, object], ...] = (),
    ) -> None:
        self._names = names
        self._inner, self._default, self._rng, self._epoch = inner, round(sampling * 10_000), rng, epoch
        self.rules = AS_SET
        self._spans: deque[Ended] = deque()
        self._lock = forks.lock()
        self.dropped = 0

    def taken(self) -> list[Ended]:
        """The spans that have ended since, for whoever pushes them."""
        with self._lock:
            found = list(self._spans)
            self._spans.clear()
        return found

    def _is_sampled(self, told: Told) -> bool:
        """Whether a trace that begins here leaves spans."""
        return told.all_traces or self._rng.random() * 1_000_000 < (
            self._default if told.sampling is None else told.sampling
        )

    def _id(self, bits: int) -> str:
        return f"{self._rng.getrandbits(bits) or 1:0{bits // 4}x}"

    # Calls

    def call_began(self, call: Call) -> None:
        self._inner.call_began(call)
        assert call.request is not None
        # What the caller wrote itself, or came through a gateway, else what the request being served has brought.
        parent = _of_application() or _of_headers(call.request.headers)
        if parent is None:
            if self._is_sampled(self.rules.client):
                call.mark = Trace(self._id(128), self._id(64))
        elif parent[2] or self.rules.client.all_traces:
            call.mark = Trace(parent[0], self._id(64), parent[1])

    def attempt_began(self, call: Call, attempt: Attempt) -> HeaderOperations | None:
        operations = self._inner.attempt_began(call, attempt)
        if call.mark is not None:
            attempt.mark = self._id(64)
        if not self.rules.client.context:
            return HeaderOperations(() if operations is None else operations.set, remove=TRACE_CONTEXT)
        if call.mark is None or call.request is None:
            return operations
        told = [("traceparent", f"00-{call.mark.trace_id}-{attempt.mark}-01")]
        headers = call.request.headers
        if headers.get("b3") is not None:
            told.append(("b3", f"{call.mark.trace_id}-{attempt.mark}-1"))
        if headers.get("x-b3-traceid") is not None:
            told += [
                ("x-b3-traceid", call.mark.trace_id),
                ("x-b3-spanid", attempt.mark),
                ("x-b3-parentspanid", call.mark.span_id),
                ("x-b3-sampled", "1"),
            ]
        return HeaderOperations(set=(*(operations.set if operations is not None else ()), *told))

    def attempt_ended(self, call: Call, attempt: Attempt) -> None:
        self._inner.attempt_ended(call, attempt)
        if call.mark is None:
            return
        outcome = attempt.outcome
        status = 0 if outcome is None else outcome.status or 0
        failure = "cancelled" if outcome is None else outcome.failure
        call.tried.append((attempt, status, failure))

    def _attempt_span(self, call: Call, attempt: Attempt, status: int, failure: str) -> None:
        at = Trace(call.mark.trace_id, attempt.mark, call.mark.span_id)
        request = call.request
        assert request is not None
        attributes: list[tuple[str, object]] = [
            *_method(request.method),
            *_target(request),
            *_network(attempt.endpoint.authority),
            ("mesh.attempt", attempt.number),
            ("mesh.endpoint", attempt.endpoint.authority),
            ("mesh.cluster", attempt.cluster.name),
        ]
        if attempt.number > 1:
            attributes.append(("http.request.resend_count", attempt.number - 1))
        if status:
            attributes.append(("http.response.status_code", status))
        name, error = _name(request.method), _error(status, failure)
        self._keep(Ended(at, _CLIENT, name, attempt.began, attempt.ended, tuple(attributes), error))

    def call_ended(self, call: Call) -> None:
        if call.mark is not None and len(call.tried) == 1:
            call.mark = call.mark._replace(span_id=call.tried[0][0].mark)  # before an exemplar names it
        self._inner.call_ended(call)
        mark, told = call.mark, self.rules.client
        if mark is None or call.request is None or not told.spans:
            return
        request, last = call.request, call.last
        attributes: list[tuple[str, object]] = [
            *_method(request.method),
            *_target(request),
            ("mesh.response_flags", call.flags or "-"),
            ("mesh.attempts", call.attempts),
        ]
        if call.status:
            attributes.append(("http.response.status_code", call.status))
        if call.decision is not None:
            attributes.append(("mesh.route", call.decision.route.name or "default"))
            if call.decision.route.origin:
                attributes.append(("mesh.object", call.decision.route.origin))
        if call.cluster is not None:
            attributes.append(("mesh.cluster", call.cluster.name))
        if last is not None:
            attributes.append(("mesh.endpoint", last.endpoint.authority))
            attributes += _network(last.endpoint.authority)
            attributes += _peer(of_endpoint(last.endpoint))
        tls = None if call.cluster is None else call.cluster.cluster.tls
        attributes.append(("mesh.mtls", tls is not None and tls.mode != "SIMPLE"))
        if call.fault or "FI" in call.flags:
            attributes.append(("mesh.fault", "abort" if "FI" in call.flags else call.fault))
        attributes += self._tags(told, request.headers, lambda: seen_call(call))
        error = _error(call.status, call.flags)
        if len(call.tried) > 1:
            for attempt, status, failure in call.tried:
                self._attempt_span(call, attempt, status, failure)
        name = _name(request.method)
        if call.is_grpc or is_grpc(request.headers.get("content-type")):
            name = request.path.lstrip("/")
            attributes += _rpc(name, call.grpc_status)
            error = error or _rpc_error(call.grpc_status)
        self._keep(Ended(mark, _CLIENT, name, call.began, call.ended, tuple(attributes), error))

    # Requests

    def serving(self, served: Served) -> Carried | None:
        carried = self._inner.serving(served) or served.carried
        if carried is None:
            return None
        begun = self._begin(carried, served, self.rules.server)
        return None if begun is None else carried.with_header(begun)

    def entering(self, served: Served) -> tuple[bytes, bytes] | None:
        """A request comes in that is passed on rather than served, as a gateway does: the header that takes the place
        of its trace context, if any. Its metrics are those of the call that is made of it; so is Istio's `CLIENT` what
        the configuration says of it."""
        return self._begin(served.headers, served, self.rules.client)

    def _begin(self, headers: HeaderView, served: Served, told: Told) -> tuple[bytes, bytes] | None:
        parent = _of_headers(headers)
        if parent is not None and not parent[2] and not told.all_traces:
            return None
        is_sampled = parent is not None or self._is_sampled(told)
        at = Trace(parent[0] if parent else self._id(128), self._id(64), parent[1] if parent else "")
        if is_sampled:
            served.mark = at
        return b"traceparent", f"00-{at.trace_id}-{at.span_id}-{'01' if is_sampled else '00'}".encode("ascii")

    def served(self, served: Served) -> None:
        if served.mark is None and served.reason:  # refused, and so never begun to be served
            self._begin(served.headers, served, self.rules.server)
        mark = served.mark
        self._inner.served(served)
        if mark is not None:
            self._served(served, self.rules.server)

    def entered(self, served: Served) -> None:
        """What `entering` began is over."""
        if served.mark is not None:
            self._served(served, self.rules.client)

    def _served(self, served: Served, told: Told) -> None:
        if not told.spans:
            return
        path, _, query = served.path.partition("?")
        host, port = _host_and_port(served.authority)
        attributes: list[tuple[str, object]] = [
            *_method(served.method),
            ("url.path", path),
            ("url.scheme", "https" if served.peer.is_tls else "http"),
            ("client.address", served.peer.remote or served.client),
            ("network.peer.address", served.client),
            ("server.address", host),
            ("network.protocol.version", served.protocol.rpartition("/")[2]),
            ("mesh.response_flags", served.flags or "-"),
            ("mesh.mtls", served.peer.identity is not None),
            *_peer(peer_of(served)),
        ]
        if port:
            attributes.append(("server.port", port))
        if served.client_port:
            attributes.append(("network.peer.port", served.client_port))
        if query:
            attributes.append(("url.query", scrubbed(query)))
        if served.status:
            attributes.append(("http.response.status_code", served.status))
        if agent := served.headers.get("user-agent"):
            attributes.append(("user_agent.original", agent))
        if served.route:
            attributes.append(("http.route", served.route))
        attributes += self._tags(told, served.headers, lambda: seen_request(served))
        error = _error(served.status, served.flags) if served.status >= 500 or not served.status else ""
        name = f"{_name(served.method)} {served.route}".rstrip()
        if served.grpc_status or is_grpc(served.headers.get("content-type")):
            name = path.lstrip("/")
            attributes += _rpc(name, served.grpc_status)
            error = error or _rpc_error(served.grpc_status, _SERVERS_FAULT)
        self._keep(Ended(served.mark, _SERVER, name, served.began, served.ended, tuple(attributes), error))

    def _tags(self, told: Told, headers: HeaderView, see: Callable[[], Seen]) -> Iterator[tuple[str, object]]:
        """What the configuration wants every span to bear."""
        if told.workload:
            yield from self._names
        seen: Seen | None = None
        for tag in told.tags:
            if tag.kind == "formatter":
                seen = seen or see()
                found: str | None = filled_in(tag.value, seen)
            elif tag.kind == "literal":
                found = tag.value
            else:
                found = headers.get(tag.value) if tag.kind == "header" else os.environ.get(tag.value)
            if found := found or tag.default:
                yield tag.name, found

    def _keep(self, span: Ended) -> None:
        with self._lock:
            if len(self._spans) >= MAX_SPANS:
                self.dropped += 1
                self._spans.popleft()
            self._spans.append(span)

    def written(self, spans: list[Ended]) -> list[Span]:
        """As OTLP has them."""
        from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

        from meshlib.telemetry.otlp import set_attributes

        found = []
        for each in spans:
            span = Span(
                trace_id=bytes.fromhex(each.at.trace_id),
                span_id=bytes.fromhex(each.at.span_id),
                parent_span_id=bytes.fromhex(each.at.parent),
                name=each.name,
                kind=each.kind,  # type: ignore[arg-type]
                start_time_unix_nano=int((self._epoch + each.began) * 1e9),
                end_time_unix_nano=int((self._epoch + each.ended) * 1e9),
            )
            set_attributes(span.attributes, each.attributes)
            if each.error:
                span.status.MergeFrom(Status(code=Status.STATUS_CODE_ERROR))
                set_attributes(span.attributes, [("error.type", each.error)])
            found.append(span)
        return found


_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"))


def _method(method: str) -> list[tuple[str, object]]:
    """A method that nobody knows is `_OTHER`: anyone can make them up."""
    if method in _METHODS:
        return [("http.request.method", method)]
    return [("http.request.method", "_OTHER"), ("http.request.method_original", method[:32])]


def _name(method: str) -> str:
    """Of a span: "HTTP if the method is _OTHER"."""
    return method if method in _METHODS else "HTTP"


def _target(request: Request) -> list[tuple[str, object]]:
    """Where a call was to go, as its caller wrote it, without credentials."""
    host, port = _host_and_port(request.authority)
    told: list[tuple[str, object]] = [
        ("server.address", host),
        ("url.full", f"{request.scheme}://{request.authority.rpartition('@')[2]}{scrubbed(request.path)}"),
    ]
    return [*told, ("server.port", port)] if port else told


def _network(authority: str) -> list[tuple[str, object]]:
    """Where it went."""
    host, port = _host_and_port(authority)
    told: list[tuple[str, object]] = [("network.peer.address", host)]
    return [*told, ("network.peer.port", port)] if port else told


def _host_and_port(authority: str) -> tuple[str, int]:
    """`[::1]:80` -> `::1`, 80; 0 where none is written."""
    host, mark, port = authority.rpartition(":")
    if not mark or not port.isdecimal() or len(port) > 5 or (":" in host and not host.startswith("[")):
        return authority.strip("[]"), 0
    return host.strip("[]"), int(port)


def _peer(there: Described) -> list[tuple[str, object]]:
    """Who is at the other end: `reviews-v1.default`; nothing where that is not known."""
    if there.workload == UNKNOWN:
        return []
    return [("mesh.peer", f"{there.workload}.{there.namespace}")]


def _rpc(method: str, status: str) -> list[tuple[str, object]]:
    """OpenTelemetry's conventions for RPC; status: gRPC's number, "" if unknown."""
    told: list[tuple[str, object]] = [("rpc.system.name", "grpc"), ("rpc.method", method)]
    if status.isdigit() and int(status) < len(_GRPC):
        told.append(("rpc.status_code", _GRPC[int(status)]))
    return told


_GRPC = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS"),
    *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED"),
    *("INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"),
)


_SERVERS_FAULT = frozenset(("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"))
"""What makes a server's span an error; the others are its caller's (OpenTelemetry's conventions for gRPC)."""


def _rpc_error(status: str, of: frozenset[str] = frozenset(_GRPC) - {"OK"}) -> str:
    """error.type of a gRPC call: its status, where that is one of these; "" if it is none."""
    name = _GRPC[int(status)] if status.isdigit() and int(status) < len(_GRPC) else ""
    return name if name in of else ""


def _error(status: int, told: str) -> str:
    """OpenTelemetry's error.type of a client: the status from 400 on, or what failed instead."""
    if status >= 400:
        return str(status)
    return "" if status else told or "no response"


def _of_headers(headers: HeaderView) -> tuple[str, str, bool] | None:
    """Trace, span, and whether it is sampled: W3C, else B3."""
    parent = _W3C.fullmatch(headers.get("traceparent") or "")
    if parent is not None:
        return parent[1], parent[2], bool(int(parent[3], 16) & 1)
    told = headers.get("b3")
    if told is None:
        trace = headers.get("x-b3-traceid")
        if trace is None:
            return None
        is_sampled = headers.get("x-b3-sampled") not in ("0", "false")
        told = f"{trace.lower()}-{(headers.get('x-b3-spanid') or '').lower()}-{is_sampled:d}"
    found = _B3.fullmatch(told)
    return None if found is None else (found[1].rjust(32, "0"), found[2], found[3] in ("1", "d", None))


def _of_application() -> tuple[str, str, bool] | None:
    """The span that the application's own OpenTelemetry is in; nothing is imported that it has not."""
    api: Any = sys.modules.get("opentelemetry.trace")
    if api is None:
        return None
    read: Callable[[], Any] | None = getattr(api, "get_current_span", None)
    if read is None:
        return None
    context = read().get_span_context()
    if not context.is_valid:
        return None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}", bool(context.trace_flags & 1)
