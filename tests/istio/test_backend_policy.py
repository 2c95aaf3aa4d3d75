"""What a BackendTrafficPolicy asks for, as the data plane gets it: one claim for each field, and where it holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from views import destination_rule, node, service, view, virtual_service

from meshlib.istio.translate import Translation
from meshlib.model import (
    BreakerRules,
    Cluster,
    Forward,
    HealthCheck,
    HedgePolicy,
    LoadBalancing,
    OutlierDetection,
    RateBudget,
    RetryBudget,
)

A = "outbound|80||a.default.svc.cluster.local"
V1 = "outbound|80|v1|a.default.svc.cluster.local"
SUBSETS = destination_rule("{host: a, subsets: [{name: v1, labels: {v: '1'}}, {name: v2, labels: {v: '2'}}]}")


def policy(spec: str, *, name: str = "p", namespace: str = "default") -> str:
    return (
        "apiVersion: meshlib.io/v1alpha1\nkind: BackendTrafficPolicy\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )


def cluster(made: Translation, name: str = A) -> Cluster:
    return next(each for each in made.snapshot.clusters if each.name == name)


def under(spec: str, *more: str, name: str = A) -> Cluster:
    return cluster(view(service(), policy(f"{{host: a, {spec}}}"), *more), name)


def forward(made: Translation) -> Forward:
    configuration = next(each for each in made.snapshot.route_configurations if each.name == A)
    action = configuration.virtual_hosts[0].routes[0].action
    assert isinstance(action, Forward)
    return action


@pytest.mark.parametrize(
    ("given", "rules"),
    [
        ("consecutiveFailures: 5", BreakerRules(5)),
        ("failureRate: 50, minimumCalls: 7, window: 1m", BreakerRules(failure_rate=50, minimum_calls=7, window=60)),
        ("slowCallRate: 80, slowCall: 500ms", BreakerRules(slow_call_rate=80, slow_call=0.5)),
        ("consecutiveFailures: 1, openFor: 5s, probes: 3", BreakerRules(1, open_for=5, probes=3)),
    ],
)
def test_a_breaker_is_the_clusters(given: str, rules: BreakerRules) -> None:
    """With the model's defaults for what is left out."""
    assert under(f"breaker: {{{given}}}").breaker == rules


def test_a_rate_budget_takes_the_place_of_a_percentage() -> None:
    """And without one the DestinationRule's stays."""
    percent = destination_rule("{host: a, trafficPolicy: {retryBudget: {percent: 30}}}")
    assert under("retryBudget: {ratio: 0.5, minPerSecond: 1, ttl: 20s}", percent).retry_budget == RateBudget(0.5, 1, 20)
    assert under("retryBudget: {}").retry_budget == RateBudget()
    assert under("shadow: [limits]", percent).retry_budget == RetryBudget(30, 3)


def test_a_balancer_takes_the_place_of_the_rules() -> None:
    """Of a hash too, whose keys the routes then have no use for."""
    assert under("loadBalancer: PEAK_EWMA").load_balancing is LoadBalancing.PEAK_EWMA
    hashing = destination_rule("{host: a, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true}}}}")
    made = view(service(), hashing, policy("{host: a, loadBalancer: CLIENT_SIDE_WEIGHTED_ROUND_ROBIN}"))
    assert cluster(made).load_balancing is LoadBalancing.CLIENT_SIDE_WEIGHTED_ROUND_ROBIN
    assert forward(made).hash_policies == ()


@pytest.mark.parametrize(
    ("given", "check"),
    [
        ("http: {}", HealthCheck()),
        (
            "http: {path: /h, host: h.e.com, expectedStatuses: [204, 300-399]}, port: 8081",
            HealthCheck("http", "/h", "h.e.com", port=8081, expected_statuses=((204, 204), (300, 399))),
        ),
        ("grpc: {service: s}, interval: 1s, timeout: 200ms", HealthCheck("grpc", service="s", interval=1, timeout=0.2)),
        (
            "tcp: {}, healthyThreshold: 1, unhealthyThreshold: 9",
            HealthCheck("tcp", healthy_threshold=1, unhealthy_threshold=9),
        ),
    ],
)
def test_health_checks_are_the_clusters(given: str, check: HealthCheck) -> None:
    """Of three kinds, with the model's defaults."""
    assert under(f"healthChecks: [{{{given}}}]").health_checks == (check,)


