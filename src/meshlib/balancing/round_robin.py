"""ROUND_ROBIN: one endpoint after the other, as often as its weight says.

Equal weights walk the list. Unequal ones use static-stride scheduling (grpc-go's weightedroundrobin/scheduler.go,
after gRFC A58): immutable weights and one counter, so a pick takes no lock and does not depend on how many there are.
Envoy's earliest-deadline schedule gives the same shares from a heap.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from meshlib.balancing.picker import Target, cumulative

MAX_WEIGHT = 65535


class RoundRobin:
    """`turn` outlives the picker, so that an update does not send every process back to the start. Two threads that
    read the same position pick the same endpoint once; that evens out."""

    __slots__ = ("_strides", "_targets", "_turn")

    def __init__(self, targets: Sequence[Target], weights: Sequence[int], turn: list[int]) -> None:
        self._targets = tuple(targets)
        self._turn = turn
        self._strides = strides(weights)

    def pick(self, now: float = 0.0, key: int | None = None, attempt: int = 0, avoid: Collection[int] = ()) -> Target:
        return self._targets[next_index(self._turn, self._strides, len(self._targets))]

    def __repr__(self) -> str:
        return f"<Picker round_robin {len(self._targets)} ready>"


def strides(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights scaled to at most MAX_WEIGHT; () where all are equal."""
    if cumulative(weights) is None:  # type: ignore[arg-type]
        return ()
    heaviest = max(weights)
    return tuple(max(1, int(weight * MAX_WEIGHT / heaviest)) for weight in weights)


def next_index(turn: list[int], strides: tuple[int, ...], count: int) -> int:
    """Whose turn it is, of `count`.

    Each generation visits every endpoint once and skips it in proportion to what it lacks of the heaviest; the offset
    keeps light endpoints from being served in one burst.
    """
    while True:
        position = turn[0]
        turn[0] = position + 1
        index = position % count
        if not strides:
            return index
        generation = position // count
        weight = strides[index]
        phase = (weight * generation + index * (MAX_WEIGHT // 2)) % MAX_WEIGHT
        if phase >= MAX_WEIGHT - weight:
            return index
