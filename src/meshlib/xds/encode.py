"""How does the model look on the wire? Model values -> xDS v3 resources, in the forms that Envoy, gRPC and our own
decode.py read alike. Equal values give equal bytes, so a version can be a hash of them.

What Envoy refuses although it means something (a prefix that is empty, `/foo/` as a segment prefix) is written in
another form of the same meaning, and comes back in that form. Everything else comes back as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from meshlib.model import (
    Cluster,
    ClusterType,
    DirectResponse,
    Endpoint,
    Fault,
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
    Node,
    OutlierDetection,
    Redirect,
    RetryBudget,
    RetryPolicy,
    Rewrite,
    Route,
    RouteConfiguration,
    RouteMatch,
    Snapshot,
    StringMatch,
    UpstreamTls,
    VirtualHost,
    WeightedCluster,
)
from meshlib.xds import messages as m
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE

UNLIMITED = 0xFFFFFFFF
"""How Istio writes "no limit" for Envoy, whose own defaults are 1024 and 3."""
ISTIO, OWN = "istio", "meshlib"
FAULT_FILTER, ROUTER_FILTER = "envoy.filters.http.fault", "envoy.filters.http.router"
MANAGER_FILTER = "envoy.filters.network.http_connection_manager"
TLS_SOCKET = "envoy.transport_sockets.tls"
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
WHOLE_PATH = "^/.*$"
"""The regular expression that stands for Rewrite.path, for which Envoy has no field."""
SYSTEM_ROOTS = "/etc/ssl/certs/ca-certificates.crt"
"""Where Envoy is told to look for the system's roots, since it can't find them itself (system_root_certs is gRPC's,
gRFC A82): the place in Debian's, Alpine's and Envoy's own image. Where the file is missing Envoy refuses the cluster;
were none named, it would refuse every cluster that checks a name, and check no certificate for the others."""
DEFAULT_PORT = "default_port"
"""In a redirect's metadata: port_redirect stands for the scheme's default."""
REDIRECT_CODES = {301: 0, 302: 1, 303: 2, 307: 3, 308: 4}
_OVERWRITE, _APPEND = 2, 0

_LB = {LoadBalancing.ROUND_ROBIN: 0, LoadBalancing.LEAST_REQUEST: 1, LoadBalancing.RANDOM: 3}
_TYPES = {
    ClusterType.STATIC: 0,
    ClusterType.STRICT_DNS: 1,
    ClusterType.LOGICAL_DNS: 2,
    ClusterType.EDS: 3,
    ClusterType.ORIGINAL_DST: 4,
}
_CLUSTER_PROVIDED = 6
_HEALTH = {Health.HEALTHY: 1, Health.UNHEALTHY: 2, Health.DRAINING: 3}


def encode_resource(type_url: str, value: Listener | RouteConfiguration | Cluster | LoadAssignment) -> bytes:
    """A resource's bytes, not wrapped in an Any. Raises TypeError where type and value do not go together."""
    if type_url == LISTENER and isinstance(value, Listener):
        return m.serialize(_listener(value))
    if type_url == ROUTE and isinstance(value, RouteConfiguration):
        return m.serialize(_route_configuration(value))
    if type_url == CLUSTER and isinstance(value, Cluster):
        return m.serialize(_cluster(value))
    if type_url == ENDPOINT and isinstance(value, LoadAssignment):
        return m.serialize(_assignment(value.cluster, value.endpoints, value))
    raise TypeError(f"{type(value).__name__} is not a {type_url}")


def resources_of(snapshot: Snapshot) -> Mapping[str, Mapping[str, bytes]]:
    """Every resource of a snapshot, by type URL and name."""
    return {
        CLUSTER: {each.name: encode_resource(CLUSTER, each) for each in snapshot.clusters},
        ENDPOINT: {each.cluster: encode_resource(ENDPOINT, each) for each in snapshot.assignments},
        LISTENER: {each.name: encode_resource(LISTENER, each) for each in snapshot.listeners},
        ROUTE: {each.name: encode_resource(ROUTE, each) for each in snapshot.route_configurations},
    }


