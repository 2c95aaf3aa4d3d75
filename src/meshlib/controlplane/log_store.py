"""Which lines have processes logged lately? A bounded memory of them, of the newest of each workload.

A workload that talks much loses its own oldest lines, not those of others. Belongs to one event loop.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from meshlib.controlplane.admin_api import LogLine
from meshlib.telemetry.lines import ACCESS, LONGEST
from meshlib.telemetry.scrub import scrubbed, scrubbed_text

MAX_LINES, OF_ONE = 20_000, 2_000
"""In all, and of one workload: some 50 MB where all are lines of the access log."""
FIELDS, LONGEST_NAME = 40, 100
"""Of one line: as many, and with names as long. The access log has 25."""
_AT_ONCE = 100
_IDENTITY = ("service.namespace", "istio.workload", "service.name", "service.instance.id")


def line_of(
    resource: Mapping[str, str],
    logger: str,
    at: float,
    level: str,
    text: str,
    attributes: Mapping[str, str],
    trace_id: str,
    span_id: str,
) -> LogLine:
    """As it was pushed. resource: OpenTelemetry's, of the process."""
    namespace, workload, service, instance = (resource.get(name, "") for name in _IDENTITY)
    parts = instance.split("~")
    return LogLine(
        at,
        workload or service,
        namespace,
        parts[2] if len(parts) == 4 else instance,
        "access" if logger == ACCESS else "mesh",
        level or "INFO",
        logger,
        scrubbed_text(text[:LONGEST]),
        attributes.get("mesh.direction", ""),
        dict(_fields(attributes)),
        trace_id[:32],
        span_id[:16],
    )


def _fields(attributes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    names = [name for name in attributes if name != "mesh.direction" and len(name) <= LONGEST_NAME]
    for name in names[:FIELDS]:
        yield name, scrubbed_text(scrubbed(attributes[name]))


class LogStore:
    """Of which the newest lines are kept."""

    def __init__(self, max_lines: int = MAX_LINES, of_one: int = OF_ONE) -> None:
        self._max, self._of_one = max_lines, of_one
        self._kept: dict[tuple[str, str], deque[LogLine]] = {}
        self._number = 0
        self._listeners: list[Callable[[Sequence[LogLine]], None]] = []

    def on_lines(self, tell: Callable[[Sequence[LogLine]], None]) -> None:
        """tell: called with each lot that comes."""
        self._listeners.append(tell)

    def add(self, lines: Sequence[LogLine]) -> None:
        for line in lines:
            kept = self._kept.setdefault((line.namespace, line.workload), deque())
            kept.append(line)
            self._number += 1
            if len(kept) > self._of_one:
                kept.popleft()
                self._number -= 1
        while self._number > self._max:
            self._forget_some()
        for tell in self._listeners:
            tell(lines)

    def _forget_some(self) -> None:
        """A hundred where they are many, so that not each line looks at all workloads: of whoever has most the older
        half, then of those that have nearly as many."""
        left, most = _AT_ONCE, 0
        for workload in heapq.nlargest(_AT_ONCE, self._kept, key=lambda each: len(self._kept[each])):
            kept = self._kept[workload]
            most = most or len(kept)
            if 2 * len(kept) < most:
                return
            forgotten = min(left, (len(kept) + 1) // 2)
            for _ in range(forgotten):
                kept.popleft()
            if not kept:
                del self._kept[workload]
            self._number -= forgotten
            left -= forgotten
            if not left:
                return

    def lines(self, since: float, fits: Callable[[LogLine], bool], limit: int) -> list[LogLine]:
        """The newest `limit` of those that fit, the oldest first."""
        found = sorted(self._fitting(since, fits), key=lambda line: line.at)
        return found[-limit:] if limit else []

    def _fitting(self, since: float, fits: Callable[[LogLine], bool]) -> Iterable[LogLine]:
        return (line for kept in self._kept.values() for line in kept if line.at >= since and fits(line))

    def __repr__(self) -> str:
        return f"<LogStore {self._number} lines of {len(self._kept)} workloads>"
