"""Who wrote the book, and how many pages has it? Bookinfo's details service, on Flask.

v1 knows one book. v2 (ENABLE_EXTERNAL_BOOK_SERVICE=true) asks a public one: EXTERNAL_BOOK_SERVICE_HOSTNAME
(www.googleapis.com, may carry a port), by HTTPS, or by HTTP with DO_NOT_ENCRYPT=true, so that the mesh can see the
request and originate TLS itself.
"""

from __future__ import annotations

import os
from typing import Any

import bookinfo_mesh
import httpx
import serving
from flask import Flask, jsonify
from flask.typing import ResponseReturnValue

THE_COMEDY_OF_ERRORS = "isbn:0486424618"
EXTERNAL_TIMEOUT = 5.0


def create_app() -> Flask:
    app = Flask(__name__)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    mesh = bookinfo_mesh.connect()
    external = mesh.Client(timeout=EXTERNAL_TIMEOUT) if is_true("ENABLE_EXTERNAL_BOOK_SERVICE") else None

    @app.get("/health")
    def health() -> ResponseReturnValue:
        return jsonify(status="Details is healthy")

    @app.get("/details/<product_id>")
    def details(product_id: str) -> ResponseReturnValue:
        if not (product_id.isascii() and product_id.isdecimal()):
            return jsonify(error=f"the product's id must be a number, not {product_id!r}"), 400
        if external is None:
            return jsonify(one_book(int(product_id)))
        try:
            return jsonify(book_from(external, int(product_id)))
        except (httpx.HTTPError, AttributeError, LookupError, TypeError, ValueError) as error:  # or any other JSON
            app.logger.warning("external book service: %r", error)
            return jsonify(error="the external book service gave no answer that can be used"), 502

    app.wsgi_app = mesh.wsgi(serving.WsgiAccessLog(app.wsgi_app, "details"))  # type: ignore[method-assign]
    return app


def one_book(product_id: int) -> dict[str, Any]:
    return {
        "id": product_id,
        "author": "William Shakespeare",
        "year": 1595,
        "type": "paperback",
        "pages": 200,
        "publisher": "PublisherA",
        "language": "English",
        "ISBN-10": "1234567890",
        "ISBN-13": "123-1234567890",
    }


def book_from(client: httpx.Client, product_id: int) -> dict[str, Any]:
    """The first volume found, in the format of the Google Books API (volumes: list)."""
    scheme = "http" if is_true("DO_NOT_ENCRYPT") else "https"
    host = os.environ.get("EXTERNAL_BOOK_SERVICE_HOSTNAME", "www.googleapis.com")
    response = client.get(f"{scheme}://{host}/books/v1/volumes", params={"q": THE_COMEDY_OF_ERRORS})
    volume = response.raise_for_status().json()["items"][0]["volumeInfo"]
    identifiers = {each["type"]: each["identifier"] for each in volume.get("industryIdentifiers", ())}
    return {
        "id": product_id,
        "author": volume["authors"][0],
        "year": volume["publishedDate"],
        "type": "paperback" if volume["printType"] == "BOOK" else "unknown",
        "pages": volume["pageCount"],
        "publisher": volume["publisher"],
        "language": "English" if volume["language"] == "en" else "unknown",
        "ISBN-10": identifiers.get("ISBN_10", "unknown"),
        "ISBN-13": identifiers.get("ISBN_13", "unknown"),
    }


def is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"


if __name__ == "__main__":
    serving.serve_wsgi("details", create_app)
