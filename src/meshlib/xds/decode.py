"""What does a resource on the wire say? xDS v3 resources -> model values. What can't be understood is refused with
InvalidResource, whose text becomes the NACK; nothing else is ever raised.

Reads what encode.py writes, and what Istio's and gRPC's control planes write as far as the model can hold it.
A field that is not known is passed over where it refines, and refused where it restricts: a condition of a match, a
check of a certificate, a filter that may turn a call away. Without it more would be let through than was meant.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from google.protobuf.message import DecodeError

from meshlib.errors import InvalidResource
from meshlib.model import (
    INBOUND_PREFIX,
    Access,
    ClaimMatch,
    Cluster,
    Cors,
    DirectResponse,
    Fault,
    FaultAbort,
    FaultDelay,
    FilterChain,
    Forward,
    HashPolicy,
    HeaderMatch,
    HeaderOperations,
    HedgePolicy,
    Inbound,
    Listener,
    LoadAssignment,
    Mirror,
    Node,
    NodeKind,
    QueryMatch,
    Redirect,
    Reporting,
    ResetHeader,
    RetryPolicy,
    Rewrite,
    Route,
    RouteConfiguration,
    RouteMatch,
    StringMatch,
    VirtualHost,
    WeightedCluster,
    Workload,
)
from meshlib.xds import access, notes
from meshlib.xds import fields as read
from meshlib.xds import messages as m
from meshlib.xds.cors import CORS_FILTER, decode_cors
from meshlib.xds.decode_clusters import decode_assignment, decode_cluster
from meshlib.xds.decode_inbound import server_inbound
from meshlib.xds.decode_tls import downstream_tls, is_secured
from meshlib.xds.encode import (
    ACCESS,
    DEFAULT_PORT,
    FAULT_FILTER,
    INBOUND,
    MISSING_STATUSES,
    NO_RESET_HEADERS,
    REDIRECT_CODES,
    REPORTING,
    WHOLE_PATH,
)
from meshlib.xds.fields import HEADER_NAME, Wrong
from meshlib.xds.notes import OWN
from meshlib.xds.rbac import JWT_FILTER, PAYLOAD
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE

Decoded = Listener | Inbound | RouteConfiguration | Cluster | LoadAssignment

_NOTED = f"metadata.filter_metadata[{OWN}]"
_REDIRECT_STATUS = {number: status for status, number in REDIRECT_CODES.items()}
_MISSING_STATUS = {number: status for status, number in MISSING_STATUSES.items()}


def decode_resource(type_url: str, data: bytes) -> Decoded:
    """The value of a resource's bytes. Raises InvalidResource, naming the field."""
    known: tuple[Any, Callable[[Any], Decoded], str] | None = _DECODERS.get(type_url)
    if known is None:
        raise InvalidResource(type_url, "", "type_url", "is not a type that was asked for")
    message_type, decoder, name_field = known
    name = ""
    try:
        message = message_type.FromString(data)
        name = str(getattr(message, name_field))
        if not name:
            raise Wrong(name_field, "is empty")
        return decoder(message)
    except Wrong as error:
        raise InvalidResource(type_url, name, error.field, error.reason) from None
    except DecodeError:
        raise InvalidResource(type_url, name, "", "is not a message of this type") from None
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise InvalidResource(type_url, name, "", f"can't be understood: {error}") from error


