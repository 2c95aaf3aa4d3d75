"""What does an inbound request hand to the outbound calls made while it is served?

Three things: who asked first (trace context and x-request-id), how long the caller still waits (its deadline), and the
headers that the user named. A sidecar can't do this, it does not know which calls belong to which request; Istio asks
every application to copy the headers by hand.

The rules:
- Trace context goes on as it came, in every format that came. None is invented: a request without one has no trace.
- x-request-id is invented where it is missing, as Envoy does (generate_request_id).
- What the application put on an outbound request wins, by format: its own traceparent also keeps our tracestate away.
- A value that its specification does not allow is left out; nothing here raises because of what a peer sent.
- Cookies and authorization are handed on only when named: they were meant for this service.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Protocol

from meshlib.errors import SettingsError
from meshlib.model import HeaderView

REQUEST_ID = b"x-request-id"
EXPECTED_TIMEOUT = b"x-envoy-expected-rq-timeout-ms"
UPSTREAM_TIMEOUT = b"x-envoy-upstream-rq-timeout-ms"
GRPC_TIMEOUT = b"grpc-timeout"
_DEADLINES = frozenset({EXPECTED_TIMEOUT, UPSTREAM_TIMEOUT, GRPC_TIMEOUT})

MAX_VALUE = 8192
"""Bytes of one value: what W3C Baggage asks for, and about what servers take for one header (gunicorn: 8190)."""
MAX_TRACESTATE = 512
"""Bytes of tracestate: what W3C Trace Context asks to propagate at least."""

_HEX16 = rb"[0-9a-fA-F]{16}"
_HEX32 = _HEX16 + _HEX16
_SPAN = rb"(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_VISIBLE = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]{0,1022}[\x21-\x7e])?")
_LIST = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?")

# The formats of trace context, as Istio's documentation lists them for forwarding (b3 single and baggage added). A
# format of which the application has sent a part itself is not handed on at all.
_FORMATS: tuple[dict[bytes, re.Pattern[bytes]], ...] = (
    {REQUEST_ID: re.compile(rb"[\x21-\x7e]{1,256}")},
    {  # W3C Trace Context, 3.2: version ff is forbidden, 00 has no further parts
        b"traceparent": re.compile(rb"00-" + _SPAN + rb"|(?!00|ff)[0-9a-f]{2}-" + _SPAN + rb"(?:-[\x21-\x7e]{0,200})?"),
        b"tracestate": _LIST,
    },
    {b"baggage": _LIST},
    {  # openzipkin/b3-propagation
        b"b3": re.compile(
            rb"[01d]|(?:%b|%b)-%b(?:-[01d](?:-%b)?)?" % (_HEX32, _HEX16, _HEX16, _HEX16),
        ),
        b"x-b3-traceid": re.compile(_HEX32 + rb"|" + _HEX16),
        b"x-b3-spanid": re.compile(_HEX16),
        b"x-b3-parentspanid": re.compile(_HEX16),
        b"x-b3-sampled": re.compile(rb"[01]|true|false"),
        b"x-b3-flags": re.compile(rb"[01]"),
    },
    {
        b"x-datadog-trace-id": _VISIBLE,
        b"x-datadog-parent-id": _VISIBLE,
        b"x-datadog-sampling-priority": _VISIBLE,
    },
    {b"x-ot-span-context": _VISIBLE},
    {b"x-cloud-trace-context": _VISIBLE},
    {b"grpc-trace-bin": _VISIBLE},
    {b"sw8": re.compile(rb"[\x21-\x7e]{1,2048}")},
)
TRACE_CONTEXT = tuple(
    name.decode("ascii") for names in _FORMATS for name in names if name not in (REQUEST_ID, b"baggage")
)
"""What tells whoever is called of a trace; baggage and the request's id are the application's as well."""
_PATTERNS = {name: pattern for names in _FORMATS for name, pattern in names.items()}
_FORMAT_OF = {name: frozenset(names) for names in _FORMATS for name in names}
_FIELD_VALUE = re.compile(rb"[\x21-\x7e\x80-\xff](?:[\x20-\x7e\x80-\xff\t]*[\x21-\x7e\x80-\xff])?")  # RFC 9110, 5.5
_TOKEN = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, 5.6.2
_LIMITS = {b"tracestate": MAX_TRACESTATE, b"baggage": MAX_VALUE}

# What belongs to one connection or to one message's body (RFC 9110, 7.6.1 and 8) says nothing about another message.
_NOT_FORWARDED = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
    *("transfer-encoding", "upgrade", "host", "expect", "range", "accept-encoding"),
    *("content-encoding", "content-length", "content-type"),
    *(name.decode() for name in _DEADLINES),
}

_GRPC_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_GRPC_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_MILLISECONDS = re.compile(rb"[0-9]{1,15}")


class RawHeaders(Protocol):
    """Headers that can be read as pairs: httpx.Headers, httpx2.Headers and model.Headers are."""

    @property
    def raw(self) -> Sequence[tuple[bytes, bytes]]: ...


class Carried:
    """What one inbound request hands on. Shared by all tasks and threads that serve it.

    headers: (name, value) with lower-case names. Only the deadline ever changes: `finish` lifts it, since work that
    goes on after the answer keeps nobody waiting.
    """

    __slots__ = ("_clock", "_deadline", "headers")

    def __init__(
        self,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        deadline: float | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """deadline: in seconds of `clock`, which is needed only with one."""
        assert deadline is None or clock is not None
        self.headers = headers
        self._deadline = deadline
        self._clock = clock

    def remaining_deadline(self) -> float | None:
        """The deadline in force, in the clock's seconds; None when there is none or the request is finished."""
        return self._deadline

    def remaining_time(self) -> float | None:
        """Seconds until the deadline in force, negative when it has passed."""
        deadline = self._deadline  # read once: another thread may finish the request meanwhile
        return None if deadline is None or self._clock is None else deadline - self._clock()

    def with_header(self, header: tuple[bytes, bytes]) -> Carried:
        """The same with this header in place of its like."""
        kept = (pair for pair in self.headers if pair[0] != header[0])
        return Carried((header, *kept), self._deadline, self._clock)

    def has_expired(self) -> bool:
        remaining = self.remaining_time()
        return remaining is not None and remaining <= 0

    def finish(self) -> None:
        """The response has gone: nobody waits any more."""
        self._deadline = None

    def get(self, name: str, /) -> str | None:
        wanted = name.encode("latin-1")
        return next((value.decode("latin-1") for key, value in self.headers if key == wanted), None)

    def __repr__(self) -> str:
        deadline = "no deadline" if self._deadline is None else f"deadline {self._deadline:.3f}"
        return f"<Carried {b' '.join(name for name, _ in self.headers).decode('latin-1')}, {deadline}>"


