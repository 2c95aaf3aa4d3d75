"""What do guards have to ask the world? The keys of issuers, and external authorizers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshlib.identity.jwks import MAX_BYTES, JwksCache
from meshlib.policy.admission import Authorize, FetchKeys, Question
from meshlib.state import forks

if TYPE_CHECKING:
    import grpc
    import httpx

    from meshlib.model import Authorizer


class AuthorizationEdge:
    """Thread-safe; opens nothing before it is asked. transport: makes the one that calls go through; channel: one to
    an authority, for authorizers that speak gRPC."""

    def __init__(
        self,
        transport: Callable[[], httpx.BaseTransport],
        channel: Callable[[str], grpc.Channel],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport, self._open = transport, channel
        self._channels: dict[str, grpc.Channel] = {}
        self._lock = forks.lock()
        self._made: httpx.Client | None = None
        self._keys = JwksCache(self._fetch, clock)

    def ready(self, question: FetchKeys) -> Any:
        return self._keys.at_hand(question.provider, question.unknown)

    def answer(self, question: Question) -> Any:
        if isinstance(question, FetchKeys):
            return self._keys.wait(question.provider, question.unknown)
        assert isinstance(question, Authorize)  # quotas are asked elsewhere
        if question.authorizer.kind == "http":
            from meshlib.inbound import ext_authz

            return ext_authz.ask(self._client(), question)
        from meshlib.inbound import ext_authz_grpc

        return ext_authz_grpc.ask(self._channel(question.authorizer), question)

    def _channel(self, authorizer: Authorizer) -> grpc.Channel:
        target = f"{authorizer.host}:{authorizer.port}"
        with self._lock:
            found = self._channels.get(target)
            if found is None:
                found = self._channels[target] = self._open(target)
            return found

    def _client(self) -> httpx.Client:
        import httpx

        with self._lock:
            if self._made is None:
                self._made = httpx.Client(transport=self._transport())
            return self._made

    def _fetch(self, url: str, timeout: float) -> str:
        # httpx's timeout is between two bytes; what trickles in is given up here.
        until = time.monotonic() + timeout
        with self._client().stream("GET", url, timeout=timeout, headers={"accept": "application/json"}) as response:
            if response.status_code != 200:
                raise ValueError(f"answered {response.status_code}")
            text = bytearray()
            for chunk in response.iter_bytes():
                text += chunk
                if len(text) > MAX_BYTES:
                    raise ValueError(f"is larger than {MAX_BYTES} bytes")
                if time.monotonic() > until:
                    raise ValueError(f"was not complete in {timeout:g} s")
        return text.decode("utf-8")