def decode_node(message: Any) -> Node:
    """The node of a request: ours, Istio's, or any Envoy's. Raises InvalidResource when it can't be told who it is."""
    metadata = read.plain(message.metadata)
    parts = message.id.split("~")
    if not message.id:
        raise InvalidResource("envoy.config.core.v3.Node", "", "id", "is empty")
    if not message.id.isprintable():  # it stands in logs and on terminals
        raise InvalidResource("envoy.config.core.v3.Node", "", "id", "holds what can't be printed")
    kind = NodeKind.ROUTER if parts[0] in ("router", "ingress") else NodeKind.SIDECAR
    if len(parts) != 4 and message.user_agent_name == "envoy":
        kind = NodeKind.ROUTER  # an Envoy that nobody configured as a sidecar stands at the edge
    namespace = (
        read.text(metadata, "NAMESPACE") or (parts[2].rpartition(".")[2] if len(parts) == 4 else "") or "default"
    )
    labels = metadata.get("LABELS")
    ports = metadata.get("MESHLIB_PORTS")
    addresses = read.text(metadata, "INSTANCE_IPS").split(",")
    workload = Workload(
        name=read.text(metadata, "WORKLOAD_NAME") or (parts[2].partition(".")[0] if len(parts) == 4 else message.id),
        namespace=namespace,
        service=read.text(metadata, "MESHLIB_SERVICE"),
        service_account=read.text(metadata, "SERVICE_ACCOUNT") or "default",
        labels=tuple(sorted((str(k), str(v)) for k, v in labels.items())) if isinstance(labels, dict) else (),
        address=addresses[0].strip(),
        port=_port(metadata.get("MESHLIB_PORT")),
        port_names=tuple(sorted((str(k), _port(v)) for k, v in ports.items())) if isinstance(ports, dict) else (),
        locality=read.locality(message.locality),
    )
    inbound, outbound = metadata.get("MESHLIB_INBOUND"), read.text(metadata, "MESHLIB_OUTBOUND")
    sockets = inbound.items() if isinstance(inbound, dict) else ()
    # Istio's agent names its provider so, and says that it is one (grpc_bootstrap.go).
    provider = "default" if metadata.get("GENERATOR") == "grpc" else ""
    agent = message.user_agent_name
    version = message.user_agent_version
    return Node(
        id=message.id,
        workload=workload,
        kind=kind,
        user_agent=f"{agent}/{version}" if version else agent,
        trust_domain=read.text(metadata, "MESHLIB_TRUST_DOMAIN") or "cluster.local",
        cluster_id=read.text(metadata, "CLUSTER_ID") or "Kubernetes",
        ready=metadata.get("MESHLIB_READY") is True,
        certificates=read.text(metadata, "MESHLIB_CERTIFICATES") or provider,
        inbound=tuple(sorted((_inbound_port(key), _socket(value)) for key, value in sockets)),
        outbound=_socket(outbound) if outbound else "",
        metrics_port=_port(metadata.get("MESHLIB_METRICS_PORT")),
        discovery_cluster=read.text(metadata, "MESHLIB_DISCOVERY_CLUSTER"),
        takes_ttl=m.TTL_FEATURE in message.client_features,
    )


# Pieces


def _port(value: Any) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = float(value)
    return int(value) if isinstance(value, float) and 0 < value < 65536 else 0


def _inbound_port(value: Any) -> int:
    if not (port := _port(value)):
        raise InvalidResource("envoy.config.core.v3.Node", "", "metadata.MESHLIB_INBOUND", f"{value!r} is no port")
    return port


def _socket(value: Any) -> str:
    """`10.0.0.1:80`, `[::1]:80`. An Envoy is told to bind, or to call, just that."""
    host, _, port = str(value).rpartition(":")
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        port = ""
    if not _port(port):
        reason = f"{value!r} is no IP address with a port"
        raise InvalidResource("envoy.config.core.v3.Node", "", "metadata.MESHLIB_INBOUND or MESHLIB_OUTBOUND", reason)
    return str(value)


_NOT_IN_A_COOKIE = re.compile(r"[^\x20-\x3a\x3c-\x7e]")
_FRAMING = frozenset({"content-length", "transfer-encoding"})
"""They say where a message ends: whoever sets them makes the next one begin somewhere else."""


# Listeners


