"""What a DestinationRule and MeshConfig ask for, as the data plane gets it: one claim for each field."""

from __future__ import annotations

import pytest
from views import destination_rule, service, view, virtual_service

from meshlib.istio.translate import MeshSettings
from meshlib.model import (
    Cluster,
    ConnectionLimits,
    Forward,
    HashPolicy,
    HashTable,
    LoadBalancing,
    OutlierDetection,
    RetryBudget,
    RetryPolicy,
    SlowStart,
    Snapshot,
    TcpKeepalive,
    UpstreamTls,
)

A = "outbound|80||a.default.svc.cluster.local"


def cluster(snapshot: Snapshot, name: str = A) -> Cluster:
    return next(each for each in snapshot.clusters if each.name == name)


def made(policy: str, *more: str) -> Cluster:
    """The cluster of service `a` under one trafficPolicy."""
    return cluster(view(service(), destination_rule(f"{{host: a, trafficPolicy: {policy}}}"), *more).snapshot)


def forward(snapshot: Snapshot, port: int = 80) -> Forward:
    name = f"outbound|{port}||a.default.svc.cluster.local"
    configuration = next(each for each in snapshot.route_configurations if each.name == name)
    action = configuration.virtual_hosts[0].routes[0].action
    assert isinstance(action, Forward)
    return action


def mesh_config(text: str) -> str:
    return (
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\n"
        f"data:\n  mesh: |\n    {text}\n"
    )


# Load balancing


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ("httpHeaderName: X-User", HashPolicy("header", "x-user")),
        ("httpQueryParameterName: user", HashPolicy("query", "user")),
        ("useSourceIp: true", HashPolicy("source")),
        ("httpCookie: {name: user}", HashPolicy("cookie", "user")),
        ("httpCookie: {name: user, ttl: 0s}", HashPolicy("cookie", "user", 0.0)),
        ("httpCookie: {name: user, path: /p, ttl: 1h}", HashPolicy("cookie", "user", 3600.0, "/p")),
    ],
)
def test_the_key_of_a_hash_is_the_routes(given: str, policy: HashPolicy) -> None:
    """The cluster says how to look up, the route with what; a retry may go where the first try went."""
    snapshot = view(
        service(), destination_rule(f"{{host: a, trafficPolicy: {{loadBalancer: {{consistentHash: {{{given}}}}}}}}}")
    ).snapshot
    assert cluster(snapshot).load_balancing is LoadBalancing.RING_HASH
    action = forward(snapshot)
    assert action.hash_policies == (policy,)
    assert action.retry is not None
    assert action.retry.host_selection_attempts == 0


@pytest.mark.parametrize(
    ("given", "balancing", "table"),
    [
        ("", LoadBalancing.RING_HASH, HashTable(1024)),
        ("ringHash: {}", LoadBalancing.RING_HASH, HashTable(1024)),
        ("ringHash: {minimumRingSize: 4096}", LoadBalancing.RING_HASH, HashTable(4096)),
        ("minimumRingSize: 2048", LoadBalancing.RING_HASH, HashTable(2048)),
        ("maglev: {}", LoadBalancing.MAGLEV, HashTable(maglev_size=65537)),
        ("maglev: {tableSize: 1021}", LoadBalancing.MAGLEV, HashTable(maglev_size=1021)),
    ],
)
def test_rings_and_tables_have_the_size_that_is_asked_for(
    given: str, balancing: LoadBalancing, table: HashTable
) -> None:
    """Istio's defaults where none is."""
    found = made(f"{{loadBalancer: {{consistentHash: {{useSourceIp: true, {given}}}}}}}")
    assert (found.load_balancing, found.hash_table) == (balancing, table)


def test_a_route_hashes_as_its_destination_does() -> None:
    """A subset's own policy, not the host's; of several destinations, each once; of none that does not hash."""
    rule = destination_rule(
        "{host: a, subsets: [{name: v1, labels: {v: '1'}, trafficPolicy: {loadBalancer: {consistentHash:"
        " {httpHeaderName: user}}}}, {name: v2, labels: {v: '2'}}]}"
    )

    def hashed(*subsets: str) -> tuple[HashPolicy, ...]:
        routes = ", ".join(f"{{destination: {{host: a, subset: {each}}}, weight: 1}}" for each in subsets)
        return forward(view(service(), rule, virtual_service(f"[{{route: [{routes}]}}]")).snapshot).hash_policies

    assert hashed("v1") == (HashPolicy("header", "user"),)
    assert hashed("v2") == ()
    assert hashed("v1", "v2") == (HashPolicy("header", "user"),)


