"""The whole way on a real kubelet, as docs/tutorial/bookinfo-kubernetes.md has it: install, Bookinfo, rules, mTLS, a
rolling update while a replica of the control plane is killed, and away with it.

One story: each test begins where the one before it ended. `make test-node` runs it.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from kube.real_cluster import BUILT
from meshlib.controlplane.installation import INJECTION
from node.images import ARCHIVES
from node.machine import NODE, missing
from node.running import PROGRAMS, Node, running_node

ROOT = Path(__file__).parents[2]
BOOKINFO = ROOT / "examples" / "bookinfo"
IMAGES = os.environ.get("MESHLIB_TEST_NODE_IMAGES", "")
PATIENCE = 180.0
DEPLOYMENTS = ("productpage-v1", "details-v1", "ratings-v1", "reviews-v1", "reviews-v2", "reviews-v3")
HOME = "istio-system"


def _why_not() -> str:
    if not IMAGES or any(not (Path(IMAGES) / each).is_file() for each in ARCHIVES):
        return "there are no images for a node: make test-node builds them"
    if lacking := [each for each in PROGRAMS if not (BUILT / each).is_file()]:
        return f"not built: {', '.join(lacking)}; make test-node builds them"
    return missing()


pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "there is a node"),
]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with tempfile.TemporaryDirectory(prefix="meshlib-node-") as folder:
        archives = (Path(IMAGES) / each for each in ARCHIVES)
        with running_node(Path(folder) / "n", *archives) as running:
            yield running


def meshctl(node: Node, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        (str(ROOT / ".venv" / "bin" / "meshctl"), *words),
        env=node.environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def install(node: Node, *words: str) -> None:
    code, told = meshctl(node, "install", "--image", "meshlib:dev", "--istio-crds", "--wait", *words)
    assert code == 0, f"{told}\n{node.situation()}"


def until(what: Callable[[], bool], told: str, node: Node) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, f"not within {PATIENCE:g} s: {told}\n{node.situation()}"
        time.sleep(0.2)


def apply(node: Node, *files: str) -> None:
    for each in files:
        node.kubectl("apply", "-f", str(BOOKINFO / each))


def available(node: Node) -> None:
    node.kubectl("wait", "--for=condition=Available", "deployment", "--all", f"--timeout={PATIENCE:g}s")


def door(node: Node) -> str:
    """Where the world outside finds the gateway: a port of the node, which a load balancer would forward to."""
    (port,) = node.get("service", "bookinfo-gateway")["spec"]["ports"]
    return f"http://{NODE}:{port['nodePort']}"


def page(node: Node, client: httpx.Client | None = None) -> str:
    """Which version wrote its reviews; "" for a page that lacks something."""
    get = httpx.get if client is None else client.get
    answer = get(f"{door(node)}/productpage", timeout=60)
    return version_on(answer)


def version_on(answer: httpx.Response) -> str:
    is_whole = answer.status_code == 200 and "currently unavailable" not in answer.text
    found = re.search(r"<b>reviews</b> <span>(reviews-v\d)", answer.text)
    return found[1] if is_whole and found else ""


def pages(node: Node, number: int) -> Counter[str]:
    with httpx.Client(trust_env=False, timeout=60) as client:
        return Counter(page(node, client) for _ in range(number))


def test_check_misses_everything_and_install_brings_it(node: Node) -> None:
    """On the API server's word, and on the kubelet's: the pod's probes answer."""
    code, told = meshctl(node, "check")
    assert code == 1 and "meshctl install brings them" in told
    install(node)
    code, told = meshctl(node, "check")
    assert code == 0, told
    (pod,) = node.get("pods", "-n", HOME)["items"]
    (status,) = pod["status"]["containerStatuses"]
    assert status["ready"] and status["restartCount"] == 0


