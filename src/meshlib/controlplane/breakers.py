"""How do the callers of a service fare with it: whose circuits are open, whom do they leave alone? And the objects by
which an operator opens a circuit, closes it, or lets it decide again.

What processes tell is a minute old at most. An object is written whole, as it would be applied; nothing is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import msgspec

from meshlib.istio import resources as r
from meshlib.istio.resources import Object

KIND = "BackendTrafficPolicy"
_STATES = {0.0: "closed", 0.5: "half-open", 1.0: "open"}
Gauges = Iterable[tuple[str, Mapping[str, str], float]]
"""(name, attributes, value), as the telemetry store has them."""


class Ejected(msgspec.Struct, frozen=True):
    """An endpoint that some callers leave alone. by: those, `productpage-v1.default`."""

    address: str
    by: tuple[str, ...]


class BreakerDetail(msgspec.Struct, frozen=True):
    """The circuit of one service.

    states: how many callers' processes have it `open`, `half-open`, `closed`; none where it has no breaker, or nobody
    calls. forced: `OPEN` or `CLOSED` where an operator has said so. name: of the policy that says so, or would. before:
    that policy's YAML, "" where there is none. open, close, release: what it would be; "" is that it would be deleted.
    """

    name: str
    forced: str = ""
    states: dict[str, int] = {}
    before: str = ""
    open: str = ""
    close: str = ""
    release: str = ""


def breaker_of(
    name: str, namespace: str, is_of_service: Callable[[str, str], bool], objects: Sequence[Object], states: Gauges
) -> BreakerDetail:
    """is_of_service: whether a host, as an object of a namespace writes it, is this service."""
    found = next(
        (
            each
            for each in objects
            if isinstance(each.spec, r.BackendTrafficPolicy)
            and each.namespace == namespace
            and not each.spec.subset
            and is_of_service(each.spec.host, each.namespace)
        ),
        None,
    )
    forced = ""
    if found is not None and isinstance(found.spec, r.BackendTrafficPolicy) and found.spec.breaker is not None:
        forced = found.spec.breaker.forced or ""
    counts: dict[str, int] = {}
    for gauge, told, value in states:
        if gauge == "meshlib_breaker_open" and is_of_service(_host_of(told), namespace) and value in _STATES:
            counts[_STATES[value]] = counts.get(_STATES[value], 0) + 1
    if found is None:
        name = _free(name, {each.name for each in objects if each.kind == KIND and each.namespace == namespace})
    return BreakerDetail(
        found.name if found is not None else name,
        forced,
        dict(sorted(counts.items())),
        r.dump_yaml(found) if found is not None else "",
        _written(found, name, namespace, "OPEN"),
        _written(found, name, namespace, "CLOSED"),
        _written(found, name, namespace, None) if found is not None else "",
    )


def ejected_of(is_of_service: Callable[[str, str], bool], namespace: str, states: Gauges) -> tuple[Ejected, ...]:
    found: dict[str, set[str]] = {}
    for gauge, told, value in states:
        if gauge == "meshlib_endpoint_ejected" and value and is_of_service(_host_of(told), namespace):
            teller = f"{told.get('istio.workload', 'unknown')}.{told.get('service.namespace', '')}"
            found.setdefault(told.get("endpoint", ""), set()).add(teller)
    return tuple(Ejected(address, tuple(sorted(by))) for address, by in sorted(found.items()))


def live_badges(states: Gauges, node_of: Callable[[str], str]) -> dict[str, tuple[str, ...]]:
    """`breaker-open` and `ejected`, by the node of the service. node_of: a host -> its node's id."""
    found: dict[str, set[str]] = {}
    for gauge, told, value in states:
        badge = _BADGES.get(gauge)
        if badge and value and (host := _host_of(told)):
            found.setdefault(node_of(host), set()).add(badge)
    return {node: tuple(sorted(badges)) for node, badges in found.items()}


_BADGES = {"meshlib_breaker_open": "breaker-open", "meshlib_endpoints_ejected": "ejected"}


def _host_of(told: Mapping[str, str]) -> str:
    """`outbound|9080|v1|reviews.default.svc.cluster.local` -> the last part."""
    parts = told.get("cluster", "").split("|")
    return parts[3] if len(parts) == 4 else ""


def _free(name: str, taken: Set[str]) -> str:
    """What is applied replaces what bears the same name, which may be of a subset, or of another service."""
    names = (name, *(f"{name}-breaker{number or ''}" for number in range(len(taken))))
    return next(each for each in names if each not in taken)


def _written(found: Object | None, name: str, namespace: str, forced: str | None) -> str:
    whole: dict[str, Any] = (
        copy.deepcopy(dict(found.whole))
        if found is not None
        else {
            "apiVersion": "meshlib.io/v1alpha1",
            "kind": KIND,
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"host": name},
        }
    )
    spec = whole["spec"]
    breaker = {key: value for key, value in (spec.get("breaker") or {}).items() if key != "forced"}
    if forced is not None:
        breaker["forced"] = forced
    spec.pop("breaker", None)
    if breaker:
        spec["breaker"] = breaker
    if set(spec) <= {"host", "subset"}:
        return ""
    return r.dump_yaml(Object("", KIND, namespace, name, "", None, whole))
