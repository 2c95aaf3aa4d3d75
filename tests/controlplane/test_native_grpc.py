"""Does a gRPC client with its own xDS (`xds:///`) find its way by our control plane? C-core is the judge."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc.aio
import pytest
from ads_server import Serving, mesh

from everything import HASHES, LIMITS, OUTLIERS, RETRY, everything
from meshlib import model as md
from meshlib.model import Cluster, ClusterType, Endpoint, LoadAssignment, LoadBalancing
from peers import other_grpcio

# In a process of its own: C-core reads the bootstrap once, and its xDS client lives as long as the process.
CLIENT = """
import grpc, json, sys
channel = grpc.insecure_channel("xds:///web:80", options=[("grpc.enable_http_proxy", 0)])
say = channel.unary_unary("/echo.Echo/Say", lambda data: data, lambda data: data)
def tell(call):
    failed = f"{call.code().name} {call.details()}" if call.code() is not grpc.StatusCode.OK else ""
    print(failed or call.result().decode(), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    for _ in range(order["calls"]):
        call = say.future(order["word"].encode(), timeout=20, metadata=order["metadata"])
        call.add_done_callback(tell)
"""


@dataclass
class Echo:
    """A gRPC server that answers with its name; to `again` at the second try, to `hold` when released."""

    name: str
    is_broken: bool = False
    port: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def say(self, request: bytes, context: Any) -> bytes:
        tries = dict(context.invocation_metadata()).get("grpc-previous-rpc-attempts", "0")
        if self.is_broken or (request == b"again" and tries == "0"):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        if request == b"hold":
            await self.released.wait()
        return self.name.encode()


@dataclass
class Judge:
    """A client of gRPC's own, and what it is told."""

    serving: Serving
    process: asyncio.subprocess.Process

    def order(self, word: str, *, calls: int = 1, **metadata: str) -> None:
        assert self.process.stdin is not None
        pairs = [(name.replace("_", "-"), value) for name, value in metadata.items()]
        order = {"word": word, "calls": calls, "metadata": pairs}
        self.process.stdin.write(json.dumps(order).encode() + b"\n")

    async def told(self) -> str:
        assert self.process.stdout is not None
        return (await self.process.stdout.readline()).decode().strip()

    async def say(self, word: str = "hello", **metadata: str) -> str:
        """The server's name, or the name of a status."""
        self.order(word, **metadata)
        return await self.told()

    async def publish(self, cluster: Cluster, *servers: Echo, **action: Any) -> None:
        """One cluster and a route to it; the cluster before it is gone."""
        made = mesh(cluster.name)
        (table,) = made.route_configurations
        (host,) = table.virtual_hosts
        (route,) = host.routes
        assert isinstance(route.action, md.Forward)
        route = replace(route, action=replace(route.action, **action))
        endpoints = tuple(Endpoint("127.0.0.1", each.port) for each in servers)
        await self.serving.publish(
            replace(
                made,
                clusters=(cluster,),
                assignments=(LoadAssignment(cluster.name, endpoints),),
                route_configurations=(replace(table, virtual_hosts=(replace(host, routes=(route,)),)),),
            )
        )

    def assert_accepted(self) -> None:
        (shown,) = self.serving.ads.clients()
        assert shown.user_agent.startswith("gRPC C-core")
        assert shown.errors == ()


@asynccontextmanager
async def judging() -> AsyncIterator[tuple[Judge, Echo, Echo]]:
    """A client and two servers."""
    serving = Serving()
    await serving.server.start()
    servers = []
    for each in (one := Echo("one"), two := Echo("two")):
        server = grpc.aio.server()
        method = grpc.unary_unary_rpc_method_handler(each.say)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", {"Say": method}),))
        each.port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
    bootstrap = {
        "xds_servers": [{"server_uri": serving.address, "channel_creds": [{"type": "insecure"}]}],
        "node": {"id": "sidecar~127.0.0.1~native.default~default.svc.cluster.local"},
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CLIENT),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **other_grpcio(), "GRPC_XDS_BOOTSTRAP_CONFIG": json.dumps(bootstrap)},
    )
    try:
        async with asyncio.timeout(60):
            yield Judge(serving, process), one, two
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
        await serving.close()
        for server in servers:
            await server.stop(None)


