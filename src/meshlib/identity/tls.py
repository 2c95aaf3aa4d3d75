"""Which TLS does this process speak, and with whom? Contexts made of its Credentials, and the check of who answers.

- A peer is verified within the handshake, before a byte of a request is written or read: the contexts make sockets and
  memory buffers of classes whose `do_handshake` ends well only with a certificate that satisfies the rule.
- Contexts are made anew for each Credentials and never changed: trust can be taken away, no session outlives a
  rotation, and connections that are open go on. Who keeps connections keeps them by context.
"""

from __future__ import annotations

import os
import ssl
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from meshlib.identity.credentials import Credentials
from meshlib.model import Peer, SpiffeId, UpstreamTls, mesh_alpn

Connection = ssl.SSLSocket | ssl.SSLObject
Verify = Callable[[Connection], None]
"""Looks at a connection whose handshake has just ended. Raises ssl.SSLCertVerificationError to refuse it."""

_ALPN = {False: ("http/1.1",), True: ("h2", "http/1.1")}
_MAX_CONTEXTS = 4096
_ASKED = "_meshlib_asked_name"
_BEGIN, _END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"


class NoCredentials(OSError):
    """mTLS is demanded, and this process has nothing to prove who it is. The call or connection is refused."""


class Context(ssl.SSLContext):
    """A context whose ALPN is what it was made with: client libraries would set their own on it."""

    is_sealed = False

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        if not self.is_sealed:
            super().set_alpn_protocols(alpn_protocols)


