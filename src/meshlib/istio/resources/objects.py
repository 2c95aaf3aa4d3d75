"""What is an object? Its kind, name, content, and the place where it was read.

Which kinds there are, by group and version, and which shape their content has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

import msgspec
import yaml

from meshlib.errors import ConfigurationError
from meshlib.istio import gateway_kinds
from meshlib.istio.documents import Path, is_text
from meshlib.istio.resources.kubernetes import (
    Deployment,
    Endpoints,
    EndpointSlice,
    KubernetesNode,
    MeshConfigMap,
    Pod,
    Service,
    ServiceAccount,
)
from meshlib.istio.resources.networking import (
    DestinationRule,
    EnvoyFilter,
    Gateway,
    ProxyConfigOfWorkloads,
    ServiceEntry,
    Sidecar,
    VirtualService,
    WorkloadEntry,
    WorkloadGroup,
)
from meshlib.istio.resources.own import BackendTrafficPolicy, RateLimitPolicy
from meshlib.istio.resources.security import AuthorizationPolicy, PeerAuthentication, RequestAuthentication
from meshlib.istio.resources.telemetry import Telemetry
from meshlib.model.values import dataclass

NETWORKING = "networking.istio.io"
OWN = "meshlib.io"
"""The API group of the kinds that Istio has no word for."""
NETWORKING_KINDS = frozenset(
    {
        "VirtualService",
        "DestinationRule",
        "ServiceEntry",
        "Gateway",
        "Sidecar",
        "EnvoyFilter",
        "WorkloadEntry",
        "WorkloadGroup",
        "ProxyConfig",
    }
)
ISTIO_VERSIONS = ("v1alpha3", "v1beta1", "v1")
SECURITY = "security.istio.io"
SECURITY_VERSIONS = ("v1beta1", "v1")
TELEMETRY = "telemetry.istio.io"
TELEMETRY_VERSIONS = ("v1alpha1", "v1")
OWN_VERSIONS = ("v1alpha1",)
STRICT_GROUPS = (NETWORKING, SECURITY, TELEMETRY, OWN)
"""Their objects may hold no field that is not known."""
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")
NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
METADATA_FIELDS = frozenset(
    {
        "annotations",
        "creationTimestamp",
        "deletionGracePeriodSeconds",
        "deletionTimestamp",
        "finalizers",
        "generateName",
        "generation",
        "labels",
        "managedFields",
        "name",
        "namespace",
        "ownerReferences",
        "resourceVersion",
        "selfLink",
        "uid",
    }
)


Spec = (
    VirtualService
    | DestinationRule
    | ServiceEntry
    | WorkloadEntry
    | WorkloadGroup
    | ProxyConfigOfWorkloads
    | Sidecar
    | Gateway
    | BackendTrafficPolicy
    | RateLimitPolicy
    | EnvoyFilter
    | Service
    | Endpoints
    | EndpointSlice
    | Pod
    | Deployment
    | ServiceAccount
    | KubernetesNode
    | MeshConfigMap
    | PeerAuthentication
    | AuthorizationPolicy
    | RequestAuthentication
    | gateway_kinds.HTTPRoute
    | gateway_kinds.GRPCRoute
    | gateway_kinds.Gateway
    | gateway_kinds.GatewayClass
    | gateway_kinds.ReferenceGrant
    | Telemetry
)


@dataclass(frozen=True, slots=True)
class KindShape:
    """Where an API kind's content stands: under `spec`, or beside `metadata` (whole)."""

    spec: type[msgspec.Struct]
    group: str
    versions: tuple[str, ...]
    whole: bool = False


