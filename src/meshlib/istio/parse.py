"""Which objects does a YAML text hold, and which of them can't be used? A bad object hides no good one.

Shapes are checked by resources.py's structs; what a shape can't say (exactly one of, sums, names that must be unique)
is checked here, as Istio's webhook does (istio/istio pkg/config/validation).
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import yaml

from meshlib.errors import ConfigurationError
from meshlib.istio import closing, envoy_filters, gateway_kinds
from meshlib.istio import resources as r
from meshlib.istio.claims import claim_of
from meshlib.istio.documents import Document, InvalidYaml, Path, split
from meshlib.istio.limit_checks import check_limits, check_quotas, check_rate_limit
from meshlib.istio.problems import ConfigurationWarning, Refused
from meshlib.istio.security_checks import check_security
from meshlib.istio.telemetry_checks import check_telemetry, telemetry_warnings
from meshlib.model import SHADOWABLE
from meshlib.state import forks

MAX_TEXT = 16 * 1024 * 1024
"""Characters. Far above any real file; a text beyond it is a mistake."""

_HOST = re.compile(r"(\*|(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\.?)\Z", re.IGNORECASE)
_SUBSET = re.compile(r"[a-zA-Z0-9]([-a-zA-Z0-9_.]*[a-zA-Z0-9])?\Z")
_HEADER = re.compile(r":?[!#$%&'*+.^_`|~0-9a-zA-Z-]+\Z")
_NOT_IN_A_HEAD = re.compile(r"[^\t\x20-\x7e]")
_FRAMING = frozenset({"content-length", "transfer-encoding"})
"""They say where a message ends: whoever sets them makes the next one begin somewhere else."""
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(h|ms|m|us|µs|ns|s)")
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
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
_NOT_YET_GROUPS = ("istio.io", "gateway.networking.k8s.io", "gateway.networking.x-k8s.io")
_OBJECT_FIELDS = frozenset({"apiVersion", "kind", "metadata", "spec", "status"})
MAX_RING, MAX_TABLE = 8 * 1024 * 1024, 5_000_011
"""Envoy's limits of a ring and of a maglev table."""
_PROTOCOLS = frozenset({"HTTP", "HTTPS", "GRPC", "GRPC-WEB", "HTTP2", "MONGO", "TCP", "TLS", "UDP", "MYSQL", "REDIS"})


@dataclass(frozen=True, slots=True)
class Parsed:
    """objects: usable, in the text's order. problems: one for each object that is not, and for YAML that is none.
    warnings: what usable objects ask for and do not get. closed: what stands for security objects that can't be used,
    where there is no other form of them: whoever passes them over lets in whom they may have kept out."""

    objects: tuple[r.Object, ...]
    problems: tuple[ConfigurationError, ...]
    warnings: tuple[ConfigurationWarning, ...] = ()
    closed: tuple[r.Object, ...] = ()


def parse_text(text: str, source: str, *, namespace: str = "default") -> Parsed:
    """Every object of a YAML text. source: a file's name, for messages; objects get the line with it. namespace: of
    objects that name none. Raises nothing."""
    objects: list[r.Object] = []
    problems: list[ConfigurationError] = []
    warnings: list[ConfigurationWarning] = []
    closed: list[r.Object] = []
    seen: set[tuple[str, ...]] = set()
    if len(text) > MAX_TEXT:
        problem = ConfigurationError(source, "", "", f"more than {MAX_TEXT} characters")
        return Parsed((), (problem,), (), closing.of_text(text, problem))
    for document in split(text):

        def place(path: Path, document: Document = document) -> str:
            return f"{source}:{document.line(path)}"

        try:
            value = document.value()
        except InvalidYaml as error:
            problem = ConfigurationError(f"{source}:{error.line}", "", "", error.reason)
            problems.append(problem)
            closed += closing.of_document(document, problem, namespace)
            continue
        for item, path in _items(value):
            try:
                found = _object(item, place, path, namespace)
            except ConfigurationError as error:
                problems.append(error)
                stand_ins = closing.of_value(item, error, namespace)
                closed += stand_ins or (closing.of_text(document.text, error) if _may_hold_others(item) else ())
                continue
            identity = closing.identity(found)
            if identity in seen:
                problems.append(ConfigurationError(found.source, found.title, "", "stands in this file twice"))
                continue
            seen.add(identity)
            objects.append(found)
            warnings.extend(_warnings(found))
    return Parsed(tuple(objects), tuple(problems), tuple(warnings), tuple(closed))


def parse_value(value: Any, source: str, *, namespace: str = "default") -> Parsed:
    """One object that was decoded already, as an API server sends it, or the items of a List. source: where from, for
    messages; there are no lines. Raises nothing."""
    objects: list[r.Object] = []
    problems: list[ConfigurationError] = []
    closed: list[r.Object] = []
    for item, path in _items(value):
        try:
            objects.append(_object(item, lambda _: source, path, namespace))
        except ConfigurationError as error:
            problems.append(error)
            closed += closing.of_value(item, error, namespace)
    warnings = tuple(warning for each in objects for warning in _warnings(each))
    return Parsed(tuple(objects), tuple(problems), warnings, tuple(closed))


def _group(given: r.Object) -> str:
    return given.api_version.rpartition("/")[0]


def _may_hold_others(item: Any) -> bool:
    """Whether there may be objects in what is none: a list without a kind, a List of something else."""
    if isinstance(item, dict) and isinstance(kind := item.get("kind"), str):
        return kind.endswith("List")
    return isinstance(item, dict | list)


