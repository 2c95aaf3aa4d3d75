"""What crosses the gateway, and what it says itself: real sockets on both sides."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace

import httpx
import pytest
from gateways import NAME, PORT, address, configured, everything_to, gateway, hosts, listener, raw, url

from meshlib.gateway.limits import Limits
from meshlib.model import (
    ALWAYS,
    Access,
    AccessRule,
    Action,
    AddressIs,
    Cluster,
    ConnectionLimits,
    DirectResponse,
    HeaderOperations,
    Mirror,
    RateLimit,
    Redirect,
    RetryPolicy,
    Rewrite,
    RouteMatch,
    StringMatch,
    UpstreamTls,
    WeightedCluster,
)
from peers import Answer, Peer, Received, refusing_port
from snapshots import forward, route


@pytest.fixture
async def client():
    async with httpx.AsyncClient(timeout=20) as made:
        yield made


# Limits


async def test_a_limit_of_the_gateway_is_one_for_all_that_comes_in(client: httpx.AsyncClient) -> None:
    """429 with Envoy's headers, before anything is sent on; good answers tell what is left where they are asked to."""
    limited = Access(rate_limits=(RateLimit("door", 2, 2, 3600.0, answers=True),))
    with Peer() as peer:
        given = everything_to(peer.address)
        given = replace(given, listeners=tuple(replace(each, access=limited) for each in given.listeners))
        async with gateway(given) as made:
            answers = [await client.get(url(made)) for _ in range(3)]
        assert [each.status_code for each in answers] == [200, 200, 429]
        assert [each.headers["x-ratelimit-remaining"] for each in answers] == ["1", "0", "0"]
        assert (answers[2].text, answers[2].headers["x-envoy-ratelimited"]) == ("local_rate_limited", "true")
        assert len(peer.received) == 2


# Crossing


async def test_request_and_response_cross_unchanged(client: httpx.AsyncClient) -> None:
    """Method, path with query, Host, headers and body arrive; status, headers and body come back."""
    with Peer(lambda _: Answer(201, b"made", [("x-own", "1"), ("set-cookie", "a=1"), ("set-cookie", "b=2")])) as peer:
        async with gateway(everything_to(peer.address)) as made:
            response = await client.post(
                url(made, "/a%2Fb/c?x=1&y=%20"),
                content=b"hello",
                headers={"host": "shop.example", "x-mine": "é".encode()},
            )
    assert (response.status_code, response.content, response.headers["x-own"]) == (201, b"made", "1")
    assert response.headers.get_list("set-cookie") == ["a=1", "b=2"]
    received = peer.received[0]
    assert (received.method, received.target, received.body) == ("POST", "/a%2Fb/c?x=1&y=%20", b"hello")
    assert received.header("host") == "shop.example"
    assert received.header("content-length") == "5"
    assert received.header("x-mine").encode("latin-1") == "é".encode()


async def test_hop_by_hop_headers_stay_on_their_hop() -> None:
    """What belongs to one connection, and what Connection names, crosses in neither direction."""
    answer = Answer(
        body=b"ok",
        headers=[("Connection", "x-hop, keep-alive"), ("X-Hop", "1"), ("Keep-Alive", "timeout=5"), ("x-end", "1")],
    )
    with Peer(lambda _: answer) as peer:
        async with gateway(everything_to(peer.address)) as made, raw(made) as client:
            await client.send(
                "GET / HTTP/1.1",
                "Host: a",
                "Connection: keep-alive, X-Secret, host, content-length",
                "X-Secret: 1",
                "Keep-Alive: 5",
                "Proxy-Connection: keep-alive",
                "Proxy-Authorization: Basic eDp5",
                "TE: trailers, gzip",
                "Trailer: x-sum",
                "X-End: 1",
            )
            status, headers, _ = await client.response()
    assert status == 200
    assert headers["x-end"] == "1" and not {"x-hop", "keep-alive", "connection"} & set(headers)
    sent = {name for name, _ in peer.received[0].headers}
    assert {"host", "x-end"} <= sent
    assert not sent & {
        "connection",
        "x-secret",
        "keep-alive",
        "proxy-connection",
        "proxy-authorization",
        "te",
        "trailer",
    }


