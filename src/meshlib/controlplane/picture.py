"""What does the page ask? The graph, series, traces, changes, and a stream of them; and the page itself.

Everything here only reads, and shows of it what the reader's namespaces allow: traffic from or to them, spans and
changes in them. The page's own files are the same for everybody; they are served
with a Content-Security-Policy that lets nothing in from elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from importlib.resources import files
from typing import Protocol

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.access_rules import EVERYWHERE, Role
from meshlib.controlplane.admin import query_of
from meshlib.controlplane.audit import redacted
from meshlib.controlplane.before_and_after import before_and_after, sides, touched_by
from meshlib.controlplane.breakers import BreakerDetail, Ejected, Gauges, breaker_of, ejected_of, live_badges
from meshlib.controlplane.concerns import Concerned
from meshlib.controlplane.gate import JSON, Admission, admission_of
from meshlib.controlplane.graph import Graph, Node, Rates, agreed, graph, health, is_seen, rates, source_id, target_id
from meshlib.controlplane.history import Change, History
from meshlib.controlplane.hops import hops, overhead
from meshlib.controlplane.log_store import LogStore
from meshlib.controlplane.otlp import Receiver
from meshlib.controlplane.series import Remembered, Series, SeriesUnavailable
from meshlib.controlplane.taps import request_of
from meshlib.controlplane.telemetry_store import MAX_TRACES, Labels, Span, TelemetryStore, Trace
from meshlib.istio import resources as r
from meshlib.istio.mesh_settings import mesh_settings
from meshlib.istio.resources import Object

logger = logging.getLogger("meshlib.controlplane.picture")

STEP = 0.75
"""Seconds between two looks of the stream: with the second that a process of the demo keeps what it has counted, a
request shows within two."""
_CSP = (
    "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


Sees = Callable[[str], bool]
"""Whether the reader may see what is in this namespace."""


class Point(msgspec.Struct, frozen=True):
    """One stretch of time: when it began (seconds since 1970), its length, and what happened."""

    at: float
    seconds: float
    rates: Rates


class SeriesOf(msgspec.Struct, frozen=True):
    points: tuple[Point, ...] = ()


class TraceHead(msgspec.Struct, frozen=True):
    """duration: seconds. failed: some span is an error. request, status: of the span it began with, `GET /productpage`;
    "" and 0 where that is not told."""

    trace_id: str
    service: str
    name: str
    began: float
    duration: float
    spans: int
    failed: bool
    request: str = ""
    status: int = 0


class Traces(msgspec.Struct, frozen=True):
    traces: tuple[TraceHead, ...] = ()


class WholeTrace(msgspec.Struct, frozen=True):
    """spans: the earliest first."""

    trace_id: str
    dropped: int
    spans: tuple[Span, ...]


class Changes(msgspec.Struct, frozen=True):
    changes: tuple[Change, ...] = ()


class Subset(msgspec.Struct, frozen=True):
    name: str
    labels: dict[str, str] = {}


class Share(msgspec.Struct, frozen=True):
    """weight: percent."""

    subset: str
    weight: int


class Steering(msgspec.Struct, frozen=True):
    """What a route does besides choosing. delay, timeout: seconds, 0 is none. delayed, aborted: percent of requests.
    abort: the HTTP status that the aborted get."""

    delay: float = 0.0
    delayed: float = 0.0
    abort: int = 0
    aborted: float = 0.0
    timeout: float = 0.0


class Certificate(msgspec.Struct, frozen=True):
    """Of one process. expires: seconds since 1970; 0: it has told of none."""

    process: str
    workload: str
    expires: float = 0.0


class ServiceDetail(msgspec.Struct, frozen=True):
    """One service, as its part of the page shows it. subsets: of its DestinationRule. split, steering: what the last
    route of its VirtualService does, and where that goes to subsets. objects: that say something of it. rule: the
    VirtualService. rule_name: its name, where it is in the service's namespace and of this service only. breaker,
    ejected: what its callers tell. certificates: of the processes behind it."""

    name: str
    namespace: str
    host: str
    ports: tuple[int, ...] = ()
    endpoints: tuple[api.ServiceEndpoint, ...] = ()
    subsets: tuple[Subset, ...] = ()
    split: tuple[Share, ...] = ()
    objects: tuple[str, ...] = ()
    rule: str = ""
    rule_name: str = ""
    steering: Steering = Steering()
    breaker: BreakerDetail | None = None
    ejected: tuple[Ejected, ...] = ()
    certificates: tuple[Certificate, ...] = ()


class Condition(msgspec.Struct, frozen=True):
    """Why a graph may be empty. clients: connected processes; last_push: seconds since the last telemetry, null is
    never."""

    clients: int
    last_push: float | None


class Pictured(Protocol):
    """What the page needs to know of the configuration. Called on the event loop; must not block."""

    def clients(self) -> Sequence[api.Client]: ...
    def endpoints(self) -> Sequence[api.ServiceEndpoints]: ...
    def objects(self) -> Sequence[Object]: ...
    def badges(self) -> Mapping[str, tuple[str, ...]]:
        """By node id of a service (`service:default/reviews`)."""


class Picture:
    """clock: seconds since 1970. series: where the graph's figures come from; None: from `store`, as traces do."""

    def __init__(
        self,
        store: TelemetryStore,
        history: History,
        view: Pictured,
        clock: Callable[[], float] = time.time,
        series: Series | None = None,
        logs: LogStore | None = None,
    ) -> None:
        self._store, self._history, self._view, self._clock = store, history, view, clock
        self._figures = Remembered(store) if series is None else series
        self.receiver = Receiver(store, clock, logs)

    def routes(self) -> list[Route]:
        return [
            Route("/", lambda _: RedirectResponse("/dashboard/")),
            Route("/dashboard/{name:path}", self._page),
            Route("/v1/graph", self._graph),
            Route("/v1/series", self._series),
            Route("/v1/overhead", self._overhead),
            Route("/v1/services/{namespace}/{name}", self._service),
            Route("/v1/traces", self._traces),
            Route("/v1/traces/{trace_id}", self._trace),
            Route("/v1/changes", self._changes),
            Route("/v1/changes/{number:int}", self._before_and_after),
            Route("/v1/stream", self._stream),
            Route("/v1/metrics", self.receiver.post_metrics, methods=["POST"]),
            Route("/v1/traces", self.receiver.post_traces, methods=["POST"]),
            Route("/v1/logs", self.receiver.post_logs, methods=["POST"]),
        ]

    async def graph(
        self, seconds: float, end: float | None = None, services: bool = True, sees: Sees = lambda namespace: True
    ) -> Graph:
        """The last `seconds` before `end`, with what the configuration does and who is connected. Raises
        SeriesUnavailable."""
        is_now = end is None
        end = self._clock() if end is None else end
        start = end - seconds
        known_cells = await self._figures.window(start, end)
        cells = {labels: cell for labels, cell in known_cells.items() if is_seen(labels, sees)}
        made = graph(cells, start, end, self._figures.overflowed, services=services)
        badges = {name: told for name, told in self._view.badges().items() if sees(_namespace_of_node(name))}
        if is_now:  # of the past nobody remembers them
            for name, told in live_badges(self._states(sees), lambda host: _service_of(host, "")).items():
                badges[name] = tuple(sorted({*badges.get(name, ()), *told}))
        clients = [client for client in self._view.clients() if sees(client.namespace)]
        instances: dict[str, int] = {}
        gateways = set()
        for client in clients:
            name = f"workload:{client.namespace}/{client.workload}"
            instances[name] = instances.get(name, 0) + 1
            if client.kind == "router":
                gateways.add(name)
        told_by_gateways = [(labels, cell) for labels, cell in agreed(cells).items() if source_id(labels) in gateways]
        nodes = []
        for node in made.nodes:
            incoming, state = node.incoming, node.health
            if node.id in gateways and not incoming.rps:
                # Nobody reports what comes in at a gateway: it is what goes on from there.
                incoming = rates([each for each in told_by_gateways if source_id(each[0]) == node.id], seconds)
                state = health(incoming)
            nodes.append(
                msgspec.structs.replace(
                    node,
                    incoming=incoming,
                    health=state,
                    kind="gateway" if node.id in gateways else node.kind,
                    badges=badges.get(node.id, ()),
                    instances=instances.get(node.id, 0),
                )
            )
        # Who is connected and idle is part of the picture, too.
        known = {node.id for node in nodes}
        for client in clients:
            name = f"workload:{client.namespace}/{client.workload}"
            if name not in known and client.workload:
                known.add(name)
                kind = "gateway" if name in gateways else "workload"
                idle = Node(name, kind, client.workload, client.namespace, instances=instances[name])
                nodes.append(idle)
        nodes.sort(key=lambda node: node.id)
        return msgspec.structs.replace(made, nodes=tuple(nodes))

    def _states(self, sees: Sees) -> list[tuple[str, dict[str, str], float]]:
        """What processes have told of their own state in the last minute."""
        told = self._store.gauges(self._clock())
        return [each for each in told if sees(each[1].get("service.namespace", ""))]

    def _certificates(self, service: api.ServiceEndpoints, states: Gauges) -> tuple[Certificate, ...]:
        """Of the connected processes behind it."""
        expiry = {
            told.get("service.instance.id", ""): value
            for name, told, value in states
            if name == "meshlib_certificate_expiry_timestamp_seconds"
        }
        workloads = {each.workload for each in service.endpoints if each.workload}
        return tuple(
            Certificate(each.name, each.workload, expiry.get(each.id, 0.0))
            for each in self._view.clients()
            if each.namespace == service.namespace and each.workload in workloads
        )

    async def _graph(self, request: Request) -> Response:
        query = query_of(request, "seconds", "end", "services")
        seconds = _number(query, "seconds", 60.0)
        end = _number(query, "end", 0.0) or None
        sees = admission_of(request).powers.sees
        try:
            return JSON(await self.graph(seconds, end, query["services"] != "false", sees))
        except SeriesUnavailable as error:
            raise HTTPException(502, str(error)) from None

    async def _series(self, request: Request) -> Response:
        query = query_of(request, "node", "source", "target", "seconds", "end")
        end = _number(query, "end", 0.0) or self._clock()
        start = end - _number(query, "seconds", 900.0)
        wanted, sees = _selection(query), admission_of(request).powers.sees
        points = []
        try:
            slots = await self._figures.slots(start, end)
        except SeriesUnavailable as error:
            raise HTTPException(502, str(error)) from None
        for began, width, cells in slots:
            found = [
                (labels, cell) for labels, cell in agreed(cells).items() if wanted(labels) and is_seen(labels, sees)
            ]
            points.append(Point(began, width, rates(found, width)))
        return JSON(SeriesOf(tuple(points)))

    async def _overhead(self, request: Request) -> Response:
        """What the calls of an edge take between their ends, by the traces that are remembered."""
        query = query_of(request, "source", "target", "seconds", "end")
        end = _number(query, "end", 0.0) or self._clock()
        start, sees = end - _number(query, "seconds", 900.0), admission_of(request).powers.sees
        whole = (each for each in self._store.traces(MAX_TRACES) if start <= each.began < end)
        traces = (each for each in (_seen(trace, sees) for trace in whole) if each is not None)
        source, target = query["source"], query["target"]
        return JSON(
            overhead(
                hop
                for hop in hops(traces)
                if source in ("", hop.source, hop.service) and target in ("", hop.target, hop.service)
            )
        )

    async def _service(self, request: Request) -> Response:
        namespace, name = request.path_params["namespace"], request.path_params["name"]
        powers = admission_of(request).powers
        for each in self._view.endpoints():
            if (each.namespace, each.name) == (namespace, name) and powers.sees(namespace):
                detail = detail_of(each, [told for told in self._view.objects() if powers.sees(told.namespace)])
                node, states = f"service:{namespace}/{name}", self._states(powers.sees)

                def is_it(host: str, where: str, node: str = node) -> bool:
                    return _service_of(host, where) == node

                breaker = breaker_of(name, namespace, is_it, self._view.objects(), states)
                if not powers.has(Role.OPERATOR, namespace):
                    detail = msgspec.structs.replace(detail, rule=redacted(detail.rule))
                    texts = {key: redacted(getattr(breaker, key)) for key in ("before", "open", "close", "release")}
                    breaker = msgspec.structs.replace(breaker, **texts)
                return JSON(
                    msgspec.structs.replace(
                        detail,
                        breaker=breaker,
                        ejected=ejected_of(is_it, namespace, states),
                        certificates=self._certificates(each, states),
                    )
                )
        raise HTTPException(404, f"there is no service {namespace}/{name}: meshctl get endpoints shows what there is")

    async def _traces(self, request: Request) -> Response:
        query = query_of(request, "limit", "service", "failed", "slower")
        slower = _number(query, "slower", 0.0)
        heads = []
        sees = admission_of(request).powers.sees
        for whole in self._store.traces(MAX_TRACES):
            trace = _seen(whole, sees)
            if trace is None:
                continue
            if query["failed"] == "true" and not trace.has_failed:
                continue
            if trace.duration < slower:
                continue
            if query["service"] and all(span.service != query["service"] for span in trace.spans.values()):
                continue
            heads.append(_head(trace))
            if len(heads) >= _number(query, "limit", 100):
                break
        return JSON(Traces(tuple(heads)))

    async def _trace(self, request: Request) -> Response:
        kept = self._store.trace(request.path_params["trace_id"])
        found = _seen(kept, admission_of(request).powers.sees) if kept is not None else None
        if found is None:
            raise HTTPException(404, "this trace is not known (any more)")
        spans = sorted(found.spans.values(), key=lambda span: (span.began, -span.ended))
        return JSON(WholeTrace(found.trace_id, found.dropped, tuple(spans)))

    async def _changes(self, request: Request) -> Response:
        query = query_of(request, "since")
        sees = admission_of(request).powers.sees
        found = self._history.since(_number(query, "since", 0.0))
        return JSON(Changes(tuple(each for each in found if sees(each.namespace))))

    async def _before_and_after(self, request: Request) -> Response:
        query, number = query_of(request, "seconds"), request.path_params["number"]
        seconds = _number(query, "seconds", 60.0)
        if not 1 <= seconds <= 3600:
            raise HTTPException(400, f"seconds must be between 1 and 3600, not {query['seconds']!r}")
        sees, now = admission_of(request).powers.sees, self._clock()
        known = [each for each in self._history.since() if sees(each.namespace)]
        change = next((each for each in known if each.number == number), None)
        if change is None:
            raise HTTPException(404, f"there is no change {number} (any more)")
        windows = sides(change.at, seconds, now)
        services = [each for each in self._view.endpoints() if sees(each.namespace)]
        touched = touched_by(change, services, mesh_settings(self._view.objects()).root_namespace)
        try:
            slots = await self._figures.slots(windows[0][0], min(windows[1][1], now)) if touched else ()
        except SeriesUnavailable as error:
            raise HTTPException(502, str(error)) from None
        seen = [
            (began, width, {labels: cell for labels, cell in cells.items() if is_seen(labels, sees)})
            for began, width, cells in slots
        ]
        return JSON(before_and_after(change, touched, windows, seen, now, known))

    async def _stream(self, request: Request) -> Response:
        query = query_of(request, "seconds", "services")
        seconds = _number(query, "seconds", 60.0)
        return StreamingResponse(
            self._events(seconds, query["services"] != "false", admission_of(request)),
            media_type="text/event-stream",
            headers={"cache-control": "no-store"},
        )

    async def _events(self, seconds: float, services: bool, admission: Admission) -> AsyncIterator[bytes]:
        """First the whole graph, then what has changed of it, every STEP; a comment where nothing has. It ends with
        the reader's right to see it."""
        nodes: dict[str, bytes] = {}
        edges: dict[str, bytes] = {}
        changes = -1
        while (powers := admission.current()).grants:
            try:
                made = await self.graph(seconds, services=services, sees=powers.sees)
            except SeriesUnavailable as error:
                logger.warning("%s", error)
                yield b": no figures\n\n"
                await asyncio.sleep(STEP)
                continue
            new_nodes = {node.id: msgspec.json.encode(node) for node in made.nodes}
            new_edges = {edge.id: msgspec.json.encode(edge) for edge in made.edges}
            pushed = self._store.last_push
            known = [each for each in self._history.since() if powers.sees(each.namespace)]
            number = known[-1].number if known else 0
            patch = {
                "start": made.start,
                "end": made.end,
                "nodes": [msgspec.Raw(text) for name, text in new_nodes.items() if nodes.get(name) != text],
                "edges": [msgspec.Raw(text) for name, text in new_edges.items() if edges.get(name) != text],
                "gone": [name for name in (*nodes, *edges) if name not in new_nodes and name not in new_edges],
                "overflowed": made.overflowed,
                "condition": Condition(
                    sum(powers.sees(each.namespace) for each in self._view.clients()),
                    self._clock() - pushed if pushed else None,
                ),
                "change": number,
            }
            has_news = patch["nodes"] or patch["edges"] or patch["gone"] or number != changes or not known
            nodes, edges, changes = new_nodes, new_edges, number
            yield b"event: graph\ndata: " + msgspec.json.encode(patch) + b"\n\n" if has_news else b": nothing new\n\n"
            await asyncio.sleep(STEP)

    async def _page(self, request: Request) -> Response:
        name = request.path_params["name"] or "index.html"
        ending = name[name.rfind(".") :]
        if ending not in _TYPES or "/" in name:
            raise HTTPException(404, f"there is no {name}")
        found = files("meshlib.controlplane").joinpath("dashboard", name)
        if not found.is_file():
            raise HTTPException(404, f"there is no {name}")
        return Response(
            found.read_bytes(),
            media_type=_TYPES[ending],
            headers={
                "content-security-policy": _CSP,
                "x-content-type-options": "nosniff",
                "referrer-policy": "no-referrer",
                "cache-control": "no-cache",
            },
        )


