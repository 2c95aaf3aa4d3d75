"""How many tokens are left? A bucket that is filled in steps, as Envoy's; and buckets by key, a bounded number."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

MAX_KEYS = 10_000
"""Buckets of one limit. Beyond that the one that was asked for longest ago is forgotten, which is full again when it is
asked for: whoever can make up that many keys can't be limited by them anyway."""


class TokenBucket:
    """Full at first. Not thread-safe by itself: Buckets holds the lock. now: monotonic seconds, which never go back."""

    __slots__ = ("_filled_at", "interval", "most", "per_fill", "tokens")

    def __init__(self, most: int, per_fill: int, interval: float, now: float) -> None:
        self.most, self.per_fill, self.interval = most, per_fill, interval
        self.tokens = most
        self._filled_at = now

    def take(self, now: float) -> bool:
        """One token, if there is one."""
        self._fill(now)
        if not self.tokens:
            return False
        self.tokens -= 1
        return True

    def next_fill(self, now: float) -> float:
        """Seconds until there are more."""
        return max(0.0, self._filled_at + self.interval - now)

    def _fill(self, now: float) -> None:
        steps = int((now - self._filled_at) // self.interval)
        if steps > 0:
            self.tokens = min(self.most, self.tokens + steps * self.per_fill)
            self._filled_at += steps * self.interval

    def __repr__(self) -> str:
        return f"<TokenBucket {self.tokens} of {self.most}>"


class Buckets:
    """The buckets of one limit, by key. Thread-safe; the lock is held for a few sums."""

    __slots__ = ("_buckets", "_interval", "_lock", "_most", "_per_fill", "allowed", "limited", "max_keys")

    def __init__(self, most: int, per_fill: int, interval: float, max_keys: int = MAX_KEYS) -> None:
        self._most, self._per_fill, self._interval = most, per_fill, interval
        self._lock = threading.Lock()
        self._buckets: OrderedDict[Hashable, TokenBucket] = OrderedDict()
        self.max_keys = max_keys
        self.allowed = 0
        self.limited = 0

    def take(self, key: Hashable, now: float) -> tuple[bool, int, float]:
        """Whether there was a token; how many are left, and in how many seconds there are more."""
        with self._lock:
            bucket = self._buckets.get(key)
            if bucket is None:
                bucket = self._buckets[key] = TokenBucket(self._most, self._per_fill, self._interval, now)
                if len(self._buckets) > self.max_keys:
                    self._buckets.popitem(last=False)
            else:
                self._buckets.move_to_end(key)
            taken = bucket.take(now)
            if taken:
                self.allowed += 1
            else:
                self.limited += 1
            return taken, bucket.tokens, bucket.next_fill(now)

    def __repr__(self) -> str:
        return f"<Buckets {len(self._buckets)} keys, {self.allowed} allowed, {self.limited} limited>"
