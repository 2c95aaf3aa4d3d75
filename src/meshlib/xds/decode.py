"""What does a resource on the wire say? xDS v3 resources -> model values. What can't be understood is refused with
InvalidResource, whose text becomes the NACK; nothing else is ever raised.

Reads what encode.py writes, and what Istio's and gRPC's control planes write as far as the model can hold it.
A field that is not known is passed over where it refines, and refused where it restricts: a condition of a match, a
check of a certificate, a filter that may turn a call away. Without it more would be let through than was meant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from meshlib.errors import InvalidResource
from meshlib.model import (
    Cluster,
    ClusterType,
    ConnectionLimits,
    DirectResponse,
    Endpoint,
    Fault,
    FaultAbort,
    FaultDelay,
    FilterChain,
    Forward,
    HeaderMatch,
    HeaderOperations,
    Health,
    Listener,
    ListenerTls,
    LoadAssignment,
    LoadBalancing,
    Locality,
    LocalityWeight,
    Mirror,
    Node,
    NodeKind,
    OutlierDetection,
    QueryMatch,
    Redirect,
    RetryBudget,
    RetryPolicy,
    Rewrite,
    Route,
    RouteConfiguration,
    RouteMatch,
    ServiceName,
    StringMatch,
    UpstreamTls,
    VirtualHost,
    WeightedCluster,
    Workload,
)
from meshlib.xds import messages as m
from meshlib.xds.encode import (
    DEFAULT_PORT,
    FAULT_FILTER,
    HTTP_OPTIONS,
    ISTIO,
    OWN,
    REDIRECT_CODES,
    UNLIMITED,
    WHOLE_PATH,
)
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE

Decoded = Listener | RouteConfiguration | Cluster | LoadAssignment

_REDIRECT_STATUS = {number: status for status, number in REDIRECT_CODES.items()}
_PER_MILLION = {0: 10_000, 1: 100, 2: 1}
_TYPES = {
    0: ClusterType.STATIC,
    1: ClusterType.STRICT_DNS,
    2: ClusterType.LOGICAL_DNS,
    3: ClusterType.EDS,
    4: ClusterType.ORIGINAL_DST,
}
# Hashing policies are balanced by least request: calls work, though they do not stick.
_LB = {0: LoadBalancing.ROUND_ROBIN, 3: LoadBalancing.RANDOM}
_EXTENSIONS = {
    m.type_url(m.LeastRequest): LoadBalancing.LEAST_REQUEST,
    m.type_url(m.RoundRobin): LoadBalancing.ROUND_ROBIN,
    m.type_url(m.Random): LoadBalancing.RANDOM,
}
_DEEPEST = 4
_HEALTH = {2: Health.UNHEALTHY, 3: Health.DRAINING, 4: Health.UNHEALTHY}
_RAW_BUFFER = "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"
_LONGEST = 315_576_000_000
"""Seconds: ten thousand years, the most that a Duration holds (duration.proto)."""
_TLS_PARAMETERS, _KEY_LOG = 1, 15


class _Wrong(Exception):
    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field, self.reason = field, reason


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
            raise _Wrong(name_field, "is empty")
        return decoder(message)
    except _Wrong as error:
        raise InvalidResource(type_url, name, error.field, error.reason) from None
    except DecodeError:
        raise InvalidResource(type_url, name, "", "is not a message of this type") from None
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise InvalidResource(type_url, name, "", f"can't be understood: {error}") from error


def decode_node(message: Any) -> Node:
    """The node of a request: ours, Istio's, or any Envoy's. Raises InvalidResource when it can't be told who it is."""
    metadata = _plain(message.metadata)
    parts = message.id.split("~")
    if not message.id:
        raise InvalidResource("envoy.config.core.v3.Node", "", "id", "is empty")
    if not message.id.isprintable():  # it stands in logs and on terminals
        raise InvalidResource("envoy.config.core.v3.Node", "", "id", "holds what can't be printed")
    kind = NodeKind.ROUTER if parts[0] in ("router", "ingress") else NodeKind.SIDECAR
    if len(parts) != 4 and message.user_agent_name == "envoy":
        kind = NodeKind.ROUTER  # an Envoy that nobody configured as a sidecar stands at the edge
    namespace = _text(metadata, "NAMESPACE") or (parts[2].rpartition(".")[2] if len(parts) == 4 else "") or "default"
    labels = metadata.get("LABELS")
    ports = metadata.get("MESHLIB_PORTS")
    addresses = _text(metadata, "INSTANCE_IPS").split(",")
    workload = Workload(
        name=_text(metadata, "WORKLOAD_NAME") or (parts[2].partition(".")[0] if len(parts) == 4 else message.id),
        namespace=namespace,
        service=_text(metadata, "MESHLIB_SERVICE"),
        service_account=_text(metadata, "SERVICE_ACCOUNT") or "default",
        labels=tuple(sorted((str(k), str(v)) for k, v in labels.items())) if isinstance(labels, dict) else (),
        address=addresses[0].strip(),
        port=_port(metadata.get("MESHLIB_PORT")),
        port_names=tuple(sorted((str(k), _port(v)) for k, v in ports.items())) if isinstance(ports, dict) else (),
        locality=_locality(message.locality),
    )
    agent = message.user_agent_name
    version = message.user_agent_version
    return Node(
        id=message.id,
        workload=workload,
        kind=kind,
        user_agent=f"{agent}/{version}" if version else agent,
        trust_domain=_text(metadata, "MESHLIB_TRUST_DOMAIN") or "cluster.local",
        cluster_id=_text(metadata, "CLUSTER_ID") or "Kubernetes",
        ready=metadata.get("MESHLIB_READY") is True,
    )