def _items(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, tuple[str | int, ...]]]:
    """The object itself, or the items of a List."""
    if value is None:
        return
    if isinstance(value, dict) and str(value.get("kind", "")).endswith("List") and "items" in value:
        items = value["items"]
        if items is None or isinstance(items, list):
            for index, item in enumerate(items or ()):
                yield from _items(item, (*path, "items", index))
            return
    yield value, path


def _converted(content: Any, wanted: Any) -> Any:
    """Raises msgspec.ValidationError."""
    with forks.whole:
        return msgspec.convert(content, wanted, dec_hook=_decode)


def _object(value: Any, place: Callable[[Path], str], path: Path, default_namespace: str) -> r.Object:
    """place: where what a path names stands, for messages."""
    where = place(path)
    if not isinstance(value, dict):
        raise ConfigurationError(where, "", "", f"an object is a mapping with apiVersion and kind, not {_told(value)}")
    kind, version = value.get("kind"), value.get("apiVersion")
    for required, found in (("kind", kind), ("apiVersion", version)):
        if not isinstance(found, str) or not found:
            raise ConfigurationError(where, "", required, "is missing" if found is None else f"must be text: {found!r}")
    kind, version = str(kind), str(version)
    given = value.get("metadata")
    metadata: dict[str, Any] = given if isinstance(given, dict) else {}
    name: Any = metadata.get("name")
    namespace: Any = metadata.get("namespace") or default_namespace
    title = f"{kind} {namespace}/{name or metadata.get('generateName', '')}"

    def refuse(field: str, reason: str) -> ConfigurationError:
        return ConfigurationError(place((*path, *_steps(field))), title, field, reason)

    if given is not None and not isinstance(given, dict):
        raise refuse("metadata", f"must be a mapping, not {_told(given)}")
    if kind.endswith("List") and "items" in value:
        raise refuse("items", f"must be a list, not {_told(value['items'])}")
    if not isinstance(name, str) or not r.NAME.match(name):
        raise refuse("metadata.name", "is missing" if name is None else f"is no name of Kubernetes: {name!r}")
    if not isinstance(namespace, str) or not r.NAMESPACE.match(namespace):
        raise refuse("metadata.namespace", f"is no namespace: {namespace!r}")
    labels: Any = metadata.get("labels") or {}
    if not isinstance(labels, dict) or not all(isinstance(each, str) for each in labels.values()):
        raise refuse("metadata.labels", "must be text, each")
    group, _, short = version.rpartition("/")
    shape = r.shape_of(kind, group)
    own = {known for known, each in r.SHAPES.items() if each.group == r.OWN}
    if (group == r.NETWORKING and kind not in r.NETWORKING_KINDS) or (group == r.OWN and kind not in own):
        raise refuse("kind", f"{group} has no kind {kind!r}")
    if group == r.SECURITY and kind not in closing.KINDS:
        raise refuse("kind", f"{group} has no kind {kind!r}; it has {', '.join(sorted(closing.KINDS))}")
    if kind in closing.KINDS and group != r.SECURITY and (not group or group.endswith("istio.io")):
        raise refuse("apiVersion", f"{version!r} has no kind {kind}; {r.SECURITY}/v1 has")
    if shape is not None and shape.group == r.NETWORKING and group != r.NETWORKING:
        raise refuse("apiVersion", f"{version!r} has no kind {kind}; {r.NETWORKING}/v1 has")
    spec: Any = None
    if shape is not None and shape.group == group:
        if short not in shape.versions:
            wanted = ", ".join(f"{group}/{known}" if group else known for known in shape.versions)
            raise refuse("apiVersion", f"{version!r} is not known; there are {wanted}")
        if group in r.STRICT_GROUPS:
            for at, table, known in (("", value, _OBJECT_FIELDS), ("metadata.", metadata, r.METADATA_FIELDS)):
                for field in table:
                    if field not in known:
                        raise refuse(f"{at}{field}", "there is no such field")
        content = value if shape.whole else value.get("spec")
        if content is None and not shape.whole:
            content = {}
        try:
            content = _without_nulls(content)
            spec = _converted(content, shape.spec)
            _check((kind, namespace, name), spec)
        except msgspec.ValidationError as error:
            field, reason = _explained(_with_key(str(error), content, shape.spec), "" if shape.whole else "spec")
            raise refuse(field, reason) from None
        except Refused as error:
            prefix = "" if shape.whole else "spec"
            raise refuse(".".join(part for part in (prefix, error.field) if part), error.reason) from None
    created = metadata.get("creationTimestamp")
    rules: tuple[str, ...] = ()
    if isinstance(spec, r.AuthorizationPolicy):
        rules = tuple(place((*path, "spec", "rules", index)) for index in range(len(spec.rules)))
    age = str(created) if created else ""
    return r.Object(
        version, kind, namespace, name, where, spec, value, labels, age, rules, lambda at: place((*path, *at))
    )


def _told(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "nothing")


def _without_nulls(value: Any) -> Any:
    """A field that is null is a field that is not set (Kubernetes)."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value


def _decode(wanted: type, value: Any) -> Any:
    if wanted is r.Duration:
        return parse_duration(value)
    raise NotImplementedError(wanted)


def parse_duration(value: Any) -> r.Duration:
    """`1.5s` -> Duration(1.5). Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"a duration has a unit, as in 5s or 250ms; found {value!r}")
    position, seconds = 0, 0.0
    while position < len(value):
        part = _DURATION.match(value, position)
        if part is None:
            raise ValueError(f"no duration: {value!r}; write 5s, 250ms, 1h30m")
        seconds += float(part[1]) * _UNITS[part[2]]
        position = part.end()
    if not value or seconds > 315_576_000_000:
        raise ValueError(f"no duration: {value!r}")
    return r.Duration(seconds)


