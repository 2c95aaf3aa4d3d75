"""Who may call, as Envoy's RBAC filter says it? RBAC -> rules of access: rbac.py backwards, and what pilot writes.

Nothing that restricts is passed over: a condition, a field or an extension that is not known here is refused with its
name, so that the rules from before stay, or nobody gets in. One condition is known and can't be judged: metadata, what
other filters have found out, of which whoever sends RBAC alone sends none; so nothing verifies tokens either. It never
holds where it would allow, and always where it would deny. (gRPC has it never hold, gRFC A41: there a DENY of claims
lets everybody in.)
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

from meshlib.model import (
    ALWAYS,
    NEVER,
    AccessRule,
    Action,
    AddressIs,
    And,
    Condition,
    HeaderMatch,
    Not,
    Or,
    PathIs,
    PathTemplate,
    PortIs,
    PrincipalIs,
    ServerNameIs,
)
from meshlib.xds import fields as read
from meshlib.xds import messages as m
from meshlib.xds.fields import Wrong

NOBODY = "no policy allows anything"
"""The name of the rule that stands for an ALLOW filter without policies."""
_ACTIONS = {0: Action.ALLOW, 1: Action.DENY, 2: Action.AUDIT}
_AUDIT_LOGGING = 3
_STAT_PREFIX, _SHADOW_MATCHER, _PER_RULE_STATS = 6, 5, 7
_PSEUDO = frozenset({":method", ":authority", ":path"})
_MAX_DEPTH = 32
_WILD = re.compile(r"\*\*?")
"""As Envoy writes what Istio's rules have in braces (pilot/pkg/security/authz/matcher, PathTemplateMatcher)."""
_Of = Literal["peer", "remote", "destination"]


def filter_rules(message: Any, field: str) -> list[AccessRule]:
    """The rules of one RBAC HTTP filter. Its shadow rules decide, and are not carried out. Raises Wrong."""
    read.closed(message, field, _STAT_PREFIX, _SHADOW_MATCHER, _PER_RULE_STATS)
    found = rules(message.rules, f"{field}.rules") if message.HasField("rules") else []
    if message.HasField("shadow_rules"):
        found += rules(message.shadow_rules, f"{field}.shadow_rules", dry_run=True)
    return found


def rules(message: Any, field: str, *, dry_run: bool = False) -> list[AccessRule]:
    """The rules of one RBAC, by their names. Raises Wrong."""
    read.closed(message, field, _AUDIT_LOGGING)
    action = _ACTIONS.get(message.action)
    if action is None:
        raise Wrong(f"{field}.action", f"is not known: {message.action}")
    found = []
    for name, policy in sorted(message.policies.items()):
        place = f"{field}.policies[{name}]"
        read.closed(policy, place)  # a condition in CEL, for one
        reader = _Reader(widen=action is Action.DENY)
        permission = _any_of(policy.permissions, f"{place}.permissions", reader.permission)
        principal = _any_of(policy.principals, f"{place}.principals", reader.principal)
        found.append(AccessRule(name, action, permission, principal, dry_run))
    if action is Action.ALLOW and not found:
        found.append(AccessRule(NOBODY, action, NEVER, dry_run=dry_run))
    return found


