"""What do the Gateway API's routes say? HTTPRoute and GRPCRoute -> the VirtualServices that say the same.

A route may have Gateways of ours as parents, and Services (GAMMA): then it is for those who call the Service, wherever
they are where the route is in the Service's namespace, in its own namespace where not. All routes of one parent and
host are one VirtualService here, their matches in the order of the specification: which object a match stands in makes
no difference. Sources: gateway-api.sigs.k8s.io, and istio/istio pilot/pkg/config/kube/gateway.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from typing import NamedTuple

import msgspec

from meshlib.errors import ConfigurationError
from meshlib.istio import gateway_kinds as g
from meshlib.istio import resources as r
from meshlib.istio.checks.routes import check_virtual_service
from meshlib.istio.decoding import parse_duration
from meshlib.istio.gateway_listeners import Condition, GatewayStatus, Listener, gateway_of, is_granted, listeners_of
from meshlib.istio.problems import ConfigurationWarning, Refused
from meshlib.istio.services import DOMAIN
from meshlib.model.values import dataclass

NOWHERE = "not-resolved.invalid"
"""In place of a backend that is none: its share of the calls gets 500, as the specification wants it."""
ACCEPTED, RESOLVED = Condition(True, "Accepted"), Condition(True, "ResolvedRefs")
RETRY_ON = "connect-failure,refused-stream,unavailable,cancelled"
Route = g.HTTPRoute | g.GRPCRoute


@dataclass(frozen=True, slots=True)
class ParentStatus:
    """What one route is told about one of its parents."""

    route: r.Object
    parent: g.ParentReference
    accepted: Condition
    resolved: Condition


@dataclass(frozen=True, slots=True)
class Converted:
    """objects: what was given without the Gateway API's kinds, and what is made of those."""

    objects: tuple[r.Object, ...]
    problems: tuple[ConfigurationError, ...] = ()
    statuses: tuple[ParentStatus, ...] = ()
    gateways: tuple[GatewayStatus, ...] = ()


class _Unsupported(Exception):
    """A route asks for what nobody does. It is refused whole: half of it would be something else."""


class _Place(NamedTuple):
    """What a VirtualService is made for. gateway: `ns/name`, "" for the mesh. export_to: of the mesh's."""

    namespace: str
    host: str
    gateway: str = ""
    export_to: str = "*"


@dataclass(slots=True)
class _Work:
    services: frozenset[str]
    """Hosts."""
    grants: list[r.Object]
    listeners: Mapping[tuple[str, str], list[Listener]]
    namespaces: Mapping[str, Mapping[str, str]]
    places: dict[_Place, list[tuple[tuple[object, ...], r.HTTPRoute, r.Object]]] = field(default_factory=dict)
    problems: list[ConfigurationError] = field(default_factory=list)
    statuses: list[ParentStatus] = field(default_factory=list)


def convert(objects: Iterable[r.Object], joined: Iterable[str] = ()) -> Converted:
    """Pure. Objects without any of the Gateway API's come back as they are. joined: hosts of services that are there by
    their processes, whether there is an object of them or not (services.joined_hosts)."""
    given = tuple(objects)
    routes = [each for each in given if isinstance(each.spec, Route)]
    if not routes and not any(isinstance(each.spec, g.Gateway) for each in given):
        return Converted(given)
    grants = [each for each in given if isinstance(each.spec, g.ReferenceGrant)]
    listeners, problems = listeners_of(given, grants)
    work = _Work(
        frozenset((*(_host(each.name, each.namespace) for each in given if isinstance(each.spec, r.Service)), *joined)),
        grants,
        listeners,
        {each.name: each.labels for each in given if each.kind == "Namespace"},
        problems=problems,
    )
    for route in sorted(routes, key=lambda each: (each.created, each.namespace, each.name, each.kind)):
        _attach(route, work)
    made = [gateway_of(each) for found in listeners.values() for each in found if each.is_served]
    made += [_virtual_service(place, found) for place, found in work.places.items()]
    rest = tuple(each for each in given if not isinstance(each.spec, Route | g.Gateway))
    gateways = [
        GatewayStatus(each, tuple(listeners[each.namespace, each.name]))
        for each in given
        if isinstance(each.spec, g.Gateway) and (each.namespace, each.name) in listeners
    ]
    return Converted((*rest, *made), tuple(work.problems), tuple(work.statuses), tuple(gateways))


