"""Is what a text would do told to who may know it, with the traffic that it concerns, and without doing it?"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controlplane.access import VIRTUAL_SERVICE, YAML, client_of, write_access
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.controlplane.telemetry_store import Cell
from meshlib.controlplane.what_if import compare
from meshlib.istio.parse import parse_text
from meshlib.model import Node, Workload
from pushes import REVIEWS, metrics

SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: default}
spec: {selector: {app: reviews}, ports: [{name: http, port: 9080}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews, namespace: default}
spec: {host: reviews, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]}
"""
CANARY = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http:
  - fault: {abort: {httpStatus: 503, percentage: {value: 5}}}
    route:
    - {destination: {host: reviews, subset: v1}, weight: 75}
    - {destination: {host: reviews, subset: v2}, weight: 25}
"""
MATCHED = CANARY.replace("- fault", "- match: [{headers: {end-user: {exact: jason}}}]\n    fault")


def cell(requests: int) -> Cell:
    made = Cell()
    made.requests = requests
    return made


def asked(text: str, *callers: Node) -> list[tuple[str, tuple[str, ...], list[tuple[str, float, float | None]]]]:
    objects, given = parse_text(SERVICE, "s").objects, parse_text(text, "t").objects
    traffic = {REVIEWS: cell(40), REVIEWS._replace(source_workload="other"): cell(1000)}
    found = compare(objects, given, (), callers, traffic, 10.0)
    assert (found.problems, found.left_out) == ((), 0)
    return [
        (each.host, each.callers, [(to.to, to.share, to.rps) for to in (each.after or each.before)[0].portions])
        for each in found.hosts
    ]


def test_recorded_traffic_is_shared_as_the_weights_say() -> None:
    """That of the callers concerned only: 4 requests a second of productpage's."""
    host = "reviews.default.svc.cluster.local"
    caller = Node("a", Workload("productpage-v1"))
    [(told, callers, portions)] = asked(CANARY, caller)
    assert (told, callers) == (f"{host}:9080", ("workload:default/productpage-v1",))
    assert portions == [(f"{host} v1", 0.75, 3.0), (f"{host} v2", 0.25, 1.0)]


def test_what_depends_on_a_header_is_left_open() -> None:
    """Nobody has recorded headers."""
    [(_, _, portions)] = asked(MATCHED, Node("a", Workload("productpage-v1")))
    assert [rps for _, _, rps in portions] == [None, None]


def test_callers_that_would_see_the_same_are_one() -> None:
    """And a text that says nothing new changes nothing."""
    [(_, callers, _)] = asked(CANARY, Node("a", Workload("b-v1")), Node("c", Workload("d-v1")))
    assert callers == ("workload:default/b-v1", "workload:default/d-v1")
    assert asked(SERVICE, Node("a", Workload("b-v1"))) == []


POLICIES = """
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews, namespace: default}
spec:
  host: reviews
  trafficPolicy: {outlierDetection: {consecutive5xxErrors: 3}, connectionPool: {http: {http2MaxRequests: 7}}}
  subsets: [{name: v1, labels: {version: v1}}, {name: v3, labels: {version: v3}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http:
  - {timeout: 2s, retries: {attempts: 4, perTryTimeout: 1s}, route: [{destination: {host: reviews, subset: v1}}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: default}
spec: {action: DENY, rules: [{to: [{operation: {methods: [DELETE]}}]}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: default}
spec: {mtls: {mode: STRICT}}
"""


