"""A gRPC caller and a gRPC service: what both count and trace is what happened, and they agree on it."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from inbound.grpc_homes import AioHome, SyncHome
from outbound.grpc_peers import AioFace, Face, SyncFace
from snapshots import mesh, publish
from telemetry.receiver import attributes, grpc_receiver
from telemetry.test_both_ends import CLIENT, SERVER, reviews, told

ON = {"access_log": "text"}
TARGET = "reviews:9080"


def caller(kind: str, by: Any) -> Face:
    return AioFace(lambda: by.grpc_aio_channel(TARGET)) if kind == "aio" else SyncFace(by.grpc_channel(TARGET))


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_both_ends_tell_the_same(kind: str) -> None:
    """Workloads, statuses and numbers are equal at both ends, for calls of every arity."""
    home: Any = AioHome if kind == "aio" else SyncHome
    with mesh(**SERVER, **ON) as server, mesh(**CLIENT, **ON) as client:  # type: ignore[arg-type]
        with home(server, lambda context: b"in") as serving:
            publish(client, reviews(f"http://127.0.0.1:{serving.port}"))
            face = caller(kind, client)
            assert face.every(b"") == [b"in"] * 4
            with pytest.raises(grpc.RpcError):
                face.unary(b"abort")
            face.close()
        ends = []
        for by, reporter in ((client, "source"), (server, "destination")):
            found = sorted(told(by), key=lambda each: each["grpc_response_status"])
            assert [(each["grpc_response_status"], each["count"]) for each in found] == [("0", "4"), ("5", "1")]
            for each in found:
                assert each.pop("reporter") == reporter
                assert (each["request_protocol"], each["response_code"]) == ("grpc", "200")
                assert (each["source_workload"], each["destination_workload"]) == ("productpage-v1", "reviews-v2")
            ends.append(found)
        assert ends[0] == ends[1]


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_a_trace_goes_through(kind: str) -> None:
    """The call and the server, whose parent it is; named after the method."""
    home: Any = AioHome if kind == "aio" else SyncHome
    with grpc_receiver() as receiver:
        pushed: Any = {"telemetry": receiver.url, "telemetry_interval": 0.1, "trace_sampling": 100.0}
        with (
            mesh(**SERVER, **pushed) as server,  # type: ignore[arg-type]
            mesh(**CLIENT, **pushed) as client,  # type: ignore[arg-type]
            home(server, lambda context: b"in") as serving,
        ):
            publish(client, reviews(f"http://127.0.0.1:{serving.port}"))
            face = caller(kind, client)
            assert face.unary(b"") == b"in"
            face.close()
        spans = receiver.spans
    assert len({each.trace_id for each in spans}) == 1
    [root] = [each for each in spans if not each.parent_span_id]
    [served] = [each for each in spans if each.parent_span_id == root.span_id]
    assert len(spans) == 2 and (root.kind, served.kind) == (3, 2)
    assert {root.name, served.name} == {"test.Echo/UnaryUnary"}
    assert [attributes(each)["rpc.status_code"] for each in spans] == ["OK", "OK"]