def _listener(message: Any) -> Listener | Inbound:
    noted = message.metadata.filter_metadata
    own = read.plain(noted[OWN]) if OWN in noted else {}
    if INBOUND in own:
        return replace(_inbound(message.name, own[INBOUND]), reporting=_reporting(own))
    if message.name.startswith(INBOUND_PREFIX):
        return server_inbound(message)
    if message.HasField("api_listener"):
        manager = read.unpacked(message.api_listener.api_listener, m.HttpConnectionManager, "api_listener.api_listener")
        routes = _rds_name(manager, "api_listener.api_listener")
        return Listener(message.name, routes, reporting=_reporting(own))
    if not message.filter_chains:
        raise Wrong("api_listener", "is missing, and there are no filter_chains")
    chains = tuple(_chain(chain, f"filter_chains[{i}]") for i, chain in enumerate(message.filter_chains))
    address = message.address.socket_address
    if not address.address or address.WhichOneof("port_specifier") != "port_value" or address.port_value > 65535:
        raise Wrong("address", f"is no address: {address.address!r} port {address.port_value}")
    rules = None
    if ACCESS in own:
        rules = access.read(Access, notes.text(own[ACCESS], f"{_NOTED}.{ACCESS}"), f"{_NOTED}.{ACCESS}")
    return Listener(message.name, "", address.address, address.port_value, chains, rules, _reporting(own))


def _reporting(own: Mapping[str, Any]) -> Reporting | None:
    if REPORTING not in own:
        return None
    field = f"{_NOTED}.{REPORTING}"
    return access.read(Reporting, notes.text(own[REPORTING], field), field)


def _inbound(name: str, note: Any) -> Inbound:
    field = f"{_NOTED}.{INBOUND}"
    inbound = access.read(Inbound, notes.text(note, field), field)
    if inbound.name != name:
        raise Wrong(f"{field}.name", f"is {inbound.name!r}")
    return inbound


def _rds_name(manager: Any, field: str) -> str:
    kind = manager.WhichOneof("route_specifier")
    if kind != "rds":
        raise Wrong(f"{field}.route_specifier", "must be rds: routes are asked for by name")
    source = manager.rds.config_source
    if source.WhichOneof("config_source_specifier") not in ("ads", "self"):
        raise Wrong(f"{field}.rds.config_source", "must be ads or self")
    if not manager.rds.route_config_name:
        raise Wrong(f"{field}.rds.route_config_name", "is empty")
    for index, each in enumerate(manager.http_filters):
        # A filter may turn calls away (RBAC, JWT): one that is not known and not optional is refused (gRFC A39).
        url = each.typed_config.type_url
        if url not in _FILTERS and not each.is_optional and not each.disabled:
            raise Wrong(f"{field}.http_filters[{index}]", f"{each.name!r} is not known here: {url or 'without a type'}")
    return str(manager.rds.route_config_name)


def _chain(message: Any, field: str) -> FilterChain:
    for index, filter_ in enumerate(message.filters):
        if filter_.typed_config.type_url == m.type_url(m.HttpConnectionManager):
            manager = read.unpacked(filter_.typed_config, m.HttpConnectionManager, f"{field}.filters[{index}]")
            name = _rds_name(manager, f"{field}.filters[{index}]")
            break
    else:
        raise Wrong(f"{field}.filters", "has no HttpConnectionManager")
    tls = None
    read.closed(message.filter_chain_match, f"{field}.filter_chain_match")
    if is_secured(message):
        context = read.unpacked(
            message.transport_socket.typed_config, m.DownstreamTlsContext, f"{field}.transport_socket.typed_config"
        )
        tls = downstream_tls(context, f"{field}.transport_socket.typed_config.common_tls_context")
    return FilterChain(name, tuple(message.filter_chain_match.server_names), tls)


# Routes


def _route_configuration(message: Any) -> RouteConfiguration:
    hosts = tuple(_virtual_host(host, f"virtual_hosts[{i}]") for i, host in enumerate(message.virtual_hosts))
    # One domain in two places is two answers to one question; Envoy refuses it too.
    seen: set[str] = set()
    for index, host in enumerate(hosts):
        for domain in host.domains:
            if domain.lower() in seen:
                raise Wrong(f"virtual_hosts[{index}].domains", f"{domain!r} is there twice")
            seen.add(domain.lower())
    return RouteConfiguration(message.name, hosts)


