"""How much of a shared quota has this process used?"""

from __future__ import annotations

import threading


class QuotaUse:
    """Thread-safe. allowed, limited, failed: calls by the answer that they got; failed: none came. remaining: what the
    last answer said that is left, None before the first."""

    __slots__ = ("_lock", "allowed", "failed", "limited", "remaining")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.allowed = self.limited = self.failed = 0
        self.remaining: int | None = None

    def count(self, is_over: bool | None, remaining: int | None = None) -> None:
        """is_over: None when there was no answer."""
        with self._lock:
            if is_over is None:
                self.failed += 1
                return
            if is_over:
                self.limited += 1
            else:
                self.allowed += 1
            if remaining is not None:
                self.remaining = remaining

    def __repr__(self) -> str:
        return f"<QuotaUse {self.allowed} allowed, {self.limited} limited, {self.failed} without an answer>"
