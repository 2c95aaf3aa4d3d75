"""Is what has a time to live renewed in time, as long as the control plane serves, and let go of when it does not?"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ads_server import Serving, mesh
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.service.discovery.v3.discovery_pb2 import Resource as Wrapper
from xds_client import node

from meshlib.controlplane.cache import Encoder, View
from meshlib.controlplane.subscriptions import RENEWALS, Answer, DeltaStream, Request, SotwStream
from meshlib.discovery.xds import XdsSource
from meshlib.model import Cluster, LoadAssignment, Node, Snapshot, Workload
from meshlib.xds.messages import TTL_FEATURE
from meshlib.xds.resource_types import CLUSTER, ENDPOINT

BOTH = pytest.mark.parametrize("delta", [True, False], ids=["delta", "sotw"])
TTL = 0.6


class Peer:
    """One stream whose resources of one type are good for 30 seconds."""

    def __init__(self, delta: bool, type_url: str) -> None:
        self.stream = (DeltaStream if delta else SotwStream)(has_catch_all=False, ttls={type_url: 30.0})
        self.type_url, self.delta, self.names = type_url, delta, ("a", "b")
        clusters = tuple(Cluster(name) for name in "ab")
        self.view = View(Snapshot(clusters=clusters, assignments=tuple(map(LoadAssignment, "ab"))), (), Encoder())

    def ask(self, at: float, **more: Any) -> list[Answer]:
        self.stream.received(Request(self.type_url, self.names, **more))
        return self.stream.due(self.view, at)

    def answer(self, at: float, to: Answer, error: str | None = None) -> list[Answer]:
        self.stream.received(Request(self.type_url, () if self.delta else self.names, nonce=to.nonce, error=error))
        return self.stream.due(self.view, at)


@BOTH
@pytest.mark.parametrize("type_url", [CLUSTER, ENDPOINT])
def test_all_is_renewed_often_enough(delta: bool, type_url: str) -> None:
    """A third of the time after the last answer or heartbeat; a heartbeat names all, and has no content."""
    peer = Peer(delta, type_url)
    (first,) = peer.ask(100.0)
    assert (first.ttl, first.is_heartbeat) == (30.0, False)
    assert peer.stream.renew_at is None  # one answer of a type is in flight at a time
    assert peer.answer(101.0, first) == []
    assert peer.stream.renew_at == 100.0 + 30.0 / RENEWALS
    assert peer.stream.due(peer.view, 109.0) == []
    (beat,) = peer.stream.due(peer.view, 110.0)
    assert (beat.is_heartbeat, [(each.name, each.data) for each in beat.resources]) == (True, [("a", b""), ("b", b"")])
    assert [each.version for each in beat.resources] == [each.version for each in first.resources]
    assert peer.stream.due(peer.view, 150.0) == []
    assert peer.answer(150.0, beat)[0].is_heartbeat


@BOTH
def test_a_heartbeat_leaves_a_refusal_as_it_is(delta: bool) -> None:
    """The client's answer to it says nothing of what it has refused."""
    peer = Peer(delta, ENDPOINT)
    (first,) = peer.ask(0.5)
    (beat,) = peer.answer(20.0, first, error="no such field")
    subscription = peer.stream.subscriptions[ENDPOINT]
    assert peer.answer(20.0, beat) == []
    assert (subscription.status, subscription.error, subscription.accepted) == ("NACKED", "no such field", "")


def test_who_comes_back_with_all_there_is_hears_a_heartbeat_at_once() -> None:
    """Nobody says how old it is, there."""
    peer = Peer(True, ENDPOINT)
    has = {name: each.version for name, each in peer.view.resources[ENDPOINT].items()}
    (beat,) = peer.ask(50.0, initial=has)
    assert beat.is_heartbeat


@BOTH
def test_who_has_given_up_all_is_not_woken_for_nothing(delta: bool) -> None:
    """Else its stream would turn in a circle."""
    peer = Peer(delta, ENDPOINT)
    (first,) = peer.ask(0.5)
    peer.answer(1.0, first)
    peer.names = ()
    peer.ask(2.0, nonce=first.nonce, unsubscribe=("a", "b") if delta else ())
    assert peer.stream.renew_at is None


@pytest.fixture
async def serving() -> AsyncIterator[Serving]:
    found = Serving({ENDPOINT: TTL})
    await found.server.start()
    yield found
    await found.close()


def resources(response: Any, delta: bool) -> list[Wrapper]:
    if delta:
        return list(response.resources)
    found = []
    for each in response.resources:
        found.append(Wrapper())
        assert each.Unpack(found[-1])
    return found


@BOTH
async def test_a_client_that_heeds_it_is_told_and_sent_heartbeats(serving: Serving, delta: bool) -> None:
    """In state of the world each resource is in a Resource, which has the field for it."""
    client = await serving.connect(delta=delta, who=node(features=(TTL_FEATURE,)))
    await client.ask("EDS", "a")
    for is_heartbeat in (False, True, True):
        async with asyncio.timeout(10):
            response = client.last["EDS"] = await client._call.read()
        (each,) = resources(response, delta)
        assert (each.name, each.ttl.ToMilliseconds(), each.HasField("resource")) == ("a", 600, not is_heartbeat)
        assert is_heartbeat or each.resource.Is(ClusterLoadAssignment.DESCRIPTOR)
        await client.ack("EDS")


@BOTH
async def test_a_client_that_does_not_say_that_it_heeds_it_is_told_nothing_of_it(serving: Serving, delta: bool) -> None:
    """It might not understand the form."""
    client = await serving.connect(delta=delta, who=node())
    await client.ask("EDS", "a")
    await client.take("EDS")
    assert not delta or not client.last["EDS"].resources[0].HasField("ttl")


@BOTH
async def test_our_client_goes_without_what_the_control_plane_renews_no_more(serving: Serving, delta: bool) -> None:
    """It is sent heartbeats as long as there is one, and then its time runs out."""
    await serving.publish(mesh("a"))
    who = Node("me", Workload("me"), user_agent="meshlib/test", takes_ttl=True)
    source = XdsSource(serving.address, who, cache_dir=None, delta=delta)
    source.want("web:80")
    loop, published = asyncio.get_running_loop(), asyncio.Queue[Snapshot]()
    thread = threading.Thread(
        target=source.run, args=(lambda found: loop.call_soon_threadsafe(published.put_nowait, found),), daemon=True
    )
    thread.start()
    try:
        async with asyncio.timeout(30):
            while not (found := await published.get()).assignments or not found.assignments[0].endpoints:
                pass
        (connection,) = serving.ads._connections.values()
        beats: asyncio.Queue[None] = asyncio.Queue()
        heartbeat = connection.state._heartbeat
        connection.state._heartbeat = lambda *of: beats.put_nowait(None) or heartbeat(*of)  # type: ignore[method-assign]
        for _ in range(RENEWALS):
            await asyncio.wait_for(beats.get(), 30)
        await serving.close()
        async with asyncio.timeout(30):
            while (found := await published.get()).assignments and found.assignments[0].endpoints:
                pass
    finally:
        source.stop()
        await asyncio.to_thread(thread.join, 10)
