"""How does a route's Cors look in Envoy's own words? The filter `cors`, and what a route says to it.

For Envoys alone: gRPC refuses a filter that it does not know, and our own gateway reads the route's notes.
"""

from __future__ import annotations

from typing import Any

from meshlib.model import Cors
from meshlib.xds import fields as read
from meshlib.xds import messages as m
from meshlib.xds.encode_matches import set_string
from meshlib.xds.fields import Wrong

CORS_FILTER = "envoy.filters.http.cors"


def encode_cors(cors: Cors) -> Any:
    message = m.CorsPolicy(allow_methods=cors.methods, allow_headers=cors.headers, expose_headers=cors.exposed)
    for origin in cors.origins:
        set_string(message.allow_origin_string_match.add(), origin)
    message.filter_enabled.default_value.numerator = 100  # Envoy 1.40 does nothing where it is not said
    if cors.max_age is not None:
        message.max_age = str(cors.max_age)
    message.allow_credentials.value = cors.credentials
    message.forward_not_matching_preflights.value = cors.forward_unmatched
    return message


def decode_cors(message: Any, field: str) -> Cors | None:
    """None where it is switched off. Raises Wrong."""
    if message.HasField("filter_enabled") and not message.filter_enabled.default_value.numerator:
        return None
    if message.max_age and not message.max_age.isdecimal():
        raise Wrong(f"{field}.max_age", f"is no number of seconds: {message.max_age!r}")
    for name in ("allow_methods", "allow_headers", "expose_headers"):
        read.head_text(getattr(message, name), f"{field}.{name}")
    return Cors(
        tuple(
            read.string(each, f"{field}.allow_origin_string_match[{index}]")
            for index, each in enumerate(message.allow_origin_string_match)
        ),
        message.allow_methods,
        message.allow_headers,
        message.expose_headers,
        int(message.max_age) if message.max_age else None,
        message.allow_credentials.value,
        message.forward_not_matching_preflights.value or not message.HasField("forward_not_matching_preflights"),
    )
