"""How much of a shared quota has this process used?"""

from __future__ import annotations

from typing import Protocol

from meshlib.state import forks


class Told(Protocol):
    """What an answer says (policy.quota.Answer). limit: 0 where it does not tell what is left."""

    @property
    def is_over(self) -> bool: ...
    @property
    def limit(self) -> int: ...
    @property
    def remaining(self) -> int: ...


class QuotaUse:
    """Thread-safe. allowed, limited, failed: calls by the answer that they got; failed: none came. remaining: what the
    last answer that told it said is left, None before the first."""

    __slots__ = ("_lock", "allowed", "failed", "limited", "remaining")

    def __init__(self) -> None:
        self._lock = forks.lock()
        self.allowed = self.limited = self.failed = 0
        self.remaining: int | None = None

    def count(self, answer: Told | None) -> None:
        with self._lock:
            if answer is None:
                self.failed += 1
                return
            if answer.is_over:
                self.limited += 1
            else:
                self.allowed += 1
            if answer.limit:
                self.remaining = answer.remaining

    def __repr__(self) -> str:
        return f"<QuotaUse {self.allowed} allowed, {self.limited} limited, {self.failed} without an answer>"
