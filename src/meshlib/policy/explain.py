"""Why does a request go where it goes? The route that takes it and why not the others, who may serve it, and every
policy in force with the object that it came from.

Asks the very matchers and counters that calls use, and changes nothing: no call is counted, no turn is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any
from urllib.parse import urlsplit

from meshlib.balancing.locality import priority_shares
from meshlib.model import (
    ClusterType,
    DirectResponse,
    Endpoint,
    Forward,
    HeaderMatch,
    Headers,
    Health,
    OutlierDetection,
    QueryMatch,
    RateLimit,
    Redirect,
    Request,
    RetryPolicy,
    RouteMatch,
    StringMatch,
    WeightedCluster,
)
from meshlib.model.values import dataclass
from meshlib.policy.cluster import LiveCluster
from meshlib.policy.live import Live
from meshlib.policy.matching import compile_match
from meshlib.policy.rate_limit import Use
from meshlib.policy.router import NO_ROUTE, PASS, TO_HTTPS, Decision, redirected, with_port


@dataclass(frozen=True, slots=True)
class Policy:
    """One thing that is done to the call. origin: the objects and files that say so, "" when none does. is_shadow: it
    decides and counts, but its decision is not carried out."""

    name: str
    value: str
    origin: str = ""
    is_shadow: bool = False


@dataclass(frozen=True, slots=True)
class RouteVerdict:
    """One route that was looked at. fits: None when an earlier one had taken the request. reason: the first condition
    that did not hold, or what did."""

    name: str
    origin: str
    fits: bool | None
    reason: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """One endpoint of a destination. verdict: `serves`, or why it gets no call."""

    endpoint: Endpoint
    verdict: str
    serves: bool
    in_flight: int
    is_ejected: bool
    ejections: int


@dataclass(frozen=True, slots=True)
class Destination:
    """One cluster that the request may go to, `percent` of the time. breaker: its state, "" without one.

    requests, retries: in flight, from this process. problem: why nobody can serve it, "" when somebody can.
    limits: rate limits and quotas of calls to it, and how much of each this process has used.
    refused: what, and how often, this process has turned away so far; a policy in shadow counts what it would have.
    """

    cluster: str
    percent: float
    load_balancing: str = ""
    origin: str = ""
    candidates: tuple[Candidate, ...] = ()
    policies: tuple[Policy, ...] = ()
    requests: int = 0
    retries: int = 0
    breaker: str = ""
    problem: str = ""
    limits: tuple[Use, ...] = ()
    refused: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would happen to one request now. `str` of it is for people.

    route: the one that takes it; None when none does. routes: all that were looked at, in order.
    version: of the configuration in force. limits: of a route that answers by itself. inbound_limits: of calls that
    come in here, whatever the request.
    """

    request: str
    outcome: str
    virtual_host: str
    version: str
    route: RouteVerdict | None
    routes: tuple[RouteVerdict, ...]
    policies: tuple[Policy, ...]
    destinations: tuple[Destination, ...]
    limits: tuple[Use, ...] = ()
    inbound_limits: tuple[Use, ...] = ()

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def request_of(method: str, url: str, headers: Iterable[tuple[str, str]] = ()) -> Request:
    """The request as the core sees it. Raises ValueError."""
    parts = urlsplit(url)
    authority = parts.netloc.rpartition("@")[2].lower()
    if not parts.scheme or not authority:
        raise ValueError(f"an absolute URL is wanted, as http://reviews:9080/; found {url!r}")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    return Request(method.upper(), parts.scheme.lower(), authority, path, Headers(raw))


def explain(live: Live, request: Request) -> Explanation:
    """What `live` says about a request. A host that it does not know is explained as unknown."""
    decision = live.router.match(request) or live.router.unanswered(request)
    host, looked_at = live.router.looked_at(request)
    routes = tuple(_verdicts(request, decision, looked_at))
    action = decision.action
    origin = decision.route.origin
    policies = tuple(
        _policies(decision.route, origin, skip=frozenset({"match", "action", "name", "origin", "limited_by"}))
    )
    destinations: tuple[Destination, ...] = ()
    if isinstance(action, Forward):
        policies += tuple(_policies(action, origin, skip=frozenset({"clusters"}), always=("timeout", "retry")))
        total = sum(each.weight for each in action.clusters)
        destinations = tuple(
            _destination(
                live, each, 100.0 * each.weight / total if len(action.clusters) > 1 else 100.0, action.missing_status
            )
            for each in action.clusters
            if each.weight or len(action.clusters) == 1
        )
    return Explanation(
        f"{request.method} {request.scheme}://{request.authority}{request.path}",
        _outcome(decision, request),
        host,
        live.snapshot.version,
        next((each for each in routes if each.fits), None),
        routes,
        policies,
        destinations,
        _uses(live.cluster(decision.route.limited_by)) if decision.route.limited_by else (),
        tuple(use for limiter in live.guard.limiters for use in limiter.uses()),
    )


