"""What is there now, of one kind, and what has just changed? A list, then a watch, for as long as it runs.

The rules (client-go's Reflector, and the API concepts' page "Efficient detection of changes"):

- List once, consistently (no resourceVersion), then watch from the list's resourceVersion. A watch that ends, is reset
  or falls silent goes on from the last version seen, events' or bookmarks'; nothing in between is missed.
- 410 Gone, as a status or as an ERROR event: list again, and tell only what differs from what was told before, with
  what is gone. So nobody hears of a change twice, and nobody misses a deletion.
- An event whose version is not newer than the last one seen is a repetition, or out of its order: it is dropped.
- A resource that does not exist (its CRD is not installed) has no objects. It is looked for again now and then, and at
  once when somebody knows better (`look`).
- Failures wait, twice as long each time, never in step with others; a watch that brought something clears that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from meshlib.kube.client import JSON, KubeClient, Object, Resource
from meshlib.kube.errors import Busy, Forbidden, Gone, KubernetesError, NotFound, Unauthorized, Unreachable

logger = logging.getLogger("meshlib.kube")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between attempts (client-go: 0.8 and 30)."""
ABSENT = 30.0
"""Seconds between two looks for a resource that does not exist."""
WATCH = (290.0, 580.0)
"""Seconds after which the server ends a watch, at random between these, so that all do not come back at once."""
SILENCE = 150.0
"""Seconds without an event or bookmark after which a connection counts as dead. Bookmarks come once a minute."""
BRIEF = 1.0
"""A watch that ended sooner and brought nothing counts as a failure (client-go: "very short watch")."""


GATHER = 10.0
"""Seconds for which an API server that has just started may refuse everybody without a warning in our log."""


class Key(NamedTuple):
    namespace: str
    name: str


Changes = Mapping[Key, Object | None]
"""What is new or different; None is gone."""


class Refusals:
    """Which resources an API server refuses to show, told once for all that share this, `GATHER` seconds after the
    first: a server that has just started refuses everybody everything, for less."""

    def __init__(self, gather: float = GATHER) -> None:
        self._gather = gather
        self._now: dict[str, KubernetesError] = {}
        self._told: set[str] = set()
        self._due: asyncio.TimerHandle | None = None

    def add(self, title: str, error: KubernetesError) -> None:
        self._now[title] = error
        if self._due is None and title not in self._told:
            self._due = asyncio.get_running_loop().call_later(self._gather, self._tell)

    def discard(self, title: str) -> None:
        self._now.pop(title, None)
        self._told.discard(title)

    def _tell(self) -> None:
        self._due = None
        if fresh := sorted(self._now.keys() - self._told):
            logger.warning("the API server refuses to show %s: %s", ", ".join(fresh), self._now[fresh[0]])
            self._told.update(fresh)

    def __repr__(self) -> str:
        return f"<Refusals of {', '.join(sorted(self._now)) or 'nothing'}>"


