"""What would be written to a log here, and may be read elsewhere? A bounded queue of lines, on their way to the control
plane: those of the access log, and what the library itself has to say.

Whoever is slow to push loses the oldest, and their number is told. Credentials are left out before a line is kept: it
will be read by more people than those who may read this process's own log.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import NamedTuple

from meshlib.state import forks
from meshlib.telemetry.scrub import scrubbed_text

MAX_LINES = 2048
"""As many wait to be pushed; OpenTelemetry's default (OTEL_BLRP_MAX_QUEUE_SIZE)."""
LONGEST = 4096
"""Characters of one."""
ACCESS = "meshlib.access"
"""The logger of the access log; all other lines are the library's own."""


class Line(NamedTuple):
    """at: Unix seconds. level: logging's number. direction: `in` or `out`, "" for what is no request's. fields: of a
    line of the access log, by Istio's names."""

    at: float
    level: int
    logger: str
    text: str
    direction: str = ""
    fields: tuple[tuple[str, object], ...] = ()
    trace_id: str = ""
    span_id: str = ""


class Lines:
    """Thread-safe; its lock is held for a microsecond."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, as in a forked child."""
        self._lock = forks.lock()
        self._waiting: deque[Line] = deque()
        self.dropped = 0

    def put(self, line: Line) -> None:
        with self._lock:
            if len(self._waiting) >= MAX_LINES:
                self.dropped += 1
                self._waiting.popleft()
            self._waiting.append(line)

    def taken(self) -> list[Line]:
        """Those that have come since, for whoever pushes them."""
        with self._lock:
            found = list(self._waiting)
            self._waiting.clear()
        return found

    def __repr__(self) -> str:
        return f"<Lines {len(self._waiting)} waiting>"


class LinesHandler(logging.Handler):
    """What the library logs at INFO or above, to `lines`. The application's own log is as it would be without it."""

    def __init__(self, lines: Lines) -> None:
        super().__init__(logging.INFO)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == ACCESS:  # comes with its fields from the access log itself
            return
        text = record.getMessage()
        if record.exc_info is not None and record.exc_info[1] is not None:
            text += f": {type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
        self._lines.put(Line(record.created, record.levelno, record.name, scrubbed_text(text)[:LONGEST]))

    def handle(self, record: logging.LogRecord) -> bool:
        """A logger that has a handler no longer warns on stderr where nobody has set logging up; we are not asked to
        change that."""
        if not _has_others(self, record.name) and (last := logging.lastResort) and record.levelno >= last.level:
            last.handle(record)
        return bool(super().handle(record))


def _has_others(own: logging.Handler, name: str) -> bool:
    """Whether a record of this logger is handled by anybody but those of this kind."""
    logger: logging.Logger | None = logging.getLogger(name)
    first: LinesHandler | None = None
    while logger is not None:
        for each in logger.handlers:
            if not isinstance(each, LinesHandler):
                return True
            first = first or each
        logger = logger.parent if logger.propagate else None
    return first is not own  # one of several that stand in, not each of them
