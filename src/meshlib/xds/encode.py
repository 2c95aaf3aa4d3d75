"""How does the model look on the wire? Model values -> xDS v3 resources, in the forms that Envoy, gRPC and our own
decode.py read alike. Equal values give equal bytes, so a version can be a hash of them.

What Envoy refuses although it means something (a prefix that is empty, `/foo/` as a segment prefix) is written in
another form of the same meaning, and comes back in that form. Everything else comes back as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from meshlib.model import (
    NO_ACCESS_RULES,
    ClaimMatch,
    Cluster,
    DirectResponse,
    Fault,
    FilterChain,
    Forward,
    HashPolicy,
    HeaderMatch,
    HeaderOperations,
    Inbound,
    Listener,
    LoadAssignment,
    Node,
    Redirect,
    Reporting,
    RetryPolicy,
    Rewrite,
    Route,
    RouteConfiguration,
    RouteMatch,
    VirtualHost,
    WeightedCluster,
)
from meshlib.xds import access, notes
from meshlib.xds import messages as m
from meshlib.xds.cors import CORS_FILTER, encode_cors
from meshlib.xds.encode_clusters import encode_assignment, encode_cluster
from meshlib.xds.encode_inbound import MANAGER_FILTER, ROUTER_FILTER, set_normalization
from meshlib.xds.encode_matches import regex_of, set_header, set_string
from meshlib.xds.encode_tls import set_files_server
from meshlib.xds.http_filters import Upstreams, http_filters
from meshlib.xds.notes import OWN
from meshlib.xds.pieces import refer, set_locality, set_seconds, set_share
from meshlib.xds.rbac import JWT_FILTER, PAYLOAD
from meshlib.xds.reader import OURSELVES, Dialect, Reader
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE

FAULT_FILTER = "envoy.filters.http.fault"
WHOLE_PATH = "^/.*$"
"""The regular expression that stands for Rewrite.path, for which Envoy has no field."""
DEFAULT_PORT = "default_port"
"""In a redirect's metadata: port_redirect stands for the scheme's default."""
NO_RESET_HEADERS = "no_reset_headers"
"""In a route's metadata: its retries heed none. Where nothing is said, those that everybody sends are heeded."""
REDIRECT_CODES = {301: 0, 302: 1, 303: 2, 307: 3, 308: 4}
MISSING_STATUSES = {503: 0, 404: 1, 500: 2}
"""Envoy's ClusterNotFoundResponseCode."""
ACCESS, INBOUND, REPORTING = "access", "inbound", "reporting"
"""In a listener's metadata: who may come in at a gateway's; everything of the one that a server asks for, but what is
told of its calls, which stands beside it: a reader that does not know that goes on."""
_OVERWRITE, _APPEND = 2, 0


def encode_resource(
    type_url: str,
    value: Listener | Inbound | RouteConfiguration | Cluster | LoadAssignment,
    reader: Reader = OURSELVES,
    upstreams: Upstreams | None = None,
) -> bytes:
    """A resource's bytes, not wrapped in an Any. Raises TypeError where type and value do not go together.

    upstreams: for an Envoy's listeners, the clusters that their filters call.
    """
    if type_url == LISTENER and isinstance(value, Listener):
        return m.serialize(_listener(value, reader, upstreams))
    if type_url == LISTENER and isinstance(value, Inbound):
        return m.serialize(_inbound(value))
    if type_url == ROUTE and isinstance(value, RouteConfiguration):
        return m.serialize(_route_configuration(value, reader))
    if type_url == CLUSTER and isinstance(value, Cluster):
        return m.serialize(encode_cluster(value, reader))
    if type_url == ENDPOINT and isinstance(value, LoadAssignment):
        return m.serialize(encode_assignment(value.cluster, value.endpoints, value))
    raise TypeError(f"{type(value).__name__} is not a {type_url}")


def encode_node(node: Node) -> Any:
    """The node as Istio writes it, with what meshlib adds under its own names."""
    workload = node.workload
    name, _, version = node.user_agent.partition("/")
    message = m.Node(id=node.id, user_agent_name=name, cluster=node_cluster(node))
    if version:
        message.user_agent_version = version
    set_locality(message.locality, workload.locality)
    if node.takes_ttl:
        message.client_features.append(m.TTL_FEATURE)
    message.metadata.update(node_metadata(node))
    return message


