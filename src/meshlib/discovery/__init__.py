"""Where does a process learn what the mesh looks like? Feeds: a Source yields Snapshots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from meshlib.model import Snapshot


class Source(Protocol):
    """One feed of configuration. Made by Mesh, used once: after a fork, and after `stop`, Mesh makes a new one.

    Making one does no I/O and starts nothing.
    """

    def run(self, publish: Callable[[Snapshot], None]) -> None:
        """Block until `stop`, calling `publish` (on this thread, one call at a time) with each new consistent Snapshot.

        A feed that is down or sends nonsense is logged, and the last good Snapshot stays: it raises nothing of that.
        """

    def want(self, authority: str) -> None:
        """Someone calls `authority` (`host:port`), which the Snapshot lacks: a later Snapshot names it, as a listener
        or in `absent`, if the feed can find out. From any thread; again is harmless; never blocks; never raises."""

    def stop(self) -> None:
        """Let `run` return soon. From any thread, before, while or after it runs."""
