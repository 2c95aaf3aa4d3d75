"""Who may call this workload? PeerAuthentications, AuthorizationPolicies and RequestAuthentications that select it ->
Inbound (istio/istio pilot/pkg/security: authz/builder, authz/model, authn)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from meshlib.errors import ConfigurationError
from meshlib.istio import resources as r
from meshlib.istio import targets
from meshlib.istio.filter_limits import limits_of_filters
from meshlib.istio.limits import limits_of, quotas_of
from meshlib.istio.mesh_settings import MeshSettings
from meshlib.model import (
    ALWAYS,
    NEVER,
    Access,
    AccessRule,
    Action,
    AddressIs,
    And,
    Authorizer,
    ClaimIs,
    Condition,
    HeaderMatch,
    Inbound,
    JwtProvider,
    Node,
    NodeKind,
    Not,
    Or,
    PathIs,
    PathTemplate,
    PortIs,
    PrincipalIs,
    Quota,
    RateLimit,
    ServerNameIs,
    StringMatch,
    TlsMode,
)

Report = Callable[[ConfigurationError], None]
INBOUND = "inbound"
"""The name of what a view says about its own workload; on the wire it bears the address that was asked for."""


def inbound_of(objects: Iterable[r.Object], settings: MeshSettings, node: Node, report: Report) -> Inbound:
    objects = tuple(objects)
    tls, ports = _tls(objects, settings, node)
    access = access_of(objects, settings, node, report, targets.services_of(objects, node.workload))
    return Inbound(INBOUND, tls=tls, port_tls=ports, access=access)


def _limits(
    objects: Iterable[r.Object], settings: MeshSettings, node: Node, report: Report
) -> tuple[list[RateLimit], list[Quota]]:
    """Of the root namespace and the workload's own, by name; all that select it hold. EnvoyFilters come last."""
    labels = dict(node.workload.labels)
    limits: list[RateLimit] = []
    quotas: list[Quota] = []
    for each in sorted(objects, key=lambda each: (each.namespace, each.name)):
        spec = each.spec
        if not isinstance(spec, r.RateLimitPolicy):
            continue
        if each.namespace in (settings.root_namespace, node.workload.namespace) and _labels_fit(spec.selector, labels):
            name = f"{each.namespace}/{each.name}"
            limits += limits_of(spec.limits, name, each.origin)
            quotas += quotas_of(spec.quotas, name if not spec.limits else f"{name} quota", each.origin)
    by_filters, asked_by_filters = limits_of_filters(objects, node, settings.root_namespace, report)
    return limits + by_filters, quotas + asked_by_filters


def access_of(
    objects: Iterable[r.Object],
    settings: MeshSettings,
    node: Node,
    report: Report,
    services: frozenset[str] = frozenset(),
) -> Access:
    """services: what the node serves, by name. A gateway judges by what its trusted proxies say; a workload by the
    last entry of x-forwarded-for, as a sidecar."""
    rules: list[AccessRule] = []
    providers: list[JwtProvider] = []
    authorizers = {each.name: each for each in _authorizers(settings)}
    for each in sorted(objects, key=lambda each: (each.namespace, each.name)):
        spec = each.spec
        if not isinstance(spec, r.AuthorizationPolicy | r.RequestAuthentication):
            continue
        if not _selects(each, spec, settings, node, services):
            continue
        if each.unusable is not None:
            rules.append(_refused(each, each.unusable))
            continue
        if isinstance(spec, r.RequestAuthentication):
            for index, rule in enumerate(spec.jwt_rules):
                name = f"origins-{len(providers)}"
                providers.append(_provider(rule, name, f"{each.title} ({each.source})"))
                if not rule.jwks and not rule.jwks_uri and not rule.issuer.startswith(("https://", "http://")):
                    field = f"spec.jwtRules[{index}]"
                    reason = "has neither jwks nor jwksUri, and the issuer is no URL to ask: all tokens are refused"
                    report(ConfigurationError(each.source, each.title, field, reason))
        else:
            rules += _rules(each, spec, settings, services)
            if spec.provider is not None and spec.provider.name not in authorizers:
                reason = f"no extension provider {spec.provider.name!r}: what the rules select is denied"
                report(ConfigurationError(each.source, each.title, "spec.provider.name", reason))
    used = sorted({rule.provider for rule in rules if rule.provider in authorizers})
    limits, quotas = _limits(objects, settings, node, report)
    return Access(
        tuple(rules),
        tuple(providers),
        tuple(authorizers[name] for name in used),
        settings.trusted_proxies if node.kind is NodeKind.ROUTER else 0,
        settings.normalization,
        tuple(limits),
        tuple(quotas),
    )


