"""What do calls ask of one cluster? A picker over the endpoints that may be called now, its limits, its counters.

Built on the feed thread for each new form of the cluster; its state is carried over by reference.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from meshlib.balancing import EMPTY, HASHING, Picker, Target, client_weighted, load_report, peak_ewma
from meshlib.balancing.locality import Pool, has_young
from meshlib.balancing.outlier import Detector
from meshlib.model import (
    NOWHERE,
    Cluster,
    Endpoint,
    HeaderView,
    Health,
    LoadAssignment,
    LoadBalancing,
    Locality,
    Outcome,
)
from meshlib.policy.rate_limit import Limiter
from meshlib.policy.retry import CLIENT_TIMEOUT, LOCAL, TIMEOUT
from meshlib.state import NEVER, ClusterState, EndpointState
from meshlib.state.budget import Budget, TokenBudget, budget_of
from meshlib.state.limits import Limits, Ticket
from meshlib.state.turns import resting

if TYPE_CHECKING:
    from meshlib.state.breaker import Breaker

_SLOW_START_STEPS = 20
"""How many steps a weight takes from slow start's beginning to its end."""


class LiveCluster:
    """One cluster: its picker over the endpoints that may be called now, and its counters.

    The picker is replaced whole when an endpoint is ejected or returns. `targets` are the endpoints that the control
    plane calls healthy, of all priorities and zones.
    """

    __slots__ = (
        "_budget",
        "_deposits",
        "_detector",
        "_is_hashing",
        "_is_limited",
        "_limits",
        "_pool",
        "_states",
        "_weighs",
        "assignment",
        "breaker",
        "cluster",
        "limiter",
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
            e.authority: known.get(e.authority) or EndpointState(now) for e in resting(endpoints)
        }
        self.targets = tuple(
            Target(e, self._states[e.authority]) for e in resting(endpoints) if e.health is Health.HEALTHY
        )
        self._is_hashing = cluster.load_balancing in HASHING
        weights = assignment.locality_weights if assignment is not None else ()
        self._pool = Pool(cluster, endpoints, self.targets, weights, here, self.state, rng)
        rules = cluster.outlier_detection
        self._detector: Detector | None = None
        if rules is not None:
            shadow = "outlier-detection" in cluster.shadow
            self._detector = Detector(rules, self.state, len(self._states), rng, shadow)
        self._weighs = cluster.load_balancing in (
            LoadBalancing.PEAK_EWMA,
            LoadBalancing.CLIENT_SIDE_WEIGHTED_ROUND_ROBIN,
        )
        self._limits = Limits(cluster.limits, self.state, cluster.http2)
        self._is_limited = (cluster.limits.max_connections, cluster.limits.max_requests) != (None, None)
        same = previous is not None and previous.cluster.retry_budget == cluster.retry_budget
        self._budget: Budget | None
        if same and previous is not None and cluster.retry_budget is not None:
            self._budget = previous._budget  # with what was deposited
        else:
            self._budget = budget_of(cluster.retry_budget, cluster.limits.max_retries, self.state)
        self._deposits = self._budget if isinstance(self._budget, TokenBudget) else None
        self.breaker: Breaker | None = _breaker(cluster, previous)
        self.limiter: Limiter | None = None
        if cluster.rate_limits or cluster.quotas:
            before = previous.limiter.known if previous is not None and previous.limiter is not None else None
            self.limiter = Limiter(cluster.rate_limits, cluster.quotas, before)
        self.picker: Picker = EMPTY
        with self.state.lock:
            if self._detector is None:
                for state in self._states.values():
                    state.is_ejected = False
            if not cluster.health_checks:
                for state in self._states.values():
                    state.is_healthy = True
            self.state.ejected = sum(state.is_ejected for state in self._states.values())
            self.state.rebuild = self._rebuild
            self._rebuild(now)
            self.state.next_sweep = self._next_sweep(now)

    @property
    def everyone(self) -> tuple[Target, ...]:
        """All endpoints that the control plane names, with those that get no call."""
        endpoints = self.assignment.endpoints if self.assignment is not None else self.cluster.endpoints
        return tuple(Target(each, self._states[each.authority]) for each in endpoints)

    def has_endpoint(self, authority: str) -> bool:
        """Whether `authority` (`10.0.0.1:9080`) is one of its endpoints, whatever its health."""
        return authority in self._states

    def pick(
        self,
        now: float,
        tried: Sequence[Endpoint],
        reselect: int,
        key: int | None = None,
        avoid_priorities: Collection[int] = (),
    ) -> Target | None:
        """An endpoint to call now; where `reselect` is not 0, one that was not tried, if there is one.

        reselect: how many further picks are to find it (Envoy's host_selection_retry_max_attempts). After these Envoy
        takes a tried one; here another of the same priority is looked up, since an endpoint that refuses every
        connection has the fewest calls in flight, and is picked again and again.

        key: the request's hash (policy/hash_key); with it there is no reselecting (Istio leaves the previous-hosts
        predicate out), a retry looks up what comes next. avoid_priorities: those to leave out if there are others.
        """
        if now >= self.state.next_sweep:
            self._sweep(now)
        if not tried:
            return self.picker.pick(now, key)
        target = self.picker.pick(now, key, len(tried), avoid_priorities)
        if self._is_hashing:
            return target
        for _ in range(reselect):
            if target is None or target.endpoint not in tried:
                return target
            target = self.picker.pick(now, key, 0, avoid_priorities)
        return self._untried(target, tried) if reselect and target is not None else target

    def _untried(self, picked: Target, tried: Sequence[Endpoint]) -> Target:
        """Of the priority, and where zones have shares of the load the zone, that was picked: the one with the fewest
        calls in flight. What was picked, if there is no other."""
        if picked.endpoint not in tried:
            return picked
        has_shares = self.cluster.locality_weighted or self.cluster.zone_aware is not None
        others = [
            each
            for each in self.targets
            if each.endpoint.priority == picked.endpoint.priority
            and (not has_shares or each.endpoint.locality == picked.endpoint.locality)
            and each.endpoint not in tried
            and _is_ready(each)
        ]
        return min(others, key=lambda each: each.state.in_flight, default=picked)

    def admit(self, now: float) -> bool | Ticket:
        """Count a call in, unless the cluster's limits are reached. True, and a Ticket, are paired with one `leave`,
        or with one `give_up` while the Ticket is not granted."""
        state = self.state
        with state.lock:
            if self._deposits is not None:
                self._deposits.began(now)
            if not self._is_limited:
                state.requests += 1
                return True
            admitted = self._limits.admit()
            if admitted is not True and "limits" in self.cluster.shadow:
                if admitted is not False:
                    self._limits.give_up(admitted)
                state.overflows += 1
                self._limits.admit_anyway()
                return True
            if admitted is False:
                state.overflows += 1
            return admitted

    def leave(self) -> None:
        """A call that was admitted has ended."""
        with self.state.lock:
            following = self._limits.leave()
        if following is not None:
            following.grant()

    def give_up(self, ticket: Ticket) -> None:
        """A call no longer waits for its turn."""
        with self.state.lock:
            following = self._limits.give_up(ticket)
        if following is not None:
            following.grant()

    def admit_retry(self, now: float) -> bool:
        """Count a retry in, unless the budget forbids it. Every True is paired with one `leave_retry`."""
        state = self.state
        with state.lock:
            if self._budget is not None and not self._budget.admits(now):
                state.retries_refused += 1
                if "retry-budget" not in self.cluster.shadow:
                    return False
            state.retries += 1
            return True

    def leave_retry(self) -> None:
        with self.state.lock:
            self.state.retries -= 1

    def dropped_mirror(self) -> None:
        """A copy of a call was not sent here."""
        with self.state.lock:
            self.state.mirrors_dropped += 1

    def begin(self, target: Target) -> None:
        with self.state.lock:
            target.state.in_flight += 1

    def end(self, target: Target) -> None:
        with self.state.lock:
            target.state.in_flight -= 1

    def judge(self, target: Target, outcome: Outcome, seconds: float, now: float) -> None:
        """How an attempt ended, `seconds` after it was sent, for outlier detection and for pickers that measure."""
        status, detector = outcome.status, self._detector
        if status is None:
            if outcome.failure in (CLIENT_TIMEOUT, LOCAL):
                return  # what never left this process, or was given up by its caller, is no endpoint's fault
            status = 504 if outcome.failure == TIMEOUT else None
        if self._weighs:
            self._weigh(target.state, outcome.headers, status, seconds, now)
        if detector is not None and detector.is_news(target.state, status):
            with self.state.lock:
                if detector.record(target.state, status, now):
                    self.state.rebuild(now)

    def _weigh(
        self, state: EndpointState, headers: HeaderView | None, status: int | None, seconds: float, now: float
    ) -> None:
        """For pickers that measure."""
        if self.cluster.load_balancing is LoadBalancing.PEAK_EWMA:
            if status is None or status >= 500 or status == 429:
                seconds = max(seconds, peak_ewma.penalty(headers))
            with self.state.lock:
                peak_ewma.observe(state, seconds, now)
        elif headers is not None and (report := load_report.read(headers)) is not None:
            with self.state.lock:
                client_weighted.observe(state, report, now)

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


def _breaker(cluster: Cluster, previous: LiveCluster | None) -> Breaker | None:
    """The cluster's breaker, with the state it had."""
    if cluster.breaker is None:
        return None
    from meshlib.state.breaker import Breaker

    is_shadow = "breaker" in cluster.shadow
    if previous is None or previous.breaker is None:
        return Breaker(cluster.breaker, cluster.name, is_shadow)
    previous.breaker.update(cluster.breaker, is_shadow)
    return previous.breaker
