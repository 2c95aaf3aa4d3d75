"""Istio's semantics where a naive reading is wrong."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from views import PREFIX, WORKLOADS, decide, destination_rule, node, objects, service, view, virtual_service, weights

from meshlib.istio.translate import MeshSettings, translate, view_key
from meshlib.model import Forward, NodeKind, RouteMatch, Workload

A = "http://a:80/x"


TO_A = "[{route: [{destination: {host: a}}]}]"
TO_B = "[{route: [{destination: {host: b}}]}]"


def test_a_service_answers_to_all_its_names_and_the_short_one_only_at_home() -> None:
    """name, name.ns, name.ns.svc, and the whole, each with and without the port."""
    texts = (service(ports="[{name: http, port: 8000}]"),)
    home, abroad = view(*texts).snapshot, view(*texts, given=node("other")).snapshot
    for name in ("a.default", "a.default.svc", "a.default.svc.cluster.local"):
        for made in (home, abroad):
            assert weights(decide(made, f"http://{name}:8000/")) == {"a.default.svc.cluster.local": 1}
    assert weights(decide(home, "http://a:8000/")) == {"a.default.svc.cluster.local": 1}
    assert "a:8000" not in {listener.name for listener in abroad.listeners}


def test_a_rule_for_a_service_of_another_namespace_names_it_in_full() -> None:
    """A short name in a rule means the rule's own namespace."""
    texts = (service(), virtual_service(TO_A.replace("}]}]", "}], timeout: 1s}]"), namespace="other"))
    assert decide(view(*texts).snapshot, A).timeout is None


def test_one_virtual_service_has_a_host_and_the_other_is_told() -> None:
    """The older wins; without an age, the first by name. The caller's own namespace comes before."""
    young = virtual_service("[{route: [{destination: {host: a}}], timeout: 1s}]", name="a-young").replace(
        "{name: a-young,", "{name: a-young, creationTimestamp: '2026-02-01T00:00:00Z',"
    )
    old = virtual_service("[{route: [{destination: {host: a}}], timeout: 2s}]", name="b-old").replace(
        "{name: b-old,", "{name: b-old, creationTimestamp: '2026-01-01T00:00:00Z',"
    )
    made = view(service(), young, old)
    assert decide(made.snapshot, A).timeout == 2.0
    assert [(p.object, p.field) for p in made.problems] == [("VirtualService default/a-young", "spec.hosts[0]")]


def test_the_most_specific_wildcard_has_the_host() -> None:
    """*.default.svc.cluster.local over *.cluster.local; an exact host over both."""
    wide = virtual_service("[{route: [{destination: {host: a}}], timeout: 1s}]", name="w", hosts="['*.cluster.local']")
    near = virtual_service(
        "[{route: [{destination: {host: a}}], timeout: 2s}]", name="n", hosts="['*.default.svc.cluster.local']"
    )
    made = view(service(), service("b"), wide, near, virtual_service(TO_B, name="e", hosts="[b]"))
    assert decide(made.snapshot, A).timeout == 2.0
    assert decide(made.snapshot, "http://b:80/").timeout is None


def test_a_virtual_service_for_a_gateway_alone_leaves_the_mesh_alone() -> None:
    """`gateways` without `mesh`; a match may name the mesh by itself."""
    timed = "[{route: [{destination: {host: a}}], timeout: 1s}]"
    made = view(service(), virtual_service(timed, more="gateways: [public]"))
    assert decide(made.snapshot, A).timeout is None
    both = view(service(), virtual_service(timed, more="gateways: [public, mesh]"))
    assert decide(both.snapshot, A).timeout == 1.0


def test_what_follows_a_match_for_everything_is_dead() -> None:
    """As in Bookinfo's own fault-injection-details-v1."""
    made = view(service(), service("b"), virtual_service(TO_A[:-1] + "," + TO_B[1:]))
    assert weights(decide(made.snapshot, A)) == {"a.default.svc.cluster.local": 1}
    configuration = next(c for c in made.snapshot.route_configurations if c.name.startswith("outbound|80||a."))
    assert len(configuration.virtual_hosts[0].routes) == 1


