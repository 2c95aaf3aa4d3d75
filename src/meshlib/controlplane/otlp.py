"""What do processes push? OTLP metrics, traces and logs, over gRPC and HTTP, read into the stores.

With TLS, or access control, a process tells only of itself: whoever pushes proves an identity, and what is told of
another namespace's workloads, or by another principal, is refused whole.

Only what the picture needs is read: Istio's request metrics and gauges; every other metric is accepted and let go, so
that whoever points an exporter here gets no error. Cumulative sums are no deltas and are told so (partial success).
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Collection, Iterable
from itertools import islice
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_DELTA
from starlette.requests import Request
from starlette.responses import Response

from meshlib.controlplane.authentication import Authenticator, NotAuthenticated, bearer
from meshlib.controlplane.ca_service import caller_of
from meshlib.controlplane.log_store import LogStore, line_of
from meshlib.controlplane.telemetry_store import BOUNDS, Cell, Labels, Span, TelemetryStore, labels_of_retry
from meshlib.model import SpiffeId

logger = logging.getLogger("meshlib.controlplane.otlp")

MAX_BODY = 16 * 1024 * 1024
"""Bytes, unpacked."""
PROTOBUF = "application/x-protobuf"
_MAX_VALUE = 1024
"""Characters of a name, or of a value."""
_MAX_ATTRIBUTES = 128
"""Of one resource, span or line: OpenTelemetry's own limit (OTEL_ATTRIBUTE_COUNT_LIMIT)."""
_KINDS = ("internal", "internal", "server", "client", "producer", "consumer")
_HISTOGRAMS = {
    "istio_request_duration_milliseconds": "milliseconds",
    "istio_request_bytes": "request_bytes",
    "istio_response_bytes": "response_bytes",
}
RETRIES = "meshlib_retries_total"
_COUNTED = frozenset({"istio_requests_total", RETRIES, *_HISTOGRAMS})


class NotOwn(Exception):
    """What was pushed is about somebody else. The message says what."""


Read = Callable[[bytes, SpiffeId | None], bytes]
Accounts = Callable[[str, str], Collection[str]]
"""(namespace, workload) -> the service accounts of the connected processes that bear this name."""


