"""A process without a control plane, under a real API server's RBAC, with the role that the page gives and no other."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import meshlib
from kube.installed import token_kubeconfig
from kube.real_cluster import RealCluster, own_address
from peers import Answer, Peer

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "kubernetes.md"
PATIENCE = 60.0
pytestmark = pytest.mark.timeout(180)


def service(name: str, namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"ports": [{"name": "http", "port": 9080}]},
    }


def slice_of(name: str, namespace: str, port: int) -> dict[str, Any]:
    labels = {"kubernetes.io/service-name": name}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-a", "namespace": namespace, "labels": labels},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port}],
        "endpoints": [{"addresses": [own_address()], "conditions": {"ready": True}}],
    }


def test_the_role_on_the_page_is_enough_and_ends_at_its_namespace(
    real_cluster: RealCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """New pods are followed by its own account. What another namespace keeps to itself is left to DNS."""
    caplog.set_level(logging.INFO, "meshlib")
    text = PAGE.read_text().partition("## Without a control plane")[2].partition("```yaml")[2].partition("```")[0]
    role = yaml.safe_load(text)
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "web", "namespace": "shop"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": role["metadata"]["name"]},
        "subjects": [{"kind": "ServiceAccount", "name": "web", "namespace": "shop"}],
    }
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "web", "namespace": "shop"}}
    real_cluster.put(account, role, binding, service("reviews", "shop"), service("vault", "private"))
    monkeypatch.setenv("KUBECONFIG", str(token_kubeconfig(real_cluster, tmp_path, "shop", "web")))
    with (
        Peer(lambda _: Answer(body=b"one"), host=own_address()) as one,
        Peer(lambda _: Answer(body=b"two"), host=own_address()) as two,
        meshlib.connect("kubernetes:", telemetry="off") as mesh,
        httpx.Client(transport=mesh.transport(), timeout=30) as client,
    ):
        real_cluster.put(slice_of("reviews", "shop", one.port), slice_of("vault", "private", one.port))
        assert client.get("http://reviews:9080/").text == "one"
        assert client.get("http://reviews.shop.svc.cluster.local:9080/").text == "one"
        real_cluster.put(slice_of("reviews", "shop", two.port))
        deadline = time.monotonic() + PATIENCE
        while client.get("http://reviews:9080/").text != "two":
            assert time.monotonic() < deadline, "the new pod gets no call"
        with pytest.raises(httpx.HTTPError):
            client.get("http://vault.private:9080/")
    refusals = [each.getMessage() for each in caplog.records if "403" in each.getMessage()]
    assert refusals
    assert all(each.startswith("vault.private:9080 is left to DNS") for each in refusals), refusals
