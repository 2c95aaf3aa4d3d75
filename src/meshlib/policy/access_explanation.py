"""Which rule lets a call in, or turns it away? The guard's own decision, and what each rule says when it is alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from meshlib.model import Access, AccessRule, Action, Inbound, Peer, Request, TlsMode
from meshlib.model.values import dataclass
from meshlib.policy.admission import Allow, Authorize, Deny, Question, Verdict
from meshlib.policy.guard import Guard

Answer = Callable[[Question], Any]
"""What the edge says to a guard's question; None where it has no answer."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One rule that applies to the workload. holds: whether it applies to this call."""

    rule: AccessRule
    holds: bool


@dataclass(frozen=True, slots=True)
class AccessExplanation:
    """verdict: the guard's. decided: the rules that made it: the one that denies, those that allow; empty where no rule
    did. reason: one sentence. rules: all of them, in the order in which they are asked. asked: the external authorizers
    whose word the decision needs and that were not heard."""

    verdict: Verdict
    decided: tuple[AccessRule, ...]
    reason: str
    rules: tuple[Judged, ...]
    asked: tuple[str, ...] = ()

    @property
    def is_allowed(self) -> bool:
        return isinstance(self.verdict, Allow)


_ORDER = (Action.CUSTOM, Action.DENY, Action.ALLOW, Action.AUDIT)


def explain_access(inbound: Inbound, request: Request, peer: Peer, now: float, answer: Answer) -> AccessExplanation:
    """now: seconds since 1970. Quotas and rate limits count for nothing here. Never raises."""
    # The call comes in by this port, and so does the guard of it alone.
    inbound = replace(inbound, port=0)
    asked: list[str] = []

    def say(question: Question) -> Any:
        found = answer(question)
        if found is None and isinstance(question, Authorize):
            asked.append(question.authorizer.name)
        return found

    access = replace(inbound.access, rate_limits=(), quotas=())
    verdict = _decided(replace(inbound, access=access), request, peer, now, say)
    rules = tuple(
        Judged(rule, _holds(inbound, access, rule, request, peer, now, answer))
        for action in _ORDER
        for rule in access.rules
        if rule.action is action
    )
    decided, reason = _why(verdict, rules)
    return AccessExplanation(verdict, decided, reason, rules, tuple(asked))


def _decided(inbound: Inbound, request: Request, peer: Peer, now: float, answer: Answer) -> Verdict:
    flow = Guard((inbound,)).admission(request, peer, now)
    said: Any = None
    try:
        question = next(flow)
        while True:
            said = answer(question)
            question = flow.send(said)
    except StopIteration as end:
        verdict: Verdict = end.value
        return verdict


def _holds(
    inbound: Inbound, access: Access, rule: AccessRule, request: Request, peer: Peer, now: float, answer: Answer
) -> bool:
    """As an ALLOW rule that is alone, whatever it does in earnest: it lets the call in if it applies to it."""
    alone = replace(rule, action=Action.ALLOW, dry_run=False)
    bare = replace(access, rules=(alone,), authorizers=())
    open_to_all = replace(inbound, access=bare, tls=TlsMode.PERMISSIVE, port_tls=())
    return isinstance(_decided(open_to_all, request, peer, now, answer), Allow)


def _why(verdict: Verdict, rules: tuple[Judged, ...]) -> tuple[tuple[AccessRule, ...], str]:
    enforced = [each for each in rules if not each.rule.dry_run]
    if isinstance(verdict, Deny):
        by = tuple(each.rule for each in enforced if verdict.rule and each.rule.name == verdict.rule)
        return by, verdict.reason or verdict.details
    allowing = [each for each in enforced if each.rule.action is Action.ALLOW]
    if allowing:
        return tuple(each.rule for each in allowing if each.holds), "an ALLOW rule applies, and no DENY rule does"
    if any(each.rule.action is Action.DENY for each in enforced):
        return (), "no DENY rule applies, and there is no ALLOW policy, which lets everybody else in"
    return (), "no policy applies to this workload"
