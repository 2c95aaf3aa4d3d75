"""Hedged calls over real sockets, through every adapter."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from adapters import ADAPTERS, Caller, caller

from meshlib.mesh import Mesh
from meshlib.model import HedgePolicy
from peers import Answer, Peer, Received, plain
from snapshots import forward, mesh, publish, route, service, snapshot

URL = "http://reviews:9080/reviews/0"
WAIT = 15.0


@pytest.fixture
def here() -> Iterator[Mesh]:
    made = mesh()
    yield made
    made.close()


@pytest.fixture(params=ADAPTERS)
def call(request: pytest.FixtureRequest, here: Mesh) -> Iterator[Caller]:
    with caller(str(request.param), here) as made:
        yield made


def test_a_slow_endpoint_is_overtaken_by_another(call: Caller, here: Mesh) -> None:
    """Six calls, some of which begin at an endpoint that takes two seconds: all are answered by the other one, and
    in the end nothing is in flight."""
    with Peer(lambda _: Answer(gate=asyncio.sleep(2.0))) as slow, Peer(plain) as fast:
        hedged = route(forward("c", hedge=HedgePolicy(0.02), timeout=WAIT))
        routes = {"reviews:9080": [hedged], "other:9080": [route(forward("other"))]}
        publish(here, snapshot(routes, {"c": [slow.address, fast.address], "other": [fast.address]}))
        for _ in range(6):
            response = call.get(URL)
            assert (response.status_code, response.text) == (200, "ok")
        assert len(fast.received) >= 6
        cluster = here.live.clusters["c"]
        pause = threading.Event()
        for _ in range(int(WAIT / 0.01)):
            call.get("http://other:9080/")  # an event loop of this suite turns only while a call is made
            counts = (cluster.state.requests, cluster.state.retries, [t.state.in_flight for t in cluster.targets])
            if counts == (0, 0, [0, 0]):
                break
            pause.wait(0.01)
        assert counts == (0, 0, [0, 0])


def test_a_post_is_sent_once_however_slow(call: Caller, here: Mesh) -> None:
    """It may not be carried out twice."""
    seen: list[str] = []

    def lazy(received: Received) -> Answer:
        seen.append(received.method)
        return Answer(gate=asyncio.sleep(0.1))

    with Peer(lazy) as peer:
        publish(here, service("reviews:9080", [peer.address], hedge=HedgePolicy(0.01)))
        assert call.request("POST", URL, content=b"x").status_code == 200
        assert seen == ["POST"]
