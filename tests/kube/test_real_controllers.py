"""The mesh where Kubernetes' own controllers work: nothing is written that they would write, but pods' status."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import meshlib
from cli.meshctl_processes import control_plane
from kube.installed import HOME, install, meshctl, pod_of_it
from kube.real_cluster import RealCluster
from kube.real_controllers import LOOPBACK, PROGRAM, SUBNET, Kubelet, controllers
from peers import unused_port

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not PROGRAM.is_file(), reason="no kube-controller-manager here: make cluster-tools builds it"),
]


@pytest.fixture
def cluster(real_cluster: RealCluster) -> Iterator[RealCluster]:
    with controllers(real_cluster):
        yield real_cluster


def deployment(version: str, port: int, replicas: int = 2) -> dict[str, Any]:
    container = {"name": "app", "image": f"reviews:{version}", "ports": [{"name": "http", "containerPort": port}]}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "reviews", "namespace": "shop"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "reviews"}},
            "strategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {"labels": {"app": "reviews", "version": version}},
                "spec": {"containers": [container]},
            },
        },
    }


def service(port: int) -> dict[str, Any]:
    spec = {"selector": {"app": "reviews"}, "ports": [{"name": "http", "port": 9080, "targetPort": port}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "reviews", "namespace": "shop"}, "spec": spec}


def namespace(name: str, **labels: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def pods(cluster: RealCluster, home: str = "shop") -> list[dict[str, Any]]:
    return list(cluster.ask("GET", f"/api/v1/namespaces/{home}/pods")["items"])


def test_what_a_deployment_makes_is_on_the_mesh(cluster: RealCluster, tmp_path: Path) -> None:
    """Its pods are made by a controller that knows nothing of us; they go with their owner."""
    install(cluster, tmp_path)
    shop = namespace("shop")
    shop["metadata"]["labels"] = {"meshlib-injection": "enabled"}
    with pod_of_it(cluster, tmp_path / "one") as plane:
        cluster.until(lambda: "holds the lease" in plane.log, "the control plane serves")
        cluster.put(shop, deployment("v1", 9080, replicas=3))
        cluster.until(lambda: len(pods(cluster)) == 3, "three pods are made")
        for each in pods(cluster):
            assert [one["name"] for one in each["spec"]["initContainers"]] == ["meshlib-init"]
            assert each["metadata"]["ownerReferences"][0]["kind"] == "ReplicaSet"
        path = "/apis/apps/v1/namespaces/shop/deployments/reviews"
        cluster.ask("DELETE", path, propagationPolicy="Background")
        cluster.until(lambda: not pods(cluster), "they go with it")


def test_a_rolling_update_fails_no_call(cluster: RealCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Deployment's controller, one pod after the other; who is called is what the EndpointSlice controller says.
    Pods are on loopback, at addresses that no EndpointSlice takes: the caller's sockets translate."""
    connect = socket.create_connection

    def translated(address: tuple[str, int], *rest: Any, **options: Any) -> socket.socket:
        host, port = address
        return connect((host.replace(SUBNET, LOOPBACK, 1), port), *rest, **options)

    monkeypatch.setattr(socket, "create_connection", translated)
    port = unused_port()
    config = cluster.kubeconfig(tmp_path / "admin-kubeconfig")
    cluster.put(namespace("shop"), service(port), deployment("v1", port))
    words = ("--kubernetes", "--xds", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    answers: list[str] = []
    is_over = threading.Event()
    with (
        Kubelet(cluster, "shop") as kubelet,
        control_plane(tmp_path, *words, KUBECONFIG=str(config)) as plane,
        meshlib.connect(plane.xds, namespace="shop", cache_dir="-") as mesh,
        mesh.Client(timeout=20) as client,
    ):

        def ask() -> str:
            answer = client.get("http://reviews:9080/")
            return answer.text if answer.status_code == 200 else f"{answer.status_code} {answer.text}"

        def load() -> None:
            while not is_over.wait(0.01):
                try:
                    answers.append(ask())
                except Exception as error:
                    answers.append(repr(error))

        cluster.until(lambda: ask() == "v1", "the first version answers")
        caller = threading.Thread(target=load)
        caller.start()
        try:
            cluster.put(deployment("v2", port))

            def is_done() -> bool:
                found = pods(cluster)
                return kubelet.error is None and [each["metadata"]["labels"]["version"] for each in found] == ["v2"] * 2

            cluster.until(is_done, f"the old pods are gone: {kubelet!r}")
            seen = len(answers)
            cluster.until(lambda: len(answers) > seen + 20, "calls go on")
        finally:
            is_over.set()
            caller.join(60)
    assert set(answers) == {"v1", "v2"}
    assert set(answers[-10:]) == {"v2"}


def test_nothing_is_left_of_it(cluster: RealCluster, tmp_path: Path) -> None:
    """By meshctl uninstall, and by the end of its namespace, which a controller empties for good."""
    cluster.until(lambda: cluster.find("ConfigMap", "kube-root-ca.crt") is not None, "the controllers have begun")
    before = set(cluster.everything())
    install(cluster, tmp_path, "--istio-crds", "--replicas", "2")
    cluster.until(lambda: bool(pods(cluster, HOME)), "its pods are made")
    assert meshctl(cluster, tmp_path, "uninstall", "--purge").exit_code == 0
    assert not [name for kind, _, name in cluster.everything() if kind == "CustomResourceDefinition"]
    cluster.ask("DELETE", f"/api/v1/namespaces/{HOME}")
    cluster.until(lambda: set(cluster.everything()) <= before, "all is gone")
