"""RANDOM: every endpoint with a chance proportional to its weight (Envoy's random; Istio's RANDOM)."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Collection, Sequence

from meshlib.balancing.picker import Target, cumulative


class Random:
    __slots__ = ("_cumulative", "_random", "_targets")

    def __init__(self, targets: Sequence[Target], weights: Sequence[int], rng: random.Random) -> None:
        self._targets = tuple(targets)
        self._cumulative = cumulative(weights)
        self._random = rng.random

    def pick(self, now: float = 0.0, key: int | None = None, attempt: int = 0, avoid: Collection[int] = ()) -> Target:
        if self._cumulative is None:
            return self._targets[int(self._random() * len(self._targets))]
        return self._targets[bisect(self._cumulative, self._random() * self._cumulative[-1])]

    def __repr__(self) -> str:
        return f"<Picker random {len(self._targets)} ready>"
