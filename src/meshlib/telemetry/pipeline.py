"""Who measures in this process, and where does it go? Telemetry: one recorder, its observer, and one thread that
pushes, writes and holds the port. Nothing starts before the first call; a forked child counts from zero."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from meshlib.model import AS_SET, Node, ProcessState, Reporting
from meshlib.policy.observer import Observer
from meshlib.state import forks
from meshlib.telemetry.access_log import AccessLog
from meshlib.telemetry.gauges import values
from meshlib.telemetry.labels import names_of
from meshlib.telemetry.lines import Lines, LinesHandler
from meshlib.telemetry.meter import Meter
from meshlib.telemetry.prometheus import OPENMETRICS, TEXT, Counted, Folder, Port, merged, render
from meshlib.telemetry.recorder import Recorder
from meshlib.telemetry.setup import Setup
from meshlib.telemetry.tracing import Tracer
from meshlib.version import __version__

if TYPE_CHECKING:
    from meshlib.policy.live import Live
    from meshlib.telemetry.otlp import Connect, Deltas, Sender

_log = logging.getLogger("meshlib.telemetry")

_LAST_PUSH = 2.0
"""Seconds that a process which ends gives its last push."""
_WATCHED = 1.0
"""Seconds between two pushes while somebody looks at the calls as they happen."""
_SHARE = 1.0
"""Seconds between two writes of what this process has counted, for the one that is scraped."""


class Telemetry:
    """This process's measurements. recorder: others report through it, too (`recorder.count`).

    read_live: what calls read now, for the state of clusters. connect: how the control plane is reached, where that is
    who is pushed to; prove: by which metadata each push says who makes it. read_state: of the feed and the certificate.
    """

    def __init__(
        self,
        setup: Setup,
        node: Node,
        read_live: Callable[[], Live],
        connect: Connect | None = None,
        prove: Callable[[], tuple[tuple[str, str], ...]] = tuple,
        read_state: Callable[[], ProcessState] = ProcessState,
    ) -> None:
        self.setup = setup
        self._connect, self._prove = connect, prove
        self.recorder = Recorder(time.time)
        self._node, self._read_live, self._read_state = node, read_live, read_state
        self._port: Port | None = None
        self._began = time.time()
        self._rules = AS_SET
        self._lines = Lines() if setup.keeps_lines else None
        self._handler = LinesHandler(self._lines) if self._lines is not None else None
        self._observe()
        self._forget_threads()

    def _forget_threads(self) -> None:
        self._lock = forks.lock()
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._folder: Folder | None = None

    def _observe(self) -> None:
        """Spans are made only where somebody takes them, and lines of a log only once somebody has asked for them."""
        self._epoch = time.time() - time.monotonic()
        self._meter = Meter(self.recorder, self._node, self.setup.strict)
        self._tracer: Tracer | None = None
        if self.setup.target:
            names = names_of(self._node)
            self._tracer = Tracer(self._meter, self.setup.sampling, random.Random(), self._epoch, names)
        self._access_log: AccessLog | None = None
        self.observer: Observer = self._tracer or self._meter
        self._obey()

    def follow(self, rules: Reporting) -> Observer:
        """What the configuration says is to be told. The observer from now on."""
        if rules != self._rules:
            self._rules = rules
            self._obey()
            if self._is_watched:
                self._wake.set()
        return self.observer

    @property
    def _is_watched(self) -> bool:
        return self._rules.client.all_traces or self._rules.server.all_traces

    def _obey(self) -> None:
        rules = self._rules
        self._meter.follow(rules)
        if self._tracer is not None:
            self._tracer.rules = rules
        is_logging = self.setup.access_log or rules.client.access_log or rules.server.access_log
        if self._lines is not None:
            is_logging = is_logging or self._is_watched
        if self._access_log is None and is_logging:
            self.observer = self._access_log = AccessLog(self.observer, self.setup.access_log, self._epoch, self._lines)
        if self._access_log is not None:
            self._access_log.follow(rules)

    def start(self) -> None:
        """Begin to push and to answer scrapes, if that is wanted and not begun."""
        with self._lock:
            if self._thread is not None or self._stop.is_set() or not (self.setup.target or self.setup.prometheus):
                return
            if self.setup.prometheus is not None:
                host, port = self.setup.prometheus
                try:
                    self._folder = Folder.of(port) if port else None
                except OSError as error:
                    _log.warning("what other processes count can't be shared: %s", error)
                self._port = Port(host, port, self._all_processes)
                self._port.try_to_hold()
            if self._handler is not None:
                logging.getLogger("meshlib").addHandler(self._handler)
            self._thread = threading.Thread(target=self._run, name="meshlib-telemetry", daemon=True)
            self._thread.start()

    def restart_after_fork(self, node: Node) -> Observer:
        """In a forked child: nothing is counted yet, and what was begun is the parent's. The observer from now on."""
        if self._port is not None:
            self._port.forget()
            self._port = None
        self.recorder.forget()
        if self._lines is not None:
            self._lines.forget()
        self._node, self._began = node, time.time()
        self._observe()
        self._forget_threads()
        return self.observer

    def stop(self) -> None:
        """Push what is left, within 2 s, and end."""
        with self._lock:
            self._stop.set()
            self._wake.set()
            thread = self._thread
        if thread is not None:
            thread.join(_LAST_PUSH + 1.0)
        if self._handler is not None:
            logging.getLogger("meshlib").removeHandler(self._handler)
        if self._port is not None:
            self._port.close()

    @property
    def tracer(self) -> Tracer | None:
        """None where nobody takes spans."""
        return self._tracer

    @property
    def prometheus_port(self) -> int:
        """The port that this process is scraped on; 0 while another process holds it, or none is wanted."""
        return 0 if self._port is None else self._port.port

    def exposition(self, accept: str = "") -> tuple[str, bytes]:
        """Content type and body for a scrape, as a route of the application's own may serve them: what all processes
        of this server have counted. accept: the scrape's Accept header."""
        openmetrics = "application/openmetrics-text" in accept
        return OPENMETRICS if openmetrics else TEXT, render(self._all_processes(), openmetrics).encode()

    def _counted(self) -> Counted:
        sides = (("source", self._rules.client), ("destination", self._rules.server))
        hidden = frozenset((name, reporter) for reporter, told in sides for name in told.no_metrics)
        found = values(self.recorder, self._read_live(), __version__, self._read_state())
        shown = [
            each for each in found if not hidden or (each.name, dict(each.labels).get("reporter", "")) not in hidden
        ]
        return Counted(self.recorder.series(), shown, hidden)

    def _all_processes(self) -> Counted:
        own = self._counted()
        others = self._folder.others() if self._folder is not None else ()
        return merged([own, *others])._replace(hidden=own.hidden)

    # The thread

    def _run(self) -> None:
        pushing = self._pushing()
        now = time.monotonic()
        next_push = now + self.setup.interval
        try:
            while not self._stop.is_set():
                wait = next_push - time.monotonic() if pushing is not None else _SHARE
                self._wake.wait(max(0.0, min(wait, _SHARE) if self._port is not None else wait))
                if self._wake.is_set() and not self._stop.is_set():
                    self._wake.clear()
                    next_push = min(next_push, time.monotonic() + _WATCHED)
                self._share()
                if pushing is not None and time.monotonic() >= next_push and not self._stop.is_set():
                    interval = min(self.setup.interval, _WATCHED) if self._is_watched else self.setup.interval
                    next_push = time.monotonic() + interval
                    pushing.push(self._counted(), min(self.setup.interval, 5.0))
            self._share()
            if pushing is not None:
                pushing.push(self._counted(), _LAST_PUSH)
        finally:
            if pushing is not None:
                pushing.close()

    def _share(self) -> None:
        holds = self._port is not None and self._port.try_to_hold()
        if self._folder is not None:
            try:
                self._folder.write(self._counted())
                if holds:
                    self._folder.fold()
            except OSError as error:
                _log.debug("what was counted can't be written: %s", error)

    def _pushing(self) -> _Pushing | None:
        if not self.setup.target:
            return None
        try:
            from meshlib.telemetry.otlp import Deltas, GrpcSender, HttpSender
        except ImportError:
            _log.info("nothing is pushed to %s: install meshlib-proxyless[telemetry]", self.setup.target)
            return None
        sender: Sender
        if "://" in self.setup.target:
            sender = HttpSender(self.setup.target, dict(self.setup.headers))
        else:
            sender = GrpcSender(self.setup.target, self.setup.secure, self._connect, self._prove)
        resource = resource_of(self._node)
        return _Pushing(sender, Deltas(resource, self._began), self.recorder, self._tracer, self._lines, resource)

    def __repr__(self) -> str:
        return f"<Telemetry {self.recorder!r} to {self.setup.target or 'nobody'}>"


