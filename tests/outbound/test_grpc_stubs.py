"""Generated stubs over channels of the mesh, to servers in processes of their own: killed, stopped, split, mirrored."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
import pytest

import meshlib
from meshlib.mesh import Mesh
from meshlib.model import (
    Cluster,
    HeaderMatch,
    HedgePolicy,
    LoadBalancing,
    Mirror,
    RetryPolicy,
    RouteMatch,
    StringMatch,
    WeightedCluster,
)
from snapshots import forward, mesh, publish, route, service, snapshot

pytestmark = pytest.mark.processes

TARGET = "ratings:9080"
WAIT = 30.0
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What grpcio-tools makes of echo.proto."""
    from grpc_tools import protoc

    folder = tmp_path_factory.mktemp("generated")
    arguments = ["", f"-I{HERE}", f"--python_out={folder}", f"--grpc_python_out={folder}", str(HERE / "echo.proto")]
    assert protoc.main(arguments) == 0
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


class Process:
    """A server, and what it says."""

    def __init__(self, generated: Path, name: str, kind: str = "sync") -> None:
        self.name = name
        environment = {**os.environ, "PYTHONPATH": str(generated), "GRPC_VERBOSITY": "NONE"}
        command = [sys.executable, str(HERE / "grpc_process.py"), name, kind]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.strip())

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def said(self, beginning: str) -> None:
        """Waits for such a line. What it said to an earlier test may still be on its way."""
        while not self.lines.get(timeout=WAIT).startswith(beginning):
            pass

    def has_said(self, beginning: str) -> bool:
        with contextlib.suppress(queue.Empty):
            while True:
                if self.lines.get_nowait().startswith(beginning):
                    return True
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.process.kill()
        self.process.wait(WAIT)
        self._reader.join(WAIT)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module", params=["sync", "aio"])
def two(generated: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Process, Process]]:
    """Servers of one kind, for tests that leave them running."""
    with Process(generated, "one", request.param) as one, Process(generated, "two", request.param) as other:
        yield one, other


@pytest.fixture(autouse=True)
def _quiet(request: pytest.FixtureRequest) -> None:
    """What servers said to an earlier test is not for this one."""
    if "two" in request.fixturenames:
        for each in request.getfixturevalue("two"):
            with contextlib.suppress(queue.Empty):
                while True:
                    each.lines.get_nowait()


