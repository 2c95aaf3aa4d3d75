"""How does Prometheus read it? Text exposition and OpenMetrics, on a port of its own that several processes share.

Processes behind one port (gunicorn's workers) each write what they have counted to a file in a folder they share; one
of them holds the port and answers for all. What a process counted stays counted after its end. When the holder ends,
another takes the port over within a second.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from meshlib.state import forks
from meshlib.telemetry.gauges import HELP, LEAST
from meshlib.telemetry.label_sets import differ_by_metric, pairs
from meshlib.telemetry.recorder import BOUNDS, Exemplar, Series, Value, of_metric

_log = logging.getLogger("meshlib.telemetry")

PATHS = frozenset({"/stats/prometheus", "/metrics"})
"""Istio's, and what Prometheus asks for by itself."""
TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class Counted(NamedTuple):
    """All that one process says at one time. hidden: (metric, reporter) pairs that are not told."""

    series: Sequence[Series]
    values: Sequence[Value]
    hidden: frozenset[tuple[str, str]] = frozenset()


def merged(parts: Iterable[Counted]) -> Counted:
    """The sum over processes; of gauges too, which count what is in flight, but for those of which the least counts."""
    series: dict[tuple[str, ...], Series] = {}
    values: dict[tuple[str, tuple[tuple[str, str], ...]], Value] = {}
    for part in parts:
        for each in part.series:
            known = series.get(each.labels)
            if known is None:
                series[each.labels] = each
            else:
                known.add(each)
        for value in part.values:
            key = value.name, value.labels
            before = values.get(key)
            if before is None or value.name == "istio_build":
                values[key] = value
            elif value.name in LEAST:
                values[key] = min(before, value, key=lambda each: each.value)
            else:
                values[key] = before._replace(value=before.value + value.value)
    return Counted(list(series.values()), list(values.values()))


# Text


def render(counted: Counted, openmetrics: bool = False) -> str:
    """The exposition. Exemplars are in OpenMetrics only, the older format has no place for them."""
    lines: list[str] = []
    labelled = [(each, _labels(pairs(each.labels, ""))) for each in counted.series]
    metrics_differ = any(differ_by_metric(each.labels) for each in counted.series)

    def told(name: str) -> list[tuple[Series, str]]:
        shown = [pair for pair in labelled if (name, pair[0].labels[0]) not in counted.hidden]
        if not metrics_differ:
            return shown
        return [(each, _labels(labels)) for labels, each in of_metric((each for each, _ in shown), name)]

    if requests := told("istio_requests_total"):
        _head(lines, "istio_requests_total", "counter", openmetrics)
        lines += [f"istio_requests_total{{{labels}}} {each.count}" for each, labels in requests]
    for name, buckets, total, has_exemplars in (
        ("istio_request_duration_milliseconds", "durations", "milliseconds", openmetrics),
        ("istio_request_bytes", "requests", "request_bytes", False),
        ("istio_response_bytes", "responses", "response_bytes", False),
    ):
        if series := told(name):
            _head(lines, name, "histogram", openmetrics)
            for each, labels in series:
                exemplars = each.exemplars if has_exemplars else {}
                _histogram(lines, name, labels, getattr(each, buckets), getattr(each, total), exemplars)
    names: dict[str, list[Value]] = {}
    for value in counted.values:
        names.setdefault(value.name, []).append(value)
    for name, found in names.items():
        _head(lines, name, "counter" if found[0].is_counter else "gauge", openmetrics)
        lines += [f"{name}{{{_labels(each.labels)}}} {each.value:.17g}".replace("{}", "") for each in found]
    if openmetrics:
        lines.append("# EOF")
    return "\n".join(lines) + "\n"


def _head(lines: list[str], name: str, kind: str, openmetrics: bool) -> None:
    family = name.removesuffix("_total") if openmetrics and kind == "counter" else name
    lines.append(f"# HELP {family} {HELP.get(name, name)}")
    lines.append(f"# TYPE {family} {kind}")


def _histogram(
    lines: list[str], name: str, labels: str, buckets: list[int], total: int, exemplars: dict[int, Exemplar]
) -> None:
    so_far = 0
    for index, amount in enumerate(buckets):
        so_far += amount
        line = f'{name}_bucket{{{labels},le="{_LE[index]}"}} {so_far}'
        if index in exemplars:
            found = exemplars[index]
            line += f' # {{trace_id="{found.trace_id}",span_id="{found.span_id}"}} {found.value:.17g} {found.at:.3f}'
        lines.append(line)
    lines.append(f"{name}_sum{{{labels}}} {total}")
    lines.append(f"{name}_count{{{labels}}} {so_far}")


_LE = [*(f"{bound:g}" if bound < 1e6 else f"{bound:.0f}" for bound in BOUNDS), "+Inf"]
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


