"""What others are asked for, what is only noted for meshlib, and what other control planes' forms mean here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from everything import BREAKER, CHECKED, LIMITS, OUTLIERS, RETRY, everything
from meshlib import model as md
from meshlib.errors import InvalidResource
from meshlib.xds import messages as m
from meshlib.xds.decode import decode_resource
from meshlib.xds.encode import encode_resource
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, ROUTE


def encoded(cluster: md.Cluster) -> Any:
    return m.Cluster.FromString(encode_resource(CLUSTER, cluster))


def decoded(message: Any) -> md.Cluster:
    found = decode_resource(CLUSTER, m.serialize(message))
    assert isinstance(found, md.Cluster)
    return found


def eds(**fields: Any) -> Any:
    """A cluster as another control plane would send it."""
    message = m.Cluster(name="c", type=3, **fields)
    message.eds_cluster_config.eds_config.ads.SetInParent()
    return message


def policy_names(message: Any) -> list[str]:
    policies = message.load_balancing_policy.policies
    return [each.typed_extension_config.name.rpartition(".")[2] for each in policies]


# What others are asked for


def test_what_runs_in_shadow_is_not_asked_of_anybody_else() -> None:
    """Envoy and gRPC know no shadow: an ejection that was to be counted only would be carried out there."""
    real = md.Cluster("c", limits=LIMITS, retry_budget=md.RetryBudget(), outlier_detection=OUTLIERS, breaker=BREAKER)
    shown = encoded(real)
    assert shown.HasField("outlier_detection")
    assert shown.circuit_breakers.thresholds[0].max_requests.value == LIMITS.max_requests
    assert shown.circuit_breakers.thresholds[0].HasField("retry_budget")
    in_shadow = replace(real, shadow=md.SHADOWABLE)
    message = encoded(in_shadow)
    assert not message.HasField("outlier_detection")
    assert message.circuit_breakers.thresholds[0].max_requests.value == 0xFFFFFFFF
    assert not message.circuit_breakers.thresholds[0].HasField("retry_budget")
    assert decoded(message) == in_shadow


def test_hedging_is_not_asked_of_envoy() -> None:
    """Its hedge_policy sends a POST twice as well."""
    forward = md.Forward((md.WeightedCluster("c"),), hedge=md.HedgePolicy(0.1, 3), retry=RETRY)
    host = md.VirtualHost("h", ("*",), (md.Route(md.RouteMatch(), forward),))
    message = m.RouteConfiguration.FromString(encode_resource(ROUTE, md.RouteConfiguration("r", (host,))))
    assert not message.virtual_hosts[0].routes[0].route.HasField("hedge_policy")


def test_a_rate_budget_is_the_nearest_percentage_for_others() -> None:
    """Each request pays for a fifth of a retry: retries in flight may be 20 percent of the requests."""
    message = encoded(md.Cluster("c", retry_budget=md.RateBudget(0.2)))
    assert message.circuit_breakers.thresholds[0].retry_budget.budget_percent.value == 20
    whole = encoded(md.Cluster("c", retry_budget=md.RateBudget(5.0)))
    assert whole.circuit_breakers.thresholds[0].retry_budget.budget_percent.value == 100


@pytest.mark.parametrize(
    ("policy", "names"),
    [
        (md.LoadBalancing.ROUND_ROBIN, []),
        (md.LoadBalancing.RING_HASH, []),
        (md.LoadBalancing.LEAST_REQUEST, ["least_request", "wrr_locality"]),
        (md.LoadBalancing.PEAK_EWMA, ["least_request", "wrr_locality"]),
        (md.LoadBalancing.RANDOM, ["random", "wrr_locality"]),
        (md.LoadBalancing.MAGLEV, ["maglev", "ring_hash"]),
        (md.LoadBalancing.CLIENT_SIDE_WEIGHTED_ROUND_ROBIN, ["client_side_weighted_round_robin", "round_robin"]),
    ],
)
def test_what_grpc_does_not_know_stands_before_what_it_knows(policy: md.LoadBalancing, names: list[str]) -> None:
    """gRPC refuses a cluster of whose policies it knows none (gRFC A52); the older field says what all know."""
    assert policy_names(encoded(md.Cluster("c", load_balancing=policy))) == names


def test_locality_weights_have_one_form_for_each_policy() -> None:
    """Envoy refuses the older field beside a load_balancing_policy."""
    for policy in md.LoadBalancing:
        message = encoded(md.Cluster("c", load_balancing=policy, locality_weighted=True))
        is_older = not message.HasField("load_balancing_policy")
        assert message.common_lb_config.HasField("locality_weighted_lb_config") is is_older, policy


def test_envoy_makes_the_first_check_that_it_can() -> None:
    """One of each cluster, and gRPC's only over HTTP/2; it would refuse the cluster. We make them all."""
    both = md.Cluster("c", health_checks=(CHECKED["grpc"], CHECKED["tcp"]))
    message = encoded(both)
    assert [each.WhichOneof("health_checker") for each in message.health_checks] == ["tcp_health_check"]
    assert decoded(message) == both
    over_http2 = encoded(replace(both, http2=True))
    assert [each.WhichOneof("health_checker") for each in over_http2.health_checks] == ["grpc_health_check"]


