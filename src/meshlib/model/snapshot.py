"""What does one process know of the mesh? A Snapshot: one versioned, consistent set of configuration.

The same class stands on both sides of the wire: the control plane translates YAML into one, a client decodes one.
The consistency check lives beside the value (as in go-control-plane's cache/v3/snapshot.go), so no one can hold a
Snapshot that names what it does not have without being able to ask.
"""

from __future__ import annotations

from dataclasses import replace

from meshlib.model.access import Inbound
from meshlib.model.cluster import Cluster, ClusterType, LoadAssignment
from meshlib.model.reporting import AS_SET, Reporting
from meshlib.model.route import Listener, RouteConfiguration
from meshlib.model.values import dataclass


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All tuples are sorted by name and hold each name once. `version` is for people and logs; equality of two
    snapshots' content is `same_content`.

    complete: every host that no listener names is outside the registry; a client of an on-demand feed holds an
    incomplete one. absent: authorities (`host:port`) that were asked for and do not exist, sorted.
    inbound: how this workload is called; () where the feed has not said.
    """

    version: str = ""
    listeners: tuple[Listener, ...] = ()
    route_configurations: tuple[RouteConfiguration, ...] = ()
    clusters: tuple[Cluster, ...] = ()
    assignments: tuple[LoadAssignment, ...] = ()
    complete: bool = False
    absent: tuple[str, ...] = ()
    inbound: tuple[Inbound, ...] = ()

    @property
    def reporting(self) -> Reporting:
        """What is told of this process's calls: the same in whatever says it."""
        said = [each.reporting for each in self.inbound] + [each.reporting for each in self.listeners[:1]]
        return next((each for each in said if each is not None), AS_SET)

    def tapped(self) -> Snapshot:
        """The same configuration of a process in which every call leaves its spans."""
        told = self.reporting.tapped()
        return replace(
            self,
            listeners=tuple(replace(each, reporting=told) for each in self.listeners),
            inbound=tuple(replace(each, reporting=told) for each in self.inbound),
        )

    def same_content(self, other: Snapshot) -> bool:
        """Whether only the version differs."""
        return replace(self, version="") == replace(other, version="")

    def inconsistencies(self) -> tuple[str, ...]:
        """One sentence for each reference that leads nowhere; () when the snapshot is consistent.

        A route may name a cluster that is not there (a subset that no DestinationRule defines): Istio accepts that,
        and calls on it get 503 NC. So it is not an inconsistency.
        """
        found: list[str] = []
        for kind, names in (
            ("listener", [listener.name for listener in self.listeners]),
            ("route configuration", [routes.name for routes in self.route_configurations]),
            ("cluster", [cluster.name for cluster in self.clusters]),
            ("load assignment", [assignment.cluster for assignment in self.assignments]),
            ("inbound listener", [inbound.name for inbound in self.inbound]),
        ):
            if names != sorted(set(names)):
                found.append(f"{kind} names are not sorted and unique")
        routes = {configuration.name for configuration in self.route_configurations}
        for listener in self.listeners:
            for wanted in listener.route_configurations:
                if wanted not in routes:
                    found.append(f"listener {listener.name!r} names route configuration {wanted!r}, which is missing")
        assigned = {assignment.cluster for assignment in self.assignments}
        for cluster in self.clusters:
            if cluster.type is ClusterType.EDS and cluster.name not in assigned:
                found.append(f"cluster {cluster.name!r} has no load assignment")
        return tuple(found)

    def __repr__(self) -> str:
        return (
            f"<Snapshot {self.version or 'unversioned'} {len(self.listeners)} listeners, "
            f"{len(self.clusters)} clusters, {sum(len(a.endpoints) for a in self.assignments)} endpoints>"
        )
