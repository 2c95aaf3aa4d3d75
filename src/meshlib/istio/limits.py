"""Which limits hold for calls? RateLimit and BackendTrafficPolicy -> the model's RateLimits and Quotas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from meshlib.istio import resources as r
from meshlib.model import LimitKey, Quota, QuotaService, RateLimit
from meshlib.model.rate_limit import KeyKind

_TIMEOUT = QuotaService("redis", "").timeout
_KEY_KINDS: Mapping[str, KeyKind] = {
    "header": "header",
    "principal": "principal",
    "address": "address",
    "method": "method",
    "path": "path",
}


def limits_of(given: Iterable[r.Limit], prefix: str, origin: str, *, shadow: bool = False) -> tuple[RateLimit, ...]:
    return tuple(
        RateLimit(
            each.name or f"{prefix} {index}",
            each.burst or each.requests,
            each.requests,
            each.per.seconds,
            tuple(_key(key) for key in each.keys),
            tuple(method.upper() for method in each.methods),
            each.path_prefix,
            each.answers,
            each.shadow or shadow,
            origin,
        )
        for index, each in enumerate(given)
    )


def quotas_of(given: Iterable[r.QuotaRule], prefix: str, origin: str, *, shadow: bool = False) -> tuple[Quota, ...]:
    return tuple(
        Quota(
            each.name or f"{prefix} {index}",
            QuotaService(
                "redis" if each.redis else "envoy",
                each.redis or each.service,
                each.domain,
                each.timeout.seconds if each.timeout is not None else _TIMEOUT,
                each.failure_mode_deny,
            ),
            _descriptors(each),
            each.requests or 0,
            int(each.per.seconds) if each.per is not None else 1,
            each.hits,
            tuple(method.upper() for method in each.methods),
            each.path_prefix,
            each.answers,
            each.shadow or shadow,
            origin,
        )
        for index, each in enumerate(given)
    )


def _descriptors(quota: r.QuotaRule) -> tuple[tuple[LimitKey, ...], ...]:
    if quota.redis:
        return (tuple(_key(key) for key in quota.keys),)
    return tuple(
        tuple(
            _key(entry.from_, entry.key) if entry.from_ else LimitKey("value", entry=entry.key, value=entry.value)
            for entry in entries
        )
        for entries in quota.descriptors
    )


def _key(given: str, entry: str = "") -> LimitKey:
    kind, _, name = given.partition(":")
    return LimitKey(_KEY_KINDS[kind], name.lower(), entry)
