"""Does a change cost as much as has changed, whatever there is? Counted, not timed."""

from __future__ import annotations

import gc
import weakref

import pytest

from meshlib.controlplane.cache import Encoder, View
from meshlib.controlplane.changes import NOTHING, Changes
from meshlib.controlplane.resource import Resource
from meshlib.controlplane.subscriptions import DeltaStream, Request, SotwStream
from meshlib.model import CATCH_ALL, Cluster, Endpoint, Listener, LoadAssignment, Snapshot
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER

ENCODER = Encoder()


class Counted(View):
    """A view that counts what is looked up in it."""

    looked_up = 0
    compared = 0

    def find(self, type_url: str, name: str, *, has_catch_all: bool) -> Resource | None:
        self.looked_up += 1
        return super().find(type_url, name, has_catch_all=has_catch_all)

    def _compared(self, before: object) -> dict[str, Changes]:
        self.compared += 1
        return dict(super()._compared(before))


def view(count: int, changed: int = 0, *, listeners: tuple[Listener, ...] = ()) -> Counted:
    """changed: how many services have another endpoint than they had."""
    return Counted(
        Snapshot(
            listeners=listeners,
            clusters=tuple(Cluster(f"s{number:04}") for number in range(count)),
            assignments=tuple(
                LoadAssignment(f"s{number:04}", (Endpoint("127.0.0.1", 2 if number < changed else 1),))
                for number in range(count)
            ),
        ),
        (),
        ENCODER,
    )


def accept(stream: DeltaStream | SotwStream, names: frozenset[str]) -> None:
    for type_url, subscription in stream.subscriptions.items():
        if subscription.in_flight:
            asked = names if isinstance(stream, SotwStream) and type_url == ENDPOINT else frozenset[str]()
            stream.received(Request(type_url, asked, nonce=subscription.nonce))


@pytest.mark.parametrize("make", [DeltaStream, SotwStream])
@pytest.mark.parametrize("count", [100, 1000])
@pytest.mark.parametrize("changed", [1, 10, 100])
def test_a_stream_looks_at_what_has_changed_and_at_nothing_else(
    make: type[DeltaStream] | type[SotwStream], count: int, changed: int
) -> None:
    """Whoever has subscribed to everything; and views are compared once for all streams."""
    before, after = view(count), view(count, changed)
    names = frozenset(before.resources[ENDPOINT])
    streams = [make(has_catch_all=False) for _ in range(3)]
    for stream in streams:
        stream.received(Request(CLUSTER))
        stream.received(Request(ENDPOINT, names))
        stream.due(before)
        accept(stream, names)
        assert stream.due(before) == []
    before.looked_up = 0
    for stream in streams:
        (answer,) = stream.due(after)
        assert [each.name for each in answer.resources] == [f"s{number:04}" for number in range(changed)]
        accept(stream, names)
        assert stream.due(after) == []
    assert (after.looked_up, before.looked_up, after.compared) == (3 * changed, 0, 1)


@pytest.mark.parametrize("make", [DeltaStream, SotwStream])
def test_who_has_not_asked_for_what_has_changed_looks_at_nothing(make: type[DeltaStream] | type[SotwStream]) -> None:
    """As most of a mesh's clients."""
    before, after = view(1000), view(1000, 100)
    stream = make(has_catch_all=False)
    stream.received(Request(ENDPOINT, ("s0900", "s0901")))
    stream.due(before)
    accept(stream, frozenset({"s0900", "s0901"}))
    assert stream.due(after) == []
    assert after.looked_up == 0


def test_what_differs_is_what_is_new_other_or_gone() -> None:
    """By version: another object of the same content is the same."""
    before = View(Snapshot(clusters=(Cluster("gone"), Cluster("other"), Cluster("same"))), (), Encoder())
    now = (Cluster("new"), Cluster("other", connect_timeout=1.0), Cluster("same"))
    after = View(Snapshot(clusters=now), (), Encoder())
    assert after.changes_since(before) == {CLUSTER: Changes(frozenset({"gone", "new", "other"}))}
    assert after.changes_since(before) is after.changes_since(before)


@pytest.mark.parametrize(
    ("before", "after", "renamed"),
    [
        ((), (Listener("a:80", "r"),), False),
        ((Listener("*.a:80", "r"),), (Listener("*.a:80", "s"),), True),
        ((Listener(CATCH_ALL, "r"),), (Listener(CATCH_ALL, "s"),), True),
        ((), (Listener(CATCH_ALL, "s"),), True),
        ((Listener(CATCH_ALL, "r"),), (Listener(CATCH_ALL, "r"),), False),
    ],
)
def test_a_wildcards_change_is_one_of_the_names_that_it_covers(
    before: tuple[Listener, ...], after: tuple[Listener, ...], renamed: bool
) -> None:
    """They are not in any list: each client has made them up."""
    changes = view(1, listeners=after).changes_since(view(1, listeners=before))
    assert changes.get(LISTENER, NOTHING).renamed is renamed


def test_a_view_that_nobody_has_any_more_is_forgotten() -> None:
    """Though the next one was compared with it: a control plane runs for months."""
    before, after = view(1), view(1, 1)
    after.changes_since(before)
    gone = weakref.ref(before)
    del before
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("make", [DeltaStream, SotwStream])
def test_who_never_answers_does_not_remember_all_that_ever_was(make: type[DeltaStream] | type[SotwStream]) -> None:
    """Services come and go, and a client that hangs is told of none of it."""
    stream = make(has_catch_all=False)
    stream.received(Request(CLUSTER))
    for number in range(100):
        stream.due(View(Snapshot(clusters=(Cluster(f"s{number}"),)), (), ENCODER))
    assert len(stream.subscriptions[CLUSTER].pending) < 5
