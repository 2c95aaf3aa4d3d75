"""What do readers say about the book? Bookinfo's reviews service, on Starlette.

v1 gives no stars. v2 (ENABLE_RATINGS=true) asks the ratings service and gives black ones, v3 (STAR_COLOR=red too) red
ones. RATINGS_PROTOCOL=grpc asks `ratings-grpc` instead, by gRPC. The user's name reaches ratings without a line here:
the mesh relays it (MESHLIB_FORWARD_HEADERS=end-user).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import bookinfo_mesh
import grpc
import httpx
import ratings_api
import serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

TEXTS = {
    "Reviewer1": "Two pairs of twins, one bad day in Ephesus, and not a single dull door. I laughed until the last "
    "of them had closed behind the right brother.",
    "Reviewer2": "The jokes are four centuries old and still quicker than most of what is on tonight. Only the ending "
    "ties its bow a little too neatly.",
}


def ratings_timeout(star_color: str) -> float:
    """Seconds. v2 waits longer than productpage waits for us: the flaw that fault injection brings to light, and that
    v3 has repaired."""
    return 10.0 if star_color == "black" else 2.5


def create_app() -> ASGIApp:
    has_ratings = os.environ.get("ENABLE_RATINGS", "").lower() == "true"
    by_grpc = os.environ.get("RATINGS_PROTOCOL", "").lower() == "grpc"
    star_color = os.environ.get("STAR_COLOR", "black")
    mesh = bookinfo_mesh.connect()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        timeout = ratings_timeout(star_color)
        if by_grpc:
            async with mesh.grpc_aio_channel(bookinfo_mesh.authority("ratings-grpc")) as channel:
                yield {"ask": over_grpc(ratings_api.RatingsStub(channel), timeout)}
            return
        async with httpx.AsyncClient(
            transport=mesh.async_transport(), base_url=bookinfo_mesh.base_url("ratings"), timeout=timeout
        ) as client:
            yield {"ask": over_http(client)}

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "Reviews is healthy"})

    async def reviews(request: Request) -> JSONResponse:
        product_id = request.path_params["product_id"]
        found: list[dict[str, Any]] = [{"reviewer": reviewer, "text": text} for reviewer, text in TEXTS.items()]
        if has_ratings:
            ratings = await ratings_of(request.state.ask, product_id)
            for review in found:
                review["rating"] = rating_of(ratings.get(review["reviewer"]), star_color)
        return JSONResponse(
            {
                "id": str(product_id),
                "podname": os.environ.get("HOSTNAME", ""),
                "clustername": os.environ.get("CLUSTER_NAME", ""),
                "reviews": found,
            }
        )

    app = Starlette(routes=[Route("/health", health), Route("/reviews/{product_id:int}", reviews)], lifespan=lifespan)
    return mesh.asgi(serving.AsgiAccessLog(app, "reviews"))


Ask = Callable[[int], Awaitable[dict[str, int]]]
"""Stars by reviewer, of a product."""


def over_http(client: httpx.AsyncClient) -> Ask:
    async def ask(product_id: int) -> dict[str, int]:
        response = await client.get(f"/ratings/{product_id}")
        return dict(response.raise_for_status().json()["ratings"])

    return ask


def over_grpc(stub: ratings_api.RatingsStub, timeout: float) -> Ask:
    async def ask(product_id: int) -> dict[str, int]:
        return dict((await stub.Get(ratings_api.RatingsRequest(product_id=product_id), timeout=timeout)).stars)

    return ask


async def ratings_of(ask: Ask, product_id: int) -> dict[str, int]:
    """None if the ratings service fails: reviews without stars are better than no reviews."""
    try:
        return await ask(product_id)
    except (httpx.HTTPError, grpc.RpcError, LookupError, TypeError, ValueError) as error:  # whatever shape its JSON has
        serving.out.warning("ratings: %r", error)
        return {}


def rating_of(stars: int | None, color: str) -> dict[str, Any]:
    return {"error": "Ratings service is currently unavailable"} if stars is None else {"stars": stars, "color": color}


if __name__ == "__main__":
    serving.serve_asgi("reviews", create_app)
