"""How do people make join tokens? Routes of the admin API, for admins of the identity's namespace.

Whoever may make a token for an identity may be that identity.
"""

from __future__ import annotations

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from meshlib.controlplane.access_rules import Role
from meshlib.controlplane.admin import check_yaml
from meshlib.controlplane.admin_api import Token, Tokens
from meshlib.controlplane.audit import AuditLog
from meshlib.controlplane.ca import CertificateAuthority
from meshlib.controlplane.gate import JSON, Admission, admission_of
from meshlib.controlplane.join_tokens import JoinTokens
from meshlib.controlplane.token_shelf import JoinToken
from meshlib.model import SpiffeId


class TokenRoutes:
    """may_make: whether who is there is asked, or is on this machine: anybody else's tokens would be everybody's."""

    def __init__(
        self, tokens: JoinTokens, authority: CertificateAuthority, may_make: bool, audit: AuditLog | None = None
    ) -> None:
        self._tokens, self._authority, self._may_make, self._audit = tokens, authority, may_make, audit

    def routes(self) -> list[Route]:
        return [
            Route("/v1/tokens", self._list),
            Route("/v1/tokens", self._create, methods=["POST"]),
            Route("/v1/tokens/revoke", self._revoke, methods=["POST"]),
        ]

    async def _list(self, request: Request) -> Response:
        powers = self._checked(request).powers
        found = [each for each in await self._tokens.all() if powers.has(Role.ADMIN, _namespace(each))]
        return JSON(Tokens(tuple(_shown(each, self._tokens.now()) for each in found)))

    async def _create(self, request: Request) -> Response:
        admission = self._checked(request)
        asked = request.query_params
        try:
            admission.demand(Role.ADMIN, asked["namespace"], "token create")
            identity = SpiffeId.parse(
                SpiffeId.of(self._authority.trust_domain, asked["namespace"], asked["service_account"]).uri
            )
            if (identity.namespace, identity.service_account) != (asked["namespace"], asked["service_account"]):
                raise ValueError("namespace and service account must be plain names")
            text, token = await self._tokens.create(identity, float(asked["ttl"]), self._authority.signing)
        except KeyError as error:
            raise HTTPException(400, f"{error.args[0]} is missing") from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        self._write(admission, "token create", token)
        return JSON(msgspec.structs.replace(_shown(token, self._tokens.now()), text=text))

    async def _revoke(self, request: Request) -> Response:
        admission = self._checked(request)
        id = request.query_params.get("id", "")
        known = next((each for each in await self._tokens.all() if each.id == id), None)
        if known is None or not admission.powers.sees(_namespace(known)):
            raise HTTPException(404, "there is no such token: meshctl token list shows them")
        admission.demand(Role.ADMIN, _namespace(known), "token revoke")
        self._write(admission, "token revoke", known)
        await self._tokens.revoke(id)
        return JSON(_shown(known, self._tokens.now()))

    def _write(self, admission: Admission, action: str, token: JoinToken) -> None:
        if self._audit is not None:
            told = f"JoinToken {token.id}"
            self._audit.write(admission.actor, action, object=told, namespace=_namespace(token), note=token.identity)

    def _checked(self, request: Request) -> Admission:
        if not self._may_make:
            raise HTTPException(
                403,
                "tokens are made where the admin API is bound to loopback (--admin 127.0.0.1:PORT), or has --access",
            )
        if request.method == "POST":
            check_yaml(request)
        return admission_of(request)


def _namespace(token: JoinToken) -> str:
    return SpiffeId.parse(token.identity).namespace


def _shown(token: JoinToken, now: float) -> Token:
    state = "used" if token.used else "expired" if now >= token.expires else "unused"
    return Token(token.id, token.identity, token.created, token.expires, state)
