"""What does a Gateway of the Gateway API listen on? Its listeners -> Istio's Gateways, and what each listener is told.

HTTP, and HTTPS that ends here, with one Secret of the Gateway's own namespace as its certificate: a gateway process
reads those of its own namespace alone. Everything else is refused listener by listener, with the specification's
reasons (gateway-api.sigs.k8s.io/reference/spec, ListenerConditionType).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from meshlib.errors import ConfigurationError
from meshlib.istio import gateway_kinds as g
from meshlib.istio import resources as r
from meshlib.model.values import dataclass

CLASS = "meshlib"
"""The class of Gateways that are ours, besides those whose GatewayClass names our controller."""
LABEL = "gateway.networking.k8s.io/gateway-name"
"""The label of a Gateway's pods."""
NAME_LABEL = "kubernetes.io/metadata.name"
"""The label that Kubernetes gives every namespace."""
ROUTE_KINDS = ("HTTPRoute", "GRPCRoute")


class Condition(NamedTuple):
    is_so: bool
    reason: str
    message: str = ""

    def told(self, name: str) -> dict[str, object]:
        """As a status has it, but for times and generations."""
        return {"type": name, "status": str(self.is_so), "reason": self.reason, "message": self.message}


@dataclass(slots=True)
class Listener:
    """attached: how many routes it has taken."""

    owner: r.Object
    spec: g.GatewayListener
    accepted: Condition
    resolved: Condition
    conflicted: Condition
    attached: int = 0

    @property
    def gateway_name(self) -> str:
        return f"{self.owner.name}~{self.spec.name}"

    @property
    def is_served(self) -> bool:
        return self.accepted.is_so and self.resolved.is_so and not self.conflicted.is_so

    @property
    def kinds(self) -> list[str]:
        """The routes' kinds that it takes."""
        asked = self.spec.allowed_routes.kinds
        return [each.kind for each in asked if _is_known(each)] if asked else list(ROUTE_KINDS)

    @property
    def why(self) -> str:
        """What is wrong with it, "" for nothing."""
        wrong = (self.conflicted, *(each for each in (self.accepted, self.resolved) if not each.is_so))
        return next((each.message for each in wrong if each.message), "")

    def takes(self, route: r.Object, namespaces: Mapping[str, Mapping[str, str]]) -> bool:
        """Whether allowedRoutes lets this route attach. namespaces: their labels, by name."""
        allowed = self.spec.allowed_routes
        if route.kind not in self.kinds:
            return False
        if allowed.namespaces.from_ == "All":
            return True
        if allowed.namespaces.from_ == "Selector":
            labels = {NAME_LABEL: route.namespace, **namespaces.get(route.namespace, {})}
            return selects(allowed.namespaces.selector, labels)
        return allowed.namespaces.from_ == "Same" and route.namespace == self.owner.namespace


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Kubernetes' label selector. What can't be understood selects nothing."""
    wanted = selector.get("matchLabels") or {}
    if not isinstance(wanted, Mapping) or any(labels.get(key) != value for key, value in wanted.items()):
        return False
    expressions = selector.get("matchExpressions") or []
    return isinstance(expressions, list) and all(_fits(each, labels) for each in expressions)


def _fits(expression: Any, labels: Mapping[str, str]) -> bool:
    if not isinstance(expression, Mapping):
        return False
    key, values = str(expression.get("key", "")), expression.get("values") or []
    match expression.get("operator"):
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
    return False


def listeners_of(
    objects: Iterable[r.Object], grants: Sequence[r.Object]
) -> tuple[dict[tuple[str, str], list[Listener]], list[ConfigurationError]]:
    """Those of our Gateways, by the Gateway's namespace and name; with what is wrong with them."""
    given = list(objects)
    classes = {CLASS}
    for each in given:
        if isinstance(each.spec, g.GatewayClass) and each.spec.controller_name == g.CONTROLLER:
            classes.add(each.name)
    found: dict[tuple[str, str], list[Listener]] = {}
    problems: list[ConfigurationError] = []
    for each in given:
        if isinstance(each.spec, g.Gateway) and each.spec.gateway_class_name in classes:
            made = found[each.namespace, each.name] = list(_listeners(each, each.spec, grants))
            for index, listener in enumerate(made):
                if listener.why:
                    at = f"spec.listeners[{index}]"
                    reason = f"the listener {listener.spec.name!r} is not served: {listener.why}"
                    problems.append(ConfigurationError(each.source, each.title, at, reason))
    return found, problems


def _listeners(owner: r.Object, spec: g.Gateway, grants: Sequence[r.Object]) -> Iterator[Listener]:
    places = Counter((each.port, each.protocol, each.hostname.lower()) for each in spec.listeners)
    protocols: dict[int, set[str]] = {}
    for each in spec.listeners:
        protocols.setdefault(each.port, set()).add(each.protocol)
    for each in spec.listeners:
        conflicted = Condition(False, "NoConflicts")
        if len(protocols[each.port]) > 1:
            conflicted = Condition(True, "ProtocolConflict", f"port {each.port} has listeners of several protocols")
        elif places[each.port, each.protocol, each.hostname.lower()] > 1:
            conflicted = Condition(True, "HostnameConflict", f"port {each.port} has another listener of this hostname")
        accepted = _accepted(spec, each)
        resolved = _resolved(owner, each, grants) if accepted.is_so else Condition(True, "ResolvedRefs")
        yield Listener(owner, each, accepted, resolved, conflicted)


