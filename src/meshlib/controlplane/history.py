"""What was changed, and when? The configuration's objects, before and after, as they came into force."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

import msgspec

from meshlib.controlplane import admin_api as api

MOST = 500


class Change(msgspec.Struct, frozen=True):
    """at: seconds since 1970. object: `VirtualService default/reviews`. before, after: YAML, "" where there was, or is,
    none. origin: `folder`, `kubernetes` or `applied`. source: the file."""

    number: int
    at: float
    object: str
    origin: str
    source: str
    before: str
    after: str


class History:
    """The last MOST changes, the oldest first. Thread-safe; what was there at the start is no change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, api.StoredObject] | None = None
        self._changes: deque[Change] = deque(maxlen=MOST)
        self._number = 0

    def update(self, stored: Iterable[api.StoredObject], now: float) -> None:
        """What is in force now."""
        found = {f"{each.kind} {each.namespace}/{each.name}": each for each in stored}
        with self._lock:
            known, self._known = self._known, found
            if known is None:
                return
            for name in sorted({*known, *found}):
                before, after = known.get(name), found.get(name)
                old, new = before.yaml if before else "", after.yaml if after else ""
                if old == new:
                    continue
                self._number += 1
                told = after or before
                assert told is not None
                self._changes.append(Change(self._number, now, name, told.origin, told.source, old, new))

    def since(self, start: float = 0.0) -> list[Change]:
        with self._lock:
            return [each for each in self._changes if each.at >= start]