class _Reader:
    """Of one policy's conditions. widen: what can't be judged counts as true, since the policy denies."""

    def __init__(self, widen: bool, depth: int = 0) -> None:
        self._widen, self._depth = widen, depth

    def permission(self, message: Any, field: str) -> Condition:
        kind = message.WhichOneof("rule")
        if kind == "url_path":
            read.closed(message.url_path, f"{field}.url_path")
            return PathIs(read.string(message.url_path.path, f"{field}.url_path.path"))
        if kind == "uri_template":
            return _template(message.uri_template, f"{field}.uri_template")
        if kind == "destination_port":
            return PortIs(_port(message.destination_port, f"{field}.destination_port"))
        if kind == "destination_port_range":
            return _ports(message.destination_port_range, f"{field}.destination_port_range")
        if kind == "destination_ip":
            return _address("destination", message.destination_ip, f"{field}.destination_ip")
        if kind == "requested_server_name":
            return ServerNameIs(read.string(message.requested_server_name, f"{field}.requested_server_name"))
        return self._shared(message, kind, field, "rule", _Reader.permission)

    def principal(self, message: Any, field: str) -> Condition:
        kind = message.WhichOneof("identifier")
        if kind == "authenticated":
            return _authenticated(message.authenticated, f"{field}.authenticated")
        if kind in ("direct_remote_ip", "source_ip"):
            return _address("peer", getattr(message, kind), f"{field}.{kind}")
        if kind == "remote_ip":
            return _address("remote", message.remote_ip, f"{field}.remote_ip")
        return self._shared(message, kind, field, "id", _Reader.principal)

    def _shared(
        self, message: Any, kind: str | None, field: str, one: str, way: Callable[[_Reader, Any, str], Condition]
    ) -> Condition:
        """What permissions and principals both have. one: what the wire calls one of them in its connectives."""
        if kind == "any" and message.any:
            return ALWAYS
        if kind == "header":
            return _header(message.header, f"{field}.header")
        if kind == "metadata":
            return ALWAYS if self._widen else NEVER
        if kind == f"not_{one}":
            place = f"{field}.{kind}"
            return Not(way(self._deeper(place, widen=not self._widen), getattr(message, kind), place))
        for connective, of in (("and", And), ("or", Or)):
            if kind == f"{connective}_{one}s":
                place = f"{field}.{kind}"
                reads = partial(way, self._deeper(place, widen=self._widen))
                return of(_parts(getattr(getattr(message, kind), f"{one}s"), place, reads))
        raise Wrong(field, "has no condition that is known")

    def _deeper(self, field: str, *, widen: bool) -> _Reader:
        if self._depth >= _MAX_DEPTH:
            raise Wrong(field, f"is nested deeper than {_MAX_DEPTH} conditions")
        return _Reader(widen, self._depth + 1)


def _parts(messages: Iterable[Any], field: str, way: Callable[[Any, str], Condition]) -> tuple[Condition, ...]:
    found = tuple(way(each, f"{field}[{index}]") for index, each in enumerate(messages))
    if not found:
        raise Wrong(field, "is empty")
    return found


def _any_of(messages: Iterable[Any], field: str, way: Callable[[Any, str], Condition]) -> Condition:
    """ "A policy matches if and only if at least one of its permissions ... and at least one of its principals" do."""
    found = _parts(messages, field, way)
    return found[0] if len(found) == 1 else Or(found)


def _header(message: Any, field: str) -> Condition:
    found = read.header(message, field)
    name = found[0].name
    if name.startswith(":") and name not in _PSEUDO:
        raise Wrong(f"{field}.name", f"is not known of a call that comes in: {name}")
    parts = tuple(_of_pseudo(each) if name in _PSEUDO else each for each in found)
    return parts[0] if len(parts) == 1 else And(parts)


def _of_pseudo(header: HeaderMatch) -> Condition:
    """Each call has a method, an authority and a path."""
    if header.match.kind == "present":
        return NEVER if header.invert else ALWAYS
    return header


def _authenticated(message: Any, field: str) -> PrincipalIs:
    read.closed(message, field)
    if not message.HasField("principal_name"):
        return PrincipalIs()  # "any user that is authenticated"
    return PrincipalIs(read.string(message.principal_name, f"{field}.principal_name"))


def _address(of: _Of, message: Any, field: str) -> AddressIs:
    # "If not set, the prefix length defaults to 0" (CidrRange): everybody, as Envoy reads it.
    cidr = f"{message.address_prefix}/{message.prefix_len.value}"
    try:
        ipaddress.ip_network(cidr, strict=False)
    except ValueError:
        raise Wrong(field, f"is no range of addresses: {cidr!r}") from None
    return AddressIs(of, cidr)


def _port(port: int, field: str) -> int:
    if not 0 < port < 65536:
        raise Wrong(field, f"is no port: {port}")
    return int(port)


def _ports(message: Any, field: str) -> PortIs:
    first, last = _port(message.start, f"{field}.start"), _port(message.end - 1, f"{field}.end")  # "end ... exclusive"
    if last < first:
        raise Wrong(field, f"is no range: {message.start} to {message.end}")
    return PortIs(first, last)


def _template(message: Any, field: str) -> PathTemplate:
    config = read.unpacked(message.typed_config, m.UriTemplate, f"{field}.typed_config")
    found = PathTemplate(_WILD.sub(r"{\g<0>}", config.path_template))
    try:
        _ = found.regex
    except ValueError:
        reason = f"is not known: {config.path_template!r}"
        raise Wrong(f"{field}.typed_config.path_template", reason) from None
    return found
