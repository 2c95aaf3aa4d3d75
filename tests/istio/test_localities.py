"""Which endpoints are near, as Istio's loadbalancer.go has it, and who has to be told apart for it."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from views import destination_rule, node, objects, service, view

from meshlib.istio import resources as r
from meshlib.istio.instances import Instance
from meshlib.istio.localities import Nearness, seen_from
from meshlib.istio.translate import Translation, view_key
from meshlib.model import Cluster, Endpoint, LoadAssignment, Locality, LocalityWeight, Node, Workload, ZoneAware

HERE = Locality("eu", "a", "1")
PLACES = {
    "10.0.0.1": HERE,
    "10.0.0.2": Locality("eu", "a", "2"),
    "10.0.0.3": Locality("eu", "b", "1"),
    "10.0.0.4": Locality("us", "a", "1"),
    "10.0.0.5": Locality("asia", "a", "1"),
}
WORKLOADS = tuple(
    Workload(f"w{address[-1]}", service="a", address=address, port=80, labels=(("rack", address[-1]),), locality=place)
    for address, place in PLACES.items()
)
FAILS = "outlierDetection: {}"


def at(place: Locality = HERE, **labels: str) -> Node:
    made = node(**labels)
    return replace(made, workload=replace(made.workload, locality=place))


def translated(
    policy: str, *more: str, caller: Node | None = None, a_service: str | None = None
) -> tuple[Translation, Cluster, LoadAssignment]:
    rules = (destination_rule(f"{{host: a, trafficPolicy: {{{policy}}}}}"),) if policy else ()
    made = view(a_service or service(), *rules, *more, workloads=WORKLOADS, given=caller or at())
    return made, made.snapshot.clusters[-1], made.snapshot.assignments[0]


def priorities(*given: str, caller: Node | None = None, a_service: str | None = None) -> dict[str, int]:
    """The last number of each endpoint's address -> its priority."""
    _, _, assignment = translated(*given, caller=caller, a_service=a_service)
    return {each.address[-1]: each.priority for each in assignment.endpoints}


def locality(setting: str, *, detects: bool = True) -> str:
    return f"loadBalancer: {{localityLbSetting: {setting}}}" + (f", {FAILS}" if detects else "")


def test_outlier_detection_alone_prefers_what_is_near() -> None:
    """Istio's surprise: the subzone, the zone, the region, the rest; without the block all are equals."""
    assert priorities(FAILS) == {"1": 0, "2": 1, "3": 2, "4": 3, "5": 3}
    assert priorities("") == {"1": 0, "2": 0, "3": 0, "4": 0, "5": 0}
    _, cluster, assignment = translated(FAILS)
    assert (cluster.locality_weighted, assignment.locality_weights) == (False, ())


def test_priorities_have_no_gaps_wherever_the_caller_is() -> None:
    """From a region with nobody near, all are equally far."""
    assert priorities(FAILS, caller=at(Locality("us", "b"))) == {"1": 1, "2": 1, "3": 1, "4": 0, "5": 1}
    assert set(priorities(FAILS, caller=at(Locality("mars"))).values()) == {0}


def test_locality_can_be_switched_off() -> None:
    """By the rule, and for the whole mesh; the rule's word goes before the mesh's."""
    off = (
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\n"
        "data:\n  mesh: '{localityLbSetting: {enabled: false}}'\n"
    )
    assert set(priorities(locality("{enabled: false}")).values()) == {0}
    assert set(priorities(FAILS, off).values()) == {0}
    assert priorities(locality("{enabled: true}"), off)["4"] == 3


def test_failover_names_the_region_that_comes_next() -> None:
    """Others come after it; localities then weigh what their endpoints weigh."""
    policy = locality("{failover: [{from: eu, to: asia}, {from: us, to: eu}]}")
    assert priorities(policy) == {"1": 0, "2": 1, "3": 2, "4": 4, "5": 3}
    assert priorities(policy, caller=at(Locality("us", "a", "1"))) == {"1": 1, "2": 1, "3": 1, "4": 0, "5": 2}
    _, cluster, assignment = translated(policy)
    assert cluster.locality_weighted
    assert LocalityWeight(HERE, 0, 1) in assignment.locality_weights