def _uses(found: LiveCluster | None) -> tuple[Use, ...]:
    return () if found is None or found.limiter is None else tuple(found.limiter.uses())


def _outcome(decision: Decision, request: Request) -> str:
    action = decision.action
    if decision is NO_ROUTE:
        return "is answered here with 404: no route takes it"
    if decision is PASS:
        return f"goes to {with_port(request.authority, request.scheme)} as it is: the mesh does not know the host"
    if isinstance(action, Redirect):
        why = ", since this host wants TLS" if decision is TO_HTTPS else ""
        return f"is redirected ({action.status}) to {redirected(action, decision.route.match, request)}{why}"
    if isinstance(action, DirectResponse):
        return f"is answered here with {action.status}"
    if not action.clusters:
        return "is for the application itself"
    names = " or ".join(each.cluster for each in action.clusters)
    return f"goes to {names}"


# Routes


def _verdicts(request: Request, decision: Decision, looked_at: Iterable[Decision]) -> Iterator[RouteVerdict]:
    is_taken = decision is TO_HTTPS
    for each in looked_at:
        route = each.route
        failed = None if is_taken else next(_failures(route.match, request), None)
        if is_taken:
            why = "plain HTTP is redirected first" if decision is TO_HTTPS else "an earlier one takes the request"
            yield RouteVerdict(route.name, route.origin, None, why)
        elif failed is not None:
            yield RouteVerdict(route.name, route.origin, False, failed)
        else:
            is_taken = True
            yield RouteVerdict(route.name, route.origin, True, conditions(route.match))


def _parts(match: RouteMatch) -> Iterator[tuple[RouteMatch, str]]:
    """Each condition by itself, and what it wants."""
    if match.path is not None:
        yield RouteMatch(path=match.path), f"path {_wanted(match.path)}"
    if match.method is not None:
        yield RouteMatch(method=match.method), f"method {_wanted(match.method)}"
    if match.scheme is not None:
        yield RouteMatch(scheme=match.scheme), f"scheme {_wanted(match.scheme)}"
    if match.authority is not None:
        yield RouteMatch(authority=match.authority), f"authority {_wanted(match.authority)}"
    for header in match.headers:
        yield RouteMatch(headers=(header,)), f"header {header.name} {'not ' * header.invert}{_wanted(header.match)}"
    for claim in match.claims:
        wanted = f"claim {'.'.join(claim.path)} {'not ' * claim.invert}{_wanted(claim.match)}"
        yield RouteMatch(claims=(claim,)), wanted
    for query in match.query:
        yield RouteMatch(query=(query,)), f"query parameter {query.name} {_wanted(query.match)}"


def _wanted(match: StringMatch) -> str:
    if match.kind == "present":
        return "present"
    return f"{match.kind} {match.value!r}{' in any case' if match.ignore_case else ''}"


def conditions(match: RouteMatch) -> str:
    """What a request must be like, in words."""
    return ", ".join(wanted for _, wanted in _parts(match)) or "takes every request"


def _failures(match: RouteMatch, request: Request) -> Iterator[str]:
    for part, wanted in _parts(match):
        fits = compile_match(part)
        if fits is not None and not fits(request):
            yield f"wants {wanted}; {_found(part, request)}"


def _found(part: RouteMatch, request: Request) -> str:
    if part.headers:
        (header,) = part.headers
        value = request.headers.get(header.name)
        return "it is not there" if value is None else f"it is {value!r}"
    if part.claims:
        return "only a gateway knows claims"
    if part.query or part.path is not None:
        bare, mark, query = request.path.partition("?")
        return f"it is {bare!r}" if part.path is not None else f"the query is {mark + query!r}"
    found = request.method if part.method else request.scheme if part.scheme else request.authority
    return f"it is {found!r}"


