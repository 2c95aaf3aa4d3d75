"""Who calls whom, how often, and how well? Series -> the graph of the mesh. Pure.

An edge is one caller, one service, and the workload that answered. Both ends report a request: for each combination
of the two, code and flags the destination's word counts where it has given one, and the source's otherwise (a call that
no server saw), as in Kiali's graph (it takes the first of both by the same key).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import msgspec

from meshlib.controlplane.telemetry_store import OVERFLOW, RETRY, Cell, Labels

UNKNOWN = "unknown"


class Rates(msgspec.Struct, frozen=True):
    """rps: requests a second. errors: the share of them, 0 to 1, that failed (5xx, no answer, a gRPC status that is not
    OK). p50, p95, p99: milliseconds; null without a request. bytes_in, bytes_out: a second."""

    rps: float = 0.0
    errors: float = 0.0
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    bytes_in: float = 0.0
    bytes_out: float = 0.0


class Tries(msgspec.Struct, frozen=True):
    """What the callers of a service have asked for and got (effective), and what that took, each try by itself (actual;
    every try that was followed by another one has failed). success: the share, 0 to 1; rps: a second."""

    effective_success: float
    effective_rps: float
    actual_success: float
    actual_rps: float


class Node(msgspec.Struct, frozen=True):
    """id: `workload:default/reviews-v1`, `service:default/reviews`, `external:www.example.com`, `unknown`. kind:
    workload, service, gateway, external, unknown. badges: of what the configuration does here (`virtual-service`,
    `fault`, `circuit-breaker`, `mirror`, `shadow`...). incoming: what it serves; of a gateway, what goes on
    from it. tries: of a service whose callers tell
    of their calls."""

    id: str
    kind: str
    name: str
    namespace: str = ""
    app: str = ""
    version: str = ""
    health: str = "idle"
    badges: tuple[str, ...] = ()
    incoming: Rates = Rates()
    instances: int = 0
    tries: Tries | None = None


class Edge(msgspec.Struct, frozen=True):
    """mtls: the share of the requests that reached anybody, 0 to 1. codes: requests a second by `code flags`
    (`503 UH`)."""

    id: str
    source: str
    target: str
    protocol: str
    rates: Rates
    mtls: float = 0.0
    health: str = "idle"
    codes: dict[str, float] = {}


class Graph(msgspec.Struct, frozen=True):
    """start, end: seconds since 1970. overflowed: requests whose series was one too many."""

    start: float
    end: float
    nodes: tuple[Node, ...] = ()
    edges: tuple[Edge, ...] = ()
    overflowed: int = 0


def is_error(labels: Labels) -> bool:
    if labels.grpc_response_status:
        return labels.grpc_response_status != "0"
    return labels.response_code == "0" or labels.response_code.startswith("5")


def health(rates: Rates) -> str:
    """Kiali's thresholds for 5xx: any is degraded, a tenth is a failure."""
    if not rates.rps:
        return "idle"
    return "failure" if rates.errors >= 0.1 else "degraded" if rates.errors > 0 else "healthy"


def is_seen(labels: Labels, sees: Callable[[str], bool]) -> bool:
    """Traffic is seen from both of its ends. sees: whether the reader may look into a namespace."""
    ends = labels.source_workload_namespace, labels.destination_workload_namespace, labels.destination_service_namespace
    return any(map(sees, ends))


def agreed(series: Mapping[Labels, Cell]) -> dict[Labels, Cell]:
    """Each request once, whoever has reported it. What is known of an endpoint by its caller only (UF: it never
    answered) stays the caller's."""
    by_key: dict[tuple[object, ...], dict[str, list[tuple[Labels, Cell]]]] = {}
    for labels, cell in series.items():
        key = (
            labels.source_workload,
            labels.source_workload_namespace,
            labels.destination_service,
            labels.destination_workload,
            labels.destination_workload_namespace,
            labels.request_protocol,
            labels.response_code,
            labels.grpc_response_status,
            labels.response_flags,
        )
        by_key.setdefault(key, {}).setdefault(labels.reporter, []).append((labels, cell))
    return {
        labels: cell
        for reported in by_key.values()
        for labels, cell in reported.get("destination") or reported.get("source") or ()
    }


def rates(cells: Iterable[tuple[Labels, Cell]], seconds: float) -> Rates:
    total, failed = Cell(), 0
    for labels, cell in cells:
        total.add(cell)
        if is_error(labels):
            failed += cell.requests
    if not total.requests:
        return Rates()
    return Rates(
        total.requests / seconds,
        failed / total.requests,
        total.quantile(0.5),
        total.quantile(0.95),
        total.quantile(0.99),
        total.request_bytes / seconds,
        total.response_bytes / seconds,
    )


