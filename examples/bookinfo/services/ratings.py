"""How many stars did each reviewer give? Bookinfo's ratings service, on Starlette.

SERVICE_VERSION decides how it behaves:
  v1             keeps ratings in memory; POST replaces those of a product
  v2             reads them from a database, RATINGS_DATABASE (a SQLite file, made if missing); POST is not implemented
  v-faulty       answers every second request, at random, with 503
  v-delayed      delays every second request, at random, by 7 seconds
  v-unavailable  answers 503 every other minute
  v-unhealthy    answers 503 every other quarter of an hour, and fails its health check meanwhile
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sqlite3
import time
from typing import NamedTuple

import bookinfo_mesh
import serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

RATINGS = {"Reviewer1": 5, "Reviewer2": 4}


class Mood(NamedTuple):
    """How the next request is treated. delay: seconds."""

    is_available: bool = True
    is_healthy: bool = True
    delay: float = 0.0


def mood(version: str, uptime: float, draw: float) -> Mood:
    """uptime: seconds since the start. draw: uniform in [0, 1)."""
    if version == "v-faulty":
        return Mood(is_available=draw < 0.5)
    if version == "v-delayed":
        return Mood(delay=0.0 if draw < 0.5 else 7.0)
    if version == "v-unavailable":
        return Mood(is_available=uptime // 60 % 2 == 0)
    if version == "v-unhealthy":
        is_well = uptime // (15 * 60) % 2 == 0
        return Mood(is_available=is_well, is_healthy=is_well)
    return Mood()


def create_app() -> ASGIApp:
    start = time.monotonic()
    in_memory: dict[int, dict[str, int]] = {}
    database = os.environ.get("RATINGS_DATABASE", "ratings.sqlite") if serving.VERSION == "v2" else None
    if database:
        make_database(database)

    def mood_now() -> Mood:
        return mood(serving.VERSION, time.monotonic() - start, random.random())

    async def health(request: Request) -> JSONResponse:
        if mood_now().is_healthy:
            return JSONResponse({"status": "Ratings is healthy"})
        return JSONResponse({"status": "Ratings is not healthy"}, 500)

    async def get(request: Request) -> JSONResponse:
        product_id = request.path_params["product_id"]
        if not (product_id.isascii() and product_id.isdecimal()):
            return JSONResponse({"error": f"the product's id must be a number, not {product_id!r}"}, 400)
        now = mood_now()
        await asyncio.sleep(now.delay)
        if not now.is_available:
            return JSONResponse({"error": "ratings are out of order"}, 503)
        if database:
            try:
                ratings = await asyncio.to_thread(read_database, database)
            except sqlite3.Error as error:
                return JSONResponse({"error": f"the ratings database can't be read: {error}"}, 500)
        else:
            ratings = in_memory.get(int(product_id), RATINGS)
        return JSONResponse({"id": int(product_id), "ratings": ratings})

    async def post(request: Request) -> JSONResponse:
        product_id = request.path_params["product_id"]
        if not (product_id.isascii() and product_id.isdecimal()):
            return JSONResponse({"error": f"the product's id must be a number, not {product_id!r}"}, 400)
        if database:
            return JSONResponse({"error": "ratings in a database can't be changed here"}, 501)
        try:
            ratings = json.loads(await request.body())
        except ValueError:
            ratings = None
        if not is_ratings(ratings):
            return JSONResponse({"error": 'the body must be JSON such as {"Reviewer1": 5}'}, 400)
        in_memory[int(product_id)] = ratings
        return JSONResponse({"id": int(product_id), "ratings": ratings})

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/ratings/{product_id}", get, methods=["GET"]),
            Route("/ratings/{product_id}", post, methods=["POST"]),
        ]
    )
    return bookinfo_mesh.connect().asgi(serving.AsgiAccessLog(app, "ratings"))


def is_ratings(value: object) -> bool:
    return isinstance(value, dict) and all(type(stars) is int and 0 <= stars <= 5 for stars in value.values())


def make_database(path: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS ratings (reviewer TEXT PRIMARY KEY, stars INTEGER NOT NULL)")
        connection.executemany("INSERT OR IGNORE INTO ratings VALUES (?, ?)", RATINGS.items())


def read_database(path: str) -> dict[str, int]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return dict(connection.execute("SELECT reviewer, stars FROM ratings ORDER BY reviewer"))


if __name__ == "__main__":
    serving.serve_asgi("ratings", create_app)
