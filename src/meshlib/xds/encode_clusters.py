"""How do clusters and their endpoints look on the wire? Model values -> xDS v3, with Envoy's fields wherever there are
any, and notes (notes.py) for the rest.

Others must never do more than was meant: what runs in shadow here is noted, and not asked of Envoy or gRPC at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

from meshlib.model import (
    Cluster,
    ClusterType,
    ConnectionLimits,
    Endpoint,
    HashTable,
    Health,
    HealthCheck,
    LoadAssignment,
    LoadBalancing,
    OutlierDetection,
    RateBudget,
    RetryBudget,
    SlowStart,
    TcpKeepalive,
)
from meshlib.xds import messages as m
from meshlib.xds import notes
from meshlib.xds.encode_tls import set_upstream
from meshlib.xds.fields import LONGEST
from meshlib.xds.notes import OWN
from meshlib.xds.pieces import refer, set_locality, set_seconds
from meshlib.xds.reader import OURSELVES, Reader

UNLIMITED = 0xFFFFFFFF
"""How Istio writes "no limit" for Envoy, whose own defaults are 1024 and 3."""
ISTIO, ENVOY_LB, SOCKET_MATCH = "istio", "envoy.lb", "envoy.transport_socket_match"
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
CIRCUIT_LIMITS = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
OUTLIER_COUNTS = (
    # Ours, Envoy's, and Envoy's default, which is left out
    ("success_rate_minimum_hosts", "success_rate_minimum_hosts", 5),
    ("success_rate_request_volume", "success_rate_request_volume", 100),
    ("failure_percentage_threshold", "failure_percentage_threshold", 85),
    ("failure_percentage_minimum_hosts", "failure_percentage_minimum_hosts", 5),
    ("failure_percentage_request_volume", "failure_percentage_request_volume", 50),
)
MAX_EJECTION_TIME = 300.0
"""Envoy's default, or base_ejection_time where that is more; a given one that is less than that it refuses."""

TYPES = {
    ClusterType.STATIC: 0,
    ClusterType.STRICT_DNS: 1,
    ClusterType.LOGICAL_DNS: 2,
    ClusterType.EDS: 3,
    ClusterType.ORIGINAL_DST: 4,
}
_ROUND_ROBIN, _LEAST_REQUEST, _RING_HASH, _RANDOM, _MAGLEV, _CLUSTER_PROVIDED = 0, 1, 2, 3, 5, 6
_HEALTH = {Health.HEALTHY: 1, Health.UNHEALTHY: 2, Health.DRAINING: 3}
_HASH_TABLE = HashTable()


def encode_cluster(cluster: Cluster, reader: Reader = OURSELVES) -> Any:
    message = m.Cluster(name=cluster.name, type=TYPES[cluster.type])
    noted = _balance(message, cluster)
    set_seconds(message.connect_timeout, cluster.connect_timeout)
    if cluster.type is ClusterType.EDS:
        refer(message.eds_cluster_config.eds_config, reader)
        message.eds_cluster_config.service_name = cluster.name
        message.lrs_server.self.SetInParent()  # gRPC reports the load of clusters that say so
    elif cluster.type is not ClusterType.ORIGINAL_DST:
        message.load_assignment.CopyFrom(encode_assignment(cluster.name, cluster.endpoints))
    noted |= _limit(message, cluster)
    if cluster.limits.tcp_keepalive is not None:
        _set_keepalive(message.upstream_connection_options.tcp_keepalive, cluster.limits.tcp_keepalive)
    if cluster.outlier_detection is not None:
        noted |= _detect_outliers(message, cluster, cluster.outlier_detection)
    if cluster.health_checks:
        noted |= _check_health(message, cluster)
    if cluster.tls is not None and cluster.tls.auto:
        # As Istio has it: what no match takes goes out as it is.
        match = message.transport_socket_matches.add(name="tlsMode-istio")
        match.match.fields["tlsMode"].string_value = "istio"
        set_upstream(match.transport_socket, cluster.tls, cluster.http2, reader)
    elif cluster.tls is not None:
        set_upstream(message.transport_socket, cluster.tls, cluster.http2, reader)
    options = _http_options(cluster)
    if options is not None:
        message.typed_extension_protocol_options[HTTP_OPTIONS].CopyFrom(m.pack(options))
    if cluster.service is not None or cluster.subset:
        _name_service(message.metadata.filter_metadata[ISTIO].fields, cluster)
    if cluster.breaker is not None:
        noted["breaker"] = notes.write(cluster.breaker)
    if cluster.rate_limits:
        noted["rate_limits"] = [notes.write(each) for each in cluster.rate_limits]
    if cluster.quotas:
        noted["quotas"] = [notes.write(each) for each in cluster.quotas]
    if cluster.shadow:
        noted["shadow"] = sorted(cluster.shadow)
    if cluster.origin:
        noted["origin"] = cluster.origin
    if noted:
        message.metadata.filter_metadata[OWN].update(noted)
    return message


