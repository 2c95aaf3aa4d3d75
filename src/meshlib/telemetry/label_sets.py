"""Which labels does a series of metrics bear? Istio's, less those that the configuration removes, and those it makes.

A series is counted once for all metrics of requests. So its labels are a tuple of LABELS' values, and behind them what
is said beyond these: `name=value`, a label that is made. What concerns some metrics only names them in front,
`|METRIC,METRIC|name=value`, or `|METRIC,METRIC|name` for a label that these go without; `pairs` says what is left of it
for one metric. No name of a label or metric has any of these characters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

LABELS = (
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_service",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_service_name",
    "destination_service_namespace",
    "destination_cluster",
    "request_protocol",
    "response_code",
    "grpc_response_status",
    "response_flags",
    "connection_security_policy",
)
"""Istio's, of istio_requests_total and the three histograms."""
MESSAGE_LABELS = tuple(
    name
    for name in LABELS
    if name
    not in {
        "response_code",
        "grpc_response_status",
        "request_protocol",
        "response_flags",
        "connection_security_policy",
    }
)
"""Of istio_request_messages_total and istio_response_messages_total."""
_POSITIONS = {name: position for position, name in enumerate(LABELS)}
_OF_MESSAGES = tuple(LABELS.index(name) for name in MESSAGE_LABELS)
_MAY_BE_EMPTY = "grpc_response_status"

Labels = tuple[str, ...]
Pairs = tuple[tuple[str, str], ...]


def of_some(name: str, metrics: Collection[str]) -> str:
    """How a label is called in a series that only these metrics bear, or go without; none are all of them."""
    return f"|{','.join(metrics)}|{name}" if metrics else name


def without(labels: Labels, removed: Collection[str], of_some_metrics: Labels = ()) -> Labels:
    """LABELS less those that are removed. of_some_metrics: names by `of_some`."""
    if removed:
        labels = tuple("" if name in removed else value for name, value in zip(LABELS, labels, strict=True))
    return (*labels, *of_some_metrics)


def with_new(labels: Labels, made: Iterable[tuple[str, str]]) -> Labels:
    """With those that the configuration says otherwise, and those that it makes."""
    found, more = list(labels), []
    for name, value in made:
        if name in _POSITIONS:
            found[_POSITIONS[name]] = value
        else:
            more.append(f"{name}={value}")
    return (*found, *more)


def of_messages(labels: Labels) -> Labels:
    """What a series of requests says of its messages: values of MESSAGE_LABELS, and which of these some metrics go
    without."""
    beyond = (each for each in labels[len(LABELS) :] if "=" not in each)
    return (*(labels[position] for position in _OF_MESSAGES), *beyond)


def differ_by_metric(labels: Labels) -> bool:
    return any(each.startswith("|") for each in labels[len(LABELS) :])


def pairs(labels: Labels, metric: str, names: Labels = LABELS) -> Pairs:
    """(name, value) of each label that `metric` bears. names: what the first values are of. Of Istio's own only
    grpc_response_status is ever empty; any other that is, has been removed."""
    found = {name: value for name, value in zip(names, labels, strict=False) if value or name == _MAY_BE_EMPTY}
    for each in labels[len(names) :]:
        name, is_made, value = each.partition("=")
        metrics, _, name = name.removeprefix("|").rpartition("|")
        if metrics and metric not in metrics.split(","):
            continue
        if is_made:
            found[name] = value
        else:
            found.pop(name, None)
    return tuple(found.items())
