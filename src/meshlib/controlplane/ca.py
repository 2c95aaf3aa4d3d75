"""Who signs? The certificate authority: roots and their rotation, and leaves whose names come from the caller alone.

- A leaf says what the authenticated caller is: its SPIFFE URI, and beside it `<account>.<namespace>.sa.<trust domain>`,
  since gRPC's clients can check DNS names only. It is no Service's name (`svc`): whoever may choose an account's name
  must not choose which Service it passes for. Nothing of a request but its public key is taken over.
- A rotation has three steps. `begin` makes a new root, which is trusted from then on; `switch` signs with it, once all
  who listen have said that they trust it; `finish` drops the old one, once nothing that it signed is valid any more.
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshlib.controlplane.private_files import private_folder, read_private, write_private
from meshlib.controlplane.sources import StateError
from meshlib.model import SpiffeId

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes

logger = logging.getLogger("meshlib.controlplane.ca")

DAY = 86400.0
DEFAULT_LIFETIME, MAX_LIFETIME = DAY, 90 * DAY
"""Seconds; Istio's."""
ROOT_LIFETIME = 3650 * DAY
BACKDATED = 120.0
"""Seconds before now at which a leaf begins, for machines whose clocks are behind (Istio: 2 minutes)."""
MAX_CSR = 32 * 1024


class BadRequest(ValueError):
    """What is to be signed can't be. The message is for the caller."""


class RotationRefused(ValueError):
    """It is not the time for this step. The message says why."""


class Signer(msgspec.Struct):
    """One root, or a plugged-in intermediate. chain: PEM from the signer up to, and with, the root.

    until: when the last leaf that it signed ends, seconds since 1970.
    """

    key: bytes
    chain: bytes
    until: float = 0.0

    def __repr__(self) -> str:
        return f"<Signer {fingerprint(self.root)[:12]}>"

    @property
    def root(self) -> bytes:
        return x509.load_pem_x509_certificates(self.chain)[-1].public_bytes(form.Encoding.PEM)


class PluggedAuthority(NamedTuple):
    """The PEM files of a CA that somebody else has made. chain: what stands between `certificate` and `root`."""

    certificate: Path
    key: Path
    root: Path
    chain: Path | None = None

    @classmethod
    def of(cls, folder: Path) -> Self:
        """As Istio's `cacerts` secret names them."""
        chain = folder / "cert-chain.pem"
        return cls(
            folder / "ca-cert.pem",
            folder / "ca-key.pem",
            folder / "root-cert.pem",
            chain if chain.exists() else None,
        )


class PemAuthority(NamedTuple):
    """The same, as PEM. origin: where it was read, for errors. It prints no key."""

    certificate: bytes
    key: bytes
    root: bytes
    chain: bytes
    origin: str

    def __repr__(self) -> str:
        return f"<PemAuthority of {self.origin}>"


class _State(msgspec.Struct):
    """signers: the one that signs first. next: the one that will, trusted already."""

    trust_domain: str
    signers: list[Signer]
    next: Signer | None = None


