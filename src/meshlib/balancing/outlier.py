"""Has an endpoint failed too often in a row? Envoy's consecutive detectors (source/common/upstream/
outlier_detection_impl.cc), decided as each attempt ends.

Envoy returns ejected hosts in a sweep every `interval`; here the time of return is rounded up to the interval's grid,
which gives the same moments without a timer. The clock comes in as an argument; the caller holds the cluster's lock.
"""

from __future__ import annotations

import math

from meshlib.model import OutlierDetection
from meshlib.state import ClusterState, EndpointState

_GATEWAY_ERRORS = frozenset({502, 503, 504})
MAX_EJECTION_TIME = 300.0
"""Envoy's max_ejection_time, which Istio does not expose; base_ejection_time where that is larger."""


def record(
    rules: OutlierDetection,
    endpoint: EndpointState,
    cluster: ClusterState,
    hosts: int,
    status: int | None,
    now: float,
) -> bool:
    """Count one finished attempt. True when it ejected the endpoint.

    status: None when no response head came (a local-origin failure, which counts as a 503 unless
    split_external_local_origin_errors is set, as in Envoy).
    """
    if endpoint.ejected_until > now:
        return False  # calls that were under way when it was ejected do not prolong the ejection
    if status is None and rules.split_external_local_origin_errors:
        endpoint.consecutive_local_failures += 1
        if endpoint.consecutive_local_failures != rules.consecutive_local_origin_failures:
            return False
        endpoint.consecutive_local_failures = 0
        return _eject(rules, endpoint, cluster, hosts, now)
    endpoint.consecutive_local_failures = 0
    code = 503 if status is None else status
    if code < 500:
        endpoint.consecutive_5xx = endpoint.consecutive_gateway_errors = 0
        return False
    endpoint.consecutive_5xx += 1
    endpoint.consecutive_gateway_errors = endpoint.consecutive_gateway_errors + 1 if code in _GATEWAY_ERRORS else 0
    # "==" and not ">=", as in Envoy: a detector fires once, and again only after its counter was reset.
    if endpoint.consecutive_gateway_errors == rules.consecutive_gateway_errors > 0:
        endpoint.consecutive_gateway_errors = 0
        return _eject(rules, endpoint, cluster, hosts, now)
    if endpoint.consecutive_5xx == rules.consecutive_5xx > 0:
        endpoint.consecutive_5xx = 0
        return _eject(rules, endpoint, cluster, hosts, now)
    return False


def _eject(rules: OutlierDetection, endpoint: EndpointState, cluster: ClusterState, hosts: int, now: float) -> bool:
    # Envoy's always_eject_one_host is off by default and Istio does not set it: two hosts and 10 percent eject none.
    if 100 * (cluster.ejected + 1) > rules.max_ejection_percent * hosts:
        return False
    quiet = int((now - endpoint.returned_at) // rules.interval) if endpoint.returned_at else 0
    endpoint.ejections = max(0, endpoint.ejections - quiet) + 1
    longest = max(MAX_EJECTION_TIME, rules.base_ejection_time)
    end = now + min(rules.base_ejection_time * endpoint.ejections, longest)
    endpoint.ejected_until = math.ceil(end / rules.interval) * rules.interval
    endpoint.returned_at = endpoint.ejected_until
    cluster.ejected += 1
    cluster.next_return = min(cluster.next_return, endpoint.ejected_until)
    return True
