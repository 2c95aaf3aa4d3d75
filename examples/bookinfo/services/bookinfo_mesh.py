"""Is this service on the mesh, or bare? BOOKINFO_MESH=off gives the same methods on plain httpx, to compare the two."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

if TYPE_CHECKING:
    from meshlib import Mesh

App = TypeVar("App")


class Bare:
    """What the services use of a Mesh, without one: DNS finds the host, nothing routes, retries or relays headers."""

    Client = httpx.Client
    AsyncClient = httpx.AsyncClient

    def async_transport(self) -> None:
        """httpx's own: a client that is given none is one that `meshctl run` puts on the mesh."""

    def wsgi(self, app: App) -> App:
        return app

    def asgi(self, app: App) -> App:
        return app

    def grpc_aio_channel(self, target: str) -> Any:
        import grpc.aio

        return grpc.aio.insecure_channel(target)

    def grpc_aio_server_interceptors(self) -> list[Any]:
        return []


def connect() -> Mesh | Bare:
    if os.environ.get("BOOKINFO_MESH") == "off":
        return Bare()
    import meshlib

    return meshlib.connect()


def base_url(service: str) -> str:
    """`http://details:9080`, or what the environment makes of it."""
    return f"http://{authority(service)}"


def authority(service: str) -> str:
    """`details:9080`, or what DETAILS_HOSTNAME, DETAILS_SERVICE_PORT and SERVICES_DOMAIN make of it.

    Kubernetes sets DETAILS_SERVICE_PORT by itself for a Service named details: to the same value, if nobody renames it.
    """
    variable = service.upper().replace("-", "_")
    host = os.environ.get(f"{variable}_HOSTNAME", service)
    domain = os.environ.get("SERVICES_DOMAIN")
    port = os.environ.get(f"{variable}_SERVICE_PORT", "9080")
    return f"{host}.{domain}:{port}" if domain else f"{host}:{port}"
