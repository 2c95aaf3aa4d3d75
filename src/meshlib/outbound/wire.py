"""What passes between an adapter and the engine that sends? One attempt, ready for the wire, and what came back."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from meshlib.model import Endpoint, HeaderOperations
from meshlib.policy.cluster import LiveCluster

RawHeaders = list[tuple[bytes, bytes]]


class WireRequest(NamedTuple):
    """One attempt. `headers` are complete, Host included; `content` is the body in the client library's form.

    timeouts: seconds for connect, read and write (httpx's and httpcore's names), None for no limit.
    timeout: seconds until the response's head, for engines that can enforce it; None is no limit.
    resendable: the engine may send it again by itself when a kept-alive connection turns out to be dead.
    replayable: the body can be sent again, whatever the method; for servers that say that they have not begun.
    """

    cluster: LiveCluster
    endpoint: Endpoint
    method: bytes
    scheme: bytes
    host: str
    target: bytes
    headers: RawHeaders
    content: Any
    timeouts: Mapping[str, float | None]
    timeout: float | None
    tls: ssl.SSLContext | None
    resendable: bool
    replayable: bool = False


class WireResponse(NamedTuple):
    """A response's head, and its body still on the wire. `close` gives the connection back; once, whatever happens;
    it does not raise."""

    status: int
    headers: RawHeaders
    stream: Iterable[bytes]
    extensions: Mapping[str, Any]
    close: Callable[[], None]


class AsyncWireResponse(NamedTuple):
    """WireResponse, for asyncio."""

    status: int
    headers: RawHeaders
    stream: AsyncIterable[bytes]
    extensions: Mapping[str, Any]
    close: Callable[[], Awaitable[None]]


class SendFailed(Exception):
    """No response head came. failure: a name of policy/retry. error: the name of httpx's exception class for it."""

    def __init__(self, failure: str, error: str, message: str) -> None:
        super().__init__(message)
        self.failure, self.error = failure, error


class Engine(Protocol):
    """Sends attempts and keeps connections, one pool for each (cluster, endpoint, TLS context). Thread-safe.

    send: raises SendFailed, and nothing else but what must end the call. speaks_http2: where the server does.
    """

    speaks_http2: bool

    def send(self, request: WireRequest) -> WireResponse: ...
    def close(self) -> None: ...


class AsyncEngine(Protocol):
    """Engine, for asyncio."""

    speaks_http2: bool

    async def send(self, request: WireRequest) -> AsyncWireResponse: ...
    async def aclose(self) -> None: ...


def apply(operations: Sequence[HeaderOperations], headers: RawHeaders) -> RawHeaders:
    """`headers` after `operations`, each in the order remove, set, add. The input is left as it is."""
    for step in operations:
        gone = {name.encode("latin-1") for name in (*step.remove, *(name for name, _ in step.set))}
        headers = [pair for pair in headers if pair[0].lower() not in gone] if gone else list(headers)
        headers += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (*step.set, *step.add)]
    return headers


def with_host(headers: RawHeaders, authority: str) -> RawHeaders:
    """`headers` with this Host and no other, in the place where the old one stood (first)."""
    return [(b"Host", authority.encode("ascii")), *(pair for pair in headers if pair[0].lower() != b"host")]
