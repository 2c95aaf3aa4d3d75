"""Does the explanation say what the guard says, and name the rule that made it so?"""

from __future__ import annotations

import pytest

from meshlib.model import Headers, Request
from meshlib.policy.access_explanation import explain_access
from security.decisions import DECISIONS, OTHER, PLAIN, SLEEP, Decision, inbound


def request(target: str, host: str = "reviews", headers: tuple[tuple[str, str], ...] = ()) -> Request:
    method, path = target.split(" ")
    return Request(method, "http", host, path, Headers(tuple((k.encode(), v.encode()) for k, v in headers)))


def test_it_decides_as_the_guard_does() -> None:
    """On the whole table that every edge is held to."""

    def decided(each: Decision) -> bool:
        asked = request(each.target, each.host, each.headers)
        return explain_access(inbound(each.spec), asked, each.peer, 1000.0, lambda _: None).is_allowed

    assert [each for each in DECISIONS if decided(each) is not each.is_allowed] == []


@pytest.mark.parametrize(
    ("spec", "peer", "allowed", "rules", "reason"),
    [
        ("{rules: [{from: [{source: {namespaces: [bar]}}]}, {from: [{source: {namespaces: [foo]}}]}]}", SLEEP, True,
         ["ns[default]-policy[p]-rule[1]"], "an ALLOW rule applies"),
        ("{rules: [{from: [{source: {namespaces: [bar]}}]}]}", SLEEP, False, [], "no rule allows it"),
        ("{action: DENY, rules: [{from: [{source: {namespaces: [bar]}}]}]}", OTHER, False,
         ["ns[default]-policy[p]-rule[0]"], "denied by"),
        ("{action: DENY, rules: [{from: [{source: {namespaces: [bar]}}]}]}", PLAIN, True, [], "no DENY rule applies"),
        ("{action: CUSTOM, provider: {name: nobody}, rules: [{}]}", SLEEP, False,
         ["ns[default]-policy[p]-rule[0]"], "no provider"),
    ],
)  # fmt: skip
def test_the_rule_that_decided_is_named(spec: str, peer: object, allowed: bool, rules: list[str], reason: str) -> None:
    """With its object, file and line; where none did, why."""
    found = explain_access(inbound(spec), request("GET /"), peer, 1000.0, lambda _: None)  # type: ignore[arg-type]
    assert found.is_allowed is allowed
    assert [each.name for each in found.decided] == rules
    assert reason in found.reason
    assert all("AuthorizationPolicy default/p (p.yaml:4" in each.origin for each in found.decided)
