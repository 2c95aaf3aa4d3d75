"""The control plane at a real API server: as its own service account, under RBAC, and called by it over TLS."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from cli.meshctl_processes import ControlPlaneProcess, control_plane
from joining import certificate
from kube.api_server import crd
from kube.installed import HOME, install, meshctl, pod_of_it, token_kubeconfig
from kube.real_cluster import RealCluster
from meshlib.controlplane.installation import Installation, manifests
from meshlib.controlplane.kubernetes import WATCHED, KubernetesSource
from meshlib.kube.client import KubeClient
from meshlib.kube.reflector import Changes, Key, Reflector
from meshlib.kube.settings import from_kubeconfig

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
NOT_ITS = [
    ("", "secrets", "get"),
    ("", "secrets", "list"),
    ("", "configmaps", "list"),
    ("", "configmaps", "get"),
    ("", "pods", "update"),
    ("", "pods", "delete"),
    ("", "pods/exec", "create"),
    ("", "serviceaccounts/token", "create"),
    ("", "nodes", "patch"),
    ("networking.istio.io", "virtualservices", "patch"),
    ("networking.istio.io", "virtualservices", "delete"),
    ("rbac.authorization.k8s.io", "clusterroles", "bind"),
    ("coordination.k8s.io", "leases", "delete"),
    ("admissionregistration.k8s.io", "mutatingwebhookconfigurations", "patch"),
]
SECURITY = {
    "peerauthentications": "PeerAuthentication",
    "authorizationpolicies": "AuthorizationPolicy",
    "requestauthentications": "RequestAuthentication",
}
GONE = [
    {
        "type": {"code": "IST0101"},
        "level": "ERROR",
        "documentationUrl": "https://istio.io/latest/docs/reference/config/analysis/ist0101/",
    }
]


def virtual_service(name: str, host: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"hosts": [name], "http": [{"route": [{"destination": {"host": host}}]}], **spec},
    }


def service(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"ports": [{"name": "http", "port": 80}]},
    }


def pod(name: str, **metadata: Any) -> dict[str, Any]:
    containers = [{"name": "app", "image": "none", "ports": [{"containerPort": 9080}]}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "labels": {"app": name}, **metadata},
        "spec": {"containers": containers},
    }


def namespace(name: str, **labels: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def account(name: str, home: str = "shop") -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": home}}


@pytest.fixture
def cluster(real_cluster: RealCluster, tmp_path: Path) -> RealCluster:
    install(real_cluster, tmp_path, "--istio-crds")
    shop = namespace("shop")
    shop["metadata"]["labels"] = {"meshlib-injection": "enabled"}
    real_cluster.put(shop, account("default"))
    return real_cluster


@pytest.fixture
def plane(cluster: RealCluster, tmp_path: Path) -> Iterator[ControlPlaneProcess]:
    with pod_of_it(cluster, tmp_path / "one") as process:
        cluster.until(lambda: "holds the lease" in process.log, "the only replica leads")
        yield process


def problems(plane: ControlPlaneProcess) -> list[Any]:
    return list(httpx.get(f"{plane.admin}/v1/problems", trust_env=False, timeout=10).json()["problems"])


def status(cluster: RealCluster, name: str) -> dict[str, Any]:
    found = cluster.find("VirtualService", name, "shop", "networking.istio.io")
    assert found is not None
    return dict(found.get("status") or {})


def test_its_rights_are_enough_and_no_more(cluster: RealCluster, plane: ControlPlaneProcess, tmp_path: Path) -> None:
    """All kinds are there, so all of them are listed, watched, and one is written to; nothing is refused to it. What
    it does not need is refused."""
    cluster.put(crd("HTTPRoute", "httproutes", "gateway.networking.k8s.io", "v1"), service("a"))
    cluster.put(virtual_service("b", "gone"))
    cluster.until(lambda: status(cluster, "b").get("validationMessages") == GONE, "the status is written")
    parent = {"group": "", "kind": "Service", "name": "a"}
    cluster.put(
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": "r", "namespace": "shop"},
            "spec": {"parentRefs": [parent], "rules": [{"backendRefs": [{"name": "a", "port": 80}]}]},
        }
    )

    def accepted() -> bool:
        route = cluster.find("HTTPRoute", "r", "shop", "gateway.networking.k8s.io") or {}
        parents = (route.get("status") or {}).get("parents") or [{}]
        return {each["type"]: each["status"] for each in parents[0].get("conditions", ())} == {
            "Accepted": "True",
            "ResolvedRefs": "True",
        }

    cluster.until(accepted, "a kind that was defined later is read, and written to")
    of_cluster = crd("GatewayClass", "gatewayclasses", "gateway.networking.k8s.io", "v1")
    cluster.put({**of_cluster, "spec": {**of_cluster["spec"], "scope": "Cluster"}})
    ours = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "GatewayClass",
        "metadata": {"name": "ours"},
        "spec": {"controllerName": "meshlib.io/gateway-controller"},
    }
    cluster.put(ours)

    def has_status() -> bool:
        found = cluster.find("GatewayClass", "ours", "", "gateway.networking.k8s.io") or {}
        return bool((found.get("status") or {}).get("conditions"))

    cluster.until(has_status, "a kind of the whole cluster, too")
    assert "403" not in plane.log
    assert "forbidden" not in plane.log.lower()
    with httpx.Client(base_url=cluster.url, verify=cluster.settings().tls(), trust_env=False) as anybody:
        for group, resource, verb in NOT_ITS:
            where = {"group": group, "resource": resource.partition("/")[0], "subresource": resource.partition("/")[2]}
            body = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SubjectAccessReview",
                "spec": {
                    "user": f"system:serviceaccount:{HOME}:meshlib",
                    "groups": ["system:serviceaccounts", f"system:serviceaccounts:{HOME}", "system:authenticated"],
                    "resourceAttributes": {"namespace": HOME, "verb": verb, **where},
                },
            }
            told = anybody.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", json=body).json()["status"]
            assert told["allowed"] is False, (group, resource, verb)


def test_the_api_server_has_pods_injected_over_tls(cluster: RealCluster, plane: ControlPlaneProcess) -> None:
    """It calls the webhook at its Service, and trusts it by the CA of the installation. Beside what Kubernetes itself
    adds to a pod: once, with volumes that are its own."""
    made = cluster.put(pod("reviews"))
    spec = made["spec"]
    assert [each["name"] for each in spec["initContainers"]] == ["meshlib-init"]
    (container,) = spec["containers"]
    env = {each["name"]: each for each in container["env"]}
    assert env["MESHLIB_CONTROL_PLANE"]["value"] == "meshlib.istio-system.svc:15012"
    assert env["MESHLIB_SERVICE_ACCOUNT"]["valueFrom"]["fieldRef"]["fieldPath"] == "spec.serviceAccountName"
    mounts = {each["name"] for each in container["volumeMounts"]}
    assert {"meshlib-root", "meshlib-token"} <= mounts <= {each["name"] for each in spec["volumes"]}
    left_alone = cluster.put(pod("batch", labels={"app": "batch", "meshlib.io/inject": "false"}))
    assert "initContainers" not in left_alone["spec"]
    cluster.put(namespace("other"), account("default", "other"))
    elsewhere = pod("reviews")
    elsewhere["metadata"]["namespace"] = "other"
    assert "initContainers" not in cluster.put(elsewhere)["spec"]


def test_an_injected_pod_is_fit_for_a_restricted_namespace(cluster: RealCluster, plane: ControlPlaneProcess) -> None:
    """What is added must not be what a namespace refuses."""
    labels = {"meshlib-injection": "enabled", "pod-security.kubernetes.io/enforce": "restricted"}
    strict = namespace("strict")
    strict["metadata"]["labels"] = labels
    cluster.put(strict, account("default", "strict"))
    given = pod("reviews")
    given["metadata"]["namespace"] = "strict"
    given["spec"]["securityContext"] = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    for each in given["spec"]["containers"]:
        each["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert [each["name"] for each in cluster.put(given)["spec"]["initContainers"]] == ["meshlib-init"]


def test_the_api_server_has_rules_judged(cluster: RealCluster, plane: ControlPlaneProcess) -> None:
    """On the way in, in the words of `meshctl validate`, and again when they are changed."""
    path = "/apis/networking.istio.io/v1/namespaces/shop/virtualservices"
    refused = cluster.http.post(path, json=virtual_service("b", "b", htp=[]))
    assert refused.status_code == 422
    expected = 'admission webhook "validation.meshlib.io" denied the request: spec.htp: there is no such field'
    assert refused.json()["message"].startswith(expected)
    made = cluster.ask("POST", path, virtual_service("b", "b"))
    worse = cluster.http.put(f"{path}/b", json={**made, "spec": {"hosts": ["b"], "http": [{"rout": []}]}})
    assert worse.status_code == 422
    assert "spec.http[0].rout" in worse.text


def test_while_it_is_away_rules_pass_and_pods_of_the_mesh_do_not(cluster: RealCluster, tmp_path: Path) -> None:
    """A pod that asks for the mesh must not begin in plaintext; a rule that can't be used is left out later, too. Its
    own pods are made all the same."""
    refused = cluster.http.post("/api/v1/namespaces/shop/pods", json=pod("reviews"))
    assert refused.status_code == 500
    assert "injection.meshlib.io" in refused.text
    own = pod("itself", labels={"app.kubernetes.io/name": "meshlib"})
    assert "initContainers" not in cluster.put(own)["spec"]
    cluster.put(virtual_service("b", "b", htp=[]))
    with pod_of_it(cluster, tmp_path / "late"):
        cluster.until(
            lambda: (
                [each["type"]["code"] for each in status(cluster, "b").get("validationMessages", ())] == ["IST0106"]
            ),
            "what passed meanwhile is told",
        )
        assert cluster.put(pod("reviews"))["spec"]["initContainers"]


def test_analyze_reads_a_real_cluster(cluster: RealCluster, tmp_path: Path) -> None:
    """With the administrator's rights; the codes are istioctl's."""
    cluster.put(service("a"), virtual_service("b", "gone"))
    found = meshctl(cluster, tmp_path, "analyze", "--kubernetes", "-n", "shop")
    assert (found.exit_code, found.stdout) == (
        79,
        'Error [IST0101] (VirtualService shop/b) Referenced host not found: "gone"\n',
    )


@pytest.mark.parametrize("forgets", [False, True], ids=["remembers", "410"])
def test_an_api_server_that_restarts_is_followed_again(
    cluster: RealCluster, plane: ControlPlaneProcess, forgets: bool
) -> None:
    """What changed meanwhile is taken up; with etcd's history gone, by a new list: the watch ends in 410 then."""
    cluster.put(virtual_service("b", "gone"))
    cluster.until(lambda: status(cluster, "b").get("validationMessages") == GONE, "it is followed")
    cluster.stop()
    cluster.until(lambda: "can't be reached" in plane.log or "connect" in plane.log.lower(), "it sees that")
    cluster.start()
    if forgets:
        for number in range(5):
            cluster.put(service(f"other-{number}"))
        cluster.compact()
        cluster.stop()
        cluster.start()
    cluster.put(virtual_service("c", "gone"), service("gone"))
    cluster.until(lambda: status(cluster, "b") == {"observedGeneration": "1"}, "it is mended")
    assert "validationMessages" not in status(cluster, "c")
    # A server that has just started refuses everybody, until it has read its roles; that is over now, and lost nothing.
    cluster.until(lambda: problems(plane) == [], "no trouble is left")
    if forgets:
        assert "listed again" in plane.log


