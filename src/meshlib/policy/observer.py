"""What is told of a call, and to whom? Observer, the contract, and what the core fills in as an outbound call runs.

Two records, one for each direction. They are plain objects that are filled in while the call runs: by the core, which
knows route and cluster; by the edge, which knows sizes and peers. Where nobody observes, none is made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Protocol

from meshlib.model import UNKNOWN_PEER, Endpoint, HeaderOperations, HeaderView, Outcome, Request
from meshlib.policy.steps import Deliver, Reply, Send

if TYPE_CHECKING:
    from meshlib.policy.cluster import LiveCluster
    from meshlib.policy.propagation import Carried
    from meshlib.policy.router import Decision


class Attempt:
    """One try of a call. began, ended: monotonic seconds; number: from 1; mark: the observer's own."""

    __slots__ = ("began", "cluster", "ended", "endpoint", "mark", "number", "outcome")

    def __init__(self, number: int, send: Send, began: float) -> None:
        self.number, self.began, self.ended = number, began, began
        self.cluster: LiveCluster = send.cluster
        self.endpoint: Endpoint = send.endpoint
        self.outcome: Outcome | None = None
        """None: given up before it ended."""
        self.mark: Any = None


class Messages:
    """How many gRPC messages a call has had so far, from the client and from the server: counted by the edge as they
    pass, whatever number of attempts they took.

    is_stream: there may be many, so they are told as they pass. report: set by whoever wants to hear of each; a call
    can end, to whoever is told of it, a moment before its last message is read. told: what is known there already.
    """

    __slots__ = ("is_stream", "report", "requests", "responses", "told")

    def __init__(self, is_stream: bool = False) -> None:
        self.is_stream = is_stream
        self.requests = self.responses = 0
        self.report: Callable[[Messages], None] | None = None
        self.told = (0, 0)

    def sent(self) -> None:
        self.requests += 1
        if self.report is not None:
            self.report(self)

    def received(self) -> None:
        self.responses += 1
        if self.report is not None:
            self.report(self)

    def __repr__(self) -> str:
        return f"<Messages {self.requests} there, {self.responses} back>"


class Call:
    """One outbound call.

    began, ended: monotonic seconds. decision: what the route said; None when the host was not even looked up.
    cluster: where it was to go; None when the route leads nowhere. last: the attempt whose outcome counts.
    status: what the caller got; 0 is none. flags: Envoy's response flags, "" is none. reason: for logs.
    request_bytes, response_bytes: bodies, as far as the edge has seen them; -1 is not looked at, and content-length
      is believed. is_grpc: the edge speaks gRPC by itself. grpc_status: "" where the call is not gRPC, or its status is
      not known.
    messages: of a gRPC call; None where nobody counts them.
    racing: the attempts of a hedged call, in the order of their start.
    carried: what the request being served hands on. mark, tried: the observer's own.
    """

    __slots__ = (
        "attempts",
        "began",
        "carried",
        "cluster",
        "decision",
        "ended",
        "fault",
        "flags",
        "grpc_status",
        "is_grpc",
        "last",
        "mark",
        "messages",
        "racing",
        "reason",
        "request",
        "request_bytes",
        "response_bytes",
        "response_headers",
        "status",
        "tried",
    )

    def __init__(self, carried: Carried | None = None) -> None:
        self.request: Request | None = None
        self.began = self.ended = 0.0
        self.carried = carried
        self.decision: Decision | None = None
        self.cluster: LiveCluster | None = None
        self.last: Attempt | None = None
        self.attempts = 0
        self.status = 0
        self.flags = self.reason = self.grpc_status = self.fault = ""
        self.is_grpc = False
        self.request_bytes = self.response_bytes = -1
        self.response_headers: HeaderView | None = None
        self.messages: Messages | None = None
        self.racing: list[Attempt] = []
        self.mark: Any = None
        self.tried: list[Any] = []

    def sent(self, size: int) -> None:
        """The edge has sent so many bytes of a request's body whose length nobody told before."""
        self.request_bytes = size if self.request_bytes < 0 else self.request_bytes + size

    def received(self, size: int) -> None:
        """The edge has read so many bytes of the response's body."""
        self.response_bytes = size if self.response_bytes < 0 else self.response_bytes + size

    @property
    def wire_sizes(self) -> tuple[int, int]:
        """Bytes there and back, of heads and bodies."""
        request_head, there = sizes_of(None if self.request is None else self.request.headers)
        response_head, back = sizes_of(self.response_headers)
        there, back = self._bodies(there, back)
        return request_head + there, response_head + back

    @property
    def body_sizes(self) -> tuple[int, int]:
        """Bytes of the bodies, there and back."""
        told = sizes_of(None if self.request is None else self.request.headers)[1]
        return self._bodies(told, sizes_of(self.response_headers)[1])

    def _bodies(self, there: int, back: int) -> tuple[int, int]:
        """As they were counted, else as their heads say."""
        if self.response_bytes >= 0:
            back = self.response_bytes
        elif self.status in (204, 304) or (self.request is not None and self.request.method == "HEAD"):
            back = 0
        return self.request_bytes if self.request_bytes >= 0 else there, back

    def __repr__(self) -> str:
        return (
            f"<Call {self.request and self.request.authority} {self.status} {self.flags or '-'} {self.attempts} tries>"
        )


