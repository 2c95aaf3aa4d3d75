"""What is told of a call, and to whom? Observer, the contract; and `observed`, which looks on as an outbound call runs.

Two records, one for each direction. They are plain objects that are filled in while the call runs: by the core, which
knows route and cluster; by the edge, which knows sizes and peers. Where nobody observes, none is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from meshlib.model import UNKNOWN_PEER, Endpoint, HeaderOperations, HeaderView, Outcome, Request
from meshlib.policy.steps import Deliver, Finished, Flow, Race, Reply, Send, Win

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
        self.mark: Any = None
        self.tried: list[Any] = []

    def received(self, size: int) -> None:
        """The edge has read so many bytes of the response's body."""
        self.response_bytes = size if self.response_bytes < 0 else self.response_bytes + size

    def __repr__(self) -> str:
        return (
            f"<Call {self.request and self.request.authority} {self.status} {self.flags or '-'} {self.attempts} tries>"
        )


class Served:
    """One inbound request.

    began, ended: monotonic seconds. headers: the request's. status: 0 is no answer. flags, reason: as a Call's.
    peer: who is calling, as its certificate says.
    authority: the Host that was asked for. client: the peer's address. route: the application's route template, "" if
      unknown. carried: what the request brought. messages: of a gRPC call. mark: the observer's own.
    """

    __slots__ = (
        "authority",
        "began",
        "carried",
        "client",
        "ended",
        "flags",
        "grpc_status",
        "headers",
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


def observed(flow: Flow, call: Call, observer: Observer, clock: Callable[[], float]) -> Flow:
    """`flow`, with `observer` told what comes of it. The call ends when the flow is closed: with its body."""
    racing: list[Attempt] = []
    attempt: Attempt | None = None
    observer.call_began(call)
    try:
        step = next(flow)
        while True:
            if isinstance(step, Send):
                attempt, step = _begin(call, step, observer, clock)
                answer = yield step
                attempt.ended = clock()
                attempt.outcome = answer if isinstance(answer, Outcome) else None
                observer.attempt_ended(call, attempt)
            elif isinstance(step, (Deliver, Reply)):
                _judge(call, step, attempt)
                yield step
                return
            elif isinstance(step, Race):
                if step.start is not None:
                    started, send = _begin(call, step.start, observer, clock)
                    racing.append(started)
                    step = step._replace(start=send)
                answer = yield step
                if isinstance(answer, Finished):
                    runner = racing[answer.number]
                    runner.ended, runner.outcome = clock(), answer.outcome
                    observer.attempt_ended(call, runner)
            else:
                if isinstance(step, Win):
                    attempt = racing[step.number]
                answer = yield step
            step = flow.send(answer)
    finally:
        flow.close()
        call.ended = clock()
        if call.status == 0 and not call.flags:
            call.flags = "DC"  # the caller went away before there was an answer: cancelled, or its process is ending
        for runner in racing:
            if runner.outcome is None:
                runner.ended = call.ended
                observer.attempt_ended(call, runner)
        observer.call_ended(call)


def _begin(call: Call, step: Send, observer: Observer, clock: Callable[[], float]) -> tuple[Attempt, Send]:
    call.attempts += 1
    attempt = call.last = Attempt(call.attempts, step, clock())
    call.cluster = step.cluster
    operations = observer.attempt_began(call, attempt)
    if operations is not None:
        step = step._replace(headers=(*step.headers, operations))
    return attempt, step


def _judge(call: Call, step: Deliver | Reply, attempt: Attempt | None) -> None:
    if isinstance(step, Reply):
        call.status = step.status
        call.response_bytes = len(step.body)
        call.last = attempt if step.flag == "UT" else None
    else:
        call.last = attempt
        outcome = None if attempt is None else attempt.outcome
        if outcome is not None and outcome.status is not None:
            call.status = outcome.status
            call.response_headers = outcome.headers
    flags = step.flag
    if call.is_grpc:
        call.grpc_status = _grpc_status(call, step, attempt)
        call.status = 200  # as on the wire: gRPC's own status is in the trailers
    if call.fault and "DI" not in flags:
        flags = f"DI,{flags}" if flags else "DI"
    call.flags, call.reason = flags, step.reason


def _grpc_status(call: Call, step: Deliver | Reply, attempt: Attempt | None) -> str:
    outcome = None if attempt is None or isinstance(step, Reply) else attempt.outcome
    if outcome is not None and outcome.status is not None:
        return str(outcome.grpc_status or 0)
    if isinstance(step, Reply):
        told = dict(step.headers).get("grpc-status")
        if told is not None:
            return told
    return "4" if "UT" in step.flag or "DC" in step.flag else _GRPC_OF.get(call.status, "14")


_GRPC_OF = {400: "13", 401: "16", 403: "7", 404: "12"}
"""gRPC's http-grpc-status-mapping, where it is not UNAVAILABLE."""


class Head(NamedTuple):
    """What a message's head says of its size (HTTP/1.1: name, value and four more of each line) and its body."""

    size: int
    content_length: int
    is_grpc: bool


NO_HEAD = Head(0, 0, False)


def head_of(headers: HeaderView | None) -> Head:
    """In one pass, since it is made for each call; views that show no pairs have no size."""
    raw: Iterable[tuple[bytes, bytes]] | None = getattr(headers, "raw", None)
    if raw is None:
        return NO_HEAD
    size, length, is_grpc = 0, 0, False
    for name, value in raw:
        named = len(name)
        size += named + len(value) + 4
        if named == _CONTENT_TYPE and name.lower() == b"content-type":
            is_grpc = value.startswith(b"application/grpc") and value[16:17] != b"-"
        elif named == _CONTENT_LENGTH and name.lower() == b"content-length" and value.isdigit() and len(value) < 16:
            length = int(value)
    return Head(size, length, is_grpc)


_CONTENT_TYPE, _CONTENT_LENGTH = len("content-type"), len("content-length")
