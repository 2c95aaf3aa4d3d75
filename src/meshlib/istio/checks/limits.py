"""Which rate limits and quotas make no sense?"""

from __future__ import annotations

import re
from collections.abc import Iterator

from meshlib.istio import resources as r
from meshlib.istio.problems import Refused

KEYS = ("header", "principal", "address", "method", "path")
_OF_CALLERS = ("principal", "address")
_YEAR = 365 * 24 * 3600
_REDIS = ("redis://", "rediss://", "redis+unix://")
_TARGET = re.compile(r"(?:[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\]):[0-9]{1,5}\Z")


def check_rate_limit(spec: r.RateLimitPolicy) -> None:
    """Raises Refused."""
    if not spec.limits and not spec.quotas:
        raise Refused("limits", "is empty, and so are quotas")
    check_limits(spec.limits, "limits", inbound=True)
    check_quotas(spec.quotas, "quotas", inbound=True)


def check_limits(limits: list[r.Limit], at: str, *, inbound: bool = False) -> None:
    for index, limit in enumerate(limits):
        place = f"{at}[{index}]"
        if limit.per.seconds < 0.001:
            raise Refused(f"{place}.per", "must be at least 1ms")
        _check_keys(limit.keys, f"{place}.keys", inbound)
        _check_scope(limit, place, inbound)


def check_quotas(quotas: list[r.QuotaRule], at: str, *, inbound: bool = False) -> None:
    for index, quota in enumerate(quotas):
        place = f"{at}[{index}]"
        if bool(quota.redis) == bool(quota.service):
            raise Refused(place, "needs one of redis and service: who counts?")
        if quota.timeout is not None and quota.timeout.seconds < 0.001:
            raise Refused(f"{place}.timeout", "must be at least 1ms")
        if quota.redis:
            _check_redis(quota, place)
            _check_keys(quota.keys, f"{place}.keys", inbound)
        else:
            _check_service(quota, place, inbound)
        _check_scope(quota, place, inbound)


def _check_redis(quota: r.QuotaRule, place: str) -> None:
    if not quota.redis.startswith(_REDIS):
        raise Refused(f"{place}.redis", f"must begin with one of {', '.join(_REDIS)}")
    for name in ("domain", "descriptors"):
        if getattr(quota, name):
            raise Refused(f"{place}.{name}", "is for a rate limit service; Redis counts requests per keys")
    if quota.requests is None:
        raise Refused(f"{place}.requests", "is missing: how many?")
    if quota.per is None:
        raise Refused(f"{place}.per", "is missing: in which time?")
    if quota.per.seconds < 1 or not quota.per.seconds.is_integer():
        raise Refused(f"{place}.per", "must be whole seconds, since Redis keeps them by its clock")
    if quota.per.seconds > _YEAR:
        raise Refused(f"{place}.per", "must be at most a year (8760h)")
    if quota.hits > quota.requests:
        raise Refused(f"{place}.hits", "is more than requests: no call would ever pass")


def _check_service(quota: r.QuotaRule, place: str, inbound: bool) -> None:
    if not _TARGET.match(quota.service) or not 0 < int(quota.service.rpartition(":")[2]) < 65536:
        raise Refused(f"{place}.service", f"must be host:port, as in ratelimit:8081: {quota.service!r}")
    if not quota.domain:
        raise Refused(f"{place}.domain", "is missing: the service counts by domain")
    for name in ("requests", "per", "keys"):
        if getattr(quota, name):
            raise Refused(f"{place}.{name}", "is for Redis; a rate limit service knows its limits by descriptors")
    if not quota.descriptors:
        raise Refused(f"{place}.descriptors", "is missing: what is to be counted?")
    for number, entries in enumerate(quota.descriptors):
        at = f"{place}.descriptors[{number}]"
        if not entries:
            raise Refused(at, "is empty")
        for index, entry in enumerate(entries):
            if not entry.key:
                raise Refused(f"{at}[{index}].key", "is missing")
            if bool(entry.from_) == bool(entry.value):
                raise Refused(f"{at}[{index}]", "needs one of from and value")
            if entry.from_:
                _check_key(entry.from_, f"{at}[{index}].from", inbound)


def _check_scope(limit: r.Limit | r.QuotaRule, place: str, inbound: bool) -> None:
    if limit.path_prefix and not limit.path_prefix.startswith("/"):
        raise Refused(f"{place}.pathPrefix", f"must begin with /: {limit.path_prefix!r}")
    if limit.answers and not inbound:
        raise Refused(f"{place}.answers", "is for calls that come in (RateLimit)")


def _check_keys(keys: list[str], at: str, inbound: bool) -> None:
    for number, key in enumerate(keys):
        _check_key(key, f"{at}[{number}]", inbound)


def _check_key(key: str, at: str, inbound: bool) -> None:
    kind, mark, name = key.partition(":")
    if kind not in KEYS or (mark != "") != (kind == "header") or (kind == "header" and not name):
        raise Refused(at, f"must be one of {', '.join(_wanted())}: {key!r}")
    if not inbound and kind in _OF_CALLERS:
        raise Refused(at, f"{kind!r} is of those who call, which is this process alone")


def _wanted() -> Iterator[str]:
    return ("header:NAME" if each == "header" else each for each in KEYS)