def test_policies_are_compared_too() -> None:
    """Limits and ejections of a destination, its subsets and endpoints, timeouts and retries, and who may call."""
    objects, given = parse_text(SERVICE, "s").objects, parse_text(POLICIES, "t").objects
    caller = Node("a", Workload("productpage-v1"))
    v1 = Workload("reviews-v1", labels=(("app", "reviews"), ("version", "v1")), address="10.0.0.1", port=9080)
    hosts, _, _, policies, *_ = compare(objects, given, (v1,), [caller], {}, 10.0)
    host = "reviews.default.svc.cluster.local"
    found = {each.what: each for each in policies}
    assert set(found) == {host, f"{host} v1", f"{host} v2", f"{host} v3", "calls to"}
    assert any("consecutive 5xx 3" in line for line in found[host].after), found[host]
    assert any(line.startswith("limits: ") and "7" in line for line in found[host].after)
    assert found[host].workloads == ("workload:default/productpage-v1",)
    assert (found[f"{host} v2"].after, found[f"{host} v3"].before) == ((), ())
    assert "endpoints: none" in found[f"{host} v3"].after
    assert "tls: PERMISSIVE" in found["calls to"].before and "tls: STRICT" in found["calls to"].after
    assert any("nobody" in line and line.endswith("DENY") for line in found["calls to"].after), found["calls to"]
    assert [each.after[0].does for each in hosts] == [("timeout 2s", "4 retries, 1s each")]


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    folder = tmp_path / "mesh"
    folder.mkdir()
    (folder / "services.yaml").write_text(SERVICE)
    settings = ControlPlaneSettings(
        (folder,), xds=("127.0.0.1", 0), admin=("127.0.0.1", 0), access=write_access(tmp_path / "access")
    )
    made = ControlPlane(settings)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


async def test_it_takes_an_operator_of_the_namespace(plane: ControlPlane) -> None:
    """Also who may ask is told of problems only, where there are some; nothing is in force afterwards."""
    text = VIRTUAL_SERVICE.replace("NAMESPACE", "default")
    async with client_of(plane, "olaf") as olaf, client_of(plane, "vera") as vera, client_of(plane, "dora") as dora:
        for nobody in (vera, dora):
            refused = await nobody.post("/v1/what-if", content=text, headers=YAML)
            assert (refused.status_code, "needs the role operator" in refused.text) == (403, True)
        told = (await olaf.post("/v1/what-if", content=text, headers=YAML)).json()
        assert [each["after"][0]["does"] for each in told["hosts"]] == [["timeout 2s"]]
        wrong = (await olaf.post("/v1/what-if", content=text.replace("2s", "2 s"), headers=YAML)).json()
        assert (len(wrong["problems"]), wrong["hosts"]) == (1, [])
        assert (await olaf.post("/v1/what-if?seconds=0", content=text, headers=YAML)).status_code == 400
        assert (await olaf.post("/v1/what-if", content=text)).status_code == 415
        assert (await olaf.get("/v1/objects?kind=VirtualService")).json()["objects"] == []


BANK = """
apiVersion: v1
kind: Service
metadata: {name: bank, namespace: prod}
spec: {ports: [{name: http, port: 80}]}
"""


async def test_the_traffic_of_others_is_not_told(plane: ControlPlane) -> None:
    """Whose host it is does not matter: of requests between two namespaces, who may look into neither learns nothing,
    not even their number."""
    host = "bank.prod.svc.cluster.local"
    to_bank = REVIEWS._replace(
        destination_service=host, destination_service_namespace="prod", destination_workload_namespace="prod"
    )
    from_prod = to_bank._replace(source_workload_namespace="prod")
    plane._picture.receiver.metrics(metrics({to_bank: [5.0] * 60, from_prod: [5.0] * 540}, time.time()))
    rule = VIRTUAL_SERVICE.replace("NAMESPACE", "default").replace("reviews]", f"{host}]")
    text = rule.replace("host: reviews", f"host: {host}")
    assert plane._store is not None
    plane._store.apply(BANK, "bank.yaml")
    async with client_of(plane, "alice") as alice, client_of(plane, "olaf") as olaf:
        rps = []
        for client in (alice, olaf):
            told = (await client.post("/v1/what-if?seconds=60", content=text, headers=YAML)).json()
            rps.append(sum(each["rps"] for each in told["hosts"] if each["host"].startswith(host)))
    assert rps == [10.0, 1.0]
