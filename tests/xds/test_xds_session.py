"""The ADS state machine, both variants: what is said, what is known, and when. No network and no clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.errors import InvalidResource
from meshlib.model import Cluster, ClusterType, Listener, LoadAssignment, RouteConfiguration
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE
from meshlib.xds.session import (
    DOES_NOT_EXIST_TIMEOUT,
    TRANSITIONS,
    Entry,
    Event,
    Request,
    Resource,
    Response,
    Session,
    State,
    Value,
)


def decode(type_url: str, data: bytes) -> Value:
    """Bytes are `name=text`; the text `bad` can't be understood, and `broken` breaks the decoder."""
    name, _, text = data.decode().partition("=")
    if text == "bad":
        raise InvalidResource(type_url, name, "field", "is bad")
    if text == "broken":
        raise RuntimeError("a defect")
    match type_url:
        case _ if type_url == LISTENER:
            return Listener(name, text)
        case _ if type_url == ROUTE:
            return RouteConfiguration(name, ())
        case _ if type_url == CLUSTER:
            return Cluster(name, ClusterType.EDS)
    return LoadAssignment(name)


def resource(name: str, text: str = "v1", type_url: str = LISTENER, version: str = "") -> Resource:
    return Resource(type_url, name, version or text, f"{name}={text}".encode())


class Wire:
    """One end of a conversation: a Session, and answers in one line."""

    def __init__(self, *, delta: bool, wildcard: tuple[str, ...] = (), is_open: bool = True) -> None:
        self.session = Session(decode, delta=delta, wildcard=wildcard)
        self.count = 0
        if is_open:
            self.open()

    def open(self) -> None:
        self.session.stream_opened()
        self.session.stream_ready(0.0)

    def said(self, now: float = 0.0) -> list[Request]:
        return self.session.requests(now)

    def answer(
        self,
        type_url: str = LISTENER,
        *names: str,
        removed: tuple[str, ...] = (),
        version: str = "1",
        now: float = 0.0,
        **texts: str,
    ) -> tuple[InvalidResource, ...]:
        """Names with text `v1`, and names with the texts given."""
        self.count += 1
        resources = [resource(name, type_url=type_url) for name in names]
        resources += [resource(name, text, type_url) for name, text in texts.items()]
        if not self.session.delta:
            resources = [Resource(type_url, "", "", each.data) for each in resources]
        return self.session.received(Response(type_url, f"n{self.count}", version, tuple(resources), removed), now)

    def state(self, name: str, type_url: str = LISTENER) -> State | None:
        entry = self.session.entry(type_url, name)
        return entry.state if entry is not None else None

    def value(self, name: str, type_url: str = LISTENER) -> Value | None:
        entry = self.session.entry(type_url, name)
        return entry.value if entry is not None else None


def wire(delta: bool, *names: str, wildcard: tuple[str, ...] = ()) -> Wire:
    """A stream on which these listeners were asked for."""
    made = Wire(delta=delta, wildcard=wildcard)
    made.session.subscribe(LISTENER, names)
    made.said()
    return made


both = pytest.mark.parametrize("delta", [True, False], ids=["delta", "sotw"])


# Asking


def test_sotw_names_all_that_is_wanted() -> None:
    """Rule 2: each request is the full set; without nonce before the first response, with its nonce after it."""
    each = Wire(delta=False)
    each.session.subscribe(LISTENER, ["b", "a"])
    assert each.said() == [Request(LISTENER, names=("a", "b"))]
    each.answer(LISTENER, "a", "b", version="7")
    assert each.said() == [Request(LISTENER, "n1", names=("a", "b"), version="7")]
    each.session.subscribe(LISTENER, ["b", "c"])
    assert each.said() == [Request(LISTENER, "n1", names=("b", "c"), version="7")]


def test_delta_names_what_changes() -> None:
    """Rule 2: subscribe and unsubscribe are relative to what this stream was told, and need no nonce."""
    each = Wire(delta=True)
    each.session.subscribe(LISTENER, ["b", "a"])
    assert each.said() == [Request(LISTENER, subscribe=("a", "b"))]
    each.session.subscribe(LISTENER, ["b", "c"])
    assert each.said() == [Request(LISTENER, subscribe=("c",), unsubscribe=("a",))]
    assert each.said() == []


@both
def test_nothing_is_asked_for_by_accident(delta: bool) -> None:
    """Rule 3: a first request without names would ask for everything, so there is none for LDS and CDS."""
    each = Wire(delta=delta)
    greeting = each.said()
    assert [request.type_url for request in greeting] == [ROUTE], "the node has to be told all the same"
    each.session.subscribe(CLUSTER, ())
    assert each.said() == []


