"""What may be written to the cluster, and what does a pod need to be on the mesh? Kubernetes' admission webhooks.

/validate refuses objects that could not be used, in the words of `meshctl validate`. /inject adds to a pod an init
container, which hands over the mesh's root and the library, and the environment by which Python and meshlib find them.
Nothing that is there changes, but that PYTHONPATH gets one more folder.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from meshlib.instrumentation.library import IMAGE_FOLDER
from meshlib.istio.parse import parse_value
from meshlib.istio.problems import ConfigurationWarning

logger = logging.getLogger("meshlib.controlplane")

MAX_REVIEW = 8 * 1024 * 1024
"""Bytes. An object has 1.5 MB at most, and a review holds two forms of it."""
MAX_WARNING = 256
"""Characters: Kubernetes shortens a longer warning."""
INIT, ROOT_VOLUME, TOKEN_VOLUME = "meshlib-init", "meshlib-root", "meshlib-token"
ROOT_FOLDER, TOKEN_FOLDER = "/var/run/meshlib", "/var/run/secrets/meshlib"
LIBRARY_VOLUME, LIBRARY_FOLDER = "meshlib-library", "/var/run/meshlib-library"
AUTOSTART, PYTHONPATH = f"{LIBRARY_FOLDER}/autostart", "PYTHONPATH"
ANNOTATION = "meshlib.io/inject"
"""`false` on a pod (or its label of that name) keeps it off the mesh. `meshlib.io/port` says which port it serves."""
STATUS = "meshlib.io/status"
"""Of a pod: which of its containers are on the mesh, in the form that Istio's `sidecar.istio.io/status` has, so that
Kiali knows that this pod is (its setting istio_sidecar_annotation)."""
PORT, LIBRARY = "meshlib.io/port", "meshlib.io/library"
"""LIBRARY: `false` where the image has meshlib; the pod is told then who and where it is, and no more."""
Pod = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Injection:
    """image: has Python; the init container runs it. control_plane: `host:port` as pods call it. audience: of the
    token by which a pod proves its service account."""

    image: str
    control_plane: str
    trust_domain: str = "cluster.local"
    audience: str = "istio-ca"


def admission_app(injection: Injection | None, root: Callable[[], str]) -> Starlette:
    """root: PEM of those who vouch for the control plane now. Without `injection` pods are left as they are."""

    async def validate(request: Request) -> Response:
        return await _reviewed(request, _validate)

    async def inject(request: Request) -> Response:
        return await _reviewed(request, lambda review: _inject(review, injection, root()))

    return Starlette(
        routes=[Route("/validate", validate, methods=["POST"]), Route("/inject", inject, methods=["POST"])]
    )


async def _reviewed(request: Request, answer: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Response:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_REVIEW:
            return JSONResponse({"error": "too large"}, status_code=413)
    try:
        review = json.loads(body)
        asked = review["request"]
        uid = asked["uid"]
        if review["apiVersion"] != "admission.k8s.io/v1" or not isinstance(uid, str):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        return JSONResponse({"error": "no AdmissionReview of admission.k8s.io/v1"}, status_code=400)
    try:
        response = answer(asked)
    except Exception:
        logger.exception("an admission review can't be answered")
        return JSONResponse({"error": "internal"}, status_code=500)  # the webhook's failurePolicy decides
    found = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": {"uid": uid, **response}}
    return JSONResponse(found)


def _validate(review: Mapping[str, Any]) -> dict[str, Any]:
    given = review.get("object")
    if not given:
        return {"allowed": True}  # it is deleted
    namespace = str(review.get("namespace") or "default")
    parsed = parse_value(given, "", namespace=namespace)
    if parsed.problems:
        told = "; ".join(f"{each.field}: {each.reason}" if each.field else each.reason for each in parsed.problems)
        return {"allowed": False, "status": {"code": 422, "reason": "Invalid", "message": told}}
    warnings = [_shortened(each) for each in parsed.warnings]
    return {"allowed": True, **({"warnings": warnings} if warnings else {})}


def _shortened(warning: ConfigurationWarning) -> str:
    return f"{warning.field}: {warning.reason}"[:MAX_WARNING] if warning.field else warning.reason[:MAX_WARNING]


def _inject(review: Mapping[str, Any], injection: Injection | None, root: str) -> dict[str, Any]:
    pod = review.get("object") or {}
    if injection is None or not _wants(pod):
        return {"allowed": True}
    namespace = str(review.get("namespace") or pod.get("metadata", {}).get("namespace") or "default")
    patch = patch_of(pod, namespace, injection, root)
    encoded = base64.b64encode(json.dumps(patch).encode()).decode("ascii")
    found = {"allowed": True, "patchType": "JSONPatch", "patch": encoded}
    warnings = [
        f"container {each['name']}: PYTHONPATH comes from elsewhere; put {AUTOSTART} in front of it there"
        for each in pod["spec"]["containers"]
        if _gets_library(pod) and (known := _python_path(each)) is not None and _is_from_elsewhere(known[1])
    ]
    return {**found, **({"warnings": warnings} if warnings else {})}


def _wants(pod: Pod) -> bool:
    metadata, spec = pod.get("metadata") or {}, pod.get("spec") or {}
    words = {**(metadata.get("annotations") or {}), **(metadata.get("labels") or {})}
    is_done = any(each.get("name") == INIT for each in spec.get("initContainers") or ())
    is_declined = str(words.get(ANNOTATION, "")).lower() == "false"
    return not is_declined and not is_done and bool(spec.get("containers")) and _system(spec) != "windows"


def _system(spec: Mapping[str, Any]) -> str:
    """What its nodes run, where the pod says it: an init container of ours would never start on Windows."""
    said = (spec.get("os") or {}).get("name") or (spec.get("nodeSelector") or {}).get("kubernetes.io/os")
    return str(said or "")


def _gets_library(pod: Pod) -> bool:
    return str((pod["metadata"].get("annotations") or {}).get(LIBRARY, "")).lower() != "false"


def _python_path(container: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]] | None:
    """The variable and its place, where the pod's author has it; of two the last, which is what counts."""
    env = container.get("env") or ()
    return next(((at, env[at]) for at in reversed(range(len(env))) if env[at].get("name") == PYTHONPATH), None)