def _virtual_host(message: Any, field: str) -> VirtualHost:
    if not message.domains:
        raise Wrong(f"{field}.domains", "is empty")
    routes = tuple(_route(route, f"{field}.routes[{i}]") for i, route in enumerate(message.routes))
    if message.HasField("retry_policy"):
        # "If this is set, a retry policy of a route takes precedence" (route_components.proto)
        retry = _retry(message.retry_policy, f"{field}.retry_policy")
        routes = tuple(
            replace(each, action=replace(each.action, retry=retry))
            if isinstance(each.action, Forward) and each.action.retry is None
            else each
            for each in routes
        )
    return VirtualHost(message.name, tuple(message.domains), routes, message.require_tls == 2)


def _route(message: Any, field: str) -> Route:
    kind = message.WhichOneof("action")
    action: Forward | Redirect | DirectResponse
    noted = read.plain(message.metadata.filter_metadata[OWN]) if OWN in message.metadata.filter_metadata else {}
    if kind == "route":
        action = _noted_forward(_forward(message.route, f"{field}.route"), noted, f"{field}.{_NOTED}")
    elif kind == "non_forwarding_action":
        action = Forward(())
    elif kind == "redirect":
        action = _redirect(message.redirect, f"{field}.redirect")
    elif kind == "direct_response":
        body, status = message.direct_response.body, message.direct_response.status
        if body.filename:
            raise Wrong(f"{field}.direct_response.body", "must be inline")
        if not 200 <= status <= 599:
            raise Wrong(f"{field}.direct_response.status", f"is no status of a whole answer: {status}")
        action = DirectResponse(status, body.inline_bytes or body.inline_string.encode())
    else:
        raise Wrong(field, f"has no action that can be taken: {kind or 'none'}")
    fault = None
    if FAULT_FILTER in message.typed_per_filter_config:
        place = f"{field}.typed_per_filter_config[{FAULT_FILTER}]"
        fault = _fault(read.unpacked(message.typed_per_filter_config[FAULT_FILTER], m.HTTPFault, place), place)
    if isinstance(action, Redirect) and noted.get(DEFAULT_PORT) is True:
        action = replace(action, port=-1)
    return Route(
        _match(message.match, f"{field}.match"),
        action,
        message.name,
        fault,
        *_both_operations(message, field),
        read.text(noted, "origin"),
        read.text(noted, "limited_by"),
        _cors(message, noted, field),
    )


def _cors(message: Any, noted: dict[str, Any], field: str) -> Cors | None:
    """In our own words, or in Envoy's."""
    if "cors" in noted:
        return notes.read(Cors, noted["cors"], f"{field}.{_NOTED}.cors")
    if CORS_FILTER not in message.typed_per_filter_config:
        return None
    place = f"{field}.typed_per_filter_config[{CORS_FILTER}]"
    return decode_cors(read.unpacked(message.typed_per_filter_config[CORS_FILTER], m.CorsPolicy, place), place)


def _noted_forward(action: Forward, noted: dict[str, Any], field: str) -> Forward:
    """With what Envoy has no field for."""
    if "hedge" in noted:
        action = replace(action, hedge=notes.read(HedgePolicy, noted["hedge"], f"{field}.hedge"))
    retry = action.retry
    if retry is not None and NO_RESET_HEADERS in noted:
        retry = replace(retry, reset_headers=())
    if retry is not None and "resend_unsafe" in noted:
        unsafe = notes.flag(noted["resend_unsafe"], f"{field}.resend_unsafe")
        retry = replace(retry, resend_unsafe=unsafe)
    return action if retry is action.retry else replace(action, retry=retry)


