"""RING_HASH and MAGLEV: equal keys go to equal endpoints, whoever asks. The same hash (xxHash64), keys and layout as
Envoy's (source/extensions/load_balancing_policies/{ring_hash,maglev}), so that we and Envoy choose alike.

A table is built once for all endpoints of a priority, on the feed thread. An endpoint that is ejected meanwhile is
passed over when it is looked up, as a retry passes over the one it has tried, where Envoy builds the whole table anew:
an ejection happens inside a call, which should not wait for 65,537 slots. Keys of other endpoints stay where they are.
"""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import xxhash

from meshlib.balancing.picker import Target
from meshlib.model import Cluster, LoadBalancing

_64_BITS = (1 << 64) - 1


class Table(Protocol):
    """index: the endpoint for a key at the n-th look."""

    def index(self, key: int, attempt: int) -> int: ...


class Ring:
    """`addresses` with `weights` on a ring of hashes; a key belongs to the first hash that is not below it."""

    __slots__ = ("_hashes", "_owners")

    def __init__(self, keys: Sequence[str], weights: Sequence[float], minimum: int, maximum: int) -> None:
        total = sum(weights)
        shares = [weight / total for weight in weights]
        least = min(shares)
        # The lightest endpoint gets a whole number of hashes, if the ring may become that large.
        scale = min(math.ceil(least * minimum) / least, float(maximum))
        points: list[tuple[int, int]] = []
        target = 0.0
        for owner, (key, share) in enumerate(zip(keys, shares, strict=True)):
            target += scale * share
            number = 0
            while len(points) < target:
                points.append((xxhash.xxh64_intdigest(f"{key}_{number}".encode()), owner))
                number += 1
        points.sort()
        self._hashes = array("Q", (point for point, _ in points))
        self._owners = array("L", (owner for _, owner in points))

    def index(self, key: int, attempt: int) -> int:
        at = bisect_left(self._hashes, key)
        return self._owners[(at + attempt) % len(self._owners)]

    def __len__(self) -> int:
        return len(self._owners)


class Maglev:
    """Every endpoint fills slots of a table in an order of its own, in turn, until it is full (Google's Maglev)."""

    __slots__ = ("_size", "_table")

    def __init__(self, keys: Sequence[str], weights: Sequence[float], size: int) -> None:
        self._size = size
        free = len(keys)  # no owner has this number
        table = array("L", [free]) * size
        heaviest = max(weights)
        # By key, so that the order in which endpoints are listed makes no difference.
        order = sorted(range(len(keys)), key=keys.__getitem__)
        slots = [xxhash.xxh64_intdigest(keys[owner].encode()) % size for owner in order]
        skips = [xxhash.xxh64_intdigest(keys[owner].encode(), 1) % (size - 1) + 1 for owner in order]
        targets = [0.0] * len(order)
        left = size
        turn = 0
        while left:
            turn += 1
            for each, owner in enumerate(order):
                if turn * weights[owner] < targets[each]:
                    continue
                targets[each] += heaviest
                slot, skip = slots[each], skips[each]
                while table[slot] != free:
                    slot += skip
                    if slot >= size:
                        slot -= size
                table[slot] = owner
                slots[each] = (slot + skip) % size
                left -= 1
                if not left:
                    break
        self._table = table

    def index(self, key: int, attempt: int) -> int:
        if attempt:
            key ^= _64_BITS - attempt + 1  # ~0 - attempt + 1 (Envoy's MaglevTable::chooseHost)
        return self._table[key % self._size]

    def __len__(self) -> int:
        return self._size


def build_table(cluster: Cluster, targets: Sequence[Target], weights: Sequence[float]) -> Table:
    """The table of the cluster's policy. Takes tens of milliseconds for maglev: not for the hot path."""
    keys = [target.endpoint.hash_key or target.endpoint.authority for target in targets]
    sizes = cluster.hash_table
    if cluster.load_balancing is LoadBalancing.MAGLEV:
        return Maglev(keys, weights, sizes.maglev_size)
    return Ring(keys, weights, sizes.minimum_ring_size, sizes.maximum_ring_size)


class HashPicker:
    """Looks a key up among the endpoints that are ready. A call without a key gets a random one (Envoy)."""

    __slots__ = ("_is_ready", "_name", "_random", "_ready", "_table", "_targets")

    def __init__(
        self,
        name: str,
        table: Table,
        targets: Sequence[Target],
        is_ready: Callable[[Target], bool],
        rng: random.Random,
    ) -> None:
        self._name = name
        self._table = table
        self._targets = tuple(targets)
        ready = [is_ready(target) for target in targets]
        self._is_ready = None if all(ready) else ready
        self._ready = sum(ready)
        self._random = rng.getrandbits

    def pick(
        self, now: float = 0.0, key: int | None = None, attempt: int = 0, avoid: Collection[int] = ()
    ) -> Target | None:
        if not self._ready:
            return None
        if key is None:
            key = self._random(64)
        ready = self._is_ready
        if ready is None:
            return self._targets[self._table.index(key, attempt)]
        # With few left ready, more looks are needed to meet one; each is independent of the one before.
        for look in range(attempt, attempt + 64):
            index = self._table.index(key, look)
            if ready[index]:
                return self._targets[index]
        left = [target for target, is_ready in zip(self._targets, ready, strict=True) if is_ready]
        return left[key % len(left)]

    def __repr__(self) -> str:
        return f"<Picker {self._name} {self._ready} ready>"