current: ContextVar[Carried | None] = ContextVar("meshlib_carried", default=None)
"""What the request being served hands on; None outside of one. Set by meshlib.inbound, read by meshlib.outbound."""


class Intake:
    """What is taken up from inbound requests. Made once for an application.

    names: lower-case names of all headers that `take_up` looks at.
    """

    __slots__ = ("_patterns", "names")

    def __init__(self, forward_headers: Iterable[str] = ()) -> None:
        """forward_headers: names of headers to hand on besides trace context.

        Raises SettingsError for what is no header's name, and for headers that belong to one message only.
        """
        named = [name.strip().lower() for name in forward_headers]
        for name in named:
            if not _TOKEN.fullmatch(name):
                raise SettingsError(
                    f"forward_headers: {name!r} is no header's name: letters, digits and -, as end-user"
                )
            if name in _NOT_FORWARDED:
                raise SettingsError(
                    f"forward_headers: {name!r} belongs to one message and can't be handed on: leave it out"
                )
        self._patterns = {name.encode("ascii"): _FIELD_VALUE for name in named} | _PATTERNS
        self.names = self._patterns.keys() | _DEADLINES

    def take_up(
        self,
        headers: Iterable[tuple[bytes, bytes]],
        clock: Callable[[], float],
        outer: Carried | None = None,
        new_request_id: Callable[[], bytes] = lambda: str(uuid.uuid4()).encode("ascii"),
    ) -> Carried:
        """headers: as they came, names in lower case. outer: what was in force where the request is served, when one
        application calls another in its own process; its deadline is one too."""
        found: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in self.names:
                # RFC 9110, 5.2 (cookies: RFC 9113, 8.2.3). A list of two traceparents is malformed, as W3C wants it.
                found[name] = found[name] + (b"; " if name == b"cookie" else b", ") + value if name in found else value
        deadline = None if outer is None else outer.remaining_deadline()
        if found and not _DEADLINES.isdisjoint(found):
            timeout = _timeout(found)
            if timeout is not None:
                arrived = clock()
                deadline = arrived + timeout if deadline is None else min(deadline, arrived + timeout)
        carried: dict[bytes, bytes] = {}
        for name, value in found.items():
            pattern = self._patterns.get(name)
            if name in _LIMITS:
                value = _whole_members(value, _LIMITS[name])
            if pattern is not None and len(value) <= MAX_VALUE and pattern.fullmatch(value):
                carried[name] = value
        if b"tracestate" in carried and b"traceparent" not in carried:
            # "If the vendor failed to parse traceparent, it MUST NOT attempt to parse tracestate."
            del carried[b"tracestate"]
        if REQUEST_ID not in carried:
            carried[REQUEST_ID] = new_request_id()
        return Carried(tuple(carried.items()), deadline, clock)

    def __repr__(self) -> str:
        named = sorted(self._patterns.keys() - _PATTERNS.keys())
        return f"<Intake trace context, deadline{''.join(', ' + name.decode() for name in named)}>"


