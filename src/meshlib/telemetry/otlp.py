"""How does it get away? OTLP: deltas of what the recorder counted, and spans, pushed over gRPC or HTTP.

A push that fails loses nothing of the metrics: the next one carries the difference to the last that arrived. Spans wait
in a bounded queue; what does not fit is dropped, and counted.
"""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_DELTA

from meshlib.telemetry.label_sets import Pairs, differ_by_metric, pairs
from meshlib.telemetry.lines import Line
from meshlib.telemetry.recorder import BOUNDS, Series, Value, of_metric
from meshlib.version import __version__

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

_log = logging.getLogger("meshlib.telemetry")
_METRICS = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
_TRACES = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_LOGS = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"
_NOTHING: Series = Series((), 0.0)


class Sender(Protocol):
    """Sends serialised requests; raises OSError or RuntimeError-like errors of its library when it can't."""

    def metrics(self, body: bytes, timeout: float) -> None: ...
    def traces(self, body: bytes, timeout: float) -> None: ...
    def logs(self, body: bytes, timeout: float) -> None: ...
    def close(self) -> None: ...


Connect = Callable[[Sequence[tuple[str, Any]]], Any]
"""Makes a grpc.Channel with these options. May block for a few seconds; raises OSError when it can't now."""


class GrpcSender:
    """OTLP/gRPC, gzipped. target: host:port. connect: how that is reached; default its TLS is the system's, or none.
    prove: the metadata by which each call says who makes it."""

    def __init__(
        self,
        target: str,
        secure: bool = False,
        connect: Connect | None = None,
        prove: Callable[[], tuple[tuple[str, str], ...]] = tuple,
    ) -> None:
        import grpc

        def of_the_system(options: Sequence[tuple[str, Any]]) -> Any:
            if secure:
                return grpc.secure_channel(target, grpc.ssl_channel_credentials(), options)
            return grpc.insecure_channel(target, options)

        self._connect, self._prove = connect or of_the_system, prove
        self._channel: Any = None
        self._gzip = grpc.Compression.Gzip

    def metrics(self, body: bytes, timeout: float) -> None:
        self._send(_METRICS, body, timeout)

    def traces(self, body: bytes, timeout: float) -> None:
        self._send(_TRACES, body, timeout)

    def logs(self, body: bytes, timeout: float) -> None:
        self._send(_LOGS, body, timeout)

    def _send(self, method: str, body: bytes, timeout: float) -> None:
        if self._channel is None:
            # gRPC's own reconnect back-off grows to two minutes; a receiver that is back is wanted back.
            options = (("grpc.max_reconnect_backoff_ms", 5000), ("grpc.use_local_subchannel_pool", 1))
            self._channel = self._connect(options)
        try:
            call = self._channel.unary_unary(method)
            call(body, timeout=timeout, compression=self._gzip, metadata=self._prove())
        except BaseException:
            self.close()  # a channel keeps the roots that it was made with, and these may have been replaced
            raise

    def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


class HttpSender:
    """OTLP/HTTP with protobuf, gzipped. base: the URL before /v1/metrics."""

    def __init__(self, base: str, headers: Mapping[str, str]) -> None:
        import httpx

        self._base = base.rstrip("/")
        told = {**headers, "content-type": "application/x-protobuf", "content-encoding": "gzip"}
        self._client = httpx.Client(headers=told, trust_env=False)

    def metrics(self, body: bytes, timeout: float) -> None:
        self._post("/v1/metrics", body, timeout)

    def traces(self, body: bytes, timeout: float) -> None:
        self._post("/v1/traces", body, timeout)

    def logs(self, body: bytes, timeout: float) -> None:
        self._post("/v1/logs", body, timeout)

    def _post(self, path: str, body: bytes, timeout: float) -> None:
        response = self._client.post(self._base + path, content=gzip.compress(body, 1), timeout=timeout)
        response.raise_for_status()

    def close(self) -> None:
        self._client.close()


