"""What a DestinationRule says of connections holds in both engines of the httpx transports, sync and async."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from meshlib.mesh import Mesh
from meshlib.model import Cluster, ConnectionLimits, Snapshot, TcpKeepalive
from meshlib.outbound import engine_aiohttp, engine_httpcore
from peers import Answer, Peer, Received
from snapshots import mesh, publish, service

URL = "http://reviews:9080/"
Call = Callable[[], httpx.Response]


@contextmanager
def sync_caller(made: Mesh) -> Iterator[Call]:
    with made.Client() as client:
        yield lambda: client.get(URL)


@contextmanager
def async_caller(made: Mesh, engine: Any) -> Iterator[Call]:
    client = httpx.AsyncClient(transport=made.async_transport(engine=engine))
    with asyncio.Runner() as runner:
        yield lambda: runner.run(client.get(URL))
        runner.run(client.aclose())


CALLERS = {
    "sync": sync_caller,
    "async": lambda made: async_caller(made, "httpcore"),
    "aiohttp": lambda made: async_caller(made, "aiohttp"),
}


@pytest.fixture(params=CALLERS)
def calling(request: pytest.FixtureRequest) -> Any:
    return CALLERS[request.param]


def one_service(peer: Peer, **limits: Any) -> Snapshot:
    return service("reviews:9080", [peer.address], cluster=Cluster("reviews:9080", limits=ConnectionLimits(**limits)))


def connections(peer: Peer) -> list[int]:
    return [each.connection for each in peer.received]


@pytest.mark.parametrize(("most", "used"), [(0, [1, 1, 1, 1]), (2, [1, 1, 2, 2]), (1, [1, 2, 3, 4])])
def test_a_connection_serves_no_more_requests_than_it_may(calling: Any, most: int, used: list[int]) -> None:
    """maxRequestsPerConnection; 1 switches keep-alive off, 0 is no limit."""
    with Peer() as peer, mesh(one_service(peer, max_requests_per_connection=most)) as made, calling(made) as call:
        assert [call().status_code for _ in range(4)] == [200] * 4
        assert connections(peer) == used


@pytest.mark.parametrize(("duration", "used"), [(1e-9, [1, 2, 3]), (3600.0, [1, 1, 1])])
def test_a_connection_that_has_lived_long_enough_takes_no_new_request(
    calling: Any, duration: float, used: list[int]
) -> None:
    """maxConnectionDuration, from when it was opened."""
    with Peer() as peer, mesh(one_service(peer, max_connection_duration=duration)) as made, calling(made) as call:
        assert [call().status_code for _ in range(3)] == [200] * 3
        assert connections(peer) == used


@pytest.mark.parametrize(("idle", "used"), [(1e-9, [1, 2]), (60.0, [1, 1])])
def test_an_idle_connection_is_kept_as_long_as_is_said(
    calling: Any, idle: float, used: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """idleTimeout, exactly; the engine's own choice holds only where nothing is said."""
    for engine in (engine_httpcore, engine_aiohttp):
        monkeypatch.setattr(engine, "KEEPALIVE", 30.0 if idle < 1 else 1e-9)
    with Peer() as peer, mesh(one_service(peer, idle_timeout=idle)) as made, calling(made) as call:
        assert [call().status_code for _ in range(2)] == [200] * 2
        assert connections(peer) == used


def test_new_rules_hold_for_the_next_call(calling: Any) -> None:
    """Without a restart, and for connections that are there already."""
    with Peer() as peer, mesh(one_service(peer)) as made, calling(made) as call:
        call()
        call()
        publish(made, one_service(peer, max_requests_per_connection=1))
        call()
        call()
        one, same, *others = connections(peer)
        assert one == same
        assert len({one, *others}) == 3


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="this system names the options otherwise")
def test_tcp_keepalive_is_set_on_the_socket(calling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tcpKeepalive gives; 0 leaves the operating system's."""
    found: list[Any] = []
    original = engine_aiohttp.set_options

    def seen(sock: Any, limits: ConnectionLimits) -> None:
        original(sock, limits)
        found.append([sock.getsockopt(*option) for option in options])

    options = (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    )
    monkeypatch.setattr(engine_aiohttp, "set_options", seen)
    keepalive = TcpKeepalive(time=77, interval=7)

    def answer(_: Received) -> Answer:
        return Answer(body=b"ok")

    with Peer(answer) as peer, mesh(one_service(peer, tcp_keepalive=keepalive)) as made, calling(made) as call:
        stream = call().extensions.get("network_stream")
        if stream is not None:
            sock = stream.get_extra_info("socket")
            found.append([sock.getsockopt(*option) for option in options])
    assert found == [[1, 77, 7]]
