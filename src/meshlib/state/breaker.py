"""Is a destination so ill that it should be left alone? A circuit breaker for a whole cluster: pybreaker's, with
permits.

pybreaker's names, states, listeners, storages and error stay; its `call` holds a lock for as long as the guarded call
takes, counts a coroutine's making as its success, and lets a late answer of an earlier state decide about the present
one. So a call takes a Permit here when it begins and says with it how it ended: results of an earlier generation mean
nothing, probes are bounded, a cancelled call is neither a success nor a failure, and the lock is held for a few
additions. Listeners are told after it was given back; one that raises is logged and hurts nobody.

This module loads pybreaker, which loads redis where that is installed: it is imported for clusters with a breaker only.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pybreaker

from meshlib.errors import UpstreamFailure
from meshlib.model import BreakerRules
from meshlib.state import forks

_log = logging.getLogger("meshlib")
_BUCKETS = 10
"""Parts of the window; the oldest is forgotten as a new one begins (as in Linkerd's breaker)."""
_PHASES = (pybreaker.STATE_CLOSED, pybreaker.STATE_OPEN, pybreaker.STATE_HALF_OPEN)
T = TypeVar("T")


class Permit:
    """One call's leave to go out. Exactly one of success, failure and cancel counts: the first. Any thread."""

    __slots__ = ("_breaker", "_is_done", "generation")

    def __init__(self, breaker: Breaker, generation: int) -> None:
        self._breaker = breaker
        self.generation = generation
        self._is_done = False

    def success(self, seconds: float, now: float) -> None:
        """It was answered after `seconds`. now: monotonic seconds."""
        if not self._is_done:
            self._is_done = True
            self._breaker._ended(self, False, seconds, now, None)

    def failure(self, seconds: float, now: float, error: BaseException | None = None) -> None:
        """It failed. error: for listeners."""
        if not self._is_done:
            self._is_done = True
            self._breaker._ended(self, True, seconds, now, error)

    def cancel(self) -> None:
        """Its caller gave up; that says nothing about the destination."""
        if not self._is_done:
            self._is_done = True
            self._breaker._cancelled(self)


class Window:
    """Calls of the last `seconds`, in buckets: how many, how many failed, how many were slow. O(1) for each."""

    __slots__ = ("_at", "_buckets", "_width", "calls", "failures", "slow")

    def __init__(self, seconds: float) -> None:
        self._width = seconds / _BUCKETS
        self.clear()

    def clear(self) -> None:
        self.calls = self.failures = self.slow = 0
        self._at = 0
        self._buckets = [[0, 0, 0] for _ in range(_BUCKETS)]

    def add(self, failed: bool, slow: bool, now: float) -> None:
        at = int(now / self._width)
        if at > self._at:
            for old in range(max(self._at + 1, at - _BUCKETS + 1), at + 1):
                bucket = self._buckets[old % _BUCKETS]
                self.calls -= bucket[0]
                self.failures -= bucket[1]
                self.slow -= bucket[2]
                bucket[:] = (0, 0, 0)
            self._at = at
        bucket = self._buckets[at % _BUCKETS]
        bucket[0] += 1
        bucket[1] += failed
        bucket[2] += slow
        self.calls += 1
        self.failures += failed
        self.slow += slow


class Breaker(pybreaker.CircuitBreaker):
    """A pybreaker.CircuitBreaker whose calls take permits. Thread-safe, and safe for asyncio: nothing waits.

    `add_listener`, `current_state`, `open()`, `close()`, `half_open()`, `fail_counter` and the rest are pybreaker's.
    """

    def __init__(
        self,
        rules: BreakerRules,
        name: str = "",
        is_shadow: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._phase: str = pybreaker.STATE_CLOSED
        super().__init__(name=name, throw_new_error_on_trip=False)
        self._clock = clock
        forks.reopen(self._lock)  # pybreaker's
        self._own = forks.lock()
        self._opened = 0.0
        self._in_a_row = 0
        self._probing = 0
        self._good_probes = 0
        self.generation = 0
        """Counts the changes of state."""
        self.refused = 0
        """Calls that were not let through; in shadow mode, that would not have been."""
        self._is_forced = False
        self.is_adopted = False
        """Whether the present state was taken over from another process."""
        self.changed: Callable[[], object] = _nothing
        """Called after each change of state; must not block (state/shared_breaker)."""
        self.rules = rules
        self._window = Window(rules.window)
        self.update(rules, is_shadow)

    def update(self, rules: BreakerRules, is_shadow: bool) -> None:
        """New rules for the same destination. The state stays; the window begins anew when its length changed."""
        with self._own:
            if self.rules.window != rules.window:
                self._window = Window(rules.window)
            self.rules, self.is_shadow = rules, is_shadow
            self._counts_rates = bool(rules.failure_rate or rules.slow_call_rate)
            has_changed = self._obey()
        self._fail_max, self._reset_timeout = rules.consecutive_failures, rules.open_for
        self._success_threshold = rules.probes
        if has_changed:
            self._publish()

    def _obey(self) -> bool:
        """An operator's word goes before what is counted. When it is taken back, an open circuit lets probes through
        at once: how its destination does is not known. Whether the state is another. With the lock held."""
        forced, was = self.rules.forced, self._is_forced
        self._is_forced = bool(forced)
        if forced:
            wanted = pybreaker.STATE_OPEN if forced == "open" else pybreaker.STATE_CLOSED
        elif was and self._phase is pybreaker.STATE_OPEN:
            wanted = pybreaker.STATE_HALF_OPEN
        else:
            return False
        if self._phase is wanted and was:
            return False
        # The others have the same configuration: there is nothing to tell them.
        self._become(wanted, self._clock(), is_adopted=True)
        return True

    # What calls ask

    def acquire(self, now: float) -> Permit | None:
        """Leave for one call, or None: the circuit is open, or enough probes are under way."""
        if self._phase is pybreaker.STATE_CLOSED:  # read without the lock: a call more or less at the change is nothing
            if self._listeners:
                self._tell("before_call", None)
            return Permit(self, self.generation)
        changed = False
        permit: Permit | None = None
        with self._own:
            has_waited = not self._is_forced and now - self._opened >= self.rules.open_for
            if self._phase is pybreaker.STATE_OPEN and has_waited:
                self._become(pybreaker.STATE_HALF_OPEN, now)
                changed = True
            if self._phase is pybreaker.STATE_CLOSED:
                permit = Permit(self, self.generation)
            elif self._phase is pybreaker.STATE_HALF_OPEN and self._probing < self.rules.probes:
                self._probing += 1
                permit = Permit(self, self.generation)
            else:
                self.refused += 1
                if self.is_shadow:
                    permit = Permit(self, -1)  # of no generation: how it ends decides nothing
        if changed:
            self._publish()
        if permit is not None and self._listeners:
            self._tell("before_call", None)
        return permit

    def _ended(self, permit: Permit, failed: bool, seconds: float, now: float, error: BaseException | None) -> None:
        if self._listeners:
            self._tell("failure" if failed else "success", error)
        if not failed and not self._in_a_row and not self._counts_rates and self._phase is pybreaker.STATE_CLOSED:
            return  # nothing that it could change
        with self._own:
            if permit.generation != self.generation or self._is_forced:
                return
            before = self._phase
            rules = self.rules
            is_slow = seconds >= rules.slow_call
            if before is pybreaker.STATE_HALF_OPEN:
                self._probing -= 1
                self._in_a_row = self._in_a_row + 1 if failed else 0
                if failed or (is_slow and rules.slow_call_rate):
                    self._become(pybreaker.STATE_OPEN, now)
                else:
                    self._good_probes += 1
                    if self._good_probes >= rules.probes:
                        self._become(pybreaker.STATE_CLOSED, now)
            else:
                self._in_a_row = self._in_a_row + 1 if failed else 0
                if self._counts_rates:
                    self._window.add(failed, is_slow, now)
                if self._trips():
                    self._become(pybreaker.STATE_OPEN, now)
            changed = self._phase is not before
        if changed:
            self._publish()

    def _trips(self) -> bool:
        rules, window = self.rules, self._window
        if 0 < rules.consecutive_failures <= self._in_a_row:
            return True
        if not self._counts_rates or window.calls < max(1, rules.minimum_calls):
            return False
        if rules.failure_rate and 100 * window.failures >= rules.failure_rate * window.calls:
            return True
        return bool(rules.slow_call_rate) and 100 * window.slow >= rules.slow_call_rate * window.calls

    def _cancelled(self, permit: Permit) -> None:
        with self._own:
            if permit.generation == self.generation and self._phase is pybreaker.STATE_HALF_OPEN:
                self._probing -= 1

    # Changes of state

    def _become(self, phase: str, now: float, opened: float | None = None, is_adopted: bool = False) -> None:
        """With the lock held."""
        self._phase = phase
        self.generation += 1
        self.is_adopted = is_adopted
        self._probing = self._good_probes = 0
        if phase is pybreaker.STATE_OPEN:
            self._opened = now if opened is None else opened
        elif phase is pybreaker.STATE_CLOSED:
            self._in_a_row = 0
            self._window.clear()

    def _publish(self) -> None:
        """Bring pybreaker's storage to where we are, which tells its listeners. Never with our lock held."""
        self.changed()
        with self._lock:
            phase = self._phase
            if super().current_state == phase:
                return
            try:
                if phase is pybreaker.STATE_OPEN:
                    super().open()
                elif phase is pybreaker.STATE_HALF_OPEN:
                    super().half_open()
                else:
                    super().close()
            except Exception:
                _log.exception("a listener of the breaker of %s raised", self.name)

    def _tell(self, event: str, error: BaseException | None) -> None:
        for listener in self.listeners:
            try:
                if event == "before_call":
                    listener.before_call(self, _nothing)
                elif event == "success":
                    listener.success(self)
                else:
                    listener.failure(self, error or UpstreamFailure(f"a call to {self.name} failed"))
            except Exception:
                _log.exception("a listener of the breaker of %s raised", self.name)

    def open(self) -> bool:
        """Let nothing through for `open_for` seconds. As pybreaker's. While the configuration forces a state, this, and
        the two below, have no effect."""
        return self._set(pybreaker.STATE_OPEN)

    def half_open(self) -> None:
        """Let probes through. As pybreaker's."""
        self._set(pybreaker.STATE_HALF_OPEN)

    def close(self) -> None:
        """Let everything through. As pybreaker's."""
        self._set(pybreaker.STATE_CLOSED)

    def _set(self, phase: str) -> bool:
        with self._own:
            if self._is_forced:
                return False
            self._become(phase, self._clock())
        self._publish()
        return False

    def adopt(self, phase: str, age: float) -> bool:
        """Another process says that the circuit is open or closed, since `age` seconds (state/shared_breaker). False
        where the configuration says otherwise."""
        now = self._clock()
        with self._own:
            if self._is_forced:
                return False
            self._become(_PHASES[_PHASES.index(phase)], now, now - age, is_adopted=True)
        self._publish()
        return True

    @property
    def fail_counter(self) -> int:
        """Failures in a row."""
        return self._in_a_row

    @property
    def success_counter(self) -> int:
        """Good probes since the circuit was half-opened."""
        return self._good_probes

    @property
    def current_state(self) -> str:
        return self._phase

    # pybreaker's own way to call, kept for those who know it, by permits

    def call(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call `func` under a permit. Raises pybreaker.CircuitBreakerError when there is none. No lock is held."""
        with self.calling():
            return func(*args, **kwargs)

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """`with breaker.calling():`, also around an `await`."""
        began = self._clock()
        permit = self.acquire(began)
        if permit is None:
            raise pybreaker.CircuitBreakerError(f"{self!r}")
        try:
            yield
        except Exception as error:
            now = self._clock()
            if self.is_system_error(error):
                permit.failure(now - began, now, error)
            else:
                permit.success(now - began, now)
            raise
        except BaseException:
            permit.cancel()
            raise
        now = self._clock()
        permit.success(now - began, now)

    def __call__(self, *call_args: Any, **call_kwargs: Any) -> Any:
        """As a decorator, of functions and of coroutine functions."""

        def guarded(func: Callable[..., Any]) -> Callable[..., Any]:
            if inspect.iscoroutinefunction(func):

                @functools.wraps(func)
                async def later(*args: Any, **kwargs: Any) -> Any:
                    with self.calling():
                        return await func(*args, **kwargs)

                return later

            @functools.wraps(func)
            def now(*args: Any, **kwargs: Any) -> Any:
                return self.call(func, *args, **kwargs)

            return now

        return guarded(call_args[0]) if call_args else guarded

    def __repr__(self) -> str:
        shadow = ", as another process says" if self.is_adopted else ""
        shadow = ", as the configuration says" if self._is_forced else shadow
        shadow += ", shadow" if self.is_shadow else ""
        return (
            f"<Breaker {self.name} {self._phase}, {self._in_a_row} failures in a row, {self.refused} refused{shadow}>"
        )


def _nothing() -> None: ...
