"""What must hold in a corsPolicy that its shape can't say? As Istio's webhook has it (validateCORSPolicy)."""

from __future__ import annotations

from meshlib.istio import resources as r
from meshlib.istio.checks.parts import HEADER, check_regex
from meshlib.istio.problems import Refused

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE", "*"})


def check_cors(policy: r.CorsPolicy, at: str) -> None:
    """Raises Refused."""
    for index, origin in enumerate(policy.allow_origins):
        given = [name for name in ("exact", "prefix", "regex") if getattr(origin, name) is not None]
        if len(given) != 1 or not getattr(origin, given[0]):
            raise Refused(f"{at}.allowOrigins[{index}]", "needs one of exact, prefix and regex, and not an empty one")
        if origin.regex is not None:
            check_regex(origin.regex, f"{at}.allowOrigins[{index}].regex")
    for index, method in enumerate(policy.allow_methods):
        if method not in _METHODS:
            raise Refused(f"{at}.allowMethods[{index}]", f"unknown method {method!r}")
    for field, names in (("allowHeaders", policy.allow_headers), ("exposeHeaders", policy.expose_headers)):
        for index, name in enumerate(names):
            if not HEADER.match(name) or name.startswith(":"):
                raise Refused(f"{at}.{field}[{index}]", f"no header name: {name!r}")
    if policy.max_age is not None and (policy.max_age.seconds < 0.001 or policy.max_age.seconds % 1):
        raise Refused(f"{at}.maxAge", "must be whole seconds, at least 1s")
