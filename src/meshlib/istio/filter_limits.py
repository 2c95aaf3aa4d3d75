"""Which limits do EnvoyFilters lay on one node? Patches, put together as in one Envoy -> RateLimits and Quotas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple, TypeVar

from meshlib.errors import ConfigurationError
from meshlib.istio import envoy_filters as f
from meshlib.istio import resources as r
from meshlib.model import LimitKey, Node, NodeKind, Quota, QuotaService, RateLimit

P = TypeVar("P")
_TIMEOUT = QuotaService("envoy", "").timeout


class _Placed(NamedTuple):
    """A patch, and where it stands."""

    patch: f.Patch
    given: r.Object
    number: int

    @property
    def origin(self) -> str:
        return self.given.origin

    @property
    def name(self) -> str:
        return f"{self.given.namespace}/{self.given.name}"


def limits_of_filters(
    objects: Iterable[r.Object], node: Node, root_namespace: str, report: Callable[[ConfigurationError], None]
) -> tuple[list[RateLimit], list[Quota]]:
    """Of the EnvoyFilters that select `node`, in their order of priority."""
    context = f.GATEWAY if node.kind is NodeKind.ROUTER else f.INBOUND
    labels = dict(node.workload.labels)
    everywhere: list[_Placed] = []
    here: list[_Placed] = []
    for each in sorted(objects, key=_order):
        if not isinstance(each.spec, r.EnvoyFilter):
            continue
        placed = [_Placed(patch, each, index) for index, patch in f.patches(each.spec)[0]]
        everywhere += placed
        selector = each.spec.workload_selector
        wanted = selector.labels if selector is not None else {}
        if each.namespace not in (root_namespace, node.workload.namespace):
            continue
        if all(labels.get(key) == value for key, value in wanted.items()):
            here += placed
    here = [each for each in here if isinstance(each.patch, f.AddedCluster) or context in each.patch.scope.contexts]
    clusters = {each.patch.name: each.patch.target for each in everywhere if isinstance(each.patch, f.AddedCluster)}
    described = list(_of(here, f.Described))
    return list(_local(here, described)), list(_asked(here, described, clusters, report))


def _order(given: r.Object) -> tuple[int, str, str, str]:
    priority = given.spec.priority if isinstance(given.spec, r.EnvoyFilter) else 0
    return priority, given.created, given.namespace, given.name


def _of(placed: Iterable[_Placed], kind: type[P]) -> Iterator[tuple[P, _Placed]]:
    return ((each.patch, each) for each in placed if isinstance(each.patch, kind))


# Local limits


def _local(here: list[_Placed], described: list[tuple[f.Described, _Placed]]) -> Iterator[RateLimit]:
    """A route's or a virtual host's own configuration takes the place of the filter's, which has to be there."""
    filters = list(_of(here, f.LocalLimit))
    if not filters:
        return
    instead = [(patch.local, placed) for patch, placed in described if patch.local is not None]
    for limit, placed in [
        *((limit, placed) for limit, placed in filters if not any(own.scope.covers(limit.scope) for own, _ in instead)),
        *instead,
    ]:
        if not limit.enabled:
            continue
        actions = [(limit.scope, each) for each in limit.actions]
        if not actions:
            actions = _described(limit.scope, limit.stage, described)
        yield from _buckets(limit, actions, placed)


def _described(
    scope: f.Scope, stage: int, described: list[tuple[f.Described, _Placed]]
) -> list[tuple[f.Scope, f.Action]]:
    """What virtual hosts and routes have a filter ask about, and for which calls."""
    return [
        (both, action)
        for patch, _ in described
        if (both := patch.scope.both(scope)) is not None
        for action in patch.actions
        if action.stage == stage
    ]


def _buckets(limit: f.LocalLimit, actions: list[tuple[f.Scope, f.Action]], placed: _Placed) -> Iterator[RateLimit]:
    name = f"{placed.name} {limit.name}".rstrip()
    origin = f"{placed.origin} configPatches[{placed.number}]"

    def made(
        called: str, bucket: f.Bucket, keys: tuple[LimitKey, ...], scope: f.Scope, otherwise: bool = False
    ) -> RateLimit:
        return RateLimit(
            called,
            bucket.tokens,
            bucket.per_fill,
            bucket.interval,
            keys,
            answers=limit.answers,
            shadow=not limit.enforced,
            origin=origin,
            port=scope.port,
            hosts=scope.hosts,
            otherwise=otherwise,
            answer=limit.answer,
        )

    for entries, bucket in limit.descriptors:
        told = ", ".join(f"{key}={value}" if value else key for key, value in entries)
        for scope, action in actions:
            keys = _matched(action.keys, entries)
            if keys is not None:
                yield made(f"{name} {told}", bucket, keys, scope)
    if limit.default is not None and limit.default.tokens < f.UNLIMITED:
        yield made(name, limit.default, (), limit.scope, otherwise=not limit.always_default)


def _matched(keys: tuple[LimitKey, ...], entries: tuple[tuple[str, str], ...]) -> tuple[LimitKey, ...] | None:
    """What a call must have so that its descriptor is this one: entry for entry the same, "" being any value. None
    when no call's can be."""
    if len(keys) != len(entries):
        return None
    found = []
    for key, (name, value) in zip(keys, entries, strict=True):
        if key.entry != name:
            return None
        if key.kind in ("value", "match"):
            if value not in ("", key.value):
                return None
            if key.kind == "match":
                found.append(key)
        else:
            found.append(replace(key, value=value, optional=False))
    return tuple(found)


# Limits that a service counts


def _asked(
    here: list[_Placed],
    described: list[tuple[f.Described, _Placed]],
    clusters: dict[str, str],
    report: Callable[[ConfigurationError], None],
) -> Iterator[Quota]:
    for limit, placed in _of(here, f.ServiceLimit):
        address = limit.target or _address(limit.cluster, clusters)
        if not address:
            field = f"spec.configPatches[{placed.number}].patch.value.typed_config.rate_limit_service"
            reason = f"no cluster {limit.cluster!r}: nobody is there to be asked"
            report(ConfigurationError(placed.given.source, placed.given.title, field, reason))
        service = QuotaService(
            "envoy",
            address or limit.cluster,
            limit.domain,
            _TIMEOUT if limit.timeout is None else limit.timeout,
            limit.denies,
            limit.status_on_failure,
        )
        by_scope: dict[tuple[f.Scope, int], list[tuple[LimitKey, ...]]] = {}
        actions = [(limit.scope, each) for each in limit.actions] or _described(limit.scope, limit.stage, described)
        for scope, action in actions:
            by_scope.setdefault((scope, action.hits), []).append(action.keys)
        for (scope, hits), descriptors in by_scope.items():
            where = " ".join([*scope.hosts, *([str(scope.port)] if scope.port else [])])
            yield Quota(
                f"{placed.name} {limit.domain} {where}".rstrip(),
                service,
                tuple(descriptors),
                hits=hits,
                answers=limit.answers,
                origin=placed.origin,
                port=scope.port,
                hosts=scope.hosts,
                answer=limit.answer,
            )


def _address(cluster: str, clusters: dict[str, str]) -> str:
    """`outbound|8081||ratelimit.default.svc.cluster.local`, or one that a patch has added."""
    if cluster in clusters:
        return clusters[cluster]
    parts = cluster.split("|")
    return f"{parts[3]}:{parts[1]}" if len(parts) == 4 and parts[0] == "outbound" and parts[1].isdecimal() else ""
