"""Mesh starts late, publishes whole, survives forks, and ends clean."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import pytest

import meshlib
from certificates import TestCA, write_identity
from meshlib import feed
from meshlib.errors import MeshClosed
from meshlib.mesh import Mesh
from meshlib.model import FeedState, Snapshot
from meshlib.settings import Settings
from peers import Peer
from promises import within
from snapshots import mesh, publish, service, snapshot


class Scripted:
    """A Source in a test's hands: publishes what it is told to."""

    def __init__(self) -> None:
        self.wanted: list[str] = []
        self.state = FeedState(is_connected=True)
        self.asked = threading.Event()
        self.ready = threading.Event()
        self._stopped = threading.Event()
        self._started = threading.Event()
        self._publish: Callable[[Snapshot], None] | None = None

    def run(self, publish: Callable[[Snapshot], None]) -> None:
        self._publish = publish
        self._started.set()
        self._stopped.wait()

    def want(self, authority: str) -> None:
        self.wanted.append(authority)
        self.asked.set()

    def set_ready(self, workload: object = None) -> None:
        self.ready.set()

    def stop(self) -> None:
        self._stopped.set()

    def tell(self, given: Snapshot) -> None:
        assert self._started.wait(10)
        assert self._publish is not None
        self._publish(given)


class Fed(Mesh):
    """A Mesh whose source is Scripted."""

    def __init__(self, **settings: object) -> None:
        super().__init__(Settings(control_plane="test:1", **settings))  # type: ignore[arg-type]
        self.feeds: list[Scripted] = []

    def _make_source(self) -> Scripted:
        self.feeds.append(Scripted())
        return self.feeds[-1]


def test_nothing_starts_before_the_first_call() -> None:
    """Forking servers import and wrap first, and fork later."""
    before = set(threading.enumerate())

    def begun() -> set[str]:
        return {each.name for each in set(threading.enumerate()) - before}

    with Fed() as made:
        made.transport()
        assert (made.feeds, begun()) == ([], set())
        made.call_context()
        assert begun() == {"meshlib-feed", "meshlib-telemetry"}
    assert begun() == set()


def test_a_first_call_waits_for_the_answer_about_its_host() -> None:
    """And goes to the mesh, not to DNS."""
    with Peer() as peer, Fed() as made, made.Client() as client:
        given = service("reviews:9080", [peer.address])

        def answer() -> None:
            made.start()
            assert made.feeds[0].asked.wait(10)
            made.feeds[0].tell(given)

        feeding = threading.Thread(target=answer)
        feeding.start()
        assert client.get("http://reviews:9080/").text == "ok"
        feeding.join()
        assert made.feeds[0].wanted == ["reviews:9080"]


async def test_an_async_first_call_waits_without_blocking_the_loop() -> None:
    """Other tasks of the loop run meanwhile: one of them brings the answer."""
    with Peer() as peer, Fed() as made:
        given = service("reviews:9080", [peer.address])
        async with made.AsyncClient() as client:
            made.start()
            asyncio.get_running_loop().call_later(0.05, lambda: made.feeds[0].tell(given))
            assert (await client.get("http://reviews:9080/")).text == "ok"


def test_a_host_that_gets_no_answer_is_waited_for_once() -> None:
    """The hot path does not wait for a control plane that is away: the second call goes straight out."""
    with Peer() as peer, Fed(resolve_timeout=0.3) as made, made.Client() as client:
        started = time.monotonic()
        assert client.get(f"http://localhost:{peer.port}/").text == "ok"
        assert time.monotonic() - started >= 0.3
        started = time.monotonic()
        assert client.get(f"http://localhost:{peer.port}/").text == "ok"
        assert time.monotonic() - started < within(0.3)


async def test_a_process_with_an_identity_sends_nothing_in_plaintext_to_hosts_nobody_answered_for(
    tmp_path: Path,
) -> None:
    """What others could read on its way is not sent while nobody knows where to, also when other hosts are known."""
    write_identity(tmp_path, TestCA().credentials("productpage"))
    with Peer() as peer, Fed(resolve_timeout=0.05, identity=f"files:{tmp_path}") as made:
        with made.Client() as client:
            answer = client.get("http://reviews:9080/")
            assert (answer.status_code, answer.extensions["meshlib.flag"]) == (503, "NC")
            assert "MESHLIB_OUTBOUND_FAILURE_POLICY=allow" in answer.extensions["meshlib.reason"]
            assert client.get(f"http://127.0.0.1:{peer.port}/").text == "ok"
            with pytest.raises(httpx.ConnectError):  # it is sent, and no such host is found
                client.get("https://reviews.invalid/")
        async with made.AsyncClient() as client:
            assert (await client.get("http://192.0.2.1:9080/")).status_code == 503
            reviews = service("reviews:9080", [peer.address])
            made.feeds[0].tell(replace(reviews, complete=False, absent=("localhost:80",)))
            assert (await client.get("http://reviews:9080/")).text == "ok"
            assert (await client.get("http://ratings:9080/")).extensions["meshlib.flag"] == "NC"
            made.feeds[0].tell(reviews)
            assert (await client.get(f"http://localhost:{peer.port}/")).text == "ok"


