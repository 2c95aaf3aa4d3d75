"""Which Telemetry holds for a workload, and what does it say there? After pilot/pkg/model/telemetry.go."""

from __future__ import annotations

import pytest
from views import node, objects, view

from meshlib.istio.parse import parse_text
from meshlib.istio.translate import view_key
from meshlib.model import AS_SET, NewLabel, NodeKind, RemovedLabel, Reporting, SpanTag
from meshlib.xds.access import read, write

HEAD = "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {name: %s, namespace: %s}\nspec:\n"
METRICS = (
    "istio_requests_total",
    "istio_request_duration_milliseconds",
    "istio_request_bytes",
    "istio_response_bytes",
    "istio_request_messages_total",
    "istio_response_messages_total",
)
EVERY = tuple(sorted(METRICS))


def telemetry(spec: str, namespace: str = "default", name: str = "x", created: str = "") -> str:
    head = HEAD % (name, namespace)
    if created:
        head = head.replace("}\nspec", f", creationTimestamp: '{created}'}}\nspec")
    return head + "".join(f"  {line}\n" for line in spec.strip().splitlines())


def reporting(*texts: str, **labels: str) -> Reporting:
    return view(*texts, given=node(**labels)).snapshot.reporting


def test_what_is_nearer_has_the_last_word_field_by_field() -> None:
    """Root, namespace, workload; another workload's is not ours, and another namespace's neither."""
    found = reporting(
        telemetry("tracing: [{randomSamplingPercentage: 10, disableSpanReporting: true}]", "istio-system"),
        telemetry("tracing: [{randomSamplingPercentage: 20}]"),
        telemetry("tracing: [{disableSpanReporting: false}]\nselector: {matchLabels: {app: w}}", name="w"),
        telemetry("tracing: [{randomSamplingPercentage: 90}]\nselector: {matchLabels: {app: other}}", name="o"),
        telemetry("tracing: [{randomSamplingPercentage: 80}]", "elsewhere"),
        app="w",
    )
    assert (found.client.sampling, found.client.spans) == (200_000, True)
    assert found.server == found.client
    assert found.origin.count("Telemetry") == 3


def test_of_two_in_one_place_the_older_holds() -> None:
    """And of two of the same age, the first by name."""
    young = telemetry("tracing: [{randomSamplingPercentage: 1}]", name="a", created="2026-02-01T00:00:00Z")
    old = telemetry("tracing: [{randomSamplingPercentage: 2}]", name="b", created="2026-01-01T00:00:00Z")
    assert reporting(young, old).client.sampling == 20_000
    assert reporting(young.replace("a,", "c,"), young).client.sampling == 10_000


def test_nothing_said_is_as_the_process_is_set() -> None:
    """A percentage of 0 is something said."""
    assert reporting() == AS_SET
    assert reporting(telemetry("tracing: [{randomSamplingPercentage: 0}]")).client.sampling == 0


def test_directions_are_told_apart() -> None:
    """match.mode of tracing and of the access log; of an override by its own match."""
    found = reporting(
        telemetry(
            """
tracing: [{match: {mode: CLIENT}, randomSamplingPercentage: 5}]
accessLogging: [{match: {mode: SERVER}, filter: {expression: response.code >= 400}}]
metrics:
- overrides:
  - {match: {mode: SERVER}, disabled: true}
  - {match: {metric: REQUEST_COUNT, mode: SERVER}, disabled: false}
  - {match: {metric: ALL_METRICS, mode: CLIENT}, tagOverrides: {source_version: {operation: REMOVE}}}
"""
        )
    )
    assert (found.client.sampling, found.server.sampling) == (50_000, None)
    assert (found.client.access_log, found.server.access_log) == (None, True)
    assert found.server.log_filter == "response.code >= 400"
    assert found.server.no_metrics == tuple(each for each in EVERY if each != "istio_requests_total")
    assert (found.client.no_metrics, found.client.no_labels) == ((), ("source_version",))


def test_labels_are_made_said_otherwise_and_taken_back() -> None:
    """The last word holds, of each metric by itself."""
    given = telemetry(
        """
metrics:
- overrides:
  - {match: {metric: REQUEST_COUNT}, tagOverrides: {request_method: {value: request.method}, bad-name: {value: "1"}}}
  - {tagOverrides: {tenant: {value: "'x'"}, source_app: {value: "'y'"}, reporter: {operation: REMOVE}}}
  - {match: {metric: REQUEST_SIZE}, tagOverrides: {tenant: {value: "'z'"}, source_app: {operation: REMOVE}}}
  - {match: {mode: SERVER}, tagOverrides: {tenant: {operation: REMOVE}}}
"""
    )
    found = reporting(given)
    others = tuple(each for each in METRICS if each != "istio_request_bytes")
    assert found.client.new_labels == (
        NewLabel("request_method", "request.method", ("istio_requests_total",)),
        NewLabel("source_app", "'y'", others),
        NewLabel("tenant", "'x'", others),
        NewLabel("tenant", "'z'", ("istio_request_bytes",)),
    )
    assert found.client.removed_labels == (RemovedLabel("source_app", ("istio_request_bytes",)),)
    assert [each.name for each in found.server.new_labels] == ["request_method", "source_app"]
    assert (found.client.no_labels, found.server.no_labels) == ((), ("tenant",))
    assert read(Reporting, write(found), "reporting") == found


