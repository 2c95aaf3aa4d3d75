"""How does the gateway compare with nginx as a reverse proxy? Requests to a small server, straight, through `meshctl
gateway`, and through one worker of nginx, in plaintext, by the raw client: one process each, which keep connections
to the server. Both route by Host and set X-Forwarded-For; neither writes an access log.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.effort import Effort
from benchmarks.processes import module, ports, program
from benchmarks.raw import RawClient
from benchmarks.rounds import Row, play_async
from benchmarks.sidecars import Missing, nginx_reverse

STRAIGHT, GATEWAY, NGINX = "straight", "meshctl gateway", "nginx"
HOST = "shop.example"
MESH = """
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: shop, namespace: istio-system}}
spec:
  selector: {{istio: ingressgateway}}
  servers: [{{port: {{number: 80, name: http, protocol: HTTP}}, hosts: [shop.example]}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: shop, namespace: istio-system}}
spec:
  hosts: [shop.example]
  gateways: [shop]
  http: [{{route: [{{destination: {{host: reviews.example, port: {{number: 80}}}}}}]}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: reviews, namespace: istio-system}}
spec:
  hosts: [reviews.example]
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: {port}}}]
  endpoints: [{{address: 127.0.0.1}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: reviews, namespace: istio-system}}
spec: {{host: reviews.example, trafficPolicy: {{connectionPool: {{http: {{idleTimeout: 3600s}}}}}}}}
"""


async def _play(listening: dict[str, int], processes: tuple[int, ...], concurrency: int, effort: Effort) -> list[Row]:
    clients = {name: RawClient(port, HOST) for name, port in listening.items()}
    try:
        calls = {name: client.get for name, client in clients.items()}
        return await play_async("raw", calls, concurrency, effort.rounds, effort.length(concurrency), processes)
    finally:
        for client in clients.values():
            client.close()


def measure(effort: Effort) -> dict[str, Any]:
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        server = stack.enter_context(module("benchmarks.server", "0"))
        (folder / "mesh").mkdir()
        (folder / "mesh" / "mesh.yaml").write_text(MESH.format(port=server.ports[0]), encoding="utf-8")
        (port,) = ports(1)
        command = [sys.executable, "-m", "meshlib.cli", "gateway", "--control-plane", str(folder / "mesh")]
        command += ["--port", f"80={port}", "--log-level", "error"]
        quiet = {"MESHLIB_CACHE_DIR": "-", "MESHLIB_TELEMETRY": "off"}
        gateway = stack.enter_context(program(command, port, folder / "gateway.log", **quiet))
        listening, processes = {STRAIGHT: server.ports[0], GATEWAY: port}, [server.process, gateway.process]
        try:
            reverse = stack.enter_context(nginx_reverse(folder, server.ports[0]))
            listening[NGINX] = reverse.ports[0]
            processes.append(reverse.process)
        except (Missing, RuntimeError) as error:
            skipped[NGINX] = str(error)
        for concurrency in effort.concurrency:
            rows += asyncio.run(_play(listening, tuple(processes), concurrency, effort))
    return {"rows": [row._asdict() for row in rows], "skipped": skipped}
