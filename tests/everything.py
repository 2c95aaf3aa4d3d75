"""One snapshot that says everything there is to say of clusters, endpoints and calls, for judges that are not ours."""

from __future__ import annotations

from meshlib import model as md

LIMITS = md.ConnectionLimits(100, 50, 200, 5, 1000, 250, 60.0, 600.0, md.TcpKeepalive(3, 300, 30))
OUTLIERS = md.OutlierDetection(
    consecutive_5xx=7,
    consecutive_gateway_errors=3,
    consecutive_local_origin_failures=4,
    split_external_local_origin_errors=True,
    interval=5.0,
    base_ejection_time=10.0,
    max_ejection_percent=50,
    min_health_percent=20,
    max_ejection_time=100.0,
    max_ejection_jitter=2.0,
    always_eject_one=True,
    success_rate_enforcing=100,
    success_rate_minimum_hosts=3,
    success_rate_request_volume=10,
    success_rate_stdev_factor=2.5,
    failure_percentage_enforcing=100,
    failure_percentage_threshold=60,
    failure_percentage_minimum_hosts=3,
    failure_percentage_request_volume=10,
    error_codes=frozenset({429}),
)
BREAKER = md.BreakerRules(consecutive_failures=5, failure_rate=50.0, slow_call_rate=80.0, slow_call=2.0)
RETRY = md.RetryPolicy(
    3,
    frozenset({"5xx", "retriable-headers", "retriable-status-codes", "unavailable"}),
    frozenset({429}),
    0.5,
    0.05,
    1.0,
    retry_remote_localities=True,
    retriable_headers=(
        md.HeaderMatch("x-again", md.StringMatch("present")),
        md.HeaderMatch("x-fine", md.StringMatch("exact", "yes"), invert=True),
    ),
    max_reset=60.0,
    resend_unsafe=True,
)
HASHES = (
    md.HashPolicy("header", "x-user", terminal=True),
    md.HashPolicy("query", "user"),
    md.HashPolicy("cookie", "session", 0.0, "/"),
    md.HashPolicy("cookie", "long", 3600.0),
    md.HashPolicy("cookie", "theirs"),
    md.HashPolicy("source"),
)
HERE, THERE = md.Locality("eu", "a"), md.Locality("eu", "b")
CHECKED = {
    "http": md.HealthCheck(path="/health", expected_statuses=((200, 204), (401, 401)), interval=1.0),
    "grpc": md.HealthCheck("grpc", service="reviews", interval=1.0),
    "tcp": md.HealthCheck("tcp", interval=1.0),
}
SHADOW = {"shadow": md.SHADOWABLE}


def everything(port: int, endpoint_port: int) -> md.Snapshot:
    """A gateway on `port` that leads `/<cluster>` to each cluster; all of them are served by `endpoint_port`."""
    clusters = tuple(sorted(_clusters(), key=lambda each: each.name))
    endpoints = (
        md.Endpoint("127.0.0.1", endpoint_port, 3, HERE, workload="here-v1", hash_key="one"),
        md.Endpoint("127.0.0.2", endpoint_port, 1, THERE, hash_key="two"),
        md.Endpoint("127.0.0.3", endpoint_port, 1, THERE, priority=1, health=md.Health.UNHEALTHY),
    )
    weights = (md.LocalityWeight(HERE, 0, 70), md.LocalityWeight(THERE, 0, 30), md.LocalityWeight(THERE, 1, 1))
    routes = tuple(
        md.Route(
            md.RouteMatch(md.StringMatch("path-prefix", f"/{each.name}")),
            md.Forward(
                (md.WeightedCluster(each.name),),
                timeout=10.0,
                retry=RETRY,
                idle_timeout=30.0,
                hedge=md.HedgePolicy(0.1, 3),
                hash_policies=HASHES,
            ),
            name=each.name,
            origin="VirtualService default/all (all.yaml)",
        )
        for each in clusters
    )
    table = md.RouteConfiguration("all", (md.VirtualHost("all", ("*",), routes),))
    return md.Snapshot(
        "1",
        (md.Listener("gateway", "", "127.0.0.1", port, (md.FilterChain("all"),)), md.Listener("web:80", "all")),
        (table,),
        clusters,
        tuple(md.LoadAssignment(each.name, endpoints, weights) for each in clusters if each.type is md.ClusterType.EDS),
        complete=True,
    )


def _clusters() -> list[md.Cluster]:
    service = md.ServiceName("all.default.svc.cluster.local", "all", "default")
    found = []
    for policy in md.LoadBalancing:
        for form, fields in {
            "plain": {},
            "slow": {"slow_start": md.SlowStart(30.0, 2.0, 5.0)},
            "weighted": {"locality_weighted": True, "slow_start": md.SlowStart(30.0)},
            "zones": {"zone_aware": md.ZoneAware(80.0, 3)},
            "sized": {"hash_table": md.HashTable(64, 4096, 251)},
        }.items():
            found.append(md.Cluster(f"{policy}-{form}".lower(), load_balancing=policy, service=service, **fields))
    for kind, check in CHECKED.items():
        for http2 in (False, True):
            name = f"checked-{kind}-{'http2' if http2 else 'http1'}"
            found.append(md.Cluster(name, health_checks=(check,), http2=http2, service=service))
    found.append(md.Cluster("checked-twice", health_checks=(CHECKED["http"], CHECKED["tcp"])))
    for name, budget in {"percent": md.RetryBudget(30.0, 5), "rate": md.RateBudget(0.5, 20.0, 5.0)}.items():
        for form, fields in {"real": {}, "shadow": SHADOW}.items():
            found.append(
                md.Cluster(
                    f"limited-{name}-{form}",
                    limits=LIMITS,
                    retry_budget=budget,
                    outlier_detection=OUTLIERS,
                    breaker=BREAKER,
                    service=service,
                    origin="DestinationRule default/all (all.yaml)",
                    **fields,
                )
            )
    found.append(md.Cluster("limited-http2", limits=LIMITS, http2=True, outlier_detection=md.OutlierDetection()))
    shared = md.Quota(
        "shared", md.QuotaService("envoy", "ratelimit:8081", "shop"), ((md.LimitKey("path", entry="p"),),)
    )
    found.append(md.Cluster("limited-rate", rate_limits=(md.RateLimit("one", 5, 1, 0.5),), quotas=(shared,)))
    found.append(md.Cluster("original", md.ClusterType.ORIGINAL_DST, breaker=BREAKER))
    return found
