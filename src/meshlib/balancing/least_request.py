"""LEAST_REQUEST: of two endpoints drawn at random, the one with fewer calls in flight. Istio's default.

Two draws with replacement, the first wins a tie (Envoy's choice_count 2; gRFC A48). With unequal weights the draws
are weighted and calls in flight are counted per unit of weight.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence

from meshlib.balancing.picker import Target, cumulative_weights


class LeastRequest:
    __slots__ = ("_count", "_cumulative", "_random", "_targets")

    def __init__(self, targets: Sequence[Target], rng: random.Random) -> None:
        self._targets = tuple(targets)
        self._count = len(self._targets)
        self._cumulative = cumulative_weights(targets)
        self._random = rng.random

    def pick(self) -> Target:
        if self._count == 1:
            return self._targets[0]
        if self._cumulative is not None:
            return self._pick_weighted(self._cumulative)
        a = self._targets[int(self._random() * self._count)]
        b = self._targets[int(self._random() * self._count)]
        return a if a.state.in_flight <= b.state.in_flight else b

    def _pick_weighted(self, cumulative: list[int]) -> Target:
        a = self._targets[bisect(cumulative, self._random() * cumulative[-1])]
        b = self._targets[bisect(cumulative, self._random() * cumulative[-1])]
        # Cross-multiplied, so that no float decides a tie.
        a_load = (a.state.in_flight + 1) * b.endpoint.weight
        b_load = (b.state.in_flight + 1) * a.endpoint.weight
        return a if a_load <= b_load else b

    def __repr__(self) -> str:
        return f"<Picker least_request {self._count} ready>"
