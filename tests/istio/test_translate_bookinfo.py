"""Each file of Istio's tutorial means what the tutorial says."""

from __future__ import annotations

import pytest
from views import BOOKINFO, decide, node, objects, view, weights

from meshlib.model import ClusterType, Forward, LoadBalancing, NodeKind

BASE = ("platform/bookinfo.yaml", "networking/destination-rule-all.yaml")
REVIEWS = "http://reviews:9080/reviews/0"
RATINGS = "http://ratings:9080/ratings/0"
JASON = {"end-user": "jason"}


@pytest.mark.parametrize(
    ("file", "headers", "expected"),
    [
        ("virtual-service-all-v1", {}, {"v1": 1}),
        ("virtual-service-reviews-test-v2", JASON, {"v2": 1}),
        ("virtual-service-reviews-test-v2", {}, {"v1": 1}),
        ("virtual-service-reviews-jason-v2-v3", JASON, {"v2": 1}),
        ("virtual-service-reviews-jason-v2-v3", {}, {"v3": 1}),
        ("virtual-service-reviews-50-v3", {}, {"v1": 50, "v3": 50}),
        ("virtual-service-reviews-80-20", {}, {"v1": 80, "v2": 20}),
        ("virtual-service-reviews-90-10", {}, {"v1": 90, "v2": 10}),
        ("virtual-service-reviews-v2-v3", {}, {"v2": 50, "v3": 50}),
        ("virtual-service-reviews-v3", {}, {"v3": 1}),
        ("virtual-service-ratings-db", {}, {"v3": 1}),
    ],
)
def test_reviews_are_routed(file: str, headers: dict[str, str], expected: dict[str, int]) -> None:
    """Version by user, and splits."""
    made = view(*BASE, f"networking/{file}.yaml")
    assert weights(decide(made.snapshot, REVIEWS, headers)) == expected


def test_without_a_rule_a_service_is_called_whatever_its_version() -> None:
    """Istio's default: all endpoints, no timeout, two retries of what never reached the server."""
    made = view(*BASE)
    decision = decide(made.snapshot, REVIEWS)
    assert weights(decision) == {"reviews.default.svc.cluster.local": 1}
    assert decision.timeout is None
    assert decision.retrying is not None
    assert decision.retrying.policy.attempts == 2
    assert made.problems == ()


def test_a_subset_holds_the_endpoints_with_its_labels() -> None:
    """And a service all of them; one subset without endpoints is there, and empty."""
    snapshot = view(*BASE).snapshot
    found = {each.cluster: [e.workload for e in each.endpoints] for each in snapshot.assignments}
    host = "reviews.default.svc.cluster.local"
    assert found[f"outbound|9080||{host}"] == ["reviews-v1", "reviews-v2", "reviews-v3"]
    assert found[f"outbound|9080|v2|{host}"] == ["reviews-v2"]
    assert found["outbound|9080|v2-mysql|ratings.default.svc.cluster.local"] == []


def test_jasons_ratings_are_delayed_or_aborted() -> None:
    """7 s for him alone; 500 for him alone."""
    delayed = view(*BASE, "networking/virtual-service-ratings-test-delay.yaml").snapshot
    fault = decide(delayed, RATINGS, JASON).fault
    assert fault is not None
    assert fault.delay is not None
    assert (fault.delay.seconds, fault.delay.per_million) == (7.0, 1_000_000)
    assert decide(delayed, RATINGS).fault is None
    aborted = view(*BASE, "networking/virtual-service-ratings-test-abort.yaml").snapshot
    fault = decide(aborted, RATINGS, JASON).fault
    assert fault is not None
    assert fault.abort is not None
    assert (fault.abort.status, fault.abort.per_million) == (500, 1_000_000)
    assert decide(aborted, RATINGS).fault is None


def test_timeouts_mirrors_and_circuit_breaking() -> None:
    """The three other tasks."""
    timed = decide(view(*BASE, "networking/virtual-service-reviews-timeout.yaml").snapshot, REVIEWS)
    assert timed.timeout == 0.5
    mirrored = decide(view(*BASE, "networking/virtual-service-reviews-mirror-v3.yaml").snapshot, REVIEWS)
    assert isinstance(mirrored.action, Forward)
    assert [(m.cluster, m.per_million) for m in mirrored.action.mirrors] == [
        ("outbound|9080|v3|reviews.default.svc.cluster.local", 1_000_000)
    ]
    broken = view("platform/bookinfo.yaml", "networking/destination-rule-details-circuit-breaker.yaml").snapshot
    cluster = next(c for c in broken.clusters if c.name == "outbound|9080||details.default.svc.cluster.local")
    assert (cluster.limits.max_connections, cluster.limits.max_pending_requests) == (1, 1)
    assert cluster.outlier_detection is not None
    assert (cluster.outlier_detection.consecutive_5xx, cluster.outlier_detection.max_ejection_percent) == (1, 100)
    random = view("platform/bookinfo.yaml", "networking/destination-rule-reviews.yaml").snapshot
    assert {c.load_balancing for c in random.clusters if "reviews" in c.name} == {LoadBalancing.RANDOM}


