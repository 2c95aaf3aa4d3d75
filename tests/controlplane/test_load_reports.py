"""What becomes of the load reports of clients? Sent by the stub of Envoy's protos, read from the admin API."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from access import client_of, running, settings_of
from envoy.config.core.v3.base_pb2 import Node
from envoy.service.load_stats.v3.lrs_pb2 import LoadStatsRequest
from envoy.service.load_stats.v3.lrs_pb2_grpc import LoadReportingServiceStub
from google.protobuf.json_format import ParseDict
from xds_client import node

from meshlib.controlplane import load_reports
from meshlib.controlplane.load_reports import LoadReports
from meshlib.xds import messages as m
from promises import within

TIMEOUT = 10


def stats(cluster: str = "a", *, zone: str = "z1", dropped: int = 0, **counts: int) -> dict[str, Any]:
    return {
        "cluster_name": cluster,
        "total_dropped_requests": dropped,
        "upstream_locality_stats": [{"locality": {"region": "r", "zone": zone}, **counts}],
    }


def request(*clusters: dict[str, Any], who: Node | None = None) -> LoadStatsRequest:
    found: LoadStatsRequest = ParseDict({"cluster_stats": clusters}, LoadStatsRequest())
    if who is not None:
        found.node.CopyFrom(who)
    return found


@contextlib.asynccontextmanager
async def reporting(address: str, first: LoadStatsRequest) -> AsyncIterator[tuple[Any, Any]]:
    """The call, and what the server wants."""
    async with grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        stub: Any = LoadReportingServiceStub(channel)
        call = stub.StreamLoadStats(timeout=60)
        await call.write(first)
        yield call, await call.read()
        call.cancel()


SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec: {ports: [{port: 80, name: http}]}
"""


