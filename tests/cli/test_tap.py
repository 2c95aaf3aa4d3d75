"""What do tap and top print of two processes that really call each other, and sample nothing by themselves?"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from dashboard.pictured_town import Town
from inbound.inbound_servers import uvicorn_server
from meshlib.cli.app import app
from meshlib.controlplane.taps import request_of
from meshlib.controlplane.telemetry_store import Span
from meshlib.mesh import Mesh
from meshlib.settings import Settings
from promises import within
from telemetry.test_both_ends import _asgi

Meshctl = Callable[..., Result]
PATHS = ("/200?access_token=hunter2&page=1", "/503")
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec: {selector: {app: reviews}, ports: [{name: http, port: 9080}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http: [{name: all-of-them, retries: {attempts: 0}, route: [{destination: {host: reviews}}]}]
"""


def eventually(what: Callable[[], bool], told: str) -> None:
    """Of another thread's state, which can only be asked for."""
    deadline = time.monotonic() + within(20)
    while not what():
        assert time.monotonic() < deadline, told
        time.sleep(0.02)


class Running:
    """reviews-v1, productpage-v1, and a caller in it that never rests."""

    def __init__(self, town: Town, server: Mesh, client: Mesh) -> None:
        self.town, self.server, self.client = town, server, client
        self._stop = threading.Event()
        self._caller = threading.Thread(target=self._call, daemon=True)
        self._caller.start()

    def _call(self) -> None:
        with self.client.Client() as http:
            while not self._stop.is_set():
                for path in PATHS:
                    try:
                        http.get(f"http://reviews:9080{path}", headers={"authorization": "Bearer hunter2"})
                    except httpx.HTTPError:
                        pass  # the services are not known yet
                self._stop.wait(0.02)

    def are_watched(self) -> list[bool]:
        found = [each.telemetry for each in (self.client, self.server)]
        return [each is not None and each._is_watched for each in found]

    def stop(self) -> None:
        self._stop.set()
        self._caller.join(20)


class _App:
    """The application once its Mesh is there, which has to know the port."""

    mesh: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await (self.mesh or _asgi)(scope, receive, send)


def _settings(town: Town, app: str, address: str = "", telemetry_interval: float = 30.0) -> Settings:
    return Settings(
        control_plane=town.target,
        service=app,
        labels=(("app", app), ("version", "v1")),
        address=address,
        cache_dir="-",
        trace_sampling=0.0,
        telemetry_interval=telemetry_interval,
    )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("mesh")
    (folder / "reviews.yaml").write_text(SERVICE)
    serving = _App()
    with (
        uvicorn_server(serving) as url,
        Town(folder) as town,
        Mesh(_settings(town, "reviews", httpx.URL(url).netloc.decode())) as server,
        Mesh(_settings(town, "productpage")) as client,
    ):
        serving.mesh = server.asgi(_asgi)
        server.serve()
        made = Running(town, server, client)
        try:
            yield made
        finally:
            made.stop()


@pytest.fixture
def meshctl(running: Running) -> Meshctl:
    def run(*words: str) -> Result:
        return CliRunner().invoke(app, [*words, "--control-plane", running.town.url], env={"MESHCTL_ADMIN": ""})

    def names() -> set[Any]:
        return {each["workload"] for each in httpx.get(f"{running.town.url}/v1/clients").json()["clients"]}

    eventually(lambda: names() == {"reviews-v1", "productpage-v1"}, "both are connected")
    return run


def test_a_tap_shows_what_nobody_sampled_and_leaves_nothing_behind(running: Running, meshctl: Meshctl) -> None:
    """In linkerd's form, without credentials; when it ends, the processes sample as before."""
    assert running.are_watched() == [False, False]
    found = meshctl("tap", "productpage-v1", "--path", "/200", "--limit", "2")
    assert (found.exit_code, found.stderr) == (0, "tapping productpage-v1.default: 1 processes\n")
    first, second = found.stdout.splitlines()[:2]
    ends = "id=1 proxy=out src=productpage-v1.default dst=reviews-v1.default tls=false"
    assert first == f"req {ends} :method=GET :authority=reviews:9080 :path=/200?access_token=REDACTED&page=1"
    assert re.fullmatch(rf"rsp {ends} :status=200 duration=\d+µs", second)
    assert len(found.stdout.splitlines()) == 4
    eventually(lambda: not any(running.are_watched()), "sampling is as before")


