"""What does our own code cost a call? Microseconds with nothing on the wire.

The policy of a call is `policy.call.outbound_call`, run by `outbound.drive` over an exchange that answers at once:
route, pick, limits, breaker and outlier detection, of the 8 endpoints of a service with two routes and retries. On
top of that: metrics, traces, a failed attempt; then whole clients over a mock, and the inbound middleware.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx

from benchmarks.effort import Effort
from meshlib.inbound.asgi import MeshASGI
from meshlib.inbound.wsgi import MeshWSGI
from meshlib.mesh import Mesh
from meshlib.model import (
    Cluster,
    ConnectionLimits,
    Endpoint,
    Forward,
    HeaderMatch,
    Headers,
    Listener,
    LoadAssignment,
    Outcome,
    OutlierDetection,
    Request,
    RetryPolicy,
    Route,
    RouteConfiguration,
    RouteMatch,
    Snapshot,
    StringMatch,
    VirtualHost,
    WeightedCluster,
)
from meshlib.model.cluster import BreakerRules
from meshlib.outbound.drive import drive, drive_async
from meshlib.outbound.httpx import async_transport_class, sync_transport_class
from meshlib.outbound.wire import AsyncWireResponse, WireRequest, WireResponse
from meshlib.policy import propagation
from meshlib.policy.call import CallContext, outbound_call
from meshlib.policy.observer import Call, Observer
from meshlib.policy.steps import Deliver, Flow, Send
from meshlib.settings import Settings
from meshlib.telemetry.meter import Meter
from meshlib.telemetry.recorder import Recorder
from meshlib.telemetry.tracing import Tracer

URL = "http://reviews:9080/reviews/0"
HEAD = [(b"content-type", b"application/json"), (b"content-length", b"2")]
INBOUND = [
    (b"host", b"reviews:9080"),
    (b"user-agent", b"benchmark"),
    (b"accept", b"*/*"),
    (b"x-request-id", b"5f2c0a1e-7a4b-4d1c-8000-3c6ef372fe94"),
    (b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    (b"end-user", b"jason"),
]
CORE, CORE_ASYNC = "policy, sync", "policy, async"
METRICS, METRICS_ASYNC = "policy and metrics, sync", "policy and metrics, async"
UNSAMPLED, SAMPLED = "policy, metrics and an unsampled trace", "policy, metrics and a span"
FAILED = "policy and metrics, a failed attempt before"


def snapshot() -> Snapshot:
    """reviews as Istio's tutorial configures it: jason's route first, then everybody's, with retries of 5xx. Outliers
    are looked for and the breaker counts, but no threshold is reached: what is measured is the same in each call."""
    rest = Forward((WeightedCluster("reviews-v1"),), retry=RetryPolicy(on=RetryPolicy().on | {"5xx"}))
    jason = RouteMatch(headers=(HeaderMatch("end-user", StringMatch("exact", "jason")),))
    routes = (Route(jason, Forward((WeightedCluster("reviews-v2"),), retry=RetryPolicy())), Route(RouteMatch(), rest))
    host = VirtualHost("reviews", ("reviews", "reviews:9080"), routes)
    addresses = tuple(Endpoint("127.0.0.1", 10_000 + number) for number in range(8))
    names = ("reviews-v1", "reviews-v2")
    limits = ConnectionLimits(max_requests=1024, max_retries=64)
    outliers, breaker = OutlierDetection(consecutive_5xx=1_000_000), BreakerRules(consecutive_failures=1_000_000)
    return Snapshot(
        "benchmark",
        (Listener("reviews:9080", "reviews"),),
        (RouteConfiguration("reviews", (host,)),),
        tuple(Cluster(name, limits=limits, outlier_detection=outliers, breaker=breaker) for name in names),
        tuple(LoadAssignment(name, addresses) for name in names),
        complete=True,
    )


class _Stream:
    def __iter__(self) -> Iterator[bytes]:
        yield b"{}"

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"{}"


class MockEngine:
    """Answers at once: what is left is the transport, the policy and the pick."""

    def send(self, request: WireRequest) -> WireResponse:
        return WireResponse(200, HEAD, _Stream(), {}, lambda: None)

    def close(self) -> None: ...


class AsyncMockEngine:
    async def send(self, request: WireRequest) -> AsyncWireResponse:
        return AsyncWireResponse(200, HEAD, _Stream(), {}, _nothing)

    async def aclose(self) -> None: ...


async def _nothing() -> None: ...


class MockTransport(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """What a bare client is measured over: the same answer, and no more code than needed."""

    class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b"{}"

        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"{}"

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers=HEAD, stream=self.Body())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers=HEAD, stream=self.Body())


class Instant:
    """An exchange that answers at once, and that waits for nothing. outcomes: of the attempts of one call."""

    def __init__(self, *outcomes: Outcome) -> None:
        self._outcomes, self._sent = outcomes, 0

    def send(self, step: Send) -> Outcome:
        outcome = self._outcomes[self._sent]
        self._sent = (self._sent + 1) % len(self._outcomes)
        return outcome

    def release(self) -> None: ...

    def wait(self, seconds: float) -> None: ...

    def deliver(self, step: Deliver, flow: Flow) -> None:
        next(flow, None)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the policy asked for {name}")


class AsyncInstant(Instant):
    async def send(self, step: Send) -> Outcome:  # type: ignore[override]
        return super().send(step)

    async def release(self) -> None: ...  # type: ignore[override]

    async def wait(self, seconds: float) -> None: ...  # type: ignore[override]


Timed = Callable[[int], float]
"""Runs so many repetitions, and returns the seconds that they took."""


def _timed(once: Callable[[], object]) -> Timed:
    def run(size: int) -> float:
        began = time.perf_counter()
        for _ in range(size):
            once()
        return time.perf_counter() - began

    return run


def _timed_async(runner: asyncio.Runner, once: Callable[[], Awaitable[object]]) -> Timed:
    async def repeat(size: int) -> float:
        began = time.perf_counter()
        for _ in range(size):
            await once()
        return time.perf_counter() - began

    return lambda size: runner.run(repeat(size))


class Measured:
    """What is measured, and against what, in the order that it was named in."""

    def __init__(self) -> None:
        self.timed: dict[str, Timed] = {}
        self.against: dict[str, str] = {}

    def add(self, what: str, run: Timed, against: str = "") -> None:
        self.timed[what], self.against[what] = run, against

    def rows(self, batches: int, size: int) -> list[dict[str, Any]]:
        """Microseconds of one repetition, by batch. They take turns, batch by batch."""
        found: dict[str, list[float]] = {name: [] for name in self.timed}
        for number in range(batches + 1):
            for name, run in self.timed.items():
                if size >= 100:
                    gc.collect()
                seconds = run(size if number else max(1, size // 4))
                if number:
                    found[name].append(seconds / size * 1e6)
        return [
            {"what": what, "against": self.against[what], "microseconds": microseconds}
            for what, microseconds in found.items()
        ]


def _add_core(measured: Measured, mesh: Mesh, runner: asyncio.Runner) -> None:
    request = Request("GET", "http", "reviews:9080", "/reviews/0", Headers(INBOUND[:3]))
    answered, failed = Outcome(200, Headers(HEAD)), Outcome(503, Headers(HEAD))
    given = mesh.call_context()
    live, clock, rng, quotas = given.live, given.clock, given.rng, given.quotas
    meter = Meter(Recorder(time.time), mesh.node)

    def observed_by(observer: Observer) -> Callable[[], CallContext]:
        """As Mesh.call_context makes one for each call."""
        return lambda: CallContext(
            live, clock, rng, None, "", False, False, "", observer, Call(propagation.current.get()), quotas
        )

    def run(context: Callable[[], CallContext], *outcomes: Outcome) -> Timed:
        exchange = Instant(*(outcomes or (answered,)))
        return _timed(lambda: drive(outbound_call(request, context()), exchange))

    def run_async(context: Callable[[], CallContext]) -> Timed:
        exchange = AsyncInstant(answered)
        return _timed_async(
            runner,
            lambda: drive_async(outbound_call(request, context()), exchange),
        )

    measured.add(CORE, run(mesh.call_context))
    measured.add(CORE_ASYNC, run_async(mesh.call_context))
    measured.add(METRICS, run(observed_by(meter)), CORE)
    measured.add(METRICS_ASYNC, run_async(observed_by(meter)), CORE_ASYNC)
    # Nothing is pushed: making a span is the call's time, pushing it is another thread's.
    for what, sampling in ((UNSAMPLED, 0.0), (SAMPLED, 100.0)):
        measured.add(what, run(observed_by(Tracer(meter, sampling, random.Random(1), 0.0))), METRICS)
    # The first attempt fails, its back-off is not waited for, the second is answered.
    measured.add(FAILED, run(observed_by(meter), failed, answered), METRICS)


def _add_clients(measured: Measured, mesh: Mesh, runner: asyncio.Runner, stack: ExitStack) -> None:
    bare = stack.enter_context(httpx.Client(transport=MockTransport()))
    through = stack.enter_context(httpx.Client(transport=sync_transport_class(httpx)(mesh, MockEngine())))
    bare_async = httpx.AsyncClient(transport=MockTransport())
    through_async = httpx.AsyncClient(transport=async_transport_class(httpx)(mesh, AsyncMockEngine()))
    stack.callback(lambda: runner.run(bare_async.aclose()))
    stack.callback(lambda: runner.run(through_async.aclose()))
    carried = propagation.Intake(("end-user",)).take_up(INBOUND, time.monotonic)

    def carrying() -> object:
        token = propagation.current.set(carried)
        try:
            return through.get(URL)
        finally:
            propagation.current.reset(token)

    measured.add("httpx.Client over a mock", _timed(lambda: bare.get(URL)))
    measured.add("the same, meshed", _timed(lambda: through.get(URL)), "httpx.Client over a mock")
    measured.add("the same, meshed, while a request is served", _timed(carrying), "httpx.Client over a mock")
    measured.add("httpx.AsyncClient over a mock", _timed_async(runner, lambda: bare_async.get(URL)))
    measured.add(
        "the same, meshed (async)",
        _timed_async(runner, lambda: through_async.get(URL)),
        "httpx.AsyncClient over a mock",
    )
    function = mesh.outbound("reviews:9080")(_answer)
    coroutine = mesh.outbound("reviews:9080")(_answer_async)
    measured.add("a function", _timed(_answer))
    measured.add("a function under mesh.outbound", _timed(function), "a function")
    measured.add("a coroutine", _timed_async(runner, _answer_async))
    measured.add("a coroutine under mesh.outbound", _timed_async(runner, coroutine), "a coroutine")


def _add_middleware(measured: Measured, runner: asyncio.Runner) -> None:
    scope = {"type": "http", "method": "GET", "path": "/", "headers": INBOUND}
    environ = {"HTTP_" + name.decode().upper().replace("-", "_"): value.decode() for name, value in INBOUND}
    asgi = MeshASGI(_asgi_app, forward_headers=["end-user"])
    wsgi = MeshWSGI(_wsgi_app, forward_headers=["end-user"])
    measured.add("an ASGI application", _timed_async(runner, lambda: _asgi_app(scope, _receive, _send)))
    measured.add(
        "an ASGI application, meshed", _timed_async(runner, lambda: asgi(scope, _receive, _send)), "an ASGI application"
    )
    measured.add("a WSGI application", _timed(lambda: list(_wsgi_app(environ, _start_response))))
    measured.add(
        "a WSGI application, meshed", _timed(lambda: list(wsgi(environ, _start_response))), "a WSGI application"
    )


def measure(effort: Effort) -> dict[str, Any]:
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh(Settings()))
        mesh.start()
        mesh._feed.publish(snapshot())
        runner = stack.enter_context(asyncio.Runner())
        measured = Measured()
        _add_core(measured, mesh, runner)
        _add_clients(measured, mesh, runner, stack)
        _add_middleware(measured, runner)
        return {"rows": measured.rows(effort.batches, effort.size)}


def _answer() -> str:
    return "{}"


async def _answer_async() -> str:
    return "{}"


async def _asgi_app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": HEAD})
    await send({"type": "http.response.body", "body": b"{}"})


async def _receive() -> Any: ...


async def _send(message: Any) -> None: ...


def _wsgi_app(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b"{}"]


def _start_response(status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], object]:
    return lambda _: None