def _is_from_elsewhere(variable: Mapping[str, Any]) -> bool:
    """Kubernetes leaves an empty value out: one that has none of either is empty."""
    return bool(variable.get("valueFrom"))


def patch_of(pod: Pod, namespace: str, injection: Injection, root: str) -> list[dict[str, Any]]:
    """RFC 6902. What the pod's author set stays: a variable that is there is not touched, but for PYTHONPATH, which
    gets the library's folder in front."""
    spec, gets_library = pod["spec"], _gets_library(pod)
    patch: list[dict[str, Any]] = []

    def add(place: str, known: object, each: object, *, first: bool = False) -> None:
        if known:
            patch.append({"op": "add", "path": f"{place}/{0 if first else '-'}", "value": each})
        else:
            patch.append({"op": "add", "path": place, "value": [each]})

    on_the_mesh = json.dumps({"containers": [each.get("name", "") for each in spec["containers"]]})
    if pod.get("metadata", {}).get("annotations"):
        patch.append({"op": "add", "path": f"/metadata/annotations/{STATUS.replace('/', '~1')}", "value": on_the_mesh})
    else:
        patch.append({"op": "add", "path": "/metadata/annotations", "value": {STATUS: on_the_mesh}})
    add("/spec/initContainers", spec.get("initContainers"), _init(injection, root, gets_library), first=True)
    volumes = list(spec.get("volumes") or ())
    for volume in _volumes(injection, gets_library):
        add("/spec/volumes", volumes, volume)
        volumes.append(volume)
    kinds = (("containers", spec["containers"]), ("initContainers", spec.get("initContainers") or ()))
    for kind, containers in kinds:
        offset = 1 if kind == "initContainers" else 0  # ours stands before them by now
        for index, container in enumerate(containers):
            place = f"/spec/{kind}/{index + offset}"
            env = list(container.get("env") or ())
            names = {each.get("name") for each in env}
            given = _environment(pod, container, namespace, injection, serves=kind == "containers")
            if gets_library:
                given.append({"name": PYTHONPATH, "value": AUTOSTART})
                if (known := _python_path(container)) is not None and not _is_from_elsewhere(known[1]):
                    value = known[1].get("value")
                    path = f"{AUTOSTART}:{value}" if value else AUTOSTART
                    patch.append({"op": "add", "path": f"{place}/env/{known[0]}/value", "value": path})
            for variable in given:
                if variable["name"] not in names:
                    add(f"{place}/env", env, variable)
                    env.append(variable)
            mounts = list(container.get("volumeMounts") or ())
            for mount in _mounts(gets_library):
                add(f"{place}/volumeMounts", mounts, mount)
                mounts.append(mount)
    return patch


