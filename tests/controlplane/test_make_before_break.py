"""Does an Envoy ever hold a route that leads nowhere? Random changes, against a model of Envoy's cluster warming."""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshlib.controlplane.cache import Encoder, View
from meshlib.controlplane.subscriptions import Answer, DeltaStream, Request, SotwStream
from meshlib.model import (
    Cluster,
    Endpoint,
    Forward,
    Listener,
    LoadAssignment,
    Route,
    RouteConfiguration,
    RouteMatch,
    Snapshot,
    VirtualHost,
    WeightedCluster,
)
from meshlib.xds.decode import decode_resource
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE

ENCODER = Encoder()


@st.composite
def views(draw: Any) -> View:
    """A few clusters, each in one of two versions and with one of two sets of endpoints, and a route to one of them."""
    names = sorted(draw(st.sets(st.sampled_from("abcd"), min_size=1)))
    route = Route(RouteMatch(), Forward((WeightedCluster(draw(st.sampled_from(names))),)))
    return View(
        Snapshot(
            "",
            (Listener("l", "r"),),
            (RouteConfiguration("r", (VirtualHost("r", ("*",), (route,)),)),),
            tuple(Cluster(name, connect_timeout=float(draw(st.integers(1, 2)))) for name in names),
            tuple(LoadAssignment(name, (Endpoint("127.0.0.1", draw(st.integers(1, 2))),)) for name in names),
        ),
        (),
        ENCODER,
    )


class Envoy:
    """As much of an Envoy as matters here: all clusters and listeners, endpoints by cluster, routes by listener.

    A new cluster is used when its endpoints have come; a changed one takes the place of the old when they have come
    again. While a cluster is taken in, the request for its endpoints is sent before the cluster is accepted.
    """

    def __init__(self, delta: bool) -> None:
        self.delta = delta
        self.clusters: dict[str, Any] = {}
        self.warming: set[str] = set()
        self.active: set[str] = set()
        self.assignments: dict[str, Any] = {}
        self.route = ""
        self.nonces: dict[str, str] = {}
        self.named: dict[str, set[str]] = {ENDPOINT: set(), ROUTE: set()}
        self.out: deque[Request] = deque()
        self._say(CLUSTER)

    def _say(self, type_url: str, new: Any = (), gone: Any = (), nonce: str = "", error: str | None = None) -> None:
        names = tuple(sorted(new if self.delta else self.named.get(type_url, ())))
        nonce = nonce if self.delta else self.nonces.get(type_url, "")
        self.out.append(Request(type_url, names, tuple(sorted(gone)) if self.delta else (), {}, nonce, error))

    def receive(self, answer: Answer, refuse: bool) -> None:
        type_url = answer.type_url
        is_first = type_url not in self.nonces
        values = {each.name: decode_resource(type_url, each.data) for each in answer.resources}
        refuse = refuse and type_url == ROUTE and not is_first
        if type_url == CLUSTER:
            gone = set(answer.removed) if self.delta else self.clusters.keys() - values.keys()
            new = values.keys() - self.clusters.keys()
            self.warming |= {name for name, value in values.items() if self.clusters.get(name) != value}
            self.clusters.update(values)
            for name in gone:
                self.clusters.pop(name, None)
                self.active.discard(name)
                self.warming.discard(name)
            if new or gone:
                self.named[ENDPOINT] = set(self.clusters)
                self._say(ENDPOINT, new, gone)
        elif type_url == ENDPOINT:
            # One that does not exist is one without endpoints (Envoy's eds.cc, "Missing ClusterLoadAssignment").
            for name in {*values, *answer.removed} & self.clusters.keys():
                self.warming.discard(name)
                self.active.add(name)
            self.assignments.update(values)
        elif type_url == ROUTE and not refuse:
            (value,) = values.values()
            assert isinstance(value, RouteConfiguration)
            action = value.virtual_hosts[0].routes[0].action
            assert isinstance(action, Forward)
            self.route = action.clusters[0].cluster
        self.nonces[type_url] = answer.nonce
        self._say(type_url, nonce=answer.nonce, error="refused" if refuse else None)
        # An Envoy asks for listeners when its first clusters are warm, and for routes when it has listeners.
        if type_url == ENDPOINT and not self.warming and LISTENER not in self.nonces and not self._asked(LISTENER):
            self._say(LISTENER)
        if type_url == LISTENER and is_first:
            self.named[ROUTE] = {"r"}
            self._say(ROUTE, {"r"})

    def _asked(self, type_url: str) -> bool:
        return any(request.type_url == type_url for request in self.out)


@given(st.booleans(), st.lists(views(), min_size=1, max_size=6), st.data())
def test_a_route_never_leads_to_a_cluster_that_is_not_warm(delta: bool, changes: list[View], data: Any) -> None:
    """Whoever is slow, whatever comes between; and in the end the Envoy has what there is, in finitely many steps."""
    stream = DeltaStream(has_catch_all=False) if delta else SotwStream(has_catch_all=False)
    envoy, wire = Envoy(delta), deque[Answer]()
    view, upcoming, refused = changes[0], deque(changes[1:]), False
    for _ in range(400):
        can = [
            name
            for name, what in (("ask", envoy.out), ("answer", wire), ("change", upcoming if envoy.route else ()))
            if what
        ]
        if not can:
            break
        step = data.draw(st.sampled_from(can))
        if step == "ask":
            stream.received(envoy.out.popleft())
        elif step == "change":
            view = upcoming.popleft()
        else:
            refused = data.draw(st.integers(0, 4)) == 0
            envoy.receive(wire.popleft(), refused)
            assert not envoy.route or envoy.route in envoy.active
        if step != "answer":
            wire.extend(stream.due(view))
        assert len(wire) <= len(stream.subscriptions)
    else:
        raise AssertionError("it does not come to rest")
    assert not envoy.warming
    has_newest_route = not stream.subscriptions[ROUTE].error
    assert {name: envoy.clusters[name] for name in view.resources[CLUSTER]} == {
        each.name: each for each in view.snapshot.clusters
    }
    assert {name: envoy.assignments[name] for name in view.resources[ENDPOINT]} == {
        each.cluster: each for each in view.snapshot.assignments
    }
    if has_newest_route:
        assert envoy.active == envoy.clusters.keys() == view.resources[CLUSTER].keys()
        action = view.snapshot.route_configurations[0].virtual_hosts[0].routes[0].action
        assert isinstance(action, Forward)
        assert envoy.route == action.clusters[0].cluster
