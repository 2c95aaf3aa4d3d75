"""The client's stream against a real gRPC server: how it is opened, kept, lost and opened again."""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Self

import pytest

from ads_peer import AdsPeer
from meshlib.model import Listener, Node, Workload
from meshlib.xds.decode import decode_node, decode_resource
from meshlib.xds.resource_types import LISTENER
from meshlib.xds.session import Session, State
from meshlib.xds.stream import FIRST_PAUSE, LONGEST_PAUSE, Stream, pause_after
from promises import within

NODE = Node(
    "sidecar~127.0.0.1~a-1.default~default.svc.cluster.local",
    Workload("a", service="a", address="127.0.0.1", port=9080),
    user_agent="meshlib/1",
)
TIMEOUT = 30.0
both = pytest.mark.parametrize("delta", [True, False], ids=["delta", "sotw"])


class Client:
    """A Stream on a thread of its own, that wants the listeners `names`. A context manager."""

    def __init__(self, target: str, *names: str, delta: bool = True, clock: Callable[[], float] = time.monotonic):
        self.session = Session(decode_resource, delta=delta)
        self.names = names
        self.node = NODE
        self.stream = Stream(target, self.session, lambda: self.node, clock=clock)
        self.turns = 0
        self.stepped = threading.Condition()
        self._thread = threading.Thread(target=self.stream.run, args=(self._step,), daemon=True)

    def _step(self, now: float) -> None:
        with self.stepped:
            self.session.subscribe(LISTENER, self.names)
            self.turns += 1
            self.stepped.notify_all()

    def wait_for(self, holds: Callable[[], object], timeout: float = TIMEOUT) -> None:
        with self.stepped:
            assert self.stepped.wait_for(holds, timeout), repr(self.stream)

    def turn(self) -> None:
        """Let the loop go round once."""
        before = self.turns
        self.stream.wake()
        self.wait_for(lambda: self.turns > before)

    def state(self, name: str) -> State | None:
        entry = self.session.entry(LISTENER, name)
        return entry.state if entry is not None else None

    def stop(self) -> float:
        """Returns how long it took."""
        began = time.monotonic()
        self.stream.stop()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        return time.monotonic() - began

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.stop()


@pytest.fixture
def peer() -> Iterator[AdsPeer]:
    with AdsPeer() as peer:
        yield peer


def test_a_delta_conversation_in_full(peer: AdsPeer) -> None:
    """Node once, subscriptions, ACK, NACK with its reason, unsubscription: as an independent peer reads them."""
    with Client(peer.target, "b:80", "c:80") as client:
        stream = peer.accept()
        assert stream.is_delta
        first = stream.next()
        assert decode_node(first.node) == NODE
        assert (first.type_url, [*first.resource_names_subscribe]) == (LISTENER, ["b:80", "c:80"])
        nonce = stream.send(LISTENER, Listener("b:80", "routes"), removed=("c:80",), version="7")
        ack = stream.next()
        assert (ack.response_nonce, ack.HasField("error_detail"), ack.HasField("node")) == (nonce, False, False)
        assert (client.state("b:80"), client.state("c:80")) == (State.ACKED, State.DOES_NOT_EXIST)
        nonce = stream.send(LISTENER, raw={"b:80": b"\xff"})
        nack = stream.next()
        assert (nack.response_nonce, nack.error_detail.code) == (nonce, 3)
        assert nack.error_detail.message == "1 of 1 resources rejected: Listener 'b:80': is not a message of this type"
        client.names = ("c:80",)
        client.stream.wake()
        assert [*stream.next().resource_names_unsubscribe] == ["b:80"]
        stream.close()
        again = peer.accept().next()
        assert again.HasField("node") and [*again.resource_names_subscribe] == ["c:80"]


