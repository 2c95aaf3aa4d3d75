"""May this call come in? Guard: a workload's rules compiled once, asked by every request, ASGI, WSGI, gRPC and gateway
alike.

The order is fixed: TLS identity, JWT, CUSTOM, DENY, ALLOW, quota. An exception inside denies.

A path is judged twice where its spelling lets one read it differently: as Istio normalises it, and as an application
may see it (every escape decoded, slashes merged). Both must be allowed. That is stricter than Istio, whose proxy can't
know what the application does with `%2F`; here it is the same process, and servers do decode it.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from meshlib.model import (
    Access,
    AccessRule,
    Action,
    AddressIs,
    And,
    Authorizer,
    Condition,
    HeaderMatch,
    Inbound,
    JwtProvider,
    Not,
    Or,
    PathIs,
    PathTemplate,
    Peer,
    PortIs,
    PrincipalIs,
    Request,
    ServerNameIs,
    Snapshot,
    StringMatch,
    TlsMode,
)
from meshlib.model.expressions import compile_string
from meshlib.policy import jwt, paths
from meshlib.policy.admission import ALLOW, Admission, Allow, Authorize, Deny, FetchKeys, RawPairs, ReadBody, Verdict
from meshlib.policy.matching import compile_claim, compile_header
from meshlib.policy.rate_limit import Limited, Limiter, Taken

_log = logging.getLogger("meshlib.guard")

DENIED = b"RBAC: access denied"
"""Envoy's words."""
_GRPC_UNAUTHENTICATED = 16
_TEXT = (b"content-type", b"text/plain")


class AuthorityUntold(Exception):
    """The server does not tell whom the call was made for (grpc.aio), or the caller has not said it."""


class ServerNameUntold(Exception):
    """The server does not tell which name the caller's handshake asked for (gRPC), or it asked for none."""


class Call:
    """One call, while it is judged."""

    __slots__ = ("_authority", "_remote", "_trusted_hops", "claims", "headers", "local_port", "method", "path", "peer")

    def __init__(self, request: Request, peer: Peer, path: str, trusted_hops: int, claims: Mapping[str, Any] | None):
        self.method, self._authority, self.headers = request.method, request.authority, request.headers
        self.peer, self.path, self.local_port = peer, path, peer.local_port
        self.claims = claims
        self._trusted_hops = trusted_hops
        self._remote: str | None = None

    @property
    def authority(self) -> str:
        """Raises AuthorityUntold: a rule that would turn away by it must not let pass what has none."""
        if not self._authority:
            raise AuthorityUntold
        return self._authority

    @property
    def server_name(self) -> str:
        """ "" in plaintext. Raises ServerNameUntold: the same."""
        if self.peer.is_tls and not self.peer.sni:
            raise ServerNameUntold
        return self.peer.sni

    def address(self, of: str) -> str:
        if of != "remote":
            return self.peer.address if of == "peer" else self.peer.local_address
        if self._remote is None:
            told = self.headers.get("x-forwarded-for")
            self._remote = self.peer.remote or remote_address(self.peer.address, told, self._trusted_hops)
        return self._remote


def remote_address(peer: str, forwarded_for: str | None, trusted_hops: int) -> str:
    """Whom x-forwarded-for names behind so many proxies of ours: its last entry for 0, as a sidecar believes it. The
    peer, where the entry is not there or is no address (Envoy, getLastAddressFromXFF)."""
    listed = forwarded_for.split(",") if forwarded_for else []
    if trusted_hops >= len(listed):
        return peer
    named = listed[-1 - trusted_hops].strip()
    try:
        ipaddress.ip_address(named)
    except ValueError:
        return peer
    return named


Holds = Callable[[Call], bool]


class _Rule:
    __slots__ = ("holds", "rule")

    def __init__(self, rule: AccessRule) -> None:
        self.rule = rule
        self.holds = _both(_compile(rule.permission), _compile(rule.principal))


def _always(_: Call) -> bool:
    return True


def _never(_: Call) -> bool:
    return False


