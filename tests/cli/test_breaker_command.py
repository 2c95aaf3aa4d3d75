"""Does an operator's word about a circuit reach the processes that call, and can it be taken back?"""

from __future__ import annotations

import re

import httpx

from cli.test_tap import Meshctl, Running, eventually, meshctl, running
from meshlib.controlplane.breakers import breaker_of, ejected_of, live_badges
from meshlib.istio.parse import parse_text

__all__ = ["meshctl", "running"]
POLICY = """
apiVersion: meshlib.io/v1alpha1
kind: BackendTrafficPolicy
metadata: {name: careful}
spec: {host: reviews, breaker: {failureRate: 50}}
"""
CLUSTER = "outbound|9080||reviews.default.svc.cluster.local"


def test_a_circuit_is_opened_in_its_callers_and_released(running: Running, meshctl: Meshctl) -> None:
    """By a real control plane and a real caller, whose calls get 503 UO meanwhile; it stands in the change history."""
    shown = meshctl("breaker", "open", "reviews", "--dry-run").stdout
    assert "kind: BackendTrafficPolicy" in shown and "forced: OPEN" in shown
    assert meshctl("get", "btp").stdout == ""
    assert "backendtrafficpolicy" in meshctl("breaker", "open", "reviews").stdout.lower()

    def answer() -> int:
        with running.client.Client() as http:
            response = http.get("http://reviews:9080/200")
            return response.status_code if response.headers.get("x-envoy-overloaded") else 0

    eventually(lambda: answer() == 503, "the caller's circuit is open")
    assert meshctl("breaker", "show", "reviews").stdout.split()[4:5] == ["OPEN"]
    assert "deleted" in meshctl("breaker", "release", "reviews").stdout
    eventually(lambda: answer() == 0, "the caller calls again")
    nothing = meshctl("breaker", "release", "reviews")
    assert (nothing.exit_code, "there is nothing to release" in nothing.stderr) == (1, True)
    assert meshctl("breaker", "open", "nobody").exit_code == 1
    changes = httpx.get(f"{running.town.url}/v1/changes").json()["changes"]
    assert [bool(each["after"]) for each in changes if each["object"].startswith("BackendTrafficPolicy")] == [
        True,
        False,
    ]


def is_reviews(host: str, namespace: str) -> bool:
    return host.partition(".")[0] == "reviews"


def test_what_a_policy_says_besides_stays() -> None:
    """Its own rules of when to open, and its name."""
    objects = parse_text(POLICY, "file.yaml").objects
    found = breaker_of("reviews", "default", is_reviews, objects, ())
    assert (found.name, found.forced) == ("careful", "")
    assert re.search(r"failureRate: 50\n +forced: OPEN", found.open)
    (opened,) = parse_text(found.open, "x").objects
    again = breaker_of("reviews", "default", is_reviews, [opened], ())
    assert (again.forced, "forced" in again.release, "failureRate: 50" in again.release) == ("OPEN", False, True)


def test_a_policy_of_the_same_name_for_something_else_is_not_replaced() -> None:
    """What is applied replaces an object whole: one of a subset, or of another service, is left alone."""
    for spec in (
        "{host: ratings, breaker: {failureRate: 50}}",
        "{host: reviews, subset: v1, breaker: {failureRate: 50}}",
    ):
        other = POLICY.replace("careful", "reviews").replace("{host: reviews, breaker: {failureRate: 50}}", spec)
        found = breaker_of("reviews", "default", is_reviews, parse_text(other, "file.yaml").objects, ())
        (opened,) = parse_text(found.open, "x").objects
        assert (found.name, opened.name, found.before) == ("reviews-breaker", "reviews-breaker", "")


def test_what_callers_tell_is_summed_up() -> None:
    """Their circuits by state; whom they leave alone; and the marks of the graph."""
    told = {"cluster": CLUSTER, "istio.workload": "productpage-v1", "service.namespace": "default"}
    states = [
        ("meshlib_breaker_open", {**told, "service.instance.id": "a"}, 1.0),
        ("meshlib_breaker_open", {**told, "service.instance.id": "b"}, 0.0),
        ("meshlib_endpoint_ejected", {**told, "endpoint": "10.0.0.1:9080"}, 1.0),
        ("meshlib_endpoints_ejected", told, 1.0),
        ("meshlib_endpoints_ejected", {**told, "cluster": "outbound|1||x.default.svc.cluster.local"}, 0.0),
    ]
    assert breaker_of("reviews", "default", is_reviews, (), states).states == {"closed": 1, "open": 1}
    (ejected,) = ejected_of(is_reviews, "default", states)
    assert (ejected.address, ejected.by) == ("10.0.0.1:9080", ("productpage-v1.default",))
    assert live_badges(states, lambda host: host.partition(".")[0]) == {"reviews": ("breaker-open", "ejected")}
