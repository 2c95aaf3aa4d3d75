"""Where may a request go, and what is done to it on the way? Listeners, virtual hosts and routes, as xDS names them.

Every time is in seconds. Every share is an integer per million (Envoy's finest FractionalPercent, which Istio uses),
so that equal configuration is equal, whatever floats it came from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from meshlib.model.values import dataclass

if TYPE_CHECKING:
    from meshlib.model.access import Access
    from meshlib.model.reporting import Reporting

CATCH_ALL = "*"
"""The name of the listener that answers for every host the registry does not know (Istio's outboundTrafficPolicy)."""


@dataclass(frozen=True, slots=True)
class StringMatch:
    """How a string is compared. `path-prefix` ends at a segment (`/foo` matches `/foo/bar`, not `/foobar`), as in
    Gateway API; `prefix` does not, as in VirtualService. `regex` is RE2 and must match the whole string."""

    kind: Literal["exact", "prefix", "suffix", "contains", "path-prefix", "regex", "present"]
    value: str = ""
    ignore_case: bool = False


@dataclass(frozen=True, slots=True)
class HeaderMatch:
    """`invert`: the rule holds when the match does not. A missing header is "" to an inverted match that is not
    `present` (Envoy's treat_missing_header_as_empty, which Istio sets for withoutHeaders)."""

    name: str
    match: StringMatch
    invert: bool = False


@dataclass(frozen=True, slots=True)
class QueryMatch:
    name: str
    match: StringMatch


@dataclass(frozen=True, slots=True)
class ClaimMatch:
    """A claim of the verified token, by its path; where it is a list, any of its items. Without a token there is no
    claim, which only an inverted match takes."""

    path: tuple[str, ...]
    match: StringMatch
    invert: bool = False


@dataclass(frozen=True, slots=True)
class RouteMatch:
    """All given conditions must hold. `path` is compared without the query; None matches every path."""

    path: StringMatch | None = None
    method: StringMatch | None = None
    scheme: StringMatch | None = None
    authority: StringMatch | None = None
    headers: tuple[HeaderMatch, ...] = ()
    query: tuple[QueryMatch, ...] = ()
    claims: tuple[ClaimMatch, ...] = ()


@dataclass(frozen=True, slots=True)
class HeaderOperations:
    """Done in this order: remove, set (overwrite), add (append). Names are lower case."""

    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.set or self.add or self.remove)


NO_OPERATIONS = HeaderOperations()


@dataclass(frozen=True, slots=True)
class Rewrite:
    """`prefix` replaces what a prefix match matched; `path` the whole path; `regex`/`substitution` (RE2, `\\1`) parts
    of it. At most one of the three is given. The query is kept. `authority` replaces the Host that the server sees."""

    prefix: str | None = None
    path: str | None = None
    regex: str | None = None
    substitution: str = ""
    authority: str | None = None


