"""Snapshots in one line: what tests of the data plane are configured with."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meshlib.mesh import Mesh
from meshlib.model import (
    Cluster,
    Endpoint,
    Forward,
    Listener,
    LoadAssignment,
    QuotaService,
    Route,
    RouteConfiguration,
    RouteMatch,
    Snapshot,
    VirtualHost,
    WeightedCluster,
)
from meshlib.policy.call import CallContext
from meshlib.policy.live import Live, compile_live
from meshlib.policy.quota import Answer, Question
from meshlib.quota.edge import QuotaEdge
from meshlib.settings import Settings
from meshlib.xds.encode import encode_resource
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE

Addresses = Sequence[tuple[str, int]]


def forward(*clusters: str | WeightedCluster, **fields: Any) -> Forward:
    """A Forward to clusters by name, in equal parts."""
    chosen = tuple(c if isinstance(c, WeightedCluster) else WeightedCluster(c) for c in clusters)
    return Forward(chosen, **fields)


def route(action: Any, match: RouteMatch = RouteMatch(), **fields: Any) -> Route:  # noqa: B008 -- frozen
    return Route(match, action, **fields)


def endpoints(addresses: Addresses) -> tuple[Endpoint, ...]:
    return tuple(sorted(Endpoint(host, port) for host, port in addresses))


def snapshot(
    routes: Mapping[str, Iterable[Route]],
    clusters: Mapping[str, Addresses | tuple[Cluster, Addresses]],
    *,
    complete: bool = True,
    absent: tuple[str, ...] = (),
    version: str = "1",
) -> Snapshot:
    """routes: by authority with port (`reviews:9080`). clusters: by name, the addresses behind it."""
    listeners, configurations = [], []
    for authority, its_routes in sorted(routes.items()):
        host = authority.rpartition(":")[0]
        listeners.append(Listener(authority, authority))
        domains = (host, authority) if host else (authority,)
        configurations.append(RouteConfiguration(authority, (VirtualHost(authority, domains, tuple(its_routes)),)))
    found, assignments = [], []
    for name, given in sorted(clusters.items()):
        cluster, addresses = (Cluster(name), given)
        if isinstance(given, tuple) and given and isinstance(given[0], Cluster):
            cluster, addresses = given
        found.append(cluster)
        assignments.append(LoadAssignment(name, endpoints(addresses)))  # type: ignore[arg-type]
    return Snapshot(
        version, tuple(listeners), tuple(configurations), tuple(found), tuple(assignments), complete, absent
    )


def service(authority: str, addresses: Addresses, *, cluster: Cluster | None = None, **fields: Any) -> Snapshot:
    """One service with one route and one cluster, both of its name."""
    used = cluster or Cluster(authority)
    return snapshot({authority: [route(forward(used.name, **fields))]}, {used.name: (used, addresses)})


def resources_of(snapshot: Snapshot) -> Mapping[str, Mapping[str, bytes]]:
    """Every resource of a snapshot, by type URL and name."""
    return {
        CLUSTER: {each.name: encode_resource(CLUSTER, each) for each in snapshot.clusters},
        ENDPOINT: {each.cluster: encode_resource(ENDPOINT, each) for each in snapshot.assignments},
        LISTENER: {each.name: encode_resource(LISTENER, each) for each in snapshot.listeners},
        ROUTE: {each.name: encode_resource(ROUTE, each) for each in snapshot.route_configurations},
    }


def live(given: Snapshot, seed: int = 1) -> Live:
    assert given.inconsistencies() == ()
    return compile_live(given, None, random.Random(seed))


def mesh(given: Snapshot | None = None, **settings: Any) -> Mesh:
    """A started Mesh that runs on `given`, without a feed."""
    made = Mesh(Settings(**settings))
    made.start()
    if given is not None:
        publish(made, given)
    return made


def publish(to: Mesh, given: Snapshot) -> None:
    assert given.inconsistencies() == ()
    to._feed.publish(given)


class Counted(QuotaEdge):
    """Asks nobody about quotas: lets `calls` calls pass, and remembers what it was asked."""

    def __init__(self, calls: int) -> None:
        super().__init__(_nobody)
        self.calls = calls
        self.asked: list[Question] = []

    def ask(self, question: Question) -> Answer:
        self.asked.append(question)
        left = self.calls - len(self.asked)
        return Answer(left < 0, self.calls, 60, max(0, left), 30.0, (("x-told", "yes"),), (("x-counted", "yes"),))

    async def ask_async(self, question: Question) -> Answer:
        await asyncio.sleep(0)
        return self.ask(question)


def _nobody(service: QuotaService) -> Any:
    raise AssertionError(f"{service} is not to be called")


def counted(to: Mesh, by: Counted) -> None:
    """Have `by` asked about every quota."""
    to._quotas = by


class Clock:
    """Monotonic seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def context(given: Snapshot | Live, clock: Clock | None = None, seed: int = 1, **fields: Any) -> CallContext:
    current = given if isinstance(given, Live) else live(given)
    return CallContext(lambda: current, clock or Clock(), random.Random(seed), **fields)
