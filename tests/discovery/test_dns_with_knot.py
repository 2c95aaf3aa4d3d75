"""The same against a name server of others: what it sends is nobody's idea of an answer but its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

import meshlib
from discovery.feed import Feed, hosts
from discovery.knot import KNOTD, Knot
from meshlib.discovery.dns import DnsSource
from meshlib.model import Snapshot
from peers import Answer, Peer

pytestmark = [pytest.mark.processes, pytest.mark.skipif(KNOTD is None, reason="no knotd: Debian's package knot")]

PATIENCE = 30.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Knot]:
    with Knot(tmp_path) as server:
        yield server


@pytest.fixture
def feed(server: Knot, tmp_path: Path) -> Iterator[Feed]:
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 127.0.0.1\noptions ndots:1 timeout:1\n")
    with Feed(DnsSource(server.address, resolv_conf=conf)) as feed:
        yield feed


def of(snapshot: Snapshot, authority: str) -> list[tuple[str, int, int]]:
    """(address, weight, priority) of each endpoint."""
    host, _, port = authority.rpartition(":")
    return [
        (each.authority, each.weight, each.priority)
        for assignment in snapshot.assignments
        if assignment.cluster == f"outbound|{port}||{host}"
        for each in assignment.endpoints
    ]


def ask(feed: Feed, authority: str) -> Snapshot:
    feed.source.want(authority)
    return feed.wait_for(lambda snapshot: authority in (*hosts(snapshot), *snapshot.absent))


def test_what_a_zone_says_is_what_is_called(server: Knot, feed: Feed) -> None:
    """Addresses, an alias that the server follows itself, services, and a name that there is not."""
    server.set(
        "a 60 A 10.0.0.1",
        "a 60 A 10.0.0.2",
        "b 60 CNAME c",
        "c 60 CNAME a",
        "_http._tcp.s 60 SRV 1 5 8080 a",
        "_http._tcp.s 60 SRV 2 7 8081 six",
        "six 60 AAAA 2001:db8::1",
    )
    assert of(ask(feed, "a.test:80"), "a.test:80") == [("10.0.0.1:80", 1, 0), ("10.0.0.2:80", 1, 0)]
    assert of(ask(feed, "b.test:80"), "b.test:80") == [("10.0.0.1:80", 1, 0), ("10.0.0.2:80", 1, 0)]
    assert of(ask(feed, "_http._tcp.s.test:80"), "_http._tcp.s.test:80") == [
        ("10.0.0.1:8080", 5, 0),
        ("10.0.0.2:8080", 5, 0),
        ("[2001:db8::1]:8081", 7, 1),
    ]
    assert "none.test:80" in ask(feed, "none.test:80").absent


def test_more_than_a_datagram_holds_comes_by_tcp(server: Knot, feed: Feed) -> None:
    """500 addresses are some 8 KB; Knot cuts at 1232 bytes and says so."""
    server.set(*(f"many 60 A 10.0.{number // 250}.{number % 250}" for number in range(500)))
    assert len(of(ask(feed, "many.test:80"), "many.test:80")) == 500


def test_aliases_in_a_circle_are_left(server: Knot, feed: Feed) -> None:
    """The server gives up on them in its own way; the next name is answered."""
    server.set("x 60 CNAME y", "y 60 CNAME x", "a 60 A 10.0.0.1")
    feed.source.want("x.test:80")
    assert of(ask(feed, "a.test:80"), "a.test:80") == [("10.0.0.1:80", 1, 0)]


def test_records_change_and_the_server_dies_under_load_without_a_failed_call(server: Knot) -> None:
    """Pods are replaced one after the other; in between the name server is killed and comes back with another zone."""

    def named(name: str) -> Peer:
        return Peer(lambda received: Answer(200, name.encode()))

    told: list[str] = []
    is_over = threading.Event()
    with ExitStack() as stack:
        generations = [stack.enter_context(ExitStack()) for _ in range(3)]
        peers = [until.enter_context(named(f"{number}")) for number, until in enumerate(generations)]
        zones = [(f"_http._tcp.a 1 SRV 0 1 {peer.port} pod", "pod 1 A 127.0.0.1") for peer in peers]
        server.set(*zones[0])
        mesh = stack.enter_context(meshlib.connect(f"dns:127.0.0.1:{server.port}", telemetry="off"))
        client = stack.enter_context(httpx.Client(transport=mesh.transport(), timeout=PATIENCE))

        def call() -> None:
            while not is_over.wait(0.02):
                try:
                    response = client.get("http://_http._tcp.a.test./")
                    told.append(response.text if response.status_code == 200 else str(response.status_code))
                except httpx.HTTPError as error:
                    told.append(repr(error))

        def eventually(holds: Callable[[], bool]) -> None:
            deadline = time.monotonic() + PATIENCE
            while not holds():
                assert time.monotonic() < deadline, told[-5:]
                time.sleep(0.01)

        def more(calls: int) -> None:
            wanted = len(told) + calls
            eventually(lambda: len(told) >= wanted)

        caller = threading.Thread(target=call)
        caller.start()
        try:
            eventually(lambda: told[-1:] == ["0"])
            server.set(*zones[1])
            eventually(lambda: told[-1:] == ["1"])
            generations[0].close()
            server.kill(*zones[2])
            more(75)  # some 1.5 s: the TTL is over, and nobody answers
            assert told[-1] == "1"
            server.start()
            eventually(lambda: told[-1:] == ["2"])
            generations[1].close()
            more(20)
        finally:
            is_over.set()
            caller.join(PATIENCE)
    assert set(told) == {"0", "1", "2"}, sorted(set(told))
