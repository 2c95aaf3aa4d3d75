"""What upstreams may answer, and how connections to them are kept: byte-true servers behind a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from gateways import configured, everything_to, gateway, hosts, listener, raw, url

from meshlib.gateway import upstream
from meshlib.model import Cluster, ConnectionLimits, Forward, HeaderOperations, Rewrite, WeightedCluster
from snapshots import route


class Script:
    """A server that answers each request on a connection with the next of `answers`; None closes the connection."""

    def __init__(self, *answers: bytes | None) -> None:
        self.answers = list(answers)
        self.heads: list[bytes] = []
        self.connections = 0
        self.closed = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while self.answers:
                self.heads.append(await reader.readuntil(b"\r\n\r\n"))
                answer = self.answers.pop(0)
                if answer is None:
                    return
                writer.write(answer)
                await writer.drain()
            await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.closed.set()


Answers = Callable[..., Awaitable[None]]


@asynccontextmanager
async def behind(script: Answers, **cluster: object) -> AsyncIterator[tuple[httpx.AsyncClient, str]]:
    server = await asyncio.start_server(script, "127.0.0.1", 0)
    at = server.sockets[0].getsockname()[:2]
    async with (
        server,
        gateway(everything_to(at, cluster=Cluster("app", **cluster))) as made,  # type: ignore[arg-type]
        httpx.AsyncClient(timeout=20) as client,
    ):
        yield client, url(made)


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.mark.parametrize(
    ("answer", "status", "text"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n", 200, "abc"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK, 200, "ok"),
        (b"HTTP/1.1 599 Odd\r\ncontent-length: 0\r\n\r\n", 599, ""),
        (b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nok", 200, "ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, ""),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 10\r\n\r\n", 304, ""),
    ],
)
async def test_proper_answers_cross_and_keep_the_connection(answer: bytes, status: int, text: str) -> None:
    script = Script(answer, OK)
    async with behind(script) as (client, target):
        response = await client.get(target)
        assert (response.status_code, response.text) == (status, text)
        assert "x-sum" not in response.headers and "link" not in response.headers
        assert (await client.get(target)).text == "ok"
    assert script.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\x00b\r\n\r\n",
        b"HTTP/1.1 600 Odd\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"220 smtp.example ESMTP\r\n",
    ],
)
async def test_improper_answers_are_protocol_errors(answer: bytes) -> None:
    """502, as by Envoy, and the connection is not used again."""
    script = Script(answer)
    async with behind(script) as (client, target):
        response = await client.get(target)
        assert (response.status_code, response.text.rpartition(": ")[2]) == (502, "protocol error")
        async with asyncio.timeout(10):
            await script.closed.wait()


async def test_a_body_may_end_with_its_connection() -> None:
    """HTTP/1.0's way; the client gets it in chunks and keeps its own connection."""

    async def old(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 100_000)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(old, "127.0.0.1", 0)
    async with server, gateway(everything_to(server.sockets[0].getsockname()[:2])) as made, raw(made) as client:
        for _ in range(2):
            await client.send("GET / HTTP/1.1", "Host: a")
            status, headers, body = await client.response()
            assert (status, headers["transfer-encoding"], len(body)) == (200, "chunked", 100_000)