class Reflector:
    """Keeps `objects` as they are in the cluster. run() on the client's event loop; it ends when it is cancelled.

    tell: called on the loop with each set of changes, after `objects` has them: the first list whole (an empty one
    too), the difference of a later one whole, events one by one. namespace: "" for all. params: `fieldSelector`,
    `labelSelector`.

    refusals: of all that are followed together, so that what is refused to all is told once.

    keep: what of an object is kept and told; it must leave its resourceVersion. accept: as for KubeClient.list.

    has_synced: set once the first list was told, or once it is known that the resource does not exist. One that may not
    be listed is not synced: whoever takes it for absent takes rules that protect somebody for absent.
    """

    def __init__(
        self,
        client: KubeClient,
        resource: Resource,
        tell: Callable[[Changes], None],
        *,
        namespace: str = "",
        params: Mapping[str, str] | None = None,
        keep: Callable[[Object], Object] = lambda given: given,
        accept: str = JSON,
        rng: Callable[[], float] = random.random,
        first_pause: float = FIRST_PAUSE,
        absent: float = ABSENT,
        silence: float = SILENCE,
        refusals: Refusals | None = None,
    ) -> None:
        self._client, self.resource, self._tell = client, resource, tell
        self._namespace, self._params = namespace, dict(params or {})
        self._keep, self._accept = keep, accept
        self._rng, self._first_pause, self._absent, self._silence = rng, first_pause, absent, silence
        self._refusals = refusals or Refusals()
        self.objects: dict[Key, Object] = {}
        self.has_synced = asyncio.Event()
        self.error: KubernetesError | None = None
        """Why it is not up to date now; NotFound while the resource does not exist."""
        self._version = ""
        self._path = ""
        self._failures = 0
        self._look = asyncio.Event()

    def look(self) -> None:
        """The resource may exist, or be allowed, from now on: don't wait any longer."""
        self._look.set()

    async def run(self) -> None:
        try:
            await self._follow()
        finally:
            self._refusals.discard(self.resource.title)

    async def _follow(self) -> None:
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except Gone as error:
                logger.info("%s: listed again: %s", self.resource.title, error)
                self._version = ""
                await self._pause_after_gone()
            except NotFound as error:
                self._nothing(error)
                await self._pause(self._absent * (0.75 + self._rng() / 2))
            except (Forbidden, Unauthorized) as error:
                # What was there stays in force: a role that was edited wrongly must not empty the mesh.
                self._has_failed(error, logging.DEBUG)
                self._refusals.add(self.resource.title, error)
                await self._pause(self._backoff())
            except KubernetesError as error:
                self._has_failed(error, logging.INFO if isinstance(error, Unreachable | Busy) else logging.WARNING)
                await self._pause(max(self._backoff(), error.retry_after or 0.0))

    async def _list(self) -> None:
        listing = None
        for version in self.resource.versions:
            path = self.resource.path(version, self._namespace)
            try:
                listing = await self._client.list(path, accept=self._accept, **self._params)
            except NotFound:
                if version == self.resource.versions[-1]:
                    raise
                continue
            self._path = path
            break
        assert listing is not None
        self._version = listing.version
        found = {key_of(each): self._keep(each) for each in listing.items}
        changes: dict[Key, Object | None] = {
            key: each for key, each in found.items() if _version(self.objects.get(key)) != _version(each)
        }
        changes.update((key, None) for key in self.objects if key not in found)
        self.objects, self.error = found, None
        self._refusals.discard(self.resource.title)
        if changes or not self.has_synced.is_set():
            self._tell(changes)
        self.has_synced.set()

    async def _watch(self) -> None:
        began, has_come = time.monotonic(), False
        low, high = WATCH
        events = self._client.watch(
            self._path,
            self._version,
            seconds=low + self._rng() * (high - low),
            silence=self._silence,
            accept=self._accept,
            **self._params,
        )
        async with contextlib.aclosing(events):
            async for event in events:
                has_come = True
                self._is_well()
                version = _version(event.object)
                if not _is_newer(version, self._version):
                    continue
                if event.type in ("ADDED", "MODIFIED", "DELETED"):
                    self._take(event.type, event.object)
                if version:
                    self._version = version
        if not has_come and time.monotonic() - began < BRIEF:
            raise Unreachable(f"watch {self._path}: ended at once")
        self._is_well()

    def _take(self, kind: str, given: Object) -> None:
        key = key_of(given)
        if kind == "DELETED":
            if self.objects.pop(key, None) is not None:
                self._tell({key: None})
        else:
            kept = self.objects[key] = self._keep(given)
            self._tell({key: kept})

    def _nothing(self, error: NotFound) -> None:
        """The resource does not exist, so neither do its objects: with a CRD go all that were made of it."""
        self._version = ""
        self.error, self._failures = error, 0
        self._refusals.discard(self.resource.title)
        gone: dict[Key, Object | None] = dict.fromkeys(self.objects)
        self.objects = {}
        if gone or not self.has_synced.is_set():
            self._tell(gone)
        self.has_synced.set()

    def _is_well(self) -> None:
        if self._failures:
            self._refusals.discard(self.resource.title)
        self.error, self._failures = None, 0

    def _has_failed(self, error: KubernetesError, level: int) -> None:
        self.error = error
        self._failures += 1
        if self._failures == 1 or level > logging.INFO:
            logger.log(level, "%s", error)

    def _backoff(self) -> float:
        longest = min(LONGEST_PAUSE, self._first_pause * float(2 ** min(self._failures - 1, 16)))
        return longest * (0.5 + self._rng() / 2)

    async def _pause_after_gone(self) -> None:
        """A server that forgets at once what it has just listed would be listed without end."""
        self._failures += 1
        if self._failures > 1:
            await self._pause(self._backoff())

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._look.wait(), seconds)
        self._look.clear()

    def __repr__(self) -> str:
        state = str(self.error) if self.error else f"at {self._version}" if self._version else "not listed yet"
        return f"<Reflector {self.resource.title} {len(self.objects)} objects, {state}>"


def key_of(given: Object) -> Key:
    metadata = given.get("metadata") or {}
    return Key(str(metadata.get("namespace") or ""), str(metadata.get("name") or ""))


def _version(given: Object | None) -> str:
    return str(((given or {}).get("metadata") or {}).get("resourceVersion") or "")


def _is_newer(version: str, than: str) -> bool:
    """Versions are ordered as numbers (KEP-5504); those of an aggregated API that are none are taken as they come."""
    if version.isdecimal() and than.isdecimal():
        return int(version) > int(than)
    return not version or version != than
