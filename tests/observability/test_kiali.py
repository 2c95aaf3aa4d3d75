"""Does a real Kiali show Bookinfo as it is? Its own server asks a real Prometheus and a real API server: nodes and
edges, rates and shares of errors, mutual TLS, health, the metrics of a workload."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kube.real_cluster import RealCluster
from observability.kiali_server import MISSING, PROGRAM, Kiali, fill, kiali
from observability.watched_demo import Visitors, demo_process, eventually, scraped
from telemetry.test_real_prometheus import PROMETHEUS

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not PROGRAM.exists(), reason=MISSING),
    pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed (Debian package prometheus)"),
]
RATE = 4.0
"""Requests a second; one of four is for the book that is refused."""
SECONDS = 45
TRUE_EDGES = {
    *(("istio-ingressgateway", "productpage-v1"), ("productpage-v1", "details-v1")),
    *(("productpage-v1", "reviews-v1"), ("productpage-v1", "reviews-v2"), ("productpage-v1", "reviews-v3")),
    *(("reviews-v2", "ratings-v1"), ("reviews-v3", "ratings-v1")),
}


class Seen(NamedTuple):
    kiali: Kiali
    sent: Visitors


@pytest.fixture(scope="module")
def seen(running_cluster: RealCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder: Path = tmp_path_factory.mktemp("kiali")
    try:
        fill(running_cluster, folder)
        with (
            demo_process(folder) as demo,
            scraped(folder, demo) as prometheus,
            kiali(running_cluster, folder, prometheus.url) as asked,
            Visitors(demo.page, RATE) as sent,
        ):
            began = time.monotonic()
            # Rates are those of the last so many seconds: until then there is less in them than was sent.
            eventually(lambda: time.monotonic() - began > SECONDS + 5, lambda: "time stands still")
            yield Seen(asked, sent)
    finally:
        running_cluster.wipe()


def graph(asked: Kiali, **params: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Nodes by their ids, and edges."""
    given = {
        "namespaces": "default,istio-system",
        "graphType": "versionedApp",
        "duration": f"{SECONDS}s",
        "injectServiceNodes": "false",
        "appenders": "deadNode,responseTime,securityPolicy,sidecarsCheck,throughput",
        "throughputType": "response",
    }
    elements = asked.ask("/namespaces/graph", **{**given, **params})["elements"]
    return (
        {each["data"]["id"]: each["data"] for each in elements["nodes"]},
        [each["data"] for each in elements["edges"]],
    )


def by_workload(asked: Kiali, **params: str) -> dict[tuple[str, str], dict[str, Any]]:
    nodes, edges = graph(asked, **params)
    return {(nodes[each["source"]]["workload"], nodes[each["target"]]["workload"]): each for each in edges}


def rates(edge: dict[str, Any]) -> dict[str, float]:
    assert edge["traffic"]["protocol"] == "http"
    return {name: float(value) for name, value in edge["traffic"]["rates"].items()}


def test_the_graph_has_the_workloads_and_the_calls_that_there_are(seen: Seen) -> None:
    """No node is unknown, dead, or without a sidecar as Kiali calls it, and no edge is one that nobody calls along."""
    nodes, edges = graph(seen.kiali)
    workloads = {each["workload"]: each for each in nodes.values() if "workload" in each}
    assert set(workloads) == {name for edge in TRUE_EDGES for name in edge}
    assert {each["nodeType"] for each in nodes.values()} == {"app", "box"}
    for each in workloads.values():
        assert not each.get("isDead") and not each.get("isInaccessible") and not each.get("isOutOfMesh")
    assert set(by_workload(seen.kiali)) == TRUE_EDGES
    assert len(edges) == len(TRUE_EDGES)


def test_service_nodes_are_between_them(seen: Seen) -> None:
    """As Kiali draws it unless it is told otherwise."""
    nodes, edges = graph(seen.kiali, injectServiceNodes="true")
    services = {each["service"]: each for each in nodes.values() if each["nodeType"] == "service"}
    assert set(services) == {"productpage", "details", "reviews", "ratings"}
    called = {nodes[each["target"]]["workload"] for each in edges if each["source"] == services["reviews"]["id"]}
    assert called == {"reviews-v1", "reviews-v2", "reviews-v3"}