class TlsContexts:
    """The contexts of one process. Thread-safe.

    credentials: the present ones, None while there are none. has_identity: whether there ever will be: without, what
    would be secured where both sides can (auto-mTLS) stays plaintext. clock: seconds since 1970.
    """

    def __init__(
        self,
        credentials: Callable[[], Credentials | None] = lambda: None,
        *,
        has_identity: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._credentials, self.has_identity, self._clock = credentials, has_identity, clock
        self._made: tuple[Credentials | None, dict[Any, Context]] = (None, {})
        self._of_files: dict[tuple[UpstreamTls, bool], Context] = {}

    def client(self, tls: UpstreamTls, http2: bool = False) -> ssl.SSLContext:
        """The context for connections to a cluster with these rules. http2: whether the caller can speak it.

        Raises NoCredentials, OSError for files that can't be read, ssl.SSLError for what can't be used.
        """
        if not tls.is_mesh:
            found = self._of_files.get((tls, http2))
            if found is None:
                found = self._of_files[tls, http2] = _of_files(tls, http2)
            return found
        credentials, contexts = self._present()
        found = contexts.get((tls, http2))
        if found is None:
            found = _context(ssl.PROTOCOL_TLS_CLIENT, credentials, tls.subject_alt_names, mesh_alpn(http2))
            if len(contexts) >= _MAX_CONTEXTS:
                contexts.clear()
            contexts[tls, http2] = found
        return found

    def server(self, http2: bool = False) -> ssl.SSLContext:
        """The context for connections that are accepted: the client proves an identity of a trusted domain.
        Raises NoCredentials."""
        credentials, contexts = self._present()
        found = contexts.get(http2)
        if found is None:
            found = contexts[http2] = _context(ssl.PROTOCOL_TLS_SERVER, credentials, (), _ALPN[http2])
        return found

    @property
    def is_ready(self) -> bool:
        """Whether there are credentials that have not expired."""
        credentials = self._credentials()
        return credentials is not None and not credentials.has_expired(self._clock())

    def present(self) -> Credentials:
        """The credentials themselves, for a library with a TLS of its own. Raises NoCredentials."""
        return self._present()[0]

    def _present(self) -> tuple[Credentials, dict[Any, Context]]:
        credentials = self._credentials()
        if credentials is None:
            raise NoCredentials(
                "mTLS is demanded, and this process has no certificate of the mesh: MESHLIB_IDENTITY says whence, and "
                "the log of meshlib.identity why there is none yet"
            )
        if credentials.has_expired(self._clock()):
            raise NoCredentials(
                f"mTLS is demanded, and the certificate of {credentials.identity} has expired: the log of "
                "meshlib.identity says why it was not renewed"
            )
        known, contexts = self._made
        if known is not credentials:
            contexts = {}
            self._made = credentials, contexts
        return credentials, contexts

    def __repr__(self) -> str:
        return f"<TlsContexts {self._made[0]!r} {len(self._made[1])} contexts>"


def secured(peer: Peer, connection: Connection) -> Peer:
    """`peer` with what a handshake by a context of ours has proven. Raises what peer_identity raises."""
    return peer._replace(identity=peer_identity(connection), is_tls=True, sni=asked_name(connection))


def peer_identity(connection: Connection) -> SpiffeId:
    """The one SPIFFE ID of the peer's certificate. Its chain was verified by the handshake.

    Raises ssl.SSLCertVerificationError when there is no certificate, or not exactly one URI in it (X.509-SVID, 2:
    "MUST contain exactly one URI SAN"), or one that is no workload's ID.
    """
    certificate: Any = connection.getpeercert() or {}
    uris = [name for kind, name in certificate.get("subjectAltName", ()) if kind == "URI"]
    if len(uris) != 1:
        raise _refused(f"the peer's certificate has {len(uris)} URIs, and one is its identity")
    try:
        return SpiffeId.parse(uris[0])
    except ValueError as error:
        raise _refused(str(error)) from None


def asked_name(connection: Connection) -> str:
    """The server name that the client's handshake asked for; "" for none, or where the context is not ours."""
    return str(getattr(connection, _ASKED, ""))


def bears(names: tuple[str, ...]) -> Verify:
    """The certificate bears one of these names (Envoy's match_typed_subject_alt_names, as Istio sets it)."""

    def verify(connection: Connection) -> None:
        certificate: Any = connection.getpeercert() or {}
        found: list[tuple[str, str]] = list(certificate.get("subjectAltName", ()))
        if not any(is_borne(each, *name) for each in names for name in found):
            told = ", ".join(name for _, name in found) or "no name"
            raise _refused(f"certificate is for {told}, not for {' or '.join(names)}")

    return verify


def is_borne(wanted: str, kind: str, name: str) -> bool:
    """DNS names without regard to case, a wildcard for one label (RFC 6125, 6.4.3); URIs and addresses as they are."""
    if kind != "DNS" or "://" in wanted:
        return kind == ("URI" if "://" in wanted else "IP Address") and name == wanted
    wanted, name = wanted.lower(), name.lower()
    if name.startswith("*."):
        first, dot, rest = wanted.partition(".")
        return bool(first and dot) and rest == name[2:]
    return name == wanted


def load_credentials(context: ssl.SSLContext, credentials: Credentials) -> None:
    load_pem(context, credentials.certificate_chain, credentials.private_key)


def _no_password() -> str:
    """Without this OpenSSL would ask for an encrypted key's at the terminal."""
    return ""


def load_pem(context: ssl.SSLContext, chain: bytes, key: bytes) -> None:
    """Python loads keys from files only: one that exists in memory, where the system has such, or one that is gone
    again before it is of use to anybody. Raises ssl.SSLError."""
    text = key.rstrip() + b"\n" + chain
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("meshlib", os.MFD_CLOEXEC)
        try:
            with os.fdopen(file, "wb", closefd=False) as written:
                written.write(text)
            context.load_cert_chain(f"/proc/self/fd/{file}", password=_no_password)
        finally:
            os.close(file)
        return
    file, path = tempfile.mkstemp(prefix="meshlib")  # 0600
    try:
        with os.fdopen(file, "wb") as written:
            written.write(text)
        context.load_cert_chain(path, password=_no_password)
    finally:
        Path(path).unlink()


# How contexts are made


def _context(protocol: int, credentials: Credentials, names: tuple[str, ...], alpn: tuple[str, ...]) -> Context:
    context = Context(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # Istio's default; 1.3 is taken where both sides have it
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    for _, bundle in credentials.trust_bundles:
        context.load_verify_locations(cadata=bundle.decode("ascii"))
    load_credentials(context, credentials)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.sni_callback = _keep_asked_name
        context.num_tickets = 0  # a resumed session would bring the identity that was proven before a rotation
        context.options |= ssl.OP_NO_TICKET
    _verify_with(context, _of_the_mesh(credentials, names))
    context.set_alpn_protocols(alpn)
    context.is_sealed = True
    return context


def _keep_asked_name(connection: Connection, name: str | None, _: ssl.SSLContext) -> None:
    """Python's ssl tells it here and nowhere else."""
    setattr(connection, _ASKED, name or "")


def _of_files(tls: UpstreamTls, http2: bool) -> Context:
    context = Context(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.ca_file:
        context.load_verify_locations(tls.ca_file)
    else:
        context.load_default_certs()
    if tls.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif tls.subject_alt_names:  # they stand in the place of the SNI name
        context.check_hostname = False
        _verify_with(context, bears(tls.subject_alt_names))
    if tls.certificate_file:
        context.load_cert_chain(tls.certificate_file, tls.private_key_file or None)
    context.set_alpn_protocols(_ALPN[http2])
    context.is_sealed = True
    return context


def _of_the_mesh(credentials: Credentials, names: tuple[str, ...]) -> Verify:
    """An identity of a trusted domain, by a chain that ends at a root of this very domain; and, where `names` are
    given, one of them."""
    roots = {domain: frozenset(_certificates(bundle)) for domain, bundle in credentials.trust_bundles}
    is_named = bears(names) if names else None

    def verify(connection: Connection) -> None:
        identity = peer_identity(connection)
        trusted = roots.get(identity.trust_domain)
        if trusted is None:
            raise _refused(f"{identity} is of no trusted domain; there are {', '.join(roots) or 'none'}")
        if len(roots) > 1 and root_of(connection) not in trusted:
            raise _refused(f"{identity} was not signed by a root of {identity.trust_domain}")
        if is_named is not None:
            is_named(connection)

    return verify


def _verify_with(context: ssl.SSLContext, verify: Verify) -> None:
    class VerifiedSocket(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            verify(self)

    class VerifiedObject(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            verify(self)

    context.sslsocket_class, context.sslobject_class = VerifiedSocket, VerifiedObject


def root_of(connection: Any) -> bytes:
    """Where the verified chain ends, in DER."""
    if hasattr(connection, "get_verified_chain"):  # Python 3.13
        return bytes(connection.get_verified_chain()[-1])
    chain = connection._sslobj.get_verified_chain()
    return ssl.PEM_cert_to_DER_cert(chain[-1].public_bytes())


def _certificates(bundle: bytes) -> Iterable[bytes]:
    for part in bundle.split(_BEGIN)[1:]:
        text = _BEGIN + part.partition(_END)[0] + _END
        yield ssl.PEM_cert_to_DER_cert(text.decode("ascii"))


def _refused(reason: str) -> ssl.SSLCertVerificationError:
    return ssl.SSLCertVerificationError(1, reason)
