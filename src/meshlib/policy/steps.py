"""What does the core ask of the edge? The steps that `outbound_call` yields, and what each expects back.

The edge (outbound/drive) answers Send with an Outcome, Race with a Finished or None, Ask with an Answer or None, and
everything else with None.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, NamedTuple

from meshlib.model import Endpoint, HeaderOperations, Outcome
from meshlib.policy.quota import Answer, Question, Quotas
from meshlib.state.limits import Ticket

if TYPE_CHECKING:
    from meshlib.errors import MeshError
    from meshlib.policy.cluster import LiveCluster


class Resolve(NamedTuple):
    """Wait, bounded, until the feed has said whether it knows `authority` (host:port)."""

    authority: str


class Wait(NamedTuple):
    """Let `seconds` pass: an injected delay, or the pause before a retry."""

    seconds: float


class Queue(NamedTuple):
    """Wait until `ticket` is granted, `seconds` at most (None is no limit): all connections are in use."""

    ticket: Ticket
    seconds: float | None


class Ask(NamedTuple):
    """Have `quotas` say whether one more call fits."""

    quotas: Quotas
    question: Question


class Send(NamedTuple):
    """One attempt: send the request to `endpoint`, answer with an Outcome when the response's head is there.

    authority, path: what stands on the wire where it differs from the caller's request, else None.
    headers: operations, in this order. timeout: seconds until the response's head; None is no limit.
    deadline: monotonic seconds by which the response must be complete; None is no limit.
    The response of an earlier attempt is released before this one is sent.
    """

    cluster: LiveCluster
    endpoint: Endpoint
    authority: str | None
    path: str | None
    headers: tuple[HeaderOperations, ...]
    timeout: float | None
    deadline: float | None = None


class Race(NamedTuple):
    """Attempts side by side. Send `start`, if there is one, beside those that are out; then answer with the first that
    has ended and was not answered with yet, or with None when `seconds` have passed first (None is no limit).

    Attempts are numbered from 0 in the order of their start. One that can't be sent beside others (its body can be sent
    once only, no thread is free) ends at once, with the failure `local`. What an attempt brought is kept until Win.
    ended: called once, from any thread, when this attempt has lost, is over and its response is released; not for the
    one that wins. Should the flow end without a Win, then all have lost.
    """

    start: Send | None
    ended: Callable[[], None] | None
    seconds: float | None


class Finished(NamedTuple):
    """What an attempt of a race came to."""

    number: int
    outcome: Outcome


class Win(NamedTuple):
    """The race is over: what follows is about attempt `number`, all others are given up."""

    number: int


class Mirror(NamedTuple):
    """Run `flow` beside the call, fire and forget: its result and its failure matter to no one. Where it is not run,
    `cluster` counts it (LiveCluster.dropped_mirror)."""

    flow: Flow
    cluster: LiveCluster


class Reply(NamedTuple):
    """The mesh answers in the server's place. Last step.

    flag: Envoy's response flag. reason: for logs and exceptions, one sentence. error: the class of exception that says
    more than the flag does; None is what the flag stands for.
    """

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    flag: str = ""
    reason: str = ""
    error: type[MeshError] | None = None


class Deliver(NamedTuple):
    """Give the caller what the last attempt brought: its response, or the client library's own error. Last step; the
    flow stays suspended until the edge ends it, which it does when the body ends: with `next(flow, None)`, which costs
    no exception, or with `close()`.

    headers: operations on the response. deadline: monotonic seconds by which the body must be read; None is no limit.
    flag, reason: for logs and exceptions, when the attempt failed. idle_timeout: seconds without a byte of the body
    after which reading it fails; None is no limit.
    """

    headers: tuple[HeaderOperations, ...] = ()
    deadline: float | None = None
    flag: str = ""
    reason: str = ""
    idle_timeout: float | None = None


Step = Resolve | Wait | Queue | Ask | Send | Race | Win | Mirror | Reply | Deliver
Told = Outcome | Finished | Answer | None
"""What a step is answered with."""
Flow = Generator[Step, Told, None]
