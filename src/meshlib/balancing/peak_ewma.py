"""PEAK_EWMA: of two endpoints drawn at random, the one whose expected latency times its queue is less. Linkerd's
default; Finagle's PeakEwma.scala, tower's load/peak_ewma.rs.

The estimate jumps to a latency that is worse and decays towards one that is better, so that a slow answer is heeded at
once and forgotten slowly. A failure counts as a slow answer (Linkerd's load biaser): an endpoint that fails fast would
otherwise look like the best of all and attract the traffic.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence

from meshlib.balancing.picker import Target
from meshlib.model import HeaderView
from meshlib.state import EndpointState

DEFAULT_LATENCY = 0.03
"""Seconds that an endpoint is thought to take before it has answered once (Linkerd)."""
DECAY = 10.0
"""Seconds in which the weight of what was falls to 1/e (Linkerd)."""
PENALTY = 5.0
"""Seconds that a failure counts as, unless the server names its own with Retry-After."""
MAX_PENALTY = 300.0


def observe(state: EndpointState, seconds: float, now: float) -> None:
    """An attempt took so long to its answer. Guarded by the cluster's lock."""
    cost = state.latency if state.latency_at else DEFAULT_LATENCY
    if seconds > cost:
        state.latency = seconds
    else:
        weight = math.exp(-max(0.0, now - state.latency_at) / DECAY) if state.latency_at else 0.0
        state.latency = cost * weight + seconds * (1.0 - weight)
    state.latency_at = now


def penalty(headers: HeaderView | None) -> float:
    """Seconds that a failure counts as: what its Retry-After says, or PENALTY."""
    told = None if headers is None else headers.get("retry-after")
    if told is None or not told.isascii() or not told.isdigit():
        return PENALTY
    return min(float(told), MAX_PENALTY)


class PeakEwma:
    __slots__ = ("_random", "_targets")

    def __init__(self, targets: Sequence[Target], rng: random.Random) -> None:
        self._targets = tuple(targets)
        self._random = rng.random

    def pick(self, now: float = 0.0, key: int | None = None, attempt: int = 0, avoid: Collection[int] = ()) -> Target:
        count = len(self._targets)
        if count == 1:
            return self._targets[0]
        first = int(self._random() * count)
        second = int(self._random() * (count - 1))
        second += second >= first  # two distinct ones, each pair as likely as another
        a, b = self._targets[first], self._targets[second]
        return a if _load(a.state, now) / a.endpoint.weight <= _load(b.state, now) / b.endpoint.weight else b

    def __repr__(self) -> str:
        return f"<Picker peak_ewma {len(self._targets)} ready>"


def _load(state: EndpointState, now: float) -> float:
    """Latency, decayed towards zero for the time since it was measured, for each call that would be in flight."""
    at = state.latency_at
    latency = state.latency * math.exp((at - now) / DECAY) if at and now > at else state.latency
    return (latency if at else DEFAULT_LATENCY) * (state.in_flight + 1)
