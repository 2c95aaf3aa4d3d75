"""Who is at the admin API? A token of the tokens' file, an OIDC provider's token, a proof of the mesh's own identity or
a client certificate says so; and for the page, a session that was begun with one of them."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from meshlib.controlplane.access_rules import EVERYTHING, TOKEN_PREFIX, AccessFile, AccessRules, Powers, token_hash
from meshlib.controlplane.authentication import Authenticator, Caller, NotAuthenticated, TokenReview
from meshlib.controlplane.join_tokens import JoinTokens
from meshlib.identity.pem import BadCredentials, identity_of
from meshlib.identity.proof import Replays
from meshlib.identity.tls import root_of

logger = logging.getLogger("meshlib.controlplane.access")

SESSION = 8 * 3600.0
"""Seconds for which one sign-in on the page is good, at most."""
MAX_SESSIONS = 1000


@dataclass(frozen=True, slots=True)
class Administrator:
    """name: as grants and the audit log call them. names: all that grants may call them, groups too. method: token,
    oidc, kubernetes, certificate or open. until: when what they have shown ends, seconds since 1970; 0 is never. token:
    the hash of a token of the file, which has to be there still: one that was replaced ends its sessions."""

    name: str
    method: str
    names: frozenset[str]
    until: float = 0.0
    token: str = ""


ANYBODY = Administrator("anybody on this machine", "open", frozenset())
"""Without access control."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a client's handshake has proven. leaf, root: DER; the chain between them was verified."""

    leaf: bytes
    root: bytes


@dataclass(slots=True)
class Session:
    """Of the page. csrf: what a request that changes something has to repeat in a header."""

    administrator: Administrator
    csrf: str = field(repr=False)
    ends: float


