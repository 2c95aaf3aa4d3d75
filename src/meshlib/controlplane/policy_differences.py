"""What holds otherwise in one configuration than in another, besides routes? Only what differs, in words.

Policies of destinations, their endpoints, and who may call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any

from meshlib.model import Cluster, Endpoint, Inbound, LoadAssignment, Snapshot

Difference = tuple[str, tuple[str, ...], tuple[str, ...]]
"""(what, before, after): a line for each field."""
_UNTOLD = frozenset({"name", "origin", "service", "endpoints", "reporting"})
CALLS = "calls to"


def place(cluster: str) -> str:
    """`outbound|9080|v2|reviews.default.svc.cluster.local` -> `reviews.default.svc.cluster.local v2`."""
    parts = cluster.split("|")
    return f"{parts[3]} {parts[2]}".strip() if len(parts) == 4 else cluster


def policy_differences(before: Snapshot, after: Snapshot) -> Iterator[Difference]:
    old = {each.name: each for each in before.clusters}
    new = {each.name: each for each in after.clusters}
    was = {each.cluster: each for each in before.assignments}
    will = {each.cluster: each for each in after.assignments}
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) is new.get(name) and was.get(name) is will.get(name):
            continue
        one = _of_cluster(old.get(name), was.get(name))
        two = _of_cluster(new.get(name), will.get(name))
        yield from _difference(place(name), one, two)
    yield from _difference(CALLS, _of_inbound(before), _of_inbound(after))


def _difference(what: str, one: dict[str, str], two: dict[str, str]) -> Iterator[Difference]:
    differing = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    if differing:
        yield (
            what,
            tuple(f"{name}: {one[name]}" for name in differing if name in one),
            tuple(f"{name}: {two[name]}" for name in differing if name in two),
        )


def _of_cluster(cluster: Cluster | None, assignment: LoadAssignment | None) -> dict[str, str]:
    if cluster is None:
        return {}
    endpoints = assignment.endpoints if assignment is not None else cluster.endpoints
    return {**_fields(cluster), "endpoints": _addresses(endpoints)}


def _addresses(endpoints: tuple[Endpoint, ...]) -> str:
    shown = sorted(each.authority for each in endpoints)
    return f"{len(shown)}: {', '.join(shown[:10])}{', ...' if len(shown) > 10 else ''}" if shown else "none"


def _of_inbound(snapshot: Snapshot) -> dict[str, str]:
    inbound: Inbound | None = next(iter(snapshot.inbound), None)
    if inbound is None:
        return {}
    rules = {f"rule {each.name}": each.action.value for each in inbound.access.rules}
    ports = {f"tls of port {port}": mode.value for port, mode in inbound.port_tls}
    rest = {name: told for name, told in _fields(inbound.access).items() if name != "rules"}
    return {"tls": inbound.tls.value, **ports, **rules, **rest}


def _fields(value: Any) -> dict[str, str]:
    """Those that are not as by default."""
    return {
        each.name.replace("_", " "): _said(getattr(value, each.name))
        for each in fields(value)
        if each.name not in _UNTOLD and not _is_default(each, getattr(value, each.name))
    }


def _is_default(field: Any, value: Any) -> bool:
    if field.default is not MISSING:
        return bool(value == field.default)
    return bool(field.default_factory is not MISSING and value == field.default_factory())


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | frozenset):
        return ", ".join(str(getattr(each, "name", "") or _said(each)) for each in value) or "none"
    if is_dataclass(value):
        return ", ".join(f"{name} {told}" for name, told in _fields(value).items()) or "by default"
    return str(value)
