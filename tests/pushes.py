"""What a process would push: OTLP messages in one line."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from meshlib.controlplane.telemetry_store import BOUNDS, Labels

REVIEWS = Labels(
    source_workload="productpage-v1",
    source_workload_namespace="default",
    source_app="productpage",
    destination_workload="reviews-v1",
    destination_workload_namespace="default",
    destination_app="reviews",
    destination_version="v1",
    destination_service="reviews.default.svc.cluster.local",
    destination_service_name="reviews",
    destination_service_namespace="default",
    response_code="200",
)


def metrics(series: Mapping[Labels, Iterable[float]], at: float, temporality: int = 1) -> bytes:
    """Deltas (1) or cumulative sums (2). series: by labels, the milliseconds that each request took."""
    message = ExportMetricsServiceRequest()
    scope = message.resource_metrics.add().scope_metrics.add()
    total, took = (
        scope.metrics.add(name="istio_requests_total"),
        scope.metrics.add(name="istio_request_duration_milliseconds"),
    )
    total.sum.aggregation_temporality = took.histogram.aggregation_temporality = temporality
    total.sum.is_monotonic = True
    for labels, durations in series.items():
        durations = list(durations)
        buckets = [0] * (len(BOUNDS) + 1)
        for each in durations:
            buckets[next((i for i, bound in enumerate(BOUNDS) if each <= bound), len(BOUNDS))] += 1
        one: Any = total.sum.data_points.add(time_unix_nano=int(at * 1e9), as_int=len(durations))
        two: Any = took.histogram.data_points.add(
            time_unix_nano=int(at * 1e9),
            count=len(durations),
            sum=sum(durations),
            explicit_bounds=BOUNDS,
            bucket_counts=buckets,
        )
        for point in (one, two):
            for name, value in labels._asdict().items():
                point.attributes.add(key=name).value.string_value = value
    return message.SerializeToString()


def gauges(resource: Mapping[str, str], told: Mapping[str, Mapping[str, str]], at: float) -> bytes:
    """Each 1, with its attributes, by name."""
    message = ExportMetricsServiceRequest()
    given = message.resource_metrics.add()
    for name, value in resource.items():
        given.resource.attributes.add(key=name).value.string_value = value
    scope = given.scope_metrics.add()
    for name, attributes in told.items():
        point = scope.metrics.add(name=name).gauge.data_points.add(time_unix_nano=int(at * 1e9), as_double=1.0)
        for key, text in attributes.items():
            point.attributes.add(key=key).value.string_value = text
    return message.SerializeToString()


def retries(workload: str, cluster: str, count: int, at: float) -> bytes:
    """Tries after the first, as a process of this workload has counted them."""
    message = ExportMetricsServiceRequest()
    resource = message.resource_metrics.add()
    for name, value in (("istio.workload", workload), ("service.namespace", "default")):
        resource.resource.attributes.add(key=name).value.string_value = value
    total = resource.scope_metrics.add().metrics.add(name="meshlib_retries_total").sum
    total.aggregation_temporality = 1
    point: Any = total.data_points.add(time_unix_nano=int(at * 1e9), as_double=count)
    point.attributes.add(key="cluster").value.string_value = cluster
    return message.SerializeToString()


def spans(
    *told: tuple[str, str, str, float, float, bool],
    trace: str = "ab" * 16,
    attributes: Mapping[str, Mapping[str, str]] | None = None,
    servers: Collection[str] = (),
) -> bytes:
    """(service, span id, parent id or "", began, seconds, failed) each. attributes: by span id. servers: the ids of
    those that are servers' spans; the others are clients'."""
    message = ExportTraceServiceRequest()
    for service, span_id, parent, began, seconds, failed in told:
        resource = message.resource_spans.add()
        resource.resource.attributes.add(key="service.name").value.string_value = service
        span = resource.scope_spans.add().spans.add(
            trace_id=bytes.fromhex(trace),
            span_id=bytes.fromhex(span_id),
            parent_span_id=bytes.fromhex(parent),
            name="GET",
            kind=2 if span_id in servers else 3,
            start_time_unix_nano=int(began * 1e9),
            end_time_unix_nano=int((began + seconds) * 1e9),
        )
        span.status.code = 2 if failed else 1
        for name, value in (attributes or {}).get(span_id, {}).items():
            span.attributes.add(key=name).value.string_value = value
    return message.SerializeToString()
