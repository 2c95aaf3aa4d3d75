"""Are the recorded callers that new rules would turn away named, with the rule; and none that they would not?"""

from __future__ import annotations

from typing import Any

import pytest

from meshlib.controlplane.telemetry_store import Cell, Labels
from meshlib.controlplane.what_if import Compared, compare
from meshlib.istio.parse import parse_text
from meshlib.model import Node, Workload
from pushes import REVIEWS

CALLEE = Node("r", Workload("reviews-v1", labels=(("app", "reviews"),), address="10.0.0.1", port=9080))
PRINCIPAL = "spiffe://cluster.local/ns/default/sa/{}"
SECURE = REVIEWS._replace(
    reporter="destination",
    connection_security_policy="mutual_tls",
    source_principal=PRINCIPAL.format("bookinfo-productpage"),
)
OLD = REVIEWS._replace(reporter="destination", source_workload="cron", connection_security_policy="none")


def cell(requests: int) -> Cell:
    made = Cell()
    made.requests = requests
    return made


BOTH, CRON = [("productpage-v1", 40, True), ("cron", 7, True)], [("cron", 7, True)]
TRAFFIC = {SECURE: cell(40), OLD: cell(7), SECURE._replace(response_code="403"): cell(1000)}


def policy(kind: str, spec: str, name: str = "p") -> str:
    head = f"apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: default}}\n"
    return f"{head}spec: {spec}\n"


def asked(text: str, before: str = "", traffic: dict[Labels, Cell] = TRAFFIC) -> Compared:
    objects, given = parse_text(before, "b").objects, parse_text(text, "t")
    assert not given.problems
    return compare(objects, given.objects, (), [CALLEE, Node("x", Workload("other"))], traffic, 300.0)


def told(found: Compared) -> list[tuple[str, int, bool]]:
    return [(each.caller.rpartition("/")[2], each.requests, each.is_certain) for each in found.turned_away]


def test_strict_turns_plaintext_away() -> None:
    """And says which object does; what was refused anyway is not counted."""
    found = asked(policy("PeerAuthentication", "{mtls: {mode: STRICT}}"))
    assert (told(found), found.judged) == ([("cron", 7, True)], 47)
    assert found.turned_away[0].callee == "workload:default/reviews-v1"
    assert found.turned_away[0].rules == ("PeerAuthentication default/p (t:1): STRICT, and it came in plaintext",)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/other]}}]}]}", BOTH),
        ("{rules: [{from: [{source: {principals: ['*/bookinfo-productpage']}}]}]}", CRON),
        ("{rules: [{from: [{source: {namespaces: [default]}}]}]}", CRON),
        ("{}", BOTH),
        ("{rules: [{}]}", []),
        ("{action: DENY, rules: [{from: [{source: {notPrincipals: ['*']}}]}]}", CRON),
        ("{action: DENY, rules: [{to: [{operation: {ports: ['9080']}}]}]}", BOTH),
        ("{action: DENY, rules: [{to: [{operation: {ports: ['1']}}]}]}", []),
        ("{action: AUDIT, rules: [{}]}", []),
        ("{selector: {matchLabels: {app: ratings}}, action: DENY, rules: [{}]}", []),
    ],
)
def test_rules_of_who_calls_are_decided(spec: str, expected: list[tuple[str, int, bool]]) -> None:
    """By identity, namespace and port, which are recorded; the rule's file is named."""
    found = asked(policy("AuthorizationPolicy", spec))
    assert told(found) == expected
    assert all("AuthorizationPolicy default/p (t:" in each.rules[0] for each in found.turned_away)


@pytest.mark.parametrize(
    ("spec", "depends_on"),
    [
        ("{action: DENY, rules: [{to: [{operation: {methods: [DELETE], paths: [/x]}}]}]}", ("method", "path")),
        ("{rules: [{to: [{operation: {methods: [GET]}}]}]}", ("method",)),
        ("{rules: [{when: [{key: 'request.headers[x-user]', values: [a]}]}]}", ("header x-user",)),
        ("{rules: [{from: [{source: {requestPrincipals: ['*']}}]}]}", ("token",)),
    ],
)
def test_what_nobody_has_recorded_is_left_open(spec: str, depends_on: tuple[str, ...]) -> None:
    """Neither promised nor threatened: it says what it hangs on."""
    found = asked(policy("AuthorizationPolicy", spec))
    assert told(found) == [("productpage-v1", 40, False), ("cron", 7, False)]
    assert {each.depends_on for each in found.turned_away} == {depends_on}


def test_tokens_alone_turn_away_only_bad_ones() -> None:
    """A RequestAuthentication lets in who brings none."""
    found = asked(policy("RequestAuthentication", "{jwtRules: [{issuer: me, jwks: '{\"keys\": []}'}]}"))
    assert {each.depends_on for each in found.turned_away} == {("token, if it has one",)}
    assert "RequestAuthentication default/p" in found.turned_away[0].rules[0]


def test_what_is_turned_away_already_is_no_news() -> None:
    """Only what gets worse; also a rule that goes lets nobody down."""
    deny = policy("AuthorizationPolicy", "{action: DENY, rules: [{from: [{source: {namespaces: [default]}}]}]}", "q")
    both = deny + "---\n" + policy("AuthorizationPolicy", "{action: DENY, rules: [{}]}")
    assert told(asked(both, deny)) == [("cron", 7, True)]
    assert told(asked(deny.replace("[default]", "[nobody]"), deny)) == []


def test_plaintext_that_was_an_order_is_not_held_against_the_caller() -> None:
    """Under DISABLE everybody comes in plaintext; who is in the mesh would use TLS as soon as it is taken."""
    disabled = policy("PeerAuthentication", "{mtls: {mode: DISABLE}}")
    traffic: dict[Any, Cell] = {OLD: cell(7)}
    found = asked(policy("PeerAuthentication", "{mtls: {mode: STRICT}}"), disabled, traffic)
    assert [(each.requests, each.is_certain) for each in found.turned_away] == [(7, False)]
    assert found.turned_away[0].depends_on == ("whether it comes over mutual TLS",)
