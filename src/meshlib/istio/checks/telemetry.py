"""Which Telemetry objects are refused, and what do they ask for that they do not get?"""

from __future__ import annotations

import re
from collections.abc import Iterator

from meshlib.istio import resources as r
from meshlib.istio.checks.security import check_selector, check_targets
from meshlib.istio.problems import ConfigurationWarning, Refused
from meshlib.model import OPERATORS, Command, parts_of

METRICS = {
    "REQUEST_COUNT": "istio_requests_total",
    "REQUEST_DURATION": "istio_request_duration_milliseconds",
    "REQUEST_SIZE": "istio_request_bytes",
    "RESPONSE_SIZE": "istio_response_bytes",
    "GRPC_REQUEST_MESSAGES": "istio_request_messages_total",
    "GRPC_RESPONSE_MESSAGES": "istio_response_messages_total",
}
"""Istio's names of what is counted here; its TCP metrics are not, since there is no TCP proxy."""
EVERY_METRIC = tuple(METRICS.values())
_OF_MESSAGES = [(METRICS["GRPC_REQUEST_MESSAGES"],), (METRICS["GRPC_RESPONSE_MESSAGES"],)]


def metrics_of(match: r.MetricSelector | None) -> tuple[str, ...]:
    """The metrics that an override is about, by our names; () for those that are not counted here."""
    if match is None or (match.metric in ("", "ALL_METRICS") and not match.custom_metric):
        return EVERY_METRIC
    if match.custom_metric:
        return (match.custom_metric,) if match.custom_metric in EVERY_METRIC else ()
    return (METRICS[match.metric],) if match.metric in METRICS else ()


def is_label(name: str) -> bool:
    """Whether Prometheus has labels of such a name; `le` and those with two underscores are its own,
    and `reporter` says which end has counted."""
    return _LABEL.fullmatch(name) is not None and name not in ("le", "reporter") and not name.startswith("__")


_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


def check_telemetry(spec: r.Telemetry) -> None:
    """Raises Refused."""
    if spec.selector is not None:
        check_selector(spec.selector)
    if spec.selector is not None and (spec.target_ref is not None or spec.target_refs):
        raise Refused("targetRefs", "is given beside selector: only one of them may be")
    check_targets(spec.target_ref, spec.target_refs)
    _check_providers("tracing", [each.providers for each in spec.tracing])
    _check_providers("metrics", [each.providers for each in spec.metrics])
    _check_providers("accessLogging", [each.providers for each in spec.access_logging])
    for index, tracing in enumerate(spec.tracing):
        for name, tag in tracing.custom_tags.items():
            given = [each for each in (tag.literal, tag.header, tag.environment, tag.formatter) if each is not None]
            if not name or len(given) != 1:
                raise Refused(
                    f"tracing[{index}].customTags.{name}",
                    "needs exactly one of literal, environment, header and formatter",
                )
            if tag.formatter is not None:
                _check_text(f"tracing[{index}].customTags.{name}.formatter.value", tag.formatter.value)
    for index, metrics in enumerate(spec.metrics):
        for number, override in enumerate(metrics.overrides):
            for name, change in override.tag_overrides.items():
                field = f"metrics[{index}].overrides[{number}].tagOverrides.{name}"
                if change.operation == "UPSERT" and not change.value:
                    raise Refused(f"{field}.value", "is missing: UPSERT needs one")
                if change.operation == "REMOVE" and change.value:
                    raise Refused(f"{field}.value", "is given with REMOVE, which has none")
    for index, logging in enumerate(spec.access_logging):
        if logging.filter is not None and not logging.filter.expression.strip():
            raise Refused(f"accessLogging[{index}].filter.expression", "is empty")


def _check_text(field: str, text: str) -> None:
    if not text:
        raise Refused(field, "is empty")
    try:
        parts_of(text)
    except ValueError as error:
        raise Refused(field, str(error)) from None


def _check_providers(field: str, given: list[list[r.ProviderRef]]) -> None:
    for index, providers in enumerate(given):
        for number, provider in enumerate(providers):
            if not provider.name:
                raise Refused(f"{field}[{index}].providers[{number}].name", "is empty")


def telemetry_warnings(given: r.Object) -> Iterator[ConfigurationWarning]:
    """What a Telemetry asks for and does not get."""
    spec = given.spec
    if not isinstance(spec, r.Telemetry):
        return

    def warn(field: str, reason: str) -> ConfigurationWarning:
        return ConfigurationWarning(given.source, given.title, f"spec.{field}", reason)

    for index, tracing in enumerate(spec.tracing):
        for name, tag in tracing.custom_tags.items():
            if tag.formatter is None:
                continue
            commands = (each.operator for each in parts_of(tag.formatter.value) if isinstance(each, Command))
            if unknown := sorted(set(commands) - OPERATORS):
                reason = f"nobody here can say {', '.join(f'%{each}%' for each in unknown)}, which is left empty"
                yield warn(f"tracing[{index}].customTags.{name}.formatter.value", reason)
    for index, metrics in enumerate(spec.metrics):
        for number, override in enumerate(metrics.overrides):
            at = f"metrics[{index}].overrides[{number}]"
            if not metrics_of(override.match):
                yield warn(f"{at}.match", "names a metric that is not counted here")
            for name, change in override.tag_overrides.items():
                if not is_label(name):
                    yield warn(f"{at}.tagOverrides.{name}", "has no effect: that name can't be given, or is taken")
                elif change.operation == "UPSERT" and metrics_of(override.match) in _OF_MESSAGES:
                    reason = "has no effect: messages are counted as they pass, and go without labels that are made"
                    yield warn(f"{at}.tagOverrides.{name}", reason)
