"""What do clients of others get from our ADS over a real socket? The peer speaks Envoy's published protos."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from ads_server import Serving, mesh
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest
from xds_client import Stream, node, ports, type_url, workload

from meshlib.controlplane import ads
from meshlib.model import (
    Cluster,
    LoadAssignment,
)

BOTH = pytest.mark.parametrize("delta", [True, False], ids=["delta", "sotw"])


@pytest.fixture
async def serving() -> AsyncIterator[Serving]:
    found = Serving()
    await found.server.start()
    yield found
    await found.close()


async def like_an_envoy(client: Stream, *clusters: str) -> None:
    """Ask for everything, in Envoy's order, and accept it."""
    await client.ask("CDS")
    await client.take("CDS")
    await client.ask("EDS", *clusters)
    await client.take("EDS")
    await client.ask("LDS")
    await client.take("LDS")
    await client.ask("RDS", "r")
    await client.take("RDS")


# What comes


@BOTH
async def test_a_client_gets_what_it_asks_for_in_envoys_own_messages(serving: Serving, delta: bool) -> None:
    """Names, types and contents are understood by someone else's protos."""
    client = await serving.connect(delta=delta)
    await client.ask("LDS", "web:80")
    assert list(await client.take("LDS")) == ["web:80"]
    await client.ask("RDS", "r")
    routes = await client.take("RDS")
    assert routes["r"].virtual_hosts[0].routes[0].route.cluster == "a"
    await client.ask("CDS", "a")
    assert (await client.take("CDS"))["a"].eds_cluster_config.service_name == "a"
    await client.ask("EDS", "a")
    assert ports((await client.take("EDS"))["a"]) == [1000]


@BOTH
async def test_a_change_brings_only_what_has_changed(serving: Serving, delta: bool) -> None:
    """Of clusters a client of the state of the world gets all, and it gets none when only endpoints have changed."""
    await serving.publish(mesh("a", "b"))
    client = await serving.connect(delta=delta)
    await like_an_envoy(client, "a", "b")
    before = mesh("a", "b")
    await serving.publish(replace(before, assignments=(before.assignments[0], LoadAssignment("b"))))
    assert list(await client.take("EDS")) == ["b"]
    await serving.publish(replace(before, clusters=(replace(before.clusters[0], connect_timeout=1.0), Cluster("b"))))
    kind, clusters, removed = await client.next()
    assert (kind, sorted(clusters), removed) == ("CDS", ["a"] if delta else ["a", "b"], ())


@BOTH
async def test_an_envoy_has_the_endpoints_before_a_route_leads_there(serving: Serving, delta: bool) -> None:
    """And the old cluster until the route has left it."""
    client = await serving.connect(delta=delta)
    await like_an_envoy(client, "a")
    await serving.publish(mesh("b"))
    kind, clusters, _ = await client.next()
    assert (kind, sorted(clusters)) == ("CDS", ["b"] if delta else ["a", "b"])
    await client.ask("EDS", *(["b"] if delta else ["a", "b"]))
    await client.ack("CDS")
    assert list(await client.take("EDS")) == ["b"]
    assert list(await client.take("RDS")) == ["r"]
    kind, clusters, removed = await client.next()
    assert (kind, sorted(clusters), removed) == (("CDS", [], ("a",)) if delta else ("CDS", ["b"], ()))


async def test_a_client_that_reconnects_with_all_that_there_is_gets_nothing(serving: Serving) -> None:
    """What it does not have, or has in another version, it gets."""
    await serving.publish(mesh("a", "b"))
    first = await serving.connect()
    await first.ask("CDS", "a", "b")
    await first.take("CDS")
    has = {each.name: each.version for each in first.last["CDS"].resources}
    second = await serving.connect()
    await second.ask("CDS", "a", "b", initial=has)
    await second.ask("EDS", "a")
    assert list(await second.take("EDS")) == ["a"]
    third = await serving.connect()
    await third.ask("CDS", "a", "b", initial={**has, "b": "older"})
    assert list(await third.take("CDS")) == ["b"]


@BOTH
async def test_only_meshlibs_own_client_gets_the_catch_all_by_any_name(serving: Serving, delta: bool) -> None:
    """To gRPC a name that is not there has to be not there."""
    own = await serving.connect(delta=delta, who=node(user_agent="meshlib"))
    await own.ask("LDS", "example.org:443")
    assert list(await own.take("LDS")) == ["example.org:443"]
    other = await serving.connect(delta=delta, who=node(user_agent="gRPC C-core linux"))
    await other.ask("LDS", "example.org:443")
    assert await other.next() == ("LDS", {}, ("example.org:443",) if delta else ())


# Refusals


