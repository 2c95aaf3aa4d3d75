"""gRPC messages are counted at both ends, in every arity, each once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from inbound.grpc_homes import AioHome, SyncHome
from meshlib.mesh import Mesh
from meshlib.model import RetryPolicy
from meshlib.telemetry.label_sets import MESSAGE_LABELS
from meshlib.telemetry.recorder import Recorder
from outbound.grpc_peers import FACES, SERVICE, GrpcPeer, face
from snapshots import mesh, publish, service
from telemetry.test_recorder import labels

TARGET = "ratings:9080"
ON = {"access_log": "text"}


def counted(by: Mesh, reporter: str) -> tuple[int, int]:
    """Messages of requests and of responses."""
    assert by.telemetry is not None
    found = {"request": 0, "response": 0}
    for (name, pairs), amount in by.telemetry.recorder.counts().items():
        if name.endswith("_messages_total") and dict(pairs)["reporter"] == reporter:
            assert tuple(key for key, _ in pairs) == MESSAGE_LABELS
            found[name.split("_")[1]] += int(amount)
    return found["request"], found["response"]


def assert_counted(by: Mesh, expected: tuple[int, int], reporter: str = "source") -> None:
    """gRPC's own thread knows of a stream's end a moment after its reader."""
    deadline = time.monotonic() + 20.0
    while (found := counted(by, reporter)) != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found == expected


@pytest.mark.parametrize("name", FACES)
def test_a_caller_counts_what_it_sends_and_reads(name: str) -> None:
    """Tries do not count twice, a failed call has no response, and a stream counts as many as were read."""
    with GrpcPeer() as peer, mesh(**ON) as here:  # type: ignore[arg-type]
        publish(here, service(TARGET, [peer.address], retry=RetryPolicy(attempts=2)))
        call = face(name, here, TARGET, peer)
        expected = [0, 0]
        steps: list[tuple[Any, Any, int, int]] = [
            (call.unary, b"a", 1, 1),
            (call.unary, b"fail 1", 1, 1),
            (call.stream, b"a", 1, 3),
            (call.collect, [b"a", b"b", b"c"], 3, 1),
            (call.echo, [b"a", b"b"], 2, 2),
        ]
        for do, request, sent, received in steps:
            do(request)
            expected = [expected[0] + sent, expected[1] + received]
            assert_counted(here, (expected[0], expected[1]))
        with pytest.raises(grpc.RpcError):
            call.unary(b"status NOT_FOUND")
        assert_counted(here, (expected[0] + 1, expected[1]))
        call.close()


@pytest.mark.parametrize("home", [SyncHome, AioHome])
def test_a_service_counts_what_it_gets_and_answers(home: Any) -> None:
    """With streams that are returned, yielded and written."""
    with mesh(**ON) as made, GrpcPeer() as peer:  # type: ignore[arg-type]
        with home(made, lambda context: b"in") as serving, mesh() as bare:
            publish(bare, service(TARGET, [("127.0.0.1", serving.port)]))
            call = face("channel", bare, TARGET, peer)
            call.unary(b"a")
            call.stream(b"a")
            call.collect([b"a"])
            call.echo([b"a", b"b"])
            with pytest.raises(grpc.RpcError):
                call.unary(b"abort")
            call.close()
        # The server has stopped, so all calls have ended there.
        assert counted(made, "destination") == (1 + 1 + 1 + 2 + 1, 1 + 2 + 1 + 2)


@pytest.mark.parametrize("name", FACES)
def test_a_caller_tells_of_a_stream_while_it_lives(name: str) -> None:
    """It may last for days."""
    with mesh(**ON) as here, GrpcPeer() as peer:  # type: ignore[arg-type]
        publish(here, service(TARGET, [peer.address]))
        call = face(name, here, TARGET, peer)

        def look() -> None:
            assert_counted(here, (1, 1))
            peer.released.set()

        assert call.first_of(b"stall", look) == [b"0", b"1", b"2"]
        assert_counted(here, (1, 3))
        call.close()


@pytest.mark.parametrize("home", [SyncHome, AioHome])
def test_a_service_tells_of_a_stream_while_it_lives(home: Any) -> None:
    """Of what came and of what was sent."""
    go_on = threading.Event()

    def requests() -> Iterator[bytes]:
        yield b"a"
        go_on.wait(20)
        yield b"b"

    with mesh(**ON) as made, home(made, lambda context: b"in") as serving:  # type: ignore[arg-type]
        with grpc.insecure_channel(f"127.0.0.1:{serving.port}") as channel:
            call = channel.stream_stream(f"/{SERVICE}/StreamStream")(requests())
            assert next(call) == b"in"
            assert_counted(made, (1, 1), "destination")
            go_on.set()
            assert list(call) == [b"in"]
        assert_counted(made, (2, 2), "destination")


def test_what_comes_after_the_end_is_counted_and_series_share_what_they_share() -> None:
    """The last message may be read after gRPC has told of the call's end; status and flags are no labels of these."""
    from meshlib.policy.observer import Messages

    recorder = Recorder(lambda: 0.0)
    for code in ("200", "503"):
        messages = Messages()
        messages.requests = 1
        recorder.request(code, lambda code=code: labels(code), 0.001, 0, 0, None, messages)  # type: ignore[misc]
        messages.received()
        messages.received()
    found = {name: amount for (name, _), amount in recorder.counts().items() if "messages" in name}
    assert found == {"istio_request_messages_total": 2, "istio_response_messages_total": 4}
