"""What is said about a call that comes in, and what must be asked first? Guard's answers and its questions to the edge.

A guard's flow yields questions; the edge (inbound/admit) does the I/O and sends the answers back, None where there is
none. A flow that yields nothing, which is nearly every one, is a plain function.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

from meshlib.model import Authorizer, JwtProvider, Peer, Request
from meshlib.policy.quota import Question as AskQuota

RawPairs = tuple[tuple[bytes, bytes], ...]


class Allow(NamedTuple):
    """The call may go on.

    remove: header names that the application does not see, lower case; then `add` is added, in place of what has that
    name. answer: headers for the response. remove_params: query parameters that it does not see. principal, claims:
    of the verified token; "" and None without one. notes: what audit and dry-run rules have to say, for the log.
    """

    remove: frozenset[bytes] = frozenset()
    add: RawPairs = ()
    answer: RawPairs = ()
    remove_params: frozenset[str] = frozenset()
    principal: str = ""
    claims: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


class Deny(NamedTuple):
    """The call is turned away, with what a sidecar would answer.

    details: Envoy's response code details. rule: the rule's name; origin: its object, file and line. reason: for logs,
    one sentence; holds nothing that the caller sent.
    """

    status: int
    body: bytes
    headers: RawPairs = ()
    grpc_status: int = 7
    flag: str = ""
    details: str = ""
    rule: str = ""
    origin: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()

    @property
    def told(self) -> RawPairs:
        """The headers that are not about the body: what a gRPC caller is told, too, as metadata."""
        return tuple(pair for pair in self.headers if not pair[0].startswith(b"content-"))


Verdict = Allow | Deny
ALLOW = Allow()
PROBE = Allow()
"""That of a kubelet's probe, known by identity: no traffic of the mesh, so nobody is told of it. In Istio its agent
takes them, and no proxy counts them."""


class FetchKeys(NamedTuple):
    """The keys of `provider` are wanted: expects a `jwt.Keys`, None when there are none to be had.

    unknown: the key id that the keys at hand lack; "" asks for what is there.
    """

    provider: JwtProvider
    unknown: str = ""


class ReadBody(NamedTuple):
    """The request's body is wanted: expects its first `limit` bytes and, where there are more, one of them; None where
    this edge can't look at it before the application does."""

    limit: int


class Authorize(NamedTuple):
    """Ask an external authorizer about `request`: expects a Verdict, None when there was no answer.

    peer: who calls. body: what of it the authorizer wants to see. is_partial: there is more of it.
    """

    authorizer: Authorizer
    request: Request
    peer: Peer
    body: bytes = b""
    is_partial: bool = False


Question = FetchKeys | ReadBody | Authorize | AskQuota
Admission = Generator[Question, Any, Verdict]
