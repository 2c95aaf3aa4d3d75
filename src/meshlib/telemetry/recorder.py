"""How much, how often, how slow? One recorder a process: a tuple of labels -> counters and three arrays of buckets.

Everything that measures ends here, and every exporter reads from here, so Prometheus and OTLP can't disagree. Recording
takes about a microsecond: the labels of a kind of call are made once and found again by a short key.

The number of series is bounded. What comes after that is counted in one series whose every label is `__overflow__`, so
that sums stay true and the loss is seen.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

from meshlib.policy.observer import Messages
from meshlib.state import forks
from meshlib.telemetry.label_sets import LABELS, MESSAGE_LABELS, Labels, Pairs, of_messages, pairs

BOUNDS = (
    *(0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0),
    *(30000.0, 60000.0, 300000.0, 600000.0, 1800000.0, 3600000.0),
)
"""Envoy's buckets (source/common/stats/histogram_impl.cc), for milliseconds and bytes alike."""
_WHOLE_BOUNDS = tuple(map(int, BOUNDS))
"""The same for what is counted in whole numbers, which are compared three times as fast with others of their kind."""
MAX_SERIES = 5000
OVERFLOW = "__overflow__"
_SLOTS = len(BOUNDS) + 1


class Exemplar(NamedTuple):
    """A sampled request that fell in a bucket. at: Unix seconds."""

    value: float
    trace_id: str
    span_id: str
    at: float


class Series:
    """One tuple of labels, cumulative since `began` (Unix seconds). The arrays count what fell in each bucket."""

    __slots__ = (
        "began",
        "count",
        "durations",
        "exemplars",
        "labels",
        "messages",
        "milliseconds",
        "request_bytes",
        "requests",
        "response_bytes",
        "responses",
    )

    def __init__(self, labels: Labels, began: float) -> None:
        self.labels, self.began = labels, began
        self.count = 0
        self.milliseconds = self.request_bytes = self.response_bytes = 0
        self.durations = [0] * _SLOTS
        self.requests = [0] * _SLOTS
        self.responses = [0] * _SLOTS
        self.exemplars: dict[int, Exemplar] = {}
        self.messages: list[int] | None = None
        """gRPC messages of requests and of responses, shared by all series that differ in what came of a call only."""

    def copy(self) -> Series:
        """Without the messages, which are counted elsewhere."""
        copy = Series(self.labels, self.began)
        copy.count, copy.milliseconds = self.count, self.milliseconds
        copy.request_bytes, copy.response_bytes = self.request_bytes, self.response_bytes
        copy.durations, copy.requests = list(self.durations), list(self.requests)
        copy.responses, copy.exemplars = list(self.responses), dict(self.exemplars)
        return copy

    def add(self, other: Series) -> None:
        """The sum of both, from now on."""
        self.count += other.count
        self.milliseconds += other.milliseconds
        self.request_bytes += other.request_bytes
        self.response_bytes += other.response_bytes
        for mine, theirs in (
            (self.durations, other.durations),
            (self.requests, other.requests),
            (self.responses, other.responses),
        ):
            for index, amount in enumerate(theirs):
                mine[index] += amount
        self.exemplars.update(other.exemplars)


def of_metric(series: Iterable[Series], metric: str) -> list[tuple[Pairs, Series]]:
    """Each with the labels that this metric bears; those that differ in others only are one."""
    found: dict[Pairs, Series] = {}
    for each in series:
        told = pairs(each.labels, metric)
        if (known := found.get(told)) is None:
            found[told] = each
        else:
            found[told] = both = known.copy()
            both.add(each)
    return list(found.items())


class Value(NamedTuple):
    """A counter or gauge of our own, as it is read."""

    name: str
    labels: Pairs
    value: float
    is_counter: bool


