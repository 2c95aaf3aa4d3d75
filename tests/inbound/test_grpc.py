"""What a gRPC call brings is in force in its handler and who may not call does not reach it, sync and aio."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from certificates import TestCA, write_identity
from inbound.grpc_homes import AioHome, SyncHome
from meshlib.identity.credentials import Credentials
from meshlib.identity.tls import NoCredentials
from meshlib.mesh import Mesh
from meshlib.model import Cluster, Snapshot, SpiffeId, UpstreamTls
from meshlib.policy.observer import Served
from meshlib.policy.propagation import current
from outbound.grpc_peers import SERVICE, AioFace, GrpcPeer, SyncFace
from security.decisions import inbound
from snapshots import mesh, service

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Watcher:
    """An observer that keeps what was served."""

    def __init__(self) -> None:
        self.all: queue.Queue[Served] = queue.Queue()

    def serving(self, served: Served) -> None:
        return None

    def served(self, served: Served) -> None:
        self.all.put(served)

    def next(self) -> Served:
        return self.all.get(timeout=20)


@pytest.fixture(params=[SyncHome, AioHome])
def home(request: pytest.FixtureRequest) -> Any:
    return request.param


def _channel(port: int) -> SyncFace:
    return SyncFace(grpc.insecure_channel(f"127.0.0.1:{port}"))


def _carried(context: Any) -> bytes:
    carried = current.get()
    assert carried is not None
    return ",".join(filter(None, (carried.get("traceparent"), carried.get("tenant")))).encode()


def test_what_a_call_brings_is_in_force_in_handlers_of_every_arity(home: Any) -> None:
    """Trace context and forwarded headers, in the handler and in threads that it starts."""
    with mesh(forward_headers=("tenant",)) as made, home(made, _carried) as serving:
        channel = _channel(serving.port)
        found = channel.every(b"", metadata=(("traceparent", TRACE), ("tenant", "a"), ("cookie", "b")))
        assert found == [f"{TRACE},a".encode()] * 4
        assert current.get() is None
        channel.close()


@pytest.mark.parametrize("client", ["sync", "aio"])
def test_calls_made_in_a_handler_hand_on_id_and_deadline(home: Any, client: str) -> None:
    """Two hops over real channels: the second server gets the first one's request id, and no more time than is left."""
    with GrpcPeer() as behind, mesh(service("ratings:9080", [behind.address])) as made:
        faces: list[Any] = []

        def ask(context: Any) -> bytes:
            face: Any
            if client == "sync":
                face = SyncFace(made.grpc_channel("ratings:9080"))
            else:
                face = AioFace(lambda: made.grpc_aio_channel("ratings:9080"))
            faces.append(face)
            try:
                return bytes(face.unary(dict(context.invocation_metadata())["x-request-id"].encode()))
            finally:
                face.close()

        with home(made, ask) as serving:
            channel = _channel(serving.port)
            answer = channel.unary(b"", timeout=30.0)
            assert answer == b"peer:" + behind.metadata[0]["x-request-id"].encode()
            channel.close()


def test_a_call_whose_time_is_over_is_not_started(home: Any) -> None:
    """The deadline that an HTTP caller further out has set has passed."""
    watcher = Watcher()
    with mesh() as made:
        made._observer = watcher  # type: ignore[assignment]
        interceptors = made.grpc_server_interceptors()
        porch = interceptors[0]._porch
        clock = iter(range(0, 100_000, 1000))
        porch.clock = lambda: float(next(clock))  # each look takes a quarter of an hour
        made.grpc_server_interceptors = lambda port=0: interceptors  # type: ignore[method-assign]
        from meshlib.inbound.grpc import MeshAioServerInterceptor

        made.grpc_aio_server_interceptors = lambda port=0: [MeshAioServerInterceptor(porch)]  # type: ignore[method-assign]
        with home(made, _carried) as serving:
            channel = _channel(serving.port)
            for call in (channel.unary, channel.stream):
                with pytest.raises(grpc.RpcError) as raised:
                    call(b"", metadata=(("x-envoy-expected-rq-timeout-ms", "1000"),))
                assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
                assert raised.value.details() == "upstream request timeout"  # type: ignore[attr-defined]
                served = watcher.next()
                assert (served.grpc_status, served.flags) == ("4", "UT")
            assert serving.started.empty()
            channel.close()