@pytest.mark.processes
async def test_a_native_grpc_client_follows_endpoints_and_routes() -> None:
    """It asks by name, state of the world, and gets a new cluster because a route names it."""
    async with judging() as (judge, one, two):
        # Our default, LEAST_REQUEST, which C-core does not know: it takes the second choice.
        assert Cluster("a").load_balancing is LoadBalancing.LEAST_REQUEST
        await judge.publish(Cluster("a"), one)
        assert await judge.say() == "one"
        await judge.publish(Cluster("a"), two)
        while await judge.say() != "two":  # endpoints
            pass
        await judge.publish(Cluster("b"), one)
        while await judge.say() != "one":  # a route, to a cluster that was not there
            pass
        judge.assert_accepted()


@pytest.mark.processes
async def test_a_native_grpc_client_takes_everything_that_the_model_can_say() -> None:
    """Every policy, limit, budget and check: what C-core does not know, it finds something else for, or passes over.
    Each time the cluster before is gone, and no call fails."""
    async with judging() as (judge, one, two):
        given = [each for each in everything(0, 0).clusters if each.type is ClusterType.EDS]
        assert {each.load_balancing for each in given} == set(LoadBalancing)
        for number, cluster in enumerate(given):
            server = (one, two)[number % 2]
            await judge.publish(
                cluster, server, retry=RETRY, hash_policies=HASHES, hedge=md.HedgePolicy(0.1), idle_timeout=30.0
            )
            while (answer := await judge.say()) != server.name:
                assert answer in ("one", "two"), (cluster.name, answer)
        judge.assert_accepted()


@pytest.mark.processes
@pytest.mark.parametrize("policy", [LoadBalancing.RING_HASH, LoadBalancing.MAGLEV])
async def test_a_native_grpc_client_sends_one_user_to_one_endpoint(policy: LoadBalancing) -> None:
    """By the route's hash policy and the cluster's ring; behind maglev, which C-core does not know, stands a ring."""
    async with judging() as (judge, one, two):
        cluster = Cluster("a", load_balancing=policy)
        await judge.publish(cluster, one, two, hash_policies=(md.HashPolicy("header", "x-user"),))
        homes = {user: await judge.say(x_user=user) for user in map(str, range(20))}
        assert set(homes.values()) == {"one", "two"}
        assert {user: await judge.say(x_user=user) for user in homes} == homes
        judge.assert_accepted()


@pytest.mark.processes
async def test_a_native_grpc_client_heeds_limits_retries_and_outliers() -> None:
    """Circuit breaking (gRFC A32), retries (A44) and outlier detection (A50), as a DestinationRule says them."""
    async with judging() as (judge, one, two):
        await judge.publish(Cluster("limited", limits=replace(LIMITS, max_requests=1)), one)
        assert await judge.say() == "one"
        judge.order("hold", calls=3)
        dropped = [await judge.told(), await judge.told()]
        assert dropped == ["UNAVAILABLE circuit breaker drop"] * 2
        one.released.set()
        assert await judge.told() == "one"

        await judge.publish(Cluster("retried"), two, retry=md.RetryPolicy(2, frozenset({"unavailable"})))
        while await judge.say() != "two":
            pass
        assert await judge.say("again") == "two"

        one.is_broken = True
        rules = replace(OUTLIERS, interval=0.2, failure_percentage_minimum_hosts=1, failure_percentage_request_volume=1)
        await judge.publish(
            Cluster("watched", load_balancing=LoadBalancing.ROUND_ROBIN, outlier_detection=rules), one, two
        )
        while await judge.say() == "two":
            pass  # until the broken one has been met
        in_a_row = 0
        while in_a_row < 20:
            in_a_row = in_a_row + 1 if await judge.say() == "two" else 0
        judge.assert_accepted()