def test_a_wildcard_is_written_out_once_names_were_sent() -> None:
    """Rule 3: no names means everything only until a name was sent on the stream."""
    sotw, delta = Wire(delta=False, wildcard=(LISTENER,)), Wire(delta=True, wildcard=(LISTENER,))
    assert [r.names for r in sotw.said()] == [()]
    assert [r.subscribe for r in delta.said()] == [()]
    for each in (sotw, delta):
        each.session.subscribe(LISTENER, ["a"])
    assert [r.names for r in sotw.said()] == [("*", "a")]
    assert [r.subscribe for r in delta.said()] == [("a",)]
    sotw.session.subscribe(LISTENER, [])
    assert [r.names for r in sotw.said()] == [("*",)]
    delta.session.stream_closed()
    delta.open()
    assert [r.subscribe for r in delta.said()] == [("*", "a")]


def test_the_last_name_given_up_is_not_a_wildcard() -> None:
    """SotW: an empty list after names says "nothing any more"."""
    each = wire(False, "a")
    each.answer(LISTENER, "a")
    each.session.subscribe(LISTENER, [])
    assert each.said() == [Request(LISTENER, "n1", names=(), version="1")]
    assert each.state("a") is None


@both
def test_a_node_that_changed_is_announced_even_if_there_is_nothing_to_say(delta: bool) -> None:
    """Readiness: a request that changes nothing gives the node a place to travel."""
    each = wire(delta, "a")
    each.answer(LISTENER, "a")
    each.said()
    each.session.announce()
    (request,) = each.said()
    assert not request.error and not request.subscribe and not request.unsubscribe
    assert each.said() == []


# Answering


@both
def test_every_response_is_acknowledged_by_its_nonce(delta: bool) -> None:
    """Rule 5: an ACK carries the nonce and no error."""
    each = wire(delta, "a")
    each.answer(LISTENER, "a")
    (ack,) = each.said()
    assert (ack.type_url, ack.nonce, ack.error) == (LISTENER, "n1", "")
    assert each.said() == [], "answered once"


def test_delta_answers_each_nonce_and_sotw_the_latest() -> None:
    """Rule 6."""
    delta, sotw = wire(True, "a"), wire(False, "a")
    for each in (delta, sotw):
        each.answer(LISTENER, "a")
        each.answer(LISTENER, "a")
    assert [r.nonce for r in delta.said()] == ["n1", "n2"]
    assert [r.nonce for r in sotw.said()] == ["n2"]


@both
def test_a_bad_resource_is_refused_and_the_rest_applies(delta: bool) -> None:
    """Rule 8: the NACK tells each resource's reason; good ones apply, and the bad one's last good value stays."""
    each = wire(delta, "a", "b")
    each.answer(LISTENER, "a", "b")
    each.said()
    problems = each.answer(LISTENER, a="bad", b="v2", version="2")
    assert [problem.name for problem in problems] == ["a"]
    (nack,) = each.said()
    assert nack.nonce == "n2"
    assert nack.error == "1 of 2 resources rejected: Listener 'a': field: is bad"
    assert (each.state("a"), each.value("a")) == (State.NACKED, Listener("a", "v1"))
    assert (each.state("b"), each.value("b")) == (State.ACKED, Listener("b", "v2"))
    each.answer(LISTENER, a="v3", b="v2", version="3")
    (ack,) = each.said()
    assert (ack.error, each.state("a"), each.value("a")) == ("", State.ACKED, Listener("a", "v3"))


def test_a_sotw_nack_carries_the_last_version_with_anything_valid() -> None:
    """Rule 8, as gRPC C-core does it: nothing valid leaves the old version."""
    each = wire(False, "a")
    each.answer(LISTENER, a="v1", version="1")
    each.said()
    each.answer(LISTENER, a="bad", version="2")
    assert [r.version for r in each.said()] == ["1"]
    each.session.subscribe(LISTENER, ["a", "b"])
    each.said()
    each.answer(LISTENER, a="bad", b="v1", version="3")
    assert [r.version for r in each.said()] == ["3"]


def test_changes_of_subscriptions_do_not_travel_in_a_sotw_nack() -> None:
    """Rule 7: Istio reads no names in a NACK, so they follow in a request of their own."""
    each = wire(False, "a")
    each.answer(LISTENER, a="bad")
    each.session.subscribe(LISTENER, ["a", "b"])
    nack, change = each.said()
    assert (nack.names, bool(nack.error)) == (("a",), True)
    assert (change.names, change.error) == (("a", "b"), "")


