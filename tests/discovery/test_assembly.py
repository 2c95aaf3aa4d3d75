"""Consistent Snapshots from resources that arrive in any order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.feed import hosts, ports, world
from meshlib.discovery.assembly import REMOVAL_GRACE, Assembly
from meshlib.model import Access, DirectResponse, FilterChain, Forward, Listener, Mirror, Quota, QuotaService, Snapshot
from meshlib.xds.decode import decode_resource
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE
from meshlib.xds.session import DOES_NOT_EXIST_TIMEOUT, Resource, Response, Session
from snapshots import resources_of

NOTHING = Snapshot()


class Process:
    """A client that wants hosts, and a server's resources as they arrive."""

    def __init__(self, *wanted: str, wildcard: bool = False, delta: bool = True) -> None:
        self.session = Session(decode_resource, delta=delta, wildcard=(LISTENER, CLUSTER) if wildcard else ())
        self.assembly = Assembly(self.session, wildcard=wildcard)
        self.wanted = wanted
        self.now = 0.0
        self.count = 0
        self.session.stream_opened()
        self.session.stream_ready(0.0)
        self.snapshot = self.update()

    def update(self) -> Snapshot:
        self.session.expire(self.now)
        self.snapshot = self.assembly.update(self.wanted, "1", self.now)
        assert self.snapshot.inconsistencies() == ()
        self.session.requests(self.now)
        return self.snapshot

    def arrive(self, type_url: str, given: Snapshot = NOTHING, removed: tuple[str, ...] = ()) -> Snapshot:
        """Everything of a type in `given`."""
        self.count += 1
        resources = tuple(
            Resource(type_url, name, str(self.count), data) for name, data in resources_of(given)[type_url].items()
        )
        self.session.received(Response(type_url, f"n{self.count}", "1", resources, removed), self.now)
        return self.update()

    def arrive_all(self, given: Snapshot) -> Snapshot:
        for type_url in (LISTENER, ROUTE, CLUSTER, ENDPOINT):
            self.arrive(type_url, given)
        return self.snapshot

    def subscribed(self, type_url: str) -> list[str]:
        return self.session.names(type_url)


def cluster_name(snapshot: Snapshot) -> str:
    return snapshot.clusters[0].name


def test_a_host_is_followed_down_to_its_endpoints_and_then_published() -> None:
    """Listener, routes, clusters, endpoints: each is asked for when its parent names it; nothing half is shown."""
    given = world("b:80")
    process = Process("b:80")
    for type_url, then, name in (
        (LISTENER, ROUTE, "routes of b:80"),
        (ROUTE, CLUSTER, cluster_name(given)),
        (CLUSTER, ENDPOINT, cluster_name(given)),
    ):
        assert not hosts(process.arrive(type_url, given))
        assert process.subscribed(then) == [name]
    assert process.arrive(ENDPOINT, given).same_content(given)


def test_a_route_that_answers_by_itself_leads_to_the_cluster_that_limits_it() -> None:
    """And a gateway's listener to the routes by which it asks who counts for it."""
    given = world("b:80")
    (routes,) = given.route_configurations
    (host,) = routes.virtual_hosts
    answers = replace(host.routes[0], action=DirectResponse(200), limited_by=cluster_name(given))
    limited = replace(routes, virtual_hosts=(replace(host, routes=(answers,)),))
    assert hosts(Process("b:80").arrive_all(replace(given, route_configurations=(limited,)))) == ["b:80"]

    counts = QuotaService("envoy", "b:80", "shop", route_configuration=routes.name)
    access = Access(quotas=(Quota("q", counts),))
    door = Listener("door", "", "0.0.0.0", 80, (FilterChain(routes.name),), access)
    own = replace(routes, name="own")
    process = Process(wildcard=True)
    shown = process.arrive_all(
        replace(
            given,
            listeners=(replace(door, filter_chains=(FilterChain("own"),)),),
            route_configurations=(own, routes),
        )
    )
    assert process.subscribed(ROUTE) == sorted(["own", routes.name])
    assert [each.name for each in shown.route_configurations] == sorted(["own", routes.name])


def test_one_slow_host_does_not_hold_back_the_others() -> None:
    """A listener waits for what it leads to, and for nothing else."""
    given = world("b:80", "c:80")
    process = Process("b:80", "c:80")
    for type_url in (LISTENER, ROUTE, CLUSTER):
        process.arrive(type_url, given)
    process.arrive(ENDPOINT, world("c:80"))
    assert hosts(process.snapshot) == ["c:80"]
    process.arrive(ENDPOINT, given)
    assert hosts(process.snapshot) == ["b:80", "c:80"]


