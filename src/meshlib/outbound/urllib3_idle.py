"""Which idle connection of a urllib3 manager may be used again? Stacks of them, for each (cluster, endpoint, TLS)."""

from __future__ import annotations

import os
import time
import weakref
from typing import TYPE_CHECKING, Any

from meshlib.outbound.connections import KEEPALIVE, may_serve
from meshlib.outbound.urllib3_connections import Key

if TYPE_CHECKING:
    from meshlib.model import Cluster

MAX_IDLE = 128
"""Idle connections kept for one endpoint; one more is closed when it comes back."""


class IdleConnections:
    """Idle connections of one manager, for each (cluster, endpoint, TLS). Pushing to and popping from a list is
    atomic, so no lock is needed."""

    def __init__(self) -> None:
        self._stacks: dict[Key, list[Any]] = {}
        self._owner = os.getpid()
        self._swept = time.monotonic()
        weakref.finalize(self, _close, self._stacks)

    def take(self, key: Key, cluster: Cluster) -> Any | None:
        """The connection used last that may be used again; those found dead on the way are closed."""
        stack = self._stack(key)
        while stack:
            try:
                connection = stack.pop()
            except IndexError:  # another thread was faster
                return None
            if _is_fit(connection, cluster, time.monotonic()) and connection.is_connected:
                return connection
            connection.close()
        return None

    def give(self, connection: Any) -> None:
        """Keep it, if the response on it was read to its end."""
        response, connection.response = connection.response, None
        stack = self._stack(connection.key)
        is_unfit = response is not None and (not response.isclosed() or response.has_more)
        if connection.is_closed or is_unfit or len(stack) >= MAX_IDLE:
            connection.close()
            return
        connection.idle_since = time.monotonic()
        stack.append(connection)
        if self._stacks.get(connection.key) is not stack:  # swept away at this very moment
            connection.close()

    def sweep(self) -> None:
        """Close what has been idle too long and forget who has none, at most once in KEEPALIVE seconds: nothing else
        would look at an endpoint that has left."""
        now = time.monotonic()
        if now - self._swept < KEEPALIVE:
            return
        self._swept = now
        for key, stack in list(self._stacks.items()):
            try:
                while now - stack[0].idle_since > stack[0].keepalive:
                    stack.pop(0).close()
            except IndexError:  # empty, or another thread was faster
                if not stack:
                    self._stacks.pop(key, None)

    def close(self) -> None:
        _close(self._stacks)

    def _stack(self, key: Key) -> list[Any]:
        if os.getpid() != self._owner:
            # A fork: the parent goes on with these connections. Closing our copies says nothing to the server, since
            # Python's TLS sockets close without a word.
            self._owner = os.getpid()
            _close(self._stacks)
        found = self._stacks.get(key)
        return self._stacks.setdefault(key, []) if found is None else found

    def __repr__(self) -> str:
        return f"<IdleConnections {sum(map(len, self._stacks.values()))} idle to {len(self._stacks)} endpoints>"


def _close(stacks: dict[Key, list[Any]]) -> None:
    for stack in list(stacks.values()):
        while stack:
            stack.pop().close()


def _is_fit(connection: Any, cluster: Cluster, now: float) -> bool:
    limits = cluster.limits
    if now - connection.idle_since > connection.keepalive:
        return False
    return may_serve(limits, connection.served, connection.opened, now)