class CertificateAuthority:
    """The signing half of the mesh's identity. Belongs to one event loop.

    folder: where it is kept; None keeps it in memory. plugged: a CA that is kept elsewhere: its files, a folder with
    them (PluggedAuthority.of), or the PEM itself. clock: seconds since 1970.

    Raises StateError when what is kept can't be used, or others can read it.
    """

    def __init__(
        self,
        trust_domain: str,
        folder: Path | None = None,
        plugged: PluggedAuthority | PemAuthority | Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.trust_domain = trust_domain
        self._clock = clock
        self._file = folder / "ca.json" if folder is not None else None
        self._listeners: list[Callable[[], None]] = []
        self._is_behind, self._told = False, ""
        """Whether `until` has not been kept yet, and what was logged of that."""
        self.is_plugged = plugged is not None
        if folder is not None:
            private_folder(folder)
        if plugged is not None:
            self._file = None
            files = PluggedAuthority.of(plugged) if isinstance(plugged, Path) else plugged
            read = _read(files) if isinstance(files, PluggedAuthority) else files
            self._state = _State(trust_domain, [_signer(read)])
            return
        kept = read_private(self._file) if self._file is not None else None
        if kept is None:
            self._state = _State(trust_domain, [self._new_root()])
            self._save(self._state)
            return
        try:
            self._state = msgspec.json.decode(kept, type=_State)
        except msgspec.DecodeError as error:
            raise StateError(f"{self._file}: {error}") from None
        if self._state.trust_domain != trust_domain:
            raise StateError(f"{self._file} is the CA of {self._state.trust_domain}, not of {trust_domain}")

    # Who is trusted

    @property
    def roots(self) -> tuple[bytes, ...]:
        """PEM of each, the one in use first."""
        state = self._state
        return tuple(dict.fromkeys(each.root for each in (*state.signers, *([state.next] if state.next else []))))

    @property
    def bundle(self) -> bytes:
        return b"".join(self.roots)

    @property
    def version(self) -> str:
        return hashlib.sha256(self.bundle).hexdigest()[:16]

    @property
    def signing(self) -> str:
        """The fingerprint of the root under which leaves are signed now."""
        return fingerprint(self._state.signers[0].root)

    @property
    def stage(self) -> str:
        """`idle`; `begun`: a new root is trusted; `switched`: it signs, and the old one is trusted still."""
        return "begun" if self._state.next else "switched" if len(self._state.signers) > 1 else "idle"

    @property
    def old_until(self) -> float:
        """When the last leaf of the old root may end, seconds since 1970; 0 where no root is old."""
        return self._state.signers[-1].until if self.stage == "switched" else 0.0

    def on_change(self, tell: Callable[[], None]) -> None:
        """`tell` is called after each change of who is trusted or who signs."""
        self._listeners.append(tell)

    # Signing

    def sign(self, csr: bytes, identity: SpiffeId, lifetime: float = 0.0) -> tuple[bytes, ...]:
        """PEM, the leaf first, the root last. csr: PEM. lifetime: seconds; none or a negative one is the default.

        Raises BadRequest for a request that is none, whose sender does not have the key, or whose key is weak.
        """
        return self._issue(_public_key(csr), identity, (_dns_name(identity),), (), lifetime)

    def issue_own(self, identity: SpiffeId, dns: Sequence[str], addresses: Sequence[Any]) -> tuple[bytes, bytes]:
        """(chain, key) as PEM for the control plane itself, which is called by names that are no workload's."""
        key = ec.generate_private_key(ec.SECP256R1())
        chain = self._issue(key.public_key(), identity, dns, addresses, DEFAULT_LIFETIME)
        return b"".join(chain), _pem(key)

    def issue(self, identity: SpiffeId, lifetime: float = 0.0) -> tuple[tuple[bytes, ...], bytes]:
        """(PEM, the leaf first and the root last; key as PEM) for a workload that can't make a key of its own."""
        key = ec.generate_private_key(ec.SECP256R1())
        return self._issue(key.public_key(), identity, (_dns_name(identity),), (), lifetime), _pem(key)

    def _issue(
        self, public_key: Any, identity: SpiffeId, dns: Sequence[str], addresses: Sequence[Any], lifetime: float
    ) -> tuple[bytes, ...]:
        signer = self._state.signers[0]
        chain = x509.load_pem_x509_certificates(signer.chain)
        issuer, now = chain[0], self._clock()
        wanted = min(lifetime if lifetime > 0 else DEFAULT_LIFETIME, MAX_LIFETIME)
        end = min(now + wanted, *(each.not_valid_after_utc.timestamp() for each in chain))
        if end <= now:
            raise BadRequest("the CA's own certificate has expired: whoever runs the control plane renews it")
        key = form.load_pem_private_key(signer.key, None)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri), *map(x509.DNSName, dns)]
        names += map(x509.IPAddress, addresses)
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(issuer.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_time(max(now - BACKDATED, issuer.not_valid_before_utc.timestamp())))
            .not_valid_after(_time(end))
            .add_extension(x509.BasicConstraints(False, None), True)
            .add_extension(x509.KeyUsage(True, False, True, False, False, False, False, False, False), True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False
            )
            .add_extension(x509.SubjectAlternativeName(names), True)  # critical, since the subject is empty
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), False)  # type: ignore[arg-type]
            .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())  # type: ignore[arg-type]
        )
        # Kept an hour ahead, so that not each leaf is a write.
        if end > signer.until:
            signer.until, self._is_behind = end + 3600, True
        if self._is_behind:
            self._keep_until()
        parents = chain if len(chain) > 1 else chain[-1:]
        return tuple(each.public_bytes(form.Encoding.PEM) for each in (leaf, *parents))

    def _keep_until(self) -> None:
        """A disk that is full ends nobody's identity: what can't be kept now is kept with a later leaf. Only `finish`
        asks for it. After a restart it may then come too soon, and whoever has such a leaf is trusted no more; nobody
        is trusted for it who was not.
        """
        try:
            self._save(self._state)
        except StateError as error:
            if self._told != str(error):
                self._told = str(error)
                logger.error("until when leaves are good can't be kept, and they are given all the same: %s", error)
        else:
            self._is_behind, self._told = False, ""

    # Rotation

    def rotate(self, step: str, has_everybody: Callable[[], Sequence[str]] = tuple, force: bool = False) -> None:
        """step: `begin`, `switch` or `finish`. has_everybody: who does not trust the present bundle yet.

        Raises RotationRefused, and StateError where the step can't be kept; then nothing has changed.
        """
        state = copy.deepcopy(self._state)
        if self.is_plugged:
            raise RotationRefused(
                "the CA is plugged in: have whoever issued it rotate it, and start the control plane with the new files"
            )
        order = {"begin": "idle", "switch": "begun", "finish": "switched"}
        if order.get(step) != self.stage:
            raise RotationRefused(f"the rotation is {self.stage}; steps are begin, switch, finish, in this order")
        if step == "begin":
            state.next = self._new_root()
        elif step == "switch":
            if (late := has_everybody()) and not force:
                names = ", ".join(late[:5])
                raise RotationRefused(f"the new root has not reached everybody yet: {names}; wait, or force it")
            assert state.next is not None
            state.signers.insert(0, state.next)
            state.next = None
        else:
            if (until := state.signers[-1].until) > self._clock() and not force:
                end = _time(until).isoformat(timespec="seconds")
                raise RotationRefused(f"certificates of the old root may be valid until {end}: wait, or force it")
            state.signers.pop()
        self._save(state)
        self._state = state
        logger.info("rotation of the root: %s; trusted: %s", self.stage, [fingerprint(r)[:12] for r in self.roots])
        for tell in self._listeners:
            tell()

    def exported(self) -> dict[str, bytes]:
        """The signer with its key, in files named as Istio's `cacerts` secret has them."""
        signer = self._state.signers[0]
        certificates = x509.load_pem_x509_certificates(signer.chain)
        return {
            "ca-cert.pem": certificates[0].public_bytes(form.Encoding.PEM),
            "ca-key.pem": signer.key,
            "root-cert.pem": signer.root,
            "cert-chain.pem": signer.chain,
        }

    def _new_root(self) -> Signer:
        key = ec.generate_private_key(ec.SECP256R1())
        now = self._clock()
        # The name differs for each root: else a verifier tries one's key on the other's signature.
        serial = x509.random_serial_number()
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, self.trust_domain),
                x509.NameAttribute(NameOID.COMMON_NAME, f"meshlib root {serial:x}"[:40]),
            ]
        )
        root = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(serial)
            .not_valid_before(_time(now - BACKDATED))
            .not_valid_after(_time(now + ROOT_LIFETIME))
            .add_extension(x509.BasicConstraints(True, None), True)
            .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .sign(key, hashes.SHA256())
        )
        return Signer(_pem(key), root.public_bytes(form.Encoding.PEM))

    def _save(self, state: _State) -> None:
        if self._file is not None:
            write_private(self._file, msgspec.json.encode(state))

    def __repr__(self) -> str:
        return f"<CertificateAuthority {self.trust_domain} {self.stage}, {len(self.roots)} roots>"


