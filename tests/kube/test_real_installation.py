"""A real API server takes what `meshctl install` says, and gives all of it back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.test_chart import chart, filled
from kube.api_server import crd
from kube.installed import HOME, install, meshctl
from kube.real_cluster import RealCluster
from meshlib.controlplane.installation import KINDS
from meshlib.controlplane.kubernetes import CUSTOM

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]


def versions(cluster: RealCluster) -> dict[tuple[str, str, str], str]:
    return {who: each["metadata"]["resourceVersion"] for who, each in cluster.everything().items()}


def test_again_changes_nothing_and_other_choices_leave_nothing_behind(
    real_cluster: RealCluster, tmp_path: Path
) -> None:
    """Server-side apply by a real server, which fills in defaults: none of them is fought over."""
    install(real_cluster, tmp_path, "--istio-crds", "--replicas", "2")
    before = versions(real_cluster)
    kinds = {kind for kind, _, _ in before}
    assert {"Deployment", "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy"} <= kinds
    install(real_cluster, tmp_path, "--istio-crds", "--replicas", "2")
    assert versions(real_cluster) == before
    install(real_cluster, tmp_path, "--istio-crds", "--no-inject")
    gone = {kind for kind, _, _ in before.keys() - versions(real_cluster).keys()}
    assert gone == {"PodDisruptionBudget", "HorizontalPodAutoscaler", "MutatingWebhookConfiguration"}
    deployment = real_cluster.find("Deployment", "meshlib", HOME, "apps")
    assert deployment is not None
    assert deployment["spec"]["replicas"] == 1


def test_a_dry_run_asks_the_cluster_nothing(real_cluster: RealCluster, tmp_path: Path) -> None:
    """And what it prints, the server takes, every field of it."""
    before = versions(real_cluster)
    printed = meshctl(real_cluster, tmp_path, "install", "--dry-run", "--replicas", "2").stdout
    assert versions(real_cluster) == before
    install(real_cluster, tmp_path)  # namespaces, without which a dry run makes nothing in them
    for each in yaml.safe_load_all(printed):
        applied(real_cluster, each)


def applied(cluster: RealCluster, given: dict[str, Any], namespace: str = "default") -> dict[str, Any]:
    """A server-side apply that changes nothing, and lets no field pass that the server does not know."""
    group, _, version = str(given["apiVersion"]).rpartition("/")
    place = cluster.collection(group, given["kind"])
    home = given["metadata"].get("namespace", namespace) if place.namespaced else ""
    answer = cluster.http.patch(
        place.path(version, home, given["metadata"]["name"]),
        content=json.dumps(given),
        params={"fieldManager": "test", "force": "true", "dryRun": "All", "fieldValidation": "Strict"},
        headers={"content-type": "application/apply-patch+yaml"},
    )
    assert answer.is_success, f"{given['kind']} {given['metadata']['name']}: {answer.text}"
    assert "warning" not in answer.headers, answer.headers["warning"]
    found: dict[str, Any] = answer.json()
    return found


def test_the_kinds_are_served_under_all_their_names(real_cluster: RealCluster, tmp_path: Path) -> None:
    """Structural and without a conflict; `kubectl get vs` works as with Istio's own definitions."""
    install(real_cluster, tmp_path, "--istio-crds")
    short = {}
    for each in CUSTOM:
        found = real_cluster.find("CustomResourceDefinition", each.resource.title, "", "apiextensions.k8s.io")
        assert found is not None
        conditions = {each["type"]: each["status"] for each in found["status"]["conditions"]}
        assert conditions == {"NamesAccepted": "True", "Established": "True"}, conditions
        assert set(found["status"]["acceptedNames"]) == set(found["spec"]["names"])
        short[each.resource.kind] = found["status"]["acceptedNames"].get("shortNames")
    assert short["VirtualService"] == ["vs"]
    assert short["AuthorizationPolicy"] == ["ap"]


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_chart_is_accepted_by_a_server(real_cluster: RealCluster, tmp_path: Path, replicas: int) -> None:
    """As Helm renders it: fields that no server knows would be lost without a word."""
    install(real_cluster, tmp_path, "--istio-crds", "-n", "mesh")
    files = chart.files()
    values = {**yaml.safe_load(files["values.yaml"]), "replicas": replicas, "istioCRDs": True}
    templates = (each.removeprefix(chart.SECRET) for name, each in files.items() if name.startswith("templates/"))
    found = [each for each in yaml.safe_load_all("\n---\n".join(filled(each, values) for each in templates)) if each]
    assert {"Deployment", "MutatingWebhookConfiguration", "CustomResourceDefinition"} <= {
        each["kind"] for each in found
    }
    for each in found:
        if each["kind"].endswith("WebhookConfiguration"):
            for webhook in each["webhooks"]:
                webhook["clientConfig"].pop("caBundle")  # a mark here, where Helm has the certificate
        applied(real_cluster, each)


