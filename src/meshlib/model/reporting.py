"""What is told of a workload's calls? Istio's Telemetry, as it holds for one workload: spans, metrics, access log."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from meshlib.model.values import dataclass


@dataclass(frozen=True, slots=True)
class SpanTag:
    """One attribute of every span. kind: `literal`, the value itself; `header`, of the request; `environment`, a
    variable of this process; `formatter`, a text with Envoy's command operators. default: where header or variable is
    not there; "" leaves the attribute out, as an empty text does."""

    name: str
    kind: Literal["literal", "header", "environment", "formatter"]
    value: str
    default: str = ""


@dataclass(frozen=True, slots=True)
class NewLabel:
    """A label of Istio's metrics that the configuration makes, or says otherwise. expression: CEL, of its value.
    metrics: those that bear it; none are all of them."""

    name: str
    expression: str
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RemovedLabel:
    """A label that these metrics go without, and others do not."""

    name: str
    metrics: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Told:
    """What is told of the calls of one direction. None: as the process itself is set.

    sampling: of traces that begin here, per million. spans: whether any are made; who is called next is told all the
    same. access_log: whether there is a line for each. log_filter: a CEL expression that must hold; "" is all.
    no_metrics: names of Istio's metrics that are not told. no_labels: labels that all of them go without;
    removed_labels: that some do. new_labels: those that are made. all_traces: whatever the sampling here, or of who
    calls, every call leaves its spans: somebody looks at them as they happen. context: whether who is called is told of
    the trace. workload: whether spans bear Istio's names of this workload.
    """

    sampling: int | None = None
    spans: bool = True
    tags: tuple[SpanTag, ...] = ()
    access_log: bool | None = None
    log_filter: str = ""
    no_metrics: tuple[str, ...] = ()
    no_labels: tuple[str, ...] = ()
    all_traces: bool = False
    new_labels: tuple[NewLabel, ...] = ()
    context: bool = True
    removed_labels: tuple[RemovedLabel, ...] = ()
    workload: bool = True


@dataclass(frozen=True, slots=True)
class Reporting:
    """client: of calls that this workload makes. server: of those that it serves. origin: the objects that say so."""

    client: Told = Told()
    server: Told = Told()
    origin: str = ""

    def tapped(self) -> Reporting:
        """The same, with the spans of every call; where none are made, they are not made now either."""
        return replace(self, client=replace(self.client, all_traces=True), server=replace(self.server, all_traces=True))


AS_SET = Reporting()
"""No Telemetry says anything."""
