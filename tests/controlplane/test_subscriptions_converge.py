"""Does a client end with exactly what it wants? Random changes, subscriptions, refusals and new streams."""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from meshlib.controlplane.cache import Encoder, View
from meshlib.controlplane.resource import empty_assignment
from meshlib.controlplane.subscriptions import WHOLE_SET, WILDCARD, Answer, DeltaStream, Request, SotwStream
from meshlib.model import (
    CATCH_ALL,
    INBOUND_PREFIX,
    Cluster,
    Endpoint,
    Forward,
    Inbound,
    Listener,
    LoadAssignment,
    Route,
    RouteConfiguration,
    RouteMatch,
    Snapshot,
    TlsMode,
    VirtualHost,
    WeightedCluster,
)
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, PUSH_ORDER, ROUTE

NAMES = {
    CLUSTER: ("a", "b", "c", "x"),
    ENDPOINT: ("a", "b", "c", "x"),
    LISTENER: ("a:80", "www.b.c:80", "nobody:80", INBOUND_PREFIX + "10.0.0.1:80"),
    ROUTE: ("r", "s", "x"),
}
"""Some are never there; a listener may be one with a wildcard in it, or the one for calls that come in."""


def view(
    clusters: list[str], listeners: list[str], routes: list[str], leads_to: str, number: int, inbound: bool
) -> View:
    """number: what the content differs by."""
    route = Route(RouteMatch(), Forward((WeightedCluster(leads_to),)))
    return View(
        Snapshot(
            "",
            tuple(Listener(name, f"r{number}") for name in sorted(listeners)),
            tuple(RouteConfiguration(name, (VirtualHost(str(number), ("*",), (route,)),)) for name in sorted(routes)),
            tuple(Cluster(name, connect_timeout=1.0 + number) for name in sorted(clusters)),
            tuple(LoadAssignment(name, (Endpoint("127.0.0.1", 1 + number),)) for name in sorted(clusters)),
            inbound=(Inbound("i", tls=(TlsMode.STRICT, TlsMode.PERMISSIVE, TlsMode.DISABLE)[number]),)
            if inbound
            else (),
        ),
        (),
        Encoder(),
    )


@st.composite
def views(draw: Any, numbers: tuple[int, ...] = (0, 1)) -> View:
    some = lambda *names: sorted(draw(st.sets(st.sampled_from(names))))  # noqa: E731
    return view(
        some("a", "b", "c"),
        some("a:80", "*.b.c:80", CATCH_ALL),
        some("r", "s"),
        draw(st.sampled_from("abcx")),
        draw(st.sampled_from(numbers)),
        draw(st.booleans()),
    )


class Client:
    """Holds what it was sent, and says what it wants; as little as xDS lets a client do. version of each resource."""

    def __init__(self, delta: bool) -> None:
        self.delta = delta
        self.names: dict[str, set[str]] = {}
        self.held: dict[str, dict[str, str]] = {type_url: {} for type_url in PUSH_ORDER}
        self.connect()

    def connect(self) -> None:
        """A new stream: nonces and subscriptions are gone, what it holds is not."""
        self.nonces: dict[str, str] = {}
        self.stream = DeltaStream(has_catch_all=True) if self.delta else SotwStream(has_catch_all=True)
        self.requests: deque[Request] = deque()
        self.answers: deque[Answer] = deque()
        self.asked: set[str] = set()
        """The types that were asked for on this stream. Never without names at first: that would be a wildcard."""
        for type_url, names in self.names.items():
            held = self.held[type_url]
            if not names:
                continue
            self.asked.add(type_url)
            self.requests.append(Request(type_url, tuple(sorted(names)), initial=dict(held) if self.delta else {}))

    def want(self, type_url: str, names: set[str]) -> None:
        before, self.names[type_url] = self.names.get(type_url, set()), names
        if WILDCARD not in names:
            self.held[type_url] = {name: at for name, at in self.held[type_url].items() if name in names}
        if type_url not in self.asked:
            if names:
                self.asked.add(type_url)
                self.requests.append(Request(type_url, tuple(sorted(names))))
        elif self.delta:
            self.requests.append(Request(type_url, tuple(sorted(names - before)), tuple(sorted(before - names))))
        else:
            self._say(type_url)

    def _say(self, type_url: str, error: str | None = None) -> None:
        names = () if self.delta else tuple(sorted(self.names[type_url]))
        self.requests.append(Request(type_url, names, nonce=self.nonces.get(type_url, ""), error=error))

    def receive(self, answer: Answer, refuse: bool) -> None:
        wanted, held = self.names[answer.type_url], self.held[answer.type_url]
        came = {each.name: each.version for each in answer.resources if each.name in wanted or WILDCARD in wanted}
        if not refuse:
            if not self.delta and answer.type_url in WHOLE_SET:
                held.clear()
            held.update(came)
        for name in answer.removed:
            held.pop(name, None)
        self.nonces[answer.type_url] = answer.nonce
        self._say(answer.type_url, "refused" if refuse else None)


