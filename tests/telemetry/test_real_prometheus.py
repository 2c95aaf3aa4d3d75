"""A real Prometheus scrapes a small mesh; Kiali's and Istio's dashboards' queries return the traffic that was sent."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from meshlib.mesh import Mesh
from peers import unused_port
from snapshots import mesh, publish
from telemetry.test_both_ends import CLIENT, SERVER, reviews, served

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed (Debian package prometheus)"),
]

# Kiali, graph/telemetry/istio: incoming traffic of a namespace.
KIALI = """sum(rate(istio_requests_total{reporter=~"destination",destination_service_namespace="default"}[5m])) by (
source_cluster,source_workload_namespace,source_workload,source_canonical_service,source_canonical_revision,
destination_cluster,destination_service_namespace,destination_service,destination_service_name,
destination_workload_namespace,destination_workload,destination_canonical_service,destination_canonical_revision,
request_protocol,response_code,grpc_response_status,response_flags) > 0"""


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, text: str) -> list[dict[str, Any]]:
        try:
            answer = httpx.get(f"{self.url}/api/v1/query", params={"query": text}, trust_env=False, timeout=20)
        except httpx.TransportError:
            return []
        return answer.json()["data"]["result"] if answer.status_code == 200 else []

    def value(self, text: str) -> float:
        found = self.query(text)
        return float(found[0]["value"][1]) if found else 0.0

    def until(self, text: str, wanted: float) -> None:
        started = time.monotonic()
        while (found := self.value(text)) != wanted:
            assert time.monotonic() - started < 60, f"{text} is {found}, not {wanted}"
            time.sleep(0.2)


@contextmanager
def prometheus(folder: Path, *ports: int) -> Iterator[Prometheus]:
    targets = ", ".join(f"'127.0.0.1:{port}'" for port in ports)
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        "scrape_configs:\n"
        "- job_name: mesh\n  honor_labels: true\n  metrics_path: /stats/prometheus\n"
        f"  static_configs: [{{targets: [{targets}]}}]\n"
    )
    with prometheus_of(folder) as asked:
        yield asked


@contextmanager
def prometheus_of(folder: Path) -> Iterator[Prometheus]:
    """With the folder's `prometheus.yml`."""
    port = unused_port()
    process = subprocess.Popen(
        [
            str(PROMETHEUS),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--enable-feature=exemplar-storage",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(30)


def _own_port(by: Mesh) -> int:
    assert by.telemetry is not None
    by.start()
    return by.telemetry.prometheus_port


def test_dashboards_find_what_was_sent(tmp_path: Path) -> None:
    """By the second scrape of each series: numbers, codes, latency, and Kiali's edge with all its labels."""
    address = f"127.0.0.1:{unused_port()}"
    other = f"127.0.0.1:{unused_port()}"
    with (
        mesh(**SERVER, telemetry="off", prometheus=address) as server,
        mesh(**CLIENT, telemetry="off", prometheus=other) as client,
        served("asgi", server) as url,
        prometheus(tmp_path, _own_port(server), _own_port(client)) as asked,
        client.Client() as http,
    ):
        publish(client, reviews(url))
        asked.until('count(istio_build{component="proxy"})', 2)
        for status, times in ((200, 2), (500, 1)):
            for _ in range(times):
                http.get(f"http://reviews:9080/{status}")
        for reporter in ("source", "destination"):
            asked.until(f'sum(istio_requests_total{{reporter="{reporter}"}})', 3)
        # A new series' first sample is no increase, so the edges show with the requests that follow.
        for status, times in ((200, 6), (500, 2)):
            for _ in range(times):
                http.get(f"http://reviews:9080/{status}")
        name = 'destination_service=~"reviews.default.svc.cluster.local"'
        for reporter in ("source", "destination"):
            chosen = f'{name},reporter=~"{reporter}"'
            asked.until(f"sum(istio_requests_total{{{chosen}}})", 11)
            asked.until(f'sum(istio_requests_total{{{chosen},response_code!~"5.*"}})', 8)
            bucket = f"istio_request_duration_milliseconds_bucket{{{chosen}}}"
            assert 0 < asked.value(f"histogram_quantile(0.95, sum({bucket}) by (le))") < 5000
        edges = asked.query(KIALI)
        assert {each["metric"]["response_code"] for each in edges} == {"200", "500"}
        for each in edges:
            metric = each["metric"]
            assert (metric["source_workload"], metric["destination_workload"]) == ("productpage-v1", "reviews-v2")
            assert set(metric) >= {"source_cluster", "destination_cluster", "response_flags", "request_protocol"}
        share = {each["metric"]["response_code"]: float(each["value"][1]) for each in edges}
        assert 0.1 < share["500"] / (share["200"] + share["500"]) < 0.45