def _selects(
    given: r.Object,
    spec: r.AuthorizationPolicy | r.RequestAuthentication,
    settings: MeshSettings,
    node: Node,
    services: frozenset[str],
) -> bool:
    if not given.namespace:  # of an object whose namespace can't be read
        return _labels_fit(spec.selector, dict(node.workload.labels))
    if targets.targets(spec):
        return targets.select(given, node.workload, services)
    if given.namespace not in (settings.root_namespace, node.workload.namespace):
        return False
    return _labels_fit(spec.selector, dict(node.workload.labels))


def _labels_fit(selector: r.WorkloadSelector | None, labels: dict[str, str]) -> bool:
    return selector is None or all(labels.get(key) == value for key, value in selector.match_labels.items())


# PeerAuthentication


def _tls(
    objects: Sequence[r.Object], settings: MeshSettings, node: Node
) -> tuple[TlsMode, tuple[tuple[int, TlsMode], ...]]:
    """Workload over namespace over mesh; the oldest of a level; UNSET inherits. One with a selector in the root
    namespace is for that namespace's own workloads alone (ComposePeerAuthentication)."""
    if any(_closes(each, settings, node) for each in objects):
        return TlsMode.STRICT, ()
    found = [each.spec if each is not None else None for each in _levels(objects, settings, node)]
    mode = TlsMode.PERMISSIVE
    for level in found:
        mode = _mode(level.mtls if isinstance(level, r.PeerAuthentication) else None, mode)
    workload = found[-1]
    ports = workload.port_level_mtls if isinstance(workload, r.PeerAuthentication) else {}
    return mode, tuple(sorted((int(port), _mode(given, mode)) for port, given in ports.items()))


def _levels(objects: Sequence[r.Object], settings: MeshSettings, node: Node) -> list[r.Object | None]:
    """The PeerAuthentication of the mesh, of the namespace, and of the workload."""
    labels = dict(node.workload.labels)
    mesh = namespace = workload = None
    for each in sorted(objects, key=lambda each: (each.created, each.name, each.namespace)):
        spec = each.spec
        if not isinstance(spec, r.PeerAuthentication):
            continue
        has_selector = spec.selector is not None and bool(spec.selector.match_labels)
        if not has_selector and each.namespace == settings.root_namespace:
            mesh = mesh or each
        elif each.namespace == node.workload.namespace and not has_selector:
            namespace = namespace or each
        elif each.namespace == node.workload.namespace and _labels_fit(spec.selector, labels):
            workload = workload or each
    return [mesh, namespace, workload]


def tls_decided_by(objects: Sequence[r.Object], settings: MeshSettings, node: Node, port: int) -> r.Object | None:
    """The PeerAuthentication that says how this port of the workload takes connections; None where none does, or one
    that can't be read."""
    if any(_closes(each, settings, node) for each in objects):
        return None
    for each in reversed(_levels(objects, settings, node)):
        if each is None or not isinstance(each.spec, r.PeerAuthentication):
            continue
        own = each.spec.port_level_mtls.get(str(port))
        if any(given is not None and given.mode != "UNSET" for given in (own, each.spec.mtls)):
            return each
    return None


def _closes(given: r.Object, settings: MeshSettings, node: Node) -> bool:
    """Whether it stands for a PeerAuthentication that can't be read and may be this workload's. Of which level that one
    is nobody can say, so no other is above it."""
    if given.unusable is None or not isinstance(given.spec, r.PeerAuthentication):
        return False
    selector = given.spec.selector
    is_of_all = given.namespace == "" or (given.namespace == settings.root_namespace and selector is None)
    return (is_of_all or given.namespace == node.workload.namespace) and _labels_fit(
        selector, dict(node.workload.labels)
    )


def _mode(given: r.MutualTls | None, inherited: TlsMode) -> TlsMode:
    return inherited if given is None or given.mode == "UNSET" else TlsMode(given.mode)


# AuthorizationPolicy


def _refused(given: r.Object, problem: ConfigurationError) -> AccessRule:
    """Of whomever an object selects that can't be used: nobody comes in."""
    at = f"{problem.field}: " if problem.field else ""
    origin = f"{given.title} ({given.source}), which can't be used: {at}{problem.reason}"
    return AccessRule(f"ns[{given.namespace}]-{given.kind}[{given.name}]-unusable", Action.DENY, origin=origin)