def _name_service(metadata: Any, cluster: Cluster) -> None:
    """As Istio tells it to Envoy, for its telemetry."""
    if cluster.service is not None:
        service = metadata["services"].list_value.values.add().struct_value.fields
        service["host"].string_value = cluster.service.host
        service["name"].string_value = cluster.service.name
        service["namespace"].string_value = cluster.service.namespace
    if cluster.subset:
        metadata["subset"].string_value = cluster.subset


# Load balancing


def _balance(message: Any, cluster: Cluster) -> dict[str, Any]:
    """Whoever reads `load_balancing_policy` takes the first policy it knows: Envoy and we the first, gRPC the second
    (gRFC A52). The older `lb_policy` is written where gRPC knows it, since it then heeds the localities' weights;
    least request, maglev and random it would refuse there, and C-core the whole cluster.

    Returns what the form does not say.
    """
    if cluster.type is ClusterType.ORIGINAL_DST:
        message.lb_policy, said = _CLUSTER_PROVIDED, frozenset({"LEAST_REQUEST"})
    else:
        write, said = _FORMS[cluster.load_balancing]
        write(message, cluster)
    noted: dict[str, Any] = {}
    if cluster.load_balancing not in said:
        noted["load_balancing"] = str(cluster.load_balancing)
    if cluster.slow_start is not None and "slow_start" not in said:
        noted["slow_start"] = notes.write(cluster.slow_start)
    if cluster.locality_weighted and "locality_weighted" not in said:
        noted["locality_weighted"] = True
    # Envoy weighs the localities or is zone-aware.
    if cluster.zone_aware is not None and (cluster.locality_weighted or "zone_aware" not in said):
        noted["zone_aware"] = notes.write(cluster.zone_aware)
    if (table := cluster.hash_table) is not _HASH_TABLE and table != _HASH_TABLE:
        rings = (table.minimum_ring_size, table.maximum_ring_size)
        ring_only = table.maglev_size == _HASH_TABLE.maglev_size and "rings" in said
        table_only = rings == (_HASH_TABLE.minimum_ring_size, _HASH_TABLE.maximum_ring_size) and "table" in said
        if not ring_only and not table_only:
            noted["hash_table"] = notes.write(table)
    return noted


def _round_robin(message: Any, cluster: Cluster) -> None:
    message.lb_policy = _ROUND_ROBIN
    if cluster.slow_start is not None:
        _set_slow_start(message.round_robin_lb_config.slow_start_config, cluster.slow_start)
    if cluster.locality_weighted or cluster.zone_aware is not None:
        _set_localities(message.common_lb_config, cluster)


def _ring_hash(message: Any, cluster: Cluster) -> None:
    message.lb_policy = _RING_HASH
    message.ring_hash_lb_config.minimum_ring_size.value = cluster.hash_table.minimum_ring_size
    message.ring_hash_lb_config.maximum_ring_size.value = cluster.hash_table.maximum_ring_size
    if cluster.locality_weighted:
        message.common_lb_config.locality_weighted_lb_config.SetInParent()


def _least_request(message: Any, cluster: Cluster) -> None:
    config = m.LeastRequest()
    if cluster.slow_start is not None:
        _set_slow_start(config.slow_start_config, cluster.slow_start)
    if cluster.locality_weighted or cluster.zone_aware is not None:
        _set_localities(config.locality_lb_config, cluster)
    _add_policy(message, "least_request", config)
    _add_policy(message, "wrr_locality", _by_localities("round_robin", m.RoundRobin()))


def _random(message: Any, cluster: Cluster) -> None:
    config = m.Random()
    if cluster.locality_weighted or cluster.zone_aware is not None:
        _set_localities(config.locality_lb_config, cluster)
    _add_policy(message, "random", config)
    _add_policy(message, "wrr_locality", _by_localities("round_robin", m.RoundRobin()))


