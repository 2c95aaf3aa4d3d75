"""Which objects does a cluster need to run the control plane? One list, which is applied, printed and taken away again.

Least privileges: the role allows what kubernetes.py watches and statuses.py writes, resource by resource, and reads no
Secret. The container runs as nobody, on a file system that it can't write, without any capability.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from meshlib.controlplane.kinds import NETWORKING, OWN, SECURITY, find_kind
from meshlib.controlplane.kubernetes import (
    CRDS,
    CUSTOM,
    GATEWAY_CLASSES,
    GATEWAYS,
    ROUTES,
    WATCHED,
    WITHOUT_EFFECT,
    Watched,
)
from meshlib.controlplane.statuses import LEASE
from meshlib.kube.client import Object, Resource
from meshlib.version import __version__

MANAGER = "meshctl"
"""The field manager of what is applied, and the value of the label by which it is found."""
NAME, CA, TOKENS = "meshlib", "meshlib-ca", "meshlib-join-tokens"
XDS, WEBHOOK, METRICS = 15012, 15017, 15020
USER = 65532
INJECTION = "meshlib-injection"
"""The label of namespaces whose pods are put on the mesh: `enabled`."""
LABELS = {"app.kubernetes.io/name": NAME, "app.kubernetes.io/managed-by": MANAGER}
_STATE, _SECRET, _KEYS = "/var/lib/meshlib", "/etc/meshlib-ca", "/var/lib/meshlib/keys"


@dataclass(frozen=True, slots=True)
class Installation:
    """root: PEM of the CA's root, which vouches for the webhooks. image: of the control plane, and of what is injected.

    injects: whether pods are put on the mesh. istio_crds: whether Istio's kinds are defined, for clusters without it.
    """

    root: str
    namespace: str = "istio-system"
    image: str = f"ghcr.io/meshlib/meshlib:{__version__}"
    replicas: int = 1
    trust_domain: str = "cluster.local"
    injects: bool = True
    istio_crds: bool = False

    @property
    def host(self) -> str:
        return f"{NAME}.{self.namespace}.svc"


KINDS: Mapping[str, Resource] = {
    each.kind: each
    for each in (
        Resource("Namespace", "namespaces", namespaced=False),
        CRDS,
        Resource("ServiceAccount", "serviceaccounts"),
        Resource("ClusterRole", "clusterroles", "rbac.authorization.k8s.io", namespaced=False),
        Resource("ClusterRoleBinding", "clusterrolebindings", "rbac.authorization.k8s.io", namespaced=False),
        Resource("Role", "roles", "rbac.authorization.k8s.io"),
        Resource("RoleBinding", "rolebindings", "rbac.authorization.k8s.io"),
        Resource("Secret", "secrets"),
        Resource("Service", "services"),
        Resource("Deployment", "deployments", "apps"),
        Resource("PodDisruptionBudget", "poddisruptionbudgets", "policy"),
        Resource("HorizontalPodAutoscaler", "horizontalpodautoscalers", "autoscaling", ("v2",)),
        Resource("NetworkPolicy", "networkpolicies", "networking.k8s.io"),
        Resource(
            "MutatingWebhookConfiguration",
            "mutatingwebhookconfigurations",
            "admissionregistration.k8s.io",
            namespaced=False,
        ),
        Resource(
            "ValidatingWebhookConfiguration",
            "validatingwebhookconfigurations",
            "admissionregistration.k8s.io",
            namespaced=False,
        ),
    )
}


def path_of(given: Object) -> str:
    """Where the API server has this object."""
    resource = KINDS[given["kind"]]
    version = str(given["apiVersion"]).rpartition("/")[2]
    return resource.path(version, str(given["metadata"].get("namespace", "")), str(given["metadata"]["name"]))


def manifests(given: Installation) -> tuple[Object, ...]:
    """In the order in which they are to be applied. The CA's Secret is not among them: see secret()."""
    # MeshConfig's place is a fixed one, and a Role needs its namespace.
    places = dict.fromkeys((given.namespace, *(each.namespace for each in WATCHED if each.namespace)))
    found: list[Object] = [_object("Namespace", place, labels={}) for place in places]
    found += crds(given)
    found += _access(given)
    found += [_service(given), _deployment(given)]
    if given.replicas > 1:
        found += _several(given)
    found.append(_network_policy(given))
    found += _webhooks(given)
    return tuple(found)