class Administrators:
    """Belongs to one event loop. access: None lets anybody be admin, which is for loopback only. roots: PEM of each of
    the mesh's roots, now. clock: seconds since 1970."""

    def __init__(
        self,
        access: AccessFile | None = None,
        *,
        trust_domain: str = "cluster.local",
        roots: Callable[[], tuple[bytes, ...]] = tuple,
        kubernetes: TokenReview | None = None,
        http: httpx.AsyncClient | None = None,
        replays: Replays | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.access, self._trust_domain, self._roots, self._clock = access, trust_domain, roots, clock
        self._kubernetes, self._http, self._replays = kubernetes, http, replays or Replays()
        self._judge: tuple[AccessRules, Authenticator] | None = None
        self._sessions: dict[str, Session] = {}

    @property
    def is_open(self) -> bool:
        return self.access is None

    def powers(self, who: Administrator) -> Powers:
        """What they may do, by the rules as they are now; nothing once what they have shown has ended."""
        if self.access is None:
            return EVERYTHING
        if who.until and self._clock() >= who.until:
            return Powers()
        rules = self.access.rules()
        if who.token and who.token not in rules.tokens:
            return Powers()
        return rules.powers(who.names)

    async def of_token(self, token: str, address: str) -> Administrator:
        """Raises NotAuthenticated."""
        assert self.access is not None
        rules = self.access.rules()
        if token.startswith(TOKEN_PREFIX):
            known = rules.tokens.get(token_hash(token))
            if known is None:
                logger.warning("an administrator from %s is refused: no such token", address)
                raise NotAuthenticated("no such token")
            if known.expires and self._clock() >= known.expires:
                logger.warning("an administrator from %s is refused: token %s has expired", address, known.name)
                raise NotAuthenticated("the token has expired: meshctl access token makes another")
            name = f"token:{known.name}"
            return Administrator(name, "token", frozenset({name}), known.expires, known.sha256)
        return self._of_caller(rules, await self._authenticator(rules).authenticate(token, address))

    def of_certificate(self, shown: Certificate) -> Administrator | None:
        """By its SPIFFE ID where one of the mesh's roots has signed it, by its common name where one of the file's has.
        None: it says nothing that is known here."""
        assert self.access is not None
        from cryptography import x509
        from cryptography.x509.oid import NameOID

        leaf = x509.load_der_x509_certificate(shown.leaf)
        until = leaf.not_valid_after_utc.timestamp()
        if shown.root in map(_der, self._roots()):
            try:
                identity = identity_of(leaf)
            except BadCredentials:
                return None
            if identity.trust_domain != self._trust_domain:
                return None
            return Administrator(identity.uri, "certificate", frozenset({identity.uri}), until)
        if shown.root in _all_der(self.access.rules().roots):
            names = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            if len(names) == 1 and isinstance(names[0].value, str) and names[0].value:
                name = f"cn:{names[0].value}"
                return Administrator(name, "certificate", frozenset({name}), until)
        return None

    def _authenticator(self, rules: AccessRules) -> Authenticator:
        """Of people: what a workload's issuer says counts here by the mesh's certificates only."""
        if self._judge is None or self._judge[0] is not rules:
            made = Authenticator(
                self._trust_domain,
                lambda: b"".join(self._roots()),
                JoinTokens(),
                issuers=tuple(each.issuer for each in rules.issuers),
                kubernetes=self._kubernetes,
                http=self._http,
                replays=self._replays,
            )
            self._judge = (rules, made)
        return self._judge[1]

    def _of_caller(self, rules: AccessRules, caller: Caller) -> Administrator:
        if caller.method != "oidc":
            assert caller.identity is not None
            until = self._clock() + 60.0 if caller.method == "certificate" else self._clock() + 600.0
            return Administrator(caller.identity.uri, caller.method, frozenset({caller.identity.uri}), until)
        claims: Any = caller.claims or {}
        issuer = next(each for each in rules.issuers if each.issuer.issuer == claims.get("iss"))
        subject = claims.get(issuer.subject)
        if not isinstance(subject, str) or not subject:
            raise NotAuthenticated(
                f"the token has no claim {issuer.subject}, which `subject` of the issuer in the access file names"
            )
        # An address that nobody has verified is anybody's to claim (OpenID Connect Core, 5.7).
        if issuer.subject == "email" and claims.get("email_verified") is not True:
            raise NotAuthenticated(
                "the token's email address is not verified: have it verified, or name another `subject`"
            )
        groups = claims.get(issuer.groups, ())
        named = [each for each in groups if isinstance(each, str)] if isinstance(groups, list) else []
        name = f"user:{issuer.name}/{subject}"
        names = frozenset({name, *(f"group:{issuer.name}/{each}" for each in named)})
        return Administrator(name, "oidc", names, float(claims["exp"]))

    # Sessions of the page

    def begin(self, who: Administrator) -> tuple[str, Session]:
        """(what the cookie holds, the session)."""
        now = self._clock()
        self._sessions = {key: each for key, each in self._sessions.items() if each.ends > now}
        while len(self._sessions) >= MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        text = secrets.token_urlsafe(32)
        session = Session(who, secrets.token_urlsafe(32), min(now + SESSION, who.until or now + SESSION))
        self._sessions[_hash(text)] = session
        return text, session

    def session(self, text: str) -> Session | None:
        """None once it is over, and once nothing is granted any more to who began it."""
        found = self._sessions.get(_hash(text))
        if found is None or found.ends <= self._clock() or not self.powers(found.administrator).grants:
            return None
        return found

    def now(self) -> float:
        return self._clock()

    def end(self, text: str) -> None:
        self._sessions.pop(_hash(text), None)

    def __repr__(self) -> str:
        return f"<Administrators {'open' if self.access is None else self.access!r}, {len(self._sessions)} sessions>"


def same(one: str, two: str) -> bool:
    """Compared in constant time."""
    return hmac.compare_digest(one.encode("utf-8", "surrogateescape"), two.encode("utf-8", "surrogateescape"))


def certificate_of(connection: Any) -> Certificate | None:
    """What the client at the other end of this TLS connection has shown; None for nothing."""
    leaf = connection.getpeercert(binary_form=True) if connection is not None else None
    return Certificate(leaf, root_of(connection)) if leaf else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _der(pem: bytes) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))


def _all_der(pem: bytes) -> frozenset[bytes]:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization as form

    if not pem:
        return frozenset()
    return frozenset(each.public_bytes(form.Encoding.DER) for each in x509.load_pem_x509_certificates(pem))
