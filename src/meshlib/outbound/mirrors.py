"""How are mirrored calls kept from harming the real ones? A bounded set of tasks whose results matter to no one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

MAX_MIRRORS = 64
"""Mirrored calls in flight at once for one transport; a further one is dropped: a mirror never slows the call."""

_log = logging.getLogger("meshlib.mirror")


class AsyncMirrors:
    """The mirrored calls of one transport, on asyncio. `start` never blocks and never raises."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, told: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` beside the call. told: what it is, for the log."""
        if len(self._tasks) >= MAX_MIRRORS:
            return

        async def run() -> None:
            try:
                await work()
            except Exception as error:
                _log.debug("mirrored %s: %s", told, error)

        task = asyncio.create_task(run(), name="meshlib-mirror")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Give up what still runs."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def __repr__(self) -> str:
        return f"<AsyncMirrors {len(self._tasks)} in flight>"
