"""What does the core ask of the edge? The steps that `outbound_call` yields, and what each expects back.

The edge (outbound/drive) answers Send with an Outcome and everything else with None.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, NamedTuple

from meshlib.model import Endpoint, HeaderOperations, Outcome

if TYPE_CHECKING:
    from meshlib.policy.cluster import LiveCluster


class Resolve(NamedTuple):
    """Wait, bounded, until the feed has said whether it knows `authority` (host:port)."""

    authority: str


class Wait(NamedTuple):
    """Let `seconds` pass: an injected delay, or the pause before a retry."""

    seconds: float


class Send(NamedTuple):
    """One attempt: send the request to `endpoint`, answer with an Outcome when the response's head is there.

    authority, path: what stands on the wire where it differs from the caller's request, else None.
    headers: operations, in this order. timeout: seconds until the response's head; None is no limit.
    The response of an earlier attempt is released before this one is sent.
    """

    cluster: LiveCluster
    endpoint: Endpoint
    authority: str | None
    path: str | None
    headers: tuple[HeaderOperations, ...]
    timeout: float | None


class Mirror(NamedTuple):
    """Run `flow` beside the call, fire and forget: its result and its failure matter to no one."""

    flow: Flow


class Reply(NamedTuple):
    """The mesh answers in the server's place. Last step.

    flag: Envoy's response flag. reason: for logs and exceptions, one sentence.
    """

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    flag: str = ""
    reason: str = ""


class Deliver(NamedTuple):
    """Give the caller what the last attempt brought: its response, or the client library's own error. Last step; the
    flow stays suspended until the edge closes it, which it does when the body ends.

    headers: operations on the response. deadline: monotonic seconds by which the body must be read; None is no limit.
    flag, reason: for logs and exceptions, when the attempt failed.
    """

    headers: tuple[HeaderOperations, ...] = ()
    deadline: float | None = None
    flag: str = ""
    reason: str = ""


Step = Resolve | Wait | Send | Mirror | Reply | Deliver
Flow = Generator[Step, Outcome | None, None]