def _accepted(gateway: g.Gateway, listener: g.GatewayListener) -> Condition:
    if listener.protocol not in ("HTTP", "HTTPS"):
        reason = f"it speaks {listener.protocol}, and a gateway speaks HTTP and HTTPS"
        return Condition(False, "UnsupportedProtocol", reason)
    if listener.protocol == "HTTP":
        return Condition(True, "Accepted")
    if listener.tls is not None and listener.tls.mode != "Terminate":
        return Condition(False, "UnsupportedValue", f"tls.mode {listener.tls.mode} is not there: Terminate is")
    # Nobody is let in without the check that was asked for.
    asks_all = gateway.tls is not None and gateway.tls.frontend is not None
    if asks_all or (listener.tls is not None and listener.tls.frontend_validation is not None):
        reason = "clients' certificates are asked for, which an Istio Gateway with tls.mode MUTUAL can do"
        return Condition(False, "UnsupportedValue", reason)
    return Condition(True, "Accepted")


def _resolved(owner: r.Object, listener: g.GatewayListener, grants: Sequence[r.Object]) -> Condition:
    for kind in listener.allowed_routes.kinds:
        if not _is_known(kind):
            return Condition(False, "InvalidRouteKinds", f"it asks for routes of kind {kind.kind}, which are not there")
    if listener.protocol != "HTTPS":
        return Condition(True, "ResolvedRefs")
    refs = [] if listener.tls is None else listener.tls.certificate_refs
    if len(refs) != 1:
        reason = f"tls.certificateRefs has to name one Secret, and names {len(refs) or 'none'}"
        return Condition(False, "InvalidCertificateRef", reason)
    (ref,) = refs
    home = ref.namespace or owner.namespace
    if ref.group not in ("", "core") or ref.kind != "Secret":
        return Condition(False, "InvalidCertificateRef", f"{ref.kind} {home}/{ref.name} is no certificate: a Secret is")
    if home != owner.namespace:
        if not is_granted(grants, owner, "Secret", ref.name, home):
            reason = f"no ReferenceGrant in {home} lets Gateways of {owner.namespace} use Secret {home}/{ref.name}"
            return Condition(False, "RefNotPermitted", reason)
        reason = f"Secret {home}/{ref.name}: a gateway reads Secrets of its own namespace, {owner.namespace}, only"
        return Condition(False, "InvalidCertificateRef", reason)
    return Condition(True, "ResolvedRefs")


def _is_known(kind: g.RouteKind) -> bool:
    return kind.group == g.GROUP and kind.kind in ROUTE_KINDS


def is_granted(grants: Iterable[r.Object], asker: r.Object, kind: str, name: str, namespace: str) -> bool:
    """Whether a ReferenceGrant of `namespace` lets an object of the asker's kind and namespace name this one."""
    for each in grants:
        spec = each.spec
        if each.namespace != namespace or not isinstance(spec, g.ReferenceGrant):
            continue
        is_from = any(
            (one.group, one.kind, one.namespace) == (g.GROUP, asker.kind, asker.namespace) for one in spec.from_
        )
        is_to = any(one.group in ("", "core") and one.kind == kind and one.name in ("", name) for one in spec.to)
        if is_from and is_to:
            return True
    return False


def gateway_of(listener: Listener) -> r.Object:
    """The Istio Gateway that listens as it says."""
    owner, spec = listener.owner, listener.spec
    tls: r.ServerTLSSettings | None = None
    if spec.protocol == "HTTPS" and spec.tls is not None:
        tls = r.ServerTLSSettings(mode="SIMPLE", credential_name=spec.tls.certificate_refs[0].name)
    server = r.Server(r.GatewayPort(spec.port, spec.protocol, spec.name), [spec.hostname or "*"], tls=tls)
    return r.Object(
        f"{r.NETWORKING}/v1",
        "Gateway",
        owner.namespace,
        listener.gateway_name,
        owner.source,
        r.Gateway([server], {LABEL: owner.name}),
        {},
        created=owner.created,
    )


# What Gateways are told


@dataclass(frozen=True, slots=True)
class GatewayStatus:
    gateway: r.Object
    listeners: tuple[Listener, ...]

    def told(self, addresses: Sequence[Mapping[str, object]]) -> dict[str, object]:
        """Its `status`, but for times and generations. addresses: of the Services in front of its processes."""
        bad = [each for each in self.listeners if not each.is_served]
        accepted = Condition(True, "Accepted")
        if bad:
            names = ", ".join(each.spec.name for each in bad)
            accepted = Condition(len(bad) < len(self.listeners), "ListenersNotValid", f"not served: {names}")
        programmed = Condition(True, "Programmed")
        if not accepted.is_so:
            programmed = Condition(False, "Invalid", accepted.message)
        elif not addresses:
            reason = f"no Service of {self.gateway.namespace} selects pods labelled {LABEL}: {self.gateway.name}"
            programmed = Condition(False, "AddressNotAssigned", reason)
        return {
            "addresses": [dict(each) for each in addresses],
            "conditions": [accepted.told("Accepted"), programmed.told("Programmed")],
            "listeners": [_told(each) for each in self.listeners],
        }


def _told(listener: Listener) -> dict[str, object]:
    programmed = Condition(True, "Programmed") if listener.is_served else Condition(False, "Invalid", listener.why)
    return {
        "name": listener.spec.name,
        "supportedKinds": [{"group": g.GROUP, "kind": kind} for kind in listener.kinds],
        "attachedRoutes": listener.attached,
        "conditions": [
            listener.accepted.told("Accepted"),
            listener.conflicted.told("Conflicted"),
            listener.resolved.told("ResolvedRefs"),
            programmed.told("Programmed"),
        ],
    }
