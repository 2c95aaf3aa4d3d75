"""MeshASGI under uvicorn with Starlette, and by hand where a server could not show it."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest
from inbound_claims import RATINGS, WAIT, Claims, Site
from inbound_servers import uvicorn_server
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.sync.client import connect

from meshlib.errors import SettingsError
from meshlib.inbound.asgi import MeshASGI
from meshlib.policy.propagation import current
from snapshots import Clock

DEADLINE = (b"x-envoy-expected-rq-timeout-ms", b"1000")


class TestUvicorn(Claims):
    """The claims that ASGI and WSGI share."""

    def serve(self, application: Any) -> AbstractContextManager[str]:
        return uvicorn_server(application)

    def application(self, site: Site) -> Any:
        loop_clients: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}

        async def call(**headers: str) -> str:
            loop = asyncio.get_running_loop()
            if loop not in loop_clients:
                loop_clients[loop] = httpx.AsyncClient(transport=site.mesh.async_transport(), timeout=WAIT)
            response = await loop_clients[loop].get(RATINGS, headers=headers)
            return f"{response.status_code} {response.text}"

        async def plain(request: Request) -> PlainTextResponse:
            return PlainTextResponse(await call())

        async def own(request: Request) -> PlainTextResponse:
            return PlainTextResponse(await call(**{"end-user": "mary"}))

        def thread(request: Request) -> PlainTextResponse:  # Starlette runs it on a thread of anyio's
            found: list[str] = []
            working = threading.Thread(target=lambda: found.append(site.call()))
            working.start()
            working.join()
            return PlainTextResponse(found[0])

        async def pool(request: Request) -> PlainTextResponse:
            return PlainTextResponse(await asyncio.wrap_future(site.pool.submit(site.call)))

        async def executor(request: Request) -> PlainTextResponse:
            return PlainTextResponse(await asyncio.get_running_loop().run_in_executor(None, site.call))

        async def tasks(request: Request) -> PlainTextResponse:
            async with asyncio.TaskGroup() as group:
                both = group.create_task(call()), group.create_task(asyncio.to_thread(site.call))
            return PlainTextResponse(" ".join(task.result() for task in both))

        async def seen_id(request: Request) -> PlainTextResponse:
            return PlainTextResponse(request.headers["x-request-id"])

        async def stream(request: Request) -> StreamingResponse:
            async def body() -> AsyncIterator[str]:
                yield "first "
                await asyncio.to_thread(site.release.wait, WAIT)
                yield await call()
                site.ended.set()

            return StreamingResponse(body())

        async def endless(request: Request) -> StreamingResponse:
            async def body() -> AsyncIterator[bytes]:
                try:
                    while True:
                        yield b"x" * 65536
                        await asyncio.sleep(0)
                finally:
                    site.ended.set()

            return StreamingResponse(body())

        async def after(request: Request) -> PlainTextResponse:
            return PlainTextResponse("soon", background=BackgroundTask(site.call_and_tell))

        async def outlive(request: Request) -> PlainTextResponse:
            threading.Thread(target=lambda: site.release.wait(WAIT) and site.call_and_tell()).start()
            return PlainTextResponse("started")

        async def fail(request: Request) -> PlainTextResponse:
            raise LookupError("no such book")

        async def leave() -> None:
            for client in loop_clients.values():
                await client.aclose()

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await leave()

        paths = {
            "/call": plain,
            "/own": own,
            "/thread": thread,
            "/pool": pool,
            "/executor": executor,
            "/tasks": tasks,
            "/id": seen_id,
            "/stream": stream,
            "/endless": endless,
            "/after": after,
            "/outlive": outlive,
            "/fail": fail,
        }
        meshed = site.mesh.asgi(Starlette(routes=[Route(path, at) for path, at in paths.items()], lifespan=lifespan))

        async def until_over(scope: Any, receive: Any, send: Any) -> None:
            await meshed(scope, receive, send)
            site.over.set()

        return until_over


def http_scope(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "method": "GET", "path": "/", "headers": list(headers)}


async def nothing_to_receive() -> dict[str, Any]:
    raise AssertionError("nothing is received here")


class Sent(list[dict[str, Any]]):
    """An ASGI `send` that keeps what it was given."""

    async def __call__(self, message: Any) -> None:
        self.append(dict(message))


async def answer_ok(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


async def test_a_passed_deadline_is_answered_without_the_work() -> None:
    """The outer request's time is over when the inner application is called: 504 in Envoy's words."""
    clock = Clock()
    started: list[str] = []

    async def work(scope: Any, receive: Any, send: Any) -> None:
        started.append(scope["path"])
        await answer_ok(scope, receive, send)

    inner = MeshASGI(work, clock=clock)

    async def slow_outer(scope: Any, receive: Any, send: Any) -> None:
        clock.now += 1.5
        await inner(scope, receive, send)

    sent = Sent()
    await MeshASGI(slow_outer, clock=clock)(http_scope(DEADLINE), nothing_to_receive, sent)
    assert started == []
    assert [message.get("status") for message in sent] == [504, None]
    assert dict(sent[0]["headers"])[b"content-type"] == b"text/plain"
    assert sent[1]["body"] == b"upstream request timeout"


async def test_a_grpc_request_without_time_is_answered_in_grpcs_words() -> None:
    """DEADLINE_EXCEEDED in a head without a body, and the work is not begun."""
    headers = [(b"content-type", b"application/grpc"), (b"grpc-timeout", b"0n")]
    sent = Sent()
    await MeshASGI(answer_ok, clock=Clock())({**http_scope(), "headers": headers}, nothing_to_receive, sent)
    assert [message.get("status") for message in sent] == [200, None]
    assert dict(sent[0]["headers"])[b"grpc-status"] == b"4"
    assert sent[1]["body"] == b""


async def test_a_path_cannot_write_lines_of_its_own_into_our_log(caplog: pytest.LogCaptureFixture) -> None:
    """ASGI's path is percent-decoded; a line break in it stays visible text."""
    clock = Clock()
    inner = MeshASGI(answer_ok, clock=clock)

    async def slow_outer(scope: Any, receive: Any, send: Any) -> None:
        clock.now += 1.5
        await inner({**scope, "path": "/a\nERROR"}, receive, send)

    with caplog.at_level("INFO", "meshlib.inbound"):
        await MeshASGI(slow_outer, clock=clock)(http_scope(DEADLINE), nothing_to_receive, Sent())
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]


