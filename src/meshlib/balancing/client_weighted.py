"""CLIENT_SIDE_WEIGHTED_ROUND_ROBIN: as often as an endpoint's own load report says that it can take (gRFC A58).

weight = qps / (utilization + eps / qps * penalty). The servers report in a response header (ORCA,
balancing/load_report). Reports count after a black-out of 10 seconds and for 3 minutes; an endpoint without one gets
the mean of the others; fewer than two weights are plain round robin.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from meshlib.balancing.load_report import LoadReport
from meshlib.balancing.picker import Target
from meshlib.balancing.round_robin import next_index, strides
from meshlib.state import EndpointState

BLACKOUT, EXPIRATION, UPDATE_PERIOD = 10.0, 180.0, 1.0
ERROR_PENALTY = 1.0


def observe(state: EndpointState, report: LoadReport, now: float) -> None:
    """An endpoint has reported. Guarded by the cluster's lock."""
    utilization = report.application_utilization or report.cpu_utilization
    if report.qps <= 0 or utilization <= 0:
        return
    penalty = report.eps / report.qps * ERROR_PENALTY
    if now - state.weighed_at > EXPIRATION:
        state.weighed_since = now
    state.reported_weight = report.qps / (utilization + penalty)
    state.weighed_at = now


class ClientWeighted:
    """Weights are worked out anew at most once a second, by the call that comes first then."""

    __slots__ = ("_next_update", "_strides", "_targets", "_turn")

    def __init__(self, targets: Sequence[Target], turn: list[int]) -> None:
        self._targets = tuple(targets)
        self._turn = turn
        self._strides: tuple[int, ...] = ()
        self._next_update = 0.0

    def pick(self, now: float = 0.0, key: int | None = None, attempt: int = 0, avoid: Collection[int] = ()) -> Target:
        if now >= self._next_update:
            self._next_update = now + UPDATE_PERIOD
            self._strides = self._weigh(now)
        return self._targets[next_index(self._turn, self._strides, len(self._targets))]

    def _weigh(self, now: float) -> tuple[int, ...]:
        found = [_weight(target.state, now) for target in self._targets]
        known = [weight for weight in found if weight > 0]
        if len(known) < 2:
            return ()
        mean = sum(known) / len(known)
        return strides([weight or mean for weight in found])

    def __repr__(self) -> str:
        return f"<Picker client_side_weighted_round_robin {len(self._targets)} ready>"


def _weight(state: EndpointState, now: float) -> float:
    if now - state.weighed_at >= EXPIRATION or now - state.weighed_since < BLACKOUT:
        return 0.0
    return state.reported_weight