class Receiver:
    """Reads what is pushed into `store`, and lines of logs into `logs`. clock: seconds since 1970."""

    def __init__(
        self, store: TelemetryStore, clock: Callable[[], float] = time.time, logs: LogStore | None = None
    ) -> None:
        self._store, self._clock = store, clock
        self._logs = LogStore() if logs is None else logs
        self._authenticator: Authenticator | None = None
        self._is_required_by_grpc = self._is_required_by_http = False
        self._accounts: Accounts = lambda namespace, workload: ()

    def authenticate_by(self, authenticator: Authenticator, accounts: Accounts, *, grpc: bool, http: bool) -> None:
        """grpc, http: whether whoever pushes by it has to prove an identity; who shows a token is held to it anyway."""
        self._authenticator, self._accounts = authenticator, accounts
        self._is_required_by_grpc, self._is_required_by_http = grpc, http

    def metrics(self, body: bytes, by: SpiffeId | None = None) -> bytes:
        """by: who has pushed it; None where nobody was asked. Raises ValueError for what is no
        ExportMetricsServiceRequest, NotOwn."""
        request = _parsed(ExportMetricsServiceRequest, body)
        if by is not None:
            for resource in request.resource_metrics:
                self._check(by, resource.resource)
                for scope in resource.scope_metrics:
                    for metric in scope.metrics:
                        self._check_points(by, metric)
        now = self._clock()
        counted: dict[Labels, Cell] = {}
        at: float | None = None
        refused = 0
        for resource in request.resource_metrics:
            told = _texts(resource.resource.attributes)
            if by is not None:  # who says nothing is where its identity is
                told["service.namespace"] = by.namespace
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    kind = metric.WhichOneof("data")
                    data: Any = getattr(metric, kind or "gauge")
                    if kind == "gauge":
                        for point in data.data_points:
                            value = point.as_double if point.WhichOneof("value") == "as_double" else float(point.as_int)
                            # What was checked is the resource: no point says of whom it is.
                            name = tuple(sorted({**_texts(point.attributes), **told}.items()))
                            self._store.set_gauge(metric.name, name, value, now)
                    elif metric.name in _COUNTED:
                        if getattr(data, "aggregation_temporality", 0) != AGGREGATION_TEMPORALITY_DELTA:
                            refused += len(data.data_points)
                            continue
                        for point in data.data_points:
                            if metric.name == RETRIES:
                                _count_retries(counted, told, point)
                            else:
                                _count(counted, metric.name, point)
                            at = point.time_unix_nano / 1e9
        if counted:
            self._store.add(counted, now, at)
        answer = ExportMetricsServiceResponse()
        if refused:
            answer.partial_success.rejected_data_points = refused
            answer.partial_success.error_message = "istio_* metrics must be deltas (aggregation temporality DELTA)"
        return answer.SerializeToString()

    def traces(self, body: bytes, by: SpiffeId | None = None) -> bytes:
        """by: who has pushed it; None where nobody was asked. Raises ValueError for what is no
        ExportTraceServiceRequest, NotOwn."""
        request = _parsed(ExportTraceServiceRequest, body)
        if by is not None:
            for resource in request.resource_spans:
                self._check(by, resource.resource)
        for resource in request.resource_spans:
            told = _texts(resource.resource.attributes)
            if by is not None:
                told["service.namespace"] = by.namespace
            service = told.get("service.name", "unknown_service")
            for scope in resource.scope_spans:
                self._store.add_spans(_span(each, service, told) for each in scope.spans)
        return ExportTraceServiceResponse().SerializeToString()

    def logs(self, body: bytes, by: SpiffeId | None = None) -> bytes:
        """by: who has pushed it; None where nobody was asked. Raises ValueError for what is no
        ExportLogsServiceRequest, NotOwn."""
        request = _parsed(ExportLogsServiceRequest, body)
        if by is not None:
            for resource in request.resource_logs:
                self._check(by, resource.resource)
        found = []
        for resource in request.resource_logs:
            told = _texts(resource.resource.attributes)
            if by is not None:
                told["service.namespace"] = by.namespace
            for scope in resource.scope_logs:
                for record in scope.log_records:
                    found.append(
                        line_of(
                            told,
                            scope.scope.name[:_MAX_VALUE],
                            record.time_unix_nano / 1e9 or self._clock(),
                            record.severity_text[:16],
                            str(record.body.string_value),
                            _texts(record.attributes),
                            record.trace_id[:16].hex(),
                            record.span_id[:8].hex(),
                        )
                    )
        self._logs.add(found)
        return ExportLogsServiceResponse().SerializeToString()

    # Whose it is

    def _check(self, by: SpiffeId, resource: Any) -> None:
        told = _texts(resource.attributes)
        _check_is(by, "service.namespace", told.get("service.namespace", by.namespace), by.namespace)
        instance = told.get("service.instance.id", "").split("~")
        if len(instance) == 4:  # a node's id
            _check_is(by, "service.instance.id", instance[2].rpartition(".")[2], by.namespace)
        if workload := told.get("istio.workload", ""):
            accounts = self._accounts(by.namespace, workload)
            if accounts and by.service_account not in accounts:
                raise NotOwn(f"{by} tells of workload {workload}, which runs as {', '.join(sorted(accounts))}")

    def _check_points(self, by: SpiffeId, metric: Any) -> None:
        if metric.name != "istio_requests_total" and metric.name not in _HISTOGRAMS:
            return
        data: Any = getattr(metric, metric.WhichOneof("data") or "gauge")
        for point in data.data_points:
            told = {each.key: _text(each.value) for each in point.attributes}
            end = told.get("reporter", "source")
            _check_is(by, "reporter", end, "source", "destination")
            _check_is(by, f"{end}_workload_namespace", told.get(f"{end}_workload_namespace", ""), by.namespace)
            _check_is(by, f"{end}_principal", told.get(f"{end}_principal", "unknown"), by.uri, "unknown", "")

    # gRPC

    def add_to(self, server: grpc.aio.Server) -> None:
        async def metrics(body: bytes, context: Any) -> bytes:
            return await self._answer(self.metrics, body, context)

        async def traces(body: bytes, context: Any) -> bytes:
            return await self._answer(self.traces, body, context)

        async def logs(body: bytes, context: Any) -> bytes:
            return await self._answer(self.logs, body, context)

        for service, method in (
            ("metrics.v1.MetricsService", metrics),
            ("trace.v1.TraceService", traces),
            ("logs.v1.LogsService", logs),
        ):
            handlers: dict[str, Any] = {"Export": grpc.unary_unary_rpc_method_handler(method)}
            name = f"opentelemetry.proto.collector.{service}"
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))

    async def _answer(self, read: Read, body: bytes, context: Any) -> bytes:
        by = None
        has_token = any(key == "authorization" for key, _ in context.invocation_metadata() or ())
        if self._authenticator is not None and (has_token or self._is_required_by_grpc):
            by = (await caller_of(context, self._authenticator)).identity
            if by is None:
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, "telemetry is pushed by workloads")
        try:
            return read(body, by)
        except NotOwn as error:
            logger.warning("telemetry from %s is refused: %s", context.peer(), error)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        raise AssertionError("abort raises")

    # HTTP

    async def post_metrics(self, request: Request) -> Response:
        return await self._posted(self.metrics, request)

    async def post_traces(self, request: Request) -> Response:
        return await self._posted(self.traces, request)

    async def post_logs(self, request: Request) -> Response:
        return await self._posted(self.logs, request)

    async def _posted(self, read: Read, request: Request) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != PROTOBUF:
            # JSON is what a web page could send without a preflight; nobody's exporter needs it here.
            return Response(f"content-type must be {PROTOBUF}\n", 415)
        try:
            by = await self._pusher(request)
            body = _unpacked(await _body(request), request.headers.get("content-encoding", "identity"))
            return Response(read(body, by), media_type=PROTOBUF)
        except NotAuthenticated:
            return Response("who pushes could not be verified\n", 401, {"www-authenticate": "Bearer"})
        except NotOwn as error:
            logger.warning("telemetry is refused: %s", error)
            return Response(f"{error}\n", 403)
        except ValueError as error:
            return Response(f"{error}\n", 400)

    async def _pusher(self, request: Request) -> SpiffeId | None:
        """Raises NotAuthenticated."""
        if self._authenticator is None or not self._is_required_by_http:
            return None
        client = request.client
        address = f"{client.host}:{client.port}" if client is not None else ""
        caller = await self._authenticator.authenticate(bearer(request.headers.get("authorization", "")), address)
        if caller.identity is None:
            raise NotAuthenticated("telemetry is pushed by workloads")
        return caller.identity