def test_failover_without_outlier_detection_has_no_effect_and_says_so() -> None:
    """Nobody would ever leave the first priority."""
    policy = locality("{failover: [{from: eu, to: us}]}", detects=False)
    assert set(priorities(policy).values()) == {0}


def test_failover_priority_compares_labels_in_their_order() -> None:
    """The nth counts only if those before it agree; places need no labels; `key=value` asks the endpoint alone."""
    by_place = "{failoverPriority: [topology.kubernetes.io/region, topology.kubernetes.io/zone]}"
    assert priorities(locality(by_place)) == {"1": 0, "2": 0, "3": 1, "4": 2, "5": 2}
    assert priorities(locality("{failoverPriority: [rack]}"), caller=at(rack="4")) == {
        "1": 1, "2": 1, "3": 1, "4": 0, "5": 1,
    }  # fmt: skip
    fixed = "{failoverPriority: ['rack=3', topology.kubernetes.io/region]}"
    assert priorities(locality(fixed)) == {"1": 1, "2": 1, "3": 0, "4": 1, "5": 1}


def test_failover_priority_and_failover_go_together() -> None:
    """Labels first, then regions within each step of them (applyLocalityFailover on top)."""
    policy = locality("{failoverPriority: [rack], failover: [{from: eu, to: asia}]}")
    assert priorities(policy, caller=at(rack="4")) == {"1": 1, "2": 2, "3": 3, "4": 0, "5": 4}


def test_distribute_shares_by_place_and_leaves_out_the_rest() -> None:
    """The first rule for the caller's place; a wildcard's share is divided by weight; no priorities."""
    policy = locality("{distribute: [{from: eu/a/*, to: {eu/a/*: 70, us/a/1: 30}}, {from: '*', to: {asia/*: 100}}]}")
    _, cluster, assignment = translated(policy)
    assert cluster.locality_weighted
    assert {each.address[-1] for each in assignment.endpoints} == {"1", "2", "4"}
    assert {str(each.locality): each.weight for each in assignment.locality_weights} == {
        "eu/a/1": 35, "eu/a/2": 35, "us/a/1": 30,
    }  # fmt: skip
    _, _, elsewhere = translated(policy, caller=at(Locality("us")))
    assert [(str(each.locality), each.weight) for each in elsewhere.locality_weights] == [("asia/a/1", 100)]


def test_distribute_without_a_rule_for_the_caller_shares_by_weight() -> None:
    """And leaves nobody out; it needs no outlier detection."""
    policy = locality("{distribute: [{from: mars, to: {eu: 100}}]}", detects=False)
    _, cluster, assignment = translated(policy)
    assert cluster.locality_weighted
    assert len(assignment.endpoints) == 5
    assert {each.weight for each in assignment.locality_weights} == {1}


def test_zone_aware_routing_makes_other_regions_a_last_resort() -> None:
    """Zones of the own region are equals, whatever localityLbSetting says; no outlier detection is needed."""
    policy = (
        "loadBalancer: {zoneAwareLbSetting: {enabled: true, minClusterSize: 3}, localityLbSetting:"
        " {distribute: [{from: '*', to: {us: 100}}]}}"
    )
    assert priorities(policy) == {"1": 0, "2": 0, "3": 0, "4": 1, "5": 1}
    _, cluster, _ = translated(policy)
    assert cluster.zone_aware == ZoneAware(100.0, 3)
    assert not cluster.locality_weighted
    further = "loadBalancer: {zoneAwareLbSetting: {failover: [{from: eu, to: us}]}}, " + FAILS
    assert priorities(further) == {"1": 0, "2": 0, "3": 0, "4": 1, "5": 2}
    off = "loadBalancer: {zoneAwareLbSetting: {enabled: false}}, " + FAILS
    assert priorities(off) == {"1": 0, "2": 1, "3": 2, "4": 3, "5": 3}