def _seen(trace: Trace, sees: Sees) -> Trace | None:
    """The part of a trace that is in the reader's namespaces; a span that does not say where it was is in none."""
    if sees(EVERYWHERE):
        return trace
    spans = {key: span for key, span in trace.spans.items() if sees(dict(span.attributes).get("service.namespace", ""))}
    if not spans:
        return None
    found = Trace(trace.trace_id)
    found.spans, found.dropped = spans, trace.dropped
    return found


def _namespace_of_node(name: str) -> str:
    """`service:default/reviews` -> `default`."""
    return name.partition(":")[2].partition("/")[0]


def _service_of(host: str, namespace: str) -> str:
    """`service:default/reviews`, for `reviews` and `reviews.default.svc.cluster.local` alike."""
    name, _, rest = host.partition(".")
    return f"service:{rest.partition('.')[0] or namespace}/{name}"


def badges_of(objects: Sequence[Object]) -> dict[str, tuple[str, ...]]:
    """What the configuration does to a service, by its node's id: `virtual-service` and what it is for (`routing`,
    `shifting`, `fault`, `mirror`, `timeout`, `retries`), `circuit-breaker`."""
    found: dict[str, set[str]] = {}
    for each in objects:
        spec = each.spec
        if isinstance(spec, r.VirtualService):
            told = {"virtual-service"}
            for rule in spec.http:
                does = {
                    "routing": bool(rule.match),
                    "shifting": len(rule.route) > 1,
                    "fault": rule.fault is not None,
                    "timeout": rule.timeout is not None,
                    "retries": rule.retries is not None,
                    "mirror": rule.mirror is not None or bool(rule.mirrors),
                }
                told.update(name for name, is_so in does.items() if is_so)
            for host in spec.hosts:
                if "*" not in host:
                    found.setdefault(_service_of(host, each.namespace), set()).update(told)
        elif isinstance(spec, r.DestinationRule):
            policies = [spec.traffic_policy, *(subset.traffic_policy for subset in spec.subsets)]
            has_breaker = any(
                policy is not None and (policy.connection_pool is not None or policy.outlier_detection is not None)
                for policy in policies
            )
            if has_breaker and "*" not in spec.host:
                found.setdefault(_service_of(spec.host, each.namespace), set()).add("circuit-breaker")
        elif isinstance(spec, r.BackendTrafficPolicy) and spec.breaker is not None and "*" not in spec.host:
            found.setdefault(_service_of(spec.host, each.namespace), set()).add("circuit-breaker")
    return {name: tuple(sorted(told)) for name, told in found.items()}


