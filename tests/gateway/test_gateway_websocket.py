"""A WebSocket through the gateway is the same WebSocket: messages, subprotocol, close codes, refusals."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
import trustme
from gateways import configured, everything_to, gateway, hosts, listener, raw, secured, url
from websockets.asyncio.client import connect
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus

from meshlib.gateway.limits import Limits
from meshlib.gateway.server import Gateway
from meshlib.model import HeaderOperations, RouteMatch, StringMatch
from snapshots import forward, route


async def echo(socket: ServerConnection) -> None:
    async for message in socket:
        if message == "bye":
            await socket.close(4001, "as you wish")
        elif message == "die":
            socket.transport.abort()
        else:
            await socket.send(message)


def at(server: Server) -> tuple[str, int]:
    found: tuple[str, int] = next(iter(server.sockets)).getsockname()[:2]
    return found


def ws(made: Gateway, path: str = "/") -> str:
    return url(made, path).replace("http", "ws")


async def test_messages_cross_both_ways() -> None:
    """Text, bytes, large and fragmented messages, pings; compression is the two ends' own affair."""
    async with serve(echo, "127.0.0.1", 0, max_size=None) as server, gateway(everything_to(at(server))) as made:
        socket = await connect(ws(made), max_size=None)
        async with socket:
            assert "permessage-deflate" in socket.response.headers["sec-websocket-extensions"]
            for message in ("hello", "grüße", b"\x00\xff", "x" * 3_000_000, ""):
                await socket.send(message)
                assert await socket.recv() == message
            await socket.send(["frag", "mented"])
            assert await socket.recv() == "fragmented"
            await (await socket.ping())


async def test_handshake_headers_cross() -> None:
    """Subprotocol, Origin, cookies and forwarded headers arrive; the route's operations are done."""
    seen = {}

    async def look(socket: ServerConnection) -> None:
        seen.update(
            {name.lower(): value for name, value in socket.request.headers.raw_items()}, path=socket.request.path
        )

    match = RouteMatch(StringMatch("prefix", "/chat"), headers=())
    chat = route(forward("app"), match, response_headers=HeaderOperations(set=(("x-out", "1"),)))
    async with serve(look, "127.0.0.1", 0, subprotocols=["v2.chat"]) as server:
        snapshot = configured([listener()], [hosts("http.8080", {"*": [chat]})], {"app": [at(server)]})
        async with gateway(snapshot) as made:
            async with connect(
                ws(made, "/chat?room=1"),
                subprotocols=["v1.chat", "v2.chat"],
                origin="http://page",
                additional_headers={"cookie": "a=1"},
            ) as socket:
                assert socket.subprotocol == "v2.chat"
                assert socket.response.headers["x-out"] == "1"
                await socket.wait_closed()
            with pytest.raises(InvalidStatus) as refused:
                await connect(ws(made, "/other"))
    assert refused.value.response.status_code == 404
    assert seen["path"] == "/chat?room=1"
    assert (seen["origin"], seen["cookie"], seen["x-forwarded-for"]) == ("http://page", "a=1", "127.0.0.1")
    assert seen["x-forwarded-proto"] == "http"


async def test_close_codes_cross_both_ways() -> None:
    closed = asyncio.get_running_loop().create_future()

    async def watch(socket: ServerConnection) -> None:
        try:
            await echo(socket)
        finally:
            await socket.wait_closed()
            if not closed.done():
                closed.set_result((socket.close_code, socket.close_reason))

    async with serve(watch, "127.0.0.1", 0) as server, gateway(everything_to(at(server))) as made:
        async with connect(ws(made)) as socket:
            await socket.close(4002, "enough")
        assert await closed == (4002, "enough")
        async with connect(ws(made)) as socket:
            await socket.send("bye")
            with pytest.raises(ConnectionClosed):
                await socket.recv()
            assert (socket.close_code, socket.close_reason) == (4001, "as you wish")


