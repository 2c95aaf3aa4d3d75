"""The chart in the hands of Helm itself: what it says, and what a real API server is left with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.test_chart import ROOT, as_installed, chart, filled
from kube.installed import HOME, meshctl, pod_of_it
from kube.real_cluster import BUILT, RealCluster

HELM = BUILT / "helm"
CHART = str(ROOT / "charts" / "meshlib")
CHOICES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ()),
    ({"replicas": 3, "istioCRDs": True}, ("--replicas", "3", "--istio-crds")),
    ({"replicas": 7, "inject": False}, ("--replicas", "7", "--no-inject")),
    (
        {"image": "example.com/a/b:1", "trustDomain": "a.example"},
        ("--image", "example.com/a/b:1", "--trust-domain", "a.example"),
    ),
]
pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not HELM.is_file(), reason="there is no helm here: make cluster-tools builds it"),
]

Objects = dict[tuple[str, str, str], dict[str, Any]]


def helm(folder: Path, *words: str, **chosen: Any) -> str:
    values = [f"--set={name}={str(each).lower()}" for name, each in chosen.items()]
    # Nothing of the user's own: neither repositories nor plugins.
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "KUBECONFIG": str(folder / "admin-kubeconfig")}
    done = subprocess.run([HELM, *words, *values], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"helm {' '.join(words)}: {done.stdout} {done.stderr}"
    return done.stdout


def comparable(objects: Any) -> Objects:
    """By key. Each has made a CA: what it is to be trusted by is no difference. Who makes the namespace of the release,
    and the Secret, depends on the way."""
    found = {}
    for each in map(as_installed, filter(None, objects)):
        for webhook in each.get("webhooks", ()):
            assert webhook["clientConfig"].pop("caBundle")
        found[each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"]] = each
    return {who: each for who, each in found.items() if who not in (("Namespace", "", "mesh"), SECRET)}


SECRET = ("Secret", "mesh", "meshlib-ca")


@pytest.mark.parametrize(("chosen", "words"), CHOICES, ids=lambda each: str(each))
def test_helm_renders_what_install_prints(tmp_path: Path, chosen: dict[str, Any], words: tuple[str, ...]) -> None:
    """And the suite's own reading of the templates, which is all that there is where no Helm is, is Helm's."""
    rendered = helm(tmp_path, "template", "meshlib", CHART, "--namespace", "mesh", **chosen)
    found = comparable(yaml.safe_load_all(rendered))
    printed = meshctl_dry_run(*words)
    assert found == comparable(printed)
    files = chart.files()
    values = {**yaml.safe_load(files["values.yaml"]), **chosen}
    texts = [each.removeprefix(chart.SECRET) for name, each in files.items() if name.startswith("templates/")]
    assert found == comparable(yaml.safe_load_all("\n---\n".join(filled(each, values) for each in texts)))


def meshctl_dry_run(*words: str) -> list[dict[str, Any]]:
    from typer.testing import CliRunner

    from meshlib.cli.app import app

    done = CliRunner().invoke(app, ["install", "--dry-run", "-n", "mesh", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return list(yaml.safe_load_all(done.stdout))


def test_helm_finds_nothing_to_object_to(tmp_path: Path) -> None:
    """Strictly: a warning is a failure."""
    assert "0 chart(s) failed" in helm(tmp_path, "lint", "--strict", CHART)


def test_helm_installs_upgrades_and_takes_away(real_cluster: RealCluster, tmp_path: Path) -> None:
    """The CA is made once, and kept: so are the kinds, with what users have made of them. A second installation takes
    up where the first one ended."""
    real_cluster.kubeconfig(tmp_path / "admin-kubeconfig")
    before = set(real_cluster.everything())
    helm(tmp_path, "install", "meshlib", CHART, "--namespace", "mesh", "--create-namespace", istioCRDs=True)
    first = real_cluster.everything()
    assert ("Namespace", "", "istio-system") in first  # of the role that reads MeshConfig
    bundle = first[SECRET]["data"]["root-cert.pem"]
    assert trusted(first) == {bundle}
    rule = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": "b", "namespace": "mesh"},
        "spec": {"hosts": ["b"]},
    }
    real_cluster.put(rule)
    helm(tmp_path, "upgrade", "meshlib", CHART, "--namespace", "mesh", replicas=3, inject=False)
    second = real_cluster.everything()
    assert second[SECRET]["data"] == first[SECRET]["data"]
    assert trusted(second) == {bundle}
    kinds = {kind for kind, _, _ in second}
    assert {"PodDisruptionBudget", "HorizontalPodAutoscaler"} <= kinds
    assert "MutatingWebhookConfiguration" not in kinds
    assert ("VirtualService", "mesh", "b") in second
    assert all_there(real_cluster, tmp_path)
    helm(tmp_path, "uninstall", "meshlib", "--namespace", "mesh")
    left = set(real_cluster.everything()) - before
    assert {kind for kind, _, _ in left} == {"Namespace", "CustomResourceDefinition", "Secret", "VirtualService"}
    assert {who for who in left if who[0] in ("Secret", "VirtualService")} == {SECRET, ("VirtualService", "mesh", "b")}
    helm(tmp_path, "install", "meshlib", CHART, "--namespace", "mesh", istioCRDs=True)
    again = real_cluster.everything()
    assert again[SECRET]["data"] == first[SECRET]["data"]
    assert trusted(again) == {bundle}


def trusted(objects: Objects) -> set[str]:
    """By what the API server trusts our webhooks."""
    return {
        webhook["clientConfig"]["caBundle"]
        for (kind, _, _), each in objects.items()
        if kind.endswith("WebhookConfiguration")
        for webhook in each["webhooks"]
    }


def all_there(cluster: RealCluster, folder: Path) -> bool:
    """In the words of meshctl, which does not mind who has installed it; nobody runs it here, and that it says."""
    found = meshctl(cluster, folder, "check", "-n", "mesh").stdout
    return "√ the CA is there" in found and "√ validatingwebhookconfiguration/meshlib-mesh trusts the CA" in found


def test_what_helm_has_installed_works(real_cluster: RealCluster, tmp_path: Path) -> None:
    """Its CA is made by Helm, of another kind than ours: the control plane signs with it, and the API server trusts the
    webhook that has pods injected."""
    real_cluster.kubeconfig(tmp_path / "admin-kubeconfig")
    helm(tmp_path, "install", "meshlib", CHART, "--namespace", HOME, "--create-namespace")
    with pod_of_it(real_cluster, tmp_path / "one") as plane:
        real_cluster.until(lambda: "holds the lease" in plane.log, "the control plane serves")
        labels = {"meshlib-injection": "enabled"}
        real_cluster.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": labels}})
        made = real_cluster.put(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "reviews", "namespace": "shop"}}
        )
        assert [each["name"] for each in made["spec"]["initContainers"]] == ["meshlib-init"]
