"""What is asked of whoever counts for all processes, and what does he say? The core asks, the edge (meshlib.quota)
does the I/O."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from meshlib.model import Quota
from meshlib.policy.descriptors import Descriptor

Pairs = tuple[tuple[str, str], ...]


class Question(NamedTuple):
    """Does one more call fit into `quota`? descriptors: of this call; for Redis exactly one."""

    quota: Quota
    descriptors: tuple[Descriptor, ...]


class Answer(NamedTuple):
    """is_over: it does not. limit, window: so many in so many seconds; 0 is not told. remaining: calls left. reset:
    seconds until there may be more. response_headers, request_headers, body: what the service adds."""

    is_over: bool
    limit: int = 0
    window: int = 0
    remaining: int = 0
    reset: float = 0.0
    response_headers: Pairs = ()
    request_headers: Pairs = ()
    body: bytes = b""


class Quotas(Protocol):
    """Who gets the answers. Both forms wait no longer than the service's timeout for anything, hold no lock meanwhile,
    and never raise but what must end the call (cancellation): None is no answer."""

    def ask(self, question: Question) -> Answer | None: ...
    async def ask_async(self, question: Question) -> Answer | None: ...