# Pieces


def _plain(struct: Any) -> dict[str, Any]:
    """A Struct as Python values."""
    return {key: _value(value) for key, value in struct.fields.items()}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return _plain(value.struct_value)
    if kind == "list_value":
        return [_value(each) for each in value.list_value.values]
    return None if kind in (None, "null_value") else getattr(value, kind)


def _text(metadata: dict[str, Any], name: str) -> str:
    found = metadata.get(name)
    return found if isinstance(found, str) else ""


def _port(value: Any) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = float(value)
    return int(value) if isinstance(value, float) and 0 < value < 65536 else 0


def _seconds(duration: Any, field: str, *, positive: bool = False) -> float:
    total = int(duration.seconds) * 1_000_000_000 + int(duration.nanos)
    if total < 0 or duration.seconds > _LONGEST or not -1_000_000_000 < duration.nanos < 1_000_000_000:
        raise _Wrong(field, f"is no time to wait: {duration.seconds} s and {duration.nanos} ns")
    if positive and not total:
        raise _Wrong(field, "must be more than 0")
    # One division, so that what was rounded to nanoseconds comes back as the very float it was.
    return total / 1_000_000_000


_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-zA-Z-]+")
_NOT_IN_A_HEAD = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]|[^\x00-\xff]")
_FRAMING = frozenset({"content-length", "transfer-encoding"})
"""They say where a message ends: whoever sets them makes the next one begin somewhere else."""


def _head_text(text: str, field: str) -> str:
    """Text that stands in a message's head one day: after a line break in it, a header would begin that nobody gave."""
    if _NOT_IN_A_HEAD.search(text):
        raise _Wrong(field, f"holds a character that no header may hold: {text!r}")
    return text


def _percent(message: Any, field: str) -> float:
    if not 0 <= message.value <= 100:  # not a number is neither
        raise _Wrong(field, f"must be from 0 to 100, not {message.value}")
    return float(message.value)


def _closed(message: Any, field: str, *passed_over: int) -> None:
    """Refuse what is not known in a message that restricts."""
    unknown = UnknownFieldSet(message)
    for index in range(len(unknown)):
        number = unknown[index].field_number
        if number not in passed_over:
            raise _Wrong(field, f"has field {number} of {message.DESCRIPTOR.full_name}, which is not understood here")


def _locality(message: Any) -> Locality:
    return Locality(message.region, message.zone, message.sub_zone)


def _share(fraction: Any) -> int:
    return min(1_000_000, int(fraction.numerator) * _PER_MILLION.get(fraction.denominator, 10_000))


def _unpacked(any_message: Any, message_type: Any, field: str) -> Any:
    if any_message.type_url.rpartition("/")[2] != message_type.DESCRIPTOR.full_name:
        raise _Wrong(field, f"holds {any_message.type_url or 'nothing'}, not {message_type.DESCRIPTOR.full_name}")
    try:
        return message_type.FromString(any_message.value)
    except DecodeError:
        raise _Wrong(field, f"is no {message_type.DESCRIPTOR.full_name}") from None


def _regex(pattern: str, field: str) -> str:
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        re2.compile(pattern, options)
    except re2.error as error:
        told = error.args[0] if error.args else error
        raise _Wrong(field, f"is no RE2 expression: {told.decode() if isinstance(told, bytes) else told}") from None
    return pattern


def _string(message: Any, field: str) -> StringMatch:
    kind = message.WhichOneof("match_pattern")
    if kind is None:
        raise _Wrong(field, "has no match_pattern that is known")
    if kind == "safe_regex":
        # "The ignore_case has no effect for the safe_regex match" (string.proto)
        return StringMatch("regex", _regex(message.safe_regex.regex, f"{field}.safe_regex.regex"))
    return StringMatch(kind, getattr(message, kind), message.ignore_case)