def unwanted(given: Installation) -> Iterator[Object]:
    """What an installation with other choices may have left. Kinds stay: with one go all its objects."""
    wanted = {path_of(each) for each in manifests(given)}
    for each in manifests(replace(given, replicas=2, injects=True)):
        if path_of(each) not in wanted and each["kind"] != "CustomResourceDefinition":
            yield each


def secret(given: Installation, files: Mapping[str, bytes]) -> Object:
    """files: the CA, as Istio's `cacerts` secret names them."""
    data = {name: base64.b64encode(content).decode("ascii") for name, content in sorted(files.items())}
    return {**_object("Secret", CA, given), "type": "Opaque", "data": data}


def _object(kind: str, name: str, given: Installation | None = None, *, labels: Mapping[str, str] = LABELS) -> Object:
    resource = KINDS[kind]
    metadata: Object = {"name": name}
    if resource.namespaced and given is not None:
        metadata["namespace"] = given.namespace
    if labels:
        metadata["labels"] = dict(labels)
    return {"apiVersion": resource.api_version(resource.versions[0]), "kind": kind, "metadata": metadata}


# What may be done


def _access(given: Installation) -> Iterator[Object]:
    account = [{"kind": "ServiceAccount", "name": NAME, "namespace": given.namespace}]
    yield _object("ServiceAccount", NAME, given)
    cluster = f"{NAME}-{given.namespace}"
    yield {**_object("ClusterRole", cluster), "rules": list(cluster_rules())}
    yield {**_object("ClusterRoleBinding", cluster), "roleRef": _role("ClusterRole", cluster), "subjects": account}
    for watched in WATCHED:
        if watched.namespace:
            name = watched.params["fieldSelector"].removeprefix("metadata.name=")
            rule = {**_rule([watched.resource], "list", "watch"), "resourceNames": [name]}
            home = {"namespace": watched.namespace}
            role = _object("Role", f"{NAME}-mesh-config", given)
            role["metadata"] |= home
            binding = _object("RoleBinding", f"{NAME}-mesh-config", given)
            binding["metadata"] |= home
            yield {**role, "rules": [rule]}
            yield {**binding, "roleRef": _role("Role", f"{NAME}-mesh-config"), "subjects": account}
    leases = Resource("Lease", "leases", "coordination.k8s.io")
    rules = [_rule([leases], "create"), {**_rule([leases], "get", "update"), "resourceNames": [LEASE]}]
    # Which may be made by nobody here: a right to create one Secret is one to create any.
    yield _object("Secret", TOKENS, given)
    rules.append({**_rule([KINDS["Secret"]], "get", "patch"), "resourceNames": [TOKENS]})
    yield {**_object("Role", NAME, given), "rules": rules}
    yield {**_object("RoleBinding", NAME, given), "roleRef": _role("Role", NAME), "subjects": account}


def cluster_rules() -> Iterator[Object]:
    """One for each API group."""
    groups: dict[str, list[Resource]] = {}
    for each in (*(watched.resource for watched in WATCHED if not watched.namespace), CRDS):
        groups.setdefault(each.group, []).append(each)
    for resources in groups.values():
        yield _rule(resources, "list", "watch")
    written: dict[str, list[Resource]] = {}
    for watched in (*CUSTOM, *ROUTES, GATEWAYS, GATEWAY_CLASSES):
        written.setdefault(watched.resource.group, []).append(watched.resource)
    for resources in written.values():
        yield _rule(resources, "patch", subresource="/status")
    yield _rule([Resource("TokenReview", "tokenreviews", "authentication.k8s.io")], "create")


def _rule(resources: Iterable[Resource], *verbs: str, subresource: str = "") -> Object:
    found = list(resources)
    return {
        "apiGroups": [found[0].group],
        "resources": [f"{each.plural}{subresource}" for each in found],
        "verbs": list(verbs),
    }


def _role(kind: str, name: str) -> Object:
    return {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name}


# What runs

_SELECTOR = {"app.kubernetes.io/name": NAME}


