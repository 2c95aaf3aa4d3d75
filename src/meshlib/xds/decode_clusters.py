"""What does a cluster, or an assignment of endpoints, say? xDS v3 messages -> model values. Raises Wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from meshlib.model import (
    SHADOWABLE,
    BreakerRules,
    Cluster,
    ClusterType,
    ConnectionLimits,
    Endpoint,
    HashTable,
    Health,
    HealthCheck,
    LoadAssignment,
    LoadBalancing,
    Locality,
    LocalityWeight,
    OutlierDetection,
    Quota,
    RateBudget,
    RateLimit,
    RetryBudget,
    ServiceName,
    SlowStart,
    TcpKeepalive,
    UpstreamTls,
    ZoneAware,
)
from meshlib.state.turns import resting
from meshlib.xds import fields as read
from meshlib.xds import messages as m
from meshlib.xds import notes
from meshlib.xds.decode_tls import is_secured, upstream_tls
from meshlib.xds.encode_clusters import (
    CIRCUIT_LIMITS,
    ENVOY_LB,
    HTTP_OPTIONS,
    ISTIO,
    MAX_EJECTION_TIME,
    OUTLIER_COUNTS,
    SOCKET_MATCH,
    TYPES,
    UNLIMITED,
)
from meshlib.xds.fields import LONGEST, Wrong
from meshlib.xds.notes import OWN

_TYPES = {number: kind for kind, number in TYPES.items()}
_HEALTH = {2: Health.UNHEALTHY, 3: Health.DRAINING, 4: Health.UNHEALTHY}
_NOTED = f"metadata.filter_metadata[{OWN}]"
_MOST_RINGS, _LARGEST_TABLE = 8 * 1024 * 1024, 5_000_011  # Envoy's (ring_hash.proto, maglev.proto)


def decode_cluster(message: Any) -> Cluster:
    kind = _TYPES.get(message.type)
    if kind is None or (not message.WhichOneof("cluster_discovery_type") and not message.HasField("load_assignment")):
        raise Wrong("type", "is missing or unknown")
    if kind is ClusterType.EDS:
        source = message.eds_cluster_config.eds_config.WhichOneof("config_source_specifier")
        if source not in ("ads", "self"):
            raise Wrong("eds_cluster_config.eds_config", "must be ads or self")
        service_name = message.eds_cluster_config.service_name
        if service_name not in ("", message.name):
            raise Wrong("eds_cluster_config.service_name", f"must be the cluster's name, not {service_name!r}")
    endpoints: tuple[Endpoint, ...] = ()
    if kind in (ClusterType.STATIC, ClusterType.STRICT_DNS, ClusterType.LOGICAL_DNS):
        endpoints = _endpoints(message.load_assignment, "load_assignment")[0]
    options, http2 = _http_options(message)
    # "If multiple Thresholds are defined with the same RoutingPriority, the first one in the list is used"
    first = next((each for each in message.circuit_breakers.thresholds if each.priority == 0), None)
    filter_metadata = message.metadata.filter_metadata
    noted = read.plain(filter_metadata[OWN]) if OWN in filter_metadata else {}
    service = _service(filter_metadata[ISTIO].fields) if ISTIO in filter_metadata else None
    balancing = _balancing(message, noted)
    return Cluster(
        message.name,
        kind,
        balancing.kind,
        read.seconds(message.connect_timeout, "connect_timeout", positive=True)
        if message.HasField("connect_timeout")
        else 5.0,
        _limits(message, first, options, http2, noted),
        _retry_budget(first, noted),
        _outlier(message, noted),
        _tls(message),
        http2 is not None,
        endpoints,
        service,
        read.note(message.metadata, ISTIO, "subset"),
        balancing.hash_table,
        balancing.slow_start,
        balancing.locality_weighted,
        balancing.zone_aware,
        _health_checks(message, service, noted),
        notes.read(BreakerRules, noted["breaker"], f"{_NOTED}.breaker") if "breaker" in noted else None,
        notes.listed(notes.one_of(*sorted(SHADOWABLE)), frozenset)(noted["shadow"], f"{_NOTED}.shadow")
        if "shadow" in noted
        else frozenset(),
        read.text(noted, "origin"),
        notes.listed(notes.of(RateLimit))(noted.get("rate_limits", []), f"{_NOTED}.rate_limits"),
        notes.listed(notes.of(Quota))(noted.get("quotas", []), f"{_NOTED}.quotas"),
    )


def _tls(message: Any) -> UpstreamTls | None:
    """One socket for all endpoints; or, as Istio's auto-mTLS has it, one for those that the match takes. Other matches
    say nothing that could be heeded here, so they are refused."""
    if is_secured(message):
        return upstream_tls(message.transport_socket)
    found = None
    for index, each in enumerate(message.transport_socket_matches):
        wanted = {key: value.string_value for key, value in each.match.fields.items()}
        if is_secured(each):
            if wanted != {"tlsMode": "istio"} or found is not None:
                raise Wrong(f"transport_socket_matches[{index}].match", "must be tlsMode: istio, once")
            found = replace(upstream_tls(each.transport_socket), auto=True)
        elif wanted:
            raise Wrong(f"transport_socket_matches[{index}].match", "must be empty: what is not matched is plaintext")
    return found


def _service(noted: Any) -> ServiceName | None:
    """As Istio tells it: the first of a list."""
    services = noted["services"].list_value.values if "services" in noted else ()
    if not services or services[0].WhichOneof("kind") != "struct_value":
        return None
    named = services[0].struct_value.fields
    host, name, namespace = (
        str(named[key].string_value) if key in named else "" for key in ("host", "name", "namespace")
    )
    return ServiceName(host, name, namespace)


# Load balancing


class _Balancing(NamedTuple):
    kind: LoadBalancing
    hash_table: HashTable = HashTable()
    slow_start: SlowStart | None = None
    locality_weighted: bool = False
    zone_aware: ZoneAware | None = None


def _balancing(message: Any, noted: dict[str, Any]) -> _Balancing:
    """`load_balancing_policy` rules out `lb_policy` where it is given (Envoy, gRFC A52). A note rules out both."""
    if message.HasField("load_balancing_policy"):
        # Where none is known, calls shall work all the same.
        found = _first_known(message.load_balancing_policy, 0) or _Balancing(LoadBalancing.LEAST_REQUEST)
    else:
        found = _older_form(message)
    if "load_balancing" in noted:
        named = notes.one_of(*LoadBalancing)(noted["load_balancing"], f"{_NOTED}.load_balancing")
        found = found._replace(kind=LoadBalancing(named))
    if "slow_start" in noted:
        found = found._replace(slow_start=notes.read(SlowStart, noted["slow_start"], f"{_NOTED}.slow_start"))
    if "zone_aware" in noted:
        found = found._replace(zone_aware=notes.read(ZoneAware, noted["zone_aware"], f"{_NOTED}.zone_aware"))
    if "locality_weighted" in noted:
        weighted = notes.flag(noted["locality_weighted"], f"{_NOTED}.locality_weighted")
        found = found._replace(locality_weighted=weighted)
    if "hash_table" in noted:
        field = f"{_NOTED}.hash_table"
        table = notes.read(HashTable, noted["hash_table"], field)
        _check_rings(table, f"{field}.minimum_ring_size")
        _check_prime(table.maglev_size, f"{field}.maglev_size")
        found = found._replace(hash_table=table)
    return found


def _older_form(message: Any) -> _Balancing:
    common, kind = message.common_lb_config, message.lb_policy
    weighted, zone_aware = _localities(common, "common_lb_config")
    if kind == 0:
        config, field = message.round_robin_lb_config, "round_robin_lb_config"
        return _Balancing(
            LoadBalancing.ROUND_ROBIN,
            slow_start=_slow_start(config, field),
            locality_weighted=weighted,
            zone_aware=zone_aware,
        )
    if kind == 2:
        table = _rings(message.ring_hash_lb_config, "ring_hash_lb_config")
        return _Balancing(LoadBalancing.RING_HASH, table, None, weighted, zone_aware)
    if kind == 3:
        return _Balancing(LoadBalancing.RANDOM, locality_weighted=weighted, zone_aware=zone_aware)
    if kind == 5:
        table = _table(message.maglev_lb_config, "maglev_lb_config")
        return _Balancing(LoadBalancing.MAGLEV, table, None, weighted, zone_aware)
    slow_start = _slow_start(message.least_request_lb_config, "least_request_lb_config")
    return _Balancing(LoadBalancing.LEAST_REQUEST, HashTable(), slow_start, weighted, zone_aware)


_DEEPEST = 4
_NAME = "load_balancing_policy"


def _first_known(policy: Any, depth: int) -> _Balancing | None:
    for each in policy.policies:
        config = each.typed_extension_config.typed_config
        reader = _EXTENSIONS.get(config.type_url)
        if reader is not None:
            message_type, read_config = reader
            return read_config(read.unpacked(config, message_type, _NAME))
        if config.type_url == _WRR_LOCALITY and depth < _DEEPEST:
            inner = read.unpacked(config, m.WrrLocality, _NAME).endpoint_picking_policy
            found = _first_known(inner, depth + 1)
            if found is not None:
                return found._replace(locality_weighted=True)
    return None


def _least_request(config: Any) -> _Balancing:
    weighted, zone_aware = _localities(config.locality_lb_config, f"{_NAME}.locality_lb_config")
    slow_start = _slow_start(config, _NAME)
    return _Balancing(LoadBalancing.LEAST_REQUEST, HashTable(), slow_start, weighted, zone_aware)


def _round_robin(config: Any) -> _Balancing:
    return _least_request(config)._replace(kind=LoadBalancing.ROUND_ROBIN)  # the same fields


def _random(config: Any) -> _Balancing:
    weighted, zone_aware = _localities(config.locality_lb_config, f"{_NAME}.locality_lb_config")
    return _Balancing(LoadBalancing.RANDOM, locality_weighted=weighted, zone_aware=zone_aware)


def _ring_hash(config: Any) -> _Balancing:
    weighted = config.HasField("locality_weighted_lb_config")
    return _Balancing(LoadBalancing.RING_HASH, _rings(config, _NAME), locality_weighted=weighted)


def _maglev(config: Any) -> _Balancing:
    weighted = config.HasField("locality_weighted_lb_config")
    return _Balancing(LoadBalancing.MAGLEV, _table(config, _NAME), locality_weighted=weighted)


def _client_side_weighted(config: Any) -> _Balancing:
    slow_start = _slow_start(config, _NAME)
    return _Balancing(LoadBalancing.CLIENT_SIDE_WEIGHTED_ROUND_ROBIN, slow_start=slow_start)


_WRR_LOCALITY = m.type_url(m.WrrLocality)
_EXTENSIONS = {
    m.type_url(message_type): (message_type, reader)
    for message_type, reader in (
        (m.LeastRequest, _least_request),
        (m.RoundRobin, _round_robin),
        (m.Random, _random),
        (m.RingHash, _ring_hash),
        (m.Maglev, _maglev),
        (m.ClientSideWeightedRoundRobin, _client_side_weighted),
    )
}


def _localities(message: Any, field: str) -> tuple[bool, ZoneAware | None]:
    kind = message.WhichOneof("locality_config_specifier")
    if kind != "zone_aware_lb_config":
        return kind is not None, None
    config, default = message.zone_aware_lb_config, ZoneAware()
    return False, ZoneAware(
        read.percent(config.routing_enabled, f"{field}.{kind}.routing_enabled")
        if config.HasField("routing_enabled")
        else default.routing_percent,
        int(config.min_cluster_size.value) if config.HasField("min_cluster_size") else default.min_cluster_size,
    )


def _slow_start(message: Any, field: str) -> SlowStart | None:
    if not message.HasField("slow_start_config"):
        return None
    config, field = message.slow_start_config, f"{field}.slow_start_config"
    aggression = config.aggression.default_value if config.HasField("aggression") else 1.0
    if not 0 < aggression < math.inf:
        raise Wrong(f"{field}.aggression", f"must be more than 0, not {aggression}")
    return SlowStart(
        read.seconds(config.slow_start_window, f"{field}.slow_start_window", positive=True),
        aggression,
        read.percent(config.min_weight_percent, f"{field}.min_weight_percent")
        if config.HasField("min_weight_percent")
        else 10.0,
    )


def _rings(config: Any, field: str) -> HashTable:
    default = HashTable()
    table = HashTable(
        int(config.minimum_ring_size.value) if config.HasField("minimum_ring_size") else default.minimum_ring_size,
        int(config.maximum_ring_size.value) if config.HasField("maximum_ring_size") else default.maximum_ring_size,
    )
    _check_rings(table, f"{field}.minimum_ring_size")
    return table


def _check_rings(table: HashTable, field: str) -> None:
    smallest, largest = table.minimum_ring_size, table.maximum_ring_size
    if not 1 <= smallest <= largest <= _MOST_RINGS:
        raise Wrong(field, f"must be at least 1 and no more than maximum_ring_size, not {smallest} and {largest}")


def _table(config: Any, field: str) -> HashTable:
    if not config.HasField("table_size"):
        return HashTable()
    _check_prime(config.table_size.value, f"{field}.table_size")
    return HashTable(maglev_size=int(config.table_size.value))


def _check_prime(size: int, field: str) -> None:
    if not 2 <= size <= _LARGEST_TABLE or any(size % each == 0 for each in range(2, math.isqrt(size) + 1)):
        raise Wrong(field, f"must be a prime number up to {_LARGEST_TABLE}, not {size}")


# Limits and options


def _http_options(message: Any) -> tuple[Any, Any]:
    """The options of every protocol; those of HTTP/2, or None where it is not spoken. The cluster's own fields are the
    deprecated form, which other control planes still write."""
    if HTTP_OPTIONS not in message.typed_extension_protocol_options:
        http2 = message.http2_protocol_options if message.HasField("http2_protocol_options") else None
        return message.common_http_protocol_options, http2
    options = read.unpacked(
        message.typed_extension_protocol_options[HTTP_OPTIONS],
        m.HttpProtocolOptions,
        f"typed_extension_protocol_options[{HTTP_OPTIONS}]",
    )
    explicit = options.explicit_http_config
    is_http2 = explicit.WhichOneof("protocol_config") == "http2_protocol_options"
    return options.common_http_protocol_options, explicit.http2_protocol_options if is_http2 else None


def _limits(message: Any, thresholds: Any, common: Any, http2: Any, noted: dict[str, Any]) -> ConnectionLimits:
    found: dict[str, Any] = {}
    for name in CIRCUIT_LIMITS:
        if thresholds is not None and thresholds.HasField(name):
            value = int(getattr(thresholds, name).value)
            found[name] = None if value == UNLIMITED else value
    place = f"typed_extension_protocol_options[{HTTP_OPTIONS}].common_http_protocol_options"
    if common.HasField("idle_timeout"):  # 0 switches it off
        found["idle_timeout"] = read.seconds(common.idle_timeout, f"{place}.idle_timeout") or float(LONGEST)
    if common.HasField("max_connection_duration"):  # and here
        duration = read.seconds(common.max_connection_duration, f"{place}.max_connection_duration")
        found["max_connection_duration"] = duration or None
    if common.HasField("max_requests_per_connection"):
        found["max_requests_per_connection"] = common.max_requests_per_connection.value
    elif message.HasField("max_requests_per_connection"):  # the deprecated form
        found["max_requests_per_connection"] = message.max_requests_per_connection.value
    if http2 is not None and http2.HasField("max_concurrent_streams"):
        streams = http2.max_concurrent_streams.value
        if not 1 <= streams <= 0x7FFFFFFF:
            raise Wrong("http2_protocol_options.max_concurrent_streams", f"must be from 1 to 2147483647, not {streams}")
        found["max_concurrent_streams"] = streams
    if message.upstream_connection_options.HasField("tcp_keepalive"):
        keepalive = message.upstream_connection_options.tcp_keepalive
        found["tcp_keepalive"] = TcpKeepalive(
            keepalive.keepalive_probes.value, keepalive.keepalive_time.value, keepalive.keepalive_interval.value
        )
    if "limits" in noted:
        found |= notes.changes(ConnectionLimits, noted["limits"], f"{_NOTED}.limits")
    return ConnectionLimits(**found)


def _retry_budget(thresholds: Any, noted: dict[str, Any]) -> RetryBudget | RateBudget | None:
    if "retry_budget" in noted:
        note, place = noted["retry_budget"], f"{_NOTED}.retry_budget"
        if isinstance(note, dict) and "ratio" in note:
            return notes.read(RateBudget, note, place)
        return notes.read(RetryBudget, note, place)
    if thresholds is None or not thresholds.HasField("retry_budget"):
        return None
    given, place, default = thresholds.retry_budget, "circuit_breakers.thresholds.retry_budget", RetryBudget()
    return RetryBudget(
        read.percent(given.budget_percent, f"{place}.budget_percent")
        if given.HasField("budget_percent")
        else default.percent,
        given.min_retry_concurrency.value if given.HasField("min_retry_concurrency") else default.min_concurrency,
    )


# Health


def _outlier(message: Any, noted: dict[str, Any]) -> OutlierDetection | None:
    found = _envoys_outlier(message) if message.HasField("outlier_detection") else None
    if "outlier_detection" not in noted:
        return found
    changes = notes.changes(OutlierDetection, noted["outlier_detection"], f"{_NOTED}.outlier_detection")
    return replace(found or OutlierDetection(), **changes)


def _envoys_outlier(message: Any) -> OutlierDetection:
    outlier, default = message.outlier_detection, OutlierDetection()

    def enforced(name: str, otherwise: int) -> int:
        share = int(getattr(outlier, name).value) if outlier.HasField(name) else otherwise
        if share > 100:
            raise Wrong(f"outlier_detection.{name}", f"must be from 0 to 100, not {share}")
        return share

    def count(name: str, enforcing: str, otherwise: int, always: int) -> int:
        if not enforced(enforcing, always):
            return 0
        return int(getattr(outlier, name).value) if outlier.HasField(name) else otherwise

    def seconds(name: str, otherwise: float, *, positive: bool = True) -> float:
        place = f"outlier_detection.{name}"
        return read.seconds(getattr(outlier, name), place, positive=positive) if outlier.HasField(name) else otherwise

    counts: dict[str, Any] = {
        ours: int(getattr(outlier, name).value) if outlier.HasField(name) else otherwise
        for ours, name, otherwise in OUTLIER_COUNTS
    }
    panic = read.percent(message.common_lb_config.healthy_panic_threshold, "common_lb_config.healthy_panic_threshold")
    if counts["failure_percentage_threshold"] > 100:
        raise Wrong("outlier_detection.failure_percentage_threshold", "must be from 0 to 100")
    return OutlierDetection(
        count("consecutive_5xx", "enforcing_consecutive_5xx", 5, 100),
        count("consecutive_gateway_failure", "enforcing_consecutive_gateway_failure", 5, 0),
        count("consecutive_local_origin_failure", "enforcing_consecutive_local_origin_failure", 5, 100),
        outlier.split_external_local_origin_errors,
        seconds("interval", default.interval),
        seconds("base_ejection_time", default.base_ejection_time),
        enforced("max_ejection_percent", 10),
        math.ceil(panic),
        max_ejection_time=seconds("max_ejection_time", MAX_EJECTION_TIME),
        max_ejection_jitter=seconds("max_ejection_time_jitter", 0.0, positive=False),
        always_eject_one=outlier.always_eject_one_host.value,
        success_rate_enforcing=enforced("enforcing_success_rate", 100),
        success_rate_stdev_factor=outlier.success_rate_stdev_factor.value / 1000
        if outlier.HasField("success_rate_stdev_factor")
        else default.success_rate_stdev_factor,
        failure_percentage_enforcing=enforced("enforcing_failure_percentage", 0),
        **counts,
    )


def _health_checks(message: Any, service: ServiceName | None, noted: dict[str, Any]) -> tuple[HealthCheck, ...]:
    if "health_checks" in noted:
        given, field = noted["health_checks"], f"{_NOTED}.health_checks"
        found: tuple[HealthCheck, ...] = notes.listed(lambda note, place: notes.read(HealthCheck, note, place))(
            given, field
        )
        return found
    checks = (_health_check(each, f"health_checks[{i}]", service) for i, each in enumerate(message.health_checks))
    return tuple(each for each in checks if each is not None)


def _health_check(message: Any, field: str, service: ServiceName | None) -> HealthCheck | None:
    """None for a kind that is not known: then nothing is checked, and nothing taken out."""
    kind = message.WhichOneof("health_checker")
    if kind is None:
        return None
    common: dict[str, Any] = {
        "port": int(message.alt_port.value),
        "interval": read.seconds(message.interval, f"{field}.interval", positive=True),
        "timeout": read.seconds(message.timeout, f"{field}.timeout", positive=True),
        "healthy_threshold": int(message.healthy_threshold.value),
        "unhealthy_threshold": int(message.unhealthy_threshold.value),
    }
    for name in ("healthy_threshold", "unhealthy_threshold"):
        if not common[name]:
            raise Wrong(f"{field}.{name}", "is missing or 0")
    if common["port"] > 65535:
        raise Wrong(f"{field}.alt_port", f"is no port: {common['port']}")
    if kind == "tcp_health_check":
        return HealthCheck("tcp", **common)

    def host(named: str, place: str) -> str:
        read.head_text(named, place)
        return "" if service is not None and named == service.host else named

    if kind == "grpc_health_check":
        grpc = message.grpc_health_check
        host_named = host(grpc.authority, f"{field}.{kind}.authority")
        return HealthCheck("grpc", host=host_named, service=grpc.service_name, **common)
    http = message.http_health_check
    statuses = []
    for index, each in enumerate(http.expected_statuses):
        if not 100 <= each.start < each.end <= 600:
            raise Wrong(f"{field}.{kind}.expected_statuses[{index}]", f"is no range: {each.start} to {each.end}")
        statuses.append((int(each.start), int(each.end) - 1))  # "end of the range (exclusive)"
    return HealthCheck(
        "http",
        read.head_text(http.path, f"{field}.{kind}.path"),
        host(http.host, f"{field}.{kind}.host"),
        expected_statuses=tuple(statuses) or ((200, 200),),  # "By default ... only 200"
        **common,
    )


# Endpoints


def decode_assignment(message: Any) -> LoadAssignment:
    endpoints, weights = _endpoints(message, "")
    return LoadAssignment(message.cluster_name, endpoints, weights)


def _endpoints(message: Any, prefix: str) -> tuple[tuple[Endpoint, ...], tuple[LocalityWeight, ...]]:
    found: list[Endpoint] = []
    weights: list[LocalityWeight] = []
    is_weighted = False
    seen: set[tuple[int, Locality]] = set()
    for index, group in enumerate(message.endpoints):
        field = f"{prefix}.endpoints[{index}]".lstrip(".")
        locality = read.locality(group.locality)
        if (group.priority, locality) in seen:
            raise Wrong(field, f"repeats locality {locality} of priority {group.priority}")
        seen.add((group.priority, locality))
        members = [
            _endpoint(each, locality, group.priority, f"{field}.lb_endpoints[{number}]")
            for number, each in enumerate(resting(group.lb_endpoints))
        ]
        found += members
        weight = int(group.load_balancing_weight.value)
        weights.append(LocalityWeight(locality, group.priority, weight))
        # A weight that just adds up the endpoints' says nothing of its own (encode writes it for gRPC), unless noted.
        is_weighted = (
            is_weighted or weight not in (0, sum(member.weight for member in members)) or _is_marked(group.metadata)
        )
    return tuple(sorted(found)), tuple(weights) if is_weighted else ()


def _is_marked(metadata: Any) -> bool:
    return OWN in metadata.filter_metadata and "weighted" in metadata.filter_metadata[OWN].fields


def _endpoint(message: Any, locality: Locality, priority: int, field: str) -> Endpoint:
    address = message.endpoint.address.socket_address
    if not address.address or not 0 < address.port_value < 65536:
        raise Wrong(f"{field}.endpoint.address", f"is no address: {address.address!r} port {address.port_value}")
    workload = hash_key = peer = ""
    if message.HasField("metadata"):
        # Istio's form is `name;namespace;service;revision;cluster`.
        workload, _, peer = read.note(message.metadata, ISTIO, "workload").partition(";")
        hash_key = read.note(message.metadata, ENVOY_LB, "hash_key")
    return Endpoint(
        address.address,
        address.port_value,
        max(1, message.load_balancing_weight.value) if message.HasField("load_balancing_weight") else 1,
        locality,
        priority,
        _HEALTH.get(message.health_status, Health.HEALTHY),
        workload,
        hash_key,
        peer,
        read.note(message.metadata, SOCKET_MATCH, "tlsMode") == "istio" if message.HasField("metadata") else False,
    )
