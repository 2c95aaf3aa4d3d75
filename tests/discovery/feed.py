"""A feed on a thread of its own, whose Snapshots a test can wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from meshlib.discovery import Source
from meshlib.discovery.xds import XdsSource
from meshlib.model import (
    Cluster,
    ClusterType,
    Endpoint,
    Forward,
    Listener,
    LoadAssignment,
    Locality,
    Node,
    NodeKind,
    Route,
    RouteConfiguration,
    RouteMatch,
    Snapshot,
    VirtualHost,
    WeightedCluster,
    Workload,
)

TIMEOUT = 30.0


def node(identity: str = "sidecar~127.0.0.1~a-1.default~default.svc.cluster.local", **fields: Any) -> Node:
    return Node(identity, Workload("a", service="a", address="127.0.0.1", port=9080), **fields)


def gateway() -> Node:
    return node("router~127.0.0.1~gw-1.default~default.svc.cluster.local", kind=NodeKind.ROUTER)


def world(*hosts: str, port: int = 1, version: str = "1", subset: str = "") -> Snapshot:
    """Each host (`b:80`) with a listener, a route, a cluster and one endpoint at `port`."""
    hosts = tuple(sorted(hosts))
    clusters = {host: f"outbound|{subset}|{host}" for host in hosts}
    return Snapshot(
        version,
        tuple(Listener(host, f"routes of {host}") for host in hosts),
        tuple(
            RouteConfiguration(
                f"routes of {host}",
                (VirtualHost(host, (host,), (Route(RouteMatch(), Forward((WeightedCluster(clusters[host]),))),)),),
            )
            for host in hosts
        ),
        tuple(Cluster(clusters[host], ClusterType.EDS) for host in hosts),
        tuple(LoadAssignment(clusters[host], (Endpoint("127.0.0.1", port, locality=Locality("r")),)) for host in hosts),
    )


def ports(snapshot: Snapshot) -> list[int]:
    return [endpoint.port for assignment in snapshot.assignments for endpoint in assignment.endpoints]


def hosts(snapshot: Snapshot) -> list[str]:
    return [listener.name for listener in snapshot.listeners]


class Feed:
    """Runs a Source; a context manager, which fails if the source does not stop at once."""

    def __init__(self, source: Source) -> None:
        self.source: Any = source
        self.published: list[Snapshot] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=source.run, args=(self._publish,), name="feed", daemon=True)

    def _publish(self, snapshot: Snapshot) -> None:
        with self._changed:
            self.published.append(snapshot)
            self._changed.notify_all()

    @property
    def snapshot(self) -> Snapshot:
        return self.published[-1] if self.published else Snapshot()

    def wait_for(self, holds: Callable[[Snapshot], object], timeout: float = TIMEOUT) -> Snapshot:
        """The newest Snapshot, once `holds` is true of it."""
        with self._changed:
            assert self._changed.wait_for(lambda: holds(self.snapshot), timeout), f"still {self.snapshot!r}"
            return self.snapshot

    def stop(self) -> None:
        self.source.stop()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def feed(target: str, cache_dir: Path | None = None, *, delta: bool = True, of: Node | None = None) -> Feed:
    return Feed(XdsSource(target, of or node(), cache_dir=cache_dir, delta=delta))