async def test_what_a_client_claims_is_not_believed(client: httpx.AsyncClient) -> None:
    """An edge overwrites or drops what upstreams would trust, and appends the address it saw itself."""
    claims = {
        "x-forwarded-for": "6.6.6.6",
        "x-forwarded-proto": "https",
        "x-forwarded-host": "evil",
        "x-forwarded-port": "1",
        "forwarded": "for=evil",
        "x-forwarded-client-cert": "By=evil",
        "x-envoy-expected-rq-timeout-ms": "1",
        "x-envoy-external-address": "6.6.6.6",
        "x-request-id": "mine",
        "connection": "x-forwarded-for, x-request-id",
    }
    with Peer() as peer:
        async with gateway(everything_to(peer.address)) as made:
            await client.get(url(made), headers={**claims, "connection": "keep-alive"})
            await client.get(url(made), headers=claims)
    first, second = peer.received
    assert first.header("x-forwarded-for") == "6.6.6.6,127.0.0.1"
    assert second.header("x-forwarded-for") == "127.0.0.1"
    for received in (first, second):
        assert received.header("x-forwarded-proto") == "http"
        assert received.header("x-envoy-external-address") == "127.0.0.1"
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", received.header("x-request-id") or "")
        names = [name for name, _ in received.headers]
        assert not {"x-forwarded-host", "x-forwarded-port", "forwarded", "x-forwarded-client-cert"} & set(names)
        assert "x-envoy-expected-rq-timeout-ms" not in names
        assert len(names) == len(set(names))


async def test_trusted_proxies_are_believed(client: httpx.AsyncClient) -> None:
    """With one trusted hop, the last entry of X-Forwarded-For is the client, and its scheme and id stand."""
    claims = {"x-forwarded-for": "6.6.6.6, 9.9.9.9", "x-forwarded-proto": "https", "x-request-id": "mine"}
    with Peer() as peer:
        async with gateway(everything_to(peer.address), trusted_hops=1) as made:
            await client.get(url(made), headers=claims)
    received = peer.received[0]
    assert received.header("x-forwarded-for") == "6.6.6.6,9.9.9.9,127.0.0.1"
    assert received.header("x-envoy-external-address") == "9.9.9.9"
    assert received.header("x-forwarded-proto") == "https"
    assert received.header("x-request-id") == "mine"


async def test_rules_about_addresses_see_whom_trusted_proxies_name(client: httpx.AsyncClient) -> None:
    """MeshConfig's numTrustedProxies: without any, the connection's own address counts, whatever a client claims."""
    rule = AccessRule("r", Action.ALLOW, ALWAYS, AddressIs("remote", "9.9.9.0/24"))
    claims = {"x-forwarded-for": "6.6.6.6, 9.9.9.9"}
    with Peer() as peer:
        for hops, wanted in ((0, 403), (1, 200), (2, 403), (3, 403)):
            given = everything_to(peer.address)
            ruled = replace(given.listeners[0], access=Access((rule,), trusted_hops=hops))
            async with gateway(replace(given, listeners=(ruled,))) as made:
                assert (await client.get(url(made), headers=claims)).status_code == wanted, hops
    assert peer.received[0].header("x-envoy-external-address") == "9.9.9.9"


async def test_connections_are_kept_on_both_sides() -> None:
    """Several requests of one client connection, pipelined ones included, use one upstream connection, in order."""
    with Peer(lambda r: Answer(body=r.target.encode())) as peer:
        async with gateway(everything_to(peer.address)) as made, raw(made) as client:
            for number in range(3):
                await client.send(f"GET /{number} HTTP/1.1", "Host: a")
                assert (await client.response())[2] == f"/{number}".encode()
            client.writer.write(b"".join(b"GET /p%d HTTP/1.1\r\nHost: a\r\n\r\n" % n for n in range(5)))
            assert [(await client.response())[2] for _ in range(5)] == [b"/p%d" % n for n in range(5)]
    assert peer.connections == 1


async def test_head_and_bodiless_statuses_cross() -> None:
    """A Content-Length without a body (HEAD, 304) leaves the connection in step."""

    def answer(received: Received) -> Answer:
        if received.target == "/304":
            return Answer(304, headers=[("etag", '"1"')])
        return Answer(204) if received.target == "/204" else Answer(body=b"12345")

    with Peer(answer) as peer:
        async with gateway(everything_to(peer.address)) as made, raw(made) as client:
            await client.send("HEAD /x HTTP/1.1", "Host: a")
            status, headers = await client.head()
            assert (status, headers["content-length"]) == (200, "5")
            for path, wanted in (("/304", 304), ("/204", 204)):
                await client.send(f"GET {path} HTTP/1.1", "Host: a")
                status, headers = await client.head()
                assert (status, headers.get("transfer-encoding")) == (wanted, None)
            await client.send("GET /x HTTP/1.1", "Host: a")
            assert (await client.response())[2] == b"12345"