def _rules(
    given: r.Object, spec: r.AuthorizationPolicy, settings: MeshSettings, services: frozenset[str]
) -> Iterable[AccessRule]:
    annotations = (given.raw.get("metadata") or {}).get("annotations") or {}
    dry_run = str(annotations.get("istio.io/dry-run", "")).lower() == "true"
    action = Action(spec.action)
    name = f"ns[{given.namespace}]-policy[{given.name}]"
    provider = spec.provider.name if spec.provider is not None else ""
    if not spec.rules and action is Action.ALLOW:
        yield AccessRule(f"{name}-rule[0]", action, NEVER, ALWAYS, dry_run, "", f"{given.title} ({given.source})")
    for index, rule in enumerate(spec.rules):
        source = given.rule_sources[index] if index < len(given.rule_sources) else given.source
        named = targets.called_by_name(given, action, services)
        permissions: list[Condition] = [] if named is ALWAYS else [named]
        principals: list[Condition] = []
        if rule.to:
            permissions.append(Or(tuple(_operation(each.operation) for each in rule.to if each.operation)))
        if rule.from_:
            principals.append(
                Or(tuple(_source(each.source, given.namespace, settings) for each in rule.from_ if each.source))
            )
        for when in rule.when:
            into = permissions if when.key.startswith(("destination.", "connection.")) else principals
            into.append(_when(when, given.namespace, settings))
        yield AccessRule(
            f"{name}-rule[{index}]",
            action,
            And(tuple(permissions)),
            And(tuple(principals)),
            dry_run,
            provider,
            f"{given.title} ({source})",
        )


def _both(values: Sequence[str], not_values: Sequence[str], make: Callable[[str], Condition]) -> list[Condition]:
    found: list[Condition] = []
    if values:
        found.append(Or(tuple(make(value) for value in values)))
    if not_values:
        found.append(Not(Or(tuple(make(value) for value in not_values))))
    return found


def _operation(operation: r.Operation) -> Condition:
    return And(
        (
            *_both(operation.hosts, operation.not_hosts, lambda v: HeaderMatch(":authority", _string(v, True))),
            *_both(operation.ports, operation.not_ports, lambda v: PortIs(int(v))),
            *_both(operation.methods, operation.not_methods, lambda v: HeaderMatch(":method", _string(v))),
            *_both(operation.paths, operation.not_paths, _path),
        )
    )


def _path(value: str) -> Condition:
    return PathTemplate(value) if "{*}" in value or "{**}" in value else PathIs(_string(value))


def _string(value: str, ignore_case: bool = False) -> StringMatch:
    """`*`: anything that is not empty; `abc*`, `*abc`; else the very text."""
    if value == "*":
        return StringMatch("regex", ".+")
    if value.endswith("*"):
        return StringMatch("prefix", value[:-1], ignore_case)
    if value.startswith("*"):
        return StringMatch("suffix", value[1:], ignore_case)
    return StringMatch("exact", value, ignore_case)


def _source(source: r.Source, namespace: str, settings: MeshSettings) -> Condition:
    def of(one: str) -> Callable[[str], Condition]:
        return lambda value: _principal(one, value, namespace, settings)

    return And(
        (
            *_both(source.principals, source.not_principals, of("principal")),
            *_both(source.request_principals, source.not_request_principals, _request_principal),
            *_both(source.namespaces, source.not_namespaces, of("namespace")),
            *_both(source.service_accounts, source.not_service_accounts, of("account")),
            *_both(source.trust_domains, source.not_trust_domains, of("domain")),
            *_both(source.ip_blocks, source.not_ip_blocks, lambda v: AddressIs("peer", v)),
            *_both(source.remote_ip_blocks, source.not_remote_ip_blocks, lambda v: AddressIs("remote", v)),
        )
    )


def _principal(of: str, value: str, namespace: str, settings: MeshSettings) -> Condition:
    if of == "namespace":
        return PrincipalIs(StringMatch("regex", f".*/ns/{_wild(value)}/.*"))
    if of == "account":
        where, _, name = value.rpartition("/")
        return PrincipalIs(StringMatch("suffix", f"/ns/{where or namespace}/sa/{name}"))
    if of == "domain":
        own = (settings.trust_domain, *settings.trust_domain_aliases)
        domains = own if value in own else (value,)
        return _either([PrincipalIs(StringMatch("regex", f"spiffe://{_wild(each)}/.*")) for each in domains])
    if value == "*":
        return PrincipalIs()
    return _either([PrincipalIs(_principal_string(each)) for each in _with_aliases(value, settings)])


def _either(conditions: Sequence[Condition]) -> Condition:
    return conditions[0] if len(conditions) == 1 else Or(tuple(conditions))


def _principal_string(value: str) -> StringMatch:
    match = _string(value)
    return match if match.kind == "suffix" else StringMatch(match.kind, f"spiffe://{match.value}")


