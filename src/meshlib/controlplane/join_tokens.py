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
from typing import TypeVar

import msgspec

from meshlib.controlplane.private_files import StateError
from meshlib.controlplane.token_shelf import FileShelf, JoinToken, Shelf, Tokens
from meshlib.model import SpiffeId

PREFIX = "mjt_"
MAX_TTL = 7 * 86400.0
KEEP = 7 * 86400.0
"""Seconds for which a token that was used, or is too old, is still shown."""


ANOTHER = "make another with meshctl token create"


class Refused(Exception):
    """The token is not good. The message holds no part of the secret."""


ATTEMPTS = 20
"""Times that a change is made again, after another replica was faster."""
T = TypeVar("T")


class JoinTokens:
    """All of them. Belongs to one event loop. shelf: where they are kept; None keeps them in memory.

    All methods raise StateError where they can't be read, or kept.
    """

    def __init__(self, shelf: Shelf | None = None, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._shelf = clock, shelf or FileShelf()

    async def create(self, identity: SpiffeId, ttl: float, root: str) -> tuple[str, JoinToken]:
        """The token, which nobody can be told again. ttl: seconds. root: SHA-256 of the root, in hexadecimal.

        Raises ValueError for a time that is no time.
        """
        if not 0 < ttl <= MAX_TTL:
            raise ValueError(f"a token is good for up to {MAX_TTL / 86400:g} days")
        now, secret = self._clock(), secrets.token_urlsafe(32)
        token = JoinToken(secrets.token_hex(8), _hash(secret), identity.uri, now, now + ttl)

        def add(tokens: Tokens) -> tuple[Tokens, None]:
            kept = {key: each for key, each in tokens.items() if now < max(each.expires, each.used) + KEEP}
            return {**kept, token.id: token}, None

        await self._change(add)
        return f"{PREFIX}{token.id}.{secret}.{root}", token

    async def check(self, text: str) -> JoinToken:
        """Raises Refused."""
        id, _, rest = text.removeprefix(PREFIX).partition(".")
        tokens, _ = await self._shelf.read()
        token = tokens.get(id)
        secret = rest.partition(".")[0]
        if token is None or not hmac.compare_digest(token.hash, _hash(secret)):
            raise Refused("no such join token")
        if token.used:
            raise Refused(f"join token {token.id} was used already")
        if self._clock() >= token.expires:
            raise Refused(f"join token {token.id} has expired")
        return token

    async def spend(self, token: JoinToken) -> None:
        """Before anything is given for it. Raises Refused when another was quicker, at this replica or at another;
        where it can't be kept it is not spent."""

        def use(tokens: Tokens) -> tuple[Tokens, None]:
            found = tokens.get(token.id)
            if found is None or found.used:
                raise Refused(f"join token {token.id} was used already")
            return {**tokens, token.id: msgspec.structs.replace(found, used=self._clock())}, None

        await self._change(use)

    async def revoke(self, id: str) -> JoinToken | None:
        """None when there is none."""

        def remove(tokens: Tokens) -> tuple[Tokens, JoinToken | None]:
            return {key: each for key, each in tokens.items() if key != id}, tokens.get(id)

        return await self._change(remove)

    def now(self) -> float:
        return self._clock()

    async def all(self) -> tuple[JoinToken, ...]:
        tokens, _ = await self._shelf.read()
        return tuple(sorted(tokens.values(), key=lambda each: each.created))

    async def _change(self, edit: Callable[[Tokens], tuple[Tokens, T]]) -> T:
        """edit: what they are then, and what comes of it; asked again where another has changed them meanwhile."""
        for _ in range(ATTEMPTS):
            tokens, version = await self._shelf.read()
            changed, result = edit(tokens)
            if changed == tokens or await self._shelf.write(changed, version):
                return result
        raise StateError(f"the join tokens are changed by others all the time: tried {ATTEMPTS} times")


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
