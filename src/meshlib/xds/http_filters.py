"""Which HTTP filters carry out the rules for calls that come in? Access -> the filters of a server's listener, in the
order in which Istio's pilot has them: tokens, external authorizers, AUDIT, DENY, ALLOW. Limits come last."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import urlsplit

from meshlib.model import Access, AccessRule, Action, Authorizer, JwtProvider, StringMatch
from meshlib.xds import messages as m
from meshlib.xds import rbac
from meshlib.xds.encode_matches import set_string
from meshlib.xds.limit_filters import limit_filters
from meshlib.xds.pieces import set_seconds
from meshlib.xds.reader import Dialect, Reader

RBAC_FILTER, EXT_AUTHZ_FILTER = "envoy.filters.http.rbac", "envoy.filters.http.ext_authz"
JWKS_FOR = 300.0
"""Seconds for which fetched keys are good, as in Istio."""
NO_KEYS = '{"keys":[]}'
_V3 = 2
_OURS = "istio-ext-authz"


class Upstreams(Protocol):
    """The clusters that filters call."""

    def cluster(self, host: str, port: int, *, tls: bool = False, http2: bool = False) -> str: ...


def http_filters(access: Access, reader: Reader, upstreams: Upstreams, port: int = 0) -> list[tuple[str, Any]]:
    """(name, configuration) pairs; the names are all different, as gRPC wants them. port: of the listener; 0 is for
    all."""
    if reader.dialect is Dialect.GRPC:
        return _of_grpc(access, reader)
    found: list[tuple[str, Any]] = []
    if access.jwt:
        found.append((rbac.JWT_FILTER, _tokens(access, upstreams)))
    found += _custom(access, reader, upstreams)
    if audit := rbac.by_action(access.rules, Action.AUDIT):
        found.append((f"{RBAC_FILTER}.audit", m.RbacFilter(rules=rbac.rbac(audit, rbac.LOG, reader))))
    found += _enforced(access, reader)
    found += limit_filters(access, upstreams, port)
    return found


def not_carried_out(access: Access, reader: Reader) -> list[str]:
    """What of the rules this reader does not carry out as they are meant, in words."""
    found: list[str] = []
    if access.rate_limits or access.quotas:
        found.append("rate limits are not carried out")
    if reader.dialect is not Dialect.GRPC:
        return found
    if access.jwt:
        found.append("tokens are not verified")
    for rule in access.rules:
        if rule.action is Action.CUSTOM and not rule.dry_run:
            found.append(f"{rule.name} denies, since nobody can be asked")
        elif rule.action in (Action.ALLOW, Action.DENY) and not rule.dry_run and rbac.is_approximated(rule, reader):
            how = "denies more" if rule.action is Action.DENY else "allows less"
            found.append(f"{rule.name} {how} than it says, since gRPC can't judge all of it")
    return found


def _of_grpc(access: Access, reader: Reader) -> list[tuple[str, Any]]:
    """gRPC has RBAC and nothing else (gRFC A41): what an external authorizer would have to judge is denied, what would
    only be logged is left out."""
    rules = [
        replace(each, action=Action.DENY) if each.action is Action.CUSTOM else each
        for each in access.rules
        if not each.dry_run
    ]
    return _enforced(replace(access, rules=tuple(rules)), reader)


def _enforced(access: Access, reader: Reader) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for action, number in ((Action.DENY, rbac.DENY), (Action.ALLOW, rbac.ALLOW)):
        rules, dry = (rbac.by_action(access.rules, action, dry_run=dry) for dry in (False, True))
        message = m.RbacFilter()
        if rules:
            message.rules.CopyFrom(rbac.rbac(rules, number, reader))
        if dry:
            message.shadow_rules.CopyFrom(rbac.rbac(dry, number, reader))
            message.shadow_rules_stat_prefix = f"istio_dry_run_{action.lower()}_"
        if rules or dry:
            found.append((f"{RBAC_FILTER}.{action.lower()}", message))
    return found


# Tokens


def _tokens(access: Access, upstreams: Upstreams) -> Any:
    message = m.JwtAuthentication(bypass_cors_preflight=True)
    for provider in access.jwt:
        _set_provider(message.providers[provider.name], provider, upstreams)
    rule = message.rules.add()
    rule.match.prefix = "/"
    names = [each.name for each in access.jwt]
    if len(names) == 1:
        rule.requires.CopyFrom(_valid_or_missing(names[0]))
        return message
    # Any provider's valid token; else none that is not valid (Istio, convertToEnvoyJwtConfig).
    for name in names:
        rule.requires.requires_any.requirements.add(provider_name=name)
    last = rule.requires.requires_any.requirements.add()
    for name in names:
        last.requires_all.requirements.add().CopyFrom(_valid_or_missing(name))
    return message


def _valid_or_missing(name: str) -> Any:
    message = m.message_class("envoy.extensions.filters.http.jwt_authn.v3.JwtRequirement")()
    message.requires_any.requirements.add(provider_name=name)
    message.requires_any.requirements.add().allow_missing.SetInParent()
    return message


def _set_provider(message: Any, provider: JwtProvider, upstreams: Upstreams) -> None:
    message.issuer, message.forward = provider.issuer, provider.forward
    message.audiences.extend(provider.audiences)
    url = urlsplit(provider.jwks_uri)
    if provider.jwks or not url.hostname:
        message.local_jwks.inline_string = provider.jwks or NO_KEYS  # without keys no token is good
    else:
        remote = message.remote_jwks
        tls = url.scheme == "https"
        remote.http_uri.uri = provider.jwks_uri
        remote.http_uri.cluster = upstreams.cluster(url.hostname, url.port or (443 if tls else 80), tls=tls)
        set_seconds(remote.http_uri.timeout, provider.timeout)
        set_seconds(remote.cache_duration, JWKS_FOR)
    for name, prefix in provider.from_headers:
        message.from_headers.add(name=name, value_prefix=prefix)
    message.from_params.extend(provider.from_params)
    message.from_cookies.extend(provider.from_cookies)
    for header, claim in provider.claim_headers:
        message.claim_to_headers.add(header_name=header, claim_name=claim)
    message.forward_payload_header = provider.payload_header
    message.payload_in_metadata = rbac.PAYLOAD
    message.normalize_payload_in_metadata.space_delimited_claims.extend(
        ("permission", "scope", *provider.space_delimited)
    )


# External authorizers


def _custom(access: Access, reader: Reader, upstreams: Upstreams) -> list[tuple[str, Any]]:
    """For each provider an RBAC in shadow, which leaves in the metadata whether a rule applies, and a filter that asks
    if one did."""
    authorizers = {each.name: each for each in access.authorizers}
    by_provider: dict[str, list[AccessRule]] = {}
    for rule in rbac.by_action(access.rules, Action.CUSTOM):
        by_provider.setdefault(rule.provider, []).append(rule)
    found: list[tuple[str, Any]] = []
    for index, (provider, rules) in enumerate(by_provider.items()):
        authorizer = authorizers.get(provider)
        message = m.RbacFilter()
        if authorizer is None:  # nobody can be asked, so nobody may
            message.rules.CopyFrom(rbac.rbac(rules, rbac.DENY, reader))
            found.append((f"{RBAC_FILTER}.custom-{index}", message))
            continue
        prefix, mark = f"istio_ext_authz_{index}_", f"{_OURS}-{provider}-"
        message.shadow_rules.CopyFrom(rbac.rbac(rules, rbac.DENY, reader, prefix=mark))
        message.shadow_rules_stat_prefix = prefix
        found.append((f"{RBAC_FILTER}.custom-{index}", message))
        asking = _asking(authorizer, upstreams)
        asking.filter_enabled_metadata.filter = RBAC_FILTER
        asking.filter_enabled_metadata.path.add(key=f"{prefix}shadow_effective_policy_id")
        asking.filter_enabled_metadata.value.string_match.prefix = mark
        found.append((f"{EXT_AUTHZ_FILTER}-{index}", asking))
    return found


def _asking(authorizer: Authorizer, upstreams: Upstreams) -> Any:
    message = m.ExtAuthz(transport_api_version=_V3, failure_mode_allow=authorizer.fail_open)
    message.status_on_error.code = authorizer.status_on_error
    if authorizer.max_body:
        body = message.with_request_body
        body.max_request_bytes, body.allow_partial_message = authorizer.max_body, authorizer.partial_body
        body.pack_as_bytes = authorizer.raw_body
    where = f"{authorizer.host}:{authorizer.port}"
    if authorizer.kind == "grpc":
        service = message.grpc_service
        service.envoy_grpc.cluster_name = upstreams.cluster(authorizer.host, authorizer.port, http2=True)
        service.envoy_grpc.authority = where
        set_seconds(service.timeout, authorizer.timeout)
        return message
    http = message.http_service
    http.path_prefix = authorizer.path_prefix
    http.server_uri.uri = f"http://{where}"
    http.server_uri.cluster = upstreams.cluster(authorizer.host, authorizer.port)
    set_seconds(http.server_uri.timeout, authorizer.timeout)
    for name, value in authorizer.added_headers:
        http.authorization_request.headers_to_add.add(key=name, value=value)
    answer = http.authorization_response
    for patterns, names in (
        (message.allowed_headers, authorizer.request_headers),
        (answer.allowed_upstream_headers, authorizer.upstream_headers),
        (answer.allowed_client_headers, authorizer.downstream_headers),
        (answer.allowed_client_headers_on_success, authorizer.allowed_downstream_headers),
    ):
        for name in names:
            set_string(patterns.patterns.add(), _pattern(name))
    return message


def _pattern(name: str) -> StringMatch:
    """Istio's: a `*` at an end is any text; without regard to case."""
    if name == "*":
        return StringMatch("prefix")
    if name.endswith("*"):
        return StringMatch("prefix", name[:-1], True)
    if name.startswith("*"):
        return StringMatch("suffix", name[1:], True)
    return StringMatch("exact", name, True)
