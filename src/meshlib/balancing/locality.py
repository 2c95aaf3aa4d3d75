"""Which priority, and which zone? Shares of the load between groups of endpoints, and a picker for each group.

Priorities: a lower one gets load only as far as those above it can't take all of it, each counted for 1.4 times its
healthy share (Envoy's overprovisioning factor; arch_overview/upstream/load_balancing/priority). Localities: by their
weights (locality_weight.rst) or, zone-aware, the own one first (zone_aware.rst).
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from meshlib.balancing.hashing import HashPicker, Table, build_table
from meshlib.balancing.picker import EMPTY, HASHING, Picker, Target, build_picker
from meshlib.model import NOWHERE, Cluster, Endpoint, Health, Locality, LocalityWeight, SlowStart
from meshlib.state import ClusterState

OVERPROVISIONING = 140
_WEIGHT_SCALE = 1000
"""Weights are whole numbers; slow start needs parts of them."""


class Share(NamedTuple):
    """What a priority gets: percent of the load, and whether it is in panic (all its endpoints serve)."""

    percent: int
    is_panicking: bool


def priority_shares(health: Sequence[tuple[int, int]], panic_percent: int) -> tuple[Share, ...]:
    """health: (healthy, all) endpoints by priority. The shares sum to 100, or are all 0 when nobody can be called.

    Whole percents, as Envoy counts: of 72 percent healthy in the first, nothing overflows; of 71, 1 percent.
    """
    able = [min(100, OVERPROVISIONING * healthy // total) if total else 0 for healthy, total in health]
    norm = min(100, sum(able))
    if not norm:
        everyone = sum(total for _, total in health)
        if not panic_percent or not everyone:
            return tuple(Share(0, False) for _ in health)
        # Total panic: by the number of endpoints (Envoy, recalculateLoadInTotalPanic).
        return _rounded([100 * total // everyone for _, total in health], [True] * len(health))
    left = 100
    shares = []
    for each in able:
        share = min(left, each * 100 // norm)
        shares.append(share)
        left -= share
    panics = [norm < 100 and bool(total) and 100 * healthy < panic_percent * total for healthy, total in health]
    return _rounded(shares, panics)


def _rounded(shares: list[int], panics: list[bool]) -> tuple[Share, ...]:
    """What rounding has left over goes to the first that gets any (Envoy)."""
    first = next(index for index, share in enumerate(shares) if share)
    shares[first] += 100 - sum(shares)
    return tuple(map(Share, shares, panics))


class _Group(NamedTuple):
    """The endpoints of one priority; hosts: how many there are, those included that the control plane calls ill."""

    priority: int
    targets: tuple[Target, ...]
    hosts: int
    table: Table | None


class Pool:
    """All endpoints of a cluster, grouped. Immutable; `picker` is made anew when somebody is ejected or returns."""

    __slots__ = ("_cluster", "_groups", "_here", "_hosts_by_locality", "_rng", "_state", "_weights")

    def __init__(
        self,
        cluster: Cluster,
        endpoints: Sequence[Endpoint],
        targets: Sequence[Target],
        locality_weights: Sequence[LocalityWeight],
        here: Locality,
        state: ClusterState,
        rng: random.Random,
    ) -> None:
        self._cluster, self._here, self._state, self._rng = cluster, here, state, rng
        self._weights = {(each.priority, each.locality): each.weight for each in locality_weights}
        self._hosts_by_locality: dict[tuple[int, Locality], int] = {}
        hosts: dict[int, int] = {}
        for endpoint in endpoints:
            if endpoint.health is not Health.DRAINING:
                hosts[endpoint.priority] = hosts.get(endpoint.priority, 0) + 1
                place = (endpoint.priority, endpoint.locality)
                self._hosts_by_locality[place] = self._hosts_by_locality.get(place, 0) + 1
        groups = []
        for priority in sorted(hosts):
            members = tuple(target for target in targets if target.endpoint.priority == priority)
            table = None
            if members and cluster.load_balancing in HASHING:
                table = build_table(cluster, members, self._hash_weights(priority, members))
            groups.append(_Group(priority, members, hosts[priority], table))
        self._groups = tuple(groups)

    def _hash_weights(self, priority: int, members: Sequence[Target]) -> list[float]:
        """A table holds all localities: an endpoint has its part of its locality's weight."""
        if not self._cluster.locality_weighted:
            return [float(target.endpoint.weight) for target in members]
        sums: dict[Locality, int] = {}
        for target in members:
            sums[target.endpoint.locality] = sums.get(target.endpoint.locality, 0) + target.endpoint.weight
        found = [
            self._weights.get((priority, target.endpoint.locality), 0)
            * target.endpoint.weight
            / sums[target.endpoint.locality]
            for target in members
        ]
        return found if any(found) else [1.0] * len(members)

    def picker(self, is_ready: Callable[[Target], bool], panic_percent: int, now: float) -> Picker:
        """A picker over those that `is_ready` says can be called. O(endpoints)."""
        if len(self._groups) == 1 and not panic_percent:
            return self._group_picker(self._groups[0], is_ready, now)
        counts = [(sum(map(is_ready, group.targets)), group.hosts) for group in self._groups]
        shares = priority_shares(counts, panic_percent)
        pickers = [
            self._group_picker(group, _everyone if share.is_panicking else is_ready, now) if share.percent else EMPTY
            for group, share in zip(self._groups, shares, strict=True)
        ]
        if not any(share.percent for share in shares):
            return EMPTY
        if len(self._groups) == 1:
            return pickers[0]

        def avoiding(priorities: Collection[int]) -> Picker:
            """As if these priorities had nobody."""
            rest = [
                (0, 0) if group.priority in priorities else count
                for group, count in zip(self._groups, counts, strict=True)
            ]
            again = priority_shares(rest, panic_percent)
            if not any(share.percent for share in again):
                return EMPTY
            made = [
                self._group_picker(group, _everyone if share.is_panicking else is_ready, now)
                if share.percent
                else EMPTY
                for group, share in zip(self._groups, again, strict=True)
            ]
            return _Shared([share.percent for share in again], made, self._rng)

        return _Priorities([share.percent for share in shares], pickers, self._rng, avoiding)

    def _group_picker(self, group: _Group, is_ready: Callable[[Target], bool], now: float) -> Picker:
        cluster = self._cluster
        if group.table is not None:
            return HashPicker(cluster.load_balancing.lower(), group.table, group.targets, is_ready, self._rng)
        ready = [target for target in group.targets if is_ready(target)]
        if not ready:
            return EMPTY
        if cluster.locality_weighted:
            return self._by_locality(group, ready, self._locality_loads(group, ready), now)
        if cluster.zone_aware is not None and group is self._groups[0]:
            loads = self._zone_loads(group, ready)
            if loads:
                return self._by_locality(group, ready, loads, now)
        return self._leaf((group.priority,), ready, now)

    def _leaf(self, place: tuple[object, ...], targets: Sequence[Target], now: float) -> Picker:
        turn = self._state.turns.setdefault(place, [0])
        weights = weights_now(self._cluster.slow_start, targets, now)
        return build_picker(self._cluster, targets, weights, turn, self._rng)

    def _by_locality(self, group: _Group, ready: Sequence[Target], loads: dict[Locality, float], now: float) -> Picker:
        members: dict[Locality, list[Target]] = {}
        for target in ready:
            members.setdefault(target.endpoint.locality, []).append(target)
        places = [place for place in sorted(members) if loads.get(place, 0) > 0]
        if not places:
            return EMPTY
        pickers = [self._leaf((group.priority, place), members[place], now) for place in places]
        if len(places) == 1:
            return pickers[0]
        return _Shared([loads[place] for place in places], pickers, self._rng)

    def _locality_loads(self, group: _Group, ready: Sequence[Target]) -> dict[Locality, float]:
        """weight * min(100, 140 * healthy / all); a locality without a weight gets nothing."""
        healthy: dict[Locality, int] = {}
        for target in ready:
            healthy[target.endpoint.locality] = healthy.get(target.endpoint.locality, 0) + 1
        loads = {}
        for place, count in healthy.items():
            hosts = self._hosts_by_locality[group.priority, place]
            weight = self._weights.get((group.priority, place), 0)
            loads[place] = weight * min(100.0, OVERPROVISIONING * count / hosts)
        return loads

    def _zone_loads(self, group: _Group, ready: Sequence[Target]) -> dict[Locality, float]:
        """{} where zone awareness does not apply. The callers' own distribution over zones, which Envoy takes from its
        local cluster, is taken for even: a process does not know the other callers."""
        rules = self._cluster.zone_aware
        assert rules is not None
        here = self._here
        if here == NOWHERE or len(ready) < rules.min_cluster_size:
            return {}
        if self._rng.random() * 100 >= rules.routing_percent:
            return {}
        counts: dict[Locality, int] = {}
        for target in ready:
            counts[target.endpoint.locality] = counts.get(target.endpoint.locality, 0) + 1
        if here not in counts or len(counts) < 2:
            return {}
        even, upstream = 1 / len(counts), {place: count / len(ready) for place, count in counts.items()}
        if upstream[here] >= even:
            return {here: 1.0}
        # The own zone takes what it can carry; the rest goes where there is more than its callers need.
        loads = {here: upstream[here] / even}
        spare = {place: max(0.0, share - even) for place, share in upstream.items() if place != here}
        total = sum(spare.values())
        for place, share in spare.items():
            loads[place] = (1 - loads[here]) * share / total if total else 0.0
        return loads

    def __repr__(self) -> str:
        return f"<Pool {self._cluster.name} {[len(group.targets) for group in self._groups]}>"


