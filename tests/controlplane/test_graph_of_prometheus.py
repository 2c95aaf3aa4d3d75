"""Is the graph that is asked of a real Prometheus the one of the control plane's own memory?"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from dashboard.pictured_town import Town
from peers import unused_port
from promises import within
from snapshots import mesh, publish
from telemetry.test_both_ends import CLIENT, SERVER, reviews, served
from telemetry.test_real_prometheus import PROMETHEUS, _own_port, prometheus

REQUESTS, WINDOW = 60, 300


def _eventually(what: Callable[[], bool], told: str) -> None:
    """Of another process' state, which can only be asked for."""
    deadline = time.monotonic() + within(30)
    while not what():
        assert time.monotonic() < deadline, told
        time.sleep(0.1)


def _edges(town: Town, services: str = "true") -> dict[str, Any]:
    answer = httpx.get(
        f"{town.url}/v1/graph", params={"seconds": str(WINDOW), "services": services}, trust_env=False, timeout=20
    )
    assert answer.status_code == 200, answer.text
    return {each["id"]: each for each in answer.json()["edges"]}


def _is_near(edges: dict[str, Any], rps: float) -> bool:
    """Within what an increase is extrapolated by, once it stands on a handful of samples."""
    return bool(edges) and all(abs(each["rates"]["rps"] - rps) < 0.3 * rps for each in edges.values())


@pytest.mark.processes
@pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed (Debian package prometheus)")
def test_either_source_gives_the_same_graph(tmp_path: Path) -> None:
    """Edges and health alike; rates within what Prometheus extrapolates, and misses of a series' first sample."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    ends = [f"127.0.0.1:{unused_port()}" for _ in range(2)]
    with Town(tmp_path / "one") as remembered:
        pushed = {"telemetry": f"http://{remembered.target}", "telemetry_interval": 0.5}
        with (
            mesh(**SERVER, **pushed, prometheus=ends[0]) as server,
            mesh(**CLIENT, **pushed, prometheus=ends[1]) as client,
            served("asgi", server) as url,
            prometheus(tmp_path, _own_port(server), _own_port(client)) as asked,
            Town(tmp_path / "two", prometheus_url=asked.url) as scraped,
            client.Client() as http,
        ):
            publish(client, reviews(url))
            asked.until('count(istio_build{component="proxy"})', 2)
            for status in (200, 503):
                http.get(f"http://reviews:9080/{status}")
            for reporter in ("source", "destination"):
                asked.until(f'sum(istio_requests_total{{reporter="{reporter}"}})', 2)
            for number in range(REQUESTS):
                http.get(f"http://reviews:9080/{503 if number % 4 == 0 else 200}")
            for reporter in ("source", "destination"):
                asked.until(f'sum(istio_requests_total{{reporter="{reporter}"}})', REQUESTS + 2)
            whole = (REQUESTS + 2) / WINDOW
            _eventually(
                lambda: {round(each["rates"]["rps"], 6) for each in _edges(remembered).values()} == {round(whole, 6)},
                "all was pushed",
            )
            _eventually(
                lambda: _is_near(_edges(scraped), whole),
                "all was scraped",
            )
            one, two = _edges(remembered), _edges(scraped)
            assert set(one) == set(two)
            for name, edge in one.items():
                rates, other = edge["rates"], two[name]["rates"]
                assert other["rps"] == pytest.approx(rates["rps"], rel=0.35)
                assert other["errors"] == pytest.approx(rates["errors"], abs=0.1)
                assert other["bytes_out"] == pytest.approx(rates["bytes_out"], rel=0.35)
                assert 0 < other["p50"] <= other["p99"] < 60_000
                assert (edge["health"], edge["protocol"], edge["mtls"]) == ("failure", "http", two[name]["mtls"])
            series = httpx.get(
                f"{scraped.url}/v1/series?node=workload:default/reviews-v2&seconds=120", trust_env=False, timeout=20
            )
            assert sum(each["rates"]["rps"] * each["seconds"] for each in series.json()["points"]) > 0


def test_a_prometheus_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Rather than an empty graph, which would say that nobody calls anybody."""
    with Town(tmp_path, prometheus_url="http://127.0.0.1:9") as town:
        answer = httpx.get(f"{town.url}/v1/graph", trust_env=False, timeout=20)
        assert answer.status_code == 502
        assert "Prometheus at http://127.0.0.1:9 does not answer" in answer.json()["error"]