def test_a_match_is_for_one_port_one_source_or_one_namespace() -> None:
    """Conditions on the caller are decided here; they never reach the wire."""
    rule = (
        "[{match: [{port: 81}], route: [{destination: {host: b}}]},"
        " {match: [{sourceLabels: {app: x}}], route: [{destination: {host: c}}]},"
        " {match: [{sourceNamespace: other}], route: [{destination: {host: b}}]},"
        " {route: [{destination: {host: a}}]}]"
    )
    texts = (service(ports="[{name: h, port: 80}, {name: g, port: 81}]"), service("b"), service("c"))
    made = view(*texts, virtual_service(rule)).snapshot
    assert weights(decide(made, "http://a:81/")) == {"b.default.svc.cluster.local": 1}
    assert "a.default.svc.cluster.local" in weights(decide(made, A))
    labelled = view(*texts, virtual_service(rule), given=node(app="x")).snapshot
    assert weights(decide(labelled, A)) == {"c.default.svc.cluster.local": 1}
    other = view(*texts, virtual_service(rule), given=node("other")).snapshot
    assert weights(decide(other, "http://a.default:80/")) == {"b.default.svc.cluster.local": 1}


def test_nodes_with_one_key_get_one_snapshot() -> None:
    """Labels that nothing asks for make no difference."""
    given_objects = objects(
        service(), virtual_service("[{match: [{sourceLabels: {app: x}}], route: [{destination: {host: a}}]}]")
    )
    one, two, three = node(app="x", version="v1"), node(app="x", version="v2"), node(app="y")
    assert view_key(given_objects, one) == view_key(given_objects, two)
    assert view_key(given_objects, one) != view_key(given_objects, three)
    assert translate(given_objects, WORKLOADS, one).snapshot == translate(given_objects, WORKLOADS, two).snapshot


def test_a_missing_host_or_subset_is_reported_and_answered_503() -> None:
    """Never a silent fallback to another version."""
    made = view(
        service(),
        virtual_service(
            "[{match: [{uri: {exact: /s}}], route: [{destination: {host: a, subset: v9}}]},"
            " {route: [{destination: {host: nowhere}}]}]"
        ),
    )
    assert {(p.field, p.reason.split(" ")[0]) for p in made.problems} == {
        ("spec.http[0].route[0].destination.subset", "no"),
        ("spec.http[1].route[0].destination.host", "no"),
    }
    names = {cluster.name for cluster in made.snapshot.clusters}
    decision = decide(made.snapshot, "http://a:80/s")
    assert isinstance(decision.action, Forward)
    assert decision.action.clusters[0].cluster == "outbound|80|v9|a.default.svc.cluster.local"
    assert decision.action.clusters[0].cluster not in names


def test_a_ports_own_settings_replace_the_policy_whole() -> None:
    """A block left out has its default, not the policy's."""
    spec = (
        "{host: a, trafficPolicy: {loadBalancer: {simple: RANDOM}, outlierDetection: {consecutive5xxErrors: 3},"
        " portLevelSettings: [{port: {number: 81}, loadBalancer: {simple: ROUND_ROBIN}}]}}"
    )
    made = view(
        service(ports="[{name: h, port: 80}, {name: g, port: 81}]"), destination_rule(spec), workloads=()
    ).snapshot
    policies = {
        c.name.split("|")[1]: (str(c.load_balancing), c.outlier_detection is not None)
        for c in made.clusters
        if c.service
    }
    assert policies == {"80": ("RANDOM", True), "81": ("ROUND_ROBIN", False)}


