"""What must hold in a VirtualService that its shape can't say? As Istio's webhook has it (pkg/config/validation)."""

from __future__ import annotations

import base64
import binascii

from meshlib.istio import resources as r
from meshlib.istio.checks.cors import check_cors
from meshlib.istio.checks.labels import check_labels
from meshlib.istio.checks.layer4 import check_gateways, check_tcp_routes, check_tls_routes, lies_within
from meshlib.istio.checks.parts import (
    HEADER,
    SUBSET,
    check_export,
    check_head_text,
    check_host,
    check_regex,
    check_substitution,
    is_address,
    msgspec_name,
)
from meshlib.istio.claims import claim_of
from meshlib.istio.problems import Refused

_FRAMING = frozenset({"content-length", "transfer-encoding"})
"""They say where a message ends: whoever sets them makes the next one begin somewhere else."""
_RETRY_CONDITIONS = frozenset(
    {
        "5xx",
        "gateway-error",
        "reset",
        "reset-before-request",
        "connect-failure",
        "envoy-ratelimited",
        "retriable-4xx",
        "refused-stream",
        "retriable-status-codes",
        "retriable-headers",
        "http3-post-connect-failure",
        "cancelled",
        "deadline-exceeded",
        "internal",
        "resource-exhausted",
        "unavailable",
    }
)
_GRPC_NAMES = """
OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED RESOURCE_EXHAUSTED
FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS UNAUTHENTICATED
"""
GRPC_STATUSES = {name: number for number, name in enumerate(_GRPC_NAMES.split())}


def check_virtual_service(spec: r.VirtualService) -> None:
    """Raises Refused, with the field below the spec."""
    if not spec.hosts:
        _check_delegate(spec)
    check_gateways(spec.gateways, "gateways")
    _check_hosts(spec)
    if not spec.http and spec.tls is None and spec.tcp is None:
        raise Refused("http", "is missing: a VirtualService needs http, tls or tcp routes")
    check_export(spec.export_to)
    for index, route in enumerate(spec.http):
        _check_route(route, f"http[{index}]")
    check_tls_routes(spec)
    check_tcp_routes(spec)


def _check_hosts(spec: r.VirtualService) -> None:
    in_mesh = not spec.gateways or "mesh" in spec.gateways
    for index, host in enumerate(spec.hosts):
        if not is_address(host):
            check_host(host, f"hosts[{index}]")
        if in_mesh and host == "*":
            reason = "* would take every call of the mesh; it is for gateways, without mesh among them"
            raise Refused(f"hosts[{index}]", reason)
    if len({host.lower() for host in spec.hosts}) != len(spec.hosts):
        raise Refused("hosts", "names a host twice")
    for index, host in enumerate(spec.hosts):
        for other in spec.hosts[index + 1 :]:
            if lies_within(host, other) or lies_within(other, host):
                raise Refused("hosts", f"{host} and {other} are the same hosts in part")


def _check_delegate(spec: r.VirtualService) -> None:
    """A VirtualService without hosts is for others to delegate to: what says who calls is theirs to say."""
    if not spec.http or spec.tls is not None or spec.tcp is not None:
        raise Refused("hosts", "is missing: only a delegate has none, and a delegate has http routes alone")
    if spec.gateways:
        raise Refused("gateways", "has no meaning in a delegate (a VirtualService without hosts)")
    for index, route in enumerate(spec.http):
        if route.delegate is not None:
            raise Refused(f"http[{index}].delegate", "a delegate can't delegate further")
        for number, match in enumerate(route.match):
            for name in ("gateways", "source_labels", "source_namespace"):
                if getattr(match, name):
                    at = f"http[{index}].match[{number}].{msgspec_name(name)}"
                    raise Refused(at, "has no meaning in a delegate; the one that delegates may say it")


