"""A control plane in a thread, with Bookinfo's configuration and made-up traffic of known size."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import grpc

from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.controlplane.telemetry_store import Labels
from pushes import gauges, metrics, retries, spans

BOOKINFO = Path(__file__).parents[2] / "examples" / "bookinfo"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def called(source: str, target: str, code: str = "200", flags: str = "-", mtls: bool = True) -> Labels:
    """One series, as the destination reports it. source, target: `reviews-v1`."""
    service = target.partition("-")[0]
    return Labels(
        "destination",
        source,
        "default",
        source_app=source.partition("-")[0],
        destination_workload=target,
        destination_workload_namespace="default",
        destination_app=service,
        destination_version=target.partition("-")[2],
        destination_service=f"{service}.default.svc.cluster.local",
        destination_service_name=service,
        destination_service_namespace="default",
        response_code=code,
        response_flags=flags,
        connection_security_policy="mutual_tls" if mtls else "none",
    )


class Town:
    """Also a context manager. `push` counts requests, now or some seconds `ago`: milliseconds of each, by series."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self._settings = ControlPlaneSettings((folder,), xds=("127.0.0.1", 0), admin=("127.0.0.1", 0), **settings)
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.url = self.target = ""

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        plane = ControlPlane(self._settings)
        await plane.start()
        self.url, self.target = plane.admin_url, plane.xds_address
        self._ready.set()
        await self._stop.wait()
        await plane.stop()

    def push(self, series: Mapping[Labels, Iterable[float]], ago: float = 0.0) -> None:
        self._export("metrics.v1.MetricsService", metrics(series, time.time() - ago))

    def push_spans(self, *told: tuple[str, str, str, float, float, bool], **more: Any) -> None:
        self._export("trace.v1.TraceService", spans(*told, **more))

    def push_retries(self, workload: str, cluster: str, count: int) -> None:
        self._export("metrics.v1.MetricsService", retries(workload, cluster, count, time.time()))

    def gauges(self, resource: Mapping[str, str], told: Mapping[str, Mapping[str, str]]) -> None:
        self._export("metrics.v1.MetricsService", gauges(resource, told, time.time()))

    def _export(self, service: str, body: bytes) -> None:
        with grpc.insecure_channel(self.target) as channel:
            channel.unary_unary(f"/opentelemetry.proto.collector.{service}/Export")(body, timeout=20)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)


def traffic(town: Town, ago: float = 0.0) -> None:
    """60 requests of productpage, 30 of which reach reviews-v2, where a sixth fails."""
    town.push(
        {
            called("istio-ingressgateway", "productpage-v1"): [30.0] * 60,
            called("productpage-v1", "details-v1"): [3.0] * 60,
            called("productpage-v1", "reviews-v1"): [5.0] * 30,
            called("productpage-v1", "reviews-v2", mtls=False): [8.0] * 25,
            called("productpage-v1", "reviews-v2", "503", "UF", mtls=False): [8.0] * 5,
            called("reviews-v2", "ratings-v1"): [2.0] * 25,
        },
        ago,
    )