def _with_key(message: str, content: Any, wanted: type) -> str:
    """msgspec says `[...]` for any key of a mapping. Which one it is shows by trying each alone."""
    before, found, _ = message.partition(" - at `")[2].partition("[...]")
    if not found:
        return message
    path = _steps(before.removeprefix("$"))
    table = content
    for step in path:
        table = table[step]
    for key, value in table.items():
        try:
            _converted(_replaced(content, path, {key: value}), wanted)
        except msgspec.ValidationError as error:
            if str(error) == message:
                return message.replace("[...]", f".{key}", 1)
    return message


def _replaced(content: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """`content` with `value` at `path`."""
    if not path:
        return value
    copy: Any = content.copy()
    copy[path[0]] = _replaced(content[path[0]], path[1:], value)
    return copy


def _explained(message: str, prefix: str) -> tuple[str, str]:
    """msgspec's message -> (field, reason). `Expected `int`, got `str` - at `$.http[0].port``"""
    reason, mark, place = message.partition(" - at `")
    field = place.rstrip("`").removeprefix("$").removeprefix(".") if mark else ""
    field = ".".join(part for part in (prefix, field) if part)
    unknown = re.match(r"Object contains unknown field `(.*)`", reason)
    if unknown:
        return f"{field}.{unknown[1]}" if field else unknown[1], "there is no such field"
    missing = re.match(r"Object missing required field `(.*)`", reason)
    if missing:
        return f"{field}.{missing[1]}" if field else missing[1], "is missing"
    enum = re.match(r"Invalid enum value '(.*)'", reason)
    if enum:
        return field, f"unknown value {enum[1]!r}"
    expected = re.match(r"Expected `(.*)`, got `(.*)`", reason)
    if expected:
        names = {
            "str": "text",
            "object": "a mapping",
            "array": "a list",
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
        }
        wanted = " or ".join(names.get(part, part) for part in expected[1].split(" | ") if part != "null")
        return field, f"must be {wanted}, not {names.get(expected[2], expected[2])}"
    return field, reason[:1].lower() + reason[1:]


def _steps(field: str) -> tuple[str | int, ...]:
    """`spec.http[0].route` -> ("spec", "http", 0, "route")"""
    found = re.findall(r"([^.\[\]]+)|\[(\d+)\]", field)
    return tuple(int(index) if index else name for name, index in found)


# What a shape can't say


def _check(key: tuple[str, str, str], spec: Any) -> None:
    kind = key[0]
    if kind == "VirtualService":
        check_virtual_service(spec)
    elif kind == "DestinationRule":
        _check_destination_rule(spec)
    elif kind == "ServiceEntry":
        _check_service_entry(spec)
    elif kind == "WorkloadEntry":
        _check_workload_entry(spec)
    elif kind == "Sidecar":
        _check_sidecar(spec)
    elif isinstance(spec, r.Gateway):
        _check_gateway(spec)
    elif kind == "BackendTrafficPolicy":
        _check_backend_policy(spec)
    elif kind == "EnvoyFilter":
        envoy_filters.patches(spec)
    elif kind == "RateLimit":
        check_rate_limit(spec)
    elif key == r.MESH_CONFIG_KEY:
        mesh_config(spec)
    elif kind in ("Pod", "Endpoints", "EndpointSlice"):
        _check_addresses(spec)
    elif isinstance(spec, r.PeerAuthentication | r.AuthorizationPolicy | r.RequestAuthentication):
        check_security(spec)
    elif isinstance(spec, r.Telemetry):
        check_telemetry(spec)


def _check_addresses(spec: r.Pod | r.Endpoints | r.EndpointSlice) -> None:
    """One endpoint that is no IP address, and an Envoy refuses all endpoints of its cluster."""
    found: Iterator[tuple[str, str]]
    if isinstance(spec, r.Pod):
        found = iter([("status.podIP", spec.status.pod_ip)] if spec.status.pod_ip else [])
    elif isinstance(spec, r.Endpoints):
        found = (
            (f"subsets[{index}].addresses[{number}].ip", address.ip)
            for index, subset in enumerate(spec.subsets)
            for number, address in enumerate(subset.addresses)
        )
    else:
        found = (
            (f"endpoints[{index}].addresses[{number}]", address)
            for index, endpoint in enumerate(spec.endpoints if spec.address_type != "FQDN" else ())
            for number, address in enumerate(endpoint.addresses)
        )
    for field, address in found:
        if not _is_address(address) or address.startswith("["):
            raise Refused(field, f"must be an IP address: {address!r}")


def _check_host(host: str, field: str, *, wildcard: bool = True) -> None:
    if not _HOST.match(host) or len(host) > 255:
        raise Refused(field, f"no host name: {host!r}")
    if not wildcard and "*" in host:
        raise Refused(field, f"must be one host, not a wildcard: {host!r}")


def _check_export(names: list[str], field: str = "exportTo") -> None:
    for index, name in enumerate(names):
        if name not in (".", "*", "~") and not r.NAMESPACE.match(name):
            raise Refused(f"{field}[{index}]", f"must be a namespace, '.', '*' or '~': {name!r}")


def check_virtual_service(spec: r.VirtualService) -> None:
    """Raises Refused, with the field below the spec."""
    if not spec.hosts:
        _check_delegate(spec)
    for index, host in enumerate(spec.hosts):
        if not _is_address(host):
            _check_host(host, f"hosts[{index}]")
    if len({host.lower() for host in spec.hosts}) != len(spec.hosts):
        raise Refused("hosts", "names a host twice")
    if not spec.http and spec.tls is None and spec.tcp is None:
        raise Refused("http", "is missing: a VirtualService needs http, tls or tcp routes")
    _check_export(spec.export_to)
    for index, route in enumerate(spec.http):
        _check_route(route, f"http[{index}]")


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


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
    except ValueError:
        return False
    return True


def _is_network(address: str) -> bool:
    try:
        ipaddress.ip_network(address, strict=False)
    except ValueError:
        return False
    return True


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
        _check_host(destination.destination.host, f"{place}.destination.host", wildcard=False)
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
            _check_head_text(getattr(route.redirect, name), f"{at}.redirect.{msgspec_name(name)}")
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
    if route.retries is not None:
        _check_retries(route.retries, f"{at}.retries")
    if route.fault is not None:
        _check_fault(route.fault, f"{at}.fault")
    if route.mirror is not None and route.mirrors:
        raise Refused(f"{at}.mirrors", "either mirror or mirrors")
    for place, mirror in (
        *(((f"{at}.mirror", route.mirror),) if route.mirror else ()),
        *((f"{at}.mirrors[{index}].destination", each.destination) for index, each in enumerate(route.mirrors)),
    ):
        _check_host(mirror.host, f"{place}.host", wildcard=False)


def _check_match(match: r.HTTPMatchRequest, at: str) -> None:
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
            elif name != "queryParams" and not _HEADER.match(key):
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
        _check_regex(match.regex, f"{at}.regex")


def _check_regex(pattern: str, at: str) -> None:
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        re2.compile(pattern, options)
    except re2.error as error:
        told = error.args[0] if error.args else error
        raise Refused(at, f"is no RE2 expression: {told.decode() if isinstance(told, bytes) else told}") from None


def _check_headers(headers: r.Headers, at: str) -> None:
    for side in ("request", "response"):
        operations: r.HeaderOperations = getattr(headers, side)
        for kind in ("set", "add", "remove"):
            for name in getattr(operations, kind):
                if not _HEADER.match(name) or (name.startswith(":") and name != ":authority"):
                    raise Refused(f"{at}.{side}.{kind}", f"no header name: {name!r}")
            values = getattr(operations, kind)
            if isinstance(values, dict):
                for name, value in values.items():
                    if name.lower() in _FRAMING:
                        raise Refused(f"{at}.{side}.{kind}.{name}", "follows from the body, and can't be set")
                    _check_head_text(value, f"{at}.{side}.{kind}.{name}")


def _check_head_text(text: str, at: str) -> None:
    """Of what stands in a message's head one day: after a line break in it, a header would begin that nobody gave."""
    if _NOT_IN_A_HEAD.search(text):
        raise Refused(at, f"holds a character that no header may hold: {text!r}")


def _check_rewrite(rewrite: r.HTTPRewrite, at: str) -> None:
    if rewrite.uri and rewrite.uri_regex_rewrite is not None:
        raise Refused(at, "either uri or uriRegexRewrite")
    if not rewrite.uri and not rewrite.authority and rewrite.uri_regex_rewrite is None:
        raise Refused(at, "rewrites nothing: give uri, authority or uriRegexRewrite")
    _check_head_text(rewrite.uri, f"{at}.uri")
    _check_head_text(rewrite.authority, f"{at}.authority")
    if rewrite.uri_regex_rewrite is not None:
        _check_regex(rewrite.uri_regex_rewrite.match, f"{at}.uriRegexRewrite.match")
        _check_head_text(rewrite.uri_regex_rewrite.rewrite, f"{at}.uriRegexRewrite.rewrite")
        _check_substitution(rewrite.uri_regex_rewrite, f"{at}.uriRegexRewrite.rewrite")


def _check_substitution(rewrite: r.RegexRewrite, at: str) -> None:
    """RE2 knows `\\0` to `\\9`, as many as the pattern has groups, and `\\\\`."""
    import re2

    groups = re2.compile(rewrite.match).groups
    for escaped in re.findall(r"\\(.?)", rewrite.rewrite):
        if escaped != "\\" and not (escaped and escaped in "0123456789" and int(escaped) <= groups):
            raise Refused(at, f"has a \\{escaped} that is no group of the pattern, which has {groups}")


def _check_retries(retries: r.HTTPRetry, at: str) -> None:
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


def _check_destination_rule(spec: r.DestinationRule) -> None:
    if spec.host != "*":
        _check_host(spec.host, "host")
    _check_export(spec.export_to)
    if spec.traffic_policy is not None:
        _check_policy(spec.traffic_policy, "trafficPolicy")
    seen: set[str] = set()
    for index, subset in enumerate(spec.subsets):
        at = f"subsets[{index}]"
        if not _SUBSET.match(subset.name):
            raise Refused(f"{at}.name", f"no subset name: {subset.name!r}")
        if subset.name in seen:
            raise Refused(f"{at}.name", f"{subset.name!r} is there twice")
        seen.add(subset.name)
        if subset.traffic_policy is not None:
            _check_policy(subset.traffic_policy, f"{at}.trafficPolicy")


def _check_policy(policy: r.TrafficPolicy, at: str) -> None:
    _check_blocks(policy, at)
    for index, level in enumerate(policy.port_level_settings):
        _check_blocks(level, f"{at}.portLevelSettings[{index}]")


def _check_blocks(policy: r.TrafficPolicy | r.PortTrafficPolicy, at: str) -> None:
    if policy.tls is not None:
        _check_tls(policy.tls, f"{at}.tls")
    if policy.outlier_detection is not None:
        _check_outlier(policy.outlier_detection, f"{at}.outlierDetection")
    if policy.connection_pool is not None:
        _check_pool(policy.connection_pool, f"{at}.connectionPool")
    if policy.load_balancer is not None:
        _check_balancer(policy.load_balancer, f"{at}.loadBalancer")


def _check_tls(tls: r.ClientTLSSettings, at: str) -> None:
    if tls.mode == "ISTIO_MUTUAL" and (tls.client_certificate or tls.private_key or tls.ca_certificates):
        raise Refused(f"{at}.mode", "ISTIO_MUTUAL shows the mesh's own certificate: files contradict it")
    if tls.credential_name is not None:
        raise Refused(f"{at}.credentialName", "secrets are not read yet; name files")
    if tls.mode == "MUTUAL" and not (tls.client_certificate and tls.private_key):
        raise Refused(at, "MUTUAL needs clientCertificate and privateKey (files)")
    if tls.ca_crl is not None:
        raise Refused(f"{at}.caCrl", "is not checked yet, so this is refused")
    for index, name in enumerate(tls.subject_alt_names):
        if not name or "*" in name:
            raise Refused(f"{at}.subjectAltNames[{index}]", f"must be one whole name: {name!r}")
    if tls.insecure_skip_verify and (tls.subject_alt_names or tls.ca_certificates):
        raise Refused(f"{at}.insecureSkipVerify", "checks nothing, so subjectAltNames and caCertificates contradict it")
    if tls.sni:
        _check_host(tls.sni, f"{at}.sni", wildcard=False)


def _check_outlier(outlier: r.OutlierDetection, at: str) -> None:
    for name in ("interval", "base_ejection_time"):
        _at_least(getattr(outlier, name), 0.001, f"{at}.{msgspec_name(name)}")


def _check_pool(pool: r.ConnectionPool, at: str) -> None:
    _at_least(pool.tcp.connect_timeout, 0.001, f"{at}.tcp.connectTimeout")
    _at_least(pool.tcp.max_connection_duration, 0.001, f"{at}.tcp.maxConnectionDuration")
    keepalive = pool.tcp.tcp_keepalive
    if keepalive is not None:
        _at_least(keepalive.time, 1, f"{at}.tcp.tcpKeepalive.time")
        _at_least(keepalive.interval, 1, f"{at}.tcp.tcpKeepalive.interval")
    for kind, timeout in (("tcp", pool.tcp.idle_timeout), ("http", pool.http.idle_timeout)):
        if timeout is not None and 0 < timeout.seconds < 0.001:
            raise Refused(f"{at}.{kind}.idleTimeout", "must be at least 1ms")


def _at_least(given: r.Duration | None, least: float, at: str) -> None:
    if given is not None and given.seconds < least:
        raise Refused(at, "must be at least 1ms" if least < 1 else f"must be at least {least:g}s")


def _check_balancer(balancer: r.LoadBalancer, at: str) -> None:
    if balancer.simple is not None and balancer.consistent_hash is not None:
        raise Refused(at, "either simple or consistentHash")
    if balancer.consistent_hash is not None:
        _check_hash(balancer.consistent_hash, f"{at}.consistentHash")
    _check_locality(balancer.locality_lb_setting, f"{at}.localityLbSetting")
    _check_zone_aware(balancer.zone_aware_lb_setting, f"{at}.zoneAwareLbSetting")
    for name in ("warmup", "warmup_duration_secs"):
        if getattr(balancer, name) is not None and (
            balancer.consistent_hash is not None or balancer.simple in ("RANDOM", "PASSTHROUGH")
        ):
            raise Refused(f"{at}.{msgspec_name(name)}", "goes with ROUND_ROBIN and LEAST_REQUEST only")
    _at_least(balancer.warmup_duration_secs, 0.001, f"{at}.warmupDurationSecs")
    if balancer.warmup is not None:
        _at_least(balancer.warmup.duration, 0.001, f"{at}.warmup.duration")
        if balancer.warmup.aggression is not None and balancer.warmup.aggression < 1:
            raise Refused(f"{at}.warmup.aggression", "must be at least 1")


def _check_hash(given: r.ConsistentHash, at: str) -> None:
    keys = {
        "httpHeaderName": given.http_header_name,
        "httpCookie": given.http_cookie,
        "useSourceIp": given.use_source_ip,
        "httpQueryParameterName": given.http_query_parameter_name,
    }
    found = [name for name, value in keys.items() if value]
    if len(found) != 1:
        told = " and ".join(found) or "none"
        raise Refused(at, f"needs exactly one of {', '.join(keys)}; found {told}")
    if given.http_header_name and not _HEADER.match(given.http_header_name):
        raise Refused(f"{at}.httpHeaderName", f"no header name: {given.http_header_name!r}")
    if given.http_cookie is not None:
        if not given.http_cookie.name or not _HEADER.match(given.http_cookie.name):
            raise Refused(f"{at}.httpCookie.name", f"no name of a cookie: {given.http_cookie.name!r}")
        if ";" in given.http_cookie.path:
            raise Refused(f"{at}.httpCookie.path", f"no path of a cookie: {given.http_cookie.path!r}")
        _check_head_text(given.http_cookie.path, f"{at}.httpCookie.path")
    if given.ring_hash is not None and given.maglev is not None:
        raise Refused(at, "either ringHash or maglev")
    for name, size in (
        ("ringHash.minimumRingSize", given.ring_hash.minimum_ring_size if given.ring_hash else 0),
        ("minimumRingSize", given.minimum_ring_size),
    ):
        if size > MAX_RING:
            raise Refused(f"{at}.{name}", f"must be at most {MAX_RING}")
    size = given.maglev.table_size if given.maglev is not None else 0
    if size and (size > MAX_TABLE or not _is_prime(size)):
        raise Refused(f"{at}.maglev.tableSize", f"must be a prime number of at most {MAX_TABLE}: {size}")


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % each for each in range(2, math.isqrt(number) + 1))


