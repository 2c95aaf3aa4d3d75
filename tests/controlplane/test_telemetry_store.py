"""Is what processes push remembered rightly, and within bounds?"""

from __future__ import annotations

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from meshlib.controlplane.graph import graph
from meshlib.controlplane.otlp import Receiver
from meshlib.controlplane.telemetry_store import COARSE_SLOTS, FINE_SLOTS, OVERFLOW, Cell, TelemetryStore
from pushes import REVIEWS, metrics, spans

NOW = 1_000_000.0
DESTINATION = REVIEWS._replace(reporter="destination", connection_security_policy="mutual_tls")


def requests(count: int) -> Cell:
    cell = Cell()
    cell.requests = count
    return cell


def test_the_last_minute_is_what_was_pushed_in_it() -> None:
    """To whole slots of five seconds."""
    store = TelemetryStore()
    for age in (600, 65, 55, 5, 0):
        store.add({REVIEWS: requests(1)}, NOW - age)
    assert store.window(NOW - 60, NOW + 1)[REVIEWS].requests == 3
    assert store.window(NOW - 899, NOW + 1)[REVIEWS].requests == 5


def test_a_state_that_is_told_no_more_makes_room() -> None:
    """Pods come and go, whether anybody looks or not; those that are there are not forgotten for one that is new."""
    store = TelemetryStore(max_series=2)
    for pod, at in (("a", 0.0), ("b", 50.0), ("a", 59.0), ("c", 100.0), ("c", 111.0), ("d", 111.0)):
        store.set_gauge("up", (("pod", pod),), at, NOW + at)
    assert [(told["pod"], value) for _, told, value in store.gauges(NOW + 111.0)] == [("a", 59.0), ("c", 111.0)]
    for pod, at in (("d", 120.0), ("c", 121.0)):
        store.set_gauge("up", (("pod", pod),), at, NOW + at)
    assert [told["pod"] for _, told, _ in store.gauges(NOW + 121.0)] == ["d", "c"]


def test_a_day_is_remembered_by_the_minute_and_no_longer() -> None:
    """And the fine slots end after 15 minutes, so that memory stays bounded."""
    store = TelemetryStore()
    for minute in range(26 * 60):
        store.add({REVIEWS: requests(1)}, NOW + minute * 60)
    end = NOW + 26 * 3600
    assert sum(cells[REVIEWS].requests for _, _, cells in store.slots(end - 20 * 3600, end)) == 20 * 60
    assert len(store._coarse.slots) <= COARSE_SLOTS
    assert len(store._fine.slots) <= FINE_SLOTS


def test_what_comes_late_is_counted_when_it_happened() -> None:
    """A process whose push failed once sends the difference with the next."""
    store = TelemetryStore()
    store.add({REVIEWS: requests(1)}, NOW)
    store.add({REVIEWS: requests(2)}, NOW, NOW - 30)
    assert store.window(NOW - 32, NOW - 29)[REVIEWS].requests == 2
    store.add({REVIEWS: requests(4)}, NOW, NOW - 4000)
    assert store.window(NOW - 1, NOW + 1)[REVIEWS].requests == 5


def test_series_beyond_the_bound_are_counted_together_and_that_is_told() -> None:
    """A label that anyone can make up must not fill the control plane's memory."""
    store = TelemetryStore(max_series=10)
    for number in range(25):
        store.add({REVIEWS._replace(source_workload=f"w{number}"): requests(1)}, NOW)
    found = store.window(NOW - 60, NOW + 1)
    assert len(found) == 11
    assert found[OVERFLOW].requests == store.overflowed == 15
    later = NOW + 1000
    store.add({REVIEWS: requests(1)}, later)  # who has been silent for long makes room
    assert store.window(later - 1, later + 1)[REVIEWS].requests == 1


def test_quantiles_are_those_of_prometheus() -> None:
    """Linear within the bucket."""
    store = TelemetryStore()
    Receiver(store, lambda: NOW).metrics(metrics({REVIEWS: [3.0] * 50 + [70.0] * 50}, NOW))
    cell = store.window(NOW - 60, NOW + 1)[REVIEWS]
    assert cell.quantile(0.25) == pytest.approx(3.0)  # half of the 50 in (1, 5]
    assert cell.quantile(0.75) == pytest.approx(75.0)  # half of the 50 in (50, 100]
    assert Cell().quantile(0.5) is None