def _maglev(message: Any, cluster: Cluster) -> None:
    """With a ring behind it: gRPC's calls stick as well, though each to another endpoint than Envoy's and ours."""
    config = m.Maglev()
    config.table_size.value = cluster.hash_table.maglev_size
    if cluster.locality_weighted:
        config.locality_weighted_lb_config.SetInParent()
    _add_policy(message, "maglev", config)
    _add_policy(message, "ring_hash", m.RingHash(hash_function=1))


def _client_side_weighted(message: Any, cluster: Cluster) -> None:
    """With plain turns behind it, for who is too old: Envoy 1.36 has no wrr_locality, and refuses a cluster of whose
    policies it knows none."""
    config, behind = m.ClientSideWeightedRoundRobin(), m.RoundRobin()
    if cluster.slow_start is not None:
        _set_slow_start(config.slow_start_config, cluster.slow_start)
    if cluster.locality_weighted:
        _add_policy(message, "wrr_locality", _by_localities("client_side_weighted_round_robin", config))
    else:
        _add_policy(message, "client_side_weighted_round_robin", config)
    if cluster.slow_start is not None:
        _set_slow_start(behind.slow_start_config, cluster.slow_start)
    if cluster.locality_weighted:
        _set_localities(behind.locality_lb_config, cluster)
    _add_policy(message, "round_robin", behind)


_FORMS: dict[LoadBalancing, tuple[Callable[[Any, Cluster], None], frozenset[str]]] = {
    LoadBalancing.ROUND_ROBIN: (
        _round_robin,
        frozenset({"ROUND_ROBIN", "slow_start", "locality_weighted", "zone_aware"}),
    ),
    LoadBalancing.LEAST_REQUEST: (
        _least_request,
        frozenset({"LEAST_REQUEST", "slow_start", "locality_weighted", "zone_aware"}),
    ),
    # Others have no such policy: least request is its nearest relative.
    LoadBalancing.PEAK_EWMA: (_least_request, frozenset({"slow_start", "locality_weighted", "zone_aware"})),
    LoadBalancing.RANDOM: (_random, frozenset({"RANDOM", "locality_weighted", "zone_aware"})),
    LoadBalancing.RING_HASH: (_ring_hash, frozenset({"RING_HASH", "locality_weighted", "rings"})),
    LoadBalancing.MAGLEV: (_maglev, frozenset({"MAGLEV", "locality_weighted", "table"})),
    LoadBalancing.CLIENT_SIDE_WEIGHTED_ROUND_ROBIN: (
        _client_side_weighted,
        frozenset({"CLIENT_SIDE_WEIGHTED_ROUND_ROBIN", "slow_start", "locality_weighted"}),
    ),
}
"""Who writes a policy, and what its form can say."""


def _add_policy(message: Any, name: str, config: Any) -> None:
    extension = message.load_balancing_policy.policies.add().typed_extension_config
    extension.name = f"envoy.load_balancing_policies.{name}"
    m.pack_into(extension.typed_config, config)


def _by_localities(name: str, config: Any) -> Any:
    message = m.WrrLocality()
    extension = message.endpoint_picking_policy.policies.add().typed_extension_config
    extension.name = f"envoy.load_balancing_policies.{name}"
    m.pack_into(extension.typed_config, config)
    return message


def _set_localities(message: Any, cluster: Cluster) -> None:
    """In a CommonLbConfig or a LocalityLbConfig: the fields have the same names."""
    if cluster.locality_weighted:
        message.locality_weighted_lb_config.SetInParent()
    elif cluster.zone_aware is not None:
        message.zone_aware_lb_config.routing_enabled.value = cluster.zone_aware.routing_percent
        message.zone_aware_lb_config.min_cluster_size.value = cluster.zone_aware.min_cluster_size


def _set_slow_start(message: Any, slow_start: SlowStart) -> None:
    set_seconds(message.slow_start_window, slow_start.window)
    if slow_start.aggression != 1.0:
        message.aggression.default_value = slow_start.aggression
        message.aggression.runtime_key = "meshlib.slow_start.aggression"  # Envoy wants one; nobody sets it
    message.min_weight_percent.value = slow_start.min_weight_percent


# Limits and options


