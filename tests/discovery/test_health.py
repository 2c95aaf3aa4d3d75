"""Endpoints are checked in the background, over real sockets, and only those that are well are called."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from meshlib.mesh import Mesh
from meshlib.model import Cluster, HealthCheck, LoadBalancing
from peers import Answer, Peer, Received, refusing_port
from snapshots import mesh, publish, service

QUICK = {"interval": 0.05, "timeout": 2.0}


def eventually(what: Callable[[], bool]) -> None:
    """For what another thread finds out."""
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def here() -> Iterator[Mesh]:
    with mesh() as made:
        yield made


def cluster(*checks: HealthCheck) -> Cluster:
    return Cluster("c", load_balancing=LoadBalancing.ROUND_ROBIN, health_checks=checks)


def ready(here: Mesh) -> list[int]:
    """The ports of those that would be called."""
    found = here.live.clusters["c"]
    picked = {found.pick(time.monotonic(), (), 0) for _ in range(4 * len(found.targets))}
    return sorted(target.endpoint.port for target in picked if target is not None)


class Ill:
    """A server whose health is set from outside."""

    def __init__(self) -> None:
        self.status = 200
        self.checks: list[Received] = []

    def __call__(self, received: Received) -> Answer:
        if received.target == "/health":
            self.checks.append(received)
            return Answer(self.status)
        return Answer(200)


def test_an_unexpected_status_takes_an_endpoint_out_at_once_and_good_ones_bring_it_back(here: Mesh) -> None:
    """Two good ones; calls go to the other meanwhile, and never fail."""
    ill = Ill()
    check = HealthCheck("http", "/health", host="reviews.example", healthy_threshold=2, **QUICK)
    with Peer(ill) as one, Peer() as other, here.Client() as client:
        publish(here, service("reviews:80", [one.address, other.address], cluster=cluster(check)))
        eventually(lambda: len(ill.checks) >= 1)
        assert ill.checks[0].header("host") == "reviews.example"
        assert ready(here) == sorted((one.port, other.port))
        ill.status = 500
        eventually(lambda: ready(here) == [other.port])
        assert all(client.get("http://reviews/").text == "ok" for _ in range(10))
        ill.status = 204
        seen = len(ill.checks)
        eventually(lambda: ready(here) == sorted((one.port, other.port)))
        assert len(ill.checks) - seen >= 2


def test_an_endpoint_that_is_not_there_is_found_without_a_call(here: Mesh) -> None:
    """Its first check decides."""
    gone = ("127.0.0.1", refusing_port())
    with Peer() as peer:
        publish(here, service("reviews:80", [gone, peer.address], cluster=cluster(HealthCheck("tcp", **QUICK))))
        eventually(lambda: ready(here) == [peer.port])


def test_silence_counts_up_to_the_threshold(here: Mesh) -> None:
    """One that answered once and then hangs is out after three timeouts in a row."""
    hangs = threading.Event()
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                accepted.append(connection)
                if not hangs.is_set():
                    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        check = HealthCheck("http", unhealthy_threshold=3, interval=0.01, timeout=0.1)
        port = listener.getsockname()[1]
        publish(here, service("reviews:80", [("127.0.0.1", port)], cluster=cluster(check)))
        eventually(lambda: len(accepted) >= 2)
        hangs.set()
        seen = len(accepted)
        eventually(lambda: ready(here) == [])
        assert len(accepted) - seen >= 2
        listener.shutdown(socket.SHUT_RDWR)
    for connection in accepted:
        connection.close()


def test_grpc_health_is_asked_for_its_service(here: Mesh) -> None:
    """grpc.health.v1, from a grpcio server."""
    status = {b"": 1, b"reviews.Reviews": 1}

    class Health(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            def check(request: bytes, context: grpc.ServicerContext) -> bytes:
                return b"\x08" + bytes([status[request[2:]]])

            return grpc.unary_unary_rpc_method_handler(check) if details.method.endswith("/Check") else None

    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Health(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        check = HealthCheck("grpc", service="reviews.Reviews", **QUICK)
        publish(here, service("reviews:80", [("127.0.0.1", port)], cluster=cluster(check)))
        status[b"reviews.Reviews"] = 2
        eventually(lambda: ready(here) == [])
        status[b"reviews.Reviews"] = 1
        eventually(lambda: ready(here) == [port])
    finally:
        server.stop(None).wait()


def test_an_endpoint_must_pass_every_check(here: Mesh) -> None:
    """It listens, but says that it is ill."""
    ill = Ill()
    ill.status = 503
    checks = (HealthCheck("tcp", **QUICK), HealthCheck("http", "/health", **QUICK))
    with Peer(ill) as peer:
        publish(here, service("reviews:80", [peer.address], cluster=cluster(*checks)))
        eventually(lambda: ready(here) == [])


def test_checks_that_are_no_longer_wanted_end_and_their_verdicts_with_them(here: Mesh) -> None:
    """An update without them makes everybody callable again."""
    gone = ("127.0.0.1", refusing_port())
    publish(here, service("reviews:80", [gone], cluster=cluster(HealthCheck("tcp", **QUICK))))
    eventually(lambda: ready(here) == [])
    publish(here, service("reviews:80", [gone], cluster=cluster()))
    assert ready(here) == [gone[1]]
    assert here._feed._health is not None
    eventually(lambda: not here._feed._health._running)  # type: ignore[union-attr]


def test_closing_the_mesh_ends_the_checks() -> None:
    """No thread, no loop and no socket is left, and a mesh without checks starts none."""
    with Peer() as peer:
        made = mesh(service("reviews:80", [peer.address], cluster=cluster(HealthCheck("http", **QUICK))))
        eventually(lambda: bool(peer.received))
        health = made._feed._health
        made.close()
        assert health is not None
        assert health._loop.is_closed()
        assert "meshlib-health" not in {thread.name for thread in threading.enumerate()}
        quiet = mesh(service("reviews:80", [peer.address]))
        assert quiet._feed._health is None
        quiet.close()