def test_who_may_not_call_reaches_no_handler_and_learns_no_methods(home: Any) -> None:
    """Every arity is refused with the sidecar's words, and so is a method that does not exist."""
    watcher = Watcher()
    with mesh(Snapshot(inbound=(inbound("{}"),), complete=True)) as made:
        made._observer = watcher  # type: ignore[assignment]
        with home(made, _carried) as serving:
            channel = _channel(serving.port)
            unknown = channel.channel.unary_unary(f"/{SERVICE}/Nothing")
            calls: list[Any] = [
                lambda: channel.unary(b""), lambda: channel.stream(b""), lambda: channel.collect([b""]),
                lambda: channel.echo([b""]), lambda: unknown(b""),
            ]  # fmt: skip
            for call in calls:
                with pytest.raises(grpc.RpcError) as raised:
                    call()
                assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED  # type: ignore[attr-defined]
                assert raised.value.details() == "RBAC: access denied"  # type: ignore[attr-defined]
                served = watcher.next()
                assert (served.status, served.grpc_status, served.reason) == (
                    200,
                    "7",
                    "rbac_access_denied_matched_policy[none]",
                )
            assert serving.started.empty()
            channel.close()


def test_rules_see_a_post_of_the_method(home: Any) -> None:
    """One method is open, another is not."""
    rules = f"{{rules: [{{to: [{{operation: {{methods: [POST], paths: ['/{SERVICE}/UnaryUnary']}}}}]}}]}}"
    with mesh(Snapshot(inbound=(inbound(rules),), complete=True)) as made, home(made, lambda context: b"in") as serving:
        channel = _channel(serving.port)
        assert channel.unary(b"") == b"in"
        with pytest.raises(grpc.RpcError):
            channel.stream(b"")
        channel.close()


def test_where_the_host_is_not_told_a_rule_about_hosts_denies() -> None:
    """asyncio's servers don't tell the authority; a DENY rule must not be passed by that."""
    rules = "{action: DENY, rules: [{to: [{operation: {hosts: [secret]}}]}]}"
    given = Snapshot(inbound=(inbound(rules),), complete=True)
    for home, is_allowed in ((SyncHome, True), (AioHome, False)):
        with mesh(given) as made, home(made, lambda context: b"in") as serving:
            channel = _channel(serving.port)
            if is_allowed:
                assert channel.unary(b"") == b"in"
            else:
                with pytest.raises(grpc.RpcError) as raised:
                    channel.unary(b"")
                assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED  # type: ignore[attr-defined]
            channel.close()


def test_how_a_call_ended_is_told(home: Any) -> None:
    """OK, an abort, an exception, a method that does not exist, a caller that goes away: once each."""
    watcher = Watcher()
    with mesh() as made:
        made._observer = watcher  # type: ignore[assignment]
        with home(made, lambda context: b"in") as serving:
            channel = _channel(serving.port)
            assert channel.unary(b"") == b"in"
            served = watcher.next()
            assert (served.path, served.status, served.grpc_status) == (f"/{SERVICE}/UnaryUnary", 200, "0")
            assert served.ended >= served.began and served.client == "127.0.0.1"
            for command, status in ((b"abort", "5"), (b"raise", "2")):
                for call in (channel.unary, channel.stream):
                    with pytest.raises(grpc.RpcError):
                        call(command)
                    assert watcher.next().grpc_status == status
            with pytest.raises(grpc.RpcError) as raised:
                channel.channel.unary_unary(f"/{SERVICE}/Nothing")(b"")
            assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
            assert watcher.next().grpc_status == "12"
            while not serving.started.empty():
                serving.started.get()
            assert channel.cancelled(b"hold", lambda: serving.started.get(timeout=20)) is grpc.StatusCode.CANCELLED
            served = watcher.next()
            assert (served.status, served.flags) == (0, "DC")
            assert watcher.all.empty()
            channel.close()


def test_plain_functions_on_an_asyncio_server_are_served_too() -> None:
    """grpc.aio runs them in its threads; they are judged, carry and are measured as others."""
    watcher = Watcher()
    with mesh() as made:
        made._observer = watcher  # type: ignore[assignment]
        with AioHome(made, _carried) as serving:
            channel = _channel(serving.port)
            call = channel.channel.unary_unary(f"/{SERVICE}/Plain")
            assert call(b"", metadata=(("traceparent", TRACE),)) == TRACE.encode()
            assert watcher.next().grpc_status == "0"
            channel.close()


