"""A cluster of one node, all of it Kubernetes' own: API server, controllers, scheduler, kubelet, kube-proxy, and DNS.

containerd runs the pods; CNI's bridge connects them. Nothing is pulled: images come from archives. The API server,
etcd, controllers and scheduler run on this machine, the rest on a Machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from kube.real_cluster import BUILT, PATIENCE, RealCluster
from kube.real_controllers import controllers
from node.machine import HOST, NODE, PODS, Machine, cni

PROGRAMS = ("kube-apiserver", "etcd", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl")
NAME = "node"
DNS = "10.96.0.10"


class Node:
    """`with running_node(folder, images) as node:`. What a person does with a cluster: kubectl, and images for it."""

    def __init__(self, cluster: RealCluster, machine: Machine, kubeconfig: Path) -> None:
        self.cluster, self.machine, self.kubeconfig = cluster, machine, kubeconfig

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"KUBECONFIG": str(self.kubeconfig), "PATH": f"{BUILT}:{os.environ['PATH']}"}

    def kubectl(self, *words: str, patience: float = 300.0) -> str:
        done = subprocess.run(
            ("kubectl", *words), env=self.environment, capture_output=True, text=True, timeout=patience, check=False
        )
        assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stdout}{done.stderr}\n{self.situation()}"
        return done.stdout

    def get(self, *words: str) -> Any:
        return json.loads(self.kubectl("get", "-o", "json", *words))

    def load(self, archive: Path) -> None:
        """As `kind load image-archive`."""
        self.ctr("images", "import", str(archive))

    def ctr(self, *words: str) -> None:
        self.machine.run("ctr", f"--address={self.machine.folder / 'containerd.sock'}", "--namespace=k8s.io", *words)

    def situation(self) -> str:
        """For whoever has to find out why something did not come about."""
        told = []
        for words in (("get", "pods", "-A", "-o", "wide"), ("get", "events", "-A", "--sort-by=.lastTimestamp")):
            done = subprocess.run(
                ("kubectl", *words), env=self.environment, capture_output=True, text=True, timeout=PATIENCE, check=False
            )
            told.append("\n".join((done.stdout + done.stderr).splitlines()[-40:]))
        return "\n".join(told)


@contextlib.contextmanager
def running_node(folder: Path, *archives: Path) -> Iterator[Node]:
    """Ready, with DNS; the images of the archives are there. folder: short, since sockets are in it."""
    with Machine(folder) as machine, RealCluster(HOST) as cluster, controllers(cluster, ("*",)), _scheduler(cluster):
        node = Node(cluster, machine, cluster.kubeconfig(cluster.folder / "node-admin"))
        _start_containerd(node)
        for each in archives:
            node.load(each)
        _start_kubelet(node)
        _start_proxy(node)
        cluster.until(lambda: _is_ready(node), "the node is ready")
        for each in _dns():
            cluster.put(each)
        node.kubectl("-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=120s")
        yield node


def _is_ready(node: Node) -> bool:
    node.machine.check()
    found = node.cluster.find("Node", NAME)
    conditions = {each["type"]: each["status"] for each in ((found or {}).get("status") or {}).get("conditions", ())}
    return conditions.get("Ready") == "True"


@contextlib.contextmanager
def _scheduler(cluster: RealCluster) -> Iterator[None]:
    config = cluster.kubeconfig(cluster.folder / "scheduler-kubeconfig", user="scheduler")
    words = (f"--kubeconfig={config}", "--leader-elect=false", "--secure-port=0")
    with (cluster.folder / "kube-scheduler.log").open("ab") as log:
        process = subprocess.Popen((str(BUILT / "kube-scheduler"), *words), stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait(PATIENCE)


def _start_containerd(node: Node) -> None:
    folder = node.machine.folder
    networks = folder / "cni"
    networks.mkdir()
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": PODS}]], "routes": [{"dst": "0.0.0.0/0"}]},
    }
    plugins = [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}]
    (networks / "10-pods.conflist").write_text(json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": plugins}))
    # Where root may not make a process less likely to be killed than itself, Kubernetes' wish for that is let go.
    (folder / "containerd.toml").write_text(f"""
version = 2
root = "{folder}/containerd"
state = "/run/containerd"
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:node"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni()}"
    conf_dir = "{networks}"
