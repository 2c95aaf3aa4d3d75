"""What Istio's webhook refuses of labels and of exportTo is refused here, by field."""

from __future__ import annotations

import pytest

from meshlib.istio.parse import parse_text

TEXT = "apiVersion: networking.istio.io/v1\nkind: %s\nmetadata: {name: x}\nspec: %s\n"
ROUTE = "http: [{route: [{destination: {host: a}}]}]"


@pytest.mark.parametrize(
    ("kind", "spec", "field"),
    [
        ("VirtualService", f"{{hosts: [a], exportTo: [a, a], {ROUTE}}}", "spec.exportTo[1]"),
        ("VirtualService", f"{{hosts: [a], exportTo: ['*', a], {ROUTE}}}", "spec.exportTo"),
        ("DestinationRule", "{host: a, exportTo: ['*', .]}", "spec.exportTo"),
        ("DestinationRule", "{host: a, subsets: [{name: v1, labels: {'a b': c}}]}", "spec.subsets[0].labels"),
        ("DestinationRule", "{host: a, subsets: [{name: v1, labels: {a: 'c d'}}]}", "spec.subsets[0].labels"),
        (
            "DestinationRule",
            "{host: a, workloadSelector: {matchLabels: {'a*': x}}}",
            "spec.workloadSelector.matchLabels",
        ),
        (
            "Sidecar",
            "{workloadSelector: {labels: {a: 'x*'}}, egress: [{hosts: ['./*']}]}",
            "spec.workloadSelector.labels",
        ),
        ("WorkloadEntry", "{address: 192.0.2.1, labels: {'a/b/c': x}}", "spec.labels"),
        (
            "Gateway",
            "{selector: {'': x}, servers: [{hosts: ['*'], port: {number: 80, name: h, protocol: HTTP}}]}",
            "spec.selector",
        ),
    ],
)
def test_what_nothing_can_match_is_refused(kind: str, spec: str, field: str) -> None:
    """A label that can't be would select nothing, silently."""
    (problem,) = parse_text(TEXT % (kind, spec), "x.yaml").problems
    assert problem.field == field


@pytest.mark.parametrize("label", ["app: a", "example.com/team.x: a_b.c-D", "a: ''", "a.b_c: '1'"])
def test_labels_that_can_be_are_taken(label: str) -> None:
    """Prefixes, dots, underscores, and no value at all."""
    rule = f"{{host: a, subsets: [{{name: v1, labels: {{{label}}}}}]}}"
    assert parse_text(TEXT % ("DestinationRule", rule), "x.yaml").problems == ()
