"""Does the trace of what comes in from outside begin at the gateway, with the call to the service as its child?"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import httpx
from gateways import address, everything_to, gateway, url

from meshlib.mesh import Mesh
from meshlib.model import Access, AccessRule, Action, Authorizer
from meshlib.telemetry.tracing import Ended
from peers import Peer, refusing_port

TRACE, SPAN = "ab" * 16, "cd" * 8
TRACED: dict[str, Any] = {"telemetry": "http://127.0.0.1:9", "telemetry_interval": 3600.0, "trace_sampling": 100.0}
"""To nobody: spans are looked at here, before they would be pushed."""


def spans_of(mesh: Mesh) -> dict[int, Ended]:
    """By kind: 2 is a server's, 3 a client's."""
    assert mesh.telemetry is not None and mesh.telemetry.tracer is not None
    return {each.kind: each for each in mesh.telemetry.tracer.taken()}


async def test_a_trace_begins_at_the_gateway() -> None:
    """One tree: its own span, the call's, and what the service was told; no request is counted twice."""
    with Peer() as peer:
        async with gateway(everything_to(peer.address), settings=TRACED) as made:
            async with httpx.AsyncClient() as client:
                answer = await client.get(url(made, "/a?token=S3CRET"))
            found = spans_of(made.mesh)
            assert answer.status_code == 200
            server, call = found[2], found[3]
            assert (server.at.parent, call.at.parent, call.at.trace_id) == ("", server.at.span_id, server.at.trace_id)
            assert peer.received[0].header("traceparent") == f"00-{server.at.trace_id}-{call.at.span_id}-01"
            told = dict(server.attributes)
            assert (told["url.path"], told["url.query"], told["http.response.status_code"]) == (
                *("/a", "token=REDACTED"),
                200,
            )
            assert told["client.address"] == "127.0.0.1"
            assert told["network.peer.port"] in range(1024, 65536)
            assert server.began <= call.began <= call.ended <= server.ended
            assert made.mesh.telemetry is not None
            [series] = made.mesh.telemetry.recorder.series()
            assert (series.labels[0], series.count) == ("source", 1)


async def test_a_parent_from_outside_is_heeded_and_a_failure_told() -> None:
    """Sampled: both spans are in its trace; not sampled: none is made, and the service hears of it."""
    nobody = ("127.0.0.1", refusing_port())
    async with (
        gateway(everything_to(nobody), settings={**TRACED, "trace_sampling": 0.0}) as made,
        httpx.AsyncClient() as client,
    ):
        await client.get(url(made), headers={"traceparent": f"00-{TRACE}-{SPAN}-01"})
        found = spans_of(made.mesh)
        assert (found[2].at.trace_id, found[2].at.parent) == (TRACE, SPAN)
        assert found[3].at.parent == found[2].at.span_id
        told = dict(found[2].attributes)
        assert (found[2].error, "UF" in str(told["mesh.response_flags"])) == ("503", True)
        await client.get(url(made), headers={"traceparent": f"00-{TRACE}-{SPAN}-00"})
        await client.get(url(made))
        assert spans_of(made.mesh) == {}


async def test_who_leaves_while_being_admitted_has_a_span_all_the_same() -> None:
    """An external authorizer has the question and does not answer; the client hangs up."""
    asked, enough = asyncio.Event(), asyncio.Event()

    async def authorizer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await enough.wait()
        writer.close()

    silent = await asyncio.start_server(authorizer, "127.0.0.1", 0)
    access = Access(
        (AccessRule("ask", Action.CUSTOM, provider="silent"),),
        authorizers=(Authorizer("silent", "http", *silent.sockets[0].getsockname()[:2]),),
    )
    given = everything_to(("127.0.0.1", refusing_port()))
    given = replace(given, listeners=tuple(replace(each, access=access) for each in given.listeners))
    async with silent, gateway(given, settings=TRACED) as made:
        try:
            _, client = await asyncio.open_connection(*address(made))
            client.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.wait_for(asked.wait(), 20)
            client.close()
            async with asyncio.timeout(20):
                while not (found := spans_of(made.mesh)):  # noqa: ASYNC110 -- nobody tells of a span but the span
                    await asyncio.sleep(0.01)
        finally:
            enough.set()  # a thread asks it, and can't be cancelled
    told = dict(found[2].attributes)
    assert (told["url.path"], told["mesh.response_flags"]) == ("/slow", "DC")
    assert set(found) == {2}
