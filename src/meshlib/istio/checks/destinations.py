"""What must hold in a DestinationRule and a BackendTrafficPolicy that their shapes can't say?"""

from __future__ import annotations

import math
from typing import Any

from meshlib.istio import resources as r
from meshlib.istio.checks.labels import check_labels, check_selector
from meshlib.istio.checks.limits import check_limits, check_quotas
from meshlib.istio.checks.parts import (
    HEADER,
    SUBSET,
    at_least,
    check_export,
    check_head_text,
    check_host,
    is_address,
    msgspec_name,
    read,
)
from meshlib.istio.problems import Refused
from meshlib.model import SHADOWABLE

MAX_RING, MAX_TABLE = 8 * 1024 * 1024, 5_000_011
"""Envoy's limits of a ring and of a maglev table."""


def check_destination_rule(spec: r.DestinationRule, namespace: str = "") -> None:
    """namespace: the object's own."""
    for index, each in enumerate(spec.subsets):
        check_labels(each.labels, f"subsets[{index}].labels")
    check_selector(spec.workload_selector)
    if spec.host != "*":
        check_host(spec.host, "host")
    check_export(spec.export_to)
    if spec.workload_selector is not None and any(each != "." and each != namespace for each in spec.export_to):
        raise Refused("exportTo", "may name the own namespace alone beside workloadSelector")
    if spec.traffic_policy is not None:
        _check_policy(spec.traffic_policy, "trafficPolicy")
    seen: set[str] = set()
    for index, subset in enumerate(spec.subsets):
        at = f"subsets[{index}]"
        if not SUBSET.match(subset.name):
            raise Refused(f"{at}.name", f"no subset name: {subset.name!r}")
        if subset.name in seen:
            raise Refused(f"{at}.name", f"{subset.name!r} is there twice")
        seen.add(subset.name)
        if subset.traffic_policy is not None:
            _check_policy(subset.traffic_policy, f"{at}.trafficPolicy")


def _check_policy(policy: r.TrafficPolicy, at: str) -> None:
    if policy == r.TrafficPolicy():
        raise Refused(at, "says nothing")
    if policy.tunnel is not None:
        _check_tunnel(policy.tunnel, f"{at}.tunnel")
        if policy.proxy_protocol is not None:
            raise Refused(f"{at}.tunnel", "can't stand beside proxyProtocol")
    _check_blocks(policy, at)
    for index, level in enumerate(policy.port_level_settings):
        if level == r.PortTrafficPolicy(level.port):
            raise Refused(f"{at}.portLevelSettings[{index}]", "says nothing of its port")
        _check_blocks(level, f"{at}.portLevelSettings[{index}]")


def _check_blocks(policy: r.TrafficPolicy | r.PortTrafficPolicy, at: str) -> None:
    if policy.tls is not None:
        _check_tls(policy.tls, f"{at}.tls")
    if policy.outlier_detection is not None:
        check_outlier(policy.outlier_detection, f"{at}.outlierDetection")
    if policy.connection_pool is not None:
        check_pool(policy.connection_pool, f"{at}.connectionPool")
    if policy.load_balancer is not None:
        _check_balancer(policy.load_balancer, f"{at}.loadBalancer")


def _check_tls(tls: r.ClientTLSSettings, at: str) -> None:
    if tls.mode == "ISTIO_MUTUAL" and (tls.client_certificate or tls.private_key or tls.ca_certificates):
        raise Refused(f"{at}.mode", "ISTIO_MUTUAL shows the mesh's own certificate: files contradict it")
    if tls.credential_name is not None:
        raise Refused(f"{at}.credentialName", "secrets are not read yet; name files")
    if tls.mode == "MUTUAL" and not (tls.client_certificate and tls.private_key):
        raise Refused(at, "MUTUAL needs clientCertificate and privateKey (files)")
    if tls.ca_crl is not None:
        raise Refused(f"{at}.caCrl", "is not checked yet, so this is refused")
    for index, name in enumerate(tls.subject_alt_names):
        if not name or "*" in name:
            raise Refused(f"{at}.subjectAltNames[{index}]", f"must be one whole name: {name!r}")
    if tls.insecure_skip_verify and (tls.subject_alt_names or tls.ca_certificates):
        raise Refused(f"{at}.insecureSkipVerify", "checks nothing, so subjectAltNames and caCertificates contradict it")
    if tls.sni:
        check_host(tls.sni, f"{at}.sni", wildcard=False)


