"""A caller and a service on real sockets: what both count is what happened, and they agree on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from inbound.inbound_servers import uvicorn_server, werkzeug_server
from meshlib.mesh import Mesh
from meshlib.model import Cluster, Endpoint, Fault, FaultAbort, RetryPolicy, ServiceName, Snapshot, peer_of
from meshlib.telemetry.label_sets import LABELS
from snapshots import mesh, publish, service
from telemetry.receiver import attributes, grpc_receiver, http_receiver

REVIEWS = ServiceName("reviews.default.svc.cluster.local", "reviews", "default")
SERVER = {"service": "reviews", "labels": (("app", "reviews"), ("version", "v2"))}
CLIENT = {"service": "productpage", "labels": (("app", "productpage"), ("version", "v1"))}
PORT = {"telemetry": "off", "prometheus": "127.0.0.1:1"}


@pytest.fixture(autouse=True)
def _no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests read what is exposed without a port to scrape."""
    monkeypatch.setattr("meshlib.telemetry.pipeline.Telemetry.start", lambda self: None)


async def _asgi(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        return
    while (await receive()).get("more_body"):
        pass
    status = int(scope["path"].strip("/") or 200)
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"12345", "more_body": True})
    await send({"type": "http.response.body", "body": b"67890"})


def _wsgi(environ: Any, start_response: Any) -> Any:
    start_response(environ["PATH_INFO"].strip("/") + " said", [])
    return iter([b"12345", b"67890"])


@contextmanager
def served(kind: str, by: Mesh) -> Iterator[str]:
    with uvicorn_server(by.asgi(_asgi)) if kind == "asgi" else werkzeug_server(by.wsgi(_wsgi)) as url:
        yield url


def reviews(url: str) -> Snapshot:
    host, _, port = url.removeprefix("http://").partition(":")
    given = service("reviews:9080", [(host, int(port))], cluster=Cluster("outbound|9080||reviews", service=REVIEWS))
    labels = dict(SERVER["labels"])
    there = Endpoint(host, int(port), workload="reviews-v2", peer=peer_of(labels, "reviews-v2", "default"))
    return replace(given, assignments=(replace(given.assignments[0], endpoints=(there,)),))


def told(by: Mesh) -> list[dict[str, str]]:
    assert by.telemetry is not None
    return [
        dict(zip(LABELS, each.labels, strict=True)) | {"count": str(each.count)}
        for each in by.telemetry.recorder.series()
    ]


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
def test_both_ends_tell_the_same(kind: str) -> None:
    """Kiali counts an edge twice where they do not: workloads, codes, flags and numbers are equal at both ends."""
    with mesh(**SERVER, **PORT) as server, mesh(**CLIENT, **PORT) as client:
        with served(kind, server) as url, client.Client() as http:
            publish(client, reviews(url))
            for status in (200, 200, 404, 500):
                assert http.get(f"http://reviews:9080/{status}").read() == b"1234567890"
        expected = {
            "source_workload": "productpage-v1",
            "source_workload_namespace": "default",
            "source_app": "productpage",
            "source_canonical_service": "productpage",
            "source_canonical_revision": "v1",
            "source_version": "v1",
            "source_cluster": "Kubernetes",
            "source_principal": "unknown",
            "destination_workload": "reviews-v2",
            "destination_workload_namespace": "default",
            "destination_app": "reviews",
            "destination_version": "v2",
            "destination_canonical_service": "reviews",
            "destination_canonical_revision": "v2",
            "destination_principal": "unknown",
            "destination_cluster": "Kubernetes",
            "destination_service": "reviews.default.svc.cluster.local",
            "destination_service_name": "reviews",
            "destination_service_namespace": "default",
            "request_protocol": "http",
            "grpc_response_status": "",
            "response_flags": "-",
            "connection_security_policy": "none",
        }
        for reporter, by in (("source", client), ("destination", server)):
            found = sorted(told(by), key=lambda each: each["response_code"])
            assert found == [
                {**expected, "reporter": reporter, "response_code": code, "count": count}
                for code, count in (("200", "2"), ("404", "1"), ("500", "1"))
            ]


def test_bytes_are_those_of_the_body_that_was_read() -> None:
    """A chunked answer has no content-length, and counts for what it is."""
    with mesh(**SERVER, **PORT) as server, mesh(**CLIENT, **PORT) as client:
        with served("asgi", server) as url, client.Client() as http:
            publish(client, reviews(url))
            http.post("http://reviews:9080/200", content=b"x" * 1000)
        for by in (client, server):
            assert by.telemetry is not None
            [series] = by.telemetry.recorder.series()
            assert 1000 < series.request_bytes < 2500
            assert 10 <= series.response_bytes < 300


def test_a_call_that_reaches_nobody_is_told_by_its_source() -> None:
    """UH and NR name the service that was meant and no workload, so that Kiali finds the edge."""
    with mesh(**CLIENT, **PORT) as client:
        given = service("reviews:9080", [], cluster=Cluster("outbound|9080||reviews", service=REVIEWS))
        publish(client, given)
        with client.Client() as http:
            assert http.get("http://reviews:9080/").status_code == 503
        [found] = told(client)
        assert (found["response_code"], found["response_flags"]) == ("503", "UH")
        assert (found["destination_workload"], found["destination_cluster"]) == ("unknown", "unknown")
        assert found["destination_service"] == "reviews.default.svc.cluster.local"
        assert found["destination_service_namespace"] == "default"


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
def test_a_probe_is_no_traffic(kind: str) -> None:
    """A kubelet asks each replica every few seconds, in plaintext: no edge of the graph, and no lock half open."""
    with mesh(**SERVER, **PORT, probe_paths=("/200",)) as server, served(kind, server) as url:
        for path in ("/200", "/404"):
            assert httpx.get(url + path, trust_env=False, timeout=30).status_code == int(path[1:])
    (counted,) = told(server)  # what was served is told a moment after the answer, and before the server has ended
    assert (counted["response_code"], counted["count"]) == ("404", "1")


