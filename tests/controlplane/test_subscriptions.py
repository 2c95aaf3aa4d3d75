"""What does a stream get, in which order, and what not? Rule by rule, without a socket."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from meshlib.controlplane.cache import Encoder, View
from meshlib.controlplane.subscriptions import Answer, DeltaStream, Request, SotwStream
from meshlib.model import (
    CATCH_ALL,
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
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE, SHORT_NAMES


def route_configuration(name: str, cluster: str) -> RouteConfiguration:
    route = Route(RouteMatch(), Forward((WeightedCluster(cluster),)))
    return RouteConfiguration(name, (VirtualHost(name, ("*",), (route,)),))


def view(
    *clusters: str, routes: Iterable[tuple[str, str]] = (), listeners: Iterable[str] = (), ports: int = 80
) -> View:
    """Clusters with one endpoint each, on `ports`; listeners lead to the route configuration `r`."""
    return View(
        Snapshot(
            "",
            tuple(Listener(name, "r") for name in sorted(listeners)),
            tuple(route_configuration(name, cluster) for name, cluster in sorted(routes)),
            tuple(Cluster(name) for name in sorted(clusters)),
            tuple(LoadAssignment(name, (Endpoint("127.0.0.1", ports),)) for name in sorted(clusters)),
        ),
        (),
        Encoder(),
    )


class Client:
    """Asks, and answers what it gets, as either kind of client does."""

    def __init__(self, stream: DeltaStream | SotwStream) -> None:
        self.stream = stream
        self.last: dict[str, Answer] = {}

    def ask(self, type_url: str, *names: str, now: View, **more: object) -> list[str]:
        return self.send(Request(type_url, names, **more), now)  # type: ignore[arg-type]

    def send(self, request: Request, now: View) -> list[str]:
        self.stream.received(request)
        return self.due(now)

    def due(self, now: View) -> list[str]:
        answers = self.stream.due(now)
        self.last.update((answer.type_url, answer) for answer in answers)
        return [told(answer) for answer in answers]

    def ack(self, type_url: str, *names: str, now: View, error: str | None = None) -> list[str]:
        return self.send(Request(type_url, names, nonce=self.last[type_url].nonce, error=error), now)


def told(answer: Answer) -> str:
    """`CDS a b -c`"""
    words = [SHORT_NAMES[answer.type_url], *(each.name for each in answer.resources)]
    return " ".join([*words, *(f"-{name}" for name in answer.removed)])


def delta(*, has_catch_all: bool = False) -> Client:
    return Client(DeltaStream(has_catch_all=has_catch_all))


def sotw(*, has_catch_all: bool = False) -> Client:
    return Client(SotwStream(has_catch_all=has_catch_all))


# Delta


def test_delta_answers_what_is_asked_for_and_no_more() -> None:
    """Not all of a consistent set must be asked for: clients come for what they need (go-control-plane#426)."""
    client, now = delta(), view("a", "b")
    assert client.ask(CLUSTER, "a", now=now) == ["CDS a"]
    assert client.ack(CLUSTER, now=now) == []


def test_delta_says_at_once_what_does_not_exist_and_sends_it_when_it_is_born() -> None:
    """And says it once."""
    client, now = delta(), view("a")
    assert client.ask(CLUSTER, "a", "b", now=now) == ["CDS a -b"]
    assert client.ack(CLUSTER, now=now) == []
    assert client.due(view("a", "b")) == ["CDS b"]


def test_delta_answers_a_name_that_is_asked_for_again() -> None:
    """The client may have forgotten it."""
    client, now = delta(), view("a")
    client.ask(CLUSTER, "a", now=now)
    client.ack(CLUSTER, now=now)
    assert client.ask(CLUSTER, "a", now=now) == ["CDS a"]


def test_delta_sends_only_what_differs_to_a_client_that_reconnects() -> None:
    """Versions are of the content, so they hold across streams and servers."""
    now = view("a", "b")
    has = {name: now.resources[CLUSTER][name].version for name in ("a", "b")}
    assert delta().ask(CLUSTER, "a", "b", now=now, initial=has) == []
    assert delta().ask(CLUSTER, "a", "b", "c", now=now, initial={**has, "a": "older"}) == ["CDS a -c"]
    assert delta().ask(CLUSTER, "a", "gone", now=now, initial={"a": has["a"], "gone": "1"}) == ["CDS -gone"]


def test_delta_a_client_that_has_all_there_is_counts_as_having_accepted_it() -> None:
    """It came from another replica, and is asked what it has by whoever looks for those that are behind."""
    now = view("a")
    client = delta()
    client.ask(CLUSTER, "a", now=now, initial={"a": now.resources[CLUSTER]["a"].version})
    subscription = client.stream.subscriptions[CLUSTER]
    assert (subscription.status, subscription.accepted) == ("SYNCED", now.versions[CLUSTER])


def test_delta_wildcard_gets_everything_and_what_changes() -> None:
    """Without names in the first request, or with the name *."""
    for names in ((), ("*",)):
        client = delta()
        assert client.ask(CLUSTER, *names, now=view("a", "b")) == ["CDS a b"]
        assert client.ack(CLUSTER, now=view("b", "c")) == ["CDS c"]
        assert client.ack(CLUSTER, now=view("b", "c")) == ["CDS -a"]
        assert client.ack(CLUSTER, now=view("b", "c")) == []


def test_delta_wildcard_is_answered_even_when_there_is_nothing() -> None:
    """An Envoy that starts waits for the answer."""
    assert delta().ask(LISTENER, now=view()) == ["LDS"]


def test_delta_unsubscribe_ends_the_pushes_and_a_wildcard_takes_over() -> None:
    """A name that the wildcard covers too is answered (xds_protocol.rst, "unsubscribing from resources")."""
    client = delta()
    client.ask(CLUSTER, "a", "b", now=view("a", "b"))
    client.ack(CLUSTER, now=view("a", "b"))
    assert client.ask(CLUSTER, now=view("a"), unsubscribe=("b",)) == []
    client = delta()
    client.ask(CLUSTER, "*", "a", "x", now=view("a"))
    client.ack(CLUSTER, now=view("a"))
    assert client.ask(CLUSTER, now=view("a"), unsubscribe=("a", "x")) == ["CDS a -x"]
    assert client.ack(CLUSTER, now=view("a"), ) == []  # fmt: skip
    assert client.ask(CLUSTER, now=view("a"), unsubscribe=("*",)) == []
    assert client.due(view("b")) == []


def test_delta_subscriptions_of_a_request_with_an_old_nonce_count() -> None:
    """Only its ACK does not."""
    client, now = delta(), view("a", "b")
    client.ask(CLUSTER, "a", now=now)
    assert client.ask(CLUSTER, "b", now=now, nonce="old") == []
    assert client.ack(CLUSTER, now=now) == ["CDS b"]


# State of the world


def test_sotw_lds_and_cds_are_always_the_whole_set() -> None:
    """What is missing from it is deleted."""
    client = sotw()
    assert client.ask(CLUSTER, now=view("a", "b")) == ["CDS a b"]
    assert client.ack(CLUSTER, now=view("a", "b")) == []
    assert client.due(view("a", "b", "c")) == ["CDS a b c"]


def test_sotw_rds_and_eds_are_what_has_changed() -> None:
    """Absence means nothing there."""
    client, now = sotw(), view("a", "b")
    assert client.ask(ENDPOINT, "a", "b", now=now) == ["EDS a b"]
    changed = View(Snapshot(assignments=(LoadAssignment("a"), now.snapshot.assignments[1])), (), Encoder())
    assert client.ack(ENDPOINT, "a", "b", now=changed) == ["EDS a"]


def test_sotw_a_name_that_is_added_is_answered_though_nothing_has_changed() -> None:
    """And one that is taken away is not."""
    client, now = sotw(), view("a", "b")
    client.ask(ENDPOINT, "a", now=now)
    assert client.ack(ENDPOINT, "a", "b", now=now) == ["EDS b"]
    assert client.ack(ENDPOINT, "b", now=now) == []
    assert client.ack(ENDPOINT, "a", "b", now=now) == ["EDS a"]


def test_sotw_a_missing_assignment_is_an_empty_one() -> None:
    """Without an answer an Envoy waits for it for ever (java-control-plane#127)."""
    client = sotw()
    assert client.ask(ENDPOINT, "gone", now=view()) == ["EDS gone"]
    (resource,) = client.last[ENDPOINT].resources
    assert decode_resource(ENDPOINT, resource.data) == LoadAssignment("gone")
    assert client.ack(ENDPOINT, "gone", now=view()) == []
    assert client.ack(ENDPOINT, "gone", now=view("gone")) == ["EDS gone"]


def test_sotw_a_missing_route_is_remembered_and_sent_when_it_is_born() -> None:
    """SotW has no word for "does not exist" there."""
    client = sotw()
    assert client.ask(ROUTE, "r", now=view()) == []
    assert client.due(view("a", routes=[("r", "a")])) == ["RDS r"]
    assert client.ack(ROUTE, "r", now=view("a")) == []
    assert client.due(view("a", routes=[("r", "a")])) == ["RDS r"]


def test_sotw_a_missing_listener_is_answered_by_a_set_without_it() -> None:
    """So the client need not wait for its timer."""
    assert sotw().ask(LISTENER, "nope:80", now=view()) == ["LDS"]


def test_sotw_no_names_after_names_is_nothing_any_more() -> None:
    """And not a wildcard."""
    client = sotw()
    assert client.ask(CLUSTER, "a", now=view("a", "b")) == ["CDS a"]
    assert client.ack(CLUSTER, now=view("a", "b")) == []
    assert client.due(view("a", "b", "c")) == []


def test_sotw_a_legacy_wildcard_stays_one_and_becomes_named_by_names() -> None:
    """Its ACKs have no names either; a name with * keeps the wildcard."""
    client = sotw()
    client.ask(CLUSTER, now=view("a"))
    assert client.ack(CLUSTER, now=view("a", "b")) == ["CDS a b"]
    assert client.ack(CLUSTER, "*", "x", now=view("a", "b")) == ["CDS a b"]
    assert client.ack(CLUSTER, "b", now=view("a", "b")) == ["CDS b"]


def test_sotw_a_name_given_up_beside_a_wildcard_leaves_the_set() -> None:
    """The wildcard does not cover a host that only another wildcard, a listener's, has brought to life."""
    client, now = sotw(), view("a", routes=[("r", "a")], listeners=["*.example.com:443"])
    assert client.ask(LISTENER, "*", "api.example.com:443", now=now) == ["LDS *.example.com:443 api.example.com:443"]
    assert client.ack(LISTENER, "*", now=now) == ["LDS *.example.com:443"]


def test_sotw_a_request_with_an_old_nonce_is_ignored() -> None:
    """It was sent before the client saw the latest answer, and will be sent again."""
    client = sotw()
    client.ask(ENDPOINT, "a", now=view("a", "b"))
    assert client.ask(ENDPOINT, "a", "b", now=view("a", "b"), nonce="old") == []
    assert client.ack(ENDPOINT, "a", "b", now=view("a", "b")) == ["EDS b"]


@pytest.mark.parametrize("error", [None, "no such field"])
def test_sotw_names_that_come_with_a_refusal_count(error: str | None) -> None:
    """An Envoy puts a new name and a refusal in one request, and does not say the name again."""
    client, now = sotw(), view("a", "b")
    client.ask(ENDPOINT, "a", now=now)
    assert client.ack(ENDPOINT, "a", "b", now=now, error=error) == ["EDS b"]


# Both


@pytest.mark.parametrize("make", [delta, sotw])
def test_a_refusal_is_noted_and_not_answered(make: type[Client]) -> None:
    """To send it again would be refused again, for ever; what has changed is sent."""
    client = make()
    names = ("a",) if make is sotw else ()
    client.ask(CLUSTER, "a", now=view("a"))
    assert client.ack(CLUSTER, *names, now=view("a"), error="no such field") == []
    subscription = client.stream.subscriptions[CLUSTER]
    assert (subscription.status, subscription.error) == ("NACKED", "no such field")
    assert client.due(view("a")) == []
    changed = View(Snapshot(clusters=(Cluster("a", connect_timeout=1.0),)), (), Encoder())
    assert client.due(changed) == ["CDS a"]
    assert subscription.status == "STALE"
    client.ack(CLUSTER, *names, now=changed)
    assert subscription.status == "SYNCED"


@pytest.mark.parametrize("make", [delta, sotw])
def test_a_refusal_stands_until_the_next_answer(make: type[Client]) -> None:
    """A request that only changes the subscription bears the same nonce, and accepts nothing."""
    client, now = make(), view("a", "b")
    client.ask(ENDPOINT, "a", now=now)
    subscription = client.stream.subscriptions[ENDPOINT]
    names = ("a",) if make is sotw else ()
    client.ack(ENDPOINT, *names, now=now)
    accepted = subscription.accepted
    client.due(changed := view("a", "b", ports=81))
    client.ack(ENDPOINT, *names, now=changed, error="no such field")
    assert (subscription.status, subscription.accepted, subscription.version) == (
        "NACKED",
        accepted,
        changed.versions[ENDPOINT],
    )
    client.stream.received(Request(ENDPOINT, names, nonce=client.last[ENDPOINT].nonce))
    assert subscription.status == "NACKED"
    assert client.ack(ENDPOINT, "a", "b", now=changed)[0].startswith("EDS")
    assert subscription.status == "STALE"


@pytest.mark.parametrize("make", [delta, sotw])
def test_one_answer_of_a_type_is_in_flight_and_changes_meanwhile_are_sent_together(make: type[Client]) -> None:
    """A slow client gets the latest, not the history."""
    client = make()
    names = ("a",) if make is sotw else ()
    client.ask(ENDPOINT, "a", now=view("a", ports=1))
    assert client.due(view("a", ports=2)) == []
    assert client.due(view("a", ports=3)) == []
    assert client.ack(ENDPOINT, *names, now=view("a", ports=4)) == ["EDS a"]
    (resource,) = client.last[ENDPOINT].resources
    assignment = decode_resource(ENDPOINT, resource.data)
    assert isinstance(assignment, LoadAssignment)
    assert assignment.endpoints[0].port == 4


def full(make: type[Client], now: View) -> Client:
    """A client like an Envoy, to which all was sent and which has accepted all."""
    client = make()
    client.ask(CLUSTER, now=now)
    client.ask(ENDPOINT, *now.resources[ENDPOINT], now=now)
    client.ask(LISTENER, now=now)
    client.ask(ROUTE, *now.resources[ROUTE], now=now)
    for _ in range(3):
        for type_url, subscription in client.stream.subscriptions.items():
            if subscription.in_flight:
                names = sorted(subscription.names) if make is sotw else ()
                client.ack(type_url, *names, now=now)
    assert {each.status for each in client.stream.subscriptions.values()} <= {"SYNCED", "NOT SENT"}
    return client


@pytest.mark.parametrize("make", [delta, sotw])
def test_a_cluster_goes_only_after_the_route_that_named_it(make: type[Client]) -> None:
    """Make before break: the new cluster first, then the route, and the old cluster when that was accepted."""
    before = view("old", routes=[("r", "old")], listeners=["l"])
    after = view("new", routes=[("r", "new")], listeners=["l"])
    client = full(make, before)
    assert client.due(after) == (["CDS new"] if make is delta else ["CDS new old"])
    # An Envoy asks for the endpoints, and accepts the cluster once it has them. Only then comes the route.
    names = ("new",) if make is delta else ("new", "old")
    assert client.ask(ENDPOINT, *names, now=after, nonce=client.last[ENDPOINT].nonce) == ["EDS new"]
    assert client.ack(ENDPOINT, *(names if make is sotw else ()), now=after) == []
    assert client.ack(CLUSTER, now=after) == ["RDS r"]
    last = client.ack(ROUTE, *(("r",) if make is sotw else ()), now=after)
    assert last == (["CDS -old", "EDS -old"] if make is delta else ["CDS new", "EDS old"])


@pytest.mark.parametrize("make", [delta, sotw])
def test_a_cluster_stays_while_the_route_that_does_without_it_is_refused(make: type[Client]) -> None:
    """The client still uses the old route, and would send its calls nowhere."""
    client = full(make, view("old", "new", routes=[("r", "old")], listeners=["l"]))
    after = view("new", routes=[("r", "new")], listeners=["l"])
    assert client.due(after) == ["RDS r"]
    names = ("r",) if make is sotw else ()
    assert client.ack(ROUTE, *names, now=after, error="no such match") == []
    better = view("new", routes=[("r", "newer")], listeners=["l"])
    assert client.due(better) == ["RDS r"]
    assert client.ack(ROUTE, *names, now=better)[0] == ("CDS -old" if make is delta else "CDS new")


@pytest.mark.parametrize("make", [delta, sotw])
def test_a_refusal_of_what_was_given_up_holds_nothing_back(make: type[Client]) -> None:
    """Nobody uses the old form of it any more, and nothing will come that would end the refusal."""
    client = full(make, view("old", "new", routes=[("r", "old")], listeners=["l"]))
    after = view("new", routes=[("r", "new")], listeners=["l"])
    assert client.due(after) == ["RDS r"]
    assert client.ack(ROUTE, *(("r",) if make is sotw else ()), now=after, error="no such match") == []
    unsubscribe = () if make is sotw else ("r",)
    gone = client.ask(ROUTE, now=after, unsubscribe=unsubscribe, nonce=client.last[ROUTE].nonce)
    assert gone[0] == ("CDS -old" if make is delta else "CDS new")


@pytest.mark.parametrize("make", [delta, sotw])
def test_a_client_that_names_its_clusters_waits_for_nothing(make: type[Client]) -> None:
    """gRPC asks for a cluster because a route names it; it may also give up a type and never answer for it."""
    client, now = make(), view("a", routes=[("r", "a")], listeners=["l"])
    assert client.ask(CLUSTER, "a", now=now) == ["CDS a"]
    assert client.ask(LISTENER, "l", now=now) == ["LDS l"]
    assert client.ask(ROUTE, "r", now=now) == ["RDS r"]


def test_sotw_a_cluster_that_is_gone_stays_for_a_client_that_still_names_it() -> None:
    """C-core's calls take the old cluster until the new one is ready, long after the route was accepted."""
    client = sotw()
    before = view("old", routes=[("r", "old")], listeners=["l"])
    after = view("new", routes=[("r", "new")], listeners=["l"])
    for type_url, name in ((LISTENER, "l"), (ROUTE, "r"), (CLUSTER, "old"), (ENDPOINT, "old")):
        client.ask(type_url, name, now=before)
        client.ack(type_url, name, now=before)
    assert client.due(after) == ["RDS r"]
    assert client.ack(ROUTE, "r", now=after) == []
    nonces = {type_url: client.last[type_url].nonce for type_url in (CLUSTER, ENDPOINT)}
    assert client.ask(CLUSTER, "new", "old", now=after, nonce=nonces[CLUSTER]) == ["CDS new old"]
    assert client.ack(CLUSTER, "new", "old", now=after) == []
    assert client.ask(ENDPOINT, "new", "old", now=after, nonce=nonces[ENDPOINT]) == ["EDS new"]
    assert client.ack(ENDPOINT, "new", "old", now=after) == []
    assert client.ask(ENDPOINT, "new", now=after, nonce=client.last[ENDPOINT].nonce) == []
    assert client.ask(CLUSTER, "new", now=after, nonce=client.last[CLUSTER].nonce) == []


def test_sotw_a_cluster_that_is_gone_and_that_a_route_leads_to_is_taken_away() -> None:
    """Nobody will come to the end of using it: calls shall get 503 as on every other client."""
    client = sotw()
    before = view("old", routes=[("r", "old")], listeners=["l"])
    after = view(routes=[("r", "old")], listeners=["l"])
    for type_url, name in ((LISTENER, "l"), (ROUTE, "r"), (CLUSTER, "old"), (ENDPOINT, "old")):
        client.ask(type_url, name, now=before)
        client.ack(type_url, name, now=before)
    assert client.due(after) == ["CDS", "EDS old"]


@pytest.mark.parametrize("make", [delta, sotw])
def test_a_type_in_flight_holds_back_what_may_name_it(make: type[Client]) -> None:
    """The first push is not answered; the second one brings a cluster and the route to it."""
    client = full(make, view("a", routes=[("r", "a")], listeners=["l"]))
    assert client.due(view("a", "b", routes=[("r", "a")], listeners=["l"]))[0] in ("CDS b", "CDS a b")
    after = view("a", "b", "c", routes=[("r", "c")], listeners=["l"])
    assert client.due(after) == []
    assert client.ack(CLUSTER, now=after)[0] in ("CDS c", "CDS a b c")
    assert client.ack(CLUSTER, now=after) == ["RDS r"]


@pytest.mark.parametrize("make", [delta, sotw])
def test_a_cluster_that_changes_brings_its_endpoints_again(make: type[Client]) -> None:
    """Though they are the same: an Envoy warms the new cluster until they come."""
    before = view("a", "b")
    client = full(make, before)
    changed = (Cluster("a", connect_timeout=1.0), before.snapshot.clusters[1])
    after = View(Snapshot(clusters=changed, assignments=before.snapshot.assignments), (), Encoder())
    assert client.due(after) == ["CDS a" if make is delta else "CDS a b", "EDS a"]
    assert client.ack(ENDPOINT, *(("a", "b") if make is sotw else ()), now=after) == []
    assert client.ack(CLUSTER, now=after) == []


def test_delta_a_cluster_that_changed_while_the_client_was_away_brings_its_endpoints_again() -> None:
    """The client says what endpoints it has only after the cluster was sent, and they are the same."""
    now = view("a")
    has = {name: each.version for name, each in now.resources[ENDPOINT].items()}
    client = delta()
    assert client.ask(CLUSTER, now=now, initial={"a": "older"}) == ["CDS a"]
    assert client.ask(ENDPOINT, "a", now=now, initial=has) == ["EDS a"]
    assert client.ack(CLUSTER, now=now) == client.ack(ENDPOINT, now=now) == []


def test_delta_a_resource_that_is_gone_is_taken_from_a_client_that_knows_no_versions() -> None:
    """It has come from state of the world, where resources have none."""
    client = delta()
    assert client.ask(CLUSTER, "a", "gone", now=view("a"), initial={"a": "", "gone": ""}) == ["CDS a"]
    assert client.ack(CLUSTER, now=view("a")) == ["CDS -gone"]


@pytest.mark.parametrize("make", [delta, sotw])
def test_a_listener_that_no_service_has_is_made_of_a_wildcard_or_the_catch_all(make: type[Client]) -> None:
    """It bears the name that was asked for. Only meshlib's client gets the catch-all."""
    now = view("a", routes=[("r", "a")], listeners=[CATCH_ALL, "*.example.com:443", "*.deep.example.com:443"])
    for name, has_catch_all, route in (
        ("api.example.com:443", False, "r"),
        ("www.python.org:443", True, "r"),
        ("www.python.org:443", False, None),
        ("api.example.com:80", False, None),
    ):
        client = make(has_catch_all=has_catch_all)
        (answer,) = client.ask(LISTENER, name, now=now)
        if route is None:
            assert answer in ("LDS", f"LDS -{name}")
        else:
            assert answer == f"LDS {name}"
            listener = decode_resource(LISTENER, client.last[LISTENER].resources[0].data)
            assert listener == Listener(name, route)


@pytest.mark.parametrize("make", [delta, sotw])
def test_a_type_that_nobody_serves_disturbs_nobody(make: type[Client]) -> None:
    """An Envoy asks for secrets, extensions and more."""
    client = make()
    secret = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
    client.stream.received(Request(secret, ("default",)))
    answers = client.stream.due(view("a"))
    assert [answer.removed for answer in answers] == ([("default",)] if make is delta else [])
    if answers:
        client.stream.received(Request(secret, nonce=answers[0].nonce))
    assert client.ask(CLUSTER, "a", now=view("a")) == ["CDS a"]
