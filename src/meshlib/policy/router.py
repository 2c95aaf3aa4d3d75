"""Which route takes this request, and what does it say? Route configurations, compiled."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Mapping
from itertools import accumulate

from meshlib.model import (
    CATCH_ALL,
    PASSTHROUGH,
    DirectResponse,
    DomainTable,
    Fault,
    Forward,
    HeaderOperations,
    Redirect,
    Request,
    Rewrite,
    Route,
    RouteConfiguration,
    RouteMatch,
    Snapshot,
    VirtualHost,
    WeightedCluster,
    is_loopback,
)
from meshlib.model.expressions import compile_regex
from meshlib.policy.cors import CorsRules
from meshlib.policy.matching import Predicate, compile_match
from meshlib.policy.retry import Retrying

_REMEMBERED = 4096
_DEFAULT_PORTS = {"http": "80", "https": "443", "ws": "80", "wss": "443"}


def with_port(authority: str, scheme: str) -> str:
    """`reviews` -> `reviews:80`, as listeners are named; lower case."""
    authority = authority.lower()
    if authority.endswith("]") or ":" not in authority.rpartition("]")[2]:
        return f"{authority}:{_DEFAULT_PORTS.get(scheme, '80')}"
    return authority


def _is_exposed(request: Request) -> bool:
    """Whether others could read it on its way: not what is encrypted, and not what stays on this machine."""
    return request.scheme not in ("https", "wss") and not is_loopback(with_port(request.authority, request.scheme))


class Destination:
    """One of a route's weighted clusters, with what stands on the wire for it: the route's own is joined to it once.

    authority: in place of the caller's, None where that stands. request_headers, response_headers: operations, in
    this order.
    """

    __slots__ = ("authority", "cluster", "request_headers", "response_headers")

    def __init__(self, chosen: WeightedCluster, route: Route) -> None:
        rewrite = route.action.rewrite if isinstance(route.action, Forward) else None
        self.cluster = chosen.cluster
        # A destination's Host loses to the route's (Istio, route.go processDestination).
        self.authority = (None if rewrite is None else rewrite.authority) or chosen.authority
        # Envoy: the more specific first, so that the less specific has the last word.
        self.request_headers = tuple(each for each in (chosen.request_headers, route.request_headers) if each)
        self.response_headers = tuple(each for each in (chosen.response_headers, route.response_headers) if each)

    def __repr__(self) -> str:
        return f"<Destination {self.cluster}>"


class Decision:
    """What one route says about the calls that match it. Immutable and shared; a call holds one for its whole life."""

    __slots__ = (
        "_cumulative",
        "_destinations",
        "action",
        "cors",
        "fault",
        "matches",
        "response_headers",
        "retrying",
        "route",
        "timeout",
    )

    def __init__(self, route: Route, rng: random.Random) -> None:
        self.route = route
        self.matches: Predicate | None = compile_match(route.match)
        self.action: Forward | Redirect | DirectResponse = route.action
        self.fault: Fault | None = route.fault
        self.cors = None if route.cors is None else CorsRules(route.cors)
        self.response_headers: HeaderOperations = route.response_headers
        self.timeout: float | None = None
        self.retrying: Retrying | None = None
        self._destinations: tuple[Destination, ...] = ()
        self._cumulative: list[int] = []
        if isinstance(route.action, Forward):
            self.timeout = route.action.timeout
            self._destinations = tuple(Destination(each, route) for each in route.action.clusters)
            self._cumulative = list(accumulate(cluster.weight for cluster in route.action.clusters))
            if route.action.retry is not None and route.action.retry.attempts > 0:
                self.retrying = Retrying(route.action.retry, rng)

    def choose(self, rng: random.Random) -> Destination:
        """A destination, by weight. A lone one is chosen whatever its weight (Istio)."""
        if len(self._destinations) == 1:
            return self._destinations[0]
        return self._destinations[bisect(self._cumulative, rng.random() * self._cumulative[-1])]

    def __repr__(self) -> str:
        return f"<Decision {self.route.name} of {self.route.origin or 'no object'}>"


class _VirtualHost:
    """A virtual host with its routes compiled."""

    __slots__ = ("decisions", "host")

    def __init__(self, host: VirtualHost, rng: random.Random) -> None:
        self.host = host
        self.decisions = tuple(Decision(route, rng) for route in host.routes)

    def match(self, request: Request) -> Decision | None:
        if self.host.require_tls and request.scheme != "https":
            return TO_HTTPS
        for decision in self.decisions:
            if decision.matches is None or decision.matches(request):
                return decision
        return None


class RouteTable:
    """One route configuration, compiled."""

    __slots__ = ("_domains", "configuration")

    def __init__(self, configuration: RouteConfiguration, rng: random.Random) -> None:
        self.configuration = configuration
        hosts = [(host.domains, _VirtualHost(host, rng)) for host in configuration.virtual_hosts]
        self._domains = DomainTable((domain, host) for domains, host in hosts for domain in domains)

    def virtual_host(self, authority: str) -> _VirtualHost | None:
        return self._domains.find(authority)

    def match(self, request: Request) -> Decision | None:
        """The first route that fits, in the virtual host that the request's authority means; None when there is
        none (404 NR)."""
        host = self.virtual_host(request.authority)
        return None if host is None else host.match(request)


NO_ROUTE = Decision(Route(RouteMatch(), DirectResponse(404), name="no route"), random.Random(0))
TO_HTTPS = Decision(Route(RouteMatch(), Redirect(301, scheme="https"), name="to https"), random.Random(0))
"""What a virtual host that requires TLS says to plain HTTP."""
UNANSWERED = Decision(Route(RouteMatch(), DirectResponse(503), name="no answer yet"), random.Random(0))
"""What happens to a call in plaintext to a host that the feed has not answered for, where the settings say so."""
PASS = Decision(Route(RouteMatch(), Forward((WeightedCluster(PASSTHROUGH),)), name="passthrough"), random.Random(0))
"""What happens to a host that the registry does not know while nothing else is configured (Istio's ALLOW_ANY)."""


class Router:
    """Outbound routing for every authority the snapshot knows.

    `match` costs one dictionary look-up and the walk down the routes.
    """

    __slots__ = ("_absent", "_complete", "_denies", "_hosts", "_listeners", "_unknown", "tables")

    def __init__(self, snapshot: Snapshot, tables: Mapping[str, RouteTable], denies: bool = False) -> None:
        """denies: what would leave this machine in plaintext, to a host that nobody has answered for yet."""
        self.tables = tables
        self._denies = denies
        self._complete = snapshot.complete
        self._absent = frozenset(snapshot.absent)
        self._listeners: DomainTable[RouteTable] = DomainTable(
            (listener.name, tables[listener.route_configuration])
            for listener in snapshot.listeners
            if not listener.is_bound and listener.name != CATCH_ALL and listener.route_configuration in tables
        )
        self._unknown = next(
            (tables.get(each.route_configuration) for each in snapshot.listeners if each.name == CATCH_ALL), None
        )
        self._hosts: dict[tuple[str, str], _VirtualHost | None] = {}

    def match(self, request: Request) -> Decision | None:
        """The decision for a request; NO_ROUTE when its virtual host has no route for it; None when the snapshot says
        nothing about its authority, so that the feed must be asked."""
        key = (request.authority, request.scheme)
        try:
            host = self._hosts[key]
        except KeyError:
            host = self._find(request)
            if len(self._hosts) >= _REMEMBERED:
                self._hosts.clear()
            self._hosts[key] = host
        if host is not None:
            return host.match(request) or NO_ROUTE
        if self._complete or with_port(request.authority, request.scheme) in self._absent:
            return self.unknown(request)
        return None

    def unknown(self, request: Request) -> Decision:
        """What outboundTrafficPolicy says about a host that is not in the registry."""
        if self._unknown is None:
            return PASS
        return self._unknown.match(request) or NO_ROUTE

    def unanswered(self, request: Request) -> Decision:
        """For a host that the feed was asked for, and has not answered for in time: it may be one of the mesh, and
        whoever can keep the answer away must not be given the call to read."""
        return UNANSWERED if self._denies and _is_exposed(request) else self.unknown(request)

    def looked_at(self, request: Request) -> tuple[str, tuple[Decision, ...]]:
        """The name of the virtual host that its authority means, and the routes that are tried in turn; for explain."""
        host = self._find(request)
        if host is None and self._unknown is not None:
            host = self._unknown.virtual_host(request.authority)
        if host is None:
            return "", ()
        return host.host.name, host.decisions

    def knows(self, authority: str) -> bool:
        """Whether the snapshot says anything about `host:port`, be it that it does not exist."""
        return self._complete or authority in self._absent or self._listeners.find(authority) is not None

    def _find(self, request: Request) -> _VirtualHost | None:
        table = self._listeners.find(with_port(request.authority, request.scheme))
        return None if table is None else table.virtual_host(request.authority)

    def __repr__(self) -> str:
        return f"<Router {self._listeners!r}>"


def rewritten_path(rewrite: Rewrite, match: RouteMatch, path: str) -> str:
    """The path (with its query) that goes on the wire.

    A prefix rewrite replaces just what the prefix match matched, the whole path where the match was exact or a
    regular expression (Istio). `/foo` -> `/` turns `/foo/bar` into `//bar`, as in Envoy, unless the match ends at
    segments.
    """
    bare, mark, query = path.partition("?")
    if rewrite.path is not None:
        bare = rewrite.path
    elif rewrite.regex is not None:
        bare = compile_regex(rewrite.regex).sub(rewrite.substitution, bare)
    elif rewrite.prefix is not None:
        bare = _replaced_prefix(rewrite.prefix, match, bare)
    return bare + mark + query


def _replaced_prefix(replacement: str, match: RouteMatch, path: str) -> str:
    if match.path is None:
        # no match is the prefix "/", and Envoy replaces just what matched: "/foo" turns /bar into /foobar
        return replacement + path.removeprefix("/")
    if match.path.kind == "prefix":
        return replacement + path[len(match.path.value) :]
    if match.path.kind == "path-prefix":
        rest = path[len(match.path.value.rstrip("/")) :]
        return (replacement.rstrip("/") + rest) or "/"
    return replacement


def redirected(redirect: Redirect, match: RouteMatch, request: Request) -> str:
    """The Location of a redirect."""
    scheme = redirect.scheme or request.scheme
    host, port = _split_port(request.authority)
    if redirect.authority is not None:
        host, port = _split_port(redirect.authority)
    elif redirect.scheme is not None and redirect.scheme != request.scheme and redirect.port == 0:
        # Envoy drops an explicit port that was the old scheme's default.
        port = "" if port == _DEFAULT_PORTS.get(request.scheme) else port
    if redirect.port > 0:
        port = str(redirect.port)
    if redirect.port == -1 or port == _DEFAULT_PORTS.get(scheme):
        port = ""
    path, mark, query = request.path.partition("?")
    if redirect.path is not None:
        path = redirect.path
        if "?" in path:
            mark = query = ""
    elif redirect.regex is not None:
        path = compile_regex(redirect.regex).sub(redirect.substitution, path)
    elif redirect.prefix is not None:
        path = _replaced_prefix(redirect.prefix, match, path)
    return f"{scheme}://{host}{':' + port if port else ''}{path}{mark}{query}"


def _split_port(authority: str) -> tuple[str, str]:
    if authority.endswith("]") or ":" not in authority:
        return authority, ""
    host, _, port = authority.rpartition(":")
    return host, port
