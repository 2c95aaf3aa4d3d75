"""What is valid and has no effect, or not the one that its author expects?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from meshlib.istio import envoy_filters, gateway_kinds
from meshlib.istio import resources as r
from meshlib.istio.checks.labels import why_nothing_has
from meshlib.istio.checks.parts import msgspec_name
from meshlib.istio.checks.telemetry import telemetry_warnings
from meshlib.istio.problems import ConfigurationWarning

_NOT_YET_GROUPS = ("istio.io", "gateway.networking.k8s.io", "gateway.networking.x-k8s.io")


def _group(given: r.Object) -> str:
    return given.api_version.rpartition("/")[0]


def effects_of(given: r.Object) -> Iterator[ConfigurationWarning]:
    group = _group(given)
    if given.spec is None:
        if group.endswith(_NOT_YET_GROUPS):
            yield ConfigurationWarning(given.source, given.title, "", "has no effect yet")
        return
    if isinstance(given.spec, r.WorkloadGroup):
        reason = "has no effect: no sidecar registers itself; a WorkloadEntry says all of its workload"
        yield ConfigurationWarning(given.source, given.title, "", reason)
    if isinstance(given.spec, r.ProxyConfigOfWorkloads):
        yield ConfigurationWarning(given.source, given.title, "", "has no effect: there is no proxy to start with it")
    for field, selected in _selectors(given.spec):
        if why := why_nothing_has(selected):
            yield ConfigurationWarning(given.source, given.title, field, f"selects nothing: {why}")
    for field in _unsupported(given.spec, "spec"):
        yield ConfigurationWarning(given.source, given.title, field, "has no effect yet")
    if group == gateway_kinds.GROUP:
        for field in gateway_kinds.unknown(given.spec, given.raw.get("spec")):
            yield ConfigurationWarning(given.source, given.title, field, "has no effect yet")
    yield from telemetry_warnings(given)
    if isinstance(given.spec, r.DestinationRule):
        for field, reason in _pointless(given.spec):
            yield ConfigurationWarning(given.source, given.title, field, reason)
    if isinstance(given.spec, r.ServiceEntry) and given.spec.resolution == "NONE" and given.spec.workload_selector:
        reason = "has no effect with resolution NONE"
        yield ConfigurationWarning(given.source, given.title, "spec.workloadSelector", reason)
    if isinstance(given.spec, r.ServiceEntry) and _is_empty(given.spec):
        reason = "are none, and resolution STATIC looks nothing up: every call is answered 503"
        yield ConfigurationWarning(given.source, given.title, "spec.endpoints", reason)
    if isinstance(given.spec, r.EnvoyFilter):
        for passed_over in envoy_filters.patches(given.spec)[1]:
            at = f"spec.{passed_over.at}" if passed_over.at else ""
            yield ConfigurationWarning(given.source, given.title, at, passed_over.reason)
    if isinstance(given.spec, r.VirtualService):
        is_of_mesh = bool(given.spec.hosts) and set(given.spec.gateways) <= {"mesh"}
        for index, rule in enumerate(given.spec.http):
            if rule.cors_policy is not None and is_of_mesh:
                reason = "has no effect within the mesh: its calls come from no page"
                yield ConfigurationWarning(given.source, given.title, f"spec.http[{index}].corsPolicy", reason)
            for kind, fault in (("delay", rule.fault and rule.fault.delay), ("abort", rule.fault and rule.fault.abort)):
                if fault and fault.percentage is None and not getattr(fault, "percent", None):
                    field = f"spec.http[{index}].fault.{kind}.percentage"
                    yield ConfigurationWarning(
                        given.source, given.title, field, "is missing, so no request is affected"
                    )


def _is_empty(spec: r.ServiceEntry) -> bool:
    return spec.resolution == "STATIC" and not spec.endpoints and spec.workload_selector is None


def _selectors(spec: r.Spec) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Selectors whose labels Istio's webhook takes as they come."""
    kinds = r.PeerAuthentication | r.AuthorizationPolicy | r.RequestAuthentication | r.Telemetry
    if isinstance(spec, kinds) and spec.selector is not None:
        yield "spec.selector.matchLabels", spec.selector.match_labels


def _pointless(spec: r.DestinationRule) -> Iterator[tuple[str, str]]:
    """What is valid, and can't have the effect that its author expects."""
    policy = spec.traffic_policy
    if policy is None:
        return
    levels: list[tuple[str, r.TrafficPolicy | r.PortTrafficPolicy]] = [("spec.trafficPolicy", policy)]
    levels += [
        (f"spec.trafficPolicy.portLevelSettings[{n}]", each) for n, each in enumerate(policy.port_level_settings)
    ]
    for at, each in levels:
        tls, balancer = each.tls, each.load_balancer
        if tls is not None and tls.mode == "SIMPLE" and (tls.client_certificate or tls.private_key):
            yield f"{at}.tls.clientCertificate", "has no effect with SIMPLE: a certificate is shown with MUTUAL"
        if balancer is None or each.outlier_detection is not None:
            continue
        # Nobody fails over from an endpoint that nobody finds to be bad (Istio, ValidateLocalityLbSetting).
        for name in ("locality_lb_setting", "zone_aware_lb_setting"):
            setting = getattr(balancer, name)
            for kind in ("failover", "failover_priority"):
                if setting is not None and getattr(setting, kind):
                    field = f"{at}.loadBalancer.{msgspec_name(name)}.{msgspec_name(kind)}"
                    yield field, "has no effect without outlierDetection"


_HARMLESS = frozenset({"stat_prefix"})


def _unsupported(value: Any, at: str) -> Iterator[str]:
    if isinstance(value, msgspec.Struct):
        annotations = _annotations(type(value))
        for name in value.__struct_fields__:
            found = getattr(value, name)
            encoded = dict(zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True))[name]
            if annotations.get(name) == "Unsupported":
                if found is not None and name not in _HARMLESS:
                    yield f"{at}.{encoded}"
            else:
                yield from _unsupported(found, f"{at}.{encoded}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _unsupported(each, f"{at}[{index}]")


def _annotations(struct: type) -> Mapping[str, Any]:
    return {
        name: hint for each in reversed(struct.__mro__) for name, hint in vars(each).get("__annotations__", {}).items()
    }
