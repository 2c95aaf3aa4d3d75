"""Does the table of subscription rules hold on real streams, aggregated and of one type?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from ads_server import Serving
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DiscoveryRequest
from google.rpc.status_pb2 import Status
from test_subscription_table import AFTER, BEFORE, DELTA, SOTW, Say
from xds_client import Stream, node

from meshlib.controlplane.subscriptions import DeltaStream, SotwStream
from meshlib.xds.resource_types import CLUSTER, SHORT_NAMES

ADS = pytest.mark.parametrize("is_single", [False, True], ids=["ads", "single"])


class Read:
    """Says when the server has read a request, and what it made of it: an answer to it is under way then, or none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._states: asyncio.Queue[DeltaStream | SotwStream] = asyncio.Queue()
        for kind in (DeltaStream, SotwStream):
            monkeypatch.setattr(kind, "due", self._told(kind))

    def _told(self, kind: type[DeltaStream] | type[SotwStream]) -> object:
        due = kind.due

        def told(state: DeltaStream | SotwStream, *of: object) -> object:
            found = due(state, *of)  # type: ignore[arg-type]
            self._states.put_nowait(state)
            return found

        return told

    async def next(self) -> DeltaStream | SotwStream:
        async with asyncio.timeout(20):
            return await self._states.get()


@pytest.fixture
async def serving() -> AsyncIterator[Serving]:
    found = Serving()
    found.snapshot = BEFORE.snapshot
    await found.server.start()
    yield found
    await found.close()


def request(type_url: str, each: Say, nonce: str, *, delta: bool) -> DeltaDiscoveryRequest | DiscoveryRequest:
    error = Status(message=each.error) if each.error is not None else None
    if not delta:
        return DiscoveryRequest(
            type_url=type_url, resource_names=tuple(each.names), response_nonce=nonce, error_detail=error
        )
    return DeltaDiscoveryRequest(
        type_url=type_url,
        resource_names_subscribe=tuple(each.names),
        resource_names_unsubscribe=tuple(each.drop),
        initial_resource_versions={name: BEFORE.resources[type_url][name].version for name in each.initial},
        response_nonce=nonce,
        error_detail=error,
    )


async def pushed(serving: Serving, client: Stream, read: Read, type_url: str, requests: list[Say]) -> str:
    """The names that come when all have changed, once what came before is accepted."""
    kind, latest = SHORT_NAMES[type_url], ""
    for each in requests:
        nonce = {"latest": latest, "old": "old", "none": ""}[each.answers]
        await client.send(request(type_url, each, nonce, delta=client.delta))
        state = await read.next()
        while state.subscriptions[type_url].in_flight:
            await client.next()
            latest, subscription = client.last[kind].nonce, state.subscriptions[type_url]
            has_star = subscription.is_wildcard and subscription.has_named
            kept = "".join(sorted(subscription.names)) + "*" * has_star
            await client.send(request(type_url, Say("" if client.delta else kept), latest, delta=client.delta))
            state = await read.next()
    await serving.publish(AFTER.snapshot)
    subscription = state.subscriptions[type_url]
    if not subscription.in_flight and not subscription.is_wildcard and not subscription.names & {*"abc"}:
        return ""  # and nothing is under way
    _, found, _ = await client.next()
    return "".join(sorted(found))


@ADS
@pytest.mark.parametrize(
    ("delta", "row"),
    [*((False, row) for row in SOTW), *((True, row) for row in DELTA)],
    ids=lambda value: ("delta" if value else "sotw") if isinstance(value, bool) else value,
)
async def test_the_table_holds_on_the_wire(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, is_single: bool, delta: bool, row: str
) -> None:
    """Each row, on a stream of its own."""
    type_url, requests, expected = (DELTA if delta else SOTW)[row]
    read = Read(monkeypatch)
    client = await serving.connect(delta=delta, who=node(), only=SHORT_NAMES[type_url] if is_single else "")
    assert await pushed(serving, client, read, type_url, requests) == expected


async def test_a_push_that_nobody_wants_is_not_under_way(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the table takes for granted where nothing is expected: the next that comes is of another type."""
    client = await serving.connect(delta=True, who=node())
    read = Read(monkeypatch)
    assert await pushed(serving, client, read, CLUSTER, [Say("a", answers="none"), Say(drop="a", answers="none")]) == ""
    await client.ask("EDS", "nobody")
    assert await client.next() == ("EDS", {}, ("nobody",))
