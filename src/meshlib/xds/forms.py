"""What of a snapshot can a reader use? Clusters and endpoints as Envoy's and gRPC's clients understand them.

What would have to be secured and can't be has no endpoints: calls on it fail at once, and none goes out as plaintext.
"""

from __future__ import annotations

from dataclasses import replace

from meshlib.model import Cluster, ClusterType, LoadAssignment, Snapshot
from meshlib.xds.reader import Dialect, Reader


def understood(snapshot: Snapshot, reader: Reader) -> tuple[tuple[Cluster, ...], tuple[LoadAssignment, ...]]:
    """Clusters, and assignments of those that have one. What a reader understands as it is stays the very object."""
    assignments = {each.cluster: each for each in snapshot.assignments}
    found: list[Cluster] = []
    for given in snapshot.clusters:
        cluster = _secured(given, reader)
        if cluster is not None and reader.dialect is Dialect.GRPC:
            cluster = _for_grpc(cluster)
            if cluster is not None and cluster.tls is not None and cluster.tls.auto:
                # gRPC secures a cluster or does not: once some endpoints have mTLS, they are the ones that it calls.
                cluster = replace(cluster, tls=replace(cluster.tls, auto=False))
                if cluster.name in assignments:
                    assignments[cluster.name] = _meshed(assignments[cluster.name])
        if cluster is None:
            # Left out, C-core would wait 15 seconds for it (its does-not-exist timer).
            cluster = replace(given, type=ClusterType.EDS, tls=None, endpoints=(), health_checks=())
            assignments[given.name] = LoadAssignment(given.name)
        found.append(cluster)
    return tuple(found), tuple(assignments[each.name] for each in found if each.name in assignments)


# None: it can't be called as is meant.


def _secured(cluster: Cluster, reader: Reader) -> Cluster | None:
    if cluster.tls is None or not cluster.tls.is_mesh or reader.has_certificates:
        return cluster
    if reader.dialect in (Dialect.GRPC, Dialect.ENVOY):
        # Auto-mTLS is for where both sides can; what is asked for is a demand.
        return replace(cluster, tls=None) if cluster.tls.auto else None
    return cluster


def _for_grpc(cluster: Cluster) -> Cluster | None:
    if cluster.tls is not None and not cluster.tls.is_mesh:
        return None  # its certificates come from providers of the bootstrap (gRFC A29), not from files
    if cluster.type is ClusterType.EDS:
        return cluster
    if cluster.type in (ClusterType.LOGICAL_DNS, ClusterType.STRICT_DNS) and len(cluster.endpoints) == 1:
        return replace(cluster, type=ClusterType.LOGICAL_DNS)  # gRFC A37: one name
    return None


def _meshed(assignment: LoadAssignment) -> LoadAssignment:
    """Only the endpoints that serve the mesh's mTLS. Priorities count from 0 without a gap, or gRPC refuses them."""
    kept = [each for each in assignment.endpoints if each.is_meshed]
    if len(kept) == len(assignment.endpoints):
        return assignment
    numbers = {priority: index for index, priority in enumerate(sorted({each.priority for each in kept}))}
    return replace(
        assignment,
        endpoints=tuple(replace(each, priority=numbers[each.priority]) for each in kept),
        locality_weights=tuple(
            replace(each, priority=numbers[each.priority])
            for each in assignment.locality_weights
            if each.priority in numbers
        ),
    )
