"""Which kind does a person mean by `vs`, `virtualservices` or `virtualservice.networking.istio.io`?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind with kubectl's names for it. group: "" for Kubernetes' core group."""

    kind: str
    group: str
    plural: str
    short: tuple[str, ...] = ()

    @property
    def resource(self) -> str:
        """`virtualservice.networking.istio.io`, `service`: what kubectl prints before the name."""
        return f"{self.kind.lower()}.{self.group}" if self.group else self.kind.lower()

    @property
    def plural_resource(self) -> str:
        """`virtualservices.networking.istio.io`, `services`: what kubectl says that it did not find."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


NETWORKING, SECURITY, OWN = "networking.istio.io", "security.istio.io", "meshlib.io"
KINDS = (
    Kind("VirtualService", NETWORKING, "virtualservices", ("vs",)),
    Kind("DestinationRule", NETWORKING, "destinationrules", ("dr",)),
    Kind("Gateway", NETWORKING, "gateways", ("gw",)),
    Kind("ServiceEntry", NETWORKING, "serviceentries", ("se",)),
    Kind("WorkloadEntry", NETWORKING, "workloadentries", ("we",)),
    Kind("WorkloadGroup", NETWORKING, "workloadgroups", ("wg",)),
    Kind("Sidecar", NETWORKING, "sidecars"),
    Kind("ProxyConfig", NETWORKING, "proxyconfigs"),
    Kind("EnvoyFilter", NETWORKING, "envoyfilters"),
    Kind("BackendTrafficPolicy", OWN, "backendtrafficpolicies", ("btp",)),
    Kind("RateLimit", OWN, "ratelimits", ("rl",)),
    Kind("PeerAuthentication", SECURITY, "peerauthentications", ("pa",)),
    Kind("AuthorizationPolicy", SECURITY, "authorizationpolicies", ("ap",)),
    Kind("RequestAuthentication", SECURITY, "requestauthentications", ("ra",)),
    Kind("Telemetry", "telemetry.istio.io", "telemetries", ("telemetry",)),
    Kind("WasmPlugin", "extensions.istio.io", "wasmplugins"),
    Kind("HTTPRoute", "gateway.networking.k8s.io", "httproutes"),
    Kind("GRPCRoute", "gateway.networking.k8s.io", "grpcroutes"),
    Kind("GatewayClass", "gateway.networking.k8s.io", "gatewayclasses", ("gc",)),
    Kind("ReferenceGrant", "gateway.networking.k8s.io", "referencegrants", ("refgrant",)),
    Kind("Service", "", "services", ("svc",)),
    Kind("Endpoints", "", "endpoints", ("ep",)),
    Kind("EndpointSlice", "discovery.k8s.io", "endpointslices"),
    Kind("ServiceAccount", "", "serviceaccounts", ("sa",)),
    Kind("Namespace", "", "namespaces", ("ns",)),
    Kind("Pod", "", "pods", ("po",)),
    Kind("ConfigMap", "", "configmaps", ("cm",)),
    Kind("Secret", "", "secrets"),
    Kind("Deployment", "apps", "deployments", ("deploy",)),
    Kind("StatefulSet", "apps", "statefulsets", ("sts",)),
    Kind("DaemonSet", "apps", "daemonsets", ("ds",)),
    Kind("ReplicaSet", "apps", "replicasets", ("rs",)),
    Kind("Job", "batch", "jobs"),
    Kind("Ingress", "networking.k8s.io", "ingresses", ("ing",)),
)

_POSITIONS = {(kind.kind, kind.group): position for position, kind in enumerate(KINDS)}
_BY_KIND = {kind.kind: kind for kind in KINDS}
_BY_WORD = {
    word: kind
    for kind in reversed(KINDS)
    for word in (
        kind.kind.lower(),
        kind.plural,
        kind.resource,
        kind.plural_resource,
        *kind.short,
    )
}


def find_kind(word: str) -> Kind | None:
    """The kind that a person means, None if there is no such."""
    return _BY_WORD.get(word.lower())


def named(kind: str, api_version: str = "") -> Kind:
    """The kind of an object. One that is not in the table gets its group from the object itself."""
    group = api_version.partition("/")[0] if "/" in api_version else ""
    known = _BY_KIND.get(kind)
    if known is not None and (not api_version or known.group == group):
        return known
    return Kind(kind, group, f"{kind.lower()}s")


def position(kind: str, group: str = "") -> int:
    """Where a kind comes in a list of all: as in the table, what is not in it at the end."""
    return _POSITIONS.get((kind, group), len(KINDS))