def _both(one: Holds, two: Holds) -> Holds:
    if one is _always:
        return two
    if two is _always:
        return one
    return lambda call: one(call) and two(call)


def _compile(condition: Condition) -> Holds:
    if isinstance(condition, And):
        return _all([_compile(part) for part in condition.parts])
    if isinstance(condition, Or):
        return _any([_compile(part) for part in condition.parts])
    if isinstance(condition, Not):
        part = _compile(condition.part)
        return lambda call: not part(call)
    if isinstance(condition, HeaderMatch):
        return _compile_header(condition)
    if isinstance(condition, PathIs):
        fits = compile_string(condition.match)
        return lambda call: fits(call.path)
    if isinstance(condition, PathTemplate):
        full = paths.compile_template(condition.template).fullmatch
        return lambda call: full(call.path) is not None
    if isinstance(condition, PortIs):
        first, last = condition.port, condition.last or condition.port
        return lambda call: first <= call.local_port <= last
    if isinstance(condition, AddressIs):
        network, of = ipaddress.ip_network(condition.cidr, strict=False), condition.of
        return lambda call: _is_in(call.address(of), network)
    if isinstance(condition, PrincipalIs):
        return _compile_principal(condition.match)
    if isinstance(condition, ServerNameIs):
        fits_name = compile_string(condition.match)
        return lambda call: fits_name(call.server_name)
    has_claim = compile_claim(condition.path, condition.match)
    return lambda call: has_claim(call.claims)


def _all(parts: list[Holds]) -> Holds:
    parts = [part for part in parts if part is not _always]
    if not parts:
        return _always
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return _both(*parts)

    def holds(call: Call) -> bool:
        for part in parts:  # noqa: SIM110 -- a generator costs more than all of it
            if not part(call):
                return False
        return True

    return holds


def _any(parts: list[Holds]) -> Holds:
    if any(part is _always for part in parts):
        return _always
    if not parts:
        return _never
    if len(parts) == 1:
        return parts[0]

    def holds(call: Call) -> bool:
        for part in parts:  # noqa: SIM110
            if part(call):
                return True
        return False

    return holds


def _compile_header(condition: HeaderMatch) -> Holds:
    read = {":method": "method", ":authority": "authority", ":path": "path"}.get(condition.name)
    if read is None:
        fits_headers = compile_header(condition)
        return lambda call: fits_headers(call.headers)
    fits = compile_string(condition.match)
    invert = condition.invert
    return lambda call: fits(getattr(call, read)) is not invert


def _compile_principal(match: StringMatch | None) -> Holds:
    if match is None:
        return lambda call: call.peer.identity is not None
    fits = compile_string(match)

    def holds(call: Call) -> bool:
        identity = call.peer.identity
        return identity is not None and fits(identity.uri)

    return holds