def _host(name: str, namespace: str) -> str:
    return f"{name}.{namespace}.svc.{DOMAIN}"


# Routes


def _attach(route: r.Object, work: _Work) -> None:
    spec = route.spec
    assert isinstance(spec, Route)
    try:
        rules, resolved = _rules(route, spec, work)
        check_virtual_service(
            r.VirtualService(["*"], ["any"], http=[_with_match(each.rule, each.match) for each in rules])
        )
    except (_Unsupported, Refused) as error:
        reason = error.reason if isinstance(error, Refused) else str(error)
        work.problems.append(ConfigurationError(route.source, route.title, "spec.rules", reason))
        for parent in spec.parent_refs:
            if _is_ours(parent, route, work):
                refused = Condition(False, "UnsupportedValue", reason)
                work.statuses.append(ParentStatus(route, parent, refused, RESOLVED))
        return
    for parent in spec.parent_refs:
        if not _is_ours(parent, route, work):
            continue
        accepted = _accept(route, spec, parent, rules, work)
        if not accepted.is_so:
            work.problems.append(ConfigurationError(route.source, route.title, "spec.parentRefs", accepted.message))
        work.statuses.append(ParentStatus(route, parent, accepted, resolved))


def _is_ours(parent: g.ParentReference, route: r.Object, work: _Work) -> bool:
    """Of another's Gateway we have nothing to say."""
    if parent.kind == "Service" and parent.group in ("", "core"):
        return True
    home = parent.namespace or route.namespace
    return parent.kind == "Gateway" and parent.group == g.GROUP and (home, parent.name) in work.listeners


def _accept(route: r.Object, spec: Route, parent: g.ParentReference, rules: list[_Made], work: _Work) -> Condition:
    home = parent.namespace or route.namespace
    if parent.kind == "Service":
        host = _host(parent.name, home)
        if host not in work.services:
            return Condition(False, "NoMatchingParent", f"there is no Service {home}/{parent.name}")
        place = _Place(route.namespace, host, export_to="*" if home == route.namespace else ".")
        _put(work, place, route, rules, parent.port)
        if any(each.rule.cors_policy is not None for each in rules):
            reason = "CORS has no effect within the mesh: its calls come from no page"
            work.problems.append(ConfigurationWarning(route.source, route.title, "spec.rules", reason))
        return ACCEPTED
    found = [
        each
        for each in work.listeners[home, parent.name]
        if parent.section_name in ("", each.spec.name) and parent.port in (None, each.spec.port)
    ]
    if not found:
        return Condition(False, "NoMatchingParent", f"Gateway {home}/{parent.name} has no such listener")
    allowed = [each for each in found if each.takes(route, work.namespaces)]
    if not allowed:
        reason = f"no listener of Gateway {home}/{parent.name} takes this route"
        return Condition(False, "NotAllowedByListeners", reason)
    hosts = {id(each): _common(each.spec.hostname, spec.hostnames) for each in allowed}
    if not any(hosts.values()):
        reason = f"no listener of Gateway {home}/{parent.name} has these hostnames"
        return Condition(False, "NoMatchingListenerHostname", reason)
    for each in allowed:
        each.attached += bool(hosts[id(each)])
        for host in hosts[id(each)] if each.is_served else ():
            _put(work, _Place(route.namespace, host, f"{home}/{each.gateway_name}"), route, rules, None)
    return ACCEPTED