def test_a_retry_that_is_told_to_moves_on_even_with_a_hash() -> None:
    """retryIgnorePreviousHosts is heeded where it is given; left out, hashing switches it off."""
    rule = destination_rule("{host: a, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true}}}}")

    def attempts(more: str) -> int:
        retries = f"{{attempts: 1{more}}}"
        made = view(
            service(), rule, virtual_service(f"[{{route: [{{destination: {{host: a}}}}], retries: {retries}}}]")
        )
        retry = forward(made.snapshot).retry
        assert retry is not None
        return retry.host_selection_attempts

    assert attempts("") == 0
    assert attempts(", retryIgnorePreviousHosts: true") == 5
    assert attempts(", retryIgnorePreviousHosts: false") == 0


@pytest.mark.parametrize(
    ("given", "slow"),
    [
        ("warmupDurationSecs: 30s", SlowStart(30.0)),
        ("warmup: {duration: 1m}", SlowStart(60.0, 1.0, 10.0)),
        ("warmup: {duration: 1m, minimumPercent: 25, aggression: 2}", SlowStart(60.0, 2.0, 25.0)),
        ("warmup: {duration: 1m, minimumPercent: 0}", SlowStart(60.0, 1.0, 0.0)),
        ("simple: ROUND_ROBIN, warmup: {duration: 1m}, warmupDurationSecs: 5s", SlowStart(60.0)),
    ],
)
def test_warm_up_is_slow_start(given: str, slow: SlowStart) -> None:
    """The newer form goes before the older."""
    assert made(f"{{loadBalancer: {{{given}}}}}").slow_start == slow


# Connections


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ("tcp: {maxConnections: 7}", ConnectionLimits(max_connections=7)),
        ("tcp: {maxConnections: 0}", ConnectionLimits()),
        ("http: {http1MaxPendingRequests: 3, http2MaxRequests: 4}", ConnectionLimits(None, 3, 4)),
        ("http: {http1MaxPendingRequests: 0, http2MaxRequests: 0, maxRetries: 0}", ConnectionLimits()),
        ("http: {maxRetries: 2}", ConnectionLimits(max_retries=2)),
        ("http: {maxRequestsPerConnection: 1}", ConnectionLimits(max_requests_per_connection=1)),
        ("http: {maxConcurrentStreams: 10}", ConnectionLimits(max_concurrent_streams=10)),
        ("http: {idleTimeout: 30s}, tcp: {idleTimeout: 1m}", ConnectionLimits(idle_timeout=30.0)),
        ("tcp: {idleTimeout: 1m}", ConnectionLimits(idle_timeout=60.0)),
        ("http: {idleTimeout: 0s}", ConnectionLimits()),
        ("tcp: {maxConnectionDuration: 5m}", ConnectionLimits(max_connection_duration=300.0)),
        ("tcp: {tcpKeepalive: {}}", ConnectionLimits(tcp_keepalive=TcpKeepalive())),
        (
            "tcp: {tcpKeepalive: {probes: 9, time: 2h, interval: 75s}}",
            ConnectionLimits(tcp_keepalive=TcpKeepalive(9, 7200, 75)),
        ),
    ],
)
def test_the_connection_pool_is_limits(given: str, limits: ConnectionLimits) -> None:
    """0 is no limit, as Istio takes it; tcp.idleTimeout counts where HTTP's is not given."""
    assert made(f"{{connectionPool: {{{given}}}}}").limits == limits


def test_an_upgrade_is_http2_whatever_the_port_is_called() -> None:
    """The rule's word for any port; the mesh's for ports that say HTTP; the rule's again over the mesh's."""
    assert made("{connectionPool: {http: {h2UpgradePolicy: UPGRADE}}}").http2
    assert not made("{connectionPool: {http: {h2UpgradePolicy: DEFAULT}}}").http2
    mesh = mesh_config("h2UpgradePolicy: UPGRADE")
    assert cluster(view(service(), mesh).snapshot).http2
    assert not cluster(view(service(ports="[{name: x, port: 80}]"), mesh).snapshot).http2
    assert not made("{connectionPool: {http: {h2UpgradePolicy: DO_NOT_UPGRADE}}}", mesh).http2


