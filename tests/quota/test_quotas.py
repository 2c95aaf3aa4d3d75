"""Do all processes share what they are allowed? Against a real Redis, and a real rate limit service."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import httpx
import pytest
from quota_servers import needs_redis, nobody, rate_limit_server, redis_server

import meshlib
from meshlib.mesh import Mesh
from meshlib.model import Access, Cluster, Inbound, LimitAnswer, LimitKey, Quota, QuotaService, Snapshot
from meshlib.policy.quota import Question
from meshlib.quota.edge import QuotaEdge
from meshlib.telemetry.gauges import values
from meshlib.telemetry.recorder import Recorder
from peers import Peer
from snapshots import forward, mesh, publish, route, service, snapshot

URL = "http://reviews:9080/"
USER = LimitKey("header", "end-user", "user")
LIMITS = {
    "shop": {"user_jason": 2, "user_anna": 100, "tier_gold": 3, "tier_gold|user_jason": 1, "echo_1": 1, "hits_1": 10}
}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def counting() -> Iterator[str]:
    with rate_limit_server(LIMITS) as address:
        yield address


@pytest.fixture
def edge() -> Iterator[QuotaEdge]:
    with mesh() as made:
        yield made.quotas


def in_redis(url: str, name: str, requests: int = 2, **fields: Any) -> Quota:
    """Counted anew for each test, by its name."""
    answers = QuotaService("redis", url, timeout=10.0)
    return Quota(name, answers, requests=requests, interval=3600, **{"descriptors": ((),), **fields})


def at_service(address: str, *keys: LimitKey, timeout: float = 10.0, denies: bool = False, **fields: Any) -> Quota:
    who = QuotaService("envoy", address, "shop", timeout, denies)
    return Quota("at-service", who, (keys or (USER,),), **fields)


def value(key: str, value: str) -> LimitKey:
    return LimitKey("value", entry=key, value=value)


def over(edge: QuotaEdge, quota: Quota, *descriptors: tuple[tuple[str, str], ...]) -> bool | None:
    answer = edge.ask(Question(quota, descriptors or ((),)))
    return None if answer is None else answer.is_over


# Redis


@needs_redis
def test_threads_loops_and_processes_count_together(edge: QuotaEdge, redis: str) -> None:
    """Twenty calls for ten: by threads, by two event loops, and by another process."""
    quota = in_redis(redis, "together", 10)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: over(edge, quota), range(4)))

    async def ask() -> list[Any]:
        question = Question(quota, ((),))
        found = await asyncio.gather(*(edge.ask_async(question) for _ in range(4)))
        await edge.aclose()
        return [None if each is None else each.is_over for each in found]

    answers += asyncio.run(ask()) + asyncio.run(ask())
    program = f"""
from meshlib.model import Quota, QuotaService
from meshlib.policy.quota import Question
from meshlib.quota.edge import QuotaEdge
edge = QuotaEdge(None)
quota = Quota("together", QuotaService("redis", {redis!r}, timeout=10.0), requests=10, interval=3600)
print([edge.ask(Question(quota, ((),))).is_over for _ in range(8)])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    answers += eval(done.stdout)
    assert (answers.count(False), answers.count(True), answers.count(None)) == (10, 10, 0)


@needs_redis
def test_what_a_caller_sends_reaches_into_no_other_count(edge: QuotaEdge, redis: str) -> None:
    """Slashes separate the parts of a key in Redis; a value may hold any, be long, or no text at all."""
    quota = in_redis(redis, "parts", 1, descriptors=((LimitKey("header", "a"), LimitKey("header", "b")),))
    calls = [("x/y", "z"), ("x", "y/z"), ("é%2F", "\x00"), ("é/", "\x00"), ("l" * 500, ""), ("l" * 501, "")]
    assert [over(edge, quota, (("a", one), ("b", two))) for one, two in calls] == [False] * 6
    assert [over(edge, quota, (("a", one), ("b", two))) for one, two in calls] == [True] * 6


@needs_redis
def test_a_call_may_count_for_several(edge: QuotaEdge, redis: str) -> None:
    """And one that does not fit takes nothing."""
    assert [over(edge, in_redis(redis, "several", 10, hits=hits)) for hits in (7, 4, 3, 1)] == [
        False,
        True,
        False,
        True,
    ]


