"""What does the model say that Envoy has no field for? Values <-> notes in a resource's metadata, under our own name.

A note is a value's fields by their names, all of them, so that a reader with other defaults understands the same.
What is read is checked as strictly as Envoy checks its own; names that are not known are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from meshlib.model import (
    BreakerRules,
    ConnectionLimits,
    Cors,
    HashTable,
    HeaderMatch,
    HealthCheck,
    HedgePolicy,
    LimitAnswer,
    LimitKey,
    OutlierDetection,
    Quota,
    QuotaService,
    RateBudget,
    RateLimit,
    RetryBudget,
    SlowStart,
    StringMatch,
    ZoneAware,
)
from meshlib.xds.fields import LONGEST, Wrong, head_text, regex

OWN = "meshlib"
"""Our name among filter_metadata's."""

Check = Callable[[Any, str], Any]
_T = TypeVar("_T")
_MOST = 0xFFFFFFFF


def write(value: object, *names: str) -> dict[str, Any]:
    """A value as a Struct holds it; only the fields of `names`, where any are given."""
    return {name: _writable(getattr(value, name)) for name in names or _CHECKS[type(value)]}


def changes(kind: type[object], note: Any, field: str) -> dict[str, Any]:
    """The fields that a note gives, checked. Raises Wrong."""
    if not isinstance(note, dict):
        raise Wrong(field, f"must be an object, not {note!r}")
    return {name: check(note[name], f"{field}.{name}") for name, check in _CHECKS[kind].items() if name in note}


def read(kind: type[_T], note: Any, field: str) -> _T:
    """The value that a note tells. Raises Wrong, also for a field that is missing and has no default."""
    found = changes(kind, note, field)
    try:
        return kind(**found)
    except TypeError:
        raise Wrong(field, f"is no {kind.__name__}: a field is missing") from None


def _writable(value: Any) -> Any:
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple):
        return [_writable(each) for each in value]
    return write(value) if type(value) in _CHECKS else value


# Checks


