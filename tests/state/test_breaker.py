"""When a circuit opens, what may pass then, and who has no say in it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pybreaker
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.model import BreakerRules, Cluster, LoadAssignment
from meshlib.policy.cluster import LiveCluster
from meshlib.state.breaker import Breaker, Permit
from snapshots import Clock

EVENTS = ("take", "success", "failure", "cancel", "wait", "open", "close")


def made(clock: Clock | None = None, is_shadow: bool = False, **rules: Any) -> tuple[Breaker, Clock]:
    clock = clock or Clock()
    return Breaker(BreakerRules(**{"open_for": 30.0, **rules}), "reviews", is_shadow, clock), clock


def take(breaker: Breaker, clock: Clock) -> Permit:
    permit = breaker.acquire(clock.now)
    assert permit is not None
    return permit


def fail(breaker: Breaker, clock: Clock, times: int = 1, seconds: float = 0.1) -> None:
    for _ in range(times):
        take(breaker, clock).failure(seconds, clock.now)


def succeed(breaker: Breaker, clock: Clock, times: int = 1, seconds: float = 0.1) -> None:
    for _ in range(times):
        take(breaker, clock).success(seconds, clock.now)


def test_failures_in_a_row_open_it_and_a_success_begins_anew() -> None:
    """Two and a good one and two are nothing; three are enough."""
    breaker, clock = made(consecutive_failures=3)
    fail(breaker, clock, 2)
    succeed(breaker, clock)
    fail(breaker, clock, 2)
    assert breaker.current_state == pybreaker.STATE_CLOSED
    fail(breaker, clock)
    assert breaker.current_state == pybreaker.STATE_OPEN
    assert breaker.acquire(clock.now) is None
    assert breaker.refused == 1


def test_after_its_time_probes_pass_and_close_it() -> None:
    """As many at a time as `probes`, as many successes to close."""
    breaker, clock = made(consecutive_failures=1, probes=2)
    fail(breaker, clock)
    clock.now += 29.9
    assert breaker.acquire(clock.now) is None
    clock.now += 0.1
    first, second = take(breaker, clock), take(breaker, clock)
    assert breaker.acquire(clock.now) is None, "two probes are under way"
    assert breaker.current_state == pybreaker.STATE_HALF_OPEN
    first.success(0.1, clock.now)
    assert breaker.current_state == pybreaker.STATE_HALF_OPEN
    second.success(0.1, clock.now)
    assert breaker.current_state == pybreaker.STATE_CLOSED


def test_a_probe_that_fails_opens_it_again() -> None:
    """For the whole time."""
    breaker, clock = made(consecutive_failures=1)
    fail(breaker, clock)
    clock.now += 30
    fail(breaker, clock)
    assert breaker.current_state == pybreaker.STATE_OPEN
    clock.now += 29
    assert breaker.acquire(clock.now) is None


def test_a_cancelled_probe_makes_room_for_another() -> None:
    """And says nothing about the destination."""
    breaker, clock = made(consecutive_failures=1)
    fail(breaker, clock)
    clock.now += 30
    take(breaker, clock).cancel()
    succeed(breaker, clock)
    assert breaker.current_state == pybreaker.STATE_CLOSED


def test_results_of_an_earlier_generation_mean_nothing() -> None:
    """A late success of the time before does not close what was opened since; a late failure opens nothing."""
    breaker, clock = made(consecutive_failures=1)
    early, also_early = take(breaker, clock), take(breaker, clock)
    fail(breaker, clock)
    early.success(60.0, clock.now)
    assert breaker.current_state == pybreaker.STATE_OPEN
    clock.now += 30
    succeed(breaker, clock)
    also_early.failure(90.0, clock.now)
    assert breaker.current_state == pybreaker.STATE_CLOSED


def test_only_the_first_word_on_a_permit_counts() -> None:
    """A call's clean-up may cancel what has ended already."""
    breaker, clock = made(consecutive_failures=2)
    permit = take(breaker, clock)
    permit.failure(0.1, clock.now)
    permit.failure(0.1, clock.now)
    permit.cancel()
    assert breaker.fail_counter == 1


