"""What does the mesh add to an httpx call? Two answers.

calls: meshed calls over real sockets as a ratio to bare httpx in the same run. The server is a process of its own;
contestants take turns round by round, so that a slow moment of the machine meets all of them.
policy: microseconds of our own code alone, with nothing on the wire: clients over a mock, the core's generator, and
the inbound middleware.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.by_hand import AsyncByHand, ByHand
from benchmarks.picks import Pick, pick_costs
from meshlib.inbound.asgi import MeshASGI
from meshlib.inbound.wsgi import MeshWSGI
from meshlib.mesh import Mesh
from meshlib.model import (
    Cluster,
    Endpoint,
    Forward,
    HeaderMatch,
    Headers,
    Listener,
    LoadAssignment,
    Outcome,
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
from meshlib.outbound.httpx import async_transport_class, sync_transport_class
from meshlib.outbound.wire import AsyncWireResponse, WireRequest, WireResponse
from meshlib.policy import propagation
from meshlib.policy.call import CallContext, outbound_call
from meshlib.policy.observer import Call, Observer
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


def snapshot(endpoints: Sequence[tuple[str, int]]) -> Snapshot:
    """reviews as Istio's tutorial configures it: jason's route first, then everybody's, with Istio's retries."""
    rest = Forward((WeightedCluster("reviews-v1"),), retry=RetryPolicy())
    jason = RouteMatch(headers=(HeaderMatch("end-user", StringMatch("exact", "jason")),))
    routes = (Route(jason, Forward((WeightedCluster("reviews-v2"),), retry=RetryPolicy())), Route(RouteMatch(), rest))
    host = VirtualHost("reviews", ("reviews", "reviews:9080"), routes)
    addresses = tuple(sorted(Endpoint(address, port) for address, port in endpoints))
    names = ("reviews-v1", "reviews-v2")
    return Snapshot(
        "benchmark",
        (Listener("reviews:9080", "reviews"),),
        (RouteConfiguration("reviews", (host,)),),
        tuple(Cluster(name) for name in names),
        tuple(LoadAssignment(name, addresses) for name in names),
        complete=True,
    )


@contextmanager
def meshed(endpoints: Sequence[tuple[str, int]]) -> Iterator[Mesh]:
    """A Mesh that runs on a Snapshot given to it, without a feed."""
    with Mesh(Settings()) as mesh:
        mesh.start()
        mesh._feed.publish(snapshot(endpoints))
        yield mesh


@contextmanager
def separate_server(seconds: float = 0.0) -> Iterator[int]:
    """The port of a server in a process of its own, which takes so long for an answer."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.server", str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        yield int(process.stdout.readline())
        process.stdin.close()


class Row(NamedTuple):
    """One line of the first table. microseconds: wall time of a round by its calls (so at a concurrency of 32 it is a
    32nd of a call's latency). ratio: the median over rounds of microseconds by those of bare httpx in that round."""

    mode: str
    concurrency: int
    contestant: str
    microseconds: float
    p50_ms: float
    p99_ms: float
    ratio: float


class Cost(NamedTuple):
    """One line of the second table."""

    what: str
    microseconds: float
    added: float | None


class Round(NamedTuple):
    elapsed: float
    latencies: list[float]


# Calls over real sockets

_EVERY = httpx.Limits(max_connections=None, max_keepalive_connections=None)
"""Bare httpx's best case: its defaults keep 20 connections, so that a 21st concurrent call pays for a new one."""


def _sync_round(client: httpx.Client, url: str, concurrency: int, seconds: float) -> Round:
    latencies: list[float] = []
    start = threading.Barrier(concurrency + 1)

    def work() -> None:
        mine = []
        start.wait()
        until = time.perf_counter() + seconds
        while True:
            before = time.perf_counter()
            client.get(url)
            after = time.perf_counter()
            mine.append(after - before)
            if after >= until:
                break
        latencies.extend(mine)

    workers = [threading.Thread(target=work) for _ in range(concurrency)]
    for worker in workers:
        worker.start()
    start.wait()
    began = time.perf_counter()
    for worker in workers:
        worker.join()
    return Round(time.perf_counter() - began, latencies)