@pytest.mark.parametrize(
    ("policy", "has_identity", "denies"),
    [("", True, True), ("", False, False), ("allow", True, False), ("deny", False, True)],
)
def test_who_has_no_identity_or_is_told_so_calls_by_dns(
    tmp_path: Path, policy: str, has_identity: bool, denies: bool
) -> None:
    """An application that joined for its retries alone must not stand still with the control plane."""
    write_identity(tmp_path, TestCA().credentials("productpage"))
    identity = f"files:{tmp_path}" if has_identity else ""
    with Fed(resolve_timeout=0.05, outbound_failure_policy=policy, identity=identity) as made, made.Client() as client:
        if denies:
            assert client.get("http://reviews.invalid/").extensions["meshlib.flag"] == "NC"
        else:
            with pytest.raises(httpx.ConnectError):  # it is sent, and no such host is found
                client.get("http://reviews.invalid/")


def test_what_finds_its_way_or_brings_its_own_tls_is_not_held_back(tmp_path: Path) -> None:
    """The mesh would not encrypt it either: a decorated function runs, and a channel with credentials connects."""
    write_identity(tmp_path, TestCA().credentials("productpage"))
    with Fed(resolve_timeout=0.05, identity=f"files:{tmp_path}") as made:
        assert made.outbound("ratings:9080")(lambda: "ran")() == "ran"
        for credentials, error in (
            (None, meshlib.NotConfigured),
            (grpc.ssl_channel_credentials(), meshlib.UpstreamConnectionFailure),
        ):
            with made.grpc_channel("ratings.invalid:9080", credentials=credentials) as channel:
                with pytest.raises(error) as caught:
                    channel.unary_unary("/a/b")(b"", timeout=10)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_whoever_waits_for_the_next_configuration_hears_that_the_mesh_was_closed() -> None:
    """And does not wait for ever."""
    made = Fed()
    made.start()
    following = asyncio.create_task(made.next_live(made.live))
    await asyncio.sleep(0)
    await asyncio.to_thread(made.close)
    with pytest.raises(MeshClosed):
        await asyncio.wait_for(following, 10)


def test_hosts_without_an_answer_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crawler whose control plane is away fills no memory; the newest names are those that are not waited for."""
    monkeypatch.setattr(feed, "MAX_UNANSWERED", 3)
    with Fed(resolve_timeout=0.001) as made:
        made.start()
        for number in range(10):
            made.resolve(f"host-{number}:80")
        assert list(made._feed._unanswered) == [f"host-{number}:80" for number in (7, 8, 9)]


def test_the_first_configuration_waits_for_a_certificate_no_longer_than_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the start on: the feed has waited before, to connect, where the control plane gives the certificate."""
    waits: list[float] = []
    with Fed(identity=f"files:{tmp_path}", identity_timeout=0.2) as made:
        made.start()
        assert made.wait_for_credentials() is None
        assert made.wait_for_credentials() is None
        monkeypatch.setattr(made._identity, "wait", waits.append)
        made.feeds[0].tell(service("reviews:9080", [("127.0.0.1", 9)]))
    assert waits == [0.0]


def test_a_configuration_from_disk_waits_for_no_certificate_of_a_control_plane_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would not come, and who calls has given up by then; what needs none can be called at once."""
    waits: list[float] = []
    with Fed(identity="control-plane") as made:
        made.start()
        monkeypatch.setattr(made._identity, "wait", waits.append)
        [source] = made.feeds
        source.state = FeedState()
        source.tell(service("reviews:9080", [("127.0.0.1", 9)]))
        assert (waits, made.live.router.knows("reviews:9080")) == ([], True)


async def test_cancelling_the_wait_for_a_host_leaves_nothing_behind() -> None:
    """No waiter stays registered."""
    with Fed() as made:
        async with made.AsyncClient() as client:
            call = asyncio.create_task(client.get("http://reviews:9080/"))
            made.start()
            await asyncio.to_thread(made.feeds[0].asked.wait, 10)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert made._feed._waiting == set()


def test_a_configuration_that_cannot_be_compiled_leaves_the_last_one_in_force(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever a feed hands over."""
    with mesh(service("reviews:9080", [("10.0.0.1", 1)])) as made:
        before = made.live
        made._feed.publish(None)  # type: ignore[arg-type]
        assert made.live is before
        assert "stays in force" in caplog.text


def test_a_closed_mesh_goes_on_with_what_it_had_and_one_never_started_raises() -> None:
    """close() is idempotent."""
    with Peer() as peer:
        made = mesh(service("reviews:9080", [peer.address]))
        transport = made.transport()
        made.close()
        made.close()
        with httpx.Client(transport=transport) as client:
            assert client.get("http://reviews:9080/").text == "ok"
    never = Mesh(Settings())
    never.close()
    with pytest.raises(MeshClosed):
        never.start()


