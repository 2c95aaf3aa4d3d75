"""Which addresses does a name have now? For clusters whose endpoints are names (a ServiceEntry of resolution DNS):
Envoy's STRICT_DNS, where each address is an endpoint of its own, balanced, checked and ejected by itself.

The operating system is asked, as for every other connection of the process, in the background and again and again; no
call waits for it. Until the first answer a call goes to the name, and what was last known stays while nobody answers.
"""

from __future__ import annotations

import heapq
import ipaddress
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from meshlib.model import Cluster, ClusterType, Endpoint, LoadAssignment, Snapshot

REFRESH = 30.0
"""Seconds between two look-ups of a name, a tenth more or less. Istio has 60 and heeds the TTL besides, which the
operating system does not tell."""
RETRY = 5.0
"""Seconds after a look-up that failed (Envoy's dns_refresh_rate)."""
_JITTER = 0.1
_THREADS = 4
"""Look-ups at a time: one that hangs holds up no other name."""
_log = logging.getLogger("meshlib.discovery")

Lookup = Callable[[str], tuple[str, ...]]


def lookup(name: str) -> tuple[str, ...]:
    """The IPv4 addresses of a name, or its IPv6 addresses where it has no other (Istio's V4_PREFERRED), sorted. Raises
    OSError."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    first = [str(address[0]) for family, _, _, _, address in found if family == socket.AF_INET]
    return tuple(sorted(set(first or [str(address[0]) for *_, address in found])))


class Addresses:
    """The names of today's configuration, and what is known of them. Starts its threads with the first name.

    changed: called, on one of them, when a name has other addresses than before. ask: `lookup`, or what stands for it.
    """

    def __init__(self, changed: Callable[[], None], ask: Lookup | None = None) -> None:
        self._changed, self._lookup = changed, ask or lookup
        self._known: dict[str, tuple[str, ...]] = {}
        self._wanted: frozenset[str] = frozenset()
        self._due: list[tuple[float, str]] = []
        self._scheduled: set[str] = set()
        """Names that are due some day, or are being looked up."""
        self._condition = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._is_stopped = False

    def resolved(self, snapshot: Snapshot) -> Snapshot:
        """`snapshot` with a load assignment for each cluster whose names are known. Never waits."""
        clusters = {each.name: each for each in snapshot.clusters if each.type is ClusterType.STRICT_DNS}
        self._want(frozenset(name for cluster in clusters.values() for name in _names(cluster)))
        with self._condition:
            known = dict(self._known)
        made = {name: _assignment(each, known) for name, each in clusters.items() if any(map(known.get, _names(each)))}
        if not made:
            return snapshot
        others = [each for each in snapshot.assignments if each.cluster not in made]
        return replace(
            snapshot, assignments=tuple(sorted((*others, *made.values()), key=lambda assigned: assigned.cluster))
        )

    def _want(self, names: frozenset[str]) -> None:
        with self._condition:
            now = time.monotonic()
            for name in names - self._scheduled:
                self._scheduled.add(name)
                heapq.heappush(self._due, (now, name))
            self._wanted = names
            self._known = {name: addresses for name, addresses in self._known.items() if name in names}
            while len(self._threads) < min(_THREADS, len(names)) and not self._is_stopped:
                thread = threading.Thread(target=self._run, name="meshlib-addresses", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._condition.notify_all()

    def _run(self) -> None:
        while (name := self._next()) is not None:
            try:
                found: tuple[str, ...] | None = self._lookup(name)
            except (OSError, UnicodeError) as error:
                _log.debug("%s: %s", name, error)
                found = None
            with self._condition:
                if name not in self._wanted or self._is_stopped:
                    self._scheduled.discard(name)
                    continue
                pause = REFRESH * random.uniform(1 - _JITTER, 1 + _JITTER) if found else RETRY
                heapq.heappush(self._due, (time.monotonic() + pause, name))
                self._condition.notify()
                is_news = bool(found) and found != self._known.get(name)
                if found:
                    self._known[name] = found
            if is_news:
                self._changed()

    def _next(self) -> str | None:
        """The next name to be looked up, once it is due; None when there will be no more."""
        with self._condition:
            while not self._is_stopped:
                if not self._due:
                    self._condition.wait()
                    continue
                due, name = self._due[0]
                left = due - time.monotonic()
                if left > 0:
                    self._condition.wait(left)
                    continue
                heapq.heappop(self._due)
                if name in self._wanted:
                    return name
                self._scheduled.discard(name)
        return None

    def stop(self) -> None:
        """No more look-ups; one that hangs is not waited for. Idempotent."""
        with self._condition:
            self._is_stopped = True
            self._condition.notify_all()

    def __repr__(self) -> str:
        return f"<Addresses {len(self._known)} of {len(self._wanted)} names known>"


def _names(cluster: Cluster) -> Iterator[str]:
    for endpoint in cluster.endpoints:
        try:
            ipaddress.ip_address(endpoint.address)
        except ValueError:
            yield endpoint.address


def _assignment(cluster: Cluster, known: Mapping[str, tuple[str, ...]]) -> LoadAssignment:
    """Two names with one address are one endpoint, in the place of the first."""
    found: dict[str, Endpoint] = {}
    for endpoint in cluster.endpoints:
        for address in known.get(endpoint.address) or (endpoint.address,):
            one = replace(endpoint, address=address)
            found.setdefault(one.authority, one)
    return LoadAssignment(cluster.name, tuple(sorted(found.values())))
