"""What was one process told, and what would it do with a request? The configuration that a client holds, and
mesh.explain() as it would answer there."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from meshlib.controlplane.access_rules import Powers
from meshlib.controlplane.admin import query_of
from meshlib.controlplane.gate import JSON, admission_of
from meshlib.model import (
    Cluster,
    Forward,
    Headers,
    Inbound,
    Listener,
    LoadAssignment,
    Redirect,
    RouteConfiguration,
    Snapshot,
)
from meshlib.model import Request as Call
from meshlib.policy.explain import conditions, explain
from meshlib.policy.live import compile_live
from meshlib.xds.decode import decode_resource

N = TypeVar("N", Listener, Inbound, RouteConfiguration, Cluster)


class ListenerRow(msgspec.Struct, frozen=True):
    """destination: the route configurations that it leads to; `this process` for what comes in."""

    name: str
    direction: str
    destination: str


class RouteRow(msgspec.Struct, frozen=True):
    """match: what a request must be like, in words. origin: the object and file that say so."""

    name: str
    virtual_host: str
    domains: tuple[str, ...]
    route: str
    match: str
    action: str
    origin: str


class ClusterRow(msgspec.Struct, frozen=True):
    """port: 0 where the cluster's name has none. endpoints: how many it has."""

    name: str
    service: str
    port: int
    subset: str
    direction: str
    type: str
    load_balancing: str
    endpoints: int
    origin: str


class EndpointRow(msgspec.Struct, frozen=True):
    """health: what the control plane says; ejections are each caller's own."""

    endpoint: str
    health: str
    locality: str
    weight: int
    priority: int
    workload: str
    mtls: bool
    cluster: str


class Configuration(msgspec.Struct, frozen=True):
    """What one client holds: what it has asked for and was sent. name: the client's.

    alike: how many connected clients fitted the name that was asked for; this is one of them.
    whole: the same with every field, where that was asked for.
    """

    name: str
    version: str
    alike: int = 1
    listeners: tuple[ListenerRow, ...] = ()
    routes: tuple[RouteRow, ...] = ()
    clusters: tuple[ClusterRow, ...] = ()
    endpoints: tuple[EndpointRow, ...] = ()
    whole: dict[str, Any] | None = None


class Explained(msgspec.Struct, frozen=True):
    """text: for people. explanation: the same, field by field (meshlib.policy.explain.Explanation)."""

    name: str
    text: str
    explanation: dict[str, Any]


class Client(NamedTuple):
    """One that is connected. sent: (type URL, bytes) of each resource that it holds. sees: what it would be sent if it
    asked for everything."""

    name: str
    workload: str
    namespace: str
    sent: tuple[tuple[str, bytes], ...]
    sees: Snapshot


class Inspection:
    """Routes of the admin API that look into one client; they only read."""

    def __init__(self, clients: Callable[[], Iterable[Client]]) -> None:
        """clients: every one that has said who it is; asked on the event loop."""
        self._clients = clients

    def routes(self) -> list[Route]:
        return [Route("/v1/config", self._configuration), Route("/v1/config/explain", self._explain)]

    async def _configuration(self, request: Request) -> Response:
        query = query_of(request, "of", "whole")
        found, alike = self._find(query["of"], admission_of(request).powers)
        return JSON(await run_in_threadpool(configuration_of, found, alike, bool(query["whole"])))

    async def _explain(self, request: Request) -> Response:
        headers = request.query_params.getlist("header")
        asked = {key: request.query_params.get(key, "") for key in ("of", "method", "url")}
        unknown = set(request.query_params) - {*asked, "header"}
        if unknown:
            raise HTTPException(400, f"unknown parameter {', '.join(sorted(unknown))}")
        found, _ = self._find(asked["of"], admission_of(request).powers)
        try:
            call = request_of(asked["method"] or "GET", asked["url"], headers)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return JSON(await run_in_threadpool(_explained, found, call))

    def _find(self, name: str, powers: Powers) -> tuple[Client, int]:
        """The client of this name; or one of this workload, and how many there are."""
        if not name:
            raise HTTPException(400, "of is missing: which process?")
        everybody = sorted(
            (each for each in self._clients() if powers.sees(each.namespace)), key=lambda each: each.name
        )
        for names in (
            [each for each in everybody if each.name == name],
            [each for each in everybody if name in (each.workload, f"{each.workload}.{each.namespace}")],
        ):
            if names:
                return names[0], len(names)
        known = ", ".join(each.name for each in everybody) or "nobody is connected"
        raise HTTPException(404, f"{name} is not connected; there are: {known}")