def test_egress_is_a_service_of_its_own() -> None:
    """A DNS cluster with a route; TLS originated on another port, under the caller's own name."""
    made = view("networking/egress-http.yaml").snapshot
    assert decide(made, "http://example.com/").timeout == 3.0
    cluster = next(c for c in made.clusters if c.name == "outbound|80||example.com")
    assert cluster.type is ClusterType.STRICT_DNS
    assert [(e.address, e.port) for e in cluster.endpoints] == [("example.com", 80)]
    secure = view("networking/egress-tls-origination.yaml").snapshot
    cluster = next(c for c in secure.clusters if c.name == "outbound|80||example.com")
    assert cluster.tls is not None
    assert (cluster.tls.mode, cluster.endpoints[0].port) == ("SIMPLE", 443)


def test_google_is_called_by_tls_whatever_the_caller_wrote() -> None:
    """The VirtualService speaks of port 80 alone, so port 443 is as if there were none."""
    made = view("networking/egress-rule-google-apis.yaml", workloads=())
    assert made.problems == ()
    for url in ("http://www.googleapis.com/books", "https://www.googleapis.com/books"):
        action = decide(made.snapshot, url).action
        assert isinstance(action, Forward)
        assert [each.cluster for each in action.clusters] == ["outbound|443||www.googleapis.com"]
    tls = {c.name: c.tls and c.tls.mode for c in made.snapshot.clusters if c.service}
    assert tls == {"outbound|80||www.googleapis.com": None, "outbound|443||www.googleapis.com": "SIMPLE"}


@pytest.mark.parametrize(
    ("file", "url", "expected"),
    [
        ("virtual-service-all-v1", "http://productpage:9080/", {"v1": 1}),
        ("virtual-service-all-v1", RATINGS, {"v1": 1}),
        ("virtual-service-all-v1", "http://details:9080/details/0", {"v1": 1}),
        ("virtual-service-details-v2", "http://details:9080/details/0", {"v2": 1}),
        ("virtual-service-ratings-db", RATINGS, {"v2": 1}),
        ("virtual-service-ratings-mysql", RATINGS, {"v2-mysql": 1}),
        ("virtual-service-ratings-mysql", REVIEWS, {"v3": 1}),
        ("virtual-service-ratings-mysql-vm", RATINGS, {"v2-mysql-vm": 1}),
        ("virtual-service-ratings-mysql-vm", REVIEWS, {"v3": 1}),
        ("virtual-service-ratings-test-delay", RATINGS, {"v1": 1}),
        ("virtual-service-reviews-mirror-v3", REVIEWS, {"v1": 100}),
    ],
)
def test_the_other_services_are_routed(file: str, url: str, expected: dict[str, int]) -> None:
    """Every version that a rule names is one that a DestinationRule defines."""
    made = view(*BASE, f"networking/{file}.yaml")
    assert made.problems == ()
    assert weights(decide(made.snapshot, url)) == expected


def test_details_fail_for_everybody() -> None:
    """555 for all; the second rule of the file is never reached, as in Istio's own."""
    made = view(*BASE, "networking/fault-injection-details-v1.yaml").snapshot
    fault = decide(made, "http://details:9080/details/0").fault
    assert fault is not None
    assert fault.abort is not None
    assert (fault.abort.status, fault.abort.per_million) == (555, 1_000_000)
    (host,) = next(c for c in made.route_configurations if c.name.startswith("outbound|9080||details")).virtual_hosts
    assert len(host.routes) == 1


def test_ratings_are_slow_for_everybody_or_tried_again() -> None:
    """Two seconds, which reviews v3 bears; three retries of two seconds each."""
    slow = decide(view(*BASE, "networking/virtual-service-ratings-delay-2s.yaml").snapshot, RATINGS).fault
    assert slow is not None
    assert slow.delay is not None
    assert (slow.delay.seconds, slow.delay.per_million) == (2.0, 1_000_000)
    retried = decide(view(*BASE, "networking/virtual-service-ratings-retries.yaml").snapshot, RATINGS).retrying
    assert retried is not None
    assert (retried.policy.attempts, retried.policy.per_try_timeout) == (3, 2.0)
    assert retried.policy.on == {"5xx", "reset", "connect-failure"}


def test_the_gateway_serves_the_page_and_nothing_else() -> None:
    """Bound listener, one virtual host for everybody, five matches, 404 for the rest."""
    ingress = node("istio-system", NodeKind.ROUTER, istio="ingressgateway")
    made = view(*BASE, "networking/bookinfo-gateway.yaml", given=ingress)
    (listener,) = made.snapshot.listeners
    assert (listener.name, listener.port, listener.route_configurations) == ("0.0.0.0_8080", 8080, ("http.8080",))
    (routes,) = made.snapshot.route_configurations
    (host,) = routes.virtual_hosts
    assert host.domains == ("*",)
    assert len(host.routes) == 5
    assert {cluster.service.name for cluster in made.snapshot.clusters if cluster.service} == {"productpage"}
    other = node("istio-system", NodeKind.ROUTER, istio="egressgateway")
    assert view(*BASE, "networking/bookinfo-gateway.yaml", given=other).snapshot.listeners == ()


def test_every_file_of_the_examples_translates_for_everybody() -> None:
    """Alone and with the platform, for a service and for a gateway, without an inconsistency."""
    for file in sorted(BOOKINFO.glob("networking/*.yaml")):
        if file.name == "destination-rule-all-mtls.yaml":
            continue
        for kind in NodeKind:
            view("platform/bookinfo.yaml", f"networking/{file.name}", given=node(kind=kind, istio="ingressgateway"))
            view(f"networking/{file.name}", given=node(kind=kind, istio="ingressgateway"))
    assert objects("platform/bookinfo.yaml")
