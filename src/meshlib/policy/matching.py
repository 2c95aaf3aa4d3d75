"""Does this request fit? Compiles the model's matches into plain functions, once, off the hot path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl

from meshlib.model import ClaimMatch, HeaderMatch, HeaderView, QueryMatch, Request, RouteMatch, StringMatch
from meshlib.model.expressions import compile_string

Predicate = Callable[[Request], bool]


def compile_claim(path: tuple[str, ...], match: StringMatch) -> Callable[[Mapping[str, Any] | None], bool]:
    """Whether a verified token's claim fits; of a list, any of its items (Istio)."""
    fits, present = compile_string(match), match.kind == "present"

    def holds(claims: Mapping[str, Any] | None) -> bool:
        value: Any = claims
        for name in path:
            if not isinstance(value, Mapping) or name not in value:
                return False
            value = value[name]
        if present:
            return True
        if isinstance(value, list):
            return any(isinstance(each, str) and fits(each) for each in value)
        if isinstance(value, bool):
            return fits("true" if value else "false")
        return isinstance(value, str) and fits(value)

    return holds


def compile_match(match: RouteMatch) -> Predicate | None:
    """None when every request fits, so that the commonest route costs nothing."""
    predicates: list[Predicate] = []
    if match.path is not None and not (match.path.kind in ("prefix", "path-prefix") and match.path.value in ("", "/")):
        fits_path = compile_string(match.path)
        predicates.append(lambda request: fits_path(request.path.partition("?")[0]))
    if match.method is not None:
        fits_method = compile_string(match.method)
        predicates.append(lambda request: fits_method(request.method))
    if match.scheme is not None:
        fits_scheme = compile_string(match.scheme)
        predicates.append(lambda request: fits_scheme(request.scheme))
    if match.authority is not None:
        fits_authority = compile_string(match.authority)
        predicates.append(lambda request: fits_authority(request.authority))
    predicates.extend(_compile_header(header) for header in match.headers)
    predicates.extend(_compile_query(query) for query in match.query)
    predicates.extend(_compile_claim(claim) for claim in match.claims)
    if not predicates:
        return None
    if len(predicates) == 1:
        return predicates[0]
    return lambda request: all(fits(request) for fits in predicates)


def compile_header(header: HeaderMatch) -> Callable[[HeaderView], bool]:
    """The same for a request's headers and for a response's."""
    name = header.name
    if header.match.kind == "present":
        wanted = not header.invert
        return lambda headers: (headers.get(name) is not None) is wanted
    fits = compile_string(header.match)
    if header.invert:
        return lambda headers: not fits(headers.get(name) or "")

    def holds(headers: HeaderView) -> bool:
        value = headers.get(name)
        return value is not None and fits(value)

    return holds


def _compile_header(header: HeaderMatch) -> Predicate:
    name, match = header.name, header.match
    if header.invert or match.kind == "present":
        holds = compile_header(header)
        return lambda request: holds(request.headers)
    fits = compile_string(match)

    def is_there(request: Request) -> bool:  # the commonest, without a step in between
        value = request.headers.get(name)
        return value is not None and fits(value)

    return is_there


def _compile_claim(claim: ClaimMatch) -> Predicate:
    holds, wanted = compile_claim(claim.path, claim.match), not claim.invert
    return lambda request: holds(request.claims) is wanted


def _compile_query(query: QueryMatch) -> Predicate:
    name = query.name
    fits = compile_string(query.match)

    def holds(request: Request) -> bool:
        given = parse_qsl(request.path.partition("?")[2], keep_blank_values=True)
        # The first value decides, as in Envoy.
        return next((fits(value) for key, value in given if key == name), False)

    return holds