def node_cluster(node: Node) -> str:
    return f"{node.workload.service or node.workload.name}.{node.workload.namespace}"


def node_metadata(node: Node) -> dict[str, Any]:
    workload = node.workload
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
    if node.discovery_cluster:
        metadata["MESHLIB_DISCOVERY_CLUSTER"] = node.discovery_cluster
    if node.certificates:
        metadata["MESHLIB_CERTIFICATES"] = node.certificates
    if node.inbound:
        metadata["MESHLIB_INBOUND"] = {str(port): address for port, address in node.inbound}
    if node.outbound:
        metadata["MESHLIB_OUTBOUND"] = node.outbound
    if workload.address:
        metadata["INSTANCE_IPS"] = workload.address
    if node.metrics_port:
        metadata["MESHLIB_METRICS_PORT"] = node.metrics_port
    return metadata


# Listeners


def _listener(listener: Listener, reader: Reader, upstreams: Upstreams | None) -> Any:
    message = m.Listener(name=listener.name)
    if not listener.is_bound:
        message.api_listener.api_listener.CopyFrom(
            m.pack(outbound_manager(listener.route_configuration, listener.name))
        )
        _note_reporting(message, listener.reporting)
        return message
    message.address.socket_address.address = listener.address
    message.address.socket_address.port_value = listener.port
    if any(chain.tls is not None for chain in listener.filter_chains):
        inspector = message.listener_filters.add(name="envoy.filters.listener.tls_inspector")
        inspector.typed_config.CopyFrom(m.pack(m.TlsInspector()))
    for chain in listener.filter_chains:
        _add_chain(message, chain, listener, reader, upstreams)
    if listener.access is not None:
        message.metadata.filter_metadata[OWN].update({ACCESS: access.write(listener.access)})
    _note_reporting(message, listener.reporting)
    return message


def _inbound(inbound: Inbound) -> Any:
    """For our own clients only (for others, encode_inbound.py): without a filter chain, no other server can take it for
    one that lets everybody in."""
    message = m.Listener(name=inbound.name)
    message.metadata.filter_metadata[OWN].update({INBOUND: access.write(replace(inbound, reporting=None))})
    _note_reporting(message, inbound.reporting)
    return message


def _note_reporting(message: Any, reporting: Reporting | None) -> None:
    if reporting is not None:
        message.metadata.filter_metadata[OWN].update({REPORTING: access.write(reporting)})


def _add_chain(
    message: Any, chain: FilterChain, listener: Listener, reader: Reader, upstreams: Upstreams | None
) -> None:
    added = message.filter_chains.add(name=chain.route_configuration)
    if chain.server_names:
        added.filter_chain_match.server_names.extend(chain.server_names)
    filters: list[tuple[str, Any]] = []
    access = listener.access or NO_ACCESS_RULES
    if reader.dialect is Dialect.ENVOY and upstreams is not None:
        filters = http_filters(access, reader, upstreams, listener.port)
    if reader.dialect is Dialect.ENVOY:
        filters.append((CORS_FILTER, m.CorsFilter()))
    manager = outbound_manager(chain.route_configuration, listener.name, filters, reader)
    # As at the edge: the client's address is the peer's, not what a header says.
    manager.use_remote_address.value = True
    set_normalization(manager, access)
    manager.upgrade_configs.add(upgrade_type="websocket")
    added.filters.add(name=MANAGER_FILTER).typed_config.CopyFrom(m.pack(manager))
    if chain.tls is not None:
        set_files_server(added.transport_socket, chain.tls)


def outbound_manager(
    route_configuration: str, name: str, filters: Iterable[tuple[str, Any]] = (), reader: Reader = OURSELVES
) -> Any:
    manager = m.HttpConnectionManager(stat_prefix=name)
    manager.rds.route_config_name = route_configuration
    refer(manager.rds.config_source, reader)
    for filter_name, config in filters:
        manager.http_filters.add(name=filter_name).typed_config.CopyFrom(m.pack(config))
    manager.http_filters.add(name=FAULT_FILTER).typed_config.CopyFrom(m.pack(m.HTTPFault()))
    manager.http_filters.add(name=ROUTER_FILTER).typed_config.CopyFrom(m.pack(m.Router()))
    return manager