def test_a_new_route_waits_for_its_cluster_while_the_old_one_serves() -> None:
    """Make before break, though the server sends the route first."""
    old, new = world("b:80", subset="v1"), world("b:80", subset="v2", port=2)
    process = Process("b:80")
    process.arrive_all(old)
    assert process.arrive(ROUTE, new).same_content(old)
    assert process.arrive(CLUSTER, new).same_content(old)
    assert set(process.subscribed(CLUSTER)) == {cluster_name(old), cluster_name(new)}
    assert process.arrive(ENDPOINT, new).same_content(new)
    assert process.subscribed(CLUSTER) == process.subscribed(ENDPOINT) == [cluster_name(new)]


def test_a_cluster_that_goes_before_its_route_serves_for_a_moment() -> None:
    """A server may remove a cluster before the last route to it: in use, it stays for the grace."""
    old, new = world("b:80", subset="v1"), world("b:80", subset="v2", port=2)
    process = Process("b:80")
    process.arrive_all(old)
    assert process.arrive(CLUSTER, removed=(cluster_name(old),)).same_content(old)
    assert process.assembly.next_deadline == REMOVAL_GRACE
    process.arrive(ROUTE, new)
    process.arrive(CLUSTER, new)
    assert process.arrive(ENDPOINT, new).same_content(new)
    assert process.assembly.next_deadline is None


def test_a_cluster_that_is_gone_for_good_leaves_its_route_behind() -> None:
    """After the grace the route names a cluster that is not there: calls get 503 NC, as with Envoy."""
    given = world("b:80")
    process = Process("b:80")
    process.arrive_all(given)
    process.arrive(CLUSTER, removed=(cluster_name(given),))
    process.now = REMOVAL_GRACE
    snapshot = process.update()
    assert (hosts(snapshot), snapshot.clusters, snapshot.assignments) == (["b:80"], (), ())


def test_a_listener_that_is_removed_is_gone_at_once() -> None:
    """Nothing above it needs a grace; the name is absent, and what it led to is given up."""
    process = Process("b:80")
    process.arrive_all(world("b:80"))
    snapshot = process.arrive(LISTENER, removed=("b:80",))
    assert (hosts(snapshot), snapshot.absent, snapshot.clusters) == ([], ("b:80",), ())
    assert process.subscribed(ROUTE) == process.subscribed(CLUSTER) == process.subscribed(ENDPOINT) == []


def test_a_host_of_which_nothing_is_said_is_absent_in_the_end() -> None:
    """The session's timer settles it."""
    process = Process("b:80")
    assert process.snapshot.absent == ()
    process.now = DOES_NOT_EXIST_TIMEOUT
    assert process.update().absent == ("b:80",)


@pytest.mark.parametrize(
    ("silent", "expected"),
    [(ROUTE, ("b:80", 0, 0, 0)), (CLUSTER, ("b:80", 1, 0, 0)), (ENDPOINT, ("b:80", 1, 1, 1))],
    ids=["routes", "cluster", "endpoints"],
)
def test_nothing_waits_for_ever(silent: str, expected: tuple[str, int, int, int]) -> None:
    """What the server never sends counts as empty: no routes (404), no cluster (503 NC), no endpoints (503 UH)."""
    given = world("b:80")
    process = Process("b:80")
    for type_url in (LISTENER, ROUTE, CLUSTER, ENDPOINT):
        if type_url == silent:
            break
        process.arrive(type_url, given)
    assert not hosts(process.snapshot)
    process.now = DOES_NOT_EXIST_TIMEOUT
    snapshot = process.update()
    assert (
        *hosts(snapshot),
        sum(len(each.virtual_hosts) for each in snapshot.route_configurations),
        len(snapshot.clusters),
        len(snapshot.assignments),
    ) == expected
    assert ports(snapshot) == []


