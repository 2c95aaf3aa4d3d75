"""Workers tell each other which circuits are open, and none of them ever waits for it."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import meshlib
from meshlib.model import BreakerRules
from meshlib.settings import Settings
from meshlib.state import shared_breaker
from meshlib.state.breaker import Breaker
from meshlib.state.shared_breaker import SharedBreakers
from peers import Answer, Peer
from promises import within
from redis_server import RedisServer, needs_redis

pytestmark = needs_redis
WAIT = 15.0
RULES = BreakerRules(consecutive_failures=3, open_for=60.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as started:
        yield started


def until(holds: Callable[[], bool]) -> None:
    """Wait for it, generously."""
    pause, deadline = threading.Event(), time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline, "it did not come to pass"
        pause.wait(0.01)


def fail(breaker: Breaker, times: int = 3) -> None:
    for _ in range(times):
        permit = breaker.acquire(time.monotonic())
        assert permit is not None
        permit.failure(0.01, time.monotonic())


@contextmanager
def worker(address: str, scope: str = "default/reviews", rules: BreakerRules = RULES) -> Iterator[Breaker]:
    """The breaker of one destination in one process."""
    breaker = Breaker(rules, "ratings")
    shared = SharedBreakers(address, scope, lambda: {"ratings": breaker})
    shared.update()
    try:
        yield breaker
    finally:
        shared.stop()


def test_a_circuit_that_one_opens_is_open_in_all_and_closes_in_all(server: RedisServer) -> None:
    """Also in one that starts later; but not for another workload, which may reach the destination well."""
    with worker(server.address) as one, worker(server.address) as two, worker(server.address, "default/other") as else_:
        fail(one)
        until(lambda: two.current_state == "open")
        assert two.acquire(time.monotonic()) is None
        assert "as another process says" in repr(two)
        with worker(server.address) as late:
            until(lambda: late.current_state == "open")
        two.close()
        until(lambda: one.current_state == "closed")
        assert else_.current_state == "closed"
        fail(two)
        until(lambda: one.current_state == "open")


def opened_for(breaker: Breaker) -> float:
    return breaker._clock() - breaker._opened


def test_it_is_open_for_the_rest_of_its_time(server: RedisServer) -> None:
    """By Redis's clock, whatever the processes' own; what is over is not taken over."""
    one, two, three = (Breaker(BreakerRules(consecutive_failures=3, open_for=0.4), "ratings") for _ in range(3))
    rounds = [SharedBreakers(server.address, "a", lambda each=each: {"ratings": each}) for each in (one, two, three)]  # type: ignore[misc]
    try:
        fail(one)
        rounds[0].synchronize()
        time.sleep(0.1)  # what passes before the second hears of it
        two.rules = BreakerRules(open_for=3600.0)
        rounds[1].synchronize()
        assert 0.1 <= opened_for(two) <= opened_for(one) + 0.05
        until(lambda: opened_for(one) > 0.5)
        rounds[2].synchronize()
        assert three.current_state == "closed"
    finally:
        for each in rounds:
            each.stop()


def test_one_good_probe_closes_it_for_all(server: RedisServer) -> None:
    """Whoever makes it."""
    with worker(server.address) as one, worker(server.address) as two:
        fail(one)
        until(lambda: two.current_state == "open")
        two.half_open()
        permit = two.acquire(time.monotonic())
        assert permit is not None
        permit.success(0.01, time.monotonic())
        until(lambda: one.current_state == "closed")


def test_a_probe_that_fails_opens_it_for_all_anew(server: RedisServer) -> None:
    """Whoever was about to probe waits again."""
    with worker(server.address) as one, worker(server.address) as two:
        fail(one)
        until(lambda: two.current_state == "open")
        two.half_open()
        permit = two.acquire(time.monotonic())
        assert permit is not None
        one.half_open()
        permit.failure(0.01, time.monotonic())
        until(lambda: one.current_state == "open")
        assert one.is_adopted


def test_without_redis_each_decides_for_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so once; when Redis comes, what is open is told; when it is lost and comes back empty, told again."""
    monkeypatch.setattr(shared_breaker, "_LONGEST_PAUSE", 0.1)
    server = RedisServer(tmp_path)
    with caplog.at_level(logging.WARNING, "meshlib"), worker(server.address) as one, worker(server.address) as two:
        until(lambda: len(caplog.records) == 2)
        fail(one)
        assert (one.current_state, two.current_state) == ("open", "closed")
        server.start()
        try:
            until(lambda: two.current_state == "open")
            server.kill()
            until(lambda: len(caplog.records) == 4)
            two.close()
            fail(two)
            assert two.current_state == "open"
            server.start()
            with worker(server.address) as late:
                until(lambda: late.current_state == "open")
        finally:
            server.kill()


