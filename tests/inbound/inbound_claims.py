"""What holds for ASGI and for WSGI alike. Each test serves a small application, calls it, and looks at what the service
behind it was sent; the application's own calls go through the mesh."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import pytest

from meshlib.mesh import Mesh
from meshlib.model import HeaderMatch, RouteMatch, Snapshot, StringMatch
from meshlib.policy import propagation
from peers import Answer, Peer, Received
from snapshots import forward, mesh, route, service, snapshot

RATINGS = "http://ratings:9080/ratings/0"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
JASON = {"end-user": "jason", "traceparent": TRACEPARENT, "x-request-id": "from-outside", "cookie": "session=1"}
WAIT = 10.0


class Site:
    """What an application under test uses, and what its test looks at.

    release: the test's, for a handler that waits. ended: the handler's, for the test to wait for. over: set when a
      request has ended for the middleware, which may be after its client has read all of the answer.
    """

    def __init__(self, at: Mesh) -> None:
        self.mesh = at
        self.client = httpx.Client(transport=at.transport(), timeout=WAIT)
        self.pool = ThreadPoolExecutor(1)
        self.release = threading.Event()
        self.ended = threading.Event()
        self.over = threading.Event()
        self.error: BaseException | None = None
        self.result = ""

    def call(self, **headers: str) -> str:
        """One outbound call; its status and what the service behind said."""
        response = self.client.get(RATINGS, headers={name.replace("_", "-"): value for name, value in headers.items()})
        return f"{response.status_code} {response.text}"

    def call_and_tell(self) -> None:
        self.result = self.call()
        self.ended.set()

    def close(self) -> None:
        self.release.set()
        self.pool.shutdown()
        self.client.close()


class Claims:
    """Subclassed for each kind of application. `application` serves these paths:

    /call, /own (end-user: mary), /thread, /pool, /executor, /tasks (two at once), /id (the x-request-id it sees),
    /stream (two chunks; after the first it waits for `release`; the second is what a call said; sets `ended`),
    /endless (chunks until it is closed; sets `ended`), /after (calls when the response has gone), /fail (raises
    LookupError), /outlive (starts a thread that waits for `release` and then calls).
    """

    def application(self, site: Site) -> Any:
        raise NotImplementedError

    def serve(self, application: Any) -> AbstractContextManager[str]:
        raise NotImplementedError

    @contextmanager
    def served(self, peer: Peer, given: Snapshot | None = None) -> Iterator[tuple[Site, httpx.Client]]:
        configured = given or service("ratings:9080", [peer.address])
        with mesh(configured, forward_headers=("end-user",)) as made:
            site = Site(made)
            try:
                with (
                    self.serve(self.application(site)) as url,
                    httpx.Client(base_url=url, timeout=WAIT, headers={"user-agent": "test"}) as client,
                ):
                    try:
                        yield site, client
                    finally:
                        site.release.set()
            finally:
                site.close()

    @pytest.mark.parametrize("path", ["/call", "/thread", "/pool", "/executor", "/tasks"])
    def test_what_a_request_brings_goes_out_with_its_calls(self, path: str) -> None:
        """From the handler itself, from threads and pools it uses, and from its tasks; cookies stay."""
        with Peer() as peer, self.served(peer) as (_, client):
            assert client.get(path, headers=JASON).text.startswith("200 ok")
            assert len(peer.received) == (2 if path == "/tasks" else 1)
            for received in peer.received:
                sent = {name: received.header(name) for name in JASON}
                assert sent == {**JASON, "cookie": None}

    @pytest.mark.parametrize("path", ["/call", "/thread", "/pool", "/executor", "/tasks"])
    def test_the_next_request_begins_with_nothing(self, path: str) -> None:
        """On the same connection and the same threads: nothing of jason's is left."""
        with Peer() as peer, self.served(peer) as (_, client):
            client.get(path, headers=JASON)
            before = len(peer.received)
            client.get(path)
            for received in peer.received[before:]:
                assert (received.header("end-user"), received.header("traceparent")) == (None, None)
                assert received.header("x-request-id") not in (None, "from-outside")

    def test_requests_served_at_once_do_not_mix(self) -> None:
        """Each call carries its own request's user, through one client and one pool."""

        def answer(received: Received) -> Answer:
            return Answer(body=(received.header("end-user") or "nobody").encode())

        with Peer(answer) as peer, self.served(peer) as (_, client), ThreadPoolExecutor(8) as users:

            def visit(number: int) -> tuple[str, str]:
                path = ("/call", "/thread", "/pool", "/executor")[number % 4]
                return f"200 user{number}", client.get(path, headers={"end-user": f"user{number}"}).text

            for wanted, found in users.map(visit, range(60)):
                assert found == wanted

    @pytest.mark.parametrize("path", ["/call", "/thread", "/executor"])
    def test_routes_match_on_what_is_carried(self, path: str) -> None:
        """Istio's tutorial: jason sees v2 and everybody else v1, several services further on too."""
        with Peer(lambda _: Answer(body=b"v1")) as v1, Peer(lambda _: Answer(body=b"v2")) as v2:
            jason = RouteMatch(headers=(HeaderMatch("end-user", StringMatch("exact", "jason")),))
            routes = [route(forward("v2"), jason), route(forward("v1"))]
            given = snapshot({"ratings:9080": routes}, {"v1": [v1.address], "v2": [v2.address]})
            with self.served(v1, given) as (_, client):
                assert client.get(path, headers=JASON).text == "200 v2"
                assert client.get(path).text == "200 v1"

    def test_the_applications_own_headers_win(self) -> None:
        """A service that logs mary in says so itself."""
        with Peer() as peer, self.served(peer) as (_, client):
            client.get("/own", headers=JASON)
            assert peer.received[0].header("end-user") == "mary"
            assert peer.received[0].header("traceparent") == TRACEPARENT

    def test_the_application_sees_the_id_that_was_made(self) -> None:
        """So that its log and the next service's agree, as behind Envoy."""
        with Peer() as peer, self.served(peer) as (_, client):
            made = client.get("/id").text
            assert len(made) == 36
            assert client.get("/id").text != made
            assert client.get("/id", headers=JASON).text == "from-outside"
            client.get("/call")
            assert len(peer.received[0].header("x-request-id") or "") == 36

    def test_a_call_ends_with_its_callers_patience(self) -> None:
        """A service that never answers holds nobody longer than the caller waits: 504 UT, not the client's timeout."""
        never = threading.Event()

        async def answer(_: Received) -> Answer:
            import asyncio

            await asyncio.to_thread(never.wait, WAIT)
            return Answer(drop=True)

        with Peer(answer) as peer, self.served(peer) as (_, client):
            found = client.get("/call", headers={"x-envoy-expected-rq-timeout-ms": "300"})
            never.set()
            assert found.text == "504 upstream request timeout"
            assert 0 < int(peer.received[0].header("x-envoy-expected-rq-timeout-ms") or 0) <= 300

    def test_a_body_streams_and_its_calls_carry(self) -> None:
        """The first chunk arrives while the second can't exist yet; the call made for the second carries too."""
        with Peer() as peer, self.served(peer) as (site, client):
            with client.stream("GET", "/stream", headers=JASON) as response:
                chunks = response.iter_raw()
                assert next(chunks) == b"first "
                assert peer.received == []
                site.release.set()
                assert b"".join(chunks) == b"200 ok"
            assert site.ended.wait(WAIT)
            assert peer.received[0].header("end-user") == "jason"

    def test_an_application_learns_that_its_client_has_left(self) -> None:
        """The body is closed as it would be without the middleware."""
        with Peer() as peer, self.served(peer) as (site, client):
            with client.stream("GET", "/endless") as response:
                assert next(response.iter_raw())
            assert site.ended.wait(WAIT)

    def test_work_after_the_response_has_a_trace_and_no_deadline(self) -> None:
        """Nobody waits any more, so the time that the caller had is no limit."""
        with Peer() as peer, self.served(peer) as (site, client):
            client.get("/after", headers={**JASON, "x-envoy-expected-rq-timeout-ms": "60000"})
            assert site.ended.wait(WAIT)
            assert peer.received[0].header("traceparent") == TRACEPARENT
            assert peer.received[0].header("x-envoy-expected-rq-timeout-ms") is None

    def test_a_thread_that_outlives_its_request_loses_the_deadline_only(self) -> None:
        """Begun within the request, it goes on for the same user and the same trace."""
        with Peer() as peer, self.served(peer) as (site, client):
            client.get("/outlive", headers={**JASON, "x-envoy-expected-rq-timeout-ms": "60000"})
            assert site.over.wait(WAIT)
            site.release.set()
            assert site.ended.wait(WAIT)
            assert peer.received[0].header("end-user") == "jason"
            assert peer.received[0].header("x-envoy-expected-rq-timeout-ms") is None

    def test_an_exception_is_the_servers_to_answer(self) -> None:
        """500 as without the middleware, and the next request works."""
        with Peer() as peer, self.served(peer) as (_, client):
            assert client.get("/fail", headers={**JASON, "connection": "close"}).status_code == 500
            assert client.get("/call").text == "200 ok"
            assert peer.received[0].header("end-user") is None
        assert propagation.current.get() is None
