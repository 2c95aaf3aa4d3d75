"""What becomes of requests that no good client sends? A status for their author, and nothing for anybody else.

The server is asked over a real socket; that it still serves is asked by another client, after each.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from ads_server import Serving, mesh
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DiscoveryRequest
from google.protobuf.struct_pb2 import Struct
from xds_client import node, type_url

BOTH = pytest.mark.parametrize("delta", [True, False], ids=["delta", "sotw"])
ADS = "/envoy.service.discovery.v3.AggregatedDiscoveryService/"
TIMEOUT = 30
UNDERSTOOD = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}
"""UNKNOWN and INTERNAL are what gRPC makes of a handler that has failed."""


@pytest.fixture
async def serving() -> AsyncIterator[Serving]:
    found = Serving()
    await found.server.start()
    yield found
    await found.close()


def asking(delta: bool, *names: str, kind: str = "CDS", who: Any = None, **more: Any) -> Any:
    about = {"type_url": type_url(kind), "node": who or node(), **more}
    if delta:
        return DeltaDiscoveryRequest(resource_names_subscribe=names, **about)
    return DiscoveryRequest(resource_names=names, **about)


def nested(depth: int) -> Struct:
    found = Struct()
    for _ in range(depth):
        outer = Struct()
        outer["x"] = found
        found = outer
    return found


def conversations(delta: bool) -> Iterator[tuple[str, list[bytes]]]:
    """(what is wrong, what is sent on one stream)."""
    good = asking(delta, "a", "b").SerializeToString()
    chance = random.Random(4)
    for length in range(0, len(good), 7):
        yield f"cut at {length}", [good[:length]]
    yield "cut later", [good, good[:-3]]
    for number in range(40):
        yield f"noise {number}", [chance.randbytes(chance.randrange(1, 200))]
        damaged = bytearray(good)
        for _ in range(3):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        yield f"damaged {number}", [bytes(damaged)]

    def told(what: str, *requests: Any) -> tuple[str, list[bytes]]:
        return what, [each.SerializeToString() for each in requests]

    yield told("one name a thousand times", asking(delta, *(["a"] * 1000)))
    yield told("a name of a megabyte", asking(delta, "x" * 1_000_000))
    yield told(
        "names that are none", asking(delta, "", "*", "*", "\0", "\U0010ffff", "a\nb", "xdstp://", "xdstp://x/y")
    )
    yield told("a type of a megabyte", asking(delta, kind="x" * 1_000_000))
    yield told("a thousand types", *(asking(delta, "a", kind=f"type/{i}") for i in range(1000)))
    yield told("an answer to nothing", asking(delta, "a", response_nonce="nobody's"))
    refused = asking(delta, "a", response_nonce="1-x")
    refused.error_detail.message = "no\n" * 100_000
    yield told("a refusal of nothing", refused)
    for value in (nested(30), [1, 2], "text", -1, 1e308, float("nan"), None, True):
        wrong = Struct()
        for key in ("LABELS", "MESHLIB_PORT", "MESHLIB_PORTS", "INSTANCE_IPS", "NAMESPACE", "MESHLIB_INBOUND"):
            wrong[key] = value
        who = node()
        who.metadata.CopyFrom(wrong)
        yield told(f"a node with {str(value)[:20]!r}", asking(delta, who=who))
    for identity in ("~", "~~~", "sidecar~~~", "sidecar~x~y~z~", "x" * 100_000, "a\nb"):
        yield told(f"a node called {identity[:20]!r}", asking(delta, who=node(identity)))
    if delta:
        many = {f"name{i}": "v" for i in range(20_000)}
        yield told("versions of what there never was", asking(delta, initial_resource_versions=many))
        yield told("both at once", asking(delta, "a", resource_names_unsubscribe=["a", "a", "*", "never"]))
        yield told(
            "unsubscribed from nothing", asking(delta, "a"), asking(delta, resource_names_unsubscribe=["*", "b"])
        )


@BOTH
async def test_no_request_breaks_the_server(serving: Serving, delta: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is in it."""
    await serving.publish(mesh("a", "b"))
    path = f"{ADS}{'Delta' if delta else 'Stream'}AggregatedResources"
    async with grpc.aio.insecure_channel(serving.address) as channel:
        for what, requests in conversations(delta):
            call = channel.stream_stream(path)(timeout=TIMEOUT)
            # It may be ended before all was said.
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                for each in requests:
                    await call.write(each)
                await call.done_writing()
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert await call.code() in UNDERSTOOD, (what, await call.code(), await call.details())
    good = await serving.connect(delta=delta)
    await good.ask("CDS", "a")
    assert list(await good.take("CDS")) == ["a"]
    assert not [record.getMessage() for record in caplog.records if record.exc_info]


@BOTH
async def test_a_request_that_is_too_large_ends_its_stream_alone(serving: Serving, delta: bool) -> None:
    """The limit here is gRPC's own; the control plane's is 16 MiB."""
    good = await serving.connect(delta=delta)
    await good.ask("CDS", "a")
    await good.take("CDS")
    path = f"{ADS}{'Delta' if delta else 'Stream'}AggregatedResources"
    async with grpc.aio.insecure_channel(serving.address) as channel:
        call = channel.stream_stream(path)(timeout=TIMEOUT)
        await call.write(asking(delta, "x" * 5_000_000).SerializeToString())
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await good.ask("EDS", "a")
    assert list(await good.take("EDS")) == ["a"]


@BOTH
async def test_a_name_that_is_sent_often_is_answered_once(serving: Serving, delta: bool) -> None:
    """In one request and in several."""
    client = await serving.connect(delta=delta)
    await client.ask("CDS", "a", "a", "a")
    response = await client.next()
    assert list(response[1]) == ["a"]
    assert len(client.last["CDS"].resources) == 1