def _check_locality(given: r.LocalityLbSetting | None, at: str) -> None:
    if given is None:
        return
    blocks = [name for name in ("distribute", "failover", "failover_priority") if getattr(given, name)]
    if "distribute" in blocks and len(blocks) > 1:
        raise Refused(at, f"either distribute or {msgspec_name(blocks[1])}")
    _check_failover(given.failover, given.failover_priority, at)
    seen: list[str] = []
    for index, each in enumerate(given.distribute):
        place = f"{at}.distribute[{index}]"
        _check_place(each.from_, seen, f"{place}.from")
        targets: list[str] = []
        for target, weight in each.to.items():
            _check_place(target, targets, f"{place}.to.{target}")
            if not 1 <= weight <= 100:
                raise Refused(f"{place}.to.{target}", f"must be from 1 to 100: {weight}")
        if sum(each.to.values()) != 100:
            raise Refused(f"{place}.to", f"must add up to 100, not {sum(each.to.values())}")


def _check_zone_aware(given: r.ZoneAwareLbSetting | None, at: str) -> None:
    if given is not None:
        _check_failover(given.failover, given.failover_priority, at)


def _check_failover(failover: list[r.Failover], priority: list[str], at: str) -> None:
    if failover and (doubled := [label for label in priority if label in r.TOPOLOGY_LABELS]):
        raise Refused(f"{at}.failoverPriority", f"either failover or the label {doubled[0]}")
    for index, each in enumerate(failover):
        for side, region in (("from", each.from_), ("to", each.to)):
            if not region or "*" in region or "/" in region:
                raise Refused(f"{at}.failover[{index}].{side}", f"must be one region: {region!r}")
        if each.from_ == each.to:
            raise Refused(f"{at}.failover[{index}]", f"from and to are both {each.to!r}")
    for index, label in enumerate(priority):
        if not label or label.startswith("=") or label.count("=") > 1:
            raise Refused(f"{at}.failoverPriority[{index}]", f"must be a label or label=value: {label!r}")