def _common(listener: str, hostnames: list[str]) -> list[str]:
    """Where a listener's and a route's hostnames meet: the narrower of the two."""
    if not hostnames:
        return [listener or "*"]
    if not listener:
        return list(hostnames)
    found = []
    for each in hostnames:
        if each == listener or (listener.startswith("*.") and each.endswith(listener[1:])):
            found.append(each)
        elif each.startswith("*.") and listener.endswith(each[1:]):
            found.append(listener)
    return found


def _put(work: _Work, place: _Place, route: r.Object, rules: list[_Made], port: int | None) -> None:
    """port: of the Service, where the parent names one."""
    entries = work.places.setdefault(place, [])
    for made in rules:
        match = made.match if port is None else _with_port(made.match, port)
        entries.append(((*made.order, len(entries)), _with_match(made.rule, match), route))


def _virtual_service(place: _Place, found: list[tuple[tuple[object, ...], r.HTTPRoute, r.Object]]) -> r.Object:
    first = found[0][2]
    names = ",".join(dict.fromkeys(each.name for _, _, each in found))
    rules = [rule for _, rule, _ in sorted(found, key=lambda each: each[0])]
    spec = r.VirtualService(
        [place.host],
        [place.gateway] if place.gateway else [],
        rules,
        [] if place.gateway else [place.export_to],
    )
    name = f"{names}@{place.gateway or place.host}" + (f"/{place.host}" if place.gateway else "")
    return r.Object(first.api_version, first.kind, place.namespace, name, first.source, spec, {}, created=first.created)


# Rules


class _Made(NamedTuple):
    """One match of a rule. order: the smaller, the sooner it is looked at."""

    order: tuple[object, ...]
    match: r.HTTPMatchRequest
    rule: r.HTTPRoute


def _rules(route: r.Object, spec: Route, work: _Work) -> tuple[list[_Made], Condition]:
    """Raises _Unsupported. With the condition ResolvedRefs."""
    resolved = RESOLVED
    found: list[_Made] = []
    rules: Sequence[g.HTTPRule | g.GRPCRule] = spec.rules
    for index, rule in enumerate(rules):
        body, trouble = _body(route, rule, f"spec.rules[{index}]", work)
        resolved = trouble or resolved
        matches = [_http(each) for each in rule.matches] if isinstance(rule, g.HTTPRule) else []
        if isinstance(rule, g.GRPCRule):
            matches = [_grpc(each) for each in rule.matches]
        for match, prefix in matches or [(r.HTTPMatchRequest(), "/")]:
            found.append(_Made(_order(match, prefix), match, _finish(body, rule, prefix)))
    return found, resolved


def _order(match: r.HTTPMatchRequest, prefix: str | None) -> tuple[object, ...]:
    """An exact path, then the longest prefix, then expressions; a method; most headers; most parameters. The rest is
    left to the age of the routes and to their own order."""
    uri = match.uri
    exact = uri is not None and uri.exact is not None
    kind = 0 if exact else 1 if prefix is not None else 2
    length = len((uri.exact or uri.regex or "") if uri is not None and prefix is None else prefix or "")
    return kind, -length, match.method is None, -len(match.headers), -len(match.query_params)


def _http(match: g.HTTPMatch) -> tuple[r.HTTPMatchRequest, str | None]:
    """With the path's prefix, None where that is no prefix."""
    uri, prefix = _path(match.path)
    method = r.StringMatch(exact=match.method) if match.method else None
    return (
        r.HTTPMatchRequest(
            uri=uri, method=method, headers=_values(match.headers), query_params=_values(match.query_params)
        ),
        prefix,
    )


def _path(path: g.PathMatch) -> tuple[r.StringMatch | None, str | None]:
    match path.type:
        case "Exact":
            return r.StringMatch(exact=path.value), None
        case "PathPrefix":
            prefix = path.value.rstrip("/")
            # By whole segments: /a takes /a and /a/b, and not /ab.
            return (r.StringMatch(regex=f"{re.escape(prefix)}(/.*)?") if prefix else None), prefix or "/"
        case "RegularExpression":
            return r.StringMatch(regex=path.value), None
    raise _Unsupported(f"no path match of type {path.type!r}")


