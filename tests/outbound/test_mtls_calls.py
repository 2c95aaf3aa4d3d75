"""Claims about calls with the mesh's mTLS: every client's, to a real server, by plain http:// URLs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapters import ADAPTERS, caller

import meshlib
from certificates import TestCA, write_identity
from http2_peer import Http2Peer
from inbound.inbound_servers import uvicorn_server
from meshlib.identity.credentials import Credentials
from meshlib.identity.tls import TlsContexts
from meshlib.inbound.peer import of_scope
from meshlib.inbound.serve import Listening
from meshlib.mesh import Mesh
from meshlib.model import TlsMode

CA = TestCA()


class Service:
    """A server of the mesh; what it saw of each call."""

    def __init__(self, mode: TlsMode = TlsMode.STRICT) -> None:
        self.credentials, self.mode = CA.credentials("reviews"), mode
        self.listening = Listening(
            TlsContexts(lambda: self.credentials, has_identity=True), lambda port: self.mode, 10.0
        )
        self.seen: list[tuple[str, str, str]] = []
        self.connections: set[Any] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        host = dict(scope["headers"])[b"host"].decode()
        self.seen.append((str(of_scope(scope).identity), host, scope["path"]))
        self.connections.add(tuple(scope["client"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"well"})


@contextlib.contextmanager
def serving(service: Service) -> Iterator[int]:
    with uvicorn_server(service, http=service.listening.uvicorn) as url:
        yield int(url.rpartition(":")[2])


def mesh_of(
    tmp_path: Path,
    port: int,
    *,
    rule: str = "",
    label: str = "",
    account: str = "reviews",
    protocol: str = "HTTP",
    **more: str,
) -> Mesh:
    """A mesh of one service, with the rule's TLS mode and the label of its endpoint."""
    labels = f"labels: {{security.istio.io/tlsMode: {label}}}, " if label else ""
    text = f"""
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: reviews, namespace: default}}
spec:
  hosts: [reviews.example]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: {protocol}, targetPort: {port}}}]
  endpoints: [{{address: 127.0.0.1, {labels}serviceAccount: {account}}}]
"""
    if rule:
        text += f"""---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: reviews, namespace: default}}
spec: {{host: reviews.example, trafficPolicy: {{tls: {{mode: {rule}}}}}}}
"""
    folder = tmp_path / "mesh"
    folder.mkdir()
    (folder / "mesh.yaml").write_text(text)
    if "identity" not in more:
        write_identity(tmp_path / "identity", CA.credentials("productpage"))
        more["identity"] = f"files:{tmp_path / 'identity'}"
    return meshlib.connect(folder, **{key: value for key, value in more.items() if value})


WAYS = {"demanded": {"rule": "ISTIO_MUTUAL"}, "auto": {"label": "istio"}}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_plain_url_goes_out_as_mtls(tmp_path: Path, adapter: str, way: str) -> None:
    """The application writes http://; both sides know who the other is, and the name it wrote arrives."""
    service = Service()
    with (
        serving(service) as port,
        mesh_of(tmp_path, port, **WAYS[way]) as mesh,
        caller(adapter, mesh) as client,
    ):
        assert client.get("http://reviews.example/x").text == "well"
        assert client.get("http://reviews.example/y").text == "well"
    who = "spiffe://cluster.local/ns/default/sa/productpage"
    assert service.seen == [(who, "reviews.example", "/x"), (who, "reviews.example", "/y")]
    assert len(service.connections) == 1


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_another_service_account_gets_no_request(tmp_path: Path, adapter: str) -> None:
    """A certificate of the mesh is not enough: the destination's own account must answer."""
    service = Service()
    with serving(service) as port, mesh_of(tmp_path, port, rule="ISTIO_MUTUAL", account="ratings") as mesh:
        with caller(adapter, mesh) as client, pytest.raises(client.errors.connect) as caught:
            client.get("http://reviews.example/")
        assert "certificate is for" in str(caught.value)
    assert service.seen == []


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_demanded_mtls_without_credentials_fails_closed(tmp_path: Path, adapter: str) -> None:
    """Nothing goes out in plaintext where the rule says ISTIO_MUTUAL, and the error says what is missing."""
    service = Service(TlsMode.PERMISSIVE)
    with serving(service) as port, mesh_of(tmp_path, port, rule="ISTIO_MUTUAL", identity="") as mesh:
        with caller(adapter, mesh) as client, pytest.raises(client.errors.every) as caught:
            client.get("http://reviews.example/")
        assert "no certificate of the mesh" in str(caught.value)
    assert service.seen == []