def test_mirrors_are_followed_too() -> None:
    """A route's mirror is a cluster like any other."""
    given, mirrored = world("b:80"), world("m:80")
    host = given.route_configurations[0].virtual_hosts[0]
    action = host.routes[0].action
    assert isinstance(action, Forward)
    routes = replace(host.routes[0], action=replace(action, mirrors=(Mirror(cluster_name(mirrored)),)))
    configuration = replace(given.route_configurations[0], virtual_hosts=(replace(host, routes=(routes,)),))
    process = Process("b:80")
    process.arrive_all(replace(given, route_configurations=(configuration,)))
    assert not hosts(process.snapshot)
    assert cluster_name(mirrored) in process.subscribed(CLUSTER)
    process.arrive(CLUSTER, mirrored)
    assert hosts(process.arrive(ENDPOINT, mirrored)) == ["b:80"]


def test_hosts_may_share_what_they_lead_to() -> None:
    """One of two listeners with the same routes goes; the routes stay."""
    given = world("b:80")
    alias = replace(given, listeners=(*given.listeners, Listener("z:80", "routes of b:80")))
    process = Process("b:80", "z:80")
    process.arrive_all(alias)
    assert process.snapshot.same_content(alias)
    process.wanted = ("z:80",)
    assert hosts(process.update()) == ["z:80"]
    assert len(process.snapshot.route_configurations) == len(process.snapshot.clusters) == 1


def test_a_gateway_gets_all_and_its_snapshot_is_complete() -> None:
    """Wildcard: clusters that no route names are kept as well; complete once the listeners are known."""
    given = world("b:80", "c:80")
    process = Process(wildcard=True)
    assert not process.snapshot.complete
    process.arrive(CLUSTER, given)
    process.arrive(ENDPOINT, given)
    bound = Listener("0.0.0.0_8080", address="0.0.0.0", port=8080, filter_chains=(FilterChain("routes of b:80"),))
    process.arrive(LISTENER, Snapshot(listeners=(bound,)))
    snapshot = process.arrive(ROUTE, world("b:80"))
    assert snapshot.complete
    assert snapshot.listeners == (bound,)
    assert len(snapshot.clusters) == len(snapshot.assignments) == 2


def test_what_did_not_change_is_the_same_object() -> None:
    """So whoever compiles a Snapshot can take over what he has by reference."""
    given = world("b:80", "c:80")
    process = Process("b:80", "c:80")
    before = process.arrive_all(given)
    after = process.arrive(ENDPOINT, replace(world("b:80", port=9)))
    assert [a is b for a, b in zip(after.clusters, before.clusters, strict=True)] == [True, True]
    assert [a is b for a, b in zip(after.assignments, before.assignments, strict=True)] == [False, True]


worlds = [
    world("b:80", subset="v1"),
    world("b:80", subset="v2", port=2),
    world("b:80", "c:80", subset="v1", port=3),
    world("c:80", subset="v2", port=4),
    Snapshot(),
]
steps = st.tuples(
    st.sampled_from([LISTENER, ROUTE, CLUSTER, ENDPOINT]), st.sampled_from(worlds), st.sampled_from([0.0, 0.5, 3.0])
)


@given(
    wildcard=st.booleans(),
    story=st.lists(steps, max_size=20),
    last=st.sampled_from(worlds),
    order=st.permutations([LISTENER, ROUTE, CLUSTER, ENDPOINT]),
)
def test_every_snapshot_is_consistent_and_the_end_is_the_servers(
    wildcard: bool, story: list[tuple[str, Snapshot, float]], last: Snapshot, order: list[str]
) -> None:
    """Whatever arrives in whatever order (each `update` checks consistency), in the end stands what the server has."""
    process = Process(*(() if wildcard else ("b:80", "c:80")), wildcard=wildcard)

    def arrive(type_url: str, sent: Snapshot) -> None:
        gone = sorted(set(process.session.names(type_url)) - set(resources_of(sent)[type_url]))
        process.arrive(type_url, sent, tuple(gone))

    for type_url, sent, pause in story:
        arrive(type_url, sent)
        process.now += pause
    for _ in range(2):  # what is asked for late is answered late
        for type_url in order:
            arrive(type_url, last)
    for type_url in (LISTENER, ROUTE, CLUSTER, ENDPOINT):
        arrive(type_url, last)
    process.now += REMOVAL_GRACE + DOES_NOT_EXIST_TIMEOUT
    process.update()
    expected = set(hosts(last))
    assert set(hosts(process.snapshot)) == expected
    assert process.snapshot.clusters == last.clusters
    assert process.snapshot.assignments == last.assignments
    if not wildcard:
        assert set(process.snapshot.absent) == {"b:80", "c:80"} - expected
