"""How do people make join tokens? Routes of the admin API; only where that is bound to loopback.

Whoever may make a token may be anybody in the mesh, and the admin API does not ask who is there: on another address
these routes refuse.
"""

from __future__ import annotations

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from meshlib.controlplane.admin import JSON, check_yaml
from meshlib.controlplane.ca import CertificateAuthority
from meshlib.controlplane.join_tokens import JoinToken, JoinTokens
from meshlib.model import SpiffeId


class Token(msgspec.Struct, frozen=True):
    """state: unused, used, expired. text: only in the answer that made it; nobody is told it again."""

    id: str
    identity: str
    created: float
    expires: float
    state: str
    text: str = ""


class Tokens(msgspec.Struct, frozen=True):
    tokens: tuple[Token, ...] = ()


class TokenRoutes:
    """is_loopback: whether the admin API is bound to this machine alone. clock: seconds since 1970."""

    def __init__(self, tokens: JoinTokens, authority: CertificateAuthority, is_loopback: bool) -> None:
        self._tokens, self._authority, self._is_loopback = tokens, authority, is_loopback

    def routes(self) -> list[Route]:
        return [
            Route("/v1/tokens", self._list),
            Route("/v1/tokens", self._create, methods=["POST"]),
            Route("/v1/tokens/revoke", self._revoke, methods=["POST"]),
        ]

    async def _list(self, request: Request) -> Response:
        self._check(request)
        return JSON(Tokens(tuple(_shown(each, self._tokens.now()) for each in self._tokens.all())))

    async def _create(self, request: Request) -> Response:
        self._check(request)
        asked = request.query_params
        try:
            identity = SpiffeId.parse(
                SpiffeId.of(self._authority.trust_domain, asked["namespace"], asked["service_account"]).uri
            )
            if (identity.namespace, identity.service_account) != (asked["namespace"], asked["service_account"]):
                raise ValueError("namespace and service account must be plain names")
            text, token = self._tokens.create(identity, float(asked["ttl"]), self._authority.signing)
        except KeyError as error:
            raise HTTPException(400, f"{error.args[0]} is missing") from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return JSON(msgspec.structs.replace(_shown(token, self._tokens.now()), text=text))

    async def _revoke(self, request: Request) -> Response:
        self._check(request)
        found = self._tokens.revoke(request.query_params.get("id", ""))
        if found is None:
            raise HTTPException(404, "there is no such token")
        return JSON(_shown(found, self._tokens.now()))

    def _check(self, request: Request) -> None:
        if not self._is_loopback:
            raise HTTPException(
                403, "tokens are made where the admin API is bound to loopback (--admin 127.0.0.1:PORT)"
            )
        if request.method == "POST":
            check_yaml(request)


def _shown(token: JoinToken, now: float) -> Token:
    state = "used" if token.used else "expired" if now >= token.expires else "unused"
    return Token(token.id, token.identity, token.created, token.expires, state)
