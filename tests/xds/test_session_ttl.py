"""Does a client let go of what was to be renewed and was not? xDS's time to live, by the rules of session.py."""

from __future__ import annotations

import pytest

from meshlib.model import Cluster, Endpoint, LoadAssignment
from meshlib.xds.decode import decode_resource
from meshlib.xds.encode import encode_resource
from meshlib.xds.resource_types import CLUSTER, ENDPOINT
from meshlib.xds.session import Resource, Response, Session, State

BOTH = pytest.mark.parametrize("delta", [True, False], ids=["delta", "sotw"])
DATA = encode_resource(ENDPOINT, LoadAssignment("a", (Endpoint("127.0.0.1", 80),)))


def opened(delta: bool, *, wildcard: bool = False) -> Session:
    session = Session(decode_resource, delta=delta, wildcard=(CLUSTER,) if wildcard else ())
    session.subscribe(ENDPOINT, ["a"])
    session.stream_opened()
    session.stream_ready(0.0)
    session.requests(0.0)
    return session


def come(session: Session, at: float, ttl: float = 0.0, data: bytes = DATA) -> None:
    """Without data it is a heartbeat."""
    name = "a" if session.delta or ttl or not data else ""
    resource = Resource(ENDPOINT, name, "1" if session.delta else "", data, ttl=ttl, is_heartbeat=not data)
    session.received(Response(ENDPOINT, f"n{at}", "1", (resource,)), at)
    session.requests(at)


def state(session: Session) -> State:
    entry = session.entry(ENDPOINT, "a")
    assert entry is not None
    assert (entry.value is None) == (entry.state is not State.ACKED)
    return entry.state


@BOTH
def test_what_is_not_renewed_is_gone(delta: bool) -> None:
    """At its time and not before; and it is there again when it comes again."""
    session = opened(delta)
    come(session, 1.0, ttl=10.0)
    assert session.next_deadline == 11.0
    assert session.lapse(10.9) == []
    assert state(session) is State.ACKED
    assert session.lapse(11.0) == [(ENDPOINT, "a")]
    assert state(session) is State.DOES_NOT_EXIST
    assert session.next_deadline is None
    come(session, 12.0, ttl=10.0)
    assert (state(session), session.next_deadline) == (State.ACKED, 22.0)


@BOTH
def test_a_heartbeat_renews_and_changes_nothing(delta: bool) -> None:
    """It is acknowledged like any other answer."""
    session = opened(delta)
    come(session, 1.0, ttl=10.0)
    revision = session.revision
    resource = Resource(ENDPOINT, "a", "1", b"", ttl=5.0, is_heartbeat=True)
    assert session.received(Response(ENDPOINT, "beat", "1", (resource,)), 9.0) == ()
    assert [(each.nonce, each.error) for each in session.requests(9.0)] == [("beat", "")]
    assert (session.revision, session.next_deadline) == (revision, 14.0)
    assert session.lapse(13.0) == []


@BOTH
def test_without_a_time_to_live_it_is_there_for_good_again(delta: bool) -> None:
    """Sent again, or renewed, without one."""
    for data in (DATA, b""):
        session = opened(delta)
        come(session, 1.0, ttl=10.0)
        come(session, 2.0, data=data)
        assert session.next_deadline is None
        assert session.lapse(1e9) == []
        assert state(session) is State.ACKED


@BOTH
def test_it_runs_out_while_there_is_no_stream(delta: bool) -> None:
    """That is what it is for: who can't reach the control plane is not to go on with what it said."""
    session = opened(delta)
    come(session, 1.0, ttl=10.0)
    session.stream_closed()
    assert session.next_deadline == 11.0
    assert session.lapse(11.0) == [(ENDPOINT, "a")]
    assert state(session) is State.DOES_NOT_EXIST


def test_what_has_run_out_on_an_open_stream_is_asked_for_anew() -> None:
    """A server that was only slow believes that we have it, and would go on with heartbeats."""
    session = opened(True)
    come(session, 1.0, ttl=10.0)
    session.lapse(11.0)
    (request,) = session.requests(11.0)
    assert (request.subscribe, request.unsubscribe) == (("a",), ())


@BOTH
def test_a_heartbeat_of_what_is_not_there_is_nothing(delta: bool) -> None:
    """It has run out, or was given up."""
    session = opened(delta)
    come(session, 1.0, ttl=10.0, data=b"")
    assert state(session) is State.REQUESTED
    assert not session.has_ttl(ENDPOINT, "a")
    come(session, 2.0, ttl=10.0)
    session.subscribe(ENDPOINT, [])
    session.requests(3.0)
    come(session, 4.0, ttl=10.0, data=b"")
    assert session.lapse(1e9) == []


@BOTH
def test_what_is_refused_leaves_the_last_good_one_and_its_time(delta: bool) -> None:
    """A broken update does not renew what came before."""
    session = opened(delta)
    come(session, 1.0, ttl=10.0)
    come(session, 2.0, ttl=100.0, data=b"\xff")
    entry = session.entry(ENDPOINT, "a")
    assert entry is not None and entry.state is State.NACKED and entry.value is not None
    assert session.lapse(11.0) == [(ENDPOINT, "a")]


def test_a_whole_set_of_heartbeats_removes_nothing() -> None:
    """SotW: what a whole set does not name is gone; a heartbeat names it."""
    session = opened(False, wildcard=True)
    packed = Resource(CLUSTER, "c", "", encode_resource(CLUSTER, Cluster("c")), ttl=10.0)
    session.received(Response(CLUSTER, "1", "1", (packed,)), 1.0)
    session.received(Response(CLUSTER, "2", "1", (Resource(CLUSTER, "c", "", b"", 10.0, is_heartbeat=True),)), 5.0)
    entry = session.entry(CLUSTER, "c")
    assert entry is not None and entry.state is State.ACKED
    assert session.next_deadline == 15.0
