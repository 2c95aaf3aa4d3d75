"""Does a fake mesh do to each client what the script says, by the real engine and over real sockets?"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import httpx
import pytest
import requests
import urllib3

import meshlib
from meshlib.testing import FakeMesh, Received, Response
from promises import within

RETRIES = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http:
  - retries: {attempts: 2, retryOn: "5xx,reset,connect-failure", backoff: 1ms}
    route: [{destination: {host: reviews}}]
"""
TIMEOUT = RETRIES.replace("  - retries", "  - timeout: 100ms\n    retries")
URL = "http://reviews:9080/reviews/0"


def by_httpx(mesh: FakeMesh) -> int:
    with mesh.Client(trust_env=False) as client:
        return client.get(URL).status_code


async def by_async_httpx(mesh: FakeMesh) -> int:
    async with mesh.AsyncClient(trust_env=False) as client:
        return (await client.get(URL)).status_code


def by_requests(mesh: FakeMesh) -> int:
    with requests.Session() as session:
        session.trust_env = False
        session.mount("http://", mesh.requests_adapter())
        return session.get(URL).status_code


def by_urllib3(mesh: FakeMesh) -> int:
    return mesh.urllib3().request("GET", URL).status


async def by_aiohttp(mesh: FakeMesh) -> int:
    async with aiohttp.ClientSession(middlewares=[mesh.aiohttp_middleware()]) as session, session.get(URL) as response:
        await response.read()
        return response.status


async def ask(way: Callable[[FakeMesh], Any], mesh: FakeMesh) -> int:
    found = way(mesh)
    return found if isinstance(found, int) else await found


every_client = pytest.mark.parametrize("way", [by_httpx, by_async_httpx, by_requests, by_urllib3, by_aiohttp])


@pytest.fixture
def mesh() -> Iterator[FakeMesh]:
    with FakeMesh() as made:
        yield made


@every_client
async def test_each_client_meets_the_scripted_faults(mesh: FakeMesh, way: Callable[[FakeMesh], Any]) -> None:
    """Two failures and then an answer: without retries the first is seen, with them the answer."""
    reviews = mesh.service("reviews:9080").fails(503, times=1).responds(200, json=[])
    assert await ask(way, mesh) == 503
    mesh.apply(RETRIES)
    reviews.fails(500, times=1).fails(502, times=1)
    assert await ask(way, mesh) == 200
    assert len(reviews.received) == 4
    assert [(call.authority, call.status, call.attempts) for call in mesh.calls] == [
        ("reviews:9080", 503, 1),
        ("reviews:9080", 200, 3),
    ]


@every_client
async def test_a_connection_is_reset_for_each_client(mesh: FakeMesh, way: Callable[[FakeMesh], Any]) -> None:
    """On a connection that was just made, so that nobody takes it for one that had been idle too long."""
    reviews = mesh.service("reviews:9080").resets(times=1)
    mesh.apply(RETRIES)
    assert await ask(way, mesh) == 200
    assert (len(reviews.received), mesh.calls[0].attempts) == (2, 2)


@every_client
async def test_a_delay_ends_at_the_routes_timeout(mesh: FakeMesh, way: Callable[[FakeMesh], Any]) -> None:
    """504, flag UT, long before the service would have answered."""
    mesh.service("reviews:9080").delays(30.0)
    mesh.apply(TIMEOUT)
    began = time.monotonic()
    assert await ask(way, mesh) == 504
    assert time.monotonic() - began < within(5)
    assert mesh.calls[0].flags == "UT"


async def test_a_service_that_is_down_refuses_and_comes_back(mesh: FakeMesh) -> None:
    """Connections that exist end; the port stays the service's own."""
    reviews = mesh.service("reviews:9080").responds(body="here")
    with mesh.Client(trust_env=False) as client:
        assert client.get(URL).text == "here"
        reviews.is_down().is_down()
        with pytest.raises(httpx.ConnectError) as caught:
            client.get(URL)
        assert isinstance(caught.value, meshlib.UpstreamConnectionFailure)
        assert mesh.calls[-1].attempts == 3  # Istio's default tries twice more where no connection was made
        assert len(reviews.received) == 1
        reviews.is_up().is_up()
        assert client.get(URL).text == "here"


