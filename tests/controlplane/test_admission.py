"""Kubernetes' webhooks, asked as the API server asks them: AdmissionReviews over TLS, verified by the mesh's root."""

from __future__ import annotations

import base64
import copy
import json
import ssl
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from meshlib.controlplane.admission import AUTOSTART, INIT, STATUS, Injection
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.settings import Settings

IMAGE = "example.com/meshlib:1"
POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "generateName": "reviews-v2-5d8f9c-",
        "labels": {"app": "reviews", "version": "v2", "pod-template-hash": "5d8f9c"},
        "ownerReferences": [{"kind": "ReplicaSet", "name": "reviews-v2-5d8f9c"}],
    },
    "spec": {
        "serviceAccountName": "bookinfo-reviews",
        "containers": [
            {
                "name": "app",
                "image": "reviews",
                "ports": [{"name": "http", "containerPort": 9080}],
                "env": [{"name": "MESHLIB_FORWARD_HEADERS", "value": "end-user"}],
            }
        ],
        "volumes": [{"name": "data", "emptyDir": {}}],
    },
}


class Webhook:
    def __init__(self, http: httpx.AsyncClient, root: str) -> None:
        self.http, self.root = http, root

    async def ask(self, path: str, given: object, namespace: str = "shop") -> dict[str, Any]:
        """The response to one review."""
        review = {
            "apiVersion": "admission.k8s.io/v1",
            "kind": "AdmissionReview",
            "request": {"uid": "42", "operation": "CREATE", "namespace": namespace, "object": given},
        }
        answer = await self.http.post(path, json=review)
        assert answer.status_code == 200
        found = answer.json()
        assert (found["apiVersion"], found["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
        assert found["response"]["uid"] == "42"
        return dict(found["response"])

    async def injected(self, pod: dict[str, Any]) -> dict[str, Any]:
        """The pod that Kubernetes would create."""
        response = await self.ask("/inject", pod)
        assert response["allowed"] is True
        if "patch" not in response:
            return pod
        assert response["patchType"] == "JSONPatch"
        return patched(pod, json.loads(base64.b64decode(response["patch"])))


def patched(given: dict[str, Any], patch: list[dict[str, Any]]) -> dict[str, Any]:
    """RFC 6902, of which `add` and `replace` are enough here. A path that is not there fails, as in Kubernetes."""
    found: Any = copy.deepcopy(given)
    for each in patch:
        *steps, last = (part.replace("~1", "/") for part in each["path"].strip("/").split("/"))
        place = found
        for step in steps:
            place = place[int(step)] if isinstance(place, list) else place[step]
        if each["op"] == "replace":
            assert last in place
            place[last] = each["value"]
        elif isinstance(place, list):
            assert each["op"] == "add"
            place.insert(len(place) if last == "-" else int(last), each["value"])
        else:
            place[last] = each["value"]
    return dict(found)


@pytest.fixture
async def webhook() -> AsyncIterator[Webhook]:
    settings = ControlPlaneSettings(
        xds=("127.0.0.1", 0),
        admin=("127.0.0.1", 0),
        webhook=("127.0.0.1", 0),
        injection=Injection(IMAGE, "meshlib.istio-system.svc:15012"),
        names=("meshlib.istio-system.svc",),
    )
    plane = ControlPlane(settings)
    await plane.start()
    try:
        context = ssl.create_default_context(cadata=plane.roots)
        async with httpx.AsyncClient(base_url=plane.webhook_url, verify=context, trust_env=False, timeout=30) as http:
            yield Webhook(http, plane.roots)
    finally:
        await plane.stop()


async def test_a_pod_gets_an_init_container_and_its_environment(webhook: Webhook) -> None:
    """And nothing that was there changes: containers, images, ports and variables are the author's."""
    pod = await webhook.injected(POD)
    (init,) = pod["spec"]["initContainers"]
    assert (init["name"], init["image"]) == (INIT, IMAGE)
    assert {each["name"]: each.get("value") for each in init["env"]}["MESHLIB_ROOT"] == webhook.root
    assert init["securityContext"]["runAsNonRoot"] is True
    (app,) = pod["spec"]["containers"]
    (before,) = POD["spec"]["containers"]
    assert app["env"][0] == before["env"][0]
    assert {**app, "env": None, "volumeMounts": None} == {**before, "env": None, "volumeMounts": None}
    assert {**pod["metadata"], "annotations": None} == {**POD["metadata"], "annotations": None}
    added = {**POD["metadata"].get("annotations", {}), STATUS: f'{{"containers": ["{before["name"]}"]}}'}
    assert pod["metadata"]["annotations"] == added
    assert [each["name"] for each in pod["spec"]["volumes"]] == [
        "data",
        "meshlib-root",
        "meshlib-token",
        "meshlib-library",
    ]
    (source,) = pod["spec"]["volumes"][2]["projected"]["sources"]
    assert source["serviceAccountToken"]["audience"] == "istio-ca"


async def test_python_finds_the_library_and_the_author_s_path(webhook: Webhook) -> None:
    """Where the pod says a PYTHONPATH, ours is put in front; one from elsewhere stays, with a warning."""

    def python_path(pod: dict[str, Any]) -> dict[str, Any]:
        (found,) = (each for each in pod["spec"]["containers"][0]["env"] if each["name"] == "PYTHONPATH")
        return dict(found)

    pod = await webhook.injected(POD)
    assert python_path(pod)["value"] == "/var/run/meshlib-library/autostart"
    (init,) = pod["spec"]["initContainers"]
    mounts = {each["name"]: each["mountPath"] for each in init["volumeMounts"]}
    assert init["command"][-1] == mounts["meshlib-library"]
    own = copy.deepcopy(POD)
    own["spec"]["containers"][0]["env"].insert(0, {"name": "PYTHONPATH", "value": "/app:/lib"})
    pod = await webhook.injected(own)
    assert python_path(pod)["value"] == "/var/run/meshlib-library/autostart:/app:/lib"
    elsewhere = {"name": "PYTHONPATH", "valueFrom": {"configMapKeyRef": {"name": "paths", "key": "python"}}}
    own["spec"]["containers"][0]["env"][0] = elsewhere
    assert python_path(await webhook.injected(own)) == elsewhere
    (warning,) = (await webhook.ask("/inject", own))["warnings"]
    assert warning.startswith("container app: PYTHONPATH comes from elsewhere; put /var/run/meshlib-library/autostart")


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ([{"name": "PYTHONPATH"}], AUTOSTART),  # as Kubernetes writes an empty one
        ([{"name": "PYTHONPATH", "value": ""}], AUTOSTART),
        ([{"name": "PYTHONPATH", "value": "/old"}, {"name": "PYTHONPATH", "value": "/app"}], f"{AUTOSTART}:/app"),
    ],
)
async def test_a_python_path_that_is_empty_or_there_twice(
    webhook: Webhook, env: list[dict[str, Any]], expected: str
) -> None:
    """The library is found, and nobody is warned: of two of one name the last counts."""
    own = copy.deepcopy(POD)
    own["spec"]["containers"][0]["env"] = env
    assert "warnings" not in await webhook.ask("/inject", own)
    found = (await webhook.injected(own))["spec"]["containers"][0]["env"]
    assert [each["value"] for each in found if each["name"] == "PYTHONPATH"][-1] == expected


