"""Runs the core's generator by hand: each step as it comes, each outcome as the test wants it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshlib.model import Headers, Outcome, Request
from meshlib.policy.call import CallContext, outbound_call
from meshlib.policy.steps import Deliver, Flow, Mirror, Reply, Resolve, Send, Step, Wait


def request(
    url: str = "http://reviews:9080/reviews/0", method: str = "GET", headers: Mapping[str, str] | None = None
) -> Request:
    scheme, _, rest = url.partition("://")
    authority, mark, path = rest.partition("/")
    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    return Request(method, scheme, authority, mark + path, Headers(raw))


def responded(status: int = 200, headers: Mapping[str, str] | None = None, replayable: bool = True) -> Outcome:
    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    return Outcome(status, Headers(raw), "", replayable)


def failed(failure: str, replayable: bool = True) -> Outcome:
    return Outcome(None, None, failure, replayable)


class Run:
    """One flow, driven with `outcomes` in turn (the last one repeats) until its last step."""

    def __init__(self, given: Request, context: CallContext, *outcomes: Outcome, clock: Any = None) -> None:
        self.flow: Flow = outbound_call(given, context)
        self.steps: list[Step] = []
        left = list(outcomes) or [responded()]
        answer: Outcome | None = None
        while True:
            step = self.flow.send(answer)
            self.steps.append(step)
            answer = None
            if isinstance(step, (Reply, Deliver)):
                break
            if isinstance(step, Send):
                answer = left.pop(0) if len(left) > 1 else left[0]
            elif isinstance(step, Wait) and clock is not None:
                clock.now += step.seconds

    @property
    def last(self) -> Reply | Deliver:
        step = self.steps[-1]
        assert isinstance(step, (Reply, Deliver))
        return step

    @property
    def reply(self) -> Reply:
        assert isinstance(self.last, Reply), self.steps
        return self.last

    @property
    def sends(self) -> list[Send]:
        return [step for step in self.steps if isinstance(step, Send)]

    @property
    def waits(self) -> list[float]:
        return [step.seconds for step in self.steps if isinstance(step, Wait)]

    @property
    def mirrors(self) -> list[Mirror]:
        return [step for step in self.steps if isinstance(step, Mirror)]

    @property
    def resolved(self) -> list[str]:
        return [step.authority for step in self.steps if isinstance(step, Resolve)]