@both
def test_a_decoders_defect_costs_one_resource(delta: bool) -> None:
    """Any exception of the decoder is a NACK of that resource."""
    each = wire(delta, "a", "b")
    problems = each.answer(LISTENER, "b", a="broken")
    assert len(problems) == 1 and "RuntimeError('a defect')" in str(problems[0])
    assert each.state("b") is State.ACKED


@both
def test_a_name_twice_in_a_response_is_invalid(delta: bool) -> None:
    """Rule 8."""
    each = wire(delta, "a")
    each.count += 1
    twice = tuple(Resource(LISTENER, "a" if delta else "", "", data) for data in (b"a=1", b"a=2"))
    (problem,) = each.session.received(Response(LISTENER, "n1", "1", twice), 0.0)
    assert problem.reason == "is in this response twice"


def test_a_resource_that_is_not_what_its_envelope_says_is_refused() -> None:
    """Delta names a resource twice, and each Any names its type: they must agree."""
    each = wire(True, "a", "b")
    (other_name,) = each.session.received(Response(LISTENER, "n1", "", (Resource(LISTENER, "a", "", b"b=1"),)), 0.0)
    (other_type,) = each.session.received(Response(LISTENER, "n2", "", (Resource(ROUTE, "a", "", b"a=1"),)), 0.0)
    assert (other_name.field, other_type.field) == ("name", "type_url")
    assert each.state("a") is State.NACKED and each.state("b") is State.REQUESTED


@both
def test_a_response_nobody_asked_for_is_passed_over(delta: bool) -> None:
    """No sub-stream, no answer; a type that is not known neither."""
    each = wire(delta, "a")
    assert each.answer(CLUSTER, "x") == ()
    assert each.session.received(Response("unknown", "n9"), 0.0) == ()
    assert each.said() == [] and each.value("x", CLUSTER) is None


@both
def test_what_was_not_asked_for_by_name_is_acknowledged_and_not_kept(delta: bool) -> None:
    """A server may send more than was asked for (go-control-plane's whole snapshot)."""
    each = wire(delta, "a")
    each.answer(LISTENER, "a", "z")
    assert each.state("z") is None
    assert [r.error for r in each.said()] == [""]


# Knowing


@both
def test_silence_becomes_absence_after_fifteen_seconds(delta: bool) -> None:
    """Rule 9: the timer runs from the subscription; until then the name is REQUESTED."""
    each = Wire(delta=delta)
    each.session.subscribe(LISTENER, ["a"])
    each.said(now=100.0)
    assert each.session.next_deadline == 100.0 + DOES_NOT_EXIST_TIMEOUT
    assert each.session.expire(114.9) == []
    assert each.state("a") is State.REQUESTED
    assert each.session.expire(115.0) == [(LISTENER, "a")]
    assert each.state("a") is State.DOES_NOT_EXIST
    assert each.session.next_deadline is None
    each.answer(LISTENER, "a", now=200.0)
    assert each.state("a") is State.ACKED, "rule 11: it is pushed the day it is born"


@both
def test_an_unreachable_server_proves_nothing(delta: bool) -> None:
    """Rule 9 (gRFC A57): the timer starts when the server is reached, stops with the stream, and starts anew."""
    each = Wire(delta=delta, is_open=False)
    each.session.subscribe(LISTENER, ["a"])
    each.session.stream_opened()
    each.said(now=0.0)
    assert each.session.next_deadline is None
    each.session.stream_ready(10.0)
    assert each.session.next_deadline == 25.0
    each.session.stream_closed()
    assert each.session.next_deadline is None
    assert each.session.expire(1000.0) == []
    each.session.stream_opened()
    each.session.stream_ready(2000.0)
    each.said(now=2000.0)
    assert each.session.next_deadline == 2015.0


def test_delta_says_what_does_not_exist() -> None:
    """Rule 10: removed_resources, at once; what is not mentioned is unchanged."""
    each = wire(True, "a", "b")
    each.answer(LISTENER, "a", removed=("b",))
    assert (each.state("a"), each.state("b")) == (State.ACKED, State.DOES_NOT_EXIST)
    each.answer(LISTENER, removed=("a",))
    assert (each.state("a"), each.value("a")) == (State.DOES_NOT_EXIST, None)
    assert each.session.next_deadline is None


def test_sotw_waits_less_for_a_server_that_answers_at_once() -> None:
    """Rule 10: once a whole set came without the name, as long as one that was on its way may take; not prolonged."""
    each = Wire(delta=False)
    each.session = Session(decode, delta=False, omitted_after=1.0)
    each.open()
    each.session.subscribe(LISTENER, ["a"])
    each.said(now=0.0)
    each.answer(LISTENER, now=3.0)
    each.answer(LISTENER, now=3.5)
    assert each.session.next_deadline == 4.0
    assert each.session.expire(4.0) == [(LISTENER, "a")]
    each.answer(LISTENER, "a", now=5.0)
    assert each.state("a") is State.ACKED