def test_a_check_names_the_service_that_servers_know() -> None:
    """Envoy's own choice would be the cluster's name, which no server has heard of."""
    service = md.ServiceName("reviews.default.svc.cluster.local", "reviews", "default")
    message = encoded(md.Cluster("outbound|80||x", health_checks=(md.HealthCheck(),), service=service))
    assert message.health_checks[0].http_health_check.host == service.host
    assert decoded(message).health_checks == (md.HealthCheck(),)


def test_a_connection_that_is_kept_for_ever_says_0() -> None:
    """ "If set to 0, the timeout is disabled"; Envoy refuses ten thousand years."""
    message = eds()
    message.common_http_protocol_options.idle_timeout.SetInParent()
    kept = decoded(message)
    assert kept.limits.idle_timeout is not None
    options = m.HttpProtocolOptions.FromString(
        next(iter(encoded(kept).typed_extension_protocol_options.values())).value
    )
    assert options.common_http_protocol_options.idle_timeout.seconds == 0
    assert decoded(encoded(kept)) == kept


def test_a_longer_ejection_than_the_longest_is_left_to_envoys_default() -> None:
    """It refuses max_ejection_time below base_ejection_time; left out, the longer of 300 s and base holds."""
    long = md.Cluster("c", outlier_detection=md.OutlierDetection(base_ejection_time=400.0))
    assert not encoded(long).outlier_detection.HasField("max_ejection_time")
    longer = replace(long, outlier_detection=md.OutlierDetection(base_ejection_time=400.0, max_ejection_time=200.0))
    assert not encoded(longer).outlier_detection.HasField("max_ejection_time")
    assert decoded(encoded(longer)) == longer


def test_a_locality_that_was_given_no_weight_gets_no_load() -> None:
    """Beside others that have one; its endpoints' sum would be a weight that nobody gave."""
    here, there = md.Locality("eu", "a"), md.Locality("eu", "b")
    endpoints = (md.Endpoint("10.0.0.1", 80, locality=here), md.Endpoint("10.0.0.2", 80, locality=there))
    given = md.LoadAssignment("c", endpoints, (md.LocalityWeight(here, 0, 1),))
    message = m.ClusterLoadAssignment.FromString(encode_resource(ENDPOINT, given))
    assert [each.load_balancing_weight.value for each in message.endpoints] == [1, 0]
    found = decode_resource(ENDPOINT, m.serialize(message))
    assert isinstance(found, md.LoadAssignment)
    assert found.locality_weights == (md.LocalityWeight(here, 0, 1), md.LocalityWeight(there, 0, 0))


# What other control planes send


