"""What is a picker, and which one does a group of endpoints get?"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Protocol

from meshlib.model import Cluster, Endpoint, LoadBalancing
from meshlib.model.values import dataclass
from meshlib.state import EndpointState


@dataclass(frozen=True, slots=True)
class Target:
    """An endpoint and what this process knows of it."""

    endpoint: Endpoint
    state: EndpointState


class Picker(Protocol):
    """Chooses among the endpoints it was built with, all of which may be called.

    Never blocks, takes no lock, may be called from any thread. None only when it was built with no endpoint.

    now: monotonic seconds. key: the request's hash, for those that look it up; None is a random one. attempt: 0 for a
    call's first try, one more for each after it. avoid: priorities that were tried (Envoy's previous_priorities).
    """

    def pick(
        self, now: float = 0.0, key: int | None = None, attempt: int = 0, avoid: Collection[int] = ()
    ) -> Target | None: ...


class _Empty:
    def pick(self, now: float = 0.0, key: int | None = None, attempt: int = 0, avoid: Collection[int] = ()) -> None:
        return None

    def __repr__(self) -> str:
        return "<Picker without endpoints>"


EMPTY: Picker = _Empty()

HASHING = frozenset({LoadBalancing.RING_HASH, LoadBalancing.MAGLEV})
"""The policies that send equal keys to equal endpoints."""


def build_picker(
    cluster: Cluster, targets: Sequence[Target], weights: Sequence[int], turn: list[int], rng: random.Random
) -> Picker:
    """The picker of the cluster's policy over `targets`, for every policy that looks nothing up (balancing/hashing has
    the others).

    weights: of the targets, in their order; larger than an endpoint's own where slow start scales it. turn: round
    robin's position, one number that outlives the picker.
    """
    from meshlib.balancing.client_weighted import ClientWeighted
    from meshlib.balancing.least_request import LeastRequest
    from meshlib.balancing.peak_ewma import PeakEwma
    from meshlib.balancing.random import Random
    from meshlib.balancing.round_robin import RoundRobin

    if not targets:
        return EMPTY
    match cluster.load_balancing:
        case LoadBalancing.ROUND_ROBIN:
            return RoundRobin(targets, weights, turn)
        case LoadBalancing.RANDOM:
            return Random(targets, weights, rng)
        case LoadBalancing.PEAK_EWMA:
            return PeakEwma(targets, rng)
        case LoadBalancing.CLIENT_SIDE_WEIGHTED_ROUND_ROBIN:
            return ClientWeighted(targets, turn)
        case _:
            return LeastRequest(targets, weights, rng)


def cumulative(weights: Sequence[int]) -> list[int] | None:
    """Running sums for a weighted draw; None where all weights are equal and no draw needs them."""
    if len(set(weights)) <= 1:
        return None
    total = 0
    return [total := total + weight for weight in weights]
