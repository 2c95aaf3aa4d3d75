"""Which names does a stream cover after which requests? The rules that go-control-plane's servers keep, as a table.

Each row is a conversation with an empty stream, and what is pushed when clusters a, b and c all change after it.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from meshlib.controlplane.cache import Encoder, View
from meshlib.controlplane.subscriptions import Answer, DeltaStream, Request, SotwStream
from meshlib.model import Cluster, Endpoint, LoadAssignment, Snapshot
from meshlib.xds.resource_types import CLUSTER, ENDPOINT


def view(timeout: float) -> View:
    return View(
        Snapshot(
            clusters=tuple(Cluster(name, connect_timeout=timeout) for name in "abc"),
            assignments=tuple(LoadAssignment(name, (Endpoint("127.0.0.1", int(timeout)),)) for name in "abc"),
        ),
        (),
        Encoder(),
    )


BEFORE, AFTER = view(1.0), view(2.0)


class Say(NamedTuple):
    """One request. answers: whether it bears the nonce of the latest answer, an old one, or none."""

    names: str = ""
    drop: str = ""
    answers: str = "latest"
    initial: str = ""
    error: str | None = None


FIRST = "none"
SOTW = {
    # Legacy wildcard: nothing in the first request.
    "no name at first is a wildcard": (CLUSTER, [Say(answers=FIRST)], "abc"),
    "and stays one when it is answered": (CLUSTER, [Say(answers=FIRST), Say()], "abc"),
    "until a name is sent": (CLUSTER, [Say(answers=FIRST), Say("a")], "a"),
    "and after that no name is nothing": (CLUSTER, [Say(answers=FIRST), Say("a"), Say()], ""),
    # The wildcard by its name.
    "a star is a wildcard": (CLUSTER, [Say("*", answers=FIRST)], "abc"),
    "beside names, too": (CLUSTER, [Say("*a", answers=FIRST)], "abc"),
    "and ends when it is left out": (CLUSTER, [Say("*a", answers=FIRST), Say("a")], "a"),
    "and begins after names": (CLUSTER, [Say("a", answers=FIRST), Say("*")], "abc"),
    # Names.
    "names are all that is wanted": (CLUSTER, [Say("ab", answers=FIRST)], "ab"),
    "those left out are not wanted any more": (CLUSTER, [Say("ab", answers=FIRST), Say("b")], "b"),
    "none at all after names is nothing": (CLUSTER, [Say("a", answers=FIRST), Say()], ""),
    "a name that does not exist waits": (CLUSTER, [Say("ax", answers=FIRST)], "a"),
    # Types that know no wildcard.
    "no endpoints without names": (ENDPOINT, [Say(answers=FIRST)], ""),
    "endpoints by name": (ENDPOINT, [Say("a", answers=FIRST), Say("ac")], "ac"),
    "a star is a name like others": (ENDPOINT, [Say("*", answers=FIRST)], ""),
    # Nonces.
    "an old nonce says nothing": (CLUSTER, [Say("a", answers=FIRST), Say("b", answers="old")], "a"),
    "nor does none, once there was an answer": (CLUSTER, [Say("a", answers=FIRST), Say("b", answers=FIRST)], "a"),
    "a refusal's names count": (CLUSTER, [Say("a", answers=FIRST), Say("b", error="no")], "b"),
}
DELTA = {
    "no name at first is a wildcard": (CLUSTER, [Say(answers=FIRST)], "abc"),
    "and stays one beside names": (CLUSTER, [Say(answers=FIRST), Say("a", answers=FIRST)], "abc"),
    "until the star is dropped": (CLUSTER, [Say(answers=FIRST), Say(drop="*", answers=FIRST)], ""),
    "which leaves the names": (CLUSTER, [Say(answers=FIRST), Say("a", drop="*", answers=FIRST)], "a"),
    "a star is a wildcard": (CLUSTER, [Say("*", answers=FIRST)], "abc"),
    "a star after names, too": (CLUSTER, [Say("a", answers=FIRST), Say("*", answers=FIRST)], "abc"),
    "names add up": (CLUSTER, [Say("a", answers=FIRST), Say("b", answers=FIRST)], "ab"),
    "an acknowledgement changes nothing": (CLUSTER, [Say("ab", answers=FIRST), Say()], "ab"),
    "what is dropped is not pushed": (CLUSTER, [Say("ab", answers=FIRST), Say(drop="a", answers=FIRST)], "b"),
    "what is dropped under a wildcard is": (CLUSTER, [Say("*a", answers=FIRST), Say(drop="a", answers=FIRST)], "abc"),
    "all dropped is nothing, no wildcard": (CLUSTER, [Say("a", answers=FIRST), Say(drop="a", answers=FIRST)], ""),
    "what was never wanted may be dropped": (CLUSTER, [Say("a", answers=FIRST), Say(drop="bx", answers=FIRST)], "a"),
    "no endpoints without names": (ENDPOINT, [Say(answers=FIRST)], ""),
    "endpoints by name": (ENDPOINT, [Say("a", answers=FIRST), Say("c", answers=FIRST)], "ac"),
    "an old nonce's names count": (CLUSTER, [Say("a", answers=FIRST), Say("b", answers="old")], "ab"),
    "a refusal's names count": (CLUSTER, [Say("a", answers=FIRST), Say("b", error="no")], "ab"),
    "what is still held is pushed when it changes": (CLUSTER, [Say("ab", answers=FIRST, initial="ab")], "ab"),
    "a wildcard with what is still held": (CLUSTER, [Say(answers=FIRST, initial="ac")], "abc"),
    "only what is wanted of what is held": (CLUSTER, [Say("a", answers=FIRST, initial="ab")], "a"),
}


def pushed(stream: DeltaStream | SotwStream, type_url: str, requests: list[Say]) -> str:
    """The names that come when all have changed, once what came before is accepted."""
    nonces = {"latest": "", "old": "old", "none": ""}
    names: tuple[str, ...] = ()

    def take(answers: list[Answer]) -> None:
        for answer in answers:
            nonces["latest"] = answer.nonce

    for each in requests:
        names = tuple(each.names)
        stream.received(
            Request(
                type_url,
                names,
                tuple(each.drop),
                {name: BEFORE.resources[type_url][name].version for name in each.initial},
                nonces[each.answers],
                each.error,
            )
        )
        take(stream.due(BEFORE))
        # The server sends when what it sent is answered, so it is, by the names that count.
        current = stream.subscriptions[type_url]
        kept = (*sorted(current.names), *("*" if current.is_wildcard and current.has_named else ""))
        if current.in_flight:
            stream.received(Request(type_url, () if isinstance(stream, DeltaStream) else kept, nonce=nonces["latest"]))
            take(stream.due(BEFORE))
    return "".join(resource.name for answer in stream.due(AFTER) for resource in answer.resources)


@pytest.mark.parametrize(("type_url", "requests", "expected"), SOTW.values(), ids=SOTW)
def test_state_of_the_world(type_url: str, requests: list[Say], expected: str) -> None:
    assert pushed(SotwStream(has_catch_all=False), type_url, requests) == expected


@pytest.mark.parametrize(("type_url", "requests", "expected"), DELTA.values(), ids=DELTA)
def test_delta(type_url: str, requests: list[Say], expected: str) -> None:
    assert pushed(DeltaStream(has_catch_all=False), type_url, requests) == expected


def test_who_comes_back_with_what_there_is_is_sent_nothing() -> None:
    """By name and by wildcard; and what is gone meanwhile is taken away."""
    held = {name: BEFORE.resources[CLUSTER][name].version for name in "abc"}
    by_name = DeltaStream(has_catch_all=False)
    by_name.received(Request(CLUSTER, ("a", "b", "c"), initial=held))
    assert by_name.due(BEFORE) == []
    everything = DeltaStream(has_catch_all=False)
    everything.received(Request(CLUSTER, ("*",), initial={**held, "gone": "v"}))
    (first,) = everything.due(BEFORE)
    assert (first.resources, first.removed) == ((), ())
    everything.received(Request(CLUSTER, nonce=first.nonce))
    (second,) = everything.due(BEFORE)
    assert (second.resources, second.removed) == ((), ("gone",))
    (changed,) = by_name.due(AFTER)
    assert [each.name for each in changed.resources] == ["a", "b", "c"]