def test_a_state_of_the_world_conversation_in_full(peer: AdsPeer) -> None:
    """The same, with the full set of names and the accepted version in each request."""
    with Client(peer.target, "b:80", delta=False) as client:
        stream = peer.accept()
        assert not stream.is_delta
        first = stream.next()
        assert (decode_node(first.node), first.version_info, first.response_nonce) == (NODE, "", "")
        nonce = stream.send(LISTENER, Listener("b:80", "routes"), version="7")
        ack = stream.next()
        assert (ack.response_nonce, ack.version_info, [*ack.resource_names]) == (nonce, "7", ["b:80"])
        nonce = stream.send(LISTENER, raw={"b:80": b"\xff"}, version="8")
        nack = stream.next()
        assert (nack.response_nonce, nack.version_info, nack.error_detail.code) == (nonce, "7", 3)
        assert client.state("b:80") is State.ACKED, "whose it was can't be told from a damaged resource"
        client.names = ("b:80", "c:80")
        client.stream.wake()
        assert [*stream.next().resource_names] == ["b:80", "c:80"]
        stream.close()
        again = peer.accept().next()
        assert (again.version_info, again.response_nonce, [*again.resource_names]) == ("7", "", ["b:80", "c:80"])


@both
def test_what_is_held_after_a_reconnect_is_said(peer: AdsPeer, delta: bool) -> None:
    """A server that died and came back on the same port hears what the client still has."""
    with Client(peer.target, "b:80", delta=delta) as client:
        stream = peer.accept()
        stream.next()
        stream.send(LISTENER, Listener("b:80", "routes"), version="7")
        stream.next()
        peer.stop()
        peer.start()
        request = peer.accept().next()
        assert (dict(request.initial_resource_versions) == {"b:80": "7"}) if delta else (request.version_info == "7")
        assert client.state("b:80") is State.ACKED


def test_the_node_is_sent_again_when_it_has_changed(peer: AdsPeer) -> None:
    """On the open stream, once; and with news of its own if there are any."""
    with Client(peer.target, "b:80") as client:
        stream = peer.accept()
        assert decode_node(stream.next().node) == NODE
        client.node = replace(NODE, ready=True)
        client.stream.renew_node()
        assert decode_node(stream.next().node).ready
        stream.send(LISTENER, Listener("b:80", "routes"))
        assert not stream.next().HasField("node")


def test_a_silent_server_that_was_reached_lets_the_timer_run(peer: AdsPeer) -> None:
    """A server that answers nothing at all has been asked: after 15 s of the clock the name is absent, and logged."""
    now = [100.0]
    with Client(peer.target, "b:80", clock=lambda: now[0]) as client:
        peer.accept().next()
        client.wait_for(lambda: client.session.next_deadline is not None)
        assert client.session.next_deadline == 115.0
        now[0] = 115.0
        client.stream.wake()
        client.wait_for(lambda: client.state("b:80") is State.DOES_NOT_EXIST)


def test_a_server_that_was_not_reached_lets_no_timer_run() -> None:
    """A port that accepts and then says nothing, not even HTTP/2: what was asked for is still on its way."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        with Client(f"127.0.0.1:{mute.getsockname()[1]}", "b:80") as client:
            connection, _ = mute.accept()
            with connection:
                assert connection.recv(3) == b"PRI"
                for _ in range(5):
                    client.turn()
                assert client.session.next_deadline is None
        assert client.state("b:80") is State.REQUESTED


def test_an_outage_is_logged_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    """However many attempts it takes; the line names the control plane and the reason."""
    caplog.set_level(logging.INFO, "meshlib.xds")
    peer = AdsPeer()
    peer.start()
    peer.stop()
    with Client(peer.target, "b:80") as client:
        client.wait_for(lambda: client.stream._attempt > 3)
        peer.start()
        try:
            stream = peer.accept()
            stream.next()
            stream.send(LISTENER, Listener("b:80", "routes"))
            client.wait_for(lambda: client.state("b:80") is State.ACKED)
        finally:
            peer.stop()
    lines = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "meshlib.xds"]
    assert [level for level, _ in lines[:2]] == ["WARNING", "INFO"]
    assert peer.target in lines[0][1] and "UNAVAILABLE" in lines[0][1] and "trying again" in lines[0][1]
    assert "answers" in lines[1][1]


def test_the_same_refusal_is_logged_once(peer: AdsPeer, caplog: pytest.LogCaptureFixture) -> None:
    """A server that repeats what was refused does not fill the log; it is told each time all the same."""
    with Client(peer.target, "b:80"):
        stream = peer.accept()
        stream.next()
        for _ in range(5):
            stream.send(LISTENER, raw={"b:80": b"\xff"})
            assert stream.next().error_detail.message
    assert len([r for r in caplog.records if "can't be used" in r.getMessage()]) == 1


def test_a_defect_costs_a_stream_and_not_the_feed(peer: AdsPeer, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in `step` is logged with its trace; the next stream follows."""
    with Client(peer.target, "b:80") as client:
        stream = peer.accept()
        stream.next()
        good, client.session.subscribe = client.session.subscribe, None  # type: ignore[assignment, method-assign]
        client.stream.wake()
        stream.wait_closed()
        client.session.subscribe = good  # type: ignore[method-assign]
        assert [*peer.accept().next().resource_names_subscribe] == ["b:80"]
    assert any(record.exc_info for record in caplog.records)