def test_a_subset_overrides_block_by_block() -> None:
    """What it leaves out is the rule's."""
    spec = (
        "{host: a, trafficPolicy: {loadBalancer: {simple: RANDOM}, connectionPool: {tcp: {maxConnections: 7}}},"
        " subsets: [{name: v1, labels: {version: v1}, trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}}]}"
    )
    made = view(service(), destination_rule(spec)).snapshot
    subset = next(c for c in made.clusters if c.subset == "v1")
    assert (str(subset.load_balancing), subset.limits.max_connections) == ("ROUND_ROBIN", 7)


def test_the_clients_namespace_decides_which_destination_rule_holds() -> None:
    """Then the service's, then the root's; the first that has any is it, and nothing is merged across."""

    def rule(name: str, namespace: str, balancing: str) -> str:
        host = "a.default.svc.cluster.local"
        return destination_rule(
            f"{{host: {host}, trafficPolicy: {{loadBalancer: {{simple: {balancing}}}}}}}",
            name=name,
            namespace=namespace,
        )

    texts = [service(), rule("c", "client", "RANDOM"), rule("s", "default", "ROUND_ROBIN")]
    root = rule("r", "istio-system", "ROUND_ROBIN")

    def balancing(namespace: str, *given_texts: str) -> str:
        made = view(*given_texts, given=node(namespace)).snapshot
        return str(next(c for c in made.clusters if c.service).load_balancing)

    assert balancing("client", *texts) == "RANDOM"
    assert balancing("elsewhere", *texts) == "ROUND_ROBIN"
    assert balancing("elsewhere", service(), root) == "ROUND_ROBIN"
    assert balancing("elsewhere", service()) == "LEAST_REQUEST"


def test_several_rules_for_one_host_add_their_subsets() -> None:
    """A subset named twice: the first has it."""
    one = destination_rule("{host: a, subsets: [{name: v1, labels: {version: v1}}]}", name="one")
    two = destination_rule(
        "{host: a, subsets: [{name: v1, labels: {version: x}}, {name: v2, labels: {version: v2}}]}", name="two"
    )
    workloads = tuple(
        Workload(f"a-{v}", service="a", labels=(("version", v),), address="10.0.0.1", port=i)
        for i, v in enumerate(("v1", "v2"), 1)
    )
    made = view(service(), one, two, workloads=workloads).snapshot
    found = {each.cluster.split("|")[2]: [e.workload for e in each.endpoints] for each in made.assignments}
    assert found == {"": ["a-v1", "a-v2"], "v1": ["a-v1"], "v2": ["a-v2"]}


def test_export_to_hides() -> None:
    """A service, a rule and a policy that are private to another namespace are not there."""
    hidden = virtual_service(
        "[{route: [{destination: {host: a}}], timeout: 1s}]",
        hosts="[a.default.svc.cluster.local]",
        namespace="other",
        more="exportTo: ['.']",
    )
    assert decide(view(service(), hidden).snapshot, A).timeout is None
    assert decide(view(service(), hidden, given=node("other")).snapshot, "http://a.default:80/").timeout == 1.0


def test_workloads_make_a_service_where_no_object_does() -> None:
    """Outside Kubernetes nobody writes Services: name and port come from who registered."""
    made = view().snapshot
    assert weights(decide(made, "http://ratings:9005/")) == {"ratings.default.svc.cluster.local": 1}
    assert [e.port for each in made.assignments if "ratings" in each.cluster for e in each.endpoints] == [9005]


def test_a_workload_joins_by_name_or_by_selector() -> None:
    """A service it names, or every service whose selector fits if it names none."""
    by_label = Workload("x", labels=(("app", "a"),), address="10.0.0.1", port=8000)
    by_name = Workload("y", service="a", address="10.0.0.2", port=8000)
    elsewhere = Workload("z", "other", service="a", address="10.0.0.3", port=8000)
    made = view(service(), workloads=(by_label, by_name, elsewhere)).snapshot
    endpoints = next(a for a in made.assignments if a.cluster == "outbound|80||a.default.svc.cluster.local").endpoints
    assert [str(endpoint) for endpoint in endpoints] == ["10.0.0.1:8000", "10.0.0.2:8000"]


