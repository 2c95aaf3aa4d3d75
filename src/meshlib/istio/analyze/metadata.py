"""Does Istio know an annotation, and on this kind of object? A misspelt one does nothing, and nobody says so.
(IST0107, IST0108) Source: istio/api annotation/annotations.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from meshlib.istio.analyze.messages import MISPLACED, UNKNOWN_ANNOTATION, Message, annotations_of
from meshlib.istio.analyze.scene import SYSTEM, Scene

_OF_PODS = {
    "sidecar.istio.io": """inject status rewriteAppHTTPProbers controlPlaneAuthPolicy discoveryAddress proxyImage
        proxyImageType proxyCPU proxyCPULimit proxyMemory proxyMemoryLimit interceptionMode bootstrapOverride
        statsInclusionPrefixes statsInclusionSuffixes statsInclusionRegexps statsHistogramBuckets statsCompression
        statsEvictionInterval userVolume userVolumeMount enableCoreDump logLevel componentLogLevel agentLogLevel
        extraStatTags nativeSidecar""",
    "status.sidecar.istio.io": "port",
    "readiness.status.sidecar.istio.io": "initialDelaySeconds periodSeconds failureThreshold applicationPorts",
    "traffic.sidecar.istio.io": """includeOutboundIPRanges excludeOutboundIPRanges includeInboundPorts
        excludeInboundPorts includeOutboundPorts excludeOutboundPorts excludeInterfaces kubevirtInterfaces""",
    "istio.io": "reroute-virtual-interfaces rev",
    "proxy.istio.io": "config overrides",
    "inject.istio.io": "templates",
    "prometheus.istio.io": "merge-metrics",
    "ambient.istio.io": "redirection bypass-inbound-capture dns-capture",
    "alpha.istio.io": "identity",
}
_OTHERS = {
    "networking.istio.io/exportTo": ("Service",),
    "networking.istio.io/traffic-distribution": ("Service", "ServiceEntry", "Namespace"),
    "networking.istio.io/address-type": ("Gateway",),
    "networking.istio.io/service-type": ("Gateway",),
    "alpha.istio.io/kubernetes-serviceaccounts": ("Service",),
    "alpha.istio.io/canonical-serviceaccounts": ("Service",),
    "istio.io/dry-run": ("AuthorizationPolicy",),
    "istio.io/autoRegistrationGroup": ("WorkloadEntry",),
    "istio.io/workloadController": ("WorkloadEntry",),
    "istio.io/connectedAt": ("WorkloadEntry",),
    "istio.io/disconnectedAt": ("WorkloadEntry",),
    "topology.istio.io/controlPlaneClusters": ("Namespace",),
    "ambient.istio.io/waypoint-inbound-binding": ("GatewayClass",),
    "galley.istio.io/analyze-suppress": (),
    "install.operator.istio.io/chart-owner": (),
    "install.operator.istio.io/owner-generation": (),
    "install.operator.istio.io/version": (),
}
_WITH_PODS = ("Pod", "WorkloadGroup")
"""Not what makes pods: there they stand in the template, and have no effect beside it."""
KNOWN: Mapping[str, tuple[str, ...]] = {
    **{f"{prefix}/{name}": _WITH_PODS for prefix, names in _OF_PODS.items() for name in names.split()},
    **_OTHERS,
}
"""By the annotation: the kinds that may bear it, () for any."""


def check(scene: Scene) -> Iterator[Message]:
    for each in scene.objects:
        if each.namespace in SYSTEM and each.kind != "Namespace":
            continue
        for name in annotations_of(each):
            prefix = name.partition("/")[0]
            if prefix != "istio.io" and not prefix.endswith(".istio.io"):
                continue
            kinds = KNOWN.get(name)
            path = ("metadata", "annotations", name)
            if kinds is None:
                yield UNKNOWN_ANNOTATION.at(each, path, name)
            elif kinds and each.kind not in kinds:
                yield MISPLACED.at(each, path, name, kinds[0])
