"""The control plane gets into a cluster by one command, and out of it: over HTTP, against an API server."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import Result
from cryptography import x509
from typer.testing import CliRunner

from kube.api_server import ApiServer, crd
from kube.cluster import Cluster
from meshlib.cli import endings
from meshlib.cli.app import app
from meshlib.controlplane.installation import Installation, cluster_rules, manifests
from meshlib.controlplane.kubernetes import CRDS, CUSTOM, WATCHED, WITHOUT_EFFECT

HOME = "istio-system"
PATIENCE = 30.0


def meshctl(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), catch_exceptions=False)


@pytest.fixture
def cluster(any_api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with Cluster(any_api) as cluster:
        cluster.kubeconfig(tmp_path / "kubeconfig")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield cluster


def contents(cluster: Cluster) -> set[tuple[str, str]]:
    return {(kind, name) for kind, _, name in cluster.api.everything()}


def versions(cluster: Cluster) -> dict[tuple[str, str, str], str]:
    return {who: each["metadata"]["resourceVersion"] for who, each in cluster.api.everything().items()}


def find(cluster: Cluster, plural: str, name: str = "meshlib", namespace: str = HOME) -> dict[str, Any]:
    found = cluster.api.find(plural, name, namespace)
    assert found is not None
    return found


def test_install_brings_everything_and_the_webhooks_trust_the_ca(cluster: Cluster) -> None:
    """Namespace and kinds first. The CA's key is in a Secret, and in no output."""
    done = meshctl("install")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == (
        "the control plane is installed in istio-system; processes reach it at meshlib.istio-system.svc:15012"
    )
    found = contents(cluster)
    assert {("Deployment", "meshlib"), ("Service", "meshlib"), ("Secret", "meshlib-ca")} <= found
    assert ("CustomResourceDefinition", "ratelimits.meshlib.io") in found
    assert ("CustomResourceDefinition", "virtualservices.networking.istio.io") not in found
    assert not {kind for kind, _ in found} & {"PodDisruptionBudget", "HorizontalPodAutoscaler"}
    data = find(cluster, "secrets", "meshlib-ca")["data"]
    root = base64.b64decode(data["root-cert.pem"])
    assert x509.load_pem_x509_certificate(root).extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    for plural in ("mutatingwebhookconfigurations", "validatingwebhookconfigurations"):
        (webhook,) = find(cluster, plural, f"meshlib-{HOME}", "")["webhooks"]
        assert webhook["clientConfig"]["caBundle"] == data["root-cert.pem"]
    assert "PRIVATE" not in done.output
    assert data["ca-key.pem"] not in done.output


def test_again_is_harmless_and_keeps_the_ca(cluster: Cluster) -> None:
    """A new root would make all certificates of the mesh worthless."""
    assert meshctl("install").exit_code == 0
    before, as_it_was = find(cluster, "secrets", "meshlib-ca"), versions(cluster)
    assert meshctl("install").exit_code == 0
    assert find(cluster, "secrets", "meshlib-ca") == before
    assert versions(cluster) == as_it_was
    assert meshctl("install", "--replicas", "2", "--image", "example.com/meshlib:2").exit_code == 0
    assert {("PodDisruptionBudget", "meshlib"), ("HorizontalPodAutoscaler", "meshlib")} <= contents(cluster)
    assert meshctl("install", "--no-inject", "--image", "example.com/meshlib:2").exit_code == 0
    left = {kind for kind, _ in contents(cluster)}
    assert not left & {"PodDisruptionBudget", "HorizontalPodAutoscaler", "MutatingWebhookConfiguration"}
    spec = find(cluster, "deployments")["spec"]["template"]["spec"]
    assert {each["image"] for each in (*spec["containers"], *spec["initContainers"])} == {"example.com/meshlib:2"}


def test_istios_kinds_are_defined_where_they_are_not(cluster: Cluster) -> None:
    """Istio's own definition has a schema, and stays."""
    cluster.put(crd("VirtualService", "virtualservices", "networking.istio.io", "v1alpha3"))
    before = find(cluster, "customresourcedefinitions", "virtualservices.networking.istio.io", "")
    assert meshctl("install", "--istio-crds").exit_code == 0
    assert find(cluster, "customresourcedefinitions", "virtualservices.networking.istio.io", "") == before
    there = {name for kind, name in contents(cluster) if kind == "CustomResourceDefinition"}
    istios = [each for each in WITHOUT_EFFECT if each.resource.group.endswith(".istio.io")]
    assert {each.resource.title for each in (*CUSTOM, *istios)} == there


def test_a_dry_run_prints_what_would_be_applied(cluster: Cluster) -> None:
    """And asks the cluster nothing."""
    done = meshctl("install", "--dry-run", "-n", "mesh", "--replicas", "2")
    printed = list(yaml.safe_load_all(done.stdout))
    assert cluster.api.requests == []
    assert printed[0]["kind"] == "Namespace"
    assert [each["metadata"]["name"] for each in printed if each["kind"] == "Namespace"] == ["mesh", "istio-system"]
    assert {each["metadata"].get("namespace", "mesh") for each in printed} == {"mesh", "istio-system"}  # MeshConfig's
    assert not [each for each in printed if each["kind"] == "Secret" and {"data", "stringData"} & {*each}]
    assert "&id" not in done.stdout


