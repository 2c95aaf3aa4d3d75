"""What does this process count of each endpoint and each cluster?"""

from __future__ import annotations

import threading

NEVER = float("inf")


class EndpointState:
    """One endpoint of one cluster, as this process sees it. Guarded by its cluster's lock; `in_flight` may be read
    without (a pick that is off by one is still a good pick)."""

    __slots__ = (
        "consecutive_5xx",
        "consecutive_gateway_errors",
        "consecutive_local_failures",
        "ejected_until",
        "ejections",
        "in_flight",
        "returned_at",
    )

    def __init__(self) -> None:
        self.in_flight = 0
        self.consecutive_5xx = 0
        self.consecutive_gateway_errors = 0
        self.consecutive_local_failures = 0
        self.ejected_until = 0.0
        """Monotonic seconds; 0 when it was never ejected."""
        self.ejections = 0
        """Envoy's ejection multiplier: grows with each ejection, shrinks with each quiet interval."""
        self.returned_at = 0.0

    def __repr__(self) -> str:
        return f"<EndpointState {self.in_flight} in flight, {self.ejections} ejections>"


class ClusterState:
    """One cluster, as this process sees it: what is in flight, and the lock for it and for its endpoints."""

    __slots__ = ("ejected", "lock", "next_return", "overflows", "requests", "retries", "turn")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests = 0
        """Calls that were admitted and are not finished (a call with three tries is one)."""
        self.retries = 0
        self.overflows = 0
        self.ejected = 0
        self.next_return = NEVER
        """When the next ejected endpoint may return (monotonic seconds)."""
        self.turn = 0
        """Round robin's position; survives an update, so that an update does not restart the round."""

    def __repr__(self) -> str:
        return f"<ClusterState {self.requests} in flight, {self.retries} retries, {self.ejected} ejected>"