def test_a_process_is_registered_once_its_port_accepts() -> None:
    """Not before: a registered endpoint is one that answers."""
    from peers import unused_port

    port = unused_port()
    with Fed(service="reviews", address=f"127.0.0.1:{port}") as made:
        made.serve()
        assert not made.node.ready
        peer = Peer()
        peer.port = port
        with peer:
            while not made.feeds:
                time.sleep(0.01)
            assert made.feeds[0].ready.wait(10)
            assert made.node.ready


def _in_child(made: Mesh, client: httpx.Client, answers: multiprocessing.connection.Connection) -> None:
    first = client.get("http://reviews:9080/").text
    made.close()
    answers.send((first, made.node.id, os.getpid()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_calls_with_connections_and_an_identity_of_its_own() -> None:
    """gunicorn --preload, multiprocessing: the parent's kept-alive connection is not touched."""
    with Peer() as peer:
        made = mesh(service("reviews:9080", [peer.address]))
        client = made.Client()
        assert client.get("http://reviews:9080/").text == "ok"
        receiving, sending = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=_in_child, args=(made, client, sending))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of any fork with threads: the peer's
            child.start()
        assert receiving.poll(20)
        text, identity, pid = receiving.recv()
        child.join(10)
        assert (text, child.exitcode, pid) == ("ok", 0, child.pid)
        assert identity != made.node.id
        assert client.get("http://reviews:9080/").text == "ok"
        assert [received.connection for received in peer.received] == [1, 2, 1]
        client.close()
        made.close()


def test_an_interpreter_that_never_closes_exits_clean(tmp_path: Path) -> None:
    """Scripted thread, idle connections, warnings as errors: nothing on stderr, exit code 0, at once."""
    with Peer() as peer:
        program = tmp_path / "program.py"
        program.write_text(
            "import meshlib, pathlib, sys\n"
            "mesh = meshlib.connect(sys.argv[1], cache_dir='-', resolve_timeout=0.01)\n"
            "client = mesh.Client()\n"
            "print(client.get(sys.argv[2]).text)\n"
        )
        (tmp_path / "config").mkdir()
        ran = subprocess.run(
            [sys.executable, "-W", "error", program, tmp_path / "config", f"http://localhost:{peer.port}/"],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "ok\n", "")


def test_importing_meshlib_loads_no_client_library() -> None:
    """A service that uses gRPC alone does not pay for httpx."""
    loaded = "import sys, meshlib; print(sorted({'httpx', 'grpc', 'aiohttp', 'yaml', 'dns'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


async def test_an_abandoned_async_client_leaks_no_task() -> None:
    """Mirrors and waits included."""
    with Peer() as peer, mesh(service("reviews:9080", [peer.address])) as made:
        async with made.AsyncClient() as client:
            await client.get("http://reviews:9080/")
        gc.collect()
        assert asyncio.all_tasks() == {asyncio.current_task()}


def test_threads_share_one_client_while_configuration_changes() -> None:
    """Eight threads call while it is replaced a hundred times: no call fails."""
    with Peer() as one, Peer() as two:
        made = mesh(service("reviews:9080", [one.address]))
        stop, failures, calls = threading.Event(), [], [0]

        def work() -> None:
            while not stop.is_set():
                answer = client.get("http://reviews:9080/")
                calls[0] += 1
                if answer.status_code != 200:
                    failures.append(answer)

        with made.Client() as client:
            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for turn in range(100):
                publish(made, service("reviews:9080", [(one, two)[turn % 2].address]))
                time.sleep(0.005)
            stop.set()
            for thread in threads:
                thread.join()
        made.close()
        assert failures == []
        assert calls[0] > 100
        assert two.received


def test_a_snapshot_without_hosts_is_still_a_snapshot() -> None:
    """An empty mesh passes everything through."""
    with Peer() as peer, mesh(snapshot({}, {})) as made, made.Client() as client:
        assert client.get(f"http://127.0.0.1:{peer.port}/").text == "ok"


def test_a_breaker_is_found_by_its_host_and_is_the_one_that_calls_ask() -> None:
    """Opened by hand, it refuses at once; a host without one has none."""
    from meshlib.model import BreakerRules, Cluster

    with Peer() as peer, mesh() as made, made.Client() as client:
        publish(made, service("reviews:80", [peer.address], cluster=Cluster("c", breaker=BreakerRules())))
        breaker = made.breaker("reviews")
        assert breaker is not None
        assert client.get("http://reviews/").status_code == 200
        breaker.open()
        refused = client.get("http://reviews/")
        assert (refused.status_code, refused.headers["x-envoy-overloaded"]) == (503, "true")
        breaker.close()
        assert client.get("http://reviews/").status_code == 200
        publish(made, service("reviews:80", [peer.address]))
        assert made.breaker("reviews") is None
        assert made.breaker("stranger:9080") is None