def _service(given: Installation) -> Object:
    ports = [
        {"name": "grpc-xds", "port": XDS, "targetPort": "grpc-xds"},
        {"name": "https-webhook", "port": 443, "targetPort": "https-webhook"},
        {"name": "http-metrics", "port": METRICS, "targetPort": "http-metrics"},
    ]
    return {**_object("Service", NAME, given), "spec": {"selector": _SELECTOR, "ports": ports}}


def _deployment(given: Installation) -> Object:
    restricted = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    state = {"name": "state", "mountPath": _STATE}
    copies = f"umask 077 && mkdir -p {_KEYS} && cp {_SECRET}/*.pem {_KEYS}/"

    def probe(path: str, seconds: int) -> Object:
        return {"httpGet": {"path": path, "port": "http-metrics"}, "periodSeconds": seconds, "timeoutSeconds": 5}

    control_plane = {
        "name": NAME,
        "image": given.image,
        "args": list(_arguments(given)),
        "ports": [
            {"name": "grpc-xds", "containerPort": XDS},
            {"name": "https-webhook", "containerPort": WEBHOOK},
            {"name": "http-metrics", "containerPort": METRICS},
        ],
        # A node that is busy with all that begins at once may take its time: two minutes until it answers.
        "startupProbe": {**probe("/healthz", 2), "failureThreshold": 60},
        # Ready once the whole cluster was read, which may take long where a right is missing: it lives meanwhile.
        "readinessProbe": probe("/readyz", 2),
        "livenessProbe": probe("/healthz", 10),
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "2Gi"}},
        "securityContext": restricted,
        "volumeMounts": [state, {"name": "tmp", "mountPath": "/tmp"}],
        # Why it ended is in the pod's status: for kubectl describe, and meshctl install --wait.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    # A Secret's files are root's; the CA's key must be its owner's alone.
    keys = {
        "name": "keys",
        "image": given.image,
        "command": ["sh", "-c", copies],
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "64Mi"}},
        "securityContext": restricted,
        "volumeMounts": [state, {"name": "ca", "mountPath": _SECRET, "readOnly": True}],
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    pod = {
        "serviceAccountName": NAME,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "initContainers": [keys],
        "containers": [control_plane],
        "volumes": [
            {"name": "state", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {"medium": "Memory"}},
            {"name": "ca", "secret": {"secretName": CA, "defaultMode": 0o440}},
        ],
    }
    scraped = {"prometheus.io/scrape": "true", "prometheus.io/port": str(METRICS), "prometheus.io/path": "/metrics"}
    spec: Object = {
        "selector": {"matchLabels": _SELECTOR},
        "strategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "template": {"metadata": {"labels": {**LABELS, "app": NAME}, "annotations": scraped}, "spec": pod},
    }
    if given.replicas == 1:
        spec["replicas"] = 1  # of several, the autoscaler has the number
    return {**_object("Deployment", NAME, given), "spec": spec}


def _arguments(given: Installation) -> Iterator[str]:
    yield from ("control-plane", "--kubernetes", "--write-status", "--read-only", "--state", f"{_STATE}/state")
    yield from ("--xds", f"0.0.0.0:{XDS}", "--trust-domain", given.trust_domain)
    for name in (given.host, f"{given.host}.cluster.local", f"{NAME}.{given.namespace}"):
        yield from ("--san", name)
    yield from ("--ca-cert", f"{_KEYS}/ca-cert.pem", "--ca-key", f"{_KEYS}/ca-key.pem")
    yield from ("--root-cert", f"{_KEYS}/root-cert.pem", "--token-secret", f"{given.namespace}/{TOKENS}")
    yield from ("--webhook", f"0.0.0.0:{WEBHOOK}", "--metrics", f"0.0.0.0:{METRICS}")
    if given.injects:
        yield from ("--inject-image", given.image, "--inject-control-plane", f"{given.host}:{XDS}")


def _several(given: Installation) -> Iterator[Object]:
    selector = {"matchLabels": _SELECTOR}
    yield {**_object("PodDisruptionBudget", NAME, given), "spec": {"minAvailable": 1, "selector": selector}}
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME}
    cpu = {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}}
    spec = {
        "scaleTargetRef": target,
        "minReplicas": given.replicas,
        "maxReplicas": max(5, given.replicas),
        "metrics": [cpu],
    }
    yield {**_object("HorizontalPodAutoscaler", NAME, given), "spec": spec}


