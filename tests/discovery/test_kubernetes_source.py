"""What does a process see that has a Kubernetes API server and no control plane?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import meshlib
from discovery.feed import Feed
from kube.api_server import ApiServer
from kube.cluster import Cluster
from meshlib.discovery.kubernetes import KubernetesSource
from meshlib.errors import SettingsError
from meshlib.kube.settings import KubeSettings
from meshlib.model import Snapshot
from peers import Answer, Peer

PATIENCE = 30.0


def service(name: str = "reviews", namespace: str = "shop", **spec: Any) -> dict[str, Any]:
    ports = [{"name": "http", "port": 9080, "targetPort": 8080}, {"name": "admin", "port": 9090}]
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": ports, **spec}}


def slice_of(
    *addresses: str, port: int = 8080, name: str = "reviews-a", namespace: str = "shop", **conditions: bool
) -> dict[str, Any]:
    owner = {"kubernetes.io/service-name": name.rpartition("-")[0]}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": namespace, "labels": owner},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port}, {"name": "admin", "port": 1}],
        "endpoints": [{"addresses": [each], "conditions": conditions} for each in addresses],
    }


@pytest.fixture
def cluster(any_api: ApiServer) -> Iterator[Cluster]:
    with Cluster(any_api) as cluster:
        yield cluster


@pytest.fixture
def feed(cluster: Cluster) -> Iterator[Feed]:
    settings = KubeSettings(cluster.api.url, namespace="shop")
    with Feed(KubernetesSource(settings, again=0.1, first_pause=0.01)) as feed:
        yield feed


def addresses(snapshot: Snapshot, authority: str = "reviews:9080") -> list[str] | None:
    """None while it is absent, or nothing is known."""
    host, _, port = authority.rpartition(":")
    for assignment in snapshot.assignments:
        if assignment.cluster == f"outbound|{port}||{host}":
            return [each.authority for each in assignment.endpoints]
    return None


def until(feed: Feed, expected: list[str] | None, authority: str = "reviews:9080") -> Snapshot:
    return feed.wait_for(lambda found: addresses(found, authority) == expected, PATIENCE)


def test_a_host_is_the_ready_endpoints_of_its_service(cluster: Cluster, feed: Feed) -> None:
    """By any name of it, at the port that the slices say; all slices together, one port apart from the other."""
    cluster.put(service(), slice_of("10.0.0.1", "10.0.0.2"), slice_of("10.0.1.1", name="reviews-b", ready=True))
    cluster.put(slice_of("10.0.2.1", name="reviews-c", ready=False))
    names = ("reviews", "reviews.shop", "reviews.shop.svc", "reviews.shop.svc.cluster.local")
    for name in names:
        feed.source.want(f"{name}:9080")
    feed.source.want("reviews:9090")
    for name in names:
        until(feed, ["10.0.0.1:8080", "10.0.0.2:8080", "10.0.1.1:8080"], f"{name}:9080")
    snapshot = until(feed, ["10.0.0.1:1", "10.0.0.2:1", "10.0.1.1:1"], "reviews:9090")
    assert snapshot.inconsistencies() == ()


def hinted(given: dict[str, Any], *zones: str | None) -> dict[str, Any]:
    for endpoint, zone in zip(given["endpoints"], zones, strict=True):
        endpoint["hints"] = {"forZones": [{"name": zone}]} if zone else {}
    return given


def test_hints_keep_calls_in_their_zone_as_long_as_they_are_whole(cluster: Cluster) -> None:
    """As kube-proxy follows them: not while an endpoint has none, nor where none is for this zone."""
    settings = KubeSettings(cluster.api.url, namespace="shop")
    with (
        Feed(KubernetesSource(settings, zone="z1", first_pause=0.01)) as here,
        Feed(KubernetesSource(settings, zone="z9", first_pause=0.01)) as elsewhere,
        Feed(KubernetesSource(settings, first_pause=0.01)) as anywhere,
    ):
        cluster.put(service(), hinted(slice_of("10.0.0.1", "10.0.0.2"), "z1", "z2"))
        for each in (here, elsewhere, anywhere):
            each.source.want("reviews:9080")
        until(here, ["10.0.0.1:8080"])
        until(elsewhere, ["10.0.0.1:8080", "10.0.0.2:8080"])
        until(anywhere, ["10.0.0.1:8080", "10.0.0.2:8080"])
        cluster.put(hinted(slice_of("10.0.1.1", name="reviews-b"), None))
        until(here, ["10.0.0.1:8080", "10.0.0.2:8080", "10.0.1.1:8080"])
        cluster.put(hinted(slice_of("10.0.1.1", name="reviews-b"), "z1"))
        until(here, ["10.0.0.1:8080", "10.0.1.1:8080"])


def test_only_the_hosts_in_use_are_asked_for(cluster: Cluster, feed: Feed) -> None:
    """One Service and its slices, in its namespace: a process need not see more, and must not ask for more."""
    cluster.put(service(), slice_of("10.0.0.1"), service("ratings"))
    feed.source.want("reviews:9080")
    until(feed, ["10.0.0.1:8080"])
    paths = {path.partition("?")[0] for _, path in cluster.api.requests}
    assert paths == {
        "/api/v1/namespaces/shop/services/reviews",
        "/api/v1/namespaces/shop/services",
        "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices",
    }
    queries = [path for _, path in cluster.api.requests if path.startswith("/api/v1/namespaces/shop/services?")]
    assert queries
    assert all("fieldSelector=metadata.name%3Dreviews" in path for path in queries)


def test_pods_come_and_go_and_watches_break(cluster: Cluster, feed: Feed) -> None:
    """Resets, 410 and a restart of the API server miss nothing."""
    cluster.put(service(), slice_of("10.0.0.1"))
    feed.source.want("reviews:9080")
    until(feed, ["10.0.0.1:8080"])
    cluster.watched("services", "endpointslices")
    cluster.put(slice_of("10.0.0.1", "10.0.0.2"))
    until(feed, ["10.0.0.1:8080", "10.0.0.2:8080"])

    def forget() -> None:
        cluster.api.put(slice_of("10.0.0.3"))
        cluster.api.compact()
        cluster.api.reset_watches()

    cluster.call(forget)
    until(feed, ["10.0.0.3:8080"])
    cluster.do(cluster.api.stop())
    cluster.put(slice_of())
    assert addresses(feed.snapshot) == ["10.0.0.3:8080"]
    cluster.do(cluster.api.start())
    until(feed, [])


def test_a_name_without_a_service_is_left_to_dns_until_it_has_one(cluster: Cluster, feed: Feed) -> None:
    """And again when it has lost it. What can be no Service costs no question."""
    for authority in ("reviews:9080", "www.example.com:80", "127.0.0.1:80", "[::1]:80"):
        feed.source.want(authority)
        feed.wait_for(lambda found, authority=authority: authority in found.absent, PATIENCE)
    assert all("/reviews" in path for _, path in cluster.api.requests)
    cluster.put(service(), slice_of("10.0.0.1"))
    until(feed, ["10.0.0.1:8080"])
    cluster.watched("services", "endpointslices")
    cluster.call(lambda: cluster.api.remove("services", "reviews", "shop"))
    feed.wait_for(lambda found: "reviews:9080" in found.absent, PATIENCE)


def test_an_external_name_and_a_port_that_is_not_there_are_left_to_dns(cluster: Cluster, feed: Feed) -> None:
    """The kernel and the name server know what to do with them."""
    cluster.put(service(), slice_of("10.0.0.1"), service("books", type="ExternalName", externalName="b.example.com"))
    for authority in ("reviews:1234", "books:9080"):
        feed.source.want(authority)
        feed.wait_for(lambda found, authority=authority: authority in found.absent, PATIENCE)


def test_what_may_not_be_read_is_left_to_dns_and_what_was_known_stays(
    cluster: Cluster, feed: Feed, caplog: pytest.LogCaptureFixture
) -> None:
    """`example.com` might be a Service of the namespace `com`. A right that is lost later empties nothing."""
    cluster.put(service(), slice_of("10.0.0.1"))
    cluster.call(lambda: cluster.api.forbidden.add("endpointslices"))
    feed.source.want("reviews:9080")
    feed.wait_for(lambda found: "reviews:9080" in found.absent, PATIENCE)
    assert any("left to DNS" in each.getMessage() for each in caplog.records)
    cluster.call(lambda: cluster.api.forbidden.clear())
    until(feed, ["10.0.0.1:8080"])
    cluster.watched("services", "endpointslices")

    def forbid() -> None:
        cluster.api.forbidden.add("endpointslices")
        cluster.api.compact()
        cluster.api.reset_watches()

    count = len(cluster.api.requests)
    cluster.call(forbid)
    cluster.do(asyncio.wait_for(cluster.api.asked(count + 4), PATIENCE))
    assert addresses(feed.snapshot) == ["10.0.0.1:8080"]


def test_a_refusal_is_asked_about_again_soon(cluster: Cluster) -> None:
    """A server that has just started refuses everybody, until it has read its roles. Half a minute is too long then."""
    cluster.put(service(), slice_of("10.0.0.1"))
    cluster.call(lambda: cluster.api.forbidden.add("endpointslices"))
    settings = KubeSettings(cluster.api.url, namespace="shop")
    with Feed(KubernetesSource(settings, again=3600.0, first_pause=0.01)) as feed:
        feed.source.want("reviews:9080")
        feed.wait_for(lambda found: "reviews:9080" in found.absent, PATIENCE)
        cluster.call(lambda: cluster.api.forbidden.clear())
        until(feed, ["10.0.0.1:8080"])


def test_calls_go_to_the_pods(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """meshlib.connect("kubernetes:") with a kubeconfig: the new pod gets the calls, and the old one may go."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    cluster.kubeconfig(tmp_path / "config")
    with (
        Peer(lambda _: Answer(body=b"one"), host=cluster.host) as one,
        Peer(lambda _: Answer(body=b"two"), host=cluster.host) as two,
        meshlib.connect("kubernetes:", telemetry="off") as mesh,
        httpx.Client(transport=mesh.transport()) as client,
    ):
        cluster.put(service(), slice_of(one.host, port=one.port))
        assert client.get("http://reviews:9080/").text == "one"
        cluster.watched("endpointslices")
        cluster.put(slice_of(two.host, port=two.port))
        deadline = time.monotonic() + PATIENCE
        while client.get("http://reviews:9080/").text != "two":
            assert time.monotonic() < deadline, "the new pod gets no call"


def test_without_a_cluster_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At the first use, in one sentence."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with (
        meshlib.connect("kubernetes:", telemetry="off") as mesh,
        httpx.Client(transport=mesh.transport()) as client,
        pytest.raises(SettingsError, match="no kubeconfig in"),
    ):
        client.get("http://reviews:9080/")
