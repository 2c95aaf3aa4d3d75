"""Kubernetes' own controllers beside a RealCluster, and a kubelet of the tests': what makes pods of Deployments, and
EndpointSlices of pods that run."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kube.real_cluster import BUILT, PATIENCE, SYSTEM, Object, RealCluster

PROGRAM = BUILT / "kube-controller-manager"
NODE = "here"
SUBNET, LOOPBACK = "10.244.0.", "127.244.0."
"""Pods' addresses, and those at which they really are: no EndpointSlice takes a loopback address."""
GRACE = 1.0
"""Seconds for which a pod that is to end still answers."""
RUN = (
    "deployment-controller",
    "replicaset-controller",
    "endpointslice-controller",
    "namespace-controller",
    "garbage-collector-controller",
    "serviceaccount-controller",
    "root-ca-certificate-publisher-controller",
)


@contextlib.contextmanager
def controllers(cluster: RealCluster, run: Sequence[str] = RUN) -> Iterator[None]:
    """Until the end of the block. Those of nodes are left out: the only one has nobody who speaks for it."""
    keys = cluster.folder
    config = cluster.kubeconfig(keys / "controllers-kubeconfig", user="controllers")
    with (keys / "kube-controller-manager.log").open("ab") as log:
        words = (
            f"--kubeconfig={config}",
            "--leader-elect=false",
            "--secure-port=0",
            f"--controllers={','.join(run)}",
            f"--service-account-private-key-file={keys / 'accounts.key'}",
            f"--root-ca-file={keys / 'ca.crt'}",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
        )
        process = subprocess.Popen((str(PROGRAM), *words), stdout=log, stderr=log)
    try:
        cluster.until(
            lambda: cluster.find("ServiceAccount", "default") is not None, "the controllers give namespaces an account"
        )
        yield
    finally:
        process.kill()
        process.wait(PATIENCE)
        for namespace in SYSTEM:  # where wipe() leaves what the API server writes itself
            cluster.remove("ConfigMap", "kube-root-ca.crt", namespace)
            cluster.remove("ServiceAccount", "default", namespace)


class _Pod:
    """A process's worth of one pod: an HTTP server that says which version it is."""

    def __init__(self, number: int, pod: Object) -> None:
        metadata, spec = pod["metadata"], pod["spec"]
        version, port = metadata["labels"].get("version", ""), spec["containers"][0]["ports"][0]["containerPort"]

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("content-length", str(len(version)))
                self.end_headers()
                self.wfile.write(version.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.address = f"{SUBNET}{number}"
        self._server = ThreadingHTTPServer((f"{LOOPBACK}{number}", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(PATIENCE)


class Kubelet:
    """Takes every pod of one namespace for its own: binds it, runs it, says that it is ready; once it is to go, lets
    it go after GRACE."""

    def __init__(self, cluster: RealCluster, namespace: str) -> None:
        self._cluster, self._path = cluster, f"/api/v1/namespaces/{namespace}/pods"
        self._pods: dict[str, _Pod] = {}
        self._count = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kubelet", daemon=True)
        self.error: BaseException | None = None

    def __enter__(self) -> Kubelet:
        self._cluster.put({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(PATIENCE)
        for pod in self._pods.values():
            pod.stop()
        assert self.error is None, repr(self.error)

    def _run(self) -> None:
        going: dict[str, float] = {}
        try:
            while not self._is_over.wait(0.1):
                for each in self._cluster.ask("GET", self._path)["items"]:
                    name = each["metadata"]["name"]
                    if each["metadata"].get("deletionTimestamp"):
                        going[name] = going.get(name, GRACE) - 0.1
                        if going[name] <= 0:
                            self._end(name)
                    elif name not in self._pods:
                        self._begin(name, each)
        except BaseException as error:
            self.error = error

    def _begin(self, name: str, pod: Object) -> None:
        self._count += 1
        running = self._pods[name] = _Pod(self._count, pod)
        if not pod["spec"].get("nodeName"):
            binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}}
            target = {"apiVersion": "v1", "kind": "Node", "name": NODE}
            self._cluster.ask("POST", f"{self._path}/{name}/binding", {**binding, "target": target})
        status = {
            "phase": "Running",
            "podIP": running.address,
            "podIPs": [{"ip": running.address}],
            "conditions": [{"type": each, "status": "True"} for each in ("Ready", "ContainersReady", "PodScheduled")],
        }
        self._cluster.ask("PATCH", f"{self._path}/{name}/status", {"status": status})

    def _end(self, name: str) -> None:
        pod = self._pods.pop(name, None)
        if pod is not None:
            pod.stop()
        self._cluster.http.delete(f"{self._path}/{name}", params={"gracePeriodSeconds": "0"})

    def __repr__(self) -> str:
        return f"<Kubelet {len(self._pods)} pods>"
