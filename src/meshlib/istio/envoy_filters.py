"""What do EnvoyFilters say that is understood here? Rate limits, in the shapes that Istio's own samples show.

An EnvoyFilter patches Envoy's configuration, and there is no Envoy here: of all that it could say, the filters
envoy.filters.http.local_ratelimit and envoy.filters.http.ratelimit are read, and the actions that they ask about. A
patch is understood as a whole or has no effect, and then a warning says which field is to blame: half a limit would
be another one than its author meant. Sources: istio.io/api networking/v1alpha3/envoy_filter.proto, and Envoy's protos
that are named below.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, TypeVar

from meshlib.istio import resources as r
from meshlib.istio.checks.parts import check_regex
from meshlib.istio.problems import Refused
from meshlib.model import HeaderMatch, LimitAnswer, LimitKey, StringMatch
from meshlib.model.values import dataclass

T = TypeVar("T")
Contexts = frozenset[str]
INBOUND, GATEWAY = "SIDECAR_INBOUND", "GATEWAY"
_LOCAL = "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit"
_SERVICE = "envoy.extensions.filters.http.ratelimit.v3.RateLimit"
_TYPED_STRUCTS = ("udpa.type.v1.TypedStruct", "xds.type.v3.TypedStruct")
_MANAGER = "envoy.filters.network.http_connection_manager"
_INSERTS = ("ADD", "INSERT_BEFORE", "INSERT_AFTER", "INSERT_FIRST")
_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?s\Z")
_INBOUND_HOST = re.compile(r"inbound\|(?:http)?\|([0-9]+)\Z")
_HOST_AND_PORT = re.compile(r"([^:|]+):([0-9]+)\Z")
_LONGEST = 315_576_000_000
UNLIMITED = 0xFFFFFFFF


class NotYet(Exception):
    """Valid, and not understood here."""

    def __init__(self, at: str, reason: str = "has no effect yet") -> None:
        super().__init__(at, reason)
        self.at, self.reason = at, reason


@dataclass(frozen=True, slots=True)
class Scope:
    """Which calls a patch is for. port: 0 is all. hosts: () is all."""

    contexts: Contexts = frozenset({INBOUND, GATEWAY})
    port: int = 0
    hosts: tuple[str, ...] = ()

    def covers(self, other: Scope) -> bool:
        return not self.hosts and self.port in (0, other.port)

    def both(self, other: Scope) -> Scope | None:
        """The calls that both are for; None when there are none."""
        if (self.port and other.port and self.port != other.port) or (
            self.hosts and other.hosts and self.hosts != other.hosts
        ):
            return None
        return Scope(self.contexts & other.contexts, self.port or other.port, self.hosts or other.hosts)


@dataclass(frozen=True, slots=True)
class Bucket:
    tokens: int
    per_fill: int
    interval: float


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of `rate_limits`: how a call is described. stage: only filters of the same ask about it."""

    keys: tuple[LimitKey, ...]
    stage: int = 0
    hits: int = 1


@dataclass(frozen=True, slots=True)
class LocalLimit:
    """A LocalRateLimit. descriptors: entries (key, value), "" being any value, and their bucket. always_default: the
    default bucket counts calls that a descriptor concerns, too. enforced: otherwise it only counts."""

    name: str
    scope: Scope
    default: Bucket | None = None
    descriptors: tuple[tuple[tuple[tuple[str, str], ...], Bucket], ...] = ()
    actions: tuple[Action, ...] = ()
    always_default: bool = True
    answers: bool = False
    enabled: bool = False
    enforced: bool = False
    stage: int = 0
    answer: LimitAnswer = field(default_factory=lambda: LimitAnswer(grpc_status=14))


@dataclass(frozen=True, slots=True)
class ServiceLimit:
    """A RateLimit filter, which asks a service. cluster: of Envoy's, that leads there; or target, its host:port."""

    scope: Scope
    domain: str
    cluster: str
    target: str = ""
    actions: tuple[Action, ...] = ()
    timeout: float | None = None
    denies: bool = False
    status_on_failure: int = 500
    answers: bool = False
    stage: int = 0
    answer: LimitAnswer = field(default_factory=lambda: LimitAnswer(grpc_status=14))


