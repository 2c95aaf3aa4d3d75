"""How is each service treated? DestinationRule, BackendTrafficPolicy and MeshConfig -> one policy for each cluster.

Source of the rules: istio/istio pilot/pkg/model/push_context.go (destinationRule), destination_rule.go (merge),
pilot/pkg/networking/core/cluster_traffic_policy.go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from meshlib.errors import ConfigurationError
from meshlib.istio import resources as r
from meshlib.istio.by_label import Labels
from meshlib.istio.checks.destinations import statuses
from meshlib.istio.instances import Instance, Port
from meshlib.istio.limits import limits_of, quotas_of
from meshlib.istio.localities import Nearness, nearness, seen_from
from meshlib.istio.mesh_settings import MeshSettings
from meshlib.istio.services import Directory, Service, cluster_name, fqdn, is_exported
from meshlib.model import (
    BreakerRules,
    Cluster,
    ClusterType,
    ConnectionLimits,
    HashPolicy,
    HashTable,
    HealthCheck,
    HedgePolicy,
    LoadAssignment,
    LoadBalancing,
    Locality,
    OutlierDetection,
    RateBudget,
    RetryBudget,
    ServiceName,
    SlowStart,
    TcpKeepalive,
    UpstreamTls,
    ZoneAware,
)
from meshlib.model.values import dataclass

_LOAD_BALANCING = {
    "ROUND_ROBIN": LoadBalancing.ROUND_ROBIN,
    "RANDOM": LoadBalancing.RANDOM,
    "LEAST_CONN": LoadBalancing.LEAST_REQUEST,
    "LEAST_REQUEST": LoadBalancing.LEAST_REQUEST,
}
_ENVOYS_OWN_ZONE_MINIMUM = 6

Report = Callable[[ConfigurationError], None]
S = TypeVar("S", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as far as rules can tell one from another."""

    namespace: str
    labels: Labels
    locality: Locality = Locality()


class _Rule(NamedTuple):
    """names: of the host, as it stands and in full."""

    object: r.Object
    names: tuple[str, ...]
    export_to: tuple[str, ...]
    selector: Labels | None


class HostRules:
    """The rules of one kind, found by the host that they are for: exact names before wildcards."""

    def __init__(self, rules: Iterable[_Rule]) -> None:
        self._exact: dict[tuple[str, str], list[_Rule]] = {}
        self._wild: dict[str, list[_Rule]] = {}
        self.asks_who_calls = False
        """Whether some rule is for callers with certain labels only."""
        for rule in rules:
            self.asks_who_calls = self.asks_who_calls or rule.selector is not None
            namespace = rule.object.namespace
            for name in dict.fromkeys(rule.names):
                if name.startswith("*"):
                    self._wild.setdefault(namespace, []).append(rule)
                else:
                    self._exact.setdefault((namespace, name), []).append(rule)

    @classmethod
    def of_destinations(cls, objects: Iterable[r.Object], export_to: tuple[str, ...]) -> HostRules:
        rules = []
        for each in objects:
            if isinstance(each.spec, r.DestinationRule):
                spec = each.spec
                selector = spec.workload_selector
                wanted = None if selector is None else selector.match_labels or selector.labels
                rules.append(_Rule(each, _names(spec.host, each.namespace), tuple(spec.export_to) or export_to, wanted))
        return cls(rules)

    @classmethod
    def of_backends(cls, objects: Iterable[r.Object], report: Report) -> HostRules:
        rules = []
        first: dict[tuple[str, str, str], r.Object] = {}
        for each in objects:
            if isinstance(each.spec, r.BackendTrafficPolicy):
                place = (each.namespace, fqdn(each.spec.host, each.namespace), each.spec.subset)
                known = first.setdefault(place, each)
                if known is each:
                    rules.append(_Rule(each, _names(each.spec.host, each.namespace), (), None))
                else:
                    reason = f"{place[1]} has {known.title} already"
                    report(ConfigurationError(each.source, each.title, "spec.host", reason))
        return cls(rules)

    def find(self, service: Service, caller: Caller, root: str, known: Directory) -> tuple[r.Object, ...]:
        """The caller's namespace, the service's, the root's: the first that has any rule for the host is it. For a
        caller in the root namespace, where gateways are at home, the service's comes first all the same."""
        own = () if caller.namespace == root else (caller.namespace,)
        for namespace in dict.fromkeys((*own, service.namespace, root)):
            fitting = [
                rule
                for rule in self._exact.get((namespace, service.host), ())
                # A short name that is a service of the rule's own namespace is not a host of the same bare name.
                if (rule.names[0] == service.host or rule.names[0] not in known.services) and _holds_for(rule, caller)
            ]
            if not fitting and namespace in self._wild:
                wild = [
                    rule
                    for rule in self._wild[namespace]
                    if (rule.names[0] == "*" or service.host.endswith(rule.names[0][1:])) and _holds_for(rule, caller)
                ]
                longest = max((len(rule.names[0]) for rule in wild), default=0)
                fitting = [rule for rule in wild if len(rule.names[0]) == longest]
            if fitting:
                # A rule for this very workload stands alone; it is not merged with those for all.
                chosen = [rule for rule in fitting if rule.selector is not None] or fitting
                return tuple(rule.object for rule in chosen)
        return ()

    def forcing(self, service: Service, found: tuple[r.Object, ...]) -> tuple[r.Object, ...]:
        """Policies of the service's own namespace by which an operator holds its circuit: they are for every caller,
        even one whose namespace has rules of its own (`found`) for the rest."""
        rules = self._exact.get((service.namespace, service.host), ())
        return tuple(each.object for each in rules if each.object not in found and _forced(each.object))


