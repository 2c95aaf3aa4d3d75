"""What holds for a translation whatever is written: it ends, it is consistent, and only its inputs count."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from views import destination_rule, node, objects, service, virtual_service

from meshlib.istio.parse import parse_text
from meshlib.istio.resources import Object
from meshlib.istio.translate import translate, view_key
from meshlib.model import Endpoint, Forward, Locality, Node, NodeKind, Snapshot, Workload
from meshlib.policy.live import compile_live
from meshlib.xds.decode import decode_resource
from snapshots import resources_of

NAMES, NAMESPACES = ("a", "b"), ("default", "other", "istio-system")
HOSTS = ("a", "b", "a.default.svc.cluster.local", "*.default.svc.cluster.local", "*", "x.e.com", "*.e.com", "10.0.0.1")
name, namespace = st.sampled_from(NAMES), st.sampled_from(NAMESPACES)
labels = st.dictionaries(st.sampled_from(("app", "version")), st.sampled_from(("x", "y")), max_size=2)
port = st.sampled_from((80, 81, 9080))
export = st.sampled_from(([], ["."], ["*"], ["~"], ["other"]))


def flow(value: object) -> str:
    """YAML's flow style is JSON's, but for the quotes that it lets one leave out."""

    return json.dumps(value)


@st.composite
def a_service(draw: st.DrawFn) -> str:
    ports = [{"name": f"{kind}-{number}", "port": number} for number, kind in draw(_ports).items()]
    return service(draw(name), draw(namespace), flow(ports)).replace("selector:", "clusterIP: 10.9.9.9, selector:")


_ports = st.dictionaries(port, st.sampled_from(("http", "grpc", "tls", "mysql")), min_size=1)
_destination = st.fixed_dictionaries(
    {"host": st.sampled_from([host for host in HOSTS if "*" not in host])},
    optional={"subset": st.sampled_from(("v1", "v2")), "port": st.fixed_dictionaries({"number": port})},
)
_match = st.fixed_dictionaries(
    {},
    optional={
        "uri": st.sampled_from([{"prefix": "/"}, {"exact": "/x"}, {"regex": ".*"}]),
        "port": port,
        "sourceLabels": labels,
        "sourceNamespace": namespace,
        "gateways": st.lists(st.sampled_from(("mesh", "a", "default/b")), max_size=2),
        "headers": st.just({"end-user": {"exact": "jason"}}),
    },
)
_rule = st.fixed_dictionaries(
    {
        "route": st.lists(
            st.fixed_dictionaries({"destination": _destination, "weight": st.just(1)}), min_size=1, max_size=2
        )
    },
    optional={"match": st.lists(_match, max_size=2), "mirror": _destination},
)


@st.composite
def a_virtual_service(draw: st.DrawFn) -> str:
    gateways = draw(st.lists(st.sampled_from(("mesh", "a", "default/b")), max_size=2, unique=True))
    return virtual_service(
        flow(draw(st.lists(_rule, min_size=1, max_size=3))),
        name=draw(name),
        namespace=draw(namespace),
        hosts=flow(draw(st.lists(st.sampled_from(HOSTS), min_size=1, max_size=3, unique=True))),
        more=f"gateways: {flow(gateways)}\n  exportTo: {flow(draw(export))}",
    )


_balancer = st.sampled_from(
    [
        {"simple": "PASSTHROUGH"},
        {"consistentHash": {"httpHeaderName": "user"}},
        {"consistentHash": {"httpCookie": {"name": "c", "ttl": "1s"}, "maglev": {"tableSize": 1021}}},
        {"localityLbSetting": {"distribute": [{"from": "eu", "to": {"eu/a": 40, "us": 60}}]}},
        {"localityLbSetting": {"failoverPriority": ["app", "topology.kubernetes.io/region"]}},
        {"localityLbSetting": {"failover": [{"from": "eu", "to": "us"}]}},
        {"zoneAwareLbSetting": {"enabled": True}},
        {"simple": "ROUND_ROBIN", "warmup": {"duration": "1m"}},
    ]
)
_policy = st.fixed_dictionaries(
    {},
    optional={
        "loadBalancer": _balancer,
        "outlierDetection": st.just({}),
        "tls": st.just({"mode": "SIMPLE"}),
        "connectionPool": st.just({"tcp": {"maxConnections": 3}, "http": {"h2UpgradePolicy": "UPGRADE"}}),
        "retryBudget": st.just({"percent": 10}),
    },
)


@st.composite
def a_destination_rule(draw: st.DrawFn) -> str:
    spec = {
        "host": draw(st.sampled_from(HOSTS)),
        "subsets": [{"name": each, "labels": draw(labels)} for each in draw(st.sets(st.sampled_from(("v1", "v2"))))],
        "exportTo": draw(export),
        "trafficPolicy": draw(_policy),
    }
    if spec["subsets"] and draw(st.booleans()):
        spec["subsets"][0]["trafficPolicy"] = draw(_policy)
    if draw(st.booleans()):
        spec["workloadSelector"] = {"matchLabels": draw(labels)}
    return destination_rule(flow(spec), name=draw(name), namespace=draw(namespace))


@st.composite
def an_entry(draw: st.DrawFn) -> str:
    resolution = draw(st.sampled_from(("NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS")))
    spec: dict[str, object] = {
        "hosts": draw(st.lists(st.sampled_from(("x.e.com", "*.e.com", "b")), min_size=1, max_size=2, unique=True)),
        "ports": [{"number": n, "name": f"p{n}", "protocol": k.upper()} for n, k in draw(_ports).items()],
        "resolution": resolution,
        "exportTo": draw(export),
    }
    if resolution in ("STATIC", "DNS") and draw(st.booleans()):
        spec["workloadSelector"] = {"labels": draw(labels)}
    elif resolution not in ("NONE", "DYNAMIC_DNS"):
        spec["endpoints"] = [{"address": "10.0.0.1", "labels": draw(labels), "locality": draw(_place)}]
    return (
        f"apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n"
        f"metadata: {{name: {draw(name)}, namespace: {draw(namespace)}}}\nspec: {flow(spec)}\n"
    )


_place = st.sampled_from(("", "eu/a", "eu/b/1", "us/a"))


def whole(version: str, kind: str, where: str, named: str, spec: object) -> str:
    return f"apiVersion: {version}\nkind: {kind}\nmetadata: {{name: {named}, namespace: {where}}}\nspec: {flow(spec)}\n"


@st.composite
def a_workload_entry(draw: st.DrawFn) -> str:
    address = draw(st.sampled_from(("10.0.0.7", "vm.e.com")))
    spec = {"address": address, "labels": draw(labels), "locality": draw(_place)}
    return whole("networking.istio.io/v1", "WorkloadEntry", draw(namespace), draw(name), spec)


@st.composite
def a_sidecar(draw: st.DrawFn) -> str:
    host = st.builds(
        "/".join,
        st.tuples(
            st.sampled_from((".", "*", "~", *NAMESPACES)), st.sampled_from([h for h in HOSTS if "." in h or h == "*"])
        ),
    ).filter(lambda each: not each.endswith("10.0.0.1"))
    listener = st.fixed_dictionaries({"hosts": st.lists(host, min_size=1, max_size=3)})
    spec: dict[str, object] = {"egress": draw(st.lists(listener, max_size=1))}
    if draw(st.booleans()):
        spec["egress"] = [{"port": {"number": draw(port)}, "hosts": ["*/*"]}, *draw(st.lists(listener, max_size=1))]
    if draw(st.booleans()):
        spec["workloadSelector"] = {"labels": draw(labels)}
    if draw(st.booleans()):
        spec["outboundTrafficPolicy"] = draw(st.sampled_from(({}, {"mode": "ALLOW_ANY"})))
    return whole("networking.istio.io/v1", "Sidecar", draw(namespace), draw(name), spec)


@st.composite
def a_backend_policy(draw: st.DrawFn) -> str:
    parts = {
        "breaker": {"consecutiveFailures": 5},
        "retryBudget": {"ratio": 0.1},
        "hedge": {"delay": "10ms"},
        "loadBalancer": "PEAK_EWMA",
        "healthChecks": [{"tcp": {}}],
        "outlierDetection": {"successRateEnforcing": 100},
        "resendUnsafe": True,
        "shadow": ["breaker"],
    }
    chosen = draw(st.sets(st.sampled_from(sorted(parts)), min_size=1))
    spec = {"host": draw(st.sampled_from(HOSTS)), "subset": draw(st.sampled_from(("", "v1")))}
    spec |= {each: parts[each] for each in chosen}
    return whole("meshlib.io/v1alpha1", "BackendTrafficPolicy", draw(namespace), draw(name), spec)


@st.composite
def a_delegation(draw: st.DrawFn) -> str:
    """A VirtualService that delegates, or one to delegate to."""
    where = draw(namespace)
    if draw(st.booleans()):
        rules = flow(draw(st.lists(_rule, min_size=1, max_size=2)))
        return whole("networking.istio.io/v1", "VirtualService", where, "part", {"http": json.loads(rules)})
    rule = {"match": draw(st.lists(_match, max_size=1)), "delegate": {"name": "part", "namespace": draw(namespace)}}
    spec = {"hosts": [draw(st.sampled_from(HOSTS))], "http": [rule]}
    return whole("networking.istio.io/v1", "VirtualService", where, draw(name), spec)


@st.composite
def a_mesh_config(draw: st.DrawFn) -> str:
    mesh = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "outboundTrafficPolicy": st.sampled_from(({}, {"mode": "ALLOW_ANY"})),
                "localityLbSetting": st.sampled_from(({"enabled": False}, {"failoverPriority": ["version"]})),
                "defaultTrafficPolicy": st.just({"outlierDetection": {}}),
                "defaultHttpRetryPolicy": st.just({"attempts": 1}),
                "defaultServiceExportTo": export,
                "h2UpgradePolicy": st.just("UPGRADE"),
            },
        )
    )
    return (
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\n"
        f"data: {flow({'mesh': json.dumps(mesh)})}\n"
    )


@st.composite
def a_gateway(draw: st.DrawFn) -> str:
    servers = [
        {"port": {"number": number, "name": "http", "protocol": "HTTP"}, "hosts": hosts, "tls": {"httpsRedirect": True}}
        if is_plain
        else {
            "port": {"number": number, "name": "https", "protocol": "HTTPS"},
            "hosts": hosts,
            "tls": {"mode": "SIMPLE", "serverCertificate": "/c", "privateKey": "/k"},
        }
        for number, is_plain, hosts in draw(
            st.lists(
                st.tuples(
                    port,
                    st.booleans(),
                    st.lists(st.sampled_from(("*", "*.e.com", "x.e.com", "./a", "other/*")), min_size=1, unique=True),
                ),
                min_size=1,
                max_size=3,
            )
        )
    ]
    return (
        f"apiVersion: networking.istio.io/v1\nkind: Gateway\n"
        f"metadata: {{name: {draw(name)}, namespace: {draw(namespace)}}}\n"
        f"spec: {flow({'selector': draw(labels), 'servers': servers})}\n"
    )


texts = st.lists(
    st.one_of(
        a_service(),
        a_virtual_service(),
        a_destination_rule(),
        an_entry(),
        a_gateway(),
        a_workload_entry(),
        a_sidecar(),
        a_backend_policy(),
        a_delegation(),
        a_mesh_config(),
    ),
    max_size=10,
)
_localities = st.sampled_from((Locality(), Locality("eu", "a"), Locality("us", "a", "1")))
workloads = st.builds(
    Workload,
    name=name,
    namespace=namespace,
    service=st.sampled_from(("", "a", "b", "x.e.com", "c")),
    labels=labels.map(lambda found: tuple(sorted(found.items()))),
    address=st.sampled_from(("10.1.0.1", "10.1.0.2", "::1", "")),
    port=st.sampled_from((0, 80, 9080)),
    locality=_localities,
)


def a_node(where: str, kind: NodeKind, given_labels: dict[str, str], locality: Locality) -> Node:
    made = node(where, kind, **given_labels)
    return replace(made, workload=replace(made.workload, locality=locality))


nodes = st.builds(a_node, namespace, st.sampled_from(NodeKind), labels, _localities)


def parsed(given_texts: list[str]) -> list[Object]:
    """Each object once; what the parser refuses is not the translation's to judge."""
    found = {each.key: each for text in given_texts for each in parse_text(text, "t.yaml").objects}
    return list(found.values())