def test_rates_and_shares_of_errors_are_those_that_were_sent(seen: Seen) -> None:
    """One of four requests is refused by `details`, and by nobody else."""
    edges = by_workload(seen.kiali)
    for edge in (("istio-ingressgateway", "productpage-v1"), ("productpage-v1", "details-v1")):
        told = rates(edges[edge])
        assert told["http"] == pytest.approx(RATE, rel=0.15)
        assert told["http4xx"] == pytest.approx(RATE / 4, rel=0.3)
        assert told["httpPercentErr"] == pytest.approx(25, abs=4)
        assert set(edges[edge]["traffic"]["responses"]) == {"200", "403"}
    reviews = [rates(edges["productpage-v1", f"reviews-v{number}"]) for number in (1, 2, 3)]
    assert sum(each["http"] for each in reviews) == pytest.approx(RATE * 3 / 4, rel=0.2)
    assert all(each["http"] > 0 and "http4xx" not in each and "http5xx" not in each for each in reviews)
    for number in (2, 3):
        asking = rates(edges[f"reviews-v{number}", "ratings-v1"])
        assert asking["http"] == pytest.approx(reviews[number - 1]["http"], rel=0.3)
    assert set(seen.sent.answers) == {200, 403}


def test_every_edge_is_mutual_tls_between_the_workloads_identities(seen: Seen) -> None:
    """The padlocks, and who is behind them."""
    for (source, target), edge in by_workload(seen.kiali).items():
        assert edge["isMTLS"] == "100", (source, target, edge)
        assert edge["destPrincipal"] == f"spiffe://cluster.local/ns/default/sa/bookinfo-{target.rpartition('-')[0]}"
        account = (
            "istio-system/sa/istio-ingressgateway-service-account"
            if source == "istio-ingressgateway"
            else f"default/sa/bookinfo-{source.rpartition('-')[0]}"
        )
        assert edge["sourcePrincipal"] == f"spiffe://cluster.local/ns/{account}"
        assert float(edge["throughput"]) > 0
        # Whole milliseconds, as Istio's: a service may need less than one.
        assert float(target == "productpage-v1") <= float(edge["responseTime"]) < 10_000


def test_health_counts_the_requests_that_failed(seen: Seen) -> None:
    """Of workloads, in and out; a workload without a failure has none."""
    health = seen.kiali.ask("/clusters/health", namespaces="default", type="workload", rateInterval=f"{SECONDS}s")
    workloads = health["namespaceWorkloadHealth"]["default"]
    details = workloads["details-v1"]["requests"]["inbound"]["http"]
    assert details["403"] / sum(details.values()) == pytest.approx(0.25, abs=0.05)
    assert set(workloads["reviews-v2"]["requests"]["inbound"]["http"]) == {"200"}
    assert workloads["productpage-v1"]["requests"]["outbound"]["http"]["403"] > 0
    assert workloads["ratings-v1"]["workloadStatus"]["availableReplicas"] == 1


def test_a_workload_and_a_service_have_metrics(seen: Seen) -> None:
    """What Kiali draws in their tabs: counts, by reporter, and latencies."""
    asking = {"duration": str(SECONDS), "step": "5", "rateInterval": f"{SECONDS}s", "quantiles[]": "0.95"}
    for place, direction in (
        ("workloads/productpage-v1", "outbound"),
        ("workloads/details-v1", "inbound"),
        ("services/reviews", "inbound"),
    ):
        found = seen.kiali.ask(
            f"/namespaces/default/{place}/metrics",
            **asking,
            direction=direction,
            reporter="source" if direction == "outbound" else "destination",
            **{"filters[]": "request_count"},
        )
        latest = [float(each["datapoints"][-1][1]) for each in found["request_count"]]
        assert sum(latest) > 1, (place, found)
