"""Does the process tell what the configuration says, from the moment on in which it says so?"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from inbound.inbound_servers import uvicorn_server
from meshlib.mesh import Mesh
from meshlib.model import Inbound, NewLabel, RemovedLabel, Reporting, Snapshot, SpanTag, Told
from meshlib.policy.propagation import Intake, current
from meshlib.telemetry.label_sets import LABELS, with_new
from meshlib.telemetry.otlp import Deltas
from meshlib.telemetry.recorder import Recorder
from meshlib.telemetry.tracing import Ended
from snapshots import mesh, publish, service
from telemetry.receiver import attributes
from telemetry.test_both_ends import _asgi

PUSHED = {"telemetry": "http://127.0.0.1:9", "telemetry_interval": 3600.0}
"""To nobody: spans are looked at here, before they would be pushed."""


def with_rules(given: Snapshot, client: Told = Told(), server: Told = Told()) -> Snapshot:  # noqa: B008 -- frozen
    reporting = Reporting(client, server)
    return replace(
        given,
        listeners=tuple(replace(each, reporting=reporting) for each in given.listeners),
        inbound=(Inbound("inbound", reporting=reporting),),
    )


def spans_of(by: Mesh, number: int = 0) -> list[Ended]:
    """number: as many are waited for; a server's ends a moment after its caller has the answer."""
    deadline, found = time.monotonic() + 20.0, []
    while len(found := found + _taken(by)) < number and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def _taken(by: Mesh) -> list[Ended]:
    assert by.telemetry is not None and by.telemetry._tracer is not None
    return by.telemetry._tracer.taken()