def test_a_failure_rate_needs_a_minimum_of_calls() -> None:
    """Half of twenty; of nineteen it is nothing yet."""
    breaker, clock = made(failure_rate=50.0, minimum_calls=20)
    for number in range(19):
        (fail if number % 2 else succeed)(breaker, clock)
    assert breaker.current_state == pybreaker.STATE_CLOSED
    fail(breaker, clock)
    assert breaker.current_state == pybreaker.STATE_OPEN


def test_the_window_forgets() -> None:
    """Failures of eleven seconds ago do not count in a window of ten."""
    breaker, clock = made(failure_rate=50.0, minimum_calls=10, window=10.0)
    fail(breaker, clock, 9)
    clock.now += 11
    succeed(breaker, clock, 9)
    fail(breaker, clock)
    assert breaker.current_state == pybreaker.STATE_CLOSED


def test_slow_calls_open_it_too() -> None:
    """Also when they succeed, and a slow probe opens it again."""
    breaker, clock = made(slow_call_rate=50.0, slow_call=1.0, minimum_calls=4)
    succeed(breaker, clock, 2, seconds=0.9)
    succeed(breaker, clock, 2, seconds=1.0)
    assert breaker.current_state == pybreaker.STATE_OPEN
    clock.now += 30
    succeed(breaker, clock, seconds=2.0)
    assert breaker.current_state == pybreaker.STATE_OPEN


def test_shadow_mode_decides_and_lets_all_through() -> None:
    """What would have been refused is counted, and after its time it is probed as if it were in force."""
    breaker, clock = made(is_shadow=True, consecutive_failures=1)
    fail(breaker, clock)
    assert breaker.current_state == pybreaker.STATE_OPEN
    fail(breaker, clock, 3)
    assert breaker.refused == 3
    clock.now += 30
    succeed(breaker, clock)
    assert breaker.current_state == pybreaker.STATE_CLOSED


class Listener(pybreaker.CircuitBreakerListener):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
        self.seen.append("before")

    def success(self, cb: Any) -> None:
        self.seen.append("success")

    def failure(self, cb: Any, exc: BaseException) -> None:
        self.seen.append("failure")

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        self.seen.append(f"{old_state.name}->{new_state.name}")


def test_pybreakers_listeners_hear_everything() -> None:
    """Those that a team has already."""
    breaker, clock = made(consecutive_failures=1)
    heard = Listener()
    breaker.add_listener(heard)
    fail(breaker, clock)
    clock.now += 30
    succeed(breaker, clock)
    assert heard.seen == [
        *("before", "failure", "closed->open"),
        *("open->half-open", "before", "success", "half-open->closed"),
    ]


def test_a_listener_that_raises_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged; the state changes all the same, and nothing stays locked."""

    class Bad(pybreaker.CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            raise RuntimeError("no")

        def failure(self, cb: Any, exc: BaseException) -> None:
            raise RuntimeError("no")

    breaker, clock = made(consecutive_failures=1)
    breaker.add_listener(Bad())
    fail(breaker, clock)
    assert breaker.current_state == pybreaker.STATE_OPEN
    assert "a listener of the breaker of reviews raised" in caplog.text
    clock.now += 30
    succeed(breaker, clock)
    assert breaker.current_state == pybreaker.STATE_CLOSED


def test_it_can_be_opened_and_closed_by_hand() -> None:
    """pybreaker's own methods, for a runbook."""
    breaker, clock = made()
    breaker.open()
    assert breaker.acquire(clock.now) is None
    breaker.half_open()
    assert breaker.acquire(clock.now) is not None
    breaker.close()
    assert breaker.acquire(clock.now) is not None


def test_threads_do_not_wait_for_each_other() -> None:
    """Eight calls are under way at once, which pybreaker's own `call` would let in one after the other."""
    breaker, _ = made(consecutive_failures=5)
    together = threading.Barrier(8)

    def one() -> None:
        breaker.call(together.wait, 10)  # passes only when all eight are inside

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not together.broken
    assert breaker.fail_counter == 0


