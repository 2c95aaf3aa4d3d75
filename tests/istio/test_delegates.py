"""What becomes of a VirtualService that leaves part of its routes to others."""

from __future__ import annotations

import pytest
from views import PREFIX, decide, node, service, view, virtual_service, weights

from meshlib.istio.translate import Translation
from meshlib.model import Route

HANDS_OVER = "delegate: {name: part, namespace: team}"
TO_A, TO_B = "route: [{destination: {host: a.default.svc.cluster.local}}]", "route: [{destination: {host: b}}]"


def part(http: str, *, namespace: str = "team", more: str = "", name: str = "part") -> str:
    return (
        f"{PREFIX}kind: VirtualService\nmetadata: {{name: {name}, namespace: {namespace}}}\n"
        f"spec:\n  http: {http}\n  {more}\n"
    )


def made(root: str, *parts: str) -> Translation:
    return view(service(), service("b", "team"), virtual_service(root), *parts, workloads=())


def routes(translation: Translation) -> list[Route]:
    name = "outbound|80||a.default.svc.cluster.local"
    found = next(each for each in translation.snapshot.route_configurations if each.name == name)
    return list(found.virtual_hosts[0].routes)


def test_the_routes_of_a_delegate_take_the_place_of_the_rule() -> None:
    """Short names in it are of its own namespace; it is named as the origin; what follows the rule goes on."""
    translation = made(f"[{{match: [{{uri: {{prefix: /b}}}}], {HANDS_OVER}}}, {{{TO_A}}}]", part(f"[{{{TO_B}}}]"))
    assert translation.problems == ()
    assert weights(decide(translation.snapshot, "http://a:80/b/1")) == {"b.team.svc.cluster.local": 1}
    assert weights(decide(translation.snapshot, "http://a:80/")) == {"a.default.svc.cluster.local": 1}
    assert [each.origin for each in routes(translation)] == [
        "VirtualService team/part (test.yaml)",
        "VirtualService default/vs (test.yaml)",
    ]


def test_matches_of_both_must_hold() -> None:
    """Headers are joined, the delegate's path is within the root's."""
    translation = made(
        f"[{{match: [{{uri: {{prefix: /b}}, headers: {{x: {{exact: '1'}}}}}}], {HANDS_OVER}}}, {{{TO_A}}}]",
        part(f"[{{match: [{{uri: {{exact: /b/c}}, headers: {{y: {{exact: '2'}}}}}}], {TO_B}}}]"),
    )
    there = {"b.team.svc.cluster.local": 1}
    both = {"x": "1", "y": "2"}
    assert weights(decide(translation.snapshot, "http://a:80/b/c", both)) == there
    assert weights(decide(translation.snapshot, "http://a:80/b/d", both)) != there
    assert weights(decide(translation.snapshot, "http://a:80/b/c", {"y": "2"})) != there


@pytest.mark.parametrize(
    ("root", "inner"),
    [
        ("uri: {prefix: /b}", "uri: {prefix: /}"),
        ("uri: {prefix: /b}", "uri: {exact: /c}"),
        ("uri: {exact: /b}", "uri: {prefix: /b}"),
        ("uri: {exact: /b}", "uri: {exact: /c}"),
        ("uri: {regex: /b.*}", "uri: {prefix: /b}"),
        ("headers: {x: {exact: a}}", "headers: {x: {exact: b}}"),
        ("queryParams: {x: {exact: a}}", "queryParams: {x: {exact: b}}"),
        ("withoutHeaders: {x: {exact: a}}", "withoutHeaders: {x: {exact: b}}"),
        ("port: 80", "port: 81"),
        ("uri: {prefix: /b}, ignoreUriCase: true", "uri: {prefix: /b}"),
        ("method: {exact: GET}", "method: {exact: POST}"),
    ],
)
def test_a_match_that_lies_outside_is_left_out_and_named(root: str, inner: str) -> None:
    """The rest of the delegate, and of the root, holds."""
    translation = made(
        f"[{{match: [{{{root}}}], {HANDS_OVER}}}, {{{TO_A}}}]",
        part(f"[{{match: [{{{inner}}}], {TO_B}}}, {{name: rest, {TO_B}}}]"),
    )
    assert routes(translation)[0].name == "rest"
    (problem,) = translation.problems
    assert (problem.object, problem.field) == ("VirtualService team/part", "spec.http[0].match")
    assert "VirtualService default/vs hands over at spec.http[0]" in problem.reason


def test_a_delegate_takes_from_the_root_what_it_does_not_say() -> None:
    """And what it says goes before. Names are joined."""
    translation = made(
        f"[{{name: r, timeout: 1s, retries: {{attempts: 9}}, rewrite: {{uri: /x}}, {HANDS_OVER},"
        " headers: {request: {set: {k: v}}}}]",
        part(f"[{{name: p, timeout: 2s, {TO_B}}}]"),
    )
    (route,) = routes(translation)
    assert route.name == "r-p"
    assert route.request_headers.set == (("k", "v"),)
    decision = decide(translation.snapshot, "http://a:80/")
    assert decision.timeout == 2.0
    assert route.action.retry.attempts == 9  # type: ignore[union-attr]
    assert route.action.rewrite.prefix == "/x"  # type: ignore[union-attr]


def test_who_calls_is_the_roots_word() -> None:
    """A delegate can't say it, so what the root says holds for each of its routes."""
    texts = (
        service(),
        service("b", "team"),
        virtual_service(f"[{{match: [{{sourceLabels: {{app: x}}}}], {HANDS_OVER}}}, {{{TO_A}}}]"),
        part(f"[{{match: [{{uri: {{prefix: /}}}}], {TO_B}}}]"),
    )
    there = {"b.team.svc.cluster.local": 1}
    assert weights(decide(view(*texts, workloads=(), given=node(app="x")).snapshot, "http://a:80/")) == there
    assert weights(decide(view(*texts, workloads=()).snapshot, "http://a:80/")) != there


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((), "no VirtualService team/part without hosts is there, so the rule is left out"),
        (
            (part(f"[{{{TO_B}}}]", more="exportTo: ['.']"),),
            "VirtualService team/part is not exported to namespace default, so the rule is left out",
        ),
    ],
)
def test_a_delegate_that_can_not_be_had_is_named(parts: tuple[str, ...], reason: str) -> None:
    """Only that rule is left out."""
    translation = made(f"[{{match: [{{uri: {{prefix: /b}}}}], {HANDS_OVER}}}, {{{TO_A}}}]", *parts)
    assert weights(decide(translation.snapshot, "http://a:80/b")) == {"a.default.svc.cluster.local": 1}
    (problem,) = translation.problems
    assert (problem.object, problem.field, problem.reason) == (
        "VirtualService default/vs", "spec.http[0].delegate", reason,
    )  # fmt: skip


def test_a_virtual_service_without_hosts_that_nobody_delegates_to_is_named() -> None:
    """Forgotten hosts must not be silent."""
    translation = made(f"[{{{TO_A}}}]", part(f"[{{{TO_B}}}]"))
    (problem,) = translation.problems
    assert (problem.object, problem.field) == ("VirtualService team/part", "spec.hosts")
    assert "no VirtualService delegates to this one" in problem.reason