def domains_are_unique(snapshot: Snapshot) -> bool:
    """Envoy refuses a route configuration that names a domain twice."""
    return all(
        len(found) == len({domain.lower() for domain in found})
        for configuration in snapshot.route_configurations
        for found in [[domain for host in configuration.virtual_hosts for domain in host.domains]]
    )


@settings(max_examples=150, deadline=None)
@given(texts, st.lists(workloads, max_size=4), nodes)
def test_every_translation_is_consistent(given_texts: list[str], running: list[Workload], given_node: Node) -> None:
    """No reference leads nowhere, no domain stands twice, it compiles, and the wire carries all of it."""
    snapshot = translate(parsed(given_texts), running, given_node).snapshot
    assert snapshot.inconsistencies() == ()
    assert domains_are_unique(snapshot)
    compile_live(snapshot, None, random.Random(1))
    for type_url, found in resources_of(snapshot).items():
        for data in found.values():
            decode_resource(type_url, data)


@settings(max_examples=100, deadline=None)
@given(texts, st.lists(workloads, max_size=4), nodes, st.randoms(use_true_random=False))
def test_the_order_in_which_things_come_makes_no_difference(
    given_texts: list[str], running: list[Workload], given_node: Node, chance: random.Random
) -> None:
    """Objects from several files, workloads from several streams."""
    found, others = parsed(given_texts), list(running)
    expected = translate(found, running, given_node)
    chance.shuffle(found)
    chance.shuffle(others)
    assert translate(found, others, given_node) == expected


