"""Does the page get its data, from a push over a real socket to the stream? With a whole control plane."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import msgspec
import pytest

from meshlib.controlplane.otlp import MAX_BODY, PROTOBUF
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from pushes import REVIEWS, metrics, spans

CONFIGURATION = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http:
  - fault: {delay: {percentage: {value: 10}, fixedDelay: 2s}}
    timeout: 1s
    route: [{destination: {host: reviews}}]
---
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec: {selector: {app: reviews}, ports: [{name: http, port: 9080}]}
"""
DESTINATION = REVIEWS._replace(reporter="destination")


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    (tmp_path / "reviews.yaml").write_text(CONFIGURATION)
    made = ControlPlane(ControlPlaneSettings((tmp_path,), xds=("127.0.0.1", 0), admin=("127.0.0.1", 0)))
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


@pytest.fixture
async def client(plane: ControlPlane) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=plane.admin_url, trust_env=False, timeout=20) as client:
        yield client


async def push(plane: ControlPlane, service: str, body: bytes) -> None:
    async with grpc.aio.insecure_channel(plane.xds_address) as channel:
        await channel.unary_unary(f"/opentelemetry.proto.collector.{service}/Export")(
            body, compression=grpc.Compression.Gzip
        )


async def test_what_is_pushed_over_grpc_is_in_the_graph(plane: ControlPlane, client: httpx.AsyncClient) -> None:
    """With what the configuration does to the service."""
    await push(plane, "metrics.v1.MetricsService", metrics({DESTINATION: [2.0] * 60}, time.time()))
    graph = (await client.get("/v1/graph?seconds=60")).json()
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert {edge["id"]: edge["rates"]["rps"] for edge in graph["edges"]} == {
        "workload:default/productpage-v1>service:default/reviews>http": 1.0,
        "service:default/reviews>workload:default/reviews-v1>http": 1.0,
    }
    assert nodes["service:default/reviews"]["badges"] == ["fault", "timeout", "virtual-service"]
    series = (await client.get("/v1/series?node=workload:default/reviews-v1")).json()
    assert [point["rates"]["rps"] * point["seconds"] for point in series["points"]] == [60]


async def test_the_stream_tells_of_the_first_request_within_two_seconds(
    plane: ControlPlane, client: httpx.AsyncClient
) -> None:
    """First all that is known, then what is new."""
    async with client.stream("GET", "/v1/stream") as response:
        lines = response.aiter_lines()

        async def event() -> Any:
            async for line in lines:
                if line.startswith("data: "):
                    return msgspec.json.decode(line[6:])

        first = await event()
        assert (first["edges"], first["condition"]) == ([], {"clients": 0, "last_push": None})
        await push(plane, "metrics.v1.MetricsService", metrics({DESTINATION: [2.0]}, time.time()))
        async with asyncio.timeout(2 * 3):  # thrice, for a machine that is busy
            second = await event()
        assert len(second["edges"]) == 2
        assert second["condition"]["last_push"] is not None


async def test_traces_are_listed_and_shown_whole(plane: ControlPlane, client: httpx.AsyncClient) -> None:
    """The failed ones by themselves, too."""
    now = time.time()
    one = spans(("productpage", "01" * 8, "", now, 3.0, False), ("reviews", "02" * 8, "01" * 8, now, 1.0, True))
    await push(plane, "trace.v1.TraceService", one)
    await push(plane, "trace.v1.TraceService", spans(("details", "03" * 8, "", now, 0.1, False), trace="cd" * 16))
    found = (await client.get("/v1/traces?failed=true")).json()["traces"]
    assert [(each["service"], each["spans"], each["failed"]) for each in found] == [("productpage", 2, True)]
    assert len((await client.get("/v1/traces")).json()["traces"]) == 2
    whole = (await client.get(f"/v1/traces/{found[0]['trace_id']}")).json()
    assert [(span["service"], span["parent_id"]) for span in whole["spans"]] == [
        ("productpage", ""),
        ("reviews", "01" * 8),
    ]
    assert (await client.get("/v1/traces/00")).status_code == 404


async def test_exporters_that_speak_http_are_heard(client: httpx.AsyncClient) -> None:
    """Packed or not; what is too large or no protobuf is refused."""
    body = metrics({DESTINATION: [2.0]}, time.time())
    headers = {"content-type": PROTOBUF}
    assert (await client.post("/v1/metrics", content=body, headers=headers)).status_code == 200
    packed = await client.post(
        "/v1/metrics", content=gzip.compress(body), headers={**headers, "content-encoding": "gzip"}
    )
    assert packed.status_code == 200
    graph = (await client.get("/v1/graph?services=false")).json()
    assert [edge["rates"]["rps"] * 60 for edge in graph["edges"]] == [pytest.approx(2)]
    assert (await client.post("/v1/metrics", content=b"{}")).status_code == 415
    bomb = gzip.compress(b"\0" * (MAX_BODY + 1))
    refused = await client.post("/v1/metrics", content=bomb, headers={**headers, "content-encoding": "gzip"})
    assert (refused.status_code, "larger" in refused.text) == (400, True)


async def test_a_change_is_told_with_what_was_there_before(client: httpx.AsyncClient) -> None:
    """What the control plane has read at its start is none."""
    assert (await client.get("/v1/changes")).json() == {"changes": []}
    changed = CONFIGURATION.replace("timeout: 1s", "timeout: 5s")
    async with client.stream("GET", "/v1/stream") as response, asyncio.timeout(20):
        await client.post("/v1/apply", content=changed, headers={"content-type": "application/yaml"})
        async for line in response.aiter_lines():
            if line.startswith("data: ") and msgspec.json.decode(line[6:])["change"]:
                break
    found = (await client.get("/v1/changes")).json()["changes"]
    assert [(each["object"], each["origin"]) for each in found] == [("VirtualService default/reviews", "applied")]
    assert "timeout: 1s" in found[0]["before"]
    assert "timeout: 5s" in found[0]["after"]


@pytest.mark.parametrize("url", ["/v1/graph?seconds=x", "/v1/graph?second=1", "/v1/series?seconds=-1"])
async def test_a_parameter_that_means_nothing_is_refused(client: httpx.AsyncClient, url: str) -> None:
    """Rather than answered with something else than was asked."""
    assert (await client.get(url)).status_code == 400


async def test_a_service_tells_how_it_is_steered(client: httpx.AsyncClient) -> None:
    """What the page's form begins with: an edit of one thing must not undo the others."""
    found = (await client.get("/v1/services/default/reviews")).json()
    assert found["rule_name"] == "reviews"
    assert found["steering"] == {"delay": 2.0, "delayed": 10.0, "abort": 0, "aborted": 0.0, "timeout": 1.0}
