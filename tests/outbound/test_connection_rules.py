"""What a DestinationRule says of connections holds through every adapter."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from adapters import ADAPTERS, Got, caller

from meshlib.mesh import Mesh
from meshlib.model import Cluster, ConnectionLimits, Snapshot, TcpKeepalive
from meshlib.outbound import aiohttp, engine_aiohttp, engine_httpcore, urllib3_exchange, urllib3_idle
from peers import Peer
from snapshots import mesh, publish, service

URL = "http://reviews:9080/"
Call = Callable[[], Got]


@pytest.fixture(params=ADAPTERS)
def calling(request: pytest.FixtureRequest) -> Any:
    """A context manager that makes calls through a mesh with one of the adapters."""

    @contextmanager
    def calls(made: Mesh) -> Iterator[Call]:
        with caller(request.param, made) as client:
            yield lambda: client.get(URL)

    return calls


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
    for engine in (engine_httpcore, engine_aiohttp, aiohttp, urllib3_exchange):
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
    options = (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    )

    def note(sock: Any) -> None:
        found.append([sock.getsockopt(*option) for option in options])

    # aiohttp and urllib3 give no way to the socket once the response is there.
    engine_sets, middleware_sets = engine_aiohttp.set_options, aiohttp.set_options
    gives = urllib3_idle.IdleConnections.give

    def engine(sock: Any, limits: ConnectionLimits) -> None:
        engine_sets(sock, limits)
        note(sock)

    def middleware(transport: Any, limits: ConnectionLimits) -> None:
        middleware_sets(transport, limits)
        note(transport.get_extra_info("socket"))

    def give(kept: Any, connection: Any) -> None:
        note(connection.sock)
        gives(kept, connection)

    monkeypatch.setattr(engine_aiohttp, "set_options", engine)
    monkeypatch.setattr(aiohttp, "set_options", middleware)
    monkeypatch.setattr(urllib3_idle.IdleConnections, "give", give)
    keepalive = TcpKeepalive(time=77, interval=7)
    with Peer() as peer, mesh(one_service(peer, tcp_keepalive=keepalive)) as made, calling(made) as call:
        stream = call().extensions.get("network_stream")
        if stream is not None:
            note(stream.get_extra_info("socket"))
    assert found == [[1, 77, 7]]
