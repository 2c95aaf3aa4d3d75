"""A name's addresses are endpoints of their own, looked up beside the calls."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import meshlib
from meshlib.discovery import addresses
from meshlib.discovery.addresses import Addresses, lookup
from meshlib.model import Cluster, ClusterType, Endpoint, LoadBalancing, Locality, OutlierDetection, Snapshot
from peers import Answer, Peer
from snapshots import forward, mesh, publish, route, snapshot

WAIT = 15.0


def until(holds: Callable[[], bool]) -> None:
    pause, deadline = threading.Event(), time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline, "it did not come to pass"
        pause.wait(0.005)


class Names:
    """A name server in one dict; an OSError where it has nothing, and one that hangs until it is told."""

    def __init__(self, **known: tuple[str, ...]) -> None:
        self.known = known
        self.asked: list[str] = []
        self.hanging = threading.Event()

    def __call__(self, name: str) -> tuple[str, ...]:
        self.asked.append(name)
        if name == "hangs":
            self.hanging.wait(WAIT)
        found = self.known.get(name)
        if found is None:
            raise socket.gaierror(f"{name}: no such name")
        return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "REFRESH", 0.01)
    monkeypatch.setattr(addresses, "RETRY", 0.01)


@pytest.fixture
def started() -> Iterator[Callable[[Names], Addresses]]:
    made: list[Addresses] = []

    def start(names: Names) -> Addresses:
        made.append(Addresses(lambda: None, names))
        return made[-1]

    yield start
    for each in made:
        each.stop()


def named(*endpoints: Endpoint, kind: ClusterType = ClusterType.STRICT_DNS) -> Snapshot:
    cluster = Cluster("c", kind, endpoints=endpoints, load_balancing=LoadBalancing.ROUND_ROBIN)
    made = snapshot({"db.example:80": [route(forward("c"))]}, {"c": (cluster, [])})
    return replace(made, assignments=())


def served(found: Snapshot) -> list[str]:
    return [endpoint.authority for assigned in found.assignments for endpoint in assigned.endpoints]


def test_each_address_of_each_name_is_an_endpoint(started: Callable[[Names], Addresses]) -> None:
    """With what the name's endpoint says besides; an address that is given as one, and a name that is not known yet,
    stay as they are; two names of one address are one endpoint."""
    names = Names(a=("10.0.0.1", "10.0.0.2"), b=("10.0.0.2",))
    here = Locality("eu", "a")
    given = named(
        Endpoint("a", 80, weight=3, locality=here, priority=1),
        Endpoint("b", 80),
        Endpoint("10.0.0.9", 81),
        Endpoint("gone", 80),
    )
    found = started(names)
    until(lambda: len(served(found.resolved(given))) == 4)
    (assigned,) = found.resolved(given).assignments
    by_address = {each.authority: each for each in assigned.endpoints}
    assert sorted(by_address) == ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.9:81", "gone:80"]
    assert by_address["10.0.0.2:80"] == Endpoint("10.0.0.2", 80, 3, here, 1)
    assert found.resolved(given).inconsistencies() == ()


def test_other_clusters_are_left_alone(started: Callable[[Names], Addresses]) -> None:
    """DNS_ROUND_ROBIN is looked up as each connection is made; nothing is started for it."""
    names = Names(a=("10.0.0.1",))
    given = named(Endpoint("a", 80), kind=ClusterType.LOGICAL_DNS)
    assert started(names).resolved(given) is given
    assert names.asked == []


def test_addresses_are_followed_and_the_last_ones_stay(quick: None, started: Callable[[Names], Addresses]) -> None:
    """New ones within a refresh; while nobody answers, those that were known; a name that is no longer wanted is asked
    for no more."""
    names = Names(a=("10.0.0.1",))
    given = named(Endpoint("a", 80))
    found = started(names)
    until(lambda: served(found.resolved(given)) == ["10.0.0.1:80"])
    names.known["a"] = ("10.0.0.2", "10.0.0.3")
    until(lambda: served(found.resolved(given)) == ["10.0.0.2:80", "10.0.0.3:80"])
    del names.known["a"]
    asked = len(names.asked)
    until(lambda: len(names.asked) > asked + 3)
    assert served(found.resolved(given)) == ["10.0.0.2:80", "10.0.0.3:80"]
    found.resolved(named(Endpoint("b", 80)))
    until(lambda: "b" in names.asked)
    asked = names.asked.count("a")
    many = len(names.asked)
    until(lambda: len(names.asked) > many + 5)
    assert names.asked.count("a") <= asked + 1
    names.known["a"] = ("10.0.0.4",)
    until(lambda: served(found.resolved(given)) == ["10.0.0.4:80"])


def test_a_name_that_hangs_holds_up_no_other(started: Callable[[Names], Addresses]) -> None:
    """Nor the end."""
    names = Names(a=("10.0.0.1",))
    found = started(names)
    given = named(Endpoint("hangs", 80), Endpoint("a", 80))
    until(lambda: served(found.resolved(given)) == ["10.0.0.1:80", "hangs:80"])
    began = time.monotonic()
    found.stop()
    assert time.monotonic() - began < WAIT / 3
    names.hanging.set()


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this machine on Linux")
def test_calls_are_balanced_over_the_addresses_and_a_bad_one_is_ejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two addresses of this machine, one port: Host is the name, and what fails is left alone by itself."""
    monkeypatch.setattr(addresses, "lookup", Names(db=("127.0.0.1", "127.0.0.2")))
    with Peer() as one, Peer(host="127.0.0.2", port=one.port) as two, mesh() as made, made.Client() as client:
        cluster = Cluster(
            "c",
            ClusterType.STRICT_DNS,
            endpoints=(Endpoint("db", one.port),),
            load_balancing=LoadBalancing.ROUND_ROBIN,
            outlier_detection=OutlierDetection(consecutive_5xx=1, max_ejection_percent=50),
        )
        given = snapshot({"db.example:80": [route(forward("c"))]}, {"c": (cluster, [])})
        publish(made, replace(given, assignments=()))
        until(lambda: len(made.live.clusters["c"].targets) == 2)
        for _ in range(4):
            assert client.get("http://db.example/").status_code == 200
        assert (len(one.received), len(two.received)) == (2, 2)
        assert two.received[0].header("host") == "db.example"
        two.answer = lambda _: Answer(500)
        for _ in range(6):
            client.get("http://db.example/")
        assert (len(one.received), len(two.received)) == (2 + 5, 2 + 1)
        said = made.explain("GET", "http://db.example/")
        assert [each.endpoint.address for each in said.destinations[0].candidates] == ["127.0.0.1", "127.0.0.2"]