def encode_node(node: Node) -> Any:
    """The node as Istio writes it, with what meshlib adds under its own names."""
    workload = node.workload
    name, _, version = node.user_agent.partition("/")
    message = m.Node(
        id=node.id, user_agent_name=name, cluster=f"{workload.service or workload.name}.{workload.namespace}"
    )
    if version:
        message.user_agent_version = version
    _set_locality(message.locality, workload.locality)
    metadata: dict[str, Any] = {
        "NAMESPACE": workload.namespace,
        "SERVICE_ACCOUNT": workload.service_account,
        "WORKLOAD_NAME": workload.name,
        "LABELS": dict(workload.labels),
        "CLUSTER_ID": node.cluster_id,
        "MESHLIB_SERVICE": workload.service,
        "MESHLIB_PORT": workload.port,
        "MESHLIB_PORTS": dict(workload.port_names),
        "MESHLIB_READY": node.ready,
        "MESHLIB_TRUST_DOMAIN": node.trust_domain,
    }
    if workload.address:
        metadata["INSTANCE_IPS"] = workload.address
    message.metadata.update(metadata)
    return message


# Pieces


def _set_seconds(duration: Any, seconds: float) -> None:
    total = round(seconds * 1_000_000_000)
    duration.seconds, duration.nanos = divmod(total, 1_000_000_000)
    duration.SetInParent()


def _set_locality(message: Any, locality: Locality) -> None:
    message.region, message.zone, message.sub_zone = locality.region, locality.zone, locality.subzone


def _set_share(fraction: Any, per_million: int) -> None:
    fraction.numerator, fraction.denominator = per_million, 2


def _ads(source: Any) -> None:
    source.ads.SetInParent()
    source.resource_api_version = 2


def _set_string(message: Any, match: StringMatch) -> None:
    if match.kind == "regex":
        message.safe_regex.regex = _regex(match)
    elif match.kind not in ("exact", "prefix", "suffix", "contains"):
        raise TypeError(f"a string can't be matched by {match.kind}")
    elif not match.value and match.kind != "exact":
        message.safe_regex.regex = ".*"  # Envoy wants at least one character in all but exact
    else:
        setattr(message, match.kind, match.value)
        message.ignore_case = match.ignore_case


def _regex(match: StringMatch) -> str:
    """Envoy's ignore_case and case_sensitive don't concern regular expressions; RE2 has a flag for it."""
    return f"(?i){match.value}" if match.ignore_case else match.value


# Listeners


def _listener(listener: Listener) -> Any:
    message = m.Listener(name=listener.name)
    if not listener.is_bound:
        message.api_listener.api_listener.CopyFrom(m.pack(_manager(listener.route_configuration, listener.name)))
        return message
    message.address.socket_address.address = listener.address
    message.address.socket_address.port_value = listener.port
    if any(chain.tls is not None for chain in listener.filter_chains):
        inspector = message.listener_filters.add(name="envoy.filters.listener.tls_inspector")
        inspector.typed_config.CopyFrom(m.pack(m.TlsInspector()))
    for chain in listener.filter_chains:
        _add_chain(message, chain, listener.name)
    return message


def _add_chain(listener: Any, chain: FilterChain, name: str) -> None:
    message = listener.filter_chains.add(name=chain.route_configuration)
    if chain.server_names:
        message.filter_chain_match.server_names.extend(chain.server_names)
    manager = _manager(chain.route_configuration, name)
    # As at the edge: the client's address is the peer's, not what a header says.
    manager.use_remote_address.value = True
    manager.normalize_path.value = True
    manager.upgrade_configs.add(upgrade_type="websocket")
    message.filters.add(name=MANAGER_FILTER).typed_config.CopyFrom(m.pack(manager))
    if chain.tls is not None:
        message.transport_socket.name = TLS_SOCKET
        message.transport_socket.typed_config.CopyFrom(m.pack(_downstream_tls(chain.tls)))


