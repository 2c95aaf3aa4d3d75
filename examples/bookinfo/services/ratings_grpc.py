"""How many stars did each reviewer give? Bookinfo's ratings service over gRPC, on asyncio (ratings.proto).

reviews asks it in place of `ratings` where RATINGS_PROTOCOL=grpc. It keeps ratings in memory; Put replaces those of a
product. With an identity its port speaks the mesh's mTLS, since a port of gRPC's is TLS or plaintext.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping
from typing import Any

import bookinfo_mesh
import grpc
import grpc.aio
import ratings_api
import serving

RATINGS = {"Reviewer1": 5, "Reviewer2": 4}


class Ratings:
    def __init__(self) -> None:
        self._in_memory: dict[int, Mapping[str, int]] = {}

    async def Get(self, request: Any, context: Any) -> Any:
        product_id = request.product_id
        return ratings_api.ProductRatings(product_id=product_id, stars=self._in_memory.get(product_id, RATINGS))

    async def Put(self, request: Any, context: Any) -> Any:
        stars = dict(request.stars)
        if not all(1 <= each <= 5 for each in stars.values()):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a reviewer gives 1 to 5 stars")
        self._in_memory[request.product_id] = stars
        return request


class AccessLog(grpc.aio.ServerInterceptor):
    """Behind the mesh's interceptor, to see calls as it hands them on."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method, metadata = handler_call_details.method, dict(handler_call_details.invocation_metadata or ())

        async def logged(request: Any, context: Any) -> Any:
            start, status = time.perf_counter(), 500
            try:
                response = await handler.unary_unary(request, context)
                status = 200
                return response
            finally:
                serving.log_request("ratings-grpc", "POST", method, status, start, metadata)

        return grpc.unary_unary_rpc_method_handler(logged, handler.request_deserializer, handler.response_serializer)


async def serve() -> None:
    """Until SIGTERM."""
    mesh = bookinfo_mesh.connect()
    server = grpc.aio.server(interceptors=[*mesh.grpc_aio_server_interceptors(), AccessLog()])
    ratings_api.add_ratings(Ratings(), server)
    host, port = serving.address()
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if isinstance(mesh, bookinfo_mesh.Bare) or await asyncio.to_thread(mesh.wait_for_credentials) is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, mesh.grpc_server_credentials())
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.start()
    serving.out.info("ratings-grpc-%s listens on grpc://%s:%d", serving.VERSION, host, port)
    await stop.wait()
    await server.stop(serving.GRACE)


if __name__ == "__main__":
    serving.write_lines_to_stdout()
    asyncio.run(serve())