async def test_dot_segments_are_resolved_before_routing(client: httpx.AsyncClient) -> None:
    """/open/../admin is /admin for the route, as it will be for the server (Istio's pathNormalization BASE)."""
    admin = route(DirectResponse(403, b"no"), RouteMatch(StringMatch("prefix", "/admin")))
    with Peer() as peer:
        snapshot = configured(
            [listener()], [hosts(f"http.{PORT}", {"*": [admin, route(forward("app"))]})], {"app": [peer.address]}
        )
        async with gateway(snapshot) as made, raw(made) as client_:
            for path in ("/open/../admin", "/open/%2e%2E/admin", "/.\\admin", "/open/..\\admin/x"):
                await client_.send(f"GET {path} HTTP/1.1", "Host: a")
                assert (await client_.response())[0] == 403, path
            for path, wanted in (
                ("/a/./b/..?q=/../x", "/a/?q=/../x"),
                ("/a//b/.hidden", "/a//b/.hidden"),
                ("/..", "/"),
            ):
                await client_.send(f"GET {path} HTTP/1.1", "Host: a")
                assert (await client_.response())[0] == 200
                assert peer.received[-1].target == wanted


async def test_rewrites_and_header_operations_reach_the_wire(client: httpx.AsyncClient) -> None:
    """A rewritten authority shows in Host and X-Forwarded-Host, a rewritten path in x-envoy-original-path."""
    action = forward(
        WeightedCluster("app", request_headers=HeaderOperations(set=(("x-set", "cluster"),))),
        rewrite=Rewrite(prefix="/new", authority="inside.example"),
        timeout=30.0,
    )
    changed = route(
        action,
        RouteMatch(StringMatch("prefix", "/old")),
        request_headers=HeaderOperations(set=(("x-set", "route"),), remove=("x-gone",)),
        response_headers=HeaderOperations(set=(("x-out", "1"),), remove=("x-own",)),
    )
    with Peer(lambda _: Answer(headers=[("x-own", "1"), ("server", "secret/1.0"), ("date", "yesterday")])) as peer:
        snapshot = configured([listener()], [hosts(f"http.{PORT}", {"*": [changed]})], {"app": [peer.address]})
        async with gateway(snapshot) as made:
            response = await client.get(
                url(made, "/old/x?q"), headers={"host": "shop.example:99", "x-gone": "1", "x-set": "client"}
            )
    received = peer.received[0]
    assert (received.target, received.header("host")) == ("/new/x?q", "inside.example")
    assert received.header("x-forwarded-host") == "shop.example:99"
    assert received.header("x-envoy-original-path") == "/old/x?q"
    assert [value for name, value in received.headers if name == "x-set"] == ["route"]
    assert received.header("x-gone") is None
    assert 0 < int(received.header("x-envoy-expected-rq-timeout-ms") or 0) <= 30_000
    assert response.headers["x-out"] == "1" and "x-own" not in response.headers
    assert response.headers["server"] == "meshlib"
    assert response.headers["date"] == "yesterday"
    assert int(response.headers["x-envoy-upstream-service-time"]) >= 0


async def test_an_absolute_target_names_the_host() -> None:
    """RFC 9112, 3.2.2: the authority of an absolute-form target replaces Host."""
    one = route(DirectResponse(200, b"one"))
    snapshot = configured([listener()], [hosts(f"http.{PORT}", {"one.example": [one]})], {})
    async with gateway(snapshot) as made, raw(made) as client:
        for target in ("http://one.example/x", "http://one.example:81?q", "http://ONE.example"):
            await client.send(f"GET {target} HTTP/1.1", "Host: two.example")
            assert (await client.response())[2] == b"one"


async def test_mirrors_get_a_copy(client: httpx.AsyncClient) -> None:
    """A mirrored request reaches the other cluster with the shadow's authority; its answer goes nowhere."""
    arrived = asyncio.Event()
    loop = asyncio.get_running_loop()

    def shadow(_: Received) -> Answer:
        loop.call_soon_threadsafe(arrived.set)
        return Answer(500, b"ignored")

    with Peer() as peer, Peer(shadow) as copy:
        action = forward("app", mirrors=(Mirror("copy"),))
        snapshot = configured(
            [listener()],
            [hosts(f"http.{PORT}", {"*": [route(action)]})],
            {"app": [peer.address], "copy": [copy.address]},
        )
        async with gateway(snapshot) as made:
            response = await client.get(url(made, "/x"), headers={"host": "a.example"})
            async with asyncio.timeout(10):
                await arrived.wait()
    assert (response.status_code, response.text) == (200, "ok")
    assert copy.received[0].header("host") == "a.example-shadow"


# Envoy's answers