def _check_tunnel(tunnel: Any, at: str) -> None:
    """Nothing is tunnelled; what Istio would refuse is refused."""
    if not isinstance(tunnel, dict):
        raise Refused(at, "must be a mapping")
    if tunnel.get("protocol", "") not in ("", "CONNECT", "POST"):
        raise Refused(f"{at}.protocol", f"must be CONNECT or POST: {tunnel['protocol']!r}")
    host, port = str(tunnel.get("targetHost", "")), tunnel.get("targetPort")
    if not is_address(host):
        check_host(host, f"{at}.targetHost", wildcard=False)
    if not isinstance(port, int) or not 0 < port < 65536:
        raise Refused(f"{at}.targetPort", f"is no port: {port!r}")


def check_outlier(outlier: r.OutlierDetection, at: str) -> None:
    if outlier.consecutive_local_origin_failures and not outlier.split_external_local_origin_errors:
        field = f"{at}.consecutiveLocalOriginFailures"
        raise Refused(field, "is counted only with splitExternalLocalOriginErrors: true")
    for name in ("interval", "base_ejection_time"):
        at_least(getattr(outlier, name), 0.001, f"{at}.{msgspec_name(name)}")


def check_pool(pool: r.ConnectionPool, at: str) -> None:
    if pool.is_empty:
        raise Refused(at, "says nothing: give tcp or http")
    if pool.http.http2_keep_alive is not None:
        _check_pings(pool.http.http2_keep_alive, f"{at}.http.http2KeepAlive")
    if pool.http.h2_upgrade_policy == "UPGRADE" and pool.http.use_client_protocol:
        raise Refused(f"{at}.http.useClientProtocol", "contradicts h2UpgradePolicy: UPGRADE")
    at_least(pool.tcp.connect_timeout, 0.001, f"{at}.tcp.connectTimeout")
    at_least(pool.tcp.max_connection_duration, 0.001, f"{at}.tcp.maxConnectionDuration")
    keepalive = pool.tcp.tcp_keepalive
    if keepalive is not None:
        at_least(keepalive.time, 1, f"{at}.tcp.tcpKeepalive.time")
        at_least(keepalive.interval, 1, f"{at}.tcp.tcpKeepalive.interval")
    for kind, timeout in (("tcp", pool.tcp.idle_timeout), ("http", pool.http.idle_timeout)):
        if timeout is not None and 0 < timeout.seconds < 0.001:
            raise Refused(f"{at}.{kind}.idleTimeout", "must be at least 1ms")


def _check_pings(given: Any, at: str) -> None:
    """Nobody pings; what Istio would refuse is refused."""
    pings: dict[str, r.Duration] = read(given, dict[str, r.Duration], at)
    for name in pings:
        if name not in ("interval", "timeout"):
            raise Refused(f"{at}.{name}", "there is no such field")
    for name in ("interval", "timeout"):
        if name not in pings:
            raise Refused(f"{at}.{name}", "is missing")
        at_least(pings[name], 0.001, f"{at}.{name}")


def _check_balancer(balancer: r.LoadBalancer, at: str) -> None:
    if balancer.simple is not None and balancer.consistent_hash is not None:
        raise Refused(at, "either simple or consistentHash")
    if balancer.consistent_hash is not None:
        _check_hash(balancer.consistent_hash, f"{at}.consistentHash")
    check_locality(balancer.locality_lb_setting, f"{at}.localityLbSetting")
    check_zone_aware(balancer.zone_aware_lb_setting, f"{at}.zoneAwareLbSetting")
    for name in ("warmup", "warmup_duration_secs"):
        if getattr(balancer, name) is not None and (
            balancer.consistent_hash is not None or balancer.simple in ("RANDOM", "PASSTHROUGH")
        ):
            raise Refused(f"{at}.{msgspec_name(name)}", "goes with ROUND_ROBIN and LEAST_REQUEST only")
    at_least(balancer.warmup_duration_secs, 0.001, f"{at}.warmupDurationSecs")
    if balancer.warmup is not None:
        at_least(balancer.warmup.duration, 0.001, f"{at}.warmup.duration")
        if balancer.warmup.aggression is not None and balancer.warmup.aggression < 1:
            raise Refused(f"{at}.warmup.aggression", "must be at least 1")