def _is_in(address: str, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found in network


class _Port:
    """The rules of one port, or of all that have none of their own."""

    def __init__(self, access: Access, inbound: Inbound | None, limiter: Limiter | None = None) -> None:
        self.access, self.inbound, self.limiter = access, inbound, limiter
        by_action: dict[Action, list[_Rule]] = {action: [] for action in Action}
        for rule in access.rules:
            by_action[rule.action].append(_Rule(rule))
        self.custom = by_action[Action.CUSTOM]
        self.deny = [each for each in by_action[Action.DENY] if not each.rule.dry_run]
        self.allow = [each for each in by_action[Action.ALLOW] if not each.rule.dry_run]
        self.dry_deny = [each for each in by_action[Action.DENY] if each.rule.dry_run]
        self.dry_allow = [each for each in by_action[Action.ALLOW] if each.rule.dry_run]
        self.audit = by_action[Action.AUDIT]
        self.authorizers = {each.name: each for each in access.authorizers}
        self.keys = {each.name: _inline(each) for each in access.jwt if each.jwks}
        self.asks = bool(access.jwt or self.custom or (limiter is not None and limiter.asks))
        self.has_notes = bool(self.audit or self.dry_deny or self.dry_allow)
        self.has_rules = bool(access.rules)

    def forms(self, request: Request) -> tuple[str, ...]:
        """The path in each way to read it that counts."""
        bare = paths.bare(request.path)
        if paths.is_clean(bare):
            return (bare,)
        how = self.access.normalization
        return (bare,) if how == "NONE" else paths.readings(bare, how)


def _inline(provider: JwtProvider) -> jwt.Keys | None:
    try:
        return jwt.Keys.read(provider.jwks)
    except ValueError:
        return None  # every token of it is refused: istio/checks/security.py has said so


class Guard:
    """Asked by any thread; holds nothing that changes but the quotas' buckets, which are the previous guard's where
    their limits say the same."""

    def __init__(
        self,
        inbound: Iterable[Inbound] = (),
        listeners: Iterable[tuple[int, Access]] = (),
        previous: Guard | None = None,
    ) -> None:
        self._ports: dict[int, _Port] = {}
        self._default: _Port | None = None
        self._limiters: dict[tuple[object, object], Limiter] = {}
        """Ports that say the same share their buckets: a gateway's limit is one of all its doors."""
        for each in inbound:
            self._ports[each.port] = _Port(each.access, each, self._limiter(each.access, previous))
        for port, access in listeners:
            self._ports[port] = _Port(access, None, self._limiter(access, previous))
        self.is_configured = bool(self._ports)
        self._default = self._ports.pop(0, None)
        if self._default is None and self._ports:
            self._default = next(iter(self._ports.values())) if len(self._ports) == 1 else _Port(_DENY_ALL, None)

    def tls_mode(self, port: int) -> TlsMode:
        """How this port takes connections. PERMISSIVE where nothing is said."""
        found = self._ports.get(port, self._default)
        return TlsMode.PERMISSIVE if found is None or found.inbound is None else found.inbound.tls_mode(port)

    def asks(self, port: int) -> bool:
        """Whether a decision on this port may need I/O: then `admission` has to be run, not `admit`."""
        found = self._ports.get(port, self._default)
        return found is not None and found.asks

    def admit(self, request: Request, peer: Peer, now: float, ticks: float = 0.0) -> Verdict:
        """The decision. now: seconds since 1970. ticks: monotonic seconds, for quotas; 0 asks, and counts for, none.
        What would have to be asked first counts as unanswered. Never blocks, never raises."""
        try:
            port = self._ports.get(peer.local_port, self._default)
            if port is None:
                return ALLOW
            if not port.asks:
                found = _tls(port, peer) or (_judge(port, request, peer, ALLOW) if port.has_rules else ALLOW)
                if port.limiter is None or not ticks or isinstance(found, Deny):
                    return found
                return _limited(port.limiter.take(_as_served(port, request), peer, ticks), found)
            flow = self.admission(request, peer, now, ticks)
            next(flow)
            while True:
                flow.send(None)
        except StopIteration as end:
            verdict: Verdict = end.value
            return verdict
        except Exception as error:
            return _failed(error)

    def admission(self, request: Request, peer: Peer, now: float, ticks: float = 0.0) -> Admission:
        """`admit`, asking the edge for what needs I/O. Never raises."""
        try:
            port = self._ports.get(peer.local_port, self._default)
            if port is None:
                return ALLOW
            refused = _tls(port, peer)
            if refused is not None:
                return refused
            verdict = (yield from _authenticate(port, request, now)) if port.access.jwt else ALLOW
            if isinstance(verdict, Deny):
                return verdict
            if port.custom:
                verdict = yield from _custom(port, request, peer, verdict)
                if isinstance(verdict, Deny):
                    return verdict
            verdict = _judge(port, request, peer, verdict)
            # Quotas come last: what is denied anyway takes nobody's tokens.
            if port.limiter is None or not ticks or isinstance(verdict, Deny):
                return verdict
            return _limited((yield from port.limiter.asking(_as_served(port, request), peer, ticks)), verdict)
        except Exception as error:
            return _failed(error)

    @property
    def limiters(self) -> list[Limiter]:
        """Whose counts say how much of each quota is used."""
        return list(self._limiters.values())

    def _limiter(self, access: Access, previous: Guard | None) -> Limiter | None:
        says = (access.rate_limits, access.quotas)
        if says == ((), ()):
            return None
        if says not in self._limiters:
            before = previous.limiters if previous is not None else []
            known = {name: state for each in before for name, state in each.known.items()}
            self._limiters[says] = Limiter(*says, known)
        return self._limiters[says]

    def __repr__(self) -> str:
        count = sum(len(each.access.rules) for each in {id(p): p for p in self._all()}.values())
        return f"<Guard {count} rules>" if self.is_configured else "<Guard, not configured>"

    def _all(self) -> list[_Port]:
        return [*self._ports.values(), *([self._default] if self._default is not None else [])]


_DENY_ALL = Access(rules=(AccessRule("no rules for this port", Action.ALLOW, Or()),))


def guard_of(snapshot: Snapshot, previous: Guard | None, before: Snapshot | None) -> Guard:
    """The guard of a snapshot; the previous one where nothing has changed for it."""
    listeners = tuple((each.port, each.access) for each in snapshot.listeners if each.is_bound and each.access)
    if previous is not None and before is not None and before.inbound == snapshot.inbound:
        old = tuple((each.port, each.access) for each in before.listeners if each.is_bound and each.access)
        if old == listeners:
            return previous
    return Guard(snapshot.inbound, listeners, previous)


def _failed(error: Exception) -> Deny:
    if isinstance(error, AuthorityUntold):
        return _denied("rbac_access_denied", reason="a rule asks for the host, and this call has none that is known")
    if isinstance(error, ServerNameUntold):
        return _denied("rbac_access_denied", reason="a rule asks for the TLS server name, and none is known")
    _log.exception("a decision failed, and denies", exc_info=error)
    return _denied("rbac_access_denied", reason=f"the decision failed: {type(error).__name__}")


def _denied(details: str, rule: AccessRule | None = None, reason: str = "", notes: tuple[str, ...] = ()) -> Deny:
    return Deny(
        403,
        DENIED,
        (_TEXT,),
        7,
        "",
        details,
        rule.name if rule is not None else "",
        rule.origin if rule is not None else "",
        reason,
        notes,
    )


def _as_served(port: _Port, request: Request) -> Request:
    """Limits count the path that the application will see, or another spelling of it would have another quota."""
    _, mark, query = request.path.partition("?")
    return request._replace(path=f"{port.forms(request)[-1]}{mark}{query}")


def _limited(found: Limited | Taken | None, allowed: Allow) -> Verdict:
    if found is None:
        return allowed
    headers = _raw(found.headers)
    if isinstance(found, Limited):
        text = (_TEXT,) if found.body else ()
        limit = found.limit
        return Deny(
            found.status, found.body, (*text, *headers), found.grpc_status, found.flag, found.details, limit.name,
            limit.origin, found.reason,
        )  # fmt: skip
    return allowed._replace(answer=allowed.answer + headers, add=allowed.add + _raw(found.request_headers))


def _raw(pairs: Iterable[tuple[str, str]]) -> RawPairs:
    return tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs)


