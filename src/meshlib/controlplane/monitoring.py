"""What may everybody ask the control plane? Whether it lives, whether it serves, and its metrics: counts, and nothing
of the mesh's configuration.

For probes and Prometheus in a cluster, where the admin API is on loopback. Served before the configuration was read: a
control plane that waits for a right in a cluster lives, and is not ready.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from meshlib.controlplane.own_metrics import OwnMetrics


def health_routes(is_ready: Callable[[], bool]) -> list[Route]:
    """`/healthz`: 200 as long as the event loop turns. `/readyz`: 200 while xDS is served, 503 before and after."""

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        if is_ready():
            return PlainTextResponse("ok\n")
        return PlainTextResponse("not ready: the configuration has not been read yet\n", status_code=503)

    return [Route("/healthz", healthz), Route("/readyz", readyz)]


def monitoring_app(is_ready: Callable[[], bool], metrics: OwnMetrics) -> Starlette:
    """Asks nobody who they are, and changes nothing."""
    return Starlette(routes=[*health_routes(is_ready), metrics.route()])