def tries(series: Mapping[Labels, Cell], seconds: float) -> dict[str, Tries]:
    """By node id of the service: before and after retries, as its callers tell."""
    asked: dict[str, int] = {}
    failed: dict[str, int] = {}
    again: dict[str, int] = {}
    for labels, cell in series.items():
        if labels.destination_service_namespace == UNKNOWN or labels == OVERFLOW:
            continue
        name = f"service:{labels.destination_service_namespace}/{labels.destination_service_name}"
        if labels.reporter == RETRY:
            again[name] = again.get(name, 0) + cell.requests
        elif labels.reporter == "source":
            asked[name] = asked.get(name, 0) + cell.requests
            failed[name] = failed.get(name, 0) + (cell.requests if is_error(labels) else 0)
    found = {}
    for name, requests in asked.items():
        if requests:
            good, sent = requests - failed[name], requests + again.get(name, 0)
            found[name] = Tries(good / requests, requests / seconds, good / sent, sent / seconds)
    return found


def source_id(labels: Labels) -> str:
    if labels.source_workload == UNKNOWN:
        return UNKNOWN
    return f"workload:{labels.source_workload_namespace}/{labels.source_workload}"


def target_id(labels: Labels) -> str:
    """The workload that answered, or the service where none did; a host outside the mesh by its name."""
    if labels.destination_workload != UNKNOWN:
        return f"workload:{labels.destination_workload_namespace}/{labels.destination_workload}"
    if labels.destination_service_namespace != UNKNOWN:
        return f"service:{labels.destination_service_namespace}/{labels.destination_service_name}"
    name = labels.destination_service if labels.destination_service != UNKNOWN else labels.destination_service_name
    return UNKNOWN if name == UNKNOWN else f"external:{name}"


class _Known:
    """What is said of a node by whoever knows it."""

    __slots__ = ("app", "cells", "kind", "name", "namespace", "version")

    def __init__(self, kind: str, name: str, namespace: str = "", app: str = "", version: str = "") -> None:
        self.kind, self.name, self.namespace, self.app, self.version = kind, name, namespace, app, version
        self.cells: list[tuple[Labels, Cell]] = []


def graph(
    series: Mapping[Labels, Cell], start: float, end: float, overflowed: int = 0, *, services: bool = False
) -> Graph:
    """The graph of [start, end). Badges and instances are added by who knows the configuration.

    services: each service is a node between its callers and its workloads, as Kiali draws it.
    """
    seconds = max(end - start, 1e-9)
    tried = tries(series, seconds)
    nodes: dict[str, _Known] = {}
    edges: dict[tuple[str, str, str], list[tuple[Labels, Cell]]] = {}
    for labels, cell in agreed(series).items():
        if labels == OVERFLOW:
            continue
        source, target = source_id(labels), target_id(labels)
        if source not in nodes:
            nodes[source] = _Known(
                "unknown" if source == UNKNOWN else "workload",
                labels.source_workload,
                _known(labels.source_workload_namespace),
                _known(labels.source_app),
                _known(labels.source_version),
            )
        if target not in nodes:
            nodes[target] = _target(target, labels)
        nodes[target].cells.append((labels, cell))
        steps = [source, target]
        if services and target.startswith("workload:") and labels.destination_service_namespace != UNKNOWN:
            between = f"service:{labels.destination_service_namespace}/{labels.destination_service_name}"
            if between not in nodes:
                nodes[between] = _target(between, labels)
            nodes[between].cells.append((labels, cell))
            steps.insert(1, between)
        for one, two in itertools.pairwise(steps):
            edges.setdefault((one, two, labels.request_protocol), []).append((labels, cell))
    made = []
    for (source, target, protocol), cells in sorted(edges.items()):
        total = rates(cells, seconds)
        # A call that reached nobody (a fault, no endpoint) had no connection to be secured.
        requests = sum(cell.requests for labels, cell in cells if labels.connection_security_policy != UNKNOWN)
        secured = sum(cell.requests for labels, cell in cells if labels.connection_security_policy == "mutual_tls")
        codes: dict[str, float] = {}
        for labels, cell in cells:
            code = f"{labels.response_code} {labels.response_flags}".removesuffix(" -")
            codes[code] = codes.get(code, 0.0) + cell.requests / seconds
        made.append(
            Edge(
                f"{source}>{target}>{protocol}",
                source,
                target,
                protocol,
                total,
                secured / requests if requests else 0.0,
                health(total),
                dict(sorted(codes.items())),
            )
        )
    return Graph(
        start,
        end,
        tuple(
            Node(
                name,
                known.kind,
                known.name,
                known.namespace,
                known.app,
                known.version,
                health(incoming),
                (),
                incoming,
                tries=tried.get(name),
            )
            for name, known in sorted(nodes.items())
            for incoming in (rates(known.cells, seconds),)
        ),
        tuple(made),
        overflowed,
    )


def _target(target: str, labels: Labels) -> _Known:
    kind = target.partition(":")[0]
    if kind == "workload":
        return _Known(
            kind,
            labels.destination_workload,
            labels.destination_workload_namespace,
            _known(labels.destination_app),
            _known(labels.destination_version),
        )
    if kind == "service":
        return _Known(kind, labels.destination_service_name, labels.destination_service_namespace)
    return _Known(kind, target.partition(":")[2] or UNKNOWN)


def _known(label: str) -> str:
    return "" if label == UNKNOWN else label
