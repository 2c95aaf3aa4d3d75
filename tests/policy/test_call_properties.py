"""What holds for every call, whatever its servers do, its route says and its caller does."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from flows import Answer, Timeline, failed, request, responded
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlib.model import (
    SHADOWABLE,
    BreakerRules,
    Cluster,
    ConnectionLimits,
    Fault,
    FaultAbort,
    FaultDelay,
    HashPolicy,
    HashTable,
    HeaderOperations,
    HedgePolicy,
    LoadBalancing,
    Outcome,
    OutlierDetection,
    RateBudget,
    RetryBudget,
    RetryPolicy,
)
from meshlib.policy.call import CallContext, outbound_call
from meshlib.policy.cluster import LiveCluster
from meshlib.policy.live import Live
from meshlib.policy.observer import Attempt, Call, Served
from meshlib.policy.retry import CONDITIONS, IDEMPOTENT
from meshlib.policy.steps import Deliver, Finished, Flow, Queue, Race, Reply, Send, Wait, Win
from meshlib.state.breaker import Breaker, Permit
from snapshots import Clock, context, forward, live, route, snapshot

UNSEEN = {"connect-failure", "refused-stream", "reset-before-request"}

seconds = st.sampled_from([0.001, 0.05, 0.1, 0.3, 1.0, 5.0])
outcomes = st.one_of(
    st.builds(
        responded,
        st.sampled_from([200, 404, 409, 429, 500, 503, 504]),
        st.dictionaries(
            st.sampled_from(
                ["grpc-status", "retry-after", "x-ratelimit-reset", "grpc-retry-pushback-ms", "x-envoy-ratelimited"]
            ),
            st.sampled_from(["0", "1", "14", "-1", "x", ""]),
        ),
        st.booleans(),
    ),
    st.builds(
        failed,
        st.sampled_from([*UNSEEN, "reset", "timeout", "client-timeout", "local"]),
        st.booleans(),
    ),
)
answers = st.lists(st.builds(Answer, outcomes, seconds | st.just(0.0)), min_size=1, max_size=8)
policies = st.builds(
    RetryPolicy,
    attempts=st.integers(0, 4),
    on=st.frozensets(st.sampled_from(sorted(CONDITIONS))),
    status_codes=st.frozensets(st.sampled_from([404, 429, 503])),
    per_try_timeout=st.none() | seconds,
    base_interval=seconds,
    max_interval=seconds,
    retry_remote_localities=st.booleans(),
    resend_unsafe=st.booleans(),
)
hedges = st.none() | st.builds(HedgePolicy, delay=seconds | st.just(0.0), max_attempts=st.integers(1, 4))
faults = st.none() | st.builds(
    Fault,
    st.none() | st.builds(FaultDelay, seconds, st.sampled_from([0, 500_000, 1_000_000])),
    st.none() | st.builds(FaultAbort, st.sampled_from([0, 500_000]), st.just(500)),
)
clusters = st.builds(
    Cluster,
    st.just("c"),
    load_balancing=st.sampled_from(list(LoadBalancing)),
    hash_table=st.just(HashTable(16, 64, 251)),
    limits=st.builds(
        ConnectionLimits,
        max_requests=st.none() | st.integers(0, 4),
        max_connections=st.none() | st.integers(1, 4),
        max_pending_requests=st.none() | st.integers(0, 2),
        max_retries=st.none() | st.integers(0, 2),
    ),
    breaker=st.none() | st.builds(BreakerRules, consecutive_failures=st.integers(0, 2), open_for=seconds),
    retry_budget=st.none()
    | st.builds(RetryBudget, st.sampled_from([0.0, 20.0, 100.0]), st.integers(0, 2))
    | st.builds(RateBudget, ratio=st.sampled_from([0.0, 0.2]), min_per_second=st.sampled_from([0.0, 0.2, 1.0])),
    outlier_detection=st.none() | st.builds(OutlierDetection, consecutive_5xx=st.just(2)),
    shadow=st.frozensets(st.sampled_from(sorted(SHADOWABLE))),
)
requests = st.builds(
    request,
    method=st.sampled_from(["GET", "PUT", "POST"]),
    headers=st.dictionaries(
        st.sampled_from(["x-envoy-retry-on", "x-envoy-max-retries"]), st.sampled_from(["5xx,reset", "0", "3", "?"])
    ),
)


@dataclass
class SpiedPermit:
    permit: Permit
    told: list[str] = field(default_factory=list)

    def success(self, seconds: float, now: float) -> None:
        self.told.append("success")
        self.permit.success(seconds, now)

    def failure(self, seconds: float, now: float) -> None:
        self.told.append("failure")
        self.permit.failure(seconds, now)

    def cancel(self) -> None:
        self.told.append("cancel")
        self.permit.cancel()


class SpiedBreaker:
    """The real one, whose permits remember what they were told."""

    def __init__(self, breaker: Breaker | None) -> None:
        self.breaker = breaker
        self.permits: list[SpiedPermit] = []

    def acquire(self, now: float) -> SpiedPermit | None:
        assert self.breaker is not None
        permit = self.breaker.acquire(now)
        if permit is None:
            return None
        self.permits.append(SpiedPermit(permit))
        return self.permits[-1]


@dataclass
class World:
    """One route to one cluster, and what a call there may do."""

    live: Live
    cluster: LiveCluster
    breaker: SpiedBreaker
    clock: Clock
    timeout: float | None
    hedge: HedgePolicy | None
    policy: RetryPolicy

    def check(self) -> None:
        state = self.cluster.state
        assert state.retries >= 0
        limits = self.cluster.cluster.limits
        assert state.requests >= 0
        if "limits" not in self.cluster.cluster.shadow:
            assert limits.max_requests is None or state.requests <= limits.max_requests
            assert limits.max_connections is None or state.requests <= limits.max_connections
            assert limits.max_pending_requests is None or len(state.queue) <= limits.max_pending_requests
        assert all(target.state.in_flight >= 0 for target in self.cluster.targets)

    def check_empty(self) -> None:
        state = self.cluster.state
        assert (state.requests, state.retries) == (0, 0)
        assert [target.state.in_flight for target in self.cluster.targets] == [0] * len(self.cluster.targets)
        assert not state.queue
        # Of what a permit is told, the first counts, and it is always told something.
        assert all(permit.told for permit in self.breaker.permits)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    policy = draw(policies)
    timeout, hedge = draw(st.none() | seconds), draw(hedges)
    keys = draw(st.sampled_from([(), (HashPolicy("cookie", "session", ttl=0.0),)]))
    action = forward("c", timeout=timeout, hedge=hedge, retry=policy, hash_policies=keys)
    addresses = [(f"10.0.0.{n}", 80) for n in range(draw(st.integers(0, 3)))]
    given = snapshot({"reviews:9080": [route(action, fault=draw(faults))]}, {"c": (draw(clusters), addresses)})
    current = live(given, draw(st.integers(0, 99)))
    cluster = current.clusters["c"]
    breaker: Any = SpiedBreaker(cluster.breaker)
    if cluster.breaker is not None:
        cluster.breaker = breaker
    return World(current, cluster, breaker, Clock(), timeout, hedge, policy)


@settings(max_examples=400, deadline=None)
@given(
    world=worlds(),
    given_request=requests,
    script=answers,
    remaining=st.none() | st.sampled_from([-1.0, 0.0, 0.2, 2.0]),
    gone=st.none() | seconds,
    seed=st.integers(0, 99),
)
def test_every_call_ends_in_one_result_and_leaves_nothing_behind(
    world: World, given_request: Any, script: list[Answer], remaining: float | None, gone: float | None, seed: int
) -> None:
    """Whatever the servers answer and whenever the caller goes: no attempt after a deadline or beyond the number
    allowed, none that may be carried out twice unless allowed, and every count is back at zero."""
    start = world.clock.now
    deadline = None if remaining is None else start + remaining
    asked = context(world.live, world.clock, seed, deadline=deadline)
    timeline = Timeline(given_request, asked, world.clock, script)
    timeline.watch = world.check
    last = timeline.run(None if gone is None else start + gone)

    if isinstance(last, Deliver):
        assert timeline.sent
        assert world.cluster.state.requests == 1
        timeline.flow.close()
    world.check_empty()
    if last is not None:
        assert timeline.flow.gi_frame is None or isinstance(last, Deliver)

    ends = deadline
    for at, send in timeline.sent:
        assert send.timeout is None or send.timeout > 0
        if ends is not None:
            assert at < ends
            assert send.timeout is not None
            assert at + send.timeout <= ends + 1e-9
    if world.timeout is not None and timeline.sent:
        begun = timeline.sent[0][0]
        assert all(at < begun + world.timeout for at, _ in timeline.sent)

    # A number that the request asks for replaces the route's (1 where its route has no policy).
    number = given_request.headers.get("x-envoy-max-retries")
    attempts = int(number) if number in ("0", "3") else max(1, world.policy.attempts)
    hedged = 0 if world.hedge is None else world.hedge.max_attempts - 1
    assert len(timeline.sent) <= 1 + attempts + hedged

    resends = given_request.method in IDEMPOTENT or world.policy.resend_unsafe
    for outcome in timeline.outcomes[:-1] if timeline.lost == 0 else []:
        if not resends:
            assert outcome.failure in UNSEEN
        if world.hedge is None:
            assert outcome.replayable


class Bystander:
    """An observer that keeps what it is told, in order; for some calls it adds headers."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def call_began(self, call: Call) -> None:
        self.told.append(("began", 0))

    def attempt_began(self, call: Call, attempt: Attempt) -> HeaderOperations | None:
        self.told.append(("attempt", attempt.number))
        return HeaderOperations(set=(("x-number", str(attempt.number)),)) if attempt.number % 2 else None

    def attempt_ended(self, call: Call, attempt: Attempt) -> None:
        assert attempt.ended >= attempt.began
        self.told.append(("ended", attempt.number))

    def call_ended(self, call: Call) -> None:
        assert call.ended >= call.began
        assert call.status or call.flags
        self.told.append(("over", call.attempts))

    def serving(self, served: Served) -> None: ...
    def served(self, served: Served) -> None: ...

    def check(self) -> None:
        attempts = [kind for kind, _ in self.told].count("attempt")
        assert self.told[0] == ("began", 0)
        assert self.told[-1] == ("over", attempts)
        assert [kind for kind, _ in self.told].count("over") == 1
        numbers = list(range(1, attempts + 1))
        assert [number for kind, number in self.told if kind == "attempt"] == numbers
        assert sorted(number for kind, number in self.told if kind == "ended") == numbers
        for number in numbers:
            assert self.told.index(("attempt", number)) < self.told.index(("ended", number))