def _check_place(place: str, seen: list[str], at: str) -> None:
    """`region/zone/subzone`, with a `*` for all of the rest; none may cover another (Istio, validateLocalities). Only
    `*` may, behind all others: the rest of the world."""
    parts = place.split("/")
    wild = [part for part in parts if "*" in part]
    if not place or len(parts) > 3 or not all(parts) or any(part != "*" for part in wild) or "*" in parts[:-1]:
        raise Refused(at, f"must be region/zone/subzone, with * at the end if at all: {place!r}")
    for other in seen:
        if _covers(other, place) or (place != "*" and _covers(place, other)):
            raise Refused(at, f"{place!r} and {other!r} are both for the same place")
    seen.append(place)


def _covers(wide: str, narrow: str) -> bool:
    stem = wide.removesuffix("*").removesuffix("/")
    return wide in ("*", narrow) or narrow == stem or narrow.startswith(f"{stem}/")


def msgspec_name(name: str) -> str:
    """`base_ejection_time` -> `baseEjectionTime`"""
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def _check_service_entry(spec: r.ServiceEntry) -> None:
    if not spec.hosts:
        raise Refused("hosts", "is missing")
    for index, host in enumerate(spec.hosts):
        if host == "*":
            raise Refused(f"hosts[{index}]", "* would take every host; name a domain")
        _check_host(host, f"hosts[{index}]")
    for index, address in enumerate(spec.addresses):
        if not _is_address(address.partition("/")[0]) or not _is_network(address):
            raise Refused(f"addresses[{index}]", f"must be an IP address or a CIDR: {address!r}")
    if not spec.ports:
        raise Refused("ports", "is missing")
    for kind in ("number", "name"):
        seen: set[Any] = set()
        for index, port in enumerate(spec.ports):
            value = getattr(port, kind)
            if kind == "name" and not value:
                raise Refused(f"ports[{index}].name", "is missing")
            if value in seen:
                raise Refused(f"ports[{index}].{kind}", f"{value!r} is there twice")
            seen.add(value)
    for index, port in enumerate(spec.ports):
        if port.protocol.upper() not in _PROTOCOLS:
            raise Refused(f"ports[{index}].protocol", f"unknown protocol {port.protocol!r}")
    _check_export(spec.export_to)
    for index, name in enumerate(spec.subject_alt_names):
        if not name or "*" in name:
            raise Refused(f"subjectAltNames[{index}]", f"must be one whole name: {name!r}")
    if spec.endpoints and spec.workload_selector is not None:
        raise Refused("endpoints", "either endpoints or workloadSelector")
    if spec.resolution == "NONE" and spec.endpoints:
        raise Refused("endpoints", "have no meaning with resolution NONE")
    if spec.resolution == "DYNAMIC_DNS":
        for field, given in (("endpoints", spec.endpoints), ("workloadSelector", spec.workload_selector)):
            if given:
                raise Refused(field, "has no meaning with resolution DYNAMIC_DNS: each name is looked up when called")
        for index, host in enumerate(spec.hosts):
            if "*" not in host:
                raise Refused(f"hosts[{index}]", f"DYNAMIC_DNS is for wildcards; {host!r} wants resolution DNS")
    names = {port.name for port in spec.ports}
    for index, endpoint in enumerate(spec.endpoints):
        at = f"endpoints[{index}]"
        if not endpoint.address:
            raise Refused(f"{at}.address", "is missing")
        if spec.resolution == "STATIC" and not _is_address(endpoint.address):
            raise Refused(f"{at}.address", f"must be an IP address with resolution STATIC: {endpoint.address!r}")
        for port_name in endpoint.ports:
            if port_name not in names:
                raise Refused(f"{at}.ports.{port_name}", "names no port of this ServiceEntry")
    if spec.resolution in ("DNS", "DNS_ROUND_ROBIN"):
        if not spec.endpoints and not spec.workload_selector and any("*" in host for host in spec.hosts):
            raise Refused("hosts", "a wildcard has no address to look up: give endpoints, or resolution NONE")
        if spec.resolution == "DNS_ROUND_ROBIN" and len(spec.endpoints) > 1:
            raise Refused("endpoints", "at most one with resolution DNS_ROUND_ROBIN")