# Listeners


def _listener(message: Any) -> Listener:
    if message.HasField("api_listener"):
        manager = _unpacked(message.api_listener.api_listener, m.HttpConnectionManager, "api_listener.api_listener")
        return Listener(message.name, _rds_name(manager, "api_listener.api_listener"))
    if not message.filter_chains:
        raise _Wrong("api_listener", "is missing, and there are no filter_chains")
    chains = tuple(_chain(chain, f"filter_chains[{i}]") for i, chain in enumerate(message.filter_chains))
    address = message.address.socket_address
    if not address.address or address.WhichOneof("port_specifier") != "port_value" or address.port_value > 65535:
        raise _Wrong("address", f"is no address: {address.address!r} port {address.port_value}")
    return Listener(message.name, "", address.address, address.port_value, chains)


def _rds_name(manager: Any, field: str) -> str:
    kind = manager.WhichOneof("route_specifier")
    if kind != "rds":
        raise _Wrong(f"{field}.route_specifier", "must be rds: routes are asked for by name")
    source = manager.rds.config_source
    if source.WhichOneof("config_source_specifier") not in ("ads", "self"):
        raise _Wrong(f"{field}.rds.config_source", "must be ads or self")
    if not manager.rds.route_config_name:
        raise _Wrong(f"{field}.rds.route_config_name", "is empty")
    for index, each in enumerate(manager.http_filters):
        # A filter may turn calls away (RBAC, JWT): one that is not known and not optional is refused (gRFC A39).
        url = each.typed_config.type_url
        if url not in _FILTERS and not each.is_optional and not each.disabled:
            raise _Wrong(
                f"{field}.http_filters[{index}]", f"{each.name!r} is not known here: {url or 'without a type'}"
            )
    return str(manager.rds.route_config_name)


def _chain(message: Any, field: str) -> FilterChain:
    for index, filter_ in enumerate(message.filters):
        if filter_.typed_config.type_url == m.type_url(m.HttpConnectionManager):
            manager = _unpacked(filter_.typed_config, m.HttpConnectionManager, f"{field}.filters[{index}]")
            name = _rds_name(manager, f"{field}.filters[{index}]")
            break
    else:
        raise _Wrong(f"{field}.filters", "has no HttpConnectionManager")
    tls = None
    _closed(message.filter_chain_match, f"{field}.filter_chain_match")
    if _is_secured(message):
        context = _unpacked(
            message.transport_socket.typed_config, m.DownstreamTlsContext, f"{field}.transport_socket.typed_config"
        )
        tls = _downstream_tls(context, f"{field}.transport_socket.typed_config.common_tls_context")
    return FilterChain(name, tuple(message.filter_chain_match.server_names), tls)


def _is_secured(message: Any) -> bool:
    """Whether a transport socket does anything to the bytes."""
    if not message.HasField("transport_socket"):
        return False
    return bool(message.transport_socket.typed_config.type_url.rpartition("/")[2] != _RAW_BUFFER)


def _downstream_tls(context: Any, field: str) -> ListenerTls:
    common = context.common_tls_context
    certificate_file, private_key_file = _certificate(common, field)
    if not certificate_file:
        raise _Wrong(f"{field}.tls_certificates", "is missing")
    ca_file = _trusted_ca(common, field)
    if common.validation_context.match_typed_subject_alt_names:
        raise _Wrong(f"{field}.validation_context.match_typed_subject_alt_names", "is not checked here")
    if context.require_client_certificate.value and not ca_file:
        raise _Wrong(f"{field}.validation_context.trusted_ca", "is missing: client certificates are required")
    return ListenerTls(
        certificate_file,
        private_key_file,
        ca_file,
        context.require_client_certificate.value,
        tuple(common.alpn_protocols),
    )


def _certificate(common: Any, field: str) -> tuple[str, str]:
    """The files of the certificate that is shown and its key; both "" when none is."""
    _closed(common, field, _TLS_PARAMETERS, _KEY_LOG)
    if common.tls_certificate_sds_secret_configs or common.HasField("tls_certificate_provider_instance"):
        raise _Wrong(f"{field}.tls_certificates", "must be named by files: there are no other secrets here")
    if len(common.tls_certificates) > 1:
        raise _Wrong(f"{field}.tls_certificates", f"must be one at most; found {len(common.tls_certificates)}")
    if not common.tls_certificates:
        return "", ""
    certificate = common.tls_certificates[0]
    if not certificate.certificate_chain.filename or not certificate.private_key.filename:
        raise _Wrong(f"{field}.tls_certificates[0]", "must name files")
    return certificate.certificate_chain.filename, certificate.private_key.filename