@settings(max_examples=150, deadline=None)
@given(
    world=worlds(),
    given_request=requests,
    script=answers,
    steps=st.integers(0, 12),
    seed=st.integers(0, 99),
    leaving=st.sampled_from(["close", "throw"]),
)
def test_who_looks_on_is_told_of_every_end_once_wherever_the_call_stops(
    world: World, given_request: Any, script: list[Answer], steps: int, seed: int, leaving: str
) -> None:
    """After any step its caller goes or an error is thrown in: each attempt that began has ended, before the call has,
    and a call that never began is not told of."""
    bystander = Bystander()
    observed = context(world.live, world.clock, seed, observer=bystander, call=Call())
    timeline = Timeline(given_request, observed, world.clock, script)
    taken = 0

    class Stopped(Exception):
        pass

    def watch() -> None:
        nonlocal taken
        world.check()
        taken += 1
        if taken > steps:
            raise Stopped

    timeline.watch = watch
    if steps:
        try:
            timeline.run()
        except Stopped:
            pass
    if leaving == "throw" and timeline.flow.gi_frame is not None:
        with pytest.raises(Stopped):
            timeline.flow.throw(Stopped())
    timeline.flow.close()
    world.check_empty()
    if steps:
        bystander.check()
    else:
        assert not bystander.told


