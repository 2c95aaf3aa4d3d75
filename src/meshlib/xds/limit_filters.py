"""How do limits of calls that come in reach an Envoy? RateLimits and quotas -> its filters, one for each.

A RateLimit's keys and conditions are one descriptor, whose entries any value fits: a bucket for each combination, as
here. The default bucket, which Envoy wants, is as good as endless. What Envoy has no action for (a caller's principal,
the path without its query), and what is counted in Redis, is left out: an Envoy limits only what it can tell apart.
"""

from __future__ import annotations

import math
import re
from typing import Any, Protocol

from meshlib.model import Access, HeaderMatch, LimitKey, Quota, RateLimit, StringMatch
from meshlib.xds import messages as m
from meshlib.xds.encode_matches import set_header
from meshlib.xds.pieces import set_seconds, set_share

_LOCAL, _ASKING = "envoy.filters.http.local_ratelimit", "envoy.filters.http.ratelimit"
_ENDLESS = 0xFFFFFFFF
_SHORTEST = 0.05
"""Seconds: Envoy takes no shorter fill_interval."""
_MOST_KEYS = 10_000
"""As state/token_bucket has it; Envoy keeps 20 where nothing is said."""
_ALL = 1_000_000
_V3 = 2
_RATELIMITED = ("x-envoy-ratelimited", "true")
_REMOTE = "remote_address"
_FIXED = ("value", "match")
_HEADERS = {"method": ":method"}


class Upstreams(Protocol):
    """The clusters that filters call."""

    def cluster(self, host: str, port: int, *, tls: bool = False, http2: bool = False) -> str: ...


def limit_filters(access: Access, upstreams: Upstreams, port: int) -> list[tuple[str, Any]]:
    """port: of the listener; 0 is for all."""
    found: list[tuple[str, Any]] = []
    for limit in access.rate_limits:
        if (port == 0 or limit.port in (0, port)) and (made := _local(limit)) is not None:
            found.append((f"{_LOCAL}.{len(found)}", made))
    for quota in access.quotas:
        if (port == 0 or quota.port in (0, port)) and (asking := _asking(quota, upstreams)) is not None:
            found.append((f"{_ASKING}.{len(found)}", asking))
    return found


def _local(limit: RateLimit) -> Any:
    """None for one that Envoy can't have."""
    keys = [*_conditions(limit), *limit.keys]
    if limit.otherwise or not all(map(_is_known, keys)):
        return None
    message = m.LocalRateLimit(stat_prefix=_stat(limit.name))
    set_share(message.filter_enabled.default_value, _ALL)
    set_share(message.filter_enforced.default_value, 0 if limit.shadow else _ALL)
    _set_answer(message, limit, message.status)
    _set_header(message, _RATELIMITED)
    if not keys:
        _set_bucket(message.token_bucket, limit.tokens, limit.per_fill, limit.interval)
        return message
    _set_bucket(message.token_bucket, _ENDLESS, _ENDLESS, limit.interval)
    message.always_consume_default_token_bucket.value = False
    message.max_dynamic_descriptors.value = _MOST_KEYS
    descriptor = message.descriptors.add()
    _set_bucket(descriptor.token_bucket, limit.tokens, limit.per_fill, limit.interval)
    actions = message.rate_limits.add().actions
    for number, key in enumerate(keys):
        entry = _REMOTE if key.kind == "address" else key.entry or f"{number}"
        _set_action(actions.add(), key, entry)
        descriptor.entries.add(key=entry, value=key.value)
    return message


def _asking(quota: Quota, upstreams: Upstreams) -> Any:
    """None for one that Envoy can't have."""
    service = quota.service
    host, _, port = service.address.rpartition(":")
    keys = [key for each in quota.descriptors for key in each]
    known = all(_is_known(key) and (key.kind in _FIXED or not key.value) and _is_named(key) for key in keys)
    if service.kind != "envoy" or not port.isdecimal() or not known or _conditions(quota):
        return None
    message = m.RateLimitFilter(
        domain=service.domain, failure_mode_deny=service.denies_on_failure, stat_prefix=_stat(quota.name)
    )
    set_seconds(message.timeout, service.timeout)
    set_share(message.filter_enforced.default_value, 0 if quota.shadow else _ALL)
    message.status_on_error.code = service.status_on_failure
    _set_answer(message, quota, message.rate_limited_status)
    grpc = message.rate_limit_service.grpc_service.envoy_grpc
    grpc.cluster_name = upstreams.cluster(host.strip("[]"), int(port), http2=True)
    grpc.authority = service.address
    message.rate_limit_service.transport_api_version = _V3
    for descriptor in quota.descriptors:
        described = message.rate_limits.add()
        if quota.hits != 1:
            described.hits_addend.number.value = quota.hits
        for key in descriptor:
            _set_action(described.actions.add(), key, key.entry or key.name or key.kind)
    return message


def _is_known(key: LimitKey) -> bool:
    return key.kind not in ("principal", "path")


def _is_named(key: LimitKey) -> bool:
    """Envoy's remote_address names its entry itself."""
    return key.kind != "address" or key.entry == _REMOTE


def _conditions(limit: RateLimit | Quota) -> list[LimitKey]:
    """Which calls it is for, as an entry that only those have."""
    headers = []
    if limit.methods:
        headers.append(HeaderMatch(":method", StringMatch("regex", "|".join(map(re.escape, limit.methods)))))
    if limit.path_prefix:
        headers.append(HeaderMatch(":path", StringMatch("prefix", limit.path_prefix)))
    if limit.hosts:
        either = "|".join(re.escape(host).replace("\\*", "[^:]+") for host in limit.hosts)
        headers.append(HeaderMatch(":authority", StringMatch("regex", f"(?i:(?:{either}))(?::[0-9]+)?")))
    return [LimitKey("match", value="yes", headers=tuple(headers))] if headers else []


def _set_action(action: Any, key: LimitKey, entry: str) -> None:
    if key.kind == "value":
        action.generic_key.descriptor_key, action.generic_key.descriptor_value = entry, key.value
    elif key.kind == "match":
        match = action.header_value_match
        match.descriptor_key, match.descriptor_value, match.expect_match.value = entry, key.value, not key.invert
        for header in key.headers:
            set_header(match.headers.add(), header)
    elif key.kind == "address":
        action.remote_address.SetInParent()
    else:
        headers = action.request_headers
        headers.header_name, headers.descriptor_key = key.name or _HEADERS[key.kind], entry
        headers.skip_if_absent = key.optional


def _set_answer(message: Any, limit: RateLimit | Quota, status: Any) -> None:
    status.code = limit.answer.status
    message.rate_limited_as_resource_exhausted = limit.answer.grpc_status == 8
    message.enable_x_ratelimit_headers = int(limit.answers)
    for pair in limit.answer.headers:
        _set_header(message, pair)


def _set_header(message: Any, pair: tuple[str, str]) -> None:
    option = message.response_headers_to_add.add(append_action=2)  # overwrite
    option.header.key, option.header.value = pair[0], pair[1].replace("%", "%%")


def _set_bucket(bucket: Any, tokens: int, per_fill: int, interval: float) -> None:
    times = max(1, math.ceil(_SHORTEST / interval))
    bucket.max_tokens = tokens
    bucket.tokens_per_fill.value = min(_ENDLESS, per_fill * times)
    set_seconds(bucket.fill_interval, interval * times)


def _stat(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_") or "limit"
