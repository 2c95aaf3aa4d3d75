"""What a client may not put on the wire, and what happens to the connection then."""

from __future__ import annotations

import asyncio

import pytest
from gateways import everything_to, gateway, raw

from meshlib.gateway.headers import for_logs
from meshlib.gateway.limits import Limits
from meshlib.policy.paths import normalized_target
from peers import Answer, Peer

SMUGGLED = b"0\r\n\r\nGET /admin HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (("Content-Length: 3", "Transfer-Encoding: chunked"), 400),
        (("Transfer-Encoding: chunked", "Content-Length: 3"), 400),
        (("Transfer-Encoding: chunked", "content-length : 3"), 400),
        (("Content-Length: 3", "Content-Length: 3"), 400),
        (("Content-Length: 3", "Content-Length: 5"), 400),
        (("Content-Length: 3, 3",), 400),
        (("Content-Length: +3",), 400),
        (("Content-Length: 0x3",), 400),
        (("Transfer-Encoding: xchunked",), 501),
        (("Transfer-Encoding: identity",), 501),
        (("Transfer-Encoding: chunked, identity",), 400),
        (("Transfer-Encoding: gzip, chunked",), 501),
        (("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400),
        (("Transfer-Encoding: chunked", "Transfer-Encoding: identity"), 400),
        (("Transfer-Encoding : chunked",), 400),
        (("Transfer-Encoding:\x0bchunked",), 400),
        (("Transfer-Encoding:", " chunked"), 400),
        (("X: a\nTransfer-Encoding: chunked",), 400),
        (("X: a\rTransfer-Encoding: chunked",), 400),
        (("X: a\x00b",), 400),
        (("X\x00: a",), 400),
        (("no colon",), 400),
        (("Host: b",), 400),
        (("Connection: upgrade", "Upgrade: websocket", "Content-Length: 3"), 400),
        (("Connection: upgrade", "Upgrade: h2c", "Transfer-Encoding: chunked"), 400),
    ],
)
async def test_ambiguous_requests_are_refused(lines: tuple[str, ...], wanted: int) -> None:
    """Whatever two servers could read differently ends the connection before an upstream sees any of it."""
    with Peer() as peer:
        async with gateway(everything_to(peer.address)) as made, raw(made) as client:
            await client.send("POST / HTTP/1.1", "Host: a", *lines, body=SMUGGLED)
            status, headers, _ = await client.response()
            assert (status, headers["connection"]) == (wanted, "close")
            assert await client.rest() == b""
    assert peer.received == []


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("GET / HTTP/1.0", 426),
        ("GET / HTTP/2.0", 426),
        ("CONNECT a:443 HTTP/1.1", 404),
        ("GET ftp://a/x HTTP/1.1", 400),
        ("GET http://user@a/x HTTP/1.1", 400),
        ("OPTIONS * HTTP/1.1", 400),
        ("GET /\xff HTTP/1.1", 400),
        ("NOTHING / HTTP/1.1", 400),
    ],
)
async def test_odd_request_lines_are_refused(line: str, wanted: int) -> None:
    with Peer() as peer:
        async with gateway(everything_to(peer.address)) as made, raw(made) as client:
            await client.send(line, "Host: a")
            assert (await client.response())[0] == wanted
            assert await client.rest() == b""
    assert peer.received == []


@pytest.mark.parametrize("host", [None, "", "a b", "a/b", "a@b", "a,b?", "[::1", "a:b"])
async def test_a_request_needs_one_valid_host(host: str | None) -> None:
    async with gateway(everything_to()) as made, raw(made) as client:
        await client.send("GET / HTTP/1.1", *([] if host is None else [f"Host: {host}"]))
        assert (await client.response())[0] == 400
        assert await client.rest() == b""


async def test_a_broken_chunk_ends_the_request_and_the_connection() -> None:
    """The upstream never sees the request end well."""
    with Peer() as peer:
        async with gateway(everything_to(peer.address)) as made, raw(made) as client:
            await client.send("POST / HTTP/1.1", "Host: a", "Transfer-Encoding: chunked", body=b"3\r\nabc\r\n")
            while not peer.open_connections:  # noqa: ASYNC110 -- a counter of another thread
                await asyncio.sleep(0.01)
            client.writer.write(b"zz\r\n")
            assert (await client.response())[0] == 400
            assert await client.rest() == b""
    assert peer.received == []