def test_what_is_said_of_every_metric_is_said_of_none_by_name() -> None:
    """One after the other or all at once."""
    one_by_one = ", ".join(
        f"{{match: {{metric: {name}}}, tagOverrides: {{a: {{value: request.host}}}}}}"
        for name in (
            *("REQUEST_COUNT", "REQUEST_DURATION", "REQUEST_SIZE", "RESPONSE_SIZE"),
            *("GRPC_REQUEST_MESSAGES", "GRPC_RESPONSE_MESSAGES"),
        )
    )
    assert reporting(telemetry(f"metrics: [{{overrides: [{one_by_one}]}}]")).client.new_labels == (
        NewLabel("a", "request.host"),
    )


def test_tags_come_from_four_places() -> None:
    """A header's name is compared in lower case."""
    tags = (
        "{a: {literal: {value: x}}, b: {header: {name: End-User, defaultValue: nobody}}, c: {environment: {name: E}}, "
        "d: {formatter: {value: '%PROTOCOL%'}}}"
    )
    assert reporting(telemetry(f"tracing: [{{customTags: {tags}}}]")).client.tags == (
        SpanTag("a", "literal", "x"),
        SpanTag("b", "header", "end-user", "nobody"),
        SpanTag("c", "environment", "E"),
        SpanTag("d", "formatter", "%PROTOCOL%"),
    )


def test_istios_names_can_be_left_out_of_spans() -> None:
    """They are in them unless somebody says no."""
    given = telemetry("tracing: [{match: {mode: CLIENT}, enableIstioTags: false}]")
    assert (reporting(given).client.workload, reporting(given).server.workload) == (False, True)


def test_the_context_of_traces_can_be_kept() -> None:
    """Of calls that the workload makes; what is nearer may give it free again."""
    kept = telemetry("tracing: [{disableContextPropagation: true}]", "istio-system")
    assert not reporting(kept).client.context
    assert reporting(kept, telemetry("tracing: [{disableContextPropagation: false}]")).client.context


def test_a_gateway_is_told_too() -> None:
    """By its listeners, since nobody calls it through an inbound one."""
    gateway = """apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: g}
spec:
  selector: {istio: ingressgateway}
  servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ["*"]}]
"""
    at = node(kind=NodeKind.ROUTER, istio="ingressgateway")
    found = view(gateway, telemetry("accessLogging: [{disabled: true}]"), given=at).snapshot
    assert found.listeners and found.reporting.server.access_log is False


def test_the_labels_that_it_selects_by_tell_nodes_apart() -> None:
    """Or one of them would get the view of the other."""
    given = objects(telemetry("selector: {matchLabels: {app: w}}\ntracing: [{randomSamplingPercentage: 1}]"))
    assert view_key(given, node(app="w")) != view_key(given, node(app="v"))


@pytest.mark.parametrize(
    ("spec", "field", "reason"),
    [
        ("tracing: [{randomSamplingPercentage: 101}]", "spec.tracing[0].randomSamplingPercentage", "<= 100"),
        ("tracing: [{customTags: {a: {}}}]", "spec.tracing[0].customTags.a", "exactly one"),
        ("accessLogging: [{filter: {expression: ' '}}]", "spec.accessLogging[0].filter.expression", "is empty"),
        (
            "metrics: [{overrides: [{tagOverrides: {a: {operation: REMOVE, value: x}}}]}]",
            "spec.metrics[0].overrides[0].tagOverrides.a.value",
            "with REMOVE",
        ),
        (
            "metrics: [{overrides: [{tagOverrides: {a: {operation: UPSERT}}}]}]",
            "spec.metrics[0].overrides[0].tagOverrides.a.value",
            "needs one",
        ),
        ("selector: {matchLabels: {app: a}}\ntargetRefs: [{kind: Service, name: a}]", "spec.targetRefs", "only one"),
        ("sampling: 1", "spec.sampling", "no such field"),
        (
            "tracing: [{customTags: {a: {formatter: {value: 'at %REQ(x'}}}}]",
            "spec.tracing[0].customTags.a.formatter.value",
            "begins or ends no command operator",
        ),
        (
            "tracing: [{customTags: {a: {formatter: {value: '%REQ%'}}}}]",
            "spec.tracing[0].customTags.a.formatter.value",
            "%REQ(...)%",
        ),
    ],
)
def test_what_can_not_be_meant_is_refused(spec: str, field: str, reason: str) -> None:
    """With the field that is to blame."""
    (problem,) = parse_text(telemetry(spec), "t.yaml").problems
    assert (problem.field, reason in problem.reason) == (field, True), problem


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ("metrics: [{reportingInterval: 5s}]", "spec.metrics[0].reportingInterval"),
        ("metrics: [{overrides: [{match: {metric: TCP_SENT_BYTES}}]}]", "spec.metrics[0].overrides[0].match"),
        (
            "metrics: [{overrides: [{match: {metric: GRPC_REQUEST_MESSAGES}, tagOverrides: {a: {value: '1'}}}]}]",
            "spec.metrics[0].overrides[0].tagOverrides.a",
        ),
        (
            "metrics: [{overrides: [{tagOverrides: {reporter: {value: request.host}}}]}]",
            "spec.metrics[0].overrides[0].tagOverrides.reporter",
        ),
        (
            "tracing: [{customTags: {a: {formatter: {value: '%BYTES_SENT% %DYNAMIC_METADATA(a:b)%'}}}}]",
            "spec.tracing[0].customTags.a.formatter.value",
        ),
    ],
)
def test_what_is_not_given_is_told(spec: str, field: str) -> None:
    """A warning; the rest of the object holds."""
    parsed = parse_text(telemetry(spec), "t.yaml")
    assert [each.field for each in parsed.warnings] == [field]
    assert parsed.objects
