"""Runs the core's generator by hand: each step as it comes, each outcome as the test wants it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from meshlib.model import Headers, Outcome, Request
from meshlib.policy.call import CallContext, outbound_call
from meshlib.policy.steps import Deliver, Finished, Flow, Mirror, Queue, Race, Reply, Resolve, Send, Step, Wait, Win


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
        self._clock = clock
        self._left = list(outcomes) or [responded()]
        self.go_on()

    def go_on(self) -> None:
        """To the last step, or to a queue in which the call has to wait; then once more when its turn has come, or
        when its time there is over."""
        answer: Outcome | None = None
        while True:
            step = self.flow.send(answer)
            self.steps.append(step)
            answer = None
            if isinstance(step, (Reply, Deliver, Queue)):
                break
            if isinstance(step, Send):
                answer = self._left.pop(0) if len(self._left) > 1 else self._left[0]
            elif isinstance(step, Wait) and self._clock is not None:
                self._clock.now += step.seconds

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


class Answer(NamedTuple):
    """What a scripted server does with one attempt: `outcome`, `seconds` after it was sent."""

    outcome: Outcome
    seconds: float = 0.0


class Timeline:
    """One flow over scripted servers on a clock of its own: what outbound/drive does, with attempts side by side, but
    in no time. Attempt n is answered by `answers[n]` (the last one repeats); one that takes longer than it may ends as
    a timeout then.

    sent: when each attempt was sent, and what. outcomes: as the core was told them. lost: attempts of races that did
    not win. watch: called after every step.
    """

    def __init__(self, given: Request, context: CallContext, clock: Any, answers: Sequence[Answer]) -> None:
        self.flow: Flow = outbound_call(given, context)
        self.clock = clock
        self.sent: list[tuple[float, Send]] = []
        self.waits: list[float] = []
        self.outcomes: list[Outcome] = []
        self.lost = 0
        self.watch: Callable[[], None] = lambda: None
        self._answers = list(answers)

    def run(self, until: float | None = None) -> Reply | Deliver | None:
        """To the last step, which is returned; None when the caller has gone at `until`. A Reply ends the flow."""
        answer: Outcome | Finished | None = None
        out: list[tuple[float, int, Outcome]] = []
        racers: list[Callable[[], None]] = []
        try:
            while True:
                if until is not None and self.clock.now >= until:
                    self.flow.close()
                    return None
                step = self.flow.send(answer)
                answer = None
                if isinstance(step, Race) and step.start is not None and step.ended is not None:
                    ends, outcome = self._send(step.start)
                    heapq.heappush(out, (ends, len(racers), outcome))
                    racers.append(step.ended)
                self.watch()
                if isinstance(step, Reply):
                    self.flow.close()
                    return step
                if isinstance(step, Deliver):
                    return step
                if isinstance(step, Wait):
                    self.waits.append(step.seconds)
                    self.clock.now += step.seconds
                elif isinstance(step, Queue):
                    ends = until if step.seconds is None else self.clock.now + step.seconds
                    assert ends is not None, "a call waits for its turn for ever"
                    self.clock.now = ends
                elif isinstance(step, Send):
                    self.clock.now, answer = self._send(step)
                    self.outcomes.append(answer)
                elif isinstance(step, Race):
                    gives_up = None if step.seconds is None else self.clock.now + step.seconds
                    if out and (gives_up is None or out[0][0] <= gives_up):
                        ends, number, outcome = heapq.heappop(out)
                        self.clock.now = max(self.clock.now, ends)
                        answer = Finished(number, outcome)
                        self.outcomes.append(outcome)
                    else:
                        assert gives_up is not None, "a race without attempts and without an end"
                        self.clock.now = gives_up
                elif isinstance(step, Win):
                    self._end(racers, step.number)
                    out, racers = [], []
        finally:
            self._end(racers, None)

    def _send(self, step: Send) -> tuple[float, Outcome]:
        number = min(len(self.sent), len(self._answers) - 1)
        self.sent.append((self.clock.now, step))
        outcome, seconds = self._answers[number]
        if step.timeout is not None and seconds >= step.timeout:
            return self.clock.now + step.timeout, failed("timeout")
        return self.clock.now + seconds, outcome

    def _end(self, racers: Sequence[Callable[[], None]], winner: int | None) -> None:
        for number, ended in enumerate(racers):
            if number != winner:
                self.lost += 1
                ended()
