"""A real Kiali over a real API server and a real Prometheus, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from kube.installed import install
from kube.real_cluster import RealCluster
from meshlib.controlplane.admission import STATUS
from observability.watched_demo import BUILT, eventually, log_of, program
from peers import unused_port

PROGRAM = BUILT / "kiali"
MISSING = "there is no Kiali here: make test-kiali builds it (needs Go)"
EXAMPLES = Path(__file__).parents[2] / "examples" / "bookinfo"
CONFIGURATION = ("platform/bookinfo.yaml", "networking/bookinfo-gateway.yaml", "networking/destination-rule-all.yaml")


class Kiali:
    """Its API. version: as it says itself."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=f"{url}/api", trust_env=False, timeout=60)

    def ask(self, path: str, **params: str) -> Any:
        answer = self._http.get(path, params=params)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    def close(self) -> None:
        self._http.close()


def fill(cluster: RealCluster, folder: Path) -> None:
    """meshlib installed, Bookinfo applied, and the pods that a scheduler and kubelets would have made of it."""
    install(cluster, folder, "--istio-crds")
    for name in CONFIGURATION:
        for given in yaml.safe_load_all((EXAMPLES / name).read_text()):
            if given:
                given["metadata"].setdefault("namespace", "default")
                cluster.put(given)
                if given["kind"] == "Deployment":
                    _settle(cluster, given)


def _settle(cluster: RealCluster, deployment: dict[str, Any]) -> None:
    """Its ReplicaSet and pod, ready, with what the control plane's webhook says of a pod."""
    name, template = deployment["metadata"]["name"], deployment["spec"]["template"]
    containers = template["spec"]["containers"]
    found = cluster.find("Deployment", name, "default", "apps")
    assert found is not None
    owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name, "uid": found["metadata"]["uid"]}
    labels = {**template["metadata"]["labels"], "pod-template-hash": "1"}
    made = cluster.put(
        {
            "apiVersion": "apps/v1",
            "kind": "ReplicaSet",
            "metadata": {
                "name": f"{name}-1",
                "namespace": "default",
                "labels": labels,
                "ownerReferences": [{**owner, "controller": True}],
            },
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": labels},
                "template": {**template, "metadata": {**template["metadata"], "labels": labels}},
            },
            "status": {"replicas": 1, "readyReplicas": 1, "availableReplicas": 1},
        }
    )
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": f"{name}-1", "uid": made["metadata"]["uid"]}
    cluster.put(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{name}-1-a",
                "namespace": "default",
                "labels": labels,
                "annotations": {STATUS: json.dumps({"containers": [each["name"] for each in containers]})},
                "ownerReferences": [{**owner, "controller": True}],
            },
            "spec": template["spec"],
            "status": {
                "phase": "Running",
                "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [
                    {
                        "name": each["name"],
                        "image": each["image"],
                        "imageID": "",
                        "ready": True,
                        "restartCount": 0,
                        "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
                    }
                    for each in containers
                ],
            },
        }
    )
    counts = {"replicas": 1, "readyReplicas": 1, "availableReplicas": 1, "updatedReplicas": 1}
    cluster.put({**found, "status": counts})


@contextmanager
def kiali(cluster: RealCluster, folder: Path, prometheus: str, **external: Any) -> Iterator[Kiali]:
    """With the configuration that docs/how-to/prometheus.md shows, but for addresses.

    external: more external services."""
    port = unused_port()
    (folder / "console").mkdir()
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "kiali", "namespace": "istio-system"}}
    bound = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "kiali"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"kind": "ServiceAccount", "name": "kiali", "namespace": "istio-system"}],
    }
    cluster.put(account, bound)
    remote = cluster.kubeconfig(folder / "kiali-kubeconfig", token=cluster.token("istio-system", "kiali"))
    configuration = {
        "auth": {"strategy": "anonymous"},
        "deployment": {"namespace": "istio-system", "remote_secret_path": str(remote), "view_only_mode": True},
        "external_services": {
            "istio": {"istio_api_enabled": False, "istio_sidecar_annotation": STATUS},
            "prometheus": {"url": prometheus, "cache_enabled": False},
            "grafana": {"enabled": False},
            "tracing": {"enabled": False},
            **external,
        },
        "kubernetes_config": {"cluster_name": "Kubernetes"},
        "login_token": {"signing_key": "kiali-of-the-tests-0123456789abc"},
        "server": {
            "address": "127.0.0.1",
            "port": port,
            "web_root": "/kiali",
            "static_content_root_directory": str(folder / "console"),
            "observability": {"metrics": {"enabled": False}},
        },
    }
    (folder / "kiali.yaml").write_text(yaml.safe_dump(configuration))
    url = f"http://127.0.0.1:{port}/kiali"

    def is_up() -> bool:
        try:
            return httpx.get(f"{url}/healthz", trust_env=False, timeout=5).status_code == 200
        except httpx.HTTPError:
            assert process.poll() is None, log_of(folder, "kiali")
            return False

    with program(folder, "kiali", "-config", str(folder / "kiali.yaml")) as process:
        eventually(is_up, lambda: f"Kiali does not come up:\n{log_of(folder, 'kiali')}")
        asked = Kiali(url)
        try:
            yield asked
        finally:
            asked.close()
