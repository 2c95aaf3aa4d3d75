"""A mirror never slows or fails the call that it copies, through every adapter."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from adapters import ADAPTERS, Caller, caller

from meshlib.mesh import Mesh
from meshlib.model import Mirror
from meshlib.outbound import mirrors
from meshlib.policy import propagation
from peers import Answer, Peer, Received, plain, refusing_port
from snapshots import Addresses, forward, mesh, publish, route, snapshot

URL = "http://reviews:9080/reviews/0"
AT_ONCE = 4


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mesh]:
    monkeypatch.setattr(mirrors, "MAX_MIRRORS", AT_ONCE)
    made = mesh()
    yield made
    made.close()


@pytest.fixture(params=ADAPTERS)
def call(request: pytest.FixtureRequest, here: Mesh) -> Iterator[Caller]:
    with caller(str(request.param), here) as made:
        yield made


def mirrored(here: Mesh, real: Peer, shadow: Addresses) -> None:
    clusters = {"real": [real.address], "shadow": shadow}
    publish(here, snapshot({"reviews:9080": [route(forward("real", mirrors=(Mirror("shadow"),)))]}, clusters))


def dropped(here: Mesh) -> int:
    return here.live.clusters["shadow"].state.mirrors_dropped


def test_a_mirror_that_stalls_slows_no_call_and_holds_a_bounded_number(call: Caller, here: Mesh) -> None:
    """Four hang; the copies of the other calls are dropped and counted, and every call has its answer."""
    with Peer() as real, Peer(lambda _: Answer(raw=b"", stall=True)) as shadow:
        mirrored(here, real, [shadow.address])
        began = time.monotonic()
        assert [call.get(URL).status_code for _ in range(12)] == [200] * 12
        assert time.monotonic() - began < 8  # the clients' own timeout is 10 s
        assert len(real.received) == 12
        assert dropped(here) == 12 - AT_ONCE
        assert here.live.clusters["shadow"].state.requests <= AT_ONCE
        assert len(shadow.received) <= AT_ONCE


def test_a_mirror_that_is_down_fails_no_call(call: Caller, here: Mesh) -> None:
    """Nor does one that breaks off, or one without endpoints, whose copies count as dropped."""
    with Peer() as real, Peer(lambda _: Answer(drop=True)) as rude:
        for shadow in ([("127.0.0.1", refusing_port())], [rude.address], []):
            mirrored(here, real, shadow)
            assert [call.get(URL).status_code for _ in range(3)] == [200] * 3
        pause = threading.Event()
        for _ in range(200):
            if dropped(here) >= 3:
                break
            pause.wait(0.05)
            call.together([URL])  # an event loop of this suite turns only while a call is made
        assert dropped(here) >= 3


def test_the_copy_has_what_the_call_has(call: Caller, here: Mesh) -> None:
    """Method, path, body, and the headers that the request being served brought."""
    copies: list[Received] = []
    arrived = threading.Event()

    def note(received: Received) -> Answer:
        if received.method == "PUT":
            copies.append(received)
            arrived.set()
        return plain(received)

    with Peer() as real, Peer(note) as shadow:
        mirrored(here, real, [shadow.address])
        token = propagation.current.set(propagation.Carried(((b"x-request-id", b"42"),), None, time.monotonic))
        try:
            assert call.request("PUT", f"{URL}?a=1", content=b"copied", headers={"x-own": "1"}).status_code == 200
        finally:
            propagation.current.reset(token)
        pause = threading.Event()
        for _ in range(200):
            if arrived.wait(0.05):
                break
            call.together([URL])
            pause.wait(0.01)
        (copy,) = copies
        assert (copy.target, copy.body, copy.header("x-own")) == ("/reviews/0?a=1", b"copied", "1")
        assert (copy.header("host"), copy.header("x-request-id")) == ("reviews-shadow:9080", "42")


def test_a_body_that_can_be_sent_once_goes_to_the_real_server_alone(call: Caller, here: Mesh) -> None:
    """And the copy that was not sent is counted."""
    with Peer() as real, Peer() as shadow:
        mirrored(here, real, [shadow.address])
        assert call.upload(URL, [b"a", b"b"]).status_code == 200
        assert [each.body for each in real.received] == [b"ab"]
        assert dropped(here) == 1
        assert shadow.received == []