def test_who_serves_is_looked_at_by_its_service(running: Running, meshctl: Meshctl) -> None:
    """Though whoever calls it has not sampled the request; as JSON, one a line; filtered by caller and failure."""
    found = meshctl("tap", "reviews", "--from", "productpage", "--path", "/200", "--limit", "1", "-o", "json")
    told = json.loads(found.stdout)
    assert (told["direction"], told["workload"], told["peer"]) == ("in", "reviews-v1", "productpage-v1.default")
    assert told["path"] == "/200?access_token=REDACTED&page=1"
    assert "hunter2" not in found.stdout
    failed = meshctl("tap", "reviews-v1", "--failed", "--method", "get", "--limit", "1", "-o", "wide")
    assert re.search(r":path=/503\nrsp .* :status=503 duration=\d+µs route=- attempts=- trace=\w{32}$", failed.stdout)


def test_a_tap_is_bounded_and_says_what_it_leaves_out(meshctl: Meshctl) -> None:
    """By so many a second."""
    found = meshctl("tap", "productpage-v1", "--rate", "1", "--limit", "3")
    assert re.search(r"\d+ more in this second: see --rate, or filter", found.stderr)


def test_top_counts_each_request_once(running: Running, meshctl: Meshctl) -> None:
    """By linkerd's columns, once more as JSON."""
    assert meshctl("tap", "productpage-v1", "--limit", "4").exit_code == 0
    lines = meshctl("top", "--once", "--from", "productpage-v1").stdout.splitlines()
    assert lines[0].split() == (
        ["SOURCE", "DESTINATION", "METHOD", "PATH", "ROUTE", "COUNT", "BEST", "WORST", "LAST", "SUCCESS_RATE"]
    )
    rows = {line.split()[3]: line.split() for line in lines[1:] if "all-of-them" in line}
    for path, share in (("/200", "100.00%"), ("/503", "0.00%")):
        source, target, method, _, route, *_, success = rows[path]
        assert (source, target, method, route) == ("productpage-v1.default", "reviews-v1.default", "GET", "all-of-them")
        assert success == share
    (one,) = json.loads(meshctl("top", "productpage-v1", "--path", "/503", "-o", "json").stdout)
    assert 0 < one["best"] <= one["last"] <= one["worst"]
    assert one["count"] > 1


def test_a_query_is_shown_without_its_credentials() -> None:
    """Whoever has made the span, and whether it has looked at them."""
    told = {"http.request.method": "GET", "url.path": "/a", "url.query": "access_token=hunter2&page=1"}
    span = Span("ab" * 16, "01" * 8, "", "reviews", "GET", "server", 1.0, 1.5, False, tuple(sorted(told.items())))
    request = request_of(span)
    assert request is not None
    assert (request.path, request.duration, request.failed) == ("/a?access_token=REDACTED&page=1", 0.5, False)
    assert request_of(replace(span, attributes=(*span.attributes, ("mesh.attempt", "2")))) is None


def test_who_is_not_there_is_said(meshctl: Meshctl) -> None:
    """In one sentence each."""
    nobody = meshctl("tap", "nobody")
    assert (nobody.exit_code, "no process of default/nobody is connected" in nobody.stderr) == (1, True)
    nothing = meshctl("top", "--once", "--path", "/nowhere")
    assert (nothing.exit_code, "no request was sampled in the last 60 s" in nothing.stderr) == (1, True)
    assert "there are json and wide" in meshctl("tap", "reviews-v1", "-o", "xml").stderr
