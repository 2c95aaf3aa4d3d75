"""What is the very same in two sequences? By identity, which takes a moment for ten thousand objects of which one is
new."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress, count
from operator import is_, is_not


def are_same(one: Sequence[object], two: Sequence[object]) -> bool:
    """Whether they hold the very same, in the same order."""
    return one is two or (len(one) == len(two) and all(map(is_, one, two)))


def same_ends(one: Sequence[object], two: Sequence[object]) -> tuple[int, int]:
    """How many are the very same at the beginning, and how many of the others at the end."""
    shorter = min(len(one), len(two))
    start = next(compress(count(), map(is_not, one, two)), shorter)
    end = next(compress(count(), map(is_not, reversed(one), reversed(two))), shorter)
    return start, min(end, shorter - start)