def test_each_request_is_on_one_edge_though_both_ends_report_it() -> None:
    """The destination's word counts; what no server saw is the source's."""
    store = TelemetryStore()
    failed = REVIEWS._replace(
        destination_workload="unknown",
        destination_workload_namespace="unknown",
        response_code="503",
        response_flags="UH",
    )
    Receiver(store, lambda: NOW).metrics(
        metrics({REVIEWS: [3.0] * 30, DESTINATION: [2.0] * 30, failed: [1.0] * 10}, NOW)
    )
    made = graph(store.window(NOW - 60, NOW + 1), NOW - 60, NOW)
    edges = {(edge.source, edge.target): edge for edge in made.edges}
    good = edges["workload:default/productpage-v1", "workload:default/reviews-v1"]
    assert (good.rates.rps, good.rates.errors, good.mtls, good.codes) == (0.5, 0.0, 1.0, {"200": 0.5})
    bad = edges["workload:default/productpage-v1", "service:default/reviews"]
    assert (bad.rates.errors, bad.health, list(bad.codes)) == (1.0, "failure", ["503 UH"])
    assert len(edges) == 2


def test_a_service_stands_between_its_callers_and_its_workloads() -> None:
    """As Kiali draws it; both edges bear the traffic."""
    store = TelemetryStore()
    two = DESTINATION._replace(destination_workload="reviews-v2", destination_version="v2")
    Receiver(store, lambda: NOW).metrics(metrics({DESTINATION: [2.0] * 40, two: [2.0] * 20}, NOW))
    made = graph(store.window(NOW - 60, NOW + 1), NOW - 60, NOW, services=True)
    rps = {edge.id: edge.rates.rps for edge in made.edges}
    assert rps == {
        "workload:default/productpage-v1>service:default/reviews>http": 1.0,
        "service:default/reviews>workload:default/reviews-v1>http": pytest.approx(40 / 60),
        "service:default/reviews>workload:default/reviews-v2>http": pytest.approx(20 / 60),
    }
    kinds = {node.id: (node.kind, node.version) for node in made.nodes}
    assert kinds["workload:default/reviews-v2"] == ("workload", "v2")
    assert kinds["service:default/reviews"] == ("service", "")


def test_a_trace_is_put_together_from_what_many_processes_push() -> None:
    """In whatever order it comes."""
    store = TelemetryStore()
    receiver = Receiver(store, lambda: NOW)
    receiver.traces(spans(("reviews", "02" * 8, "01" * 8, NOW + 1, 1.0, True)))
    receiver.traces(spans(("productpage", "01" * 8, "", NOW, 3.0, False)))
    (trace,) = store.traces()
    assert (trace.root.service, trace.duration, trace.has_failed, len(trace.spans)) == ("productpage", 3.0, True, 2)


def test_old_traces_make_room_for_new_ones() -> None:
    """And a trace without end is cut."""
    store = TelemetryStore(max_traces=3)
    receiver = Receiver(store, lambda: NOW)
    for number in range(5):
        receiver.traces(spans(("a", "01" * 8, "", NOW, 1.0, False), trace=f"{number:032x}"))
    assert [int(trace.trace_id, 16) for trace in store.traces()] == [4, 3, 2]
    many = [("a", f"{number:016x}", "", NOW, 1.0, False) for number in range(1, 300)]
    receiver.traces(spans(*many, trace="ff" * 16))
    assert (len(store.traces()[0].spans), store.traces()[0].dropped) == (200, 99)


def test_sums_since_the_start_of_a_process_are_refused_by_name() -> None:
    """Added up they would count each request again and again."""
    store = TelemetryStore()
    answer = Receiver(store, lambda: NOW).metrics(metrics({REVIEWS: [1.0]}, NOW, temporality=2))
    assert b"deltas" in answer
    assert not store.window(NOW - 60, NOW + 60)


@pytest.mark.parametrize("body", [b"\xff\xff", b"\x0a\x05ab"])
def test_what_is_no_message_is_told_so(body: bytes) -> None:
    """And nothing is remembered of it."""
    with pytest.raises(ValueError, match="no ExportMetricsServiceRequest"):
        Receiver(TelemetryStore()).metrics(body)


def test_what_is_kept_of_one_span_is_bounded() -> None:
    """Whoever pushes may have no good will: a thousand attributes, names without end, ids that are none."""
    request = ExportTraceServiceRequest()
    span = request.resource_spans.add().scope_spans.add().spans.add(trace_id=b"t" * 5000, span_id=b"s" * 5000)
    for number in range(1000):
        span.attributes.add(key=f"{number}-{'x' * 5000}").value.string_value = "y" * 5000
    store = TelemetryStore()
    Receiver(store, lambda: NOW).traces(request.SerializeToString())
    (found,) = store.spans(0.0)
    assert (len(found.trace_id), len(found.span_id), len(found.attributes)) == (32, 16, 128)
    assert all(len(name) <= 1024 and len(value) <= 1024 for name, value in found.attributes)
