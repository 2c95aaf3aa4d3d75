"""Which messages are there? Istio's codes, levels and words: who greps for them, or suppresses them, finds the same."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from enum import IntEnum

from meshlib.istio import resources as r
from meshlib.istio.documents import Path
from meshlib.model.values import dataclass

DOCUMENTATION = "https://istio.io/latest/docs/reference/config/analysis"
SUPPRESS = "galley.istio.io/analyze-suppress"


class Level(IntEnum):
    INFO = 0
    WARNING = 1
    ERROR = 2

    @property
    def word(self) -> str:
        return self.name.capitalize()


@dataclass(frozen=True, slots=True)
class Kind:
    """name: as Istio calls it. template: for str.format."""

    code: str
    name: str
    level: Level
    template: str

    def at(self, given: r.Object, path: Path, *words: object) -> Message:
        """What is to be said of the field of `given` that `path` names."""
        hidden = str(annotations_of(given).get(SUPPRESS, ""))
        codes = {part.strip() for part in hidden.split(",")}
        text = self.template.format(*words)
        return Message(self, text, title_of(given), given.at(path), bool(codes & {"*", self.code}))


@dataclass(frozen=True, slots=True)
class Message:
    """origin: `VirtualService default/reviews`. reference: `reviews.yaml:12`, "" for an object of a cluster."""

    kind: Kind
    text: str
    origin: str
    reference: str
    is_suppressed: bool = False

    @property
    def code(self) -> str:
        return self.kind.code

    @property
    def level(self) -> Level:
        return self.kind.level

    @property
    def documentation(self) -> str:
        return f"{DOCUMENTATION}/{self.code.lower()}/"

    def shown(self, reference: str | None = None) -> dict[str, str]:
        """As istioctl has it in JSON and YAML. reference: where another form of it is to be shown."""
        reference = self.reference if reference is None else reference
        place = {"reference": reference} if reference else {}
        return {
            "code": self.code,
            "documentationUrl": self.documentation,
            "level": self.level.word,
            "message": self.text,
            "origin": self.origin,
            **place,
        }

    def line(self, reference: str | None = None) -> str:
        """As istioctl prints it."""
        place = self.reference if reference is None else reference
        where = f"{self.origin} {place}".rstrip()
        return f"{self.level.word} [{self.code}] ({where}) {self.text}"

    @property
    def in_status(self) -> dict[str, object]:
        """As istiod writes it to an object's status (AnalysisMessageBase)."""
        return {"type": {"code": self.code}, "level": self.level.name, "documentationUrl": self.documentation}


@dataclass(frozen=True, slots=True)
class Suppression:
    """`IST0102=Namespace frod`, `IST0103=Pod *.testing`: this code, on the objects that the pattern fits."""

    code: str
    pattern: str

    @classmethod
    def parse(cls, text: str) -> Suppression:
        """Raises ValueError."""
        code, mark, pattern = text.partition("=")
        if not mark or "=" in pattern or not code:
            raise ValueError(f"{text} is not a valid suppression value: write CODE=KIND NAME.NAMESPACE")
        return cls(code, pattern)

    def hides(self, message: Message) -> bool:
        kind, _, name = message.origin.partition(" ")
        namespace, slash, short = name.rpartition("/")
        resource = f"{kind} {short}.{namespace}" if slash else f"{kind} {name}"
        return message.code == self.code and fnmatch.fnmatchcase(resource, self.pattern)


def title_of(given: r.Object) -> str:
    """`VirtualService default/reviews`; cluster-wide objects have no namespace to show."""
    return f"{given.kind} {given.name}" if given.kind in ("Namespace", "Node") else given.title


def annotations_of(given: r.Object) -> Mapping[str, object]:
    found = (given.raw.get("metadata") or {}).get("annotations")
    return found if isinstance(found, dict) else {}


def listed(values: object) -> str:
    """As Go's %v prints a slice."""
    return f"[{' '.join(map(str, values))}]" if isinstance(values, list | tuple) else str(values)


