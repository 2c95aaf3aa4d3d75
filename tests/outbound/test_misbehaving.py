"""Servers on a bad day, through every adapter: none is weaker than another. What is plain failure is in test_contract;
here is what comes halfway, late, too long, or twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest
from adapters import ADAPTERS, Caller, caller

import meshlib
from meshlib.mesh import Mesh
from meshlib.model import LoadBalancing, RetryPolicy
from meshlib.model.cluster import Cluster
from peers import Answer, Peer, Received, plain
from snapshots import mesh, publish, service

URL = "http://reviews:9080/reviews/0"
NEVER = RetryPolicy(attempts=0)
IN_TURN = Cluster("c", load_balancing=LoadBalancing.ROUND_ROBIN)


@pytest.fixture
def here() -> Iterator[Mesh]:
    made = mesh()
    yield made
    made.close()


@pytest.fixture(params=ADAPTERS)
def call(request: pytest.FixtureRequest, here: Mesh) -> Iterator[Caller]:
    with caller(str(request.param), here) as made:
        yield made


def again(on: str = "5xx", **fields: object) -> RetryPolicy:
    return RetryPolicy(
        on=frozenset({on}),
        base_interval=0.001,
        max_interval=0.001,
        host_selection_attempts=20,
        **fields,  # type: ignore[arg-type]
    )


def first(bad: Answer) -> Callable[[Received], Answer]:
    """`bad` on the first connection, and what is right on all others."""
    return lambda received: bad if received.connection == 1 else plain(received)


def check_nothing_in_flight(here: Mesh, name: str = "reviews:9080") -> None:
    cluster = here.live.clusters[name]
    assert (cluster.state.requests, [each.state.in_flight for each in cluster.targets]) == (
        0,
        [0] * len(cluster.targets),
    )


# Time


def test_a_try_that_stalls_is_followed_by_one_elsewhere(call: Caller, here: Mesh) -> None:
    """perTryTimeout; and a POST, which may have been carried out, is not sent twice."""
    with Peer(lambda _: Answer(gate=asyncio.sleep(30))) as slow, Peer() as quick:
        policy = again(per_try_timeout=0.2)
        publish(here, service("reviews:9080", [slow.address, quick.address], retry=policy, cluster=IN_TURN, timeout=20))
        for _ in range(2):
            assert call.get(URL).status_code == 200
        statuses = sorted(call.request("POST", URL, content=b"order").status_code for _ in range(2))
        assert statuses == [200, 504]
        assert [each.method for each in slow.received].count("POST") == 1
        check_nothing_in_flight(here, "c")


def test_the_time_for_a_try_ends_with_the_head(call: Caller, here: Mesh) -> None:
    """A body may take longer; the route's timeout is for that."""

    async def slow_body(_: Received) -> Answer:
        async def chunks():  # type: ignore[no-untyped-def]
            for _ in range(6):
                yield b"x"
                await asyncio.sleep(0.1)

        return Answer(chunks=chunks())

    with Peer(slow_body) as peer:
        publish(here, service("reviews:9080", [peer.address], retry=again(per_try_timeout=0.3), timeout=20.0))
        assert call.get(URL).text == "x" * 6


def test_a_head_that_comes_byte_by_byte_is_a_head(call: Caller, here: Mesh) -> None:
    """Bytes arrive as the network likes."""
    whole = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-a: b\r\n\r\nok"

    with Peer(lambda _: Answer(trickle=(whole, 0.002))) as peer:
        publish(here, service("reviews:9080", [peer.address]))
        got = call.get(URL)
        assert (got.status_code, got.text, got.every("x-a")) == (200, "ok", ["b"])


def test_a_head_that_trickles_is_cut_when_its_time_is_over(call: Caller, here: Mesh) -> None:
    """Each read is quick, and all together too slow."""
    endless = b"HTTP/1.1 200 OK\r\n" + b"".join(b"x-%d: y\r\n" % number for number in range(1000))
    with Peer(lambda _: Answer(trickle=(endless, 0.02))) as peer:
        publish(here, service("reviews:9080", [peer.address], timeout=0.4, retry=NEVER))
        began = time.monotonic()
        got = call.get(URL)
        assert (got.status_code, got.extensions["meshlib.flag"]) == (504, "UT")
        assert time.monotonic() - began < 8
        check_nothing_in_flight(here)


# Kept connections


def test_a_kept_connection_that_was_closed_costs_no_post(call: Caller, here: Mesh) -> None:
    """The server closed it without a word after its answer: seen before a byte is written."""
    whole = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    with Peer(lambda _: Answer(raw=whole)) as peer:  # and then it closes
        publish(here, service("reviews:9080", [peer.address], retry=NEVER))
        for number in range(1, 5):
            assert call.request("POST", URL, content=b"order").status_code == 200
            deadline = time.monotonic() + 10
            while peer.open_connections and time.monotonic() < deadline:
                time.sleep(0.005)
            assert len(peer.received) == number


