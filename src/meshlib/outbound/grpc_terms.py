"""What do a gRPC call and its end look like to the core, and the core's word to a gRPC user? For sync and aio alike.

The rules:
- To the core every call is a POST of `/package.Service/Method` to the authority that the channel was made for.
- A status that the server sent is an answer; the core sees the HTTP status that Envoy counts it as. What gRPC's own
  core made up (no connection, a connection that broke) is a failure by name, as with every other client.
- Commits with the first message of the response, or with its metadata, if those were asked for.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import grpc

from meshlib.errors import (
    AnsweredByRoute,
    FaultInjected,
    MeshError,
    NoHealthyEndpoint,
    NotConfigured,
    UpstreamConnectionFailure,
)
from meshlib.identity.tls import TlsContexts
from meshlib.model import Endpoint, HeaderOperations, HeaderView, LoadBalancing, Outcome, Request
from meshlib.outbound.raising import answered, failed
from meshlib.policy import propagation
from meshlib.policy.call import CallContext, outbound_call
from meshlib.policy.live import Live
from meshlib.policy.observer import Messages
from meshlib.policy.retry import CLIENT_TIMEOUT, CONNECT_FAILURE, REFUSED_STREAM, RESET, TIMEOUT
from meshlib.policy.steps import Deliver, Flow, Reply, Send

Metadata = tuple[tuple[str, str | bytes], ...]

_UNSEEN = (NoHealthyEndpoint, NotConfigured, UpstreamConnectionFailure)
"""What becomes of calls that no server has seen."""
_CLOSE_ENOUGH = 0.005
"""Seconds. gRPC's timers and ours do not agree to the millisecond on whose deadline it was."""

# Envoy, Grpc::Utility::grpcToHttpStatus.
_HTTP_OF = (200, 499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401)
# Envoy, Grpc::Utility::httpToGrpcStatus; any other is UNKNOWN.
_GRPC_OF = {400: 13, 401: 16, 403: 7, 404: 12, 429: 14, 502: 14, 503: 14, 504: 14}
CODES = {code.value[0]: code for code in grpc.StatusCode}

# What C-core says of an UNAVAILABLE that no server has sent.
_UNCONNECTED = re.compile(
    r"failed to connect to (?:all addresses|remote host)|DNS resolution failed|errors resolving ", re.I
)
_REFUSED = re.compile(r"RST_STREAM with error code 7|refused stream", re.I)
_BROKEN = re.compile(
    r"socket closed|connection reset|broken pipe|recvmsg|sendmsg|endpoint closing|transport closed|goaway|"
    r"keepalive watchdog|stream removed|connection (?:aborted|shutdown|closed)|end of (?:file|tcp)",
    re.I,
)


class Home(Protocol):
    """What a channel needs of its Mesh. Callable from any thread; the first call starts the feeds."""

    @property
    def live(self) -> Live: ...
    @property
    def tls(self) -> TlsContexts: ...

    def call_context(self, deadline: float | None, may_resend: bool) -> CallContext: ...
    def resolve(self, authority: str) -> None: ...
    async def resolve_async(self, authority: str) -> None: ...


class Terms(NamedTuple):
    """What the user says of one call, as gRPC's multi-callables take it."""

    timeout: float | None = None
    metadata: Any = None
    credentials: grpc.CallCredentials | None = None
    wait_for_ready: bool | None = None
    compression: grpc.Compression | None = None


class MetadataView:
    """A HeaderView over metadata; values of `-bin` names in base64, as on the wire."""

    __slots__ = ("_pairs", "_status")

    def __init__(self, pairs: Iterable[Any] | None, status: str = "") -> None:
        self._pairs, self._status = tuple(pairs or ()), status

    @property
    def raw(self) -> list[tuple[bytes, bytes]]:
        """For whoever measures, at the end of a call; made anew each time."""
        return [
            (key.encode("utf-8", "replace"), told(key, value).encode("utf-8", "replace")) for key, value in self._pairs
        ]

    def get(self, name: str, /) -> str | None:
        if name == "grpc-status":
            return self._status or None
        found = [told(key, value) for key, value in self._pairs if key == name]
        if not found:
            return "application/grpc" if name == "content-type" else None
        return ", ".join(found)

    def __repr__(self) -> str:
        return f"<MetadataView {len(self._pairs)}>"


def told(name: str, value: str | bytes) -> str:
    if isinstance(value, str):
        return value
    return base64.b64encode(value).decode() if name.endswith("-bin") else value.decode("latin-1")


