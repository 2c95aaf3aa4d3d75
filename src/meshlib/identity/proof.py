"""How does one prove a certificate without a TLS handshake? A JWT of a minute, signed by the certificate's key.

grpcio's servers either demand a client certificate or never see one, and callers with tokens have none. So who has a
certificate says so in the `authorization` header: the chain is the JWT's `x5c` (RFC 7515, 4.1.6), the audience is the
control plane, each is good once.
"""

from __future__ import annotations

import base64
import datetime
import json
import secrets
from typing import Any

from meshlib.identity.credentials import Credentials
from meshlib.identity.pem import BadCredentials, identity_of
from meshlib.model import SpiffeId

PROOF_TYPE = "meshlib-svid+jwt"
AUDIENCE = "meshlib-control-plane"
LIFETIME, LEEWAY = 60, 60
"""Seconds."""
MAX_CHAIN = 5


class Replays:
    """The proofs seen while they were good."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}

    def is_new(self, id: str, until: float, now: float) -> bool:
        if len(self._seen) > 10_000:
            self._seen = {key: each for key, each in self._seen.items() if each > now}
        if self._seen.get(id, 0.0) > now:
            return False
        self._seen[id] = until
        return True


def prove(credentials: Credentials, now: float) -> str:
    """A token for the `authorization` header of one call. now: seconds since 1970."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization as form
    from joserfc import jwt

    chain = x509.load_pem_x509_certificates(credentials.certificate_chain)
    key, algorithm = _key(credentials.private_key, chain[0].public_key())
    header = {
        "alg": algorithm,
        "typ": PROOF_TYPE,
        "x5c": [base64.b64encode(each.public_bytes(form.Encoding.DER)).decode() for each in chain[:MAX_CHAIN]],
    }
    claims = {"aud": AUDIENCE, "iat": int(now), "exp": int(now) + LIFETIME, "jti": secrets.token_urlsafe(16)}
    return jwt.encode(header, claims, key, registry=_registry(algorithm))


def verify_proof(token: str, roots: bytes, trust_domain: str, replays: Replays, now: float) -> SpiffeId:
    """Who proved what it is. Raises BadCredentials, joserfc's JoseError or ValueError."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
    from joserfc import jwt

    head = token.partition(".")[0]
    sent = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4))).get("x5c")
    if not isinstance(sent, list) or not 0 < len(sent) <= MAX_CHAIN:
        raise BadCredentials("the proof has no certificate chain")
    leaf, *rest = (x509.load_der_x509_certificate(base64.b64decode(each, validate=True)) for each in sent)
    policy = PolicyBuilder().store(Store(x509.load_pem_x509_certificates(roots)))
    verifier = policy.time(datetime.datetime.fromtimestamp(now, datetime.UTC)).build_client_verifier()
    try:
        verifier.verify(leaf, rest)
    except VerificationError:
        raise BadCredentials("the proof's certificate is not, or no longer, one of ours") from None
    public = leaf.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    key, algorithm = _key(public, leaf.public_key())
    claims = jwt.decode(token, key, registry=_registry(algorithm)).claims
    aud: Any = claims.get("aud")
    issued, ends, id = claims.get("iat"), claims.get("exp"), claims.get("jti")
    if aud != AUDIENCE or not isinstance(issued, int) or not isinstance(ends, int) or not isinstance(id, str):
        raise BadCredentials("the proof is not meant for a control plane")
    if not (issued - LEEWAY <= now < ends + LEEWAY and ends - issued <= LIFETIME):
        raise BadCredentials("the proof is too old, or not good yet")
    identity = identity_of(leaf)
    if identity.trust_domain != trust_domain:
        raise BadCredentials(f"the proof is of trust domain {identity.trust_domain}")
    if not replays.is_new(f"{leaf.serial_number}/{id[:64]}", ends + LEEWAY, now):
        raise BadCredentials("the proof was used already")
    return identity


def _registry(algorithm: str) -> Any:
    """joserfc takes headers of 512 bytes; a chain is longer, and whoever reads it has bounded the whole."""
    from joserfc import jws

    class Registry(jws.JWSRegistry):
        max_header_length = 12 * 1024

    return Registry(algorithms=[algorithm])


def _key(pem: bytes, public: object) -> tuple[Any, str]:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from joserfc.jwk import ECKey, OKPKey, RSAKey

    match public:
        case ec.EllipticCurvePublicKey():
            return ECKey.import_key(pem), {256: "ES256", 384: "ES384", 521: "ES512"}[public.curve.key_size]
        case rsa.RSAPublicKey():
            return RSAKey.import_key(pem), "RS256"
        case _:
            return OKPKey.import_key(pem), "EdDSA"