def _grpc(match: g.GRPCMatch) -> tuple[r.HTTPMatchRequest, str | None]:
    method = match.method
    uri: r.StringMatch | None
    if method.type == "RegularExpression":
        uri = r.StringMatch(regex=f"/{method.service or '[^/]+'}/{method.method or '[^/]+'}")
    elif method.type != "Exact":
        raise _Unsupported(f"no method match of type {method.type!r}")
    elif method.service and method.method:
        uri = r.StringMatch(exact=f"/{method.service}/{method.method}")
    elif method.service:
        uri = r.StringMatch(regex=f"/{re.escape(method.service)}/[^/]+")
    elif method.method:
        uri = r.StringMatch(regex=f"/[^/]+/{re.escape(method.method)}")
    else:
        uri = None
    return r.HTTPMatchRequest(uri=uri, headers=_values(match.headers)), "/" if uri is None else None


def _values(matches: list[g.ValueMatch]) -> dict[str, r.StringMatch]:
    """Of two with the same name the first counts."""
    found: dict[str, r.StringMatch] = {}
    for each in matches:
        if each.type not in ("Exact", "RegularExpression"):
            raise _Unsupported(f"no match of type {each.type!r}")
        value = r.StringMatch(exact=each.value) if each.type == "Exact" else r.StringMatch(regex=each.value)
        found.setdefault(each.name, value)
    return found


class _Body(NamedTuple):
    """What a rule does, but for what depends on the path's prefix."""

    route: list[r.HTTPRouteDestination]
    headers: r.Headers
    mirrors: list[r.HTTPMirrorPolicy]
    redirect: g.RedirectFilter | None
    rewrite: g.RewriteFilter | None
    cors: r.CorsPolicy | None


def _body(route: r.Object, rule: g.HTTPRule | g.GRPCRule, at: str, work: _Work) -> tuple[_Body, Condition | None]:
    trouble: Condition | None = None

    def host(backend: g.BackendObjectReference, field: str) -> r.Destination:
        nonlocal trouble
        found = _trouble(route, backend, work)
        if found is not None:
            trouble = found
            work.problems.append(ConfigurationError(route.source, route.title, field, found.message))
            return r.Destination(NOWHERE, port=r.PortSelector(80))
        home = backend.namespace or route.namespace
        assert backend.port is not None
        return r.Destination(_host(backend.name, home), port=r.PortSelector(backend.port))

    destinations = []
    for index, backend in enumerate(rule.backend_refs):
        headers = r.Headers()
        for each in backend.filters:
            headers = _with_headers(headers, each)
        destination = host(backend, f"{at}.backendRefs[{index}]")
        destinations.append(r.HTTPRouteDestination(destination, backend.weight, headers))
    headers, mirrors = r.Headers(), []
    redirect: g.RedirectFilter | None = None
    rewrite: g.RewriteFilter | None = None
    cors: r.CorsPolicy | None = None
    for index, each in enumerate(rule.filters):
        if each.request_mirror is not None and each.type == "RequestMirror":
            destination = host(each.request_mirror.backend_ref, f"{at}.filters[{index}]")
            mirrors.append(r.HTTPMirrorPolicy(destination, r.Percent(_share(each.request_mirror))))
        elif each.request_redirect is not None and each.type == "RequestRedirect":
            redirect = each.request_redirect
        elif each.cors is not None and each.type == "CORS":
            cors = _cors(each.cors)
        elif each.url_rewrite is not None and each.type == "URLRewrite":
            rewrite = each.url_rewrite
        else:
            headers = _with_headers(headers, each)
    return _Body(destinations, headers, mirrors, redirect, rewrite, cors), trouble