def test_sotw_deletes_listeners_and_clusters_by_leaving_them_out() -> None:
    """Rule 10: the whole set; what was never seen waits for its timer."""
    each = wire(False, "a", "b")
    each.answer(LISTENER, "a")
    assert each.state("b") is State.REQUESTED
    each.answer(LISTENER, "b")
    assert (each.state("a"), each.state("b")) == (State.DOES_NOT_EXIST, State.ACKED)


@pytest.mark.parametrize("type_url", [ROUTE, ENDPOINT])
def test_sotw_absence_means_nothing_for_routes_and_endpoints(type_url: str) -> None:
    """Rule 10: a response may be partial."""
    each = Wire(delta=False)
    each.session.subscribe(type_url, ["a", "b"])
    each.said()
    each.answer(type_url, "a", "b")
    each.answer(type_url, "b")
    assert each.state("a", type_url) is State.ACKED


def test_a_resource_too_bad_to_tell_its_name_deletes_nothing() -> None:
    """SotW: it may be any of those that are missing."""
    each = wire(False, "a", "b")
    each.answer(LISTENER, "a", "b")
    each.session.received(Response(LISTENER, "n2", "2", (Resource(LISTENER, "", "", b"\xff"), resource("b"))), 0.0)
    assert each.state("a") is State.ACKED


@both
def test_a_name_given_up_and_taken_back_before_anyone_noticed_keeps_its_value(delta: bool) -> None:
    """Values are dropped once the server has been told."""
    each = wire(delta, "a")
    each.answer(LISTENER, "a")
    each.said()
    each.session.subscribe(LISTENER, [])
    each.session.subscribe(LISTENER, ["a"])
    assert each.said() == []
    assert each.value("a") == Listener("a", "v1")
    each.session.subscribe(LISTENER, [])
    each.said()
    each.session.subscribe(LISTENER, ["a"])
    assert each.state("a") is State.REQUESTED


@both
def test_what_is_repeated_is_not_decoded_again(delta: bool) -> None:
    """The value stays the same object, so whatever was compiled from it stays as well."""
    each = wire(delta, "a")
    each.answer(LISTENER, "a")
    before = each.value("a")
    each.answer(LISTENER, "a")
    assert each.value("a") is before


# The next stream


def test_delta_says_after_a_reconnect_what_it_still_holds() -> None:
    """Rule 4: subscriptions again, with initial_resource_versions; values serve on."""
    each = wire(True, "a", "b", "c")
    each.answer(LISTENER, removed=("b",), a="v7")
    each.session.stream_closed()
    assert each.value("a") == Listener("a", "v7")
    assert each.said() == []
    each.open()
    assert each.said() == [Request(LISTENER, subscribe=("a", "b", "c"), initial_versions=(("a", "v7"),))]


def test_sotw_says_after_a_reconnect_which_version_it_has() -> None:
    """Rule 4: the version survives a stream, the nonce does not; an unanswered response is not answered any more."""
    each = wire(False, "a")
    each.answer(LISTENER, "a", version="7")
    each.session.stream_closed()
    each.open()
    assert each.said() == [Request(LISTENER, "", names=("a",), version="7")]


@pytest.mark.parametrize("type_url", [LISTENER, ENDPOINT])
def test_what_an_earlier_process_knew_serves_until_it_is_contradicted(type_url: str) -> None:
    """Restored values count as held, with no version, so the server sends all of them once."""
    each = Wire(delta=True, is_open=False)
    problems = each.session.restore(
        type_url, [resource("a", type_url=type_url), resource("b", "bad", type_url)], ["c"], 0.0
    )
    assert [problem.partition(":")[2] for problem in problems] == [" field: is bad"]
    each.session.subscribe(type_url, ["a", "b", "c"])
    assert each.state("a", type_url) is State.ACKED and each.state("c", type_url) is State.DOES_NOT_EXIST
    assert each.session.has_unconfirmed
    each.open()
    (request,) = each.said()
    assert (request.subscribe, request.initial_versions) == (("a", "b", "c"), (("a", ""),))
    each.answer(type_url, "a")
    assert each.session.has_unconfirmed
    each.answer(type_url, removed=("c",))
    assert not each.session.has_unconfirmed


# Wildcards


