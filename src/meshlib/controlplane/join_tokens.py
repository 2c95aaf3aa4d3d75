"""Who may join without a platform that vouches for it? Whoever shows a token made for one identity, once, in time.

Written `mjt_<id>.<secret>.<SHA-256 of the root>`: the last part tells a process whom to trust before it trusts anybody.
Only a hash of the secret is kept, which is random, so a plain hash is enough.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from meshlib.controlplane.private_files import private_folder, read_private, write_private
from meshlib.controlplane.sources import StateError
from meshlib.model import SpiffeId

PREFIX = "mjt_"
MAX_TTL = 7 * 86400.0
KEEP = 7 * 86400.0
"""Seconds for which a token that was used, or is too old, is still shown."""


ANOTHER = "make another with meshctl token create"


class Refused(Exception):
    """The token is not good. The message holds no part of the secret."""


class JoinToken(msgspec.Struct):
    """What is known of a token. used: when, seconds since 1970; 0 is never."""

    id: str
    hash: str
    identity: str
    created: float
    expires: float
    used: float = 0.0

    def __repr__(self) -> str:
        return f"<JoinToken {self.id} for {self.identity}>"


class JoinTokens:
    """All of them. Belongs to one event loop. folder: where they are kept; None keeps them in memory."""

    def __init__(self, folder: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._file = folder / "tokens.json" if folder is not None else None
        self._tokens: dict[str, JoinToken] = {}
        if self._file is not None:
            private_folder(self._file.parent)
            try:
                kept = msgspec.json.decode(read_private(self._file) or b"[]", type=list[JoinToken])
            except msgspec.DecodeError as error:
                raise StateError(f"{self._file}: {error}") from None
            self._tokens = {each.id: each for each in kept}

    def create(self, identity: SpiffeId, ttl: float, root: str) -> tuple[str, JoinToken]:
        """The token, which nobody can be told again. ttl: seconds. root: SHA-256 of the root, in hexadecimal.

        Raises ValueError for a time that is no time.
        """
        if not 0 < ttl <= MAX_TTL:
            raise ValueError(f"a token is good for up to {MAX_TTL / 86400:g} days")
        now = self._clock()
        self._tokens = {key: each for key, each in self._tokens.items() if now < max(each.expires, each.used) + KEEP}
        secret = secrets.token_urlsafe(32)
        token = JoinToken(secrets.token_hex(8), _hash(secret), identity.uri, now, now + ttl)
        self._tokens[token.id] = token
        self._save()
        return f"{PREFIX}{token.id}.{secret}.{root}", token

    def check(self, text: str) -> JoinToken:
        """Raises Refused."""
        id, _, rest = text.removeprefix(PREFIX).partition(".")
        token = self._tokens.get(id)
        secret = rest.partition(".")[0]
        if token is None or not hmac.compare_digest(token.hash, _hash(secret)):
            raise Refused(f"no such join token; {ANOTHER}")
        if token.used:
            raise Refused(f"join token {token.id} was used already; {ANOTHER}")
        if self._clock() >= token.expires:
            raise Refused(f"join token {token.id} has expired; {ANOTHER}")
        return token

    def spend(self, token: JoinToken) -> None:
        """Before anything is given for it. Raises Refused when another was quicker, StateError where it can't be kept;
        then it is not spent."""
        if token.used or token.id not in self._tokens:
            raise Refused(f"join token {token.id} was used already; {ANOTHER}")
        token.used = self._clock()
        try:
            self._save()
        except StateError:
            token.used = 0.0
            raise

    def revoke(self, id: str) -> JoinToken | None:
        """None when there is none."""
        token = self._tokens.pop(id, None)
        if token is not None:
            self._save()
        return token

    def now(self) -> float:
        return self._clock()

    def all(self) -> tuple[JoinToken, ...]:
        return tuple(sorted(self._tokens.values(), key=lambda each: each.created))

    def _save(self) -> None:
        if self._file is not None:
            write_private(self._file, msgspec.json.encode(list(self._tokens.values())))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