def _manager(route_configuration: str, name: str) -> Any:
    manager = m.HttpConnectionManager(stat_prefix=name)
    manager.rds.route_config_name = route_configuration
    _ads(manager.rds.config_source)
    manager.http_filters.add(name=FAULT_FILTER).typed_config.CopyFrom(m.pack(m.HTTPFault()))
    manager.http_filters.add(name=ROUTER_FILTER).typed_config.CopyFrom(m.pack(m.Router()))
    return manager


def _downstream_tls(tls: ListenerTls) -> Any:
    message = m.DownstreamTlsContext()
    common = message.common_tls_context
    certificate = common.tls_certificates.add()
    certificate.certificate_chain.filename = tls.certificate_file
    certificate.private_key.filename = tls.private_key_file
    common.alpn_protocols.extend(tls.alpn)
    if tls.ca_file:
        common.validation_context.trusted_ca.filename = tls.ca_file
    message.require_client_certificate.value = tls.mutual
    return message


# Routes


def _route_configuration(configuration: RouteConfiguration) -> Any:
    message = m.RouteConfiguration(name=configuration.name)
    # A route may name a cluster that is not there yet, or never will be: calls on it get 503.
    message.validate_clusters.value = False
    for host in configuration.virtual_hosts:
        _add_virtual_host(message, host)
    return message


def _add_virtual_host(configuration: Any, host: VirtualHost) -> None:
    message = configuration.virtual_hosts.add(name=host.name, require_tls=2 if host.require_tls else 0)
    message.domains.extend(host.domains)
    for route in host.routes:
        _add_route(message, route)


def _add_route(host: Any, route: Route) -> None:
    message = host.routes.add(name=route.name)
    _set_match(message.match, route.match)
    action = route.action
    if isinstance(action, Forward):
        _set_forward(message.route, action)
    elif isinstance(action, Redirect):
        _set_redirect(message.redirect, action)
    else:
        _set_direct_response(message.direct_response, action)
    if route.fault is not None:
        message.typed_per_filter_config[FAULT_FILTER].CopyFrom(m.pack(_fault(route.fault)))
    _set_operations(message, route.request_headers, route.response_headers)
    notes: dict[str, Any] = {}
    if route.origin:
        notes["origin"] = route.origin
    if isinstance(action, Redirect) and action.port == -1:
        notes[DEFAULT_PORT] = True
    if notes:
        message.metadata.filter_metadata[OWN].update(notes)


def _set_match(message: Any, match: RouteMatch) -> None:
    path = match.path
    if path is None:
        message.prefix = "/"
    elif path.kind == "exact":
        message.path = path.value
    elif path.kind == "prefix":
        message.prefix = path.value
    elif path.kind == "path-prefix":
        stem = path.value.rstrip("/")  # "must not end in /" (route_components.proto)
        if stem:
            message.path_separated_prefix = stem
        else:
            message.prefix = "/"
    elif path.kind == "regex":
        message.safe_regex.regex = _regex(path)
    else:
        raise TypeError(f"a path can't be matched by {path.kind}")
    if path is not None and path.ignore_case and path.kind != "regex":
        message.case_sensitive.value = False
    for name, string in ((":method", match.method), (":scheme", match.scheme), (":authority", match.authority)):
        if string is not None:
            _add_header(message, HeaderMatch(name, string))
    for header in match.headers:
        _add_header(message, header)
    for query in match.query:
        added = message.query_parameters.add(name=query.name)
        if query.match.kind == "present":
            added.present_match = True
        else:
            _set_string(added.string_match, query.match)


def _add_header(message: Any, header: HeaderMatch) -> None:
    added = message.headers.add(name=header.name, invert_match=header.invert)
    if header.match.kind == "present":
        added.present_match = True
    else:
        _set_string(added.string_match, header.match)
        added.treat_missing_header_as_empty = header.invert