@dataclass(frozen=True, slots=True)
class Described:
    """What a virtual host or a route adds: actions, and a LocalRateLimit in the place of the filter's own."""

    scope: Scope
    actions: tuple[Action, ...]
    local: LocalLimit | None = None


@dataclass(frozen=True, slots=True)
class AddedCluster:
    name: str
    target: str


Patch = LocalLimit | ServiceLimit | Described | AddedCluster


def patches(spec: r.EnvoyFilter) -> tuple[list[tuple[int, Patch]], list[NotYet]]:
    """What is understood, by the patch's index, and why the rest is not. Raises Refused for what Envoy refuses."""
    if spec.target_refs:
        return [], [NotYet("targetRefs")]
    if not spec.config_patches:
        return [], [NotYet("")]
    found: list[tuple[int, Patch]] = []
    passed_over: list[NotYet] = []
    for index, given in enumerate(spec.config_patches):
        at = f"configPatches[{index}]"
        try:
            found.append((index, _patch(given, at)))
        except NotYet as reason:
            passed_over.append(reason)
    return found, passed_over


class _Fields:
    """A message as JSON or YAML has it: names in either of protobuf's spellings, each to be taken once."""

    def __init__(self, value: Any, at: str) -> None:
        if not isinstance(value, Mapping):
            raise Refused(at, f"must be a mapping, not {value!r}")
        self.at = at
        self._values = {_snake(str(name)): (str(name), each) for name, each in value.items()}

    def place(self, name: str) -> str:
        return f"{self.at}.{self._values[name][0] if name in self._values else name}"

    def take(self, name: str, read: Callable[[Any, str], T], otherwise: T) -> T:
        if name not in self._values:
            return otherwise
        place = self.place(name)
        return read(self._values.pop(name)[1], place)

    def part(self, name: str) -> _Fields:
        """The message in a field; an empty one where there is none."""
        return self.take(name, _Fields, _Fields({}, f"{self.at}.{name}"))

    def items(self, name: str) -> list[tuple[Any, str]]:
        nothing: list[tuple[Any, str]] = []
        return self.take(name, _list, nothing)

    def taken(self, name: str) -> Any:
        return self._values.pop(name)[1] if name in self._values else None

    def has(self, name: str) -> bool:
        return name in self._values

    def done(self, *harmless: str) -> None:
        """Raises NotYet for what is left."""
        for name, (written, value) in self._values.items():
            if name not in harmless and value not in (None, False, 0, "", [], {}):
                raise NotYet(f"{self.at}.{written}", "is not understood here, so this patch has no effect")


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])([A-Z])", lambda found: f"_{found[1].lower()}", name)