@pytest.mark.parametrize("spec", [{"os": {"name": "windows"}}, {"nodeSelector": {"kubernetes.io/os": "windows"}}])
async def test_a_pod_of_windows_is_left_alone(webhook: Webhook, spec: dict[str, Any]) -> None:
    """The init container would never start there, and Kubernetes would refuse its user."""
    own = copy.deepcopy(POD)
    own["spec"].update(spec)
    assert await webhook.injected(own) == own
    own["spec"].update({name: {} for name in spec})
    assert await webhook.injected(own) != own


async def test_containers_beside_the_application(webhook: Webhook) -> None:
    """A sidecar among the init containers (restartPolicy: Always) keeps its place behind ours, calls through the mesh,
    and serves nothing there. What has no environment gets one; what is taken from elsewhere (envFrom) stays."""
    own = copy.deepcopy(POD)
    source = [{"configMapRef": {"name": "shop"}}]
    own["spec"]["initContainers"] = [
        {"name": "helper", "image": "helper", "restartPolicy": "Always", "ports": [{"containerPort": 9}]}
    ]
    own["spec"]["containers"].append({"name": "bare", "image": "bare", "envFrom": source})
    own["spec"]["hostNetwork"] = True
    pod = await webhook.injected(own)
    first, helper = pod["spec"]["initContainers"]
    assert (first["name"], helper["name"], helper["restartPolicy"]) == (INIT, "helper", "Always")
    bare = pod["spec"]["containers"][1]
    assert bare["envFrom"] == source
    for each in (helper, bare):
        names = [variable["name"] for variable in each["env"]]
        assert {"MESHLIB_CONTROL_PLANE", "PYTHONPATH"} <= {*names} and "MESHLIB_ADDRESS" not in names
        assert len({*names}) == len(names)


async def test_an_image_that_has_meshlib_gets_no_library(webhook: Webhook) -> None:
    """It is told who and where it is, and no more."""
    own = copy.deepcopy(POD)
    own["metadata"]["annotations"] = {"meshlib.io/library": "false"}
    pod = await webhook.injected(own)
    assert [each["name"] for each in pod["spec"]["volumes"]] == ["data", "meshlib-root", "meshlib-token"]
    names = [each["name"] for each in pod["spec"]["containers"][0]["env"]]
    assert ("MESHLIB_CONTROL_PLANE" in names, "PYTHONPATH" in names) == (True, False)
    (init,) = pod["spec"]["initContainers"]
    assert init["command"][-1] == "/var/run/meshlib"


