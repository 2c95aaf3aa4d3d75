"""Where do the figures of the picture come from? The control plane's own memory, or a Prometheus that scrapes the mesh.

Both give series of the same form, so that graph, series and stat are computed from either alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import httpx
import msgspec

from meshlib.controlplane.telemetry_store import BOUNDS, RETRY, Cell, Labels, TelemetryStore, labels_of_retry

KEPT = 4.0
"""Seconds for which an answer of Prometheus is good: every reader of the stream asks each second."""
LEAST_STEP, MOST_POINTS = 30.0, 180
"""Seconds, of a series' points: a shorter one holds less than two scrapes at the usual interval."""
TIMEOUT = 10.0
MOST_BYTES = 64 * 1024 * 1024
_BY = ", ".join(Labels._fields)
_COUNTS = {
    "istio_requests_total": "requests",
    "istio_request_duration_milliseconds_sum": "milliseconds",
    "istio_request_bytes_sum": "request_bytes",
    "istio_response_bytes_sum": "response_bytes",
}
_BUCKETS = "istio_request_duration_milliseconds_bucket"
_TRIES = "meshlib_retries_total"
Slot = tuple[float, float, Mapping[Labels, Cell]]
"""When it began (seconds since 1970), its width (seconds), its cells."""


class SeriesUnavailable(Exception):
    """Whoever has the figures does not tell them. The message is for people."""


class Series(Protocol):
    @property
    def overflowed(self) -> int:
        """Requests that are counted under OVERFLOW."""

    async def window(self, start: float, end: float) -> Mapping[Labels, Cell]:
        """Each series' traffic in [start, end), seconds since 1970. Raises SeriesUnavailable."""

    async def slots(self, start: float, end: float) -> Sequence[Slot]:
        """The same by stretches of time, the earliest first. Raises SeriesUnavailable."""


class Remembered:
    """What processes have pushed to this control plane."""

    def __init__(self, store: TelemetryStore) -> None:
        self._store = store

    @property
    def overflowed(self) -> int:
        return self._store.overflowed

    async def window(self, start: float, end: float) -> Mapping[Labels, Cell]:
        return self._store.window(start, end)

    async def slots(self, start: float, end: float) -> Sequence[Slot]:
        return self._store.slots(start, end)


class _Answer(msgspec.Struct):
    """Prometheus' /api/v1/query and query_range."""

    data: dict[str, Any] = {}


class Scraped:
    """What a Prometheus at `url` has scraped. The increases are extrapolated as its own graphs are, so numbers of
    requests are near, and no whole ones. clock: monotonic seconds."""

    overflowed = 0

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.url, self._clock = url.rstrip("/"), clock
        self._http = httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT, trust_env=False)
        self._kept: dict[tuple[float, int], tuple[float, Mapping[Labels, Cell]]] = {}

    async def close(self) -> None:
        await self._http.aclose()

    async def window(self, start: float, end: float) -> Mapping[Labels, Cell]:
        seconds, now = end - start, self._clock()
        key = (round(seconds, 3), int(end // KEPT))
        self._kept = {key: kept for key, kept in self._kept.items() if kept[0] > now - KEPT}
        if key not in self._kept:
            found: dict[float, dict[Labels, Cell]] = {}
            for metric in (*_COUNTS, _BUCKETS, _TRIES):
                result = await self._ask("/api/v1/query", {"query": _increase(metric, seconds), "time": f"{end:.3f}"})
                for each in result:
                    _add(found, metric, each["metric"], [each["value"]])
            self._kept[key] = (now, next((_finished(cells) for cells in found.values()), {}))
        return self._kept[key][1]

    async def slots(self, start: float, end: float) -> Sequence[Slot]:
        step = max(LEAST_STEP, math.ceil((end - start) / MOST_POINTS))
        found: dict[float, dict[Labels, Cell]] = {}
        span = {"start": f"{start + step:.3f}", "end": f"{max(end, start + step):.3f}", "step": f"{step:.0f}"}
        for metric in (*_COUNTS, _BUCKETS, _TRIES):
            for each in await self._ask("/api/v1/query_range", {"query": _increase(metric, step), **span}):
                _add(found, metric, each["metric"], each["values"])
        return [(at - step, step, _finished(cells)) for at, cells in sorted(found.items())]

    async def _ask(self, path: str, query: Mapping[str, str]) -> Sequence[Mapping[str, Any]]:
        body = bytearray()
        try:
            async with self._http.stream("GET", path, params=query) as response:
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > MOST_BYTES:
                        raise SeriesUnavailable(f"Prometheus at {self.url} has more series than fit in {MOST_BYTES} B")
            if response.status_code != 200:
                raise SeriesUnavailable(f"Prometheus at {self.url} answers {response.status_code} to a query")
            result = msgspec.json.decode(bytes(body), type=_Answer).data["result"]
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SeriesUnavailable(
                f"Prometheus at {self.url} does not answer ({type(error).__name__}): is it running, and is "
                "--prometheus-url right?"
            ) from None
        except (msgspec.DecodeError, KeyError):
            raise SeriesUnavailable(
                f"{self.url} answers, but not as Prometheus does: is --prometheus-url right?"
            ) from None
        return result if isinstance(result, list) else []

    def __repr__(self) -> str:
        return f"<Scraped {self.url}>"


def _increase(metric: str, seconds: float) -> str:
    by = {_BUCKETS: f"{_BY}, le", _TRIES: "cluster"}.get(metric, _BY)
    return f"sum by ({by}) (increase({metric}[{max(1, round(seconds))}s])) > 0"


def _add(
    found: dict[float, dict[Labels, Cell]], metric: str, told: Mapping[str, str], values: Sequence[Sequence[Any]]
) -> None:
    labels: Labels | None = Labels(**{name: told[name] for name in Labels._fields if name in told})
    if metric == _TRIES:
        labels = labels_of_retry(told.get("cluster", ""))
    if labels is None:
        return
    for at, text in values:
        value = float(text)
        cell = found.setdefault(float(at), {}).setdefault(labels, Cell())
        if metric == _BUCKETS:
            bound = float(told.get("le", "nan"))
            index = len(BOUNDS) if math.isinf(bound) else next((i for i, b in enumerate(BOUNDS) if b == bound), None)
            if index is not None:
                cell.buckets = cell.buckets or [0] * (len(BOUNDS) + 1)
                cell.buckets[index] = round(value)
        elif metric == _TRIES or _COUNTS[metric] == "requests":
            cell.requests = round(value)
        else:
            setattr(cell, _COUNTS[metric], value)


def _finished(cells: dict[Labels, Cell]) -> dict[Labels, Cell]:
    """Prometheus' buckets hold what those below them hold; ours do not. Buckets that hold nothing are not told."""
    for cell in cells.values():
        if cell.buckets is not None:
            below = 0
            for index, until in enumerate(cell.buckets):
                cell.buckets[index] = max(0, until - below)
                below = max(below, until)
    return {labels: cell for labels, cell in cells.items() if cell.requests or labels.reporter == RETRY}