class Deltas:
    """What has been counted since the last push that arrived. resource: attributes of this process."""

    def __init__(self, resource: Mapping[str, str], began: float) -> None:
        self._resource = resource
        self._sent: dict[tuple[str, ...], Series] = {}
        self._counts: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._since = began

    def request(
        self,
        series: Sequence[Series],
        values: Iterable[Value],
        now: float,
        hidden: Collection[tuple[str, str]] = (),
    ) -> bytes | None:
        """A serialised ExportMetricsServiceRequest; None when nothing has happened. now: Unix seconds. hidden: (metric,
        reporter) pairs that are not told."""
        message = ExportMetricsServiceRequest()
        resource = message.resource_metrics.add()
        set_attributes(resource.resource.attributes, self._resource.items())
        scope = resource.scope_metrics.add()
        scope.scope.name, scope.scope.version = "meshlib", __version__
        start, end = int(self._since * 1e9), int(now * 1e9)
        changed = [
            (each, before)
            for each in series
            if (before := self._sent.get(each.labels, _NOTHING)) is _NOTHING or before.count != each.count
        ]
        metrics_differ = any(differ_by_metric(each.labels) for each in series)

        def told(name: str) -> list[tuple[Pairs, Series, Series]]:
            """What has changed, with what it was; as this metric bears its labels."""
            if not metrics_differ:
                shown = (pair for pair in changed if (name, pair[0].labels[0]) not in hidden)
                return [(pairs(each.labels, name), each, before) for each, before in shown]
            known = dict(of_metric(self._sent.values(), name))
            now = of_metric((each for each in series if (name, each.labels[0]) not in hidden), name)
            paired = ((labels, each, known.get(labels, _NOTHING)) for labels, each in now)
            return [each for each in paired if each[1].count != each[2].count]

        if requests := told("istio_requests_total"):
            total = scope.metrics.add(name="istio_requests_total", unit="1")
            _delta(total.sum, True)
            for labels, each, before in requests:
                point = total.sum.data_points.add(
                    start_time_unix_nano=start, time_unix_nano=end, as_int=each.count - before.count
                )
                set_attributes(point.attributes, labels)
        for name, unit, buckets, sum_of in (
            ("istio_request_duration_milliseconds", "ms", "durations", "milliseconds"),
            ("istio_request_bytes", "By", "requests", "request_bytes"),
            ("istio_response_bytes", "By", "responses", "response_bytes"),
        ):
            if measured := told(name):
                metric = scope.metrics.add(name=name, unit=unit)
                _delta(metric.histogram)
                for labels, each, before in measured:
                    fallen = zip(getattr(each, buckets), getattr(before, buckets), strict=True)
                    part = metric.histogram.data_points.add(
                        start_time_unix_nano=start,
                        time_unix_nano=end,
                        count=each.count - before.count,
                        sum=getattr(each, sum_of) - getattr(before, sum_of),
                        explicit_bounds=BOUNDS,
                        bucket_counts=[new - old for new, old in fallen],
                    )
                    set_attributes(part.attributes, labels)
                    if buckets == "durations":
                        _add_exemplars(part, each, before)
        for value in values:
            self._add_value(scope, value, start, end)
        return message.SerializeToString() if scope.metrics else None

    def _add_value(self, scope: Any, value: Value, start: int, end: int) -> None:
        if not value.is_counter:
            point = scope.metrics.add(name=value.name).gauge.data_points.add(time_unix_nano=end, as_double=value.value)
        else:
            amount = value.value - self._counts.get((value.name, value.labels), 0)
            if amount <= 0:
                return
            metric = scope.metrics.add(name=value.name)
            _delta(metric.sum, True)
            point = metric.sum.data_points.add(start_time_unix_nano=start, time_unix_nano=end, as_double=amount)
        set_attributes(point.attributes, value.labels)

    def arrived(self, series: Sequence[Series], values: Iterable[Value], now: float) -> None:
        self._sent = {each.labels: each for each in series}
        self._counts = {(each.name, each.labels): each.value for each in values if each.is_counter}
        self._since = now


def _delta(of: Any, monotonic: bool = False) -> None:
    of.aggregation_temporality = AGGREGATION_TEMPORALITY_DELTA
    if monotonic:
        of.is_monotonic = True


def _add_exemplars(point: Any, each: Series, before: Series) -> None:
    for bucket, exemplar in each.exemplars.items():
        if before.exemplars.get(bucket) != exemplar:
            point.exemplars.add(
                time_unix_nano=int(exemplar.at * 1e9),
                as_double=exemplar.value,
                trace_id=bytes.fromhex(exemplar.trace_id),
                span_id=bytes.fromhex(exemplar.span_id),
            )


def set_attributes(of: Any, pairs: Iterable[tuple[str, object]]) -> None:
    for name, value in pairs:
        attribute = of.add(key=name)
        if isinstance(value, bool):
            attribute.value.bool_value = value
        elif isinstance(value, int):
            attribute.value.int_value = value
        else:
            attribute.value.string_value = str(value)


def spans_request(resource: Mapping[str, str], spans: Iterable[Span]) -> bytes:
    message = ExportTraceServiceRequest()
    of = message.resource_spans.add()
    set_attributes(of.resource.attributes, resource.items())
    scope = of.scope_spans.add()
    scope.scope.name, scope.scope.version = "meshlib", __version__
    scope.spans.extend(spans)
    return message.SerializeToString()


def lines_request(resource: Mapping[str, str], lines: Iterable[Line]) -> bytes:
    """A serialised ExportLogsServiceRequest: the logger is the scope, as OpenTelemetry's own bridge has it."""
    message = ExportLogsServiceRequest()
    of = message.resource_logs.add()
    set_attributes(of.resource.attributes, resource.items())
    scopes: dict[str, Any] = {}
    for each in lines:
        if each.logger not in scopes:
            scopes[each.logger] = of.scope_logs.add()
            scopes[each.logger].scope.name = each.logger
        record = scopes[each.logger].log_records.add(
            time_unix_nano=int(each.at * 1e9),
            severity_number=_severity(each.level),
            severity_text=logging.getLevelName(each.level),
            trace_id=bytes.fromhex(each.trace_id),
            span_id=bytes.fromhex(each.span_id),
        )
        record.body.string_value = each.text
        told = (("mesh.direction", each.direction), *each.fields) if each.direction else each.fields
        set_attributes(record.attributes, told)
    return message.SerializeToString()


def _severity(level: int) -> Any:
    """logging's numbers, by tens, as OpenTelemetry has them, by fours: DEBUG 5, INFO 9, WARN 13, ERROR 17, FATAL 21."""
    return min(21, max(1, 1 + level // 10 * 4))