def test_a_large_response_is_taken_whole(peer: AdsPeer) -> None:
    """More than the 4 MB at which gRPC stops by itself."""
    names = tuple(f"host-{number}.{'x' * 200}:80" for number in range(12_000))
    with Client(peer.target, *names) as client:
        stream = peer.accept()
        stream.next()
        stream.send(LISTENER, *(Listener(name, f"routes of {name}") for name in names))
        assert not stream.next().HasField("error_detail")
        assert client.state(names[-1]) is State.ACKED


def test_stop_does_not_wait_for_anything(peer: AdsPeer) -> None:
    """With a stream open, with a server that does not answer, and in a pause; twice is as good as once."""
    with Client(peer.target, "b:80") as client:
        peer.accept().next()
        assert client.stop() < within(1.0)
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        Client(f"127.0.0.1:{mute.getsockname()[1]}", "b:80") as client,
    ):
        connection, _ = mute.accept()
        assert client.stop() < within(1.0)
        connection.close()
    peer.stop()
    with Client(peer.target, "b:80") as client:
        client.wait_for(lambda: client.stream.has_failed)
        assert client.stop() < within(1.0)
    assert client.stop() < within(1.0)


def test_pauses_grow_to_a_limit_and_are_never_in_step() -> None:
    """Exponential, with jitter, bounded by what a waiting call can bear."""
    rng = random.Random(1)
    pauses = [pause_after(failures, rng) for failures in range(1, 200)]
    assert 0.6 * FIRST_PAUSE <= pauses[0] <= FIRST_PAUSE
    assert 0.6 * LONGEST_PAUSE <= min(pauses[20:]) < max(pauses[20:]) <= LONGEST_PAUSE
    assert len({pause_after(50, random.Random(seed)) for seed in range(100)}) == 100


def test_a_server_that_falls_over_after_each_answer_is_given_time(peer: AdsPeer) -> None:
    """Only a stream that lasted lets the pauses begin anew; else a crashing server would be stormed."""
    now = [0.0]
    with Client(peer.target, "b:80", clock=lambda: now[0]) as client:

        def fall_over(after: float) -> None:
            stream = peer.accept()
            stream.next()
            stream.send(LISTENER, Listener("b:80", "routes"))
            stream.next()
            attempt, now[0] = client.stream._attempt, now[0] + after
            stream.close()
            client.wait_for(lambda: client.stream._failures > 0 and not client.session._is_open)
            failures.append(client.stream._failures)
            now[0] += LONGEST_PAUSE
            client.stream.wake()
            client.wait_for(lambda: client.stream._attempt > attempt)

        failures: list[int] = []
        for lasted in (0.0, 0.0, 0.0, LONGEST_PAUSE, 0.0):
            fall_over(lasted)
    assert failures == [1, 2, 3, 1, 2]


def test_repr_reads_like_a_status_line(peer: AdsPeer) -> None:
    """For logs."""
    with Client(peer.target, "b:80") as client:
        stream = peer.accept()
        stream.next()
        stream.send(LISTENER, Listener("b:80", "routes"))
        stream.next()
        # That the server was reached is told after its answer, now and then: two threads tell.
        deadline = time.monotonic() + within(10)
        while "opening" in repr(client.stream) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert repr(client.stream).startswith(f"<Stream {peer.target} answering: <Session delta ready: Listener 1/1")
