"""Does a process tell, and serve, only what its verified identity allows? Over TLS, with real certificates."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

import meshlib
from controlplane.access import client_of, running, settings_of, workload
from meshlib.controlplane.claims import Claims
from meshlib.controlplane.otlp import PROTOBUF
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.controlplane.telemetry_store import Labels
from meshlib.identity.proof import prove
from meshlib.istio.parse import parse_text
from meshlib.model import SpiffeId, Workload
from pushes import REVIEWS, gauges, metrics, spans

OWN = SpiffeId.of("cluster.local", "default", "reviews")
SERVED = REVIEWS._replace(reporter="destination", destination_principal=OWN.uri)
MANIFESTS = """
apiVersion: v1
kind: Service
metadata: {name: ratings}
spec: {selector: {app: ratings}, ports: [{name: http, port: 9080}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: ratings-v1}
spec:
  template:
    metadata: {labels: {app: ratings, version: v1}}
    spec: {serviceAccountName: ratings}
---
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec: {selector: {app: reviews}, ports: [{name: http, port: 9080}]}
"""


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    settings = ControlPlaneSettings(state=tmp_path / "state", xds=("127.0.0.1", 0), admin=("127.0.0.1", 0), tls=True)
    async with running(settings) as made:
        yield made


def export(plane: ControlPlane, service: str, body: bytes, identity: SpiffeId | None) -> grpc.StatusCode:
    """What became of a push by this identity; None shows nothing."""
    metadata = ()
    if identity is not None:
        metadata = (("authorization", f"Bearer {prove(workload(plane, identity), time.time())}"),)
    with grpc.secure_channel(plane.xds_address, grpc.ssl_channel_credentials(plane.roots.encode())) as channel:
        method: Any = channel.unary_unary(f"/opentelemetry.proto.collector.{service}/Export")
        try:
            method(body, timeout=30, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()  # type: ignore[attr-defined, no-any-return]
    return grpc.StatusCode.OK


def told_by(labels: Labels, **resource: str) -> bytes:
    message = ExportMetricsServiceRequest.FromString(metrics({labels: [5.0]}, time.time()))
    for name, value in resource.items():
        attribute = message.resource_metrics[0].resource.attributes.add(key=name.replace("_", "."))
        attribute.value.string_value = value
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (told_by(SERVED), grpc.StatusCode.OK),
        (told_by(SERVED, service_namespace="default"), grpc.StatusCode.OK),
        (told_by(SERVED._replace(destination_principal="unknown")), grpc.StatusCode.OK),
        (told_by(SERVED, service_namespace="prod"), grpc.StatusCode.PERMISSION_DENIED),
        (told_by(SERVED, service_instance_id="sidecar~1.2.3.4~x.prod~y"), grpc.StatusCode.PERMISSION_DENIED),
        (told_by(SERVED._replace(destination_workload_namespace="prod")), grpc.StatusCode.PERMISSION_DENIED),
        (
            told_by(SERVED._replace(destination_principal="spiffe://cluster.local/ns/default/sa/bank")),
            grpc.StatusCode.PERMISSION_DENIED,
        ),
        (told_by(SERVED._replace(reporter="source")), grpc.StatusCode.OK),
        (
            told_by(SERVED._replace(reporter="source", source_workload_namespace="prod")),
            grpc.StatusCode.PERMISSION_DENIED,
        ),
        (told_by(SERVED._replace(reporter="proxy")), grpc.StatusCode.PERMISSION_DENIED),
    ],
)
async def test_a_process_tells_of_itself_only(plane: ControlPlane, body: bytes, status: grpc.StatusCode) -> None:
    """And what is refused is not in the graph."""
    assert await asyncio.to_thread(export, plane, "metrics.v1.MetricsService", body, OWN) is status
    seen = (await plane._picture.graph(60)).nodes
    assert bool(seen) is (status is grpc.StatusCode.OK)


async def test_a_state_is_that_of_who_tells_it(plane: ControlPlane) -> None:
    """What a measurement says of its namespace counts no more than what all of the push says of it."""
    other = {"service.namespace": "prod", "service.instance.id": "sidecar~1.2.3.4~bank.prod~y", "serial": "7"}
    for resource in ({}, {"service.namespace": "default"}):
        body = gauges(resource, {"meshlib_certificate_info": other}, time.time())
        assert await asyncio.to_thread(export, plane, "metrics.v1.MetricsService", body, OWN) is grpc.StatusCode.OK
    told = plane._telemetry.gauges(time.time())
    assert {labels["service.namespace"] for name, labels, _ in told if labels.get("serial") == "7"} == {"default"}


async def test_nobody_tells_without_an_identity(plane: ControlPlane) -> None:
    """Nor with a join token, which buys a certificate only; and a push without anything shuts nobody out."""
    for _ in range(40):
        found = await asyncio.to_thread(export, plane, "metrics.v1.MetricsService", told_by(SERVED), None)
        assert found is grpc.StatusCode.UNAUTHENTICATED
    assert await asyncio.to_thread(export, plane, "metrics.v1.MetricsService", told_by(SERVED), OWN) is (
        grpc.StatusCode.OK
    )
    trace = spans(("reviews", "01" * 8, "", time.time(), 1.0, False))
    assert await asyncio.to_thread(export, plane, "trace.v1.TraceService", trace, None) is (
        grpc.StatusCode.UNAUTHENTICATED
    )
    assert await asyncio.to_thread(export, plane, "trace.v1.TraceService", trace, OWN) is grpc.StatusCode.OK
    (kept,) = plane._picture._store.traces()
    assert dict(kept.root.attributes)["service.namespace"] == "default"


async def test_a_real_process_pushes_as_itself(plane: ControlPlane, tmp_path: Path) -> None:
    """The data plane's own sender, with a certificate that it got by a join token."""
    assert plane.tokens is not None and plane.authority is not None
    token, _ = await plane.tokens.create(OWN, 600.0, plane.authority.signing)
    (tmp_path / "token").write_text(token)
    mesh = meshlib.connect(
        plane.xds_address,
        token_file=str(tmp_path / "token"),
        service_account="reviews",
        workload="reviews-v1",
        identity="control-plane",
        telemetry_interval=0.1,
        cache_dir="-",
    )
    try:
        assert await asyncio.to_thread(mesh.wait_for_credentials, 60)
        await until(lambda: plane._picture._store.last_push > 0 or bool(plane._picture._store.gauges(time.time())))
    finally:
        await asyncio.to_thread(mesh.close)


async def test_over_http_the_same_is_asked(tmp_path: Path) -> None:
    """Where the admin API has access control: an administrator's token is no workload's."""
    async with running(settings_of(tmp_path)) as plane, client_of(plane) as client:

        async def push(headers: dict[str, str], labels: Labels = SERVED) -> int:
            sent = {"content-type": PROTOBUF, **headers}
            return (await client.post("/v1/metrics", content=told_by(labels), headers=sent)).status_code

        def proof() -> dict[str, str]:
            return {"authorization": f"Bearer {prove(workload(plane, OWN), time.time())}"}

        assert await push({}) == 401
        async with client_of(plane, "alice") as alice:
            assert await push(dict(alice.headers)) == 401
        assert await push(proof()) == 200
        assert await push(proof(), SERVED._replace(destination_workload_namespace="prod")) == 403


def test_a_service_is_served_by_the_accounts_of_its_manifests() -> None:
    """By name or by labels, nobody else of the namespace gets its calls; without manifests, whoever says so."""
    objects = tuple(parse_text(MANIFESTS, "mesh.yaml").objects)
    claims = Claims()

    def admitted(**of: Any) -> bool:
        labels = tuple(sorted(of.pop("labels", {}).items()))
        each = (Workload("x-v1", labels=labels, address="10.0.0.1", port=80, **of),)
        return bool(claims.admitted(objects, each))

    assert admitted(service="ratings", service_account="ratings")
    assert not admitted(service="ratings", service_account="reviews")
    assert not admitted(labels={"app": "ratings", "version": "v9"}, service_account="reviews")
    (problem,) = claims.refused
    assert "ratings" in str(problem) and "mesh.yaml" in str(problem)
    assert admitted(service="reviews", service_account="whoever")
    assert admitted(service="ratings", service_account="reviews", namespace="other")
    assert claims.refused == ()


def test_a_pod_that_comes_or_goes_changes_who_may_serve_and_endpoints_do_not() -> None:
    """Change by change what would be said anew; a label of a template that is no text selects nothing."""
    kinds = "apiVersion: v1\nkind: {}\nmetadata: {{name: {}, labels: {{app: {}}}}}\n"
    service = kinds.format("Service", "ratings", "x") + "spec: {selector: {app: ratings}, ports: [{port: 80}]}\n"
    pods = [
        kinds.format("Pod", name, app) + f"spec: {{serviceAccountName: {name}}}\nstatus: {{podIP: 10.0.0.{number}}}\n"
        for number, (name, app) in enumerate((("one", "ratings"), ("two", "ratings"), ("three", "other")))
    ]
    template = "{metadata: {labels: {app: [ratings], 1: 2}}, spec: {serviceAccountName: odd}}"
    odd = f"apiVersion: apps/v1\nkind: StatefulSet\nmetadata: {{name: odd}}\nspec: {{template: {template}}}\n"
    slices = [
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n"
        "metadata: {name: s, labels: {kubernetes.io/service-name: ratings}}\n"
        f"endpoints: [{{addresses: [10.0.0.{n}]}}]\n"
        for n in (1, 2)
    ]
    parsed = {text: parse_text(text, "mesh.yaml").objects for text in (service, odd, *pods, *slices)}
    accounts = ("one", "two", "three", "odd")
    workloads = tuple(
        Workload("x", service="ratings", service_account=each, address=f"10.1.0.{n}", port=80)
        for n, each in enumerate(accounts)
    )
    claims = Claims()
    for texts, expected in (
        ((service, odd, pods[0], slices[0]), {"one"}),
        ((service, odd, pods[0], slices[1]), {"one"}),
        ((service, odd, *pods, slices[1]), {"one", "two"}),
        ((service, odd, *pods[1:]), {"two"}),
        ((service, odd, pods[2]), set(accounts)),
        ((service, odd, pods[0]), {"one"}),
    ):
        objects = tuple(each for text in texts for each in parsed[text])
        assert {each.service_account for each in claims.admitted(objects, workloads)} == expected


async def test_a_claim_to_anothers_service_is_no_endpoint(plane: ControlPlane, tmp_path: Path) -> None:
    """The whole way: reviews' process says that it is ratings, and `problems` says that it did."""
    assert plane.tokens is not None and plane.authority is not None
    async with httpx.AsyncClient(base_url=plane.admin_url, trust_env=False, timeout=20) as client:
        await client.post("/v1/apply", content=MANIFESTS, headers={"content-type": "application/yaml"})
        token, _ = await plane.tokens.create(OWN, 600.0, plane.authority.signing)
        (tmp_path / "token").write_text(token)
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        mesh = meshlib.connect(
            plane.xds_address,
            token_file=str(tmp_path / "token"),
            service_account="reviews",
            service="ratings",
            address=f"127.0.0.1:{port}",
            identity="control-plane",
            telemetry="off",
            cache_dir="-",
        )
        try:
            await asyncio.to_thread(mesh.wait_for_credentials, 60)
            mesh.serve()
            await until(lambda: bool(plane._claims.refused))
            services = (await client.get("/v1/endpoints?name=ratings")).json()["services"]
            assert [each["endpoints"] for each in services] == [[]]
            assert "is no endpoint" in (await client.get("/v1/problems")).text
        finally:
            await asyncio.to_thread(mesh.close)
            server.close()
            await server.wait_closed()


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