def _forced(given: r.Object) -> Literal["OPEN", "CLOSED"] | None:
    spec = given.spec
    return spec.breaker.forced if isinstance(spec, r.BackendTrafficPolicy) and spec.breaker is not None else None


def _names(host: str, namespace: str) -> tuple[str, ...]:
    return (fqdn(host, namespace), host.lower().rstrip("."))


def _holds_for(rule: _Rule, caller: Caller) -> bool:
    if rule.selector is not None:
        if rule.object.namespace != caller.namespace:
            return False
        if any(caller.labels.get(key) != value for key, value in rule.selector.items()):
            return False
    return is_exported(rule.export_to, rule.object.namespace, caller.namespace)


@dataclass(frozen=True, slots=True)
class Policy:
    """All that is said of the calls to one port of a service, or to one of its subsets. origin: by which objects."""

    traffic: r.TrafficPolicy
    backend: r.BackendTrafficPolicy
    origin: str

    @property
    def hash_policies(self) -> tuple[HashPolicy, ...]:
        """Where the key for ring hash and maglev comes from; () for every other way to balance."""
        balancer = self.traffic.load_balancer
        given = balancer.consistent_hash if balancer is not None and self.backend.load_balancer is None else None
        if given is None:
            return ()
        if given.http_cookie is not None:
            cookie = given.http_cookie
            return (HashPolicy("cookie", cookie.name, None if cookie.ttl is None else cookie.ttl.seconds, cookie.path),)
        if given.http_header_name:
            return (HashPolicy("header", given.http_header_name.lower()),)
        if given.http_query_parameter_name:
            return (HashPolicy("query", given.http_query_parameter_name),)
        return (HashPolicy("source"),)

    @property
    def hedge(self) -> HedgePolicy | None:
        given = self.backend.hedge
        return None if given is None else HedgePolicy(given.delay.seconds, given.max_attempts)

    @property
    def resend_unsafe(self) -> bool:
        return bool(self.backend.resend_unsafe)