def _tls(port: _Port, peer: Peer) -> Deny | None:
    if port.inbound is None or (peer.is_tls and peer.identity is not None):
        return None
    if port.inbound.tls_mode(peer.local_port) is not TlsMode.STRICT:
        return None
    return _denied("mtls_required", reason="the port takes only connections with mutual TLS")


def _judge(port: _Port, request: Request, peer: Peer, allowed: Allow) -> Verdict:
    """DENY, then ALLOW, for every way to read the host and the path."""
    notes: tuple[str, ...] = ()
    for call in _calls(port, request, peer, allowed):
        if port.has_notes:
            notes = (*notes, *(each for each in _notes(port, call) if each not in notes))
        for each in port.deny:
            if each.holds(call):
                rule = each.rule
                return _denied(f"rbac_access_denied_matched_policy[{rule.name}]", rule, f"denied by {rule.name}", notes)
        if port.allow:
            for each in port.allow:
                if each.holds(call):
                    break
            else:
                return _denied("rbac_access_denied_matched_policy[none]", reason="no rule allows it", notes=notes)
    return allowed._replace(notes=notes) if notes else allowed


def _calls(port: _Port, request: Request, peer: Peer, allowed: Allow) -> Iterator[Call]:
    """The call in each way to read it. `reviews.` is `reviews` to DNS and to many applications."""
    readings = [request]
    authority = request.authority
    if authority.endswith(".") or ".:" in authority:
        readings.append(request._replace(authority=authority.rstrip(".").replace(".:", ":")))
    for each in readings:
        for path in port.forms(each):
            yield Call(each, peer, path, port.access.trusted_hops, allowed.claims)


