"""What has happened in the mesh lately? A bounded memory of what processes push: request series, and traces.

Time is cut into slots: 5 seconds each for 15 minutes, a minute each for 24 hours. A slot knows only the series that had
traffic in it. A series is Istio's label tuple; beyond `max_series` in use at a time, further ones are counted together
under OVERFLOW, so that a label that someone can make up (a path, a host) costs no memory. Nothing is kept on disk.

Thread-safe: the receivers write, the admin API reads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

BOUNDS = (0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 600000, 1800000, 3600000)
"""Milliseconds; Envoy's (source/common/stats/histogram_impl.cc)."""
FINE, FINE_SLOTS = 5.0, 180
COARSE, COARSE_SLOTS = 60.0, 24 * 60
MAX_SERIES = 5000
TOLD = 60.0
"""Seconds for which the last value of a gauge is taken to hold."""
MAX_TRACES, MAX_SPANS = 2000, 200
LATE = 60.0
"""Seconds by which what is pushed may be older than the newest slot; more is counted now, since it was not told in
time, and the picture shows what is known."""


RETRY = "retry"
"""The reporter of a caller's tries after the first. They are no requests: `requests` of such a series counts tries."""


class Labels(NamedTuple):
    """Istio's labels of a request, as far as the picture needs them (observability contract, section 1.2)."""

    reporter: str = "source"
    source_workload: str = "unknown"
    source_workload_namespace: str = "unknown"
    source_principal: str = "unknown"
    source_app: str = "unknown"
    source_version: str = "unknown"
    destination_workload: str = "unknown"
    destination_workload_namespace: str = "unknown"
    destination_principal: str = "unknown"
    destination_app: str = "unknown"
    destination_version: str = "unknown"
    destination_service: str = "unknown"
    destination_service_name: str = "unknown"
    destination_service_namespace: str = "unknown"
    request_protocol: str = "http"
    response_code: str = "0"
    grpc_response_status: str = ""
    response_flags: str = "-"
    connection_security_policy: str = "none"


def labels_of_retry(cluster: str, workload: str = "unknown", namespace: str = "unknown") -> Labels | None:
    """The series of a caller's tries after the first, which no server may have seen. cluster: as Envoy calls it,
    `outbound|9080|v1|reviews.default.svc.cluster.local`; None for what is no service's. workload, namespace: who
    tries."""
    parts = cluster.split("|")
    if len(parts) != 4:
        return None
    name, _, rest = parts[3].partition(".")
    in_cluster = rest.partition(".")[2].startswith("svc.")
    return Labels(
        RETRY,
        workload,
        namespace,
        destination_service=parts[3],
        destination_service_name=name if in_cluster else parts[3],
        destination_service_namespace=rest.partition(".")[0] if in_cluster else "unknown",
    )


OVERFLOW = Labels(
    destination_service="__overflow__", destination_service_name="__overflow__", source_workload="__overflow__"
)


class Cell:
    """What one series has seen in one stretch of time. Requests in all, and by bucket of their duration."""

    __slots__ = ("buckets", "milliseconds", "request_bytes", "requests", "response_bytes")

    def __init__(self) -> None:
        self.requests = 0
        self.milliseconds = 0.0
        self.request_bytes = 0.0
        self.response_bytes = 0.0
        self.buckets: list[int] | None = None

    def add(self, other: Cell) -> None:
        self.requests += other.requests
        self.milliseconds += other.milliseconds
        self.request_bytes += other.request_bytes
        self.response_bytes += other.response_bytes
        if other.buckets is not None:
            mine = self.buckets or [0] * (len(BOUNDS) + 1)
            self.buckets = [one + two for one, two in zip(mine, other.buckets, strict=True)]

    def quantile(self, share: float) -> float | None:
        """Milliseconds, between the bounds of the bucket that it falls in as Prometheus' histogram_quantile does; None
        without a duration."""
        if self.buckets is None or not (total := sum(self.buckets)):
            return None
        wanted, seen, lower = share * total, 0, 0.0
        for count, upper in zip(self.buckets, BOUNDS, strict=False):
            if count and seen + count >= wanted:
                return lower + (upper - lower) * (wanted - seen) / count
            seen, lower = seen + count, upper
        return float(BOUNDS[-1])

    def __repr__(self) -> str:
        return f"<Cell {self.requests} requests>"


