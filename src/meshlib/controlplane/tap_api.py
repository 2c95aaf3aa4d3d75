"""How does somebody look at requests? Those that were sampled lately, and a stream of them all while it is open.

The stream makes the processes tell of more than they otherwise would, so it is asked for as a change is, by operators
of the namespace; it is in the audit log. It shows requests of that namespace's workloads only.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.access_rules import Role
from meshlib.controlplane.admin import check_yaml, query_of
from meshlib.controlplane.audit import AuditLog
from meshlib.controlplane.gate import JSON, Admission, admission_of
from meshlib.controlplane.taps import MAX_RATE, MAX_TAPS, Tap, Taps, Wanted, Wants, Workloads, request_of
from meshlib.controlplane.telemetry_store import TelemetryStore

BEAT = 1.0
"""Seconds between two signs of life where nothing happens."""
MOST = 5000
"""Requests in one answer."""
_FILTERS = ("namespace", "name", "method", "path", "from", "to", "failed")
S = TypeVar("S")


class Sought(Wants[Any], Protocol):
    """Of which workload, or service, what is wanted."""

    @property
    def namespace(self) -> str: ...
    @property
    def name(self) -> str: ...
    def workloads(self, services: Iterable[api.ServiceEndpoints]) -> Workloads: ...


class Opened(NamedTuple):
    """tap: what comes. began: who tells. workloads: whose processes they are."""

    tap: Tap[Any]
    began: api.Tapped
    workloads: Workloads


class Watching(Generic[S]):
    """What the routes for requests and for logs share: they look into a store, and open taps on workloads. clock:
    seconds since 1970."""

    def __init__(
        self,
        taps: Taps,
        store: S,
        view: api.MeshView,
        audit: AuditLog,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._taps, self._store, self._view, self._audit, self._clock = taps, store, view, audit, clock

    def _opened(self, wanted: Sought, admission: Admission, action: str, rate: str) -> Opened:
        """A tap on the workloads that are wanted, in the audit log. action: its name there. Raises HTTPException."""
        if not wanted.name:
            raise HTTPException(400, "name is missing: it says which workload or service to look at")
        most = number(rate or "100", MAX_RATE, "rate")
        admission.demand(Role.OPERATOR, wanted.namespace, action)
        workloads = wanted.workloads(self._view.endpoints())
        title = f"{wanted.namespace}/{wanted.name}"
        began = connected(self._view, workloads, title)
        self._audit.write(admission.actor, action, object=title, namespace=wanted.namespace)
        tap: Tap[Any] | None = self._taps.open(wanted, workloads, round(most))
        if tap is None:
            raise HTTPException(
                429, f"{MAX_TAPS} taps are open already: close one (meshctl tap, meshctl logs -f) first"
            )
        return Opened(tap, began, workloads)


class TapRoutes(Watching[TelemetryStore]):
    """Of requests."""

    def routes(self) -> list[Route]:
        return [Route("/v1/requests", self._requests), Route("/v1/tap", self._tap, methods=["POST"])]

    async def _requests(self, request: Request) -> Response:
        """Of the spans that were pushed lately, whoever sampled them."""
        query = query_of(request, *_FILTERS, "seconds")
        seconds = number(query["seconds"] or "60", 86400, "seconds")
        wanted, sees = _wanted(query), admission_of(request).powers.sees
        workloads = wanted.workloads(self._view.endpoints())
        found = []
        for span in self._store.spans(self._clock() - seconds):
            each = request_of(span)
            if each is None or not sees(each.namespace) or query["namespace"] not in ("", each.namespace):
                continue
            if wanted.fits(each) and (not wanted.name or (each.namespace, each.workload) in workloads):
                found.append(each)
        return JSON(api.MeshRequests(tuple(found[-MOST:])))

    async def _tap(self, request: Request) -> Response:
        check_yaml(request)
        query = query_of(request, *_FILTERS, "rate")
        wanted, admission = _wanted({**query, "namespace": query["namespace"] or "default"}), admission_of(request)
        tap, began, _ = self._opened(wanted, admission, "tap", query["rate"])
        return TapStream(self._taps, tap, events(tap, began, "request", admission, wanted.namespace))


class TapStream(StreamingResponse):
    """Closes its tap when it is over, however it ends."""

    def __init__(self, taps: Taps, tap: Tap[Any], events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._taps, self._tap = taps, tap

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._taps.close(self._tap)


async def events(
    tap: Tap[Any],
    began: api.Tapped,
    name: str,
    admission: Admission,
    namespace: str,
    before: Sequence[Any] = (),
) -> AsyncIterator[bytes]:
    """What comes through the tap, each as an event of this name. It ends with the reader's right to see it. before:
    what is shown first."""
    yield _event("tapped", began)
    for each in before:
        yield _event(name, each)
    told = time.monotonic()
    while admission.current().has(Role.OPERATOR, namespace):
        found = await tap.next(BEAT)
        if found is not None:
            yield _event(name, found)
        if time.monotonic() - told >= BEAT:
            told = time.monotonic()
            left = tap.left()
            yield _event("left", api.Left(left)) if left else b": \n\n"


def _event(name: str, value: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(value))


def connected(view: api.MeshView, workloads: Workloads, title: str) -> api.Tapped:
    """Raises HTTPException where none of their processes is connected."""
    clients = [each for each in view.clients() if (each.namespace, each.workload) in workloads]
    if not clients:
        raise HTTPException(
            404,
            f"no process of {title} is connected; meshctl status and meshctl get endpoints show workloads and services",
        )
    return api.Tapped(tuple(sorted({f"{each.workload}.{each.namespace}" for each in clients})), len(clients))


def _wanted(query: Any) -> Wanted:
    if query["failed"] not in ("", "true", "false"):
        raise HTTPException(400, f"failed must be true or false, not {query['failed']!r}")
    return Wanted(
        query["namespace"],
        query["name"],
        query["method"],
        query["path"],
        query["from"],
        query["to"],
        query["failed"] == "true",
    )


def number(text: str, most: float, name: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 1 <= found <= most:
        raise HTTPException(400, f"{name} must be between 1 and {most:.0f}, not {text!r}")
    return found