def _cors(given: g.CorsFilter) -> r.CorsPolicy:
    """A preflight of an origin that is not named gets an answer without permission, and does not reach the backend."""
    return r.CorsPolicy(
        allow_origins=[_origin(each) for each in given.allow_origins],
        allow_methods=given.allow_methods,
        allow_headers=given.allow_headers,
        expose_headers=given.expose_headers,
        max_age=r.Duration(given.max_age),
        allow_credentials=given.allow_credentials,
        unmatched_preflights="IGNORE",
    )


def _origin(given: str) -> r.StringMatch:
    """`https://*.example.com`: an asterisk is any text of the host."""
    if given == "*" or "*" not in given:
        return r.StringMatch(exact=given)
    return r.StringMatch(regex="[^/:@]+".join(map(re.escape, given.split("*"))))


def _share(mirror: g.MirrorFilter) -> float:
    if mirror.fraction is not None:
        return min(100.0, 100.0 * mirror.fraction.numerator / mirror.fraction.denominator)
    return 100.0 if mirror.percent is None else float(mirror.percent)


def _with_headers(headers: r.Headers, given: g.Filter) -> r.Headers:
    for kind, modifier in (
        ("RequestHeaderModifier", given.request_header_modifier),
        ("ResponseHeaderModifier", given.response_header_modifier),
    ):
        if given.type == kind and modifier is not None:
            operations = r.HeaderOperations(
                {each.name: each.value for each in modifier.set},
                {each.name: each.value for each in modifier.add},
                list(modifier.remove),
            )
            if kind == "RequestHeaderModifier":
                return r.Headers(operations, headers.response)
            return r.Headers(headers.request, operations)
    raise _Unsupported(f"the filter {given.type} is not there yet")


def _trouble(route: r.Object, backend: g.BackendObjectReference, work: _Work) -> Condition | None:
    """The condition ResolvedRefs of a backend that can't be used."""
    home = backend.namespace or route.namespace
    name = f"{backend.kind} {home}/{backend.name}"
    if backend.group not in ("", "core") or backend.kind != "Service":
        return Condition(False, "InvalidKind", f"{name} can be no backend: a Service can")
    if home != route.namespace and not is_granted(work.grants, route, "Service", backend.name, home):
        reason = f"no ReferenceGrant in {home} lets {route.kind}s of {route.namespace} use {name}"
        return Condition(False, "RefNotPermitted", reason)
    if _host(backend.name, home) not in work.services:
        return Condition(False, "BackendNotFound", f"there is no {name}")
    if backend.port is None:
        return Condition(False, "BackendNotFound", f"the backend {name} names no port")
    return None


def _finish(body: _Body, rule: g.HTTPRule | g.GRPCRule, prefix: str | None) -> r.HTTPRoute:
    if body.redirect is not None:
        redirect = _redirect(body.redirect, prefix)
        return r.HTTPRoute(name=rule.name, redirect=redirect, headers=body.headers, cors_policy=body.cors)
    if not body.route or not any(each.weight for each in body.route):
        nobody = r.HTTPDirectResponse(500)
        return r.HTTPRoute(name=rule.name, direct_response=nobody, headers=body.headers, cors_policy=body.cors)
    timeout = per_try = None
    retries: r.HTTPRetry | None = None
    if isinstance(rule, g.HTTPRule):
        timeout, per_try = _seconds(rule.timeouts.request), _seconds(rule.timeouts.backend_request)
        retries = _retries(rule.retry, per_try)
    return r.HTTPRoute(
        name=rule.name,
        route=body.route,
        headers=body.headers,
        mirrors=body.mirrors,
        rewrite=_rewrite(body.rewrite, prefix),
        timeout=timeout,
        retries=retries,
        cors_policy=body.cors,
    )


def _seconds(text: str) -> r.Duration | None:
    if not text:
        return None
    try:
        return parse_duration(text)
    except ValueError as error:
        raise _Unsupported(str(error)) from None


