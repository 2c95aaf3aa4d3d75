"""Where do gRPC calls arrive? GrpcEndpoint: a real gRPC server on loopback that takes any method."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc

from meshlib.testing.ports import HOST, bound
from meshlib.testing.script import Received, Script

_DEADLINE = 10.0


class Status(NamedTuple):
    """An answer that is an error."""

    code: grpc.StatusCode
    details: str


class GrpcEndpoint:
    """Answers once the client has sent all its messages. Listens from the beginning."""

    def __init__(self, script: Script, tell: Callable[[Received], None]) -> None:
        self._script, self._tell = script, tell
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="meshlib-testing-grpc")
        self._socket: socket.socket | None = bound()
        self.port: int = self._socket.getsockname()[1]
        self._server: grpc.Server | None = None
        self.up()

    def up(self) -> None:
        if self._server is not None:
            return
        self._ended.clear()
        server = grpc.server(self._pool, handlers=[_AnyMethod(self._serve)], options=[("grpc.so_reuseport", 0)])
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        server.add_insecure_port(f"{HOST}:{self.port}")
        server.start()
        self._server = server

    def down(self) -> None:
        if self._server is not None:
            self._stop(self._server)
            self._socket = bound(self.port)

    def close(self) -> None:
        if self._server is not None:
            self._stop(self._server)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._pool.shutdown()

    def _stop(self, server: grpc.Server) -> None:
        self._ended.set()
        server.stop(None).wait(_DEADLINE)
        self._server = None

    def _serve(self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        headers = {name: _text(value) for name, value in context.invocation_metadata()}
        messages = tuple(requests)
        received = Received("POST", method, headers, messages[0] if messages else b"", messages)
        delay, answer = self._script.take()
        self._tell(received)
        if delay:
            self._ended.wait(delay)
        found = answer(received)
        if isinstance(found, Status):
            context.abort(found.code, found.details)
        yield from found


class _AnyMethod(grpc.GenericRpcHandler):
    """On the wire a unary call is a stream of one message, so one kind of handler takes them all."""

    def __init__(self, serve: Callable[..., Iterator[bytes]]) -> None:
        self._serve = serve

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method

        def handle(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._serve(method, requests, context)

        return grpc.stream_stream_rpc_method_handler(handle)


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
