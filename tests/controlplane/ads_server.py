"""An ADS server on loopback whose mesh is what a test publishes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

import grpc.aio
from xds_client import Stream, node

from meshlib.controlplane.ads import AggregatedDiscoveryService, Connection
from meshlib.controlplane.cache import Cache
from meshlib.controlplane.registry import Registry
from meshlib.controlplane.subscriptions import Request
from meshlib.istio.resources import Object
from meshlib.istio.translate import Translation
from meshlib.model import (
    CATCH_ALL,
    Cluster,
    Endpoint,
    Forward,
    Listener,
    LoadAssignment,
    Node,
    Route,
    RouteConfiguration,
    RouteMatch,
    Snapshot,
    VirtualHost,
    WeightedCluster,
    Workload,
)


def mesh(*clusters: str, route_to: str = "", endpoints: int = 1, port: int = 1000) -> Snapshot:
    """Clusters with their endpoints, from `port` upwards; one listener, `web:80`, and the catch-all."""
    route = Route(RouteMatch(), Forward((WeightedCluster(route_to or clusters[0]),)))
    return Snapshot(
        listeners=(Listener(CATCH_ALL, "r"), Listener("web:80", "r")),
        route_configurations=(RouteConfiguration("r", (VirtualHost("r", ("*",), (route,)),)),),
        clusters=tuple(Cluster(name) for name in sorted(clusters)),
        assignments=tuple(
            LoadAssignment(name, tuple(Endpoint("127.0.0.1", port + i) for i in range(endpoints)))
            for name in sorted(clusters)
        ),
    )


class Serving:
    """`publish` what everybody shall see; `connect` clients; `until` waits for what the registry shows."""

    def __init__(self, ttls: Mapping[str, float] | None = None) -> None:
        self.snapshot = mesh("a")
        self.translations = 0
        self.cache, self.registry = Cache(self._translate), Registry()
        self.ads = AggregatedDiscoveryService(self.cache, self.registry, ttls=ttls or {})
        self.server = grpc.aio.server()
        self.ads.add_to(self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self._changed = asyncio.Event()
        self.registry.on_change(self._changed.set)
        self._opened = AsyncExitStack()

    def _translate(self, objects: tuple[Object, ...], workloads: tuple[Workload, ...], node: Node) -> Translation:
        self.translations += 1
        return Translation(self.snapshot, ())

    async def publish(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        await self.cache.update((), self.registry.workloads, self.registry.nodes)

    async def connect(self, *, delta: bool = True, who: object = None, only: str = "") -> Stream:
        stream = Stream(self.address, delta=delta, who=who or node(), only=only)
        return await self._opened.enter_async_context(stream)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until the registry says so."""
        async with asyncio.timeout(60):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def until_answered(self, connection: Connection) -> None:
        """Until the client's acknowledgements of all that it was sent were read."""
        state, came = connection.state, asyncio.Event()
        receive = state.received

        def received(request: Request) -> None:
            receive(request)
            came.set()

        state.received = received  # type: ignore[method-assign]
        async with asyncio.timeout(60):
            while not state.is_answered:
                came.clear()
                await came.wait()

    async def close(self) -> None:
        await self._opened.aclose()
        await self.ads.close()
        await self.server.stop(None)
