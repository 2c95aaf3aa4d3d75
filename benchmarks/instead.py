"""What would users run instead of the mesh? A pair of sidecars with mTLS between them, or libraries put together by
hand; beside the mesh, which does mTLS in the client and is met by mTLS in the server.

All contestants are httpx.AsyncClient with a pool that keeps every connection, and call one server process in the same
rounds. What one adds is the difference of its median call to that of httpx alone, in plaintext, in the same round.
Client, proxies and server share the machine's cores: CPU is told of all of them together.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.by_hand import AsyncByHand
from benchmarks.calls import EVERY
from benchmarks.effort import Effort
from benchmarks.identities import CLIENT, SERVER, stock_context, write_identities
from benchmarks.mesh_config import PLAIN_URL, SECURED_URL, mesh_of, mesh_yaml
from benchmarks.processes import module
from benchmarks.rounds import Row, play_async
from benchmarks.sidecars import PAIRS, Missing
from meshlib.mesh import Mesh

ALONE, ALONE_TLS = "httpx alone", "httpx with its own mTLS"
BY_HAND, INSTRUMENTED = "tenacity and pybreaker by hand", "OpenTelemetry's httpx instrumentation"
MESHED, MESHED_TLS = "meshed, no TLS", "meshed, mTLS"
MESHED_SPAN, MESHED_AIOHTTP = "meshed, mTLS, a span for each call", "meshed, mTLS, aiohttp engine"
AT_ONCE = 32
"""The most callers: beyond, httpx's own pool is what is measured."""


def pair(name: str) -> str:
    return f"httpx, {name} pair, mTLS between"


def instrumented(client: httpx.AsyncClient) -> Callable[[], object]:
    """Metrics and a sampled span for each call, kept in memory or thrown away, so that no exporter is measured. Returns
    what shuts it down. Raises Missing."""
    try:
        from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
    except ImportError as error:
        raise Missing(f"opentelemetry-instrumentation-httpx is not installed: `make bench` does ({error})") from None

    class Nowhere(SpanExporter):
        def export(self, spans: Any) -> Any:
            return SpanExportResult.SUCCESS

    traces, metrics = TracerProvider(), MeterProvider([InMemoryMetricReader()])
    traces.add_span_processor(BatchSpanProcessor(Nowhere()))
    HTTPXClientInstrumentor.instrument_client(client, tracer_provider=traces, meter_provider=metrics)

    def shutdown() -> None:
        traces.shutdown()
        metrics.shutdown()

    return shutdown


async def _play(
    folder: Path, server: tuple[int, ...], pairs: dict[str, int], meshes: tuple[Mesh, Mesh], processes: tuple[int, ...],
    concurrency: int, effort: Effort, skipped: dict[str, str],
) -> list[Row]:  # fmt: skip
    plain, secured = (
        f"{kind}://127.0.0.1:{port}/reviews/0" for kind, port in zip(("http", "https"), server, strict=True)
    )
    context = stock_context(folder / CLIENT)
    async with AsyncExitStack() as stack:

        async def opened(client: httpx.AsyncClient) -> httpx.AsyncClient:
            return await stack.enter_async_context(client)

        async def bare(**options: Any) -> httpx.AsyncClient:
            options = {"verify": context, "limits": EVERY, "timeout": 60, "trust_env": False, **options}
            return await opened(httpx.AsyncClient(**options))

        async def meshed(mesh: Mesh, **options: Any) -> httpx.AsyncClient:
            return await bare(transport=mesh.async_transport(**options))

        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            ALONE: partial((await bare()).get, plain),
            ALONE_TLS: partial((await bare()).get, secured),
        }
        for name, port in pairs.items():
            calls[pair(name)] = partial((await bare()).get, f"http://127.0.0.1:{port}/reviews/0")
        by_hand = await opened(AsyncByHand(verify=context, limits=EVERY, timeout=60, trust_env=False))
        calls[BY_HAND] = partial(by_hand.get, plain)
        client = await bare()
        try:
            stack.callback(instrumented(client))
            calls[INSTRUMENTED] = partial(client.get, plain)
        except Missing as error:
            skipped[INSTRUMENTED] = str(error)
        through = await meshed(meshes[0])
        calls[MESHED] = partial(through.get, PLAIN_URL)
        calls[MESHED_TLS] = partial(through.get, SECURED_URL)
        calls[MESHED_AIOHTTP] = partial((await meshed(meshes[0], engine="aiohttp")).get, SECURED_URL)
        calls[MESHED_SPAN] = partial((await meshed(meshes[1])).get, SECURED_URL)
        length = effort.length(concurrency)
        return await play_async("httpx, async", calls, concurrency, effort.rounds, length, processes)


def measure(effort: Effort) -> dict[str, Any]:
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_identities(folder)
        server = stack.enter_context(module("benchmarks.server", "0", str(folder / SERVER)))
        processes, pairs = [server.process], {}
        for each, start in PAIRS.items():
            try:
                near, far = stack.enter_context(start(folder, server.ports[0]))
            except (Missing, RuntimeError) as error:
                skipped[pair(each)] = str(error)
                continue
            processes += [near.process, far.process]
            pairs[each] = near.ports[0]
        text = mesh_yaml(*server.ports)
        traced = {
            "prometheus": "",
            "telemetry": "http://127.0.0.1:9",  # nobody is there, and nothing is pushed before it is over
            "telemetry_interval": 3600.0,
            "trace_sampling": 100.0,
        }
        meshes = tuple(stack.enter_context(mesh_of(folder, text, **more)) for more in ({}, traced))
        for concurrency in (each for each in effort.concurrency if each <= AT_ONCE):
            played = _play(folder, server.ports, pairs, meshes, tuple(processes), concurrency, effort, skipped)
            rows += asyncio.run(played)
    return {"rows": [row._asdict() for row in rows], "skipped": skipped}
