"""What do DestinationRules say about a service? Subsets, and one policy for each cluster.

Source of the rules: istio/istio pilot/pkg/model/push_context.go (destinationRule), destination_rule.go (merge).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from meshlib.istio import resources as r
from meshlib.istio.routes import cluster_name
from meshlib.istio.services import Directory, Instance, Port, Service, fqdn, is_exported
from meshlib.model import (
    Cluster,
    ClusterType,
    ConnectionLimits,
    LoadAssignment,
    LoadBalancing,
    OutlierDetection,
    RetryBudget,
    ServiceName,
    UpstreamTls,
)

_CONNECT_TIMEOUT = 10.0
_LOAD_BALANCING = {
    "ROUND_ROBIN": LoadBalancing.ROUND_ROBIN,
    "RANDOM": LoadBalancing.RANDOM,
    "LEAST_CONN": LoadBalancing.LEAST_REQUEST,
    "LEAST_REQUEST": LoadBalancing.LEAST_REQUEST,
}


@dataclass(frozen=True, slots=True)
class Rules:
    """All DestinationRules that hold for one service: their subsets together, the first policy of them."""

    policy: r.TrafficPolicy | None = None
    subsets: tuple[r.Subset, ...] = ()


NO_RULES = Rules()


class DestinationRules:
    """Looks up the rules for a service as seen by one client."""

    def __init__(
        self, objects: Iterable[r.Object], directory: Directory, namespace: str, labels: Mapping[str, str], root: str
    ) -> None:
        self._namespace, self._root = namespace, root
        self._by_namespace: dict[str, list[tuple[str, r.DestinationRule, bool]]] = {}
        for each in objects:
            spec = each.spec
            if not isinstance(spec, r.DestinationRule):
                continue
            selects = spec.workload_selector is not None
            if spec.workload_selector is not None:
                wanted = spec.workload_selector.match_labels or spec.workload_selector.labels
                if each.namespace != namespace or any(labels.get(key) != value for key, value in wanted.items()):
                    continue
            if not is_exported(spec.export_to, each.namespace, namespace):
                continue
            service = directory.find(spec.host, each.namespace)
            host = service.host if service is not None else fqdn(spec.host, each.namespace)
            self._by_namespace.setdefault(each.namespace, []).append((host, spec, selects))

    def find(self, service: Service) -> Rules:
        """The client's namespace, the service's, the root's: the first that has any rule for the host is it. For a
        client in the root namespace, where gateways are at home, the service's comes first all the same."""
        own = () if self._namespace == self._root else (self._namespace,)
        for namespace in dict.fromkeys((*own, service.namespace, self._root)):
            found = self._matching(namespace, service.host)
            if found:
                policy = next((rule.traffic_policy for rule in found if rule.traffic_policy is not None), None)
                subsets: dict[str, r.Subset] = {}
                for rule in found:
                    for subset in rule.subsets:
                        subsets.setdefault(subset.name, subset)
                return Rules(policy, tuple(subsets.values()))
        return NO_RULES

    def _matching(self, namespace: str, host: str) -> list[r.DestinationRule]:
        rules = self._by_namespace.get(namespace, ())
        fitting = [(spec, selects) for name, spec, selects in rules if name == host]
        if not fitting:
            wild = [
                each for each in rules if each[0] == "*" or (each[0].startswith("*.") and host.endswith(each[0][1:]))
            ]
            longest = max((len(name) for name, _, _ in wild), default=0)
            fitting = [(spec, selects) for name, spec, selects in wild if len(name) == longest]
        # A rule for this very workload stands alone; it is not merged with those for all.
        return [spec for spec, selects in fitting if selects] or [spec for spec, _ in fitting]


def clusters_of(service: Service, port: Port, rules: Rules) -> Iterator[tuple[Cluster, LoadAssignment | None]]:
    """The cluster of a port, and of each subset; with its endpoints where they come apart from it."""
    everyone = service.instances.get(port.number, ())
    yield _made(service, port, "", _for_port(rules.policy, port), everyone)
    for subset in rules.subsets:
        policy = _merged(_for_port(rules.policy, port), subset.traffic_policy, port)
        members = tuple(
            instance
            for instance in everyone
            if all(instance.labels.get(key) == value for key, value in subset.labels.items())
        )
        yield _made(service, port, subset.name, policy, members)