class Served:
    """One inbound request.

    began, ended: monotonic seconds. headers: the request's. status: 0 is no answer. flags, reason: as a Call's.
    peer: who is calling, as its certificate says.
    authority: the Host that was asked for. client, client_port: the peer's address; "" and 0 are unknown. is_probe: a
    kubelet's, of which no observer is told. route: the application's route template, "" if
      unknown. carried: what the request brought. messages: of a gRPC call. mark: the observer's own.
    """

    __slots__ = (
        "authority",
        "began",
        "carried",
        "client",
        "client_port",
        "ended",
        "flags",
        "grpc_status",
        "headers",
        "is_probe",
        "mark",
        "messages",
        "method",
        "path",
        "peer",
        "protocol",
        "reason",
        "request_bytes",
        "response_bytes",
        "route",
        "status",
    )

    def __init__(self, method: str, path: str, headers: HeaderView, began: float, protocol: str = "HTTP/1.1") -> None:
        self.method, self.path, self.headers, self.protocol = method, path, headers, protocol
        self.began = self.ended = began
        self.authority = self.client = self.route = ""
        self.client_port = 0
        self.is_probe = False
        self.peer = UNKNOWN_PEER
        self.status = 0
        self.flags = self.reason = self.grpc_status = ""
        self.request_bytes = self.response_bytes = 0
        self.messages: Messages | None = None
        self.carried: Carried | None = None
        self.mark: Any = None

    def __repr__(self) -> str:
        return f"<Served {self.method} {self.path} {self.status} {self.flags or '-'}>"


class Observer(Protocol):
    """Who is told. Called where the call runs, on any thread and loop: never blocks, never raises, keeps no record's
    headers after `call_ended` and `served` have returned.

    call_began: before the route is looked up. attempt_began: what it returns is done to the headers of this attempt.
    serving: before the application; what it returns is what calls made for this request carry, when it is not None.
    """

    def call_began(self, call: Call) -> None: ...
    def attempt_began(self, call: Call, attempt: Attempt) -> HeaderOperations | None: ...
    def attempt_ended(self, call: Call, attempt: Attempt) -> None: ...
    def call_ended(self, call: Call) -> None: ...
    def serving(self, served: Served) -> Carried | None: ...
    def served(self, served: Served) -> None: ...


# What the core tells, as a call runs


def attempted(call: Call, send: Send, observer: Observer, now: float) -> tuple[Attempt, Send]:
    """One more attempt, and `send` with what the observer does to its headers."""
    call.attempts += 1
    attempt = call.last = Attempt(call.attempts, send, now)
    call.cluster = send.cluster
    operations = observer.attempt_began(call, attempt)
    if operations is None:
        return attempt, send
    cluster, endpoint, authority, path, headers, timeout, deadline = send
    return attempt, Send(cluster, endpoint, authority, path, (*headers, operations), timeout, deadline)


def ended(call: Call, attempt: Attempt, outcome: Outcome | None, observer: Observer, now: float) -> None:
    attempt.ended, attempt.outcome = now, outcome
    observer.attempt_ended(call, attempt)


def delivered(call: Call, step: Deliver) -> None:
    """The caller gets what the last attempt brought."""
    outcome = None if call.last is None else call.last.outcome
    if outcome is not None and outcome.status is not None:
        call.status = outcome.status
        call.response_headers = outcome.headers
    if call.is_grpc:
        if outcome is not None and outcome.status is not None:
            call.grpc_status = str(outcome.grpc_status or 0)
        else:
            call.grpc_status = _grpc_status(call.status, step.flag)
        call.status = 200  # as on the wire: gRPC's own status is in the trailers
    _flagged(call, step.flag, step.reason)


def replied(call: Call, step: Reply) -> None:
    """The mesh answers in the server's place."""
    if step.flag != "UT":
        call.last = None
    call.status = step.status
    call.response_bytes = len(step.body)
    if call.is_grpc:
        told = dict(step.headers).get("grpc-status")
        call.grpc_status = _grpc_status(step.status, step.flag) if told is None else told
        call.status = 200
    _flagged(call, step.flag, step.reason)


def _flagged(call: Call, flags: str, reason: str) -> None:
    if call.fault and "DI" not in flags:
        flags = f"DI,{flags}" if flags else "DI"
    call.flags, call.reason = flags, reason


def _grpc_status(status: int, flags: str) -> str:
    return "4" if "UT" in flags or "DC" in flags else _GRPC_OF.get(status, "14")


_GRPC_OF = {400: "13", 401: "16", 403: "7", 404: "12"}
"""gRPC's http-grpc-status-mapping, where it is not UNAVAILABLE."""


def size_of(headers: HeaderView | None) -> int:
    """What a head takes on the wire (HTTP/1.1: name, value and four more of each line), in bytes; views that show no
    pairs have no size."""
    return sizes_of(headers)[0]


def sizes_of(headers: HeaderView | None) -> tuple[int, int]:
    """`size_of` a head; and what it says of its body, in bytes, 0 where it says nothing that can be believed."""
    raw: Collection[tuple[bytes, bytes]] | None = getattr(headers, "raw", None)
    told: str | bytes | None = None
    size = 0
    if raw is None:
        told = None if headers is None else headers.get("content-length")
    else:
        size = 4 * len(raw)
        for name, value in raw:
            size += len(name) + len(value)
            if len(name) == 14 and name.lower() == b"content-length":
                told = value if told is None else b"two"
    return size, int(told) if told and told.isdigit() and len(told) < 16 else 0