SHAPES: Mapping[str, KindShape] = {
    "VirtualService": KindShape(VirtualService, NETWORKING, ISTIO_VERSIONS),
    "DestinationRule": KindShape(DestinationRule, NETWORKING, ISTIO_VERSIONS),
    "ServiceEntry": KindShape(ServiceEntry, NETWORKING, ISTIO_VERSIONS),
    "WorkloadEntry": KindShape(WorkloadEntry, NETWORKING, ISTIO_VERSIONS),
    "WorkloadGroup": KindShape(WorkloadGroup, NETWORKING, ISTIO_VERSIONS),
    "ProxyConfig": KindShape(ProxyConfigOfWorkloads, NETWORKING, ("v1beta1",)),
    "Sidecar": KindShape(Sidecar, NETWORKING, ISTIO_VERSIONS),
    "Gateway": KindShape(Gateway, NETWORKING, ISTIO_VERSIONS),
    "BackendTrafficPolicy": KindShape(BackendTrafficPolicy, OWN, OWN_VERSIONS),
    "PeerAuthentication": KindShape(PeerAuthentication, SECURITY, SECURITY_VERSIONS),
    "AuthorizationPolicy": KindShape(AuthorizationPolicy, SECURITY, SECURITY_VERSIONS),
    "RequestAuthentication": KindShape(RequestAuthentication, SECURITY, SECURITY_VERSIONS),
    "Telemetry": KindShape(Telemetry, TELEMETRY, TELEMETRY_VERSIONS),
    "RateLimit": KindShape(RateLimitPolicy, OWN, OWN_VERSIONS),
    "EnvoyFilter": KindShape(EnvoyFilter, NETWORKING, ("v1alpha3",)),
    "Service": KindShape(Service, "", ("v1",)),
    "Endpoints": KindShape(Endpoints, "", ("v1",), whole=True),
    "EndpointSlice": KindShape(EndpointSlice, "discovery.k8s.io", ("v1",), whole=True),
    "Pod": KindShape(Pod, "", ("v1",), whole=True),
    "Deployment": KindShape(Deployment, "apps", ("v1",)),
    "Node": KindShape(KubernetesNode, "", ("v1",), whole=True),
    "ServiceAccount": KindShape(ServiceAccount, "", ("v1",), whole=True),
    "ConfigMap": KindShape(MeshConfigMap, "", ("v1",), whole=True),
}


GATEWAY_API: Mapping[str, KindShape] = {
    kind: KindShape(spec, gateway_kinds.GROUP, gateway_kinds.VERSIONS) for kind, spec in gateway_kinds.KINDS.items()
}


def shape_of(kind: str, group: str) -> KindShape | None:
    """Istio and the Gateway API both have a Gateway."""
    return GATEWAY_API.get(kind) if group == gateway_kinds.GROUP else SHAPES.get(kind)


@dataclass(frozen=True, slots=True)
class Object:
    """One object that was read. source: `file.yaml:12`. spec: None for a kind that means nothing to the mesh yet.

    raw: the mapping as written. created: metadata.creationTimestamp, "" where none is given; the older of two objects
    that claim the same wins.
    """

    api_version: str
    kind: str
    namespace: str
    name: str
    source: str
    spec: Spec | None
    raw: Mapping[str, Any] = field(compare=False, repr=False)
    labels: Mapping[str, str] = field(default_factory=dict, repr=False)
    created: str = ""
    rule_sources: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """`file.yaml:15` of each of `spec.rules`."""
    place: Callable[[Path], str] | None = field(default=None, compare=False, repr=False)
    """Where what a path names stands; None where there are no lines."""
    unusable: ConfigurationError | None = field(default=None, repr=False)
    """Why the object itself is not in force; then `spec` is what stands in its place (closing.py). namespace: "" is
    every one."""

    def at(self, path: Path) -> str:
        """`file.yaml:17`: where the field stands, or what is nearest to it."""
        return self.source if self.place is None else self.place(path)

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.kind, self.namespace, self.name)

    @property
    def title(self) -> str:
        """`VirtualService default/reviews`"""
        return f"{self.kind} {self.namespace}/{self.name}"

    @property
    def origin(self) -> str:
        """`VirtualService default/reviews (reviews.yaml)`: what a person would look for. The line is left out, or an
        edit of one object would be a change of all that stand below it."""
        file = self.source.rpartition(":")[0].rpartition("/")[2]
        return f"{self.title} ({file})" if file else self.title

    def same_content(self, other: Object) -> bool:
        """Whether only the place differs where it was read, or how its namespace was given."""
        return self.whole == other.whole

    @property
    def whole(self) -> dict[str, Any]:
        """`raw`, with the namespace in it."""
        return {**self.raw, "metadata": dict(self.raw.get("metadata") or {}, namespace=self.namespace)}

    def __hash__(self) -> int:
        return hash((self.key, self.source))


def dump_yaml(given: Object) -> str:
    """The object as YAML text that parse_text reads to an equal object."""
    return str(yaml.dump(given.whole, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


class _Dumper(yaml.SafeDumper):
    """PyYAML's reader and Kubernetes' do not agree on what is text without quotes: a label `12e4567` is a number to
    the latter. Quoted is what either of them takes for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        odd = not is_text(text) or any(character in text for character in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if odd else "|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_text)
