"""How long may what is promised in seconds take here? A promise is one for a machine that is not shared with others."""

from __future__ import annotations

import os


def within(seconds: float) -> float:
    """`seconds`, and on a machine with more work than cores as many times that as each core has tasks that want it."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
