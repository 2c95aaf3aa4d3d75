"""How are mirrored calls kept from harming the real ones? A bounded number of threads or tasks whose results matter to
no one."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Awaitable, Callable

MAX_MIRRORS = 64
"""Mirrored calls in flight at once for one transport; a further one is dropped: a mirror never slows the call."""

_log = logging.getLogger("meshlib.mirror")


class ThreadMirrors:
    """The mirrored calls of one transport, on daemon threads, so that one that stalls holds up no interpreter's exit.
    `start` never blocks and never raises."""

    def __init__(self) -> None:
        self._free = threading.BoundedSemaphore(MAX_MIRRORS)

    def start(self, told: str, work: Callable[[], None]) -> bool:
        """Run `work` beside the call, in a copy of its context; False when it is not run. told: what it is, for the
        log."""
        if not self._free.acquire(blocking=False):
            return False

        def run() -> None:
            try:
                work()
            except Exception as error:
                _log.debug("mirrored %s: %s", told, error)
            finally:
                self._free.release()

        context = contextvars.copy_context()  # what the request being served brought goes along with the copy, too
        try:
            threading.Thread(target=context.run, args=(run,), name="meshlib-mirror", daemon=True).start()
        except RuntimeError:  # the process has no thread left
            self._free.release()
            return False
        return True


class AsyncMirrors:
    """The mirrored calls of one transport, on asyncio. `start` never blocks and never raises."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, told: str, work: Callable[[], Awaitable[None]]) -> bool:
        """Run `work` beside the call; False when it is not run. told: what it is, for the log."""
        if len(self._tasks) >= MAX_MIRRORS:
            return False

        async def run() -> None:
            try:
                await work()
            except Exception as error:
                _log.debug("mirrored %s: %s", told, error)

        task = asyncio.create_task(run(), name="meshlib-mirror")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def aclose(self) -> None:
        """Give up what still runs."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def __repr__(self) -> str:
        return f"<AsyncMirrors {len(self._tasks)} in flight>"