def _trusted_ca(common: Any, field: str) -> str:
    """The file of whom to trust; "" when nothing is said, or the system's roots."""
    kind = common.WhichOneof("validation_context_type")
    if kind not in (None, "validation_context"):
        raise _Wrong(f"{field}.{kind}", "is a secret, of which there are none here: name files")
    validation = common.validation_context
    _closed(validation, f"{field}.validation_context")
    if validation.HasField("ca_certificate_provider_instance"):
        raise _Wrong(f"{field}.validation_context.ca_certificate_provider_instance", "is not known here: name files")
    ca_file = validation.trusted_ca.filename
    if kind is not None and not ca_file and not validation.HasField("system_root_certs"):
        raise _Wrong(f"{field}.validation_context", "names no trusted_ca file and no system_root_certs")
    return "" if validation.HasField("system_root_certs") else str(ca_file)


# Routes


def _route_configuration(message: Any) -> RouteConfiguration:
    hosts = tuple(_virtual_host(host, f"virtual_hosts[{i}]") for i, host in enumerate(message.virtual_hosts))
    # One domain in two places is two answers to one question; Envoy refuses it too.
    seen: set[str] = set()
    for index, host in enumerate(hosts):
        for domain in host.domains:
            if domain.lower() in seen:
                raise _Wrong(f"virtual_hosts[{index}].domains", f"{domain!r} is there twice")
            seen.add(domain.lower())
    return RouteConfiguration(message.name, hosts)


def _virtual_host(message: Any, field: str) -> VirtualHost:
    if not message.domains:
        raise _Wrong(f"{field}.domains", "is empty")
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
    if kind == "route":
        action = _forward(message.route, f"{field}.route")
    elif kind == "redirect":
        action = _redirect(message.redirect, f"{field}.redirect")
    elif kind == "direct_response":
        body, status = message.direct_response.body, message.direct_response.status
        if body.filename:
            raise _Wrong(f"{field}.direct_response.body", "must be inline")
        if not 200 <= status <= 599:
            raise _Wrong(f"{field}.direct_response.status", f"is no status of a whole answer: {status}")
        action = DirectResponse(status, body.inline_bytes or body.inline_string.encode())
    else:
        raise _Wrong(field, f"has no action that can be taken: {kind or 'none'}")
    fault = None
    if FAULT_FILTER in message.typed_per_filter_config:
        place = f"{field}.typed_per_filter_config[{FAULT_FILTER}]"
        fault = _fault(_unpacked(message.typed_per_filter_config[FAULT_FILTER], m.HTTPFault, place), place)
    notes = _plain(message.metadata.filter_metadata[OWN]) if OWN in message.metadata.filter_metadata else {}
    if isinstance(action, Redirect) and notes.get(DEFAULT_PORT) is True:
        action = replace(action, port=-1)
    return Route(
        _match(message.match, f"{field}.match"),
        action,
        message.name,
        fault,
        *_both_operations(message, field),
        _text(notes, "origin"),
    )


def _match(message: Any, field: str) -> RouteMatch:
    _closed(message, field)
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
        path = StringMatch("regex", _regex(message.safe_regex.regex, f"{field}.safe_regex.regex"))
    else:
        raise _Wrong(field, "has no path_specifier that is known")
    pseudo: dict[str, StringMatch] = {}
    headers: list[HeaderMatch] = []
    for index, each in enumerate(message.headers):
        for header in _header(each, f"{field}.headers[{index}]"):
            if header.name not in (":method", ":scheme", ":authority"):
                headers.append(header)
            elif header.match.kind != "present" or header.invert:  # each request has all three
                if header.invert or header.name in pseudo:
                    raise _Wrong(
                        f"{field}.headers[{index}]", f"{header.name} is matched once at most, and not inverted"
                    )
                pseudo[header.name] = header.match
    query = []
    for index, each in enumerate(message.query_parameters):
        place = f"{field}.query_parameters[{index}]"
        _closed(each, place)
        if not each.name:
            raise _Wrong(f"{place}.name", "is empty")
        if each.WhichOneof("query_parameter_match_specifier") == "string_match":
            query.append(QueryMatch(each.name, _string(each.string_match, f"{place}.string_match")))
        elif each.HasField("present_match") and not each.present_match:
            raise _Wrong(f"{place}.present_match", "must be true")
        else:
            query.append(QueryMatch(each.name, StringMatch("present")))
    return RouteMatch(
        path, pseudo.get(":method"), pseudo.get(":scheme"), pseudo.get(":authority"), tuple(headers), tuple(query)
    )


