"""A user's program, for mypy --strict alone (`make lint`): the public API says its types without a cast."""

from __future__ import annotations

import aiohttp
import grpc
import grpc.aio
import httpx
import requests
from starlette.applications import Starlette

import meshlib
from meshlib import Mesh, MeshError, Settings, SettingsError


def calls(mesh: Mesh) -> int:
    with mesh.Client(timeout=5.0) as client, httpx.Client(transport=mesh.transport()) as other:
        statuses: list[int] = [client.get("http://reviews/").status_code, other.get("http://reviews/").status_code]
    session = requests.Session()
    session.mount("http://", mesh.requests_adapter())
    pooled: int = mesh.urllib3().request("GET", "http://reviews/").status
    return sum(statuses) + session.get("http://reviews/").status_code + pooled


async def awaited_calls(mesh: Mesh) -> str:
    async with (
        mesh.AsyncClient() as client,
        httpx.AsyncClient(transport=mesh.async_transport(engine="aiohttp")) as other,
    ):
        text: str = (await client.get("http://reviews/")).text + (await other.get("http://reviews/")).text
    async with (
        aiohttp.ClientSession(middlewares=[mesh.aiohttp_middleware()]) as session,
        session.get("http://reviews/") as answer,
    ):
        return text + await answer.text()


def channels(mesh: Mesh) -> tuple[grpc.Channel, grpc.aio.Channel, grpc.ServerCredentials]:
    return mesh.grpc_channel("ratings:9080"), mesh.grpc_aio_channel("ratings:9080"), mesh.grpc_server_credentials()


def decorated(mesh: Mesh) -> int:
    @mesh.outbound("ratings:9080", idempotent=True, fallback=lambda product: 0)
    def stars(product: str) -> int:
        return len(product)

    return stars("0")


def explained(mesh: Mesh) -> str:
    breaker = mesh.breaker("reviews:9080")
    return f"{mesh.explain('GET', 'http://reviews/')} {breaker}"


def exposed(mesh: Mesh) -> bytes:
    content_type, body = mesh.metrics()
    return content_type.encode() + body


def why(error: MeshError) -> tuple[int, str, str, str]:
    return error.status, error.flag, error.reason, error.endpoint


def main() -> None:
    settings: Settings = Settings.from_environment({"MESHLIB_SERVICE": "shop"})
    try:
        with meshlib.connect("mesh-config/", service=settings.service) as mesh:
            app = mesh.asgi(Starlette())
            print(calls(mesh), decorated(mesh), explained(mesh), exposed(mesh), app, meshlib.__version__)
            meshlib.instrument(mesh, exclude=["grpc"])
            meshlib.uninstrument()
    except SettingsError as error:
        print(error)
    except meshlib.UpstreamTimeout as error:
        print(why(error))