def _text(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise Refused(at, f"must be text: {value!r}")
    return value


def _flag(value: Any, at: str) -> bool:
    if not isinstance(value, bool):
        raise Refused(at, f"must be true or false: {value!r}")
    return value


def _whole(least: int, most: int = 0xFFFFFFFF) -> Callable[[Any, str], int]:
    def read(value: Any, at: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise Refused(at, f"must be a whole number from {least} to {most}: {value!r}")
        return value

    return read


_port = _whole(0, 65535)


def _seconds(value: Any, at: str) -> float:
    if not isinstance(value, str) or not _SECONDS.match(value):
        raise Refused(at, f"must be seconds, as in 60s or 0.5s: {value!r}")
    if (found := float(value[:-1])) > _LONGEST:
        raise Refused(at, f"is more than a Duration holds: {value!r}")
    return found


def _list(value: Any, at: str) -> list[tuple[Any, str]]:
    if not isinstance(value, list):
        raise Refused(at, f"must be a list: {value!r}")
    return [(each, f"{at}[{index}]") for index, each in enumerate(value)]


# Patches


def _patch(given: r.EnvoyConfigPatch, at: str) -> Patch:
    body = _Fields(given.patch, f"{at}.patch")
    operation = body.take("operation", _text, "")
    value = body.taken("value")
    body.done("filter_class")
    if given.apply_to == "HTTP_FILTER" and operation in _INSERTS:
        return _filter(value, _listener_scope(given.match, f"{at}.match"), f"{at}.patch.value")
    if given.apply_to in ("VIRTUAL_HOST", "HTTP_ROUTE") and operation == "MERGE":
        scope = _route_scope(given.match, f"{at}.match")
        return _described(value, scope, f"{at}.patch.value", is_route=given.apply_to == "HTTP_ROUTE")
    if given.apply_to == "CLUSTER" and operation == "ADD":
        return _cluster(value, f"{at}.patch.value")
    raise NotYet(at)


def _contexts(match: _Fields) -> Contexts:
    context = match.take("context", _text, "ANY")
    if context == "ANY":
        return frozenset({INBOUND, GATEWAY})
    if context not in (INBOUND, GATEWAY):
        raise NotYet(
            f"{match.at}.context", f"{context} has no effect yet: limits of calls out are a BackendTrafficPolicy's"
        )
    return frozenset({context})


def _listener_scope(given: Mapping[str, Any], at: str) -> Scope:
    match = _Fields(given, at)
    contexts = _contexts(match)
    listener = match.part("listener")
    port = listener.take("port_number", _port, 0)
    chain = listener.part("filter_chain")
    network = chain.part("filter")
    if network.take("name", _text, _MANAGER) != _MANAGER:
        raise NotYet(network.place("name"))
    network.part("sub_filter")  # beside which filter it stands matters to nobody here
    for each in (network, chain, listener, match):
        each.done()
    return Scope(contexts, port)


def _route_scope(given: Mapping[str, Any], at: str) -> Scope:
    match = _Fields(given, at)
    contexts = _contexts(match)
    routes = match.part("route_configuration")
    port = routes.take("port_number", _port, 0)
    if (name := routes.take("name", _text, "")) and (listens := re.match(r"http\.([0-9]+)\Z", name)):
        port = _port(int(listens[1]), f"{routes.at}.name")
    elif name:
        raise NotYet(f"{routes.at}.name")
    host = routes.part("vhost")
    name = host.take("name", _text, "")
    domain = host.take("domain_name", _text, "")
    hosts = (domain,) if domain else ()
    if inbound := _INBOUND_HOST.match(name):
        port = _port(int(inbound[1]), f"{host.at}.name")
    elif named := _HOST_AND_PORT.match(name):
        port = _port(int(named[2]), f"{host.at}.name")
        hosts = () if named[1] == "*" else (named[1],)
    elif name:
        raise NotYet(
            f"{host.at}.name", f"no virtual host is named {name!r} here; there are inbound|http|PORT and HOST:PORT"
        )
    route = host.part("route")
    if route.take("action", _text, "ANY") not in ("ANY", "ROUTE"):
        raise NotYet(f"{route.at}.action")
    for each in (route, host, routes, match):
        each.done()
    return Scope(contexts, port, hosts)


def _filter(value: Any, scope: Scope, at: str) -> Patch:
    given = _Fields(value, at)
    given.taken("name")
    kind, config = given.take("typed_config", _any, ("", _Fields({}, at)))
    given.done()
    if kind == _LOCAL:
        return _local(config, scope)
    if kind == _SERVICE:
        return _service(config, scope)
    raise NotYet(at, f"{kind or 'a filter without typed_config'} has no effect yet")


def _any(value: Any, at: str) -> tuple[str, _Fields]:
    """The type's name and its fields, in an Any by itself or with a TypedStruct in between."""
    given = _Fields(value, at)
    name = given.take("@type", _text, "").rpartition("/")[2]
    if name not in _TYPED_STRUCTS:
        return name, given
    name = given.take("type_url", _text, "").rpartition("/")[2]
    return name, given.part("value")


def _described(value: Any, scope: Scope, at: str, *, is_route: bool) -> Described:
    given = _Fields(value, at)
    holder = given.part("route") if is_route else given
    nothing: tuple[Action, ...] = ()
    actions = holder.take("rate_limits", _actions, nothing)
    local = None
    filters = given.part("typed_per_filter_config")
    if filters.has("envoy.filters.http.local_ratelimit"):
        kind, config = filters.take("envoy.filters.http.local_ratelimit", _any, ("", given))
        if kind != _LOCAL:
            raise NotYet(config.at, f"{kind} has no effect yet")
        local = _local(config, scope)
    for each in (filters, holder, given):
        each.done()
    if not actions and local is None:
        raise NotYet(at)
    return Described(scope, actions, local)


def _cluster(value: Any, at: str) -> AddedCluster:
    """envoy/config/cluster/v3/cluster.proto. How it balances is no matter: the mesh does, or DNS."""
    given = _Fields(value, at)
    name = given.take("name", _text, "")
    assignment = given.part("load_assignment")
    for locality, place in assignment.items("endpoints"):
        for endpoint, below in _Fields(locality, place).items("lb_endpoints"):
            inner = _Fields(endpoint, below).part("endpoint")
            address = inner.part("address").part("socket_address")
            host, port = address.take("address", _text, ""), address.take("port_value", _port, 0)
            if "" not in (name, host) and port:
                return AddedCluster(name, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    raise NotYet(at)


# envoy/extensions/filters/http/local_ratelimit/v3/local_rate_limit.proto


def _local(given: _Fields, scope: Scope) -> LocalLimit:
    default = given.take("token_bucket", _bucket, None)
    found = LocalLimit(
        given.take("stat_prefix", _text, ""),
        scope,
        default,
        tuple(given.take("descriptors", _descriptors, [])),
        given.take("rate_limits", _actions, ()),
        given.take("always_consume_default_token_bucket", _flag, True),
        given.take("enable_x_ratelimit_headers", _draft, False),
        given.take("filter_enabled", _share, False),
        given.take("filter_enforced", _share, False),
        given.take("stage", _whole(0), 0),
        _answer(given, "status"),
    )
    given.done("max_dynamic_descriptors", "request_headers_to_add_when_not_enforced")
    return found


def _bucket(value: Any, at: str) -> Bucket:
    given = _Fields(value, at)
    if not given.has("max_tokens"):
        raise Refused(f"{at}.max_tokens", "is missing")
    if not given.has("fill_interval"):
        raise Refused(f"{at}.fill_interval", "is missing")
    made = Bucket(
        given.take("max_tokens", _whole(1), 1),
        given.take("tokens_per_fill", _whole(1), 1),
        given.take("fill_interval", _seconds, 0.0),
    )
    if made.interval < 0.05:
        raise Refused(f"{at}.fill_interval", "must be at least 0.05s (Envoy)")
    given.done()
    return made


def _descriptors(value: Any, at: str) -> list[tuple[tuple[tuple[str, str], ...], Bucket]]:
    found = []
    for each, place in _list(value, at):
        given = _Fields(each, place)
        entries = []
        for entry, below in given.items("entries"):
            pair = _Fields(entry, below)
            entries.append((pair.take("key", _text, ""), pair.take("value", _text, "")))
            pair.done()
        bucket = given.take("token_bucket", _bucket, None)
        if not entries or bucket is None:
            raise Refused(place, "needs entries and a token_bucket")
        given.done()
        found.append((tuple(entries), bucket))
    return found


def _share(value: Any, at: str) -> bool:
    """A RuntimeFractionalPercent: all or nothing."""
    given = _Fields(value, at)
    given.taken("runtime_key")
    percent = given.part("default_value")
    numerator = percent.take("numerator", _whole(0), 0)
    whole = {"HUNDRED": 100, "TEN_THOUSAND": 10_000, "MILLION": 1_000_000}
    denominator = whole.get(percent.take("denominator", _text, "HUNDRED"))
    if denominator is None:
        raise Refused(f"{at}.default_value.denominator", f"must be one of {', '.join(whole)}")
    if 0 < numerator < denominator:
        raise NotYet(at, "is understood for no calls and for all, not for some: this patch has no effect")
    given.done()
    return numerator > 0


def _draft(value: Any, at: str) -> bool:
    if value not in ("OFF", "DRAFT_VERSION_03", 0, 1):
        raise Refused(at, f"must be OFF or DRAFT_VERSION_03: {value!r}")
    return value in ("DRAFT_VERSION_03", 1)


def _answer(given: _Fields, status: str) -> LimitAnswer:
    exhausted = given.take("rate_limited_as_resource_exhausted", _flag, False)
    return LimitAnswer(
        given.take(status, _status, 429),
        8 if exhausted else 14,
        tuple(given.take("response_headers_to_add", _headers, [])),
    )


def _status(value: Any, at: str) -> int:
    given = _Fields(value, at)
    code: Any = given.taken("code")
    named = {"TooManyRequests": 429, "ServiceUnavailable": 503, "Forbidden": 403, "InternalServerError": 500}
    found = code if isinstance(code, int) else named.get(str(code), 0)
    if isinstance(code, bool) or not 400 <= found <= 599:  # Envoy takes no other
        raise Refused(f"{at}.code", f"must be a status of 400 and above: {code!r}")
    return found


def _headers(value: Any, at: str) -> list[tuple[str, str]]:
    """HeaderValueOptions (envoy/config/core/v3/base.proto)."""
    found = []
    for each, place in _list(value, at):
        option = _Fields(each, place)
        header = option.part("header")
        name, text = header.take("key", _text, ""), header.take("value", _text, "")
        if not name or any(not "\x20" <= letter <= "\x7e" for letter in name + text):
            raise Refused(f"{place}.header", f"is no header: {name!r}")
        if "%" in text:
            raise NotYet(
                f"{place}.header.value", "command operators are not understood here, so this patch has no effect"
            )
        option.done("append", "append_action")
        found.append((name.lower(), text))
    return found


# envoy/extensions/filters/http/ratelimit/v3/rate_limit.proto


def _service(given: _Fields, scope: Scope) -> ServiceLimit:
    domain = given.take("domain", _text, "")
    if not domain:
        raise Refused(f"{given.at}.domain", "is missing")
    who = given.part("rate_limit_service")
    grpc = who.part("grpc_service")
    envoys = grpc.part("envoy_grpc")
    googles = grpc.part("google_grpc")
    cluster = envoys.take("cluster_name", _text, "")
    target = googles.take("target_uri", _text, "").removeprefix("dns:").lstrip("/")
    if not cluster and not target:
        raise Refused(
            f"{given.at}.rate_limit_service.grpc_service", "needs envoy_grpc.cluster_name or google_grpc.target_uri"
        )
    # Envoy passes the service's own timeout over, and waits 20 ms where the filter names none.
    meant = grpc.take("timeout", _seconds, None)
    found = ServiceLimit(
        scope,
        domain,
        cluster,
        target,
        given.take("rate_limits", _actions, ()),
        given.take("timeout", _seconds, meant),
        given.take("failure_mode_deny", _flag, False),
        given.take("status_on_error", _status, 500),
        given.take("enable_x_ratelimit_headers", _draft, False),
        given.take("stage", _whole(0), 0),
        _answer(given, "rate_limited_status"),
    )
    if found.timeout is not None and found.timeout < 0.001:
        raise Refused(f"{given.at}.timeout", "must be at least 1ms")
    if given.take("request_type", _text, "both") not in ("both", ""):
        raise NotYet(f"{given.at}.request_type", "is understood only as both, so this patch has no effect")
    envoys.done("authority")
    googles.done("stat_prefix")
    grpc.done()
    who.done("transport_api_version")
    given.done("stat_prefix", "disable_x_envoy_ratelimited_header")
    return found


# envoy/config/route/v3/route_components.proto, RateLimit


def _actions(value: Any, at: str) -> tuple[Action, ...]:
    found = []
    for each, place in _list(value, at):
        given = _Fields(each, place)
        keys = tuple(_key(action, below) for action, below in given.items("actions"))
        if not keys:
            raise Refused(f"{place}.actions", "is empty")
        hits = given.part("hits_addend")
        found.append(Action(keys, given.take("stage", _whole(0), 0), hits.take("number", _whole(0), 1)))
        hits.done()
        given.done()
    return tuple(found)


def _key(value: Any, at: str) -> LimitKey:
    action = _Fields(value, at)
    for name, read in _ACTIONS.items():
        if action.has(name):
            given = _Fields(action.taken(name), f"{at}.{name}")
            found = read(given)
            given.done()
            action.done()
            return found
    raise NotYet(at, "is an action that is not understood here, so this patch has no effect")


def _request_headers(given: _Fields) -> LimitKey:
    name, entry = given.take("header_name", _text, "").lower(), given.take("descriptor_key", _text, "")
    if not name or not entry:
        raise Refused(given.at, "needs header_name and descriptor_key")
    return LimitKey("header", name, entry, optional=given.take("skip_if_absent", _flag, False))


def _generic_key(given: _Fields) -> LimitKey:
    value, entry = given.take("descriptor_value", _text, ""), given.take("descriptor_key", _text, "generic_key")
    if not value:
        raise Refused(f"{given.at}.descriptor_value", "is missing")
    return LimitKey("value", entry=entry, value=value)


def _header_value_match(given: _Fields) -> LimitKey:
    value, entry = given.take("descriptor_value", _text, ""), given.take("descriptor_key", _text, "header_match")
    headers = tuple(_header(each, place) for each, place in given.items("headers"))
    if not value or not headers:
        raise Refused(given.at, "needs descriptor_value and headers")
    expected = given.take("expect_match", _flag, True)
    return LimitKey("match", entry=entry, value=value, headers=headers, invert=not expected)


_ACTIONS: Mapping[str, Callable[[_Fields], LimitKey]] = {
    "request_headers": _request_headers,
    "remote_address": lambda _: LimitKey("address", entry="remote_address"),
    "generic_key": _generic_key,
    "header_value_match": _header_value_match,
}


def _header(value: Any, at: str) -> HeaderMatch:
    given = _Fields(value, at)
    name = given.take("name", _text, "").lower()
    if not name:
        raise Refused(f"{at}.name", "is missing")
    match = given.take("string_match", _string, StringMatch("present"))
    for kind in ("exact", "prefix", "suffix", "contains"):
        if given.has(f"{kind}_match"):
            match = StringMatch(kind, given.take(f"{kind}_match", _text, ""))
    if given.has("safe_regex_match"):
        match = _string({"safe_regex": given.taken("safe_regex_match")}, f"{at}.safe_regex_match")
    inverted = given.take("invert_match", _flag, False)
    if given.has("present_match"):
        inverted ^= not given.take("present_match", _flag, True)
    given.done()
    return HeaderMatch(name, match, inverted)


def _string(value: Any, at: str) -> StringMatch:
    given = _Fields(value, at)
    ignore_case = given.take("ignore_case", _flag, False)
    found = StringMatch("present")
    for kind in ("exact", "prefix", "suffix", "contains"):
        if given.has(kind):
            found = StringMatch(kind, given.take(kind, _text, ""), ignore_case)
    if given.has("safe_regex"):
        regex = _Fields(given.taken("safe_regex"), f"{at}.safe_regex")
        found = StringMatch("regex", regex.take("regex", _text, ""))
        regex.done("google_re2")
        check_regex(found.value, f"{at}.safe_regex.regex")
    given.done()
    if found.kind == "present":
        raise Refused(at, "needs one of exact, prefix, suffix, contains and safe_regex")
    return found