def test_what_asking_takes_is_made_when_the_configuration_comes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not with the first call; and what is not installed is said then. Calls go on as without an answer."""
    for name in ("limits", "limits.storage", "redis"):
        monkeypatch.setitem(sys.modules, name, None)
    quota = Quota("missing", QuotaService("redis", "redis://127.0.0.1:1/0"), requests=1)
    with Peer() as peer, mesh(calling(quota, peer.address)) as made, made.Client(timeout=30) as client:
        (warning,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
        assert "a quota in Redis needs the extra quota (pip install 'meshlib-proxyless[quota]')" in warning
        assert client.get(URL).status_code == 200


def test_a_redis_that_is_silent_or_gone_holds_up_nobody(edge: QuotaEdge, caplog: pytest.LogCaptureFixture) -> None:
    """No longer than the timeout, with one warning, and without the password."""
    with nobody() as address:
        who = QuotaService("redis", f"redis://user:secret@{address}/0", timeout=0.2)
        quota = Quota("silent", who, requests=1)
        began = time.monotonic()
        assert over(edge, quota) is None
        assert asyncio.run(edge.ask_async(Question(quota, ((),)))) is None
        assert time.monotonic() - began < 20
    assert over(edge, quota) is None  # nobody listens there now
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert len(warnings) == 1
    assert f"redis://{address}/0 does not answer, calls are let pass" in warnings[0]
    assert "secret" not in warnings[0]


# A rate limit service


def test_a_rate_limit_service_is_asked_as_envoys_ask_it(edge: QuotaEdge, counting: str) -> None:
    """Domain, descriptors, hits_addend; what it says of the limit that is nearest to its end, and its headers."""
    quota = at_service(counting, hits=4)
    answers = [edge.ask(Question(quota, ((("hits", "1"),), (("user", "anna"),)))) for _ in range(3)]
    assert [each and (each.is_over, each.limit, each.window, each.remaining, each.reset) for each in answers] == [
        (False, 10, 3600, 6, 1234.0),
        (False, 10, 3600, 2, 1234.0),
        (True, 10, 3600, 0, 1234.0),
    ]
    told = edge.ask(Question(at_service(counting), ((("echo", "1"),),)))
    assert told is not None
    assert (told.response_headers, told.request_headers, told.body) == (
        (("x-told", "by the service"),),
        (("x-counted", "1"),),
        b"enough",
    )
    unknown = edge.ask(Question(at_service(counting), ((("who", "knows"),),)))
    assert unknown is not None
    assert (unknown.is_over, unknown.limit) == (False, 0)


def test_threads_and_loops_share_one_channel_to_the_service(edge: QuotaEdge, counting: str) -> None:
    """No connection belongs to a loop."""
    quota = at_service(counting)
    descriptors = ((("tier", "gold"),),)

    async def ask() -> list[bool | None]:
        found = await asyncio.gather(*(edge.ask_async(Question(quota, descriptors)) for _ in range(2)))
        return [each and each.is_over for each in found]

    answers = [*asyncio.run(ask()), over(edge, quota, *descriptors), *asyncio.run(ask())]
    assert answers == [False, False, False, True, True]


def test_a_service_that_is_silent_holds_up_nobody(edge: QuotaEdge) -> None:
    """Connections are taken, and nothing is ever said."""
    with nobody() as address:
        began = time.monotonic()
        quota = at_service(address, timeout=0.2)
        assert over(edge, quota, (("user", "jason"),)) is None
        assert asyncio.run(edge.ask_async(Question(quota, ((("user", "jason"),),)))) is None
        assert time.monotonic() - began < 20


def test_a_service_that_comes_back_is_asked_again(edge: QuotaEdge) -> None:
    """Without a restart of those who ask."""
    with rate_limit_server(LIMITS) as address:
        quota = at_service(address)
        assert over(edge, quota, (("user", "jason"),)) is False
    assert over(edge, quota, (("user", "jason"),)) is None
    with rate_limit_server(LIMITS, int(address.rpartition(":")[2])):
        deadline = time.monotonic() + 30
        while over(edge, quota, (("user", "jason"),)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)


# Calls out


def calling(quota: Quota, address: tuple[str, int]) -> Snapshot:
    return service("reviews:9080", [address], cluster=Cluster("c", quotas=(quota,)))


@pytest.mark.parametrize("where", [pytest.param("redis", marks=needs_redis), "service"])
@pytest.mark.parametrize("form", ["sync", "async"])
def test_a_call_beyond_a_quota_is_never_sent(where: str, form: str, request: pytest.FixtureRequest) -> None:
    """429 as by a local limit, also in asyncio; each user has a count, and who is none is not counted."""
    if where == "redis":
        quota = in_redis(request.getfixturevalue("redis"), f"out-{form}", descriptors=((USER,),))
    else:
        quota = at_service(request.getfixturevalue("counting"))
    users: list[dict[str, str]] = [{"end-user": "jason"}] * 3 + [{"end-user": "anna"}, {}]
    with Peer() as peer, mesh(calling(quota, peer.address)) as made:
        if form == "sync":
            with made.Client(timeout=30) as client:
                answers = [client.get(URL, headers=user) for user in users]
        else:

            async def ask() -> list[httpx.Response]:
                async with made.AsyncClient(timeout=30) as client:
                    found = [await client.get(URL, headers=user) for user in users]
                await made.quotas.aclose()
                return found

            answers = asyncio.run(ask())
        assert [each.status_code for each in answers] == [200, 200, 429, 200, 200]
        refused = answers[2]
        assert refused.headers["x-envoy-ratelimited"] == "true"
        assert refused.headers["x-ratelimit-limit"] == "2, 2;w=3600"
        assert int(refused.headers["retry-after"]) > 0
        assert len(peer.received) == 4
        told = str(made.explain("GET", URL))
        left = 0 if where == "redis" else 99  # as the last answer that tells it said: of jason, and of anna
        assert f"3 passed, 1 turned away, {left} left" in told


def test_what_the_service_adds_goes_both_ways(counting: str) -> None:
    """Its request headers to the server, its response headers and its body to the caller."""
    quota = at_service(counting, value("echo", "1"))
    with Peer() as peer, mesh(calling(quota, peer.address)) as made, made.Client(timeout=30) as client:
        good, refused = client.get(URL), client.get(URL)
        assert (good.headers["x-told"], peer.received[0].header("x-counted")) == ("by the service", "1")
        assert (refused.status_code, refused.text, refused.headers["x-told"]) == (429, "enough", "by the service")


@pytest.mark.parametrize("denies", [False, True])
def test_without_an_answer_the_configuration_decides(denies: bool) -> None:
    """failure_mode_deny: 500 and RLSE; else the call goes on. Both are counted."""
    quota = at_service("127.0.0.1:1", timeout=1.0, denies=denies)
    with Peer() as peer, mesh(calling(quota, peer.address)) as made, made.Client(timeout=30) as client:
        assert client.get(URL, headers={"end-user": "jason"}).status_code == (500 if denies else 200)
        assert client.get(URL).status_code == 200  # about whom nothing is to be asked
        assert len(peer.received) == 2 - denies
        assert "1 without an answer" in str(made.explain("GET", URL))
        counted = {
            each.name: each.value for each in values(Recorder(time.time), made.live, "1") if "quota" in each.name
        }
        assert counted == {
            "meshlib_quota_allowed_total": 0,
            "meshlib_quota_limited_total": 0,
            "meshlib_quota_unanswered_total": 1,
        }


def test_the_question_itself_is_asked_about_nowhere(counting: str) -> None:
    """A quota for all hosts, that of who counts among them."""
    quota = at_service(counting, value("tier", "gold"))
    authority = counting.replace("127.0.0.1", "ratelimit")
    host, port = counting.rsplit(":", 1)
    quotas = (at_service(authority, value("tier", "gold")),)
    given = snapshot(
        {"reviews:9080": [route(forward("c"))], authority: [route(forward("counts"))]},
        {
            "c": (Cluster("c", quotas=quotas), [(host, int(port))]),
            "counts": (Cluster("counts", http2=True, quotas=(quota,)), [(host, int(port))]),
        },
    )
    with Peer() as peer, mesh() as made:
        publish(made, given)
        answer = made.quotas.ask(Question(quotas[0], ((("tier", "gold"),),)))
        assert answer is not None
        assert answer.remaining == 2
        assert peer.received == []


# Calls that come in


def serving(quota: Quota) -> Mesh:
    made = mesh()
    publish(made, Snapshot("1", inbound=(Inbound("inbound", access=Access(quotas=(quota,))),), complete=True))
    return made


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    headers = dict(scope["headers"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": headers.get(b"x-counted", b"")})


def wsgi(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [environ.get("HTTP_X_COUNTED", "").encode()]


def test_a_service_is_asked_about_calls_that_come_in(counting: str) -> None:
    """ASGI and WSGI share what is left; the application sees what the service adds."""
    quota = at_service(counting, value("echo", "1"), answers=True)
    with serving(quota) as made:

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(made.asgi(asgi))
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.get("/")

        first = asyncio.run(ask())
        with httpx.Client(transport=httpx.WSGITransport(made.wsgi(wsgi)), base_url="http://here") as client:
            second = client.get("/")
        assert (first.status_code, first.text, first.headers["x-told"]) == (200, "1", "by the service")
        assert first.headers["x-ratelimit-remaining"] == "0"
        assert (second.status_code, second.text) == (429, "enough")
        assert (second.headers["x-envoy-ratelimited"], second.headers["retry-after"]) == ("true", "1234")
        told = str(made.explain("GET", "http://else/"))
        assert f"quota at-service: counted by {counting} domain shop by echo: 1 passed, 1 turned away, 0 left" in told


@pytest.mark.parametrize(("denies", "status"), [(False, 200), (True, 500)])
def test_calls_come_in_without_an_answer_as_configured(denies: bool, status: int) -> None:
    """Nobody listens there."""
    quota = at_service("127.0.0.1:1", value("echo", "1"), timeout=1.0, denies=denies)
    with (
        serving(quota) as made,
        httpx.Client(transport=httpx.WSGITransport(made.wsgi(wsgi)), base_url="http://here") as client,
    ):
        assert client.get("/").status_code == status


def test_a_grpc_web_server_tells_as_much(counting: str) -> None:
    """A gRPC call that an ASGI application serves gets the headers in its head, which is all it gets."""
    with serving(at_service(counting, value("echo", "1"))) as made:

        async def ask() -> list[httpx.Response]:
            transport = httpx.ASGITransport(made.asgi(asgi))
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                headers = {"content-type": "application/grpc"}
                return [await client.post("/test/Call", headers=headers) for _ in range(2)]

        refused = asyncio.run(ask())[1]
        assert (refused.status_code, refused.headers["grpc-status"], refused.content) == (200, "8", b"")
        assert (refused.headers["x-envoy-ratelimited"], refused.headers["content-type"]) == ("true", "application/grpc")


@contextmanager
def grpc_home(of: Mesh, aio: bool) -> Iterator[str]:
    """host:port of a server of one method, `/test/Call`, behind the mesh's interceptors."""

    def call(request: bytes, context: Any) -> bytes:
        return request

    async def call_async(request: bytes, context: Any) -> bytes:
        return request

    with ExitStack() as stack:
        if not aio:
            pool = stack.enter_context(ThreadPoolExecutor(4))
            server = grpc.server(pool, interceptors=of.grpc_server_interceptors(8080))
            handlers = {"Call": grpc.unary_unary_rpc_method_handler(call)}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            yield f"127.0.0.1:{port}"
            server.stop(0).wait(10)
            return
        ready, ended, ports = threading.Event(), threading.Event(), []

        async def serve() -> None:
            server = grpc.aio.server(interceptors=of.grpc_aio_server_interceptors(8080))
            handlers = {"Call": grpc.unary_unary_rpc_method_handler(call_async)}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
            ports.append(server.add_insecure_port("127.0.0.1:0"))
            await server.start()
            ready.set()
            await asyncio.to_thread(ended.wait, 60)
            await server.stop(0)

        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        assert ready.wait(20)
        try:
            yield f"127.0.0.1:{ports[0]}"
        finally:
            ended.set()
            thread.join(20)