def _notes(port: _Port, call: Call) -> list[str]:
    found = [f"audit: {each.rule.name} {each.rule.origin}".rstrip() for each in port.audit if each.holds(call)]
    denied = next((each.rule for each in port.dry_deny if each.holds(call)), None)
    if denied is not None:
        found.append(f"dry run: would be denied by {denied.name} {denied.origin}".rstrip())
    elif port.dry_allow and not any(each.holds(call) for each in (*port.dry_allow, *port.allow)):
        found.append("dry run: would be denied, no rule allows it")
    return found


def _authenticate(port: _Port, request: Request, now: float) -> Admission:
    """Any provider's valid token will do; else there must be none at all (Istio, convertToEnvoyJwtConfig)."""
    if _is_preflight(request):
        return ALLOW
    worst = ""
    for provider in port.access.jwt:
        for found in jwt.find(provider, request):
            try:
                token = jwt.read(found.token)
                jwt.check(token, provider, now)
                keys: jwt.Keys | None
                keys = port.keys[provider.name] if provider.name in port.keys else (yield FetchKeys(provider))
                fitting = keys.fitting(token.algorithm, token.key_id) if keys is not None else []
                if keys is not None and not fitting and provider.name not in port.keys:
                    keys = yield FetchKeys(provider, token.key_id or token.algorithm)  # keys may have been rotated
                    fitting = keys.fitting(token.algorithm, token.key_id) if keys is not None else []
                if keys is None:
                    raise jwt.Refused(jwt.NO_KEYS)
                if not fitting:
                    raise jwt.Refused(jwt.NO_KEY)
                jwt.verify(token, fitting)
            except jwt.Refused as error:
                if worst in ("", jwt.UNKNOWN_ISSUER):
                    worst = error.reason
                continue
            return _authenticated(port, provider, found, token)
    if not worst:
        return _stripped(port)
    status = 403 if worst == jwt.BAD_AUDIENCE else 401
    headers = [_TEXT]
    if status == 401:
        realm = quote(f"{request.scheme}://{request.authority}{paths.bare(request.path)}", safe="/:")[:512]
        challenge = f'Bearer realm="{realm}", error="invalid_token"'
        headers.append((b"www-authenticate", challenge.encode("ascii", "replace")))
    details = worst.replace(" ", "_")
    return Deny(
        status,
        worst.encode("ascii"),
        tuple(headers),
        _GRPC_UNAUTHENTICATED if status == 401 else 7,
        "",
        f"jwt_authn_access_denied{{{details}}}",
        reason=worst,
    )


def _is_preflight(request: Request) -> bool:
    """Browsers send no token with it (Istio bypass_cors_preflight)."""
    headers = request.headers
    return (
        request.method == "OPTIONS"
        and bool(headers.get("origin"))
        and bool(headers.get("access-control-request-method"))
    )


def _claimed(port: _Port) -> frozenset[bytes]:
    """Headers that only a verified token may set: a caller's own are taken away."""
    names = {name for each in port.access.jwt for name, _ in each.claim_headers}
    names |= {each.payload_header for each in port.access.jwt if each.payload_header}
    return frozenset(name.lower().encode("latin-1") for name in names)


