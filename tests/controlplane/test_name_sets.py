"""Do streams that ask for the same names share them, and is who asks for nothing new not read again?"""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ads_server import Serving, mesh

from meshlib.controlplane import name_sets
from meshlib.controlplane.name_sets import FEW, names_of
from meshlib.xds import messages as m

MANY = [f"service-{number}" for number in range(FEW + 1)]


def sotw(names: list[str], **more: Any) -> Any:
    return m.DiscoveryRequest.FromString(m.serialize(m.DiscoveryRequest(resource_names=names, **more)))


def test_equal_names_are_one_object() -> None:
    """Whatever else the request says; other names, or another order, are another object, of the same names or not."""
    first = names_of(sotw(MANY, response_nonce="1", type_url="a", node=m.Node(id="x")), "resource_names")
    assert first == set(MANY)
    assert names_of(sotw(MANY, response_nonce="2", version_info="7"), "resource_names") is first
    assert names_of(m.DeltaDiscoveryRequest(resource_names_subscribe=MANY), "resource_names_subscribe") == first
    assert names_of(sotw(MANY[::-1]), "resource_names") == first
    assert names_of(sotw([*MANY, "more"]), "resource_names") == {*MANY, "more"}
    assert names_of(sotw(["a", "a"]), "resource_names") == {"a"}
    assert names_of(sotw([]), "resource_names") == frozenset()


def test_what_nobody_asks_for_any_more_is_forgotten() -> None:
    """Nothing is remembered for a client that has gone."""
    names = names_of(sotw([f"gone-{number}" for number in range(FEW + 1)]), "resource_names")
    count = len(name_sets._known)
    del names
    gc.collect()
    assert len(name_sets._known) < count


@pytest.fixture
async def serving() -> AsyncIterator[Serving]:
    found = Serving()
    await found.server.start()
    yield found
    await found.close()


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "sotw"])
async def test_a_change_of_others_endpoints_does_not_wake_a_stream(serving: Serving, delta: bool) -> None:
    """It is brought up to date all the same: its own next change is told, and only that."""
    await serving.publish(mesh("a", "b"))
    client = await serving.connect(delta=delta)
    await client.ask("EDS", "a")
    await client.take("EDS")
    (news,) = serving.ads._tasks
    (connection,) = serving.ads._connections.values()
    await serving.until_answered(connection)
    other = mesh("a", "b", "c", route_to="a")
    await serving.publish(other)
    assert not news.is_set()
    assert connection.seen is not None and connection.seen.snapshot.same_content(other)
    await serving.publish(mesh("a", "b", "c", route_to="a", endpoints=2))
    assert news.is_set()
    assert list(await client.take("EDS")) == ["a"]
