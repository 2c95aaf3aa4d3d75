"""Would a request that was recorded be let in by these rules? Yes, no, or: that depends on what nobody has recorded.

A recorded request is known by who sent it, over which kind of connection, and to which workload: not by its method,
path, headers or token. So a condition holds, does not hold, or is open (Kleene's three values), in the guard's own
order.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from meshlib.model import (
    AccessRule,
    Action,
    AddressIs,
    And,
    Condition,
    HeaderMatch,
    Inbound,
    Not,
    Or,
    PathIs,
    PathTemplate,
    PortIs,
    PrincipalIs,
    ServerNameIs,
    SpiffeId,
    TlsMode,
)
from meshlib.model.expressions import compile_string


class Fate(IntEnum):
    """The worse, the greater."""

    ADMITTED = 0
    OPEN = 1
    REFUSED = 2


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """is_mutual: whether it came over mutual TLS; None is not known. identity: whose; None where there was none, or it
    is not known. port: the workload's own; 0 is not known."""

    is_mutual: bool | None = None
    identity: SpiffeId | None = None
    port: int = 0


@dataclass(frozen=True, slots=True)
class Judgement:
    """rules: what decides, for people: an object with its file, or a sentence. depends_on: what would have to be known
    of the request (`path`, `token`, `header x-user`), where its fate is open."""

    fate: Fate
    rules: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()


def judge(inbound: Inbound, call: RecordedCall, tls_by: str = "mutual TLS") -> Judgement:
    """By what `inbound` says; quotas and dry runs turn nobody away. tls_by: the object that decides on TLS. Never
    raises for rules that the guard takes."""
    mode = inbound.tls_mode(call.port)
    if not call.port and any(other is not inbound.tls for _, other in inbound.port_tls):
        strict = {inbound.tls, *(other for _, other in inbound.port_tls)}
        if TlsMode.STRICT in strict and call.is_mutual is not True:
            return Judgement(Fate.OPEN, (f"{tls_by}: STRICT on some ports",), ("port",))
    elif mode is TlsMode.STRICT and call.is_mutual is False:
        return Judgement(Fate.REFUSED, (f"{tls_by}: STRICT, and it came in plaintext",))
    elif mode is TlsMode.STRICT and call.is_mutual is None:
        return Judgement(Fate.OPEN, (f"{tls_by}: STRICT",), ("whether it comes over mutual TLS",))
    return _judged_by_rules(inbound, call)


def _judged_by_rules(inbound: Inbound, call: RecordedCall) -> Judgement:
    open_rules: dict[str, None] = {}
    needs: dict[str, None] = {}
    for provider in inbound.access.jwt:
        open_rules[provider.origin or f"the tokens of {provider.issuer}"] = None
        needs["token, if it has one"] = None
    rules = [each for each in inbound.access.rules if not each.dry_run]
    for each in (each for each in rules if each.action in (Action.CUSTOM, Action.DENY)):
        holds, unknown = _holds(each, call)
        if holds and each.action is Action.DENY:
            return Judgement(Fate.REFUSED, (_told(each),))
        if holds is not False:
            open_rules[_told(each)] = None
            needs |= dict.fromkeys(unknown)
            if each.action is Action.CUSTOM:
                needs[f"what {each.provider} says"] = None
    allowing = [each for each in rules if each.action is Action.ALLOW]
    found = [(each, *_holds(each, call)) for each in allowing]
    if allowing and not any(holds for _, holds, _ in found):
        perhaps = [(each, unknown) for each, holds, unknown in found if holds is None]
        if not perhaps:
            return Judgement(
                Fate.REFUSED, tuple(dict.fromkeys(f"{_told(each)} does not allow it" for each in allowing))
            )
        for each, unknown in perhaps:
            open_rules[_told(each)] = None
            needs |= dict.fromkeys(unknown)
    if open_rules:
        return Judgement(Fate.OPEN, tuple(open_rules), tuple(needs))
    return Judgement(Fate.ADMITTED)


def _told(rule: AccessRule) -> str:
    return rule.origin or rule.name


def _holds(rule: AccessRule, call: RecordedCall) -> tuple[bool | None, tuple[str, ...]]:
    unknown: dict[str, None] = {}
    found = _all([_answer(rule.permission, call, unknown), _answer(rule.principal, call, unknown)])
    return found, tuple(unknown) if found is None else ()


def _all(answers: list[bool | None]) -> bool | None:
    return False if False in answers else None if None in answers else True


def _answer(condition: Condition, call: RecordedCall, unknown: dict[str, None]) -> bool | None:
    """unknown: gets what would have to be known."""
    if isinstance(condition, And):
        return _all([_answer(part, call, unknown) for part in condition.parts])
    if isinstance(condition, Or):
        answers = [_answer(part, call, unknown) for part in condition.parts]
        return True if True in answers else None if None in answers else False
    if isinstance(condition, Not):
        found = _answer(condition.part, call, unknown)
        return None if found is None else not found
    if isinstance(condition, PrincipalIs):
        return _is_principal(condition, call, unknown)
    if isinstance(condition, PortIs) and call.port:
        return condition.port <= call.port <= (condition.last or condition.port)
    unknown[_name(condition)] = None
    return None


def _is_principal(condition: PrincipalIs, call: RecordedCall, unknown: dict[str, None]) -> bool | None:
    if call.is_mutual is False:
        return False
    if call.is_mutual and condition.match is None:
        return True
    if call.identity is None or condition.match is None or call.is_mutual is None:
        unknown["identity"] = None
        return None
    return compile_string(condition.match)(call.identity.uri)


def _name(condition: Condition) -> str:
    if isinstance(condition, HeaderMatch):
        known = {":method": "method", ":authority": "host", ":path": "path"}
        return known.get(condition.name, f"header {condition.name}")
    if isinstance(condition, PathIs | PathTemplate):
        return "path"
    if isinstance(condition, PortIs):
        return "port"
    if isinstance(condition, AddressIs):
        return "address"
    return "TLS server name" if isinstance(condition, ServerNameIs) else "token"