def _check_workload_entry(spec: r.WorkloadEntry) -> None:
    if not spec.address:
        raise Refused("address", "is missing")
    if not _is_address(spec.address):
        _check_host(spec.address, "address", wildcard=False)


def _check_sidecar(spec: r.Sidecar) -> None:
    for index, listener in enumerate(spec.egress):
        at = f"egress[{index}]"
        if not listener.hosts:
            raise Refused(f"{at}.hosts", "is missing")
        if listener.port is None and index < len(spec.egress) - 1:
            raise Refused(f"{at}.port", "is missing: only the last listener may be for every port")
        for number, host in enumerate(listener.hosts):
            namespace, slash, name = host.rpartition("/")
            if not slash:
                raise Refused(f"{at}.hosts[{number}]", f"must be namespace/host, as in ./*: {host!r}")
            if namespace not in (".", "*", "~") and not r.NAMESPACE.match(namespace):
                raise Refused(
                    f"{at}.hosts[{number}]", f"must be a namespace, '.', '*' or '~' before the slash: {host!r}"
                )
            _check_host(name, f"{at}.hosts[{number}]")


def mesh_config(spec: r.MeshConfigMap) -> r.MeshConfig:
    """What the ConfigMap `istio` says. Raises an error that parse_text makes a problem of."""
    text = spec.data.get("mesh", "")
    try:
        content = yaml.safe_load(text) or {}
        config: r.MeshConfig = _converted(_without_nulls(content), r.MeshConfig)
    except yaml.YAMLError as error:
        raise Refused("data.mesh", f"is no YAML: {' '.join(str(error).split())}") from None
    except msgspec.ValidationError as error:
        field, reason = _explained(_with_key(str(error), content, r.MeshConfig), "data.mesh")
        raise Refused(field, reason) from None
    at = "data.mesh"
    _check_locality(config.locality_lb_setting, f"{at}.localityLbSetting")
    _check_zone_aware(config.zone_aware_lb_setting, f"{at}.zoneAwareLbSetting")
    _at_least(config.connect_timeout, 0.001, f"{at}.connectTimeout")
    if config.default_http_retry_policy is not None:
        _check_retries(config.default_http_retry_policy, f"{at}.defaultHttpRetryPolicy")
    policy = config.default_traffic_policy
    if policy is not None and policy.outlier_detection is not None:
        _check_outlier(policy.outlier_detection, f"{at}.defaultTrafficPolicy.outlierDetection")
    if policy is not None and policy.connection_pool is not None:
        _check_pool(policy.connection_pool, f"{at}.defaultTrafficPolicy.connectionPool")
    for name in (
        "default_service_export_to",
        "default_virtual_service_export_to",
        "default_destination_rule_export_to",
    ):
        _check_export(getattr(config, name), f"{at}.{msgspec_name(name)}")
    return config