def _everyone(_: Target) -> bool:
    return True


def weights_now(slow_start: SlowStart | None, targets: Sequence[Target], now: float) -> list[int]:
    """What each endpoint counts for: its weight, or the part of it that slow start allows at its age."""
    if slow_start is None or not any(_is_young(target, slow_start, now) for target in targets):
        return [target.endpoint.weight for target in targets]
    floor = slow_start.min_weight_percent / 100
    found = []
    for target in targets:
        factor = 1.0
        if _is_young(target, slow_start, now):
            age = max(now - target.state.joined_at, 1.0) / slow_start.window
            factor = max(floor, age ** (1 / slow_start.aggression))
        found.append(max(1, int(target.endpoint.weight * _WEIGHT_SCALE * min(1.0, factor))))
    return found


def _is_young(target: Target, slow_start: SlowStart, now: float) -> bool:
    return now - target.state.joined_at < slow_start.window


def has_young(slow_start: SlowStart | None, targets: Sequence[Target], now: float) -> bool:
    """Whether weights change with time."""
    return slow_start is not None and any(_is_young(target, slow_start, now) for target in targets)


class _Shared:
    """Several pickers, each with its share of the calls."""

    __slots__ = ("_pickers", "_random", "_sums")

    def __init__(self, shares: Sequence[float], pickers: Sequence[Picker], rng: random.Random) -> None:
        kept = [(share, picker) for share, picker in zip(shares, pickers, strict=True) if share > 0]
        total = 0.0
        self._sums = [total := total + share for share, _ in kept]
        self._pickers = tuple(picker for _, picker in kept)
        self._random = rng.random

    def pick(
        self, now: float = 0.0, key: int | None = None, attempt: int = 0, avoid: Collection[int] = ()
    ) -> Target | None:
        if len(self._pickers) == 1:
            return self._pickers[0].pick(now, key, attempt)
        # A key decides for its group, too: equal keys go to equal endpoints.
        part = self._random() if key is None else (key >> 11) / (1 << 53)
        return self._pickers[bisect(self._sums, part * self._sums[-1])].pick(now, key, attempt)

    def __repr__(self) -> str:
        return f"<Picker of {len(self._pickers)} groups {list(self._pickers)!r}>"


class _Priorities(_Shared):
    """Also knows how to leave priorities out, for retries (Envoy's previous_priorities)."""

    __slots__ = ("_avoiding",)

    def __init__(
        self,
        shares: Sequence[float],
        pickers: Sequence[Picker],
        rng: random.Random,
        avoiding: Callable[[Collection[int]], Picker],
    ) -> None:
        super().__init__(shares, pickers, rng)
        self._avoiding = avoiding

    def pick(
        self, now: float = 0.0, key: int | None = None, attempt: int = 0, avoid: Collection[int] = ()
    ) -> Target | None:
        if avoid:
            other = self._avoiding(avoid).pick(now, key, attempt)
            if other is not None:
                return other  # and when nobody is left elsewhere, anyone will do
        return super().pick(now, key, attempt)