@dataclass(frozen=True, slots=True)
class ResetHeader:
    """`seconds`: a number of seconds (or an HTTP date, RFC 9110, 10.2.3). `unix-timestamp`: seconds since 1970; a value
    too small for that is a number of seconds, as several servers send it."""

    name: str
    form: Literal["seconds", "unix-timestamp"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Istio's default is these values (istio/pilot route/retry/retry.go). `attempts` counts retries, not sends.

    on: Envoy's and Istio's condition names; status codes stand in `status_codes`.
    base_interval, max_interval: seconds of the fully jittered exponential back-off (Envoy: 25 ms, ten times that).
    host_selection_attempts: how often a pick that falls on a tried endpoint is repeated; 0 allows tried endpoints.
    retriable_headers: conditions on the response, for `retriable-headers`.
    reset_headers: response headers that say when the next try makes sense, first found first (Envoy's
      rate_limited_retry_back_off). Envoy has none by default; here the two that everybody sends are heeded, since a
      server that says "in 3 seconds" means it. max_reset: a longer wait than this many seconds is not heeded.
    resend_unsafe: methods that are not idempotent may be sent again after the server may have seen them.
    """

    attempts: int = 2
    on: frozenset[str] = frozenset(
        {"connect-failure", "refused-stream", "unavailable", "cancelled", "retriable-status-codes"}
    )
    status_codes: frozenset[int] = frozenset()
    per_try_timeout: float | None = None
    base_interval: float = 0.025
    max_interval: float = 0.25
    host_selection_attempts: int = 5
    retry_remote_localities: bool = False
    retriable_headers: tuple[HeaderMatch, ...] = ()
    reset_headers: tuple[ResetHeader, ...] = (
        ResetHeader("retry-after", "seconds"),
        ResetHeader("x-ratelimit-reset", "unix-timestamp"),
    )
    max_reset: float = 300.0
    resend_unsafe: bool = False


@dataclass(frozen=True, slots=True)
class HedgePolicy:
    """Send idempotent requests again without giving up the first: after `delay` seconds without an answer, up to
    `max_attempts` in all; the first good answer wins (gRFC A6's hedgingPolicy). Inside the retry budget."""

    delay: float
    max_attempts: int = 2


@dataclass(frozen=True, slots=True)
class HashPolicy:
    """One part of the key that ring hash and maglev look up (Envoy's RouteAction.HashPolicy).

    kind: `header` and `query` (by `name`), `cookie` (by `name`; with a `ttl` in seconds, 0 is the session, a missing
    one is generated and set on the response, for `path`), `source` (the caller's address).
    terminal: what follows is looked at only if this yields nothing.
    """

    kind: Literal["header", "cookie", "query", "source"]
    name: str = ""
    ttl: float | None = None
    path: str = ""
    terminal: bool = False


@dataclass(frozen=True, slots=True)
class FaultDelay:
    seconds: float
    per_million: int


@dataclass(frozen=True, slots=True)
class FaultAbort:
    """Answers in the server's place. `grpc_status` is given instead of `status` for gRPC."""

    per_million: int
    status: int = 0
    grpc_status: int | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """Delay first, then abort; two independent draws; above timeout and retries (Envoy's filter order)."""

    delay: FaultDelay | None = None
    abort: FaultAbort | None = None


@dataclass(frozen=True, slots=True)
class Cors:
    """Which pages of other origins may read the answers, by what a browser is told (Fetch, CORS protocol).

    origins: any of them; exact `*` is every one. methods, headers, exposed: as the answer lists them; "" says nothing.
    max_age: seconds for which a preflight's answer is good. credentials: cookies may come along.
    forward_unmatched: a preflight of an origin that is not allowed goes on to the server; else it is answered here.
    """

    origins: tuple[StringMatch, ...] = ()
    methods: str = ""
    headers: str = ""
    exposed: str = ""
    max_age: int | None = None
    credentials: bool = False
    forward_unmatched: bool = True


@dataclass(frozen=True, slots=True)
class Mirror:
    cluster: str
    per_million: int = 1_000_000
    add_shadow_suffix: bool = True


@dataclass(frozen=True, slots=True)
class WeightedCluster:
    """`authority` replaces the Host for this destination alone; None leaves it."""

    cluster: str
    weight: int = 1
    request_headers: HeaderOperations = NO_OPERATIONS
    response_headers: HeaderOperations = NO_OPERATIONS
    authority: str | None = None


@dataclass(frozen=True, slots=True)
class Forward:
    """Send it to one of `clusters`, chosen by weight. `timeout` covers all tries and the body; None is no limit.
    `idle_timeout`: seconds without a byte in either direction. `missing_status`: of the answer where the cluster that
    was drawn does not exist."""

    clusters: tuple[WeightedCluster, ...]
    timeout: float | None = None
    retry: RetryPolicy | None = None
    rewrite: Rewrite | None = None
    mirrors: tuple[Mirror, ...] = ()
    idle_timeout: float | None = None
    hedge: HedgePolicy | None = None
    hash_policies: tuple[HashPolicy, ...] = ()
    missing_status: int = 503


@dataclass(frozen=True, slots=True)
class Redirect:
    """None keeps that part of the request's URL. `port` 0 keeps it, -1 takes the scheme's default. `regex` is replaced
    by `substitution` in the path, which has RE2's `\\1`."""

    status: int = 301
    scheme: str | None = None
    authority: str | None = None
    port: int = 0
    path: str | None = None
    prefix: str | None = None
    regex: str | None = None
    substitution: str = ""


@dataclass(frozen=True, slots=True)
class DirectResponse:
    status: int
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Route:
    """`name` is Istio's (`rule.match`, or `default`); `origin` names the object it came from (`VirtualService
    default/reviews`), for logs and explain. `limited_by`: the cluster whose rate limits hold for a route that goes to
    none. `cors`: for a gateway; calls within the mesh come from no page."""

    match: RouteMatch
    action: Forward | Redirect | DirectResponse
    name: str = "default"
    fault: Fault | None = None
    request_headers: HeaderOperations = NO_OPERATIONS
    response_headers: HeaderOperations = NO_OPERATIONS
    origin: str = ""
    limited_by: str = ""
    cors: Cors | None = None

    @property
    def clusters(self) -> tuple[str, ...]:
        """Every cluster that it leads to: destinations, mirrors, and the one whose limits hold."""
        if isinstance(self.action, Forward):
            return (*(each.cluster for each in self.action.clusters), *(each.cluster for each in self.action.mirrors))
        return (self.limited_by,) if self.limited_by else ()


@dataclass(frozen=True, slots=True)
class VirtualHost:
    """domains: exact (`reviews`, `reviews:9080`), suffix (`*.example.com`), prefix (`foo.*`) or `*`, matched in this
    order, longest first (Envoy). Routes: first match wins. `require_tls`: plain HTTP is redirected to https (301)."""

    name: str
    domains: tuple[str, ...]
    routes: tuple[Route, ...]
    require_tls: bool = False


@dataclass(frozen=True, slots=True)
class RouteConfiguration:
    name: str
    virtual_hosts: tuple[VirtualHost, ...]


@dataclass(frozen=True, slots=True)
class ListenerTls:
    """A gateway's certificate, by files (PEM), or by the name of a secret that the gateway has.

    mutual: clients must show one signed by `ca_file`, or by the secret's CA; optional: they may, and it must be then.
    credential: the secret's name; then there are no files.
    """

    certificate_file: str
    private_key_file: str
    ca_file: str = ""
    mutual: bool = False
    alpn: tuple[str, ...] = ("http/1.1",)
    optional: bool = False
    credential: str = ""

    @property
    def title(self) -> str:
        """For messages."""
        return f"secret {self.credential}" if self.credential else self.certificate_file


@dataclass(frozen=True, slots=True)
class FilterChain:
    """Which route configuration serves a connection. server_names: SNI names (`*.example.com` too); () is any."""

    route_configuration: str
    server_names: tuple[str, ...] = ()
    tls: ListenerTls | None = None


@dataclass(frozen=True, slots=True)
class Listener:
    """Either outbound (an xDS ApiListener): `name` is the authority that callers use (`reviews:9080`) and
    `route_configuration` says how it is routed. Or bound (a gateway): `address`, `port`, `filter_chains`, and who may
    come in. reporting: what is told of its calls; None is as the process is set."""

    name: str
    route_configuration: str = ""
    address: str = ""
    port: int = 0
    filter_chains: tuple[FilterChain, ...] = ()
    access: Access | None = None
    reporting: Reporting | None = None

    @property
    def is_bound(self) -> bool:
        return bool(self.filter_chains)

    @property
    def route_configurations(self) -> tuple[str, ...]:
        """Every route configuration that this listener needs, without repetition."""
        found = dict.fromkeys(chain.route_configuration for chain in self.filter_chains)
        for quota in self.access.quotas if self.access is not None else ():
            if quota.service.route_configuration:
                found[quota.service.route_configuration] = None
        return tuple(found) or (self.route_configuration,)