async def test_no_route_is_404(client: httpx.AsyncClient) -> None:
    """An unknown host and an unmatched path get an empty 404, with the gateway's Server and Date."""
    only = route(DirectResponse(200), RouteMatch(StringMatch("exact", "/only")))
    async with gateway(configured([listener()], [hosts(f"http.{PORT}", {"a.example": [only]})], {})) as made:
        for host, path in (("b.example", "/only"), ("a.example", "/other")):
            response = await client.get(url(made, path), headers={"host": host})
            assert (response.status_code, response.content) == (404, b"")
            assert response.headers["server"] == "meshlib" and response.headers["date"].endswith("GMT")
        for host in ("a.example", "A.Example:8080"):
            assert (await client.get(url(made, "/only"), headers={"host": host})).status_code == 200


async def test_no_endpoint_is_503_no_healthy_upstream(client: httpx.AsyncClient) -> None:
    async with gateway(everything_to()) as made:
        response = await client.get(url(made))
    assert (response.status_code, response.text) == (503, "no healthy upstream")
    assert response.headers["content-type"] == "text/plain"


async def test_refused_connection_is_503_with_envoys_words(client: httpx.AsyncClient) -> None:
    dead = ("127.0.0.1", refusing_port())
    words = "upstream connect error or disconnect/reset before headers. {}reset reason: remote connection failure"
    detail = ", transport failure reason: delayed connect error: Connection refused"
    async with gateway(everything_to(dead)) as made:
        response = await client.get(url(made))
    assert (response.status_code, response.text) == (503, words.format("") + detail)
    async with gateway(everything_to(dead, retry=RetryPolicy(attempts=1, base_interval=0.001))) as made:
        response = await client.get(url(made))
    assert (response.status_code, response.text) == (503, words.format("retried and the latest ") + detail)


async def test_upstream_that_hangs_up_is_503_connection_termination(client: httpx.AsyncClient) -> None:
    with Peer(lambda _: Answer(drop=True)) as peer:
        async with gateway(everything_to(peer.address)) as made:
            response = await client.post(url(made), content=b"x")
    assert response.status_code == 503
    assert response.text == (
        "upstream connect error or disconnect/reset before headers. reset reason: connection termination"
    )


async def test_upstream_that_speaks_nonsense_is_502(client: httpx.AsyncClient) -> None:
    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(nonsense, "127.0.0.1", 0)
    async with server, gateway(everything_to(server.sockets[0].getsockname())) as made:
        response = await client.get(url(made))
    assert (response.status_code, response.text) == (
        502,
        "upstream connect error or disconnect/reset before headers. reset reason: protocol error",
    )


async def test_silent_upstream_is_504(client: httpx.AsyncClient) -> None:
    async def never(_: Received) -> Answer:
        await asyncio.Event().wait()
        raise AssertionError

    with Peer(never) as peer:
        async with gateway(everything_to(peer.address, timeout=0.1)) as made:
            response = await client.get(url(made))
    assert (response.status_code, response.text) == (504, "upstream request timeout")


async def test_overflow_is_503(client: httpx.AsyncClient) -> None:
    """A cluster's limit answers at once, with Envoy's header."""
    cluster = Cluster("app", limits=ConnectionLimits(max_requests=0))
    async with gateway(everything_to(("127.0.0.1", 1), cluster=cluster)) as made:
        response = await client.get(url(made))
    assert (response.status_code, response.headers["x-envoy-overloaded"]) == (503, "true")


async def test_retry_goes_to_another_endpoint(client: httpx.AsyncClient) -> None:
    """Istio's default: a connection that was refused is tried elsewhere, bodies included that have not left."""
    with Peer() as peer:
        policy = RetryPolicy(base_interval=0.001)
        async with gateway(everything_to(peer.address, ("127.0.0.1", refusing_port()), retry=policy)) as made:
            for _ in range(10):
                response = await client.post(url(made), content=b"hello")
                assert (response.status_code, response.text) == (200, "ok")
    assert all(received.body == b"hello" for received in peer.received)


async def test_a_body_that_has_left_is_not_sent_again(client: httpx.AsyncClient) -> None:
    """A retriable status after an upload reaches the client; the same without a body is retried."""
    with Peer(lambda _: Answer(503, b"busy")) as peer:
        policy = RetryPolicy(attempts=2, status_codes=frozenset({503}), base_interval=0.001)
        async with gateway(everything_to(peer.address, retry=policy)) as made:
            response = await client.put(url(made), content=b"hello")
            assert (response.status_code, len(peer.received)) == (503, 1)
            response = await client.get(url(made))
            assert (response.status_code, len(peer.received)) == (503, 4)
    assert [received.header("x-envoy-attempt-count") for received in peer.received[1:]] == ["1", "2", "3"]