def test_a_caller_is_who_its_certificate_says_and_no_header(home: Any) -> None:
    """The SPIFFE ID of a verified certificate decides, and what claims to be forwarded is not seen."""
    ca = TestCA()
    server, client = (ca.credentials(account, dns=(account,)) for account in ("reviews", "sleep"))
    accepted = grpc.ssl_server_credentials(
        [(server.private_key, server.certificate_chain)], ca.root, require_client_auth=True
    )
    rules = "{rules: [{from: [{source: {principals: ['cluster.local/ns/default/sa/sleep']}}]}]}"

    def seen(context: Any) -> bytes:
        told = dict(context.invocation_metadata())["x-forwarded-client-cert"]
        return f"{told} {context.meshlib_peer.identity}".encode()

    with mesh(Snapshot(inbound=(inbound(rules),), complete=True)) as made, home(made, seen, accepted) as serving:
        for shown, is_allowed in ((client, True), (server, False)):
            credentials = grpc.ssl_channel_credentials(ca.root, shown.private_key, shown.certificate_chain)
            options = (("grpc.ssl_target_name_override", "reviews"), ("grpc.use_local_subchannel_pool", 1))
            face = SyncFace(grpc.secure_channel(f"127.0.0.1:{serving.port}", credentials, options))
            forged = (("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/default/sa/root"),)
            if is_allowed:
                uri = "spiffe://cluster.local/ns/default/sa/sleep"
                assert face.unary(b"", metadata=forged) == f"URI={uri} {uri}".encode()
            else:
                with pytest.raises(grpc.RpcError) as raised:
                    face.unary(b"", metadata=forged)
                assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED  # type: ignore[attr-defined]
            face.close()


# mTLS with the mesh's own identity


def _credentials(ca: TestCA, account: str, *trusts: TestCA) -> Credentials:
    """As the control plane's authority makes them: a DNS name beside the SPIFFE ID."""
    return ca.credentials(account, dns=(f"{account}.default.sa.cluster.local",), trusts=trusts)


def _rules(*accounts: str, is_auto: bool = False) -> UpstreamTls:
    uris = tuple(SpiffeId.of("cluster.local", "default", account).uri for account in accounts)
    return UpstreamTls("ISTIO_MUTUAL", "outbound_.80_._.reviews", uris, auto=is_auto)


@contextlib.contextmanager
def _member(folder: Path, credentials: Credentials, given: Snapshot | None = None) -> Iterator[Mesh]:
    write_identity(folder, credentials)
    with mesh(given, identity=f"files:{folder}") as made:
        assert made.wait_for_credentials() is not None
        yield made


def _rotate(of: Mesh, credentials: Credentials) -> None:
    assert of._identity is not None
    of._identity._publish(credentials)


def _secured(port: int, tls: UpstreamTls) -> Snapshot:
    return service("reviews:9080", [("127.0.0.1", port)], cluster=Cluster("reviews:9080", tls=tls))


def _caller(kind: str, of: Mesh) -> Any:
    if kind == "aio":
        return AioFace(lambda: of.grpc_aio_channel("reviews:9080"))
    return SyncFace(of.grpc_channel("reviews:9080"))


@pytest.mark.parametrize("client", ["sync", "aio"])
def test_both_sides_prove_who_they_are(home: Any, client: str, tmp_path: Path) -> None:
    """Every arity over mTLS: the server sees the caller's identity; a server of another account is refused."""
    ca = TestCA()
    with (
        _member(tmp_path / "s", _credentials(ca, "reviews")) as serving_mesh,
        home(
            serving_mesh,
            lambda context: str(context.meshlib_peer.identity).encode(),
            serving_mesh.grpc_server_credentials(),
        ) as serving,
        _member(tmp_path / "c", _credentials(ca, "sleep"), _secured(serving.port, _rules("reviews"))) as calling,
    ):
        face = _caller(client, calling)
        assert face.every(b"") == [b"spiffe://cluster.local/ns/default/sa/sleep"] * 4
        calling._feed.publish(_secured(serving.port, _rules("ratings")))
        with pytest.raises(grpc.RpcError) as raised:
            face.unary(b"")
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        face.close()