def test_two_replicas_have_one_voice(cluster: RealCluster, tmp_path: Path) -> None:
    """Of a real Lease. The one that holds it writes; it ends well, and the other one does at once."""
    with pod_of_it(cluster, tmp_path / "one") as one:
        cluster.until(lambda: "holds the lease" in one.log, "the first one leads")
        with pod_of_it(cluster, tmp_path / "two") as two:
            cluster.put(virtual_service("b", "gone"))
            cluster.until(lambda: status(cluster, "b").get("validationMessages") == GONE, "the status is written")
            assert "holds the lease" not in two.log
            one.process.terminate()
            one.process.wait(60)
            began = time.monotonic()
            cluster.until(lambda: "holds the lease" in two.log, "the other one leads")
            assert time.monotonic() - began < 14, "it was given back, and did not have to expire"
            cluster.put(service("gone"))
            cluster.until(lambda: "validationMessages" not in status(cluster, "b"), "and writes")
            lease = cluster.find("Lease", "meshlib-status", HOME, "coordination.k8s.io")
            assert lease is not None
            assert lease["spec"]["leaseTransitions"] == 1


def test_a_join_token_of_one_replica_is_good_at_the_other(cluster: RealCluster, tmp_path: Path) -> None:
    """Once, for both together; under the rights of the installation. To install again leaves tokens where they are."""
    asked = {"namespace": "default", "service_account": "reviews", "ttl": "600"}
    roots = base64.b64decode(
        cluster.ask("GET", f"/api/v1/namespaces/{HOME}/secrets/meshlib-ca")["data"]["root-cert.pem"]
    )
    with pod_of_it(cluster, tmp_path / "one") as one, pod_of_it(cluster, tmp_path / "two") as two:
        made = httpx.post(
            f"{one.admin}/v1/tokens", params=asked, headers={"content-type": "application/yaml"}, timeout=60
        )
        token = made.raise_for_status().json()["text"]
        install(cluster, tmp_path)

        def join(replica: ControlPlaneProcess) -> grpc.StatusCode:
            return asyncio.run(certificate(replica.xds, roots.decode(), token))

        assert join(two) is grpc.StatusCode.OK
        assert join(one) is grpc.StatusCode.UNAUTHENTICATED
        (shown,) = httpx.get(f"{one.admin}/v1/tokens", timeout=60).raise_for_status().json()["tokens"]
        assert shown["state"] == "used"


