"""What of a snapshot can a reader use? Clusters, endpoints and routes as Envoy's and gRPC's clients understand them.

What would have to be secured and can't be has no endpoints: calls on it fail at once, and none goes out as plaintext.
gRPC refuses all routes of a host for one condition that it does not know, or finds that a header that is not there
never matches: its routes mean the same in the words that it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

from meshlib.model import (
    Cluster,
    ClusterType,
    Forward,
    HeaderMatch,
    LoadAssignment,
    Route,
    RouteConfiguration,
    Snapshot,
    StringMatch,
)
from meshlib.xds.encode_matches import regex_of
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


# Routes

MAX_ALTERNATIVES = 16
"""Routes that one may become."""
_ABSENT = StringMatch("present")


def understood_routes(table: RouteConfiguration, reader: Reader) -> RouteConfiguration:
    """The very object where the reader understands all of it."""
    if reader.dialect is not Dialect.GRPC:
        return table
    hosts = []
    for host in table.virtual_hosts:
        routes = tuple(each for route in host.routes for each in _routes_for_grpc(route))
        hosts.append(host if routes == host.routes else replace(host, routes=routes))
    is_same = all(one is other for one, other in zip(hosts, table.virtual_hosts, strict=True))
    return table if is_same else replace(table, virtual_hosts=tuple(hosts))


def _routes_for_grpc(route: Route) -> Iterator[Route]:
    """gRFC A28: of the path exact, prefix and regex, and headers. Every call is a POST, in the mesh by http, without a
    query, and carries no token that anybody has looked at."""
    match = route.match
    never = match.claims or match.query or not _is(match.method, "POST") or not _is(match.scheme, "http")
    if never:
        return
    action = route.action
    if isinstance(action, Forward) and action.retry is not None and action.retry.attempts < 1:
        action = replace(action, retry=None)  # "must be >= 1" (gRFC A44)
    for headers in _alternatives(match.headers):
        plain = replace(match, path=_path(match.path), method=None, scheme=None, headers=headers)
        yield replace(route, match=plain, action=action)


def _is(condition: StringMatch | None, value: str) -> bool:
    if condition is None:
        return True
    wanted, found = condition.value, value
    if condition.ignore_case:
        wanted, found = wanted.lower(), found.lower()
    match condition.kind:
        case "exact":
            return found == wanted
        case "prefix":
            return found.startswith(wanted)
        case "suffix":
            return found.endswith(wanted)
        case "contains":
            return wanted in found
        case "regex":
            import re2

            return re2.fullmatch(regex_of(condition), value) is not None
    return True  # it is there


def _path(condition: StringMatch | None) -> StringMatch | None:
    if condition is None or condition.kind != "path-prefix":
        return condition
    stem = condition.value.rstrip("/")
    if not stem:
        return None
    return StringMatch("regex", f"{re.escape(stem)}(/.*)?", condition.ignore_case)


def _alternatives(headers: tuple[HeaderMatch, ...]) -> Iterable[tuple[HeaderMatch, ...]]:
    """Without a header, gRPC takes none of its conditions for true, not even an inverted one: so "is not a" is
    "is not there", or "is there and not a". Where there are too many, what comes last of them must be there."""
    choices: list[tuple[HeaderMatch, ...]] = []
    total = 1
    for each in headers:
        choice: tuple[HeaderMatch, ...] = (each,)
        if each.invert and each.match.kind != "present" and total < MAX_ALTERNATIVES:
            total *= 2
            choice = (each, HeaderMatch(each.name, _ABSENT, invert=True))
        choices.append(choice)
    return product(*choices)