def test_statistical_detection_is_added_to_the_rules() -> None:
    """Every field by the name that it has in the model; without a rule the rest has Istio's defaults."""
    every = (
        "successRateEnforcing: 100, successRateMinimumHosts: 3, successRateRequestVolume: 10,"
        " successRateStdevFactor: 1.5, failurePercentageEnforcing: 50, failurePercentageThreshold: 40,"
        " failurePercentageMinimumHosts: 2, failurePercentageRequestVolume: 20, maxEjectionTime: 1m,"
        " maxEjectionJitter: 1s, alwaysEjectOne: true"
    )
    expected = OutlierDetection(
        success_rate_enforcing=100,
        success_rate_minimum_hosts=3,
        success_rate_request_volume=10,
        success_rate_stdev_factor=1.5,
        failure_percentage_enforcing=50,
        failure_percentage_threshold=40,
        failure_percentage_minimum_hosts=2,
        failure_percentage_request_volume=20,
        max_ejection_time=60.0,
        max_ejection_jitter=1.0,
        always_eject_one=True,
    )
    assert under(f"outlierDetection: {{{every}}}").outlier_detection == expected
    rule = destination_rule("{host: a, trafficPolicy: {outlierDetection: {consecutive5xxErrors: 1}}}")
    assert under(f"outlierDetection: {{{every}}}", rule).outlier_detection == replace(expected, consecutive_5xx=1)


def test_shadow_is_the_clusters() -> None:
    """By the names of the policies."""
    assert under("shadow: [breaker, outlier-detection]").shadow == {"breaker", "outlier-detection"}


def test_hedging_and_resending_are_the_routes() -> None:
    """With a rule or without; not where retries are switched off."""
    ours = policy("{host: a, hedge: {delay: 100ms, maxAttempts: 3}, resendUnsafe: true}")
    to_a = "route: [{destination: {host: a}}]"
    for more in (
        (),
        (virtual_service(f"[{{{to_a}}}]"),),
        (virtual_service(f"[{{{to_a}, retries: {{attempts: 1}}}}]"),),
    ):
        action = forward(view(service(), ours, *more))
        assert action.hedge == HedgePolicy(0.1, 3)
        assert action.retry is not None
        assert action.retry.resend_unsafe
    none = forward(view(service(), ours, virtual_service(f"[{{{to_a}, retries: {{attempts: 0}}}}]")))
    assert none.retry is None
    plain = forward(view(service()))
    assert plain.hedge is None
    assert plain.retry is not None
    assert not plain.retry.resend_unsafe


def test_a_route_hedges_only_if_all_its_destinations_do() -> None:
    """Which of them is drawn is not known before."""
    ours = policy("{host: a, hedge: {delay: 100ms}, resendUnsafe: true}")
    split = virtual_service("[{route: [{destination: {host: a}, weight: 1}, {destination: {host: b}, weight: 1}]}]")
    action = forward(view(service(), service("b"), ours, split))
    assert action.hedge is None
    assert action.retry is not None
    assert not action.retry.resend_unsafe
    same = policy("{host: b, hedge: {delay: 100ms}, resendUnsafe: true}", name="q")
    assert forward(view(service(), service("b"), ours, same, split)).hedge == HedgePolicy(0.1)


# Where it holds