# meshlib.io


def _check_backend_policy(spec: r.BackendTrafficPolicy) -> None:
    if spec.host != "*":
        _check_host(spec.host, "host")
    if spec.subset and not _SUBSET.match(spec.subset):
        raise Refused("subset", f"no subset name: {spec.subset!r}")
    if spec == r.BackendTrafficPolicy(spec.host, spec.subset):
        raise Refused("", "says nothing about its host")
    for index, name in enumerate(spec.shadow):
        if name not in SHADOWABLE:
            raise Refused(f"shadow[{index}]", f"must be one of {', '.join(sorted(SHADOWABLE))}: {name!r}")
    if spec.breaker is not None:
        _check_breaker(spec.breaker)
    if spec.retry_budget is not None:
        _at_least(spec.retry_budget.ttl, 1, "retryBudget.ttl")
    check_limits(spec.rate_limits, "rateLimits")
    check_quotas(spec.quotas, "quotas")
    if spec.hedge is not None:
        _at_least(spec.hedge.delay, 0.001, "hedge.delay")
        if spec.subset == "" and "*" in spec.host:
            raise Refused("hedge", f"must be asked for by one host, not by {spec.host!r}")
    for index, check in enumerate(spec.health_checks):
        _check_health(check, f"healthChecks[{index}]")
    detection = spec.outlier_detection
    if detection is not None:
        for kind in ("success_rate", "failure_percentage"):
            given = [name for name in detection.__struct_fields__ if name.startswith(kind) and getattr(detection, name)]
            if given and f"{kind}_enforcing" not in given:
                at = f"outlierDetection.{msgspec_name(given[0])}"
                raise Refused(at, f"has no meaning without {msgspec_name(kind + '_enforcing')}")
        _at_least(detection.max_ejection_time, 0.001, "outlierDetection.maxEjectionTime")


