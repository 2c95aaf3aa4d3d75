"""LEAST_REQUEST: of two endpoints drawn at random, the one with fewer calls in flight. Istio's default.

Two draws with replacement, the first wins a tie (Envoy's choice_count 2; gRFC A48). With unequal weights the draws
are weighted and calls in flight are counted per unit of weight. Envoy schedules unequal weights by earliest deadline
with weight / (active + 1) instead, which costs a heap under a lock for each pick; the shares come out the same.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Collection, Sequence

from meshlib.balancing.picker import Target, cumulative


class LeastRequest:
    __slots__ = ("_count", "_cumulative", "_random", "_targets", "_weights")

    def __init__(self, targets: Sequence[Target], weights: Sequence[int], rng: random.Random) -> None:
        self._targets = tuple(targets)
        self._count = len(self._targets)
        self._weights = tuple(weights)
        self._cumulative = cumulative(weights)
        self._random = rng.random

    def pick(self, now: float = 0.0, key: int | None = None, attempt: int = 0, avoid: Collection[int] = ()) -> Target:
        if self._count == 1:
            return self._targets[0]
        if self._cumulative is not None:
            return self._pick_weighted(self._cumulative)
        a = self._targets[int(self._random() * self._count)]
        b = self._targets[int(self._random() * self._count)]
        return a if a.state.in_flight <= b.state.in_flight else b

    def _pick_weighted(self, sums: list[int]) -> Target:
        a = bisect(sums, self._random() * sums[-1])
        b = bisect(sums, self._random() * sums[-1])
        # Cross-multiplied, so that no float decides a tie; two idle ones tie, so that idle ones share by weight.
        a_load = self._targets[a].state.in_flight * self._weights[b]
        b_load = self._targets[b].state.in_flight * self._weights[a]
        return self._targets[a if a_load <= b_load else b]

    def __repr__(self) -> str:
        return f"<Picker least_request {self._count} ready>"