def _limit(message: Any, cluster: Cluster) -> dict[str, Any]:
    limits, budget, noted = cluster.limits, cluster.retry_budget, {}
    thresholds = message.circuit_breakers.thresholds.add()
    carried_out = limits if "limits" not in cluster.shadow else ConnectionLimits()
    for name in CIRCUIT_LIMITS:
        limit = getattr(carried_out, name)
        getattr(thresholds, name).value = UNLIMITED if limit is None else limit
    names: tuple[str, ...] = CIRCUIT_LIMITS if carried_out is not limits else ()
    if limits.max_concurrent_streams is not None and not cluster.http2:
        names += ("max_concurrent_streams",)
    if names:
        noted["limits"] = notes.write(limits, *names)
    in_shadow = "retry-budget" in cluster.shadow
    if isinstance(budget, RetryBudget) and not in_shadow:
        thresholds.retry_budget.budget_percent.value = budget.percent
        thresholds.retry_budget.min_retry_concurrency.value = budget.min_concurrency
    elif budget is not None:
        noted["retry_budget"] = notes.write(budget)
        if isinstance(budget, RateBudget) and not in_shadow:  # the nearest that Envoy has
            thresholds.retry_budget.budget_percent.value = min(100.0, budget.ratio * 100)
    return noted


def _set_keepalive(message: Any, keepalive: TcpKeepalive) -> None:
    message.SetInParent()
    for name in ("probes", "time", "interval"):
        if value := getattr(keepalive, name):
            getattr(message, f"keepalive_{name}").value = value


def _http_options(cluster: Cluster) -> Any:
    """None where Envoy's defaults do."""
    limits = cluster.limits
    names_itself = cluster.tls is not None and not cluster.tls.sni
    if (
        not cluster.http2
        and not names_itself
        and limits.idle_timeout is None
        and limits.max_connection_duration is None
        and limits.max_requests_per_connection == 0
    ):
        return None
    message = m.HttpProtocolOptions()
    common = message.common_http_protocol_options
    if limits.idle_timeout is not None:
        # "If set to 0, the timeout is disabled" (protocol.proto)
        set_seconds(common.idle_timeout, limits.idle_timeout if limits.idle_timeout < LONGEST else 0)
    if limits.max_connection_duration is not None:
        set_seconds(common.max_connection_duration, limits.max_connection_duration)
    if limits.max_requests_per_connection:
        common.max_requests_per_connection.value = limits.max_requests_per_connection
    if names_itself:
        message.upstream_http_protocol_options.auto_sni = True
        verifies = cluster.tls is not None and not cluster.tls.insecure_skip_verify
        message.upstream_http_protocol_options.auto_san_validation = verifies
    if not cluster.http2:
        message.explicit_http_config.http_protocol_options.SetInParent()
        return message
    http2 = message.explicit_http_config.http2_protocol_options
    http2.SetInParent()
    if limits.max_concurrent_streams is not None:
        http2.max_concurrent_streams.value = limits.max_concurrent_streams
    return message


# Health


def _detect_outliers(message: Any, cluster: Cluster, rules: OutlierDetection) -> dict[str, Any]:
    if "outlier-detection" in cluster.shadow:
        return {"outlier_detection": notes.write(rules)}
    outlier = message.outlier_detection
    for value, count, enforcing, always in (
        (rules.consecutive_5xx, "consecutive_5xx", "enforcing_consecutive_5xx", True),
        (
            rules.consecutive_gateway_errors,
            "consecutive_gateway_failure",
            "enforcing_consecutive_gateway_failure",
            False,
        ),
        (
            rules.consecutive_local_origin_failures,
            "consecutive_local_origin_failure",
            "enforcing_consecutive_local_origin_failure",
            True,
        ),
    ):
        if value:
            getattr(outlier, count).value = value
        if not always or not value:
            getattr(outlier, enforcing).value = 100 if value else 0
    set_seconds(outlier.interval, rules.interval)
    set_seconds(outlier.base_ejection_time, rules.base_ejection_time)
    outlier.max_ejection_percent.value = rules.max_ejection_percent
    # Istio leaves success rates off: with Envoy's default of 100 they would eject without being asked to.
    outlier.enforcing_success_rate.value = rules.success_rate_enforcing
    if rules.failure_percentage_enforcing:
        outlier.enforcing_failure_percentage.value = rules.failure_percentage_enforcing
    if rules.split_external_local_origin_errors:
        outlier.split_external_local_origin_errors = True
        outlier.enforcing_local_origin_success_rate.value = rules.success_rate_enforcing
        outlier.enforcing_failure_percentage_local_origin.value = rules.failure_percentage_enforcing
    for ours, name, default in OUTLIER_COUNTS:
        if (value := getattr(rules, ours)) != default:
            getattr(outlier, name).value = value
    noted: dict[str, Any] = {}
    if (factor := rules.success_rate_stdev_factor) != 1.9:
        outlier.success_rate_stdev_factor.value = thousandths = round(factor * 1000)
        if thousandths / 1000 != factor:
            noted["success_rate_stdev_factor"] = factor
    if rules.max_ejection_time != MAX_EJECTION_TIME:
        if rules.max_ejection_time >= rules.base_ejection_time:
            set_seconds(outlier.max_ejection_time, rules.max_ejection_time)
        else:
            noted["max_ejection_time"] = rules.max_ejection_time
    if rules.max_ejection_jitter:
        set_seconds(outlier.max_ejection_time_jitter, rules.max_ejection_jitter)
    if rules.always_eject_one:
        outlier.always_eject_one_host.value = True
    if rules.error_codes:
        noted["error_codes"] = sorted(rules.error_codes)
    message.common_lb_config.healthy_panic_threshold.value = rules.min_health_percent
    return {"outlier_detection": noted} if noted else {}