class Call:
    """One call of a user, before any attempt: its view for the core, its metadata, its deadline."""

    __slots__ = ("carried", "deadline", "home", "is_secured", "messages", "metadata", "request", "terms")

    def __init__(self, home: Home, authority: str, path: str, terms: Terms, is_secured: bool = False) -> None:
        """is_secured: the channel has credentials of the user's."""
        self.home, self.terms, self.is_secured = home, terms, is_secured
        self.metadata: Metadata = tuple(terms.metadata) if terms.metadata else ()
        self.carried = carried = propagation.current.get()
        view: HeaderView = MetadataView(self.metadata)
        if carried is not None:
            view = propagation.CarryingHeaders(view, carried)
        self.request = Request("POST", "http", authority, path, view)
        self.deadline = None if terms.timeout is None else time.monotonic() + terms.timeout
        """The user's own, in monotonic seconds."""
        self.messages = Messages()

    def flow(self, finds_its_way: bool = False) -> Flow:
        deadline = self.deadline
        if self.carried is not None:
            inherited = self.carried.remaining_deadline()
            if inherited is not None and (deadline is None or inherited < deadline):
                deadline = inherited
        context = self.home.call_context(deadline, False)
        if context.call is not None:
            context.call.is_grpc, context.call.messages = True, self.messages
        if finds_its_way or self.is_secured:
            context = context._replace(finds_its_way=finds_its_way, is_secured=self.is_secured)
        return outbound_call(self.request, context)

    def sent(self, step: Send) -> Metadata:
        """The metadata of an attempt."""
        metadata = self.handed_on()
        return applied(step.headers, metadata) if step.headers else metadata

    def handed_on(self) -> Metadata:
        """The user's metadata, and what the request being served adds to it."""
        if self.carried is None:
            return self.metadata
        return (*self.metadata, *_carried(self.carried, self.metadata))

    def remaining(self) -> float | None:
        """Seconds that the user, and whoever calls this process, leave for it."""
        own = self.terms.timeout
        left = None if self.carried is None else self.carried.remaining_time()
        if left is None:
            return own
        return max(0.0, left) if own is None else min(own, max(0.0, left))

    def timeout(self, step: Send, is_stream: bool) -> float | None:
        """Seconds for gRPC's own deadline, which also tells the server: for a response that is a stream, until its end;
        a shorter time until its first message is the edge's to keep."""
        if not is_stream or step.deadline is None:
            return step.timeout
        return max(0.0, step.deadline - time.monotonic())

    def outcome(self, error: Any, step: Send, began: float, is_replayable: bool = True) -> Outcome:
        """What a failed attempt came to. error: whatever answers code(), details() and trailing_metadata()."""
        code: grpc.StatusCode = error.code() or grpc.StatusCode.UNKNOWN
        details: str = error.details() or ""
        number = code.value[0]
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            now = time.monotonic() + _CLOSE_ENOUGH
            if self.deadline is not None and now >= self.deadline:
                return Outcome(None, None, CLIENT_TIMEOUT, is_replayable)
            if step.timeout is not None and now - began >= step.timeout:
                return Outcome(None, None, TIMEOUT, is_replayable)
        elif code is grpc.StatusCode.UNAVAILABLE:
            if _UNCONNECTED.search(details):
                return Outcome(None, None, CONNECT_FAILURE, is_replayable)
            if _REFUSED.search(details):
                return Outcome(None, None, REFUSED_STREAM, is_replayable)
            if _BROKEN.search(details):
                return Outcome(None, None, RESET, is_replayable)
        # Not its initial metadata: they may be still to come, and by the very thread of gRPC that asks here.
        view = MetadataView(error.trailing_metadata(), str(number))
        return Outcome(_HTTP_OF[number] if number < len(_HTTP_OF) else 500, view, "", is_replayable, number)


_ENCODING = "grpc-internal-encoding-request"
_ENCODINGS = {
    grpc.Compression.NoCompression: "identity",
    grpc.Compression.Deflate: "deflate",
    grpc.Compression.Gzip: "gzip",
}


def compressed(kind: str, metadata: Metadata, compression: grpc.Compression | None) -> tuple[Metadata, Any]:
    """What a native call of this kind is given as its metadata and its compression.

    Futures of calls whose request is a stream forget the latter in grpcio (1.85 and before; the blocking ones don't):
    they are told in its core's own way, GRPC_COMPRESSION_REQUEST_ALGORITHM_MD_KEY.
    """
    if kind != "stream_unary" or compression is None:
        return metadata, compression
    return (*metadata, (_ENCODING, _ENCODINGS[grpc.Compression(compression)])), None


OK = Outcome(200, MetadataView(()))


def reports_load(step: Send) -> bool:
    """Whether somebody wants to read the trailing metadata of a call that went well."""
    return step.cluster.cluster.load_balancing is LoadBalancing.CLIENT_SIDE_WEIGHTED_ROUND_ROBIN