def _made(
    service: Service, port: Port, subset: str, policy: r.TrafficPolicy, members: Iterable[Instance]
) -> tuple[Cluster, LoadAssignment | None]:
    name = cluster_name(service.host, port.number, subset)
    endpoints = tuple(sorted(instance.endpoint for instance in members))
    kind = service.type
    if policy.load_balancer is not None and policy.load_balancer.simple == "PASSTHROUGH":
        kind = ClusterType.ORIGINAL_DST
    in_cluster = kind in (ClusterType.STRICT_DNS, ClusterType.LOGICAL_DNS)
    pool = policy.connection_pool or r.ConnectionPool()
    connect = pool.tcp.connect_timeout
    cluster = Cluster(
        name,
        kind,
        _load_balancing(policy.load_balancer),
        connect.seconds if connect is not None else _CONNECT_TIMEOUT,
        _limits(pool),
        _retry_budget(policy.retry_budget),
        _outlier(policy.outlier_detection),
        _tls(policy.tls, service),
        port.is_http2,
        endpoints if in_cluster else (),
        ServiceName(service.host, service.short or service.host, service.namespace),
        subset,
    )
    return cluster, LoadAssignment(name, endpoints) if kind is ClusterType.EDS else None


def _for_port(policy: r.TrafficPolicy | None, port: Port) -> r.TrafficPolicy:
    """A port's own settings replace the policy whole: a block left out has its default, not the policy's."""
    if policy is None:
        return r.TrafficPolicy()
    level = next((each for each in policy.port_level_settings if each.port.number == port.number), None)
    if level is None:
        return policy
    return r.TrafficPolicy(
        level.load_balancer, level.connection_pool, level.outlier_detection, level.tls, policy.retry_budget
    )


def _merged(policy: r.TrafficPolicy, subset: r.TrafficPolicy | None, port: Port) -> r.TrafficPolicy:
    """A subset overrides block by block; its own settings for the port replace all four."""
    if subset is None:
        return policy
    if any(each.port.number == port.number for each in subset.port_level_settings):
        level = _for_port(subset, port)
        budget = level.retry_budget or policy.retry_budget  # it has no form for one port
        return r.TrafficPolicy(level.load_balancer, level.connection_pool, level.outlier_detection, level.tls, budget)
    return r.TrafficPolicy(
        subset.load_balancer or policy.load_balancer,
        subset.connection_pool or policy.connection_pool,
        subset.outlier_detection or policy.outlier_detection,
        subset.tls or policy.tls,
        subset.retry_budget or policy.retry_budget,
    )


def _load_balancing(given: r.LoadBalancer | None) -> LoadBalancing:
    return _LOAD_BALANCING.get((given and given.simple) or "", LoadBalancing.LEAST_REQUEST)


def _limits(pool: r.ConnectionPool) -> ConnectionLimits:
    idle = pool.http.idle_timeout
    return ConnectionLimits(
        pool.tcp.max_connections,
        pool.http.http1_max_pending_requests,
        pool.http.http2_max_requests,
        pool.http.max_retries,
        pool.http.max_requests_per_connection,
        idle_timeout=None if idle is None else idle.seconds,
    )


def _retry_budget(given: r.RetryBudget | None) -> RetryBudget | None:
    return None if given is None else RetryBudget(given.percent, given.min_retry_concurrency)


def _outlier(given: r.OutlierDetection | None) -> OutlierDetection | None:
    if given is None:
        return None
    default = OutlierDetection()

    def seconds(duration: r.Duration | None, otherwise: float) -> float:
        return otherwise if duration is None else duration.seconds

    def count(number: int | None, otherwise: int) -> int:
        return otherwise if number is None else number

    errors = given.consecutive5xx_errors if given.consecutive5xx_errors is not None else given.consecutive_errors
    return OutlierDetection(
        count(errors, default.consecutive_5xx),
        count(given.consecutive_gateway_errors, default.consecutive_gateway_errors),
        count(given.consecutive_local_origin_failures, default.consecutive_local_origin_failures),
        given.split_external_local_origin_errors,
        seconds(given.interval, default.interval),
        seconds(given.base_ejection_time, default.base_ejection_time),
        count(given.max_ejection_percent, default.max_ejection_percent),
        given.min_health_percent,
    )


def _tls(given: r.ClientTLSSettings | None, service: Service) -> UpstreamTls | None:
    if given is None or given.mode == "DISABLE":
        return None
    return UpstreamTls(
        given.mode,
        given.sni,
        tuple(given.subject_alt_names or service.subject_alt_names),
        given.ca_certificates,
        given.client_certificate,
        given.private_key,
        given.insecure_skip_verify,
    )