class Sync:
    """A stub, with blocking calls. `started`: a call of one response that does not block."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel, self.stub = channel, importlib.import_module("echo_pb2_grpc").EchoStub(channel)
        self.Note = importlib.import_module("echo_pb2").Note

    def say(self, text: str, load: bytes = b"", **terms: Any) -> Any:
        return self.stub.Say(self.Note(text=text, load=load), **terms)

    def tell(self, text: str, meanwhile: Callable[[], object] = lambda: None, **terms: Any) -> list[Any]:
        call = self.stub.Tell(self.Note(text=text), **terms)
        found = [next(call)]
        meanwhile()
        return found + list(call)

    def collect(self, *texts: str) -> Any:
        return self.stub.Collect(self.Note(text=each) for each in texts)

    def talk(self, *texts: str) -> list[Any]:
        return list(self.stub.Talk(self.Note(text=each) for each in texts))

    def cancel(self, when: Callable[[], object], is_stream: bool) -> None:
        call = (self.stub.Tell if is_stream else self.stub.Say.future)(self.Note(text="hold"))
        if is_stream:
            next(call)
        when()
        call.cancel()
        assert call.code() is grpc.StatusCode.CANCELLED

    def close(self) -> None:
        self.channel.close()


class Aio:
    """The same, of asyncio, with a loop of its own."""

    def __init__(self, open_channel: Callable[[], Any]) -> None:
        self.runner = asyncio.Runner()

        async def opened() -> Any:
            return open_channel()

        self.channel = self.runner.run(opened())
        self.stub = importlib.import_module("echo_pb2_grpc").EchoStub(self.channel)
        self.Note = importlib.import_module("echo_pb2").Note

    def _run(self, call: Callable[[], Any]) -> Any:
        async def run() -> Any:
            async with asyncio.timeout(2 * WAIT):
                return await call()

        return self.runner.run(run())

    def say(self, text: str, load: bytes = b"", **terms: Any) -> Any:
        return self._run(lambda: self.stub.Say(self.Note(text=text, load=load), **terms))

    def tell(self, text: str, meanwhile: Callable[[], object] = lambda: None, **terms: Any) -> list[Any]:
        async def run() -> list[Any]:
            call = self.stub.Tell(self.Note(text=text), **terms)
            found = [await call.read()]
            await asyncio.to_thread(meanwhile)
            return found + [each async for each in call]

        return self._run(run)  # type: ignore[no-any-return]

    def collect(self, *texts: str) -> Any:
        return self._run(lambda: self.stub.Collect(self.Note(text=each) for each in texts))

    def talk(self, *texts: str) -> list[Any]:
        async def run() -> list[Any]:
            call = self.stub.Talk()
            found = []
            for text in texts:
                await call.write(self.Note(text=text))
                found.append(await call.read())
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            return found

        return self._run(run)  # type: ignore[no-any-return]

    def cancel(self, when: Callable[[], object], is_stream: bool) -> None:
        async def run() -> None:
            call = (self.stub.Tell if is_stream else self.stub.Say)(self.Note(text="hold"))
            if is_stream:
                await call.read()
            await asyncio.to_thread(when)
            call.cancel()
            assert await call.code() is grpc.StatusCode.CANCELLED

        self._run(run)

    def close(self) -> None:
        self.runner.run(self.channel.close())
        self.runner.close()


@pytest.fixture
def here() -> Iterator[Mesh]:
    with mesh() as made:
        yield made


@pytest.fixture(params=["sync", "aio"])
def client(request: pytest.FixtureRequest, generated: Path, here: Mesh) -> Iterator[Any]:
    is_sync = request.param == "sync"
    made: Any = Sync(here.grpc_channel(TARGET)) if is_sync else Aio(lambda: here.grpc_aio_channel(TARGET))
    yield made
    made.close()


Two = tuple[Process, Process]
IN_TURN = Cluster(TARGET, load_balancing=LoadBalancing.ROUND_ROBIN)


def code_of(call: Callable[..., Any], *arguments: Any, **terms: Any) -> Any:
    with pytest.raises(grpc.RpcError) as raised:
        call(*arguments, **terms)
    return raised.value.code()  # type: ignore[attr-defined]


def test_every_arity_is_balanced(client: Any, here: Mesh, two: Two) -> None:
    """Messages come and go as they are, and calls take turns at the servers."""
    publish(here, service(TARGET, [each.address for each in two], cluster=IN_TURN))
    servers = {client.say("a").server for _ in range(4)}
    assert servers == {"one", "two"}
    assert [each.text for each in client.tell("a")] == ["a"] * 3
    assert client.collect("a", "b").text == "a,b"
    assert [each.text for each in client.talk("a", "b", "c")] == ["a", "b", "c"]


def test_a_cancelled_call_is_cancelled_at_the_server(client: Any, here: Mesh, two: Two) -> None:
    """Of one message and of many, and nothing stays in flight."""
    publish(here, service(TARGET, [two[0].address]))

    for is_stream in (False, True):
        client.cancel(lambda: two[0].said("began hold"), is_stream)
        two[0].said("cancelled")
    cluster = here.live.cluster(TARGET)
    assert cluster is not None
    deadline = time.monotonic() + WAIT
    while cluster.state.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cluster.state.requests == 0


def test_the_server_learns_the_deadline(client: Any, here: Mesh, two: Two) -> None:
    """The shorter of the call's own and the route's."""
    publish(here, service(TARGET, [two[0].address], timeout=9.0))
    assert 4.0 < float(client.say("left", timeout=5.0).text) <= 5.5  # on its way it is rounded up
    assert 8.0 < float(client.say("left", timeout=60.0).text) <= 9.5
    assert code_of(client.say, "hold", timeout=0.3) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert code_of(client.tell, "hold", timeout=0.3) is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_server_that_dies_ends_its_streams_and_the_others_go_on(client: Any, here: Mesh, generated: Path) -> None:
    """SIGKILL between two messages: the stream that has begun fails, all further calls are answered by the other."""
    with Process(generated, "dies") as dies, Process(generated, "lives") as lives:
        publish(here, service(TARGET, [dies.address], retry=RetryPolicy(attempts=2)))
        with pytest.raises(grpc.RpcError) as raised:
            client.tell("hold", dies.kill)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        publish(here, service(TARGET, [dies.address, lives.address], retry=RetryPolicy(attempts=2)))
        for _ in range(4):
            assert client.say("a").server == "lives"
            assert client.tell("a")[0].server == "lives"
            assert client.collect("a").server == "lives"
            assert [each.text for each in client.talk("a", "b")] == ["a", "b"]


def test_a_server_that_stops_fails_no_call(client: Any, here: Mesh, generated: Path) -> None:
    """SIGTERM lets what has begun end, and its GOAWAY sends everything else elsewhere, without a retry policy that
    would send a call twice."""
    with Process(generated, "stops") as stops, Process(generated, "stays") as stays:
        retry = RetryPolicy(attempts=2, on=frozenset({"connect-failure", "refused-stream"}))
        publish(here, service(TARGET, [stops.address, stays.address], cluster=IN_TURN, retry=retry))
        for _ in range(4):
            client.say("a")
        servers = []

        def stop_and_go_on() -> None:
            stops.process.send_signal(signal.SIGTERM)

        for _ in range(2):  # one of the two streams is at the server that stops
            told = client.tell("count 30", stop_and_go_on)
            assert len(told) == 30
            servers += [client.say("a").server for _ in range(10)]
        assert servers[-10:] == ["stays"] * 10
        assert stops.process.wait(WAIT) == 0


def test_metadata_and_messages_have_grpcs_limits(client: Any, here: Mesh, two: Two) -> None:
    """16 KB of metadata pass where the server takes them; 4 MB of a message do, and no byte more unless an option of
    the channel says so."""
    publish(here, service(TARGET, [two[0].address]))
    assert client.say("a", metadata=(("x-large", "v" * 16_000),)).text == "a"
    load = bytes(4 * 1024 * 1024 - 100)
    assert client.say("a", load).load == load
    assert client.say("a", load, compression=grpc.Compression.Gzip).load == load
    assert code_of(client.say, "a", load + bytes(200)) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_traffic_is_split_by_weight_and_by_metadata(client: Any, here: Mesh, two: Two) -> None:
    """A fifth of the calls goes to the second version, and all of jason's."""
    jason = RouteMatch(headers=(HeaderMatch("end-user", StringMatch("exact", "jason")),))
    split = forward(WeightedCluster("v1", 80), WeightedCluster("v2", 20))
    routes = [route(forward("v2"), jason), route(split)]
    publish(here, snapshot({TARGET: routes}, {"v1": [two[0].address], "v2": [two[1].address]}))
    for _ in range(5):
        assert client.say("a", metadata=(("end-user", "jason"),)).server == "two"
    servers = [client.say("a").server for _ in range(200)]
    assert 10 <= servers.count("two") <= 80  # one in a million falls outside


