"""After a change, is what is taken over from before just what would be made anew?"""

from __future__ import annotations

from dataclasses import replace

import pytest
from views import objects

from meshlib.istio.resources import Object
from meshlib.istio.services import Registry
from meshlib.model import Workload

MESHED = (("app", "a"), ("security.istio.io/tlsMode", "istio"))


def text_of(name: str, *, label: str = "v1", more: str = "", port: int = 80, ready: bool = True) -> str:
    """A service, its slice, its pod and the pod's node."""
    digit = ord(name)
    return (
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, annotations: {{{more}}}}}\n"
        f"spec: {{selector: {{app: {name}}}, ports: [{{name: http, port: {port}}}]}}\n---\n"
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n"
        f"metadata: {{name: {name}-1, labels: {{kubernetes.io/service-name: {name}}}}}\n"
        "ports: [{name: http, port: 8080}]\n"
        f"endpoints: [{{addresses: [10.0.0.{digit}], conditions: {{ready: {str(ready).lower()}}}, "
        f"targetRef: {{kind: Pod, name: {name}-pod}}}}]\n---\n"
        f"apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}-pod, labels: {{app: {name}, version: {label}}}}}\n"
        f"spec: {{nodeName: n-{name}}}\nstatus: {{podIP: 10.0.0.{digit}}}\n---\n"
    )


def node_of(name: str, zone: str = "z1") -> str:
    labels = f"topology.kubernetes.io/zone: {zone}, topology.kubernetes.io/region: r"
    return f"apiVersion: v1\nkind: Node\nmetadata: {{name: n-{name}, labels: {{{labels}}}}}\n---\n"


WORLD = [*objects(text_of("a")), *objects(text_of("b")), *objects(node_of("a"))]
ENTRY = (
    "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {name: vm}\n"
    "spec: {address: 192.0.2.1, labels: {app: a}}\n"
)


def edited(*texts: str, without: tuple[str, ...] = ()) -> list[Object]:
    """What these say takes the place of what was said; the rest are the very same objects. without: `Kind name`."""
    said = [given for each in texts for given in objects(each)]
    keys = {each.key for each in said}
    return [e for e in WORLD if e.key not in keys and f"{e.kind} {e.name}" not in without] + said


CHANGES: dict[str, tuple[list[Object], tuple[Workload, ...], tuple[str, ...]]] = {
    "nothing": (WORLD, (), ()),
    "an endpoint that is not ready": (edited(text_of("a", ready=False)), (), ()),
    "a pod's labels": (edited(text_of("a", label="v2")), (), ()),
    "a pod that is gone": (edited(without=("Pod a-pod",)), (), ()),
    "a slice that is gone": (edited(without=("EndpointSlice a-1",)), (), ()),
    "a service's port": (edited(text_of("a", port=81)), (), ()),
    "a service's exportTo": (edited(text_of("a", more="networking.istio.io/exportTo: .")), (), ()),
    "a node's zone": (edited(node_of("a", "z2")), (), ()),
    "a node of a pod": (edited(node_of("b")), (), ()),
    "a machine that joins": (edited(ENTRY), (), ()),
    "exportTo of all": (WORLD, (), (".",)),
    "a process with mTLS": (
        WORLD,
        (Workload("a-pod", service="a", labels=MESHED, address="10.0.0.97", port=8080),),
        (),
    ),
    "a process elsewhere": (WORLD, (Workload("far", service="a", address="10.9.9.9", port=8080),), ()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_taken_over_is_what_would_be_made_anew(change: str) -> None:
    """There and back again. The service that the change does not touch is the very same, but for changes of nodes and
    of what holds for all."""
    given, workloads, export_to = CHANGES[change]
    before = Registry(WORLD, ())
    after = Registry(given, workloads, export_to, before)
    assert after.services == Registry(given, workloads, export_to).services
    assert after.problems == Registry(given, workloads, export_to).problems
    touches_all = change in ("a node's zone", "a node of a pod", "exportTo of all")
    host = "b.default.svc.cluster.local"
    assert (after.services[host] is before.services[host]) is not touches_all
    assert Registry(WORLD, (), (), after).services == before.services


def test_a_process_that_moves_its_port_is_told_from_before() -> None:
    """Processes are compared by what they say: the registry makes new tuples of them at every change."""
    one = Workload("far", service="a", address="10.9.9.9", port=8080)
    before = Registry(WORLD, (one,))
    for workloads in ((one,), (replace(one, port=8081),), ()):
        assert Registry(WORLD, workloads, (), before).services == Registry(WORLD, workloads).services