def test_the_older_forms_of_load_balancing_are_understood() -> None:
    """As Istio writes them."""
    ring = eds(lb_policy=2)
    ring.ring_hash_lb_config.minimum_ring_size.value = 512
    assert decoded(ring).hash_table == md.HashTable(512)
    maglev = eds(lb_policy=5)
    maglev.maglev_lb_config.table_size.value = 251
    assert (decoded(maglev).load_balancing, decoded(maglev).hash_table.maglev_size) == ("MAGLEV", 251)
    least = eds(lb_policy=1)
    least.least_request_lb_config.slow_start_config.slow_start_window.seconds = 60
    least.common_lb_config.locality_weighted_lb_config.SetInParent()
    found = decoded(least)
    assert (found.load_balancing, found.slow_start, found.locality_weighted) == (
        md.LoadBalancing.LEAST_REQUEST,
        md.SlowStart(60.0),
        True,
    )
    zones = eds()
    zones.common_lb_config.zone_aware_lb_config.min_cluster_size.value = 3
    assert decoded(zones).zone_aware == md.ZoneAware(100.0, 3)


def test_grpcs_form_of_load_balancing_is_understood() -> None:
    """WrrLocality around the endpoints' policy (gRFC A52, A58); what is not known is passed over for the next."""
    message = eds()
    for config in (m.TlsInspector(), wrapped(m.TlsInspector()), wrapped(m.ClientSideWeightedRoundRobin())):
        message.load_balancing_policy.policies.add().typed_extension_config.typed_config.CopyFrom(m.pack(config))
    found = decoded(message)
    assert (found.load_balancing, found.locality_weighted) == (
        md.LoadBalancing.CLIENT_SIDE_WEIGHTED_ROUND_ROBIN,
        True,
    )
    del message.load_balancing_policy.policies[2]
    assert decoded(message).load_balancing is md.LoadBalancing.LEAST_REQUEST  # calls shall work


def wrapped(config: Any) -> Any:
    found = m.WrrLocality()
    found.endpoint_picking_policy.policies.add().typed_extension_config.typed_config.CopyFrom(m.pack(config))
    return found


def test_the_clusters_own_http_options_are_understood() -> None:
    """The deprecated fields, for who still writes them."""
    message = eds()
    message.http2_protocol_options.max_concurrent_streams.value = 7
    message.common_http_protocol_options.max_connection_duration.seconds = 60
    message.max_requests_per_connection.value = 9
    found = decoded(message)
    assert found.http2
    assert (found.limits.max_concurrent_streams, found.limits.max_connection_duration) == (7, 60.0)
    assert found.limits.max_requests_per_connection == 9


def test_envoys_defaults_of_outlier_detection_hold_where_nothing_is_said() -> None:
    """An empty block ejects by consecutive errors and by success rates (outlier_detection.proto)."""
    message = eds()
    message.outlier_detection.SetInParent()
    found = decoded(message).outlier_detection
    assert found == md.OutlierDetection(success_rate_enforcing=100)


def test_a_check_without_statuses_wants_200() -> None:
    """Envoy's default; a custom check is no check."""
    message = eds()
    message.health_checks.add().interval.seconds = 1
    check = message.health_checks.add(http_health_check={"path": "/live"})
    check.interval.seconds = check.timeout.seconds = 1
    check.healthy_threshold.value = check.unhealthy_threshold.value = 2
    assert decoded(message).health_checks == (
        md.HealthCheck("http", "/live", "", "", 0, ((200, 200),), 1.0, 1.0, 2, 2),
    )


def forwarded(**action: Any) -> md.Forward:
    message = m.RouteConfiguration(
        name="r", virtual_hosts=[{"domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": action}]}]
    )
    found = decode_resource(ROUTE, m.serialize(message))
    assert isinstance(found, md.RouteConfiguration)
    forward = found.virtual_hosts[0].routes[0].action
    assert isinstance(forward, md.Forward)
    return forward


