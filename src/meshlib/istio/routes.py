"""What do VirtualServices say about the calls to one host? Rules -> routes, in their order.

Source of the rules: istio/istio pilot/pkg/networking/core/route/route.go.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from meshlib.errors import ConfigurationError
from meshlib.istio import gateway_kinds
from meshlib.istio import resources as r
from meshlib.istio.checks.routes import GRPC_STATUSES
from meshlib.istio.claims import claim_of
from meshlib.istio.clusters import Policy, Rules
from meshlib.istio.delegates import Rule
from meshlib.istio.services import Directory, Service, cluster_name, fqdn
from meshlib.model import (
    ClaimMatch,
    Cors,
    DirectResponse,
    Fault,
    FaultAbort,
    FaultDelay,
    Forward,
    HashPolicy,
    HeaderMatch,
    HeaderOperations,
    Mirror,
    QueryMatch,
    Redirect,
    RetryPolicy,
    Rewrite,
    Route,
    RouteMatch,
    StringMatch,
    WeightedCluster,
)

MESH = "mesh"
NO_OPERATIONS = HeaderOperations()
_MILLION = 1_000_000
Report = Callable[[ConfigurationError], None]


class _Destination(NamedTuple):
    """policy: None for one that does not exist."""

    cluster: str
    policy: Policy | None


def default_route(service: Service, port: int, rules: Rules) -> Route:
    """What happens without a rule: the mesh's retries, else Istio's own; no timeout."""
    found = service.port(port)
    policies = [] if found is None else [rules.policy(found)]
    hashing = _hash_policies(policies)
    action = Forward(
        (WeightedCluster(cluster_name(service.host, port)),),
        retry=_retry(rules.settings.retries, policies, hashing),
        hedge=policies[0].hedge if policies else None,
        hash_policies=hashing,
    )
    return Route(RouteMatch(), action)


class RouteMaker:
    """Makes the routes that a caller in `namespace` with `labels` sees, or a gateway's.

    directory: what the caller sees. rules_for: what is said of a service. rules_of: what a VirtualService says, with
    its delegates' words in their places. retries: of rules that say nothing about them.
    """

    def __init__(
        self,
        directory: Directory,
        rules_for: Callable[[Service], Rules],
        rules_of: Callable[[r.Object], Sequence[Rule]],
        namespace: str,
        labels: Mapping[str, str],
        retries: r.HTTPRetry | None,
        report: Report,
    ) -> None:
        self._directory, self._rules_for, self._rules_of = directory, rules_for, rules_of
        self._namespace, self._labels = namespace, labels
        self._retries, self._report = retries, report

    def routes(self, rule_object: r.Object, port: int, gateway: str = MESH) -> list[Route]:
        """The routes of one VirtualService for calls to `port`. One that matches everything ends the list.

        gateway: whose they are, as VirtualServices name it (`ns/name`, or MESH).
        """
        found: list[Route] = []
        for rule in self._rules_of(rule_object):
            for route in self._of_rule(rule, port, gateway):
                found.append(route)
                if is_catch_all(route.match):
                    return found
        return found

    def _of_rule(self, given: Rule, port: int, gateway: str) -> Iterator[Route]:
        owner, rule = given.owner, given.rule
        matches: list[r.HTTPMatchRequest | None] = [
            each for each in rule.match if self._concerns(each, given.gateways_of, port, gateway)
        ]
        if not rule.match:
            matches = [None]
        if not matches:
            return
        action = self._action(owner, rule, given.at, port)
        fault = _fault(rule.fault)
        cors = None if rule.cors_policy is None or gateway == MESH else _cors(rule.cors_policy)
        request, response = _operations(rule.headers)
        for match in matches:
            name = ".".join(part for part in (rule.name, match.name if match else "") if part) or "default"
            wanted = _match(match)
            if wanted.claims and gateway == MESH:
                reason = "asks for a claim, which only a gateway knows: for calls within the mesh there is none"
                self._report(ConfigurationError(owner.source, owner.title, f"{given.at}.match", reason))
            yield Route(wanted, action, name, fault, request, response, owner.origin, cors=cors)

    def _concerns(self, match: r.HTTPMatchRequest, home: str, port: int, gateway: str) -> bool:
        """Gateways that are named decide alone; the source is looked at only where none is (sourceMatchHTTP)."""
        if match.port is not None and match.port != port:
            return False
        if match.gateways:
            return gateway in qualified(match.gateways, home)
        if match.source_namespace and match.source_namespace != self._namespace:
            return False
        return all(self._labels.get(key) == value for key, value in match.source_labels.items())

    def _action(self, owner: r.Object, rule: r.HTTPRoute, at: str, port: int) -> Forward | Redirect | DirectResponse:
        if rule.redirect is not None:
            return _redirect(rule.redirect)
        if rule.direct_response is not None:
            return DirectResponse(rule.direct_response.status, _body(rule.direct_response.body))

        def find(destination: r.Destination, field: str) -> _Destination:
            return self._destination(owner, destination, field, port)

        clusters = []
        policies: list[Policy] = []
        host = _set_host(rule.headers)
        for index, each in enumerate(rule.route):
            if each.weight == 0 and len(rule.route) > 1:
                continue
            request, response = _operations(each.headers)
            cluster, policy = find(each.destination, f"{at}.route[{index}].destination")
            if policy is not None:
                policies.append(policy)
            clusters.append(WeightedCluster(cluster, each.weight or 1, request, response, _set_host(each.headers)))
        rewrite = _rewrite(rule.rewrite)
        if host is not None and (rewrite is None or rewrite.authority is None):
            rewrite = Rewrite(authority=host) if rewrite is None else _with_authority(rewrite, host)
        mirrors = []
        if rule.mirror is not None:
            if rule.mirror_percentage is not None:
                share = _per_million(rule.mirror_percentage.value)
            else:
                share = _MILLION if rule.mirror_percent is None else rule.mirror_percent * 10_000
            mirrors.append(Mirror(find(rule.mirror, f"{at}.mirror").cluster, share))
        for index, mirror in enumerate(rule.mirrors):
            share = _MILLION if mirror.percentage is None else _per_million(mirror.percentage.value)
            mirrors.append(Mirror(find(mirror.destination, f"{at}.mirrors[{index}].destination").cluster, share))
        hashing = _hash_policies(policies)
        hedges = {policy.hedge for policy in policies}
        return Forward(
            tuple(clusters),
            rule.timeout.seconds if rule.timeout is not None and rule.timeout.seconds else None,
            _retry(self._retries if rule.retries is None else rule.retries, policies, hashing),
            rewrite,
            tuple(each for each in mirrors if each.per_million),
            # A rule is for all destinations of a route or for none: which one is drawn is not known before.
            hedge=hedges.pop() if len(hedges) == 1 else None,
            hash_policies=hashing,
            missing_status=500 if owner.api_version.startswith(f"{gateway_kinds.GROUP}/") else 503,
        )

    def _destination(self, owner: r.Object, destination: r.Destination, field: str, port: int) -> _Destination:
        """The cluster that a destination means; one that is missing keeps its name, and calls on it get 503 NC."""
        service = self._directory.find(destination.host, owner.namespace)

        def complain(part: str, reason: str) -> None:
            self._report(ConfigurationError(owner.source, owner.title, f"{field}.{part}", reason))

        if service is None:
            complain("host", f"no service {fqdn(destination.host, owner.namespace)} is known here")
            number = destination.port.number if destination.port else port
            return _Destination(cluster_name(fqdn(destination.host, owner.namespace), number, destination.subset), None)
        if destination.port is not None:
            number = destination.port.number
            if service.port(number) is None:
                told = ", ".join(str(each.number) for each in service.ports)
                complain("port.number", f"{service.host} has no port {number}; there are {told}")
        elif len(service.ports) == 1:
            number = service.ports[0].number
        else:
            number = port
            if service.port(port) is None:
                complain("port", f"{service.host} has several ports, so one must be named")
        rules = self._rules_for(service)
        found = service.port(number)
        if destination.subset and destination.subset not in rules.subsets:
            complain("subset", f"no DestinationRule defines subset {destination.subset!r} of {service.host}")
        return _Destination(
            cluster_name(service.host, number, destination.subset),
            None if found is None else rules.policy(found, destination.subset),
        )


def is_catch_all(match: RouteMatch) -> bool:
    """Whether no request escapes it, so that what stands behind it is dead."""
    return replace(match, path=None) == RouteMatch() and match.path in (None, StringMatch("regex", ".*"))


def qualified(gateways: Iterable[str], namespace: str) -> frozenset[str]:
    """Gateway names as `ns/name`; `mesh` stays."""
    return frozenset(name if name == MESH or "/" in name else f"{namespace}/{name}" for name in gateways)


def destinations(rules: Iterable[Rule]) -> Iterator[tuple[str, str]]:
    """Every host that the rules of a VirtualService name, and the namespace that names it."""
    for each in rules:
        namespace = each.owner.namespace
        yield from ((given.destination.host, namespace) for given in each.rule.route)
        if each.rule.mirror is not None:
            yield each.rule.mirror.host, namespace
        yield from ((given.destination.host, namespace) for given in each.rule.mirrors)


def _hash_policies(policies: Iterable[Policy]) -> tuple[HashPolicy, ...]:
    """Of all destinations of a route, each once (route.go, processDestination)."""
    return tuple(dict.fromkeys(each for policy in policies for each in policy.hash_policies))


def _match(match: r.HTTPMatchRequest | None) -> RouteMatch:
    if match is None:
        return RouteMatch()
    headers: list[HeaderMatch] = []
    claims: list[ClaimMatch] = []
    for table, inverted in ((match.headers, False), (match.without_headers, True)):
        for name, value in sorted(table.items()):
            wanted, claim = _string(value, presence=True), claim_of(name)
            if claim is not None:
                claims.append(ClaimMatch(claim, wanted, inverted))
            else:
                headers.append(HeaderMatch(name.lower(), wanted, inverted))
    path = None if match.uri is None else _string(match.uri, ignore_case=match.ignore_uri_case)
    if path is not None and path.kind == "prefix" and path.value == "/":
        path = None
    return RouteMatch(
        path,
        None if match.method is None else _string(match.method),
        None if match.scheme is None else _string(match.scheme),
        None if match.authority is None else _string(match.authority),
        tuple(headers),
        tuple(QueryMatch(name, _string(value, presence=True)) for name, value in sorted(match.query_params.items())),
        tuple(claims),
    )


def _string(match: r.StringMatch, *, presence: bool = False, ignore_case: bool = False) -> StringMatch:
    if match.exact is not None:
        return StringMatch("exact", match.exact, ignore_case)
    if match.prefix is not None:
        return StringMatch("prefix", match.prefix, ignore_case)
    if match.regex is not None:
        # Istio's own form for presence; "*" alone is no regular expression.
        return StringMatch("present") if presence and match.regex == "*" else StringMatch("regex", match.regex)
    return StringMatch("present")


def _cors(given: r.CorsPolicy) -> Cors:
    origins = (*(r.StringMatch(exact=each) for each in given.allow_origin), *given.allow_origins)
    return Cors(
        tuple(_string(each) for each in origins),
        ",".join(given.allow_methods),
        ",".join(given.allow_headers),
        ",".join(given.expose_headers),
        None if given.max_age is None else int(given.max_age.seconds),
        bool(given.allow_credentials),
        given.unmatched_preflights != "IGNORE",
    )


def _operations(headers: r.Headers) -> tuple[HeaderOperations, HeaderOperations]:
    return _side(headers.request, is_request=True), _side(headers.response, is_request=False)


def _side(given: r.HeaderOperations, *, is_request: bool) -> HeaderOperations:
    def pairs(table: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        return tuple(
            (name.lower(), value)
            for name, value in sorted(table.items())
            if not (is_request and name.lower() in ("host", ":authority"))
        )

    operations = HeaderOperations(
        pairs(given.set), pairs(given.add), tuple(sorted(name.lower() for name in given.remove))
    )
    return operations if operations else NO_OPERATIONS


def _set_host(headers: r.Headers) -> str | None:
    """Setting Host (or :authority) is a rewrite of the authority (Istio)."""
    return next((value for name, value in headers.request.set.items() if name.lower() in ("host", ":authority")), None)


def _rewrite(given: r.HTTPRewrite | None) -> Rewrite | None:
    if given is None:
        return None
    authority = given.authority or None
    if given.uri_regex_rewrite is not None:
        return Rewrite(
            regex=given.uri_regex_rewrite.match, substitution=given.uri_regex_rewrite.rewrite, authority=authority
        )
    return Rewrite(prefix=given.uri or None, authority=authority)


def _with_authority(rewrite: Rewrite, authority: str) -> Rewrite:
    return Rewrite(rewrite.prefix, rewrite.path, rewrite.regex, rewrite.substitution, authority)


def _redirect(given: r.HTTPRedirect) -> Redirect:
    port = given.port or 0
    if given.derive_port == "FROM_PROTOCOL_DEFAULT":
        port = -1
    found = Redirect(
        given.redirect_code,
        given.scheme or None,
        given.authority or None,
        port,
        given.uri or None,
        given.prefix_rewrite or None,
    )
    if isinstance(given, r.PathRedirect) and given.regex is not None:
        return replace(found, regex=given.regex.match, substitution=given.regex.rewrite)
    return found


def _body(given: r.HTTPBody | None) -> bytes:
    if given is None:
        return b""
    return given.string.encode() if given.string is not None else base64.b64decode(given.bytes or "")


def _retry(given: r.HTTPRetry | None, policies: Sequence[Policy], hashing: Sequence[HashPolicy]) -> RetryPolicy | None:
    """With consistent hashing a retry may go where the first try went (DefaultConsistentHashPolicy)."""
    resend_unsafe = bool(policies) and all(policy.resend_unsafe for policy in policies)
    default = RetryPolicy(resend_unsafe=resend_unsafe)
    if hashing:
        default = replace(default, host_selection_attempts=0)
    if given is None:
        return default
    if given.attempts == 0:
        return None
    on, codes = default.on, default.status_codes
    if given.retry_on:
        parts = [part.strip() for part in given.retry_on.split(",") if part.strip()]
        codes = frozenset(int(part) for part in parts if part.isdecimal())
        on = frozenset(part for part in parts if not part.isdecimal())
        if codes:
            on |= {"retriable-status-codes"}
    base = given.backoff.seconds if given.backoff is not None else default.base_interval
    attempts = default.host_selection_attempts
    if given.retry_ignore_previous_hosts is not None:
        attempts = RetryPolicy().host_selection_attempts if given.retry_ignore_previous_hosts else 0
    return RetryPolicy(
        given.attempts,
        on,
        codes,
        given.per_try_timeout.seconds if given.per_try_timeout is not None and given.per_try_timeout.seconds else None,
        base,
        base * 10,
        attempts,
        given.retry_remote_localities,
        resend_unsafe=resend_unsafe,
    )


def _fault(given: r.HTTPFaultInjection | None) -> Fault | None:
    if given is None:
        return None
    delay = abort = None
    if given.delay is not None:
        if given.delay.percentage is not None:
            share = _per_million(given.delay.percentage.value)
        else:
            share = (given.delay.percent or 0) * 10_000  # unset delays nobody (virtual_service.proto)
        if share:
            delay = FaultDelay(given.delay.fixed_delay.seconds, share)
    if given.abort is not None:
        # unset aborts nobody (virtual_service.proto); for a mirror it is everybody
        share = 0 if given.abort.percentage is None else _per_million(given.abort.percentage.value)
        grpc = given.abort.grpc_status
        if share:
            abort = FaultAbort(share, given.abort.http_status or 0, GRPC_STATUSES[grpc.upper()] if grpc else None)
    return Fault(delay, abort) if delay or abort else None


def _per_million(percent: float) -> int:
    return round(percent * 10_000)
