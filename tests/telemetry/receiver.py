"""A real OTLP receiver on loopback: gRPC, and HTTP with protobuf."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

_KINDS = {"metrics": ExportMetricsServiceRequest, "traces": ExportTraceServiceRequest}


class Receiver:
    """What has arrived. compressed: whether each was."""

    def __init__(self) -> None:
        self.url = ""
        self.metrics: list[ExportMetricsServiceRequest] = []
        self.traces: list[ExportTraceServiceRequest] = []
        self._came = threading.Condition()

    def take(self, kind: str, body: bytes) -> None:
        with self._came:
            getattr(self, kind).append(_KINDS[kind].FromString(body))
            self._came.notify_all()

    def wait(self, what: Any) -> None:
        with self._came:
            assert self._came.wait_for(what, 30), "it did not arrive"

    def total(self, name: str, **labels: str) -> float:
        """The sum of a counter's deltas, or of a histogram's counts."""
        found = 0.0
        for request in self.metrics:
            for resource in request.resource_metrics:
                for metric in (each for scope in resource.scope_metrics for each in scope.metrics):
                    if metric.name != name:
                        continue
                    for point in metric.sum.data_points:
                        if labels.items() <= attributes(point).items():
                            found += point.as_int or point.as_double
                    for bucket in metric.histogram.data_points:
                        if labels.items() <= attributes(bucket).items():
                            found += bucket.count
        return found

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for request in self.traces
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


def attributes(of: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}


@contextmanager
def grpc_receiver() -> Iterator[Receiver]:
    received = Receiver()

    def take(kind: str) -> grpc.RpcMethodHandler:
        def export(body: bytes, _: grpc.ServicerContext) -> bytes:
            received.take(kind, body)
            return b""

        return grpc.unary_unary_rpc_method_handler(export)

    server = grpc.server(ThreadPoolExecutor(2))
    for kind, service in (("metrics", "metrics.v1.MetricsService"), ("traces", "trace.v1.TraceService")):
        name = f"opentelemetry.proto.collector.{service}"
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, {"Export": take(kind)})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    received.url = f"http://127.0.0.1:{port}"
    try:
        yield received
    finally:
        server.stop(None).wait()


@contextmanager
def http_receiver() -> Iterator[Receiver]:
    received = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.headers["content-encoding"] == "gzip"
            received.take(self.path.removeprefix("/v1/"), gzip.decompress(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    received.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