def test_bookinfo_is_accepted_by_a_server(real_cluster: RealCluster, tmp_path: Path) -> None:
    """The manifests of the tutorial, platform and rules."""
    install(real_cluster, tmp_path, "--istio-crds")
    count = 0
    for file in sorted((ROOT / "examples" / "bookinfo").rglob("*.yaml")):
        for each in yaml.safe_load_all(file.read_text()):
            if each:
                applied(real_cluster, each)
                count += 1
    assert count > 60


def test_our_pods_are_fit_for_restricted_namespaces(real_cluster: RealCluster, tmp_path: Path) -> None:
    """Kubernetes' Pod Security Standards, of which a server refuses what is not kept."""
    install(real_cluster, tmp_path)
    deployment = real_cluster.find("Deployment", "meshlib", HOME, "apps")
    assert deployment is not None
    metadata = {"name": "strict", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}
    real_cluster.put({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    account = {"name": "meshlib", "namespace": "strict"}
    real_cluster.put({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account})
    template = deployment["spec"]["template"]
    pod = {**template, "apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"], "name": "it"}}
    real_cluster.ask("POST", "/api/v1/namespaces/strict/pods", pod)
    loose = {**pod, "metadata": {"name": "loose"}, "spec": {"containers": [{"name": "a", "image": "b"}]}}
    refused = real_cluster.http.post("/api/v1/namespaces/strict/pods", json=loose)
    assert refused.status_code == 403


def test_uninstall_leaves_nothing_but_what_is_said(real_cluster: RealCluster, tmp_path: Path) -> None:
    """The Lease too, which the control plane made. Kinds and the CA go by --purge, Istio's own never."""
    theirs = crd("VirtualService", "virtualservices", "networking.istio.io", "v1", "v1beta1", "v1alpha3")
    real_cluster.put(theirs)
    before = set(real_cluster.everything())
    install(real_cluster, tmp_path, "--istio-crds", "--replicas", "2")
    real_cluster.put(
        {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": "meshlib-status", "namespace": HOME},
        }
    )
    assert meshctl(real_cluster, tmp_path, "uninstall").exit_code == 0
    left = set(real_cluster.everything()) - before
    assert {kind for kind, _, _ in left} == {"Namespace", "CustomResourceDefinition", "Secret"}
    assert meshctl(real_cluster, tmp_path, "uninstall", "--purge").exit_code == 0
    assert set(real_cluster.everything()) - before == {("Namespace", "", HOME)}
    assert before <= set(real_cluster.everything())


def test_what_istio_has_written_to_since_is_istios(real_cluster: RealCluster, tmp_path: Path) -> None:
    """Its definition has a schema, which neither a second install nor a purge may take away."""
    install(real_cluster, tmp_path, "--istio-crds")
    title = "virtualservices.networking.istio.io"
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{title}"
    names = {"names": {"categories": ["istio-io"]}}
    real_cluster.ask("PATCH", path, {"spec": names}, fieldManager="istioctl")
    install(real_cluster, tmp_path, "--istio-crds")
    assert real_cluster.ask("GET", path)["spec"]["names"]["categories"] == ["istio-io"]
    assert meshctl(real_cluster, tmp_path, "uninstall", "--purge").exit_code == 0
    left = {name for kind, _, name in real_cluster.everything() if kind == "CustomResourceDefinition"}
    assert title in left


def test_check_reads_a_real_server(real_cluster: RealCluster, tmp_path: Path) -> None:
    """Before, and after; the Deployment's status is its controller's, and here the test's."""
    assert meshctl(real_cluster, tmp_path, "check").exit_code == 1
    install(real_cluster, tmp_path)
    starting = meshctl(real_cluster, tmp_path, "check")
    assert "× deployment/meshlib is available" in starting.stdout
    assert starting.stdout.count("×") == 2
    path = KINDS["Deployment"].path("v1", HOME, "meshlib", "status")
    seen = {"observedGeneration": 1, "replicas": 1, "readyReplicas": 1, "availableReplicas": 1}
    real_cluster.ask("PATCH", path, {"status": seen})
    well = meshctl(real_cluster, tmp_path, "check")
    assert (well.exit_code, well.stdout.count("×")) == (0, 0), well.stdout
    assert re.search(r"the API server answers: v\d+\.\d+", well.stdout)
