"""Are these labels that anything can have? As Istio's webhook has it: istio/istio pkg/config/labels."""

from __future__ import annotations

import re
from collections.abc import Mapping

from meshlib.istio import resources as r
from meshlib.istio.problems import Refused

_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_LONGEST = 63


def check_labels(labels: Mapping[str, str], at: str) -> None:
    """Raises Refused. A key may have a prefix, `example.com/team`; a value may be empty."""
    for key, value in labels.items():
        prefix, slash, name = key.rpartition("/")
        if (slash and not _PREFIX.fullmatch(prefix)) or not _NAME.fullmatch(name) or len(name) > _LONGEST:
            raise Refused(at, f"{key!r} is no label's name, so that nothing can have it")
        if value and (not _NAME.fullmatch(value) or len(value) > _LONGEST):
            raise Refused(at, f"{value!r} is no value that the label {key} can have")


def why_nothing_has(labels: Mapping[str, str]) -> str:
    """Why no workload can have these labels; "" where one may."""
    try:
        check_labels(labels, "")
    except Refused as refused:
        return refused.reason
    return ""


def check_selector(selector: r.WorkloadSelector | None) -> None:
    """Raises Refused: what `workloadSelector` names, each a label that may be."""
    if selector is not None:
        check_labels(selector.labels, "workloadSelector.labels")
        check_labels(selector.match_labels, "workloadSelector.matchLabels")
