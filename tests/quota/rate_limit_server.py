"""A rate limit service as Envoys ask it, made of the messages that Envoy publishes. Counts for ever, so no test waits.

    rate_limit_server.py PORT '{"domain": {"key_value[|key_value]": REQUESTS_PER_HOUR}}'

Prints its port. The descriptor `echo` is answered with headers for both sides and a body of the service's own.
"""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock

import grpc
from envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse

Status = RateLimitResponse.DescriptorStatus


class Service:
    def __init__(self, limits: dict[str, dict[str, int]]) -> None:
        self._limits, self._used, self._lock = limits, Counter[tuple[str, str]](), Lock()

    def should_rate_limit(self, request: RateLimitRequest, _: grpc.ServicerContext) -> RateLimitResponse:
        response = RateLimitResponse(overall_code=RateLimitResponse.OK)
        for descriptor in request.descriptors:
            name = "|".join(f"{entry.key}_{entry.value}" for entry in descriptor.entries)
            status = response.statuses.add(code=RateLimitResponse.OK)
            limit = self._limits.get(request.domain, {}).get(name)
            if limit is None:
                continue
            with self._lock:
                used = self._used[request.domain, name] = self._used[request.domain, name] + (request.hits_addend or 1)
            status.current_limit.requests_per_unit, status.current_limit.unit = limit, 3
            status.limit_remaining = max(0, limit - used)
            status.duration_until_reset.seconds = 1234
            if used > limit:
                status.code = response.overall_code = RateLimitResponse.OVER_LIMIT
            if name == "echo_1":
                response.response_headers_to_add.add(key="X-Told", value="by the service")
                response.request_headers_to_add.add(key="x-counted", value=str(used))
                response.raw_body = b"enough"
        return response


def main() -> None:
    service = Service(json.loads(sys.argv[2]))
    handler = grpc.unary_unary_rpc_method_handler(
        service.should_rate_limit, RateLimitRequest.FromString, RateLimitResponse.SerializeToString
    )
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    methods = {"ShouldRateLimit": handler}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("envoy.service.ratelimit.v3.RateLimitService", methods),)
    )
    port = server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    server.start()
    ended = Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    print(port, flush=True)
    ended.wait()
    server.stop(0).wait(10)


if __name__ == "__main__":
    main()
