"""After changes, is what is told what would be told if all began anew?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from views import destination_rule, node, objects, service, virtual_service

from meshlib.controlplane.cache import Encoder, View
from meshlib.istio.order import Ordered, Parts, in_order
from meshlib.istio.resources import Object
from meshlib.istio.translate import translated, view_key
from meshlib.istio.world import World
from meshlib.model import Locality, Node, NodeKind, Workload

NET = "apiVersion: networking.istio.io/v1\n"
SECURITY = "apiVersion: security.istio.io/v1\n"


def slice_of(name: str, *hosts: int, port: int = 8080) -> str:
    ends = ", ".join(f"{{addresses: [10.0.0.{n}], targetRef: {{kind: Pod, name: pod-{n}}}}}" for n in hosts)
    labels = f"{{kubernetes.io/service-name: {name}}}"
    return (
        f"apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}-1, labels: {labels}}}\n"
        f"addressType: IPv4\nports: [{{name: http, port: {port}}}]\nendpoints: [{ends}]\n"
    )


def pod(number: int, version: str = "v1", more: str = "", app: str = "a", address: int = 0) -> str:
    return (
        "apiVersion: v1\nkind: Pod\n"
        f"metadata: {{name: pod-{number}, labels: {{app: {app}, version: {version}{more}}}}}\n"
        f"spec: {{nodeName: n}}\nstatus: {{podIP: 10.0.0.{address or number}}}\n"
    )


def entry(name: str, host: str, ends: str, *, created: str = "", more: str = "") -> str:
    stamp = f", creationTimestamp: '{created}'" if created else ""
    return (
        f"{NET}kind: ServiceEntry\nmetadata: {{name: {name}{stamp}}}\nspec:\n  hosts: [{host}]\n  resolution: STATIC\n"
        f"  ports: [{{number: 80, name: http, protocol: HTTP}}]\n  {ends}\n  {more}\n"
    )


ROUTE = (
    "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: route}}\nspec:\n"
    "  parentRefs: [{{group: '', kind: Service, name: b}}]\n  rules: [{{backendRefs: [{{name: {}, port: 80}}]}}]\n"
)
MESHED = ", security.istio.io/tlsMode: istio"
FORMS: Mapping[str, tuple[str, ...]] = {
    "service a": (
        service("a"),
        service("a", ports="[{name: http, port: 80}, {name: tcp-x, port: 81}]"),
        service("a").replace("selector", "trafficDistribution: PreferClose, selector"),
    ),
    "service b": (service("b"), service("b", "other"), service("b", "other", "[{name: grpc, port: 80}]")),
    "service c": (service("c"), service("c").replace("name: c,", "name: c, annotations: {x: y},")),
    "slice a": (slice_of("a", 1, 2), slice_of("a", 1), slice_of("a", 1, 2, port=8081), slice_of("a", 3)),
    "slice c": (slice_of("c", 3), slice_of("c", 3, 4)),
    "pod 1": (pod(1), pod(1, "v2"), pod(1, more=MESHED), pod(1, address=9)),
    "pod 3": (pod(3, app="c"), pod(3, "v2", app="b")),
    "node": (
        "apiVersion: v1\nkind: Node\nmetadata: {name: n, labels: {topology.kubernetes.io/region: r1}}\n",
        "apiVersion: v1\nkind: Node\nmetadata: {name: n, labels: {topology.kubernetes.io/region: r2}}\n",
    ),
    "entry e": (
        entry("e", "e.com", "endpoints: [{address: 192.0.2.1}]"),
        entry("e", "e.com", "endpoints: [{address: 192.0.2.1}, {address: 192.0.2.2, labels: {version: v2}}]"),
        entry("e", "e.com", "endpoints: [{address: 192.0.2.1}]").replace("number: 80", "number: 81"),
        entry("e", "e.com", "workloadSelector: {labels: {app: a}}"),
        entry("e", "f.com", "endpoints: [{address: 192.0.2.9}]", created="2026-01-02T00:00:00Z"),
    ),
    "entry f": (
        entry("f", "e.com", "endpoints: [{address: 192.0.2.7}]"),
        entry("f", "f.com", "endpoints: [{address: 192.0.2.3}]", created="2026-01-01T00:00:00Z", more="exportTo: [.]"),
        entry("f", "b", ""),
    ),
    "machine": (
        f"{NET}kind: WorkloadEntry\nmetadata: {{name: vm}}\nspec: {{address: 192.0.2.5, labels: {{app: a}}}}\n",
        f"{NET}kind: WorkloadEntry\nmetadata: {{name: vm}}\nspec: {{address: a.name, labels: {{app: c}}}}\n",
    ),
    "routes of a": (
        virtual_service("[{route: [{destination: {host: a, subset: v2}}]}]"),
        virtual_service(
            "[{match: [{sourceLabels: {app: a}}], route: [{destination: {host: b}}]}, {directResponse: {status: 418}}]"
        ),
        virtual_service("[{route: [{destination: {host: e.com}}]}]", hosts="[a, '*.com']", more="gateways: [gw, mesh]"),
        virtual_service("[{route: [{destination: {host: b.other.svc.cluster.local}}]}]", more="exportTo: [.]"),
    ),
    "routes of b": (
        virtual_service("[{route: [{destination: {host: c, port: {number: 80}}}]}]", name="b", hosts="[b]"),
    ),
    "route": (ROUTE.format("b"), ROUTE.format("z")),
    "rule of a": (
        destination_rule("{host: a, subsets: [{name: v2, labels: {version: v2}}]}"),
        destination_rule("{host: a, trafficPolicy: {outlierDetection: {}}}"),
        destination_rule("{host: a, workloadSelector: {matchLabels: {app: a}}, trafficPolicy: {tls: {mode: SIMPLE}}}"),
        destination_rule("{host: '*.com', trafficPolicy: {loadBalancer: {simple: RANDOM}}}"),
    ),
    "sidecar": (
        f"{NET}kind: Sidecar\nmetadata: {{name: s}}\nspec: {{egress: [{{hosts: ['./*', '*/e.com']}}]}}\n",
        f"{NET}kind: Sidecar\nmetadata: {{name: s}}\n"
        "spec: {egress: [{port: {number: 80, protocol: HTTP, name: http}, hosts: ['*/*']}], "
        "outboundTrafficPolicy: {mode: REGISTRY_ONLY}}\n",
    ),
    "mesh": (
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\n"
        "data: {mesh: 'outboundTrafficPolicy: {mode: REGISTRY_ONLY}'}\n",
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\n"
        "data: {mesh: 'defaultServiceExportTo: [.]'}\n",
    ),
    "policy": (
        f"{SECURITY}kind: AuthorizationPolicy\nmetadata: {{name: p}}\n"
        "spec: {targetRefs: [{kind: Service, name: b}], action: DENY, rules: [{}]}\n",
        f"{SECURITY}kind: AuthorizationPolicy\nmetadata: {{name: p}}\n"
        "spec: {selector: {matchLabels: {app: a}}}\n",
    ),
    "telemetry": (
        "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {name: t}\n"
        "spec: {tracing: [{randomSamplingPercentage: 10}]}\n",
    ),
    "gateway": (
        f"{NET}kind: Gateway\nmetadata: {{name: gw}}\n"
        "spec: {selector: {app: a}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}\n",
    ),
}
"""What may stand in each place; every place may be empty too."""
ONE = Workload("one", service="b", labels=(("app", "b"),), address="10.9.0.1", port=8080)
TWO = Workload("two", labels=(("app", "c"), ("security.istio.io/tlsMode", "istio")), address="10.0.0.9", port=8080)
PROCESSES: tuple[tuple[Workload, ...], ...] = (
    (),
    (ONE,),
    (TWO, ONE),
    (Workload("x", service="z", address="::1", port=1),),
)
NODES = (
    node(),
    node("other", app="a"),
    Node("n", Workload("w", labels=(("app", "a"),), locality=Locality("r1"), service="a")),
    node(kind=NodeKind.ROUTER, app="a"),
)

_edit = st.one_of(
    *(st.tuples(st.just(place), st.sampled_from((*forms, ""))) for place, forms in FORMS.items()),
    st.tuples(st.just("processes"), st.integers(0, len(PROCESSES) - 1)),
    st.tuples(st.just("again"), st.just("")),
)
_changes = st.lists(st.lists(_edit, min_size=1, max_size=3), min_size=1, max_size=6)
_beginning = st.fixed_dictionaries({place: st.sampled_from((*forms, forms[0], "")) for place, forms in FORMS.items()})


class Mesh:
    """Objects that stay the very same until they are edited, as a control plane has them."""

    def __init__(self, beginning: Mapping[str, str]) -> None:
        self._objects: dict[str, list[Object]] = {}
        self.processes: tuple[Workload, ...] = ()
        for place, text in beginning.items():
            self.edit(place, text)

    def edit(self, place: str, what: str | int) -> None:
        if isinstance(what, int):
            self.processes = PROCESSES[what]
        elif place == "again":  # the same in another order
            self._objects = dict(reversed(self._objects.items()))
        else:
            self._objects[place] = objects(what) if what else []

    @property
    def objects(self) -> tuple[Object, ...]:
        return tuple(each for found in self._objects.values() for each in found)


class Compared:
    """What is told of a mesh, change by change, beside what is told of it anew."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, self._encoder = mesh, Encoder()
        self._world: World | None = None
        self._parts: Parts | None = None
        self._views: dict[int, View] = {}

    def check(self) -> None:
        """Content, problems, the bytes of each resource, and the versions."""
        found, processes = self._mesh.objects, self._mesh.processes
        self._parts = Parts.of(found, self._parts)
        self._world = World(self._parts, processes, None, self._world)
        anew = World(Parts.of(found), processes)
        for index, who in enumerate(NODES):
            one, two = translated(self._world, who), translated(anew, who)
            assert one == two
            view = View(one.snapshot, one.problems, self._encoder, self._views.get(index))
            other = View(two.snapshot, two.problems, Encoder())
            assert view.resources == other.resources
            assert view.versions == other.versions
            assert view.unnamed == other.unnamed
            self._views[index] = view
            assert view_key(found, who) == view_key(list(found), who)
        self._encoder.keep_only(self._views.values())


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(_beginning, _changes)
def test_what_is_told_after_changes_is_what_would_be_told_anew(
    beginning: dict[str, str], changes: list[list[tuple[str, str | int]]]
) -> None:
    mesh = Mesh(beginning)
    compared = Compared(mesh)
    for edits in ([], *changes):
        for place, what in edits:
            mesh.edit(place, what)
        compared.check()