def test_envoys_hedging_is_ours() -> None:
    """A try that is late is joined by the next instead of given up: the delay is the time of a try."""
    found = forwarded(
        cluster="c",
        retry_policy={"num_retries": {"value": 2}, "per_try_timeout": {"seconds": 1}},
        hedge_policy={"hedge_on_per_try_timeout": True},
    )
    assert found.hedge == md.HedgePolicy(1.0, 3)
    assert found.retry is not None
    assert found.retry.per_try_timeout is None


def test_hash_policies_that_are_not_known_are_passed_over() -> None:
    """gRPC's channel id (field 6) and a source that is not asked for; what is known keeps its place."""
    unknown = m.RouteConfiguration().virtual_hosts.add().routes.add().route.hash_policy.add()
    unknown.MergeFromString(bytes([6 << 3 | 2, 0]))
    found = forwarded(
        cluster="c",
        hash_policy=[
            unknown,
            {"connection_properties": {}},
            {"header": {"header_name": "X-User"}, "terminal": True},
            {"cookie": {"name": "s", "ttl": {}}},
        ],
    )
    assert found.hash_policies == (md.HashPolicy("header", "x-user", terminal=True), md.HashPolicy("cookie", "s", 0.0))


def test_retries_heed_what_everybody_sends_unless_told_otherwise() -> None:
    """Envoy's silence is no word against Retry-After; an empty list of ours is."""
    silent = forwarded(cluster="c", retry_policy={"retry_on": "5xx"}).retry
    assert silent is not None
    assert silent.reset_headers == md.RetryPolicy().reset_headers
    told = forwarded(
        cluster="c",
        retry_policy={
            "rate_limited_retry_back_off": {
                "reset_headers": [{"name": "X-Reset", "format": 1}],
                "max_interval": {"seconds": 5},
            }
        },
    ).retry
    assert told is not None
    assert (told.reset_headers, told.max_reset) == ((md.ResetHeader("x-reset", "unix-timestamp"),), 5.0)


# What is wrong


def noted(**notes: Any) -> Callable[[], Any]:
    def make() -> Any:
        message = eds()
        message.metadata.filter_metadata["meshlib"].update(notes)
        return message

    return make


def given(fill: Callable[[Any], None]) -> Callable[[], Any]:
    def make() -> Any:
        message = eds()
        fill(message)
        return message

    return make


def _ring(message: Any) -> None:
    message.lb_policy = 2
    message.ring_hash_lb_config.minimum_ring_size.value = 9_000_000


def _maglev(message: Any) -> None:
    message.lb_policy = 5
    message.maglev_lb_config.table_size.value = 1000


def _slow_start(message: Any) -> None:
    message.round_robin_lb_config.slow_start_config.SetInParent()


def _aggression(message: Any) -> None:
    message.round_robin_lb_config.slow_start_config.slow_start_window.seconds = 1
    message.round_robin_lb_config.slow_start_config.aggression.default_value = float("nan")


def _enforcing(message: Any) -> None:
    message.outlier_detection.enforcing_failure_percentage.value = 101


def _threshold(message: Any) -> None:
    check = message.health_checks.add(tcp_health_check={})
    check.interval.seconds = check.timeout.seconds = 1


def _statuses(message: Any) -> None:
    _threshold(message)
    check = message.health_checks[0]
    check.healthy_threshold.value = check.unhealthy_threshold.value = 1
    check.http_health_check.expected_statuses.add(start=300, end=200)