# Destinations


def _destination(live: Live, weighted: WeightedCluster, percent: float, missing: int) -> Destination:
    found = live.cluster(weighted.cluster)
    if found is None:
        return Destination(weighted.cluster, percent, problem=f"no such cluster is configured: calls get {missing}")
    cluster, state = found.cluster, found.state
    candidates = tuple(_candidates(found))
    problem = ""
    if cluster.type is not ClusterType.ORIGINAL_DST and not any(each.serves for each in candidates):
        problem = "has no endpoint" if not candidates else "no endpoint may be called"
        problem += ": calls get 503"
    skip = {"name", "type", "endpoints", "service", "subset", "origin", "load_balancing", "shadow"}
    skip |= {"rate_limits", "quotas"}  # told with their consumption
    policies = _policies(cluster, cluster.origin, skip=frozenset(skip), shadow=cluster.shadow)
    return Destination(
        cluster.name,
        percent,
        str(cluster.load_balancing),
        cluster.origin,
        candidates,
        tuple(policies),
        state.requests,
        state.retries,
        "" if cluster.breaker is None or found.breaker is None else repr(found.breaker).strip("<>"),
        problem,
        _uses(found),
        tuple(_refused(found)),
    )


def _refused(found: LiveCluster) -> Iterator[tuple[str, int]]:
    state = found.state
    for what, count in (
        ("calls by a limit", state.overflows),
        ("calls by the breaker", 0 if found.breaker is None else found.breaker.refused),
        ("retries by the budget", state.retries_refused),
        ("ejections by the share that may be ejected", state.ejections_refused),
        ("ejections in shadow", state.shadowed_ejections),
        ("mirrored copies", state.mirrors_dropped),
    ):
        if count:
            yield what, count


def _candidates(found: LiveCluster) -> Iterator[Candidate]:
    rules = found.cluster.outlier_detection
    everyone = [each for each in found.everyone if each.endpoint.health is not Health.DRAINING]
    priorities = sorted({each.endpoint.priority for each in everyone})
    counts = [
        (
            sum(_why_not(each) == "" for each in everyone if each.endpoint.priority == priority),
            sum(each.endpoint.priority == priority for each in everyone),
        )
        for priority in priorities
    ]
    shares = dict(zip(priorities, priority_shares(counts, rules.min_health_percent if rules else 0), strict=True))
    for target in found.everyone:
        endpoint, state = target.endpoint, target.state
        verdict = _why_not(target)
        share = shares.get(endpoint.priority)
        if share is not None and share.is_panicking and endpoint.health is Health.HEALTHY:
            verdict = f"serves all the same: too few are healthy ({verdict})" if verdict else ""
        elif not verdict and share is not None and not share.percent:
            verdict = f"waits: no load is left for priority {endpoint.priority}"
        serves = not verdict or verdict.startswith("serves")
        yield Candidate(endpoint, verdict or "serves", serves, state.in_flight, state.is_ejected, state.ejections)


def _why_not(target: Any) -> str:
    endpoint, state = target.endpoint, target.state
    if endpoint.health is not Health.HEALTHY:
        return f"{endpoint.health.lower()}, says the control plane"
    if not state.is_healthy:
        return "failed its health checks"
    return "ejected by outlier detection" if state.is_ejected else ""


# Policies

_TELLING: dict[type, tuple[str, ...]] = {
    RetryPolicy: ("attempts", "on"),
    OutlierDetection: ("consecutive_5xx", "interval", "base_ejection_time"),
}
"""Fields that are told even where they have their default."""


def _policies(
    value: Any,
    origin: str,
    *,
    skip: frozenset[str],
    always: tuple[str, ...] = (),
    shadow: frozenset[str] = frozenset(),
) -> Iterator[Policy]:
    """Whatever differs from its default, so that a field that is added one day is told as well."""
    for field in fields(value):
        found = getattr(value, field.name)
        if field.name in skip or (field.name not in always and found == _default(field)):
            continue
        name = field.name.replace("_", "-")
        yield Policy(name, _told(found, field.name), origin, name in shadow)


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


_NO_SECONDS = ("percent", "rate", "ratio", "factor", "aggression", "per_second")
"""What numbers with a fraction are told by these words; all others are seconds."""