async def test_the_deadline_is_lifted_before_the_last_chunk_leaves() -> None:
    """A server may begin the connection's next request while it sends that one."""
    seen: list[float | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})

    async def send(message: Any) -> None:
        carried = current.get()
        assert carried is not None
        seen.append(carried.remaining_deadline())

    clock = Clock()
    await MeshASGI(app, clock=clock)(http_scope(DEADLINE), nothing_to_receive, send)
    assert seen == [clock.now + 1.0, clock.now + 1.0, None]


async def test_messages_pass_through_untouched() -> None:
    """Without a deadline the application gets the server's own receive and send, and the scope when it has an id."""
    given: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        given.extend((scope, receive, send))

    scope, sent = http_scope((b"x-request-id", b"theirs")), Sent()
    await MeshASGI(app)(scope, nothing_to_receive, sent)
    assert given[0] is scope and given[1] is nothing_to_receive and given[2] is sent


async def test_a_scope_without_an_id_is_not_changed_in_place() -> None:
    """ASGI: middleware hands on a copy; the server's own scope belongs to the server."""
    scope = http_scope((b"x-request-id", b"has spaces"), (b"host", b"a"))
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])

    await MeshASGI(app)(scope, nothing_to_receive, Sent())
    assert scope == http_scope((b"x-request-id", b"has spaces"), (b"host", b"a"))
    assert [name for name, _ in seen] == [b"host", b"x-request-id"]