def request_of(method: str, url: str, headers: Iterable[str] = ()) -> Call:
    """The request as the core sees it. headers: `end-user: jason` each. Raises ValueError."""
    parts = urlsplit(url)
    authority = parts.netloc.rpartition("@")[2].lower()
    if not parts.scheme or not authority:
        raise ValueError(f"an absolute URL is wanted, as http://reviews:9080/; found {url!r}")
    raw = []
    for header in headers:
        name, colon, value = header.partition(":")
        if not colon or not name.strip():
            raise ValueError(f"a header is NAME: VALUE; found {header!r}")
        raw.append((name.strip().lower().encode(), value.strip().encode()))
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Call(method.upper(), parts.scheme.lower(), authority, path, Headers(raw))


def configuration_of(client: Client, alike: int = 1, whole: bool = False) -> Configuration:
    """What the client holds, in rows; with every field, too, where that is asked for."""
    held = _held(client)
    endpoints = {each.cluster: each.endpoints for each in held.assignments}
    endpoints |= {each.name: each.endpoints for each in held.clusters if each.endpoints}
    return Configuration(
        client.name,
        held.version,
        alike,
        tuple(
            ListenerRow(each.name, "outbound", ", ".join(each.route_configurations) or "-") for each in held.listeners
        )
        + tuple(ListenerRow(each.name, "inbound", "this process") for each in held.inbound),
        tuple(row for each in held.route_configurations for row in _routes(each)),
        tuple(_cluster(each, len(endpoints.get(each.name, ()))) for each in held.clusters),
        tuple(
            EndpointRow(
                str(each),
                each.health.value,
                str(each.locality),
                each.weight,
                each.priority,
                each.workload,
                each.is_meshed,
                cluster,
            )
            for cluster, found in sorted(endpoints.items())
            for each in found
        ),
        msgspec.to_builtins(held) if whole else None,
    )


def _routes(configuration: RouteConfiguration) -> Iterator[RouteRow]:
    for host in configuration.virtual_hosts:
        for route in host.routes:
            action = route.action
            if isinstance(action, Forward):
                total = sum(each.weight for each in action.clusters)
                does = ", ".join(
                    each.cluster if len(action.clusters) == 1 else f"{each.cluster} {100 * each.weight / total:.3g}%"
                    for each in action.clusters
                    if each.weight or len(action.clusters) == 1
                )
            elif isinstance(action, Redirect):
                does = f"redirect {action.status}"
            else:
                does = f"answer {action.status}"
            yield RouteRow(
                configuration.name, host.name, host.domains, route.name, conditions(route.match), does, route.origin
            )


def _cluster(cluster: Cluster, endpoints: int) -> ClusterRow:
    parts = cluster.name.split("|")  # Istio's outbound|9080|v1|reviews.default.svc.cluster.local
    is_whole = len(parts) == 4
    return ClusterRow(
        cluster.name,
        parts[3] if is_whole else cluster.service.host if cluster.service is not None else cluster.name,
        int(parts[1]) if is_whole and parts[1].isdigit() else 0,
        cluster.subset,
        parts[0] if is_whole else "-",
        cluster.type.value,
        cluster.load_balancing.value,
        endpoints,
        cluster.origin,
    )


def _explained(client: Client, call: Call) -> Explained:
    explanation = explain(compile_live(client.sees, None, random.Random(0)), call)
    return Explained(client.name, str(explanation), msgspec.to_builtins(explanation))


def _held(client: Client) -> Snapshot:
    """The Snapshot that a client makes of what it was sent."""
    values = [decode_resource(type_url, data) for type_url, data in client.sent]
    return Snapshot(
        client.sees.version,
        _named(each for each in values if isinstance(each, Listener)),
        _named(each for each in values if isinstance(each, RouteConfiguration)),
        _named(each for each in values if isinstance(each, Cluster)),
        tuple(sorted((each for each in values if isinstance(each, LoadAssignment)), key=lambda each: each.cluster)),
        inbound=_named(each for each in values if isinstance(each, Inbound)),
    )


def _named(values: Iterable[N]) -> tuple[N, ...]:
    return tuple(sorted(values, key=lambda each: each.name))
