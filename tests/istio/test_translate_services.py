"""Which services a node sees, and who serves them."""

from __future__ import annotations

import pytest
from views import decide, destination_rule, node, service, view, virtual_service, weights

from meshlib.istio.services import Registry
from meshlib.model import ClusterType, Forward, LoadAssignment, NodeKind, Snapshot, Workload

ENTRY = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n"


def entry(spec: str, *, name: str = "se", namespace: str = "default") -> str:
    return f"{ENTRY}metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"


def addresses(snapshot: Snapshot) -> dict[str, list[str]]:
    """{"outbound|80||a...": ["10.0.0.1:80"]}, of assignments and of clusters that hold their endpoints."""
    found = {each.cluster: [str(e) for e in each.endpoints] for each in snapshot.assignments}
    return found | {c.name: [str(e) for e in c.endpoints] for c in snapshot.clusters if c.endpoints}


def slice_of(name: str, ports: str, address: str, service: str = "a") -> str:
    return (
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n"
        f"metadata: {{name: {name}, labels: {{kubernetes.io/service-name: {service}}}}}\n"
        f"ports: {ports}\nendpoints: [{{addresses: [{address}]}}]\n"
    )


def test_a_service_without_endpoints_and_a_subset_without_members_are_there_and_empty() -> None:
    """Envoy waits for ever for an assignment that never comes; an empty one answers 503 UH at once."""
    rule = destination_rule("{host: a, subsets: [{name: v1, labels: {version: v1}}]}")
    made = view(service(), rule, workloads=()).snapshot
    host = "a.default.svc.cluster.local"
    assert made.assignments == (LoadAssignment(f"outbound|80|v1|{host}"), LoadAssignment(f"outbound|80||{host}"))


def test_a_private_service_hides_no_other_of_its_name() -> None:
    """What is not exported to a namespace is not there for it, and takes no host from what is."""
    private = entry(
        "{hosts: [api.e.com], exportTo: ['.'], resolution: STATIC, ports: [{number: 80, name: http, protocol: HTTP}],"
        " endpoints: [{address: 10.0.0.1}]}",
        namespace="aaa",
    )
    public = entry(
        "{hosts: [api.e.com], resolution: STATIC, ports: [{number: 80, name: http, protocol: HTTP}],"
        " endpoints: [{address: 10.0.0.2}]}",
        namespace="bbb",
    )
    name = "outbound|80||api.e.com"
    assert addresses(view(private, public, workloads=()).snapshot)[name] == ["10.0.0.2:80"]
    assert addresses(view(private, public, workloads=(), given=node("aaa")).snapshot)[name] == ["10.0.0.1:80"]


def test_of_two_services_of_one_host_the_callers_own_comes_first() -> None:
    """Both are public; each namespace calls its own, all others the first."""
    texts = [
        entry(
            f"{{hosts: [api.e.com], resolution: STATIC, ports: [{{number: 80, name: http, protocol: HTTP}}],"
            f" endpoints: [{{address: 10.0.0.{number}}}]}}",
            namespace=namespace,
        )
        for number, namespace in enumerate(("aaa", "bbb"), 1)
    ]
    found = {
        namespace: addresses(view(*texts, workloads=(), given=node(namespace)).snapshot)["outbound|80||api.e.com"]
        for namespace in ("aaa", "bbb", "ccc")
    }
    assert found == {"aaa": ["10.0.0.1:80"], "bbb": ["10.0.0.2:80"], "ccc": ["10.0.0.1:80"]}


def test_service_entries_of_one_host_and_namespace_are_one_service() -> None:
    """Ports of both; a port that both have has the endpoints of both."""
    made = view(
        entry(
            "{hosts: [e.com], resolution: STATIC, ports: [{number: 80, name: http, protocol: HTTP}],"
            " endpoints: [{address: 10.0.0.1}]}",
            name="one",
        ),
        entry(
            "{hosts: [e.com], resolution: STATIC, endpoints: [{address: 10.0.0.2}], ports:"
            " [{number: 80, name: http, protocol: HTTP}, {number: 443, name: https, protocol: HTTPS}]}",
            name="two",
        ),
        workloads=(),
    ).snapshot
    assert addresses(made) == {
        "outbound|80||e.com": ["10.0.0.1:80", "10.0.0.2:80"],
        "outbound|443||e.com": ["10.0.0.2:443"],
    }