# Outlier detection, budget, TLS


@pytest.mark.parametrize(
    ("given", "outlier"),
    [
        ("", OutlierDetection()),
        ("outlierDetectionHttpErrorCodes: [429, 404]", OutlierDetection(error_codes=frozenset({404, 429}))),
        ("maxEjectionPercent: 0", OutlierDetection(max_ejection_percent=10)),
        ("consecutive5xxErrors: 0", OutlierDetection(consecutive_5xx=0)),
        ("consecutiveErrors: 3", OutlierDetection(consecutive_5xx=3)),
        (
            "splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 2",
            OutlierDetection(consecutive_local_origin_failures=2, split_external_local_origin_errors=True),
        ),
    ],
)
def test_outlier_detection_has_istios_defaults(given: str, outlier: OutlierDetection) -> None:
    """The block alone switches it on."""
    assert made(f"{{outlierDetection: {{{given}}}}}").outlier_detection == outlier


def test_a_retry_budget_is_the_clusters() -> None:
    """Only where it is given."""
    assert made("{retryBudget: {percent: 30, minRetryConcurrency: 5}}").retry_budget == RetryBudget(30.0, 5)
    assert made("{loadBalancer: {}}").retry_budget is None


@pytest.mark.parametrize(
    ("given", "tls"),
    [
        ("mode: SIMPLE", UpstreamTls("SIMPLE")),
        ("mode: DISABLE", None),
        (
            "mode: SIMPLE, sni: x.e.com, caCertificates: /ca, subjectAltNames: [y.e.com, 'spiffe://z']",
            UpstreamTls("SIMPLE", "x.e.com", ("y.e.com", "spiffe://z"), "/ca"),
        ),
        (
            "mode: MUTUAL, clientCertificate: /c, privateKey: /k",
            UpstreamTls("MUTUAL", certificate_file="/c", private_key_file="/k"),
        ),
        ("mode: SIMPLE, insecureSkipVerify: true", UpstreamTls("SIMPLE", insecure_skip_verify=True)),
    ],
)
def test_tls_is_originated_by_files(given: str, tls: UpstreamTls | None) -> None:
    """The names to check go with it."""
    assert made(f"{{tls: {{{given}}}}}").tls == tls


# The whole mesh


def test_the_meshs_policy_fills_what_a_rule_leaves_out() -> None:
    """Field by field in the two blocks that it may hold, for every service."""
    mesh = mesh_config(
        "{defaultTrafficPolicy: {connectionPool: {tcp: {maxConnections: 9, connectTimeout: 2s}},"
        " outlierDetection: {consecutive5xxErrors: 3, interval: 1s}}}"
    )
    bare = cluster(view(service(), mesh).snapshot)
    assert (bare.limits.max_connections, bare.connect_timeout) == (9, 2.0)
    assert bare.outlier_detection == OutlierDetection(consecutive_5xx=3, interval=1.0)
    assert bare.origin == "ConfigMap istio-system/istio (test.yaml)"
    own = made("{connectionPool: {tcp: {maxConnections: 1}}, outlierDetection: {consecutive5xxErrors: 7}}", mesh)
    assert (own.limits.max_connections, own.connect_timeout) == (1, 2.0)
    assert own.outlier_detection == OutlierDetection(consecutive_5xx=7, interval=1.0)
    assert own.origin == "DestinationRule default/dr (test.yaml), ConfigMap istio-system/istio (test.yaml)"


def test_the_meshs_retries_hold_where_a_rule_says_nothing() -> None:
    """The rule's own, then the mesh's, then Istio's; 0 attempts are none."""
    mesh = mesh_config("{defaultHttpRetryPolicy: {attempts: 1, retryOn: 'connect-failure,503', backoff: 1s}}")
    expected = RetryPolicy(
        1,
        frozenset({"connect-failure", "retriable-status-codes"}),
        frozenset({503}),
        base_interval=1.0,
        max_interval=10.0,
    )
    to_a = "route: [{destination: {host: a}}]"
    assert forward(view(service(), mesh).snapshot).retry == expected
    assert forward(view(service(), mesh, virtual_service(f"[{{{to_a}}}]")).snapshot).retry == expected
    none = virtual_service(f"[{{{to_a}, retries: {{attempts: 0}}}}]")
    assert forward(view(service(), mesh, none).snapshot).retry is None
    assert forward(view(service()).snapshot).retry == RetryPolicy()
    off = mesh_config("{defaultHttpRetryPolicy: {attempts: 0}}")
    assert forward(view(service(), off).snapshot).retry is None


