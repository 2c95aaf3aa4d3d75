"""Which security objects does Istio's webhook refuse? (istio/istio pkg/config/validation, security.)"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from meshlib.istio import resources as r
from meshlib.istio.checks.parts import at_least
from meshlib.istio.problems import Refused

KEYS = frozenset(
    {
        "source.ip",
        "remote.ip",
        "source.namespace",
        "source.principal",
        "source.serviceAccount",
        "source.trustDomain",
        "request.auth.principal",
        "request.auth.audiences",
        "request.auth.presenter",
        "destination.ip",
        "destination.port",
        "connection.sni",
    }
)
_NESTED = re.compile(r"(request\.headers|request\.auth\.claims)((?:\[[^\[\]]+\])+)\Z")
_TEMPLATE = re.compile(r"\{\*\*?\}")


def check_security(spec: r.PeerAuthentication | r.AuthorizationPolicy | r.RequestAuthentication) -> None:
    """Raises Refused."""
    if spec.selector is not None:
        check_selector(spec.selector)
    if isinstance(spec, r.PeerAuthentication):
        if spec.port_level_mtls and (spec.selector is None or not spec.selector.match_labels):
            raise Refused("portLevelMtls", "needs a selector: ports are a workload's")
        for port in spec.port_level_mtls:
            _port(port, f"portLevelMtls.{port}")
        return
    if spec.selector is not None and (spec.target_ref is not None or spec.target_refs):
        raise Refused("targetRefs", "is given beside selector: only one of them may be")
    if spec.target_ref is not None and spec.target_refs:
        raise Refused("targetRefs", "is given beside targetRef: only one of them may be")
    check_targets(spec.target_ref, spec.target_refs)
    if isinstance(spec, r.RequestAuthentication):
        for index, rule in enumerate(spec.jwt_rules):
            _jwt(rule, f"jwtRules[{index}]")
    else:
        _policy(spec)


def check_selector(selector: r.WorkloadSelector) -> None:
    """Raises Refused."""
    if selector.labels:
        raise Refused("selector.labels", "there is no such field; there is matchLabels")
    for key, value in selector.match_labels.items():
        if not key or "*" in key or "*" in value:
            raise Refused("selector.matchLabels", "may hold no empty key and no wildcard")
        if len(value) > 63:
            raise Refused("selector.matchLabels", f"{value!r} is longer than the 63 characters that a label may have")


def check_targets(one: r.TargetRef | None, many: Iterable[r.TargetRef]) -> None:
    """Raises Refused: validatePolicyTargetReference."""
    given = [(f"targetRefs[{index}]", each) for index, each in enumerate(many)]
    for at, target in [*([("targetRef", one)] if one is not None else []), *given]:
        if not target.name:
            raise Refused(f"{at}.name", "is empty")
        if target.namespace:
            raise Refused(f"{at}.namespace", "must not be given: a target is in the policy's own namespace")
        if (target.group or "core", target.kind) not in _TARGETS:
            raise Refused(at, f"can be a Service, ServiceEntry, Gateway or GatewayClass: {target.group}/{target.kind}")


_TARGETS = frozenset(
    {
        ("core", "Service"),
        ("networking.istio.io", "ServiceEntry"),
        ("gateway.networking.k8s.io", "Gateway"),
        ("gateway.networking.k8s.io", "GatewayClass"),
    }
)


def _policy(spec: r.AuthorizationPolicy) -> None:
    if spec.action == "CUSTOM":
        if spec.provider is None or not spec.provider.name:
            raise Refused("provider.name", "is missing: CUSTOM asks a provider")
        if not spec.rules:
            raise Refused("rules", "is missing: CUSTOM without rules would never ask")
    elif spec.provider is not None:
        raise Refused("provider", "is only for action CUSTOM")
    for index, rule in enumerate(spec.rules):
        at = f"rules[{index}]"
        if rule.from_ is not None and not rule.from_:
            raise Refused(f"{at}.from", "is empty")
        if rule.to is not None and not rule.to:
            raise Refused(f"{at}.to", "is empty")
        for number, each in enumerate(rule.from_ or ()):
            _source(each.source, f"{at}.from[{number}].source")
        for number, to in enumerate(rule.to or ()):
            _operation(to.operation, f"{at}.to[{number}].operation")
        for number, when in enumerate(rule.when):
            _when(when, f"{at}.when[{number}]", spec.action)
        if spec.action == "CUSTOM":
            _no_claims(rule, at)


def _no_claims(rule: r.AccessRule, at: str) -> None:
    for number, each in enumerate(rule.from_ or ()):
        for name in ("namespaces", "principals", "request_principals"):
            if name == "request_principals" and each.source is not None and getattr(each.source, name):
                raise Refused(f"{at}.from[{number}].source.requestPrincipals", "can't be used with action CUSTOM")
    for number, when in enumerate(rule.when):
        if when.key.startswith("request.auth."):
            raise Refused(f"{at}.when[{number}].key", "can't be used with action CUSTOM")


def _source(source: r.Source | None, at: str) -> None:
    if source is None:
        raise Refused(at, "is missing")
    if source == r.Source():
        raise Refused(at, "says nothing")
    for name in r.Source.__struct_fields__:
        _values(getattr(source, name), f"{at}.{_camel(name)}")
    for name in ("ip_blocks", "not_ip_blocks", "remote_ip_blocks", "not_remote_ip_blocks"):
        _networks(getattr(source, name), f"{at}.{_camel(name)}")
    accounts = source.service_accounts + source.not_service_accounts
    if accounts and (source.principals or source.not_principals or source.namespaces or source.not_namespaces):
        raise Refused(f"{at}.serviceAccounts", "can't stand beside principals or namespaces")
    for name in ("service_accounts", "not_service_accounts"):
        for index, value in enumerate(getattr(source, name)):
            if "*" in value or value.count("/") > 1 or not all(value.split("/")) or len(value) > 320:
                raise Refused(f"{at}.{_camel(name)}[{index}]", f"must be namespace/name or name: {value!r}")


def _operation(operation: r.Operation | None, at: str) -> None:
    if operation is None:
        raise Refused(at, "is missing")
    if operation == r.Operation():
        raise Refused(at, "says nothing")
    for name in r.Operation.__struct_fields__:
        _values(getattr(operation, name), f"{at}.{_camel(name)}")
    for name in ("ports", "not_ports"):
        for index, port in enumerate(getattr(operation, name)):
            _port(port, f"{at}.{_camel(name)}[{index}]")
    for name in ("paths", "not_paths"):
        for index, path in enumerate(getattr(operation, name)):
            _path(path, f"{at}.{_camel(name)}[{index}]")


def _path(path: str, at: str) -> None:
    if not _TEMPLATE.search(path):
        if ("{" in path or "}" in path) and ("{*" in path or "*}" in path):
            raise Refused(at, f"is no path template: {path!r}")
        return
    if "*" in _TEMPLATE.sub("", path) or "{" in _TEMPLATE.sub("", path) or "}" in _TEMPLATE.sub("", path):
        raise Refused(at, f"mixes a template with other wildcards: {path!r}")
    operators = [segment for segment in path.split("/") if _TEMPLATE.search(segment)]
    if any(each not in ("{*}", "{**}") for each in operators):
        raise Refused(at, f"an operator must be a whole segment: {path!r}")
    if "{**}" in operators[:-1]:
        raise Refused(at, f"{{**}} must be the last operator: {path!r}")


def _when(when: r.When, at: str, action: str) -> None:
    if when.key not in KEYS and not _NESTED.match(when.key):
        raise Refused(f"{at}.key", f"is not known: {when.key!r}")
    if not when.values and not when.not_values:
        raise Refused(at, "has neither values nor notValues")
    _values(when.values, f"{at}.values")
    _values(when.not_values, f"{at}.notValues")
    for name, values in (("values", when.values), ("notValues", when.not_values)):
        if when.key in ("source.ip", "remote.ip", "destination.ip"):
            _networks(values, f"{at}.{name}")
        elif when.key == "destination.port":
            for index, value in enumerate(values):
                _port(value, f"{at}.{name}[{index}]")


def _jwt(rule: r.JwtRule, at: str) -> None:
    if not rule.issuer:
        raise Refused(f"{at}.issuer", "is empty")
    if rule.jwks and rule.jwks_uri:
        raise Refused(f"{at}.jwks", "is given beside jwksUri: only one of them may be")
    if rule.jwks_uri and urlsplit(rule.jwks_uri).scheme not in ("http", "https"):
        raise Refused(f"{at}.jwksUri", f"is no http or https URL: {rule.jwks_uri!r}")
    at_least(rule.timeout, 0.001, f"{at}.timeout")
    if rule.jwks:
        try:
            found = json.loads(rule.jwks)
        except ValueError:
            raise Refused(f"{at}.jwks", "is no JSON") from None
        if not isinstance(found, dict) or not isinstance(found.get("keys"), list):
            raise Refused(f"{at}.jwks", "is no key set: it has no list of keys")
    for name in ("audiences", "from_params", "from_cookies", "space_delimited_claims"):
        _values(getattr(rule, name), f"{at}.{_camel(name)}")
    for index, header in enumerate(rule.from_headers):
        if not header.name:
            raise Refused(f"{at}.fromHeaders[{index}].name", "is empty")
    for index, each in enumerate(rule.output_claim_to_headers):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", each.header):
            raise Refused(f"{at}.outputClaimToHeaders[{index}].header", f"is no header name: {each.header!r}")
        if not each.claim:
            raise Refused(f"{at}.outputClaimToHeaders[{index}].claim", "is empty")


def _values(values: Iterable[str], at: str) -> None:
    for index, value in enumerate(values):
        if not value:
            raise Refused(f"{at}[{index}]", "is empty")


def _networks(values: Iterable[str], at: str) -> None:
    for index, value in enumerate(values):
        try:
            ipaddress.ip_network(value, strict=False)
        except ValueError:
            raise Refused(f"{at}[{index}]", f"is no address or CIDR block: {value!r}") from None


def _port(value: str, at: str) -> None:
    if not value.isdecimal() or not 0 < int(value) < 65536:
        raise Refused(at, f"is no port: {value!r}")


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)