def _header(message: Any, field: str) -> list[HeaderMatch]:
    """One condition; two for an inverted one that wants the header to be there."""
    _closed(message, field)
    kind, name = message.WhichOneof("header_match_specifier"), message.name.lower()
    if not name:
        raise _Wrong(f"{field}.name", "is empty")
    if kind in (None, "present_match"):
        wanted = kind is None or message.present_match
        return [HeaderMatch(name, StringMatch("present"), message.invert_match == wanted)]
    if kind == "string_match":
        match = _string(message.string_match, f"{field}.string_match")
    elif kind == "safe_regex_match":
        match = StringMatch("regex", _regex(message.safe_regex_match.regex, f"{field}.safe_regex_match.regex"))
    else:
        match = StringMatch(kind.removesuffix("_match"), getattr(message, kind))
    found = HeaderMatch(name, match, message.invert_match)
    if message.invert_match and not message.treat_missing_header_as_empty:
        # Without that field, a header that is missing fits no value, inverted or not (route_components.proto).
        return [HeaderMatch(name, StringMatch("present")), found]
    return [found]


def _forward(message: Any, field: str) -> Forward:
    kind = message.WhichOneof("cluster_specifier")
    if kind == "cluster":
        clusters: tuple[WeightedCluster, ...] = (WeightedCluster(message.cluster),)
        if not message.cluster:
            raise _Wrong(f"{field}.cluster", "is empty")
    elif kind == "weighted_clusters":
        clusters = tuple(
            _weighted(each, f"{field}.weighted_clusters.clusters[{i}]")
            for i, each in enumerate(message.weighted_clusters.clusters)
        )
        if not sum(each.weight for each in clusters):
            raise _Wrong(f"{field}.weighted_clusters", "has weights that add up to 0")
    else:
        raise _Wrong(field, "has no cluster_specifier that is known")
    timeout = 0.0
    if message.HasField("timeout"):
        timeout = _seconds(message.timeout, f"{field}.timeout")
    elif message.HasField("max_stream_duration"):  # gRPC's form (gRFC A31)
        longest, name = message.max_stream_duration, "grpc_timeout_header_max"
        if not longest.HasField(name):
            name = "max_stream_duration"
        timeout = _seconds(getattr(longest, name), f"{field}.max_stream_duration.{name}")
    mirrors = []
    for index, each in enumerate(message.request_mirror_policies):
        if not each.cluster:
            raise _Wrong(f"{field}.request_mirror_policies[{index}].cluster", "is empty")
        share = _share(each.runtime_fraction.default_value) if each.HasField("runtime_fraction") else 1_000_000
        mirrors.append(Mirror(each.cluster, share, not each.disable_shadow_host_suffix_append))
    retry = _retry(message.retry_policy, f"{field}.retry_policy") if message.HasField("retry_policy") else None
    return Forward(clusters, timeout or None, retry, _rewrite(message, field), tuple(mirrors))


def _weighted(message: Any, field: str) -> WeightedCluster:
    if not message.name:
        raise _Wrong(f"{field}.name", "is empty")
    return WeightedCluster(
        message.name, message.weight.value, *_both_operations(message, field), _new_host(message, field)
    )


def _new_host(message: Any, field: str) -> str | None:
    if not message.WhichOneof("host_rewrite_specifier"):
        return None
    host = _head_text(message.host_rewrite_literal, f"{field}.host_rewrite_literal")
    if not host.isascii():
        raise _Wrong(f"{field}.host_rewrite_literal", f"is no authority: {host!r}")
    return host


def _retry(message: Any, field: str) -> RetryPolicy:
    default = RetryPolicy()
    back_off, place = message.retry_back_off, f"{field}.retry_back_off"
    base, per_try = default.base_interval, 0.0
    if back_off.HasField("base_interval"):
        base = _seconds(back_off.base_interval, f"{place}.base_interval", positive=True)
    longest = base * 10
    if back_off.HasField("max_interval"):
        longest = _seconds(back_off.max_interval, f"{place}.max_interval")
        if longest < base:
            raise _Wrong(f"{place}.max_interval", "is less than base_interval")
    if message.HasField("per_try_timeout"):
        per_try = _seconds(message.per_try_timeout, f"{field}.per_try_timeout")
    attempts = int(message.host_selection_retry_max_attempts) if message.retry_host_predicate else 0
    return RetryPolicy(
        message.num_retries.value if message.HasField("num_retries") else 1,
        frozenset(part.strip() for part in message.retry_on.split(",") if part.strip()),
        frozenset(message.retriable_status_codes),
        per_try or None,
        base,
        longest,
        max(0, attempts),
        message.HasField("retry_priority"),
    )