_INFO, _WARNING, _ERROR = Level.INFO, Level.WARNING, Level.ERROR
DEPRECATED = Kind("IST0002", "Deprecated", _WARNING, "Deprecated: {}")
NOT_FOUND = Kind("IST0101", "ReferencedResourceNotFound", _ERROR, 'Referenced {} not found: "{}"')
NOT_INJECTED = Kind(
    "IST0102",
    "NamespaceNotInjected",
    _INFO,
    "The namespace is not enabled for Istio injection. Run 'kubectl label namespace {0} istio-injection=enabled' to "
    "enable it, or 'kubectl label namespace {0} istio-injection=disabled' to explicitly mark it as not needing "
    "injection.",
)
SCHEMA_ERROR = Kind("IST0106", "SchemaValidationError", _ERROR, "Schema validation error: {}")
MISPLACED = Kind("IST0107", "MisplacedAnnotation", _WARNING, "Misplaced annotation: {} can only be applied to {}")
UNKNOWN_ANNOTATION = Kind("IST0108", "UnknownAnnotation", _WARNING, "Unknown annotation: {}")
SAME_HOST = Kind(
    "IST0109",
    "ConflictingMeshGatewayVirtualServiceHosts",
    _ERROR,
    "The VirtualServices {} associated with mesh gateway define the same host {} which can lead to undefined behavior. "
    "This can be fixed by merging the conflicting VirtualServices into a single resource.",
)
SAME_PODS = Kind(
    "IST0110",
    "ConflictingSidecarWorkloadSelectors",
    _ERROR,
    'The Sidecars {} in namespace "{}" select the same workload pod "{}", which can lead to undefined behavior.',
)
NO_SELECTORS = Kind(
    "IST0111",
    "MultipleSidecarsWithoutWorkloadSelectors",
    _ERROR,
    'The Sidecars {} in namespace "{}" have no workload selector, which can lead to undefined behavior.',
)
WHICH_PORT = Kind(
    "IST0112",
    "VirtualServiceDestinationPortSelectorRequired",
    _ERROR,
    'This VirtualService routes to a service "{}" that exposes multiple ports {}. Specifying a port in the destination '
    "is required to disambiguate.",
)
MTLS_CONFLICT = Kind(
    "IST0113",
    "MTLSPolicyConflict",
    _ERROR,
    "A DestinationRule and Policy are in conflict with regards to mTLS for host {}. The DestinationRule "
    '"{}" specifies that mTLS must be {} but the Policy object "{}" specifies {}.',
)
TWO_PROTOCOLS = Kind(
    "IST0116",
    "DeploymentAssociatedToMultipleServices",
    _WARNING,
    "This deployment {} is associated with multiple services using port {} but different protocols: {}",
)
PORT_NAME = Kind(
    "IST0118",
    "PortNameIsNotUnderNamingConvention",
    _INFO,
    "Port name {} (port: {}, targetPort: {}) doesn't follow the naming convention of Istio port.",
)
INJECTION_LABELS = Kind(
    "IST0123",
    "NamespaceMultipleInjectionLabels",
    _WARNING,
    "The namespace has more than one type of injection labels {}, which may lead to undefined behavior. Make sure only "
    "one injection label exists.",
)
NO_WORKLOADS = Kind(
    "IST0127",
    "NoMatchingWorkloadsFound",
    _WARNING,
    "No matching workloads for this resource with the following labels: {}",
)
UNREACHABLE = Kind("IST0130", "VirtualServiceUnreachableRule", _WARNING, "VirtualService rule {} not used ({}).")
INEFFECTIVE = Kind(
    "IST0131",
    "VirtualServiceIneffectiveMatch",
    _INFO,
    "VirtualService rule {} match {} is not used (duplicate/overlapping match in rule {}).",
)
NOT_IN_GATEWAY = Kind(
    "IST0132",
    "VirtualServiceHostNotFoundInGateway",
    _WARNING,
    "one or more host {} defined in VirtualService {} not found in Gateway {}.",
)
SCHEMA_WARNING = Kind("IST0133", "SchemaWarning", _WARNING, "Schema validation warning: {}")
TWO_PORTS = Kind(
    "IST0137",
    "DeploymentConflictingPorts",
    _WARNING,
    'This deployment {} is associated with multiple services {} using targetPort "{}" but different ports: {}.',
)
SAME_CERTIFICATE = Kind(
    "IST0138",
    "GatewayDuplicateCertificate",
    _WARNING,
    "Duplicate certificate in multiple gateways {} may cause 404s if clients re-use HTTP2 connections.",
)
NOT_AT_THE_GATEWAY = Kind(
    "IST0140",
    "IngressRouteRulesNotAffected",
    _WARNING,
    "Subset in virtual service {} has no effect on ingress gateway {} requests",
)
SAME_SERVERS = Kind(
    "IST0145",
    "ConflictingGateways",
    _ERROR,
    "Conflict with gateways {} (workload selector {}, port {}, hosts {}).",
)
NOBODY_VERIFIES = Kind(
    "IST0149",
    "JwtClaimBasedRoutingWithoutRequestAuthN",
    _ERROR,
    "The virtual service uses the JWT claim based routing (key: {}) but found no request authentication for the "
    "gateway ({}) pod ({}). The request authentication must first be applied for the gateway pods to validate the JWT "
    "token and make the claims available for routing.",
)
EXTERNAL_PORT_NAME = Kind(
    "IST0150",
    "ExternalNameServiceTypeInvalidPortName",
    _WARNING,
    "Port name for ExternalName service is invalid. Proxy may prevent tcp named ports and unmatched traffic for ports "
    "serving TCP protocol from being forwarded correctly",
)
TELEMETRY_OF_SAME_PODS = Kind(
    "IST0159",
    "ConflictingTelemetryWorkloadSelectors",
    _ERROR,
    'The Telemetries {} in namespace "{}" select the same workload pod "{}", which can lead to undefined behavior.',
)
TELEMETRY_WITHOUT_SELECTORS = Kind(
    "IST0160",
    "MultipleTelemetriesWithoutWorkloadSelectors",
    _ERROR,
    'The Telemetries {} in namespace "{}" have no workload selector, which can lead to undefined behavior.',
)
PORT_OF_NO_SERVICE = Kind(
    "IST0162",
    "GatewayPortNotDefinedOnService",
    _WARNING,
    "The gateway is listening on a target port (port {}) that is not defined in the Service associated with its "
    "workload instances (Pod selector {}). If you need to access the gateway port through the gateway Service, it will "
    "not be available.",
)
INTERNAL_GATEWAY = Kind(
    "IST0165",
    "ReferencedInternalGateway",
    _WARNING,
    "Gateway reference in VirtualService {} is to an implementation-generated internal Gateway: {}.",
)
NEGATIVE_CONDITION = Kind(
    "IST0171",
    "NegativeConditionStatus",
    _WARNING,
    "A condition with a negative status is present: type={}, reason={}, message={}.",
)
EMPTY_SUBSET = Kind(
    "IST0173",
    "DestinationRuleSubsetNotSelectPods",
    _ERROR,
    "The Subset {} defined in the DestinationRule does not select any pods. Which may lead to 503 UH "
    "(NoHealthyUpstream).",
)
UNKNOWN_RULE_HOST = Kind(
    "IST0174",
    "UnknownDestinationRuleHost",
    _WARNING,
    "The host {} defined in the DestinationRule does not match any services in the mesh.",
)
TWO_ENTRIES = Kind(
    "IST0177",
    "ConflictingServiceEntryProtocol",
    _WARNING,
    'Multiple ServiceEntries ({}) define the same host "{}" and port {} with conflicting protocols ({}).',
)
KINDS = tuple(each for each in list(globals().values()) if isinstance(each, Kind))