def _match(message: Any, field: str) -> RouteMatch:
    read.closed(message, field)
    kind = message.WhichOneof("path_specifier")
    ignore_case = message.HasField("case_sensitive") and not message.case_sensitive.value
    path: StringMatch | None
    if kind == "prefix":
        path = StringMatch("prefix", message.prefix, ignore_case) if message.prefix not in ("", "/") else None
    elif kind == "path":
        path = StringMatch("exact", message.path, ignore_case)
    elif kind == "path_separated_prefix":
        path = StringMatch("path-prefix", message.path_separated_prefix, ignore_case)
    elif kind == "safe_regex":
        # "Ignored for safe_regex matching" (case_sensitive, route_components.proto)
        path = StringMatch("regex", read.regex(message.safe_regex.regex, f"{field}.safe_regex.regex"))
    else:
        raise Wrong(field, "has no path_specifier that is known")
    pseudo: dict[str, StringMatch] = {}
    headers: list[HeaderMatch] = []
    for index, each in enumerate(message.headers):
        for header in read.header(each, f"{field}.headers[{index}]"):
            if header.name not in (":method", ":scheme", ":authority"):
                headers.append(header)
            elif header.match.kind != "present" or header.invert:  # each request has all three
                if header.invert or header.name in pseudo:
                    raise Wrong(f"{field}.headers[{index}]", f"{header.name} is matched once at most, and not inverted")
                pseudo[header.name] = header.match
    query = []
    for index, each in enumerate(message.query_parameters):
        place = f"{field}.query_parameters[{index}]"
        read.closed(each, place)
        if not each.name:
            raise Wrong(f"{place}.name", "is empty")
        if each.WhichOneof("query_parameter_match_specifier") == "string_match":
            query.append(QueryMatch(each.name, read.string(each.string_match, f"{place}.string_match")))
        elif each.HasField("present_match") and not each.present_match:
            raise Wrong(f"{place}.present_match", "must be true")
        else:
            query.append(QueryMatch(each.name, StringMatch("present")))
    claims = [_claim(each, f"{field}.dynamic_metadata[{n}]") for n, each in enumerate(message.dynamic_metadata)]
    return RouteMatch(
        path,
        pseudo.get(":method"),
        pseudo.get(":scheme"),
        pseudo.get(":authority"),
        tuple(headers),
        tuple(query),
        tuple(claims),
    )


def _claim(message: Any, field: str) -> ClaimMatch:
    """Of all that metadata may be matched by, the form in which a token's claims are."""
    read.closed(message, field)
    path = [segment.key for segment in message.path]
    if message.filter != JWT_FILTER or path[:1] != [PAYLOAD] or len(path) < 2 or not all(path):
        raise Wrong(field, f"asks for other metadata than the claims that {JWT_FILTER} leaves: {message.filter!r}")
    value = message.value
    if value.WhichOneof("match_pattern") == "present_match" and value.present_match:
        return ClaimMatch(tuple(path[1:]), StringMatch("present"), message.invert)
    either = value.or_match.value_matchers
    if len(either) != 2 or either[0].string_match != either[1].list_match.one_of.string_match:
        raise Wrong(f"{field}.value", "is not matched as a text, or a list that holds it")
    return ClaimMatch(tuple(path[1:]), read.string(either[0].string_match, f"{field}.value"), message.invert)