def _network_policy(given: Installation) -> Object:
    """Pods of all namespaces speak xDS, and may scrape; the API server, which is no pod, asks the webhooks, and the
    kubelet the probes. The admin API is the pod's own: `kubectl port-forward` reaches it."""
    xds = {"from": [{"namespaceSelector": {}}], "ports": [{"port": XDS}]}
    spec = {
        "podSelector": {"matchLabels": _SELECTOR},
        "policyTypes": ["Ingress"],
        "ingress": [xds, {"ports": [{"port": WEBHOOK}, {"port": METRICS}]}],
    }
    return {**_object("NetworkPolicy", NAME, given), "spec": spec}


# Webhooks


def _webhooks(given: Installation) -> Iterator[Object]:
    bundle = base64.b64encode(given.root.encode()).decode("ascii")

    def client(path: str) -> Object:
        service = {"name": NAME, "namespace": given.namespace, "path": path, "port": 443}
        return {"service": service, "caBundle": bundle}

    common = {"admissionReviewVersions": ["v1"], "sideEffects": "None"}
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for each in _validated():
        groups.setdefault((each.resource.group, each.resource.versions), []).append(each.resource.plural)
    rules = [
        {"apiGroups": [group], "apiVersions": list(versions), "resources": plurals, "operations": ["CREATE", "UPDATE"]}
        for (group, versions), plurals in groups.items()
    ]
    # Ignore: a control plane that is away must not keep anybody from editing; what is wrong is left out later, too.
    validating = {
        **common,
        "name": "validation.meshlib.io",
        "clientConfig": client("/validate"),
        "rules": rules,
        "failurePolicy": "Ignore",
        "timeoutSeconds": 5,
    }
    name = f"{NAME}-{given.namespace}"
    yield {**_object("ValidatingWebhookConfiguration", name), "webhooks": [validating]}
    if not given.injects:
        return
    pods = {"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}
    # Fail: a pod that asks to be on the mesh must not begin off it, in plaintext.
    mutating = {
        **common,
        "name": "injection.meshlib.io",
        "clientConfig": client("/inject"),
        "rules": [pods],
        "failurePolicy": "Fail",
        "reinvocationPolicy": "IfNeeded",
        "timeoutSeconds": 10,
        "namespaceSelector": {"matchLabels": {INJECTION: "enabled"}},
        "objectSelector": {
            "matchExpressions": [
                {"key": "meshlib.io/inject", "operator": "NotIn", "values": ["false"]},
                # Its own pods, or it could never begin again.
                {"key": "app.kubernetes.io/name", "operator": "NotIn", "values": [NAME]},
            ]
        },
    }
    yield {**_object("MutatingWebhookConfiguration", name), "webhooks": [mutating]}


def _validated() -> Iterable[Watched]:
    """What meshlib.istio.parse judges. The Gateway API's CRDs have schemas of their own."""
    return (each for each in CUSTOM if each.resource.group in (NETWORKING, SECURITY, OWN))


# Kinds


def crds(given: Installation) -> Iterator[Object]:
    """Ours, and Istio's where they are asked for. Without schemas: the webhook and the control plane know them better,
    and say which field is wrong. Istio's all together, since Kiali waits for those that are missing as soon as one is
    there."""
    for each in (*CUSTOM, *WITHOUT_EFFECT):
        if each.resource.group == OWN or (given.istio_crds and each.resource.group.endswith(".istio.io")):
            yield _crd(each.resource)


def _crd(resource: Resource) -> Object:
    anything: dict[str, Any] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    versions = [
        {
            "name": version,
            "served": True,
            "storage": index == 0,
            "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": anything, "status": anything}}},
            "subresources": {"status": {}},
        }
        for index, version in enumerate(resource.versions)
    ]
    names: Object = {
        "kind": resource.kind,
        "listKind": f"{resource.kind}List",
        "plural": resource.plural,
        "singular": resource.kind.lower(),
        "categories": ["meshlib"],
    }
    if (known := find_kind(resource.title)) is not None and known.short:
        names["shortNames"] = list(known.short)  # kubectl get vs
    spec = {"group": resource.group, "scope": "Namespaced", "names": names, "versions": versions}
    return {**_object("CustomResourceDefinition", resource.title), "spec": spec}
