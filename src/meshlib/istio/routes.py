"""What do VirtualServices say about the calls to one host? Rules -> routes, in their order.

Source of the rules: istio/istio pilot/pkg/networking/core/route/route.go.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from meshlib.errors import ConfigurationError
from meshlib.istio import resources as r
from meshlib.istio.parse import GRPC_STATUSES
from meshlib.istio.services import Directory, Service, fqdn
from meshlib.model import (
    DirectResponse,
    Fault,
    FaultAbort,
    FaultDelay,
    Forward,
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


def cluster_name(host: str, port: int, subset: str = "") -> str:
    return f"outbound|{port}|{subset}|{host}"


def default_route(service: Service, port: int) -> Route:
    """What happens without a rule: Istio's default retries, no timeout."""
    return Route(RouteMatch(), Forward((WeightedCluster(cluster_name(service.host, port)),), retry=RetryPolicy()))


class RouteMaker:
    """Makes the routes that a caller in `namespace` with `labels` sees, or a gateway's.

    directory: what the caller sees. subsets: of each host, to say which are missing.
    """

    def __init__(
        self,
        directory: Directory,
        subsets: Mapping[str, frozenset[str]],
        namespace: str,
        labels: Mapping[str, str],
        report: Report,
    ) -> None:
        self._directory, self._subsets = directory, subsets
        self._namespace, self._labels = namespace, labels
        self._report = report

    def routes(self, rule_object: r.Object, port: int, gateway: str = MESH) -> list[Route]:
        """The routes of one VirtualService for calls to `port`. One that matches everything ends the list.

        gateway: whose they are, as VirtualServices name it (`ns/name`, or MESH).
        """
        spec = rule_object.spec
        assert isinstance(spec, r.VirtualService)
        found: list[Route] = []
        for index, rule in enumerate(spec.http):
            for route in self._of_rule(rule_object, rule, index, port, gateway):
                found.append(route)
                if is_catch_all(route.match):
                    return found
        return found

    def _of_rule(self, owner: r.Object, rule: r.HTTPRoute, index: int, port: int, gateway: str) -> Iterator[Route]:
        matches: list[r.HTTPMatchRequest | None] = [
            each for each in rule.match if self._concerns(each, owner, port, gateway)
        ]
        if not rule.match:
            matches = [None]
        if not matches:
            return
        action = self._action(owner, rule, f"spec.http[{index}]", port)
        fault = _fault(rule.fault)
        request, response = _operations(rule.headers)
        for match in matches:
            name = ".".join(part for part in (rule.name, match.name if match else "") if part) or "default"
            yield Route(_match(match), action, name, fault, request, response, owner.title)

    def _concerns(self, match: r.HTTPMatchRequest, owner: r.Object, port: int, gateway: str) -> bool:
        """Gateways that are named decide alone; the source is looked at only where none is (sourceMatchHTTP)."""
        if match.port is not None and match.port != port:
            return False
        if match.gateways:
            return gateway in qualified(match.gateways, owner.namespace)
        if match.source_namespace and match.source_namespace != self._namespace:
            return False
        return all(self._labels.get(key) == value for key, value in match.source_labels.items())

    def _action(self, owner: r.Object, rule: r.HTTPRoute, at: str, port: int) -> Forward | Redirect | DirectResponse:
        if rule.redirect is not None:
            return _redirect(rule.redirect)
        if rule.direct_response is not None:
            return DirectResponse(rule.direct_response.status, _body(rule.direct_response.body))

        def name(destination: r.Destination, field: str) -> str:
            return self._cluster(owner, destination, field, port)

        clusters = []
        host = _set_host(rule.headers)
        for index, each in enumerate(rule.route):
            if each.weight == 0 and len(rule.route) > 1:
                continue
            request, response = _operations(each.headers)
            cluster = name(each.destination, f"{at}.route[{index}].destination")
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
            mirrors.append(Mirror(name(rule.mirror, f"{at}.mirror"), share))
        for index, policy in enumerate(rule.mirrors):
            share = _MILLION if policy.percentage is None else _per_million(policy.percentage.value)
            mirrors.append(Mirror(name(policy.destination, f"{at}.mirrors[{index}].destination"), share))
        return Forward(
            tuple(clusters),
            rule.timeout.seconds if rule.timeout is not None and rule.timeout.seconds else None,
            _retry(rule.retries),
            rewrite,
            tuple(mirror for mirror in mirrors if mirror.per_million),
        )

    def _cluster(self, owner: r.Object, destination: r.Destination, field: str, port: int) -> str:
        """The cluster that a destination means; one that is missing keeps its name, and calls on it get 503 NC."""
        service = self._directory.find(destination.host, owner.namespace)

        def complain(part: str, reason: str) -> None:
            self._report(ConfigurationError(owner.source, owner.title, f"{field}.{part}", reason))

        if service is None:
            complain("host", f"no service {fqdn(destination.host, owner.namespace)} is known here")
            number = destination.port.number if destination.port else port
            return cluster_name(fqdn(destination.host, owner.namespace), number, destination.subset)
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
        if destination.subset and destination.subset not in self._subsets.get(service.host, frozenset()):
            complain("subset", f"no DestinationRule defines subset {destination.subset!r} of {service.host}")
        return cluster_name(service.host, number, destination.subset)


def is_catch_all(match: RouteMatch) -> bool:
    """Whether no request escapes it, so that what stands behind it is dead."""
    return replace(match, path=None) == RouteMatch() and match.path in (None, StringMatch("regex", ".*"))


def qualified(gateways: Iterable[str], namespace: str) -> frozenset[str]:
    """Gateway names as `ns/name`; `mesh` stays."""
    return frozenset(name if name == MESH or "/" in name else f"{namespace}/{name}" for name in gateways)


def destinations(spec: r.VirtualService) -> Iterator[r.Destination]:
    """Every destination that a VirtualService names."""
    for rule in spec.http:
        yield from (each.destination for each in rule.route)
        if rule.mirror is not None:
            yield rule.mirror
        yield from (each.destination for each in rule.mirrors)


def _match(match: r.HTTPMatchRequest | None) -> RouteMatch:
    if match is None:
        return RouteMatch()
    headers = [
        HeaderMatch(name.lower(), _string(value, presence=True)) for name, value in sorted(match.headers.items())
    ]
    headers += [
        HeaderMatch(name.lower(), _string(value, presence=True), invert=True)
        for name, value in sorted(match.without_headers.items())
    ]
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
    return Redirect(given.redirect_code, given.scheme or None, given.authority or None, port, given.uri or None)


def _body(given: r.HTTPBody | None) -> bytes:
    if given is None:
        return b""
    return given.string.encode() if given.string is not None else base64.b64decode(given.bytes or "")


def _retry(given: r.HTTPRetry | None) -> RetryPolicy | None:
    if given is None:
        return RetryPolicy()
    if given.attempts == 0:
        return None
    default = RetryPolicy()
    on, codes = default.on, default.status_codes
    if given.retry_on:
        parts = [part.strip() for part in given.retry_on.split(",") if part.strip()]
        codes = frozenset(int(part) for part in parts if part.isdecimal())
        on = frozenset(part for part in parts if not part.isdecimal())
        if codes:
            on |= {"retriable-status-codes"}
    base = given.backoff.seconds if given.backoff is not None else default.base_interval
    return RetryPolicy(
        given.attempts,
        on,
        codes,
        given.per_try_timeout.seconds if given.per_try_timeout is not None and given.per_try_timeout.seconds else None,
        base,
        base * 10,
        default.host_selection_attempts if given.retry_ignore_previous_hosts else 0,
        given.retry_remote_localities,
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
