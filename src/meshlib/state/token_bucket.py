"""How many tokens are left? A bucket that fills steadily, as Envoy's; and buckets by key, a bounded number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from meshlib.state import forks

MAX_KEYS = 10_000
"""Buckets of one limit. Beyond that the one that was asked for longest ago is forgotten, which is full again when it is
asked for: whoever can make up that many keys can't be limited by them anyway."""


_SECOND = 1_000_000_000


class TokenBucket:
    """Full at first. Not thread-safe by itself: Buckets holds the lock. now: monotonic seconds; one that is earlier
    than the last, as threads may bring it, adds nothing.

    Kept in whole numbers, or sums of fractions would decide on who gets the last token: a token is worth as many units
    as the interval has nanoseconds, and each nanosecond adds `per_fill` of them.
    """

    __slots__ = ("_at", "_full", "_per_fill", "_token", "_units")

    def __init__(self, most: int, per_fill: int, interval: float, now: float) -> None:
        self._token, self._per_fill = max(1, round(interval * _SECOND)), per_fill
        self._units = self._full = most * self._token
        self._at = round(now * _SECOND)

    @property
    def tokens(self) -> int:
        """How many there were when it was last asked."""
        return self._units // self._token

    def take(self, now: float) -> bool:
        """One token, if there is one."""
        at = round(now * _SECOND)
        if at > self._at:
            self._units = min(self._full, self._units + (at - self._at) * self._per_fill)
            self._at = at
        if self._units < self._token:
            return False
        self._units -= self._token
        return True

    def wait(self) -> float:
        """Seconds from the last take until there is a token; 0 where there is one."""
        return max(0, -((self._units - self._token) // self._per_fill)) / _SECOND

    def __repr__(self) -> str:
        return f"<TokenBucket {self.tokens} of {self._full // self._token}>"


class Buckets:
    """The buckets of one limit, by key. Thread-safe; the lock is held for a few sums."""

    __slots__ = ("_buckets", "_interval", "_lock", "_most", "_per_fill", "allowed", "limited", "max_keys")

    def __init__(self, most: int, per_fill: int, interval: float, max_keys: int = MAX_KEYS) -> None:
        self._most, self._per_fill, self._interval = most, per_fill, interval
        self._lock = forks.lock()
        self._buckets: OrderedDict[Hashable, TokenBucket] = OrderedDict()
        self.max_keys = max_keys
        self.allowed = 0
        self.limited = 0

    def take(self, key: Hashable, now: float) -> tuple[bool, int, float]:
        """Whether there was a token; how many are left, and in how many seconds the next
        can be taken (0: now)."""
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
            return taken, bucket.tokens, bucket.wait()

    @property
    def left(self) -> int:
        """Tokens in the one bucket of calls without a key, when it was last asked."""
        bucket = self._buckets.get(())
        return self._most if bucket is None else bucket.tokens

    def __repr__(self) -> str:
        return f"<Buckets {len(self._buckets)} keys, {self.allowed} allowed, {self.limited} limited>"