async def test_https_redirect_is_301_to_the_same_url(client: httpx.AsyncClient) -> None:
    """httpsRedirect: 301, an empty body, path and query kept; a trusted proxy's https is not redirected."""
    snapshot = configured(
        [listener()], [hosts(f"http.{PORT}", {"*": [route(DirectResponse(200, b"in"))]}, require_tls=True)], {}
    )
    async with gateway(snapshot) as made:
        response = await client.get(url(made, "/a?b=1"), headers={"host": "shop.example", "x-forwarded-proto": "https"})
        assert (response.status_code, response.content) == (301, b"")
        assert response.headers["location"] == "https://shop.example/a?b=1"
    async with gateway(snapshot, trusted_hops=1) as made:
        response = await client.get(url(made), headers={"x-forwarded-proto": "https"})
        assert response.text == "in"


async def test_redirects_and_direct_responses_are_answered(client: httpx.AsyncClient) -> None:
    redirect = route(Redirect(302, authority="new.example"), RouteMatch(StringMatch("prefix", "/old")))
    direct = route(DirectResponse(418, b"teapot"))
    async with gateway(configured([listener()], [hosts(f"http.{PORT}", {"*": [redirect, direct]})], {})) as made:
        response = await client.get(url(made, "/old/x"), headers={"host": "old.example"})
        assert (response.status_code, response.headers["location"]) == (302, "http://new.example/old/x")
        response = await client.get(url(made, "/"))
        assert (response.status_code, response.text, response.headers["content-type"]) == (418, "teapot", "text/plain")


# Limits


async def test_body_limit_is_413(client: httpx.AsyncClient) -> None:
    """A declared length beyond the limit never reaches the upstream; an undeclared one is cut off there."""
    with Peer() as peer:
        async with gateway(everything_to(peer.address), limits=Limits(body=1000)) as made:
            response = await client.post(url(made), content=b"x" * 1001)
            assert (response.status_code, response.text) == (413, "Payload Too Large")
            assert (await client.post(url(made), content=b"x" * 1000)).status_code == 200
            async with raw(made) as sender:
                await sender.send("POST / HTTP/1.1", "Host: a", "Transfer-Encoding: chunked")
                for _ in range(3):
                    sender.writer.write(b"190\r\n" + b"x" * 400 + b"\r\n")
                status, headers, body = await sender.response()
                assert (status, headers["connection"], body) == (413, "close", b"Payload Too Large")
                assert await sender.rest() == b""
    assert [len(received.body) for received in peer.received] == [1000]


async def test_expectations_are_met_by_the_gateway() -> None:
    """100 Continue is the gateway's own, sent once the upstream takes the body; a refusal comes in its place."""
    with Peer() as peer:
        async with gateway(everything_to(peer.address), limits=Limits(body=10)) as made:
            async with raw(made) as client:
                await client.send("POST / HTTP/1.1", "Host: a", "Expect: 100-continue", "Content-Length: 3")
                assert (await client.head())[0] == 100
                client.writer.write(b"abc")
                assert (await client.response())[0] == 200
            async with raw(made) as client:
                await client.send("POST / HTTP/1.1", "Host: a", "Expect: 100-continue", "Content-Length: 11")
                status, headers, _ = await client.response()
                assert (status, headers["connection"]) == (413, "close")
                assert await client.rest() == b""
    assert peer.received[0].header("expect") is None


async def test_upstream_is_reached_by_tls(client: httpx.AsyncClient, tmp_path) -> None:
    """A cluster's TLS is spoken to the upstream, whatever the client speaks; the SNI and the CA are the cluster's."""
    import ssl

    import trustme

    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("inside.example").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = UpstreamTls(sni="inside.example", ca_file=str(tmp_path / "ca.pem"))
    with Peer(tls=context) as peer:
        async with gateway(everything_to(peer.address, cluster=Cluster("app", tls=tls))) as made:
            response = await client.get(url(made))
        assert (response.status_code, response.text) == (200, "ok")
        wrong = UpstreamTls(sni="other.example", ca_file=str(tmp_path / "ca.pem"))
        async with gateway(everything_to(peer.address, cluster=Cluster("app", tls=wrong))) as made:
            assert (await client.get(url(made))).status_code == 503


async def test_a_gateway_says_what_it_serves() -> None:
    async with gateway(everything_to()) as made:
        assert repr(made) == f"<Gateway <Doors [<Door {NAME} http://127.0.0.1:{address(made)[1]} 0 connections>]>>"
