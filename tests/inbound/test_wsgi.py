"""MeshWSGI under werkzeug with Flask, and by hand where a server could not show it."""

from __future__ import annotations

import asyncio
import io
import threading
import wsgiref.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import flask
import httpx
import pytest
from inbound_claims import RATINGS, WAIT, Claims, Site
from inbound_servers import werkzeug_server
from werkzeug.wsgi import ClosingIterator

from meshlib.errors import SettingsError
from meshlib.inbound.wsgi import MeshWSGI
from meshlib.policy.propagation import Carried, current
from snapshots import Clock

DEADLINE = "HTTP_X_ENVOY_EXPECTED_RQ_TIMEOUT_MS"


class TestWerkzeug(Claims):
    """The claims that ASGI and WSGI share."""

    def serve(self, application: Any) -> AbstractContextManager[str]:
        return werkzeug_server(application)

    def application(self, site: Site) -> Any:
        app = flask.Flask("books")

        @app.get("/call")
        def plain() -> str:
            return site.call()

        @app.get("/own")
        def own() -> str:
            return site.call(end_user="mary")

        @app.get("/thread")
        def thread() -> str:
            found: list[str] = []
            working = threading.Thread(target=lambda: found.append(site.call()))
            working.start()
            working.join()
            return found[0]

        @app.get("/pool")
        def pool() -> str:
            return site.pool.submit(site.call).result(WAIT)

        @app.get("/executor")
        def executor() -> str:
            async def elsewhere() -> str:
                return await asyncio.get_running_loop().run_in_executor(None, site.call)

            return asyncio.run(elsewhere())

        @app.get("/tasks")
        def tasks() -> str:
            async def call() -> str:
                async with httpx.AsyncClient(transport=site.mesh.async_transport()) as client:
                    response = await client.get(RATINGS)
                    return f"{response.status_code} {response.text}"

            async def both() -> str:
                return " ".join(await asyncio.gather(call(), asyncio.to_thread(site.call)))

            return asyncio.run(both())

        @app.get("/id")
        def seen_id() -> str:
            return flask.request.headers["x-request-id"]

        @app.get("/stream")
        def stream() -> flask.Response:
            def body() -> Iterator[str]:
                yield "first "
                site.release.wait(WAIT)
                yield site.call()
                site.ended.set()

            return flask.Response(body())

        @app.get("/endless")
        def endless() -> flask.Response:
            def body() -> Iterator[bytes]:
                try:
                    while True:
                        yield b"x" * 65536
                finally:
                    site.ended.set()

            return flask.Response(body())

        @app.get("/after")
        def after() -> flask.Response:
            response = flask.Response("soon")
            response.call_on_close(site.call_and_tell)
            return response

        @app.get("/outlive")
        def outlive() -> str:
            threading.Thread(target=lambda: site.release.wait(WAIT) and site.call_and_tell()).start()
            return "started"

        @app.get("/fail")
        def fail() -> str:
            raise LookupError("no such book")

        app.logger.disabled = True  # the exception is meant
        meshed = site.mesh.wsgi(app.wsgi_app)
        app.wsgi_app = lambda environ, start: ClosingIterator(meshed(environ, start), [site.over.set])  # type: ignore[assignment,method-assign,return-value]
        return app


def environ(**given: str) -> dict[str, Any]:
    made: dict[str, Any] = dict(given)
    wsgiref.util.setup_testing_defaults(made)
    return made


class Started(list[Any]):
    """A start_response that keeps what it was given."""

    def __call__(self, status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], object]:
        self.extend((status, dict(headers)))
        return lambda _: None


def answer_ok(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b"ok"]


class Steps:
    """An application whose every step notes what is in force: the call, __iter__, __next__ and close."""

    def __init__(self, *chunks: bytes, fail: str = "") -> None:
        self.seen: list[tuple[str, Carried | None]] = []
        self._chunks = iter(chunks)
        self._fail = fail

    def _note(self, step: str) -> None:
        self.seen.append((step, current.get()))
        if step == self._fail:
            raise LookupError(step)

    def __call__(self, environ: Any, start_response: Any) -> Steps:
        self._note("call")
        start_response("200 OK", [])
        return self

    def __iter__(self) -> Steps:
        self._note("iter")
        return self

    def __next__(self) -> bytes:
        self._note("next")
        return next(self._chunks)

    def close(self) -> None:
        self._note("close")


