"""Is everything made once, and shared by all who see the same?"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from meshlib.controlplane.ads import delta_response, sotw_response
from meshlib.controlplane.cache import KEYS_LIMIT, RENAMED_LIMIT, VIEWS_LIMIT, Cache, Encoder, View
from meshlib.controlplane.kinds import find_kind
from meshlib.controlplane.subscriptions import Answer
from meshlib.istio.parse import parse_text
from meshlib.istio.resources import Object
from meshlib.istio.translate import Translation
from meshlib.model import CATCH_ALL, Cluster, Listener, Locality, Node, NodeKind, Snapshot, Workload
from meshlib.xds import messages as m
from meshlib.xds.decode import decode_resource
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, PUSH_ORDER

SERVICES = """
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: default}
spec: {selector: {app: reviews}, ports: [{name: http, port: 9080}]}
---
apiVersion: v1
kind: Service
metadata: {name: ratings, namespace: default}
spec: {selector: {app: ratings}, ports: [{name: http, port: 9080}]}
"""
FOR_JASON = """
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: default}
spec:
  hosts: [reviews]
  http:
  - match: [{sourceLabels: {tester: jason}}]
    timeout: 1s
    route: [{destination: {host: reviews}}]
  - route: [{destination: {host: reviews}}]
"""


def objects(text: str) -> tuple[Object, ...]:
    parsed = parse_text(text, "test.yaml")
    assert not parsed.problems
    return tuple(parsed.objects)


def node(name: str = "caller", *, kind: NodeKind = NodeKind.SIDECAR, namespace: str = "default", **labels: str) -> Node:
    return Node(name, Workload(name, namespace, labels=tuple(sorted(labels.items()))), kind)


def endpoint(port: int) -> Workload:
    return Workload("reviews-v1", service="reviews", labels=(("app", "reviews"),), address="127.0.0.1", port=port)


class Counted:
    """A translation that counts, waits for permission where told to, and says what it is told to."""

    def __init__(self) -> None:
        self.count = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.has_begun = threading.Event()
        self.make: Callable[[Node], Snapshot] = lambda _: Snapshot(clusters=(Cluster("a"),))

    def __call__(self, found: tuple[Object, ...], workloads: tuple[Workload, ...], who: Node) -> Translation:
        self.count += 1
        found_now = self.make(who)
        self.has_begun.set()
        assert self.may_go_on.wait(10)
        return Translation(found_now, ())


async def test_nodes_that_see_the_same_share_a_view() -> None:
    """Only the labels that some object asks for tell nodes apart."""
    cache = Cache()
    await cache.update(objects(SERVICES + FOR_JASON), (), ())
    one, other = await cache.view(node("one", app="a")), await cache.view(node("other", app="b"))
    jason = await cache.view(node("jason", app="a", tester="jason"))
    assert one is other
    assert jason is not one


async def test_views_share_the_bytes_of_what_they_have_in_common() -> None:
    """A resource is serialised once for all views, and for all versions until it changes."""
    cache = Cache()
    await cache.update(objects(SERVICES + FOR_JASON), (endpoint(1),), ())
    plain, jason = await cache.view(node("plain")), await cache.view(node("jason", tester="jason"))
    name = "outbound|9080||reviews.default.svc.cluster.local"
    for type_url in (CLUSTER, ENDPOINT):
        assert plain.resources[type_url][name] is jason.resources[type_url][name]
    await cache.update(objects(SERVICES + FOR_JASON), (endpoint(2),), [node("plain"), node("jason", tester="jason")])
    later = await cache.view(node("plain"))
    assert later.resources[CLUSTER][name] is plain.resources[CLUSTER][name]
    assert later.resources[ENDPOINT][name] is not plain.resources[ENDPOINT][name]
    assert later.versions[CLUSTER] == plain.versions[CLUSTER]
    assert later.versions[ENDPOINT] != plain.versions[ENDPOINT]


def test_a_response_is_joined_from_bytes_that_are_made_once() -> None:
    """And is what protobuf would have made of it."""
    view = View(Snapshot(clusters=(Cluster("a"), Cluster("b"))), (), Encoder())
    resources = tuple(view.resources[CLUSTER].values())
    assert resources[0].in_delta_response is resources[0].in_delta_response
    answer = Answer(CLUSTER, "7", "n", resources, ("gone",))
    sotw = m.DiscoveryResponse.FromString(sotw_response(answer))
    assert [each.value for each in sotw.resources] == [each.data for each in resources]
    assert (sotw.version_info, sotw.nonce, sotw.type_url) == ("7", "n", CLUSTER)
    delta = m.DeltaDiscoveryResponse.FromString(delta_response(answer))
    assert [(each.name, each.version, each.resource.value) for each in delta.resources] == [
        (each.name, each.version, each.data) for each in resources
    ]
    assert (delta.nonce, delta.type_url, list(delta.removed_resources)) == ("n", CLUSTER, ["gone"])


async def test_two_views_that_differ_in_a_resource_are_both_remembered() -> None:
    """Else each change of anything would serialise it anew for both."""
    encoder = Encoder()
    one, other = Cluster("a"), Cluster("a", connect_timeout=1.0)
    first = View(Snapshot(clusters=(one,)), (), encoder), View(Snapshot(clusters=(other,)), (), encoder)
    encoder.keep_only(first)
    second = View(Snapshot(clusters=(one,)), (), encoder), View(Snapshot(clusters=(other,)), (), encoder)
    for before, after in zip(first, second, strict=True):
        assert after.resources[CLUSTER]["a"] is before.resources[CLUSTER]["a"]


async def test_what_no_view_has_is_forgotten() -> None:
    """A control plane runs for months."""
    encoder = Encoder()
    gone = View(Snapshot(clusters=(Cluster("gone"),)), (), encoder)
    kept = View(Snapshot(clusters=(Cluster("kept"),)), (), encoder)
    encoder.keep_only([kept])
    assert encoder(CLUSTER, "kept", Cluster("kept")) is kept.resources[CLUSTER]["kept"]
    assert encoder(CLUSTER, "gone", Cluster("gone")) is not gone.resources[CLUSTER]["gone"]


async def test_clients_that_come_and_go_do_not_fill_the_memory() -> None:
    """Nothing changes in the mesh for days, and jobs of ever new names and namespaces look in."""
    cache = Cache()
    await cache.update(objects(SERVICES + FOR_JASON), (), [node("stays")])
    stays = await cache.view(node("stays"))
    for number in range(VIEWS_LIMIT + 10):
        await cache.view(node("job", namespace=f"n{number}", tester=f"t{number}", job=f"j{number}"))
        assert await cache.view(node("stays")) is stays
    assert len(cache._views) <= VIEWS_LIMIT + 1
    assert len(cache._keys) <= KEYS_LIMIT


async def test_versions_are_of_the_content() -> None:
    """So a control plane that was restarted, or another one, has nothing to send."""
    views = []
    for _ in range(2):
        cache = Cache()
        await cache.update(objects(SERVICES), (endpoint(1),), ())
        views.append(await cache.view(node()))
    assert views[0].versions == views[1].versions
    assert views[0].resources == views[1].resources
    assert set(views[0].versions) == set(PUSH_ORDER)


async def test_a_change_that_changes_nothing_keeps_the_view() -> None:
    """The streams have nothing to compare then."""
    cache, who = Cache(), node()
    await cache.update(objects(SERVICES), (), [who])
    before = await cache.view(who)
    await cache.update(objects("# the same\n" + SERVICES), (), [who])
    assert await cache.view(who) is before


async def test_a_change_is_told_when_the_new_views_are_there() -> None:
    """And no more to those who have stopped listening."""
    cache, who, told = Cache(), node(), []
    forget = cache.on_change(lambda: told.append(len(cache._views)))
    await cache.update(objects(SERVICES), (), [who])
    assert told == [1]
    forget()
    await cache.update((), (), [who])
    assert told == [1]


async def test_those_who_come_at_once_wait_for_one_translation() -> None:
    """As all do after a restart."""
    translate = Counted()
    cache = Cache(translate)
    translate.may_go_on.clear()
    waiting = [asyncio.create_task(cache.view(node(str(i)))) for i in range(20)]
    await asyncio.to_thread(translate.has_begun.wait, 10)
    waiting[0].cancel()  # who gives up takes nothing from the others
    translate.may_go_on.set()
    views = await asyncio.gather(*waiting[1:])
    assert translate.count == 1
    assert len(set(map(id, views))) == 1


async def test_a_view_that_was_outdated_while_it_was_made_is_made_again() -> None:
    """Nobody is told old news as the latest."""
    translate = Counted()
    cache = Cache(translate)
    translate.may_go_on.clear()
    translate.make = lambda _: Snapshot(clusters=(Cluster("old"),))
    waiting = asyncio.create_task(cache.view(node()))
    await asyncio.to_thread(translate.has_begun.wait, 10)
    await cache.update(objects(SERVICES), (), ())
    translate.make = lambda _: Snapshot(clusters=(Cluster("new"),))
    translate.may_go_on.set()
    assert list((await waiting).resources[CLUSTER]) == ["new"]
    assert translate.count == 2


async def test_a_translation_that_fails_fails_for_those_who_wait_and_is_tried_again() -> None:
    """A defect of ours must not stick."""
    translate = Counted()

    def fail(_: Node) -> Snapshot:
        raise RuntimeError("a defect")

    good, translate.make = translate.make, fail
    cache = Cache(translate)
    for result in await asyncio.gather(*(cache.view(node()) for _ in range(3)), return_exceptions=True):
        assert isinstance(result, RuntimeError)
    translate.make = good
    assert list((await cache.view(node())).resources[CLUSTER]) == ["a"]


def test_a_listener_is_found_by_its_name_then_by_wildcard_then_as_the_catch_all() -> None:
    """Each bears the name that was asked for."""
    view = View(
        Snapshot(
            listeners=(
                Listener(CATCH_ALL, "any"),
                Listener("*.com:443", "com"),
                Listener("*.example.com:443", "example"),
                Listener("api.example.com:443", "api"),
            )
        ),
        (),
        Encoder(),
    )
    for name, route in (
        ("api.example.com:443", "api"),
        ("www.example.com:443", "example"),
        ("www.other.com:443", "com"),
        ("www.example.com:80", "any"),
        ("[::1]:443", "any"),
    ):
        found = view.find(LISTENER, name, has_catch_all=True)
        assert found is not None
        assert decode_resource(LISTENER, found.data) == Listener(name, route)
        assert view.find(LISTENER, name, has_catch_all=True) is found
    assert view.find(LISTENER, "www.example.com:80", has_catch_all=False) is None


def test_names_that_clients_make_up_do_not_fill_the_memory() -> None:
    """A crawler calls every host there is."""
    view = View(Snapshot(listeners=(Listener(CATCH_ALL, "any"),)), (), Encoder())
    for i in range(RENAMED_LIMIT + 10):
        view.find(LISTENER, f"host{i}:80", has_catch_all=True)
    assert len(view._renamed) <= RENAMED_LIMIT


async def test_nodes_of_two_places_share_a_view_until_places_count() -> None:
    """And then each has the endpoints' priorities as it sees them; clusters and routes are the very same."""
    here, there = (
        Node(name, Workload(name, locality=Locality(region))) for name, region in (("one", "eu"), ("two", "us"))
    )
    running = tuple(
        Workload("reviews-v1", service="reviews", address="127.0.0.1", port=port, locality=Locality(region))
        for port, region in ((9001, "eu"), (9002, "us"))
    )
    cache = Cache()
    await cache.update(objects(SERVICES), running, (here, there))
    assert await cache.view(here) is await cache.view(there)
    prefers_near = (
        "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: reviews}\n"
        "spec: {host: reviews, trafficPolicy: {outlierDetection: {}}}\n"
    )
    await cache.update(objects(SERVICES + prefers_near), running, (here, there))
    one, two = await cache.view(here), await cache.view(there)
    name = "outbound|9080||reviews.default.svc.cluster.local"
    first = {
        view: next(each for each in assignments.endpoints if each.priority == 0).port
        for view, assignments in (
            (view, next(each for each in view.snapshot.assignments if each.cluster == name)) for view in (one, two)
        )
    }
    assert first == {one: 9001, two: 9002}
    assert one.resources[ENDPOINT][name].version != two.resources[ENDPOINT][name].version
    assert one.resources[CLUSTER][name] is two.resources[CLUSTER][name]


def test_our_own_kind_has_a_short_name() -> None:
    """For `meshctl get btp`."""
    for word in ("btp", "backendtrafficpolicies", "BackendTrafficPolicy", "backendtrafficpolicy.meshlib.io"):
        found = find_kind(word)
        assert found is not None
        assert (found.kind, found.group) == ("BackendTrafficPolicy", "meshlib.io")


async def test_a_stream_that_cant_look_at_a_change_keeps_it_from_nobody_else() -> None:
    """What one of them raises is logged; the update goes on."""
    cache, told = Cache(Counted()), list[str]()

    def fails() -> None:
        told.append("fails")
        raise RuntimeError("no certificate")

    cache.on_change(fails)
    cache.on_change(lambda: told.append("first"))
    cache.on_change(lambda: told.append("second"))
    await cache.update((), (), [node()])
    assert sorted(told) == ["fails", "first", "second"]