class Player:
    """One call in a crowd: advanced step by step, by a driver that does what is legal, in any order."""

    def __init__(self, flow: Flow, clock: Clock, rng: random.Random, outcomes: list[Outcome]) -> None:
        self.flow, self.clock, self.rng, self.outcomes = flow, clock, rng, outcomes
        self.racers: dict[int, Any] = {}
        self.unanswered: list[int] = []
        self.count = 0
        self.step: Any = None
        self.take(next(flow))

    def take(self, step: Any) -> None:
        self.step = step
        if isinstance(step, Race) and step.start is not None:
            self.racers[self.count] = step.ended
            self.unanswered.append(self.count)
            self.count += 1

    def advance(self) -> bool:
        """One step; False when the call is over."""
        step, answer = self.step, None
        if self.rng.random() < 0.05 or isinstance(step, (Reply, Deliver)):  # the end, or the caller has gone
            self.flow.close()
            self.give_up(None)
            return False
        if isinstance(step, Send):
            answer = self.rng.choice(self.outcomes)
        elif isinstance(step, Wait):
            self.clock.now += step.seconds
        elif isinstance(step, Queue):
            if not step.ticket.is_granted:
                if step.seconds is None or self.rng.random() < 0.7:
                    return True  # still waiting
                self.clock.now += step.seconds
        elif isinstance(step, Race):
            if step.seconds is not None and (not self.unanswered or self.rng.random() < 0.5):
                self.clock.now += step.seconds
            else:
                number = self.unanswered.pop(self.rng.randrange(len(self.unanswered)))
                answer = Finished(number, self.rng.choice(self.outcomes))
        elif isinstance(step, Win):
            self.give_up(step.number)
        self.clock.now += self.rng.random() * 0.01
        self.take(self.flow.send(answer))
        return True

    def give_up(self, winner: int | None) -> None:
        for number, ended in self.racers.items():
            if number != winner:
                ended()
        self.racers = {}


@settings(max_examples=150, deadline=None)
@given(world=worlds(), script=st.lists(outcomes, min_size=1, max_size=5), seed=st.integers(0, 9999))
def test_a_crowd_of_calls_keeps_every_limit_and_leaves_nothing_behind(
    world: World, script: list[Outcome], seed: int
) -> None:
    """Calls that overlap in any order, with races and cancellations: no counter is ever negative or above its limit."""
    rng = random.Random(seed)
    asked = CallContext(lambda: world.live, world.clock, rng)
    players = [Player(outbound_call(request(), asked), world.clock, rng, script) for _ in range(8)]
    for _ in range(500):
        if not players:
            break
        chosen = rng.randrange(len(players))
        before = world.cluster.state.retries
        if not players[chosen].advance():
            del players[chosen]
        world.check()
        after, cluster = world.cluster.state.retries, world.cluster.cluster
        if after > before and cluster.retry_budget is None and "retry-budget" not in cluster.shadow:
            assert cluster.limits.max_retries is None or after <= cluster.limits.max_retries
    for player in players:
        player.flow.close()
        player.give_up(None)
    world.check_empty()