# Routes


def _route_configuration(configuration: RouteConfiguration, reader: Reader) -> Any:
    message = m.RouteConfiguration(name=configuration.name)
    # A route may name a cluster that is not there yet, or never will be: calls on it get 503.
    message.validate_clusters.value = False
    for host in configuration.virtual_hosts:
        _add_virtual_host(message, host, reader)
    return message


def _add_virtual_host(configuration: Any, host: VirtualHost, reader: Reader) -> None:
    message = configuration.virtual_hosts.add(name=host.name, require_tls=2 if host.require_tls else 0)
    message.domains.extend(host.domains)
    for route in host.routes:
        _add_route(message, route, reader)


def _add_route(host: Any, route: Route, reader: Reader) -> None:
    message = host.routes.add(name=route.name)
    _set_match(message.match, route.match)
    action = route.action
    noted: dict[str, Any] = {}
    if isinstance(action, Forward) and not action.clusters:
        message.non_forwarding_action.SetInParent()  # to the application itself, as gRPC's servers have it
    elif isinstance(action, Forward):
        noted |= _set_forward(message.route, action)
        if reader.keeps_time and action.timeout is not None:  # gRFC A31; Envoy's own field gRPC passes over
            set_seconds(message.route.max_stream_duration.max_stream_duration, action.timeout)
    elif isinstance(action, Redirect):
        _set_redirect(message.redirect, action)
    else:
        _set_direct_response(message.direct_response, action)
    if route.fault is not None:
        message.typed_per_filter_config[FAULT_FILTER].CopyFrom(m.pack(_fault(route.fault)))
    _set_operations(message, route.request_headers, route.response_headers)
    if route.origin:
        noted["origin"] = route.origin
    if route.limited_by:
        noted["limited_by"] = route.limited_by
    if route.cors is not None and reader.dialect is Dialect.ENVOY:
        message.typed_per_filter_config[CORS_FILTER].CopyFrom(m.pack(encode_cors(route.cors)))
    elif route.cors is not None:
        noted["cors"] = notes.write(route.cors)
    if isinstance(action, Redirect) and action.port == -1:
        noted[DEFAULT_PORT] = True
    if noted:
        message.metadata.filter_metadata[OWN].update(noted)


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
        message.safe_regex.regex = regex_of(path)
    else:
        raise TypeError(f"a path can't be matched by {path.kind}")
    if path is not None and path.ignore_case and path.kind != "regex":
        message.case_sensitive.value = False
    for name, string in ((":method", match.method), (":scheme", match.scheme), (":authority", match.authority)):
        if string is not None:
            set_header(message.headers.add(), HeaderMatch(name, string))
    for header in match.headers:
        set_header(message.headers.add(), header)
    for query in match.query:
        added = message.query_parameters.add(name=query.name)
        if query.match.kind == "present":
            added.present_match = True
        else:
            set_string(added.string_match, query.match)
    for claim in match.claims:
        _set_claim(message.dynamic_metadata.add(filter=JWT_FILTER, invert=claim.invert), claim)


def _set_claim(added: Any, claim: ClaimMatch) -> None:
    """What Envoy's jwt_authn filter leaves of a token: the text itself, or a list that holds it."""
    for key in (PAYLOAD, *claim.path):
        added.path.add(key=key)
    if claim.match.kind == "present":
        added.value.present_match = True
        return
    either = added.value.or_match.value_matchers
    set_string(either.add().string_match, claim.match)
    set_string(either.add().list_match.one_of.string_match, claim.match)


