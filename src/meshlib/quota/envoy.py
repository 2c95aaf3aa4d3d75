"""How is a rate limit service asked that Envoys ask, too? envoy.service.ratelimit.v3.RateLimitService, as its client.

The channel is the mesh's: the service is found, balanced and secured as any other. asyncio uses the same channel, by
its futures, so no connection belongs to a loop.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from meshlib.model import QuotaService
from meshlib.policy.quota import Answer, Pairs, Question
from meshlib.xds import messages as m

if TYPE_CHECKING:
    import grpc

_OK, _OVER_LIMIT = 1, 2
_SECONDS = {1: 1, 2: 60, 3: 3600, 4: 86_400, 5: 2_592_000, 6: 31_536_000, 7: 604_800}
"""Of RateLimit.Unit: second, minute, hour, day, month, year, week."""


class RateLimitService:
    """One service, behind a channel of its own."""

    def __init__(self, service: QuotaService, channel: grpc.Channel) -> None:
        self._service, self._channel = service, channel
        self._method: Any = channel.unary_unary(m.SHOULD_RATE_LIMIT, m.serialize, m.RateLimitResponse.FromString)

    def ask(self, question: Question) -> Answer:
        # A call that blocks would wait longer, should the name have to be asked for first.
        call = self._method.future(self._request(question), timeout=self._service.timeout)
        try:
            return _answer(call.result(self._service.timeout))
        finally:
            call.cancel()  # means nothing once it is over

    async def ask_async(self, question: Question) -> Answer:
        loop = asyncio.get_running_loop()
        over = loop.create_future()

        def ended(_: Any) -> None:
            try:
                loop.call_soon_threadsafe(lambda: None if over.done() else over.set_result(None))
            except RuntimeError:  # that loop is closed, and who asked is gone with it
                pass

        call = self._method.future(self._request(question), timeout=self._service.timeout)
        try:
            call.add_done_callback(ended)
            async with asyncio.timeout(self._service.timeout):
                await over
            return _answer(call.result())
        finally:
            call.cancel()

    def _request(self, question: Question) -> Any:
        request = m.RateLimitRequest(domain=self._service.domain, hits_addend=question.quota.hits)
        for descriptor in question.descriptors:
            entries = request.descriptors.add().entries
            for key, value in descriptor:
                entries.add(key=key, value=value)
        return request

    def close(self) -> None:
        self._channel.close()

    async def aclose(self) -> None:
        """Nothing does."""

    def __repr__(self) -> str:
        return f"<RateLimitService {self._service}>"


def _answer(response: Any) -> Answer:
    """Of several limits, the one that is nearest to its end is told (Envoy, XRateLimitHeaderUtils)."""
    told = [each for each in response.statuses if each.HasField("current_limit")]
    if response.overall_code not in (_OK, _OVER_LIMIT):
        raise ValueError("the answer has no overall_code")
    answer = Answer(
        response.overall_code == _OVER_LIMIT,
        response_headers=_pairs(response.response_headers_to_add),
        request_headers=_pairs(response.request_headers_to_add),
        body=response.raw_body,
    )
    if not told:
        return answer
    nearest = min(told, key=lambda each: each.limit_remaining)
    until = nearest.duration_until_reset
    return answer._replace(
        limit=nearest.current_limit.requests_per_unit,
        window=_SECONDS.get(nearest.current_limit.unit, 1),
        remaining=nearest.limit_remaining,
        reset=until.seconds + until.nanos / 1e9,
    )


def _pairs(headers: Any) -> Pairs:
    return tuple((each.key.lower(), each.value) for each in headers)
