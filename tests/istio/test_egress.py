"""Calls to the outside: where each resolution leads, over what, and under which name."""

from __future__ import annotations

from pathlib import Path

import pytest
from views import BOOKINFO, PREFIX, decide, destination_rule, node, service, view, weights

from meshlib.istio.translate import Translation
from meshlib.model import Cluster, ClusterType, Endpoint, Forward, LoadAssignment, Locality, UpstreamTls, Workload

NETWORKING = BOOKINFO / "networking"
HTTP = "ports: [{number: 80, name: http, protocol: HTTP}]"


def entry(spec: str, *, name: str = "e", namespace: str = "default") -> str:
    return f"{PREFIX}kind: ServiceEntry\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"


def workload_entry(spec: str, *, name: str = "vm", namespace: str = "default", labels: str = "{}") -> str:
    return (
        f"{PREFIX}kind: WorkloadEntry\nmetadata: {{name: {name}, namespace: {namespace}, labels: {labels}}}\n"
        f"spec: {{{spec}}}\n"
    )


def only(made: Translation) -> Cluster:
    (found,) = (each for each in made.snapshot.clusters if each.service is not None)
    return found


def assigned(made: Translation) -> list[Endpoint]:
    (found,) = made.snapshot.assignments
    assert isinstance(found, LoadAssignment)
    return list(found.endpoints)


# Resolutions


@pytest.mark.parametrize(
    ("spec", "kind", "endpoints"),
    [
        ("hosts: [x.e.com], resolution: NONE", ClusterType.ORIGINAL_DST, ()),
        ("hosts: ['*.e.com']", ClusterType.ORIGINAL_DST, ()),
        ("hosts: ['*.e.com'], resolution: DYNAMIC_DNS", ClusterType.ORIGINAL_DST, ()),
        ("hosts: [x.e.com], resolution: DNS", ClusterType.STRICT_DNS, (Endpoint("x.e.com", 80),)),
        (
            "hosts: [x.e.com], resolution: DNS, endpoints: [{address: a.e.com}, {address: b.e.com, ports: {http: 81}}]",
            ClusterType.STRICT_DNS,
            (Endpoint("a.e.com", 80), Endpoint("b.e.com", 81)),
        ),
        ("hosts: [x.e.com], resolution: DNS_ROUND_ROBIN", ClusterType.LOGICAL_DNS, (Endpoint("x.e.com", 80),)),
        (
            "hosts: ['*.e.com'], resolution: DNS, endpoints: [{address: a.e.com}]",
            ClusterType.STRICT_DNS,
            (Endpoint("a.e.com", 80),),
        ),
    ],
)
def test_each_resolution_has_its_kind_of_cluster(spec: str, kind: ClusterType, endpoints: tuple[Endpoint, ...]) -> None:
    """Names are looked up by the client; a name nobody can look up goes where the caller says."""
    found = only(view(entry(f"{spec}, {HTTP}"), workloads=()))
    assert (found.type, found.endpoints) == (kind, endpoints)


def test_static_endpoints_come_as_every_services() -> None:
    """With weight and place."""
    spec = (
        f"hosts: [x.e.com], resolution: STATIC, {HTTP}, endpoints: [{{address: 10.0.0.2, weight: 3,"
        " locality: eu/a/1, ports: {http: 8080}}, {address: 10.0.0.1}]"
    )
    made = view(entry(spec), workloads=())
    assert only(made).type is ClusterType.EDS
    assert assigned(made) == [Endpoint("10.0.0.1", 80), Endpoint("10.0.0.2", 8080, 3, Locality("eu", "a", "1"))]


def test_a_wildcard_answers_for_every_name_below_it() -> None:
    """And not for its own domain."""
    made = view(entry(f"hosts: ['*.e.com'], {HTTP}"), workloads=()).snapshot
    assert weights(decide(made, "http://a.e.com:80/")) == {"*.e.com": 1}
    assert {listener.name for listener in made.listeners} == {"*.e.com:80", "*"}


def test_an_entry_is_for_those_it_is_exported_to() -> None:
    """`.` is its own namespace."""
    text = entry(f"hosts: [x.e.com], resolution: DNS, {HTTP}, exportTo: ['.']")
    assert {each.name for each in view(text, workloads=()).snapshot.listeners} == {"x.e.com:80", "*"}
    assert {each.name for each in view(text, workloads=(), given=node("other")).snapshot.listeners} == {"*"}


# Servers that are no part of the mesh


