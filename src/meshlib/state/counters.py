"""What does this process count of each endpoint and each cluster?"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from meshlib.state import forks

NEVER = float("inf")


def _nothing(_: float) -> None: ...


class EndpointState:
    """One endpoint of one cluster, as this process sees it. Guarded by its cluster's lock; `in_flight` and what
    balancing measures may be read without (a pick that is off by one is still a good pick)."""

    __slots__ = (
        "consecutive_5xx",
        "consecutive_gateway_errors",
        "consecutive_local_failures",
        "ejected_at",
        "ejection_jitter",
        "ejections",
        "in_flight",
        "is_ejected",
        "is_healthy",
        "joined_at",
        "latency",
        "latency_at",
        "reported_weight",
        "returned_at",
        "weighed_at",
        "weighed_since",
        "window_calls",
        "window_good",
    )

    def __init__(self, joined_at: float = 0.0) -> None:
        self.in_flight = 0
        self.joined_at = joined_at
        """Monotonic seconds since when it is known, or was last found healthy: where slow start begins."""
        self.is_healthy = True
        """What active health checks say; True without any."""
        # Outlier detection (balancing/outlier)
        self.consecutive_5xx = 0
        self.consecutive_gateway_errors = 0
        self.consecutive_local_failures = 0
        self.is_ejected = False
        self.ejected_at = 0.0
        self.ejection_jitter = 0.0
        self.ejections = 0
        """Envoy's ejection multiplier: grows with each ejection, shrinks with each quiet interval."""
        self.returned_at = -NEVER
        self.window_calls = 0
        self.window_good = 0
        # What pickers measure: peak EWMA, and weights that the servers report
        self.latency = 0.0
        self.latency_at = 0.0
        self.reported_weight = 0.0
        self.weighed_at = -NEVER
        self.weighed_since = -NEVER

    @property
    def is_ready(self) -> bool:
        return self.is_healthy and not self.is_ejected

    def __repr__(self) -> str:
        ill = "" if self.is_healthy else ", unhealthy"
        out = ", ejected" if self.is_ejected else ""
        return f"<EndpointState {self.in_flight} in flight, {self.ejections} ejections{ill}{out}>"


class ClusterState:
    """One cluster, as this process sees it: what is in flight, and the lock for it and for its endpoints."""

    __slots__ = (
        "ejected",
        "ejections",
        "ejections_refused",
        "interval_end",
        "lock",
        "mirrors_dropped",
        "next_sweep",
        "overflows",
        "queue",
        "rebuild",
        "requests",
        "retries",
        "retries_refused",
        "shadowed_ejections",
        "turns",
    )

    def __init__(self) -> None:
        self.lock = forks.lock()
        self.requests = 0
        """Calls that were admitted and are not finished (a call with three tries is one)."""
        self.retries = 0
        self.retries_refused = 0
        """Retries that the budget did not admit; in shadow mode, that it would not have."""
        self.overflows = 0
        """Calls that were turned away by a limit; in shadow mode, that would have been."""
        self.mirrors_dropped = 0
        """Copies of calls (a route's mirrors) that were not sent: too many under way, a limit, nobody healthy, or a
        body that can be sent once only."""
        self.queue: deque[Any] = deque()
        """Tickets of calls that wait for a connection (state/limits), first come first served."""
        self.ejected = 0
        self.ejections = 0
        self.ejections_refused = 0
        """Ejections that max_ejection_percent forbade (Envoy's ejections_overflow)."""
        self.shadowed_ejections = 0
        """Ejections that shadow mode counted and did not carry out."""
        self.interval_end = 0.0
        """Of outlier detection, in monotonic seconds."""
        self.next_sweep = NEVER
        """When ejected endpoints and weights are looked at again (monotonic seconds)."""
        self.rebuild: Callable[[float], None] = _nothing
        """Makes the picker anew, of the newest form of the cluster: an attempt that began before an update may eject
        an endpoint after it. Called with the lock held."""
        self.turns: dict[object, list[int]] = {}
        """Round robin's positions by group; they survive an update, so that an update does not restart the round."""

    def __repr__(self) -> str:
        return f"<ClusterState {self.requests} in flight, {self.retries} retries, {self.ejected} ejected>"