def test_a_role_that_lacks_a_right_is_told_and_nobody_is_served(cluster: RealCluster, tmp_path: Path) -> None:
    """RBAC refuses one kind: taken for absent, AuthorizationPolicies would let everybody in."""
    role = cluster.find("ClusterRole", f"meshlib-{HOME}", "", "rbac.authorization.k8s.io")
    assert role is not None
    policy = {"apiVersion": "security.istio.io/v1", "metadata": {"name": "a", "namespace": "shop"}, "spec": {}}
    fewer = [rule for rule in role["rules"] if rule["apiGroups"] != ["security.istio.io"]]
    cluster.put({**role, "rules": fewer})

    folder = tmp_path / "fewer"
    folder.mkdir()
    config = token_kubeconfig(cluster, folder, HOME, "meshlib")

    async def follow() -> None:
        published: list[object] = []
        changed = asyncio.Event()
        async with KubeClient(from_kubeconfig([config])) as client:
            source = KubernetesSource(client, lambda told: (published.append(told), changed.set()), first_pause=0.05)  # type: ignore[func-returns-value]
            task = asyncio.create_task(source.run())
            try:
                async with asyncio.timeout(60):
                    while not source.troubles():  # noqa: ASYNC110 -- nobody is told of troubles
                        await asyncio.sleep(0.05)
                assert not published
                assert {each.object.partition(".")[2] for each in source.troubles()} == {"security.istio.io"}
                await asyncio.to_thread(cluster.put, role)
                async with asyncio.timeout(60):
                    await changed.wait()
                    for plural, kind in SECURITY.items():
                        await asyncio.to_thread(cluster.put, {**policy, "kind": kind})
                        held = source.reflectors[f"{plural}.security.istio.io"]
                        while not held.objects:  # noqa: ASYNC110 -- until it is watched, too
                            await asyncio.sleep(0.05)
            finally:
                task.cancel()
                await asyncio.wait((task,))

    asyncio.run(follow())