def _stripped(port: _Port) -> Allow:
    names = _claimed(port)
    return ALLOW if not names else Allow(remove=names)


def _authenticated(port: _Port, provider: JwtProvider, found: jwt.Found, token: jwt.Token) -> Allow:
    claims = jwt.claims(token, provider)
    remove, added = set(_claimed(port)), []
    if not provider.forward and found.header:
        remove.add(found.header.lower().encode("latin-1"))
    for header, path in provider.claim_headers:
        value: Any = claims
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        text = _header_text(value)
        if text is not None:
            added.append((header.lower().encode("latin-1"), text))
    if provider.payload_header:
        added.append((provider.payload_header.lower().encode("latin-1"), token.text.split(".")[1].encode("ascii")))
    params = frozenset({found.param} if found.param and not provider.forward else ())
    return Allow(frozenset(remove), tuple(added), remove_params=params, principal=jwt.principal(claims), claims=claims)


def _header_text(value: Any) -> bytes | None:
    """Only plain values (Envoy: string, int, bool); what could begin another header is left out."""
    if isinstance(value, bool):
        value = "true" if value else "false"
    elif isinstance(value, int | float):
        value = str(value)
    if not isinstance(value, str) or any(not "\x20" <= each <= "\x7e" for each in value):
        return None
    return value.encode("ascii")


def _custom(port: _Port, request: Request, peer: Peer, allowed: Allow) -> Admission:
    """The first provider with a matching rule is asked; a provider that nobody knows denies."""
    forms = port.forms(request)
    asked: set[str] = set()
    for each in port.custom:
        rule = each.rule
        if rule.provider in asked:
            continue
        if not any(each.holds(call) for call in _calls(port, request, peer, allowed)):
            continue
        if rule.dry_run:
            allowed = allowed._replace(notes=(*allowed.notes, f"dry run: {rule.name} would ask {rule.provider}"))
            continue
        asked.add(rule.provider)
        authorizer: Authorizer | None = port.authorizers.get(rule.provider)
        if authorizer is None:
            return _denied("ext_authz_denied", rule, f"there is no provider {rule.provider!r}")._replace(flag="UAEX")
        body: bytes | None = b""
        if authorizer.max_body:
            body = yield ReadBody(authorizer.max_body)
        is_partial = body is not None and len(body) > authorizer.max_body
        if is_partial and not authorizer.partial_body:
            reason = f"{authorizer.name} is to see a body, and this one is longer than {authorizer.max_body} bytes"
            return Deny(413, b"Payload Too Large", (_TEXT,), 8, "UAEX", "request_payload_too_large", rule.name,
                        rule.origin, reason)  # fmt: skip
        for path in forms:
            verdict: Verdict | None = None
            if body is not None:
                asked_of = request._replace(path=path + "".join(request.path.partition("?")[1:]))
                verdict = yield Authorize(authorizer, asked_of, peer, body[: authorizer.max_body], is_partial)
            if verdict is None:
                if authorizer.fail_open:
                    break
                reason = f"no answer from {authorizer.name}"
                if body is None:
                    reason = f"{authorizer.name} is to see the body, which can't be had here before the verdict"
                return Deny(authorizer.status_on_error, b"", (), 7, "UAEX", "ext_authz_error", rule.name, rule.origin,
                            reason)  # fmt: skip
            if isinstance(verdict, Deny):
                return verdict._replace(rule=rule.name, origin=rule.origin)
            allowed = _with_word(allowed, verdict)
    return allowed


def _with_word(allowed: Allow, verdict: Allow) -> Allow:
    """What a further authorizer says of a header goes before what was said until now."""
    named = {name for name, _ in verdict.add}
    return allowed._replace(
        remove=allowed.remove | verdict.remove,
        add=(*(pair for pair in allowed.add if pair[0] not in named), *verdict.add),
        answer=tuple(dict.fromkeys(allowed.answer + verdict.answer)),
        remove_params=allowed.remove_params | verdict.remove_params,
    )