async def test_exceptions_and_cancellation_come_through_and_leave_nothing() -> None:
    """Whatever ends the application ends its context too."""
    began = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        began.set()
        if scope["path"] == "/":
            raise LookupError("no such book")
        await asyncio.Event().wait()

    wrapped = MeshASGI(app)
    with pytest.raises(LookupError, match="no such book"):
        await wrapped(http_scope(), nothing_to_receive, Sent())
    assert current.get() is None
    began.clear()
    task = asyncio.create_task(wrapped({**http_scope(), "path": "/wait"}, nothing_to_receive, Sent()))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_request_that_a_closed_loop_left_behind_ends_quietly() -> None:
    """Its coroutine is finished outside of the context that it began in."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.get_running_loop().create_future()

    async def begin() -> Any:
        request = MeshASGI(app)(http_scope(), nothing_to_receive, Sent())
        request.send(None)  # up to the await
        return request

    left = asyncio.run(begin())
    left.close()
    del left
    gc.collect()


async def test_serving_begins_when_the_application_has_started_up() -> None:
    """Not while it still warms up, and once."""
    told: list[str] = []
    sent = Sent()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            return await answer_ok(scope, receive, send)
        assert (await receive())["type"] == "lifespan.startup"
        told.append("warm")
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        await send({"type": "lifespan.shutdown.complete"})

    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Any:
        return next(messages)

    wrapped = MeshASGI(app, on_serving=lambda: told.append("serving"))
    assert told == []
    await wrapped({"type": "lifespan"}, receive, sent)
    await wrapped(http_scope(), nothing_to_receive, Sent())
    assert told == ["warm", "serving"]
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_an_application_without_lifespan_serves_all_the_same() -> None:
    """The server learns that lifespan is unsupported, as without the middleware, and goes on: so does the mesh."""
    told: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise AssertionError("unsupported")
        await answer_ok(scope, receive, send)

    wrapped = MeshASGI(app, on_serving=lambda: told.append("serving"))
    with pytest.raises(AssertionError, match="unsupported"):
        await wrapped({"type": "lifespan"}, nothing_to_receive, Sent())
    assert told == ["serving"]


async def test_a_failed_startup_serves_nothing() -> None:
    """The server exits after it, so there is nothing to register."""
    told: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    await MeshASGI(app, on_serving=lambda: told.append("serving"))({"type": "lifespan"}, nothing_to_receive, Sent())
    assert told == []


async def test_without_a_lifespan_the_first_request_tells() -> None:
    """uvicorn --lifespan off, and servers that know none."""
    told: list[str] = []
    wrapped = MeshASGI(answer_ok, on_serving=lambda: told.append("serving"))
    for _ in range(2):
        await wrapped(http_scope(), nothing_to_receive, Sent())
    assert told == ["serving"]


def test_a_websocket_passes_through_and_its_calls_carry() -> None:
    """Frames both ways; a deadline in the handshake does not limit a socket that stays open."""
    found: list[Any] = []

    async def echo(socket: WebSocket) -> None:
        await socket.accept()
        carried = current.get()
        assert carried is not None
        found.append((dict(carried.headers).get(b"end-user"), carried.remaining_deadline()))
        async for text in socket.iter_text():
            await socket.send_text(text.upper())

    app = MeshASGI(Starlette(routes=[WebSocketRoute("/", echo)]), forward_headers=["end-user"])
    headers = {"end-user": "jason", "x-envoy-expected-rq-timeout-ms": "1"}
    with uvicorn_server(app) as url, connect(url.replace("http", "ws"), additional_headers=headers) as socket:
        for word in ("one", "two"):
            socket.send(word)
            assert socket.recv(WAIT) == word.upper()
    assert found == [(b"jason", None)]


def test_a_name_that_cannot_be_forwarded_is_refused_at_once() -> None:
    """Where the application is wrapped, not with the first request."""
    with pytest.raises(SettingsError, match="'content-length' belongs to one message"):
        MeshASGI(answer_ok, forward_headers=["content-length"])
