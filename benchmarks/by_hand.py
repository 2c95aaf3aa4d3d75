"""What would a team write without a mesh? httpx with tenacity around it and pybreaker around the service, as their
documentation shows it: retries with a jittered back-off, and a circuit breaker. Connections, balancing, subsets, time
limits and routes are left out: by hand there would be none.
"""

from __future__ import annotations

from typing import Any

import httpx
import pybreaker
import tenacity

_RETRYING: dict[str, Any] = {
    "stop": tenacity.stop_after_attempt(3),
    "wait": tenacity.wait_random_exponential(multiplier=0.025, max=0.25),
    "retry": tenacity.retry_if_exception_type(httpx.TransportError),
    "reraise": True,
}


class ByHand(httpx.Client):
    """`@retry` over `@breaker`. pybreaker holds its lock for the whole call (danielfm/pybreaker#3), so threads queue
    up; that is what its documented use costs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        breaker = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=30)
        self.get = tenacity.retry(**_RETRYING)(breaker(super().get))  # type: ignore[method-assign]


class AsyncByHand(httpx.AsyncClient):
    """`@retry` over `with breaker.calling()`, the one form that does not count a coroutine's making as its success."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._breaker = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=30)
        self._plain_get = super().get

    @tenacity.retry(**_RETRYING)
    async def get(self, *arguments: Any, **options: Any) -> httpx.Response:
        with self._breaker.calling():
            return await self._plain_get(*arguments, **options)
