"""How long may a measurement take? What `make bench`, `make bench FAST=1` and the tests ask for."""

from __future__ import annotations

from typing import NamedTuple


class Effort(NamedTuple):
    """rounds: that each contestant plays, after one that warms up. seconds: length of a round with one call at a time;
    more at once get longer ones (`length`). concurrency: calls at once. batches, size: of what is measured without a
    wire: batches of so many repetitions."""

    name: str
    rounds: int
    seconds: float
    concurrency: tuple[int, ...]
    batches: int
    size: int

    def length(self, concurrency: int) -> float:
        """Seconds of a round. A hundred callers of a slow client make one call each in half a second, which would be
        no measurement."""
        return self.seconds * (1.0 if concurrency < 32 else 1.2 if concurrency < 128 else 2.0)


FULL = Effort("full", 5, 0.5, (1, 32, 128), 15, 400)
FAST = Effort("fast", 2, 0.05, (1, 32, 128), 5, 100)
SMOKE = Effort("smoke", 1, 0.01, (2,), 1, 4)
EFFORTS = {effort.name: effort for effort in (FULL, FAST, SMOKE)}