def _rewrite(message: Any, field: str) -> Rewrite | None:
    authority = _new_host(message, field)
    if message.prefix_rewrite:
        return Rewrite(prefix=_head_text(message.prefix_rewrite, f"{field}.prefix_rewrite"), authority=authority)
    if message.HasField("regex_rewrite"):
        pattern, substitution = message.regex_rewrite.pattern.regex, message.regex_rewrite.substitution
        _head_text(substitution, f"{field}.regex_rewrite.substitution")
        if pattern == WHOLE_PATH and "\\" not in substitution.replace("\\\\", ""):
            return Rewrite(path=substitution.replace("\\\\", "\\"), authority=authority)
        _regex(pattern, f"{field}.regex_rewrite.pattern.regex")
        _check_substitution(pattern, substitution, f"{field}.regex_rewrite.substitution")
        return Rewrite(regex=pattern, substitution=substitution, authority=authority)
    return Rewrite(authority=authority) if authority is not None else None


def _check_substitution(pattern: str, substitution: str, field: str) -> None:
    """What a call would trip over: RE2 knows `\\0` to `\\9`, as many as there are groups, and `\\\\`."""
    import re2

    escaped = [substitution[i + 1 : i + 2] for i in _backslashes(substitution)]
    wrong = next((each for each in escaped if each != "\\" and each not in tuple("0123456789")), None)
    if wrong is not None:
        raise _Wrong(field, f"has a backslash before {wrong or 'its end'!r}")
    groups = re2.compile(pattern).groups
    if any(each != "\\" and int(each) > groups for each in escaped):
        raise _Wrong(field, f"names a group that is not there: the pattern has {groups}")


def _backslashes(text: str) -> Iterable[int]:
    """Where escapes begin."""
    place = text.find("\\")
    while place >= 0:
        yield place
        place = text.find("\\", place + 2)


def _redirect(message: Any, field: str) -> Redirect:
    for part in ("scheme_redirect", "host_redirect", "path_redirect", "prefix_rewrite"):
        _head_text(getattr(message, part), f"{field}.{part}")
    scheme = message.scheme_redirect or ("https" if message.https_redirect else None)
    path_kind = message.WhichOneof("path_rewrite_specifier")
    status = _REDIRECT_STATUS.get(message.response_code)
    if status is None:
        raise _Wrong(f"{field}.response_code", f"is not known: {message.response_code}")
    if message.port_redirect > 65535:
        raise _Wrong(f"{field}.port_redirect", f"is no port: {message.port_redirect}")
    return Redirect(
        status,
        scheme,
        message.host_redirect or None,
        message.port_redirect,
        message.path_redirect if path_kind == "path_redirect" else None,
        message.prefix_rewrite if path_kind == "prefix_rewrite" else None,
    )


def _fault(message: Any, field: str) -> Fault:
    delay = abort = None
    if message.HasField("delay"):
        seconds = _seconds(message.delay.fixed_delay, f"{field}.delay.fixed_delay", positive=True)
        delay = FaultDelay(seconds, _share(message.delay.percentage))
    if message.HasField("abort"):
        kind, status = message.abort.WhichOneof("error_type"), message.abort.http_status
        if kind is None:
            raise _Wrong(f"{field}.abort", "has no http_status and no grpc_status")
        if kind == "http_status" and not 200 <= status <= 599:
            raise _Wrong(f"{field}.abort.http_status", f"is no status of a whole answer: {status}")
        grpc = message.abort.grpc_status if kind == "grpc_status" else None
        abort = FaultAbort(_share(message.abort.percentage), status, grpc)
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
        if not _HEADER_NAME.fullmatch(name):
            raise _Wrong(f"{field}_remove[{index}]", f"is no header's name: {name!r}")
    for index, option in enumerate(added):
        overwrites = option.append_action == 2
        if option.append_action not in (0, 2):
            raise _Wrong(
                f"{field}_add[{index}].append_action", "must be to append or to overwrite, wherever the header is"
            )
        if option.HasField("append"):  # the field's deprecated form
            overwrites = not option.append.value
        name, value = option.header.key.lower(), option.header.value.replace("%%", "%")
        if not _HEADER_NAME.fullmatch(name.removeprefix(":")) or name in _FRAMING:
            raise _Wrong(f"{field}_add[{index}].header.key", f"is no header that can be set: {name!r}")
        _head_text(value, f"{field}_add[{index}].header.value")
        if value or option.keep_empty_value:
            (overwriting if overwrites else appending).append((name, value))
    return HeaderOperations(tuple(overwriting), tuple(appending), tuple(name.lower() for name in removed))


# Clusters and endpoints