async def test_the_environment_is_what_meshlib_reads(webhook: Webhook) -> None:
    """As Kubernetes resolves it: the settings say who the pod is, where it serves, and how it proves that."""
    pod = await webhook.injected(POD)
    fields = {
        "metadata.namespace": "shop",
        "spec.serviceAccountName": "bookinfo-reviews",
        "status.podIP": "10.0.0.7",
    }
    environ: dict[str, str] = {}
    for each in pod["spec"]["containers"][0]["env"]:
        text = each["value"] if "value" in each else fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
        for name, value in environ.items():
            text = text.replace(f"$({name})", value)
        environ[each["name"]] = text
    settings = Settings.from_environment(environ)
    assert settings.control_plane == "meshlib.istio-system.svc:15012"
    assert (settings.namespace, settings.service_account) == ("shop", "bookinfo-reviews")
    assert (settings.workload, settings.address) == ("reviews-v2", "10.0.0.7:9080")
    assert dict(settings.labels)["version"] == "v2"
    assert settings.identity == "control-plane"
    assert settings.ca_roots == "/var/run/meshlib/root-cert.pem"
    assert settings.token_file == "/var/run/secrets/meshlib/token"
    assert settings.forward_headers == ("end-user",)


async def test_what_is_injected_is_not_injected_again_and_may_be_declined(webhook: Webhook) -> None:
    """Kubernetes may ask twice (reinvocationPolicy); an author's own variables and init containers stay."""
    once = await webhook.injected(POD)
    assert await webhook.injected(once) == once
    for place in ("labels", "annotations"):
        declined = copy.deepcopy(POD)
        declined["metadata"].setdefault(place, {})["meshlib.io/inject"] = "false"
        assert await webhook.injected(declined) == declined
    own = copy.deepcopy(POD)
    own["spec"]["initContainers"] = [{"name": "migrate", "image": "reviews"}]
    own["spec"]["containers"][0]["env"].append({"name": "MESHLIB_CONTROL_PLANE", "value": "mine:1"})
    pod = await webhook.injected(own)
    assert [each["name"] for each in pod["spec"]["initContainers"]] == [INIT, "migrate"]
    # An init container calls out, and serves nothing.
    names = [each["name"] for each in pod["spec"]["initContainers"][1]["env"]]
    assert ("MESHLIB_CONTROL_PLANE" in names, "MESHLIB_ADDRESS" in names) == (True, False)
    given = [each["value"] for each in pod["spec"]["containers"][0]["env"] if each["name"] == "MESHLIB_CONTROL_PLANE"]
    assert given == ["mine:1"]


@pytest.mark.parametrize(
    ("ports", "annotation", "expected"),
    [
        ([], "", None),
        ([("metrics", 9090)], "", "9090"),
        ([("metrics", 9090), ("http-web", 8080)], "", "8080"),
        ([("metrics", 9090), ("web", 8080)], "", None),
        ([("metrics", 9090), ("web", 8080)], "8080", "8080"),
        ([], "8080", "8080"),
    ],
)
async def test_the_port_that_serves(
    webhook: Webhook, ports: list[tuple[str, int]], annotation: str, expected: str | None
) -> None:
    """The only one, the one that is named after HTTP or gRPC, or the one that the annotation says."""
    pod = copy.deepcopy(POD)
    pod["spec"]["containers"][0]["ports"] = [{"name": name, "containerPort": number} for name, number in ports]
    if annotation:
        pod["metadata"]["annotations"] = {"meshlib.io/port": annotation}
    found = await webhook.injected(pod)
    env = {each["name"]: each.get("value", "") for each in found["spec"]["containers"][0]["env"]}
    address = env.get("MESHLIB_ADDRESS")
    assert address == (None if expected is None else f"$(MESHLIB_POD_IP):{expected}")


def virtual_service(**http: Any) -> dict[str, Any]:
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": "reviews"},
        "spec": {"hosts": ["reviews"], "http": [{"route": [{"destination": {"host": "reviews"}}], **http}]},
    }


async def test_an_object_that_can_not_be_used_is_refused(webhook: Webhook) -> None:
    """In the words of meshctl validate, which kubectl shows. What is odd is a warning."""
    assert (await webhook.ask("/validate", virtual_service()))["allowed"] is True
    refused = await webhook.ask("/validate", virtual_service(timeuot="3s"))
    assert refused["allowed"] is False
    assert refused["status"]["message"] == "spec.http[0].timeuot: there is no such field"
    warned = await webhook.ask(
        "/validate",
        virtual_service(match=[{"uri": {"prefix": "/"}, "statPrefix": "x"}], fault={"abort": {"httpStatus": 500}}),
    )
    assert (warned["allowed"], warned["warnings"]) == (
        True,
        ["spec.http[0].fault.abort.percentage: is missing, so no request is affected"],
    )
    assert (await webhook.ask("/validate", None))["allowed"] is True  # a deletion


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"apiVersion": "admission.k8s.io/v1beta1", "request": {}}'])
async def test_what_is_no_review_is_a_bad_request(webhook: Webhook, body: bytes) -> None:
    """And the server goes on."""
    assert (await webhook.http.post("/inject", content=body)).status_code == 400
    assert (await webhook.ask("/validate", virtual_service()))["allowed"] is True


async def test_a_review_that_has_no_end_is_refused(webhook: Webhook) -> None:
    """Nobody may fill our memory."""
    assert (await webhook.http.post("/inject", content=b" " * (9 * 1024 * 1024))).status_code == 413