async def _urge(reflector: Reflector) -> None:
    while True:
        reflector.look()
        await asyncio.sleep(0.02)


def test_no_rule_is_lost_while_a_server_begins(cluster: RealCluster) -> None:
    """A definition that was not read yet must not look like one that is gone: with it went all that was made of it."""
    cluster.put(virtual_service("b", "b"))
    rules = next(each.resource for each in WATCHED if each.resource.kind == "VirtualService")

    async def follow() -> None:
        told: list[Changes] = []
        async with KubeClient(cluster.settings()) as client:
            # As impatient as can be: whatever a server says while it begins, it says to this one.
            reflector = Reflector(client, rules, told.append, first_pause=0.01, absent=0.01, rng=lambda: 0.0)
            tasks = [asyncio.create_task(reflector.run()), asyncio.create_task(_urge(reflector))]
            try:
                for number in range(3):
                    async with asyncio.timeout(60):
                        await reflector.has_synced.wait()
                    await asyncio.to_thread(cluster.stop)
                    await asyncio.to_thread(cluster.start)
                    await asyncio.to_thread(cluster.put, virtual_service(f"c{number}", "c"))
                    async with asyncio.timeout(60):
                        while Key("shop", f"c{number}") not in reflector.objects:  # noqa: ASYNC110
                            await asyncio.sleep(0.02)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
        assert [key for changes in told for key, given in changes.items() if given is None] == []

    asyncio.run(follow())