async def _async_round(client: Any, url: str, concurrency: int, seconds: float) -> Round:
    latencies: list[float] = []
    began = time.perf_counter()
    until = began + seconds

    async def work() -> None:
        while True:
            before = time.perf_counter()
            await client.get(url)
            after = time.perf_counter()
            latencies.append(after - before)
            if after >= until:
                break

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    return Round(time.perf_counter() - began, latencies)


def _rows(mode: str, concurrency: int, played: dict[str, list[Round]], baselines: Sequence[str]) -> Iterator[Row]:
    costs = {name: [r.elapsed / len(r.latencies) * 1e6 for r in rounds] for name, rounds in played.items()}
    # Against the better of the bare clients: a ratio should not profit from a pool that was sized badly.
    best = min(baselines, key=lambda name: statistics.median(costs[name]))
    for name, rounds in played.items():
        latencies = sorted(latency * 1e3 for r in rounds for latency in r.latencies)
        ratios = [mine / bare for mine, bare in zip(costs[name], costs[best], strict=True)]
        yield Row(
            mode,
            concurrency,
            name,
            statistics.median(costs[name]),
            latencies[len(latencies) // 2],
            latencies[len(latencies) * 99 // 100],
            statistics.median(ratios),
        )


def sync_calls(port: int, concurrency: int, rounds: int, seconds: float) -> list[Row]:
    """Bare and meshed httpx.Client, shared by as many threads."""
    address = ("127.0.0.1", port)
    bare, url = f"http://127.0.0.1:{port}/reviews/0", URL
    with ExitStack() as stack:
        mesh = stack.enter_context(meshed([address]))
        contestants = {
            "httpx": (httpx.Client(timeout=60), bare),
            "httpx, every connection kept": (httpx.Client(limits=_EVERY, timeout=60), bare),
            "tenacity and pybreaker by hand": (ByHand(limits=_EVERY, timeout=60), bare),
            "meshed": (httpx.Client(transport=mesh.transport(), timeout=60), url),
        }
        for client, _ in contestants.values():
            stack.enter_context(client)
        played: dict[str, list[Round]] = {name: [] for name in contestants}
        for number in range(rounds + 1):
            for name, (client, target) in contestants.items():
                found = _sync_round(client, target, concurrency, seconds if number else 0.0)
                if number:  # the first round opens the connections
                    played[name].append(found)
    return list(_rows("sync", concurrency, played, list(contestants)[:2]))


async def async_calls(port: int, concurrency: int, rounds: int, seconds: float) -> list[Row]:
    """Bare and meshed httpx.AsyncClient with either engine, shared by as many tasks."""
    bare = f"http://127.0.0.1:{port}/reviews/0"
    with meshed([("127.0.0.1", port)]) as mesh:
        contestants = {
            "httpx": (httpx.AsyncClient(timeout=60), bare),
            "httpx, every connection kept": (httpx.AsyncClient(limits=_EVERY, timeout=60), bare),
            "tenacity and pybreaker by hand": (AsyncByHand(limits=_EVERY, timeout=60), bare),
            "meshed, httpcore": (httpx.AsyncClient(transport=mesh.async_transport(), timeout=60), URL),
            "meshed, aiohttp": (httpx.AsyncClient(transport=mesh.async_transport(engine="aiohttp"), timeout=60), URL),
        }
        played: dict[str, list[Round]] = {name: [] for name in contestants}
        for number in range(rounds + 1):
            for name, (client, target) in contestants.items():
                found = await _async_round(client, target, concurrency, seconds if number else 0.0)
                if number:
                    played[name].append(found)
        for client, _ in contestants.values():
            await client.aclose()
    return list(_rows("async", concurrency, played, list(contestants)[:2]))


# Our own code alone


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


def _interleaved(batches: int, size: int, timed: dict[str, Callable[[int], float]]) -> dict[str, list[float]]:
    """Microseconds of one repetition, by batch; `timed` runs so many repetitions and returns the seconds they took."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(batches + 1):
        for name, run in timed.items():
            gc.collect()
            seconds = run(size if number else max(1, size // 4))
            if number:
                found[name].append(seconds / size * 1e6)
    return found


def _timed(once: Callable[[], object]) -> Callable[[int], float]:
    def run(size: int) -> float:
        began = time.perf_counter()
        for _ in range(size):
            once()
        return time.perf_counter() - began

    return run


def _timed_async(runner: asyncio.Runner, once: Callable[[], Awaitable[object]]) -> Callable[[int], float]:
    async def repeat(size: int) -> float:
        began = time.perf_counter()
        for _ in range(size):
            await once()
        return time.perf_counter() - began

    return lambda size: runner.run(repeat(size))


def policy_costs(batches: int, size: int) -> list[Cost]:
    """8 endpoints, jason's route and everybody's, Istio's default retries."""
    endpoints = [("127.0.0.1", 10_000 + number) for number in range(8)]
    with ExitStack() as stack:
        mesh = stack.enter_context(meshed(endpoints))
        runner = stack.enter_context(asyncio.Runner())
        timed: dict[str, Callable[[int], float]] = {}
        measured: list[tuple[str, str]] = []

        def measure(what: str, run: Callable[[int], float], against: str = "") -> None:
            timed[what] = run
            measured.append((what, against))

        bare = httpx.Client(transport=MockTransport())
        through = httpx.Client(transport=sync_transport_class(httpx)(mesh, MockEngine()))
        bare_async = httpx.AsyncClient(transport=MockTransport())
        through_async = httpx.AsyncClient(transport=async_transport_class(httpx)(mesh, AsyncMockEngine()))
        carried = propagation.Intake(("end-user",)).take_up(INBOUND, time.monotonic)

        def carrying() -> object:
            token = propagation.current.set(carried)
            try:
                return through.get(URL)
            finally:
                propagation.current.reset(token)

        measure("httpx.Client", _timed(lambda: bare.get(URL)))
        measure("httpx.Client, meshed", _timed(lambda: through.get(URL)), "httpx.Client")
        measure("httpx.Client, meshed, in a request", _timed(carrying), "httpx.Client")
        measure("httpx.AsyncClient", _timed_async(runner, lambda: bare_async.get(URL)))
        measure("httpx.AsyncClient, meshed", _timed_async(runner, lambda: through_async.get(URL)), "httpx.AsyncClient")

        function = mesh.outbound("reviews:9080")(_answer)
        coroutine = mesh.outbound("reviews:9080")(_answer_async)
        measure("a function", _timed(_answer))
        measure("a function, under mesh.outbound", _timed(function), "a function")
        measure("a coroutine", _timed_async(runner, _answer_async))
        measure("a coroutine, under mesh.outbound", _timed_async(runner, coroutine), "a coroutine")

        live = mesh.live
        context = CallContext(lambda: live, time.monotonic, random.Random(1))
        request = Request("GET", "http", "reviews:9080", "/reviews/0", Headers(INBOUND[:3]))
        answered = Outcome(200, Headers(HEAD))

        def core() -> None:
            flow = outbound_call(request, context)
            next(flow)
            flow.send(answered)
            flow.close()

        measure("the core alone (policy.call)", _timed(core))

        # What is measured costs, by what is told: nothing is pushed, since that is not the call's time.
        for what, sampling in (("metrics", None), ("metrics, an unsampled trace", 0.0), ("metrics, a span", 100.0)):
            observer: Observer = Meter(Recorder(time.time), mesh.node)
            if sampling is not None:
                observer = Tracer(observer, sampling, random.Random(1), 0.0)

            def observed_core(observer: Observer = observer) -> None:
                flow = outbound_call(request, context._replace(observer=observer, call=Call()))
                next(flow)
                flow.send(answered)
                flow.close()

            measure(f"the core, {what}", _timed(observed_core), "the core alone (policy.call)")

        scope = {"type": "http", "method": "GET", "path": "/", "headers": INBOUND}
        environ = {"HTTP_" + name.decode().upper().replace("-", "_"): value.decode() for name, value in INBOUND}
        asgi = MeshASGI(_asgi_app, forward_headers=["end-user"])
        wsgi = MeshWSGI(_wsgi_app, forward_headers=["end-user"])
        measure("ASGI application", _timed_async(runner, lambda: _asgi_app(scope, _receive, _send)))
        measure(
            "ASGI application, meshed", _timed_async(runner, lambda: asgi(scope, _receive, _send)), "ASGI application"
        )
        measure("WSGI application", _timed(lambda: list(_wsgi_app(environ, _start_response))))
        measure("WSGI application, meshed", _timed(lambda: list(wsgi(environ, _start_response))), "WSGI application")

        found = _interleaved(batches, size, timed)
        runner.run(bare_async.aclose())
        runner.run(through_async.aclose())
        bare.close()
        through.close()
    rows = []
    for what, against in measured:
        added = None
        if against:
            added = statistics.median(mine - other for mine, other in zip(found[what], found[against], strict=True))
        rows.append(Cost(what, statistics.median(found[what]), added))
    return rows


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


# The tables


def _print_head() -> None:
    print(f"{'mode':8} {'at once':>7}  {'':30} {'us/call':>9} {'p50 ms':>9} {'p99 ms':>9} {'x bare':>7}")


def _print_calls(rows: list[Row]) -> None:
    for row in rows:
        print(
            f"{row.mode:8} {row.concurrency:7}  {row.contestant:30} {row.microseconds:9.0f} {row.p50_ms:9.2f}"
            f" {row.p99_ms:9.2f} {row.ratio:7.2f}"
        )
    print(flush=True)


def _print_policy(rows: list[Cost]) -> None:
    print(f"{'':38} {'us':>8} {'added':>8}")
    for row in rows:
        added = "" if row.added is None else f"{row.added:8.1f}"
        print(f"{row.what:38} {row.microseconds:8.1f} {added:>8}")


def _print_picks(picks: list[Pick]) -> None:
    print(f"\n{'pick':34} {'endpoints':>9} {'us':>7} {'x empty':>8} {'ejection ms':>12}")
    for pick in picks:
        print(f"{pick.policy:34} {pick.endpoints:9} {pick.microseconds:7.2f} {pick.ratio:8.1f} {pick.rebuild_ms:12.2f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32, 128], metavar="N")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that each contestant plays (default 7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a round (default 1)")
    parser.add_argument("--only", choices=("calls", "policy", "picks"), help="one of the measurements")
    parser.add_argument("--quick", action="store_true", help="only see that it runs; the numbers mean nothing")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too; - is the standard output, alone")
    chosen = parser.parse_args(arguments)
    rounds, seconds, batches, size = chosen.rounds, chosen.seconds, 15, 400
    if chosen.quick:
        rounds, seconds, batches, size = 1, 0.02, 1, 20
    is_told = chosen.json != "-"
    calls: list[Row] = []
    costs: list[Cost] = []
    picks: list[Pick] = []
    if chosen.only in (None, "calls"):
        if is_told:
            _print_head()
        plans = [(0.0, concurrency) for concurrency in chosen.concurrency]
        if len(chosen.concurrency) > 1:
            plans.append((0.01, chosen.concurrency[1]))
        for mode in ("sync", "async"):
            for delay, concurrency in plans:
                with separate_server(delay) as port:
                    if mode == "sync":
                        rows = sync_calls(port, concurrency, rounds, seconds)
                    else:
                        rows = asyncio.run(async_calls(port, concurrency, rounds, seconds))
                if delay:
                    rows = [row._replace(mode=f"{mode}+10") for row in rows]
                calls += rows
                if is_told:
                    _print_calls(rows)
        from benchmarks.other_clients import other_calls  # it is built on this module

        for concurrency in chosen.concurrency:
            with separate_server() as port:
                rows = other_calls(port, concurrency, rounds, seconds)
            calls += rows
            if is_told:
                _print_calls(rows)
    if chosen.only in (None, "policy"):
        costs = policy_costs(batches, size)
        if is_told:
            _print_policy(costs)
    if chosen.only in (None, "picks"):
        picks = pick_costs(batches, size * 25)
        if is_told:
            _print_picks(picks)
    if chosen.json:
        found = {"calls": [row._asdict() for row in calls], "policy": [row._asdict() for row in costs]}
        found["picks"] = [pick._asdict() for pick in picks]
        text = json.dumps(found, indent=1) + "\n"
        if is_told:
            Path(chosen.json).write_text(text, encoding="utf-8")
        else:
            sys.stdout.write(text)


if __name__ == "__main__":
    main()
