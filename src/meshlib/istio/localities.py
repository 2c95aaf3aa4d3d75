"""Which endpoints are near, for one caller? Priorities and weights by region, zone and subzone, or by labels.

Source of the rules: istio/istio pilot/pkg/networking/core/loadbalancer/loadbalancer.go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from meshlib.istio import resources as r
from meshlib.istio.by_label import Labels
from meshlib.istio.instances import Instance
from meshlib.istio.services import Service
from meshlib.model import Endpoint, Locality, LocalityWeight
from meshlib.model.values import dataclass

NODE_LABEL = "kubernetes.io/hostname"
_BY_TRAFFIC_DISTRIBUTION = {
    "PreferClose": r.TOPOLOGY_LABELS,
    "PreferSameZone": r.TOPOLOGY_LABELS,
    "PreferSameNode": (*r.TOPOLOGY_LABELS, NODE_LABEL),
}


@dataclass(frozen=True, slots=True)
class Nearness:
    """What decides about one cluster: at most one of `distribute`, and `failover` with `failover_priority`.

    regions_only: zones of the caller's region are equals (zone-aware routing balances among them).
    is_weighted: load is shared by the localities' weights, not by their endpoints alone.
    """

    distribute: tuple[r.Distribute, ...] = ()
    failover: tuple[tuple[str, str], ...] = ()
    failover_priority: tuple[str, ...] = ()
    regions_only: bool = False
    is_weighted: bool = False

    @property
    def labels(self) -> frozenset[str]:
        """The labels of the caller that count."""
        return frozenset(label for label in self.failover_priority if "=" not in label)


def nearness(
    balancer: r.LoadBalancer | None,
    service: Service,
    mesh: r.LocalityLbSetting | None,
    mesh_zone_aware: r.ZoneAwareLbSetting | None,
    *,
    has_outlier_detection: bool,
) -> tuple[Nearness | None, r.ZoneAwareLbSetting | None]:
    """The rule that holds, None if all endpoints are equals; and the zone-aware setting that it comes from.

    The DestinationRule's replaces the Service's trafficDistribution, and that the mesh's. Failing over needs outlier
    detection, or nobody would ever leave the first priority; trafficDistribution does without (GetLocalityLbSetting).
    """
    setting: r.LocalityLbSetting | None
    zones: r.ZoneAwareLbSetting | None = balancer.zone_aware_lb_setting if balancer is not None else None
    setting = balancer.locality_lb_setting if balancer is not None else None
    forced = False
    if zones is None and setting is None:
        labels = _BY_TRAFFIC_DISTRIBUTION.get(service.traffic_distribution)
        if labels is not None:
            return Nearness(failover_priority=labels), None
        zones, setting = mesh_zone_aware, mesh
    elif zones is not None and zones.enabled is False and setting is None:
        setting = mesh  # it switches the mesh's zone-aware routing off, and that alone
    if zones is not None and zones.enabled is not False:
        setting = r.LocalityLbSetting(failover=zones.failover, failover_priority=zones.failover_priority)
        forced = True  # "regional partitioning itself is always applied" (destination_rule.proto)
    elif setting is None or setting.enabled is False:
        return None, None
    else:
        zones = None
    if setting.distribute:
        return Nearness(tuple(setting.distribute), is_weighted=True), None
    if not (has_outlier_detection or forced):
        return None, None
    asked = bool(setting.failover or setting.failover_priority)
    return (
        Nearness(
            (),
            tuple((each.from_, each.to) for each in setting.failover),
            tuple(setting.failover_priority),
            zones is not None,
            asked and zones is None,
        ),
        zones,
    )


def seen_from(
    rule: Nearness, instances: Sequence[Instance], locality: Locality, labels: Labels
) -> tuple[tuple[Endpoint, ...], tuple[LocalityWeight, ...]]:
    """The endpoints with their priorities, and the weights of the localities (only where they count)."""
    if rule.distribute:
        return _distributed(rule.distribute, [each.endpoint for each in instances], locality)
    priorities = [0] * len(instances)
    if rule.failover_priority:
        mine = _with_topology(labels, locality)
        if mine or locality != Locality():
            found = [_by_labels(rule.failover_priority, mine, each) for each in instances]
            priorities = _closed_up(found)
    if rule.regions_only or rule.failover or not rule.failover_priority:
        # Five steps by locality within each step by labels (applyLocalityFailover).
        priorities = _closed_up(
            [
                5 * priority + _by_locality(rule, locality, each.endpoint.locality)
                for priority, each in zip(priorities, instances, strict=True)
            ]
        )
    endpoints = tuple(
        replace(each.endpoint, priority=priority) for priority, each in zip(priorities, instances, strict=True)
    )
    return endpoints, _weights(endpoints) if rule.is_weighted else ()


def _by_locality(rule: Nearness, mine: Locality, other: Locality) -> int:
    """0 the same place, 1 the zone, 2 the region, 3 another region, 4 one that the failover does not name."""
    if mine.region == other.region:
        if rule.regions_only:
            return 0
        if mine.zone != other.zone:
            return 2
        return 0 if mine.subzone == other.subzone else 1
    for source, target in rule.failover:
        if source == mine.region:
            return 3 if other.region == target else 4
    return 3


def _by_labels(wanted: Sequence[str], mine: Labels, instance: Instance) -> int:
    """0 where all agree. The nth label counts only if those before it agree."""
    theirs = _with_topology(instance.labels, instance.endpoint.locality)
    for index, label in enumerate(wanted):
        name, given, value = label.partition("=")
        if theirs.get(name, "") != (value if given else mine.get(name, "")):
            return len(wanted) - index
    return 0


def _with_topology(labels: Labels, locality: Locality) -> Mapping[str, str]:
    """Kubernetes' and Istio's labels for a place, which nobody has to write."""
    places = zip(r.TOPOLOGY_LABELS, (locality.region, locality.zone, locality.subzone), strict=True)
    return {**{name: place for name, place in places if place}, **labels}


def _closed_up(priorities: Sequence[int]) -> list[int]:
    """0, 3, 4 -> 0, 1, 2: xDS allows no gaps."""
    ranks = {priority: rank for rank, priority in enumerate(sorted(set(priorities)))}
    return [ranks[priority] for priority in priorities]


def _weights(endpoints: Iterable[Endpoint]) -> tuple[LocalityWeight, ...]:
    """A locality weighs what its endpoints weigh together."""
    totals: dict[tuple[int, Locality], int] = {}
    for each in endpoints:
        place = (each.priority, each.locality)
        totals[place] = totals.get(place, 0) + each.weight
    return tuple(LocalityWeight(place, priority, totals[priority, place]) for priority, place in sorted(totals))


def _distributed(
    distribute: Sequence[r.Distribute], endpoints: Sequence[Endpoint], mine: Locality
) -> tuple[tuple[Endpoint, ...], tuple[LocalityWeight, ...]]:
    """The shares of the first rule for the caller's place. A locality that it does not name gets nothing; one that a
    wildcard names with others gets its part by weight (applyLocalityWeights)."""
    usual = _weights(endpoints)
    rule = next((each for each in distribute if _is_in(mine, each.from_)), None)
    if rule is None:
        return tuple(endpoints), usual
    shares: dict[Locality, int] = {}
    for place, share in rule.to.items():
        chosen = {each.locality: each.weight for each in usual if each.locality not in shares}
        chosen = {locality: weight for locality, weight in chosen.items() if _is_in(locality, place)}
        total = sum(chosen.values())
        for locality, weight in chosen.items():
            shares[locality] = math.ceil(weight * share / total)
    return (
        tuple(each for each in endpoints if each.locality in shares),
        tuple(LocalityWeight(locality, 0, shares[locality]) for locality in sorted(shares)),
    )


def _is_in(locality: Locality, place: str) -> bool:
    """`region/zone/*`, `region/*`, `region`, `*` (util.LocalityMatch)."""
    parts = zip((locality.region, locality.zone, locality.subzone), (*place.split("/"), "", "")[:3], strict=True)
    return all(wanted in ("*", "", found) for found, wanted in parts)
