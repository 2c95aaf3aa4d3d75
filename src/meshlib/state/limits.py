"""How many calls at a time? The connection-pool limits of a cluster, and the queue for a connection.

An HTTP/1.1 connection carries one request, so with one of ours for each call in flight, `max_connections` bounds the
calls, those beyond it wait for one to end, at most `max_pending_requests` of them, and the next is turned away (Envoy's
`overflow`). HTTP/2 multiplexes, so there only `max_requests` counts. Limits hold for this process: a service with eight
workers has eight times as many.

Nothing here waits: a call that has to is given a Ticket, and the edge waits for it as its kind of code does.
"""

from __future__ import annotations

from collections.abc import Callable

from meshlib.model import ConnectionLimits
from meshlib.state.counters import ClusterState

UNLIMITED = 1 << 62


class Ticket:
    """A call's place in the queue for a connection. `on_grant` is called once, from any thread, when its turn has come;
    at once if it has come already."""

    __slots__ = ("_wake", "is_granted")

    def __init__(self) -> None:
        self.is_granted = False
        self._wake: Callable[[], None] | None = None

    def on_grant(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        if self.is_granted:
            wake()

    def grant(self) -> None:
        self.is_granted = True
        if self._wake is not None:
            self._wake()


class Limits:
    """The limits of one cluster, over its state. `admit` and `leave` are called with the cluster's lock held."""

    __slots__ = ("_at_once", "_pending", "_requests", "_state")

    def __init__(self, limits: ConnectionLimits, state: ClusterState, is_multiplexed: bool) -> None:
        self._state = state

        def most(limit: int | None) -> int:
            return UNLIMITED if limit is None else limit

        self._requests = most(limits.max_requests)
        self._at_once = min(self._requests, UNLIMITED if is_multiplexed else most(limits.max_connections))
        self._pending = most(limits.max_pending_requests)

    def admit(self) -> bool | Ticket:
        """True: go. A Ticket: wait until it is granted. False: turned away."""
        state = self._state
        if state.requests < self._at_once and not state.queue:
            state.requests += 1
            return True
        if state.requests + len(state.queue) >= self._requests or len(state.queue) >= self._pending:
            return False
        ticket = Ticket()
        state.queue.append(ticket)
        return ticket

    def admit_anyway(self) -> None:
        """For shadow mode: counted, and not limited."""
        self._state.requests += 1

    def leave(self) -> Ticket | None:
        """A call has ended; whose turn it is now, for the caller to grant once it has given the lock back."""
        state = self._state
        state.requests -= 1
        return self._next() if state.queue else None

    def give_up(self, ticket: Ticket) -> Ticket | None:
        """A waiting call waits no longer: its deadline passed, or its caller has gone. Whose turn it is now."""
        state = self._state
        try:
            state.queue.remove(ticket)
        except ValueError:  # its turn came in this very moment
            state.requests -= 1
        return self._next()

    def _next(self) -> Ticket | None:
        state = self._state
        if not state.queue or state.requests >= self._at_once:
            return None
        state.requests += 1
        ticket: Ticket = state.queue.popleft()
        return ticket

    def __repr__(self) -> str:
        return f"<Limits {self._state.requests} in flight, {len(self._state.queue)} waiting>"