def test_every_step_of_the_iterable_carries_and_nothing_is_left_between() -> None:
    """Also on another thread than the call's, as bridges from ASGI do it; close() is reached and is the last."""
    steps = Steps(b"a", b"b")
    body = MeshWSGI(steps)(environ(HTTP_X_REQUEST_ID="theirs"), Started())
    assert current.get() is None
    chunks: list[bytes] = []

    def elsewhere() -> None:
        for chunk in body:
            chunks.append(chunk)
            assert current.get() is None
        body.close()  # type: ignore[attr-defined]

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert chunks == [b"a", b"b"]
    assert [step for step, _ in steps.seen] == ["call", "iter", "next", "next", "next", "close"]
    carried = {carried for _, carried in steps.seen}
    assert len(carried) == 1 and None not in carried
    assert current.get() is None


@pytest.mark.parametrize("where", ["call", "iter", "next", "close"])
def test_an_exception_in_any_step_comes_through_and_leaves_nothing(where: str) -> None:
    """And the deadline is over for whatever the request has left running."""
    steps = Steps(b"a", fail=where)
    with pytest.raises(LookupError, match=where):
        body = MeshWSGI(steps)(environ(**{DEADLINE: "1000"}), Started())
        try:
            list(body)
        finally:
            body.close()  # type: ignore[attr-defined]
    assert current.get() is None
    carried = steps.seen[0][1]
    assert carried is not None and carried.remaining_deadline() is None


def test_lists_and_files_keep_their_type() -> None:
    """wsgiref gives a list of one block a Content-Length, gunicorn sends its file wrapper by sendfile."""
    assert MeshWSGI(answer_ok)(environ(), Started()) == [b"ok"]

    def file(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return environ["wsgi.file_wrapper"](io.BytesIO(b"text"))

    found = MeshWSGI(file)(environ() | {"wsgi.file_wrapper": wsgiref.util.FileWrapper}, Started())
    assert type(found) is wsgiref.util.FileWrapper


def test_a_passed_deadline_is_answered_without_the_work() -> None:
    """The outer request's time is over when the inner application is called: 504 in Envoy's words."""
    clock = Clock()
    started: list[str] = []

    def work(environ: Any, start_response: Any) -> list[bytes]:
        started.append(environ["PATH_INFO"])
        return answer_ok(environ, start_response)

    inner = MeshWSGI(work, clock=clock)

    def slow_outer(environ: Any, start_response: Any) -> Any:
        clock.now += 1.5
        return inner(environ, start_response)

    response = Started()
    body = MeshWSGI(slow_outer, clock=clock)(environ(**{DEADLINE: "1000"}), response)
    assert started == []
    assert response == ["504 Gateway Timeout", {"Content-Type": "text/plain", "Content-Length": "24"}]
    assert body == [b"upstream request timeout"]


def test_a_grpc_request_without_time_is_answered_in_grpcs_words() -> None:
    """DEADLINE_EXCEEDED in a head without a body (gRPC-Web bridges run on WSGI)."""
    given = environ(HTTP_GRPC_TIMEOUT="0n") | {"CONTENT_TYPE": "application/grpc"}
    response = Started()
    assert list(MeshWSGI(answer_ok, clock=Clock())(given, response)) == []
    assert response[0] == "200 OK"
    assert response[1]["grpc-status"] == "4"


def test_serving_is_announced_when_the_application_is_wrapped() -> None:
    """No WSGI server tells when it serves, and the first request would come too late: nobody calls the unregistered."""
    told: list[str] = []
    wrapped = MeshWSGI(answer_ok, on_serving=lambda: told.append("serving"))
    wrapped(environ(), Started())
    assert told == ["serving"]


def test_a_name_that_cannot_be_forwarded_is_refused_at_once() -> None:
    """Where the application is wrapped, not with the first request."""
    with pytest.raises(SettingsError, match="'content-length' belongs to one message"):
        MeshWSGI(answer_ok, forward_headers=["content-length"])


def test_a_path_cannot_write_lines_of_its_own_into_our_log(caplog: pytest.LogCaptureFixture) -> None:
    """PATH_INFO is percent-decoded; a line break in it stays visible text."""
    clock = Clock()
    inner = MeshWSGI(answer_ok, clock=clock)

    def slow_outer(environ: Any, start_response: Any) -> Any:
        clock.now += 1.5
        return inner(environ | {"PATH_INFO": "/a\nERROR"}, start_response)

    with caplog.at_level("INFO", "meshlib.inbound"):
        MeshWSGI(slow_outer, clock=clock)(environ(**{DEADLINE: "1000"}), Started())
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]
