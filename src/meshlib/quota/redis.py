"""How do all processes count in one Redis? By the library `limits`: a sliding window, moved on by a script in Redis,
so one round trip decides, and no two processes can take the same last call.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import weakref
from typing import Any
from urllib.parse import quote

from meshlib.errors import SettingsError
from meshlib.model import Quota, QuotaService
from meshlib.policy.quota import Answer, Question
from meshlib.state import forks

_NAMESPACE = "meshlib"
_LONGEST = 128
"""Characters of a value in a key; a longer one is there by its digest."""


class RedisCounter:
    """One Redis. A client for all threads, and one for each event loop, since connections belong to theirs."""

    def __init__(self, service: QuotaService) -> None:
        """Raises SettingsError where the libraries are missing."""
        try:
            from limits import RateLimitItemPerSecond
            from limits.storage import storage_from_string
            from limits.strategies import SlidingWindowCounterRateLimiter
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise SettingsError(
                f"a quota in Redis needs the extra quota (pip install 'meshlib-proxyless[quota]'): {error}"
            ) from None

        self._service = service
        self._item = RateLimitItemPerSecond
        self._options: dict[str, Any] = {
            "socket_timeout": service.timeout,
            "socket_connect_timeout": service.timeout,
        }
        backoff: Any = NoBackoff
        self._never = backoff(), 0  # the client's own default is to try again for seconds
        retry: Any = Retry
        self._storage: Any = storage_from_string(service.address, retry=retry(*self._never), **self._options)
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)
        self._lock = forks.lock()
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = weakref.WeakKeyDictionary()

    def ask(self, question: Question) -> Answer:
        quota = question.quota
        item, names = self._counted(question)
        fits = self._limiter.hit(item, *names, cost=quota.hits)
        if fits and not quota.answers:
            return Answer(False)
        reset, remaining = self._limiter.get_window_stats(item, *names)
        return _answer(quota, fits, reset, remaining)

    async def ask_async(self, question: Question) -> Answer:
        quota = question.quota
        item, names = self._counted(question)
        limiter = self._of_this_loop()
        async with asyncio.timeout(self._service.timeout):
            fits = await limiter.hit(item, *names, cost=quota.hits)
            if fits and not quota.answers:
                return Answer(False)
            reset, remaining = await limiter.get_window_stats(item, *names)
        return _answer(quota, fits, reset, remaining)

    def _counted(self, question: Question) -> tuple[Any, list[str]]:
        quota = question.quota
        item = self._item(quota.requests, quota.interval, _NAMESPACE)
        return item, [_part(quota.name), *(_part(value) for _, value in question.descriptors[0])]

    def _of_this_loop(self) -> Any:
        loop = asyncio.get_running_loop()
        with self._lock:
            found = self._by_loop.get(loop)
            if found is None:
                from limits.aio.strategies import SlidingWindowCounterRateLimiter
                from limits.storage import storage_from_string
                from redis.asyncio.retry import Retry

                retry: Any = Retry
                address = f"async+{self._service.address}"
                storage: Any = storage_from_string(
                    address, implementation="redispy", retry=retry(*self._never), **self._options
                )
                found = self._by_loop[loop] = SlidingWindowCounterRateLimiter(storage)
        return found

    def close(self) -> None:
        """The threads' connections; those of a loop end with it."""
        self._storage.storage.close()

    async def aclose(self) -> None:
        with self._lock:
            limiter = self._by_loop.pop(asyncio.get_running_loop(), None)
        if limiter is not None:
            await limiter.storage.bridge.storage.aclose()

    def __repr__(self) -> str:
        return f"<RedisCounter {self._service}>"


def _part(value: str) -> str:
    """Of a key whose parts stand between slashes: what a caller sends must not reach into another part."""
    if len(value) > _LONGEST:
        return hashlib.sha256(value.encode("utf-8", "surrogateescape")).hexdigest()
    return quote(value, safe="", errors="surrogateescape")


def _answer(quota: Quota, fits: bool, reset: float, remaining: int) -> Answer:
    """reset: seconds since 1970."""
    return Answer(not fits, quota.requests, quota.interval, remaining if fits else 0, max(0.0, reset - time.time()))