async def test_coroutines_are_judged_by_their_end_and_cancellation_by_nothing() -> None:
    """As a decorator, which pybreaker's own would count as a success when the coroutine is made."""
    breaker, _ = made(consecutive_failures=1)
    entered = asyncio.Event()

    @breaker
    async def stalls() -> None:
        entered.set()
        await asyncio.Event().wait()

    @breaker
    async def fails() -> None:
        raise ValueError("no")

    task = asyncio.create_task(stalls())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert breaker.current_state == pybreaker.STATE_CLOSED
    with pytest.raises(ValueError, match="no"):
        await fails()
    with pytest.raises(pybreaker.CircuitBreakerError, match="Breaker reviews open"):
        await fails()


def test_an_update_keeps_the_state() -> None:
    """A cluster's new form has the breaker of the old, under the new rules; without rules there is none."""
    import random

    rules = BreakerRules(consecutive_failures=1)
    first = LiveCluster(Cluster("c", breaker=rules), LoadAssignment("c"), random.Random(1))
    assert first.breaker is not None
    first.breaker.open()
    changed = Cluster("c", breaker=BreakerRules(consecutive_failures=9, open_for=1.0))
    second = LiveCluster(changed, LoadAssignment("c"), random.Random(1), first)
    assert second.breaker is first.breaker
    assert (second.breaker.current_state, second.breaker.fail_max) == (pybreaker.STATE_OPEN, 9)
    assert LiveCluster(Cluster("c"), LoadAssignment("c"), random.Random(1), second).breaker is None


@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "success", "failure", "cancel", "wait", "open", "close"]), st.integers(0, 9))
    ),
    st.integers(1, 3),
)
def test_counts_stay_true_whatever_happens(events: list[tuple[str, int]], probes: int) -> None:
    """Never more probes than allowed, never a negative count, and an open circuit lets nobody through."""
    breaker, clock = made(
        consecutive_failures=2, failure_rate=60.0, slow_call_rate=80.0, minimum_calls=3, probes=probes, open_for=5.0
    )
    out: list[Permit] = []
    for event, number in events:
        if event == "take":
            before = breaker.current_state
            permit = breaker.acquire(clock.now)
            if permit is not None:
                out.append(permit)
            assert permit is not None or before != pybreaker.STATE_CLOSED
        elif event == "wait":
            clock.now += number
        elif event in ("open", "close"):
            getattr(breaker, event)()
        elif out:
            permit = out.pop(number % len(out))
            permit.cancel() if event == "cancel" else getattr(permit, event)(0.1, clock.now)
        assert 0 <= breaker._probing <= probes
        assert breaker.fail_counter >= 0
        window = breaker._window
        assert 0 <= window.failures <= window.calls
        if breaker.current_state == pybreaker.STATE_HALF_OPEN:
            assert sum(permit.generation == breaker.generation for permit in out) == breaker._probing


def test_an_operators_word_goes_before_what_is_counted() -> None:
    """Open for as long as it is said, whatever time passes; then probes decide. Closed, however much fails."""
    breaker, clock = made(consecutive_failures=1)
    breaker.update(BreakerRules(consecutive_failures=1, forced="open"), False)
    clock.now += 3600.0
    assert breaker.acquire(clock.now) is None
    breaker.close()
    assert not breaker.adopt(pybreaker.STATE_CLOSED, 0.0)
    assert breaker.current_state == pybreaker.STATE_OPEN
    breaker.update(BreakerRules(consecutive_failures=1), False)
    assert breaker.current_state == pybreaker.STATE_HALF_OPEN
    succeed(breaker, clock)
    assert breaker.current_state == pybreaker.STATE_CLOSED
    breaker.update(BreakerRules(consecutive_failures=1, forced="closed"), False)
    fail(breaker, clock, 5)
    assert breaker.current_state == pybreaker.STATE_CLOSED
    assert "as the configuration says" in repr(breaker)
    breaker.update(BreakerRules(consecutive_failures=1), False)
    fail(breaker, clock)
    assert breaker.current_state == pybreaker.STATE_OPEN


def test_one_that_is_made_open_is_open() -> None:
    """Without any rule by which it would open."""
    breaker, clock = made(forced="open")
    assert breaker.acquire(clock.now) is None
