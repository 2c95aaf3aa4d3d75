"""Serves a crowd that mostly says nothing: `python crowd_server.py middleware|gateway FOLDER`. Prints its URL.

GET / is answered by the application behind the inbound middleware, by way of the gateway where that is asked for.
GET /memory tells this process's resident memory in bytes, and how many sockets it holds.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import uvicorn

import meshlib
from meshlib.gateway.limits import Limits
from meshlib.gateway.server import Gateway
from meshlib.mesh import Mesh, Settings
from meshlib.model import NodeKind

PATIENCE = 600
"""Seconds for which an idle connection is kept."""
ROUTES = """
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: door}}
spec:
  selector: {{istio: ingressgateway}}
  servers: [{{port: {{number: 8080, name: http, protocol: HTTP}}, hosts: ["*"]}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: app}}
spec:
  hosts: [app.example.com]
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  endpoints: [{{address: 127.0.0.1, ports: {{http: {port}}}}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: app}}
spec:
  hosts: ["*"]
  gateways: [door]
  http: [{{route: [{{destination: {{host: app.example.com}}}}]}}]
"""
RULES = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: reads}
spec: {rules: [{to: [{operation: {methods: [GET]}}]}]}
"""


def memory() -> bytes:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return json.dumps([pages * resource.getpagesize(), len(os.listdir("/proc/self/fd"))]).encode()  # noqa: PTH208


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    body = b"ok"
    if scope["path"] == "/memory":
        body = memory()
    head = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


async def main(kind: str, folder: Path) -> None:
    (folder / "rules.yaml").write_text(RULES)
    with meshlib.connect(folder) as mesh:
        config = uvicorn.Config(
            mesh.asgi(app), port=0, log_level="warning", timeout_keep_alive=PATIENCE, backlog=4096, lifespan="on"
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 -- uvicorn tells nobody
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        if kind == "middleware":
            print(f"127.0.0.1 {port}", flush=True)
            await serving
            return
        (folder / "routes.yaml").write_text(ROUTES.format(port=port))
        settings = Settings(control_plane=str(folder), labels=(("istio", "ingressgateway"),), workload="gateway")
        with Mesh(settings, kind=NodeKind.ROUTER) as router:
            async with Gateway(router, ports={8080: 0}, limits=Limits(keep_alive=float(PATIENCE))) as gateway:
                while not (found := [*gateway.addresses.values()]):  # noqa: ASYNC110 -- the first configuration
                    await asyncio.sleep(0.01)
                print(*found[0], flush=True)
                await serving


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