def _set_forward(message: Any, action: Forward) -> None:
    if len(action.clusters) == 1 and action.clusters[0] == WeightedCluster(action.clusters[0].cluster):
        message.cluster = action.clusters[0].cluster
    else:
        for cluster in action.clusters:
            added = message.weighted_clusters.clusters.add(name=cluster.cluster)
            added.weight.value = cluster.weight
            _set_operations(added, cluster.request_headers, cluster.response_headers)
            if cluster.authority is not None:
                added.host_rewrite_literal = cluster.authority
    _set_seconds(message.timeout, action.timeout or 0.0)
    if action.retry is not None:
        _set_retry(message.retry_policy, action.retry)
    if action.rewrite is not None:
        _set_rewrite(message, action.rewrite)
    for mirror in action.mirrors:
        policy = message.request_mirror_policies.add(
            cluster=mirror.cluster, disable_shadow_host_suffix_append=not mirror.add_shadow_suffix
        )
        _set_share(policy.runtime_fraction.default_value, mirror.per_million)


def _set_retry(message: Any, retry: RetryPolicy) -> None:
    message.retry_on = ",".join(sorted(retry.on))
    message.num_retries.value = retry.attempts
    message.retriable_status_codes.extend(sorted(retry.status_codes))
    if retry.per_try_timeout is not None:
        _set_seconds(message.per_try_timeout, retry.per_try_timeout)
    _set_seconds(message.retry_back_off.base_interval, retry.base_interval)
    _set_seconds(message.retry_back_off.max_interval, retry.max_interval)
    if retry.host_selection_attempts:
        predicate = message.retry_host_predicate.add(name="envoy.retry_host_predicates.previous_hosts")
        predicate.typed_config.CopyFrom(m.pack(m.PreviousHostsPredicate()))
        message.host_selection_retry_max_attempts = retry.host_selection_attempts
    if retry.retry_remote_localities:
        message.retry_priority.name = "envoy.retry_priorities.previous_priorities"
        message.retry_priority.typed_config.CopyFrom(m.pack(m.PreviousPrioritiesConfig(update_frequency=2)))


def _set_rewrite(message: Any, rewrite: Rewrite) -> None:
    if rewrite.authority is not None:
        message.host_rewrite_literal = rewrite.authority
    if rewrite.prefix is not None:
        message.prefix_rewrite = rewrite.prefix
    elif rewrite.path is not None:
        message.regex_rewrite.pattern.regex = WHOLE_PATH
        message.regex_rewrite.substitution = rewrite.path.replace("\\", "\\\\")
    elif rewrite.regex is not None:
        message.regex_rewrite.pattern.regex = rewrite.regex
        message.regex_rewrite.substitution = rewrite.substitution


def _set_redirect(message: Any, redirect: Redirect) -> None:
    message.response_code = REDIRECT_CODES[redirect.status]
    if redirect.scheme is not None:
        message.scheme_redirect = redirect.scheme
    if redirect.authority is not None:
        message.host_redirect = redirect.authority
    if redirect.port > 0:
        message.port_redirect = redirect.port
    elif redirect.port == -1 and redirect.scheme is not None:
        # Where the scheme stays, Envoy keeps the port: it has no field for "the default of either".
        message.port_redirect = 443 if redirect.scheme == "https" else 80
    if redirect.path is not None:
        message.path_redirect = redirect.path
    elif redirect.prefix is not None:
        message.prefix_rewrite = redirect.prefix


def _set_direct_response(message: Any, action: DirectResponse) -> None:
    message.status = action.status
    if action.body:
        message.body.inline_bytes = action.body


def _fault(fault: Fault) -> Any:
    message = m.HTTPFault()
    if fault.delay is not None:
        _set_seconds(message.delay.fixed_delay, fault.delay.seconds)
        _set_share(message.delay.percentage, fault.delay.per_million)
    if fault.abort is not None:
        if fault.abort.grpc_status is not None:
            message.abort.grpc_status = fault.abort.grpc_status
        else:
            message.abort.http_status = fault.abort.status
        _set_share(message.abort.percentage, fault.abort.per_million)
    return message


