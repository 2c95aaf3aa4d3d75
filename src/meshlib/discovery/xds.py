"""What does the control plane say? The feed over xDS: what is wanted goes out, consistent Snapshots come in."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue

from meshlib.discovery.assembly import Assembly
from meshlib.discovery.disk_cache import DiskCache, Memory
from meshlib.model import INBOUND_PREFIX, FeedState, Node, NodeKind, Snapshot, Workload
from meshlib.xds.decode import decode_resource
from meshlib.xds.encode import encode_node
from meshlib.xds.istio import decode_istio_resource, encode_istio_node
from meshlib.xds.resource_types import CLUSTER, LISTENER
from meshlib.xds.session import DOES_NOT_EXIST_TIMEOUT, Resource, Session
from meshlib.xds.stream import Connect, Stream

_log = logging.getLogger("meshlib.discovery")

MAX_WANTED = 2000
"""Hosts that are kept up to date. Beyond that the one asked for first is let go, and asked for again when it is called
again: a process that calls thousands of hosts outside the mesh must not subscribe to all of them for ever."""
MAX_NAME = 512

OMITTED_BY_ISTIO = 1.0
"""Seconds after which a host that an istiod's answer leaves out does not exist. It has no other word for that, and
answers each request at once (pilot/pkg/xds, processRequest): the answer follows close behind what was on its way."""
FIRST_ANSWER = 1.0
"""Seconds in which a control plane that can be reached should have confirmed what is on disk. Until then calls wait,
rather than go where yesterday's endpoints were; one that can't be reached ends the waiting at once."""
SAVE_AFTER, SAVE_WITHIN = 1.0, 10.0
"""Written when nothing has changed for so long, but at most so long after a change."""


class XdsSource:
    """Feed of one process from the control plane at `target` (`host:port`). A Source.

    cache_dir: where the last good configuration is kept for the next start; None keeps none. delta: incremental ADS;
    False for control planes that only speak state of the world. istio: it is an istiod, which speaks to us
    as to gRPC's clients, and these speak state of the world. connect: see meshlib.xds.stream; default plaintext.

    A SIDECAR asks for the hosts it calls; a ROUTER is told of everything. What an earlier process like this one was
    using is asked for from the start, and serves until the control plane says otherwise.
    """

    def __init__(
        self,
        target: str,
        node: Node,
        *,
        cache_dir: Path | None,
        delta: bool = True,
        istio: bool = False,
        connect: Connect | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target = target
        self._node = node
        self._clock = clock
        self._gets_everything = node.kind is NodeKind.ROUTER
        wildcard = (LISTENER, CLUSTER) if self._gets_everything else ()
        decode = decode_istio_resource if istio else decode_resource
        omitted = OMITTED_BY_ISTIO if istio else DOES_NOT_EXIST_TIMEOUT
        self._session = Session(decode, delta=delta and not istio, wildcard=wildcard, omitted_after=omitted)
        self._assembly = Assembly(self._session, wildcard=self._gets_everything)
        encode = encode_istio_node if istio else encode_node
        self._stream = Stream(target, self._session, lambda: self._node, connect=connect, encode=encode, clock=clock)
        self._cache = DiskCache(cache_dir, target, node) if cache_dir is not None else None
        self._asked: SimpleQueue[str] = SimpleQueue()
        self._wanted: dict[str, None] = {}
        self._inbound = ""
        self._revision = -1
        self._newest = self._seen = self._published = Snapshot()
        self._version = ""
        self._held_until = 0.0
        self._changed_at: float | None = None
        self._save_at: float | None = None

    # From any thread

    def want(self, authority: str) -> None:
        if authority in self._wanted or self._gets_everything or not _is_name(authority):
            return
        self._asked.put(authority)
        self._stream.wake()

    def want_inbound(self, name: str) -> None:
        """This process serves: the rules for calls that come in are asked for, by their listener's name. Another name
        takes its place. A ROUTER's come with its listeners."""
        if name != self._inbound and not self._gets_everything and _is_name(name):
            self._asked.put(name)
            self._stream.wake()

    def set_ready(self, workload: Workload | None = None) -> None:
        """This process's own port accepts connections: the control plane may send calls to it. From any thread.

        workload: what is now known of it; default what it was.
        """
        self._node = replace(self._node, ready=True, workload=workload or self._node.workload)
        self._stream.renew_node()

    def stop(self) -> None:
        self._stream.stop()

    @property
    def state(self) -> FeedState:
        """How the conversation goes."""
        return self._stream.state

    # The feed's thread

    def run(self, publish: Callable[[Snapshot], None]) -> None:
        self._remember()
        self._stream.run(lambda now: self._step(now, publish))
        if self._save_at is not None:
            self._save()

    def _step(self, now: float, publish: Callable[[Snapshot], None]) -> float | None:
        """Bring subscriptions and Snapshot up to date; returns when that is due again."""
        self._take_wishes()
        due = self._assembly.next_deadline
        if self._session.revision != self._revision or (due is not None and due <= now):
            version = self._session.last_version or self._version
            self._newest = self._assembly.update(self._wanted, version, now, self._inbound)
            self._revision = self._session.revision
        is_held = self._is_held(now)
        if not is_held and self._newest is not self._seen:
            self._seen = self._newest
            if not self._newest.same_content(self._published):
                self._published = self._newest
                publish(self._newest)
                self._changed(now)
        if self._save_at is not None and self._save_at <= now:
            self._save()
        held_until = self._held_until if is_held else None
        times = (self._assembly.next_deadline, held_until, self._save_at)
        return min((time for time in times if time is not None), default=None)

    def _take_wishes(self) -> None:
        try:
            while True:
                authority = self._asked.get_nowait()
                if authority.startswith(INBOUND_PREFIX):
                    self._inbound, self._revision = authority, -1
                elif authority not in self._wanted:
                    self._wanted[authority] = None
                    self._revision = -1
                    if len(self._wanted) > MAX_WANTED:
                        del self._wanted[next(iter(self._wanted))]
        except Empty:
            return

    def _is_held(self, now: float) -> bool:
        """Whether what is on disk waits for the control plane's word."""
        if self._held_until and (
            now >= self._held_until or self._stream.has_failed or not self._session.has_unconfirmed
        ):
            self._held_until = 0.0
        return bool(self._held_until)

    # Memory

    def _remember(self) -> None:
        memory = self._cache.load() if self._cache is not None else None
        if memory is None:
            return
        now = self._clock()
        for type_url, kept in memory.resources.items():
            resources = [Resource(type_url, name, "", data) for name, data in kept.items() if data is not None]
            absent = [name for name, data in kept.items() if data is None]
            for problem in self._session.restore(type_url, resources, absent, now):
                _log.warning("%s: not taken over: %s", self._cache, problem)
        if not self._gets_everything:
            self._wanted = dict.fromkeys(name for name in memory.wanted[-MAX_WANTED:] if _is_name(name))
        self._version = f"{memory.version} (kept)".lstrip()
        self._held_until = now + FIRST_ANSWER

    def _changed(self, now: float) -> None:
        if self._cache is None:
            return
        if self._changed_at is None:
            self._changed_at = now
        self._save_at = min(now + SAVE_AFTER, self._changed_at + SAVE_WITHIN)

    def _save(self) -> None:
        """On the feed's thread, where no call waits for it."""
        self._changed_at = self._save_at = None
        if self._cache is None:
            return
        resources: dict[str, dict[str, bytes | None]] = {
            type_url: {
                name: entry.data if entry.value is not None else None
                for name, entry in sorted(parts.items())
                if not self._session.has_ttl(type_url, name)  # it is not to be used without the control plane
            }
            for type_url, parts in self._assembly.parts.items()
        }
        resources.setdefault(LISTENER, {}).update(dict.fromkeys(self._published.absent))
        self._cache.save(Memory(self._published.version.removesuffix(" (kept)"), tuple(self._wanted), resources))

    def __repr__(self) -> str:
        return f"<XdsSource {self._stream!r}, {len(self._wanted)} hosts wanted>"


def _is_name(authority: str) -> bool:
    """Whether it can be the name of a resource. "*" would ask for everything."""
    return authority not in ("", "*") and len(authority) <= MAX_NAME and authority.isascii() and authority.isprintable()