def fingerprint(pem: bytes) -> str:
    """SHA-256 of a certificate, in hexadecimal."""
    return x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256()).hex()


def _public_key(csr: bytes) -> Any:
    if len(csr) > MAX_CSR:
        raise BadRequest(f"the request is larger than {MAX_CSR} bytes")
    try:
        request = x509.load_pem_x509_csr(csr)
        key = request.public_key()
        has_key = request.is_signature_valid
    except (ValueError, InvalidSignature, UnsupportedAlgorithm, TypeError):
        raise BadRequest("csr is no PEM certificate request") from None
    if not has_key:
        raise BadRequest("the request is not signed with its own key")
    match key:
        case rsa.RSAPublicKey() if not 2048 <= key.key_size <= 8192:
            raise BadRequest(f"an RSA key has 2048 to 8192 bits, not {key.key_size}")
        case ec.EllipticCurvePublicKey() if not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1):
            raise BadRequest(f"curve {key.curve.name} is not P-256, P-384 or P-521")
        case rsa.RSAPublicKey() | ec.EllipticCurvePublicKey() | ed25519.Ed25519PublicKey():
            return key
        case _:
            raise BadRequest("the key is neither RSA nor EC nor Ed25519")


def _dns_name(identity: SpiffeId) -> str:
    return f"{identity.service_account}.{identity.namespace}.sa.{identity.trust_domain}"


def _read(files: PluggedAuthority) -> PemAuthority:
    key = read_private(files.key)
    if key is None:
        raise StateError(f"{files.key} does not exist: give the CA's private key")
    try:
        certificate, root = files.certificate.read_bytes(), files.root.read_bytes()
        chain = files.chain.read_bytes() if files.chain is not None else b""
    except OSError as error:
        raise StateError(f"{error.filename}: {error.strerror}") from None
    named = ", ".join(str(each) for each in (files.certificate, files.chain, files.root) if each is not None)
    return PemAuthority(certificate, key, root, chain, f"{named} and {files.key}")


def _signer(given: PemAuthority) -> Signer:
    try:
        wanted = x509.load_pem_x509_certificates(b"\n".join((given.certificate, given.chain, given.root)))
        chain = list(dict.fromkeys(wanted))
        for each, parent in zip(chain, chain[1:] + chain[-1:], strict=True):
            each.verify_directly_issued_by(parent)
        private: CertificateIssuerPrivateKeyTypes = form.load_pem_private_key(given.key, None)  # type: ignore[assignment]
        if not chain[0].extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise StateError(f"{given.origin}: the certificate is not a CA's: it needs the basic constraint CA:TRUE")
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        raise StateError(
            f"{given.origin} make no chain: each certificate must be signed by the next, and the last by the root"
        ) from None
    spki = form.Encoding.DER, form.PublicFormat.SubjectPublicKeyInfo
    if private.public_key().public_bytes(*spki) != chain[0].public_key().public_bytes(*spki):
        raise StateError(f"{given.origin}: the key is not the certificate's: give the two that were made together")
    return Signer(given.key, b"".join(each.public_bytes(form.Encoding.PEM) for each in chain))


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())


def _time(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