def _carried(carried: propagation.Carried, present: Metadata) -> list[tuple[str, str | bytes]]:
    """What the request being served hands on, as metadata. The deadline goes as gRPC's own."""
    shown = _Raw([(name.encode("latin-1"), b"") for name, _ in present])
    added: list[tuple[str, str | bytes]] = []
    for raw_name, raw_value in propagation.outbound_headers(carried, shown):
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        if raw_name == propagation.EXPECTED_TIMEOUT:
            continue
        if not name.endswith("-bin"):
            added.append((name, value))
            continue
        try:
            added.append((name, base64.b64decode(value + "=" * (-len(value) % 4), validate=True)))
        except binascii.Error:  # what came in was never base64, so it is no value of this name
            continue
    return added


class _Raw(NamedTuple):
    raw: Sequence[tuple[bytes, bytes]]


def applied(operations: Sequence[HeaderOperations], metadata: Iterable[Any]) -> Metadata:
    """`metadata` after `operations`, each in the order remove, set, add. Names that gRPC keeps to itself are not
    touched: it would fail the call."""
    pairs: list[tuple[str, str | bytes]] = [(name, value) for name, value in metadata]
    for step in operations:
        gone = {*step.remove, *(name for name, _ in step.set)}
        pairs = [pair for pair in pairs if pair[0] not in gone]
        pairs += [
            (name, value)
            for name, value in (*step.set, *step.add)
            if not name.startswith((":", "grpc-")) and name not in _GRPCS_OWN
        ]
    return tuple(pairs)


_GRPCS_OWN = frozenset({"host", "te", "content-type", "user-agent", "content-length", "connection"})


class Refusal(grpc.RpcError):
    """What the mesh says in a server's place: a grpc.RpcError that answers as a finished call does.

    grpc_code is set by `refused`; the class is mixed with the MeshError that says why (outbound/raising).
    """

    grpc_code = grpc.StatusCode.UNAVAILABLE
    metadata: Metadata = ()

    def code(self) -> grpc.StatusCode:
        return self.grpc_code

    def details(self) -> str:
        return str(self)

    def initial_metadata(self) -> Any:
        return ()

    def trailing_metadata(self) -> Any:
        return self.metadata

    def debug_error_string(self) -> str:
        return f"meshlib: {self}"


def code_of(reply: Reply, error: MeshError) -> grpc.StatusCode:
    """The status that Envoy's answer would have for a gRPC client."""
    for name, value in reply.headers:
        if name == "grpc-status" and value.isdigit():
            return CODES.get(int(value), grpc.StatusCode.UNKNOWN)
    if isinstance(error, (FaultInjected, AnsweredByRoute)):
        return CODES[_GRPC_OF.get(reply.status, 2)]
    return CODES[error.grpc_status]


def metadata_of(reply: Reply) -> Metadata:
    """What goes along with the mesh's answer."""
    return tuple((name, value) for name, value in reply.headers if name not in _GRPCS_OWN and name[:5] != "grpc-")


# How a call fails


_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Seconds between the tries of a call that waits until its service is ready."""


def as_told(error: Any, failure: str, step: Deliver, endpoint: Endpoint | None) -> Any:
    """A status that the server sent is raised as it is; what came of the network, or of a timeout, as a MeshError,
    too."""
    return failed(error, failure, step.flag, step.reason, endpoint) if failure else error


def answer(reply: Reply) -> Any:
    """The exception for an answer of the mesh."""
    error: Any = answered(reply, lambda kind: Refusal)
    error.grpc_code = code_of(reply, error)
    error.metadata = metadata_of(reply)
    return error


def refusal(words: str, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> Refusal:
    error = Refusal(words)
    error.grpc_code = code
    return error


def waits(error: Any, call: Call) -> bool:
    """Whether a call that waits until its service is ready waits on: nobody has seen it (gRPC's wait_for_ready)."""
    if not call.terms.wait_for_ready or not isinstance(error, _UNSEEN):
        return False
    return call.deadline is None or time.monotonic() < call.deadline


def late(call: Call) -> Any:
    return answer(Reply(504, (), b"", "UT", f"{call.request.authority}: not ready within the call's own timeout"))


def pauses(call: Call) -> Iterator[float]:
    """How long a call that waits for its service pauses, again and again, never past its deadline."""
    pause = _FIRST_PAUSE
    while True:
        left = pause if call.deadline is None else min(pause, call.deadline - time.monotonic())
        yield max(0.0, left)
        pause = min(pause * 2, _LONGEST_PAUSE)