def _labels(pairs: Iterable[tuple[str, str]]) -> str:
    return ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in pairs)


# Several processes


class Folder:
    """Where the processes behind one port leave what they have counted. Nobody else may write there."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when the folder can't be used, also when it is another user's."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to another user: remove it, or choose another port to be scraped on")
        self.path = path
        self._own = path / f"{os.getpid()}-{os.urandom(4).hex()}.counts"
        self._lock = forks.lock()

    @classmethod
    def of(cls, port: int) -> Folder:
        """Of this one's process group: what a server's workers have in common, and with their master, too."""
        return cls(Path(tempfile.gettempdir()) / f"meshlib-{os.getuid()}" / f"prometheus-{port}-{os.getpgrp()}")

    def write(self, counted: Counted) -> None:
        self._write(self._own, counted)

    def _write(self, to: Path, counted: Counted) -> None:
        told = (
            [
                (
                    *(each.labels, each.began, each.count, each.milliseconds, each.request_bytes),
                    *(each.response_bytes, each.durations, each.requests, each.responses),
                )
                for each in counted.series
            ],
            [tuple(each) for each in counted.values],
        )
        new = to.with_suffix(".new")
        new.write_bytes(msgspec.msgpack.encode(told))
        new.replace(to)

    def fold(self) -> None:
        """Put together what processes that have ended left, once they are many (a server that renews its workers). For
        the one that holds the port."""
        with self._lock:
            ended = [path for path in self.path.glob("*.counts") if not _is_alive(path)]
            if len(ended) < _MOST_ENDED:
                return
            self._write(self.path / f"0-{os.urandom(4).hex()}.counts", merged(map(self._read, ended)))
            for path in ended:
                path.unlink(missing_ok=True)

    def others(self) -> list[Counted]:
        """What the others have written last; of those that have ended, without their gauges."""
        with self._lock:
            return [self._read(path) for path in sorted(self.path.glob("*.counts")) if path != self._own]

    def _read(self, path: Path) -> Counted:
        try:
            series, values = _FILE.decode(path.read_bytes())
        except (OSError, msgspec.MsgspecError) as error:
            _log.warning("%s can't be read: %s", path, error)
            return Counted((), ())
        is_alive = _is_alive(path)
        return Counted(
            [_series(each) for each in series],
            [value for value in (Value(*each) for each in values) if is_alive or value.is_counter],
        )


_MOST_ENDED = 16
_Written = tuple[tuple[str, ...], float, int, int, int, int, list[int], list[int], list[int]]
_FILE = msgspec.msgpack.Decoder(tuple[list[_Written], list[tuple[str, tuple[tuple[str, str], ...], float, bool]]])


def _series(told: _Written) -> Series:
    each = Series(told[0], told[1])
    each.count, each.milliseconds, each.request_bytes, each.response_bytes = told[2:6]
    each.durations, each.requests, each.responses = told[6:9]
    return each


def _is_alive(file: Path) -> bool:
    """Whether the process that wrote it is; what was folded is nobody's."""
    process = int(file.name.partition("-")[0])
    if not process:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# The port


class Port:
    """The port that Prometheus scrapes; held by one of the processes that share it."""

    def __init__(self, host: str, port: int, collect: Callable[[], Counted]) -> None:
        self._address, self._collect = (host, port), collect
        self._server: _Server | None = None

    @property
    def port(self) -> int:
        """0 while another process holds it."""
        return 0 if self._server is None else int(self._server.server_address[1])

    def try_to_hold(self) -> bool:
        """Whether this process holds the port now."""
        if self._server is not None:
            return True
        try:
            self._server = _Server(self._address, self._collect)
        except OSError as error:
            _log.debug("Prometheus' port %s:%d is held by another process: %s", *self._address, error)
            return False
        threading.Thread(target=self._server.serve_forever, name="meshlib-prometheus", daemon=True).start()
        return True

    def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def forget(self) -> None:
        """In a forked child: the parent serves, this process only gives its copy of the socket back."""
        server, self._server = self._server, None
        if server is not None:
            server.socket.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_port = False

    def __init__(self, address: tuple[str, int], collect: Callable[[], Counted]) -> None:
        self.collect = collect
        super().__init__(address, _Scrape)

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a scrape from %s broke off", client_address, exc_info=True)


class _Scrape(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10

    def do_GET(self) -> None:
        if self.path.partition("?")[0] not in PATHS:
            self.send_error(404)
            return
        openmetrics = "application/openmetrics-text" in self.headers.get("accept", "")
        body = render(self.server.collect(), openmetrics).encode()
        self.send_response(200)
        self.send_header("content-type", OPENMETRICS if openmetrics else TEXT)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
