"""Who is whose parent? Decided once, where a trace begins, and heeded by everyone after that."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import replace

import pytest

from meshlib.model import Headers, Outcome
from meshlib.policy import propagation
from meshlib.policy.call import outbound_call
from meshlib.policy.observer import Call, Served
from meshlib.policy.steps import Send
from meshlib.telemetry.meter import Meter
from meshlib.telemetry.recorder import Recorder
from meshlib.telemetry.tracing import MAX_SPANS, Ended, Trace, Tracer
from policy.flows import request
from snapshots import context, mesh, service

TRACE, SPAN = "ab" * 16, "cd" * 8


def tracer(sampling: float = 0.0) -> Tracer:
    with mesh() as anybody:
        return Tracer(Meter(Recorder(time.time), anybody.node), sampling, random.Random(1), 0.0)


def called(by: Tracer, headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that an attempt sets."""
    given = context(service("reviews:9080", [("10.0.0.1", 1)]))._replace(observer=by, call=Call())
    flow = outbound_call(request(headers=headers), given)
    step = next(flow)
    assert isinstance(step, Send)
    flow.send(Outcome(200))
    flow.close()
    return {name: value for operations in step.headers for name, value in operations.set}


def carried(**headers: str) -> propagation.Carried:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return propagation.Intake().take_up(raw, time.monotonic)


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": f"00-{TRACE}-{SPAN}-01"},
        {"b3": f"{TRACE}-{SPAN}-1"},
        {"x-b3-traceid": TRACE, "x-b3-spanid": SPAN, "x-b3-sampled": "1"},
    ],
)
def test_a_sampled_parent_is_heeded_in_each_form(headers: dict[str, str]) -> None:
    """Whatever the share of new traces is; and the answer is in W3C's form and in the one that came."""
    by = tracer(sampling=0.0)
    told = called(by, headers)
    [span] = by.taken()
    assert (span.at.trace_id, span.at.parent) == (TRACE, SPAN)
    assert told["traceparent"] == f"00-{TRACE}-{span.at.span_id}-01"
    assert told.keys() >= headers.keys()
    if "b3" in headers:
        assert told["b3"] == f"{TRACE}-{span.at.span_id}-1"


@pytest.mark.parametrize("headers", [{"traceparent": f"00-{TRACE}-{SPAN}-00"}, {"b3": f"{TRACE}-{SPAN}-0"}])
def test_an_unsampled_parent_is_heeded_too(headers: dict[str, str]) -> None:
    """No span, and its context goes on as it is."""
    by = tracer(sampling=100.0)
    assert called(by, headers) == {} and by.taken() == []


@pytest.mark.parametrize("flag", ["01", "00"])
def test_a_request_that_is_refused_has_a_span_like_any_other(flag: str) -> None:
    """Where its trace is sampled; or the hop that says no is the one that is missing."""
    by = tracer(sampling=0.0)
    raw = [(b"traceparent", f"00-{TRACE}-{SPAN}-{flag}".encode())]
    refused = Served("GET", "/details/1", Headers(raw), 0.0)
    refused.status, refused.reason = 403, "rbac_access_denied_matched_policy[none]"
    by.served(refused)
    spans = by.taken()
    assert [(each.at.trace_id, each.at.parent) for each in spans] == ([(TRACE, SPAN)] if flag == "01" else [])
    assert all(dict(each.attributes)["http.response.status_code"] == 403 and not each.error for each in spans)