def expected(client: Client, type_url: str, now: View) -> dict[str, str]:
    names = client.names[type_url]
    found = {name: now.find(type_url, name, has_catch_all=True) for name in names - {WILDCARD}}
    if WILDCARD in names:
        found.update(now.resources[type_url])
    return {name: resource.version for name, resource in found.items() if resource is not None}


def check(client: Client, now: View) -> None:
    for type_url in client.names:
        held, wanted = dict(client.held[type_url]), expected(client, type_url, now)
        if not client.delta:
            # State of the world can't say that endpoints or a route are not there: the ones are empty then, and the
            # other ends with what names it. A cluster may stay for who names it while no route leads to it (rule 13).
            for name in held.keys() - wanted.keys() - now.routed:
                is_named = WILDCARD not in client.names.get(CLUSTER, {WILDCARD})
                if type_url == ROUTE or held[name] == empty_assignment(name).version or is_named:
                    del held[name]
            for name in held.keys() - wanted.keys():
                if type_url == ROUTE or held[name] == empty_assignment(name).version:
                    del held[name]
        assert held == wanted, type_url


@settings(max_examples=60, derandomize=True)
@given(st.booleans(), st.lists(views(), min_size=1, max_size=5), views(numbers=(2,)), st.data())
def test_a_client_ends_with_exactly_what_it_wants(delta: bool, changes: list[View], last: View, data: Any) -> None:
    """Whatever was changed, asked for, given up, refused or cut off before. What was refused comes when it has changed,
    so at last all of it does."""
    client, now, upcoming = Client(delta), changes[0], deque(changes[1:])
    for _ in range(data.draw(st.integers(5, 40))):
        kinds = (
            ["want", "want", "connect"] + ["ask"] * 3 * bool(client.requests) + ["answer"] * 3 * bool(client.answers)
        )
        step = data.draw(st.sampled_from(kinds + ["change"] * bool(upcoming)))
        if step == "ask":
            client.stream.received(client.requests.popleft())
        elif step == "answer":
            answer = client.answers.popleft()
            client.receive(answer, refuse=bool(answer.resources) and data.draw(st.integers(0, 4)) == 0)
        elif step == "change":
            now = upcoming.popleft()
        elif step == "connect":
            client.connect()
        else:
            type_url = data.draw(st.sampled_from(PUSH_ORDER))
            choice = (*NAMES[type_url], *([WILDCARD] if type_url in WHOLE_SET else []))
            names = data.draw(st.sets(st.sampled_from(choice), min_size=type_url not in client.names))
            client.want(type_url, names)
        if step != "answer":
            client.answers.extend(client.stream.due(now))
    now = last
    for _ in range(200):
        client.answers.extend(client.stream.due(now))
        if client.requests:
            client.stream.received(client.requests.popleft())
        elif client.answers:
            client.receive(client.answers.popleft(), refuse=False)
        else:
            break
    else:
        raise AssertionError("it does not come to rest")
    check(client, now)
