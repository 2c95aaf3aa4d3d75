"""Does an endpoint do worse than it should? Envoy's outlier detection (source/common/upstream/
outlier_detection_impl.cc): errors in a row, decided as each attempt ends; rates over an interval, and returns, decided
by a sweep at each end of it.

Envoy sweeps by a timer. Here the first call after an interval's end does, which callers can't tell apart: nobody looks
at an endpoint between calls. Where gRPC (gRFC A50) and Envoy differ we follow Envoy, whose fields Istio's are: shares
are of the cluster and not of the priority, and an ejection that would exceed max_ejection_percent is refused before,
not after. The clock comes in as an argument; the caller holds the cluster's lock.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

from meshlib.model import OutlierDetection
from meshlib.state import ClusterState, EndpointState

_GATEWAY_ERRORS = frozenset({502, 503, 504})


class Detector:
    """The rules for one cluster, over the state of its endpoints.

    hosts: how many endpoints the cluster has. is_shadow: ejections are counted and not carried out.
    """

    __slots__ = ("_hosts", "_is_shadow", "_judges_rates", "_random", "_rules", "_state")

    def __init__(
        self, rules: OutlierDetection, state: ClusterState, hosts: int, rng: random.Random, is_shadow: bool = False
    ) -> None:
        self._rules, self._state, self._hosts = rules, state, hosts
        self._random = rng.random
        self._is_shadow = is_shadow
        self._judges_rates = bool(rules.success_rate_enforcing or rules.failure_percentage_enforcing)

    def is_news(self, endpoint: EndpointState, status: int | None) -> bool:
        """Whether `record` would change anything that matters. Asked without the lock: a good answer beside a bad one
        that is being counted has come before it or after it, nobody can tell."""
        return (
            self._judges_rates
            or status is None
            or status >= 500
            or bool(endpoint.consecutive_5xx or endpoint.consecutive_gateway_errors)
            or endpoint.consecutive_local_failures > 0
            or status in self._rules.error_codes
        )

    def record(self, endpoint: EndpointState, status: int | None, now: float) -> bool:
        """Count one finished attempt. True when it ejected the endpoint.

        status: None when no response head came: a local-origin failure, which counts as a 503 unless
        split_external_local_origin_errors is set, as in Envoy.
        """
        rules = self._rules
        if status is None and rules.split_external_local_origin_errors:
            endpoint.consecutive_local_failures += 1
            if endpoint.consecutive_local_failures != rules.consecutive_local_origin_failures:
                return False
            endpoint.consecutive_local_failures = 0
            return self._eject(endpoint, 100, now)
        endpoint.consecutive_local_failures = 0
        code = 503 if status is None else status
        endpoint.window_calls += 1
        if code < 500 and code not in rules.error_codes:
            endpoint.window_good += 1
            endpoint.consecutive_5xx = endpoint.consecutive_gateway_errors = 0
            return False
        endpoint.consecutive_5xx += 1
        endpoint.consecutive_gateway_errors = endpoint.consecutive_gateway_errors + 1 if code in _GATEWAY_ERRORS else 0
        # "==" and not ">=", as in Envoy: a detector fires once, and again only after its counter was reset.
        if endpoint.consecutive_gateway_errors == rules.consecutive_gateway_errors > 0:
            endpoint.consecutive_gateway_errors = 0
            if self._eject(endpoint, 100, now):
                return True
        if endpoint.consecutive_5xx == rules.consecutive_5xx > 0:
            endpoint.consecutive_5xx = 0
            return self._eject(endpoint, 100, now)
        return False

    def sweep(self, endpoints: Sequence[EndpointState], now: float, intervals: int = 1) -> None:
        """At an interval's end: let those return whose time is over, judge the rates, forget what is old.

        intervals: how many have ended since the last sweep; more than one when nobody called.
        """
        rules = self._rules
        for endpoint in endpoints:
            if endpoint.is_ejected and now - endpoint.ejected_at >= self._ejection_time(endpoint):
                self.restore(endpoint, now)
        self._judge_rates(endpoints, now)
        for endpoint in endpoints:
            endpoint.window_calls = endpoint.window_good = 0
            if endpoint.ejections and not endpoint.is_ejected and now - endpoint.returned_at >= rules.interval:
                quiet = int((now - endpoint.returned_at) / rules.interval)
                endpoint.ejections = max(0, endpoint.ejections - min(intervals, quiet))

    def restore(self, endpoint: EndpointState, now: float) -> None:
        """An ejected endpoint serves again, with a clean slate."""
        endpoint.is_ejected = False
        endpoint.returned_at = now
        endpoint.consecutive_5xx = endpoint.consecutive_gateway_errors = endpoint.consecutive_local_failures = 0
        self._state.ejected -= 1

    def _ejection_time(self, endpoint: EndpointState) -> float:
        rules = self._rules
        longest = max(rules.max_ejection_time, rules.base_ejection_time)
        return min(rules.base_ejection_time * endpoint.ejections, longest) + endpoint.ejection_jitter

    def _judge_rates(self, endpoints: Sequence[EndpointState], now: float) -> None:
        rules = self._rules
        if rules.success_rate_enforcing:
            rates = _rates(endpoints, rules.success_rate_request_volume)
            if len(rates) >= max(1, rules.success_rate_minimum_hosts):
                mean = sum(rate for _, rate in rates) / len(rates)
                variance = sum((rate - mean) ** 2 for _, rate in rates) / len(rates)  # of the population (Envoy)
                threshold = mean - rules.success_rate_stdev_factor * variance**0.5
                self._eject_those(rates, lambda rate: rate < threshold, rules.success_rate_enforcing, now)
        if rules.failure_percentage_enforcing:
            rates = _rates(endpoints, rules.failure_percentage_request_volume)
            if len(rates) >= max(1, rules.failure_percentage_minimum_hosts):
                limit = rules.failure_percentage_threshold
                self._eject_those(rates, lambda rate: 100 - rate >= limit, rules.failure_percentage_enforcing, now)

    def _eject_those(
        self, rates: Iterable[tuple[EndpointState, float]], fails: Callable[[float], bool], enforcing: int, now: float
    ) -> None:
        for endpoint, rate in rates:
            if fails(rate):
                self._eject(endpoint, enforcing, now)

    def _eject(self, endpoint: EndpointState, enforcing: int, now: float) -> bool:
        if endpoint.is_ejected:
            return False  # calls that were under way when it was ejected do not prolong the ejection
        rules, state = self._rules, self._state
        is_within = 100 * (state.ejected + 1) <= min(100, rules.max_ejection_percent) * self._hosts
        # Envoy's always_eject_one_host is off by default and Istio does not set it: of two hosts, 10 percent is none.
        if not is_within and not (rules.always_eject_one and not state.ejected):
            state.ejections_refused += 1
            return False
        if enforcing < 100 and self._random() * 100 >= enforcing:
            return False
        if self._is_shadow:
            state.shadowed_ejections += 1
            return False
        longest = max(rules.max_ejection_time, rules.base_ejection_time)
        if rules.base_ejection_time * endpoint.ejections < longest + rules.base_ejection_time:
            endpoint.ejections += 1
        endpoint.is_ejected = True
        endpoint.ejected_at = now
        endpoint.ejection_jitter = self._random() * rules.max_ejection_jitter
        state.ejected += 1
        state.ejections += 1
        return True


def _rates(endpoints: Sequence[EndpointState], volume: int) -> list[tuple[EndpointState, float]]:
    """Percent of good answers, of those that serve and had enough to do."""
    return [
        (endpoint, 100 * endpoint.window_good / endpoint.window_calls)
        for endpoint in endpoints
        if not endpoint.is_ejected and endpoint.window_calls >= max(1, volume)
    ]