async def test_a_broken_successor_does_not_harm_the_request_before_it() -> None:
    """A pipelined request that is refused lets the one in flight finish, and then the connection closes."""
    release = asyncio.Event()

    async def slow(_):
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(release.wait(), loop))
        return Answer(body=b"well")

    loop = asyncio.get_running_loop()
    with Peer(slow) as peer:
        async with gateway(everything_to(peer.address)) as made, raw(made) as client:
            await client.send("GET /1 HTTP/1.1", "Host: a", body=b"GET /2 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
            while not peer.received:  # noqa: ASYNC110 -- filled by another thread
                await asyncio.sleep(0.01)
            release.set()
            status, headers, body = await client.response()
            assert (status, body, headers["connection"]) == (200, b"well", "close")
            assert await client.rest() == b""
    assert len(peer.received) == 1


async def test_heads_are_bounded() -> None:
    """60 KiB of head and 100 headers, as in Envoy; more is 431, also when the head never ends."""
    with Peer() as peer:
        async with gateway(everything_to(peer.address)) as made:
            for lines, wanted in (
                ([f"X-{n}: {'v' * 590}" for n in range(95)], 200),
                ([f"X-{n}: {'v' * 700}" for n in range(95)], 431),
                (["X: " + "v" * 62_000], 431),
                ([f"X-{n}: v" for n in range(99)], 200),
                ([f"X-{n}: v" for n in range(100)], 431),
            ):
                async with raw(made) as client:
                    await client.send("GET / HTTP/1.1", "Host: a", *lines)
                    assert (await client.response())[0] == wanted
            async with raw(made) as client:
                await client.send("GET /" + "p" * 62_000 + " HTTP/1.1", "Host: a")
                assert (await client.response())[0] == 431
            async with raw(made) as client:
                client.writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nX: ")
                for _ in range(100):
                    client.writer.write(b"v" * 1000)
                assert (await client.response())[0] == 431
    assert len(peer.received) == 2


async def test_a_head_behind_a_long_body_is_not_too_large() -> None:
    """What came with the body before it does not count."""
    with Peer() as peer:
        async with gateway(everything_to(peer.address)) as made, raw(made) as client:
            body = b"x" * 200_000
            head = f"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            client.writer.write(head + body + b"GET /2 HTTP/1.1\r\nHo")
            assert (await client.response())[0] == 200
            client.writer.write(b"st: a\r\n\r\n")
            assert (await client.response())[0] == 200


async def test_a_double_slash_is_a_path() -> None:
    """`//b/x` names no host."""
    with Peer() as peer:
        async with gateway(everything_to(peer.address)) as made, raw(made) as client:
            await client.send("GET //b/x HTTP/1.1", "Host: a")
            assert (await client.response())[0] == 200
    assert (peer.received[0].target, peer.received[0].header("host")) == ("//b/x", "a")


async def test_trailers_do_not_become_headers() -> None:
    """What comes behind the body passed no check: it is neither a second Host nor a word to the upstream."""
    with Peer() as peer:
        async with gateway(everything_to(peer.address)) as made, raw(made) as client:
            await client.send(
                "POST / HTTP/1.1",
                "Host: a",
                "Transfer-Encoding: chunked",
                "Trailer: host, x-evil",
                body=b"1\r\nx\r\n0\r\nHost: evil\r\nX-Evil: 1\r\n\r\n",
            )
            assert (await client.response())[0] == 200
            await client.send("GET / HTTP/1.1", "Host: a")
            assert (await client.response())[0] == 200
    for received in peer.received:
        assert [value for name, value in received.headers if name == "host"] == ["a"]
        assert received.header("x-evil") is None
    assert peer.received[0].body == b"x"


async def test_heads_have_a_time_limit() -> None:
    """A head that is begun and not ended is 408; a connection on which nothing is said just closes."""
    async with gateway(everything_to(), limits=Limits(head_timeout=0.5)) as made:
        async with raw(made) as client:
            client.writer.write(b"GET / HTTP/1.1\r\nHo")
            status, _, body = await client.response()
            assert (status, body) == (408, b"request header timeout")
            assert await client.rest() == b""
        async with raw(made) as client:
            assert await client.rest() == b""


async def test_idle_connections_close() -> None:
    async with gateway(everything_to(), limits=Limits(keep_alive=0.2)) as made, raw(made) as client:
        await client.send("GET / HTTP/1.1", "Host: a")
        assert (await client.response())[0] == 503
        assert await client.rest() == b""


async def test_empty_lines_keep_no_connection_open() -> None:
    """RFC 9112, 2.2 allows an empty line between requests; it does not count as one."""
    limits = Limits(keep_alive=30.0, head_timeout=0.5)
    async with gateway(everything_to(), limits=limits) as made, raw(made) as client:
        await client.send("GET / HTTP/1.1", "Host: a")
        assert (await client.response())[0] == 503
        client.writer.write(b"\r\n")
        assert await client.rest() == b""


async def test_an_upgrade_that_is_not_websocket_is_ignored() -> None:
    """curl --http2 offers h2c with an ordinary request; the answer is ordinary too, and ends the connection."""
    with Peer() as peer:
        async with gateway(everything_to(peer.address)) as made, raw(made) as client:
            await client.send(
                "GET / HTTP/1.1",
                "Host: a",
                "Connection: Upgrade, HTTP2-Settings",
                "Upgrade: h2c",
                "HTTP2-Settings: AAMA",
            )
            status, headers, body = await client.response()
            assert (status, body, headers["connection"]) == (200, b"ok", "close")
    assert not {"upgrade", "http2-settings", "connection"} & {name for name, _ in peer.received[0].headers}


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/", "/"),
        ("/a/b", "/a/b"),
        ("/a/./b", "/a/b"),
        ("/a/../b", "/b"),
        ("/../../b", "/b"),
        ("/a/..", "/"),
        ("/a/.", "/a/"),
        ("/a/%2E%2e/b", "/b"),
        ("/a\\..\\b", "/b"),
        ("/a/..b/.c", "/a/..b/.c"),
        ("/a%2f..%2fb", "/a%2f..%2fb"),
        ("/a//../b", "/a/b"),
        ("/a?/../b", "/a?/../b"),
        ("/%252e%252e/b", "/%252e%252e/b"),
    ],
)
def test_paths_are_normalized_as_by_istio(path: str, wanted: str) -> None:
    assert normalized_target(path) == wanted


def test_a_client_cannot_write_lines_of_its_own_into_our_log() -> None:
    """An escaped line break or a terminal's escape sequence stays visible text; the query stays out."""
    assert for_logs("/a%0aERROR%0d%1b[2J%c3%a9?secret=1") == r"/a\nERROR\r\x1b[2J\xe9"