def number(low: float, high: float) -> Check:
    def check(value: Any, field: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise Wrong(field, f"must be a number from {low:g} to {high:g}, not {value!r}")
        return float(value)

    return check


def whole(low: int, high: int = _MOST) -> Check:
    of_any_kind = number(low, high)

    def check(value: Any, field: str) -> int:
        found = of_any_kind(value, field)
        if not found.is_integer():
            raise Wrong(field, f"must be a whole number, not {value!r}")
        return int(found)

    return check


def flag(value: Any, field: str) -> bool:
    if not isinstance(value, bool):
        raise Wrong(field, f"must be true or false, not {value!r}")
    return value


def text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise Wrong(field, f"must be a text, not {value!r}")
    return value


def one_of(*allowed: str) -> Check:
    def check(value: Any, field: str) -> str:
        if value not in allowed:
            raise Wrong(field, f"must be one of {', '.join(allowed)}, not {value!r}")
        return str(value)

    return check


def optional(wanted: Check) -> Check:
    return lambda value, field: None if value is None else wanted(value, field)


def listed(wanted: Check, into: Callable[[list[Any]], Any] = tuple) -> Check:
    def check(value: Any, field: str) -> Any:
        if not isinstance(value, list):
            raise Wrong(field, f"must be a list, not {value!r}")
        return into([wanted(each, f"{field}[{index}]") for index, each in enumerate(value)])

    return check


def _status_range(value: Any, field: str) -> tuple[int, int]:
    found = listed(whole(100, 599))(value, field)
    if len(found) != 2 or found[0] > found[1]:
        raise Wrong(field, f"must be the first and the last of a range, not {value!r}")
    return found[0], found[1]


def of(kind: type[_T]) -> Check:
    return lambda note, field: read(kind, note, field)


def _string_match(note: Any, field: str) -> StringMatch:
    found = read(StringMatch, note, field)
    if found.kind == "regex":
        regex(found.value, f"{field}.value")
    return found


def _head_text(value: Any, field: str) -> str:
    return head_text(text(value, field), field)


def _pair(note: Any, field: str) -> tuple[str, str]:
    found = listed(text)(note, field)
    if len(found) != 2 or not found[0]:
        raise Wrong(field, f"must be a header's name and its value, not {note!r}")
    return head_text(found[0], field), head_text(found[1], field)


_SECONDS = number(0, LONGEST)
_SOME_SECONDS = number(math.ulp(0.0), LONGEST)
_PERCENT, _WHOLE_PERCENT = number(0, 100), whole(0, 100)
_CHECKS: Mapping[type, Mapping[str, Check]] = {
    BreakerRules: {
        "consecutive_failures": whole(0),
        "failure_rate": _PERCENT,
        "slow_call_rate": _PERCENT,
        "slow_call": _SOME_SECONDS,
        "window": _SOME_SECONDS,
        "minimum_calls": whole(1),
        "open_for": _SECONDS,
        "probes": whole(1),
        "forced": one_of("", "open", "closed"),
    },
    RetryBudget: {"percent": _PERCENT, "min_concurrency": whole(0)},
    RateBudget: {"ratio": number(0, 1000), "min_per_second": number(0, _MOST), "ttl": _SOME_SECONDS},
    RateLimit: {
        "name": text,
        "tokens": whole(1),
        "per_fill": whole(1),
        "interval": _SOME_SECONDS,
        "keys": listed(of(LimitKey)),
        "methods": listed(text),
        "path_prefix": text,
        "answers": flag,
        "shadow": flag,
        "origin": text,
        "port": whole(0, 65535),
        "hosts": listed(text),
        "otherwise": flag,
        "answer": of(LimitAnswer),
    },
    Quota: {
        "name": text,
        "service": of(QuotaService),
        "descriptors": listed(listed(of(LimitKey))),
        "requests": whole(0),
        "interval": whole(1),
        "hits": whole(0),
        "methods": listed(text),
        "path_prefix": text,
        "answers": flag,
        "shadow": flag,
        "origin": text,
        "port": whole(0, 65535),
        "hosts": listed(text),
        "answer": of(LimitAnswer),
    },
    QuotaService: {
        "kind": one_of("redis", "envoy"),
        "address": text,
        "domain": text,
        "timeout": _SOME_SECONDS,
        "denies_on_failure": flag,
        "status_on_failure": whole(200, 599),
        "route_configuration": text,
    },
    LimitAnswer: {"status": whole(200, 599), "grpc_status": whole(0, 16), "headers": listed(_pair)},
    LimitKey: {
        "kind": one_of("header", "principal", "address", "method", "path", "value", "match"),
        "name": text,
        "entry": text,
        "value": text,
        "optional": flag,
        "headers": listed(of(HeaderMatch)),
        "invert": flag,
    },
    HeaderMatch: {"name": text, "match": _string_match, "invert": flag},
    StringMatch: {
        "kind": one_of("exact", "prefix", "suffix", "contains", "path-prefix", "regex", "present"),
        "value": text,
        "ignore_case": flag,
    },
    SlowStart: {
        "window": _SOME_SECONDS,
        "aggression": number(math.ulp(0.0), _MOST),
        "min_weight_percent": _PERCENT,
    },
    ZoneAware: {"routing_percent": _PERCENT, "min_cluster_size": whole(0)},
    HashTable: {
        "minimum_ring_size": whole(1, 8 * 1024 * 1024),
        "maximum_ring_size": whole(1, 8 * 1024 * 1024),
        "maglev_size": whole(2, 5_000_011),
    },
    Cors: {
        "origins": listed(_string_match),
        "methods": _head_text,
        "headers": _head_text,
        "exposed": _head_text,
        "max_age": optional(whole(0)),
        "credentials": flag,
        "forward_unmatched": flag,
    },
    HedgePolicy: {"delay": _SECONDS, "max_attempts": whole(1)},
    ConnectionLimits: {
        "max_connections": optional(whole(0)),
        "max_pending_requests": optional(whole(0)),
        "max_requests": optional(whole(0)),
        "max_retries": optional(whole(0)),
        "max_concurrent_streams": optional(whole(1)),
    },
    HealthCheck: {
        "kind": one_of("http", "grpc", "tcp"),
        "path": text,
        "host": text,
        "service": text,
        "port": whole(0, 65535),
        "expected_statuses": listed(_status_range),
        "interval": _SOME_SECONDS,
        "timeout": _SOME_SECONDS,
        "healthy_threshold": whole(1),
        "unhealthy_threshold": whole(1),
    },
    OutlierDetection: {
        "consecutive_5xx": whole(0),
        "consecutive_gateway_errors": whole(0),
        "consecutive_local_origin_failures": whole(0),
        "split_external_local_origin_errors": flag,
        "interval": _SOME_SECONDS,
        "base_ejection_time": _SOME_SECONDS,
        "max_ejection_percent": _WHOLE_PERCENT,
        "min_health_percent": _WHOLE_PERCENT,
        "max_ejection_time": _SOME_SECONDS,
        "max_ejection_jitter": _SECONDS,
        "always_eject_one": flag,
        "success_rate_enforcing": _WHOLE_PERCENT,
        "success_rate_minimum_hosts": whole(0),
        "success_rate_request_volume": whole(0),
        "success_rate_stdev_factor": number(0, _MOST),
        "failure_percentage_enforcing": _WHOLE_PERCENT,
        "failure_percentage_threshold": _WHOLE_PERCENT,
        "failure_percentage_minimum_hosts": whole(0),
        "failure_percentage_request_volume": whole(0),
        "error_codes": listed(whole(100, 599), frozenset),
    },
}