@pytest.mark.parametrize(("rule", "label"), [("DISABLE", "istio"), ("", "")])
def test_plaintext_where_it_is_asked_for_or_nothing_else_is_served(tmp_path: Path, rule: str, label: str) -> None:
    """DISABLE wins over the endpoint's label; without a label auto-mTLS leaves an endpoint alone."""
    service = Service(TlsMode.PERMISSIVE)
    with (
        serving(service) as port,
        mesh_of(tmp_path, port, rule=rule, label=label) as mesh,
        caller("httpx", mesh) as client,
    ):
        assert client.get("http://reviews.example/").text == "well"
    assert [who for who, *_ in service.seen] == ["None"]


@pytest.mark.parametrize("adapter", ["httpx", "httpx-async", "httpx-aiohttp", "urllib3"])
def test_rotations_under_load_fail_no_call(tmp_path: Path, adapter: str) -> None:
    """Leaves change on both sides time and again, then the root does: old, both, new. No call fails."""
    service, new = Service(), TestCA()
    with serving(service) as port, mesh_of(tmp_path, port, rule="ISTIO_MUTUAL") as mesh:
        held: list[Credentials] = [CA.credentials("productpage")]
        mesh.tls = TlsContexts(lambda: held[0], has_identity=True)
        stop, called = threading.Event(), threading.Semaphore(0)

        def rotate() -> None:
            for step in range(20):
                for _ in range(2):  # some calls with each, however slow the machine is
                    called.acquire(timeout=10)
                if stop.wait(0.05):
                    return
                # A root is replaced in three steps: trusted by all, then used by all, then the old one goes.
                issuer, trusts = (CA, []) if step < 8 else (CA, [new]) if step < 12 else (new, [CA])
                if step >= 16:
                    trusts = []
                held[0] = issuer.credentials("productpage", trusts=trusts)
                service.credentials = issuer.credentials("reviews", trusts=trusts)

        # The two sides change one after the other: what is trusted by both is what both show.
        turning = threading.Thread(target=rotate)
        with caller(adapter, mesh) as client:
            assert client.get("http://reviews.example/").text == "well"
            turning.start()
            try:
                while turning.is_alive():
                    assert client.get("http://reviews.example/").text == "well"
                    called.release()
            finally:
                stop.set()
                turning.join(10)
    assert len(service.connections) >= 5  # new credentials, new connections


@pytest.mark.parametrize("adapter", ["httpx", "httpx-async", "httpx-aiohttp"])
def test_http2_goes_out_as_mtls_where_the_server_speaks_it(tmp_path: Path, adapter: str) -> None:
    """Both know who the other is; a server with another account gets no request; one of HTTP/1.1 gets that."""
    credentials = CA.credentials("reviews")
    context = TlsContexts(lambda: credentials, has_identity=True).server(http2=True)
    with Http2Peer(tls=context) as peer:
        (tmp_path / "a").mkdir()
        with (
            mesh_of(tmp_path / "a", peer.port, rule="ISTIO_MUTUAL", protocol="HTTP2") as mesh,
            caller(adapter, mesh) as client,
        ):
            got = client.get("http://reviews.example/x")
            assert (got.text, got.extensions["http_version"]) == ("ok", b"HTTP/2")
            assert peer.calls[0].header(":authority") == "reviews.example"
        (tmp_path / "b").mkdir()
        with (
            mesh_of(tmp_path / "b", peer.port, rule="ISTIO_MUTUAL", protocol="HTTP2", account="other") as mesh,
            caller(adapter, mesh) as client,
            pytest.raises(client.errors.connect),
        ):
            client.get("http://reviews.example/x")
        assert len(peer.calls) == 1
    service = Service()
    (tmp_path / "c").mkdir()
    with (
        serving(service) as port,
        mesh_of(tmp_path / "c", port, rule="ISTIO_MUTUAL", protocol="HTTP2") as mesh,
        caller(adapter, mesh) as client,
    ):
        assert [client.get("http://reviews.example/x").extensions["http_version"] for _ in range(2)] == [
            b"HTTP/1.1"
        ] * 2
