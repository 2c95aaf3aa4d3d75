"""Does one more call fit into a quota? Passes the question to whoever counts, sync and async, and bears with his
silence.

Nothing is opened before the first question. No lock is held while one is out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from meshlib.model import QuotaService
from meshlib.policy.quota import Answer, Question
from meshlib.state import forks

if TYPE_CHECKING:
    import grpc

_log = logging.getLogger("meshlib.quota")


class Counter(Protocol):
    """Who counts. Both raise what goes wrong, after the service's timeout at the latest. Called from any thread, and
    from any event loop."""

    def ask(self, question: Question) -> Answer: ...
    async def ask_async(self, question: Question) -> Answer: ...
    def close(self) -> None: ...
    async def aclose(self) -> None:
        """Give up what belongs to this event loop."""


class QuotaEdge:
    """All services that are asked by one process (policy.quota.Quotas). Thread-safe.

    channel: makes the gRPC channel to a rate limit service.
    """

    def __init__(self, channel: Callable[[QuotaService], grpc.Channel]) -> None:
        self._channel = channel
        self._lock = forks.lock()
        self._counters: dict[QuotaService, Counter] = {}
        self._failing: set[QuotaService] = set()

    def ask(self, question: Question) -> Answer | None:
        service = question.quota.service
        try:
            answer = self._counter(service).ask(question)
        except Exception as error:
            self._unanswered(service, error)
            return None
        self._answered(service)
        return answer

    async def ask_async(self, question: Question) -> Answer | None:
        service = question.quota.service
        try:
            answer = await self._counter(service).ask_async(question)
        except Exception as error:
            self._unanswered(service, error)
            return None
        self._answered(service)
        return answer

    def prepare(self, services: Iterable[QuotaService]) -> None:
        """Load and make what asking these will take, off the hot path. Opens no connection, and raises nothing: what
        is missing is said now, not with the first call."""
        for service in services:
            try:
                self._counter(service)
            except Exception as error:
                self._unanswered(service, error)

    def _counter(self, service: QuotaService) -> Counter:
        found = self._counters.get(service)
        if found is not None:
            return found
        with self._lock:
            if service not in self._counters:
                self._counters[service] = self._made(service)
            return self._counters[service]

    def _made(self, service: QuotaService) -> Counter:
        if service.kind == "redis":
            from meshlib.quota.redis import RedisCounter

            return RedisCounter(service)
        from meshlib.quota.envoy import RateLimitService

        return RateLimitService(service, self._channel(service))

    def _unanswered(self, service: QuotaService, error: Exception) -> None:
        if service not in self._failing:  # once, not with every call
            self._failing.add(service)
            result = "denied" if service.denies_on_failure else "let pass"
            _log.warning("%s does not answer, calls are %s: %s", service, result, _told(error))

    def _answered(self, service: QuotaService) -> None:
        if service in self._failing:
            self._failing.discard(service)
            _log.info("%s answers again", service)

    def close(self) -> None:
        with self._lock:
            counters, self._counters = list(self._counters.values()), {}
        for each in counters:
            each.close()

    async def aclose(self) -> None:
        """Give up what belongs to this event loop, before it ends. Others are not touched; all can be asked on."""
        for each in list(self._counters.values()):
            await each.aclose()

    def __repr__(self) -> str:
        return f"<QuotaEdge {', '.join(map(str, self._counters)) or 'nobody asked yet'}>"


def _told(error: Exception) -> str:
    if callable(code := getattr(error, "code", None)):  # grpc.RpcError
        return f"{code().name} {getattr(error, 'details', str)()}"
    return f"{type(error).__name__} {error}".strip().partition("\n")[0]
