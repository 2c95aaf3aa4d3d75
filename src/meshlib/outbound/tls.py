"""Which TLS does a client speak to a cluster? Contexts for TLS origination, built once for each set of rules."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from meshlib.model import UpstreamTls


@lru_cache(maxsize=1024)
def client_context(tls: UpstreamTls) -> ssl.SSLContext:
    """A context for `tls`: at least TLS 1.2. The server's certificate must be for the SNI name sent, or, where
    `subject_alt_names` are given, bear one of them: whatever makes connections with it, the handshake fails otherwise.

    Raises OSError or ssl.SSLError when a file can't be used; the call that needed it fails as a failed connection.
    """
    context = ssl.create_default_context(cafile=tls.ca_file or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif tls.subject_alt_names:
        # The names stand in the place of the SNI name (Envoy's match_typed_subject_alt_names, as Istio sets it).
        context.check_hostname = False
        context.sslsocket_class, context.sslobject_class = _bearing(tls.subject_alt_names)
    if tls.certificate_file:
        context.load_cert_chain(tls.certificate_file, tls.private_key_file or None)
    return context


@lru_cache(maxsize=1)
def default_context() -> ssl.SSLContext:
    """For https URLs to hosts whose cluster says nothing about TLS."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _bearing(wanted: tuple[str, ...]) -> tuple[type[ssl.SSLSocket], type[ssl.SSLObject]]:
    """What a context makes of sockets, and of the memory buffers that asyncio and anyio use: its handshake ends well
    only with a certificate that bears one of the names."""

    class NamedSocket(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            _check(self, wanted)

    class NamedObject(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            _check(self, wanted)

    return NamedSocket, NamedObject


def _check(connection: ssl.SSLSocket | ssl.SSLObject, wanted: Iterable[str]) -> None:
    certificate: Any = connection.getpeercert() or {}
    found: list[tuple[str, str]] = list(certificate.get("subjectAltName", ()))
    if not any(_is_borne(each, *name) for each in wanted for name in found):
        told = ", ".join(name for _, name in found) or "no name"
        raise ssl.SSLCertVerificationError(1, f"certificate is for {told}, not for {' or '.join(wanted)}")


def _is_borne(wanted: str, kind: str, name: str) -> bool:
    """DNS names without regard to case, a wildcard for one label (RFC 6125, 6.4.3); URIs and addresses as they are."""
    if kind != "DNS" or "://" in wanted:
        return kind == ("URI" if "://" in wanted else "IP Address") and name == wanted
    wanted, name = wanted.lower(), name.lower()
    if name.startswith("*."):
        first, dot, rest = wanted.partition(".")
        return bool(first and dot) and rest == name[2:]
    return name == wanted
