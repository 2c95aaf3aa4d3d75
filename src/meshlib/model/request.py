"""What does the core see of a call? A view of the request, and what came back from one attempt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol


class HeaderView(Protocol):
    """Read access to headers that stay in the client library's own form.

    Names are lower case. Several values of one name come joined by ", " (RFC 9110, 5.2).
    `httpx.Headers` is one; `Headers` below serves raw lists. Never blocks, never raises.
    """

    def get(self, name: str, /) -> str | None: ...


class Headers:
    """A HeaderView over raw (name, value) pairs, as ASGI and httpcore carry them. Reads in one pass, on demand."""

    __slots__ = ("raw",)

    def __init__(self, raw: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self.raw = raw if isinstance(raw, (list, tuple)) else tuple(raw)

    def get(self, name: str, /) -> str | None:
        wanted, found = name.encode("latin-1"), None
        size = len(wanted)
        for key, value in self.raw:
            if len(key) == size and key.lower() == wanted:
                found = value if found is None else b"%b, %b" % (found, value)
        return None if found is None else found.decode("latin-1")

    def __repr__(self) -> str:
        return f"<Headers {len(self.raw)}>"


class Request(NamedTuple):
    """One call as its caller wrote it. The body stays in the client library.

    authority: host, or host:port, as in the URL or the Host header; lower case.
    path: path and query, as on the request line.
    claims: of the token that a gateway has verified; None without one.
    """

    method: str
    scheme: str
    authority: str
    path: str
    headers: HeaderView
    claims: Mapping[str, Any] | None = None


class Outcome(NamedTuple):
    """What came back from one attempt: a response's head, or the reason why there is none.

    status: HTTP status code; None when no response head arrived. For a gRPC status, what Envoy counts it as.
    headers: the response's; None with an error.
    failure: one of meshlib.policy.retry's failure names (`connect-failure`, `reset`, ...), "" with a response.
    replayable: False when bytes of a body that cannot be sent again have left.
    grpc_status: the number of a gRPC status that is an error and came before any message; None otherwise. Then
      `headers` have it as `grpc-status`, too.
    """

    status: int | None
    headers: HeaderView | None = None
    failure: str = ""
    replayable: bool = True
    grpc_status: int | None = None
