"""Who changed what? The audit log's last entries, as the admin API tells them to admins of their namespaces."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from meshlib.controlplane.access_rules import Role
from meshlib.controlplane.admin import query_of
from meshlib.controlplane.audit import MOST, AuditLog, Entries
from meshlib.controlplane.gate import JSON, admission_of


class AuditRoutes:
    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit

    def routes(self) -> list[Route]:
        return [Route("/v1/audit", self._entries)]

    async def _entries(self, request: Request) -> Response:
        query = query_of(request, "since", "limit", "who", "object", "namespace")
        powers = admission_of(request).powers
        if not powers.namespaces(Role.ADMIN):
            admission_of(request).demand(Role.ADMIN)
        try:
            since, limit = float(query["since"] or 0), int(query["limit"] or MOST)
        except ValueError:
            raise HTTPException(400, "since is seconds since 1970, and limit a whole number") from None
        found = [
            each
            for each in self._audit.entries(since)
            if powers.has(Role.ADMIN, each.namespace)
            and query["who"] in ("", each.who)
            and query["object"].lower() in each.object.lower()
            and query["namespace"] in ("", each.namespace)
        ]
        return JSON(Entries(tuple(found[-limit:] if limit > 0 else ())))
