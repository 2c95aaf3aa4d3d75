"""What have the other workers found out? Circuit breakers that tell each other, through Redis, that a circuit is open
or closed again.

pybreaker's CircuitRedisStorage asks Redis for each call, and lets a call wait for it. Here every process decides by its
own breaker, and one thread beside it passes on what has changed: a circuit that one worker has opened is open in all of
them about a second later, for the rest of its time, and when the probes of one succeed it is closed in all. Results of
single calls are not shared, so a worker opens a circuit by what it has seen itself. Without Redis each goes on alone,
and says so in the log; when Redis is back, circuits that are open are told again.

Needs redis, which is imported here alone.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import pybreaker

from meshlib.errors import SettingsError

if TYPE_CHECKING:
    from meshlib.state.breaker import Breaker

INTERVAL = 0.5
"""Seconds between two looks at what the others say. A change of our own is told at once."""
_LONGEST_PAUSE = 5.0
"""Seconds between two tries while Redis does not answer."""
_TIMEOUT = 2.0
_KEPT = 3600.0
"""Seconds for which a closed circuit is remembered; an open one, for that beyond its own time."""
_TOLD = (pybreaker.STATE_OPEN, pybreaker.STATE_CLOSED)
_log = logging.getLogger("meshlib")

# Redis's clock is everybody's. The number tells a record from the one before it, also where both say the same.
_TELL = """
local now = redis.call('TIME')
redis.call('HSET', KEYS[1], 'state', ARGV[1], 'by', ARGV[2], 'at', now[1] * 1000 + math.floor(now[2] / 1000))
redis.call('HINCRBY', KEYS[1], 'number', 1)
redis.call('PEXPIRE', KEYS[1], ARGV[3])
"""


class _Record(NamedTuple):
    state: str
    by: str
    at: int
    number: int


def _nobody() -> None: ...


class SharedBreakers:
    """The breakers of one process, by the name of their cluster, and the thread that keeps them in step with others.

    address: `redis://host:6379/0`, `rediss://`, `unix://`. scope: who shares, as `default/reviews-v2`: processes that
    call from elsewhere may find the same destination in another state. breakers: those of today, asked on each round.
    """

    def __init__(self, address: str, scope: str, breakers: Callable[[], Mapping[str, Breaker]]) -> None:
        """Raises SettingsError for an address that can't be one, and where redis is missing."""
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise SettingsError(
                f"breakers shared through Redis need the extra redis (pip install 'meshlib-proxyless[redis]'): {error}"
            ) from None
        backoff: Any = NoBackoff
        retry: Any = Retry
        try:
            self._redis: Any = redis.Redis.from_url(
                address,
                socket_timeout=_TIMEOUT,
                socket_connect_timeout=_TIMEOUT,
                decode_responses=True,
                retry=retry(backoff(), 0),  # the next round is the next try
            )
        except ValueError as error:
            raise SettingsError(
                f"breaker_storage {address!r}: {error}; give redis://host:port/0, rediss:// or unix:///path"
            ) from None
        self._failure: type[Exception] = redis.RedisError
        self._scope, self._breakers = scope, breakers
        self._me = uuid.uuid4().hex
        self._told: dict[str, tuple[Breaker, int]] = {}
        """By cluster: the breaker, and its generation that the others know."""
        self._seen: dict[str, _Record] = {}
        self.is_reachable = True
        self._news = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def update(self) -> None:
        """There are new breakers, perhaps. The thread starts with the first."""
        found = self._breakers()
        for breaker in found.values():
            breaker.changed = self._news.set
        if found and self._thread is None and not self._stopping.is_set():
            self._thread = threading.Thread(target=self._run, name="meshlib-breakers", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread, within seconds even if Redis hangs. Breakers stay as they are."""
        self._stopping.set()
        self._news.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_TIMEOUT + 1)
        self._redis.close()

    def forget(self) -> None:
        """In a forked child: the thread is the parent's, and it may have held then what a change would wake it by."""
        for breaker in self._breakers().values():
            breaker.changed = _nobody

    def _run(self) -> None:
        pause = INTERVAL
        while not self._stopping.is_set():
            self._news.clear()
            try:
                self.synchronize()
            except self._failure as error:
                if self.is_reachable:
                    _log.warning("breakers are this process's own until Redis answers: %s", error)
                self.is_reachable = False
                pause = min(pause * 2, _LONGEST_PAUSE)
                self._stopping.wait(pause)
                continue
            except Exception:
                _log.exception("breakers could not be shared")
            pause = INTERVAL
            if not self._news.wait(INTERVAL):
                continue
            self._stopping.wait(0.01)  # several that change at once are told together

    def synchronize(self) -> None:
        """One round: tell what is new here, then take over what is new elsewhere. Raises redis.RedisError."""
        found = self._breakers()
        names = sorted(found)
        if not self.is_reachable:
            self._told.clear()  # what Redis knew may be lost
        for name in names:
            self._tell(name, found[name])
        if names:
            self._take_over(found, names)
        if not self.is_reachable:
            self.is_reachable = True
            _log.info("breakers are shared again")

    def _tell(self, name: str, breaker: Breaker) -> None:
        known = self._told.get(name)
        generation, phase = breaker.generation, breaker.current_state
        if known is not None and known == (breaker, generation):
            return
        is_new = known is None or known[0] is not breaker
        # What was taken over is known already, and a circuit that has always been closed is no news.
        if phase in _TOLD and not breaker.is_adopted and not (is_new and phase == pybreaker.STATE_CLOSED):
            kept = _KEPT + (breaker.rules.open_for if phase == pybreaker.STATE_OPEN else 0.0)
            self._redis.eval(_TELL, 1, self._key(name), phase, self._me, int(kept * 1000))
        self._told[name] = breaker, generation

    def _take_over(self, found: Mapping[str, Breaker], names: list[str]) -> None:
        asked = self._redis.pipeline(transaction=False)
        asked.time()
        for name in names:
            asked.hmget(self._key(name), "state", "by", "at", "number")
        (seconds, microseconds), *answers = asked.execute()
        now = seconds * 1000 + microseconds // 1000
        for name, (state, by, at, number) in zip(names, answers, strict=True):
            if state not in _TOLD:
                continue  # nobody has said anything
            record = _Record(state, by or "", int(at or 0), int(number or 0))
            if record == self._seen.get(name):
                continue
            self._seen[name] = record
            if record.by != self._me:
                self._adopt(name, found[name], state, max(0, now - record.at) / 1000)

    def _adopt(self, name: str, breaker: Breaker, state: str, age: float) -> None:
        phase = breaker.current_state
        if phase == state or (state == pybreaker.STATE_OPEN and age >= breaker.rules.open_for):
            return
        if not breaker.adopt(state, age):
            return
        self._told[name] = breaker, breaker.generation
        _log.info("the circuit of %s is %s: another process says so", name, state)

    def _key(self, name: str) -> str:
        return f"meshlib:breaker:{self._scope}:{name}"

    def __repr__(self) -> str:
        return f"<SharedBreakers {self._scope}, {'shared' if self.is_reachable else 'alone, Redis does not answer'}>"
