"""Whom would new rules turn away? Recorded requests, held against what their callee would then say. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from meshlib.controlplane.graph import UNKNOWN, source_id, target_id
from meshlib.controlplane.recorded_access import Fate, Judgement, RecordedCall, judge
from meshlib.controlplane.telemetry_store import Cell, Labels
from meshlib.model import Inbound, SpiffeId, TlsMode, Workload


class TurnedAway(msgspec.Struct, frozen=True):
    """Requests of one caller to one callee that were served, and would be turned away. caller, callee: ids of nodes of
    the graph. principal: the caller's, "" in plaintext. is_certain: all of them; otherwise those of them that
    depends_on tells apart (`path`, `token`). rules: what turns them away."""

    caller: str
    callee: str
    principal: str
    requests: int
    is_certain: bool
    rules: tuple[str, ...]
    depends_on: tuple[str, ...] = ()


_REFUSED = frozenset({"401", "403"})
"""Who gets that now does not get anything else then."""


def turned_away(
    callee: Workload, before: Inbound, after: Inbound, traffic: Mapping[Labels, Cell], tls_by: str = "mutual TLS"
) -> tuple[tuple[TurnedAway, ...], int]:
    """(those that `after` would treat worse than `before` does, the most requests first; how many requests of the
    callee's were looked at). traffic: each request once. tls_by: the object that will decide on TLS."""
    node, looked_at = f"workload:{callee.namespace}/{callee.name}", 0
    found: dict[tuple[str, str, Judgement], int] = {}
    for labels, cell in traffic.items():
        if target_id(labels) != node or labels.response_code in _REFUSED:
            continue
        looked_at += cell.requests
        was = judge(before, _recorded(labels, callee, before, before))
        will = judge(after, _recorded(labels, callee, before, after), tls_by)
        if will.fate > was.fate or (will.fate is Fate.OPEN and not {*will.rules} <= {*was.rules}):
            principal = "" if labels.source_principal == UNKNOWN else labels.source_principal
            key = (source_id(labels), principal, will)
            found[key] = found.get(key, 0) + cell.requests
    told = [
        TurnedAway(caller, node, principal, count, will.fate is Fate.REFUSED, will.rules, will.depends_on)
        for (caller, principal, will), count in found.items()
    ]
    return tuple(sorted(told, key=lambda each: (not each.is_certain, -each.requests, each.caller))), looked_at


def _recorded(labels: Labels, callee: Workload, before: Inbound, rules: Inbound) -> RecordedCall:
    """As it would come to a callee with these `rules`: callers of the mesh use TLS wherever it is taken."""
    policy, port = labels.connection_security_policy, callee.port
    is_mutual = {"mutual_tls": True, "none": False}.get(policy)
    if rules.tls_mode(port) is TlsMode.DISABLE:
        is_mutual = False
    elif is_mutual is False and before.tls_mode(port) is TlsMode.DISABLE:
        is_mutual = None  # it had no choice
    try:
        identity = SpiffeId.parse(labels.source_principal) if is_mutual is not False else None
    except ValueError:
        identity = None
    return RecordedCall(is_mutual, identity, port)