def _told(value: Any, name: str = "") -> str:
    if value is None:
        return "none"
    if isinstance(value, StringMatch):
        return _wanted(value)
    if isinstance(value, HeaderMatch | QueryMatch):
        return f"{value.name} {_told(value.match)}"
    if is_dataclass(value) and not isinstance(value, type):
        always = _TELLING.get(type(value), ())
        told = [
            f"{field.name}={_told(found, field.name)}"
            for field in fields(value)
            if (found := getattr(value, field.name)) != _default(field) or field.name in always
        ]
        return ", ".join(told) or "as by default"
    if isinstance(value, frozenset):
        return "|".join(sorted(map(str, value))) or "none"
    if isinstance(value, tuple):
        return "; ".join(map(_told, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}" if any(word in name for word in _NO_SECONDS) else f"{value:g} s"
    return str(value)


# For people


def _lines(explanation: Explanation) -> Iterator[str]:
    yield f"{explanation.request} {explanation.outcome}."
    yield f"Configuration {explanation.version or '(none)'}, virtual host {explanation.virtual_host or '(none)'}."
    if explanation.routes:
        yield "Routes, in order:"
    for route in explanation.routes:
        mark = {True: "->", False: "no", None: "--"}[route.fits]
        yield f"  {mark} {route.name}{_of(route.origin)}: {route.reason}"
    if explanation.policies:
        yield f"The route says{_of(explanation.policies[0].origin)}:"
    yield from _policy_lines(explanation.policies)
    for destination in explanation.destinations:
        yield (
            f"{destination.percent:g} % to {destination.cluster}: {destination.load_balancing or 'unknown'}, "
            f"{destination.requests} calls in flight, {destination.retries} retries"
        )
        if destination.problem:
            yield f"  !! {destination.problem}"
        if destination.breaker:
            yield f"  {destination.breaker}"
        for each in destination.candidates:
            yield f"  {_candidate(each)}"
        if destination.refused:
            yield f"  Refused so far: {', '.join(f'{count} {what}' for what, count in destination.refused)}."
        if destination.policies:
            yield f"  It says{_of(destination.origin)}:"
        yield from (f"  {line}" for line in _policy_lines(destination.policies))
        yield from (f"  {_limit(each)}" for each in destination.limits)
    yield from map(_limit, explanation.limits)
    if explanation.inbound_limits:
        yield "Calls that come in here are limited, too:"
    yield from (f"  {_limit(each)}" for each in explanation.inbound_limits)


def _limit(use: Use) -> str:
    """`limit our-share: 50 in 1 s, 100 at once: 12 passed, 3 turned away, 40 left [BackendTrafficPolicy ...]`"""
    limit = use.limit
    if isinstance(limit, RateLimit):
        what, rule = "limit", f"{limit.per_fill} in {limit.interval:g} s, {limit.tokens} at once"
    else:
        what, rule = "quota", f"counted by {limit.service}"
        if limit.requests:
            rule = f"{limit.requests} in {limit.interval} s, {rule}"
    keys = [*limit.keys] if isinstance(limit, RateLimit) else [key for each in limit.descriptors for key in each]
    told = [f"{use.allowed} passed", f"{use.limited} {'would be ' * limit.shadow}turned away"]
    if use.failed:
        told.append(f"{use.failed} without an answer")
    if use.remaining is not None:
        told.append(f"{use.remaining} left")
    by = f" by {', '.join(key.name or key.entry or key.kind for key in keys)}" if keys else ""
    return f"{what} {limit.name}: {rule}{by}: {', '.join(told)}{_of(limit.origin)}"


def _candidate(each: Candidate) -> str:
    endpoint = each.endpoint
    parts = [
        f"{'->' if each.serves else 'no'} {endpoint}",
        endpoint.workload,
        str(endpoint.locality),
        f"weight {endpoint.weight}",
        f"priority {endpoint.priority}" if endpoint.priority else "",
        f"{each.in_flight} in flight",
        f"{each.ejections} ejections" if each.ejections else "",
    ]
    return f"{', '.join(part for part in parts if part)}: {each.verdict}"


def _policy_lines(policies: Iterable[Policy]) -> Iterator[str]:
    for policy in policies:
        shadow = " (in shadow: it counts, and does nothing)" if policy.is_shadow else ""
        yield f"  {policy.name}{shadow}: {policy.value}"


def _of(origin: str) -> str:
    return f" [{origin}]" if origin else ""