class _Ring:
    """Slots of `width` seconds, the newest at the end."""

    def __init__(self, width: float, most: int) -> None:
        self.width = width
        self.slots: deque[tuple[int, dict[Labels, Cell]]] = deque(maxlen=most)

    def at(self, now: float) -> dict[Labels, Cell]:
        number, after = int(now // self.width), len(self.slots)
        while after and self.slots[after - 1][0] > number:
            after -= 1
        if after and self.slots[after - 1][0] == number:
            return self.slots[after - 1][1]
        if after < len(self.slots) == self.slots.maxlen:  # late, and there is no room for it between the others
            return self.slots[after][1]
        if after == len(self.slots):
            self.slots.append((number, {}))
            return self.slots[-1][1]
        self.slots.insert(after, (number, {}))
        return self.slots[after][1]

    def forget(self, before: float) -> None:
        while self.slots and self.slots[0][0] < before // self.width:
            self.slots.popleft()

    def between(self, start: float, end: float) -> Iterable[tuple[float, dict[Labels, Cell]]]:
        for number, slot in self.slots:
            began = number * self.width
            if began + self.width > start and began < end:
                yield began, slot


@dataclass(frozen=True, slots=True)
class Span:
    """One span, as far as the page shows it. began, ended: seconds since 1970. service: the resource's `service.name`.
    is_error: its status says so. attributes: sorted (name, text) pairs."""

    trace_id: str
    span_id: str
    parent_id: str
    service: str
    name: str
    kind: str
    began: float
    ended: float
    is_error: bool
    attributes: tuple[tuple[str, str], ...]


class Trace:
    """The spans of one trace, as they came in. They are whole once nobody adds to them any more; nobody says when."""

    __slots__ = ("dropped", "spans", "trace_id")

    def __init__(self, trace_id: str) -> None:
        self.trace_id = trace_id
        self.spans: dict[str, Span] = {}
        self.dropped = 0

    @property
    def began(self) -> float:
        return min(span.began for span in self.spans.values())

    @property
    def duration(self) -> float:
        """Seconds."""
        return max(span.ended for span in self.spans.values()) - self.began

    @property
    def root(self) -> Span:
        """The span without a parent; the first one where that has not come yet."""
        return min(self.spans.values(), key=lambda span: (span.parent_id in self.spans, span.began))

    @property
    def has_failed(self) -> bool:
        return any(span.is_error for span in self.spans.values())


class TelemetryStore:
    """clock times are passed in: seconds since 1970, of the control plane's own clock."""

    def __init__(self, max_series: int = MAX_SERIES, max_traces: int = MAX_TRACES) -> None:
        self._lock = threading.Lock()
        self._fine, self._coarse = _Ring(FINE, FINE_SLOTS), _Ring(COARSE, COARSE_SLOTS)
        self._max_series, self._max_traces = max_series, max_traces
        self._series: OrderedDict[Labels, float] = OrderedDict()
        """The series in use, the one that was silent for longest first, with the time of their last request."""
        self._traces: OrderedDict[str, Trace] = OrderedDict()
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[float, float]] = {}
        """Value, and when it was told; the one that was silent for longest first."""
        self.overflowed = 0
        """Requests that were counted under OVERFLOW."""
        self.last_push = 0.0
        self._listeners: list[Callable[[Sequence[Span]], None]] = []

    # Writing

    def add(self, counted: Mapping[Labels, Cell], now: float, at: float | None = None) -> None:
        """What one process has seen since its last push. at: when that was; taken as `now` when far off."""
        when = at if at is not None and now - LATE <= at <= now else now
        with self._lock:
            self.last_push = now
            fine, coarse = self._fine.at(when), self._coarse.at(when)
            for labels, cell in counted.items():
                labels = self._known(labels, cell, now)
                for slot in (fine, coarse):
                    if (mine := slot.get(labels)) is None:
                        mine = slot[labels] = Cell()
                    mine.add(cell)
            self._fine.forget(now - FINE * FINE_SLOTS)
            self._coarse.forget(now - COARSE * COARSE_SLOTS)

    def _known(self, labels: Labels, cell: Cell, now: float) -> Labels:
        if labels in self._series:
            self._series[labels] = now
            self._series.move_to_end(labels)
            return labels
        if len(self._series) >= self._max_series:
            silent, last = next(iter(self._series.items()))
            if last > now - FINE * FINE_SLOTS:
                self.overflowed += cell.requests
                return OVERFLOW
            del self._series[silent]
        self._series[labels] = now
        return labels

    def on_spans(self, tell: Callable[[Sequence[Span]], None]) -> None:
        """`tell` is called with all spans that come in, on the thread that brings them."""
        self._listeners.append(tell)

    def add_spans(self, spans: Iterable[Span]) -> None:
        spans = tuple(spans)
        for tell in self._listeners:
            tell(spans)
        with self._lock:
            for span in spans:
                trace = self._traces.get(span.trace_id)
                if trace is None:
                    trace = self._traces[span.trace_id] = Trace(span.trace_id)
                    if len(self._traces) > self._max_traces:
                        self._traces.popitem(last=False)
                else:
                    self._traces.move_to_end(span.trace_id)
                if len(trace.spans) < MAX_SPANS or span.span_id in trace.spans:
                    trace.spans[span.span_id] = span
                else:
                    trace.dropped += 1

    def set_gauge(self, name: str, attributes: tuple[tuple[str, str], ...], value: float, now: float) -> None:
        """The last value of a gauge of a process (a breaker's state, a certificate's end). Where there are too many, it
        takes the place of the one that was silent for longest, and of none that is still told."""
        key = (name, attributes)
        with self._lock:
            if self._gauges.pop(key, None) is None and len(self._gauges) >= self._max_series:
                silent = next(iter(self._gauges))
                if self._gauges[silent][1] > now - TOLD:
                    return
                del self._gauges[silent]
            self._gauges[key] = (value, now)

    # Reading

    def window(self, start: float, end: float) -> dict[Labels, Cell]:
        """Each series' traffic in [start, end), to whole slots."""
        found: dict[Labels, Cell] = {}
        with self._lock:
            for _, slot in self._ring(start, end).between(start, end):
                for labels, cell in slot.items():
                    if (mine := found.get(labels)) is None:
                        mine = found[labels] = Cell()
                    mine.add(cell)
        return found

    def slots(self, start: float, end: float) -> Sequence[tuple[float, float, dict[Labels, Cell]]]:
        """(when it began, its width, its cells) of each slot with traffic; the cells are not to be changed."""
        with self._lock:
            ring = self._ring(start, end)
            return [(began, ring.width, dict(slot)) for began, slot in ring.between(start, end)]

    def _ring(self, start: float, end: float) -> _Ring:
        newest = self._fine.slots[-1][0] * FINE if self._fine.slots else end
        return self._fine if start >= newest - FINE * FINE_SLOTS else self._coarse

    def traces(self, limit: int = 100) -> list[Trace]:
        """The last ones, the newest first."""
        with self._lock:
            found = []
            for trace in reversed(self._traces.values()):
                copy = Trace(trace.trace_id)
                copy.spans, copy.dropped = dict(trace.spans), trace.dropped
                found.append(copy)
                if len(found) >= limit:
                    break
            return found

    def trace(self, trace_id: str) -> Trace | None:
        with self._lock:
            found = self._traces.get(trace_id)
            if found is None:
                return None
            copy = Trace(trace_id)
            copy.spans, copy.dropped = dict(found.spans), found.dropped
            return copy

    def spans(self, since: float) -> list[Span]:
        """Those that have ended since then, seconds since 1970; the earliest first."""
        with self._lock:
            kept = [span for trace in self._traces.values() for span in trace.spans.values() if span.ended >= since]
        return sorted(kept, key=lambda span: span.ended)

    def gauges(self, now: float) -> list[tuple[str, dict[str, str], float]]:
        """(name, attributes, value) of what was told lately."""
        with self._lock:
            self._gauges = {key: kept for key, kept in self._gauges.items() if kept[1] > now - TOLD}
            return [(name, dict(told), value) for (name, told), (value, _) in self._gauges.items()]

    def __repr__(self) -> str:
        return f"<TelemetryStore {len(self._series)} series, {len(self._traces)} traces>"