@dataclass(frozen=True)
class Rules:
    """All objects that hold for one service: DestinationRules, whose subsets count together and of whose policies the
    first, and BackendTrafficPolicies. forcing: those that count for what they say about a held circuit, and no more."""

    destinations: tuple[r.Object, ...]
    backends: tuple[r.Object, ...]
    settings: MeshSettings
    forcing: tuple[r.Object, ...] = ()

    @cached_property
    def subsets(self) -> Mapping[str, tuple[r.Object, r.Subset]]:
        found: dict[str, tuple[r.Object, r.Subset]] = {}
        for each in self.destinations:
            assert isinstance(each.spec, r.DestinationRule)
            for subset in each.spec.subsets:
                found.setdefault(subset.name, (each, subset))
        return found

    def policy(self, port: Port, subset: str = "") -> Policy:
        known = self._policies.get((port, subset))
        if known is None:
            known = self._policies[port, subset] = self._policy(port, subset)
        return known

    @cached_property
    def _policies(self) -> dict[tuple[Port, str], Policy]:
        return {}

    def _policy(self, port: Port, subset: str) -> Policy:
        origins: dict[str, None] = {}
        traffic = r.TrafficPolicy()
        for each in self.destinations:
            assert isinstance(each.spec, r.DestinationRule)
            if each.spec.traffic_policy is not None:
                traffic = _for_port(each.spec.traffic_policy, port)
                origins[each.origin] = None
                break
        if subset and subset in self.subsets:
            owner, found = self.subsets[subset]
            traffic = _merged(traffic, found.traffic_policy, port)
            origins[owner.origin] = None
        settings = self.settings
        if settings.connection_pool is not None or settings.outlier_detection is not None:
            traffic = msgspec.structs.replace(
                traffic,
                connection_pool=_inherited(traffic.connection_pool, settings.connection_pool),
                outlier_detection=_inherited(traffic.outlier_detection, settings.outlier_detection),
            )
            origins[settings.origin] = None
        backend = r.BackendTrafficPolicy("")
        for wanted in dict.fromkeys((subset, "")):
            for each in self.backends:
                assert isinstance(each.spec, r.BackendTrafficPolicy)
                if each.spec.subset == wanted:
                    backend = _filled(backend, each.spec)
                    origins[each.origin] = None
        for each in self.forcing:
            breaker = backend.breaker or r.Breaker()
            assert isinstance(each.spec, r.BackendTrafficPolicy)
            if each.spec.subset in (subset, "") and breaker.forced is None:
                backend = msgspec.structs.replace(
                    backend, breaker=msgspec.structs.replace(breaker, forced=_forced(each))
                )
                origins[each.origin] = None
        return Policy(traffic, backend, ", ".join(origin for origin in origins if origin))


@dataclass(frozen=True, slots=True)
class Made:
    """A cluster, and what makes its endpoints different for each caller, if anything does."""

    cluster: Cluster
    assignment: LoadAssignment | None
    near: Nearness | None
    instances: tuple[Instance, ...]

    def seen_by(self, caller: Caller) -> tuple[Cluster, LoadAssignment | None]:
        if self.near is None:
            return self.cluster, self.assignment
        endpoints, weights = seen_from(self.near, self.instances, caller.locality, caller.labels)
        endpoints = tuple(sorted(endpoints))
        if self.assignment is not None:
            return self.cluster, LoadAssignment(self.cluster.name, endpoints, weights)
        return replace(self.cluster, endpoints=endpoints), None


def clusters_of(service: Service, rules: Rules) -> Iterator[Made]:
    """The cluster of each port, and of each subset of it."""
    subsets = {name: subset.labels for name, (_, subset) in rules.subsets.items()}
    for port in service.ports:
        everyone = service.instances.get(port.number, ())
        yield _made(service, port, "", rules, everyone)
        for name, labels in subsets.items():
            members = tuple(
                each for each in everyone if all(each.labels.get(key) == value for key, value in labels.items())
            )
            yield _made(service, port, name, rules, members)


def _made(service: Service, port: Port, subset: str, rules: Rules, members: tuple[Instance, ...]) -> Made:
    policy, settings = rules.policy(port, subset), rules.settings
    traffic, backend = policy.traffic, policy.backend
    name = cluster_name(service.host, port.number, subset)
    endpoints = tuple(sorted(instance.endpoint for instance in members))
    balancer = traffic.load_balancer
    kind = service.type
    if balancer is not None and balancer.simple == "PASSTHROUGH":
        kind = ClusterType.ORIGINAL_DST
    in_cluster = kind in (ClusterType.STRICT_DNS, ClusterType.LOGICAL_DNS)
    pool = traffic.connection_pool or r.ConnectionPool()
    connect = pool.tcp.connect_timeout
    outlier = _outlier(traffic.outlier_detection, backend.outlier_detection)
    near, zones = None, None
    if kind is not ClusterType.ORIGINAL_DST:
        near, zones = nearness(
            balancer, service, settings.locality, settings.zone_aware, has_outlier_detection=outlier is not None
        )
    if near is not None and in_cluster and near.distribute:
        near = None  # the endpoints of a DNS cluster stand in it, where there is no place for localities' weights
    cluster = Cluster(
        name,
        kind,
        _load_balancing(balancer, backend),
        connect.seconds if connect is not None else settings.connect_timeout,
        _limits(pool, settings),
        _retry_budget(traffic.retry_budget, backend.retry_budget),
        outlier,
        _tls(traffic.tls, service, port, subset, members, settings),
        port.is_http2 or _is_upgraded(pool.http.h2_upgrade_policy, port, settings),
        endpoints if in_cluster else (),
        ServiceName(service.host, service.short or service.host, service.namespace),
        subset,
        _hash_table(None if balancer is None else balancer.consistent_hash),
        _slow_start(balancer),
        near is not None and near.is_weighted,
        None if zones is None else ZoneAware(min_cluster_size=_or(zones.min_cluster_size, _ENVOYS_OWN_ZONE_MINIMUM)),
        tuple(_health_check(each) for each in backend.health_checks),
        _breaker(backend.breaker),
        frozenset(backend.shadow),
        policy.origin,
        limits_of(backend.rate_limits, f"{name} limit", policy.origin, shadow="rate-limit" in backend.shadow),
        quotas_of(backend.quotas, f"{name} quota", policy.origin, shadow="rate-limit" in backend.shadow),
    )
    assignment = LoadAssignment(name, endpoints) if kind is ClusterType.EDS else None
    return Made(cluster, assignment, near, members)


