"""What do clients get that have a service for each type, instead of ADS? By the stubs of Envoy's published protos."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from ads_server import Serving, mesh
from xds_client import Stream, node, ports, type_url, workload

BOTH = pytest.mark.parametrize("delta", [True, False], ids=["delta", "sotw"])
NAMES = {"LDS": "web:80", "RDS": "r", "CDS": "a", "EDS": "a"}


@pytest.fixture
async def serving() -> AsyncIterator[Serving]:
    found = Serving()
    await found.server.start()
    yield found
    await found.close()


async def ask_without_type(client: Stream, *names: str) -> None:
    """As a client may where the service says which type is meant."""
    await client.ask("", *names)


@BOTH
@pytest.mark.parametrize("kind", NAMES)
async def test_each_type_has_a_service(serving: Serving, delta: bool, kind: str) -> None:
    """Whether the requests name the type or not."""
    for ask in (Stream.ask, lambda client, kind, *names: ask_without_type(client, *names)):
        client = await serving.connect(delta=delta, only=kind)
        await ask(client, kind, NAMES[kind])
        assert list(await client.take(kind)) == [NAMES[kind]]


@BOTH
async def test_listeners_and_clusters_come_without_a_name(serving: Serving, delta: bool) -> None:
    """Their services know the wildcard, as on ADS."""
    await serving.publish(mesh("a", "b"))
    client = await serving.connect(delta=delta, only="CDS")
    await client.ask("CDS")
    assert list(await client.take("CDS")) == ["a", "b"]
    listeners = await serving.connect(delta=delta, only="LDS")
    await listeners.ask("LDS")
    assert "web:80" in await listeners.take("LDS")


@BOTH
async def test_a_change_is_pushed_to_the_stream_of_its_type(serving: Serving, delta: bool) -> None:
    """And a cluster that is gone leaves, though nobody here says that the routes do without it."""
    await serving.publish(mesh("a", "b"))
    clusters = await serving.connect(delta=delta, only="CDS")
    await clusters.ask("CDS")
    await clusters.take("CDS")
    endpoints = await serving.connect(delta=delta, only="EDS")
    await endpoints.ask("EDS", "a")
    await endpoints.take("EDS")
    await serving.publish(mesh("a", endpoints=2))
    assert ports((await endpoints.take("EDS"))["a"]) == [1000, 1001]
    kind, found, removed = await clusters.next()
    assert (kind, list(found), removed) == ("CDS", [] if delta else ["a"], ("b",) if delta else ())


@BOTH
async def test_another_type_is_refused(serving: Serving, delta: bool) -> None:
    """Its author reads which type there is."""
    client = await serving.connect(delta=delta, only="RDS")
    await client.ask("CDS")
    code, details = await client.status()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details == f"type_url {type_url('CDS')}: this service has {type_url('RDS')}"


@BOTH
async def test_a_client_with_a_stream_for_each_type_is_one_client(serving: Serving, delta: bool) -> None:
    """To whoever asks who is connected, and what they were told."""
    streams = {kind: await serving.connect(delta=delta, who=node(), only=kind) for kind in NAMES}
    for kind, stream in streams.items():
        await stream.ask(kind, NAMES[kind])
        await stream.take(kind)
    (shown,) = serving.ads.clients()
    assert set(shown.types) == set(NAMES)
    (inspected,) = serving.ads.inspected()
    assert {kind for kind, _ in inspected.sent} == {type_url(kind) for kind in NAMES}


@BOTH
async def test_a_process_is_an_endpoint_while_any_of_its_streams_is_open(serving: Serving, delta: bool) -> None:
    """Whichever ends first."""
    who = workload("web", 80)
    first = await serving.connect(delta=delta, who=who, only="CDS")
    await first.ask("CDS")
    await first.take("CDS")
    second = await serving.connect(delta=delta, who=who, only="EDS")
    await second.ask("EDS", "a")
    await second.take("EDS")
    await first.end()
    await first.status()
    assert (len(serving.registry.nodes), len(serving.registry.workloads)) == (1, 1)
    await second.end()
    await serving.until(lambda: not serving.registry.workloads)