@pytest.mark.parametrize(
    ("given", "refuses"),
    [
        ("{}", False),
        ("outboundTrafficPolicy: {mode: ALLOW_ANY}", False),
        ("outboundTrafficPolicy: {mode: 1}", False),
        ("outboundTrafficPolicy:", False),
        ("outboundTrafficPolicy: {mode: REGISTRY_ONLY}", True),
        ("outboundTrafficPolicy: {mode: 0}", True),
        ("outboundTrafficPolicy: {}", True),
    ],
)
def test_an_outbound_policy_without_a_mode_refuses(given: str, refuses: bool) -> None:
    """The enum's zero is REGISTRY_ONLY; only a policy that is not there at all is ALLOW_ANY."""
    names = {each.name for each in view(mesh_config(given), workloads=()).snapshot.route_configurations}
    assert names == ({"block_all"} if refuses else {"allow_any"})


def test_the_meshs_other_defaults_reach_every_cluster() -> None:
    """connectTimeout, tcpKeepalive, and whose namespace may see what does not say it."""
    found = cluster(view(service(), mesh_config("{connectTimeout: 3s, tcpKeepalive: {time: 60s}}")).snapshot)
    assert (found.connect_timeout, found.limits.tcp_keepalive) == (3.0, TcpKeepalive(0, 60, 0))
    hidden = mesh_config("{defaultServiceExportTo: ['.']}")
    assert view(service(namespace="other"), hidden, workloads=()).snapshot.assignments == ()
    to_a = "[{route: [{destination: {host: a.default.svc.cluster.local}}], timeout: 1s}]"
    foreign = virtual_service(to_a, namespace="other", hosts="[a.default.svc.cluster.local]")
    assert forward(view(service(), foreign).snapshot).timeout == 1.0
    private = mesh_config("{defaultVirtualServiceExportTo: ['.'], defaultDestinationRuleExportTo: ['.']}")
    assert forward(view(service(), foreign, private).snapshot).timeout is None


def test_settings_that_are_handed_in_go_before_the_objects() -> None:
    """For callers that know better than the YAML."""
    made = view(mesh_config("outboundTrafficPolicy: {mode: REGISTRY_ONLY}"), workloads=(), settings=MeshSettings())
    assert {each.name for each in made.snapshot.route_configurations} == {"allow_any"}


# Where it came from


def test_a_cluster_says_which_objects_and_files_made_it() -> None:
    """Each once; a rule that says nothing about this cluster is not named; lines are left out, or an edit above would
    be a change."""
    rule = destination_rule(
        "{host: a, trafficPolicy: {loadBalancer: {simple: RANDOM}}, subsets: [{name: v1, labels: {v: '1'}}]}"
    )
    only_subset = destination_rule("{host: b, subsets: [{name: v1, labels: {v: '1'}}]}", name="b")
    snapshot = view(service(), service("b"), rule, only_subset).snapshot
    said = {each.name: each.origin for each in snapshot.clusters}
    assert said[A] == said["outbound|80|v1|a.default.svc.cluster.local"] == "DestinationRule default/dr (test.yaml)"
    assert said["outbound|80||b.default.svc.cluster.local"] == ""
    assert said["outbound|80|v1|b.default.svc.cluster.local"] == "DestinationRule default/b (test.yaml)"


def test_a_route_says_which_object_and_file_it_came_from() -> None:
    """And a route that no rule made says nothing."""
    snapshot = view(service(), service("b"), virtual_service("[{route: [{destination: {host: a}}]}]")).snapshot
    origins = {
        each.name.rpartition("|")[2].partition(".")[0]: each.virtual_hosts[0].routes[0].origin
        for each in snapshot.route_configurations
        if "|" in each.name and each.name.startswith("outbound|80|")
    }
    assert (origins["a"], origins["b"]) == ("VirtualService default/vs (test.yaml)", "")