def test_a_host_that_no_test_has_named_is_not_called(mesh: FakeMesh) -> None:
    """Not even where it exists."""
    with FakeMesh() as other:
        host, port = other.service("reviews").address
        with mesh.Client(trust_env=False) as client:
            assert client.get(f"http://{host}:{port}/").status_code == 502
        assert other.service("reviews").received == []


def test_what_was_sent_can_be_asked_for(mesh: FakeMesh) -> None:
    """Method, path with its query, headers, body."""
    reviews = mesh.service("reviews:9080").answers(lambda got: Response(201, got.body, {"x-path": got.path}))
    with mesh.Client(trust_env=False) as client:
        answer = client.post("http://reviews:9080/a?b=c", json={"stars": 5}, headers={"End-User": "jason"})
    assert (answer.status_code, answer.json(), answer.headers["x-path"]) == (201, {"stars": 5}, "/a?b=c")
    (received,) = reviews.received
    assert (received.method, received.path, received.json()) == ("POST", "/a?b=c", {"stars": 5})
    assert (received.headers["end-user"], received.headers["host"]) == ("jason", "reviews:9080")


def test_the_configuration_of_production_routes_between_versions(mesh: FakeMesh, tmp_path: Path) -> None:
    """From files; who serves what in them is left out."""
    v1 = mesh.service("reviews:9080", labels={"version": "v1"}).responds(body="v1")
    v2 = mesh.service("reviews:9080", labels={"version": "v2"}).responds(body="v2")
    (tmp_path / "mesh.yaml").write_text("""
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec: {ports: [{port: 9080, name: http}], selector: {app: reviews}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews}
spec:
  host: reviews
  subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http:
  - match: [{headers: {end-user: {exact: jason}}}]
    route: [{destination: {host: reviews, subset: v2}}]
  - route: [{destination: {host: reviews, subset: v1}}]
""")
    mesh.apply(tmp_path)
    with mesh.Client(trust_env=False) as client:
        assert client.get(URL, headers={"end-user": "jason"}).text == "v2"
        assert client.get(URL).text == "v1"
    assert (len(v1.received), len(v2.received)) == (1, 1)
    mesh.apply(tmp_path / "mesh.yaml")


def test_configuration_that_is_wrong_is_refused_whole(mesh: FakeMesh) -> None:
    """With object and field; what was in force stays."""
    mesh.service("reviews:9080").fails(503, times=1)
    mesh.apply(RETRIES)
    for wrong in (RETRIES.replace("attempts: 2", "attempts: -2"), RETRIES.replace("host: reviews}", "host: nobody}")):
        with pytest.raises(meshlib.ConfigurationError, match="reviews"):
            mesh.apply(wrong)
    with mesh.Client(trust_env=False) as client:
        assert client.get(URL).status_code == 200


def test_a_function_of_the_test_that_raises_is_seen(mesh: FakeMesh) -> None:
    """As what a server would make of it: 500, with the exception's text."""
    mesh.service("reviews:9080").answers(lambda got: Response(body=got.headers["absent"].encode()))
    with mesh.Client(trust_env=False) as client:
        answer = client.get(URL)
    assert (answer.status_code, answer.text) == (500, "KeyError('absent')")


def test_mistakes_in_a_test_are_told(mesh: FakeMesh) -> None:
    """At the line that makes them."""
    with pytest.raises(ValueError, match="times=0"):
        mesh.service("reviews:9080").fails(times=0)
    with pytest.raises(ValueError, match="-1"):
        mesh.service("reviews:9080").delays(-1)
    with pytest.raises(ValueError, match="100"):
        mesh.service("reviews:9080").responds(100)
    with pytest.raises(ValueError, match="one protocol"):
        mesh.grpc_service("reviews:9080")
    with pytest.raises(ValueError, match="host:port"):
        mesh.service("reviews:http")
    with pytest.raises(meshlib.SettingsError, match="namespaces"):
        FakeMesh(namespaces="x")


