"""A call to the outside, from the YAML of the egress page to the bytes that the server gets."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import httpx
import pytest
import trustme

import meshlib
from peers import Peer

NAME = "www.googleapis.com"
SAMPLE = Path(__file__).parents[2] / "examples" / "bookinfo" / "networking" / "egress-rule-google-apis.yaml"
REGISTRY_ONLY = """
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default}
spec:
  outboundTrafficPolicy: {}
---
"""


class SecurePeer:
    """A server that says it is `name`, with what it was asked for in the handshake."""

    def __init__(self, name: str, folder: Path) -> None:
        authority = trustme.CA()
        self.ca_file = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca_file)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(context)
        self.asked_for: list[str | None] = []
        context.sni_callback = lambda connection, asked, context: self.asked_for.append(asked)
        self.peer = Peer(tls=context)


def configuration(folder: Path, port: int, ca_file: str) -> Path:
    """Istio's sample as it is, but for the address that the name has and the authority that vouches for it."""
    text = SAMPLE.read_text()
    endpoints = f"  resolution: DNS\n  endpoints:\n    - {{address: localhost, ports: {{https: {port}, http: 9}}}}\n"
    assert "  resolution: DNS\n" in text
    assert "          mode: SIMPLE" in text
    text = text.replace("  resolution: DNS\n", endpoints)
    text = text.replace("          mode: SIMPLE", f"          mode: SIMPLE\n          caCertificates: {ca_file}")
    there = folder / "mesh"
    there.mkdir()
    (there / "egress.yaml").write_text(REGISTRY_ONLY + text)
    return there


def test_bookinfos_egress_sample_calls_over_tls_by_the_name(tmp_path: Path) -> None:
    """`http://` to port 80 in the application; TLS to another port on the wire; Host and SNI are the name, and what
    the registry does not know is answered 502."""
    if socket.gethostbyname("localhost") != "127.0.0.1":
        pytest.skip("localhost is not 127.0.0.1 here")
    secure = SecurePeer(NAME, tmp_path)
    with (
        secure.peer as peer,
        meshlib.connect(configuration(tmp_path, peer.port, secure.ca_file)) as mesh,
        mesh.Client() as client,
    ):
        answer = client.get(f"http://{NAME}/books/v1/volumes?q=isbn")
        assert (answer.status_code, answer.text) == (200, "ok")
        (received,) = peer.received
        assert (received.target, received.header("host")) == ("/books/v1/volumes?q=isbn", NAME)
        assert secure.asked_for == [NAME]
        assert client.get(f"http://localhost:{peer.port}/").status_code == 502


def test_a_server_with_another_name_is_not_called(tmp_path: Path) -> None:
    """The certificate is checked against the name that the application called."""
    secure = SecurePeer("www.example.org", tmp_path)
    with secure.peer as peer, meshlib.connect(configuration(tmp_path, peer.port, secure.ca_file)) as mesh:
        with mesh.Client() as client, pytest.raises(httpx.ConnectError, match="certificate"):
            client.get(f"http://{NAME}/")
        assert peer.received == []
