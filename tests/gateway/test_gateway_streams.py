"""Bodies that are long, slow or broken: streamed both ways, bounded in memory. What broke off never looks whole."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator

import httpx
import pytest
from gateways import address, everything_to, gateway, raw, url

from peers import Answer, Peer, Received

MEGABYTE = 1 << 20


class Sink:
    """An upstream in the test's own loop: counts what it is sent, and can be told to stop reading."""

    def __init__(self) -> None:
        self.size = 0
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.head = asyncio.Event()
        self.closed = asyncio.Event()
        self.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
        self.answers_early = False

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.head.set()
            if self.answers_early:
                writer.write(self.answer)
                await writer.drain()
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            while self.size < length:
                await self.may_read.wait()
                data = await reader.read(65536)
                if not data:
                    return
                self.size += len(data)
            if not self.answers_early:
                writer.write(self.answer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            self.closed.set()


async def settled(value) -> int:
    """`value()` once it no longer grows: nothing moves any more."""
    before = -1
    while (now := value()) != before:
        before = now
        await asyncio.sleep(0.2)
    return now


async def test_large_upload_is_streamed_in_bounded_memory() -> None:
    """64 MB go up in the memory of a few buffers, and a slow upstream holds up the client."""
    total = 64 * MEGABYTE
    sink = Sink()
    server = await asyncio.start_server(sink, "127.0.0.1", 0)
    chunk = b"x" * 65536
    sent = 0
    async with server, gateway(everything_to(server.sockets[0].getsockname())) as made, raw(made) as client:
        sink.may_read.clear()
        await client.send("POST / HTTP/1.1", "Host: a", f"Content-Length: {total}")

        async def upload() -> None:
            nonlocal sent
            for _ in range(total // len(chunk)):
                client.writer.write(chunk)
                await client.writer.drain()
                sent += len(chunk)

        tracemalloc.start()
        uploading = asyncio.create_task(upload())
        held = await settled(lambda: sent)
        assert held < total / 2, "a client must not be read faster than the upstream takes it"
        sink.may_read.set()
        await uploading
        status, _, body = await client.response()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (status, body, sink.size) == (200, b"ok", total)
    assert peak < 8 * MEGABYTE


async def test_large_download_waits_for_a_slow_client() -> None:
    """A client that does not read stops the upstream; once it reads, it gets all of it."""
    total, produced = 64 * MEGABYTE, 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal produced
        while produced < total:
            produced += 65536
            yield b"y" * 65536

    with Peer(lambda _: Answer(chunks=chunks())) as peer:
        async with gateway(everything_to(peer.address)) as made, httpx.AsyncClient(timeout=30) as client:
            tracemalloc.start()
            async with client.stream("GET", url(made)) as response:
                held = await settled(lambda: produced)
                assert held < total / 2
                size = 0
                async for part in response.aiter_raw():
                    size += len(part)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert size == total
    assert peak < 12 * MEGABYTE


async def test_parts_cross_one_by_one() -> None:
    """Each part of a response arrives before the next is made, so server-sent events work."""
    turns: asyncio.Queue[bytes] = asyncio.Queue()
    made_turns = asyncio.get_running_loop()

    async def chunks() -> AsyncIterator[bytes]:
        while part := await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(turns.get(), made_turns)):
            yield part

    with Peer(lambda _: Answer(chunks=chunks(), headers=[("content-type", "text/event-stream")])) as peer:
        async with gateway(everything_to(peer.address)) as made, httpx.AsyncClient() as client:
            turns.put_nowait(b"first")
            async with client.stream("GET", url(made)) as response:
                parts = response.aiter_raw()
                assert await anext(parts) == b"first"
                turns.put_nowait(b"second")
                assert await anext(parts) == b"second"
                turns.put_nowait(b"")
                assert await anext(parts, None) is None


@pytest.mark.parametrize("framing", ["chunked", "content-length"])
async def test_upstream_that_dies_in_its_response_cuts_the_client_off(framing: str) -> None:
    """The client sees a broken connection, never a body that seems complete."""

    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if framing == "chunked":
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhello")
        await writer.drain()
        writer.transport.abort()

    server = await asyncio.start_server(dies, "127.0.0.1", 0)
    async with server, gateway(everything_to(server.sockets[0].getsockname())) as made:
        async with raw(made) as client:
            await client.send("GET / HTTP/1.1", "Host: a")
            status, _ = await client.head()
            rest = await client.rest()
        assert status == 200
        assert rest in (b"5\r\nhello\r\n", b"hello", b"")
        async with httpx.AsyncClient() as whole:
            with pytest.raises(httpx.RemoteProtocolError):
                await whole.get(url(made))


async def test_route_timeout_cuts_a_response_that_takes_too_long() -> None:
    """Envoy's route timeout covers the response to its end."""

    async def chunks() -> AsyncIterator[bytes]:
        yield b"begin"
        await asyncio.Event().wait()

    with Peer(lambda _: Answer(chunks=chunks())) as peer:
        async with gateway(everything_to(peer.address, timeout=0.3)) as made, raw(made) as client:
            await client.send("GET / HTTP/1.1", "Host: a")
            assert (await client.head())[0] == 200
            assert await client.rest() == b"5\r\nbegin\r\n"


async def test_route_timeout_counts_from_the_end_of_the_request() -> None:
    """A slow upload is the client's own business; a slow answer to it is a timeout."""

    async def answer(received: Received) -> Answer:
        if received.target == "/slow":
            await asyncio.Event().wait()
        return Answer(body=received.body)

    with Peer(answer) as peer:
        async with gateway(everything_to(peer.address, timeout=0.8)) as made:
            for path, wanted in (("/quick", (200, b"ab")), ("/slow", (504, b"upstream request timeout"))):
                async with raw(made) as client:
                    await client.send(f"POST {path} HTTP/1.1", "Host: a", "Content-Length: 2")
                    client.writer.write(b"a")
                    await asyncio.sleep(1.0)
                    client.writer.write(b"b")
                    status, _, body = await client.response()
                    assert (status, body) == wanted


async def test_a_client_that_goes_away_cancels_its_call() -> None:
    """The upstream's connection ends, and nothing stays counted as in flight."""
    sink = Sink()
    server = await asyncio.start_server(sink, "127.0.0.1", 0)
    async with server, gateway(everything_to(server.sockets[0].getsockname())) as made:
        for framing, part in (("Content-Length: 100", b"half"), ("Content-Length: 0", b"")):
            sink.head.clear()
            sink.closed.clear()
            async with raw(made) as client:
                await client.send("POST / HTTP/1.1", "Host: a", framing, body=part)
                if part:
                    await sink.head.wait()
                else:
                    sink.may_read.clear()
            async with asyncio.timeout(10):
                await sink.closed.wait()
        cluster = made.mesh.live.cluster("app")
        assert cluster is not None
        async with asyncio.timeout(10):
            while cluster.state.requests or cluster.targets[0].state.in_flight:  # noqa: ASYNC110 -- plain counters
                await asyncio.sleep(0.01)


async def test_a_client_that_goes_away_while_the_upstream_thinks_cancels_its_call() -> None:
    """No bytes are moving, and still the upstream hears of it."""
    asked, gone = asyncio.Event(), asyncio.Event()

    async def thinks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        assert await reader.read() == b""
        gone.set()
        writer.close()

    server = await asyncio.start_server(thinks, "127.0.0.1", 0)
    async with server, gateway(everything_to(server.sockets[0].getsockname())) as made:
        async with raw(made) as client:
            await client.send("GET / HTTP/1.1", "Host: a")
            await asked.wait()
        async with asyncio.timeout(10):
            await gone.wait()


async def test_an_answer_before_the_upload_ends_reaches_the_client() -> None:
    """A server that refuses early is heard while the client still sends; the connection then ends."""
    sink = Sink()
    sink.answers_early = True
    sink.answer = b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 2\r\n\r\nno"
    server = await asyncio.start_server(sink, "127.0.0.1", 0)
    async with server, gateway(everything_to(server.sockets[0].getsockname())) as made, raw(made) as client:
        await client.send("POST / HTTP/1.1", "Host: a", "Content-Length: 1000000", body=b"x" * 1000)
        status, headers, body = await client.response()
        assert (status, body, headers["connection"]) == (401, b"no", "close")
        assert await client.rest() == b""
        async with asyncio.timeout(10):
            await sink.closed.wait()


async def test_a_stopped_gateway_is_gone() -> None:
    with Peer() as peer:
        async with gateway(everything_to(peer.address)) as made:
            at = address(made)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*at)
