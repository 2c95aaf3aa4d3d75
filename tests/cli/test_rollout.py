"""Why a Deployment does not run is told in the words of Kubernetes, and of the program that ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kube.api_server import ApiServer
from kube.cluster import Cluster
from meshlib.cli import rollout
from meshlib.cli.app import app
from meshlib.cli.rollout import is_rolled_out, obstacles

HOME = "istio-system"
LOG = "Usage: meshctl control-plane [OPTIONS]\n\nError: No such option: --new\n"
CRASHING = {
    "name": "meshlib",
    "ready": False,
    "restartCount": 3,
    "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting failed container"}},
    "lastState": {"terminated": {"exitCode": 2, "reason": "Error", "message": LOG}},
}
TOLD = (
    "pod meshlib-1, container meshlib: CrashLoopBackOff: ended with exit code 2 after it said: "
    "Error: No such option: --new"
)


def deployment(generation: int = 2, **status: Any) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "meshlib", "namespace": HOME, "generation": generation},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app.kubernetes.io/name": "meshlib"}}},
        "status": status,
    }


def pod(container: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    found = {**status, **({"containerStatuses": [container]} if container else {})}
    labels = {"app.kubernetes.io/name": "meshlib"}
    metadata = {"name": "meshlib-1", "namespace": HOME, "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": found}


def container(ready: bool = False, **state: Any) -> dict[str, Any]:
    return {"name": "meshlib", "ready": ready, **state}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"observedGeneration": 2, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}, True),
        ({"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}, False),
        ({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 1, "availableReplicas": 1}, False),
        ({"observedGeneration": 2, "replicas": 1, "availableReplicas": 1}, False),
        ({"observedGeneration": 2, "replicas": 1, "updatedReplicas": 1}, False),
        ({}, False),
    ],
    ids=["new", "not seen", "old beside new", "old alone", "not available", "nothing known"],
)
def test_a_pod_of_an_earlier_template_that_serves_is_not_enough(status: dict[str, Any], expected: bool) -> None:
    assert is_rolled_out(deployment(**status)) is expected


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (pod(CRASHING), TOLD),
        (
            pod(container(state={"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "x"'}})),
            'pod meshlib-1, container meshlib: ImagePullBackOff: Back-off pulling image "x"',
        ),
        (
            pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}]),
            "pod meshlib-1: 0/3 nodes are available",
        ),
        (
            pod(initContainerStatuses=[container(state={"terminated": {"exitCode": 1}})]),
            "pod meshlib-1, container meshlib: ended with exit code 1",
        ),
    ],
    ids=["crashing", "no image", "no node", "keys"],
)
def test_what_is_in_the_way_is_told(given: dict[str, Any], told: str) -> None:
    assert list(obstacles(deployment(), [given])) == [told]


@pytest.mark.parametrize(
    "given",
    [
        pod(),
        pod(container(state={"waiting": {"reason": "ContainerCreating"}})),
        pod(container(state={"running": {}})),
        pod(container(ready=True, state={"running": {}}, lastState={"terminated": {"exitCode": 2}})),
        pod(initContainerStatuses=[container(ready=True, state={"terminated": {"exitCode": 0}})]),
        {**pod(CRASHING), "metadata": {"name": "meshlib-1", "deletionTimestamp": "2026-11-01T00:00:00Z"}},
    ],
    ids=["unknown", "creating", "beginning", "mended", "keys", "on its way out"],
)
def test_what_is_only_about_to_begin_is_not(given: dict[str, Any]) -> None:
    assert not list(obstacles(deployment(), [given]))


def test_pods_that_are_not_allowed_are_told() -> None:
    condition = {"type": "ReplicaFailure", "status": "True", "message": 'pods "meshlib-1" is forbidden: exceeded quota'}
    assert list(obstacles(deployment(conditions=[condition]), [])) == [condition["message"]]


@pytest.fixture
def cluster(any_api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with Cluster(any_api) as cluster:
        cluster.kubeconfig(tmp_path / "kubeconfig")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.setattr(rollout, "LOOK", 0.05)
        monkeypatch.setattr(rollout, "PATIENCE", 60.0)
        yield cluster


def test_install_waits_for_the_pods_of_now(cluster: Cluster) -> None:
    """As it was applied, not as it is still running."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(CliRunner().invoke, app, ["install", "--wait"], catch_exceptions=False)
        deadline = time.monotonic() + 60
        while (found := cluster.api.find("deployments", "meshlib", HOME)) is None:
            assert time.monotonic() < deadline and not done.done()
            time.sleep(0.05)
        seen = {"replicas": 1, "updatedReplicas": 1, "readyReplicas": 1, "availableReplicas": 1}
        seen["observedGeneration"] = 9
        cluster.put({**found, "status": seen})
        result = done.result(60)
    assert result.exit_code == 0, result.output


def test_an_older_image_is_told_by_its_own_last_words(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "PATIENCE", 0.5)
    cluster.put(pod(CRASHING))
    failed = CliRunner().invoke(app, ["install", "--wait"], catch_exceptions=False)
    assert failed.exit_code == 1
    assert f"waiting for deployment/meshlib: {TOLD}\n" in failed.stderr
    assert f"the Deployment istio-system/meshlib is not available after 0.5 s: {TOLD}\n" in failed.stderr