def test_the_roles_on_the_page_are_enough(real_cluster: RealCluster, tmp_path: Path) -> None:
    """Written by hand, for those who do not install by meshctl: to follow, to write statuses, for the CA and tokens."""
    page = (ROOT / "docs" / "how-to" / "kubernetes.md").read_text().partition("## What it may do")[2]
    texts = [each.partition("```")[0] for each in page.partition("## Without a control plane")[0].split("```yaml")[1:]]
    roles = [each for text in texts for each in yaml.safe_load_all(text)]
    assert len(roles) == 5
    group, subject = "rbac.authorization.k8s.io", {"kind": "ServiceAccount", "name": "meshlib", "namespace": HOME}
    for number, role in enumerate(roles):
        kind, home = role["kind"], role["metadata"].get("namespace")
        metadata = {"name": f"meshlib-{number}", **({"namespace": home} if home else {})}
        binding = {"apiVersion": f"{group}/v1", "kind": f"{kind}Binding", "metadata": metadata, "subjects": [subject]}
        ref = {"apiGroup": group, "kind": kind, "name": role["metadata"]["name"]}
        real_cluster.put(role, {**binding, "roleRef": ref})
    real_cluster.put(account("meshlib", HOME), service("a"))
    for each in manifests(Installation("", istio_crds=True)):
        if each["kind"] == "CustomResourceDefinition":
            real_cluster.put(each)
    real_cluster.put(virtual_service("b", "gone"))
    folder = tmp_path / "by-hand"
    folder.mkdir()
    config = token_kubeconfig(real_cluster, folder, HOME, "meshlib")
    secrets = ("--ca-secret", f"{HOME}/meshlib-ca", "--token-secret", f"{HOME}/meshlib-join-tokens")
    words = ("--kubernetes", "--write-status", *secrets, "--xds", "127.0.0.1:0")
    with control_plane(folder, *words, "--admin", "127.0.0.1:0", KUBECONFIG=str(config)) as process:
        real_cluster.until(lambda: status(real_cluster, "b").get("validationMessages") == GONE, "the status is written")
        assert "403" not in process.log
        assert problems(process)[0]["object"] == "VirtualService shop/b"
        for _ in range(2):  # the first one makes the Secret
            asked = {"namespace": "default", "service_account": "reviews", "ttl": "600"}
            yaml_given = {"content-type": "application/yaml"}
            httpx.post(f"{process.admin}/v1/tokens", params=asked, headers=yaml_given, timeout=60).raise_for_status()
    assert real_cluster.find("Secret", "meshlib-ca", HOME) is not None