def detail_of(service: api.ServiceEndpoints, objects: Sequence[Object]) -> ServiceDetail:
    node = f"service:{service.namespace}/{service.name}"
    subsets: tuple[Subset, ...] = ()
    split: tuple[Share, ...] = ()
    named, rule, rule_name, steering = [], "", "", Steering()
    labels = tuple(each.labels for each in service.endpoints)
    root = mesh_settings(objects).root_namespace
    concerned = Concerned(service.namespace, frozenset((service.host,)), frozenset((service.name,)), labels, root)
    for each in objects:
        spec = each.spec
        if isinstance(spec, r.VirtualService):
            hosts = {_service_of(host, each.namespace) for host in spec.hosts}
            if node not in hosts:
                continue
            if not rule:
                rule = r.dump_yaml(each)
                rule_name = each.name if each.namespace == service.namespace and hosts == {node} else ""
                steering = _steering(spec.http[-1]) if spec.http else steering
            routes = spec.http[-1].route if spec.http else []
            # A lone destination gets everything, whatever its weight.
            shares = (Share(to.destination.subset, to.weight if len(routes) > 1 else 100) for to in routes)
            split = split or tuple(share for share in shares if share.subset)
        elif isinstance(spec, r.DestinationRule):
            if _service_of(spec.host, each.namespace) != node:
                continue
            subsets = subsets or tuple(Subset(subset.name, dict(subset.labels)) for subset in spec.subsets)
        elif isinstance(spec, r.Service) or not concerned.by(each):
            continue
        named.append(each.title)
    return ServiceDetail(
        service.name,
        service.namespace,
        service.host,
        service.ports,
        service.endpoints,
        subsets,
        split,
        tuple(named),
        rule,
        rule_name,
        steering,
    )


