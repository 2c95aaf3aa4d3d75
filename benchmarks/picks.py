"""What does it cost to choose an endpoint? Microseconds for each policy, by the number of endpoints."""

from __future__ import annotations

import random
import time
from typing import Any, NamedTuple

from benchmarks.effort import Effort
from meshlib.model import Cluster, Endpoint, LoadAssignment, LoadBalancing, Outcome, OutlierDetection
from meshlib.policy.cluster import LiveCluster

SIZES = (10, 1_000, 10_000)


class Pick(NamedTuple):
    """By batch. microseconds: of one pick. empty: of calling a function that does nothing, in the same batch.
    rebuild_ms: what the call pays that ejects an endpoint, or that lets some return."""

    policy: str
    endpoints: int
    microseconds: list[float]
    empty: list[float]
    rebuild_ms: list[float]


def _nothing(now: float, tried: tuple[()], reselect: int, key: int) -> None: ...


def _seconds(call: object, size: int) -> float:
    assert callable(call)
    keys = [random.getrandbits(64) for _ in range(size)]
    began = time.perf_counter()
    for key in keys:
        call(1.0, (), 0, key)
    return (time.perf_counter() - began) / size


def cluster_of(policy: LoadBalancing, endpoints: int) -> LiveCluster:
    addresses = tuple(Endpoint(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", 80) for n in range(endpoints))
    rules = OutlierDetection(max_ejection_percent=50)
    cluster = Cluster("c", load_balancing=policy, outlier_detection=rules)
    return LiveCluster(cluster, LoadAssignment("c", addresses), random.Random(1), now=1.0)


def measure(effort: Effort) -> dict[str, Any]:
    batches, size = effort.batches, effort.size * 25
    rows = []
    for policy in LoadBalancing:
        for endpoints in SIZES:
            cluster = cluster_of(policy, endpoints)
            costs, empties = [], []
            for number in range(batches + 1):
                empty, cost = _seconds(_nothing, size), _seconds(cluster.pick, size)
                if number:
                    costs.append(cost * 1e6)
                    empties.append(empty * 1e6)
            rebuilds = []
            for target in cluster.targets[:batches]:
                bad = Outcome(500)
                for _ in range(4):
                    cluster.judge(target, bad, 0.01, 1.0)
                began = time.perf_counter()
                cluster.judge(target, bad, 0.01, 1.0)
                rebuilds.append((time.perf_counter() - began) * 1e3)
            rows.append(Pick(policy.lower(), endpoints, costs, empties, rebuilds))
    return {"rows": [row._asdict() for row in rows]}