def _check_hash(given: r.ConsistentHash, at: str) -> None:
    keys = {
        "httpHeaderName": given.http_header_name,
        "httpCookie": given.http_cookie,
        "useSourceIp": given.use_source_ip,
        "httpQueryParameterName": given.http_query_parameter_name,
    }
    found = [name for name, value in keys.items() if value]
    if len(found) != 1:
        told = " and ".join(found) or "none"
        raise Refused(at, f"needs exactly one of {', '.join(keys)}; found {told}")
    if given.http_header_name and not HEADER.match(given.http_header_name):
        raise Refused(f"{at}.httpHeaderName", f"no header name: {given.http_header_name!r}")
    if given.http_cookie is not None:
        if not given.http_cookie.name or not HEADER.match(given.http_cookie.name):
            raise Refused(f"{at}.httpCookie.name", f"no name of a cookie: {given.http_cookie.name!r}")
        if ";" in given.http_cookie.path:
            raise Refused(f"{at}.httpCookie.path", f"no path of a cookie: {given.http_cookie.path!r}")
        check_head_text(given.http_cookie.path, f"{at}.httpCookie.path")
        _check_attributes(given.http_cookie.attributes, f"{at}.httpCookie.attributes")
    if given.ring_hash is not None and given.maglev is not None:
        raise Refused(at, "either ringHash or maglev")
    for name, size in (
        ("ringHash.minimumRingSize", given.ring_hash.minimum_ring_size if given.ring_hash else 0),
        ("minimumRingSize", given.minimum_ring_size),
    ):
        if size > MAX_RING:
            raise Refused(f"{at}.{name}", f"must be at most {MAX_RING}")
    size = given.maglev.table_size if given.maglev is not None else 0
    if size and (size > MAX_TABLE or not _is_prime(size)):
        raise Refused(f"{at}.maglev.tableSize", f"must be a prime number of at most {MAX_TABLE}: {size}")


def _check_attributes(given: Any, at: str) -> None:
    """No cookie is set with them; what Istio would refuse is refused."""
    names: list[str] = []
    for index, each in enumerate(read(given or [], list[dict[str, str]], at)):
        name = each.get("name", "")
        if not name or name in names:
            raise Refused(f"{at}[{index}].name", f"{name!r} is there twice" if name else "is missing")
        names.append(name)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % each for each in range(2, math.isqrt(number) + 1))


def check_locality(given: r.LocalityLbSetting | None, at: str) -> None:
    if given is None:
        return
    blocks = [name for name in ("distribute", "failover", "failover_priority") if getattr(given, name)]
    if "distribute" in blocks and len(blocks) > 1:
        raise Refused(at, f"either distribute or {msgspec_name(blocks[1])}")
    _check_failover(given.failover, given.failover_priority, at)
    seen: list[str] = []
    for index, each in enumerate(given.distribute):
        place = f"{at}.distribute[{index}]"
        _check_place(each.from_, seen, f"{place}.from")
        targets: list[str] = []
        for target, weight in each.to.items():
            _check_place(target, targets, f"{place}.to.{target}")
            if not 1 <= weight <= 100:
                raise Refused(f"{place}.to.{target}", f"must be from 1 to 100: {weight}")
        if sum(each.to.values()) != 100:
            raise Refused(f"{place}.to", f"must add up to 100, not {sum(each.to.values())}")


def check_zone_aware(given: r.ZoneAwareLbSetting | None, at: str) -> None:
    if given is not None:
        _check_failover(given.failover, given.failover_priority, at)


def _check_failover(failover: list[r.Failover], priority: list[str], at: str) -> None:
    if failover and (doubled := [label for label in priority if label in r.TOPOLOGY_LABELS]):
        raise Refused(f"{at}.failoverPriority", f"either failover or the label {doubled[0]}")
    for index, each in enumerate(failover):
        for side, region in (("from", each.from_), ("to", each.to)):
            if not region or "*" in region or "/" in region:
                raise Refused(f"{at}.failover[{index}].{side}", f"must be one region: {region!r}")
        if each.from_ == each.to:
            raise Refused(f"{at}.failover[{index}]", f"from and to are both {each.to!r}")
    for index, label in enumerate(priority):
        if not label or label.startswith("=") or label.count("=") > 1:
            raise Refused(f"{at}.failoverPriority[{index}]", f"must be a label or label=value: {label!r}")