def test_a_foreign_authority_vouches_for_nobody(home: Any, tmp_path: Path) -> None:
    """A caller and a server with certificates of another root for the same names, and a caller without one."""
    ours, foreign = TestCA(), TestCA()
    with (
        _member(tmp_path / "s", _credentials(ours, "reviews")) as serving_mesh,
        home(serving_mesh, lambda context: b"in", serving_mesh.grpc_server_credentials()) as serving,
        _member(tmp_path / "c", _credentials(foreign, "sleep"), _secured(serving.port, _rules("reviews"))) as calling,
    ):
        face = _caller("sync", calling)
        with pytest.raises(grpc.RpcError):
            face.unary(b"")  # the server's certificate is foreign to the caller
        stranger = foreign.credentials("sleep", dns=("sleep.default.sa.cluster.local",), trusts=(ours,))
        _rotate(calling, stranger)
        with pytest.raises(grpc.RpcError):
            face.unary(b"")  # and the caller's to the server
        face.close()
        credentials = grpc.ssl_channel_credentials(ours.root)
        options = (("grpc.ssl_target_name_override", "reviews.default.sa.cluster.local"),)
        nameless = SyncFace(grpc.secure_channel(f"127.0.0.1:{serving.port}", credentials, options))
        with pytest.raises(grpc.RpcError):
            nameless.unary(b"")
        nameless.close()
        assert serving.started.empty()


@pytest.mark.parametrize("client", ["sync", "aio"])
def test_a_root_and_both_leaves_are_replaced_without_a_failed_call(home: Any, client: str, tmp_path: Path) -> None:
    """Calls go on through all steps; in the end both sides trust the new root alone, and show its leaves."""
    old, new = TestCA(), TestCA()
    with (
        _member(tmp_path / "s", _credentials(old, "reviews")) as serving_mesh,
        home(
            serving_mesh, lambda context: context.auth_context()["x509_pem_cert"][0],
            serving_mesh.grpc_server_credentials(),
        ) as serving,
        _member(tmp_path / "c", _credentials(old, "sleep"), _secured(serving.port, _rules("reviews"))) as calling,
    ):  # fmt: skip
        done, failures, rounds = threading.Event(), list[BaseException](), threading.Semaphore(0)

        def call() -> None:
            face = _caller(client, calling)
            try:
                while not done.is_set():
                    face.unary(b"")
                    rounds.release()
            except BaseException as error:  # told by the assertion below
                failures.append(error)
                rounds.release(1000)
            finally:
                face.close()

        caller = threading.Thread(target=call)
        caller.start()
        for ca, other in ((old, (new,)), (new, (old,)), (new, ())):
            for member, account in ((serving_mesh, "reviews"), (calling, "sleep")):
                latest = _credentials(ca, account, *other)
                _rotate(member, latest)
                for _ in range(3):
                    assert rounds.acquire(timeout=20)
        done.set()
        caller.join(20)
        assert not failures
        face = _caller(client, calling)
        assert face.unary(b"") == latest.certificate_chain
        face.close()
        assert serving_mesh.credentials is not None and serving_mesh.credentials.trust_bundles == (
            ("cluster.local", new.root),
        )


def test_what_cannot_be_proven_or_verified_is_not_sent(tmp_path: Path) -> None:
    """Several accounts, any account: gRPC verifies one name, so the call fails rather than trust all."""
    with GrpcPeer() as plain, _member(tmp_path / "c", _credentials(TestCA(), "sleep")) as calling:
        for accounts in ((), ("reviews", "ratings")):
            calling._feed.publish(_secured(plain.port, _rules(*accounts)))
            face = _caller("sync", calling)
            with pytest.raises(grpc.RpcError, match="one account"):
                face.unary(b"")
            face.close()
        calling._feed.publish(_secured(plain.port, _rules("reviews", is_auto=True)))
        face = _caller("sync", calling)
        assert face.unary(b"x") == b"peer:x"  # its endpoint does not serve the mesh's mTLS
        face.close()
    with mesh() as nobody, pytest.raises(NoCredentials):
        nobody.grpc_server_credentials()


def test_a_server_is_seen_to_serve_mtls(home: Any, tmp_path: Path) -> None:
    """The handshake by which a process finds out whether its own port is the mesh's, before it says so to others."""
    with (
        _member(tmp_path / "s", _credentials(TestCA(), "reviews")) as made,
        home(made, lambda context: b"in", made.grpc_server_credentials()) as serving,
        socket.create_connection(("127.0.0.1", serving.port)) as connection,
        made.tls.client(_rules("reviews")).wrap_socket(connection, server_hostname="meshlib"),
    ):
        pass


def test_an_option_of_the_users_own_wins() -> None:
    """gRPC takes the first of two values; the user's stands before ours."""
    with mesh() as made, SyncHome(made, lambda context: context._rpc_event.call_details.host) as serving:
        made._feed.publish(service("reviews:9080", [("127.0.0.1", serving.port)]))
        for options, host in (((), b"reviews:9080"), ((("grpc.default_authority", "mine"),), b"mine")):
            face = SyncFace(made.grpc_channel("reviews:9080", options=options))
            assert face.unary(b"") == host
            face.close()