def _forward(message: Any, field: str) -> Forward:
    kind = message.WhichOneof("cluster_specifier")
    if kind == "cluster":
        clusters: tuple[WeightedCluster, ...] = (WeightedCluster(message.cluster),)
        if not message.cluster:
            raise Wrong(f"{field}.cluster", "is empty")
    elif kind == "weighted_clusters":
        clusters = tuple(
            _weighted(each, f"{field}.weighted_clusters.clusters[{i}]")
            for i, each in enumerate(message.weighted_clusters.clusters)
        )
        if not sum(each.weight for each in clusters):
            raise Wrong(f"{field}.weighted_clusters", "has weights that add up to 0")
    else:
        raise Wrong(field, "has no cluster_specifier that is known")
    timeout = 0.0
    if message.HasField("timeout"):
        timeout = read.seconds(message.timeout, f"{field}.timeout")
    elif message.HasField("max_stream_duration"):  # gRPC's form (gRFC A31)
        longest, name = message.max_stream_duration, "grpc_timeout_header_max"
        if not longest.HasField(name):
            name = "max_stream_duration"
        timeout = read.seconds(getattr(longest, name), f"{field}.max_stream_duration.{name}")
    mirrors = []
    for index, each in enumerate(message.request_mirror_policies):
        if not each.cluster:
            raise Wrong(f"{field}.request_mirror_policies[{index}].cluster", "is empty")
        share = read.share(each.runtime_fraction.default_value) if each.HasField("runtime_fraction") else 1_000_000
        mirrors.append(Mirror(each.cluster, share, not each.disable_shadow_host_suffix_append))
    retry = _retry(message.retry_policy, f"{field}.retry_policy") if message.HasField("retry_policy") else None
    hedge = None
    if message.hedge_policy.hedge_on_per_try_timeout and retry is not None and retry.per_try_timeout is not None:
        # Envoy's form: a try that is late is not given up, but joined by the next.
        hedge = HedgePolicy(retry.per_try_timeout, retry.attempts + 1)
        retry = replace(retry, per_try_timeout=None)
    policies = (_hash_policy(each, f"{field}.hash_policy[{i}]") for i, each in enumerate(message.hash_policy))
    return Forward(
        clusters,
        timeout or None,
        retry,
        _rewrite(message, field),
        tuple(mirrors),
        read.seconds(message.idle_timeout, f"{field}.idle_timeout") or None,  # "0 disables"
        hedge,
        tuple(policy for policy in policies if policy is not None),
        _MISSING_STATUS.get(message.cluster_not_found_response_code, 503),
    )


def _hash_policy(message: Any, field: str) -> HashPolicy | None:
    """None for what is not known: without it, calls work, though they may not stick."""
    kind, terminal = message.WhichOneof("policy_specifier"), message.terminal
    if kind is None or (kind == "connection_properties" and not message.connection_properties.source_ip):
        return None
    if kind == "connection_properties":
        return HashPolicy("source", terminal=terminal)
    if kind == "header":
        name = message.header.header_name.lower()
        if not HEADER_NAME.fullmatch(name.removeprefix(":")):
            raise Wrong(f"{field}.header.header_name", f"is no header's name: {name!r}")
        return HashPolicy("header", name, terminal=terminal)
    name = getattr(message, kind).name
    if not name:
        raise Wrong(f"{field}.{kind}.name", "is empty")
    if kind == "query_parameter":
        return HashPolicy("query", name, terminal=terminal)
    # Both stand in a Set-Cookie header one day.
    path = message.cookie.path
    if not HEADER_NAME.fullmatch(name) or _NOT_IN_A_COOKIE.search(path):
        raise Wrong(f"{field}.cookie", f"has a name or a path that no cookie may have: {name!r}, {path!r}")
    ttl = read.seconds(message.cookie.ttl, f"{field}.cookie.ttl") if message.cookie.HasField("ttl") else None
    return HashPolicy("cookie", name, ttl, path, terminal)


def _weighted(message: Any, field: str) -> WeightedCluster:
    if not message.name:
        raise Wrong(f"{field}.name", "is empty")
    return WeightedCluster(
        message.name, message.weight.value, *_both_operations(message, field), _new_host(message, field)
    )


def _new_host(message: Any, field: str) -> str | None:
    if not message.WhichOneof("host_rewrite_specifier"):
        return None
    host = read.head_text(message.host_rewrite_literal, f"{field}.host_rewrite_literal")
    if not host.isascii():
        raise Wrong(f"{field}.host_rewrite_literal", f"is no authority: {host!r}")
    return host