def test_a_services_traffic_distribution_prefers_what_is_near_by_itself() -> None:
    """Without outlier detection; a DestinationRule's setting takes its place."""
    near = service().replace("spec: {", "spec: {trafficDistribution: PreferClose, ")
    assert priorities("", a_service=near) == {"1": 0, "2": 1, "3": 2, "4": 3, "5": 3}
    assert set(priorities(locality("{enabled: false}"), a_service=near).values()) == {0}
    annotated = service().replace(
        "namespace: default}",
        "namespace: default, annotations: {networking.istio.io/traffic-distribution: PreferClose}}",
    )
    assert priorities("", a_service=annotated)["4"] == 3


def test_endpoints_of_dns_have_their_priorities_in_the_cluster() -> None:
    """They come in no assignment; shares by locality have no place there."""
    entry = (
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: e}\n"
        "spec: {hosts: [x.e.com], ports: [{number: 80, name: http, protocol: HTTP}], resolution: DNS,"
        " endpoints: [{address: a.e.com, locality: us/a}, {address: b.e.com, locality: eu/a}]}\n"
    )

    def endpoints(policy: str) -> dict[str, int]:
        rule = destination_rule(f"{{host: x.e.com, trafficPolicy: {{{policy}}}}}")
        made = view(entry, rule, workloads=(), given=at())
        return {each.address: each.priority for each in made.snapshot.clusters[-1].endpoints}

    assert endpoints(FAILS) == {"b.e.com": 0, "a.e.com": 1}
    assert endpoints(locality("{distribute: [{from: eu, to: {us: 100}}]}")) == {"b.e.com": 0, "a.e.com": 0}


# Who has to be told apart


def test_callers_are_told_apart_by_place_only_where_it_counts() -> None:
    """Or a thousand nodes would have a view each."""
    plain = objects(service())
    assert view_key(plain, at(HERE)) == view_key(plain, at(Locality("us")))
    for policy in (
        FAILS,
        locality("{distribute: [{from: eu, to: {us: 100}}]}"),
        "loadBalancer: {zoneAwareLbSetting: {}}",
    ):
        counting = objects(service(), destination_rule(f"{{host: a, trafficPolicy: {{{policy}}}}}"))
        assert view_key(counting, at(HERE)) != view_key(counting, at(Locality("us"))), policy
    labelled = objects(
        service(), destination_rule(f"{{host: a, trafficPolicy: {{{locality('{failoverPriority: [rack]}')}}}}}")
    )
    assert view_key(labelled, at(rack="1")) != view_key(labelled, at(rack="2"))
    assert view_key(labelled, at(app="1")) == view_key(labelled, at(app="2"))


# What holds whatever is written

_locality = st.builds(Locality, st.sampled_from(("", "eu", "us")), st.sampled_from(("", "a", "b")))
_instances = st.lists(
    st.tuples(_locality, st.integers(1, 5), st.sampled_from(("1", "2"))).map(
        lambda each: Instance(Endpoint("10.0.0.1", 80, each[1], each[0]), {"rack": each[2]})
    ),
    max_size=8,
)
_shares = st.sampled_from(({"eu": 100}, {"eu/a": 40, "us": 60}, {"*": 100}, {"us/*": 1, "eu/b": 99}))
_rules = st.one_of(
    st.builds(
        Nearness,
        failover=st.sampled_from(((), (("eu", "us"),))),
        failover_priority=st.sampled_from(((), ("rack",), ("rack=2", "topology.kubernetes.io/region"))),
        regions_only=st.booleans(),
        is_weighted=st.booleans(),
    ),
    st.builds(
        lambda place, to: Nearness((r.Distribute(place, to),), is_weighted=True),
        st.sampled_from(("*", "eu", "us/a")),
        _shares,
    ),
)


@given(_rules, _instances, _locality)
def test_priorities_are_gapless_and_weights_cover_what_is_there(
    rule: Nearness, instances: list[Instance], mine: Locality
) -> None:
    """0 to n; no endpoint without its locality's weight; nobody is lost but by distribute."""
    endpoints, weights = seen_from(rule, instances, mine, {"rack": "1"})
    used = sorted({each.priority for each in endpoints})
    assert used == list(range(len(used)))
    assert len(endpoints) == len(instances) or rule.distribute
    if rule.is_weighted:
        places = {(each.priority, each.locality) for each in endpoints}
        assert places == {(each.priority, each.locality) for each in weights}
        assert all(each.weight > 0 for each in weights)
    else:
        assert weights == ()