@pytest.mark.parametrize(
    ("spec", "kind", "endpoints"),
    [
        ("resolution: NONE", ClusterType.ORIGINAL_DST, None),
        ("resolution: DNS", ClusterType.STRICT_DNS, ["e.com:8443"]),
        ("resolution: DNS_ROUND_ROBIN", ClusterType.LOGICAL_DNS, ["e.com:8443"]),
        ("resolution: DNS, endpoints: [{address: x.e.com}]", ClusterType.STRICT_DNS, ["x.e.com:8443"]),
        (
            "resolution: STATIC, endpoints: [{address: 10.0.0.1, ports: {web: 9}}, {address: '2001:db8::1'}]",
            ClusterType.EDS,
            ["10.0.0.1:9", "[2001:db8::1]:8443"],
        ),
    ],
)
def test_a_service_entrys_resolution_decides_where_its_endpoints_come_from(
    spec: str, kind: ClusterType, endpoints: list[str] | None
) -> None:
    """targetPort is the endpoints' port unless an endpoint says otherwise."""
    ports = "ports: [{number: 443, name: web, protocol: HTTPS, targetPort: 8443}]"
    made = view(entry(f"{{hosts: [e.com], {ports}, {spec}}}"), workloads=()).snapshot
    (cluster,) = (each for each in made.clusters if each.service)
    assert cluster.type is kind
    assert addresses(made).get("outbound|443||e.com") == endpoints


def test_a_wildcard_service_entry_serves_every_host_below_it() -> None:
    """And no other; its listener bears the wildcard, for the control plane to rename."""
    text = entry("{hosts: ['*.e.com'], resolution: NONE, ports: [{number: 443, name: tls, protocol: TLS}]}")
    made = view(text).snapshot
    assert "*.e.com:443" in {listener.name for listener in made.listeners}
    assert weights(decide(made, "https://a.b.e.com/")) == {"*.e.com": 1}
    stranger = decide(made, "https://e.com/").action
    assert isinstance(stranger, Forward)
    assert stranger.clusters[0].cluster == "PassthroughCluster"


def test_a_tls_host_of_the_registry_may_be_called_where_strangers_may_not() -> None:
    """Istio's own example of REGISTRY_ONLY: the ServiceEntry says TLS, the caller of this library speaks HTTP in it."""
    config = (
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\n"
        'data: {mesh: "outboundTrafficPolicy: {mode: REGISTRY_ONLY}"}\n'
    )
    text = entry("{hosts: [e.com], resolution: DNS, ports: [{number: 443, name: tls, protocol: TLS}]}")
    made = view(config, text).snapshot
    assert weights(decide(made, "https://e.com/")) == {"e.com": 1}
    assert getattr(decide(made, "https://other.com/").action, "status", None) == 502


def test_a_service_answers_to_its_cluster_ip() -> None:
    """A caller may have looked the name up itself."""
    text = service().replace("spec: {", "spec: {clusterIP: 10.96.0.7, ")
    made = view(text).snapshot
    assert weights(decide(made, "http://10.96.0.7/")) == {"a.default.svc.cluster.local": 1}
    headless = view(service().replace("spec: {", "spec: {clusterIP: None, ")).snapshot
    assert not any(listener.name.startswith("None") for listener in headless.listeners)


def test_an_external_name_is_looked_up() -> None:
    """A Service of type ExternalName."""
    text = service().replace("spec: {", "spec: {type: ExternalName, externalName: db.e.com, ")
    made = view(text, workloads=()).snapshot
    (cluster,) = (each for each in made.clusters if each.service)
    assert cluster.type is ClusterType.STRICT_DNS
    assert addresses(made) == {cluster.name: ["db.e.com:80"]}


def test_endpoints_belong_to_the_port_whose_name_they_bear() -> None:
    """One slice for each port: neither answers for the other."""
    two = service(ports="[{name: http, port: 80}, {name: admin, port: 81}]")
    made = view(
        two,
        slice_of("a-1", "[{name: http, port: 8080}]", "10.0.0.1"),
        slice_of("a-2", "[{name: admin, port: 8081}]", "10.0.0.2"),
        workloads=(),
    ).snapshot
    host = "a.default.svc.cluster.local"
    assert addresses(made) == {f"outbound|80||{host}": ["10.0.0.1:8080"], f"outbound|81||{host}": ["10.0.0.2:8081"]}


def test_the_one_port_of_a_service_needs_no_name() -> None:
    """Kubernetes lets a single port be nameless."""
    made = view(service(), slice_of("a-1", "[{port: 8080}]", "10.0.0.1"), workloads=()).snapshot
    assert list(addresses(made).values()) == [["10.0.0.1:8080"]]


