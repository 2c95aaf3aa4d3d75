"""What would this YAML do? Translated beside what is in force, and held against recorded traffic; changes nothing.

For each caller that is connected, and for one that nothing is known of, the routes to each host are compared, what
holds for each destination, and who may call it. Traffic is recorded by caller, service and version, not by path or
header: how it would be shared can be said where the first route takes every request, and is left open elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as HttpRoute

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.access_rules import Role
from meshlib.controlplane.admin import query_of, yaml_body
from meshlib.controlplane.gate import JSON, admission_of
from meshlib.controlplane.graph import agreed, is_seen, source_id
from meshlib.controlplane.in_force import key_of
from meshlib.controlplane.policy_differences import place, policy_differences
from meshlib.controlplane.series import Series, SeriesUnavailable
from meshlib.controlplane.sources import problem_of
from meshlib.controlplane.telemetry_store import Cell, Labels
from meshlib.controlplane.turned_away import TurnedAway, turned_away
from meshlib.istio.access import tls_decided_by
from meshlib.istio.mesh_settings import mesh_settings
from meshlib.istio.parse import parse_text
from meshlib.istio.resources import Object
from meshlib.istio.routes import is_catch_all
from meshlib.istio.translate import Translation, translate, view_key
from meshlib.model import Forward, Node, Redirect, RetryPolicy, Route, VirtualHost, Workload

VIEWS = 50
"""Groups of callers that see the same; each costs two translations."""
WINDOW = 300.0


class Portion(msgspec.Struct, frozen=True):
    """Where a part of the requests goes. share: 0 to 1. rps: of what was recorded; null where nobody can say."""

    to: str
    share: float
    rps: float | None = None


class RouteShown(msgspec.Struct, frozen=True):
    """object: whose route it is, with its file; "" is the service's own. takes_all: no request escapes it. does: what
    else happens: `timeout 2s`, `delay 1s for 10 %`, `abort 503 for 5 %`, `redirect`, `answers 404`."""

    name: str
    object: str
    takes_all: bool
    portions: tuple[Portion, ...] = ()
    does: tuple[str, ...] = ()


class HostChanged(msgspec.Struct, frozen=True):
    """The routes of one host (with its port), as these callers see them. callers: ids of nodes of the graph. rps:
    requests a second of theirs to its service lately; versions: of each that answered. before, after: () where there
    is no such host."""

    host: str
    callers: tuple[str, ...]
    rps: float
    versions: dict[str, float]
    before: tuple[RouteShown, ...]
    after: tuple[RouteShown, ...]


class PolicyChanged(msgspec.Struct, frozen=True):
    """What would hold otherwise, besides routes. what: a destination, `reviews.default.svc.cluster.local v1`, as these
    workloads call it; or `calls to` these workloads themselves. before, after: only what differs, a line each, as
    `timeout: 2`; () where there is no such destination."""

    what: str
    workloads: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]


class WhatIf(msgspec.Struct, frozen=True):
    """problems: objects that would be refused. warnings: of those that would be taken, and what the translation finds
    that it does not find now. hosts: whose routes would change. policies: of destinations, and of who may call.
    objects: titles of what was read. seconds: of recorded traffic. left_out: groups of callers beyond VIEWS that were
    not looked at. turned_away: recorded requests that would not be served any more; judged: how many were held against
    rules that would change."""

    objects: tuple[str, ...]
    problems: tuple[api.Problem, ...]
    warnings: tuple[api.Problem, ...]
    hosts: tuple[HostChanged, ...]
    seconds: float
    left_out: int = 0
    policies: tuple[PolicyChanged, ...] = ()
    turned_away: tuple[TurnedAway, ...] = ()
    judged: int = 0


class Compared(NamedTuple):
    """problems: that are new. left_out: groups of callers. The rest as in WhatIf."""

    hosts: tuple[HostChanged, ...]
    problems: tuple[api.Problem, ...]
    left_out: int
    policies: tuple[PolicyChanged, ...]
    turned_away: tuple[TurnedAway, ...]
    judged: int


class Known(Protocol):
    """What it is compared with. Called on the event loop; must not block."""

    def objects(self) -> Sequence[Object]: ...
    def workloads(self) -> Sequence[Workload]: ...
    def callers(self) -> Sequence[Node]:
        """Every connected process, and one that nothing is known of."""


class WhatIfRoutes:
    """figures: of recorded traffic. clock: seconds since 1970."""

    def __init__(self, known: Known, figures: Series, clock: Callable[[], float] = time.time) -> None:
        self._known, self._figures, self._clock = known, figures, clock

    def routes(self) -> list[HttpRoute]:
        return [HttpRoute("/v1/what-if", self._ask, methods=["POST"])]

    async def _ask(self, request: Request) -> Response:
        query = query_of(request, "source", "namespace", "seconds")
        text, who = await yaml_body(request), admission_of(request)
        namespace = query["namespace"] or "default"
        try:
            seconds = float(query["seconds"] or WINDOW)
        except ValueError:
            seconds = 0.0
        if not 1 <= seconds <= 86400:
            raise HTTPException(400, f"seconds must be between 1 and 86400, not {query['seconds']!r}")
        parsed = await run_in_threadpool(parse_text, text, query["source"] or "what-if", namespace=namespace)
        for each in sorted({given.namespace for given in parsed.objects} or {namespace}):
            who.demand(Role.OPERATOR, each, "what-if")
        callers = [node for node in self._known.callers() if who.powers.sees(node.workload.namespace)]
        now = self._clock()
        try:
            recorded = await self._figures.window(now - seconds, now)
        except SeriesUnavailable as error:
            raise HTTPException(502, str(error)) from None
        traffic = agreed({labels: cell for labels, cell in recorded.items() if is_seen(labels, who.powers.sees)})
        found = await run_in_threadpool(
            compare, self._known.objects(), parsed.objects, self._known.workloads(), callers, traffic, seconds
        )
        return JSON(
            WhatIf(
                tuple(each.title for each in parsed.objects),
                tuple(problem_of(each) for each in parsed.problems),
                (*(problem_of(each) for each in parsed.warnings), *found.problems),
                found.hosts,
                seconds,
                found.left_out,
                found.policies,
                found.turned_away,
                found.judged,
            )
        )


def compare(
    objects: Sequence[Object],
    given: Sequence[Object],
    workloads: Sequence[Workload],
    callers: Iterable[Node],
    traffic: Mapping[Labels, Cell],
    seconds: float,
) -> Compared:
    """given: what replaces or joins `objects`. traffic: of the last `seconds`, each request once."""
    # Tuples of our own: what translate remembers of the control plane's is for its own thread.
    replaced = {key_of(each): each for each in objects} | {key_of(each): each for each in given}
    before, after, known = (*objects,), tuple(replaced.values()), (*workloads,)
    groups: dict[Hashable, list[Node]] = {}
    for node in callers:
        groups.setdefault((view_key(before, node), view_key(after, node)), []).append(node)
    seen = list(groups.values())[:VIEWS]
    old = [translate(before, known, group[0]) for group in seen]
    new = [translate(after, known, group[0]) for group in seen]
    changed: dict[tuple[str, tuple[RouteShown, ...], tuple[RouteShown, ...]], set[str]] = {}
    problems: dict[api.Problem, None] = {}
    policies: dict[tuple[str, tuple[str, ...], tuple[str, ...]], set[str]] = {}
    away: dict[str, tuple[tuple[TurnedAway, ...], int]] = {}
    for group, one, two in zip(seen, old, new, strict=True):
        names = {f"workload:{node.workload.namespace}/{node.workload.name}" for node in group}
        for host, was, will in _differences(one, two):
            changed.setdefault((host, was, will), set()).update(names)
        for policy in policy_differences(one.snapshot, two.snapshot):
            policies.setdefault(policy, set()).update(names)
        away |= _turned_away(group, one, two, after, traffic)
        had = {problem_of(each) for each in one.problems}
        problems |= dict.fromkeys(found for each in two.problems if (found := problem_of(each)) not in had)
    hosts = (
        _recorded(host, names, was, will, traffic, seconds) for (host, was, will), names in sorted(changed.items())
    )
    others = (PolicyChanged(what, tuple(sorted(names)), *two) for (what, *two), names in sorted(policies.items()))
    lists = [found for _, (found, _) in sorted(away.items())]
    return Compared(
        tuple(hosts),
        tuple(problems),
        len(groups) - len(seen),
        tuple(others),
        tuple(each for found in lists for each in found),
        sum(looked_at for _, looked_at in away.values()),
    )


def _turned_away(
    group: Sequence[Node], one: Translation, two: Translation, objects: Sequence[Object], traffic: Mapping[Labels, Cell]
) -> dict[str, tuple[tuple[TurnedAway, ...], int]]:
    """By callee: the workloads of this group, where what they say of their callers differs."""
    before, after = (next(iter(each.snapshot.inbound), None) for each in (one, two))
    if before is None or after is None or before == after:
        return {}
    settings = mesh_settings(objects)
    found = {}
    for node in {each.workload.name: each for each in group}.values():
        by = tls_decided_by(objects, settings, node, node.workload.port)
        name = f"{by.title} ({by.source})" if by is not None else "mutual TLS"
        found[f"{node.workload.namespace}/{node.workload.name}"] = turned_away(
            node.workload, before, after, traffic, name
        )
    return found


def _differences(
    before: Translation, after: Translation
) -> Iterator[tuple[str, tuple[RouteShown, ...], tuple[RouteShown, ...]]]:
    old, new = _hosts(before), _hosts(after)
    for name in sorted(old.keys() | new.keys()):
        was, will = old.get(name), new.get(name)
        if was is None or will is None or _does(was) != _does(will):
            shown = was or will
            assert shown is not None
            yield shown.name, _shown(was), _shown(will)


def _does(host: VirtualHost) -> tuple[Route, ...]:
    """Wherever it is written."""
    return tuple(replace(each, origin="") for each in host.routes)


def _hosts(found: Translation) -> dict[tuple[str, str], VirtualHost]:
    return {
        (configuration.name, host.name): host
        for configuration in found.snapshot.route_configurations
        for host in configuration.virtual_hosts
    }


def _shown(host: VirtualHost | None) -> tuple[RouteShown, ...]:
    return () if host is None else tuple(_route(each) for each in host.routes)


def _route(route: Route) -> RouteShown:
    action, does = route.action, []
    portions: tuple[Portion, ...] = ()
    if isinstance(action, Forward):
        whole = sum(each.weight for each in action.clusters) or 1
        portions = tuple(Portion(place(each.cluster), each.weight / whole) for each in action.clusters)
        does += [f"timeout {action.timeout:g}s"] if action.timeout is not None else []
        does += _retries(action.retry)
        does += [f"mirrored to {place(each.cluster)}" for each in action.mirrors]
    else:
        does.append("redirect" if isinstance(action, Redirect) else f"answers {action.status}")
    if route.fault is not None and (delay := route.fault.delay) is not None:
        does.append(f"delay {delay.seconds:g}s for {delay.per_million / 10_000:g} %")
    if route.fault is not None and (abort := route.fault.abort) is not None:
        does.append(f"abort {abort.status or 'gRPC'} for {abort.per_million / 10_000:g} %")
    return RouteShown(route.name, route.origin, is_catch_all(route.match), portions, tuple(does))


def _retries(retry: RetryPolicy | None) -> list[str]:
    """What is not Istio's default, which every route has that says nothing."""
    if retry is None or not retry.attempts:
        return ["no retries"]
    if retry.per_try_timeout is None:
        return [] if retry.attempts == _BY_DEFAULT else [f"{retry.attempts} retries"]
    return [f"{retry.attempts} retries, {retry.per_try_timeout:g}s each"]


_BY_DEFAULT = 2


def _recorded(
    host: str,
    callers: Iterable[str],
    before: tuple[RouteShown, ...],
    after: tuple[RouteShown, ...],
    traffic: Mapping[Labels, Cell],
    seconds: float,
) -> HostChanged:
    """The unknown caller stands for all who are not connected (any more): its traffic is everybody's."""
    names = frozenset(callers)
    is_everybody = "workload:default/anybody" in names
    versions: dict[str, float] = {}
    for labels, cell in traffic.items():
        if labels.destination_service == host.rpartition(":")[0] and (is_everybody or source_id(labels) in names):
            version = labels.destination_version
            versions[version] = versions.get(version, 0.0) + cell.requests / seconds
    rps = sum(versions.values())
    return HostChanged(
        host, tuple(sorted(names)), rps, dict(sorted(versions.items())), _shared(before, rps), _shared(after, rps)
    )


def _shared(routes: tuple[RouteShown, ...], rps: float) -> tuple[RouteShown, ...]:
    if not routes or not routes[0].takes_all:
        return routes
    portions = tuple(msgspec.structs.replace(each, rps=each.share * rps) for each in routes[0].portions)
    return (msgspec.structs.replace(routes[0], portions=portions), *routes[1:])
