"""What is a browser told that asks for another origin's page? As Envoy's filter `cors` has it (cors_filter.cc).

It looks at calls that came past the rules of access, and at those with an Origin alone: services send none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from meshlib.model import Cors, HeaderOperations, Request
from meshlib.model.expressions import compile_string
from meshlib.policy.steps import Reply

if TYPE_CHECKING:
    from meshlib.policy.live import Live


class Told(NamedTuple):
    """answer: of a preflight, in the server's place. operations: on the head of whatever is answered otherwise."""

    answer: Reply | None = None
    operations: HeaderOperations = HeaderOperations()


NOTHING = Told()


class CorsRules:
    """A route's Cors, compiled. Immutable."""

    __slots__ = ("_any", "_origins", "cors")

    def __init__(self, cors: Cors) -> None:
        self.cors = cors
        self._origins = tuple(compile_string(each) for each in cors.origins)
        self._any = any(fits("*") for fits in self._origins)

    def told(self, request: Request, origin: str) -> Told:
        """What a page of `origin` is told."""
        is_allowed = self._any or any(fits(origin) for fits in self._origins)
        asked = request.method == "OPTIONS" and bool(request.headers.get("access-control-request-method"))
        if not is_allowed:
            return Told(Reply(200)) if asked and not self.cors.forward_unmatched else NOTHING
        if asked:
            return Told(Reply(200, self._permission(origin)))
        exposed = (("access-control-expose-headers", self.cors.exposed),) if self.cors.exposed else ()
        return Told(None, HeaderOperations(set=(*self._page(origin), *exposed)))

    def _page(self, origin: str) -> tuple[tuple[str, str], ...]:
        credentials = (("access-control-allow-credentials", "true"),) if self.cors.credentials else ()
        return (("access-control-allow-origin", origin), *credentials)

    def _permission(self, origin: str) -> tuple[tuple[str, str], ...]:
        cors = self.cors
        given = (
            ("access-control-allow-methods", cors.methods),
            ("access-control-allow-headers", cors.headers),
            ("access-control-max-age", "" if cors.max_age is None else str(cors.max_age)),
        )
        return (*self._page(origin), *(pair for pair in given if pair[1]))


def told_to_page(live: Live, route_configuration: str, request: Request) -> Told:
    """What the request's route says to a page of another origin; NOTHING where nobody asks or nothing is said."""
    origin = request.headers.get("origin")
    table = live.router.tables.get(route_configuration) if origin else None
    decision = table.match(request) if table is not None else None
    if not origin or decision is None or decision.cors is None:
        return NOTHING
    return decision.cors.told(request, origin)
