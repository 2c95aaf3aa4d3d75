"""How do AuthorizationPolicies reach a server that is not ours? Rules of access -> RBAC, as Istio's pilot writes it.

What a reader can't judge is approximated on the safe side: where it would allow it never holds, where it would deny it
always does. (Istio's own output for gRPC passes such conditions over, so that a DENY of them lets everybody in.)
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from typing import Any

from meshlib.model import (
    ALWAYS,
    NEVER,
    AccessRule,
    Action,
    AddressIs,
    And,
    ClaimIs,
    Condition,
    HeaderMatch,
    Not,
    Or,
    PathIs,
    PathTemplate,
    PortIs,
    PrincipalIs,
    ServerNameIs,
    StringMatch,
)
from meshlib.xds import messages as m
from meshlib.xds.encode_matches import set_header, set_string
from meshlib.xds.reader import Dialect, Reader

ALLOW, DENY, LOG = 0, 1, 2
JWT_FILTER, PAYLOAD = "envoy.filters.http.jwt_authn", "payload"
"""Where the JWT filter leaves the claims of a verified token."""
_ANY_OF_THE_MESH = StringMatch("prefix", "spiffe://")


def rbac(rules: Iterable[AccessRule], action: int, reader: Reader, *, prefix: str = "") -> Any:
    """One RBAC of all these rules, by their names. prefix: of the names."""
    message = m.Rbac(action=action)
    for rule in rules:
        policy = message.policies[prefix + rule.name]
        widen = action == DENY
        permission = approximate(rule.permission, reader, widen=widen)
        principal = approximate(rule.principal, reader, widen=widen)
        _write_permission(policy.permissions.add(), permission, reader)
        _write_principal(policy.principals.add(), principal, reader)
    return message


def is_understood(leaf: Condition, reader: Reader) -> bool:
    """Whether the reader judges this condition, which is no And, Or or Not, as we mean it."""
    if reader.dialect is not Dialect.GRPC:
        return True
    if isinstance(leaf, HeaderMatch):  # gRFC A41: refused, since gRPC's are not there when it looks
        return not leaf.name.startswith("grpc-") and leaf.name != ":scheme"
    if isinstance(leaf, AddressIs):
        return leaf.of != "remote"  # it knows the peer's address alone
    if isinstance(leaf, PortIs):
        return not leaf.last
    # There is no JWT filter, and the requested server name is always "" there (A41).
    return not isinstance(leaf, ClaimIs | ServerNameIs)


def approximate(condition: Condition, reader: Reader, *, widen: bool) -> Condition:
    """The condition without what the reader can't judge. It holds at least where the given one does (widen), or at
    most there."""
    if isinstance(condition, Not):
        return Not(approximate(condition.part, reader, widen=not widen))
    if isinstance(condition, And | Or):
        parts = (approximate(part, reader, widen=widen) for part in condition.parts)
        return type(condition)(tuple(parts))
    if is_understood(condition, reader):
        return condition
    return ALWAYS if widen else NEVER


def is_approximated(rule: AccessRule, reader: Reader) -> bool:
    """Whether the reader judges the rule otherwise than it is meant, on the safe side."""
    return any(approximate(each, reader, widen=True) != each for each in (rule.permission, rule.principal))


def _write_permission(message: Any, condition: Condition, reader: Reader) -> None:
    if _write_connective(message, condition, reader, _write_permission, "rules", "rule"):
        return
    if isinstance(condition, PortIs) and condition.last:
        message.destination_port_range.start, message.destination_port_range.end = condition.port, condition.last + 1
    elif isinstance(condition, PortIs):
        message.destination_port = condition.port
    elif isinstance(condition, PathIs):
        set_string(message.url_path.path, condition.match)
    elif isinstance(condition, PathTemplate):
        message.url_path.path.safe_regex.regex = condition.regex
    elif isinstance(condition, HeaderMatch):
        _set_plain_header(message, condition, reader, "not_rule")
    elif isinstance(condition, AddressIs) and condition.of == "destination":
        _set_range(message.destination_ip, condition.cidr)
    elif isinstance(condition, ServerNameIs):
        set_string(message.requested_server_name, condition.match)
    else:
        raise TypeError(f"{type(condition).__name__} says nothing of what is asked for")


def _write_principal(message: Any, condition: Condition, reader: Reader) -> None:
    if _write_connective(message, condition, reader, _write_principal, "ids", "id"):
        return
    if isinstance(condition, PrincipalIs):
        # With no name at all, Envoy and gRPC would take any TLS for an identity.
        set_string(message.authenticated.principal_name, condition.match or _ANY_OF_THE_MESH)
    elif isinstance(condition, AddressIs) and condition.of != "destination":
        _set_range(message.direct_remote_ip if condition.of == "peer" else message.remote_ip, condition.cidr)
    elif isinstance(condition, HeaderMatch):
        _set_plain_header(message, condition, reader, "not_id")
    elif isinstance(condition, ClaimIs):
        whole, one = message.or_ids.ids.add(), message.or_ids.ids.add()
        set_string(_claim(whole, condition).string_match, condition.match)
        set_string(_claim(one, condition).list_match.one_of.string_match, condition.match)
    else:
        raise TypeError(f"{type(condition).__name__} says nothing of who asks")


def _write_connective(
    message: Any,
    condition: Condition,
    reader: Reader,
    write: Callable[[Any, Condition, Reader], None],
    parts: str,
    one: str,
) -> bool:
    """Whether the condition was one. Of nothing there is none on the wire: `any`, or its opposite, says it."""
    if condition == ALWAYS:
        message.any = True
    elif condition == NEVER:
        getattr(message, f"not_{one}").any = True
    elif isinstance(condition, Not):
        write(getattr(message, f"not_{one}"), condition.part, reader)
    elif isinstance(condition, And | Or):
        kind = "and" if isinstance(condition, And) else "or"
        if len(condition.parts) == 1:
            write(message, condition.parts[0], reader)
            return True
        for part in condition.parts:
            write(getattr(getattr(message, f"{kind}_{parts}"), parts).add(), part, reader)
    else:
        return False
    return True


def _set_plain_header(message: Any, header: HeaderMatch, reader: Reader, negation: str) -> None:
    """gRPC does not know what Envoy has for headers that are missing."""
    if header.invert:
        message = getattr(message, negation)
    plain = HeaderMatch(header.name, header.match)
    set_header(message.header, plain, has_old_fields=reader.dialect is Dialect.GRPC)


def _set_range(message: Any, cidr: str) -> None:
    network = ipaddress.ip_network(cidr, strict=False)
    message.address_prefix, message.prefix_len.value = str(network.network_address), network.prefixlen


def _claim(message: Any, condition: ClaimIs) -> Any:
    message.metadata.filter = JWT_FILTER
    for key in (PAYLOAD, *condition.path):
        message.metadata.path.add(key=key)
    return message.metadata.value


def by_action(rules: Iterable[AccessRule], action: Action, *, dry_run: bool = False) -> list[AccessRule]:
    return [each for each in rules if each.action is action and each.dry_run is dry_run]
