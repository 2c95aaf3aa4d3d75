"""What do statuses say that is not well? (IST0171)"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from meshlib.istio import gateway_kinds
from meshlib.istio.analyze.messages import NEGATIVE_CONDITION, Message
from meshlib.istio.analyze.scene import Scene

_OF_ROUTES = frozenset({"Accepted", "Programmed", "ResolvedRefs"})
_OF_WAYPOINTS = frozenset({"istio.io/WaypointBound"})
_ASKED = {
    "Service": _OF_WAYPOINTS,
    "ServiceEntry": _OF_WAYPOINTS,
    "WorkloadEntry": _OF_WAYPOINTS,
    "AuthorizationPolicy": frozenset({"ZtunnelAccepted", "WaypointAccepted"}),
    "HTTPRoute": _OF_ROUTES,
    "GRPCRoute": _OF_ROUTES,
}


def check(scene: Scene) -> Iterator[Message]:
    for each in scene.objects:
        asked = _ASKED.get(each.kind, frozenset())
        if each.kind == "Gateway" and each.api_version.startswith(f"{gateway_kinds.GROUP}/"):
            asked = _OF_ROUTES
        for condition in _conditions(each.raw.get("status")) if asked else ():
            kind, reason = str(condition.get("type", "")), str(condition.get("reason", ""))
            is_partial = kind == "WaypointAccepted" and reason == "PartiallyInvalid"
            if kind in asked and (condition.get("status") == "False" or is_partial):
                yield NEGATIVE_CONDITION.at(each, ("status",), kind, reason, condition.get("message", ""))


def _conditions(status: Any) -> Iterator[dict[str, Any]]:
    """The object's own, and those that a route's parents give it."""
    if not isinstance(status, dict):
        return
    parents = status.get("parents")
    for holder in (status, *(parents if isinstance(parents, list) else ())):
        found = holder.get("conditions") if isinstance(holder, dict) else None
        yield from (each for each in found or () if isinstance(each, dict))
