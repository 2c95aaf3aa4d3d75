"""When is a certificate renewed, and when is it tried again? Sums only."""

from __future__ import annotations

import random

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 60.0
"""Seconds."""
SPREAD = 0.1
"""Share of the lifetime over which renewals are spread, so that what started together does not ask together."""


def renew_after(remaining: float, rng: random.Random) -> float:
    """Seconds until a certificate is renewed good for `remaining` more: half, give or take."""
    return max(0.0, remaining) * (0.5 + SPREAD * (rng.random() - 0.5))


def pause_after(failures: int, rng: random.Random) -> float:
    """Seconds after so many failures (at least one) in a row: doubled each time, and up to half of it left out."""
    return min(FIRST_PAUSE * 2.0 ** min(failures - 1, 20), LONGEST_PAUSE) * (1.0 - 0.5 * rng.random())
