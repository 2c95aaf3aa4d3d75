"""Which workloads are running? Those whose streams are open and which say that they are ready.

- A process is an endpoint from the moment it says that its port accepts, until its last stream ends.
- What runs where is kept in the state folder. After a restart of the control plane the workloads it knew count on for
  `grace` seconds, so that nobody vanishes while all of them reconnect.
- One address has one workload: a process that was started anew takes the place of the one that was there, but not
  one of another service account while that is still connected.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import tempfile
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

import msgspec

from meshlib.model import Node, Workload

logger = logging.getLogger("meshlib.controlplane")

GRACE = 10.0
"""Seconds. Twice the longest pause between two attempts of our client to reconnect, which is five."""


class Registry:
    """The running workloads. Belongs to one event loop.

    file: where they are kept; None keeps nothing. Nothing is read or written but by load() and save().
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._nodes: dict[Hashable, Node] = {}
        """Of the open streams, in the order in which they came."""
        self._remembered: dict[tuple[str, int], Workload] = {}
        self._running: dict[tuple[str, int], dict[Hashable, Workload]] = {}
        """What the open streams say runs where, the one that came last at the end."""
        self._workloads: tuple[Workload, ...] | None = ()
        """None when it has to be made anew: all come at once after a restart, and nobody looks in between."""
        self._saved: tuple[Workload, ...] = ()
        self._listeners: list[Callable[[], None]] = []
        self._is_frozen = False

    def on_change(self, tell: Callable[[], None]) -> None:
        """`tell` is called after each change of workloads()."""
        self._listeners.append(tell)

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """In a fixed order."""
        if self._workloads is None:
            last = {address: _holder(found) for address, found in self._running.items()}
            self._workloads = in_order({**self._remembered, **last}.values())
        return self._workloads

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Of the open streams; a process that has two streams is there twice."""
        return tuple(self._nodes.values())

    def accounts(self, namespace: str, workload: str) -> frozenset[str]:
        """The service accounts of the open streams' processes that bear this workload's name."""
        said = (node.workload for node in self._nodes.values())
        return frozenset(each.service_account for each in said if (each.namespace, each.name) == (namespace, workload))

    def attach(self, stream: Hashable, node: Node) -> None:
        """A stream was opened by this node, or the node has said something new about itself."""
        before, self._nodes[stream] = self._nodes.get(stream), node
        if _is_endpoint(node) and not _is_ip_address(node.workload.address):
            logger.warning("%s is no endpoint: %r is not an IP address", node.id, node.workload.address)
        self._change(stream, before, node)

    def detach(self, stream: Hashable) -> None:
        """A stream has ended. Harmless for one that never said who it is."""
        self._change(stream, self._nodes.pop(stream, None), None)

    def freeze(self) -> None:
        """The control plane stops: the streams that end now say nothing about their processes."""
        self._is_frozen = True

    def forget(self) -> None:
        """The grace after the start is over: who has not come back is gone."""
        for gone in self._remembered.values():
            logger.info("%s at %s:%d has not come back", gone.name, gone.address, gone.port)
        if self._remembered and not self._is_frozen:
            self._remembered = {}
            self._has_changed()

    def load(self) -> None:
        """Remember who ran when the control plane ended. A file that can't be read is as good as none."""
        if self._file is None:
            return
        try:
            found = msgspec.json.decode(self._file.read_bytes(), type=tuple[Workload, ...])
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as error:
            logger.warning("%s is not used: %s", self._file, error)
            return
        self._saved = found
        self._remembered = {_address(each): each for each in found if _is_ip_address(each.address)}
        if self._remembered:
            self._has_changed()

    def save(self, workloads: tuple[Workload, ...] | None = None) -> None:
        """Keep who runs now. Raises nothing: without the file a restart is rougher, and that is all.

        workloads: `workloads`, where this is another thread than the event loop's.
        """
        if workloads is None:
            workloads = self.workloads
        if self._file is None or workloads == self._saved:
            return
        try:
            handle, temporary = tempfile.mkstemp(dir=self._file.parent, prefix=f".{self._file.name}")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(msgspec.json.encode(workloads))
                Path(temporary).replace(self._file)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            logger.warning("%s can't be written: %s", self._file, error)
        self._saved = workloads

    def _change(self, stream: Hashable, before: Node | None, after: Node | None) -> None:
        """What this stream says was `before` and is `after`."""
        if self._is_frozen:
            return
        addresses = {_address(node.workload) for node in (before, after) if node is not None}
        known = [self._at(address) for address in addresses]
        if before is not None and (running := self._running.get(_address(before.workload))):
            running.pop(stream, None)
            if not running:
                del self._running[_address(before.workload)]
        if after is not None:
            address = _address(after.workload)
            if after.ready:
                self._remembered.pop(address, None)  # from now on its stream says whether it runs
            if _is_endpoint(after) and _is_ip_address(after.workload.address):
                self._running.setdefault(address, {})[stream] = after.workload
        if known != [self._at(address) for address in addresses]:
            self._has_changed()

    def _at(self, address: tuple[str, int]) -> Workload | None:
        running = self._running.get(address)
        return _holder(running) if running else self._remembered.get(address)

    def _has_changed(self) -> None:
        self._workloads = None
        for tell in self._listeners:
            tell()

    def __repr__(self) -> str:
        return f"<Registry {len(self.workloads)} workloads, {len(self._nodes)} streams>"


def _holder(running: dict[Hashable, Workload]) -> Workload:
    """Who has an address that several streams name: the one that came last, of those with the first one's identity.
    Nobody takes another's address by saying that it is theirs."""
    first = next(iter(running.values()))
    own = (first.namespace, first.service_account)
    return next(each for each in reversed(running.values()) if (each.namespace, each.service_account) == own)


def _is_endpoint(node: Node) -> bool:
    return node.ready and bool(node.workload.port)


def _is_ip_address(address: str) -> bool:
    """One endpoint with a host name, and an Envoy refuses all endpoints of its cluster ("malformed IP address")."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def _address(workload: Workload) -> tuple[str, int]:
    return (workload.address, workload.port)


def in_order(workloads: Iterable[Workload]) -> tuple[Workload, ...]:
    return tuple(sorted(workloads, key=lambda each: (each.namespace, each.service, each.name, each.address, each.port)))
