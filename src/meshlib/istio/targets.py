"""For whom is a policy that names its targets (targetRefs)? A gateway, or the workloads of a Service.

Istio attaches what names a Service to the waypoint in front of it. Here there is none: the rules hold in the processes
that serve it. One that serves several Services can't tell for which it was called but by the Host, so an ALLOW rule
lets in only what was called by the target's names; every other rule holds for all calls to the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from meshlib.errors import ConfigurationError
from meshlib.istio import resources as r
from meshlib.istio.services import Service, fqdn, names
from meshlib.model import ALWAYS, Action, Condition, HeaderMatch, Or, StringMatch, Workload

GATEWAY_LABEL = "gateway.networking.k8s.io/gateway-name"


def targets(spec: object) -> tuple[r.TargetRef, ...]:
    if not isinstance(spec, r.AuthorizationPolicy | r.RequestAuthentication | r.Telemetry):
        return ()
    return (*spec.target_refs, *([spec.target_ref] if spec.target_ref is not None else []))


def is_service(target: r.TargetRef) -> bool:
    return target.kind == "Service" and target.group in ("", "core")


def is_gateway(target: r.TargetRef) -> bool:
    return target.kind == "Gateway" and target.group in ("", "gateway.networking.k8s.io")


def select(given: r.Object, workload: Workload, services: frozenset[str]) -> bool:
    """Whether one of the targets of `given` is this workload's. services: those it serves, by name."""
    if given.namespace != workload.namespace:
        return False
    gateway = dict(workload.labels).get(GATEWAY_LABEL)
    return any(
        each.name in services if is_service(each) else is_gateway(each) and each.name == gateway
        for each in targets(given.spec)
        if each.namespace in ("", given.namespace)
    )


def called_by_name(given: r.Object, action: Action, services: frozenset[str]) -> Condition:
    """What a call must be besides, so that the rule is about it."""
    named = [each.name for each in targets(given.spec) if is_service(each)]
    if action is not Action.ALLOW or not named or services <= set(named):
        return ALWAYS
    hosts = [host for name in named for host in names(fqdn(name, given.namespace), given.namespace)]
    alone = [HeaderMatch(":authority", StringMatch("exact", host, True)) for host in hosts]
    with_port = [HeaderMatch(":authority", StringMatch("prefix", f"{host}:", True)) for host in hosts]
    return Or((*alone, *with_port))


def services_of(objects: Iterable[r.Object], workload: Workload) -> frozenset[str]:
    """The Services of its own namespace that a workload serves: the one it names, and those whose selector fits."""
    labels = dict(workload.labels)
    found = {workload.service} if workload.service else set()
    for each in objects:
        if not isinstance(each.spec, r.Service) or each.namespace != workload.namespace or not each.spec.selector:
            continue
        if all(labels.get(key) == value for key, value in each.spec.selector.items()):
            found.add(each.name)
    return frozenset(found)


def asked_labels(objects: Sequence[r.Object]) -> tuple[frozenset[str], bool]:
    """The labels that decide whether a target is a workload's, and whether the service that it names does."""
    named = {(each.namespace, target.name) for each in objects for target in targets(each.spec) if is_service(target)}
    labels = {GATEWAY_LABEL} if any(targets(each.spec) for each in objects) else set()
    if named:  # how many others it serves counts, too
        for each in objects:
            if isinstance(each.spec, r.Service):
                labels.update(each.spec.selector)
    return frozenset(labels), bool(named)


def problems(objects: Iterable[r.Object], services: Iterable[Service]) -> Iterable[ConfigurationError]:
    """Targets that nobody is, and what names only such."""
    known = {(each.namespace, each.short) for each in services if each.short}
    for given in objects:
        for index, each in enumerate(targets(given.spec)):
            at = f"spec.targetRefs[{index}]" if getattr(given.spec, "target_refs", ()) else "spec.targetRef"
            if each.namespace not in ("", given.namespace):
                reason = "is another namespace: a policy holds in its own, and this target gets no rule of it"
                yield ConfigurationError(given.source, given.title, f"{at}.namespace", reason)
            elif is_service(each) and (given.namespace, each.name) not in known:
                reason = f"there is no Service {given.namespace}/{each.name}: nobody gets these rules"
                yield ConfigurationError(given.source, given.title, f"{at}.name", reason)
            elif not is_service(each) and not is_gateway(each):
                reason = f"{each.kind} can't be a target here: Service and Gateway can, or select workloads by labels"
                yield ConfigurationError(given.source, given.title, f"{at}.kind", reason)