# Several objects, one policy


def _for_port(policy: r.TrafficPolicy, port: Port) -> r.TrafficPolicy:
    """A port's own settings replace the policy whole: a block left out has its default, not the policy's."""
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


def _inherited(own: S | None, outer: S | None) -> S | None:
    """`own`, and of `outer` what it leaves unset."""
    if own is None or outer is None:
        return outer if own is None else own
    return _filled(own, outer)


def _filled(own: S, outer: S) -> S:
    changes: dict[str, Any] = {}
    for field in msgspec.structs.fields(own):
        mine, theirs = getattr(own, field.name), getattr(outer, field.name)
        unset = field.default_factory() if callable(field.default_factory) else field.default
        if isinstance(mine, (r.TCPSettings, r.HTTPSettings)):
            changes[field.name] = _filled(mine, theirs)
        elif mine == unset:
            changes[field.name] = theirs
    return msgspec.structs.replace(own, **changes)


# One block, one value


def _load_balancing(given: r.LoadBalancer | None, backend: r.BackendTrafficPolicy) -> LoadBalancing:
    if backend.load_balancer is not None:
        return LoadBalancing(backend.load_balancer)
    if given is not None and given.consistent_hash is not None:
        return LoadBalancing.MAGLEV if given.consistent_hash.maglev is not None else LoadBalancing.RING_HASH
    return _LOAD_BALANCING.get((given and given.simple) or "", LoadBalancing.LEAST_REQUEST)


def _hash_table(given: r.ConsistentHash | None) -> HashTable:
    default = HashTable()
    if given is None:
        return default
    ring = given.ring_hash.minimum_ring_size if given.ring_hash is not None else given.minimum_ring_size
    table = given.maglev.table_size if given.maglev is not None else 0
    return HashTable(ring or default.minimum_ring_size, maglev_size=table or default.maglev_size)


def _slow_start(given: r.LoadBalancer | None) -> SlowStart | None:
    if given is None:
        return None
    if given.warmup is not None:
        warmup = given.warmup
        return SlowStart(warmup.duration.seconds, _or(warmup.aggression, 1.0), _or(warmup.minimum_percent, 10.0))
    return None if given.warmup_duration_secs is None else SlowStart(given.warmup_duration_secs.seconds)


def _limits(pool: r.ConnectionPool, settings: MeshSettings) -> ConnectionLimits:
    """A limit of 0 is none given (cluster_traffic_policy.go, applyConnectionPool)."""
    idle = pool.http.idle_timeout or pool.tcp.idle_timeout
    duration = pool.tcp.max_connection_duration
    keepalive = pool.tcp.tcp_keepalive or settings.tcp_keepalive
    return ConnectionLimits(
        pool.tcp.max_connections or None,
        pool.http.http1_max_pending_requests or None,
        pool.http.http2_max_requests or None,
        pool.http.max_retries or None,
        pool.http.max_requests_per_connection,
        pool.http.max_concurrent_streams or None,
        (idle.seconds or None) if idle is not None else None,
        None if duration is None else duration.seconds,
        None if keepalive is None else _keepalive(keepalive),
    )


def _keepalive(given: r.TCPKeepalive) -> TcpKeepalive:
    return TcpKeepalive(
        given.probes,
        round(given.time.seconds) if given.time else 0,
        round(given.interval.seconds) if given.interval else 0,
    )


def _is_upgraded(policy: str | None, port: Port, settings: MeshSettings) -> bool:
    """A rule's word counts for every port, the mesh's for those that say HTTP (shouldH2Upgrade)."""
    if policy in ("UPGRADE", "DO_NOT_UPGRADE"):
        return policy == "UPGRADE"
    return settings.h2_upgrade and port.protocol == "HTTP"