def _steering(route: r.HTTPRoute) -> Steering:
    """A percentage that is not written is all of them, as for Istio."""

    def percent(fault: r.FaultDelay | r.FaultAbort) -> float:
        older = fault.percent if isinstance(fault, r.FaultDelay) else None
        return fault.percentage.value if fault.percentage is not None else 100.0 if older is None else older

    delay, abort = (None, None) if route.fault is None else (route.fault.delay, route.fault.abort)
    return Steering(
        delay.fixed_delay.seconds if delay is not None else 0.0,
        percent(delay) if delay is not None else 0.0,
        (abort.http_status or 0) if abort is not None else 0,
        percent(abort) if abort is not None else 0.0,
        route.timeout.seconds if route.timeout is not None else 0.0,
    )


def _selection(query: Mapping[str, str]) -> Callable[[Labels], bool]:
    """Whether a series belongs to the node (as what it serves), or to the edge, that was asked for."""

    def at(labels: Labels, name: str, own: str) -> bool:
        service = f"service:{labels.destination_service_namespace}/{labels.destination_service_name}"
        return name in (own, service)

    def wanted(labels: Labels) -> bool:
        if query["node"]:
            return at(labels, query["node"], target_id(labels))
        if query["source"] and query["source"].startswith("service:"):
            return at(labels, query["source"], "") and query["target"] in ("", target_id(labels))
        if query["source"] and query["source"] != source_id(labels):
            return False
        return not query["target"] or at(labels, query["target"], target_id(labels))

    return wanted


def _head(trace: Trace) -> TraceHead:
    root = trace.root
    told = request_of(root)
    return TraceHead(
        trace.trace_id,
        root.service,
        root.name,
        trace.began,
        trace.duration,
        len(trace.spans),
        trace.has_failed,
        f"{told.method} {told.path}" if told is not None else "",
        told.status if told is not None else 0,
    )


def _number(query: Mapping[str, str], name: str, default: float) -> float:
    try:
        found = float(query[name]) if query[name] else default
    except ValueError:
        raise HTTPException(400, f"{name} must be a number, not {query[name]!r}") from None
    if not 0 <= found < 1e11:
        raise HTTPException(400, f"{name} must be between 0 and 1e11, not {query[name]!r}")
    return found