def test_an_image_that_cannot_serve_is_told_and_the_one_before_serves_on(node: Node) -> None:
    """Bookinfo's image has no meshctl. What the kubelet says of it is told while install waits."""
    words = (str(ROOT / ".venv" / "bin" / "meshctl"), "install", "--image", "bookinfo-meshlib:latest", "--wait")
    with subprocess.Popen(
        words, env=node.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as waiting:
        try:
            assert waiting.stderr is not None
            told = next((each for each in waiting.stderr if "ended with exit code" in each), "")
            assert re.search(
                r"waiting for deployment/meshlib: pod meshlib-\S+, container meshlib: .*control-plane", told
            )
        finally:
            waiting.terminate()
    code, told = meshctl(node, "check")
    assert code == 0, told
    install(node)
    until(lambda: len(_control_planes(node)) == 1, "the pod that could not serve is gone", node)


def test_bookinfo_runs_with_one_container_in_each_pod(node: Node) -> None:
    """The library comes with an init container that has ended; the environment says where it is, and who the pod is."""
    node.kubectl("label", "namespace", "default", f"{INJECTION}=enabled")
    apply(node, "platform/bookinfo.yaml", "platform/gateway.yaml", "networking/bookinfo-gateway.yaml")
    available(node)
    pods = node.get("pods")["items"]
    assert len(pods) == len(DEPLOYMENTS) + 2
    for each in pods:
        assert len(each["spec"]["containers"]) == 1
        (init,) = each["status"]["initContainerStatuses"]
        assert (init["name"], init["state"]["terminated"]["exitCode"]) == ("meshlib-init", 0)
        assert "MESHLIB_CONTROL_PLANE" in {one["name"] for one in each["spec"]["containers"][0]["env"]}


def test_pages_come_through_the_gateway_with_the_versions_in_turn(node: Node) -> None:
    seen: set[str] = set()

    def is_seen() -> bool:
        seen.update(pages(node, 5))
        return {"reviews-v1", "reviews-v2", "reviews-v3"} <= seen

    until(is_seen, "a page with each version of reviews", node)


def test_a_port_forward_shows_the_page(node: Node) -> None:
    """The tutorial's way in: kubectl, API server, kubelet, containerd, and the gateway's pod."""
    words = ("kubectl", "port-forward", "service/bookinfo-gateway", ":80")
    with subprocess.Popen(words, env=node.environment, stdout=subprocess.PIPE, text=True) as forward:
        try:
            assert forward.stdout is not None
            place = re.search(r"127\.0\.0\.1:\d+", forward.stdout.readline())
            assert place is not None
            answer = httpx.get(f"http://{place[0]}/productpage", trust_env=False, timeout=60)
            assert version_on(answer).startswith("reviews-")
        finally:
            forward.terminate()


def test_a_rule_steers_it(node: Node) -> None:
    apply(node, "networking/destination-rule-all.yaml", "networking/virtual-service-all-v1.yaml")
    until(lambda: set(pages(node, 10)) == {"reviews-v1"}, "all pages without stars", node)
    apply(node, "networking/virtual-service-reviews-50-v3.yaml")

    def is_split() -> bool:
        found = pages(node, 40)
        return set(found) == {"reviews-v1", "reviews-v3"} and min(found.values()) > 5

    until(is_split, "half of the pages with red stars", node)


def test_a_rule_that_could_not_be_used_is_refused_by_kubectl(node: Node, tmp_path: Path) -> None:
    """The API server asks the control plane's webhook, across the node's network."""
    wrong = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": "wrong"},
        "spec": {"hosts": ["reviews"], "http": [{"route": [{"destination": {"host": "reviews"}, "weight": "much"}]}]},
    }
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(AssertionError, match=r"validation\.meshlib\.io"):
        node.kubectl("apply", "-f", str(tmp_path / "wrong.yaml"))


def test_strict_takes_the_mesh_in_and_nobody_else(node: Node) -> None:
    """The kubelet's probes go on, and pods stay ready."""
    apply(node, "networking/peer-authentication-strict.yaml")
    (details,) = node.get("pods", "-l", "app=details")["items"]
    address = f"http://{details['status']['podIP']}:9080/details/0"

    def is_refused() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(address, trust_env=False, timeout=60).status_code == 403
        return True

    until(is_refused, "plaintext is refused", node)
    assert set(pages(node, 20)) == {"reviews-v1", "reviews-v3"}
    available(node)