@pytest.mark.parametrize("header", ["garbage", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01"])
def test_a_parent_that_is_none_begins_no_trace(header: str) -> None:
    """W3C Trace Context: an invalid traceparent is as good as none."""
    by = tracer(sampling=100.0)
    called(by, {"traceparent": header})
    called(by, {"x-b3-traceid": header, "x-b3-spanid": "no hex"})
    span, other = by.taken()
    assert other.at.parent == ""
    assert span.at.parent == "" and span.at.trace_id not in header


def test_a_decision_against_a_trace_is_told_to_those_who_are_called() -> None:
    """Or each of them would decide anew, and traces began in the middle."""
    by = tracer(sampling=0.0)
    served = Served("GET", "/", propagation.Carried(), 0.0)
    served.carried = carried(x_request_id="1")
    handed = by.serving(served)
    assert handed is not None and (handed.get("traceparent") or "").endswith("-00")
    assert handed.headers[-1][0] == b"x-request-id" and served.mark is None


def test_the_servers_span_is_the_parent_of_what_it_calls() -> None:
    """The application need not copy a header."""
    by = tracer()
    served = Served("GET", "/", propagation.Carried(), 0.0)
    served.carried = carried(traceparent=f"00-{TRACE}-{SPAN}-01")
    handed = by.serving(served)
    assert handed is not None and isinstance(served.mark, Trace)
    assert handed.get("traceparent") == f"00-{TRACE}-{served.mark.span_id}-01"
    assert served.mark.parent == SPAN


def test_spans_that_nobody_takes_are_dropped_and_counted() -> None:
    """The queue is bounded; the oldest go first."""
    by = tracer()
    for number in range(MAX_SPANS + 5):
        by._keep(Ended(Trace(TRACE, f"{number:016x}"), 2, "GET", 0.0, 1.0, (), ""))
    assert by.dropped == 5
    assert by.taken()[0].at.span_id == f"{5:016x}"


def test_a_call_without_a_trace_changes_no_header() -> None:
    """Unsampled is next to nothing: what goes on the wire is what went before."""
    assert called(tracer(sampling=0.0), {}) == {}


def test_an_exemplar_names_a_span_that_exists() -> None:
    """The bucket leads to the trace, and to the very span in it."""
    recorder = Recorder(time.time)
    with mesh() as anybody:
        by = Tracer(Meter(recorder, anybody.node), 100.0, random.Random(1), 0.0)
    called(by, {})
    [span] = by.taken()
    [exemplar] = recorder.series()[0].exemplars.values()
    assert (exemplar.trace_id, exemplar.span_id) == (span.at.trace_id, span.at.span_id)


def test_a_grpc_call_is_named_by_its_method() -> None:
    """As OpenTelemetry's conventions for RPC want it."""
    by = tracer(sampling=100.0)
    given = context(service("reviews:9080", [("10.0.0.1", 1)]))._replace(observer=by, call=(call := Call()))
    flow = outbound_call(
        request("http://reviews:9080/pkg.Svc/Get", "POST", {"content-type": "application/grpc"}), given
    )
    next(flow)
    flow.send(Outcome(200))
    call.grpc_status = "14"
    flow.close()
    [span] = by.taken()
    told = dict(span.attributes)
    assert span.name == "pkg.Svc/Get"
    assert (told["rpc.system.name"], told["rpc.status_code"]) == ("grpc", "UNAVAILABLE")
    assert span.error == "UNAVAILABLE"


def test_a_call_names_the_object_that_its_route_is_of() -> None:
    """With its file, as `meshctl config explain` does; the service's own route is of none."""
    by, given = tracer(sampling=100.0), service("reviews:9080", [("10.0.0.1", 1)])
    [configuration] = given.route_configurations
    [host] = configuration.virtual_hosts
    ruled = replace(host, routes=tuple(replace(each, origin="VirtualService a/b (b.yaml:1)") for each in host.routes))
    for known in (replace(given, route_configurations=(replace(configuration, virtual_hosts=(ruled,)),)), given):
        flow = outbound_call(request(), context(known)._replace(observer=by, call=Call()))
        next(flow)
        flow.send(Outcome(200))
        flow.close()
    told = [dict(span.attributes) for span in by.taken()]
    assert [each.get("mesh.object") for each in told] == ["VirtualService a/b (b.yaml:1)", None]


def test_a_call_is_told_by_the_conventions_for_http() -> None:
    """Where it was to go and where it went, with its query but for the credentials in it; a method that nobody knows
    is not a name."""
    by = tracer(sampling=100.0)
    for method in ("GET", "BREW"):
        given = context(service("reviews:9080", [("10.0.0.1", 81)]))._replace(observer=by, call=Call())
        flow = outbound_call(request("http://reviews:9080/a?token=S3CRET&b=1", method), given)
        next(flow)
        flow.send(Outcome(500))
        flow.close()
    get, brew = by.taken()
    told = dict(get.attributes)
    assert (get.name, get.error) == ("GET", "500")
    assert told["url.full"] == "http://reviews:9080/a?token=REDACTED&b=1"
    assert (told["server.address"], told["server.port"]) == ("reviews", 9080)
    assert (told["network.peer.address"], told["network.peer.port"]) == ("10.0.0.1", 81)
    other = dict(brew.attributes)
    assert (brew.name, other["http.request.method"], other["http.request.method_original"]) == (
        "HTTP",
        "_OTHER",
        "BREW",
    )


def test_a_server_is_told_by_the_conventions_for_http() -> None:
    """Path and query apart; the client's address as trusted proxies name it, and the one that is connected."""
    by = tracer(sampling=100.0)
    served = Served("GET", "/a?token=S3CRET&b=1", propagation.Carried(), 0.0, "HTTP/1.1")
    served.authority, served.client, served.status, served.route = "[::1]:8080", "10.0.0.9", 404, "/{name}"
    served.peer, served.client_port = served.peer._replace(remote="192.0.2.1"), 5000
    served.carried = propagation.Carried()
    by.serving(served)
    by.served(served)
    [span] = by.taken()
    told = dict(span.attributes)
    assert (span.name, span.error) == ("GET /{name}", "")
    assert (told["url.path"], told["url.query"]) == ("/a", "token=REDACTED&b=1")
    assert (told["server.address"], told["server.port"]) == ("::1", 8080)
    assert (told["client.address"], told["network.peer.address"]) == ("192.0.2.1", "10.0.0.9")
    assert told["network.peer.port"] == 5000


@pytest.mark.parametrize(("status", "error"), [("0", ""), ("5", ""), ("13", "INTERNAL"), ("14", "UNAVAILABLE")])
def test_a_servers_grpc_status_is_an_error_where_it_is_the_servers(status: str, error: str) -> None:
    """NOT_FOUND is the caller's business, and an error at its side only."""
    by = tracer(sampling=100.0)
    served = Served("POST", "/pkg.Svc/Get", propagation.Carried(), 0.0, "HTTP/2")
    served.status, served.grpc_status, served.carried = 200, status, propagation.Carried()
    by.serving(served)
    by.served(served)
    [span] = by.taken()
    assert (span.name, span.error) == ("pkg.Svc/Get", error)