@settings(max_examples=100, deadline=None)
@given(texts, st.lists(workloads, max_size=4), st.sampled_from(NodeKind), namespace)
def test_nodes_with_one_key_see_one_thing(
    given_texts: list[str], running: list[Workload], kind: NodeKind, where: str
) -> None:
    """A view is shared by all nodes of its key, so the key must hold all that a translation looks at."""
    found = parsed(given_texts)
    seen: dict[object, object] = {}
    places = (Locality(), Locality("eu", "a"), Locality("us", "a", "1"))
    for *values, place in itertools.product(("x", "y", ""), ("x", "y", ""), places):
        given_labels = {key: value for key, value in zip(("app", "version"), values, strict=True) if value}
        each = a_node(where, kind, given_labels, place)
        made = translate(found, running, each)
        assert seen.setdefault(view_key(found, each), made) == made


@settings(max_examples=100, deadline=None)
@given(texts, st.lists(workloads, max_size=4), st.lists(nodes, min_size=2, max_size=4))
def test_what_was_made_for_one_node_does_not_show_in_the_next(
    given_texts: list[str], running: list[Workload], asking: list[Node]
) -> None:
    """Of the very same tuples, translations share what they have in common; each is as if it were the only one."""
    found = parsed(given_texts)
    shared = (tuple(found), tuple(running))
    for each in (*asking, *reversed(asking)):
        assert translate(*shared, each) == translate(list(found), list(running), each)