def _cluster(message: Any) -> Cluster:
    kind = _TYPES.get(message.type)
    if kind is None or (not message.WhichOneof("cluster_discovery_type") and not message.HasField("load_assignment")):
        raise _Wrong("type", "is missing or unknown")
    if kind is ClusterType.EDS:
        source = message.eds_cluster_config.eds_config.WhichOneof("config_source_specifier")
        if source not in ("ads", "self"):
            raise _Wrong("eds_cluster_config.eds_config", "must be ads or self")
        service_name = message.eds_cluster_config.service_name
        if service_name not in ("", message.name):
            raise _Wrong("eds_cluster_config.service_name", f"must be the cluster's name, not {service_name!r}")
    endpoints: tuple[Endpoint, ...] = ()
    if kind in (ClusterType.STATIC, ClusterType.STRICT_DNS, ClusterType.LOGICAL_DNS):
        endpoints = _endpoints(message.load_assignment, "load_assignment")[0]
    tls = None
    options = m.HttpProtocolOptions()
    if HTTP_OPTIONS in message.typed_extension_protocol_options:
        options = _unpacked(
            message.typed_extension_protocol_options[HTTP_OPTIONS],
            m.HttpProtocolOptions,
            f"typed_extension_protocol_options[{HTTP_OPTIONS}]",
        )
    if _is_secured(message):
        tls = _upstream_tls(message.transport_socket)
    # "If multiple Thresholds are defined with the same RoutingPriority, the first one in the list is used"
    first = next((each for each in message.circuit_breakers.thresholds if each.priority == 0), None)
    budget = None
    if first is not None and first.HasField("retry_budget"):
        given, place = first.retry_budget, "circuit_breakers.thresholds.retry_budget.budget_percent"
        budget = RetryBudget(
            _percent(given.budget_percent, place) if given.HasField("budget_percent") else 20.0,
            given.min_retry_concurrency.value if given.HasField("min_retry_concurrency") else 3,
        )
    metadata = _plain(message.metadata.filter_metadata[ISTIO]) if ISTIO in message.metadata.filter_metadata else {}
    return Cluster(
        message.name,
        kind,
        _load_balancing(message),
        _seconds(message.connect_timeout, "connect_timeout", positive=True)
        if message.HasField("connect_timeout")
        else 5.0,
        _limits(first, options.common_http_protocol_options),
        budget,
        _outlier(message) if message.HasField("outlier_detection") else None,
        tls,
        options.explicit_http_config.WhichOneof("protocol_config") == "http2_protocol_options",
        endpoints,
        _service(metadata),
        _text(metadata, "subset"),
    )


def _load_balancing(message: Any) -> LoadBalancing:
    """`load_balancing_policy` rules out `lb_policy` where it is given (Envoy, gRFC A52)."""
    if message.HasField("load_balancing_policy"):
        return _first_known(message.load_balancing_policy, 0)
    return _LB.get(message.lb_policy, LoadBalancing.LEAST_REQUEST)


def _first_known(policy: Any, depth: int) -> LoadBalancing:
    for each in policy.policies:
        config = each.typed_extension_config.typed_config
        found = _EXTENSIONS.get(config.type_url)
        if found is not None:
            return found
        if config.type_url == m.type_url(m.WrrLocality) and depth < _DEEPEST:
            inner = _unpacked(config, m.WrrLocality, "load_balancing_policy").endpoint_picking_policy
            return _first_known(inner, depth + 1)
    return LoadBalancing.LEAST_REQUEST


def _limits(thresholds: Any, options: Any) -> ConnectionLimits:
    def limit(name: str) -> int | None:
        if thresholds is None or not thresholds.HasField(name):
            return None
        value = int(getattr(thresholds, name).value)
        return None if value == UNLIMITED else value

    idle: float | None = None
    if options.HasField("idle_timeout"):
        place = f"typed_extension_protocol_options[{HTTP_OPTIONS}].common_http_protocol_options.idle_timeout"
        idle = _seconds(options.idle_timeout, place) or float(_LONGEST)  # 0 switches it off
    return ConnectionLimits(
        limit("max_connections"),
        limit("max_pending_requests"),
        limit("max_requests"),
        limit("max_retries"),
        options.max_requests_per_connection.value,
        idle_timeout=idle,
    )