def test_uninstall_leaves_what_people_wrote(cluster: Cluster) -> None:
    """The kinds with their objects, and the CA, go only when it is said."""
    before = contents(cluster)
    assert meshctl("install").exit_code == 0
    assert meshctl("uninstall").exit_code == 0
    left = contents(cluster) - before
    assert {kind for kind, _ in left} == {"Namespace", "CustomResourceDefinition", "Secret"}
    assert meshctl("uninstall", "--purge").exit_code == 0
    assert {kind for kind, _ in contents(cluster) - before} == {"Namespace"}


OWN, FINALIZER = "ratelimits.meshlib.io", "example.com/held"


@pytest.fixture
def held(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """All is installed, and somebody's finalizer holds one of its kinds; what is returned lets it go."""
    monkeypatch.setattr(endings, "REMIND", 0.05)
    assert meshctl("install").exit_code == 0
    definition = f"{cluster.api.url}{CRDS.path('v1', name=OWN)}"

    def hold(*names: str) -> None:
        others = httpx.get(definition).json()["metadata"].get("finalizers", ())
        finalizers = [*(each for each in others if each != FINALIZER), *names]
        kind = {"content-type": "application/merge-patch+json"}
        httpx.patch(definition, json={"metadata": {"finalizers": finalizers}}, headers=kind).raise_for_status()

    hold(FINALIZER)
    return hold


def test_a_purge_is_over_when_the_kinds_are_gone(cluster: Cluster, held: Callable[[], None]) -> None:
    """Not when their deletion was asked for; the API server is reminded of those that it keeps."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(meshctl, "uninstall", "--purge")
        deadline = time.monotonic() + PATIENCE
        while endings.REMINDED not in find(cluster, "customresourcedefinitions", OWN, "")["metadata"].get(
            "annotations", {}
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not done.done()
        held()
        assert done.result(PATIENCE).exit_code == 0
    assert "CustomResourceDefinition" not in {kind for kind, _ in contents(cluster)}


def test_a_kind_that_stays_is_named_and_is_not_defined_anew_before_it_is_gone(
    cluster: Cluster, held: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is applied to a definition that is being deleted goes with it."""
    monkeypatch.setattr(endings, "PATIENCE", 0.5)
    failed = meshctl("uninstall", "--purge")
    assert failed.exit_code == 1
    assert f"still being deleted after 0.5 s: {OWN}: " in failed.output
    again = meshctl("install")
    assert again.exit_code == 1
    assert OWN in again.output
    held()
    monkeypatch.setattr(endings, "PATIENCE", PATIENCE)
    assert meshctl("install").exit_code == 0
    assert "deletionTimestamp" not in find(cluster, "customresourcedefinitions", OWN, "")["metadata"]


def test_check_says_what_is_missing(cluster: Cluster) -> None:
    """Each finding in one line, with what to do; exit code 1 until all is well."""
    nothing = meshctl("check")
    assert nothing.exit_code == 1
    assert "× the CA is there: secret/meshlib-ca" in nothing.stdout
    assert meshctl("install").exit_code == 0
    starting = meshctl("check")
    assert starting.exit_code == 1
    assert "× deployment/meshlib is available\n    kubectl -n istio-system logs" in starting.stdout
    deployment = find(cluster, "deployments")
    seen = {"observedGeneration": 1, "replicas": 1, "readyReplicas": 1, "availableReplicas": 1}
    cluster.put({**deployment, "status": seen})
    well = meshctl("check")
    assert (well.exit_code, well.stdout.splitlines()[-1]) == (0, "Status check results are √")
    assert "×" not in well.stdout


def test_an_api_server_that_refuses_is_told_in_one_sentence(cluster: Cluster) -> None:
    """Half an installation is mended by installing again."""
    cluster.call(lambda: cluster.api.forbidden.add("clusterroles"))
    done = meshctl("install")
    assert done.exit_code == 1
    assert re.search(r"^error: PATCH .*clusterroles.*: 403 clusterroles is forbidden", done.stderr, re.MULTILINE)


def test_the_role_allows_what_is_watched_and_written_and_nothing_else() -> None:
    """No wildcard, no Secret, no verb that changes anybody's spec."""
    rules = list(cluster_rules())
    allowed = {(rule["apiGroups"][0], resource, verb) for rule in rules for resource in rule["resources"]
               for verb in rule["verbs"]}  # fmt: skip
    for resource in (*(each.resource for each in WATCHED if not each.namespace), CRDS):
        assert {(resource.group, resource.plural, "list"), (resource.group, resource.plural, "watch")} <= allowed
    assert "*" not in {word for rule in rules for word in (*rule["apiGroups"], *rule["resources"], *rule["verbs"])}
    assert not [resource for _, resource, _ in allowed if "secrets" in resource or resource == "configmaps"]
    changing = {(resource, verb) for _, resource, verb in allowed if verb not in ("list", "watch")}
    assert {verb for resource, verb in changing if resource.endswith("/status")} == {"patch"}
    assert {each for each in changing if not each[0].endswith("/status")} == {("tokenreviews", "create")}


def test_the_container_has_no_privileges_and_its_arguments_are_meshctls() -> None:
    """What the Deployment starts is a command line that this version understands."""
    from typer.main import get_command

    (deployment,) = [each for each in manifests(Installation("root")) if each["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in (*pod["containers"], *pod["initContainers"]):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert "requests" in container["resources"]
    name, *words = pod["containers"][0]["args"]
    with get_command(app).commands[name].make_context(name, words) as context:  # type: ignore[attr-defined]
        assert context.params["kubernetes"] is True
        assert context.params["inject_control_plane"] == "meshlib.istio-system.svc:15012"