def _check_place(place: str, seen: list[str], at: str) -> None:
    """`region/zone/subzone`, with a `*` for all of the rest; none may cover another (Istio, validateLocalities). Only
    `*` may, behind all others: the rest of the world."""
    parts = place.split("/")
    wild = [part for part in parts if "*" in part]
    if not place or len(parts) > 3 or not all(parts) or any(part != "*" for part in wild) or "*" in parts[:-1]:
        raise Refused(at, f"must be region/zone/subzone, with * at the end if at all: {place!r}")
    for other in seen:
        if _covers(other, place) or (place != "*" and _covers(place, other)):
            raise Refused(at, f"{place!r} and {other!r} are both for the same place")
    seen.append(place)


def _covers(wide: str, narrow: str) -> bool:
    stem = wide.removesuffix("*").removesuffix("/")
    return wide in ("*", narrow) or narrow == stem or narrow.startswith(f"{stem}/")


def check_backend_policy(spec: r.BackendTrafficPolicy) -> None:
    if spec.host != "*":
        check_host(spec.host, "host")
    if spec.subset and not SUBSET.match(spec.subset):
        raise Refused("subset", f"no subset name: {spec.subset!r}")
    if spec == r.BackendTrafficPolicy(spec.host, spec.subset):
        raise Refused("", "says nothing about its host")
    for index, name in enumerate(spec.shadow):
        if name not in SHADOWABLE:
            raise Refused(f"shadow[{index}]", f"must be one of {', '.join(sorted(SHADOWABLE))}: {name!r}")
    if spec.breaker is not None:
        _check_breaker(spec.breaker)
    if spec.retry_budget is not None:
        at_least(spec.retry_budget.ttl, 1, "retryBudget.ttl")
    check_limits(spec.rate_limits, "rateLimits")
    check_quotas(spec.quotas, "quotas")
    if spec.hedge is not None:
        at_least(spec.hedge.delay, 0.001, "hedge.delay")
        if spec.subset == "" and "*" in spec.host:
            raise Refused("hedge", f"must be asked for by one host, not by {spec.host!r}")
    for index, check in enumerate(spec.health_checks):
        _check_health(check, f"healthChecks[{index}]")
    detection = spec.outlier_detection
    if detection is not None:
        for kind in ("success_rate", "failure_percentage"):
            given = [name for name in detection.__struct_fields__ if name.startswith(kind) and getattr(detection, name)]
            if given and f"{kind}_enforcing" not in given:
                at = f"outlierDetection.{msgspec_name(given[0])}"
                raise Refused(at, f"has no meaning without {msgspec_name(kind + '_enforcing')}")
        at_least(detection.max_ejection_time, 0.001, "outlierDetection.maxEjectionTime")


def _check_breaker(given: r.Breaker) -> None:
    if not (given.consecutive_failures or given.failure_rate or given.slow_call_rate or given.forced):
        raise Refused("breaker", "never opens: give consecutiveFailures, failureRate or slowCallRate, or forced")
    if given.slow_call_rate and given.slow_call is None:
        raise Refused("breaker.slowCall", "is missing: from how long on is a call slow?")
    for name in ("slow_call", "window", "open_for"):
        at_least(getattr(given, name), 0.001, f"breaker.{msgspec_name(name)}")


def _check_health(check: r.HealthCheck, at: str) -> None:
    kinds = [name for name in ("http", "grpc", "tcp") if getattr(check, name) is not None]
    if len(kinds) != 1:
        raise Refused(at, f"needs exactly one of http, grpc and tcp; found {' and '.join(kinds) or 'none'}")
    for name in ("interval", "timeout"):
        at_least(getattr(check, name), 0.001, f"{at}.{name}")
    if check.http is not None:
        if not check.http.path.startswith("/"):
            raise Refused(f"{at}.http.path", f"must begin with a slash: {check.http.path!r}")
        check_head_text(check.http.path, f"{at}.http.path")
        check_head_text(check.http.host, f"{at}.http.host")
        for index, each in enumerate(check.http.expected_statuses):
            if statuses(each) is None:
                raise Refused(f"{at}.http.expectedStatuses[{index}]", f"must be as 200 or 200-299: {each!r}")


def statuses(given: int | str) -> tuple[int, int] | None:
    """`204` -> (204, 204), `200-299` -> (200, 299); None for what is neither."""
    first, dash, last = str(given).partition("-")
    if not first.isdecimal() or not (last.isdecimal() or not dash):
        return None
    found = (int(first), int(last) if dash else int(first))
    return found if 100 <= found[0] <= found[1] <= 599 else None