def test_endpoints_objects_serve_where_no_slice_does() -> None:
    """A slice says it better, so Endpoints are not looked at beside one."""
    endpoints = (
        "apiVersion: v1\nkind: Endpoints\nmetadata: {name: a}\n"
        "subsets: [{addresses: [{ip: 10.0.0.9}], ports: [{name: http, port: 8080}]}]\n"
    )
    assert list(addresses(view(service(), endpoints, workloads=()).snapshot).values()) == [["10.0.0.9:8080"]]
    both = view(service(), endpoints, slice_of("a-1", "[{port: 8080}]", "10.0.0.1"), workloads=()).snapshot
    assert list(addresses(both).values()) == [["10.0.0.1:8080"]]


def test_a_pod_that_leaves_or_is_done_serves_nothing() -> None:
    """deletionTimestamp, and phases without a future."""
    pods = "---\n".join(
        f"apiVersion: v1\nkind: Pod\nmetadata: {{name: p{number}, labels: {{app: a}}{more}}}\n"
        f"status: {{podIP: 10.1.0.{number}, phase: {phase}}}\n"
        for number, (more, phase) in enumerate(
            [("", "Running"), (", deletionTimestamp: '2026-01-01T00:00:00Z'", "Running"), ("", "Succeeded")], 1
        )
    )
    assert list(addresses(view(service(), pods, workloads=()).snapshot).values()) == [["10.1.0.1:80"]]


def test_a_registered_workload_joins_only_services_of_its_own_namespace() -> None:
    """Nobody becomes an endpoint of another namespace's service by naming it."""
    intruder = Workload("x", "other", service="a.default.svc.cluster.local", address="10.0.0.1", port=80)
    made = view(service(), workloads=(intruder,)).snapshot
    assert addresses(made) == {"outbound|80||a.default.svc.cluster.local": []}


def test_a_workload_without_a_service_object_serves_all_its_ports() -> None:
    """Those it names, and the one it does not; names decide the protocol."""
    workload = Workload("x", service="x", address="10.0.0.1", port=8080, port_names=(("grpc-api", 9090),))
    made = view(workloads=(workload,)).snapshot
    host = "x.default.svc.cluster.local"
    assert addresses(made) == {f"outbound|8080||{host}": ["10.0.0.1:8080"], f"outbound|9090||{host}": ["10.0.0.1:9090"]}
    assert {c.name.split("|")[1]: c.http2 for c in made.clusters if c.service} == {"8080": False, "9090": True}


def test_a_kind_of_another_api_group_is_no_service() -> None:
    """Knative has a Service too; it means nothing here, and does no harm."""
    knative = "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: a}\nspec: {template: {}}\n"
    gateway_api = (
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: g}\nspec: {gatewayClassName: x}\n"
    )
    for kind in NodeKind:
        assert view(knative, gateway_api, workloads=(), given=node(kind=kind)).problems == ()


def test_a_rule_may_name_an_ip_address_and_a_host_of_the_search_path() -> None:
    """Hosts that no service has answer to every form of their name."""
    rule = virtual_service("[{route: [{destination: {host: a}}], timeout: 1s}]", hosts="['10.9.9.9', '::1', ghost]")
    made = view(service(), rule).snapshot
    for url in ("http://10.9.9.9/", "http://[::1]/", "http://ghost/", "http://ghost.default.svc/"):
        assert decide(made, url).timeout == 1.0


def test_a_host_that_no_service_has_stands_on_the_ports_of_those_beside_it() -> None:
    """On port 80 only where its VirtualService is for no service."""
    rule = virtual_service("[{route: [{destination: {host: a}}], timeout: 1s}]", hosts="[a, alias.e.com]")
    made = view(service(ports="[{name: http, port: 9080}]"), rule).snapshot
    assert decide(made, "http://alias.e.com:9080/").timeout == 1.0
    assert "alias.e.com:80" not in {listener.name for listener in made.listeners}


def test_a_thousand_endpoints_are_found_by_label() -> None:
    """A selector of several labels means all of them."""
    workloads = tuple(
        Workload(
            "x", labels=(("app", "a"), ("number", str(number % 7))), address=f"10.0.{number // 250}.1", port=number
        )
        for number in range(1, 1001)
    )
    text = service().replace("{app: a}", "{app: a, number: '3'}")
    found = list(addresses(view(text, workloads=workloads).snapshot).values())
    assert [len(each) for each in found] == [sum(number % 7 == 3 for number in range(1, 1001))]


def test_a_registry_names_each_service_once() -> None:
    """For those who list what there is."""
    registry = Registry((), (Workload("x", service="x", address="10.0.0.1", port=1),))
    assert [each.host for each in registry.services.values()] == ["x.default.svc.cluster.local"]