@pytest.mark.parametrize("place", [*FORMS, "processes"])
def test_each_form_of_an_object_takes_the_place_of_another(place: str) -> None:
    """All else stays as it is; there and back again."""
    beginning = {each: forms[0] for each, forms in FORMS.items() if each != "sidecar"}
    mesh = Mesh(beginning)
    compared = Compared(mesh)
    forms: Sequence[str | int] = range(len(PROCESSES)) if place == "processes" else (*FORMS[place], "")
    for form in (*forms, *reversed(forms)):
        mesh.edit(place, form)
        compared.check()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 2)), max_size=6), min_size=2, max_size=6)
)
def test_the_order_after_a_change_is_the_order_anew(changes: list[list[tuple[str, int]]]) -> None:
    """Equals too keep the order in which they were given."""
    known = {
        (name, number): Object("v1", "Pod", "default", name, f"{name}.yaml:{number}", None, {}, created=str(number % 2))
        for name in "abcdefgh"
        for number in range(3)
    }
    ordered: Ordered | None = None
    for change in changes:
        now = tuple(known[each] for each in change)
        ordered = Ordered(now, ordered)
        assert list(map(id, ordered.objects)) == list(map(id, in_order(now)))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(st.integers(0, 8), max_size=9, unique=True), min_size=2, max_size=6))
def test_the_parts_after_a_change_are_the_parts_anew(changes: list[list[int]]) -> None:
    """Of each kind in the order given; what a change leaves alone is the very same tuple."""
    texts = [
        pod(1),
        pod(2),
        pod(3),
        slice_of("a", 1),
        slice_of("b", 1),
        service("a"),
        service("b"),
        destination_rule("{host: a}"),
    ]
    known = [*(each for text in texts for each in objects(text)), *objects(entry("e", "e.com", "endpoints: []"))]
    parts: Parts | None = None
    for change in changes:
        now = tuple(known[each] for each in change)
        before, parts, anew = parts, Parts.of(now, parts), Parts.of(now)
        assert list(map(id, parts.rules)) == list(map(id, anew.rules))
        found = {kind: tuple(map(id, each)) for kind, each in parts.running.items() if each}
        assert found == {kind: tuple(map(id, each)) for kind, each in anew.running.items()}
        if before is not None:
            assert parts.rules is before.rules or parts.rules != before.rules
            assert all(
                each is before.running.get(kind, ()) or each != before.running.get(kind, ())
                for kind, each in parts.running.items()
            )