def _set_operations(message: Any, request: HeaderOperations, response: HeaderOperations) -> None:
    for added, removed, operations in (
        (message.request_headers_to_add, message.request_headers_to_remove, request),
        (message.response_headers_to_add, message.response_headers_to_remove, response),
    ):
        removed.extend(operations.remove)
        for pairs, action in ((operations.set, _OVERWRITE), (operations.add, _APPEND)):
            for name, value in pairs:
                option = added.add(append_action=action, keep_empty_value=True)
                # Envoy reads %NAME% as a command; here a value is what it says.
                option.header.key, option.header.value = name, value.replace("%", "%%")


# Clusters and endpoints


def _cluster(cluster: Cluster) -> Any:
    message = m.Cluster(name=cluster.name, type=_TYPES[cluster.type])
    original = cluster.type is ClusterType.ORIGINAL_DST
    message.lb_policy = _CLUSTER_PROVIDED if original else _LB[cluster.load_balancing]
    if cluster.load_balancing is LoadBalancing.LEAST_REQUEST and not original:
        _set_least_request(message.load_balancing_policy)
    _set_seconds(message.connect_timeout, cluster.connect_timeout)
    if cluster.type is ClusterType.EDS:
        _ads(message.eds_cluster_config.eds_config)
        message.eds_cluster_config.service_name = cluster.name
    elif not original:
        message.load_assignment.CopyFrom(_assignment(cluster.name, cluster.endpoints))
    _set_limits(message, cluster)
    if cluster.outlier_detection is not None:
        _set_outlier(message, cluster.outlier_detection)
    if cluster.tls is not None:
        message.transport_socket.name = TLS_SOCKET
        message.transport_socket.typed_config.CopyFrom(m.pack(_upstream_tls(cluster.tls)))
    options = _http_options(cluster)
    if options is not None:
        message.typed_extension_protocol_options[HTTP_OPTIONS].CopyFrom(m.pack(options))
    metadata: dict[str, Any] = {}
    if cluster.service is not None:
        service = cluster.service
        metadata["services"] = [{"host": service.host, "name": service.name, "namespace": service.namespace}]
    if cluster.subset:
        metadata["subset"] = cluster.subset
    if metadata:
        message.metadata.filter_metadata[ISTIO].update(metadata)
    return message


def _set_least_request(policy: Any) -> None:
    """Whoever reads this takes the first policy it knows: Envoy and we the first, gRPC the second (gRFC A52). In the
    older `lb_policy` it would find none, and C-core would refuse the cluster."""
    for name, config in (("envoy.load_balancing_policies.least_request", m.LeastRequest()), (_WRR, _wrr_locality())):
        extension = policy.policies.add().typed_extension_config
        extension.name = name
        extension.typed_config.CopyFrom(m.pack(config))


_WRR = "envoy.load_balancing_policies.wrr_locality"


def _wrr_locality() -> Any:
    message = m.WrrLocality()
    extension = message.endpoint_picking_policy.policies.add().typed_extension_config
    extension.name = "envoy.load_balancing_policies.round_robin"
    extension.typed_config.CopyFrom(m.pack(m.RoundRobin()))
    return message


def _set_limits(message: Any, cluster: Cluster) -> None:
    limits, budget = cluster.limits, cluster.retry_budget
    thresholds = message.circuit_breakers.thresholds.add()
    for name in ("max_connections", "max_pending_requests", "max_requests", "max_retries"):
        limit = getattr(limits, name)
        getattr(thresholds, name).value = UNLIMITED if limit is None else limit
    if isinstance(budget, RetryBudget):
        thresholds.retry_budget.budget_percent.value = budget.percent
        thresholds.retry_budget.min_retry_concurrency.value = budget.min_concurrency


