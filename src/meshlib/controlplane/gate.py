"""Who comes through to the admin API? One guard in front of every route, and what it tells them of who is there.

- The Host header must name this control plane. A page whose DNS name was rebound to our address still sends its own.
- A request that changes something, sent by a web page, must come from our own: its Origin is the Host.
- With access control everybody shows a token, a client certificate, or the page's cookie; with the cookie a change has
  to repeat the session's `csrf` in a header, too.
- A route that does not check by itself, object by object, needs the greatest power there is: admin everywhere for what
  changes something, viewer everywhere for the rest. So a route that is new is closed, not open.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Callable, Collection, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.access_rules import EVERYTHING, EVERYWHERE, Powers, Role, role_for
from meshlib.controlplane.administrators import (
    ANYBODY,
    Administrator,
    Administrators,
    Certificate,
    Session,
    same,
)
from meshlib.controlplane.audit import Actor, AuditLog
from meshlib.controlplane.authentication import NotAuthenticated, TooManyFailures, bearer

logger = logging.getLogger("meshlib.controlplane.access")

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
COOKIE = "meshlib-session"
CSRF = "x-csrf-token"
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
PUBLIC = frozenset({"/", "/healthz", "/readyz", "/v1/login"})
"""With /dashboard/..., whose files are the same for everybody and hold nothing of the mesh."""
CHECKED = frozenset(
    {
        "/v1/apply",
        "/v1/delete",
        "/v1/tap",
        "/v1/logs/follow",
        "/v1/what-if",
        "/v1/tokens",
        "/v1/tokens/revoke",
        "/v1/logout",
    }
)
"""Routes that are sent something and ask for the powers that it takes by themselves."""
NARROWED = frozenset(
    {
        "/version", "/v1/whoami", "/v1/objects", "/v1/problems", "/v1/clients", "/v1/endpoints", "/v1/graph",
        "/v1/series", "/v1/requests", "/v1/traces", "/v1/changes", "/v1/stream", "/v1/audit",
        "/v1/tokens", "/v1/ca", "/v1/config", "/v1/secrets", "/v1/overhead", "/sd/prometheus", "/v1/load", "/v1/logs",
    }
)  # fmt: skip
"""Routes that read, and show of it what the reader's namespaces allow, as those below /v1/services/, /v1/traces/ and
/v1/changes/."""
PUSHED = frozenset({"/v1/metrics", "/v1/traces", "/v1/logs"})
"""What processes POST, with their own identities (meshlib.controlplane.otlp)."""


class JSON(Response):
    """A msgspec struct, encoded."""

    media_type = "application/json"

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        super().init_headers({"cache-control": "no-store", "x-content-type-options": "nosniff", **(headers or {})})

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class Admission:
    """Who was let in, and what they may do, for the routes. current: asked again by what lasts."""

    def __init__(
        self,
        who: Administrator,
        current: Callable[[], Powers],
        actor: Actor,
        audit: AuditLog | None,
        session: Session | None = None,
    ) -> None:
        self.who, self.current, self.actor, self.session = who, current, actor, session
        self._audit = audit
        self.powers = current()

    def demand(self, role: Role, namespace: str = EVERYWHERE, what: str = "") -> None:
        """Raises HTTPException (403), and writes down who wanted it."""
        if lack := self.powers.lack(role, namespace):
            self.deny(f"{what or 'this'} {lack}", namespace, what)

    def deny(self, reason: str, namespace: str = "", what: str = "") -> None:
        logger.warning("%s from %s is refused: %s", self.who.name, self.actor.address, reason)
        if self._audit is not None and what:
            namespace = "" if namespace == EVERYWHERE else namespace
            self._audit.write(self.actor, what, outcome="denied", namespace=namespace, note=reason)
        raise HTTPException(403, f"{self.who.name}: {reason}")

    def check(self, action: str) -> Callable[[Collection[Any]], None]:
        """For ObjectStore: whether all of these keys may be changed. All, or none of them is."""

        def check(keys: Collection[Any]) -> None:
            for key in keys:
                title = f"{key.kind} {key.namespace}/{key.name}"
                if lack := self.powers.lack(role_for(key.group, key.kind), key.namespace):
                    if self._audit is not None:
                        self._audit.write(
                            self.actor, action, outcome="denied", object=title, namespace=key.namespace, note=lack
                        )
                    raise HTTPException(403, f"{self.who.name}: {action} of {title} {lack}; nothing was changed")

        return check


def admission_of(request: Request) -> Admission:
    found: Admission = request.state.admission
    return found


class Gate:
    """ASGI middleware. hosts: the names by which we are called besides loopback's; is_loopback: whether only this
    machine reaches us: then no address but loopback's is one of ours, either."""

    def __init__(
        self,
        app: ASGIApp,
        administrators: Administrators,
        hosts: Collection[str] = (),
        is_loopback: bool = True,
        audit: AuditLog | None = None,
    ) -> None:
        self._app, self._administrators, self._audit = app, administrators, audit
        self._hosts = frozenset(name.lower() for name in hosts)
        self._is_loopback = is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["admission"] = await self._admit(Request(scope))
            except HTTPException as error:
                headers = dict(error.headers or {})
                await JSON(api.Failure(error.detail), error.status_code, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _admit(self, request: Request) -> Admission:
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            raise HTTPException(
                421,
                f"Host {', '.join(hosts)!r} is not served here: use localhost or 127.0.0.1, or the names of --san "
                "(this protects the control plane from web pages)",
            )
        is_change = request.method not in SAFE
        if is_change:
            _check_origin(request, hosts[0])
        client = request.client
        address = f"{client.host}:{client.port}" if client else ""
        agent = request.headers.get("user-agent", "")[:200]
        if self._administrators.is_open:
            actor = Actor(ANYBODY.name, ANYBODY.method, address, agent)
            return Admission(ANYBODY, lambda: EVERYTHING, actor, self._audit)
        path: str = request.scope["path"]  # what routes go by; a URL made of the Host header may say another
        if path in PUBLIC or path == "/dashboard" or path.startswith("/dashboard/"):
            nobody = Administrator("nobody", "none", frozenset())
            return Admission(nobody, Powers, Actor("nobody", "none", address, agent), self._audit)
        if is_change and path in PUSHED:  # no administrator's business: the receiver asks who pushes
            nobody = Administrator("a workload", "none", frozenset())
            return Admission(nobody, Powers, Actor("a workload", "none", address, agent), self._audit)
        who, session = await self._who(request, address, is_change)

        def current() -> Powers:
            if session is not None and self._administrators.session(_cookie(request)) is None:
                return Powers()
            return self._administrators.powers(who)

        found = Admission(who, current, Actor(who.name, who.method, address, agent), self._audit, session)
        if is_change and path not in CHECKED:
            found.demand(Role.ADMIN, EVERYWHERE, f"{request.method} {path}")
        elif not is_change and not _is_narrowed(path):
            found.demand(Role.VIEWER)
        elif not found.powers.grants and path != "/v1/whoami":
            found.deny("has no role here: a grant in the access file gives one")
        return found

    async def _who(self, request: Request, address: str, is_change: bool) -> tuple[Administrator, Session | None]:
        headers = request.headers.getlist("authorization")
        if len(headers) > 1:
            raise _unknown("several authorization headers")
        if headers:
            try:
                return await self._administrators.of_token(bearer(headers[0]), address), None
            except TooManyFailures:
                raise HTTPException(429, "refused too often; wait a minute", {"retry-after": "60"}) from None
            except NotAuthenticated:
                raise _unknown("the token is not good here, or not any more") from None
        certificate: Certificate | None = getattr(request.state, "certificate", None)
        if certificate is not None and (known := self._administrators.of_certificate(certificate)) is not None:
            # A browser sends it by itself, as it does a cookie: pages of others are held off by Origin and Host.
            return known, None
        text = _cookie(request)
        session = self._administrators.session(text) if text else None
        if session is None:
            raise _unknown("show a token (meshctl --token, MESHLIB_TOKEN), or sign in")
        if is_change and not same(request.headers.get(CSRF, ""), session.csrf):
            raise HTTPException(403, f"a change by the page has to repeat its session's {CSRF}")
        return session.administrator, session

    def _is_ours(self, authority: str) -> bool:
        if not _AUTHORITY.fullmatch(authority):
            return False
        host = host_of(authority)
        if host in self._hosts or host == "localhost":
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return address.is_loopback or not self._is_loopback  # nobody can rebind an address


def host_of(authority: str) -> str:
    """`LOCALHOST:15014` -> `localhost`, `[::1]:15014` -> `::1`; what is neither comes back as it was."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0].lower()
    return authority.partition(":")[0].lower()


def _check_origin(request: Request, host: str) -> None:
    """Browsers send Origin with whatever is not GET or HEAD; programs do not."""
    origin = request.headers.get("origin")
    if origin is not None and origin.lower() != f"{request.scope['scheme']}://{host}".lower():
        raise HTTPException(403, f"a page of {origin[:200]!r} may change nothing here")
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise HTTPException(403, "a page of another site may change nothing here")


def _is_narrowed(path: str) -> bool:
    return path in NARROWED or path.startswith(("/v1/services/", "/v1/traces/", "/v1/changes/"))


def _cookie(request: Request) -> str:
    try:
        found = SimpleCookie(request.headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None else ""


def _unknown(reason: str) -> HTTPException:
    return HTTPException(401, reason, {"www-authenticate": 'Bearer realm="meshlib"'})


# What a page asks: who am I, what may I; let me in, let me out


READ_ONLY = "objects are the cluster's here, the same for all replicas: use kubectl"
_ABILITIES = {
    "view": Role.VIEWER,
    "steer": Role.OPERATOR,
    "apply": Role.ADMIN,
    "tokens": Role.ADMIN,
    "audit": Role.ADMIN,
    "rotate": Role.ADMIN,
}


def whoami(admission: Admission, is_open: bool, is_read_only: bool = False) -> api.WhoAmI:
    powers = admission.powers
    may = {}
    for name, role in _ABILITIES.items():
        where = powers.namespaces(role)
        if name == "rotate" and EVERYWHERE not in where:
            where = ()
        held = f"; {admission.who.name} has it in {', '.join(where)}" if where else f"; {admission.who.name} has not"
        reason = "" if EVERYWHERE in where else f"needs the role {role}{held}"
        may[name] = api.Ability(where, reason)
        if is_read_only and name in ("steer", "apply"):
            may[name] = api.Ability((), READ_ONLY)
    return api.WhoAmI(
        admission.who.name,
        admission.who.method,
        "open" if is_open else "controlled",
        admission.session.ends if admission.session is not None else admission.who.until,
        tuple(api.Held(str(role), tuple(sorted(namespaces))) for role, namespaces in powers.grants),
        may,
        admission.session.csrf if admission.session is not None else "",
    )


class _Login(msgspec.Struct, forbid_unknown_fields=True):
    token: str


class SignIn:
    """The routes that begin and end a session of the page."""

    def __init__(
        self, administrators: Administrators, audit: AuditLog | None = None, *, is_read_only: bool = False
    ) -> None:
        self._administrators, self._audit, self._is_read_only = administrators, audit, is_read_only

    def routes(self) -> list[Route]:
        return [
            Route("/v1/whoami", self._whoami),
            Route("/v1/login", self._login, methods=["POST"]),
            Route("/v1/logout", self._logout, methods=["POST"]),
        ]

    async def _whoami(self, request: Request) -> Response:
        return JSON(whoami(admission_of(request), self._administrators.is_open, self._is_read_only))

    async def _login(self, request: Request) -> Response:
        """The token is in the body, in JSON: not in a URL, which is logged, nor in what a form can send."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "content-type must be application/json")
        admission = admission_of(request)
        if self._administrators.is_open:
            return JSON(whoami(admission, True, self._is_read_only))
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > 64 * 1024:
                raise HTTPException(413, "no token is that long", {"connection": "close"})
        try:
            token = msgspec.json.decode(bytes(body), type=_Login).token.strip()
        except msgspec.DecodeError:
            raise HTTPException(400, 'the body must be {"token": "..."}') from None
        try:
            who = await self._administrators.of_token(token, admission.actor.address)
        except TooManyFailures:
            raise HTTPException(429, "refused too often; wait a minute", {"retry-after": "60"}) from None
        except NotAuthenticated:
            raise _unknown("the token is not good here, or not any more") from None
        if not self._administrators.powers(who).grants:
            raise HTTPException(403, f"{who.name} has no role here: a grant in the access file gives one")
        text, session = self._administrators.begin(who)
        actor = admission.actor._replace(who=who.name, method=who.method)
        if self._audit is not None:
            self._audit.write(actor, "sign in")
        found = Admission(who, lambda: self._administrators.powers(who), actor, self._audit, session)
        answer = JSON(whoami(found, False, self._is_read_only))
        answer.set_cookie(
            COOKIE,
            text,
            max_age=max(1, int(session.ends - self._administrators.now())),
            path="/",
            secure=request.scope["scheme"] == "https",
            httponly=True,
            samesite="strict",
        )
        return answer

    async def _logout(self, request: Request) -> Response:
        self._administrators.end(_cookie(request))
        answer = Response(status_code=204)
        answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        return answer