@both
def test_under_a_wildcard_everything_that_comes_is_kept_and_what_goes_is_dropped(delta: bool) -> None:
    """A gateway's listeners and clusters."""
    each = Wire(delta=delta, wildcard=(LISTENER,))
    each.said()
    assert not each.session.is_answered(LISTENER)
    each.answer(LISTENER, "a", "b")
    assert each.session.is_answered(LISTENER) and each.session.names(LISTENER) == ["a", "b"]
    each.said()
    each.answer(LISTENER, *(() if delta else ("b",)), removed=("a",) if delta else ())
    each.said()
    assert each.session.names(LISTENER) == ["b"]


# For people


@both
def test_status_and_repr_tell_what_is_known(delta: bool) -> None:
    """Counts by type; the last error; and a repr that reads like a status line."""
    each = wire(delta, "a", "b")
    each.answer(LISTENER, "b", a="bad", version="3")
    listeners = each.session.status()[0]
    assert (listeners.type_url, listeners.nonce, listeners.nacks, listeners.version) == (LISTENER, "n1", 1, "3")
    assert [(name, entry.state) for name, entry in listeners.resources] == [("a", State.NACKED), ("b", State.ACKED)]
    assert "Listener 1/2" in repr(each.session)


def test_a_long_nack_is_cut() -> None:
    """A server with a thousand bad resources gets twenty reasons and a count."""
    names = [f"n{number:04}" for number in range(1000)]
    each = wire(True, *names)
    each.answer(LISTENER, **dict.fromkeys(names, "bad"))
    (nack,) = each.said()
    assert nack.error.startswith("1000 of 1000") and nack.error.endswith("and 980 more")
    assert len(nack.error) < 2000


def test_the_table_is_complete() -> None:
    """Every state says what each event makes of it, but for the timer, which runs only while REQUESTED, and for the end
    of a time to live, which only what has a value has."""
    for state in State:
        expected = set(Event) if state is State.REQUESTED else set(Event) - {Event.TIMEOUT}
        if state in (State.REQUESTED, State.DOES_NOT_EXIST):
            expected -= {Event.LAPSED}
        assert set(TRANSITIONS[state]) == expected


# A long life

names = st.sampled_from(["a", "b", "c"])
texts = st.sampled_from(["v1", "v2", "bad", "broken"])
actions = st.one_of(
    st.tuples(st.just("subscribe"), st.frozensets(names)),
    st.tuples(st.just("answer"), st.dictionaries(names, texts), st.frozensets(names)),
    st.tuples(st.sampled_from(["requests", "close", "open", "ready", "expire", "announce"])),
)


@given(
    delta=st.booleans(),
    wildcard=st.booleans(),
    type_url=st.sampled_from([LISTENER, ROUTE, CLUSTER, ENDPOINT]),
    story=st.lists(actions, max_size=30),
)
def test_whatever_happens_the_books_are_in_order(
    delta: bool, wildcard: bool, type_url: str, story: list[tuple[object, ...]]
) -> None:
    """In any order of events: an ACKED entry has a value, a NACKED one a reason, REQUESTED and absent ones neither;
    what is wanted has an entry; each nonce is answered at most once; nothing that was sent is sent again."""
    is_wildcard = wildcard and type_url in (LISTENER, CLUSTER)
    each = Wire(delta=delta, wildcard=(type_url,) if is_wildcard else (), is_open=False)
    wanted: frozenset[str] = frozenset()
    is_open, now, answered = False, 0.0, []
    for action in story:
        now += 4.0
        match action:
            case ("subscribe", frozenset() as chosen):
                wanted = chosen
                each.session.subscribe(type_url, chosen)
            case ("answer", dict() as found, frozenset() as removed) if is_open:
                gone = tuple(sorted(removed - set(found))) if delta else ()
                each.answer(type_url, removed=gone, now=now, **found)
            case ("requests",):
                answered += [(r.nonce, r.error) for r in each.said(now) if r.nonce]
                assert each.said(now) == []
            case ("open",) if not is_open:
                is_open = True
                each.session.stream_opened()
            case ("ready",) if is_open:
                each.session.stream_ready(now)
            case ("close",) if is_open:
                is_open = False
                each.session.stream_closed()
            case ("expire",):
                each.session.expire(now)
            case ("announce",):
                each.session.announce()
        for name in wanted:
            assert each.session.entry(type_url, name) is not None
        for name in each.session.names(type_url):
            entry = each.session.entry(type_url, name) or Entry()
            assert (entry.value is not None) or entry.state is not State.ACKED
            assert bool(entry.error) == (entry.state is State.NACKED)
            assert entry.value is None or entry.state in (State.ACKED, State.NACKED)
    if delta:
        assert len({nonce for nonce, _ in answered}) == len(answered)
