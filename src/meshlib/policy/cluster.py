"""What do calls ask of one cluster? A picker over the endpoints that may be called now, its limits, its counters.

Built on the feed thread for each new form of the cluster; its state is carried over by reference.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from typing import Any

from meshlib.balancing import EMPTY, HASHING, Picker, Target, client_weighted, load_report, peak_ewma
from meshlib.balancing.locality import Pool, has_young
from meshlib.balancing.outlier import Detector
from meshlib.model import (
    NOWHERE,
    Cluster,
    Endpoint,
    Health,
    LoadAssignment,
    LoadBalancing,
    Locality,
    Outcome,
    RetryBudget,
)
from meshlib.policy.retry import CLIENT_TIMEOUT, LOCAL, TIMEOUT
from meshlib.state import NEVER, ClusterState, EndpointState

UNLIMITED = 1 << 62
_SLOW_START_STEPS = 20
"""How many steps a weight takes from slow start's beginning to its end."""


class LiveCluster:
    """One cluster: its picker over the endpoints that may be called now, and its counters.

    The picker is replaced whole when an endpoint is ejected or returns. `targets` are the endpoints that the control
    plane calls healthy, of all priorities and zones.
    """

    __slots__ = (
        "_detector",
        "_is_hashing",
        "_measures",
        "_pool",
        "_states",
        "assignment",
        "breaker",
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
        here: Locality = NOWHERE,
        now: float = 0.0,
    ) -> None:
        self.cluster = cluster
        self.assignment = assignment
        self.name = cluster.name
        self.state: ClusterState = previous.state if previous else ClusterState()
        endpoints = assignment.endpoints if assignment is not None else cluster.endpoints
        known: dict[str, EndpointState] = previous._states if previous else {}
        # Keyed by address alone: a new weight or zone is no reason to forget what is in flight.
        self._states: dict[str, EndpointState] = {
            e.authority: known.get(e.authority) or EndpointState(now) for e in endpoints
        }
        self.targets = tuple(Target(e, self._states[e.authority]) for e in endpoints if e.health is Health.HEALTHY)
        self._is_hashing = cluster.load_balancing in HASHING
        weights = assignment.locality_weights if assignment is not None else ()
        self._pool = Pool(cluster, endpoints, self.targets, weights, here, self.state, rng)
        rules = cluster.outlier_detection
        self._detector: Detector | None = None
        if rules is not None:
            shadow = "outlier-detection" in cluster.shadow
            self._detector = Detector(rules, self.state, len(self._states), rng, shadow)
        self._measures = self._detector is not None or cluster.load_balancing in (
            LoadBalancing.PEAK_EWMA,
            LoadBalancing.CLIENT_SIDE_WEIGHTED_ROUND_ROBIN,
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
        self.breaker: Any = None
        with self.state.lock:
            if self._detector is None:
                for state in self._states.values():
                    state.is_ejected = False
            self.state.ejected = sum(state.is_ejected for state in self._states.values())
            self.state.rebuild = self._rebuild
            self._rebuild(now)
            self.state.next_sweep = self._next_sweep(now)

    @property
    def everyone(self) -> tuple[Target, ...]:
        """All endpoints that the control plane names, with those that get no call."""
        endpoints = self.assignment.endpoints if self.assignment is not None else self.cluster.endpoints
        return tuple(Target(each, self._states[each.authority]) for each in endpoints)

    def pick(
        self,
        now: float,
        tried: Sequence[Endpoint],
        reselect: int,
        key: int | None = None,
        avoid_priorities: Collection[int] = (),
    ) -> Target | None:
        """An endpoint to call now, one that was not tried if `reselect` further picks find one (Envoy's
        host_selection_retry_max_attempts: after that, a tried one will do).

        key: the request's hash (policy/hash_key); with it there is no reselecting (Istio leaves the previous-hosts
        predicate out), a retry looks up what comes next. avoid_priorities: those to leave out if there are others.
        """
        if now >= self.state.next_sweep:
            self._sweep(now)
        if not tried:
            return self.picker.pick(now, key)
        target = self.picker.pick(now, key, len(tried), avoid_priorities)
        if not self._is_hashing:
            for _ in range(reselect):
                if target is None or target.endpoint not in tried:
                    break
                target = self.picker.pick(now, key, 0, avoid_priorities)
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

    def admit_retry(self, now: float) -> bool:
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

    def judge(self, target: Target, outcome: Outcome, seconds: float, now: float) -> None:
        """How an attempt ended, `seconds` after it was sent, for outlier detection and for pickers that measure."""
        if not self._measures or outcome.failure in (CLIENT_TIMEOUT, LOCAL):
            return  # what never left this process, or was given up by its caller, is no endpoint's fault
        policy = self.cluster.load_balancing
        report = None
        if policy is LoadBalancing.CLIENT_SIDE_WEIGHTED_ROUND_ROBIN and outcome.headers is not None:
            report = load_report.read(outcome.headers)
        status = 504 if outcome.failure == TIMEOUT else outcome.status
        with self.state.lock:
            if policy is LoadBalancing.PEAK_EWMA:
                if status is None or status >= 500 or status == 429:
                    seconds = max(seconds, peak_ewma.penalty(outcome.headers))
                peak_ewma.observe(target.state, seconds, now)
            elif report is not None:
                client_weighted.observe(target.state, report, now)
            if self._detector is not None and self._detector.record(target.state, status, now):
                self.state.rebuild(now)

    def set_health(self, authority: str, is_healthy: bool, now: float) -> None:
        """What an active health check has found out. A healthy endpoint that was ejected serves again at once (Envoy's
        successful_active_health_check_uneject_host)."""
        state = self._states.get(authority)
        if state is None:
            return
        with self.state.lock:
            if is_healthy and not state.is_healthy:
                state.joined_at = now  # slow start begins anew (Envoy)
            returns = is_healthy and state.is_ejected and self._detector is not None
            if state.is_healthy is is_healthy and not returns:
                return
            state.is_healthy = is_healthy
            if returns and self._detector is not None:
                self._detector.restore(state, now)
            self.state.rebuild(now)
            if self.cluster.slow_start is not None:
                step = self.cluster.slow_start.window / _SLOW_START_STEPS
                self.state.next_sweep = min(self.state.next_sweep, now + step)

    def _sweep(self, now: float) -> None:
        """What time alone changes: returns, rates, weights. Done by the first call after it is due."""
        with self.state.lock:
            if now < self.state.next_sweep:
                return  # another thread was faster
            rules = self.cluster.outlier_detection
            if self._detector is not None and rules is not None:
                end = math.floor(now / rules.interval) * rules.interval
                if end >= self.state.interval_end:
                    intervals = 1 + round((end - self.state.interval_end) / rules.interval)
                    self._detector.sweep(list(self._states.values()), end, intervals)
                    self.state.interval_end = end + rules.interval
            self.state.rebuild(now)
            self.state.next_sweep = self._next_sweep(now)

    def _next_sweep(self, now: float) -> float:
        due = NEVER
        rules = self.cluster.outlier_detection
        if rules is not None:
            due = self.state.interval_end = (math.floor(now / rules.interval) + 1) * rules.interval
        slow_start = self.cluster.slow_start
        if slow_start is not None and has_young(slow_start, self.targets, now):
            due = min(due, now + slow_start.window / _SLOW_START_STEPS)
        return due

    def _rebuild(self, now: float) -> None:
        """A picker over the targets that may be called at `now`. Called with the lock held."""
        rules = self.cluster.outlier_detection
        self.picker = self._pool.picker(_is_ready, 0 if rules is None else rules.min_health_percent, now)

    def __repr__(self) -> str:
        return f"<LiveCluster {self.name} {self.picker!r}, {self.state.ejected} ejected>"


def _is_ready(target: Target) -> bool:
    return target.state.is_ready