def _retry(message: Any, field: str) -> RetryPolicy:
    default = RetryPolicy()
    back_off, place = message.retry_back_off, f"{field}.retry_back_off"
    base, per_try = default.base_interval, 0.0
    if back_off.HasField("base_interval"):
        base = read.seconds(back_off.base_interval, f"{place}.base_interval", positive=True)
    longest = base * 10
    if back_off.HasField("max_interval"):
        longest = read.seconds(back_off.max_interval, f"{place}.max_interval")
        if longest < base:
            raise Wrong(f"{place}.max_interval", "is less than base_interval")
    if message.HasField("per_try_timeout"):
        per_try = read.seconds(message.per_try_timeout, f"{field}.per_try_timeout")
    attempts = int(message.host_selection_retry_max_attempts) if message.retry_host_predicate else 0
    headers: list[HeaderMatch] = []
    for index, each in enumerate(message.retriable_headers):
        conditions = read.header(each, f"{field}.retriable_headers[{index}]")
        if len(conditions) == 1:  # "is there, but not this" is no single condition; without it less is retried
            headers += conditions
    reset_headers, max_reset = default.reset_headers, default.max_reset
    if message.HasField("rate_limited_retry_back_off"):
        reset, place = message.rate_limited_retry_back_off, f"{field}.rate_limited_retry_back_off"
        reset_headers = tuple(
            _reset_header(each, f"{place}.reset_headers[{i}]") for i, each in enumerate(reset.reset_headers)
        )
        if reset.HasField("max_interval"):
            max_reset = read.seconds(reset.max_interval, f"{place}.max_interval", positive=True)
    return RetryPolicy(
        message.num_retries.value if message.HasField("num_retries") else 1,
        frozenset(part.strip() for part in message.retry_on.split(",") if part.strip()),
        frozenset(message.retriable_status_codes),
        per_try or None,
        base,
        longest,
        max(0, attempts),
        message.HasField("retry_priority"),
        tuple(headers),
        reset_headers,
        max_reset,
    )


def _reset_header(message: Any, field: str) -> ResetHeader:
    name = message.name.lower()
    if not HEADER_NAME.fullmatch(name):
        raise Wrong(f"{field}.name", f"is no header's name: {name!r}")
    return ResetHeader(name, "unix-timestamp" if message.format == 1 else "seconds")


def _rewrite(message: Any, field: str) -> Rewrite | None:
    authority = _new_host(message, field)
    if message.prefix_rewrite:
        return Rewrite(prefix=read.head_text(message.prefix_rewrite, f"{field}.prefix_rewrite"), authority=authority)
    if message.HasField("regex_rewrite"):
        pattern, substitution = message.regex_rewrite.pattern.regex, message.regex_rewrite.substitution
        read.head_text(substitution, f"{field}.regex_rewrite.substitution")
        if pattern == WHOLE_PATH and "\\" not in substitution.replace("\\\\", ""):
            return Rewrite(path=substitution.replace("\\\\", "\\"), authority=authority)
        read.regex(pattern, f"{field}.regex_rewrite.pattern.regex")
        read.substitution(pattern, substitution, f"{field}.regex_rewrite.substitution")
        return Rewrite(regex=pattern, substitution=substitution, authority=authority)
    return Rewrite(authority=authority) if authority is not None else None


def _redirect(message: Any, field: str) -> Redirect:
    for part in ("scheme_redirect", "host_redirect", "path_redirect", "prefix_rewrite"):
        read.head_text(getattr(message, part), f"{field}.{part}")
    scheme = message.scheme_redirect or ("https" if message.https_redirect else None)
    path_kind = message.WhichOneof("path_rewrite_specifier")
    regex, substitution = message.regex_rewrite.pattern.regex, message.regex_rewrite.substitution
    if path_kind == "regex_rewrite":
        read.head_text(substitution, f"{field}.regex_rewrite.substitution")
        read.regex(regex, f"{field}.regex_rewrite.pattern.regex")
        read.substitution(regex, substitution, f"{field}.regex_rewrite.substitution")
    status = _REDIRECT_STATUS.get(message.response_code)
    if status is None:
        raise Wrong(f"{field}.response_code", f"is not known: {message.response_code}")
    if message.port_redirect > 65535:
        raise Wrong(f"{field}.port_redirect", f"is no port: {message.port_redirect}")
    return Redirect(
        status,
        scheme,
        message.host_redirect or None,
        message.port_redirect,
        message.path_redirect if path_kind == "path_redirect" else None,
        message.prefix_rewrite if path_kind == "prefix_rewrite" else None,
        regex if path_kind == "regex_rewrite" else None,
        substitution if path_kind == "regex_rewrite" else "",
    )