def _with_aliases(value: str, settings: MeshSettings) -> list[str]:
    """A whole principal of the mesh's own trust domain, or of an alias, is one of each of them; `cluster.local` means
    the mesh's own, whatever its name (trustdomain/bundle.go)."""
    own = [settings.trust_domain, *settings.trust_domain_aliases]
    domain, _, rest = value.partition("/")
    if value.count("/") != 4 or domain == "*":
        return [value]

    def fits(each: str) -> bool:
        return domain.startswith("*") and each.endswith(domain[1:])

    if domain != "cluster.local" and domain not in own and not any(map(fits, own)):
        return [value]
    return list(dict.fromkeys(value if fits(each) else f"{each}/{rest}" for each in own))


def _wild(value: str) -> str:
    return ".*".join(re.escape(part) for part in value.split("*"))


def _request_principal(value: str) -> Condition:
    """`issuer/subject`, split at the last slash; a wildcard at an end belongs to what is there."""
    if value == "*":
        return And((ClaimIs(("iss",), _string("*")), ClaimIs(("sub",), _string("*"))))
    issuer, slash, subject = value.rpartition("/")
    if not slash:
        # `*abc` ends the subject whatever the issuer, `abc*` begins the issuer; text without a slash is no principal.
        if value.startswith("*"):
            return And((ClaimIs(("iss",), _string("*")), ClaimIs(("sub",), _string(value))))
        if value.endswith("*"):
            return And((ClaimIs(("iss",), _string(value)), ClaimIs(("sub",), _string("*"))))
        return And((ClaimIs(("iss",), StringMatch("exact", value)), ClaimIs(("sub",), StringMatch("exact", ""))))
    return And((ClaimIs(("iss",), _string(issuer)), ClaimIs(("sub",), _string(subject))))


def _when(when: r.When, namespace: str, settings: MeshSettings) -> Condition:
    key = when.key
    make: Callable[[str], Condition]
    if key.startswith("request.headers["):
        name = key[len("request.headers[") : -1].lower()
        make = lambda v: HeaderMatch(name, _string(v))  # noqa: E731
    elif key.startswith("request.auth.claims["):
        path = tuple(key[len("request.auth.claims[") : -1].split("]["))
        make = lambda v: ClaimIs(path, _string(v))  # noqa: E731
    else:
        simple: dict[str, Callable[[str], Condition]] = {
            "source.ip": lambda v: AddressIs("peer", v),
            "remote.ip": lambda v: AddressIs("remote", v),
            "source.namespace": lambda v: _principal("namespace", v, namespace, settings),
            "source.principal": lambda v: _principal("principal", v, namespace, settings),
            "source.serviceAccount": lambda v: _principal("account", v, namespace, settings),
            "source.trustDomain": lambda v: _principal("domain", v, namespace, settings),
            "request.auth.principal": _request_principal,
            "request.auth.audiences": lambda v: ClaimIs(("aud",), _string(v)),
            "request.auth.presenter": lambda v: ClaimIs(("azp",), _string(v)),
            "destination.ip": lambda v: AddressIs("destination", v),
            "destination.port": lambda v: PortIs(int(v)),
            "connection.sni": lambda v: ServerNameIs(_string(v)),
        }
        make = simple[key]
    return And(tuple(_both(when.values, when.not_values, make)))


# RequestAuthentication, and providers of CUSTOM


def _provider(rule: r.JwtRule, name: str, origin: str) -> JwtProvider:
    return JwtProvider(
        name,
        rule.issuer,
        tuple(rule.audiences),
        rule.jwks,
        rule.jwks_uri,
        tuple((each.name.lower(), each.prefix) for each in rule.from_headers),
        tuple(rule.from_params),
        tuple(rule.from_cookies),
        tuple((each.header.lower(), each.claim) for each in rule.output_claim_to_headers),
        rule.output_payload_to_header.lower(),
        rule.forward_original_token,
        tuple(rule.space_delimited_claims),
        rule.timeout.seconds if rule.timeout is not None else 5.0,
        origin,
    )


def _authorizers(settings: MeshSettings) -> Iterable[Authorizer]:
    for each in settings.extension_providers:
        given = each.envoy_ext_authz_http or each.envoy_ext_authz_grpc
        if given is None:
            continue
        body = given.include_request_body_in_check or r.BodyInCheck()
        yield Authorizer(
            each.name,
            "http" if each.envoy_ext_authz_http is not None else "grpc",
            given.service.rpartition("/")[2],
            given.port,
            given.timeout.seconds if given.timeout is not None else 600.0,
            given.fail_open,
            int(given.status_on_error) if given.status_on_error.isdecimal() else 403,
            given.path_prefix,
            tuple(given.include_request_headers_in_check),
            tuple(sorted(given.include_additional_headers_in_check.items())),
            tuple(given.headers_to_upstream_on_allow),
            tuple(given.headers_to_downstream_on_deny),
            tuple(given.headers_to_downstream_on_allow),
            body.max_request_bytes,
            body.allow_partial_message,
            body.pack_as_bytes,
        )