def test_a_job_calls_by_the_mesh_and_finishes(node: Node, tmp_path: Path) -> None:
    """Its program knows nothing of the mesh, and no sidecar keeps it from ending."""
    code = "import httpx; print(httpx.get('http://details:9080/details/0').raise_for_status().json()['author'])"
    container = {
        "name": "reader",
        "image": "bookinfo-meshlib:latest",
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", code],
    }
    pod = {"restartPolicy": "Never", "serviceAccountName": "bookinfo-productpage", "containers": [container]}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "reader"},
        "spec": {"backoffLimit": 0, "template": {"spec": pod}},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    node.kubectl("apply", "-f", str(tmp_path / "job.yaml"))
    node.kubectl("wait", "--for=condition=Complete", "job/reader", f"--timeout={PATIENCE:g}s")
    assert "William Shakespeare" in node.kubectl("logs", "job/reader", "-c", "reader")


def test_a_rolling_update_and_a_killed_control_plane_cost_no_page(node: Node) -> None:
    """Two replicas, one of them killed without grace while every process of Bookinfo is replaced, under load, with
    STRICT mTLS. A page is four to six calls; no page lacks anything."""
    install(node, "--replicas", "2")
    until(lambda: _ready(node) == 2, "both replicas serve", node)
    with _visitors(door(node), 3) as found:
        before = _names(node)
        for two in (DEPLOYMENTS[:2], DEPLOYMENTS[2:4], DEPLOYMENTS[4:]):
            node.kubectl("rollout", "restart", *(f"deployment/{each}" for each in two))
            if two == DEPLOYMENTS[:2]:
                until(lambda: not _names(node) <= before, "the first new pods", node)
                node.kubectl("delete", "-n", HOME, _control_planes(node)[0], "--grace-period=0", "--force")
            for each in two:
                node.kubectl("rollout", "status", f"deployment/{each}", f"--timeout={PATIENCE:g}s")
        until(lambda: not _names(node) & before, "the last old pod is gone", node)
        after = found.pages
        until(lambda: found.pages > after + 10, "ten pages more", node)
    assert not found.failed, f"{len(found.failed)} of {found.pages}: {found.failed[:3]}"


def test_uninstall_leaves_nothing_and_bookinfo_goes_on(node: Node) -> None:
    code, told = meshctl(node, "uninstall", "--purge")
    assert code == 0, told
    until(lambda: not node.get("pods", "-n", HOME)["items"], "the control plane is gone", node)

    def left() -> set[str]:
        found = {
            f"{kind}/{name}" for kind, home, name in node.cluster.everything() if "meshlib" in name or home == HOME
        }
        return {each for each in found if not re.match(r"(ServiceAccount/default|ConfigMap/kube-root-ca\.crt)", each)}

    until(lambda: not left(), "nothing of it is left", node)
    assert pages(node, 5)[""] == 0


class _Visits:
    """What visitors of the page found. failed: what the page lacked, or how the call failed."""

    def __init__(self) -> None:
        self.pages = 0
        self.failed: list[str] = []


@contextlib.contextmanager
def _visitors(url: str, number: int) -> Iterator[_Visits]:
    found, is_over = _Visits(), threading.Event()

    def visit() -> None:
        with httpx.Client(trust_env=False, timeout=60) as client:
            while not is_over.is_set():
                try:
                    answer = client.get(f"{url}/productpage")
                    failed = "" if version_on(answer) else f"{answer.status_code} {answer.text[-2000:]}"
                except httpx.HTTPError as error:
                    failed = repr(error)
                found.pages += 1
                if failed:
                    found.failed.append(failed)
                is_over.wait(0.05)

    threads = [threading.Thread(target=visit) for _ in range(number)]
    for each in threads:
        each.start()
    try:
        yield found
    finally:
        is_over.set()
        for each in threads:
            each.join()


def _names(node: Node) -> set[str]:
    """Of Bookinfo's pods, but for the gateway's and the Job's."""
    return {each["metadata"]["name"] for each in node.get("pods", "-l", "version")["items"]}


def _control_planes(node: Node) -> list[str]:
    return node.kubectl("get", "pods", "-n", HOME, "-l", "app=meshlib", "-o", "name").split()


def _ready(node: Node) -> int:
    return int(node.get("deployment", "-n", HOME, "meshlib")["status"].get("readyReplicas") or 0)