@pytest.mark.parametrize("aio", [False, True])
@pytest.mark.parametrize("grpc_status", ["RESOURCE_EXHAUSTED", "UNAVAILABLE"])
def test_grpc_calls_that_come_in_are_counted(aio: bool, grpc_status: str, counting: str) -> None:
    """With the status that is asked for: ours is RESOURCE_EXHAUSTED, Envoy's default UNAVAILABLE."""
    code: grpc.StatusCode = grpc.StatusCode[grpc_status]
    quota = at_service(counting, value("echo", "1"), answer=LimitAnswer(grpc_status=code.value[0]))
    with serving(quota) as made, grpc_home(made, aio) as address, grpc.insecure_channel(address) as channel:
        call: Any = channel.unary_unary("/test/Call")
        assert call(b"a", timeout=30) == b"a"
        with pytest.raises(grpc.RpcError) as refused:
            call(b"a", timeout=30)
        error: Any = refused.value
        assert (error.code(), error.details()) == (code, "enough")
        told = dict(error.trailing_metadata())
        assert (told["x-envoy-ratelimited"], told["retry-after"], told["x-told"]) == ("true", "1234", "by the service")


def test_an_error_names_what_was_not_answered() -> None:
    """For functions that can't be given a response."""
    quota = Quota("partner", QuotaService("envoy", "127.0.0.1:1", "shop", 1.0, True), ((value("a", "b"),),))
    with mesh(calling(quota, ("127.0.0.1", 1))) as made:

        @made.outbound("reviews:9080")
        def get() -> None: ...

        with pytest.raises(meshlib.RateLimitUnanswered, match=r"partner: no answer from 127\.0\.0\.1:1 domain shop"):
            get()