async def test_a_second_answer_is_not_taken_for_the_next() -> None:
    """Bytes behind a response end the connection: they answer a request that no one has made yet."""
    script = Script(OK + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", OK)
    async with behind(script) as (client, target):
        assert (await client.get(target)).text == "ok"
        assert (await client.get(target)).text == "ok"
    assert script.connections == 2


async def test_a_head_answer_leaves_the_connection_in_step() -> None:
    script = Script(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", OK)
    async with behind(script) as (client, target):
        response = await client.head(target)
        assert (response.status_code, response.headers["content-length"]) == (200, "5")
        assert (await client.get(target)).text == "ok"
    assert script.connections == 1


async def test_a_kept_connection_that_died_is_not_the_clients_problem() -> None:
    """Closed by the server while idle, or just as it is used: an idempotent request goes out again on a new one."""
    script = Script(OK, None, OK)
    async with behind(script) as (client, target):
        assert (await client.get(target)).text == "ok"
        assert (await client.get(target)).text == "ok"
    assert (script.connections, len(script.heads)) == (2, 3)


async def test_a_post_is_never_sent_twice_by_the_engine() -> None:
    script = Script(OK, None, OK)
    async with behind(script) as (client, target):
        assert (await client.get(target)).text == "ok"
        assert (await client.post(target)).status_code == 503
    assert len(script.heads) == 2


async def test_connections_end_when_told_to() -> None:
    """Connection: close, the cluster's requests per connection, and idling too long."""
    closing = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nConnection: close\r\n\r\nok"
    script = Script(closing, OK)
    async with behind(script) as (client, target):
        for _ in range(2):
            assert (await client.get(target)).text == "ok"
    assert script.connections == 2

    script = Script(OK, OK, OK)
    async with behind(script, limits=ConnectionLimits(max_requests_per_connection=2)) as (client, target):
        for _ in range(3):
            assert (await client.get(target)).text == "ok"
    assert script.connections == 2

    script = Script(OK, OK)
    async with behind(script, limits=ConnectionLimits(idle_timeout=0.1)) as (client, target):
        assert (await client.get(target)).text == "ok"
        async with asyncio.timeout(10):
            await script.closed.wait()
        assert (await client.get(target)).text == "ok"
    assert script.connections == 2


async def test_configuration_adds_no_line_to_a_request() -> None:
    """A line break in a header's value or in a rewritten path reaches no wire."""
    script = Script(OK)
    server = await asyncio.start_server(script, "127.0.0.1", 0)
    at = server.sockets[0].getsockname()[:2]
    cluster = WeightedCluster("app", request_headers=HeaderOperations(set=(("x", "a\r\ny: b"),)))
    for action in (
        Forward((cluster,)),
        Forward((WeightedCluster("app"),), rewrite=Rewrite(path="/a HTTP/1.1\r\nx: y")),
    ):
        snapshot = configured([listener()], [hosts("http.8080", {"*": [route(action)]})], {"app": [at]})
        async with gateway(snapshot) as made, httpx.AsyncClient() as client:
            response = await client.get(url(made))
            assert (response.status_code, response.text.rpartition(": ")[2]) == (503, "local reset")
    server.close()
    assert script.heads == []


async def test_an_echo_streams_both_ways_at_once() -> None:
    """The response flows while the request still comes in."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while line := await reader.readline():
            writer.write(line + await reader.readexactly(int(line, 16) + 2))
            if line == b"0\r\n":
                break
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, gateway(everything_to(server.sockets[0].getsockname()[:2])) as made, raw(made) as client:
        await client.send("POST / HTTP/1.1", "Host: a", "Transfer-Encoding: chunked")
        assert (await client.head())[0] == 200
        for part in (b"1\r\na\r\n", b"2\r\nbb\r\n", b"0\r\n\r\n"):
            client.writer.write(part)
            async with asyncio.timeout(10):
                assert await client.reader.readexactly(len(part)) == part


async def test_idle_connections_are_counted_and_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(upstream, "KEEPALIVE", 0.1)
    script = Script(OK)
    server = await asyncio.start_server(script, "127.0.0.1", 0)
    async with (
        server,
        gateway(everything_to(server.sockets[0].getsockname()[:2])) as made,
        httpx.AsyncClient() as client,
    ):
        await client.get(url(made))
        engine = made._proxy.engine
        assert repr(engine) == "<UpstreamEngine 1 idle connections to 1 endpoints>"
        async with asyncio.timeout(10):
            await script.closed.wait()
        assert repr(engine) == "<UpstreamEngine 0 idle connections to 0 endpoints>"
