"""Which consistent Snapshot can be made of the resources that have arrived, and what else must be asked for?

gRFC A74's dependency manager, per resource instead of per channel. A listener leads to route configurations, these to
clusters (mirrors too), an EDS cluster to its load assignment. From the bottom up, each name gets an EFFECTIVE entry:

    there, and nothing that it leads to is pending -> the new value
    pending: not known yet, or leads to a pending  -> what was effective before, if anything was
    missing: it is known that there is none        -> nothing, or an empty value where its parent needs one

So a new route waits for its clusters and their endpoints while the old one serves (make before break), a route that
waits holds back nobody but the listeners that name it, and nothing waits for ever: the session's does-not-exist timer
settles what no one answers. A route may lead to a missing cluster (calls get 503 NC, as with Envoy); a listener whose
routes are missing gets none (404 NR), and a cluster without an assignment has no endpoints (503 UH). Rules for calls
that come in which can't be used, with none from before in their place, let nobody in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from meshlib.model import (
    NEVER,
    Access,
    AccessRule,
    Action,
    Cluster,
    ClusterType,
    Inbound,
    Listener,
    LoadAssignment,
    RouteConfiguration,
    Snapshot,
)
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE
from meshlib.xds.session import Entry, Session, State

REMOVAL_GRACE = 2.0
"""For so long what is in use counts as pending once the server has removed it. Clusters are pushed before routes, so a
cluster that goes with its last route may be removed a moment before that route is."""

Parts = dict[str, dict[str, Entry]]
"""Entries by type and name. One without a value stands for an empty RouteConfiguration or LoadAssignment."""


class Assembly:
    """Follows the references in one Session. Not thread-safe.

    wildcard: a gateway, which gets every listener and cluster without naming it.
    """

    def __init__(self, session: Session, *, wildcard: bool = False) -> None:
        self._session = session
        self._wildcard = wildcard
        self._effective: Parts = {LISTENER: {}, ROUTE: {}, CLUSTER: {}, ENDPOINT: {}}
        self._removals: dict[tuple[str, str], float] = {}
        self._clusters_of: dict[str, tuple[RouteConfiguration, tuple[str, ...]]] = {}
        self.parts: Parts = {}
        """What the last snapshot was made of."""

    @property
    def next_deadline(self) -> float | None:
        """When another `update` may come to another result, though nothing has arrived."""
        return min(self._removals.values(), default=None)

    def update(self, wanted: Collection[str], version: str, now: float, inbound: str = "") -> Snapshot:
        """Subscribe what the listeners `wanted` lead to; returns the newest consistent Snapshot, named `version`.

        inbound: the name of the listener for calls that come in; "" is none.
        """
        self._session.subscribe(LISTENER, (*wanted, inbound) if inbound else wanted)
        needed = self._follow()
        before, graces = self._effective, self._removals
        self._effective, self._removals = {type_url: {} for type_url in before}, {}

        def settle(type_url: str, leads_on: Callable[[Entry], bool]) -> set[str]:
            """Choose the effective entries of a type; returns the names that have none, because they are pending."""
            pending = set()
            for name in needed[type_url]:
                entry, old = self._session.entry(type_url, name), before[type_url].get(name)
                if entry is not None and entry.value is not None:
                    if leads_on(entry):
                        self._effective[type_url][name] = entry
                        continue
                    is_pending = True
                else:
                    is_pending = self._is_awaited(type_url, entry)
                    if not is_pending and old is not None and old.value is not None and type_url != LISTENER:
                        until = graces.get((type_url, name), now + REMOVAL_GRACE)
                        if now < until:
                            self._removals[type_url, name] = until
                            is_pending = True
                if not is_pending:
                    if type_url in (ROUTE, ENDPOINT):
                        self._effective[type_url][name] = entry or Entry(State.DOES_NOT_EXIST)
                elif old is not None:
                    self._effective[type_url][name] = old
                else:
                    pending.add(name)
            return pending

        pending = settle(ENDPOINT, lambda _: True)
        pending = settle(CLUSTER, lambda entry: pending.isdisjoint(self._leads_to(entry)))
        pending = settle(ROUTE, lambda entry: pending.isdisjoint(self._leads_to(entry)))
        settle(LISTENER, lambda entry: pending.isdisjoint(self._leads_to(entry)))
        needed = self._follow()  # again: what only the old values led to is no longer needed
        self._removals = {key: until for key, until in self._removals.items() if key[1] in needed[key[0]]}
        self.parts = self._reachable()
        return self._snapshot(wanted, version, inbound)

    def _follow(self) -> dict[str, list[str]]:
        """Subscribe, and return by type, what the newest values lead to, and the effective ones as long as they are."""
        needed = {LISTENER: self._session.names(LISTENER)}
        for parent, child in ((LISTENER, ROUTE), (ROUTE, CLUSTER), (CLUSTER, ENDPOINT)):
            found: set[str] = set()
            for name in needed[parent]:
                for entry in (self._session.entry(parent, name), self._effective[parent].get(name)):
                    found.update(self._leads_to(entry))
            if child == CLUSTER and self._wildcard:
                found.update(self._session.names(CLUSTER), self._effective[CLUSTER])
            else:
                self._session.subscribe(child, found)
            needed[child] = sorted(found)
        self._clusters_of = {name: kept for name, kept in self._clusters_of.items() if name in needed[ROUTE]}
        return needed

    def _leads_to(self, entry: Entry | None) -> tuple[str, ...]:
        match entry.value if entry is not None else None:
            case Listener() as listener:
                return listener.route_configurations
            case RouteConfiguration() as routes:
                kept = self._clusters_of.get(routes.name)
                if kept is None or kept[0] is not routes:  # by identity: hundreds of routes are walked once, not always
                    kept = self._clusters_of[routes.name] = (routes, tuple(_clusters_of(routes)))
                return kept[1]
            case Cluster(name=name, type=ClusterType.EDS):
                return (name,)
            case _:
                return ()

    def _is_awaited(self, type_url: str, entry: Entry | None) -> bool:
        if entry is None:
            return not (self._wildcard and type_url == CLUSTER and self._session.is_answered(CLUSTER))
        return entry.state is State.REQUESTED

    def _reachable(self) -> Parts:
        """The effective entries, without those that wait for a parent which is not effective yet."""
        parts: Parts = {LISTENER: self._effective[LISTENER]}
        for parent, child in ((LISTENER, ROUTE), (ROUTE, CLUSTER), (CLUSTER, ENDPOINT)):
            names = {name for entry in parts[parent].values() for name in self._leads_to(entry)}
            if child == CLUSTER and self._wildcard:
                names.update(self._effective[CLUSTER])
            effective = self._effective[child]
            parts[child] = {name: effective[name] for name in sorted(names) if name in effective}
        return parts

    def _snapshot(self, wanted: Iterable[str], version: str, inbound: str) -> Snapshot:
        listeners, routes, clusters, assignments = (self.parts[t] for t in (LISTENER, ROUTE, CLUSTER, ENDPOINT))
        return Snapshot(
            version=version,
            listeners=tuple(e.value for _, e in sorted(listeners.items()) if isinstance(e.value, Listener)),
            route_configurations=tuple(
                e.value if isinstance(e.value, RouteConfiguration) else RouteConfiguration(name, ())
                for name, e in routes.items()
            ),
            clusters=tuple(e.value for e in clusters.values() if isinstance(e.value, Cluster)),
            assignments=tuple(
                e.value if isinstance(e.value, LoadAssignment) else LoadAssignment(name)
                for name, e in assignments.items()
            ),
            complete=self._wildcard and self._session.is_answered(LISTENER),
            absent=tuple(name for name in sorted(wanted) if self._is_absent(name)),
            inbound=(
                *(e.value for _, e in sorted(listeners.items()) if isinstance(e.value, Inbound)),
                *self._closed(inbound),
            ),
        )

    def _closed(self, name: str) -> Iterable[Inbound]:
        """In the place of rules that were sent, can't be used, and follow on none: whoever wrote them meant to keep
        somebody out, and nobody can say whom."""
        entry = self._session.entry(LISTENER, name)
        if entry is not None and entry.state is State.NACKED and entry.value is None:
            rule = AccessRule("unreadable", Action.ALLOW, NEVER, origin=f"rules that can't be used: {entry.error}")
            yield Inbound(name, access=Access((rule,)))

    def _is_absent(self, name: str) -> bool:
        entry = self._session.entry(LISTENER, name)
        return entry is not None and entry.state is State.DOES_NOT_EXIST


def _clusters_of(routes: RouteConfiguration) -> dict[str, None]:
    """In the order in which they are first named."""
    found: dict[str, None] = {}
    for host in routes.virtual_hosts:
        for route in host.routes:
            found.update(dict.fromkeys(route.clusters))
    return found
