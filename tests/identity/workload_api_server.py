"""A Workload API server as SPIRE's agent is one, run as a process: `workload_api_server.py SOCKET`.

It sends on each stream what it was told last, and again whenever it is told more: each line of its stdin is an
X509SVIDResponse in hexadecimal.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc


class Agent:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._told: list[bytes] = []

    def tell(self, response: bytes) -> None:
        with self._changed:
            self._told.append(response)
            self._changed.notify_all()

    def fetch(self, _: bytes, context: Any) -> Iterator[bytes]:
        if dict(context.invocation_metadata()).get("workload.spiffe.io") != "true":  # Workload API, 3
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing")
        seen = 0
        while context.is_active():
            with self._changed:
                if len(self._told) == seen and not self._changed.wait(0.5):
                    continue
                seen, response = len(self._told), self._told[-1]
            yield response


def main() -> None:
    agent = Agent()
    server = grpc.server(futures.ThreadPoolExecutor(8))
    handlers: dict[str, Any] = {"FetchX509SVID": grpc.unary_stream_rpc_method_handler(agent.fetch)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("SpiffeWorkloadAPI", handlers),))
    server.add_insecure_port(f"unix:{sys.argv[1]}")
    server.start()
    print("serving", flush=True)
    for line in sys.stdin:
        agent.tell(bytes.fromhex(line))
    server.stop(None)


if __name__ == "__main__":
    main()