def test_a_subsets_policy_goes_before_the_hosts_block_by_block() -> None:
    """And holds for that subset alone; false is a word, too."""
    host = policy("{host: a, breaker: {consecutiveFailures: 5}, shadow: [limits], resendUnsafe: true}")
    subset = policy("{host: a, subset: v1, breaker: {consecutiveFailures: 1}, resendUnsafe: false}", name="q")
    routed = virtual_service("[{route: [{destination: {host: a, subset: v1}}]}]")
    made = view(service(), SUBSETS, host, subset, routed)
    found = {name: cluster(made, name) for name in (A, V1)}
    assert {name: each.breaker and each.breaker.consecutive_failures for name, each in found.items()} == {A: 5, V1: 1}
    assert {each.shadow for each in found.values()} == {frozenset({"limits"})}
    retry = forward(made).retry
    assert retry is not None
    assert not retry.resend_unsafe
    assert found[V1].origin == (
        "DestinationRule default/dr (test.yaml), BackendTrafficPolicy default/q (test.yaml),"
        " BackendTrafficPolicy default/p (test.yaml)"
    )
    assert found[A].origin == "BackendTrafficPolicy default/p (test.yaml)"


def test_a_circuit_that_the_services_namespace_holds_is_held_for_every_caller() -> None:
    """Even where the caller's namespace has a policy of its own for that host, which counts in all else."""
    held = policy("{host: a, breaker: {forced: OPEN}, retryBudget: {ratio: 0.5}}")
    host = "a.default.svc.cluster.local"
    own = policy(f"{{host: {host}, breaker: {{consecutiveFailures: 3}}}}", namespace="other")
    found = cluster(view(service(), held, own, given=node("other")))
    assert found.breaker == BreakerRules(consecutive_failures=3, forced="open")
    assert found.retry_budget is None
    assert all(each in found.origin for each in ("other/p", "default/p"))
    closed = policy(f"{{host: {host}, breaker: {{forced: CLOSED}}}}", namespace="other")
    assert cluster(view(service(), held, closed, given=node("other"))).breaker == BreakerRules(forced="closed")
    free = policy("{host: a, breaker: {consecutiveFailures: 5}}")
    assert cluster(view(service(), free, own, given=node("other"))).breaker == BreakerRules(consecutive_failures=3)


def test_the_callers_namespace_comes_before_the_services_and_the_roots() -> None:
    """As with DestinationRules; the first that says anything is asked alone."""
    root = policy("{host: '*', breaker: {consecutiveFailures: 1}}", namespace="istio-system")
    its = policy("{host: a, breaker: {consecutiveFailures: 2}}")
    own = policy("{host: a.default.svc.cluster.local, breaker: {consecutiveFailures: 3}}", namespace="other")

    def failures(*texts: str) -> int:
        breaker = cluster(view(service(), *texts, given=node("other"))).breaker
        assert breaker is not None
        return breaker.consecutive_failures

    assert failures(root) == 1
    assert failures(root, its) == 2
    assert failures(root, its, own) == 3


def test_an_exact_host_comes_before_a_wildcard() -> None:
    """The longest of several."""
    wide = policy("{host: '*.svc.cluster.local', breaker: {consecutiveFailures: 1}}", name="w")
    near = policy("{host: '*.default.svc.cluster.local', breaker: {consecutiveFailures: 2}}", name="n")
    breaker = cluster(view(service(), wide, near)).breaker
    assert breaker is not None
    assert breaker.consecutive_failures == 2
    assert under("breaker: {consecutiveFailures: 3}", wide, near).breaker == BreakerRules(3)


def test_two_policies_for_one_host_are_one_too_many() -> None:
    """The first holds, and the other is told."""
    made = view(
        service(),
        policy("{host: a, breaker: {consecutiveFailures: 1}}", name="one"),
        policy("{host: a.default.svc.cluster.local, breaker: {consecutiveFailures: 2}}", name="two"),
    )
    assert cluster(made).breaker == BreakerRules(1)
    (problem,) = made.problems
    assert (problem.object, problem.field) == ("BackendTrafficPolicy default/two", "spec.host")
    assert problem.reason == "a.default.svc.cluster.local has BackendTrafficPolicy default/one already"