def _outlier(message: Any) -> OutlierDetection:
    outlier, default = message.outlier_detection, OutlierDetection()

    def count(name: str, enforcing: str, otherwise: int, enforced: int) -> int:
        share = getattr(outlier, enforcing).value if outlier.HasField(enforcing) else enforced
        if not share:
            return 0
        return int(getattr(outlier, name).value) if outlier.HasField(name) else otherwise

    def seconds(name: str, otherwise: float) -> float:
        place = f"outlier_detection.{name}"
        return _seconds(getattr(outlier, name), place, positive=True) if outlier.HasField(name) else otherwise

    most = outlier.max_ejection_percent
    if most.value > 100:
        raise _Wrong("outlier_detection.max_ejection_percent", f"must be from 0 to 100, not {most.value}")
    panic = _percent(message.common_lb_config.healthy_panic_threshold, "common_lb_config.healthy_panic_threshold")
    return OutlierDetection(
        count("consecutive_5xx", "enforcing_consecutive_5xx", 5, 100),
        count("consecutive_gateway_failure", "enforcing_consecutive_gateway_failure", 5, 0),
        count("consecutive_local_origin_failure", "enforcing_consecutive_local_origin_failure", 5, 100),
        outlier.split_external_local_origin_errors,
        seconds("interval", default.interval),
        seconds("base_ejection_time", default.base_ejection_time),
        most.value if outlier.HasField("max_ejection_percent") else 10,
        math.ceil(panic),
    )


def _upstream_tls(socket: Any) -> UpstreamTls:
    context = _unpacked(socket.typed_config, m.UpstreamTlsContext, "transport_socket.typed_config")
    field = "transport_socket.typed_config.common_tls_context"
    common = context.common_tls_context
    certificate_file, private_key_file = _certificate(common, field)
    ca_file = _trusted_ca(common, field)
    names: list[str] = []
    for index, each in enumerate(common.validation_context.match_typed_subject_alt_names):
        if each.matcher.WhichOneof("match_pattern") != "exact" or not each.matcher.exact:
            place = f"{field}.validation_context.match_typed_subject_alt_names[{index}]"
            raise _Wrong(place, "must be exact: names are compared whole")
        names.append(each.matcher.exact)
    return UpstreamTls(
        "MUTUAL" if certificate_file else "SIMPLE",
        context.sni,
        () if names == [context.sni] else tuple(names),
        ca_file,
        certificate_file,
        private_key_file,
        not common.HasField("validation_context"),
    )


def _service(metadata: dict[str, Any]) -> ServiceName | None:
    services = metadata.get("services")
    if not isinstance(services, list) or not services or not isinstance(services[0], dict):
        return None
    return ServiceName(_text(services[0], "host"), _text(services[0], "name"), _text(services[0], "namespace"))


def _assignment(message: Any) -> LoadAssignment:
    endpoints, weights = _endpoints(message, "")
    return LoadAssignment(message.cluster_name, endpoints, weights)


def _endpoints(message: Any, prefix: str) -> tuple[tuple[Endpoint, ...], tuple[LocalityWeight, ...]]:
    found: list[Endpoint] = []
    weights: list[LocalityWeight] = []
    is_weighted = False
    seen: set[tuple[int, Locality]] = set()
    for index, group in enumerate(message.endpoints):
        field = f"{prefix}.endpoints[{index}]".lstrip(".")
        locality = _locality(group.locality)
        if (group.priority, locality) in seen:
            raise _Wrong(field, f"repeats locality {locality} of priority {group.priority}")
        seen.add((group.priority, locality))
        members = [
            _endpoint(each, locality, group.priority, f"{field}.lb_endpoints[{number}]")
            for number, each in enumerate(group.lb_endpoints)
        ]
        found += members
        weight = int(group.load_balancing_weight.value)
        weights.append(LocalityWeight(locality, group.priority, weight))
        # A weight that just adds up the endpoints' says nothing of its own (encode.py writes it for gRPC).
        is_weighted = is_weighted or (weight not in (0, sum(member.weight for member in members)))
    return tuple(sorted(found)), tuple(weights) if is_weighted else ()


def _endpoint(message: Any, locality: Locality, priority: int, field: str) -> Endpoint:
    address = message.endpoint.address.socket_address
    if not address.address or not 0 < address.port_value < 65536:
        raise _Wrong(f"{field}.endpoint.address", f"is no address: {address.address!r} port {address.port_value}")
    workload = ""
    if ISTIO in message.metadata.filter_metadata:
        # Istio's form is `name;namespace;service;revision;cluster`.
        workload = _text(_plain(message.metadata.filter_metadata[ISTIO]), "workload").partition(";")[0]
    return Endpoint(
        address.address,
        address.port_value,
        max(1, message.load_balancing_weight.value) if message.HasField("load_balancing_weight") else 1,
        locality,
        priority,
        _HEALTH.get(message.health_status, Health.HEALTHY),
        workload,
    )


_FILTERS = {m.type_url(m.HTTPFault), m.type_url(m.Router)}
_DECODERS: dict[str, tuple[Any, Callable[[Any], Decoded], str]] = {
    LISTENER: (m.Listener, _listener, "name"),
    ROUTE: (m.RouteConfiguration, _route_configuration, "name"),
    CLUSTER: (m.Cluster, _cluster, "name"),
    ENDPOINT: (m.ClusterLoadAssignment, _assignment, "cluster_name"),
}
