"""What do calls ask of one cluster? A picker over the endpoints that may be called now, its limits, its counters.

Built on the feed thread for each new form of the cluster; its state is carried over by reference.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from meshlib.balancing import EMPTY, Picker, Target, build_picker
from meshlib.balancing.outlier import record
from meshlib.model import Cluster, Endpoint, Health, LoadAssignment, OutlierDetection, RetryBudget
from meshlib.state import NEVER, ClusterState, EndpointState

UNLIMITED = 1 << 62


class LiveCluster:
    """One cluster: its picker over the endpoints that may be called now, and its counters.

    The picker is replaced whole when an endpoint is ejected or returns.
    """

    __slots__ = (
        "_outlier",
        "_rng",
        "_states",
        "assignment",
        "cluster",
        "max_requests",
        "max_retries",
        "name",
        "picker",
        "state",
        "targets",
    )

    def __init__(
        self,
        cluster: Cluster,
        assignment: LoadAssignment | None,
        rng: random.Random,
        previous: LiveCluster | None = None,
    ) -> None:
        self.cluster = cluster
        self.assignment = assignment
        self.name = cluster.name
        self._rng = rng
        self._outlier: OutlierDetection | None = cluster.outlier_detection
        self.state: ClusterState = previous.state if previous else ClusterState()
        endpoints = assignment.endpoints if assignment is not None else cluster.endpoints
        known: dict[str, EndpointState] = previous._states if previous else {}
        # Keyed by address alone: a new weight or zone is no reason to forget what is in flight.
        self._states: dict[str, EndpointState] = {
            e.authority: known.get(e.authority) or EndpointState() for e in endpoints
        }
        self.targets = tuple(
            Target(e, self._states[e.authority]) for e in _first_priority(endpoints) if e.health is Health.HEALTHY
        )
        limits = cluster.limits
        # An HTTP/1.1 connection carries one request, so connections plus the queue for them bound the requests.
        connections = (
            UNLIMITED
            if limits.max_connections is None
            else limits.max_connections
            + (UNLIMITED if limits.max_pending_requests is None else limits.max_pending_requests)
        )
        self.max_requests = min(connections, UNLIMITED if limits.max_requests is None else limits.max_requests)
        self.max_retries = UNLIMITED if limits.max_retries is None else limits.max_retries
        self.picker: Picker = EMPTY
        with self.state.lock:
            if self._outlier is None:
                for target in self.targets:
                    target.state.ejected_until = 0.0
            self._rebuild(0.0)

    def pick(self, now: float, tried: Sequence[Endpoint], reselect: int) -> Target | None:
        """An endpoint to call now, one that was not tried if `reselect` further picks find one (Envoy's
        host_selection_retry_max_attempts: after that, a tried one will do)."""
        if now >= self.state.next_return:
            with self.state.lock:
                self._rebuild(now)
        target = self.picker.pick()
        if tried and target is not None:
            for _ in range(reselect):
                if target is None or target.endpoint not in tried:
                    break
                target = self.picker.pick()
        return target

    def admit(self) -> bool:
        """Count a call in, unless the cluster's limits are reached. Every True is paired with one `leave`."""
        state = self.state
        with state.lock:
            if state.requests >= self.max_requests:
                state.overflows += 1
                return False
            state.requests += 1
            return True

    def leave(self) -> None:
        with self.state.lock:
            self.state.requests -= 1

    def admit_retry(self) -> bool:
        """Count a retry in, unless the budget forbids it. Every True is paired with one `leave_retry`."""
        state = self.state
        with state.lock:
            budget = self.cluster.retry_budget
            limit = self.max_retries
            if isinstance(budget, RetryBudget):  # it overrides max_retries (Envoy)
                limit = max(budget.min_concurrency, int(state.requests * budget.percent / 100))
            if state.retries >= limit:
                return False
            state.retries += 1
            return True

    def leave_retry(self) -> None:
        with self.state.lock:
            self.state.retries -= 1

    def begin(self, target: Target) -> None:
        with self.state.lock:
            target.state.in_flight += 1

    def end(self, target: Target) -> None:
        with self.state.lock:
            target.state.in_flight -= 1

    def judge(self, target: Target, status: int | None, now: float) -> None:
        """Tell outlier detection how an attempt ended; status None when no response head came."""
        if self._outlier is None:
            return
        with self.state.lock:
            if record(self._outlier, target.state, self.state, len(self._states), status, now):
                self._rebuild(now)

    def _rebuild(self, now: float) -> None:
        """A picker over the targets that are not ejected at `now`. Called with the lock held."""
        ejected = [t.state.ejected_until for t in self.targets if t.state.ejected_until > now]
        ready = [target for target in self.targets if target.state.ejected_until <= now]
        floor = self._outlier.min_health_percent if self._outlier is not None else 0
        if self._outlier is not None and 100 * len(ready) < floor * len(self.targets):
            ready = list(self.targets)  # panic: too few are left, so ejection would do more harm than good (Envoy)
        self.state.ejected = len(ejected)
        self.state.next_return = min(ejected, default=NEVER)
        self.picker = build_picker(self.cluster.load_balancing, ready, self.state, self._rng)

    def __repr__(self) -> str:
        return f"<LiveCluster {self.name} {self.picker!r}, {self.state.ejected} ejected>"


def _first_priority(endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
    """The endpoints of the first priority that has a healthy one."""
    healthy = {e.priority for e in endpoints if e.health is Health.HEALTHY}
    if len(healthy) <= 1:
        return [e for e in endpoints if e.priority in healthy]
    first = min(healthy)
    return [e for e in endpoints if e.priority == first]
