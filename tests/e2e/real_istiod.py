"""A real istiod (tests/go/istio, which make builds) at a real API server, and the pods that it is told of."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from kube.real_cluster import BUILT, RealCluster, own_address
from peers import unused_port

MODULE = Path(__file__).parents[1] / "go" / "istio" / "go.mod"
PROGRAM = BUILT / "pilot-discovery"
HOME = "istio-system"
NAMESPACE = "shop"
HOW = "there is no istiod here: make test-istiod builds it, and what it needs"
PATIENCE = 90.0
_AUDIENCE = "istio-ca"


@cache
def definitions() -> tuple[dict[str, Any], ...] | None:
    """Istio's CustomResourceDefinitions, from the module that the program was built of; None where it is not."""
    found = re.search(r"istio\.io/istio (\S+)", MODULE.read_text())
    assert found is not None
    cache_folder = os.environ.get("GOMODCACHE") or str(Path.home() / "go" / "pkg" / "mod")
    file = Path(cache_folder) / f"istio.io/istio@{found[1]}" / "manifests/charts/base/files/crd-all.gen.yaml"
    return tuple(each for each in yaml.safe_load_all(file.read_text()) if each) if file.exists() else None


class RealIstiod:
    """`with RealIstiod(cluster, folder) as istiod:` runs until the end; stop() and start() are on the same ports."""

    def __init__(self, cluster: RealCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self._ports = {each: unused_port() for each in ("grpc", "secureGRPC", "http", "monitoring", "ctrlz")}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> str:
        return f"localhost:{self._ports['secureGRPC']}"

    def __enter__(self) -> Self:
        found = definitions()
        assert found is not None, HOW
        self.cluster.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": HOME}})
        self.cluster.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        self._define(found)
        self.cluster.kubeconfig(self.folder / "istiod.kubeconfig")
        (self.folder / "mesh.yaml").write_text("{}")
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _define(self, found: tuple[dict[str, Any], ...]) -> None:
        """All, and then wait for all: one by one they take a second each."""
        for each in found:
            self.cluster.ask("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", each)
        for each in found:
            self.cluster.put(each)

    def start(self) -> None:
        ports = self._ports
        words = [
            *(PROGRAM, "discovery", f"--kubeconfig={self.folder / 'istiod.kubeconfig'}"),
            *(f"--meshConfig={self.folder / 'mesh.yaml'}", f"--namespace={HOME}", "--httpsAddr=", "--profile=false"),
            *(f"--{each}Addr=127.0.0.1:{ports[each]}" for each in ("grpc", "secureGRPC", "http", "monitoring")),
            *(f"--ctrlz_port={ports['ctrlz']}", "--log_output_level=default:info", "--shutdownDuration=1s"),
        ]
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "POD_NAME": "istiod-0",
            "POD_NAMESPACE": HOME,
            "ISTIOD_CUSTOM_HOST": "localhost",  # beside istiod.istio-system.svc, which no name server here knows
            "INJECT_ENABLED": "false",
            "PILOT_ENABLE_GATEWAY_API": "false",
        }
        with (self.folder / "istiod.log").open("ab") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log, cwd=self.folder, env=environment)
        self.until(self._is_ready, "istiod is ready")
        self.until(lambda: self.root(NAMESPACE) is not None, "the config map with its root")

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(PATIENCE)

    def log(self) -> str:
        return (self.folder / "istiod.log").read_text(errors="replace")

    def until(self, is_so: Any, what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            assert self._process is not None
            assert self._process.poll() is None, f"istiod has ended: {self.log()[-5000:]}"
            assert time.monotonic() < deadline, f"{what}: {self.log()[-5000:]}"
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.get("/ready").status_code == 200
        return False

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self._ports['http']}{path}", trust_env=False, timeout=30)

    def rejected(self) -> dict[str, float]:
        """How often its clients have refused something, by the series of its own metrics."""
        url = f"http://127.0.0.1:{self._ports['monitoring']}/metrics"
        lines = httpx.get(url, trust_env=False, timeout=30).text.splitlines()
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if re.match(r"pilot_(total_xds_rejects|xds_\w+_reject)\b", line)
        }

    # What a pod finds mounted

    def root(self, namespace: str) -> str | None:
        found = self.cluster.find("ConfigMap", "istio-ca-root-cert", namespace)
        return found and str(found["data"]["root-cert.pem"])

    def mounted(self, account: str, namespace: str = NAMESPACE) -> tuple[Path, Path]:
        """The files of the roots and of a token of this account."""
        root = self.root(namespace)
        assert root is not None
        roots, token = self.folder / "root-cert.pem", self.folder / f"{account}.token"
        roots.write_text(root)
        self.cluster.put({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _named(account, namespace)})
        token.write_text(self.cluster.token(namespace, account, _AUDIENCE))
        return roots, token

    # What Kubernetes is told

    def apply(self, text: str) -> None:
        for each in yaml.safe_load_all(text):
            each["metadata"].setdefault("namespace", NAMESPACE)
            self.cluster.put(each)

    def delete(self, kind: str, name: str, group: str) -> None:
        self.cluster.remove(kind, name, NAMESPACE, group)

    def service(self, name: str, port: int = 9080) -> None:
        self.cluster.put(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": _named(name),
                "spec": {"selector": {"app": name}, "ports": [{"name": "http", "port": port, "targetPort": "http"}]},
            }
        )

    def pod(self, name: str, account: str, labels: dict[str, str], port: int) -> None:
        """One that is ready, at this machine's own address."""
        container = {"name": "app", "image": "none", "ports": [{"name": "http", "containerPort": port}]}
        self.cluster.put(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {**_named(name), "labels": labels},
                "spec": {"serviceAccountName": account, "containers": [container]},
                "status": {
                    "phase": "Running",
                    "podIP": own_address(),
                    "podIPs": [{"ip": own_address()}],
                    "conditions": [{"type": "Ready", "status": "True"}],
                },
            }
        )

    def endpoint_slice(self, service: str, pod: str, port: int) -> None:
        """As the controller of EndpointSlices writes it. One address is one endpoint of a service to an istiod."""
        reference = {"kind": "Pod", "name": pod, "namespace": NAMESPACE}
        self.cluster.put(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {**_named(f"{service}-{pod}"), "labels": {"kubernetes.io/service-name": service}},
                "addressType": "IPv4",
                "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
                "endpoints": [{"addresses": [own_address()], "conditions": {"ready": True}, "targetRef": reference}],
            }
        )

    def workload_entry(self, name: str, account: str, labels: dict[str, str], address: str, port: int) -> None:
        """One that is no pod. It may be at a loopback address, which no EndpointSlice may name."""
        spec = {"address": address, "ports": {"http": port}, "labels": labels, "serviceAccount": account}
        self.cluster.put(
            {
                "apiVersion": "networking.istio.io/v1",
                "kind": "WorkloadEntry",
                "metadata": {**_named(name), "labels": labels},
                "spec": spec,
            }
        )


def _named(name: str, namespace: str = NAMESPACE) -> dict[str, Any]:
    return {"name": name, "namespace": namespace}


@contextlib.contextmanager
def real_istiod(cluster: RealCluster, folder: Path) -> Iterator[RealIstiod]:
    with RealIstiod(cluster, folder) as found:
        yield found
