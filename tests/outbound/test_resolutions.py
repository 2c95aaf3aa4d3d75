"""Where a call to a host outside goes, for every resolution of a ServiceEntry, by every client."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from adapters import caller

import meshlib
from peers import Peer

CLIENTS = ("httpx", "httpx-async", "httpx-aiohttp", "requests", "aiohttp")
"""One for each way to connect."""
ENTRY = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  hosts: ["{host}"]
  ports: [{{number: {number}, name: http, protocol: HTTP, targetPort: {port}}}]
  resolution: {resolution}
{endpoints}
---
"""
STRICT = """
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default, namespace: default}
spec:
  egress: [{hosts: ["./*"]}]
  outboundTrafficPolicy: {mode: REGISTRY_ONLY}
---
"""


def entry(
    name: str, host: str, port: int, resolution: str, *addresses: str, number: int = 80, namespace: str = "default"
) -> str:
    endpoints = f"  endpoints: [{', '.join(f'{{address: {each}}}' for each in addresses)}]" if addresses else ""
    return ENTRY.format(
        name=name,
        host=host,
        number=number,
        port=port,
        resolution=resolution,
        endpoints=endpoints,
        namespace=namespace,
    )


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything under `example` is this machine, for everybody who asks the operating system."""
    asked = socket.getaddrinfo

    def here(host: Any, *arguments: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        return asked("127.0.0.1" if str(name).endswith(".example") else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", here)


@pytest.mark.parametrize("adapter", CLIENTS)
def test_every_resolution_leads_to_the_server(adapter: str, names: None, tmp_path: Path) -> None:
    """Host is the name that the caller wrote, wherever the call goes; hosts that are not imported are not called."""
    with Peer() as peer:
        port = peer.port
        (tmp_path / "mesh.yaml").write_text(
            STRICT
            + entry("static", "static.example", port, "STATIC", "127.0.0.1")
            + entry("dns", "dns.example", port, "DNS")
            + entry("elsewhere", "alias.example", port, "DNS", "other.example")
            + entry("logical", "logical.example", port, "DNS_ROUND_ROBIN")
            + entry("none", "none.example", port, "NONE", number=port)
            + entry("wild", "*.wild.example", port, "NONE", number=port)
            + entry("dynamic", "*.dynamic.example", port, "DYNAMIC_DNS", number=port)
            + entry("foreign", "foreign.example", port, "DNS", namespace="others")
        )
        urls = [f"http://{name}.example" for name in ("static", "dns", "alias", "logical")]
        urls += [f"http://{name}.example:{port}" for name in ("none", "any.wild", "a.b.dynamic")]
        with meshlib.connect(tmp_path, namespace="default") as mesh, caller(adapter, mesh) as client:
            for url in urls:
                assert client.get(f"{url}/x").status_code == 200, url
            hosts = [received.header("host") for received in peer.received]
            assert hosts == [url.removeprefix("http://") for url in urls]
            assert client.get("http://foreign.example/").status_code == 502
            assert client.get("http://unknown.example/").status_code == 502
            assert len(peer.received) == len(urls)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def demanding(authority: trustme.CA) -> Iterator[Peer]:
    """A server that lets in only who shows a certificate of its own authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("secure.example").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    with Peer(tls=context) as peer:
        yield peer


@pytest.mark.parametrize("adapter", CLIENTS)
def test_mutual_tls_is_originated_with_the_rules_files(
    adapter: str, names: None, tmp_path: Path, authority: trustme.CA, demanding: Peer
) -> None:
    """tls.mode MUTUAL: the application calls http, the server sees a certificate; with SIMPLE it sees none, and lets
    nobody in."""
    mine = authority.issue_cert("client.example")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    mine.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    (tmp_path / "chain.pem").write_bytes(b"".join(blob.bytes() for blob in mine.cert_chain_pems))
    folder = tmp_path / "mesh"
    folder.mkdir()

    def say(tls: str) -> None:
        text = (
            entry("secure", "secure.example", demanding.port, "DNS")
            + f"""
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: secure}}
spec:
  host: secure.example
  trafficPolicy: {{tls: {{caCertificates: {tmp_path}/ca.pem, {tls}}}}}
"""
        )
        (folder / "new").write_text(text)
        (folder / "new").rename(folder / "mesh.yaml")

    say(f"mode: MUTUAL, clientCertificate: {tmp_path}/chain.pem, privateKey: {tmp_path}/key.pem")
    with meshlib.connect(folder) as mesh, caller(adapter, mesh) as client:
        assert [client.get("http://secure.example/").text for _ in range(2)] == ["ok", "ok"]
        assert demanding.received[0].header("host") == "secure.example"
        say("mode: SIMPLE")
        pause, deadline = threading.Event(), time.monotonic() + 15
        while "mode=MUTUAL" in str(mesh.explain("GET", "http://secure.example/")):
            assert time.monotonic() < deadline
            pause.wait(0.02)
        count = len(demanding.received)
        with pytest.raises(client.errors.every):
            client.get("http://secure.example/")
        assert len(demanding.received) == count