def _check_breaker(given: r.Breaker) -> None:
    if not (given.consecutive_failures or given.failure_rate or given.slow_call_rate or given.forced):
        raise Refused("breaker", "never opens: give consecutiveFailures, failureRate or slowCallRate, or forced")
    if given.slow_call_rate and given.slow_call is None:
        raise Refused("breaker.slowCall", "is missing: from how long on is a call slow?")
    for name in ("slow_call", "window", "open_for"):
        _at_least(getattr(given, name), 0.001, f"breaker.{msgspec_name(name)}")


def _check_health(check: r.HealthCheck, at: str) -> None:
    kinds = [name for name in ("http", "grpc", "tcp") if getattr(check, name) is not None]
    if len(kinds) != 1:
        raise Refused(at, f"needs exactly one of http, grpc and tcp; found {' and '.join(kinds) or 'none'}")
    for name in ("interval", "timeout"):
        _at_least(getattr(check, name), 0.001, f"{at}.{name}")
    if check.http is not None:
        if not check.http.path.startswith("/"):
            raise Refused(f"{at}.http.path", f"must begin with a slash: {check.http.path!r}")
        _check_head_text(check.http.path, f"{at}.http.path")
        _check_head_text(check.http.host, f"{at}.http.host")
        for index, each in enumerate(check.http.expected_statuses):
            if statuses(each) is None:
                raise Refused(f"{at}.http.expectedStatuses[{index}]", f"must be as 200 or 200-299: {each!r}")


def statuses(given: int | str) -> tuple[int, int] | None:
    """`204` -> (204, 204), `200-299` -> (200, 299); None for what is neither."""
    first, dash, last = str(given).partition("-")
    if not first.isdecimal() or not (last.isdecimal() or not dash):
        return None
    found = (int(first), int(last) if dash else int(first))
    return found if 100 <= found[0] <= found[1] <= 599 else None


def _check_gateway(spec: r.Gateway) -> None:
    if not spec.servers:
        raise Refused("servers", "is missing")
    for index, server in enumerate(spec.servers):
        at = f"servers[{index}]"
        if not server.hosts:
            raise Refused(f"{at}.hosts", "is missing")
        for number, host in enumerate(server.hosts):
            namespace, slash, name = host.rpartition("/")
            if slash and namespace not in (".", "*") and not r.NAMESPACE.match(namespace):
                raise Refused(f"{at}.hosts[{number}]", f"no namespace before the slash: {host!r}")
            _check_host(name, f"{at}.hosts[{number}]")
        protocol = server.port.protocol.upper()
        if protocol not in ("HTTP", "HTTPS", "HTTP2", "GRPC"):
            reason = "is not there yet" if protocol in ("TCP", "TLS", "MONGO", "GRPC-WEB") else "is unknown"
            raise Refused(f"{at}.port.protocol", f"{server.port.protocol!r} {reason}; there are HTTP and HTTPS")
        tls = server.tls
        if protocol == "HTTPS":
            if tls is None or tls.mode is None:
                raise Refused(f"{at}.tls.mode", "is missing: HTTPS needs SIMPLE")
            if tls.mode not in ("SIMPLE", "MUTUAL", "OPTIONAL_MUTUAL"):
                there = "there are SIMPLE, MUTUAL and OPTIONAL_MUTUAL"
                raise Refused(f"{at}.tls.mode", f"{tls.mode} is not there yet; {there}")
            if tls.credential_names:
                raise Refused(f"{at}.tls.credentialNames", "there is one certificate for a server: use credentialName")
            has_files = bool(tls.server_certificate or tls.private_key or tls.ca_certificates)
            if tls.credential_name and has_files:
                raise Refused(f"{at}.tls.credentialName", "contradicts the files that are named beside it")
            if not tls.credential_name and not (tls.server_certificate and tls.private_key):
                raise Refused(f"{at}.tls", "needs credentialName, or serverCertificate and privateKey (files)")
            if tls.mode != "SIMPLE" and not tls.credential_name and not tls.ca_certificates:
                raise Refused(f"{at}.tls.caCertificates", f"is missing: {tls.mode} checks the client's certificate")
            for name in ("subject_alt_names", "verify_certificate_spki", "verify_certificate_hash", "ca_crl"):
                if getattr(tls, name):
                    # Whoever asks for a check must not be let in without it.
                    raise Refused(f"{at}.tls.{msgspec_name(name)}", "is not checked yet, so this is refused")
        elif tls is not None and tls.mode is not None:
            raise Refused(f"{at}.tls.mode", f"has no meaning on a port of protocol {server.port.protocol}")


# What is valid and has no effect


def _warnings(given: r.Object) -> Iterator[ConfigurationWarning]:
    group = _group(given)
    if given.spec is None:
        if group.endswith(_NOT_YET_GROUPS):
            yield ConfigurationWarning(given.source, given.title, "", "has no effect yet")
        return
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
    if isinstance(given.spec, r.EnvoyFilter):
        for passed_over in envoy_filters.patches(given.spec)[1]:
            at = f"spec.{passed_over.at}" if passed_over.at else ""
            yield ConfigurationWarning(given.source, given.title, at, passed_over.reason)
    if isinstance(given.spec, r.VirtualService):
        for index, rule in enumerate(given.spec.http):
            for kind, fault in (("delay", rule.fault and rule.fault.delay), ("abort", rule.fault and rule.fault.abort)):
                if fault and fault.percentage is None and not getattr(fault, "percent", None):
                    field = f"spec.http[{index}].fault.{kind}.percentage"
                    yield ConfigurationWarning(
                        given.source, given.title, field, "is missing, so no request is affected"
                    )


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