def test_a_kept_connection_that_closes_as_it_is_used_is_tried_around_where_that_is_harmless(
    call: Caller, here: Mesh
) -> None:
    """The race with a server's idle timeout, without any retry policy: a GET goes out once more on a new connection. A
    POST does not, since the server may have read it."""
    seen: dict[int, int] = {}

    def once(received: Received) -> Answer:
        seen[received.connection] = seen.get(received.connection, 0) + 1
        return plain(received) if seen[received.connection] == 1 else Answer(drop=True)

    with Peer(once) as peer:
        publish(here, service("reviews:9080", [peer.address], retry=NEVER))
        assert [call.get(URL).status_code for _ in range(3)] == [200] * 3
        before = len(peer.received)
        with pytest.raises(call.errors.every) as caught:
            call.request("POST", URL, content=b"order")
        assert isinstance(caught.value, meshlib.UpstreamReset)
        assert len(peer.received) == before + 1
        check_nothing_in_flight(here)


# Lengths


@pytest.mark.parametrize(
    "extra",
    [b"more than was promised", b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"],
    ids=["bytes", "a second answer"],
)
def test_what_follows_a_response_is_never_the_next_ones(call: Caller, here: Mesh, extra: bytes) -> None:
    """Somebody else's answer would be worse than none."""
    whole = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok" + extra
    with Peer(first(Answer(raw=whole, stall=True))) as peer:
        publish(here, service("reviews:9080", [peer.address], retry=NEVER))
        for method in ("GET", "POST", "GET"):
            try:
                got = call.request(method, URL, content=b"x" if method == "POST" else None)
                assert (got.status_code, got.text) == (200, "ok")
            except meshlib.UpstreamReset:  # aiohttp does not trust the answer before it, either
                assert method == "GET" and len(peer.received) == 1


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: -1\r\n\r\nok",
        b"content-length: 2\r\ncontent-length: 3\r\n\r\nok",
        b"content-length: two\r\n\r\nok",
        b"transfer-encoding: chunked\r\n\r\nzz\r\nok\r\n0\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\n5\r\nok",
    ],
    ids=["negative", "two lengths", "no number", "no chunk size", "half a chunk"],
)
def test_a_length_that_is_none_is_a_reset(call: Caller, here: Mesh, head: bytes) -> None:
    """Wherever the library notices: never a short or a wrong body taken for a whole one."""
    with Peer(lambda _: Answer(raw=b"HTTP/1.1 200 OK\r\n" + head)) as peer:
        publish(here, service("reviews:9080", [peer.address], retry=NEVER))
        with pytest.raises(call.errors.every) as caught:
            call.request("POST", URL, content=b"x")
        assert isinstance(caught.value, meshlib.UpstreamReset)
        check_nothing_in_flight(here)


def test_a_head_without_end_is_a_reset(call: Caller, here: Mesh) -> None:
    """No server may fill this process's memory."""
    endless = b"HTTP/1.1 200 OK\r\n" + b"x-a: " + b"y" * 2_000_000
    with Peer(lambda _: Answer(raw=endless, stall=True)) as peer:
        publish(here, service("reviews:9080", [peer.address], retry=NEVER))
        with pytest.raises(call.errors.every) as caught:
            call.request("POST", URL, content=b"x")
        assert isinstance(caught.value, meshlib.UpstreamReset)


# Answers out of turn


def test_an_answer_that_comes_before_the_request_is_read_is_an_answer(call: Caller, here: Mesh) -> None:
    """413, and the connection is closed while the body is still being written."""

    class Hasty(Peer):
        async def _talk(self, reader, writer, number):  # type: ignore[no-untyped-def]
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno")
            await writer.drain()
            for _ in range(200):  # a server that closes with unread input resets the connection, and with it its answer
                if not await reader.read(65536):
                    break

    with Hasty() as peer:
        publish(here, service("reviews:9080", [peer.address], retry=NEVER))
        got = call.request("PUT", URL, content=b"x" * 1_000_000)
        assert (got.status_code, got.text) == (413, "no")


def test_informational_answers_are_passed_over(call: Caller, here: Mesh) -> None:
    """100 and 103 before the one that counts."""
    early = b"HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\n\r\n"
    whole = b"HTTP/1.1 100 Continue\r\n\r\n" + early + b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    with Peer(lambda _: Answer(raw=whole)) as peer:
        publish(here, service("reviews:9080", [peer.address], retry=NEVER))
        got = call.get(URL)
        assert (got.status_code, got.text) == (200, "ok")


def test_a_reset_instead_of_an_end_is_a_reset(call: Caller, here: Mesh, request: pytest.FixtureRequest) -> None:
    """TCP's RST in the middle of a body of known length, and of one that ends with its connection; of the latter
    aiohttp sees no difference to its end."""

    class Rude(Peer):
        async def _talk(self, reader, writer, number):  # type: ignore[no-untyped-def]
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n" + (b"content-length: 100\r\n\r\n" if number % 2 else b"\r\n") + b"part")
            await writer.drain()
            await asyncio.sleep(0.05)
            import socket
            import struct

            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    with Rude() as peer:
        publish(here, service("reviews:9080", [peer.address], retry=NEVER))
        for _ in range(1 if "aiohttp" in request.node.callspec.id else 2):
            with pytest.raises(call.errors.every) as caught:
                call.get(URL)
            assert isinstance(caught.value, meshlib.UpstreamReset)
        check_nothing_in_flight(here)
