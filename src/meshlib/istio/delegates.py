"""Which rules does a VirtualService hold once those are in their places that it delegates to others?

Source of the rules: istio/istio pilot/pkg/model/virtualservice.go (mergeVirtualServicesIfNeeded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from meshlib.errors import ConfigurationError
from meshlib.istio import resources as r
from meshlib.istio.services import is_exported
from meshlib.model.values import dataclass

Report = Callable[[ConfigurationError], None]
_FILLED = ("rewrite", "timeout", "retries", "fault", "mirror", "mirror_percent", "mirror_percentage", "cors_policy")
"""What a delegate's rule takes from the one that delegates, if it does not say it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. owner: the object it stands in, where its destinations' short names are at home. at: where in it.
    gateways_of: the namespace that its matches' gateways are named in."""

    owner: r.Object
    rule: r.HTTPRoute
    at: str
    gateways_of: str


def rules_of(
    given: r.Object,
    delegates: Mapping[tuple[str, str], r.Object],
    export_to: Sequence[str],
    report: Report,
) -> tuple[Rule, ...]:
    """The rules of a VirtualService, each delegation replaced. delegates: the VirtualServices without hosts, by
    namespace and name. export_to: of those that name none."""
    spec = given.spec
    assert isinstance(spec, r.VirtualService)
    found: list[Rule] = []
    for index, rule in enumerate(spec.http):
        at = f"spec.http[{index}]"
        if rule.delegate is None:
            found.append(Rule(given, rule, at, given.namespace))
        else:
            found.extend(_delegated(given, rule, at, delegates, export_to, report))
    return tuple(found)


def _delegated(
    root: r.Object,
    rule: r.HTTPRoute,
    at: str,
    delegates: Mapping[tuple[str, str], r.Object],
    export_to: Sequence[str],
    report: Report,
) -> Iterator[Rule]:
    assert rule.delegate is not None
    namespace = rule.delegate.namespace or root.namespace
    title = f"VirtualService {namespace}/{rule.delegate.name}"

    def complain(reason: str) -> None:
        report(ConfigurationError(root.source, root.title, f"{at}.delegate", reason))

    delegate = delegates.get((namespace, rule.delegate.name))
    if delegate is None:
        complain(f"no {title} without hosts is there, so the rule is left out")
        return
    spec = delegate.spec
    assert isinstance(spec, r.VirtualService)
    if not is_exported(spec.export_to or export_to, namespace, root.namespace):
        complain(f"{title} is not exported to namespace {root.namespace}, so the rule is left out")
        return
    for index, part in enumerate(spec.http):
        matches = _matches(rule.match, part.match)
        place = f"spec.http[{index}]"
        if matches is None:
            reason = f"matches nothing that {root.title} hands over at {at}, so the rule is left out"
            report(ConfigurationError(delegate.source, delegate.title, f"{place}.match", reason))
            continue
        filled = {
            name: getattr(rule, name)
            for name in _FILLED
            if getattr(part, name) is None and getattr(rule, name) is not None
        }
        if part.headers == r.Headers():
            filled["headers"] = rule.headers
        if not part.mirrors:
            filled["mirrors"] = rule.mirrors
        merged = msgspec.structs.replace(part, name=_joined(rule.name, part.name), match=matches, **filled)
        yield Rule(delegate, merged, place, root.namespace)


def _joined(root: str, part: str) -> str:
    return f"{root}-{part}" if root and part else root or part


def _matches(root: list[r.HTTPMatchRequest], part: list[r.HTTPMatchRequest]) -> list[r.HTTPMatchRequest] | None:
    """Every pair that goes together; None if some match of the delegate goes with none of the root's."""
    if not root or not part:
        return part or root
    found: list[r.HTTPMatchRequest] = []
    for inner in part:
        fitting = [_merged(outer, inner) for outer in root if not _conflict(outer, inner)]
        if not fitting:
            return None
        found.extend(fitting)
    return found


def _merged(root: r.HTTPMatchRequest, part: r.HTTPMatchRequest) -> r.HTTPMatchRequest:
    filled = {
        name: getattr(root, name)
        for name in ("uri", "scheme", "method", "authority", "port")
        if getattr(part, name) is None
    }
    return msgspec.structs.replace(
        part,
        name=_joined(root.name, part.name),
        headers={**root.headers, **part.headers},
        without_headers={**root.without_headers, **part.without_headers},
        query_params={**root.query_params, **part.query_params},
        # A delegate can't say who calls (checks/routes.py), so what the root says of it holds.
        source_labels=root.source_labels,
        source_namespace=root.source_namespace,
        gateways=root.gateways,
        **filled,
    )


def _conflict(root: r.HTTPMatchRequest, part: r.HTTPMatchRequest) -> bool:
    if any(_differ(getattr(root, name), getattr(part, name)) for name in ("uri", "scheme", "method", "authority")):
        return True
    for outer, inner in (
        (root.headers, part.headers),
        (root.without_headers, part.without_headers),
        (root.query_params, part.query_params),
    ):
        if any(_differ(outer.get(name), match) for name, match in inner.items()):
            return True
    if root.uri is not None and part.uri is not None and root.ignore_uri_case != part.ignore_uri_case:
        return True
    return root.port is not None and part.port is not None and root.port != part.port


def _differ(root: r.StringMatch | None, part: r.StringMatch | None) -> bool:
    """Whether what `part` matches is not within what `root` does. Of two regular expressions nobody can say."""
    if root is None or part is None or root == part == r.StringMatch():
        return False
    if root.regex or part.regex:
        return True
    if root.exact is not None:
        return part.exact != root.exact
    if root.prefix is not None:
        return not (part.prefix or part.exact or "").startswith(root.prefix)
    return False  # the root asks for presence, and any value is that
