"""How does the mesh get around the calls of a channel that is not its own? By interceptors, sync and aio.

The channel connects by itself, so no endpoint is picked, none is judged and nothing is mirrored; all else that the
route and the destination say holds. Without an authority a call hands on what the request being served brought, and no
more.

grpc.aio asks an interceptor for one arity only, the first that it can do, so there is one for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from grpc import aio

from meshlib.outbound.grpc_aio_calls import CALLS, never
from meshlib.outbound.grpc_pending import Pending
from meshlib.outbound.grpc_replay import Replay, sendable
from meshlib.outbound.grpc_terms import Call, Home, Metadata, Terms, compressed
from meshlib.policy.steps import Send


class MeshInterceptor(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """For `grpc.intercept_channel`."""

    def __init__(self, home: Home, authority: str) -> None:
        self.home, self.authority = home, authority

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._intercepted("unary_unary", continuation, client_call_details, request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._intercepted("unary_stream", continuation, client_call_details, request)

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._intercepted("stream_unary", continuation, client_call_details, request_iterator)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._intercepted("stream_stream", continuation, client_call_details, request_iterator)

    def _intercepted(self, kind: str, continuation: Any, details: Any, request: Any) -> Any:
        call = Call(self.home, self.authority, details.method, Terms(details.timeout, details.metadata))
        is_stream = kind.endswith("stream")

        def sent(timeout: float | None, metadata: Metadata) -> Details:
            metadata, compression = compressed(kind, metadata, details.compression)
            return Details(details.method, timeout, metadata, details.credentials, details.wait_for_ready, compression)

        def start(step: Send, request: Any) -> tuple[Any, Callable[[], None]]:
            return continuation(sent(call.timeout(step, is_stream), call.sent(step)), sendable(request)), _nothing

        if not self.authority:
            return continuation(sent(call.remaining(), call.handed_on()), request)
        call.messages.is_stream = kind != "unary_unary"
        if kind.startswith("stream"):
            request = Replay(request, call.messages)
        else:
            call.messages.requests = 1
        return Pending(call, request, is_stream, start, never, finds_its_way=True)


class Details(grpc.ClientCallDetails):
    """What an interceptor hands on."""

    def __init__(
        self, method: Any, timeout: Any, metadata: Any, credentials: Any, wait_for_ready: Any, compression: Any
    ) -> None:
        self.method, self.timeout, self.metadata = method, timeout, metadata
        self.credentials, self.wait_for_ready, self.compression = credentials, wait_for_ready, compression


def _nothing() -> None: ...


class _AioInterceptor:
    def __init__(self, home: Home, authority: str) -> None:
        self.home, self.authority = home, authority

    async def _intercepted(self, kind: str, continuation: Any, details: Any, request: Any) -> Any:
        method = details.method
        path = method.decode() if isinstance(method, bytes) else method
        call = Call(self.home, self.authority, path, Terms(details.timeout, details.metadata))

        def sent(timeout: float | None, metadata: Metadata) -> aio.ClientCallDetails:
            rest = details.credentials, details.wait_for_ready
            return aio.ClientCallDetails(method, timeout, aio.Metadata(*metadata), *rest)

        async def start(step: Send, request: Any) -> Any:
            return await continuation(sent(call.timeout(step, kind.endswith("stream")), call.sent(step)), request)

        if not self.authority:
            return await continuation(sent(call.remaining(), call.handed_on()), request)
        call.messages.is_stream = kind != "unary_unary"
        return CALLS[kind](call, request, start, never, finds_its_way=True)


class AioUnaryUnary(_AioInterceptor, aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._intercepted("unary_unary", continuation, client_call_details, request)


class AioUnaryStream(_AioInterceptor, aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._intercepted("unary_stream", continuation, client_call_details, request)


class AioStreamUnary(_AioInterceptor, aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._intercepted("stream_unary", continuation, client_call_details, request_iterator)


class AioStreamStream(_AioInterceptor, aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._intercepted("stream_stream", continuation, client_call_details, request_iterator)


def aio_interceptors(home: Home, authority: str) -> list[Any]:
    """For `grpc.aio.insecure_channel(..., interceptors=...)`: one for each arity."""
    return [make(home, authority) for make in (AioUnaryUnary, AioUnaryStream, AioStreamUnary, AioStreamStream)]


__all__ = ["MeshInterceptor", "aio_interceptors"]
