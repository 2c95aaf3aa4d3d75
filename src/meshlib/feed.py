"""How does configuration come into force in a process? Feed: compiles what a source says, swaps it in, wakes who waits.

Beside `live` run what it asks for: look-ups of names, active health checks, breakers shared with other workers. Each is
started by the first configuration that needs it, and by no other.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from meshlib.errors import MeshClosed
from meshlib.model import ClusterType, Snapshot
from meshlib.policy.live import Live, compile_live, empty_live
from meshlib.settings import Settings

if TYPE_CHECKING:
    from meshlib.discovery import Source
    from meshlib.discovery.addresses import Addresses
    from meshlib.discovery.health import HealthChecker
    from meshlib.identity.tls import TlsContexts
    from meshlib.policy.guard import Guard
    from meshlib.state.breaker import Breaker
    from meshlib.state.shared_breaker import SharedBreakers

_log = logging.getLogger("meshlib")

MAX_UNANSWERED = 4096
"""Hosts of which is remembered that nobody answered for them. One that is forgotten is waited for again."""


class Feed:
    """The configuration in force. Thread-safe; made once, and used on after a fork (`forget_threads`).

    scope: `namespace/workload`, whose processes share breakers. before_first: called on the feed's thread before the
    first configuration is in force, which waits for it. on_live: called with each that is, before anybody is woken.
    """

    def __init__(
        self,
        settings: Settings,
        rng: random.Random,
        tls: TlsContexts,
        scope: str,
        *,
        before_first: Callable[[], object],
        on_live: Callable[[Live, Snapshot], None],
    ) -> None:
        self.live = empty_live(rng, denies=settings.denies_unanswered)
        """What calls read now. One attribute read; replaced whole."""
        self._settings, self._rng, self._tls, self._scope = settings, rng, tls, scope
        self._before_first, self._on_live = before_first, on_live
        self.forget_threads()

    def forget_threads(self) -> list[object]:
        """The state of a Feed that never ran, but for `live`: how it is made, and how a forked child goes on. What is
        returned has connections of the parent's, to be neither used nor closed here."""
        orphans: list[object] = []
        if hasattr(self, "closing"):
            orphans = [each for each in (self._health, self._shared_breakers) if each is not None]
            if self._shared_breakers is not None:
                self._shared_breakers.forget()
        self.closing = threading.Event()
        self.source: Source | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._unanswered: dict[str, None] = {}
        self._inbound_unanswered = False
        self._publishing = threading.Lock()
        self._given: Snapshot | None = None
        self._is_first = True
        self._health: HealthChecker | None = None
        self._shared_breakers: SharedBreakers | None = None
        self._addresses: Addresses | None = None
        return orphans

    # In

    def read(self) -> Live:
        return self.live

    def follow(self, source: Source) -> None:
        """Publish what `source` says, from a thread, until `stop`."""
        self.source = source
        self._thread = threading.Thread(target=source.run, args=(self.publish,), name="meshlib-feed", daemon=True)
        self._thread.start()

    def follow_nobody(self) -> None:
        """There is no control plane: every call goes where it says."""
        self.live = compile_live(Snapshot("no control plane", complete=True), None, self._rng)

    def publish(self, snapshot: Snapshot) -> None:
        """There is news: compile, swap, wake who waits. On the feed's thread."""
        if self._is_first:
            self._is_first = False
            self._before_first()
        with self._publishing:
            if not self._compile(snapshot):
                return
            self._given = snapshot
        self._wake()

    def _wake(self, is_news: bool = True) -> None:
        """is_news: of hosts, too, so that those which nobody knew are worth another wait."""
        with self._changed:
            if is_news:
                self._unanswered.clear()
            self._changed.notify_all()
            waiting = list(self._waiting)
        for loop, event in waiting:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # that loop is closed; its waiter is gone with it
                pass

    def _compile(self, given: Snapshot) -> bool:
        """Put `given` into force, with the addresses that its names have now. False where that can't be done."""
        try:
            snapshot = self._resolved(given)
            now, denies = time.monotonic(), self._settings.denies_unanswered
            self.live = compile_live(snapshot, self.live, self._rng, self._settings.locality, now, denies)
        except Exception:
            # Every source checks what it hands over, so this is a defect; calls go on with what they had.
            _log.exception("configuration %s can't be used; %s stays in force", given, self.live)
            return False
        self._on_live(self.live, snapshot)
        self._check_health()
        self._share_breakers()
        return True

    def _resolved(self, given: Snapshot) -> Snapshot:
        """With an endpoint for each address of what is to be looked up; nothing is started where nothing is."""
        if self._addresses is None:
            if self.closing.is_set() or not any(each.type is ClusterType.STRICT_DNS for each in given.clusters):
                return given
            from meshlib.discovery.addresses import Addresses

            self._addresses = Addresses(self._readdress)
        return self._addresses.resolved(given)

    def _readdress(self) -> None:
        """A name has other addresses. On a thread of discovery/addresses."""
        with self._publishing:
            if self._given is None or self.closing.is_set() or not self._compile(self._given):
                return
        self._wake(is_news=False)

    def _check_health(self) -> None:
        """Active checks of what the configuration asks for."""
        if self._health is None:
            if self.closing.is_set() or not any(each.cluster.health_checks for each in self.live.clusters.values()):
                return
            from meshlib.discovery.health import HealthChecker

            self._health = HealthChecker(self.read, time.monotonic, self._tls)
        self._health.update(self.live)

    def _share_breakers(self) -> None:
        """Tell the workers beside this one which circuits are open, where the settings say how."""
        if not self._settings.breaker_storage:
            return
        if self._shared_breakers is None:
            if self.closing.is_set() or not self._breakers():
                return
            from meshlib.state.shared_breaker import SharedBreakers

            self._shared_breakers = SharedBreakers(self._settings.breaker_storage, self._scope, self._breakers)
        self._shared_breakers.update()

    def _breakers(self) -> dict[str, Breaker]:
        clusters = self.live.clusters
        return {name: each.breaker for name, each in clusters.items() if each.breaker is not None}

    # Out

    def resolve(self, authority: str) -> None:
        """Wait until the source has said whether it knows `authority` (host:port), at most `resolve_timeout` seconds.

        A host that was not answered for once is not waited for again until there is any news.
        """
        if self._want(authority) and not self._wait(lambda: self.live.router.knows(authority)):
            self._remember_unanswered(authority)

    async def resolve_async(self, authority: str) -> None:
        """`resolve`, without blocking the loop."""
        if self._want(authority) and not await self._wait_async(lambda: self.live.router.knows(authority)):
            self._remember_unanswered(authority)

    def _remember_unanswered(self, authority: str) -> None:
        with self._changed:
            self._unanswered[authority] = None
            if len(self._unanswered) > MAX_UNANSWERED:  # whoever calls ever new names must not fill the memory
                del self._unanswered[next(iter(self._unanswered))]

    def _want(self, authority: str) -> bool:
        """Ask the source for a host. False when there is nothing to wait for."""
        if self.live.router.knows(authority) or authority in self._unanswered or self.source is None:
            return False
        self.source.want(authority)
        return True

    def await_guard(self) -> Guard:
        """The rules for what comes in, waiting at most `resolve_timeout` seconds for the first."""
        if not self._inbound_unanswered and not self._wait(lambda: self.live.guard.is_configured):
            self._inbound_unanswered = True  # the next ones don't wait: it would hold up a whole server
        return self.live.guard

    async def await_guard_async(self) -> Guard:
        """`await_guard`, without blocking the loop."""
        if not self._inbound_unanswered and not await self._wait_async(lambda: self.live.guard.is_configured):
            self._inbound_unanswered = True
        return self.live.guard

    async def next_live(self, seen: Live) -> Live:
        """What calls read, once it is no longer `seen`. Raises MeshClosed where that does not come any more."""
        await self._until(lambda: self.live is not seen or self.closing.is_set())
        if self.live is seen:
            raise MeshClosed("this Mesh was closed, so no other configuration comes into force")
        return self.live

    def _wait(self, is_there: Callable[[], bool]) -> bool:
        """False when the time is up; whoever closes the Mesh ends the wait, too."""
        with self._changed:
            return self._changed.wait_for(lambda: is_there() or self.closing.is_set(), self._settings.resolve_timeout)

    async def _wait_async(self, is_there: Callable[[], bool]) -> bool:
        try:
            async with asyncio.timeout(self._settings.resolve_timeout):
                await self._until(lambda: is_there() or self.closing.is_set())
        except TimeoutError:
            return False
        return True

    async def _until(self, is_there: Callable[[], bool]) -> None:
        entry = (asyncio.get_running_loop(), asyncio.Event())
        with self._changed:
            self._waiting.add(entry)
        try:
            while not is_there():
                await entry[1].wait()
                entry[1].clear()
        finally:
            with self._changed:
                self._waiting.discard(entry)

    # The end

    def close(self) -> None:
        """No more news; `live` stays. Returns at once; `closing` was set before."""
        self._wake()
        if self.source is not None:
            self.source.stop()

    def join(self) -> None:
        """After `close`: wait for the feed's thread, and stop what runs beside it."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)
        for beside in (self._health, self._shared_breakers, self._addresses):
            if beside is not None:
                beside.stop()