def test_workload_entries_are_chosen_by_label() -> None:
    """The object's own labels count as well; ports go by name, then by the target, then by the number."""
    text = entry(
        "hosts: [x.e.com], resolution: STATIC, workloadSelector: {labels: {app: x}},"
        " ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8000}]"
    )
    made = view(
        text,
        workload_entry("address: 10.0.0.1, labels: {app: x}, ports: {http: 9000}", name="one"),
        workload_entry("address: 10.0.0.2, locality: eu/a, weight: 2", name="two", labels="{app: x}"),
        workload_entry("address: 10.0.0.3, labels: {app: y}", name="three"),
        workload_entry("address: 10.0.0.4, labels: {app: x}", name="four", namespace="other"),
        workloads=(Workload("w", labels=(("app", "x"),), address="10.0.0.5", port=8001),),
    )
    assert assigned(made) == [
        Endpoint("10.0.0.1", 9000, workload="one"),
        Endpoint("10.0.0.2", 8000, 2, Locality("eu", "a"), workload="two"),
        Endpoint("10.0.0.5", 8001, workload="w", peer="default;x;latest;Kubernetes;x;"),
    ]


def test_a_service_takes_workload_entries_in_beside_its_pods() -> None:
    """A virtual machine on its way into Kubernetes; subsets choose by its labels."""
    rule = destination_rule("{host: a, subsets: [{name: old, labels: {version: old}}]}")
    made = view(service(), rule, workload_entry("address: 10.0.0.1, labels: {app: a, version: old}"), workloads=())
    assert [len(each.endpoints) for each in made.snapshot.assignments] == [1, 1]


def test_an_address_that_is_a_name_needs_dns() -> None:
    """In a service of resolution STATIC it is left out, and named; an Envoy would refuse the whole service."""
    selector = "workloadSelector: {labels: {app: x}}"
    vm = workload_entry("address: vm.e.com, labels: {app: x}")
    by_name = view(entry(f"hosts: [x.e.com], resolution: DNS, {selector}, {HTTP}"), vm, workloads=())
    assert only(by_name).endpoints == (Endpoint("vm.e.com", 80, workload="vm"),)
    static = view(entry(f"hosts: [x.e.com], resolution: STATIC, {selector}, {HTTP}"), vm, workloads=())
    assert assigned(static) == []
    (problem,) = static.problems
    assert (problem.object, problem.field) == ("WorkloadEntry default/vm", "spec.address")
    assert "ServiceEntry default/e" in problem.reason


# TLS origination


def test_bookinfos_egress_sample_speaks_tls_to_another_port() -> None:
    """http to port 80, a route to 443, TLS there; the Host stays the name, and so does the SNI name."""
    made = view(text(NETWORKING / "egress-rule-google-apis.yaml"), workloads=()).snapshot
    decision = decide(made, "http://www.googleapis.com/books/v1")
    assert isinstance(decision.action, Forward)
    (chosen,) = decision.action.clusters
    assert chosen.cluster == "outbound|443||www.googleapis.com"
    assert (chosen.authority, decision.action.rewrite) == (None, None)
    clusters = {each.name: each for each in made.clusters}
    assert clusters[chosen.cluster].tls == UpstreamTls("SIMPLE")
    assert clusters[chosen.cluster].endpoints == (Endpoint("www.googleapis.com", 443),)
    assert clusters["outbound|80||www.googleapis.com"].tls is None


def test_a_target_port_and_tls_need_no_route() -> None:
    """The shorter way of Istio's task: port 80 to callers, 443 to the server."""
    made = view(text(NETWORKING / "egress-tls-origination.yaml"), workloads=())
    found = only(made)
    assert (found.tls, found.endpoints) == (UpstreamTls("SIMPLE"), (Endpoint("example.com", 443),))


def test_the_names_of_an_entry_are_checked_under_tls() -> None:
    """Unless the DestinationRule names others, or says that nothing is checked."""
    named = entry(f"hosts: [x.e.com], resolution: DNS, {HTTP}, subjectAltNames: ['spiffe://e/x']")

    def names(tls: str) -> tuple[str, ...]:
        rule = destination_rule(f"{{host: x.e.com, trafficPolicy: {{tls: {{{tls}}}}}}}")
        found = only(view(named, rule, workloads=())).tls
        assert found is not None
        return found.subject_alt_names

    assert names("mode: SIMPLE") == ("spiffe://e/x",)
    assert names("mode: SIMPLE, subjectAltNames: [y.e.com]") == ("y.e.com",)
    assert names("mode: SIMPLE, insecureSkipVerify: true") == ()


def text(file: Path) -> str:
    return file.read_text()