def _streams(message: Any) -> None:
    message.http2_protocol_options.max_concurrent_streams.value = 0


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (noted(breaker=[]), "metadata.filter_metadata[meshlib].breaker"),
        (noted(breaker={"failure_rate": 101}), "metadata.filter_metadata[meshlib].breaker.failure_rate"),
        (noted(breaker={"probes": 0}), "metadata.filter_metadata[meshlib].breaker.probes"),
        (noted(breaker={"probes": 1.5}), "metadata.filter_metadata[meshlib].breaker.probes"),
        (noted(breaker={"window": "10s"}), "metadata.filter_metadata[meshlib].breaker.window"),
        (noted(breaker={"open_for": float("nan")}), "metadata.filter_metadata[meshlib].breaker.open_for"),
        (noted(shadow=["everything"]), "metadata.filter_metadata[meshlib].shadow[0]"),
        (noted(shadow=True), "metadata.filter_metadata[meshlib].shadow"),
        (noted(load_balancing="FASTEST"), "metadata.filter_metadata[meshlib].load_balancing"),
        (noted(slow_start={}), "metadata.filter_metadata[meshlib].slow_start"),
        (noted(locality_weighted=1), "metadata.filter_metadata[meshlib].locality_weighted"),
        (noted(hash_table={"maglev_size": 1000}), "metadata.filter_metadata[meshlib].hash_table.maglev_size"),
        (noted(retry_budget={"ratio": -1}), "metadata.filter_metadata[meshlib].retry_budget.ratio"),
        (noted(health_checks=[{"kind": "icmp"}]), "metadata.filter_metadata[meshlib].health_checks[0].kind"),
        (
            noted(health_checks=[{"expected_statuses": [[200, 100]]}]),
            "metadata.filter_metadata[meshlib].health_checks[0].expected_statuses[0]",
        ),
        (
            noted(outlier_detection={"error_codes": [42]}),
            "metadata.filter_metadata[meshlib].outlier_detection.error_codes[0]",
        ),
        (noted(limits={"max_requests": True}), "metadata.filter_metadata[meshlib].limits.max_requests"),
        (given(_ring), "ring_hash_lb_config.minimum_ring_size"),
        (given(_maglev), "maglev_lb_config.table_size"),
        (given(_slow_start), "round_robin_lb_config.slow_start_config.slow_start_window"),
        (given(_aggression), "round_robin_lb_config.slow_start_config.aggression"),
        (given(_enforcing), "outlier_detection.enforcing_failure_percentage"),
        (given(_threshold), "health_checks[0].healthy_threshold"),
        (given(_statuses), "health_checks[0].http_health_check.expected_statuses[0]"),
        (given(_streams), "http2_protocol_options.max_concurrent_streams"),
    ],
)
def test_what_is_wrong_in_a_cluster_is_named(make: Callable[[], Any], field: str) -> None:
    """Our notes are checked as strictly as Envoy's fields."""
    with pytest.raises(InvalidResource) as caught:
        decode_resource(CLUSTER, m.serialize(make()))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("action", "field"),
    [
        ({"hash_policy": [{"header": {"header_name": "a b"}}]}, "hash_policy[0].header.header_name"),
        ({"hash_policy": [{"query_parameter": {}}]}, "hash_policy[0].query_parameter.name"),
        ({"hash_policy": [{"cookie": {"name": "a;b"}}]}, "hash_policy[0].cookie"),
        ({"hash_policy": [{"cookie": {"name": "a", "path": "/;secure"}}]}, "hash_policy[0].cookie"),
        ({"idle_timeout": {"seconds": -1}}, "idle_timeout"),
        (
            {"retry_policy": {"rate_limited_retry_back_off": {"reset_headers": [{"name": ""}]}}},
            "retry_policy.rate_limited_retry_back_off.reset_headers[0].name",
        ),
        (
            {"retry_policy": {"rate_limited_retry_back_off": {"max_interval": {}}}},
            "retry_policy.rate_limited_retry_back_off.max_interval",
        ),
        ({"retry_policy": {"retriable_headers": [{"name": ""}]}}, "retry_policy.retriable_headers[0].name"),
    ],
)
def test_what_is_wrong_in_a_route_is_named(action: dict[str, Any], field: str) -> None:
    """What stands in a Set-Cookie header one day can't end it."""
    with pytest.raises(InvalidResource) as caught:
        forwarded(cluster="c", **action)
    assert caught.value.field == f"virtual_hosts[0].routes[0].route.{field}"


def test_what_the_judges_are_given_comes_back_as_it_was() -> None:
    """Envoy and gRPC accept it; here it is also understood, to the last note."""
    for cluster in everything(1, 1).clusters:
        assert decoded(encoded(cluster)) == cluster