@settings(max_examples=50, deadline=None)
@given(texts, st.lists(workloads, max_size=4), nodes)
def test_a_destination_without_a_cluster_is_always_told(
    given_texts: list[str], running: list[Workload], given_node: Node
) -> None:
    """Calls to it get 503: its author must hear why."""
    made = translate(parsed(given_texts), running, given_node)
    known = {cluster.name for cluster in made.snapshot.clusters}
    named = {
        cluster.cluster
        for configuration in made.snapshot.route_configurations
        for host in configuration.virtual_hosts
        for route in host.routes
        if isinstance(route.action, Forward)
        for cluster in route.action.clusters
    }
    assert made.problems or named <= known


def test_no_endpoint_is_in_two_services_that_it_does_not_serve() -> None:
    """Bookinfo, whole: each endpoint of each subset is a workload of that service and version."""
    found = objects("platform/bookinfo.yaml", "networking/destination-rule-all.yaml")
    running = [
        Workload(
            f"{app}-{version}", service=app, labels=(("app", app), ("version", version)), address="127.0.0.1", port=p
        )
        for p, (app, version) in enumerate(itertools.product(("reviews", "ratings"), ("v1", "v2", "v3")), 9000)
    ]
    snapshot = translate(found, running, node()).snapshot
    for assignment in snapshot.assignments:
        _, _, subset, host = assignment.cluster.split("|")
        for endpoint in assignment.endpoints:
            assert isinstance(endpoint, Endpoint)
            assert endpoint.workload.startswith(host.partition(".")[0])
            assert endpoint.workload.endswith(subset)
