"""Do several control planes say the same of the same? Who goes from one to another is sent nothing that it has."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
from ads_server import Serving
from xds_client import Stream, node, type_url

from meshlib.controlplane.cache import Cache, View
from meshlib.istio.parse import parse_text
from meshlib.istio.resources import Object
from meshlib.model import INBOUND_PREFIX, Node, NodeKind, Snapshot, Workload
from meshlib.xds.reader import Dialect, Reader
from meshlib.xds.resource_types import LISTENER, PUSH_ORDER

ADS = pytest.mark.parametrize("is_single", [False, True], ids=["ads", "single"])
KINDS = ("LDS", "RDS", "CDS", "EDS")
TEXT = """
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: default}
spec: {selector: {app: reviews}, ports: [{name: http, port: 9080}, {name: grpc, port: 9090}]}
---
apiVersion: v1
kind: Service
metadata: {name: ratings, namespace: default}
spec: {selector: {app: ratings}, ports: [{name: http, port: 9080}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: outside, namespace: default}
spec:
  hosts: ["*.example.com"]
  ports: [{number: 443, name: https, protocol: TLS}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews, namespace: default}
spec:
  host: reviews
  subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: default}
spec:
  hosts: [reviews]
  http: [{route: [{destination: {host: reviews, subset: v1}, weight: 90}, {destination: {host: reviews, subset: v2}}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: some, namespace: default}
spec: {rules: [{from: [{source: {namespaces: [default, other]}}]}, {to: [{operation: {methods: [GET]}}]}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: {mode: STRICT}}
"""
WORKLOADS = tuple(
    Workload(
        f"{name}-{version}",
        service=name,
        labels=(("app", name), ("version", version)),
        address=f"10.0.{a}.{b}",
        port=80,
    )
    for a, name in enumerate(("ratings", "reviews"))
    for b, version in enumerate(("v1", "v2"))
)
"""In the registry's order."""


def objects(seed: int) -> tuple[Object, ...]:
    """In whatever order a replica came to know them."""
    found = list(parse_text(TEXT, "mesh.yaml").objects)
    random.Random(seed).shuffle(found)
    return tuple(found)


async def view_of(seed: int, who: Node) -> View:
    cache = Cache()
    await cache.update(objects(seed), WORKLOADS, [who])
    return await cache.view(who)


@pytest.mark.parametrize("kind", NodeKind)
@pytest.mark.parametrize("dialect", Dialect)
async def test_replicas_give_the_same_versions_to_each_reader(kind: NodeKind, dialect: Dialect) -> None:
    """Of every type, and of each resource; in whichever order they have heard of the objects."""
    who = Node(
        "a", Workload("a", address="10.0.0.9", port=80), kind, inbound=((80, "127.0.0.1:80"),), outbound="127.0.0.1:1"
    )
    reader = Reader(dialect, has_certificates=True)
    seen = []
    for seed in range(3):
        cache = Cache()
        await cache.update(objects(seed), WORKLOADS, [who])
        seen.append(await cache.seen(who, reader))
    for other in seen[1:]:
        assert other is not seen[0]
        assert other.versions == seen[0].versions
        for served in PUSH_ORDER:
            assert {name: each.version for name, each in other.resources[served].items()} == {
                name: each.version for name, each in seen[0].resources[served].items()
            }
        for asked in ("www.example.com:443", "www.python.org:443", INBOUND_PREFIX + "10.0.0.9:80"):
            answers = [each.find(LISTENER, asked, has_catch_all=True) for each in (seen[0], other)]
            assert answers[0] == answers[1]


@pytest.fixture
async def replicas() -> AsyncIterator[tuple[Serving, Serving]]:
    found = Serving(), Serving()
    for seed, each in enumerate(found):
        await each.server.start()
        each.snapshot = (await view_of(seed, Node("other", Workload("other")))).snapshot
    yield found
    for each in found:
        await each.close()


def names_in(snapshot: Snapshot, kind: str) -> list[str]:
    found = {
        "LDS": [each.name for each in snapshot.listeners if not each.name.startswith("*")],
        "RDS": [each.name for each in snapshot.route_configurations],
        "CDS": [each.name for each in snapshot.clusters],
        "EDS": [each.cluster for each in snapshot.assignments],
    }[kind]
    assert found
    return found


async def heard(client: Stream, kind: str, names: list[str], **more: object) -> tuple[str, dict[str, str]]:
    """The version of all, and (delta) of each."""
    await client.ask(kind, *names, **more)  # type: ignore[arg-type]
    await client.take(kind)
    last = client.last[kind]
    if not client.delta:
        return last.version_info, {}
    return last.system_version_info, {each.name: each.version for each in last.resources}


@ADS
@pytest.mark.parametrize("kind", KINDS)
async def test_who_comes_from_another_replica_is_sent_nothing(
    replicas: tuple[Serving, Serving], is_single: bool, kind: str
) -> None:
    """Delta: what it has, by its initial versions; a name that is asked for beside them is all that is answered."""
    first, second = replicas
    only, names = kind if is_single else "", names_in(first.snapshot, kind)
    client = await first.connect(who=node(), only=only)
    version, held = await heard(client, kind, names)
    assert held.keys() == set(names)
    moved = await second.connect(who=node(), only=only)
    await moved.ask(kind, *names, initial=held)
    await moved.ask(kind, "nobody")
    assert await moved.next() == (kind, {}, ("nobody",))
    assert moved.last[kind].system_version_info == version


@ADS
@pytest.mark.parametrize("kind", ["LDS", "CDS"])
async def test_who_comes_with_all_of_a_wildcard_is_answered_and_sent_nothing(
    replicas: tuple[Serving, Serving], is_single: bool, kind: str
) -> None:
    """An Envoy waits for an answer; it need not hold anything."""
    first, second = replicas
    client = await first.connect(who=node(), only=kind if is_single else "")
    version, held = await heard(client, kind, ["*"])
    assert held
    moved = await second.connect(who=node(), only=kind if is_single else "")
    await moved.ask(kind, "*", initial=held)
    assert await moved.next() == (kind, {}, ())
    assert moved.last[kind].system_version_info == version


@ADS
@pytest.mark.parametrize("kind", KINDS)
async def test_state_of_the_world_is_of_the_same_version_everywhere(
    replicas: tuple[Serving, Serving], is_single: bool, kind: str
) -> None:
    """There the whole is sent to each new stream; it is the same, to the byte."""
    said = []
    for each in replicas:
        client = await each.connect(delta=False, who=node(), only=kind if is_single else "")
        version, _ = await heard(client, kind, names_in(each.snapshot, kind))
        said.append((version, [resource.SerializeToString() for resource in client.last[kind].resources]))
        assert client.last[kind].type_url == type_url(kind)
    assert said[0] == said[1]
