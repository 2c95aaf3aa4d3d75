"""ROUND_ROBIN: one endpoint after the other, as often as its weight says.

Equal weights walk the list. Unequal ones use static-stride scheduling (grpc-go's weightedroundrobin/scheduler.go,
after gRFC A58): immutable weights and one counter, so a pick takes no lock.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshlib.balancing.picker import Target, cumulative_weights
from meshlib.state import ClusterState

_MAX_WEIGHT = 65535


class RoundRobin:
    """The position lives in the cluster's state, so that an update does not send every process back to the start.
    Two threads that read the same position pick the same endpoint once; that evens out."""

    __slots__ = ("_cluster", "_targets", "_weights")

    def __init__(self, targets: Sequence[Target], cluster: ClusterState) -> None:
        self._targets = tuple(targets)
        self._cluster = cluster
        self._weights: tuple[int, ...] = ()
        if cumulative_weights(targets) is not None:
            heaviest = max(target.endpoint.weight for target in targets)
            self._weights = tuple(max(1, t.endpoint.weight * _MAX_WEIGHT // heaviest) for t in targets)

    def pick(self) -> Target:
        count = len(self._targets)
        while True:
            turn = self._cluster.turn
            self._cluster.turn = turn + 1
            index = turn % count
            if not self._weights:
                return self._targets[index]
            # Each generation visits every endpoint once and skips it in proportion to what it lacks of the heaviest;
            # the offset keeps light endpoints from being served in one burst.
            generation = turn // count
            weight = self._weights[index]
            phase = (weight * generation + index * (_MAX_WEIGHT // 2)) % _MAX_WEIGHT
            if phase >= _MAX_WEIGHT - weight:
                return self._targets[index]

    def __repr__(self) -> str:
        return f"<Picker round_robin {len(self._targets)} ready>"