async def test_a_death_on_either_side_is_told_to_the_other() -> None:
    gone = asyncio.Event()

    async def watch(socket: ServerConnection) -> None:
        try:
            await echo(socket)
        except ConnectionClosed:
            pass
        gone.set()

    async with serve(watch, "127.0.0.1", 0) as server, gateway(everything_to(at(server))) as made:
        async with connect(ws(made)) as socket:
            await socket.send("die")
            with pytest.raises(ConnectionClosed):
                await socket.recv()
            assert socket.close_code == 1006
        gone.clear()
        socket = await connect(ws(made))
        socket.transport.abort()
        async with asyncio.timeout(10):
            await gone.wait()
        cluster = made.mesh.live.cluster("app")
        assert cluster is not None
        async with asyncio.timeout(10):
            while cluster.state.requests:  # noqa: ASYNC110 -- a plain counter
                await asyncio.sleep(0.01)


async def test_bytes_sent_right_behind_the_upgrade_are_not_lost() -> None:
    """A client that does not wait for 101, and a server whose first frame comes with it."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello")
        writer.write(await reader.readexactly(5))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server, gateway(everything_to(server.sockets[0].getsockname())) as made, raw(made) as client:
        await client.send("GET / HTTP/1.1", "Host: a", "Connection: Upgrade", "Upgrade: websocket", body=b"early")
        status, headers = await client.head()
        assert (status, headers["upgrade"], headers["connection"]) == (101, "websocket", "Upgrade")
        assert await client.rest() == b"helloearly"


async def test_a_refused_upgrade_is_an_ordinary_response() -> None:
    async def refuse(connection: ServerConnection, request):
        return connection.respond(401, "who are you?\n")

    async with (
        serve(echo, "127.0.0.1", 0, process_request=refuse) as server,
        gateway(everything_to(at(server))) as made,
    ):
        with pytest.raises(InvalidStatus) as refused:
            await connect(ws(made))
    assert refused.value.response.status_code == 401
    assert refused.value.response.body == b"who are you?\n"


async def test_a_slow_reader_holds_up_the_sender() -> None:
    sent = 0

    async def flood(socket: ServerConnection) -> None:
        nonlocal sent
        while sent < 1000:
            await socket.send(b"x" * 65536)
            sent += 1

    async with serve(flood, "127.0.0.1", 0, compression=None) as server, gateway(everything_to(at(server))) as made:
        socket = await connect(ws(made), compression=None, max_queue=1)
        async with socket:
            before = -1
            while before != sent:
                before = sent
                await asyncio.sleep(0.2)
            assert sent < 500
            async for _ in socket:
                pass
    assert sent == 1000


async def test_open_sockets_end_with_the_gateway() -> None:
    """stop() waits its time for them and then cuts them off."""
    async with serve(echo, "127.0.0.1", 0) as server:
        async with gateway(everything_to(at(server)), limits=Limits(drain=0.1)) as made:
            socket = await connect(ws(made))
            await socket.send("hello")
            assert await socket.recv() == "hello"
        with pytest.raises(ConnectionClosed):
            await socket.recv()


async def test_a_secure_websocket_is_a_websocket(tmp_path: Path) -> None:
    """wss ends at the gateway; messages and close codes cross as ever."""
    authority = trustme.CA()
    issued = authority.issue_cert("a.example")
    issued.private_key_pem.write_to_path(str(tmp_path / "key"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "certificate"))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    chain = secured("https.a", str(tmp_path / "certificate"), str(tmp_path / "key"))
    async with serve(echo, "127.0.0.1", 0) as server:
        snapshot = configured(
            [listener(443, chain)], [hosts("https.a", {"*": [route(forward("app"))]})], {"app": [at(server)]}
        )
        async with gateway(snapshot) as made:
            host, port = made.addresses["0.0.0.0_443"]
            async with connect("wss://a.example/", host=host, port=port, ssl=trusting) as socket:
                await socket.send("x" * 300_000)
                assert await socket.recv() == "x" * 300_000
                await socket.send("bye")
                with pytest.raises(ConnectionClosed):
                    await socket.recv()
                assert (socket.close_code, socket.close_reason) == (4001, "as you wish")
