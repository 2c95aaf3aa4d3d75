"""Does describe name what concerns a service or workload, where it stands, and nothing else?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from dashboard.pictured_town import Town
from discovery.feed import feed
from meshlib.cli.app import app
from meshlib.model import Node, Workload

Meshctl = Callable[..., Result]
RULES = """
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec: {selector: {app: reviews}, ports: [{name: http, port: 9080}]}
---
apiVersion: v1
kind: Service
metadata: {name: empty}
spec: {selector: {app: empty}, ports: [{name: http, port: 80}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http:
  - name: testers
    match: [{headers: {end-user: {exact: jason}}}]
    route: [{destination: {host: reviews, subset: v2}}]
  - timeout: 2s
    route:
    - {destination: {host: reviews, subset: v1}, weight: 90}
    - {destination: {host: reviews, subset: v9}, weight: 10}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews}
spec:
  host: reviews.default.svc.cluster.local
  subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]
  trafficPolicy: {outlierDetection: {consecutive5xxErrors: 3}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: all, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: v2-only}
spec: {selector: {matchLabels: {version: v2}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: of-ratings}
spec: {selector: {matchLabels: {app: ratings}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: ratings}
spec: {host: ratings}
"""


def _node(version: str, port: int) -> Node:
    labels = (("app", "reviews"), ("version", version))
    workload = Workload(f"reviews-{version}", service="reviews", labels=labels, address="127.0.0.1", port=port)
    name = f"sidecar~127.0.0.1~reviews-{version}-1.default~default.svc.cluster.local"
    return Node(name, workload, ready=True)


@pytest.fixture(scope="module")
def meshctl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Meshctl]:
    folder = tmp_path_factory.mktemp("mesh")
    (folder / "rules.yaml").write_text(RULES)
    with (
        Town(folder) as town,
        feed(town.target, of=_node("v1", 9001)),
        feed(town.target, of=_node("v2", 9002)) as last,
    ):
        last.source.want("reviews:9080")
        last.wait_for(lambda now: sum(len(each.endpoints) for each in now.assignments) == 2)

        def run(*words: str) -> Result:
            return CliRunner().invoke(app, [*words, "--control-plane", town.url], env={"MESHCTL_ADMIN": ""})

        yield run


def test_a_service_is_told_with_all_that_concerns_it(meshctl: Meshctl) -> None:
    """In the order of the mesh's kinds, with file and line; what is wrong comes last."""
    found = meshctl("describe", "reviews")
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[:3] == ["Service: reviews.default", "   Host: reviews.default.svc.cluster.local", "   Port: 9080"]
    assert "   127.0.0.1:9001 HEALTHY reviews-v1 app=reviews,version=v1" in lines
    assert any(line.startswith("   reviews-v2-1.default: ") for line in lines)
    kinds = [line.split(" (")[0] for line in lines if "rules.yaml:" in line and not line.startswith(("WARNING", " "))]
    assert kinds == [
        "VirtualService: reviews.default",
        "DestinationRule: reviews.default",
        "PeerAuthentication: all.istio-system",
        "AuthorizationPolicy: v2-only.default",
    ]
    assert any("rules.yaml:12)" in line for line in lines)
    assert '   Route "testers": 1 match, to host "reviews" subset v2' in lines
    assert (
        '   Route 2: to host "reviews" subset v1 with weight 90%, to host "reviews" subset v9 with weight 10%, timeout'
        in lines
    )
    assert "   Subsets: v1, v2" in lines
    assert "   ALLOW, 0 rules: lets nobody in" in lines
    (warning,) = (line for line in lines if line.startswith("WARNING"))
    assert "v9" in warning


def test_a_workload_is_told_with_what_selects_it(meshctl: Meshctl) -> None:
    """Its own endpoint only; as JSON and YAML the same."""
    told = json.loads(meshctl("describe", "reviews-v1", "-o", "json").stdout)
    assert told == yaml.safe_load(meshctl("describe", "reviews-v1", "-o", "yaml").stdout)
    assert (told["kind"], [each["address"] for each in told["endpoints"]]) == ("workload", ["127.0.0.1:9001"])
    names = {(each["kind"], each["name"]) for each in told["rules"]}
    assert ("AuthorizationPolicy", "v2-only") not in names
    assert ("PeerAuthentication", "all") in names


def test_what_is_not_there_is_said(meshctl: Meshctl) -> None:
    """And so is a service that nobody serves."""
    nobody = meshctl("describe", "nobody")
    assert (nobody.exit_code, "no service or workload default/nobody" in nobody.stderr) == (1, True)
    assert "WARNING: there is no endpoint: calls get 503 UH" in meshctl("describe", "empty").stdout
    assert meshctl("describe", "reviews", "-o", "xml").exit_code == 1
