"""What do calls read? Live: a Snapshot compiled for the hot path, replaced whole, never edited.

`compile_live` runs on the feed thread. What did not change is taken over by reference, with all its counters, so an
update costs what changed and no call notices it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import MappingProxyType

from meshlib.model import NOWHERE, PASSTHROUGH, Cluster, ClusterType, Locality, Snapshot
from meshlib.policy.cluster import LiveCluster
from meshlib.policy.guard import Guard, guard_of
from meshlib.policy.rate_limit import Limiter
from meshlib.policy.router import Router, RouteTable


class Live:
    """Everything a call reads."""

    __slots__ = ("_passthrough", "clusters", "guard", "router", "snapshot")

    def __init__(
        self,
        snapshot: Snapshot,
        router: Router,
        clusters: Mapping[str, LiveCluster],
        passthrough: LiveCluster,
        guard: Guard,
    ) -> None:
        self.snapshot = snapshot
        self.router = router
        self.clusters = clusters
        self.guard = guard
        self._passthrough = passthrough

    @property
    def limiters(self) -> list[Limiter]:
        """Of calls out and of calls in."""
        out = [each.limiter for each in self.clusters.values() if each.limiter is not None]
        return out + self.guard.limiters

    def cluster(self, name: str) -> LiveCluster | None:
        found = self.clusters.get(name)
        if found is None and name == PASSTHROUGH:
            return self._passthrough
        return found

    def __repr__(self) -> str:
        return f"<Live {self.snapshot!r}>"


def compile_live(
    snapshot: Snapshot,
    previous: Live | None,
    rng: random.Random,
    here: Locality = NOWHERE,
    now: float = 0.0,
    denies: bool = False,
) -> Live:
    """Matchers, pickers and limits for `snapshot`; takes over from `previous` whatever is unchanged.

    here: where this process runs. now: monotonic seconds. denies: calls in plaintext to hosts that nobody has
    answered for.
    """
    old_tables = previous.router.tables if previous else {}
    tables: dict[str, RouteTable] = {}
    for configuration in snapshot.route_configurations:
        kept = old_tables.get(configuration.name)
        same = kept is not None and kept.configuration == configuration
        tables[configuration.name] = kept if kept is not None and same else RouteTable(configuration, rng)

    assignments = {assignment.cluster: assignment for assignment in snapshot.assignments}
    old_clusters = previous.clusters if previous else {}
    clusters: dict[str, LiveCluster] = {}
    for cluster in snapshot.clusters:
        assignment = assignments.get(cluster.name)
        before = old_clusters.get(cluster.name)
        if before is not None and before.cluster == cluster and before.assignment == assignment:
            clusters[cluster.name] = before
        else:
            clusters[cluster.name] = LiveCluster(cluster, assignment, rng, before, here, now)

    passthrough = (
        previous._passthrough
        if previous
        else LiveCluster(Cluster(PASSTHROUGH, type=ClusterType.ORIGINAL_DST), None, rng)
    )
    guard = guard_of(snapshot, previous.guard if previous else None, previous.snapshot if previous else None)
    return Live(snapshot, Router(snapshot, tables, denies), MappingProxyType(clusters), passthrough, guard)


def empty_live(rng: random.Random, denies: bool = False) -> Live:
    """Before any configuration: knows no host, so every call asks the feed. denies: as for `compile_live`."""
    return compile_live(Snapshot(), None, rng, denies=denies)
