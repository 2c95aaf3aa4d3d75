"""Which connection is used again? Stacks of idle ones, by what they were opened for. For engines on threads, and, one
for each event loop, for those on asyncio."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from meshlib.model import ConnectionLimits
from meshlib.outbound.connections import KEEPALIVE, may_serve

MAX_IDLE = 128
"""Idle connections kept for one endpoint; one more is closed when it comes back."""


class Held:
    """A connection, and what the destination's rules ask of it. `connection` has `has_expired` and `is_idle`."""

    __slots__ = ("connection", "opened", "served")

    def __init__(self, connection: Any, now: float) -> None:
        self.connection = connection
        self.opened = now
        self.served = 0

    def is_good(self, limits: ConnectionLimits, kept: int) -> bool:
        """Whether it is kept for another call, with so many others, once a call has ended."""
        now = time.monotonic()
        return bool(self.connection.is_idle() and kept < MAX_IDLE and may_serve(limits, self.served, self.opened, now))


class Idle:
    """Stacks of idle connections by key. Pushing to and popping from a list is atomic, so no lock is needed."""

    __slots__ = ("_owner", "_stacks", "_swept")

    def __init__(self) -> None:
        self._stacks: dict[Hashable, list[Held]] = {}
        self._owner = os.getpid()
        self._swept = time.monotonic()

    def stack(self, key: Hashable) -> list[Held]:
        if os.getpid() != self._owner:
            # A fork: the sockets belong to the parent. They are neither used nor closed here (closing a TLS
            # connection would speak on the parent's behalf), just kept from being collected with a warning.
            _ORPHANS.extend(held for stack in self._stacks.values() for held in stack)
            self._stacks, self._owner = {}, os.getpid()
        found = self._stacks.get(key)
        return self._stacks.setdefault(key, []) if found is None else found

    def expired(self) -> Iterator[Any]:
        """Connections that have been idle too long, taken off; looked for at most once in KEEPALIVE seconds.

        A connection is otherwise only looked at when its endpoint is called, which for one that has left the mesh is
        never.
        """
        now = time.monotonic()
        if now - self._swept < KEEPALIVE:
            return
        self._swept = now
        for key, stack in list(self._stacks.items()):
            try:
                while stack[0].connection.has_expired():
                    yield stack.pop(0).connection
            except IndexError:  # empty, or another thread was faster
                if not stack:  # with it goes the TLS context, of which each rotation makes another
                    self._stacks.pop(key, None)

    def keep(self, key: Hashable, held: Held) -> None:
        """Push it where `stack` finds it, even if its stack was swept away meanwhile."""
        self.stack(key).append(held)

    def drain(self) -> Iterator[Any]:
        for stack in list(self._stacks.values()):
            while stack:
                yield stack.pop().connection

    def __repr__(self) -> str:
        return f"<Idle {sum(map(len, self._stacks.values()))} connections to {len(self._stacks)} endpoints>"


_ORPHANS: list[Held] = []


def reusable(stack: list[Held], limits: ConnectionLimits, dead: Callable[[Any], object]) -> Held | None:
    """The connection used last that is still good; those found dead on the way are handed to `dead`."""
    while stack:
        try:
            held = stack.pop()
        except IndexError:  # another thread was faster
            return None
        if not held.connection.has_expired() and may_serve(limits, held.served, held.opened, time.monotonic()):
            return held
        dead(held.connection)
    return None
