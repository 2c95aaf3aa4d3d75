"""What do readers say about the book? Bookinfo's reviews service, on Starlette.

v1 gives no stars. v2 (ENABLE_RATINGS=true) asks the ratings service and gives black ones, v3 (STAR_COLOR=red too) red
ones. The user's name reaches ratings without a line here: the mesh relays it (MESHLIB_FORWARD_HEADERS=end-user).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import bookinfo_mesh
import httpx
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
    star_color = os.environ.get("STAR_COLOR", "black")
    mesh = bookinfo_mesh.connect()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        timeout = ratings_timeout(star_color)
        async with httpx.AsyncClient(
            transport=mesh.async_transport(), base_url=bookinfo_mesh.base_url("ratings"), timeout=timeout
        ) as client:
            yield {"client": client}

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "Reviews is healthy"})

    async def reviews(request: Request) -> JSONResponse:
        product_id = request.path_params["product_id"]
        found: list[dict[str, Any]] = [{"reviewer": reviewer, "text": text} for reviewer, text in TEXTS.items()]
        if has_ratings:
            ratings = await ratings_of(request.state.client, product_id)
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


async def ratings_of(client: httpx.AsyncClient, product_id: int) -> dict[str, int]:
    """Stars by reviewer; none if the ratings service fails: reviews without stars are better than no reviews."""
    try:
        response = await client.get(f"/ratings/{product_id}")
        return dict(response.raise_for_status().json()["ratings"])
    except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:  # whatever shape its JSON has
        serving.out.warning("ratings: %r", error)
        return {}


def rating_of(stars: int | None, color: str) -> dict[str, Any]:
    return {"error": "Ratings service is currently unavailable"} if stars is None else {"stars": stars, "color": color}


if __name__ == "__main__":
    serving.serve_asgi("reviews", create_app)
