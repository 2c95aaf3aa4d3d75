"""Two replicas at a real API server, a STRICT mesh of injected pods: one replica is killed during a rollout."""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_replicas import RATE, Load, are_synced, clients, leads, pod, service, spread
from town import eventually

from inbound.inbound_servers import uvicorn_server
from kube.installed import HOME, install, pod_of_it
from kube.real_cluster import RealCluster, own_address
from meshlib.inbound.peer import of_scope
from meshlib.mesh import Mesh, Settings

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

STRICT = {
    "apiVersion": "security.istio.io/v1",
    "kind": "PeerAuthentication",
    "metadata": {"name": "default", "namespace": HOME},
    "spec": {"mtls": {"mode": "STRICT"}},
}


class Town:
    """Pods of the namespace `shop`: each with the environment that the webhook has given it, in a mesh of its own."""

    def __init__(self, cluster: RealCluster, folder: Path, addresses: str) -> None:
        self._cluster, self._folder, self._addresses = cluster, folder, addresses
        self.callers: set[str] = set()
        """Who has called, as the servers have seen it."""

    def mesh(self, name: str, app: str, port: int = 0) -> Mesh:
        containers = [{"name": "app", "image": "none", "ports": [{"containerPort": port}] if port else []}]
        labels = {"app": app, "security.istio.io/tlsMode": "istio"}
        given = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "shop", "labels": labels},
            "spec": {"serviceAccountName": app, "containers": containers},
            "status": {"podIP": own_address(), "podIPs": [{"ip": own_address()}], "phase": "Running"},
        }
        return Mesh(Settings.from_environment(self._environment(self._made(given))))

    def _made(self, given: dict[str, Any]) -> dict[str, Any]:
        """As a ReplicaSet makes its pods: again, where the webhook of a replica that has just died was asked."""
        made: list[dict[str, Any]] = []

        def try_it() -> bool:
            with contextlib.suppress(AssertionError):
                made.append(self._cluster.put(given))
            return bool(made)

        eventually(try_it, f"the pod {given['metadata']['name']} is made")
        return made[0]

    def _environment(self, given: dict[str, Any]) -> dict[str, str]:
        """As a kubelet resolves it; files lie in a folder of this machine."""
        folder = self._folder / given["metadata"]["name"]
        folder.mkdir()
        spec = given["spec"]
        root = next(each["value"] for each in spec["initContainers"][0]["env"] if each["name"] == "MESHLIB_ROOT")
        volumes = {each["name"]: each for each in spec["volumes"]}
        (source,) = volumes["meshlib-token"]["projected"]["sources"]
        audience = source["serviceAccountToken"]["audience"]
        (folder / "root-cert.pem").write_text(root)
        (folder / "token").write_text(self._cluster.token("shop", spec["serviceAccountName"], audience))
        fields = {
            "metadata.namespace": "shop",
            "spec.serviceAccountName": spec["serviceAccountName"],
            "status.podIP": own_address(),
        }
        found: dict[str, str] = {}
        for each in spec["containers"][0]["env"]:
            text = each["value"] if "value" in each else fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
            found[each["name"]] = text.replace("$(MESHLIB_POD_IP)", own_address())
        places = {
            "MESHLIB_CA_ROOTS": str(folder / "root-cert.pem"),
            "MESHLIB_TOKEN_FILE": str(folder / "token"),
            "MESHLIB_CONTROL_PLANE": self._addresses,
            "MESHLIB_CACHE_DIR": "-",
            "MESHLIB_TELEMETRY": "off",
        }
        return {**found, **places}

    @contextlib.contextmanager
    def serving(self, name: str, answer: str) -> Iterator[int]:
        """A pod of reviews that says `answer`. Yields its port."""
        serving: list[Mesh] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                self.callers.add(str(of_scope(scope).identity))
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": answer.encode()})
                return
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})

        def protocol(**options: Any) -> Any:
            return serving[0].listening.uvicorn(**options)

        with uvicorn_server(app, address=own_address(), http=protocol) as url:
            port = int(url.rpartition(":")[2])
            with self.mesh(name, "reviews", port) as mesh:
                serving.append(mesh)
                mesh.serve()
                yield port


def at(name: str, port: int, ready: bool = True) -> dict[str, Any]:
    """Its EndpointSlice, with an address that a real API server takes."""
    given = pod(name, port, ready, own_address())
    given["endpoints"][0] |= {"targetRef": {"kind": "Pod", "name": name}}
    return given


def test_a_replica_dies_in_the_middle_of_a_rollout_under_strict_mtls(real_cluster: RealCluster, tmp_path: Path) -> None:
    """SIGKILL of the one that leads, while pods are replaced: their certificates come from the one that stays, whose
    CA is the same. No call fails, and none goes in plaintext."""
    cluster = real_cluster
    install(cluster, tmp_path, "--istio-crds", "--replicas", "2")
    shop = {"name": "shop", "labels": {"meshlib-injection": "enabled"}}
    cluster.put({"apiVersion": "v1", "kind": "Namespace", "metadata": shop}, service(), STRICT)
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(pod_of_it(cluster, tmp_path / name)) for name in ("one", "two")]
        town = Town(cluster, tmp_path, ",".join(each.xds for each in made))
        old = [stack.enter_context(contextlib.ExitStack()) for _ in range(2)]
        before = [each.enter_context(town.serving(f"old-{number}", "old")) for number, each in enumerate(old)]
        cluster.put(*(at(f"old-{number}", port) for number, port in enumerate(before)))
        meshes: list[Mesh] = []
        spread(meshes, made, lambda: stack.enter_context(town.mesh(f"web-{len(meshes)}", "web")))
        for replica in made:
            number = len(clients(replica))
            eventually(lambda replica=replica, number=number: are_synced(replica, number), "in sync")  # type: ignore[misc]
        eventually(lambda: any(map(leads, made)), "one replica leads")
        dying, staying = sorted(made, key=leads, reverse=True)
        with Load(meshes) as load:
            eventually(lambda: set(load.told[-RATE:]) == {"old"} and len(load.told) > RATE, "the first ones are called")
            begun = len(load.told)
            load.goes_on(1)
            dying.process.send_signal(signal.SIGKILL)
            after = [stack.enter_context(town.serving("new-0", "new"))]
            cluster.put(at("new-0", after[0]))
            load.goes_on(1)
            cluster.put(at("old-0", before[0], ready=False))
            old[0].close()  # it does not wait until everybody has heard of it
            load.goes_on(1.5)
            after.append(stack.enter_context(town.serving("new-1", "new")))
            cluster.put(at("new-1", after[1]), at("old-1", before[1], ready=False))
            old[1].close()
            load.goes_on(2)
            eventually(lambda: set(load.told[-RATE:]) == {"new"}, "the new ones have all calls")
            load.goes_on(1)
        assert set(load.told[begun:]) == {"old", "new"}, Counter(load.told[begun:])
        assert town.callers == {"spiffe://cluster.local/ns/shop/sa/web"}
        eventually(lambda: are_synced(staying, len(meshes) + 2), "everybody is at the replica that stays")
        lease = cluster.find("Lease", "meshlib-status", HOME, "coordination.k8s.io")
        assert lease is not None
        # What is left of the dead leader's fifteen seconds proves nothing: it is over now.
        cluster.put({**lease, "spec": {**lease["spec"], "leaseDurationSeconds": 1}})
        eventually(lambda: leads(staying), "the other one leads")
