"""What is told of a workload's calls? The Telemetry objects that hold for it -> Reporting (istio/istio
pilot/pkg/model/telemetry.go).

One object of the root namespace, one of the workload's own, and one that selects it, each the oldest of its sort; what
is nearer has the last word, field by field for tracing, and as a whole for the access log.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from meshlib.istio import resources as r
from meshlib.istio import targets
from meshlib.istio.checks.telemetry import EVERY_METRIC, is_label, metrics_of
from meshlib.istio.mesh_settings import MeshSettings
from meshlib.model import NewLabel, Node, RemovedLabel, Reporting, SpanTag, Told

_CLIENT, _SERVER = "CLIENT", "SERVER"
_Labels = dict[str, dict[str, str | None]]
"""Of labels by name and metric: the expression of its value, or None where it is removed."""


def reporting_of(
    objects: Iterable[r.Object], settings: MeshSettings, node: Node, services: frozenset[str]
) -> Reporting | None:
    """What holds for `node`; None where no object says anything. services: those it serves, by name."""
    chosen = _chosen([each for each in objects if isinstance(each.spec, r.Telemetry)], settings, node, services)
    if not chosen:
        return None
    specs = [each.spec for each in chosen if isinstance(each.spec, r.Telemetry)]
    return Reporting(_told(specs, _CLIENT), _told(specs, _SERVER), ", ".join(each.origin for each in chosen))


def _chosen(known: Sequence[r.Object], settings: MeshSettings, node: Node, services: frozenset[str]) -> list[r.Object]:
    """From the farthest to the nearest."""
    labels, own = dict(node.workload.labels), node.workload.namespace
    root: list[r.Object] = []
    near: list[r.Object] = []
    nearest: list[r.Object] = []
    for each in sorted(known, key=lambda each: (each.created or "~", each.namespace, each.name)):
        spec = each.spec
        assert isinstance(spec, r.Telemetry)
        if targets.targets(spec):
            if targets.select(each, node.workload, services):
                nearest.append(each)
        elif spec.selector is not None and spec.selector.match_labels:
            fits = all(labels.get(key) == value for key, value in spec.selector.match_labels.items())
            if each.namespace == own and fits:
                nearest.append(each)
        elif each.namespace == settings.root_namespace:
            root.append(each)
        elif each.namespace == own:
            near.append(each)
    return [found[0] for found in (root, near, nearest) if found]


def _told(specs: Sequence[r.Telemetry], side: str) -> Told:
    sampling: float | None = None
    spans, context, tags = True, True, {}
    access_log: bool | None = None
    log_filter = ""
    off: set[str] = set()
    workload = True
    labels: _Labels = {}
    for spec in specs:
        for tracing in spec.tracing:
            if not _concerns(tracing.match, side):
                continue
            if tracing.random_sampling_percentage is not None:
                sampling = tracing.random_sampling_percentage
            if tracing.disable_span_reporting is not None:
                spans = not tracing.disable_span_reporting
            if tracing.disable_context_propagation is not None:
                context = not tracing.disable_context_propagation
            if tracing.enable_istio_tags is not None:
                workload = tracing.enable_istio_tags
            if tracing.custom_tags:
                tags = {name: _tag(name, tag) for name, tag in sorted(tracing.custom_tags.items())}
        logging = [each for each in spec.access_logging if _concerns(each.match, side)]
        if logging:
            access_log = not logging[-1].disabled
            log_filter = logging[-1].filter.expression if logging[-1].filter is not None else ""
        for override in (override for each in spec.metrics for override in each.overrides):
            if override.match is not None and not _concerns(override.match, side):
                continue
            names = metrics_of(override.match)
            if override.disabled is not None:
                off = off | set(names) if override.disabled else off - set(names)
            for label, change in override.tag_overrides.items():
                if is_label(label):
                    value = change.value if change.operation == "UPSERT" else None
                    labels.setdefault(label, {}).update(dict.fromkeys(names, value))
    new, removed, bare = _labels(labels)
    return Told(
        None if sampling is None else round(sampling * 10_000),
        spans,
        tuple(tags.values()),
        access_log,
        log_filter,
        tuple(sorted(off)),
        bare,
        new_labels=new,
        context=context,
        removed_labels=removed,
        workload=workload,
    )


def _labels(said: _Labels) -> tuple[tuple[NewLabel, ...], tuple[RemovedLabel, ...], tuple[str, ...]]:
    """What is made, what some metrics go without, and what all do."""
    new: list[NewLabel] = []
    removed: list[RemovedLabel] = []
    bare: list[str] = []
    for name, values in sorted(said.items()):
        groups: dict[str | None, list[str]] = {}
        for metric in EVERY_METRIC:
            if metric in values:
                groups.setdefault(values[metric], []).append(metric)
        for value, metrics in groups.items():
            some = () if len(metrics) == len(EVERY_METRIC) else tuple(metrics)
            if value is not None:
                new.append(NewLabel(name, value, some))
            elif some:
                removed.append(RemovedLabel(name, some))
            else:
                bare.append(name)
    return tuple(new), tuple(removed), tuple(bare)


def _concerns(match: r.TelemetryMatch | r.MetricSelector | None, side: str) -> bool:
    return match is None or match.mode in ("CLIENT_AND_SERVER", side)


def _tag(name: str, tag: r.CustomTag) -> SpanTag:
    if tag.literal is not None:
        return SpanTag(name, "literal", tag.literal.value)
    if tag.header is not None:
        return SpanTag(name, "header", tag.header.name.lower(), tag.header.default_value)
    if tag.formatter is not None:
        return SpanTag(name, "formatter", tag.formatter.value)
    assert tag.environment is not None
    return SpanTag(name, "environment", tag.environment.name, tag.environment.default_value)
