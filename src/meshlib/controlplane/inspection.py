"""What was one process told? The configuration of a client, in the very bytes that it was sent; and which certificates
it goes by, as it tells itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, NamedTuple

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from meshlib.controlplane.access_rules import Powers, Role
from meshlib.controlplane.admin import query_of
from meshlib.controlplane.gate import JSON, admission_of
from meshlib.identity.held import ROOT


class Configuration(msgspec.Struct, frozen=True):
    """name: the client's. alike: how many connected clients fitted the name that was asked for; this is one of them.

    version: of the configuration. resources: (type URL, xDS resource in base64) each; meshlib.xds.decode reads them.
    """

    name: str
    version: str
    alike: int = 1
    resources: tuple[tuple[str, bytes], ...] = ()


Moment = Annotated[int, msgspec.Meta(ge=0, lt=253402300800)]
"""Seconds since 1970, of years that are written with four digits: what a certificate can say."""


class Secret(msgspec.Struct, frozen=True):
    """A certificate that a process goes by. name: `default` is its own, `ROOTCA` a root."""

    name: str
    serial: str
    not_before: Moment
    not_after: Moment


class Secrets(msgspec.Struct, frozen=True):
    """name, alike: as a Configuration's. None is told by a process without an identity, or without telemetry."""

    name: str
    alike: int = 1
    secrets: tuple[Secret, ...] = ()


class Client(NamedTuple):
    """One that is connected. id: the node's. sent: (type URL, bytes) of each resource that it holds. visible: of each
    that it would be sent if it asked for everything."""

    name: str
    id: str
    workload: str
    namespace: str
    version: str
    sent: tuple[tuple[str, bytes], ...]
    visible: Callable[[], tuple[tuple[str, bytes], ...]]


class Inspection:
    """Routes of the admin API that look into one client; they only read."""

    def __init__(
        self, clients: Callable[[], Iterable[Client]], gauges: Callable[[], Iterable[tuple[str, dict[str, str], float]]]
    ) -> None:
        """clients: every one that has said who it is; asked on the event loop. gauges: what processes have told of
        their own state in the last minute: name, labels, value."""
        self._clients, self._gauges = clients, gauges

    def routes(self) -> list[Route]:
        return [Route("/v1/config", self._configuration), Route("/v1/secrets", self._secrets)]

    async def _configuration(self, request: Request) -> Response:
        query = query_of(request, "of", "scope")
        if query["scope"] not in ("", "sent", "visible"):
            raise HTTPException(400, f"scope {query['scope']}: there are sent and visible")
        found, alike = self._find(query["of"], admission_of(request).powers)
        resources = found.visible() if query["scope"] == "visible" else found.sent
        return JSON(Configuration(found.name, found.version, alike, resources))

    async def _secrets(self, request: Request) -> Response:
        found, alike = self._find(query_of(request, "of")["of"], admission_of(request).powers)
        told = (
            _secret(labels)
            for name, labels, _ in self._gauges()
            if name == "meshlib_certificate_info"
            and labels.get("service.instance.id") == found.id
            and labels.get("service.namespace") == found.namespace  # nobody's word counts for another namespace
        )
        secrets = [each for each in told if each is not None]
        secrets.sort(key=lambda each: (each.name == ROOT, -each.not_before, each.serial))
        latest = [each for each in secrets if each.name != ROOT][:1]  # what it had before is told for a minute, too
        roots = [each for each in secrets if each.name == ROOT]
        return JSON(Secrets(found.name, alike, (*latest, *roots)))

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


def _secret(told: Mapping[str, str]) -> Secret | None:
    """None for what is no certificate: whoever has an identity can push a metric of that name."""
    try:
        return msgspec.convert({**told, "name": told.get("resource")}, Secret, strict=False)
    except msgspec.ValidationError:
        return None