def _set_forward(message: Any, action: Forward) -> dict[str, Any]:
    """Returns what Envoy has no field for."""
    noted: dict[str, Any] = {}
    if len(action.clusters) == 1 and action.clusters[0] == WeightedCluster(action.clusters[0].cluster):
        message.cluster = action.clusters[0].cluster
    else:
        for cluster in action.clusters:
            added = message.weighted_clusters.clusters.add(name=cluster.cluster)
            added.weight.value = cluster.weight
            _set_operations(added, cluster.request_headers, cluster.response_headers)
            if cluster.authority is not None:
                added.host_rewrite_literal = cluster.authority
    message.cluster_not_found_response_code = MISSING_STATUSES.get(action.missing_status, 0)
    set_seconds(message.timeout, action.timeout or 0.0)
    if action.idle_timeout is not None:
        set_seconds(message.idle_timeout, action.idle_timeout)
    if action.retry is not None:
        noted |= _set_retry(message.retry_policy, action.retry)
    if action.hedge is not None:
        # Envoy's hedge_policy would send what is not idempotent twice as well.
        noted["hedge"] = notes.write(action.hedge)
    for policy in action.hash_policies:
        _set_hash_policy(message.hash_policy.add(terminal=policy.terminal), policy)
    if action.rewrite is not None:
        _set_rewrite(message, action.rewrite)
    for mirror in action.mirrors:
        shadow = message.request_mirror_policies.add(
            cluster=mirror.cluster, disable_shadow_host_suffix_append=not mirror.add_shadow_suffix
        )
        set_share(shadow.runtime_fraction.default_value, mirror.per_million)
    return noted


def _set_hash_policy(message: Any, policy: HashPolicy) -> None:
    if policy.kind == "header":
        message.header.header_name = policy.name
    elif policy.kind == "query":
        message.query_parameter.name = policy.name
    elif policy.kind == "source":
        message.connection_properties.source_ip = True
    else:
        message.cookie.name, message.cookie.path = policy.name, policy.path
        if policy.ttl is not None:
            set_seconds(message.cookie.ttl, policy.ttl)


def _set_retry(message: Any, retry: RetryPolicy) -> dict[str, Any]:
    """Returns what Envoy has no field for."""
    noted: dict[str, Any] = {}
    message.retry_on = ",".join(sorted(retry.on))
    message.num_retries.value = retry.attempts
    message.retriable_status_codes.extend(sorted(retry.status_codes))
    if retry.per_try_timeout is not None:
        set_seconds(message.per_try_timeout, retry.per_try_timeout)
    set_seconds(message.retry_back_off.base_interval, retry.base_interval)
    set_seconds(message.retry_back_off.max_interval, retry.max_interval)
    if retry.host_selection_attempts:
        predicate = message.retry_host_predicate.add(name="envoy.retry_host_predicates.previous_hosts")
        predicate.typed_config.CopyFrom(m.pack(m.PreviousHostsPredicate()))
        message.host_selection_retry_max_attempts = retry.host_selection_attempts
    if retry.retry_remote_localities:
        message.retry_priority.name = "envoy.retry_priorities.previous_priorities"
        message.retry_priority.typed_config.CopyFrom(m.pack(m.PreviousPrioritiesConfig(update_frequency=2)))
    for header in retry.retriable_headers:
        set_header(message.retriable_headers.add(), header)
    if retry.reset_headers:
        reset = message.rate_limited_retry_back_off
        for each in retry.reset_headers:
            reset.reset_headers.add(name=each.name, format=1 if each.form == "unix-timestamp" else 0)
        set_seconds(reset.max_interval, retry.max_reset)
    else:
        noted[NO_RESET_HEADERS] = True
    if retry.resend_unsafe:
        noted["resend_unsafe"] = True
    return noted


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
    elif redirect.regex is not None:
        message.regex_rewrite.pattern.regex = redirect.regex
        message.regex_rewrite.substitution = redirect.substitution


def _set_direct_response(message: Any, action: DirectResponse) -> None:
    message.status = action.status
    if action.body:
        message.body.inline_bytes = action.body


def _fault(fault: Fault) -> Any:
    message = m.HTTPFault()
    if fault.delay is not None:
        set_seconds(message.delay.fixed_delay, fault.delay.seconds)
        set_share(message.delay.percentage, fault.delay.per_million)
    if fault.abort is not None:
        if fault.abort.grpc_status is not None:
            message.abort.grpc_status = fault.abort.grpc_status
        else:
            message.abort.http_status = fault.abort.status
        set_share(message.abort.percentage, fault.abort.per_million)
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