def test_a_call_that_a_fault_ends_is_one_of_its_service() -> None:
    """Envoy has chosen the cluster before its fault filter runs; it never was a call to a host that nobody knows."""
    with mesh(**CLIENT, **PORT) as client, client.Client() as http:
        given = reviews("http://127.0.0.1:1")
        [configuration] = given.route_configurations
        [host] = configuration.virtual_hosts
        fault = Fault(abort=FaultAbort(1_000_000, 500))
        broken = replace(host, routes=tuple(replace(each, fault=fault) for each in host.routes))
        publish(client, replace(given, route_configurations=(replace(configuration, virtual_hosts=(broken,)),)))
        assert http.get("http://reviews:9080/").status_code == 500
        (counted,) = told(client)
    names = ("destination_service", "destination_workload", "response_code", "response_flags")
    assert [counted[name] for name in names] == [REVIEWS.host, "unknown", "500", "FI"]


def test_a_caller_outside_of_the_mesh_is_unknown() -> None:
    """Nothing is guessed from its address, and what it claims in a header that can't be read is nothing."""
    with mesh(**SERVER, **PORT) as server:
        with served("asgi", server) as url:
            httpx.get(url, trust_env=False, timeout=20, headers={"x-envoy-peer-metadata": "%%%"})
        [found] = told(server)
        sources = {found[name] for name in LABELS if name.startswith("source_")}
        assert sources == {"unknown", "latest"} and found["source_canonical_revision"] == "latest"


def test_who_is_outside_is_told_nothing() -> None:
    """The peer metadata goes to endpoints that the control plane knows as workloads only."""
    with mesh(**SERVER, **PORT) as server, mesh(**CLIENT, **PORT) as client:
        with served("asgi", server) as url, client.Client() as http:
            given = reviews(url)
            bare = replace(given.assignments[0].endpoints[0], peer="")
            publish(client, replace(given, assignments=(replace(given.assignments[0], endpoints=(bare,)),)))
            http.get("http://reviews:9080/200")
        [found] = told(server)
        assert found["source_workload"] == "unknown"


def test_the_exposition_can_be_parsed() -> None:
    """By Prometheus' own parser; no label but grpc_response_status is empty."""
    with mesh(**SERVER, **PORT) as server:
        with served("asgi", server) as url:
            httpx.get(url, trust_env=False, timeout=20)
        kind, body = server.metrics()
        assert kind.startswith("text/plain")
        families = {each.name: each for each in text_string_to_metric_families(body.decode())}
        [sample] = families["istio_requests"].samples
        assert sample.value == 1 and set(sample.labels) == set(LABELS)
        assert [name for name, value in sample.labels.items() if not value] == ["grpc_response_status"]
        assert families["istio_build"].samples[0].labels["component"] == "proxy"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_what_was_counted_is_pushed(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deltas, by OTLP: their sum is what happened, and a process that ends pushes the rest."""
    monkeypatch.undo()
    if protocol == "http":
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with grpc_receiver() if protocol == "grpc" else http_receiver() as receiver:
        with (
            mesh(**SERVER, telemetry=receiver.url, telemetry_interval=0.1) as server,
            served("asgi", server) as url,
        ):
            for _ in range(3):
                httpx.get(url, trust_env=False, timeout=20)
            receiver.wait(lambda: receiver.total("istio_requests_total") == 3)
            httpx.get(url, trust_env=False, timeout=20)
        assert receiver.total("istio_requests_total", reporter="destination", response_code="200") == 4
        assert receiver.total("istio_request_duration_milliseconds") == 4


def test_a_trace_is_one_tree_with_every_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call, two attempts, two servers: each server's parent is the attempt that reached it."""
    monkeypatch.undo()
    failing = [500]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            status = failing.pop() if failing else 200
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    with grpc_receiver() as receiver:
        pushed = {"telemetry": receiver.url, "telemetry_interval": 0.1, "trace_sampling": 100.0}
        with (
            mesh(**SERVER, **pushed) as server,
            mesh(**CLIENT, **pushed) as client,
            uvicorn_server(server.asgi(app)) as url,
            client.Client() as http,
        ):
            given = reviews(url)
            retry = RetryPolicy(attempts=1, on=frozenset({"5xx"}))
            configured = service("reviews:9080", [], cluster=given.clusters[0], retry=retry)
            publish(client, replace(configured, assignments=given.assignments))
            assert http.get("http://reviews:9080/").status_code == 200
        spans = receiver.spans
        assert len({each.trace_id for each in spans}) == 1
        [root] = [each for each in spans if not each.parent_span_id]
        tries = [each for each in spans if each.kind == 3 and each.parent_span_id == root.span_id]
        servers = [each for each in spans if each.kind == 2]
        assert len(spans) == 5 and len(tries) == 2
        assert {each.parent_span_id for each in servers} == {each.span_id for each in tries}
        told = [attributes(each) for each in tries]
        assert sorted(each["mesh.attempt"] for each in told) == [1, 2]
        assert sorted(each["http.response.status_code"] for each in told) == [200, 500]
        assert attributes(root)["mesh.attempts"] == 2 and attributes(root)["mesh.response_flags"] == "-"