""")
    node.machine.start("containerd", "containerd", "--config", str(folder / "containerd.toml"))

    def is_up() -> bool:
        node.machine.check()
        with contextlib.suppress(AssertionError):
            node.ctr("version")
            return True
        return False

    node.cluster.until(is_up, "containerd")


def _start_kubelet(node: Node) -> None:
    folder, keys = node.machine.folder, node.cluster.folder
    config = node.cluster.kubeconfig(
        folder / "kubelet-kubeconfig", user=f"system:node:{NAME}", groups=("system:nodes",)
    )
    chain, key = node.cluster.ca.issue(dns=(NAME,), ips=(NODE,))
    for name, content in (("kubelet.crt", chain), ("kubelet.key", key), ("resolv.conf", b"")):
        (folder / name).write_bytes(content)
    # The disk is this machine's, which a kubelet knows nothing of from in here: no pod is to go for the want of it.
    # cgroups may be of either version; of the first one Kubernetes says that it will not take it for much longer.
    settings = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": NODE,
        "authentication": {"x509": {"clientCAFile": str(keys / "ca.crt")}, "webhook": {"enabled": True}},
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": node.machine.cgroup,
        "failCgroupV1": False,
        "failSwapOn": False,
        "clusterDNS": [DNS],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": f"unix://{folder}/containerd.sock",
        "imageServiceEndpoint": f"unix://{folder}/containerd.sock",
        "podLogsDir": str(folder / "logs"),
        "resolvConf": str(folder / "resolv.conf"),
        "tlsCertFile": str(folder / "kubelet.crt"),
        "tlsPrivateKeyFile": str(folder / "kubelet.key"),
        "volumePluginDir": str(folder / "plugins"),
        "enforceNodeAllocatable": [],
        "evictionHard": {"memory.available": "1Mi"},
        "localStorageCapacityIsolation": False,
        "imageGCHighThresholdPercent": 100,
        "registerNode": True,
    }
    (folder / "kubelet.yaml").write_text(yaml.safe_dump(settings))
    words = (f"--config={folder / 'kubelet.yaml'}", f"--kubeconfig={config}", f"--root-dir={folder / 'kubelet'}")
    named = (f"--hostname-override={NAME}", f"--node-ip={NODE}")
    node.machine.start("kubelet", str(BUILT / "kubelet"), *words, *named)


def _start_proxy(node: Node) -> None:
    folder = node.machine.folder
    config = node.cluster.kubeconfig(folder / "proxy-kubeconfig", user="kube-proxy")
    settings = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(config)},
        "clusterCIDR": PODS,
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpCloseWaitTimeout": "0s", "tcpEstablishedTimeout": "0s"},
        "hostnameOverride": NAME,
        "mode": "iptables",
    }
    (folder / "proxy.yaml").write_text(yaml.safe_dump(settings))
    node.machine.start("kube-proxy", str(BUILT / "kube-proxy"), f"--config={folder / 'proxy.yaml'}")


def _dns() -> list[dict[str, Any]]:
    """CoreDNS as kubeadm would have it, but for the names outside, which nobody here knows."""
    home = {"namespace": "kube-system", "name": "coredns"}
    labels = {"k8s-app": "kube-dns"}
    corefile = ".:53 {\n errors\n health\n ready\n kubernetes cluster.local in-addr.arpa ip6.arpa\n cache 5\n}\n"
    rules = [
        {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    rbac = "rbac.authorization.k8s.io"
    container = {
        "name": "coredns",
        "image": "localhost/coredns:node",
        "imagePullPolicy": "Never",
        "args": ["-conf", "/etc/coredns/Corefile"],
        "ports": [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53, "protocol": "TCP"}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
        "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns"}],
    }
    pod = {
        "serviceAccountName": "coredns",
        "dnsPolicy": "Default",
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
    }
    ports = [{"name": each, "port": 53, "protocol": each.upper()} for each in ("udp", "tcp")]
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": home},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": home, "data": {"Corefile": corefile}},
        {"apiVersion": f"{rbac}/v1", "kind": "ClusterRole", "metadata": {"name": "coredns"}, "rules": rules},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "coredns"},
            "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": "coredns"},
            "subjects": [{"kind": "ServiceAccount", **home}],
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {**home, "name": "kube-dns"},
            "spec": {"clusterIP": DNS, "selector": labels, "ports": ports},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": home,
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
    ]