def counted(by: Mesh, series: int = 0) -> dict[str, list[dict[str, str]]]:
    """series: as many are waited for, as in spans_of."""
    assert by.telemetry is not None
    deadline = time.monotonic() + 20.0
    while len(by.telemetry.recorder.series()) < series and time.monotonic() < deadline:
        time.sleep(0.01)
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(by.telemetry.exposition()[1].decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


def test_sampling_and_tags_follow_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """All, then none, then all without spans; the process itself is set to none."""
    monkeypatch.setenv("BUILD", "7")
    tags = (
        SpanTag("build", "environment", "BUILD"),
        SpanTag("user", "header", "end-user", "nobody"),
        SpanTag("team", "literal", "books"),
        SpanTag("gone", "environment", "NOT_SET"),
    )
    with (
        mesh(service="reviews") as server,
        uvicorn_server(server.asgi(_asgi)) as url,
        mesh(service="productpage", trace_sampling=0.0, **PUSHED) as client,
        client.Client() as http,
    ):
        reviews = service("reviews:9080", [("127.0.0.1", httpx.URL(url).port or 0)])
        publish(client, with_rules(reviews, Told(sampling=1_000_000, tags=tags)))
        http.get("http://reviews:9080/200", headers={"end-user": "jason"})
        (span,) = spans_of(client)
        told = dict(span.attributes)
        assert (told["build"], told["user"], told["team"], "gone" in told) == ("7", "jason", "books", False)
        for rules in (Told(sampling=0), Told(sampling=1_000_000, spans=False), Told()):
            publish(client, with_rules(reviews, rules))
            http.get("http://reviews:9080/200")
            assert spans_of(client) == []


@pytest.mark.parametrize("sampling", [0, 1_000_000])
def test_a_trace_can_be_kept_from_who_is_called(sampling: int) -> None:
    """Whether or not it leaves spans here; neither what was brought nor what the caller wrote goes along. The request's
    id does."""
    seen: list[dict[bytes, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        seen.append(dict(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    trace = f"00-{'1' * 32}-{'2' * 16}-01"
    brought = Intake().take_up([(b"traceparent", trace.encode()), (b"x-request-id", b"7")], time.monotonic, None)
    with (
        uvicorn_server(app) as url,
        mesh(service="productpage", trace_sampling=0.0, **PUSHED) as client,
        client.Client() as http,
    ):
        reviews = service("reviews:9080", [("127.0.0.1", httpx.URL(url).port or 0)])
        for context in (True, False):
            publish(client, with_rules(reviews, Told(sampling=sampling, context=context)))
            http.get("http://reviews:9080/", headers={"b3": f"{'1' * 32}-{'2' * 16}-1"} if sampling else {})
            token = current.set(brought)
            http.get("http://reviews:9080/")
            current.reset(token)
        spans = len(spans_of(client))
    told = [{name for name in each if name in (b"traceparent", b"b3")} for each in seen]
    assert told == [{b"traceparent", b"b3"} if sampling else set(), {b"traceparent"}, set(), set()]
    assert [each.get(b"x-request-id") for each in (seen[1], seen[3])] == [b"7", b"7"]
    assert spans == (4 if sampling else 2)


def test_the_log_begins_and_ends_by_the_configuration(caplog: pytest.LogCaptureFixture) -> None:
    """Though the process itself is set to write none; only lines that the filter takes, and by direction."""
    caplog.set_level(logging.INFO, "meshlib.access")

    def codes() -> list[Any]:
        found = [each.mesh["response_code"] for each in caplog.records if hasattr(each, "mesh")]
        caplog.clear()
        return found

    with mesh(service="reviews", **PUSHED) as server, uvicorn_server(server.asgi(_asgi)) as url:
        nobody = service("other:80", [])

        def ask(*paths: str) -> None:
            for path in paths:
                httpx.get(f"{url}/{path}", trust_env=False, timeout=20, headers={"user-agent": "probe"})

        ask("200")
        assert codes() == []
        errors = "response.code >= 400 && request.method == 'GET' && request.headers['user-agent'] == 'probe'"
        publish(server, with_rules(nobody, server=Told(access_log=True, log_filter=errors)))
        ask("200", "404", "503")
        assert codes() == [404, 503]
        publish(server, with_rules(nobody, client=Told(access_log=True), server=Told(access_log=False)))
        ask("503")
        assert codes() == []


@pytest.mark.parametrize("expression", ["response.code >=", "no.such.thing == 1", "response.nothing == 1", "1 + 1"])
def test_a_filter_that_can_not_decide_takes_everything(expression: str, caplog: pytest.LogCaptureFixture) -> None:
    """And says so, once if it could not even be read."""
    caplog.set_level(logging.INFO, "meshlib.access")
    with mesh(service="a", access_log="json") as client, client.Client() as http:
        publish(client, with_rules(service("b:80", []), Told(log_filter=expression)))
        for _ in range(2):
            http.get("http://b/")
    lines = [each for each in caplog.records if hasattr(each, "mesh")]
    assert [json.loads(each.getMessage())["response_code"] for each in lines] == [503, 503]
    assert sum("takes everything" in each.getMessage() for each in caplog.records) == 1


def test_metrics_and_labels_are_left_out() -> None:
    """What is left out by the source is told by nobody here; a label that is removed joins what differed in it."""
    with mesh(service="a", **PUSHED) as client, client.Client() as http:
        nobody = service("b:80", [])
        publish(client, nobody)
        http.get("http://b/")
        assert counted(client)["istio_requests_total"][0]["response_flags"] == "UH"
        told = Told(no_metrics=("istio_request_bytes",), no_labels=("response_flags", "source_workload"))
        publish(client, with_rules(nobody, told))
        http.get("http://b/")
        found = counted(client)
        assert [each.get("response_flags") for each in found["istio_requests_total"]] == ["UH", None]
        assert "source_workload" not in found["istio_requests_total"][1]
        assert "istio_request_bytes_count" not in found
        assert "istio_response_bytes_count" in found


def test_labels_are_made_by_expressions() -> None:
    """Of the request and of its answer; one of Istio's may be said otherwise; what can't be told is `unknown`. The text
    for Prometheus and the push have them, at both ends."""
    made = (
        NewLabel("request_method", "request.method"),
        NewLabel("is_slow", "request.duration > 100000"),
        NewLabel("tenant", "request.headers['x-tenant']"),
        NewLabel("destination_app", "'front-' + string(response.code)"),
        NewLabel("broken", "no.such.thing("),
    )
    with (
        mesh(service="reviews", **PUSHED) as server,
        uvicorn_server(server.asgi(_asgi)) as url,
        mesh(service="productpage", **PUSHED) as client,
        client.Client() as http,
    ):
        publish(server, with_rules(service("x:80", []), server=Told(new_labels=made)))
        host, _, port = url.removeprefix("http://").partition(":")
        reviews = service("reviews:9080", [(host, int(port))])
        publish(client, with_rules(reviews, client=Told(new_labels=made)))
        for tenant in ("a", "b"):
            http.get("http://reviews:9080/404", headers={"x-tenant": tenant})
        http.get("http://reviews:9080/404")
        for end in (client, server):
            found = counted(end, 3)["istio_requests_total"]
            assert [each["tenant"] for each in found] == ["a", "b", "unknown"]
            expected = {
                "request_method": "GET",
                "is_slow": "false",
                "destination_app": "front-404",
                "broken": "unknown",
            }
            assert all({**expected, "broken": "unknown"}.items() <= each.items() for each in found)
            assert end.telemetry is not None
            body = Deltas({}, 0.0).request(end.telemetry.recorder.series(), (), 1.0)
            message = ExportMetricsServiceRequest.FromString(body or b"")
            points = message.resource_metrics[0].scope_metrics[0].metrics[0].sum.data_points
            assert [attributes(each)["tenant"] for each in points] == ["a", "b", "unknown"]


def test_one_metric_bears_other_labels_than_the_rest() -> None:
    """A label that is made, said otherwise or removed for one of them: what it no longer tells apart is one series of
    it, with the sum, at Prometheus and in pushes, and the others are as they were."""
    size, count = "istio_request_bytes", "istio_requests_total"
    told = Told(
        new_labels=(
            NewLabel("tenant", "request.headers['x-tenant']", (count,)),
            NewLabel("source_app", "'y'", (size,)),
        ),
        removed_labels=(RemovedLabel("response_flags", (size,)), RemovedLabel("response_code", (size,))),
    )
    with mesh(service="a", labels=(("app", "a"),), **PUSHED) as client, client.Client() as http:
        publish(client, with_rules(service("b:80", []), told))
        for tenant in ("x", "y", "y"):
            http.get("http://b/", headers={"x-tenant": tenant})
        with pytest.raises(httpx.ConnectError):
            http.get("http://127.0.0.1:1/", headers={"x-tenant": "x"})
        found = counted(client)
        requests = found[count]
        assert [(each["tenant"], each["response_flags"], each["source_app"]) for each in requests] == [
            *(("x", "UH", "a"), ("y", "UH", "a")),
            ("x", "UF", "a"),
        ]
        sizes = found[f"{size}_count"]
        assert [(each["source_app"], each["destination_service"], "tenant" in each) for each in sizes] == [
            *(("y", requests[0]["destination_service"], False),),
            ("y", requests[2]["destination_service"], False),
        ]
        assert all(not {"response_flags", "response_code"} & set(each) for each in sizes)
        durations = found["istio_request_duration_milliseconds_count"]
        assert [(each["response_flags"], "tenant" in each) for each in durations] == [("UH", False), ("UF", False)]
        assert client.telemetry is not None
        deltas = Deltas({}, 0.0)
        pushes = []
        for _ in range(2):
            series = client.telemetry.recorder.series()
            pushes.append(ExportMetricsServiceRequest.FromString(deltas.request(series, (), 1.0) or b""))
            deltas.arrived(series, (), 1.0)
            http.get("http://b/", headers={"x-tenant": "y"})
        sums = [
            {
                metric.name: [each.as_int for each in metric.sum.data_points]
                or [each.count for each in metric.histogram.data_points]
                for metric in push.resource_metrics[0].scope_metrics[0].metrics
                if metric.name in (size, count)
            }
            for push in pushes
        ]
        assert sums == [{count: [1, 2, 1], size: [3, 1]}, {count: [1], size: [1]}]


def test_a_tag_is_a_text_with_what_envoys_operators_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the request and its answer, at both ends; what is not known is empty, and an empty text is no attribute."""
    monkeypatch.setenv("BUILD", "7")
    text = "%REQ(:METHOD)% %REQ(X-NONE?X-TENANT):3% %RESPONSE_CODE%%% %PROTOCOL% %ENVIRONMENT(BUILD)% [%RESP(x-none)%]"
    tags = (
        SpanTag("text", "formatter", text),
        SpanTag("path", "formatter", "%REQ(:path)% %REQ_WITHOUT_QUERY(:path)%"),
        SpanTag("is", "formatter", "%CEL(request.path == '/404?token=x')%"),
        SpanTag("query", "formatter", "%CEL(request.query)% %REQ(x-original)%"),
        SpanTag("flags", "formatter", "%RESPONSE_FLAGS%"),
        SpanTag("nothing", "formatter", "%DYNAMIC_METADATA(a)%%REQ(x-none)%"),
    )
    rules = Told(sampling=1_000_000, tags=tags)
    with (
        mesh(service="reviews", **PUSHED) as server,
        uvicorn_server(server.asgi(_asgi)) as url,
        mesh(service="productpage", **PUSHED) as client,
        client.Client() as http,
    ):
        publish(server, with_rules(service("x:80", []), server=rules))
        host, _, port = url.removeprefix("http://").partition(":")
        publish(client, with_rules(service("reviews:9080", [(host, int(port))]), client=rules))
        http.get("http://reviews:9080/404?token=x", headers={"x-tenant": "abcd", "x-original": "/a?sig=y"})
        for end, protocol in ((client, ""), (server, "HTTP/1.1")):
            (span,) = spans_of(end, 1)
            told = dict(span.attributes)
            assert told["text"] == f"GET abc 404% {protocol} 7 []"
            assert (told["path"], told["is"], told["flags"]) == ("/404?token=REDACTED /404", "True", "-")
            assert told["query"] == "token=REDACTED /a?sig=REDACTED"
            assert "nothing" not in told


def test_spans_say_whose_they_are_in_istios_words() -> None:
    """Kiali finds a workload's spans by them; `enableIstioTags: false` leaves them out."""
    with mesh(service="a", labels=(("app", "a"), ("version", "v3")), **PUSHED) as client, client.Client() as http:
        told = []
        for workload in (True, False):
            publish(client, with_rules(service("b:80", []), Told(sampling=1_000_000, workload=workload)))
            http.get("http://b/")
            told.append(dict(spans_of(client)[0].attributes))
        assert told[0]["istio.canonical_service"] == "a" and told[0]["istio.canonical_revision"] == "v3"
        assert told[0]["istio.namespace"] == "default" and told[0]["node_id"]
        assert not [name for name in told[1] if name.startswith("istio.") or name == "node_id"]


def test_what_is_made_beyond_the_limit_is_counted_together() -> None:
    """Whoever makes a label of a header lets callers make series."""
    recorder = Recorder(lambda: 0.0, max_series=2)
    for number in range(5):
        labels = with_new(("source", *["x"] * (len(LABELS) - 1)), [("tenant", str(number))])
        recorder.request(number, lambda labels=labels: labels, 0.1, 1, 1)  # type: ignore[misc]
    found = recorder.series()
    assert [each.count for each in found] == [1, 1, 3]
    assert len(found[2].labels) == len(LABELS)
