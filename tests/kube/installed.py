"""The control plane of an installation, as its Deployment would run it: as its service account, on this machine."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path

import yaml
from click.testing import Result
from typer.testing import CliRunner

from cli.meshctl_processes import ControlPlaneProcess, control_plane
from kube.real_cluster import RealCluster, own_address
from meshlib.cli.app import app
from peers import unused_port

HOME = "istio-system"


def meshctl(cluster: RealCluster, folder: Path, *words: str) -> Result:
    """As the cluster's administrator."""
    config = folder / "admin-kubeconfig"
    if not config.exists():
        cluster.kubeconfig(config)
    return CliRunner().invoke(app, list(words), env={"KUBECONFIG": str(config)}, catch_exceptions=False)


def install(cluster: RealCluster, folder: Path, *words: str) -> None:
    done = meshctl(cluster, folder, "install", *words)
    assert done.exit_code == 0, done.output


def token_kubeconfig(cluster: RealCluster, folder: Path, namespace: str, account: str) -> Path:
    """What a pod of this account finds mounted, as files beside a kubeconfig that names them."""
    (folder / "token").write_text(cluster.token(namespace, account))
    (folder / "ca.crt").write_text(cluster.root)
    document = {
        "current-context": "pod",
        "contexts": [{"name": "pod", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
        "clusters": [{"name": "c", "cluster": {"server": cluster.url, "certificate-authority": "ca.crt"}}],
        "users": [{"name": "u", "user": {"tokenFile": "token"}}],
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(document))
    return folder / "kubeconfig"


@contextlib.contextmanager
def pod_of_it(cluster: RealCluster, folder: Path, *more: str) -> Iterator[ControlPlaneProcess]:
    """Its arguments are the Deployment's, but for places and ports, which are this machine's; the API server finds its
    webhooks by an EndpointSlice."""
    folder.mkdir()
    deployment = cluster.find("Deployment", "meshlib", HOME, "apps")
    secret = cluster.find("Secret", "meshlib-ca", HOME)
    assert deployment is not None and secret is not None
    for name, content in secret["data"].items():
        (folder / name).write_bytes(base64.b64decode(content))
        (folder / name).chmod(0o600)
    xds, webhook = unused_port(), unused_port()
    places = {
        "/var/lib/meshlib/keys": str(folder),
        "/var/lib/meshlib/state": str(folder / "state"),
        "0.0.0.0:15012": f"0.0.0.0:{xds}",
        "0.0.0.0:15017": f"0.0.0.0:{webhook}",
        "0.0.0.0:15020": f"127.0.0.1:{unused_port()}",
    }
    name, *words = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    assert name == "control-plane"
    for old, new in places.items():
        words = [each.replace(old, new) for each in words]
    config = token_kubeconfig(cluster, folder, HOME, "meshlib")
    with control_plane(folder, *words, "--admin", "127.0.0.1:0", *more, KUBECONFIG=str(config)) as process:
        process.xds = f"127.0.0.1:{xds}"
        cluster.put(_endpoint(folder.name, xds, webhook))
        try:
            yield process
        finally:
            cluster.remove("EndpointSlice", f"meshlib-{folder.name}", HOME, "discovery.k8s.io")


def _endpoint(name: str, xds: int, webhook: int) -> dict[str, object]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"meshlib-{name}",
            "namespace": HOME,
            "labels": {"kubernetes.io/service-name": "meshlib"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "grpc-xds", "port": xds}, {"name": "https-webhook", "port": webhook}],
        "endpoints": [{"addresses": [own_address()], "conditions": {"ready": True}}],
    }
