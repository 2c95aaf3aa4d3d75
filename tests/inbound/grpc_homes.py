"""gRPC servers behind the mesh's interceptors, sync and aio, that do as their requests say."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc
import grpc.aio

from meshlib.mesh import Mesh
from outbound.grpc_peers import SERVICE


class SyncHome:
    """A sync server whose handlers do as the request says: `raise`, `abort`, `hold`; else they tell `seen`."""

    def __init__(self, of: Mesh, seen: Any, credentials: grpc.ServerCredentials | None = None) -> None:
        self._pool = ThreadPoolExecutor(8)
        self._server = grpc.server(self._pool, interceptors=of.grpc_server_interceptors(8080))
        handlers = {
            "UnaryUnary": grpc.unary_unary_rpc_method_handler(self._one),
            "UnaryStream": grpc.unary_stream_rpc_method_handler(self._many),
            "StreamUnary": grpc.stream_unary_rpc_method_handler(lambda them, context: self._one(next(them), context)),
            "StreamStream": grpc.stream_stream_rpc_method_handler(self._each),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self.seen, self.started = seen, queue.Queue[Any]()
        if credentials is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.stop(0).wait(10)
        self._pool.shutdown()

    def _one(self, request: bytes, context: Any) -> bytes:
        self.started.put(context)
        if request == b"raise":
            raise RuntimeError("as asked")
        if request == b"abort":
            context.abort(grpc.StatusCode.NOT_FOUND, "as asked")
        if request == b"hold":
            while context.is_active():
                time.sleep(0.005)
        return bytes(self.seen(context))

    def _many(self, request: bytes, context: Any) -> Iterator[bytes]:
        yield self._one(request, context)
        yield bytes(self.seen(context))

    def _each(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for request in requests:
            yield self._one(request, context)


class AioHome:
    """The same on an event loop in a thread of its own. Streams: one by a generator, one by writes."""

    def __init__(self, of: Mesh, seen: Any, credentials: grpc.ServerCredentials | None = None) -> None:
        self.mesh, self.seen, self.credentials = of, seen, credentials
        self.started = queue.Queue[Any]()
        self._ready: queue.Queue[int] = queue.Queue()
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        self._run = self._pool.submit(asyncio.run, self._serve())
        self.port = self._ready.get(timeout=20)
        return self

    def __exit__(self, *raised: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._run.result(20)
        self._pool.shutdown()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = grpc.aio.server(interceptors=self.mesh.grpc_aio_server_interceptors(8080))
        handlers = {
            "UnaryUnary": grpc.unary_unary_rpc_method_handler(self._one),
            "UnaryStream": grpc.unary_stream_rpc_method_handler(self._many),
            "StreamUnary": grpc.stream_unary_rpc_method_handler(self._first),
            "StreamStream": grpc.stream_stream_rpc_method_handler(self._each),
            "Plain": grpc.unary_unary_rpc_method_handler(lambda request, context: bytes(self.seen(context))),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        if self.credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", self.credentials)
        await server.start()
        self._ready.put(port)
        await self._stop.wait()
        await server.stop(0)

    async def _one(self, request: bytes, context: Any) -> bytes:
        self.started.put(context)
        if request == b"raise":
            raise RuntimeError("as asked")
        if request == b"abort":
            await context.abort(grpc.StatusCode.NOT_FOUND, "as asked")
        if request == b"hold":
            await asyncio.Event().wait()
        return bytes(await asyncio.to_thread(self.seen, context))

    async def _many(self, request: bytes, context: Any) -> Any:
        yield await self._one(request, context)
        yield bytes(self.seen(context))

    async def _first(self, requests: Any, context: Any) -> bytes:
        return await self._one(await anext(aiter(requests)), context)

    async def _each(self, requests: Any, context: Any) -> None:
        async for request in requests:
            await context.write(await self._one(request, context))