def test_kubernetes_own_endpoints_are_used() -> None:
    """EndpointSlices with their conditions, and labels from the pods they name."""
    slices = """
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: a-1, labels: {kubernetes.io/service-name: a}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.1.0.1], conditions: {ready: true}, targetRef: {kind: Pod, name: p1}}
- {addresses: [10.1.0.2], conditions: {ready: false}}
- {addresses: [10.1.0.3], conditions: {ready: false, serving: true, terminating: true}}
---
apiVersion: v1
kind: Pod
metadata: {name: p1, labels: {version: v1}}
status: {podIP: 10.1.0.1}
"""
    rule = destination_rule("{host: a, subsets: [{name: v1, labels: {version: v1}}]}")
    made = view(service(), slices, rule, workloads=()).snapshot
    found = {a.cluster.split("|")[2]: [(str(e), str(e.health)) for e in a.endpoints] for a in made.assignments}
    assert found[""] == [("10.1.0.1:8080", "HEALTHY"), ("10.1.0.3:8080", "DRAINING")]
    assert found["v1"] == [("10.1.0.1:8080", "HEALTHY")]


def test_pods_serve_where_nothing_else_says_who_does() -> None:
    """By selector, when ready, on the container port that the Service's targetPort names."""
    pods = "".join(
        f"""
apiVersion: v1
kind: Pod
metadata: {{name: p{number}, labels: {{app: a}}}}
spec: {{containers: [{{ports: [{{name: web, containerPort: 8080}}]}}]}}
status: {{podIP: 10.1.0.{number}, conditions: [{{type: Ready, status: "{ready}"}}]}}
---
"""
        for number, ready in ((1, "True"), (2, "False"))
    )
    made = view(service(ports="[{name: http, port: 80, targetPort: web}]"), pods, workloads=()).snapshot
    assert [str(e) for a in made.assignments for e in a.endpoints] == ["10.1.0.1:8080"]


def test_unknown_hosts_pass_or_are_blocked() -> None:
    """outboundTrafficPolicy, from MeshConfig in its ConfigMap."""
    assert weights_of_unknown(view()) == "PassthroughCluster"
    config = (
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\n"
        'data: {mesh: "outboundTrafficPolicy: {mode: REGISTRY_ONLY}"}\n'
    )
    blocked = decide(view(config).snapshot, "http://stranger/")
    assert getattr(blocked.action, "status", None) == 502
    also = decide(view(settings=MeshSettings(registry_only=True)).snapshot, "http://stranger/")
    assert getattr(also.action, "status", None) == 502


def weights_of_unknown(made: object) -> str:
    decision = decide(made.snapshot, "http://stranger/")  # type: ignore[attr-defined]
    assert isinstance(decision.action, Forward)
    return decision.action.clusters[0].cluster


def test_a_virtual_service_may_give_a_host_that_no_service_has() -> None:
    """It exists on port 80 then."""
    made = view(service(), virtual_service(TO_A, hosts="[api.internal]"))
    assert weights(decide(made.snapshot, "http://api.internal/")) == {"a.default.svc.cluster.local": 1}