def _init(injection: Injection, root: str, gets_library: bool) -> dict[str, Any]:
    mounts = [{"name": ROOT_VOLUME, "mountPath": ROOT_FOLDER}]
    if gets_library:
        mounts.append({"name": LIBRARY_VOLUME, "mountPath": LIBRARY_FOLDER})
    words = [ROOT_FOLDER, *((IMAGE_FOLDER, LIBRARY_FOLDER) if gets_library else ())]
    return {
        "name": INIT,
        "image": injection.image,
        "command": ["python", "-m", "meshlib.instrumentation.library", *words],
        "env": [{"name": "MESHLIB_ROOT", "value": root}],
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "64Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": mounts,
    }


def _volumes(injection: Injection, gets_library: bool) -> Iterator[dict[str, Any]]:
    token = {"audience": injection.audience, "expirationSeconds": 43200, "path": "token"}
    yield {"name": ROOT_VOLUME, "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}
    yield {"name": TOKEN_VOLUME, "projected": {"sources": [{"serviceAccountToken": token}]}}
    if gets_library:
        yield {"name": LIBRARY_VOLUME, "emptyDir": {"sizeLimit": "512Mi"}}


def _mounts(gets_library: bool) -> Iterator[dict[str, Any]]:
    yield {"name": ROOT_VOLUME, "mountPath": ROOT_FOLDER, "readOnly": True}
    yield {"name": TOKEN_VOLUME, "mountPath": TOKEN_FOLDER, "readOnly": True}
    if gets_library:
        yield {"name": LIBRARY_VOLUME, "mountPath": LIBRARY_FOLDER, "readOnly": True}


def _environment(
    pod: Pod, container: Mapping[str, Any], namespace: str, injection: Injection, *, serves: bool
) -> list[dict[str, Any]]:
    """What MESHLIB_ settings say, in docs/reference/settings.md. serves: whether its port may be called."""
    metadata = pod.get("metadata") or {}
    labels = metadata.get("labels") or {}
    found: list[dict[str, Any]] = [
        {"name": "MESHLIB_CONTROL_PLANE", "value": injection.control_plane},
        {"name": "MESHLIB_IDENTITY", "value": "control-plane"},
        {"name": "MESHLIB_CA_ROOTS", "value": f"{ROOT_FOLDER}/root-cert.pem"},
        {"name": "MESHLIB_TOKEN_FILE", "value": f"{TOKEN_FOLDER}/token"},
        {"name": "MESHLIB_TRUST_DOMAIN", "value": injection.trust_domain},
        _field("MESHLIB_NAMESPACE", "metadata.namespace"),
        _field("MESHLIB_SERVICE_ACCOUNT", "spec.serviceAccountName"),
        {"name": "MESHLIB_WORKLOAD", "value": _workload(metadata, labels) or namespace},
    ]
    told = ",".join(f"{key}={value}" for key, value in sorted(labels.items()) if "," not in f"{value}")
    if told:
        found.append({"name": "MESHLIB_LABELS", "value": told})
    port = _port(metadata.get("annotations") or {}, container) if serves else 0
    if port:
        # The name stands before what refers to it: Kubernetes replaces $(...) by what it has read so far.
        found.append(_field("MESHLIB_POD_IP", "status.podIP"))
        found.append({"name": "MESHLIB_ADDRESS", "value": f"$(MESHLIB_POD_IP):{port}"})
    return found


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _workload(metadata: Mapping[str, Any], labels: Mapping[str, Any]) -> str:
    """What owns the pod: a Deployment's name is its ReplicaSet's without the hash."""
    owner = next((str(each.get("name", "")) for each in metadata.get("ownerReferences") or ()), "")
    name = owner or str(metadata.get("generateName") or metadata.get("name") or "").rstrip("-")
    return name.removesuffix(f"-{labels.get('pod-template-hash', '')}") if labels.get("pod-template-hash") else name


def _port(annotations: Mapping[str, Any], container: Mapping[str, Any]) -> int:
    """The annotation, else the container's only port, else the first that is named after HTTP or gRPC; 0 is none."""
    ports = [each for each in container.get("ports") or () if each.get("protocol", "TCP") == "TCP"]
    said = str(annotations.get(PORT, ""))
    if said.isdecimal():
        return int(said) if len(ports) == 0 or any(each.get("containerPort") == int(said) for each in ports) else 0
    if len(ports) == 1:
        return int(ports[0]["containerPort"])
    named = (each for each in ports if str(each.get("name", "")).partition("-")[0] in ("http", "http2", "grpc"))
    first = next(named, None)
    return int(first["containerPort"]) if first is not None else 0