def _check_health(message: Any, cluster: Cluster) -> dict[str, Any]:
    """Envoy makes one check of a cluster, and gRPC's only over HTTP/2; it refuses the cluster otherwise."""
    possible = [each for each in cluster.health_checks if each.kind != "grpc" or cluster.http2]
    if possible:
        _set_health_check(message.health_checks.add(), possible[0], cluster)
    if len(cluster.health_checks) == len(possible) == 1:
        return {}
    return {"health_checks": [notes.write(each) for each in cluster.health_checks]}


def _set_health_check(message: Any, check: HealthCheck, cluster: Cluster) -> None:
    set_seconds(message.interval, check.interval)
    set_seconds(message.timeout, check.timeout)
    message.healthy_threshold.value = check.healthy_threshold
    message.unhealthy_threshold.value = check.unhealthy_threshold
    if check.port:
        message.alt_port.value = check.port
    # Envoy would name the cluster, which no server knows.
    host = check.host or (cluster.service.host if cluster.service is not None else "")
    if check.kind == "tcp":
        message.tcp_health_check.SetInParent()
    elif check.kind == "grpc":
        message.grpc_health_check.SetInParent()
        message.grpc_health_check.service_name = check.service
        message.grpc_health_check.authority = host
    else:
        http = message.http_health_check
        http.host, http.path = host, check.path
        http.codec_client_type = 1 if cluster.http2 else 0
        for first, last in check.expected_statuses:
            http.expected_statuses.add(start=first, end=last + 1)


# Endpoints


def encode_assignment(name: str, endpoints: Iterable[Endpoint], assignment: LoadAssignment | None = None) -> Any:
    message = m.ClusterLoadAssignment(cluster_name=name)
    given = assignment.locality_weights if assignment is not None else ()
    weights = {(each.priority, each.locality): each.weight for each in given}
    ordered = sorted(endpoints, key=lambda each: (each.priority, each.locality, each))
    says_something = not given
    for (priority, locality), members in groupby(ordered, key=lambda each: (each.priority, each.locality)):
        group = message.endpoints.add(priority=priority)
        set_locality(group.locality, locality)
        total = 0
        for endpoint in members:
            total += endpoint.weight
            _add_endpoint(group, endpoint)
        # Without a weight a locality gets no load, and that is what 0 means; Envoy wants at least 1 (gRFC A27).
        weight = weights.get((priority, locality), 0) if given else total
        if weight:
            group.load_balancing_weight.value = weight
        says_something = says_something or weight not in (0, total)
    if not says_something and message.endpoints:  # weights that were given, and look as if none had been
        message.endpoints[0].metadata.filter_metadata[OWN].fields["weighted"].bool_value = True
    return message


def _add_endpoint(group: Any, endpoint: Endpoint) -> None:
    added = group.lb_endpoints.add(health_status=_HEALTH[endpoint.health])
    address = added.endpoint.address.socket_address
    address.address, address.port_value = endpoint.address, endpoint.port
    added.load_balancing_weight.value = endpoint.weight
    if endpoint.workload:
        told = f"{endpoint.workload};{endpoint.peer}" if endpoint.peer else endpoint.workload
        added.metadata.filter_metadata[ISTIO].fields["workload"].string_value = told
    if endpoint.is_meshed:
        added.metadata.filter_metadata[SOCKET_MATCH].fields["tlsMode"].string_value = "istio"
    if endpoint.hash_key:
        added.metadata.filter_metadata[ENVOY_LB].fields["hash_key"].string_value = endpoint.hash_key