def test_a_gateways_servers_become_listeners() -> None:
    """TLS by SNI in chains of their own, redirects to https, hosts where both sides meet."""
    gateway = f"""{PREFIX}kind: Gateway
metadata: {{name: g}}
spec:
  selector: {{istio: ingressgateway}}
  servers:
  - port: {{number: 80, name: http, protocol: HTTP}}
    hosts: ["*.example.com"]
    tls: {{httpsRedirect: true}}
  - port: {{number: 443, name: https-a, protocol: HTTPS}}
    hosts: [a.example.com]
    tls: {{mode: SIMPLE, serverCertificate: /c.pem, privateKey: /k.pem}}
  - port: {{number: 443, name: https-b, protocol: HTTPS}}
    hosts: ["./b.example.com"]
    tls: {{mode: SIMPLE, serverCertificate: /c.pem, privateKey: /k.pem}}
"""
    rule = virtual_service(TO_A, hosts="[a.example.com]", more="gateways: [g]")
    foreign = virtual_service(
        TO_A.replace("host: a", "host: a.default.svc.cluster.local"),
        name="f",
        namespace="other",
        hosts="[b.example.com]",
        more="gateways: [default/g]",
    )
    made = view(service(), gateway, rule, foreign, given=node(kind=NodeKind.ROUTER, istio="ingressgateway")).snapshot
    listeners = {listener.name: listener for listener in made.listeners}
    assert set(listeners) == {"0.0.0.0_80", "0.0.0.0_443"}
    assert [chain.server_names for chain in listeners["0.0.0.0_443"].filter_chains] == [
        ("a.example.com",),
        ("b.example.com",),
    ]
    hosts = {c.name: {h.domains[0]: h for h in c.virtual_hosts} for c in made.route_configurations}
    assert hosts["http.80"]["a.example.com"].require_tls
    assert hosts["http.80"]["*.example.com"].require_tls
    assert set(hosts["https.443.https-a.g.default"]) == {"a.example.com"}
    assert hosts["https.443.https-b.g.default"] == {}  # ./ admits VirtualServices of the gateway's own namespace only


def test_virtual_services_of_one_gateway_host_are_merged() -> None:
    """Routes that take everything come last, whichever object they are in."""
    gateway = f"""{PREFIX}kind: Gateway
metadata: {{name: g}}
spec:
  servers:
  - port: {{number: 80, name: http, protocol: HTTP}}
    hosts: ["*"]
"""
    everything = virtual_service(TO_A, name="a-all", hosts="[x.example]", more="gateways: [g]")
    part = virtual_service(
        "[{match: [{uri: {prefix: /b}}], route: [{destination: {host: b}}]}]",
        name="b-part",
        hosts="[x.example]",
        more="gateways: [g]",
    )
    made = view(service(), service("b"), gateway, everything, part, given=node(kind=NodeKind.ROUTER)).snapshot
    (host,) = made.route_configurations[0].virtual_hosts
    assert [route.match == RouteMatch() for route in host.routes] == [False, True]
    assert host.domains == ("x.example", "x.example:*")


PIECES = [
    service(),
    service("b"),
    service("b", "other"),
    destination_rule("{host: a, subsets: [{name: v1, labels: {version: v1}}]}"),
    destination_rule("{host: '*.cluster.local', trafficPolicy: {loadBalancer: {simple: RANDOM}}}", name="w"),
    virtual_service(TO_A),
    virtual_service(TO_B, name="second"),
    virtual_service(TO_B, name="other", hosts="['*.local']", more="gateways: [mesh, g]"),
    f"{PREFIX}kind: ServiceEntry\nmetadata: {{name: se}}\nspec: {{hosts: ['*.e.com', b], resolution: NONE, "
    "ports: [{number: 443, name: tls, protocol: HTTPS}]}\n",
    f"{PREFIX}kind: Gateway\nmetadata: {{name: g}}\nspec: {{servers: [{{port: {{number: 80, name: h, protocol: HTTP}},"
    " hosts: ['*']}]}\n",
]


@given(
    st.lists(st.sampled_from(range(len(PIECES))), unique=True),
    st.sampled_from(list(itertools.product(NodeKind, ("default", "other")))),
    st.sets(st.sampled_from(WORKLOADS)),
)
def test_whatever_is_combined_the_snapshot_is_consistent_and_its_order_does_not_matter(
    chosen: list[int], kind_and_namespace: tuple[NodeKind, str], running: set[Workload]
) -> None:
    """Pure and deterministic."""
    kind, namespace = kind_and_namespace
    found = objects(*(PIECES[index] for index in chosen))
    made = translate(found, running, node(namespace, kind))
    assert made.snapshot.inconsistencies() == ()
    assert translate(list(reversed(found)), running, node(namespace, kind)) == made
