"""Two replicas of the control plane: one is killed in the middle of a rollout, and nobody who calls has to know."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from town import eventually

from cli.meshctl_processes import ControlPlaneProcess, control_plane
from kube.api_server import ApiServer
from kube.cluster import Cluster
from meshlib.mesh import Mesh
from meshlib.settings import Settings
from peers import Answer, Peer

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

RATE, CALLERS = 50, 4
"""Calls a second, of all callers together."""


def service() -> dict[str, Any]:
    spec = {"selector": {"app": "reviews"}, "ports": [{"name": "http", "port": 9080}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "reviews", "namespace": "shop"}, "spec": spec}


def pod(name: str, port: int, ready: bool = True, host: str = "127.0.0.1") -> dict[str, Any]:
    """What Kubernetes says of it: its EndpointSlice."""
    labels = {"kubernetes.io/service-name": "reviews"}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"reviews-{name}", "namespace": "shop", "labels": labels},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port}],
        "endpoints": [{"addresses": [host], "conditions": {"ready": ready}}],
    }


def named(name: str, host: str) -> Peer:
    return Peer(lambda _: Answer(body=name.encode()), host=host)


class Load:
    """Calls at a steady rate until the end. told: what each call came to: who answered, or what went wrong."""

    def __init__(self, meshes: list[Mesh]) -> None:
        self.told: list[str] = []
        self._news = threading.Condition()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(meshes[number % len(meshes)],)) for number in range(CALLERS)
        ]

    def _run(self, mesh: Mesh) -> None:
        with mesh.Client(timeout=30) as client:
            while not self._stop.wait(CALLERS / RATE):
                try:
                    answer = client.get("http://reviews.shop:9080/")
                    said = answer.text if answer.status_code == 200 else f"{answer.status_code} {answer.text}"
                except httpx.HTTPError as error:
                    said = repr(error)
                with self._news:
                    self.told.append(said)
                    self._news.notify_all()

    def goes_on(self, seconds: float) -> None:
        """For so long at the steady rate; on a slow machine until the same number of calls has been made."""
        until = len(self.told) + int(seconds * RATE)
        with self._news:
            assert self._news.wait_for(lambda: len(self.told) >= until, 60), Counter(self.told)

    def __enter__(self) -> Self:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for each in self._threads:
            each.join(30)


def clients(replica: ControlPlaneProcess) -> list[dict[str, Any]]:
    answer = httpx.get(f"{replica.admin}/v1/clients", trust_env=False, timeout=10)
    found: list[dict[str, Any]] = answer.raise_for_status().json()["clients"]
    return found


def are_synced(replica: ControlPlaneProcess, number: int) -> bool:
    """Whether it has so many clients, and all of them have accepted all that it told."""
    found = clients(replica)
    return len(found) == number and all(
        each["types"] and set(each["types"].values()) <= {"SYNCED", "NOT SENT"} for each in found
    )


def versions(replica: ControlPlaneProcess) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(each["versions"].items()) for each in clients(replica)}


@contextlib.contextmanager
def replicas(cluster: Cluster, folder: Path) -> Iterator[list[ControlPlaneProcess]]:
    cluster.kubeconfig(folder / "kubeconfig")
    with contextlib.ExitStack() as stack:
        made = []
        for number in range(2):
            home = folder / f"replica-{number}"
            home.mkdir()
            words = (
                "--kubernetes",
                "--write-status",
                "--ca-secret",
                "shop/ca",
                "--xds",
                "127.0.0.1:0",
                "--admin",
                "127.0.0.1:0",
            )
            entered = control_plane(home, *words, KUBECONFIG=str(folder / "kubeconfig"))
            made.append(stack.enter_context(entered))
        yield made


def lease(cluster: Cluster) -> dict[str, Any] | None:
    return cluster.api.find("leases", "meshlib-status", "shop")


def holder(cluster: Cluster) -> str:
    found = lease(cluster)
    return str(found["spec"].get("holderIdentity", "")) if found else ""


def leads(replica: ControlPlaneProcess) -> bool:
    return "holds the lease" in replica.log


def spread(meshes: list[Mesh], made: list[ControlPlaneProcess], new: Callable[[], Mesh]) -> None:
    """Processes join until each replica has one: where each begins is chance."""
    for _ in range(32):
        mesh = new()
        mesh.start()
        mesh.resolve("reviews.shop:9080")
        meshes.append(mesh)
        if all(map(clients, made)) and len(meshes) >= 2:
            return
    raise AssertionError("nobody chose the other replica")


def test_a_replica_dies_in_the_middle_of_a_rollout(any_api: ApiServer, tmp_path: Path) -> None:
    """SIGKILL of the one that leads. No call fails; its clients go to the other one, which tells the same under the
    same versions, and writes statuses from then on."""
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster(any_api))
        host = cluster.host
        old = [stack.enter_context(contextlib.ExitStack()) for _ in range(2)]
        before = [until_gone.enter_context(named("old", host)) for until_gone in old]
        after = [stack.enter_context(named("new", host)) for _ in range(2)]
        cluster.put(service(), *(pod(f"old-{number}", peer.port, host=host) for number, peer in enumerate(before)))
        made = stack.enter_context(replicas(cluster, tmp_path))
        addresses = ",".join(replica.xds for replica in made)

        def new() -> Mesh:
            return stack.enter_context(Mesh(Settings(addresses, cache_dir="-", telemetry="off")))

        meshes: list[Mesh] = []
        spread(meshes, made, new)
        for replica in made:
            number = len(clients(replica))
            eventually(lambda replica=replica, number=number: are_synced(replica, number), "in sync")  # type: ignore[misc]
        assert versions(made[0]) == versions(made[1])
        assert len(versions(made[0])) == 1
        eventually(lambda: any(map(leads, made)), "one replica leads")
        dying, staying = sorted(made, key=leads, reverse=True)
        led_by = holder(cluster)
        with Load(meshes) as load:
            load.goes_on(1)
            cluster.put(pod("new-0", after[0].port, host=host))
            dying.process.send_signal(signal.SIGKILL)
            cluster.put(pod("old-0", before[0].port, ready=False, host=host))
            old[0].close()  # it does not wait until everybody has heard of it
            load.goes_on(1.5)
            eventually(lambda: are_synced(staying, len(meshes)), "everybody is at the replica that stays")
            cluster.put(pod("new-1", after[1].port, host=host), pod("old-1", before[1].port, ready=False, host=host))
            old[1].close()
            load.goes_on(2)
            eventually(lambda: set(load.told[-RATE:]) == {"new"}, "the new ones have all calls")
            load.goes_on(1)
        assert set(load.told) == {"old", "new"}, Counter(load.told)
        eventually(lambda: are_synced(staying, len(meshes)), "in sync")
        assert len(versions(staying)) == 1
        # What is left of the dead leader's fifteen seconds proves nothing: it is over now.
        left = lease(cluster)
        assert left is not None
        if left["spec"]["holderIdentity"] == led_by:
            cluster.put({**left, "spec": {**left["spec"], "leaseDurationSeconds": 1}})
        eventually(lambda: holder(cluster) not in ("", led_by), "the other one leads")
        eventually(lambda: leads(staying), "and says so")


def test_a_restarted_process_begins_with_the_replica_that_is_there(any_api: ApiServer, tmp_path: Path) -> None:
    """The first of the addresses is dead, and the call waits for no more than the next attempt."""
    with Cluster(any_api) as cluster, named("one", cluster.host) as peer:
        cluster.put(service(), pod("a", peer.port, host=cluster.host))
        with replicas(cluster, tmp_path) as made:
            made[0].process.kill()
            made[0].process.wait(30)
            addresses = ",".join(replica.xds for replica in made)
            for _ in range(4):
                with (
                    Mesh(Settings(addresses, cache_dir="-", telemetry="off", resolve_timeout=30.0)) as mesh,
                    mesh.Client(timeout=30) as client,
                ):
                    assert client.get("http://reviews.shop:9080/").text == "one"
