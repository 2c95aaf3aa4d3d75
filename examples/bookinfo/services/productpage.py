"""What does a visitor see of the book? Bookinfo's front page and its JSON API, on Flask.

This is where a user's name enters the mesh: POST /login puts it into a signed session cookie, and each call that
productpage makes for that user carries it in the header `end-user`. SESSION_SECRET signs; replicas must share it.
"""

from __future__ import annotations

import contextvars
import os
import secrets
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import quote

import bookinfo_mesh
import httpx
import serving
from flask import Flask, Response, jsonify, redirect, render_template, request, session, url_for
from flask.typing import ResponseReturnValue

UPSTREAM_TIMEOUT = 3.0

PRODUCTS = [
    {
        "id": 0,
        "title": "The Comedy of Errors",
        "descriptionHtml": "Two pairs of identical twins, parted by a shipwreck, come to the same town on the same day "
        "and know nothing of each other. Servants are beaten for errands they never ran, a goldsmith bills the wrong "
        "gentleman, and a wife dines with her husband's brother while her husband hammers at the door. Shakespeare's "
        "shortest play, and one of his <b>funniest</b>.",
    }
]


class Answer(NamedTuple):
    """status: 200, or what went wrong: the upstream's status, 500 if it gave none. milliseconds: all tries together."""

    status: int
    body: Any
    milliseconds: float


def create_app() -> Flask:
    app = Flask(__name__)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.secret_key = os.environ.get("SESSION_SECRET") or secrets.token_bytes(32)
    app.config.update(SESSION_COOKIE_SAMESITE="Lax", SESSION_COOKIE_NAME="bookinfo")
    mesh = bookinfo_mesh.connect()
    client = mesh.Client(timeout=UPSTREAM_TIMEOUT)
    flood_factor = int(os.environ.get("FLOOD_FACTOR", "0"))
    results: Counter[tuple[str, int]] = Counter()
    results_lock = threading.Lock()

    def ask(service: str, product_id: str | int, tries: int = 1) -> Answer:
        url = f"{bookinfo_mesh.base_url(service)}/{service}/{quote(str(product_id), safe='')}"
        headers = {"end-user": session["user"]} if "user" in session else {}
        start = time.perf_counter()
        status, body = 500, None
        for _ in range(tries):
            try:
                response = client.get(url, headers=headers)
                status, body = response.status_code, response.json() if response.status_code == 200 else None
            except (httpx.HTTPError, ValueError) as error:
                app.logger.warning("%s: %r", service, error)
                status, body = 500, None
            with results_lock:
                results[service, status] += 1
            if status == 200:
                break
        else:
            body = {"error": f"Sorry, product {service} are currently unavailable for this book."}
        return Answer(status, body, (time.perf_counter() - start) * 1000)

    def ask_reviews(product_id: str | int) -> Answer:
        """Twice three seconds, while reviews v2 waits ten for its ratings: the tutorial's bug, here on purpose."""
        return ask("reviews", product_id, tries=2)

    def flood(product_id: int) -> None:
        """FLOOD_FACTOR=n sends n more requests to reviews for each page, at once, and ignores the answers."""
        with ThreadPoolExecutor(flood_factor) as pool:
            for _ in range(flood_factor):
                pool.submit(contextvars.copy_context().run, ask, "reviews", product_id)

    @app.get("/")
    @app.get("/index.html")
    def index() -> ResponseReturnValue:
        return render_template("index.html")

    @app.get("/health")
    def health() -> ResponseReturnValue:
        return Response("Product page is healthy", mimetype="text/plain")

    @app.get("/productpage")
    def front() -> ResponseReturnValue:
        product = PRODUCTS[0]
        if flood_factor > 0:
            flood(0)
        return render_template(
            "productpage.html",
            product=product,
            user=session.get("user", ""),
            details=ask("details", 0),
            reviews=ask_reviews(0),
        )

    @app.post("/login")
    def login() -> ResponseReturnValue:
        user = request.form.get("username", "").strip()
        if not (user.isascii() and user.isprintable() and len(user) <= 64):
            return "A user name is made of at most 64 ASCII characters: it travels in a header.", 400
        session.pop("user", None)
        if user:
            session["user"] = user
        return redirect(url_for("front"))

    @app.get("/logout")
    def logout() -> ResponseReturnValue:
        session.pop("user", None)
        return redirect(url_for("front"))

    @app.get("/api/v1/products")
    def products() -> ResponseReturnValue:
        return jsonify(PRODUCTS)

    @app.get("/api/v1/products/<product_id>")
    def product_details(product_id: str) -> ResponseReturnValue:
        answer = ask("details", product_id)
        return jsonify(answer.body), answer.status

    @app.get("/api/v1/products/<product_id>/reviews")
    def product_reviews(product_id: str) -> ResponseReturnValue:
        answer = ask_reviews(product_id)
        return jsonify(answer.body), answer.status

    @app.get("/api/v1/products/<product_id>/ratings")
    def product_ratings(product_id: str) -> ResponseReturnValue:
        answer = ask("ratings", product_id)
        return jsonify(answer.body), answer.status

    @app.get("/metrics")
    def metrics() -> ResponseReturnValue:
        lines = ["# HELP request_result_total Results of requests", "# TYPE request_result_total counter"]
        with results_lock:
            counts = sorted(results.items())
        for (service, status), count in counts:
            lines.append(f'request_result_total{{destination_app="{service}",response_code="{status}"}} {count}')
        return Response("\n".join(lines) + "\n", mimetype="text/plain; version=0.0.4")

    app.wsgi_app = mesh.wsgi(serving.WsgiAccessLog(app.wsgi_app, "productpage"))  # type: ignore[method-assign]
    return app


if __name__ == "__main__":
    serving.serve_wsgi("productpage", create_app)