def _retries(given: g.Retry | None, per_try: r.Duration | None) -> r.HTTPRetry | None:
    """A time limit for each try leaves the mesh's own retries as they are."""
    if given is None:
        return None if per_try is None else r.HTTPRetry(attempts=2, per_try_timeout=per_try)
    attempts = 2 if given.attempts is None else given.attempts
    if attempts == 0:
        return r.HTTPRetry()
    codes = ",".join(map(str, given.codes))
    on = f"{RETRY_ON},{codes}" if codes else RETRY_ON
    return r.HTTPRetry(attempts=attempts, per_try_timeout=per_try, retry_on=on, backoff=_seconds(given.backoff))


def _redirect(given: g.RedirectFilter, prefix: str | None) -> r.HTTPRedirect:
    derived = None if given.port else "FROM_PROTOCOL_DEFAULT" if given.scheme else "FROM_REQUEST_PORT"
    full = given.path.replace_full_path if given.path is not None and given.path.type == "ReplaceFullPath" else None
    return r.PathRedirect(
        uri="" if full is None else full or "/",
        regex=None if given.path is None or full is not None else _new_path(given.path, prefix),
        authority=given.hostname,
        scheme=given.scheme,
        port=given.port,
        derive_port=derived,  # type: ignore[arg-type]
        redirect_code=given.status_code,
    )


def _rewrite(given: g.RewriteFilter | None, prefix: str | None) -> r.HTTPRewrite | None:
    if given is None:
        return None
    regex = None if given.path is None else _new_path(given.path, prefix)
    if regex is None and not given.hostname:
        return None
    return r.HTTPRewrite(authority=given.hostname, uri_regex_rewrite=regex)


def _new_path(given: g.PathModifier, prefix: str | None) -> r.RegexRewrite:
    """prefix: that the rule's match takes, None where it takes none."""
    full, part = given.replace_full_path, given.replace_prefix_match
    if given.type == "ReplaceFullPath" and full is not None:
        return r.RegexRewrite("^.*$", _escaped(full or "/"))
    if given.type == "ReplacePrefixMatch" and part is not None and prefix is not None:
        return _prefix_rewrite(prefix, part)
    raise _Unsupported(
        f"a path of type {given.type} needs its value, and ReplacePrefixMatch a match of type PathPrefix"
    )


def _prefix_rewrite(prefix: str, replacement: str) -> r.RegexRewrite:
    """/old + / makes / of /old, and /x of /old/x: one slash stands between what was given and what is left."""
    old, new = prefix.rstrip("/"), replacement.rstrip("/")
    if new:
        return r.RegexRewrite(f"^{re.escape(old)}(/.*)?$", f"{_escaped(new)}\\1")
    return r.RegexRewrite(f"^{re.escape(old)}/?(.*)$", "/\\1")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\")


def _with_port(match: r.HTTPMatchRequest, port: int) -> r.HTTPMatchRequest:
    return r.HTTPMatchRequest(
        uri=match.uri, method=match.method, headers=match.headers, query_params=match.query_params, port=port
    )


def _with_match(rule: r.HTTPRoute, match: r.HTTPMatchRequest) -> r.HTTPRoute:
    return msgspec.structs.replace(rule, match=[] if match == r.HTTPMatchRequest() else [match])


def conditions(statuses: Iterable[ParentStatus]) -> Iterator[tuple[r.Object, list[dict[str, object]]]]:
    """Each route with what `status.parents` says of our parents, but for times and generations."""
    found: dict[tuple[str, str, str], tuple[r.Object, list[dict[str, object]]]] = {}
    for each in statuses:
        _, parents = found.setdefault(each.route.key, (each.route, []))
        told = [each.accepted.told("Accepted"), each.resolved.told("ResolvedRefs")]
        parents.append({"parentRef": _reference(each.parent), "controllerName": g.CONTROLLER, "conditions": told})
    yield from found.values()


def _reference(parent: g.ParentReference) -> dict[str, object]:
    rest = {"namespace": parent.namespace, "sectionName": parent.section_name, "port": parent.port}
    found: dict[str, object] = {"group": parent.group, "kind": parent.kind, "name": parent.name}
    return found | {name: value for name, value in rest.items() if value}