def _http_options(cluster: Cluster) -> Any:
    """None where Envoy's defaults do."""
    limits = cluster.limits
    names_itself = cluster.tls is not None and not cluster.tls.sni
    if (
        not cluster.http2
        and not names_itself
        and limits.idle_timeout is None
        and limits.max_requests_per_connection == 0
    ):
        return None
    message = m.HttpProtocolOptions()
    if limits.idle_timeout is not None:
        _set_seconds(message.common_http_protocol_options.idle_timeout, limits.idle_timeout)
    if limits.max_requests_per_connection:
        message.common_http_protocol_options.max_requests_per_connection.value = limits.max_requests_per_connection
    if names_itself:
        message.upstream_http_protocol_options.auto_sni = True
        verifies = cluster.tls is not None and not cluster.tls.insecure_skip_verify
        message.upstream_http_protocol_options.auto_san_validation = verifies
    if cluster.http2:
        message.explicit_http_config.http2_protocol_options.SetInParent()
    else:
        message.explicit_http_config.http_protocol_options.SetInParent()
    return message


def _set_outlier(message: Any, rules: OutlierDetection) -> None:
    outlier = message.outlier_detection
    # Istio leaves success rates off: with Envoy's default of 100 they would eject without being asked to.
    outlier.enforcing_success_rate.value = 0
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
    _set_seconds(outlier.interval, rules.interval)
    _set_seconds(outlier.base_ejection_time, rules.base_ejection_time)
    outlier.max_ejection_percent.value = rules.max_ejection_percent
    outlier.split_external_local_origin_errors = rules.split_external_local_origin_errors
    message.common_lb_config.healthy_panic_threshold.value = rules.min_health_percent


def _upstream_tls(tls: UpstreamTls) -> Any:
    message = m.UpstreamTlsContext(sni=tls.sni)
    common = message.common_tls_context
    if tls.certificate_file:
        certificate = common.tls_certificates.add()
        certificate.certificate_chain.filename = tls.certificate_file
        certificate.private_key.filename = tls.private_key_file
    if not tls.insecure_skip_verify:
        validation = common.validation_context
        if tls.ca_file:
            validation.trusted_ca.filename = tls.ca_file
        else:
            validation.trusted_ca.filename = SYSTEM_ROOTS
            validation.system_root_certs.SetInParent()
        names = tls.subject_alt_names or ((tls.sni,) if tls.sni else ())
        for name in names:
            kind = 3 if "://" in name else 2
            validation.match_typed_subject_alt_names.add(san_type=kind).matcher.exact = name
    return message


def _assignment(name: str, endpoints: Iterable[Endpoint], assignment: LoadAssignment | None = None) -> Any:
    message = m.ClusterLoadAssignment(cluster_name=name)
    weights = {
        (each.priority, each.locality): each.weight for each in (assignment.locality_weights if assignment else ())
    }
    ordered = sorted(endpoints, key=lambda each: (each.priority, each.locality, each))
    for (priority, locality), members in groupby(ordered, key=lambda each: (each.priority, each.locality)):
        group = message.endpoints.add(priority=priority)
        _set_locality(group.locality, locality)
        total = 0
        for endpoint in members:
            total += endpoint.weight
            _add_endpoint(group, endpoint)
        # Without a weight a locality gets no load, and that is what 0 means; Envoy wants at least 1 (gRFC A27).
        weight = weights.get((priority, locality), total)
        if weight:
            group.load_balancing_weight.value = weight
    return message


def _add_endpoint(group: Any, endpoint: Endpoint) -> None:
    added = group.lb_endpoints.add(health_status=_HEALTH[endpoint.health])
    added.endpoint.address.socket_address.address = endpoint.address
    added.endpoint.address.socket_address.port_value = endpoint.port
    added.load_balancing_weight.value = endpoint.weight
    if endpoint.workload:
        added.metadata.filter_metadata[ISTIO].update({"workload": endpoint.workload})