class _Pushing:
    def __init__(
        self,
        sender: Sender,
        deltas: Deltas,
        recorder: Recorder,
        tracer: Tracer | None,
        lines: Lines | None,
        resource: Mapping[str, str],
    ) -> None:
        self._sender, self._deltas, self._recorder = sender, deltas, recorder
        self._tracer, self._lines, self._resource = tracer, lines, resource
        self._failures = self._dropped = self._dropped_lines = 0

    def push(self, counted: Counted, timeout: float) -> None:
        self._push_spans(timeout)
        self._push_lines(timeout)
        self._push_metrics(counted, timeout)

    def _push_spans(self, timeout: float) -> None:
        """What can't be delivered is dropped: a trace is worth less the older it is."""
        tracer = self._tracer
        if tracer is None:
            return
        spans = tracer.taken()
        lost = tracer.dropped - self._dropped
        self._dropped = tracer.dropped
        if spans:
            from meshlib.telemetry.otlp import spans_request

            lost += self._lost(
                self._sender.traces, spans_request(self._resource, tracer.written(spans)), timeout, len(spans)
            )
        self._count_lost("spans", lost)

    def _push_lines(self, timeout: float) -> None:
        """As spans: the process's own log has them, too."""
        lines = self._lines
        if lines is None:
            return
        found = lines.taken()
        lost = lines.dropped - self._dropped_lines
        self._dropped_lines = lines.dropped
        if found:
            from meshlib.telemetry.otlp import lines_request

            lost += self._lost(self._sender.logs, lines_request(self._resource, found), timeout, len(found))
        self._count_lost("lines", lost)

    def _lost(self, send: Callable[[bytes, float], None], body: bytes, timeout: float, number: int) -> int:
        """How many of them did not arrive."""
        try:
            send(body, timeout)
        except Exception as error:  # each library has its own; none of them may end the thread
            _log.debug("%d spans or lines are dropped: %s", number, _told(error))
            return number
        return 0

    def _count_lost(self, what: str, number: int) -> None:
        if number:
            self._recorder.count("meshlib_telemetry_dropped_total", (("what", what),), number)

    def _push_metrics(self, counted: Counted, timeout: float) -> None:
        now = time.time()
        body = self._deltas.request(counted.series, counted.values, now, counted.hidden)
        if body is None:
            return
        try:
            self._sender.metrics(body, timeout)
        except Exception as error:  # each library has its own; none of them may end the thread
            self._failures += 1
            if self._failures == 1:
                _log.info("metrics can't be pushed, and are kept for the next push: %s", _told(error))
            return
        self._failures = 0
        self._deltas.arrived(counted.series, counted.values, now)

    def close(self) -> None:
        self._sender.close()


def _told(error: Exception) -> str:
    details = getattr(error, "details", None)  # grpc's errors are long
    return str(details()) if callable(details) else str(error)


def resource_of(node: Node, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """OpenTelemetry's resource: this process. OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME have the last word."""
    environ = os.environ if environ is None else environ
    workload = node.workload
    labels = dict(workload.labels)
    found = {
        "service.name": workload.service or labels.get("app") or workload.name,
        "service.namespace": workload.namespace,
        "service.version": labels.get("version", ""),
        "service.instance.id": node.id,
        "istio.cluster_id": node.cluster_id,
        "istio.workload": workload.name,
        "telemetry.sdk.language": "python",
        "process.pid": str(os.getpid()),
    }
    for pair in environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","):
        name, mark, value = pair.partition("=")
        if mark and name.strip():
            found[name.strip()] = value.strip()
    if name := environ.get("OTEL_SERVICE_NAME", ""):
        found["service.name"] = name
    return {name: value for name, value in found.items() if value}