def test_functions_under_the_decorator_are_calls_too(mesh: FakeMesh) -> None:
    """Their tries are counted, although no fake service sees them."""
    mesh.service("reviews:9080")
    mesh.apply(RETRIES)
    outcomes: list[Any] = [ConnectionError("once"), "answer"]

    @mesh.outbound("reviews:9080", idempotent=True)
    def ask() -> str:
        found = outcomes.pop(0)
        if isinstance(found, Exception):
            raise found
        return str(found)

    assert ask() == "answer"
    assert mesh.calls[0].attempts == 2


def test_clients_without_a_word_of_the_mesh_are_put_on_it(mesh: FakeMesh) -> None:
    """As by meshctl run."""
    reviews = mesh.service("reviews:9080").responds(json={"stars": 5})
    with mesh.instrumented():
        assert requests.get(URL, timeout=10).json() == {"stars": 5}
        assert urllib3.PoolManager().request("GET", URL).json() == {"stars": 5}
    assert len(reviews.received) == 2


def test_grpc_calls_meet_the_scripted_faults(mesh: FakeMesh) -> None:
    """Unary and streams; a failure is retried, a service that is down is unavailable."""
    ratings = mesh.grpc_service("ratings:9080").fails(times=1).responds(b"5")
    with mesh.grpc_channel("ratings:9080") as channel:
        get = channel.unary_unary("/bookinfo.Ratings/Get")
        assert get(b"1", metadata=(("end-user", "jason"),), timeout=10) == b"5"
        first, second = ratings.received
        for each in (first, second):
            assert each == Received("POST", "/bookinfo.Ratings/Get", each.headers, b"1", (b"1",))
        assert first.headers["end-user"] == "jason"
        assert (mesh.calls[0].attempts, mesh.calls[0].grpc_status) == (2, "0")
        ratings.answers(lambda received: [each + b"!" for each in received.messages])
        assert list(channel.stream_stream("/bookinfo.Ratings/All")(iter([b"1", b"2"]), timeout=10)) == [b"1!", b"2!"]
        ratings.fails(grpc.StatusCode.NOT_FOUND, "no such product")
        with pytest.raises(grpc.RpcError) as caught:
            get(b"1", timeout=10)
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "no such product")
        ratings.is_down()
        with pytest.raises(grpc.RpcError) as caught:
            get(b"1", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_grpc_calls_on_asyncio_meet_them_too(mesh: FakeMesh) -> None:
    """The same service."""
    mesh.grpc_service("ratings:9080").fails(times=1).responds(b"5").delays(0.01)
    async with mesh.grpc_aio_channel("ratings:9080") as channel:
        assert await channel.unary_unary("/bookinfo.Ratings/Get")(b"1", timeout=10) == b"5"


def test_nothing_is_left_behind() -> None:
    """No thread, and no port."""
    before = threading.active_count()

    def call() -> None:
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://{host}:{port}/", trust_env=False, timeout=20)

    with FakeMesh() as made:
        host, port = made.service("reviews:9080").delays(30).address
        calling = threading.Thread(target=call)
        calling.start()
        while not made.service("reviews:9080").received:
            time.sleep(0.01)
    calling.join(10)
    assert threading.active_count() == before
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{host}:{port}/", trust_env=False)


def test_the_plugin_loads_nothing_by_itself() -> None:
    """What is not used costs nothing."""
    program = "import sys, meshlib.pytest_plugin as p; print(sorted(n for n in sys.modules if n.startswith('meshlib')))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "['meshlib', 'meshlib.pytest_plugin', 'meshlib.version']"
