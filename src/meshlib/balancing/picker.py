"""What is a picker, and which one does a cluster get?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from meshlib.model import Endpoint, LoadBalancing
from meshlib.state import ClusterState, EndpointState


class Target(NamedTuple):
    """An endpoint and what this process knows of it."""

    endpoint: Endpoint
    state: EndpointState


class Picker(Protocol):
    """Chooses among the endpoints it was built with, all of which may be called.

    Never blocks, takes no lock, may be called from any thread. None only when it was built with no endpoint.
    """

    def pick(self) -> Target | None: ...


class _Empty:
    def pick(self) -> None:
        return None

    def __repr__(self) -> str:
        return "<Picker without endpoints>"


EMPTY: Picker = _Empty()


def build_picker(policy: LoadBalancing, targets: Sequence[Target], cluster: ClusterState, rng: random.Random) -> Picker:
    """The picker of `policy` over `targets`. One endpoint needs no policy."""
    from meshlib.balancing.least_request import LeastRequest
    from meshlib.balancing.random import Random
    from meshlib.balancing.round_robin import RoundRobin

    if not targets:
        return EMPTY
    if policy is LoadBalancing.ROUND_ROBIN:
        return RoundRobin(targets, cluster)
    if policy is LoadBalancing.RANDOM:
        return Random(targets, rng)
    return LeastRequest(targets, rng)


def cumulative_weights(targets: Sequence[Target]) -> list[int] | None:
    """Running sums for a weighted draw; None where all weights are equal and no draw needs them."""
    weights = [target.endpoint.weight for target in targets]
    if len(set(weights)) == 1:
        return None
    total = 0
    return [total := total + weight for weight in weights]