async def test_a_client_is_told_what_to_report_and_its_sums_are_shown(tmp_path: Path) -> None:
    """Added up; what is in progress is the latest word, and leaves with the client."""
    (tmp_path / "mesh").mkdir()
    (tmp_path / "mesh" / "reviews.yaml").write_text(SERVICE)
    settings = settings_of(tmp_path, admin=("127.0.0.1", 0), access=None, folders=(tmp_path / "mesh",))
    async with running(settings) as plane, client_of(plane) as admin:

        async def shown() -> list[dict[str, Any]]:
            loads: list[dict[str, Any]] = (await admin.get("/v1/load")).raise_for_status().json()["loads"]
            return loads

        async def until(holds: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
            async with asyncio.timeout(within(30)):
                while True:
                    if holds(found := await shown()):
                        return found
                    await asyncio.sleep(0.02)

        async with reporting(plane.xds_address, request(who=node())) as (call, wanted):
            assert wanted.load_reporting_interval.seconds == load_reports.INTERVAL
            assert any("reviews" in name for name in wanted.clusters)
            assert not wanted.send_all_clusters
            for in_progress in (3, 2):
                report = stats(
                    dropped=1,
                    total_successful_requests=5,
                    total_error_requests=1,
                    total_issued_requests=7,
                    total_requests_in_progress=in_progress,
                )
                await call.write(request(report))
            dropped, load = await until(lambda loads: [each["succeeded"] for each in loads] == [0, 10])
            assert (dropped["dropped"], dropped["locality"]) == (2, "")
            assert load == {
                "cluster": "a", "service": "", "namespace": "default", "locality": "r/z1", "priority": 0,
                "succeeded": 10, "failed": 2, "issued": 14, "dropped": 0, "in_progress": 2,
                "reported": load["reported"],
            }  # fmt: skip
        await until(lambda loads: [each["in_progress"] for each in loads] == [0, 0])
        assert (await admin.get("/v1/load", params={"cluster": "b"})).json() == {"loads": []}


async def test_a_client_that_can_reports_all_clusters(tmp_path: Path) -> None:
    """It says so by a feature."""
    async with running(settings_of(tmp_path, admin=("127.0.0.1", 0), access=None)) as plane:
        who = node()
        who.client_features.append("envoy.lrs.supports_send_all_clusters")
        async with reporting(plane.xds_address, request(who=who)) as (_, wanted):
            assert wanted.send_all_clusters


async def test_viewers_see_the_reports_of_their_namespaces(tmp_path: Path) -> None:
    """Whatever cluster they are of."""
    async with running(settings_of(tmp_path, admin=("127.0.0.1", 0))) as plane:
        for namespace in ("default", "dev"):
            who = node(f"sidecar~127.0.0.1~x.{namespace}~{namespace}.svc.cluster.local", NAMESPACE=namespace)
            report = request(stats(total_successful_requests=1), who=who)
            async with reporting(plane.xds_address, report):
                pass
        for name, seen in (("alice", ["default", "dev"]), ("vera", ["default"]), ("dora", ["dev"])):
            async with client_of(plane, name) as admin:
                found = (await admin.get("/v1/load")).json()["loads"]
                assert [each["namespace"] for each in found] == seen
        async with client_of(plane, "") as nobody:
            assert (await nobody.get("/v1/load")).status_code == 401


async def test_with_tls_a_report_needs_a_proof(tmp_path: Path) -> None:
    """As xDS does."""
    async with running(settings_of(tmp_path, admin=("127.0.0.1", 0), tls=True)) as plane:
        credentials = grpc.ssl_channel_credentials(plane.roots.encode())
        async with grpc.aio.secure_channel(plane.xds_address, credentials) as channel:
            stub: Any = LoadReportingServiceStub(channel)
            call = stub.StreamLoadStats(timeout=TIMEOUT)
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xff\xff\xff", "this is no LoadStatsRequest"),
        (b"", "the first request must say who reports: node is missing"),
        (LoadStatsRequest(node=Node()).SerializeToString(), "node: id is empty"),
    ],
)
async def test_what_is_no_report_is_refused(
    tmp_path: Path, data: bytes, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By a status that names the fault."""
    async with (
        running(settings_of(tmp_path, admin=("127.0.0.1", 0), access=None)) as plane,
        grpc.aio.insecure_channel(plane.xds_address) as channel,
    ):
        call = channel.stream_stream(m.LRS_STREAM)(timeout=60)
        await call.write(data)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await call.details() == says
    assert not [record for record in caplog.records if record.exc_info]


def ours(*clusters: dict[str, Any]) -> Any:
    return ParseDict({"cluster_stats": clusters}, m.LoadStatsRequest())


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest sums give way; of one report, and of what is in progress, there is only so much; sums stop growing."""
    monkeypatch.setattr(load_reports, "MAX_ENTRIES", 10)
    monkeypatch.setattr(load_reports, "MAX_REPORTED", 6)
    reports = LoadReports(clock=lambda: 1.0)
    for stream in range(3):
        reports.take(stream, "n", ours(*(stats(f"{stream}-{i}", total_requests_in_progress=1) for i in range(20))))
    shown = reports.shown()
    assert [each.cluster for each in shown] == [f"{s}-{i}" for s, i in [(1, 2), (1, 3), (1, 4), (1, 5)]] + [
        f"2-{i}" for i in range(6)
    ]
    assert sum(each.in_progress for each in shown) == 0  # stream 0 holds six of ten, and its sums are forgotten
    reports.end(0)
    most = 2**64 - 1
    for _ in range(2):
        reports.take(4, "n", ours(stats("big", total_successful_requests=most, total_requests_in_progress=most)))
    (big,) = (each for each in reports.shown() if each.cluster == "big")
    assert (big.succeeded, big.in_progress) == (2**53, 2**53)
    reports.take(5, "n", ours(stats("x" * 501), stats("", total_successful_requests=1)))
    assert all(0 < len(each.cluster) < 500 for each in reports.shown())