def test_no_call_waits_for_a_redis_that_hangs() -> None:
    """It takes connections and never answers; and stopping takes seconds at most."""
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        with worker(f"redis://127.0.0.1:{port}/0") as breaker:
            began = time.monotonic()
            for _ in range(1000):
                permit = breaker.acquire(time.monotonic())
                assert permit is not None
                permit.success(0.0, time.monotonic())
            fail(breaker)
            assert breaker.acquire(time.monotonic()) is None
            assert time.monotonic() - began < within(1)
            stopping = time.monotonic()
        assert time.monotonic() - stopping < 10


def test_what_redis_holds_of_others_is_nobodys_failure(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A key of another kind, or a state that no breaker has, leaves the circuits alone and the thread running."""
    import redis

    client = redis.Redis.from_url(server.address)
    client.hset("meshlib:breaker:default/reviews:ratings", mapping={"state": "ajar", "number": "1"})
    with worker(server.address) as one, worker(server.address) as two:
        fail(one)
        until(lambda: two.current_state == "open")
        client.delete("meshlib:breaker:default/reviews:ratings")
        two.close()
        until(lambda: one.current_state == "closed")
    client.close()


CONFIGURATION = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: ratings}}
spec:
  hosts: [ratings.example]
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  resolution: STATIC
  endpoints: [{{address: 127.0.0.1, ports: {{http: {port}}}}}]
---
apiVersion: meshlib.io/v1alpha1
kind: BackendTrafficPolicy
metadata: {{name: ratings}}
spec:
  host: ratings.example
  breaker: {{consecutiveFailures: 3, openFor: 60s}}
"""

WORKER = """
import sys, meshlib
with meshlib.connect() as mesh, mesh.Client() as client:
    for line in sys.stdin:
        if line.strip() == "state":
            print(mesh.breaker("ratings.example").current_state, flush=True)
        else:
            print(client.get("http://ratings.example/").status_code, flush=True)
"""


def test_workers_of_a_server_share_their_circuits(server: RedisServer, tmp_path: Path) -> None:
    """Real processes: what one has found out, the other has in its first call, which reaches nobody."""
    with Peer(lambda _: Answer(500)) as peer:
        folder = tmp_path / "mesh"
        folder.mkdir()
        (folder / "mesh.yaml").write_text(CONFIGURATION.format(port=peer.port))
        settings = {
            "MESHLIB_CONTROL_PLANE": str(folder),
            "MESHLIB_SERVICE": "reviews",
            "MESHLIB_BREAKER_STORAGE": server.address,
        }
        with (
            meshlib.connect(folder, service="reviews", breaker_storage=server.address) as mesh,
            mesh.Client() as client,
        ):
            assert [client.get("http://ratings.example/").status_code for _ in range(4)] == [500, 500, 500, 503]
            environment = {**os.environ, **settings}
            command = [sys.executable, "-c", WORKER]
            with subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdin is not None and process.stdout is not None

                def told(what: str) -> str:
                    assert process.stdin is not None and process.stdout is not None
                    process.stdin.write(f"{what}\n")
                    process.stdin.flush()
                    return process.stdout.readline().strip()

                try:
                    until(lambda: told("state") == "open")
                    assert (told("call"), len(peer.received)) == ("503", 3)
                    breaker = mesh.breaker("ratings.example")
                    assert breaker is not None
                    peer.answer = lambda _: Answer(200)
                    breaker.close()
                    until(lambda: told("state") == "closed")
                    assert told("call") == "200"
                finally:
                    process.stdin.close()
                    assert process.wait(WAIT) == 0


@pytest.mark.parametrize("address", ["localhost:6379", "http://localhost"])
def test_a_storage_that_can_be_none_is_refused(address: str) -> None:
    """At once, by name."""
    with pytest.raises(meshlib.SettingsError, match=r"breaker_storage .*redis://"):
        meshlib.connect("", breaker_storage=address)
    with pytest.raises(meshlib.SettingsError, match="MESHLIB_BREAKER_STORAGE"):
        Settings.from_environment({"MESHLIB_BREAKER_STORAGE": address})