def test_a_mirror_gets_a_copy(client: Any, here: Mesh, two: Two) -> None:
    """Of a call with one message; the caller hears of the first server only."""
    publish(
        here,
        snapshot(
            {TARGET: [route(forward("v1", mirrors=(Mirror("v2"),)))]},
            {"v1": [two[0].address], "v2": [two[1].address]},
        ),
    )
    deadline = time.monotonic() + WAIT
    while not two[1].has_said("began copy") and time.monotonic() < deadline:  # it is sent while its event loop turns
        assert client.say("copy").server == "one"
    assert time.monotonic() < deadline


def test_a_slow_server_is_overtaken(client: Any, here: Mesh, two: Two, generated: Path) -> None:
    """Hedged, where the policy lets a call be carried out twice."""
    hedged = forward("c", hedge=HedgePolicy(0.05), retry=RetryPolicy(attempts=1, resend_unsafe=True))
    publish(here, snapshot({TARGET: [route(hedged)]}, {"c": [each.address for each in two]}))
    for _ in range(2):
        client.say("a")
    os.kill(two[0].process.pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(two[0].process.pid, os.WUNTRACED)[1])
    try:
        for _ in range(4):
            assert client.say("a", timeout=WAIT).server == "two"
    finally:
        os.kill(two[0].process.pid, signal.SIGCONT)


FORKING = """
    import multiprocessing, os, sys
    import meshlib
    import echo_pb2, echo_pb2_grpc

    mesh = meshlib.connect(sys.argv[1], telemetry="off")
    channel = mesh.grpc_channel("ratings:9080")
    stub = echo_pb2_grpc.EchoStub(channel)

    def say(text):
        return stub.Say(echo_pb2.Note(text=text), timeout=30).text

    def work(text):
        os.write(1, f"{say(text)}\\n".encode())  # whole: two workers do so at once

    if sys.argv[2] == "used":
        print(say("before"), flush=True)
    for way in ("fork", "multiprocessing"):
        if way == "fork":
            child = os.fork()
            if child == 0:
                work("child")
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        else:
            children = [multiprocessing.get_context("fork").Process(target=work, args=("worker",)) for _ in range(2)]
            for each in children:
                each.start()
            for each in children:
                each.join(60)
                assert each.exitcode == 0
        print(say("parent"), flush=True)
    mesh.close()
"""
WORLD = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: ratings, namespace: default}}
spec:
  hosts: [ratings]
  resolution: STATIC
  ports: [{{number: 9080, name: grpc, protocol: GRPC}}]
  endpoints: [{{address: 127.0.0.1, ports: {{grpc: {port}}}}}]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("state", ["fresh", "used"])
def test_a_channel_that_was_made_before_a_fork_works_on_both_sides(state: str, generated: Path, tmp_path: Path) -> None:
    """As under gunicorn's preload: its children connect by themselves, whether the parent has called or not."""
    with Process(generated, "one") as one:
        (tmp_path / "world.yaml").write_text(WORLD.format(port=one.port))
        environment = {**os.environ, "PYTHONPATH": str(generated), "GRPC_VERBOSITY": "NONE"}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(FORKING), str(tmp_path), state],
            env=environment, capture_output=True, text=True, timeout=90,
        )  # fmt: skip
    before = ["before"] if state == "used" else []
    assert (done.returncode, done.stdout.split()) == (
        0,
        [*before, "child", "parent", "worker", "worker", "parent"],
    ), done.stderr


def test_errors_are_the_meshs_too(client: Any, here: Mesh) -> None:
    """A stub raises what gRPC's users catch, which says what the mesh knows."""
    publish(here, service(TARGET, [], cluster=Cluster(TARGET)))
    with pytest.raises(grpc.RpcError) as raised:
        client.say("a")
    assert isinstance(raised.value, meshlib.errors.NoHealthyEndpoint)