class Recorder:
    """Thread-safe; its lock is held for a microsecond, and never over I/O.

    wall: Unix seconds. max_series: of each kind; more are counted in the overflow's.
    """

    def __init__(self, wall: Callable[[], float], max_series: int = MAX_SERIES) -> None:
        self._wall, self._max = wall, max_series
        self.forget()

    def forget(self) -> None:
        """Begin anew: a forked child has counted nothing yet."""
        self._lock = forks.lock()
        self._found: dict[Hashable, Series] = {}
        self._series: dict[Labels, Series] = {}
        self._counts: dict[tuple[str, Pairs], float] = {}
        self._messages: dict[Labels, list[int]] = {}
        self._followed: dict[Hashable, list[int]] = {}
        self.overflowed = 0

    def forget_keys(self) -> None:
        """Labels are made otherwise from now on. What was counted stays."""
        with self._lock:
            self._found.clear()
            self._followed.clear()

    def request(
        self,
        key: Hashable,
        labels: Callable[[], Labels],
        seconds: float,
        request_bytes: int,
        response_bytes: int,
        exemplar: tuple[str, str] | None = None,
        messages: Messages | None = None,
    ) -> None:
        """One request has ended. key: stands for the labels, which are made only when it is new. messages: of gRPC."""
        series = self.find(key) or self.begin(key, labels())
        self.add(series, seconds, request_bytes, response_bytes, exemplar, messages)

    def find(self, key: Hashable) -> Series | None:
        """What `key` stands for, if it is known."""
        return self._found.get(key)

    def add(
        self,
        series: Series,
        seconds: float,
        request_bytes: int,
        response_bytes: int,
        exemplar: tuple[str, str] | None = None,
        messages: Messages | None = None,
    ) -> None:
        """One request of `series` has ended. messages: of gRPC."""
        milliseconds = int(seconds * 1000)
        bucket = bisect_left(_WHOLE_BOUNDS, milliseconds)
        in_requests = bisect_left(_WHOLE_BOUNDS, request_bytes)
        in_responses = bisect_left(_WHOLE_BOUNDS, response_bytes)
        with self._lock:
            series.count += 1
            series.milliseconds += milliseconds
            series.request_bytes += request_bytes
            series.response_bytes += response_bytes
            series.durations[bucket] += 1
            series.requests[in_requests] += 1
            series.responses[in_responses] += 1
            if messages is not None and messages.report is None:
                messages.report = partial(self._add, series.messages or self._messages_of(series))
            if exemplar is not None:
                series.exemplars[bucket] = Exemplar(milliseconds, *exemplar, self._wall())
        if messages is not None and messages.report is not None:
            messages.report(messages)

    def begin(self, key: Hashable, labels: Labels) -> Series:
        """What `key` stands for from now on."""
        with self._lock:
            series = self._series.get(labels)
            if series is None:
                if len(self._series) >= self._max:
                    self.overflowed += 1
                    labels = (labels[0], *(OVERFLOW,) * (len(LABELS) - 1))
                series = self._series.get(labels) or Series(labels, self._wall())
                self._series[labels] = series
            if len(self._found) >= 4 * self._max:  # keys of endpoints that are long gone
                self._found.clear()
            self._found[key] = series
            return series

    def follow(self, key: Hashable, labels: Callable[[], Labels], messages: Messages) -> None:
        """A stream has begun: its messages are counted as they pass. key, labels: as request's; what came of it is not
        among the labels of messages."""
        shared = self._followed.get(key)
        if shared is None:
            made = labels()
            with self._lock:
                if len(self._followed) >= 4 * self._max:
                    self._followed.clear()
                shared = self._followed[key] = self._shared(made)
        messages.report = partial(self._add, shared)
        messages.report(messages)

    def _add(self, shared: list[int], messages: Messages) -> None:
        """What has passed since it was last told."""
        with self._lock:
            requests, responses = messages.requests, messages.responses
            shared[0] += requests - messages.told[0]
            shared[1] += responses - messages.told[1]
            messages.told = requests, responses

    def _messages_of(self, series: Series) -> list[int]:
        """With the lock held."""
        shared = series.messages = self._shared(series.labels)
        return shared

    def _shared(self, labels: Labels) -> list[int]:
        """With the lock held. labels: LABELS."""
        told = of_messages(labels)
        if told not in self._messages and len(self._messages) >= self._max:
            self.overflowed += 1
            told = (told[0], *(OVERFLOW,) * (len(told) - 1))
        return self._messages.setdefault(told, [0, 0])

    def count(self, name: str, labels: Pairs = (), amount: float = 1) -> None:
        """Add to a counter: Istio's message and TCP counters, and our own (`meshlib_..._total`)."""
        key = name, labels
        with self._lock:
            if key not in self._counts and len(self._counts) >= self._max:
                self.overflowed += 1
                key = name, tuple((each, OVERFLOW) for each, _ in labels)
            self._counts[key] = self._counts.get(key, 0) + amount

    def series(self) -> list[Series]:
        """Copies, consistent each in itself."""
        with self._lock:
            return [each.copy() for each in self._series.values()]

    def counts(self) -> Mapping[tuple[str, Pairs], float]:
        with self._lock:
            counts = dict(self._counts)
            for labels, (requests, responses) in self._messages.items():
                for name, amount in (
                    ("istio_request_messages_total", requests),
                    ("istio_response_messages_total", responses),
                ):
                    told = name, pairs(labels, name, MESSAGE_LABELS)
                    counts[told] = counts.get(told, 0) + amount
            counts["meshlib_telemetry_series_overflow_total", ()] = self.overflowed
            return counts

    def __repr__(self) -> str:
        return f"<Recorder {len(self._series)} series>"
