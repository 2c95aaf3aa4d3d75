"""Who looks at requests as they happen? The taps that are open, what each of them wants, and the spans that it gets.

While a tap is open, the processes of its workloads leave a span for every call (meshlib.model.Told.all_traces); when
it is closed, their configuration is what it was. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.telemetry_store import Span
from meshlib.state.token_bucket import TokenBucket
from meshlib.telemetry.scrub import scrubbed

MAX_TAPS = 16
MAX_RATE = 1000
WAITING = 1000
"""Requests that wait for a reader who is slow; more are left out, and counted."""
Workloads = frozenset[tuple[str, str]]
"""(namespace, name) each."""


T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Wants(Protocol[T_contra]):
    """What a reader asks for."""

    def workloads(self, services: Iterable[api.ServiceEndpoints]) -> Workloads:
        """Whose it is."""

    def fits(self, told: T_contra, /) -> bool: ...


def workloads_of(namespace: str, name: str, services: Iterable[api.ServiceEndpoints]) -> Workloads:
    """The workload of that name, and those behind the service of that name."""
    found = {(namespace, name)}
    for service in services:
        if (service.namespace, service.name) == (namespace, name):
            found.update((namespace, each.workload) for each in service.endpoints if each.workload)
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of a workload's, or a service's, requests is asked for. "" is any.

    name: of a workload or of a service. path: how it begins. caller, called: `reviews-v1.default` or its beginning, up
    to a `.` or `-`: `reviews` is each version. failed: only those that have.
    """

    namespace: str
    name: str
    method: str = ""
    path: str = ""
    caller: str = ""
    called: str = ""
    failed: bool = False

    def workloads(self, services: Iterable[api.ServiceEndpoints]) -> Workloads:
        return workloads_of(self.namespace, self.name, services)

    def fits(self, request: api.MeshRequest) -> bool:
        own = f"{request.workload}.{request.namespace}"
        caller, called = (own, request.peer) if request.direction == "out" else (request.peer, own)
        return (
            self.method.upper() in ("", request.method)
            and request.path.startswith(self.path)
            and _is_named(self.caller, caller)
            and (_is_named(self.called, called) or _is_named(self.called, request.authority))
            and (request.failed or not self.failed)
        )


class Tap(Generic[T]):
    """One reader. workloads: whose requests, or lines, it gets."""

    def __init__(self, wanted: Wants[T], workloads: Workloads, rate: int, clock: Callable[[], float]) -> None:
        self.wanted, self.workloads = wanted, workloads
        self._queue: asyncio.Queue[T] = asyncio.Queue(WAITING)
        self._bucket, self._clock = TokenBucket(rate, rate, 1.0, clock()), clock
        self._left = 0

    def take(self, told: T) -> None:
        if not self.wanted.fits(told):
            return
        if self._queue.full() or not self._bucket.take(self._clock()):
            self._left += 1
            return
        self._queue.put_nowait(told)

    async def next(self, within: float) -> T | None:
        """The next one; None where there is none within so many seconds."""
        try:
            async with asyncio.timeout(within):
                return await self._queue.get()
        except TimeoutError:
            return None

    def left(self) -> int:
        """How many were left out since the last time."""
        found, self._left = self._left, 0
        return found


class Taps:
    """on_change: called when other workloads are to be tapped than before. clock: monotonic seconds."""

    def __init__(self, on_change: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_change, self._clock = on_change, clock
        self._open: list[Tap[Any]] = []

    @property
    def workloads(self) -> Workloads:
        return frozenset().union(*(each.workloads for each in self._open))

    def open(self, wanted: Wants[T], workloads: Workloads, rate: int) -> Tap[T] | None:
        """None where too many are open. It has to be closed."""
        if len(self._open) >= MAX_TAPS:
            return None
        tap = Tap(wanted, workloads, rate, self._clock)
        self._open.append(tap)
        self._on_change()
        return tap

    def close(self, tap: Tap[Any]) -> None:
        if tap in self._open:
            self._open.remove(tap)
            self._on_change()

    def follow(self, services: Sequence[api.ServiceEndpoints]) -> None:
        """A service may have got another workload since."""
        for tap in self._open:
            tap.workloads = tap.wanted.workloads(services)

    def receive(self, spans: Sequence[Span]) -> None:
        readers = [each for each in self._open if isinstance(each.wanted, Wanted)]
        if not readers:
            return
        for span in spans:
            request = request_of(span)
            if request is not None:
                self._give(readers, request)

    def receive_lines(self, lines: Sequence[api.LogLine]) -> None:
        readers = [each for each in self._open if not isinstance(each.wanted, Wanted)]
        for line in lines if readers else ():
            self._give(readers, line)

    def _give(self, readers: Sequence[Tap[Any]], told: api.MeshRequest | api.LogLine) -> None:
        for tap in readers:
            if (told.namespace, told.workload) in tap.workloads:
                tap.take(told)

    def __repr__(self) -> str:
        return f"<Taps {len(self._open)} open>"


def request_of(span: Span) -> api.MeshRequest | None:
    """The request that a span is of; None for a single try of several, and for what is no request."""
    told = dict(span.attributes)
    if span.kind not in ("server", "client") or "mesh.attempt" in told or "http.request.method" not in told:
        return None
    if span.kind == "server":
        authority, path, query = told.get("server.address", ""), told.get("url.path", ""), told.get("url.query", "")
        address = told.get("client.address", "")
    else:
        url = urlsplit(told.get("url.full", ""))
        authority, path, query = url.netloc.rpartition("@")[2], url.path, url.query
        address = told.get("mesh.endpoint", "")
    return api.MeshRequest(
        at=span.began,
        duration=max(0.0, span.ended - span.began),
        direction="in" if span.kind == "server" else "out",
        workload=told.get("istio.workload") or span.service,
        namespace=told.get("service.namespace", ""),
        peer=told.get("mesh.peer") or address or "unknown",
        method=told.get("http.request.method_original", told["http.request.method"]),
        authority=authority,
        path=scrubbed(f"{path}?{query}" if query else path),
        status=_whole(told.get("http.response.status_code", "")),
        grpc_status=told.get("rpc.status_code", ""),
        flags=told.get("mesh.response_flags", "-"),
        route=told.get("mesh.route") or told.get("http.route", ""),
        attempts=_whole(told.get("mesh.attempts", "")),
        mtls=told.get("mesh.mtls") == "true",
        failed=span.is_error or told.get("rpc.status_code", "OK") != "OK",
        trace_id=span.trace_id,
        span_id=span.span_id,
    )


def _is_named(wanted: str, name: str) -> bool:
    return name.startswith(wanted) and name[len(wanted) : len(wanted) + 1] in ("", ".", "-", ":") if wanted else True


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 10 else 0