def outbound_headers(
    carried: Carried | None, present: RawHeaders, timeout: float | None = None
) -> list[tuple[bytes, bytes]]:
    """What to add to an outbound request that has the headers `present`: what is carried and not already there.

    The time left goes along as x-envoy-expected-rq-timeout-ms, for whoever serves the call to hand on in turn: until
    the deadline, or `timeout` seconds, which the attempt itself has, whichever ends first. A gRPC request without a
    deadline of its own gets it as grpc-timeout, too, which every gRPC server heeds.
    """
    there = {name.lower(): value for name, value in present.raw}
    added: list[tuple[bytes, bytes]] = []
    if carried is not None:
        sent = there.keys()
        added += [pair for pair in carried.headers if sent.isdisjoint(_FORMAT_OF.get(pair[0]) or (pair[0],))]
        remaining = carried.remaining_time()
        if remaining is not None and (timeout is None or remaining < timeout):
            timeout = remaining
    if timeout is not None:
        # Envoy (FilterUtility::setTimeoutHeaders): 0 would be no timeout at all, so one out of time is given 1 ms.
        milliseconds = max(1, int(timeout * 1000))
        if EXPECTED_TIMEOUT not in there:
            added.append((EXPECTED_TIMEOUT, b"%d" % milliseconds))
        if GRPC_TIMEOUT not in there and is_grpc(there.get(b"content-type", b"")):
            added.append((GRPC_TIMEOUT, b"%dm" % min(milliseconds, 99_999_999)))
    return added


def is_grpc(content_type: bytes) -> bool:
    """`application/grpc`, `application/grpc+proto`, but not `application/grpc-web` (Envoy's isGrpcContentType)."""
    head, rest = content_type[:16], content_type[16:17]
    return head == b"application/grpc" and rest in (b"", b"+", b";")


class CarryingHeaders:
    """A HeaderView of an outbound request's headers together with what is carried, so that routes can match on both."""

    __slots__ = ("_carried", "_own")

    def __init__(self, own: HeaderView, carried: Carried) -> None:
        self._own, self._carried = own, carried

    @property
    def raw(self) -> Sequence[tuple[bytes, bytes]]:
        """The request's own."""
        own: Sequence[tuple[bytes, bytes]] = getattr(self._own, "raw", ())
        return own

    def get(self, name: str, /) -> str | None:
        value = self._own.get(name)
        return self._carried.get(name) if value is None else value

    def __repr__(self) -> str:
        return f"<CarryingHeaders {self._own!r} {self._carried!r}>"


def _whole_members(value: bytes, limit: int) -> bytes:
    """A comma-separated list without the members at its end that exceed `limit` bytes ("SHOULD be removed from the
    end", W3C Trace Context, 3.3.1.5)."""
    if len(value) <= limit:
        return value
    return value[: value.rfind(b",", 0, limit + 1)].rstrip(b" \t") if b"," in value[: limit + 1] else b""


def _timeout(found: dict[bytes, bytes]) -> float | None:
    """Seconds that the caller waits, by the header that says the least. 0 is no timeout in Envoy's headers, and no
    time in gRPC's, whose servers answer it with DEADLINE_EXCEEDED."""
    # Envoy's router with respect_expected_rq_timeout: the other counts only without this one, which a proxy has set.
    milliseconds = found.get(EXPECTED_TIMEOUT) or found.get(UPSTREAM_TIMEOUT) or b""
    timeouts = []
    if _MILLISECONDS.fullmatch(milliseconds) and int(milliseconds) > 0:
        timeouts.append(int(milliseconds) / 1000)
    # "TimeoutValue: positive integer as ASCII string of at most 8 digits" (gRPC over HTTP/2).
    if match := _GRPC_TIMEOUT.fullmatch(found.get(GRPC_TIMEOUT, b"")):
        timeouts.append(int(match[1]) * _GRPC_UNITS[match[2]])
    return min(timeouts, default=None)
