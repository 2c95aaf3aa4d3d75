"""Who calls the control plane? A bearer token becomes an identity: a join token, the platform's, an issuer's, or a
proof made with the caller's present certificate (meshlib.identity.proof).

Nobody is told why a token is refused; the log is, without the token.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from meshlib.controlplane.join_tokens import PREFIX, JoinTokens, Refused
from meshlib.controlplane.token_shelf import JoinToken
from meshlib.identity.proof import PROOF_TYPE, Replays, verify_proof
from meshlib.model import SpiffeId

logger = logging.getLogger("meshlib.controlplane.authentication")

MAX_TOKEN = 16 * 1024
"""Bytes. Looked at before anything else; a Kubernetes token has about one thousand."""
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Signatures with a public key. Neither `none` nor HMAC, whose key would be what everybody knows."""
LEEWAY = 30
JWKS_FOR, JWKS_AGAIN = 300.0, 30.0
"""Seconds for which keys are good, and after which an unknown one is asked for again."""
FAILURES, FAILURES_WITHIN = 30, 60.0
"""So many refusals of one address in so many seconds, and it has to wait."""
SERVICE_ACCOUNT = "system:serviceaccount:"


class NotAuthenticated(Exception):
    """The message is for the log."""


class TooManyFailures(NotAuthenticated):
    """This address was refused so often that it is not heard for a while."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. method: `join token`, `kubernetes`, `oidc`, `certificate`. claims: of an issuer's token.

    identity: None for a person, whom an issuer knows under a name that is no service account's. subject: as the audit
    log names it.
    """

    identity: SpiffeId | None
    method: str
    subject: str
    claims: Mapping[str, Any] | None = None
    token: JoinToken | None = None


@dataclass(frozen=True, slots=True)
class Issuer:
    """An issuer of JWTs that is believed. jwks: a URL, or a path of a file.

    A token's `sub` of the form `system:serviceaccount:<namespace>:<account>` is a workload's, as Kubernetes writes it;
    every other is a person's, who may have a role but no certificate.
    """

    issuer: str
    audience: str
    jwks: str
    algorithms: tuple[str, ...] = ("RS256", "ES256")


@dataclass(frozen=True, slots=True)
class TokenReview:
    """Kubernetes' own word on its tokens. api: `https://kubernetes.default.svc`. token_file: our own, read anew."""

    api: str
    token_file: Path | None = None
    ca_file: Path | None = None
    audience: str = "istio-ca"


