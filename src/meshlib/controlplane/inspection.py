"""What was one process told? The configuration of a client, in the very bytes that it was sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from meshlib.controlplane.access_rules import Powers, Role
from meshlib.controlplane.admin import query_of
from meshlib.controlplane.gate import JSON, admission_of


class Configuration(msgspec.Struct, frozen=True):
    """name: the client's. alike: how many connected clients fitted the name that was asked for; this is one of them.

    version: of the configuration. resources: (type URL, xDS resource in base64) each; meshlib.xds.decode reads them.
    """

    name: str
    version: str
    alike: int = 1
    resources: tuple[tuple[str, bytes], ...] = ()


class Client(NamedTuple):
    """One that is connected. sent: (type URL, bytes) of each resource that it holds. visible: of each that it would be
    sent if it asked for everything."""

    name: str
    workload: str
    namespace: str
    version: str
    sent: tuple[tuple[str, bytes], ...]
    visible: Callable[[], tuple[tuple[str, bytes], ...]]


class Inspection:
    """Routes of the admin API that look into one client; they only read."""

    def __init__(self, clients: Callable[[], Iterable[Client]]) -> None:
        """clients: every one that has said who it is; asked on the event loop."""
        self._clients = clients

    def routes(self) -> list[Route]:
        return [Route("/v1/config", self._configuration)]

    async def _configuration(self, request: Request) -> Response:
        query = query_of(request, "of", "scope")
        if query["scope"] not in ("", "sent", "visible"):
            raise HTTPException(400, f"scope {query['scope']}: there are sent and visible")
        found, alike = self._find(query["of"], admission_of(request).powers)
        resources = found.visible() if query["scope"] == "visible" else found.sent
        return JSON(Configuration(found.name, found.version, alike, resources))

    def _find(self, name: str, powers: Powers) -> tuple[Client, int]:
        """The client of this name; or one of this workload, and how many there are. For operators of its namespace:
        what it was sent has the credentials of headers in it, as it sends them."""
        if not name:
            raise HTTPException(400, "of is missing: which process?")
        everybody = sorted(
            (each for each in self._clients() if powers.has(Role.OPERATOR, each.namespace)), key=lambda each: each.name
        )
        for names in (
            [each for each in everybody if each.name == name],
            [each for each in everybody if name in (each.workload, f"{each.workload}.{each.namespace}")],
        ):
            if names:
                return names[0], len(names)
        known = ", ".join(each.name for each in everybody) or "nobody is connected"
        raise HTTPException(404, f"{name} is not connected; there are: {known}")