@BOTH
async def test_a_refusal_is_shown_and_not_sent_again(
    serving: Serving, delta: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It stands until an answer that differs is accepted."""
    client = await serving.connect(delta=delta)
    await client.ask("CDS", "a")
    await client.take("CDS")
    await client.ask("RDS", "r")
    await client.take("RDS")  # so what was said before it has been read
    await serving.publish(replace(mesh("a"), clusters=(Cluster("a", connect_timeout=1.0),)))
    accepted = serving.ads.clients()[0].versions["CDS"]
    await client.next()
    await client.nack("CDS", "connect_timeout: too short")
    await client.ask("EDS", "a")
    await client.take("EDS")
    (shown,) = serving.ads.clients()
    assert (shown.types["CDS"], shown.errors) == ("NACKED", ("CDS: connect_timeout: too short",))
    assert shown.versions["CDS"] == accepted
    assert [record.levelno for record in caplog.records if "connect_timeout: too short" in record.message] == [
        logging.WARNING
    ]
    await serving.publish(replace(mesh("a"), clusters=(Cluster("a", connect_timeout=2.0),)))
    kind, clusters, _ = await client.next()
    assert (kind, clusters["a"].connect_timeout.seconds) == ("CDS", 2)


@BOTH
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no node", "the first request must say who asks: node is missing"),
        ("no id", "node: id is empty"),
        ("no type", "type_url is missing"),
    ],
)
async def test_a_first_request_that_does_not_say_enough_is_refused(
    serving: Serving, delta: bool, what: str, says: str
) -> None:
    """Its author reads why, and nobody was registered."""
    async with Stream(serving.address, delta=delta, who=None if what == "no node" else node()) as client:
        if what == "no id":
            await client.say(node(""))
        await client.ask("" if what == "no type" else "CDS")
        code, details = await client.status()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert says in details
    assert serving.registry.nodes == ()


@pytest.mark.parametrize("when", ["first", "later"])
async def test_bytes_that_are_no_request_are_refused(
    serving: Serving, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With a status that names the fault, and no traceback of ours."""
    async with grpc.aio.insecure_channel(serving.address) as channel:
        call = channel.stream_stream(
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
            lambda message: message,
            lambda data: data,
        )()
        if when == "later":
            request = DeltaDiscoveryRequest(type_url=type_url("EDS"), node=workload("web", 80))
            await call.write(request.SerializeToString())
            await serving.until(lambda: len(serving.registry.nodes) == 1)
        await call.write(b"\xff\xff\xff")
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await call.details() == "this is no DeltaDiscoveryRequest"
    await serving.until(lambda: not serving.registry.nodes)
    assert not [record for record in caplog.records if record.exc_info]


# Who is there


@BOTH
async def test_a_process_is_an_endpoint_from_ready_until_its_stream_ends(serving: Serving, delta: bool) -> None:
    """It says so by sending its node again."""
    client = await serving.connect(delta=delta, who=workload("reviews", 9080, ready=False))
    await client.ask("CDS", "a")
    await client.take("CDS")
    assert serving.registry.workloads == ()
    await client.say(workload("reviews", 9080))
    await client.ask("CDS")  # asks for nothing more
    await serving.until(lambda: len(serving.registry.workloads) == 1)
    (found,) = serving.registry.workloads
    assert (found.name, found.service, found.address, found.port) == ("reviews-v1", "reviews", "127.0.0.1", 9080)
    assert dict(found.labels) == {"app": "reviews", "version": "v1"}
    await client.end()
    await serving.until(lambda: not serving.registry.workloads)
    assert await client.status() == (grpc.StatusCode.OK, "")


async def test_a_process_with_two_streams_is_an_endpoint_until_the_last_one_ends(serving: Serving) -> None:
    """Workers behind one port, or a reconnect that is seen before the end of what it replaces."""
    first = await serving.connect(who=workload("reviews", 9080))
    second = await serving.connect(who=workload("reviews", 9080))
    for client in (first, second):
        await client.ask("CDS", "a")
        await client.take("CDS")
    await first.end()
    await first.status()
    assert len(serving.registry.workloads) == 1
    await second.end()
    await serving.until(lambda: not serving.registry.workloads)


async def test_a_client_that_is_lost_is_forgotten(serving: Serving) -> None:
    """It could not say goodbye."""
    async with Stream(serving.address, who=workload("reviews", 9080)) as client:
        await client.ask("CDS")
        await client.take("CDS")
        assert len(serving.ads.clients()) == 1
    await serving.until(lambda: not serving.registry.workloads)
    assert serving.ads.clients() == []


async def test_an_envoy_at_the_edge_is_a_gateway_and_no_endpoint(serving: Serving) -> None:
    """Whatever its id looks like."""
    for identity in ("router~127.0.0.1~ingress.istio-system~istio-system.svc.cluster.local", "my-envoy"):
        client = await serving.connect(who=node(identity, user_agent="envoy", NAMESPACE="istio-system"))
        await client.ask("CDS")
        await client.take("CDS")
    assert [each.kind for each in serving.ads.clients()] == ["router", "router"]
    assert {each.namespace for each in serving.ads.clients()} == {"istio-system"}
    assert serving.registry.workloads == ()


@BOTH
async def test_a_client_that_asks_for_too_much_is_sent_away(
    serving: Serving, delta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its names are looked up at every change, on the loop that serves everybody."""
    monkeypatch.setattr(ads, "MAX_NAMES", 10)
    async with Stream(serving.address, delta=delta, who=node()) as client:
        await client.ask("LDS", *(f"host{i}:80" for i in range(6)))
        with contextlib.suppress(grpc.aio.AioRpcError):  # it may be sent away while it still asks
            await client.ask("RDS", *(f"route{i}" for i in range(6)))
        code, details = await client.status()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "10" in details
    await serving.until(lambda: not serving.registry.nodes)


class Flooding:
    """What gRPC gives to a handler, of a client that sends big requests and reads nothing."""

    def __init__(self) -> None:
        self.count = 0
        request = DeltaDiscoveryRequest(node=node(), type_url=type_url("CDS"))
        request.resource_names_subscribe.append("x" * 100_000)
        self._request = request.SerializeToString()

    def peer(self) -> str:
        return "test"

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        self.count += 1
        return self._request

    async def write(self, data: bytes) -> None:
        await asyncio.Event().wait()


async def test_what_waits_of_a_client_that_does_not_read_is_bounded(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bytes: a thousand requests of 16 MB each are more than the machine has."""
    monkeypatch.setattr(ads, "MAX_WAITING_BYTES", 1_000_000)
    client = Flooding()
    serve = asyncio.create_task(serving.ads._delta(None, client))
    for _ in range(500):
        await asyncio.sleep(0)
    await asyncio.sleep(0.1)  # the first view is made on a thread
    for _ in range(500):
        await asyncio.sleep(0)
    assert client.count <= 25
    serve.cancel()
    await asyncio.gather(serve, return_exceptions=True)


async def test_a_refusal_is_one_line_of_the_log(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a client says."""
    client = await serving.connect()
    await client.ask("CDS", "a")
    await client.take("CDS")
    await client.nack("CDS", "bad\nERROR meshlib: on fire\x1b[2J")
    await client.ask("EDS", "a")
    await client.take("EDS")
    (told,) = [record.getMessage() for record in caplog.records if "refuses" in record.getMessage()]
    assert told.isprintable()


# Many


async def test_a_client_that_does_not_read_delays_nobody_and_gets_the_latest(serving: Serving) -> None:
    """Five changes, each bigger than what a connection buffers: it gets the first, which was on its way, and the
    last."""
    await serving.publish(mesh("a", endpoints=20_000, port=1))
    slow = await serving.connect()
    await slow.ask("EDS", "a")
    fast = await serving.connect()
    await fast.ask("EDS", "a")
    await fast.take("EDS")
    for count in range(5):
        await serving.publish(mesh("a", endpoints=20_000, port=count + 2))
        assert ports((await fast.take("EDS"))["a"])[0] == count + 2
    assert ports((await slow.take("EDS"))["a"])[0] == 1
    assert ports((await slow.take("EDS"))["a"])[0] == 6


async def test_two_hundred_streams_share_one_view(serving: Serving) -> None:
    """They come all at once, as after a restart, and all hear of a change; each state is translated once."""
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(Stream(serving.address, who=workload("web", 1000 + i))) for i in range(200)
        ]

        async def start(client: Stream) -> None:
            await client.ask("EDS", "a")
            await client.take("EDS")

        serving.snapshot = mesh("a", port=7)
        await asyncio.gather(*(start(client) for client in clients))
        assert serving.translations == 1
        assert len(serving.registry.workloads) == 200
        await serving.publish(mesh("a", port=8))
        heard = await asyncio.gather(*(client.take("EDS") for client in clients))
        assert {tuple(ports(each["a"])) for each in heard} == {(8,)}
        assert serving.translations == 2
    await serving.until(lambda: not serving.registry.nodes)


async def test_the_server_stops_with_streams_open_and_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Clients see that it is gone; no task is left, and nothing is logged."""
    serving = Serving()
    await serving.server.start()
    async with (
        Stream(serving.address, who=workload("web", 80)) as busy,
        Stream(serving.address, who=workload("api", 81)) as idle,
    ):
        await busy.ask("CDS")
        await busy.take("CDS")
        await idle.ask("EDS")
        await serving.until(lambda: len(serving.registry.workloads) == 2)
        await serving.close()
        for client in (busy, idle):
            assert await client.status() == (grpc.StatusCode.UNAVAILABLE, "the control plane stops")
    assert serving.ads.clients() == []
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("ads-")]
    assert not caplog.records