class Authenticator:
    """Belongs to one event loop. roots: PEM of those who are trusted now. http: for TokenReview and JWKS. replays: of
    proofs, shared by those to whom one could be shown twice."""

    def __init__(
        self,
        trust_domain: str,
        roots: Callable[[], bytes],
        tokens: JoinTokens,
        *,
        issuers: tuple[Issuer, ...] = (),
        kubernetes: TokenReview | None = None,
        http: httpx.AsyncClient | None = None,
        replays: Replays | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        for issuer in issuers:
            if bad := sorted(set(issuer.algorithms) - set(ALGORITHMS)):
                raise ValueError(f"issuer {issuer.issuer}: algorithm {bad[0]} is not allowed")
        self._trust_domain, self._roots, self.tokens = trust_domain, roots, tokens
        self._issuers = {each.issuer: each for each in issuers}
        self._kubernetes, self._http, self._clock = kubernetes, http, clock
        self._keys: dict[str, tuple[float, KeySet]] = {}
        self.replays = replays or Replays()
        self._failures: dict[str, deque[float]] = {}

    async def authenticate(self, token: str, address: str, *, may_join: bool = False) -> Caller:
        """may_join: whether a join token will do; it must be spent (`tokens.spend`) before anything is given for it.

        Raises NotAuthenticated; what was refused is logged here. Raises StateError where nobody can say now.
        """
        host = address.rpartition(":")[0]
        self._refuse_guessers(host)
        if not token:  # nobody guesses by it, and a process that has nothing to show yet should not be shut out
            logger.info("a caller from %s is refused: no token", address)
            raise NotAuthenticated("no token: a process shows one from MESHLIB_TOKEN_FILE, a person by meshctl --token")
        try:
            return await self._authenticate(token, may_join)
        except (NotAuthenticated, Refused, JoseError, ValueError, httpx.HTTPError, OSError) as error:
            self._failures.setdefault(host, deque(maxlen=FAILURES)).append(self._clock())
            reason = str(error) if isinstance(error, NotAuthenticated | Refused) else type(error).__name__
            logger.warning("a caller from %s is refused: %s", address, reason)
            raise NotAuthenticated(reason) from None

    def _refuse_guessers(self, host: str) -> None:
        failures = self._failures.get(host)
        if failures is not None and len(failures) == FAILURES and failures[0] > self._clock() - FAILURES_WITHIN:
            raise TooManyFailures(
                f"{host} was refused {FAILURES} times in {FAILURES_WITHIN:g} s: mend its token, and wait as long"
            )
        if len(self._failures) > 10_000:
            self._failures.clear()

    async def _authenticate(self, token: str, may_join: bool) -> Caller:
        if len(token) > MAX_TOKEN:
            raise NotAuthenticated(f"the token is larger than {MAX_TOKEN} bytes")
        if token.startswith(PREFIX):
            if not may_join:
                raise NotAuthenticated(
                    "a join token buys a certificate, and nothing else: set MESHLIB_IDENTITY to control-plane"
                )
            joined = await self.tokens.check(token)
            return Caller(SpiffeId.parse(joined.identity), "join token", f"join token {joined.id}", token=joined)
        header, claims = _unverified(token)
        if header.get("typ") == PROOF_TYPE:
            identity = verify_proof(token, self._roots(), self._trust_domain, self.replays, self._clock())
            return Caller(identity, "certificate", identity.uri)
        issuer = self._issuers.get(str(claims.get("iss", "")))
        if issuer is not None:
            return await self._of_issuer(issuer, token, str(header.get("kid", "")))
        if self._kubernetes is not None:
            return await self._review(self._kubernetes, token)
        raise NotAuthenticated(
            "nobody who is believed here has issued the token: --jwt-issuer and --token-review say whom"
        )

    async def _of_issuer(self, issuer: Issuer, token: str, kid: str) -> Caller:
        keys = await self._key_set(issuer, kid)
        claims = jwt.decode(token, keys, algorithms=list(issuer.algorithms)).claims
        jwt.JWTClaimsRegistry(
            now=lambda: int(self._clock()),
            leeway=LEEWAY,
            iss={"essential": True, "value": issuer.issuer},
            aud={"essential": True, "value": issuer.audience},
            exp={"essential": True},
            sub={"essential": True},
        ).validate(claims)
        return self._caller(str(claims["sub"]), "oidc", f"{issuer.issuer}#{claims['sub']}", claims)

    async def _key_set(self, issuer: Issuer, kid: str) -> KeySet:
        at, keys = self._keys.get(issuer.issuer, (0.0, None))
        age = self._clock() - at
        is_known = keys is not None and any(each.kid == kid for each in keys.keys)
        if keys is None or age > JWKS_FOR or (not is_known and age > JWKS_AGAIN):
            try:
                if "://" in issuer.jwks:
                    assert self._http is not None
                    response = await self._http.get(issuer.jwks, timeout=5.0, follow_redirects=False)
                    content = response.raise_for_status().content
                else:
                    content = await asyncio.to_thread(Path(issuer.jwks).read_bytes)
                keys = KeySet.import_key_set(json.loads(content))
            except (httpx.HTTPError, OSError, ValueError, KeyError, JoseError) as error:
                if keys is None:
                    raise NotAuthenticated(f"no keys of {issuer.issuer}: {type(error).__name__}") from None
                logger.warning("the keys of %s can't be renewed: %s", issuer.issuer, type(error).__name__)
            self._keys[issuer.issuer] = (self._clock(), keys)
        return keys

    async def _review(self, kubernetes: TokenReview, token: str) -> Caller:
        assert self._http is not None
        headers = {}
        if kubernetes.token_file is not None:
            own = await asyncio.to_thread(kubernetes.token_file.read_text)
            headers["authorization"] = f"Bearer {own.strip()}"
        response = await self._http.post(
            f"{kubernetes.api}/apis/authentication.k8s.io/v1/tokenreviews",
            headers=headers,
            timeout=5.0,
            json={
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenReview",
                "spec": {"token": token, "audiences": [kubernetes.audience]},
            },
        )
        status = response.raise_for_status().json().get("status") or {}
        if status.get("authenticated") is not True:
            raise NotAuthenticated("Kubernetes does not know the token: it may have expired, or be of another cluster")
        # An API server that knows no audiences would let a token for any of them pass.
        if kubernetes.audience not in (status.get("audiences") or ()):
            raise NotAuthenticated(f"the token is not meant for {kubernetes.audience}: project one with that audience")
        name = str((status.get("user") or {}).get("username", ""))
        caller = self._caller(name, "kubernetes", name, None)
        if caller.identity is None:
            raise NotAuthenticated("the token is no service account's: processes show that of their pod")
        return caller

    def _caller(self, name: str, method: str, subject: str, claims: Mapping[str, Any] | None) -> Caller:
        namespace, _, account = name.removeprefix(SERVICE_ACCOUNT).partition(":")
        if not name.startswith(SERVICE_ACCOUNT):
            return Caller(None, method, subject, claims)
        identity = SpiffeId.parse(SpiffeId.of(self._trust_domain, namespace, account).uri)
        if identity.namespace != namespace:
            raise NotAuthenticated("the token's service account has no good name")
        return Caller(identity, method, subject, claims)


def bearer(header: str) -> str:
    """The token of an `authorization` header, "" for another kind."""
    kind, _, token = header.partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def _unverified(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and claims of a JWT, to see who should judge it."""
    parts = token.split(".")
    if len(parts) != 3:
        raise NotAuthenticated("the token is no JWT")
    try:
        found = [json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))) for part in parts[:2]]
    except (ValueError, RecursionError):
        raise NotAuthenticated("the token is no JWT") from None
    if not all(isinstance(each, dict) for each in found):
        raise NotAuthenticated("the token is no JWT")
    return found[0], found[1]
