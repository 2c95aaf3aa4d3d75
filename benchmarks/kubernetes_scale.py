"""How large a cluster does a control plane follow? `python -m benchmarks.kubernetes_scale`: 1,000 services of ten pods.

The API server is the tests' own, in this process; the control plane is a process of its own, and one client of it is
here. Told are: seconds until it serves, its memory, how long one change takes to reach the client, and how many changes
a second it takes in when they come all at once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from cli.meshctl_processes import control_plane  # noqa: E402
from discovery.feed import Feed, feed  # noqa: E402
from kube.cluster import Cluster  # noqa: E402
from meshlib.model import Snapshot  # noqa: E402

PATIENCE = 120.0
NAMESPACE = "shop"
WATCHED = "service-0"
"""The service that the client calls."""

Object = dict[str, Any]


def service(name: str) -> Object:
    spec = {"selector": {"app": name}, "ports": [{"name": "http", "port": 9080}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec}


def pod(name: str, number: int) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{name}-{number}", "namespace": NAMESPACE, "labels": {"app": name, "version": "v1"}},
        "spec": {"serviceAccountName": name, "containers": [{"name": "app", "image": name}]},
        "status": {"podIP": address(name, number), "phase": "Running"},
    }


def endpoint_slice(name: str, pods: int, port: int = 9080) -> Object:
    """A change of `port` is a change of every endpoint."""
    endpoints = [
        {
            "addresses": [address(name, number)],
            "conditions": {"ready": True},
            "targetRef": {"kind": "Pod", "name": f"{name}-{number}"},
        }
        for number in range(pods)
    ]
    labels = {"kubernetes.io/service-name": name}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-a", "namespace": NAMESPACE, "labels": labels},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port}],
        "endpoints": endpoints,
    }


def address(name: str, number: int) -> str:
    of = int(name.rpartition("-")[2])
    return f"10.{of // 250}.{of % 250}.{number + 1}"


def objects(services: int, pods: int) -> Iterator[Object]:
    for index in range(services):
        name = f"service-{index}"
        yield service(name)
        yield endpoint_slice(name, pods)
        yield from (pod(name, number) for number in range(pods))


def megabytes(process: int) -> float:
    """Resident memory, now."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def cpu_seconds(process: int) -> float:
    """That it has used so far: what a change costs whatever else the machine does."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def serves_on(port: int) -> Callable[[Snapshot], bool]:
    def holds(snapshot: Snapshot) -> bool:
        ports = {each.port for assignment in snapshot.assignments for each in assignment.endpoints}
        return ports == {port}

    return holds


def latency(cluster: Cluster, client: Feed, pods: int, port: int) -> float:
    """Seconds from the write to the client's new Snapshot."""
    began = time.perf_counter()
    cluster.put(endpoint_slice(WATCHED, pods, port))
    client.wait_for(serves_on(port), PATIENCE)
    return time.perf_counter() - began


def measured(services: int, pods: int, changes: int, burst: int) -> dict[str, float]:
    """pods: of each service. changes: one after the other. burst: so many at once."""
    found: dict[str, float] = {"pods": services * pods, "services": services}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = stack.enter_context(Cluster())
        cluster.put(*objects(services, pods))
        cluster.kubeconfig(folder / "kubeconfig")
        began = time.perf_counter()
        words = ("--kubernetes", "--xds", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--log-level", "warning")
        plane = stack.enter_context(control_plane(folder, *words, KUBECONFIG=str(folder / "kubeconfig")))
        found["seconds until it serves"] = time.perf_counter() - began
        client = stack.enter_context(feed(plane.xds))
        client.source.want(f"{WATCHED}.{NAMESPACE}.svc.cluster.local:9080")
        client.wait_for(serves_on(9080), PATIENCE)
        found["CPU s until then"] = cpu_seconds(plane.process.pid)
        found["MB"] = megabytes(plane.process.pid)
        began_with = cpu_seconds(plane.process.pid)
        times = [latency(cluster, client, pods, 10_000 + number) for number in range(changes)]
        found["ms to the client, median"] = statistics.median(times) * 1000
        found["ms to the client, longest"] = max(times) * 1000
        found["CPU ms of a change"] = (cpu_seconds(plane.process.pid) - began_with) / changes * 1000
        others = [endpoint_slice(f"service-{1 + n % (services - 1)}", pods, 20_000 + n) for n in range(burst - 1)]
        began, began_with = time.perf_counter(), cpu_seconds(plane.process.pid)
        cluster.put(*others, endpoint_slice(WATCHED, pods, 30_000))
        client.wait_for(serves_on(30_000), PATIENCE)
        found["changes a second, all at once"] = burst / (time.perf_counter() - began)
        found["CPU s of all of them"] = cpu_seconds(plane.process.pid) - began_with
        found["MB after that"] = megabytes(plane.process.pid)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only show that it runs")
    parser.add_argument("--services", type=int, default=1_000)
    parser.add_argument("--pods", type=int, default=10, help="of each service")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    sizes = (10, 3, 3, 20) if given.quick else (given.services, given.pods, 20, 2_000)
    found = measured(*sizes)
    if given.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<32} {value:10.1f}")


if __name__ == "__main__":
    main()
