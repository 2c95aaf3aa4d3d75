"""Whom does a client take for its server, where a DestinationRule names subjectAltNames? Real handshakes."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from meshlib.identity.tls import TlsContexts, is_borne
from meshlib.model import UpstreamTls
from peers import Peer


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture(scope="module")
def port(authority: trustme.CA) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("server.e.com", "*.w.e.com", "10.1.2.3").configure_cert(context)
    with Peer(tls=context) as peer:
        yield peer.port


def by_socket(tls: UpstreamTls, port: int, name: str) -> None:
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        TlsContexts().client(tls).wrap_socket(plain, server_hostname=name),
    ):
        pass


def by_asyncio(tls: UpstreamTls, port: int, name: str) -> None:
    async def connect() -> None:
        _, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=TlsContexts().client(tls), server_hostname=name
        )
        writer.close()
        await writer.wait_closed()

    asyncio.run(connect())


Connect = Callable[[UpstreamTls, int, str], None]
WAYS = pytest.mark.parametrize("connect", [by_socket, by_asyncio])


@WAYS
@pytest.mark.parametrize(
    "names",
    [("server.e.com",), ("SERVER.E.COM",), ("a.w.e.com",), ("10.1.2.3",), ("nobody.e.com", "server.e.com")],
    ids=str,
)
def test_a_certificate_that_bears_one_of_the_names_is_taken(
    connect: Connect, names: tuple[str, ...], ca_file: str, port: int
) -> None:
    """Whatever name the connection was made by."""
    connect(UpstreamTls("SIMPLE", "other.e.com", names, ca_file), port, "other.e.com")


@WAYS
@pytest.mark.parametrize(
    "names", [("nobody.e.com",), ("w.e.com",), ("a.b.w.e.com",), ("spiffe://server.e.com",)], ids=str
)
def test_a_certificate_that_bears_none_is_refused(
    connect: Connect, names: tuple[str, ...], ca_file: str, port: int
) -> None:
    """Although it would do for the name that the connection was made by; the error says what it is for."""
    with pytest.raises(ssl.SSLCertVerificationError, match=r"certificate is for server\.e\.com, .*, not for "):
        connect(UpstreamTls("SIMPLE", "server.e.com", names, ca_file), port, "server.e.com")


@WAYS
def test_without_names_the_certificate_must_be_for_the_sni_name(connect: Connect, ca_file: str, port: int) -> None:
    """As ever."""
    connect(UpstreamTls("SIMPLE", ca_file=ca_file), port, "server.e.com")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        connect(UpstreamTls("SIMPLE", ca_file=ca_file), port, "nobody.e.com")


@WAYS
def test_a_stranger_is_refused_whatever_it_calls_itself(connect: Connect, port: int) -> None:
    """Names are worth nothing without an authority that vouches for them."""
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        connect(UpstreamTls("SIMPLE", "", ("server.e.com",)), port, "server.e.com")


def test_a_uri_is_compared_as_it_is() -> None:
    """SPIFFE IDs: the whole of it, case and all, and no wildcard."""
    identity = "spiffe://cluster.local/ns/default/sa/reviews"
    assert is_borne(identity, "URI", identity)
    assert not is_borne(identity, "URI", identity.upper())
    assert not is_borne(identity, "DNS", identity)
    assert not is_borne("reviews", "URI", identity)
