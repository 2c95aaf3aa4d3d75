"""A certificate authority in memory, for whoever needs a peer with a good certificate, or with a bad one."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshlib.identity.credentials import Credentials
from meshlib.model import SpiffeId

DAY = 86400.0


def pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def files_of(credentials: Credentials) -> dict[str, bytes]:
    """What a folder holds for `MESHLIB_IDENTITY=files:`, by name."""
    return {
        "tls.crt": credentials.certificate_chain,
        "tls.key": credentials.private_key,
        "ca.crt": dict(credentials.trust_bundles)[credentials.identity.trust_domain],
    }


def write_identity(folder: Path, credentials: Credentials) -> None:
    """The files of an identity, in a folder that is made where it is not there."""
    folder.mkdir(exist_ok=True)
    for name, content in files_of(credentials).items():
        (folder / name).write_bytes(content)


class TestCA:
    """One root. Two of them are foreign to each other, whatever their trust domains."""

    __test__ = False

    def __init__(self, trust_domain: str = "cluster.local") -> None:
        self.trust_domain = trust_domain
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain)])
        begin = now() - datetime.timedelta(days=1000)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(self.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + datetime.timedelta(days=4000))
            .add_extension(x509.BasicConstraints(True, None), True)
            .add_extension(x509.KeyUsage(True, False, False, False, False, True, True, False, False), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False)
            .sign(self.key, hashes.SHA256())
        )
        self.root = self.certificate.public_bytes(form.Encoding.PEM)

    def issue(
        self,
        *,
        uris: Sequence[str] = (),
        dns: Sequence[str] = (),
        ips: Sequence[str] = (),
        common_name: str = "",
        begins: float = -60.0,
        ends: float = DAY,
        server: bool = True,
        client: bool = True,
        subject: Sequence[x509.NameAttribute[str]] = (),
    ) -> tuple[bytes, bytes]:
        """PEM of a leaf, and of its key, with just these names. begins, ends: seconds from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [
            *map(x509.UniformResourceIdentifier, uris),
            *map(x509.DNSName, dns),
            *(x509.IPAddress(ipaddress.ip_address(each)) for each in ips),
        ]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH] * server + [ExtendedKeyUsageOID.CLIENT_AUTH] * client
        subject = [*subject, *([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else ())]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() + datetime.timedelta(seconds=begins))
            .not_valid_after(now() + datetime.timedelta(seconds=ends))
            .add_extension(x509.BasicConstraints(False, None), True)
            .add_extension(x509.KeyUsage(True, False, True, False, False, False, False, False, False), True)
            .add_extension(x509.ExtendedKeyUsage(usages), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), not subject)
        leaf = builder.sign(self.key, hashes.SHA256())
        return leaf.public_bytes(form.Encoding.PEM), pem_of(key)

    def credentials(
        self,
        identity: SpiffeId | str = "default",
        *,
        uris: Sequence[str] | None = None,
        dns: Sequence[str] = (),
        common_name: str = "",
        begins: float = -60.0,
        ends: float = DAY,
        trusts: Sequence[TestCA] = (),
    ) -> Credentials:
        """identity: a SpiffeId, or a service account of namespace `default`. uris: other URI names than its own (none,
        several, a foreign one). trusts: other roots, each for its own trust domain; one of the same domain is put
        beside this one, as during a rotation."""
        who = identity if isinstance(identity, SpiffeId) else SpiffeId.of(self.trust_domain, "default", identity)
        chain, key = self.issue(
            uris=(who.uri,) if uris is None else uris, dns=dns, common_name=common_name, begins=begins, ends=ends
        )
        bundles = {self.trust_domain: self.root}
        for other in trusts:
            bundles[other.trust_domain] = bundles.get(other.trust_domain, b"") + other.root
        at = now().timestamp()
        return Credentials(who, chain, key, tuple(sorted(bundles.items())), at + begins, at + ends)

    def expired(self, identity: SpiffeId | str = "default") -> Credentials:
        return self.credentials(identity, begins=-2 * DAY, ends=-DAY)

    def not_yet_valid(self, identity: SpiffeId | str = "default") -> Credentials:
        return self.credentials(identity, begins=DAY, ends=2 * DAY)