def _check_is(by: SpiffeId, field: str, found: str, *wanted: str) -> None:
    if found not in wanted:
        raise NotOwn(f"{by} tells of {field} {found[:100]!r}, and may of {wanted[0]!r}")


def _parsed(kind: Any, body: bytes) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise ValueError(f"no {kind.DESCRIPTOR.name}: {error}") from None


def _texts(attributes: Iterable[Any]) -> dict[str, str]:
    return {each.key[:_MAX_VALUE]: _text(each.value) for each in islice(attributes, _MAX_ATTRIBUTES)}


def _text(value: Any) -> str:
    kind = value.WhichOneof("value")
    if kind == "string_value":
        return str(value.string_value)[:_MAX_VALUE]
    if kind == "bool_value":
        return "true" if value.bool_value else "false"
    if kind in ("int_value", "double_value"):
        return f"{getattr(value, kind):g}" if kind == "double_value" else str(value.int_value)
    return str(getattr(value, kind))[:_MAX_VALUE] if kind else ""


_FIELDS = frozenset(Labels._fields)


def _count(counted: dict[Labels, Cell], metric: str, point: Any) -> None:
    told = {each.key: _text(each.value) for each in point.attributes if each.key in _FIELDS}
    labels = Labels(**told)
    cell = counted.get(labels)
    if cell is None:
        cell = counted[labels] = Cell()
    if metric == "istio_requests_total":
        cell.requests += int(point.as_int if point.WhichOneof("value") == "as_int" else point.as_double)
        return
    setattr(cell, _HISTOGRAMS[metric], getattr(cell, _HISTOGRAMS[metric]) + point.sum)
    if metric == "istio_request_duration_milliseconds" and tuple(point.explicit_bounds) == BOUNDS:
        mine = cell.buckets or [0] * (len(BOUNDS) + 1)
        cell.buckets = [one + two for one, two in zip(mine, point.bucket_counts, strict=True)]


def _count_retries(counted: dict[Labels, Cell], resource: dict[str, str], point: Any) -> None:
    cluster = next((_text(each.value) for each in point.attributes if each.key == "cluster"), "")
    labels = labels_of_retry(
        cluster, resource.get("istio.workload", "unknown"), resource.get("service.namespace", "unknown")
    )
    if labels is not None:
        cell = counted.setdefault(labels, Cell())
        cell.requests += int(point.as_int if point.WhichOneof("value") == "as_int" else point.as_double)


def _span(message: Any, service: str, resource: dict[str, str]) -> Span:
    attributes = _texts(message.attributes)
    for name in ("service.namespace", "service.version", "service.instance.id", "istio.workload"):
        if name in resource:
            attributes.setdefault(name, resource[name])
    return Span(
        message.trace_id[:16].hex(),
        message.span_id[:8].hex(),
        message.parent_span_id[:8].hex(),
        service,
        message.name[:_MAX_VALUE],
        _KINDS[message.kind] if message.kind < len(_KINDS) else "internal",
        message.start_time_unix_nano / 1e9,
        message.end_time_unix_nano / 1e9,
        message.status.code == 2,
        tuple(sorted(attributes.items())),
    )


async def _body(request: Request) -> bytes:
    body = bytearray()
    stream: Callable[[], Any] = request.stream
    async for chunk in stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise ValueError(f"the body is larger than {MAX_BODY} bytes")
    return bytes(body)


def _unpacked(body: bytes, encoding: str) -> bytes:
    if encoding == "identity":
        return body
    if encoding != "gzip":
        raise ValueError(f"content-encoding {encoding!r}: there are gzip and identity")
    unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        found = unpack.decompress(body, MAX_BODY)
    except zlib.error as error:
        raise ValueError(f"no gzip: {error}") from None
    if unpack.unconsumed_tail:
        raise ValueError(f"the body is larger than {MAX_BODY} bytes")
    return found