def _check_route(route: r.HTTPRoute, at: str) -> None:
    actions = [
        name
        for name, given in (
            ("route", route.route),
            ("redirect", route.redirect),
            ("directResponse", route.direct_response),
            ("delegate", route.delegate),
        )
        if given
    ]
    if len(actions) != 1:
        told = " and ".join(actions) or "none"
        raise Refused(at, f"needs exactly one of route, redirect, directResponse and delegate; found {told}")
    if route.delegate is not None:
        for kind, name in (("name", route.delegate.name), ("namespace", route.delegate.namespace or "default")):
            if not r.NAME.match(name):
                raise Refused(f"{at}.delegate.{kind}", f"is no name of Kubernetes: {name!r}")
    for index, match in enumerate(route.match):
        _check_match(match, f"{at}.match[{index}]")
    total = 0
    for index, destination in enumerate(route.route):
        place = f"{at}.route[{index}]"
        check_destination(destination.destination, f"{place}.destination")
        _check_headers(destination.headers, f"{place}.headers")
        total += destination.weight
    if len(route.route) > 1 and total == 0:
        raise Refused(f"{at}.route", "the weights of several destinations must not all be 0")
    if total > 0xFFFFFFFF:
        raise Refused(f"{at}.route", "the weights add up to more than 4294967295")
    _check_headers(route.headers, f"{at}.headers")
    if route.redirect is not None:
        if route.rewrite is not None:
            raise Refused(f"{at}.rewrite", "has no meaning beside redirect")
        if route.redirect.redirect_code not in (301, 302, 303, 307, 308):
            raise Refused(
                f"{at}.redirect.redirectCode", f"must be 301, 302, 303, 307 or 308: {route.redirect.redirect_code}"
            )
        for name in ("uri", "authority", "scheme", "prefix_rewrite"):
            check_head_text(getattr(route.redirect, name), f"{at}.redirect.{msgspec_name(name)}")
        if route.redirect.uri and route.redirect.prefix_rewrite:
            raise Refused(f"{at}.redirect", "either uri or prefixRewrite")
        if not any(
            (
                route.redirect.uri,
                route.redirect.authority,
                route.redirect.scheme,
                route.redirect.port,
                route.redirect.derive_port,
                route.redirect.prefix_rewrite,
                isinstance(route.redirect, r.PathRedirect) and route.redirect.regex,
            )
        ):
            raise Refused(f"{at}.redirect", "redirects to where it came from: give uri, authority, scheme or port")
        if route.redirect.port is not None and route.redirect.derive_port is not None:
            raise Refused(f"{at}.redirect", "either port or derivePort")
    if route.direct_response is not None and (body := route.direct_response.body) is not None:
        if (body.string is None) == (body.bytes is None):
            raise Refused(f"{at}.directResponse.body", "needs exactly one of string and bytes")
        if body.bytes is not None:
            try:
                base64.b64decode(body.bytes, validate=True)
            except (binascii.Error, ValueError):
                raise Refused(f"{at}.directResponse.body.bytes", "is not base64") from None
    if route.rewrite is not None:
        _check_rewrite(route.rewrite, f"{at}.rewrite")
    if route.timeout is not None and 0 < route.timeout.seconds < 0.001:
        raise Refused(f"{at}.timeout", "must be at least 1ms")
    if route.cors_policy is not None:
        check_cors(route.cors_policy, f"{at}.corsPolicy")
    if route.retries is not None:
        check_retries(route.retries, f"{at}.retries")
    if route.fault is not None:
        _check_fault(route.fault, f"{at}.fault")
    if route.mirror is not None and route.mirrors:
        raise Refused(f"{at}.mirrors", "either mirror or mirrors")
    for place, mirror in (
        *(((f"{at}.mirror", route.mirror),) if route.mirror else ()),
        *((f"{at}.mirrors[{index}].destination", each.destination) for index, each in enumerate(route.mirrors)),
    ):
        check_destination(mirror, place)


def check_destination(given: r.Destination, at: str) -> None:
    """Raises Refused."""
    check_host(given.host, f"{at}.host", wildcard=False)
    if given.subset and not SUBSET.match(given.subset):
        raise Refused(f"{at}.subset", f"no subset name: {given.subset!r}")


def _check_match(match: r.HTTPMatchRequest, at: str) -> None:
    check_gateways(match.gateways, f"{at}.gateways")
    check_labels(match.source_labels, f"{at}.sourceLabels")
    for name, given in (
        ("uri", match.uri),
        ("scheme", match.scheme),
        ("method", match.method),
        ("authority", match.authority),
    ):
        if given is not None:
            _check_string_match(given, f"{at}.{name}")
    for name, table, presence in (
        ("headers", match.headers, True),
        ("withoutHeaders", match.without_headers, True),
        ("queryParams", match.query_params, True),
    ):
        for key, value in table.items():
            if name != "queryParams" and key.startswith("@"):
                if not claim_of(key):
                    raise Refused(f"{at}.{name}", f"names no claim as @request.auth.claims.a.b or [a][b]: {key!r}")
            elif name != "queryParams" and not HEADER.match(key):
                raise Refused(f"{at}.{name}", f"no header name: {key!r}")
            _check_string_match(value, f"{at}.{name}.{key}", presence=presence)