def _fault(message: Any, field: str) -> Fault:
    delay = abort = None
    if message.HasField("delay"):
        seconds = read.seconds(message.delay.fixed_delay, f"{field}.delay.fixed_delay", positive=True)
        delay = FaultDelay(seconds, read.share(message.delay.percentage))
    if message.HasField("abort"):
        kind, status = message.abort.WhichOneof("error_type"), message.abort.http_status
        if kind is None:
            raise Wrong(f"{field}.abort", "has no http_status and no grpc_status")
        if kind == "http_status" and not 200 <= status <= 599:
            raise Wrong(f"{field}.abort.http_status", f"is no status of a whole answer: {status}")
        grpc = message.abort.grpc_status if kind == "grpc_status" else None
        abort = FaultAbort(read.share(message.abort.percentage), status, grpc)
    return Fault(delay, abort)


def _both_operations(message: Any, field: str) -> tuple[HeaderOperations, HeaderOperations]:
    """On the request, and on the response."""
    return (
        _operations(message.request_headers_to_add, message.request_headers_to_remove, f"{field}.request_headers_to"),
        _operations(
            message.response_headers_to_add, message.response_headers_to_remove, f"{field}.response_headers_to"
        ),
    )


def _operations(added: Iterable[Any], removed: Iterable[str], field: str) -> HeaderOperations:
    overwriting: list[tuple[str, str]] = []
    appending: list[tuple[str, str]] = []
    for index, name in enumerate(removed):
        if not HEADER_NAME.fullmatch(name):
            raise Wrong(f"{field}_remove[{index}]", f"is no header's name: {name!r}")
    for index, option in enumerate(added):
        overwrites = option.append_action == 2
        if option.append_action not in (0, 2):
            raise Wrong(
                f"{field}_add[{index}].append_action", "must be to append or to overwrite, wherever the header is"
            )
        if option.HasField("append"):  # the field's deprecated form
            overwrites = not option.append.value
        name, value = option.header.key.lower(), option.header.value.replace("%%", "%")
        if not HEADER_NAME.fullmatch(name.removeprefix(":")) or name in _FRAMING:
            raise Wrong(f"{field}_add[{index}].header.key", f"is no header that can be set: {name!r}")
        read.head_text(value, f"{field}_add[{index}].header.value")
        if value or option.keep_empty_value:
            (overwriting if overwrites else appending).append((name, value))
    return HeaderOperations(tuple(overwriting), tuple(appending), tuple(name.lower() for name in removed))


_STICKY = "type.googleapis.com/envoy.extensions.filters.http.stateful_session.v3.StatefulSession"
"""Refines which endpoint is chosen; without it calls work, and don't stick (Istio writes it for gRPC's clients)."""
_FILTERS = {m.type_url(m.CorsFilter), m.type_url(m.HTTPFault), m.type_url(m.Router), _STICKY}
_DECODERS: dict[str, tuple[Any, Callable[[Any], Decoded], str]] = {
    LISTENER: (m.Listener, _listener, "name"),
    ROUTE: (m.RouteConfiguration, _route_configuration, "name"),
    CLUSTER: (m.Cluster, decode_cluster, "name"),
    ENDPOINT: (m.ClusterLoadAssignment, decode_assignment, "cluster_name"),
}