def test_until_the_first_answer_a_call_goes_to_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By YAML, as written for Istio."""
    names = Names()
    monkeypatch.setattr(addresses, "lookup", names)
    with Peer() as peer:
        (tmp_path / "mesh.yaml").write_text(f"""
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: db}}
spec:
  hosts: [localhost]
  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: {peer.port}}}]
  resolution: DNS
""")
        with meshlib.connect(tmp_path) as made, made.Client() as client:
            assert client.get("http://localhost/").status_code == 200
            until(lambda: "localhost" in names.asked)


def test_who_follows_the_configuration_hears_of_new_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a host that nobody knew is not waited for again because of them."""
    names = Names()
    monkeypatch.setattr(addresses, "lookup", names)
    monkeypatch.setattr(addresses, "RETRY", 0.01)
    given = snapshot(
        {"db:80": [route(forward("c"))]},
        {"c": (Cluster("c", ClusterType.STRICT_DNS, endpoints=(Endpoint("db", 80),)), [])},
    )

    async def follow() -> int:
        with mesh(replace(given, assignments=())) as made:
            made._feed._remember_unanswered("nobody:80")
            before = made.live
            following = asyncio.create_task(made.next_live(before))
            await asyncio.sleep(0)
            names.known["db"] = ("127.0.0.1", "127.0.0.2")
            after = await asyncio.wait_for(following, 30)
            assert set(made._feed._unanswered) == {"nobody:80"}
            return len(after.clusters["c"].targets)

    assert asyncio.run(follow()) == 2


def test_the_operating_system_is_asked() -> None:
    """IPv4 first, each address once, in order; a name that is not there is an OSError."""
    assert "127.0.0.1" in lookup("localhost")
    with pytest.raises(OSError):
        lookup("no-such-name.invalid")