def _check_string_match(match: r.StringMatch, at: str, *, presence: bool = False) -> None:
    given = [name for name in ("exact", "prefix", "regex") if getattr(match, name) is not None]
    if len(given) > 1 or (not given and not presence):
        raise Refused(at, "needs exactly one of exact, prefix and regex")
    if match.prefix == "":
        raise Refused(f"{at}.prefix", "must not be empty")
    if match.regex is not None:
        if match.regex == "":
            raise Refused(f"{at}.regex", "must not be empty")
        if presence and match.regex == "*":
            return  # Istio's form for presence
        check_regex(match.regex, f"{at}.regex")


def _check_headers(headers: r.Headers, at: str) -> None:
    for side in ("request", "response"):
        operations: r.HeaderOperations = getattr(headers, side)
        for kind in ("set", "add", "remove"):
            for name in getattr(operations, kind):
                if not HEADER.match(name) or (name.startswith(":") and name != ":authority"):
                    raise Refused(f"{at}.{side}.{kind}", f"no header name: {name!r}")
            values = getattr(operations, kind)
            if isinstance(values, dict):
                for name, value in values.items():
                    if name.lower() in _FRAMING:
                        raise Refused(f"{at}.{side}.{kind}.{name}", "follows from the body, and can't be set")
                    check_head_text(value, f"{at}.{side}.{kind}.{name}")


def _check_rewrite(rewrite: r.HTTPRewrite, at: str) -> None:
    if rewrite.uri and rewrite.uri_regex_rewrite is not None:
        raise Refused(at, "either uri or uriRegexRewrite")
    if not rewrite.uri and not rewrite.authority and rewrite.uri_regex_rewrite is None:
        raise Refused(at, "rewrites nothing: give uri, authority or uriRegexRewrite")
    check_head_text(rewrite.uri, f"{at}.uri")
    check_head_text(rewrite.authority, f"{at}.authority")
    if rewrite.uri_regex_rewrite is not None:
        check_regex(rewrite.uri_regex_rewrite.match, f"{at}.uriRegexRewrite.match")
        check_head_text(rewrite.uri_regex_rewrite.rewrite, f"{at}.uriRegexRewrite.rewrite")
        found = rewrite.uri_regex_rewrite
        check_substitution(found.match, found.rewrite, f"{at}.uriRegexRewrite.rewrite")


def check_retries(retries: r.HTTPRetry, at: str) -> None:
    if retries.attempts == 0 and (retries.retry_on or retries.per_try_timeout):
        raise Refused(at, "attempts is 0, so retryOn and perTryTimeout have no meaning")
    if retries.per_try_timeout is not None and 0 < retries.per_try_timeout.seconds < 0.001:
        raise Refused(f"{at}.perTryTimeout", "must be at least 1ms")
    for part in (part.strip() for part in retries.retry_on.split(",") if part.strip()):
        if part.isdecimal():
            if not 100 <= int(part) <= 599:
                raise Refused(f"{at}.retryOn", f"no HTTP status: {part}")
        elif part not in _RETRY_CONDITIONS:
            raise Refused(f"{at}.retryOn", f"unknown condition {part!r}")


def _check_fault(fault: r.HTTPFaultInjection, at: str) -> None:
    if fault.delay is None and fault.abort is None:
        raise Refused(at, "needs delay or abort")
    if fault.delay is not None and fault.delay.fixed_delay.seconds < 0.001:
        raise Refused(f"{at}.delay.fixedDelay", "must be at least 1ms")
    if fault.abort is not None:
        if (fault.abort.http_status is None) == (fault.abort.grpc_status is None):
            raise Refused(f"{at}.abort", "needs exactly one of httpStatus and grpcStatus")
        status = fault.abort.grpc_status
        if status is not None and status.upper() not in GRPC_STATUSES:
            raise Refused(f"{at}.abort.grpcStatus", f"unknown gRPC status {status!r}")
