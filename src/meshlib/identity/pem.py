"""What do PEM files say? Credentials made of a chain, a key and roots; whatever does not belong together is refused."""

from __future__ import annotations

from collections.abc import Iterable

from meshlib.identity.credentials import Credentials
from meshlib.model import SpiffeId


class BadCredentials(ValueError):
    """A certificate, key or bundle can't be used. The message names what is wrong and holds no secret."""


def credentials_of(chain: bytes, key: bytes, roots: bytes, bundles: Iterable[tuple[str, bytes]] = ()) -> Credentials:
    """chain: PEM, the leaf first. key: PEM, the leaf's. roots: PEM, trusted for the leaf's own trust domain; bundles:
    (trust domain, PEM) of others.

    Raises BadCredentials. Whether the time is right is the reader's question.
    """
    # Loaded here: a process without an identity needs none of it.
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as form

    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
        x509.load_pem_x509_certificates(roots)
    except ValueError:
        raise BadCredentials(
            "the certificate or its roots are no PEM certificates: -----BEGIN CERTIFICATE----- is how they begin"
        ) from None
    try:
        private = form.load_pem_private_key(key, None)
    except (ValueError, TypeError):  # TypeError: it is encrypted
        raise BadCredentials("the private key is no unencrypted PEM key: openssl pkey writes one") from None
    public = form.Encoding.DER, form.PublicFormat.SubjectPublicKeyInfo
    try:
        certified = leaf.public_key().public_bytes(*public)
    except (ValueError, UnsupportedAlgorithm):
        raise BadCredentials(
            "the certificate's key is of a kind that nobody knows here: use RSA, EC or Ed25519"
        ) from None
    if private.public_key().public_bytes(*public) != certified:
        raise BadCredentials("the private key is not the certificate's: give the two that were made together")
    identity = identity_of(leaf)
    return Credentials(
        identity,
        chain,
        private.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()),
        tuple(sorted({**dict(bundles), identity.trust_domain: roots}.items())),
        leaf.not_valid_before_utc.timestamp(),
        leaf.not_valid_after_utc.timestamp(),
    )


def identity_of(certificate: object) -> SpiffeId:
    """X509-SVID specification, 2: exactly one URI SAN, and it is the SPIFFE ID. Raises BadCredentials."""
    from cryptography import x509

    assert isinstance(certificate, x509.Certificate)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise BadCredentials(
            "the certificate has no subject alternative names: a workload's has its SPIFFE ID there"
        ) from None
    except (x509.DuplicateExtension, x509.UnsupportedGeneralNameType, ValueError):
        raise BadCredentials("the certificate's names or extensions can't be read") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise BadCredentials(f"the certificate has {len(uris)} URI names; a workload's has exactly one")
    try:
        return SpiffeId.parse(uris[0])
    except ValueError as error:
        raise BadCredentials(str(error)) from None
