"""What was changed since the start, by whom and when? The audit log's entries about objects, as the page shows them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import msgspec

from meshlib.controlplane.audit import Entry

MOST = 500
OF_OBJECTS = frozenset({"apply", "delete", "folder", "kubernetes"})


class Change(msgspec.Struct, frozen=True):
    """at: seconds since 1970. object: `VirtualService default/reviews`. before, after: YAML, "" where there was, or is,
    none. origin: `folder`, `kubernetes` or `applied`. source: the file. who: as grants name them; `folder`
    for an edited file, `kubernetes` for what was changed there."""

    number: int
    at: float
    object: str
    origin: str
    source: str
    before: str
    after: str
    who: str = ""
    namespace: str = ""


class History:
    """The last MOST changes, the oldest first. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changes: deque[Change] = deque(maxlen=MOST)
        self._number = 0

    def add(self, entries: Sequence[Entry]) -> None:
        """What the audit log was told."""
        with self._lock:
            for each in entries:
                if each.outcome == "failed":  # it was told before it was tried
                    kept = [change for change in self._changes if (change.at, change.object) != (each.at, each.object)]
                    self._changes = deque(kept, MOST)
                if each.action not in OF_OBJECTS or each.outcome != "ok":
                    continue
                self._number += 1
                self._changes.append(
                    Change(
                        self._number,
                        each.at,
                        each.object,
                        each.origin,
                        each.source,
                        each.before,
                        each.after,
                        each.who,
                        each.namespace,
                    )
                )

    def since(self, start: float = 0.0) -> list[Change]:
        with self._lock:
            return [each for each in self._changes if each.at >= start]