def _retry_budget(given: r.RetryBudget | None, own: r.RateBudget | None) -> RetryBudget | RateBudget | None:
    if own is not None:
        default = RateBudget()
        return RateBudget(
            _or(own.ratio, default.ratio),
            _or(own.min_per_second, default.min_per_second),
            _seconds(own.ttl, default.ttl),
        )
    return None if given is None else RetryBudget(given.percent, given.min_retry_concurrency)


def _outlier(given: r.OutlierDetection | None, own: r.StatisticalDetection | None) -> OutlierDetection | None:
    if given is None and own is None:
        return None
    default = OutlierDetection()
    found = default
    if given is not None:
        errors = given.consecutive5xx_errors if given.consecutive5xx_errors is not None else given.consecutive_errors
        found = OutlierDetection(
            _or(errors, default.consecutive_5xx),
            _or(given.consecutive_gateway_errors, default.consecutive_gateway_errors),
            _or(given.consecutive_local_origin_failures, default.consecutive_local_origin_failures),
            given.split_external_local_origin_errors,
            _seconds(given.interval, default.interval),
            _seconds(given.base_ejection_time, default.base_ejection_time),
            given.max_ejection_percent or default.max_ejection_percent,  # Istio takes 0 for unset
            given.min_health_percent,
            error_codes=frozenset(given.outlier_detection_http_error_codes),
        )
    if own is not None:
        said = {name: getattr(own, name) for name in own.__struct_fields__ if getattr(own, name) is not None}
        plain: dict[str, Any] = {
            name: value.seconds if isinstance(value, r.Duration) else value for name, value in said.items()
        }
        found = replace(found, **plain)
    return found


def _tls(
    given: r.ClientTLSSettings | None,
    service: Service,
    port: Port,
    subset: str,
    members: tuple[Instance, ...],
    settings: MeshSettings,
) -> UpstreamTls | None:
    if given is None:  # Istio's enableAutoMtls, for endpoints that serve it
        if not settings.auto_mtls or not any(member.endpoint.is_meshed for member in members):
            return None
        given, is_auto = r.ClientTLSSettings(mode="ISTIO_MUTUAL"), True
    else:
        is_auto = False
    if given.mode == "DISABLE":
        return None
    if given.mode == "ISTIO_MUTUAL":
        sni = given.sni or f"outbound_.{port.number}_.{subset}_.{service.host}"
        domains = (settings.trust_domain, *settings.trust_domain_aliases)
        accounts = sorted({name for member in members for name in member.identities(domains)})
        names = tuple(given.subject_alt_names) or (*service.subject_alt_names, *accounts)
        return UpstreamTls("ISTIO_MUTUAL", sni, names, auto=is_auto)
    shows = given.mode == "MUTUAL"
    return UpstreamTls(
        given.mode,
        given.sni,
        () if given.insecure_skip_verify else tuple(given.subject_alt_names or service.subject_alt_names),
        given.ca_certificates,
        given.client_certificate if shows else "",
        given.private_key if shows else "",
        given.insecure_skip_verify,
    )


def _breaker(given: r.Breaker | None) -> BreakerRules | None:
    if given is None:
        return None
    default = BreakerRules()
    return BreakerRules(
        given.consecutive_failures,
        given.failure_rate,
        given.slow_call_rate,
        _seconds(given.slow_call, default.slow_call),
        _seconds(given.window, default.window),
        _or(given.minimum_calls, default.minimum_calls),
        _seconds(given.open_for, default.open_for),
        _or(given.probes, default.probes),
        (given.forced or "").lower(),
    )


def _health_check(given: r.HealthCheck) -> HealthCheck:
    default = HealthCheck()
    http, grpc = given.http or r.HTTPHealthCheck(), given.grpc or r.GRPCHealthCheck()
    expected = tuple(found for each in http.expected_statuses if (found := statuses(each)) is not None)
    return HealthCheck(
        "http" if given.http is not None else "grpc" if given.grpc is not None else "tcp",
        http.path,
        http.host,
        grpc.service,
        given.port or 0,
        expected or default.expected_statuses,
        _seconds(given.interval, default.interval),
        _seconds(given.timeout, default.timeout),
        _or(given.healthy_threshold, default.healthy_threshold),
        _or(given.unhealthy_threshold, default.unhealthy_threshold),
    )


T = TypeVar("T", int, float)


def _or(given: T | None, otherwise: T) -> T:
    return otherwise if given is None else given


def _seconds(given: r.Duration | None, otherwise: float) -> float:
    return otherwise if given is None else given.seconds
