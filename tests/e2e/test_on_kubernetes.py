"""A service in a cluster: the webhook's environment, Kubernetes' token, EndpointSlices, and mTLS from pod to pod."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
from town import eventually

from inbound.inbound_servers import Witness, uvicorn_server
from kube.api_server import ApiServer, crd
from kube.real_api import RealApi
from kube.real_cluster import own_address
from meshlib.controlplane.admission import Injection
from meshlib.controlplane.authentication import TokenReview
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.kube.settings import KubeSettings
from meshlib.mesh import Mesh
from meshlib.settings import Settings

pytestmark = pytest.mark.timeout(180)


def token(account: str) -> str:
    """Of a Kubernetes token, only Kubernetes knows whether it is good: anybody else sees that it is a JWT."""
    parts = ({"alg": "RS256", "kid": "1"}, {"iss": "kubernetes", "sub": account})
    return (
        ".".join(base64.urlsafe_b64encode(json.dumps(each).encode()).decode().rstrip("=") for each in parts) + ".c2ln"
    )


def pod(name: str, port: int | None, host: str = "") -> dict[str, Any]:
    ports = [{"name": "http", "containerPort": port}] if port else []
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{name}-1", "namespace": "shop", "labels": {"app": name}},
        "spec": {"serviceAccountName": name, "containers": [{"name": "app", "image": name, "ports": ports}]},
        "status": {"podIP": host or "192.0.2.1", "phase": "Running"},
    }


def account(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": "shop"}}


def service() -> dict[str, Any]:
    spec = {"selector": {"app": "reviews"}, "ports": [{"name": "http", "port": 9080}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "reviews", "namespace": "shop"}, "spec": spec}


def endpoint_slice(host: str, port: int, ready: bool) -> dict[str, Any]:
    labels = {"kubernetes.io/service-name": "reviews"}
    target = {"kind": "Pod", "name": "reviews-1"}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "reviews-a", "namespace": "shop", "labels": labels},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port}],
        "endpoints": [{"addresses": [host], "conditions": {"ready": ready}, "targetRef": target}],
    }


STRICT = {
    "apiVersion": "security.istio.io/v1",
    "kind": "PeerAuthentication",
    "metadata": {"name": "default", "namespace": "istio-system"},
    "spec": {"mtls": {"mode": "STRICT"}},
}


async def environment(plane: ControlPlane, given: dict[str, Any], folder: Path, proof: str) -> dict[str, str]:
    """What the webhook gives the pod, as Kubernetes would resolve it; files lie in `folder`."""
    context = ssl.create_default_context(cadata=plane.roots)
    review = {"apiVersion": "admission.k8s.io/v1", "request": {"uid": "1", "namespace": "shop", "object": given}}
    async with httpx.AsyncClient(verify=context, trust_env=False, timeout=30) as http:
        answer = (await http.post(f"{plane.webhook_url}/inject", json=review)).json()["response"]
    patch = json.loads(base64.b64decode(answer["patch"]))
    (init,) = [each["value"][0] for each in patch if each["path"] == "/spec/initContainers"]
    (folder / "root-cert.pem").write_text(next(each["value"] for each in init["env"] if each["name"] == "MESHLIB_ROOT"))
    (folder / "token").write_text(proof)
    values = [each["value"] for each in patch if each["path"].startswith("/spec/containers/0/env")]
    fields = {
        "metadata.namespace": "shop",
        "spec.serviceAccountName": given["spec"]["serviceAccountName"],
        "status.podIP": given["status"]["podIP"],
    }
    found: dict[str, str] = {}
    for each in (entry for value in values for entry in (value if isinstance(value, list) else [value])):
        text = each["value"] if "value" in each else fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
        found[each["name"]] = text.replace("$(MESHLIB_POD_IP)", given["status"]["podIP"])
    found["MESHLIB_CA_ROOTS"] = str(folder / "root-cert.pem")
    found["MESHLIB_TOKEN_FILE"] = str(folder / "token")
    return {**found, "MESHLIB_CONTROL_PLANE": plane.xds_address, "MESHLIB_CACHE_DIR": "-"}


async def test_pods_call_each_other_by_mtls_with_nothing_but_what_is_injected(
    any_api: ApiServer, tmp_path: Path
) -> None:
    """STRICT from the start. A pod whose probe fails gets no call, though its process is connected."""
    (tmp_path / "control-plane-token").write_text("control-plane")
    async with any_api as cluster:
        host, proofs = "127.0.0.1", {name: token(name) for name in ("reviews", "web")}
        if isinstance(cluster, RealApi):
            host = own_address()
            for name in proofs:
                cluster.put(account(name))
                proofs[name] = cluster.cluster.token("shop", name, "istio-ca")
        else:
            cluster.tokens = {proofs[name]: f"system:serviceaccount:shop:{name}" for name in proofs}
            cluster.tokens["control-plane"] = "system:serviceaccount:istio-system:meshlib"
        cluster.put(crd("PeerAuthentication", "peerauthentications", "security.istio.io", "v1"))
        for each in (STRICT, service(), pod("web", None)):
            cluster.put(each)
        token_file = tmp_path / "control-plane-token"
        plane = ControlPlane(
            ControlPlaneSettings(
                xds=("127.0.0.1", 0),
                admin=("127.0.0.1", 0),
                tls=True,
                cluster=KubeSettings(cluster.url, token_file=token_file),
                kubernetes=TokenReview(cluster.url, token_file),
                webhook=("127.0.0.1", 0),
                injection=Injection("meshlib", "meshlib.istio-system.svc:15012"),
            )
        )
        await plane.start()
        loop = asyncio.get_running_loop()

        def put(*objects: dict[str, Any]) -> None:
            async def all_of_them() -> None:
                for each in objects:
                    cluster.put(each)

            asyncio.run_coroutine_threadsafe(all_of_them(), loop).result(30)

        def environ(given: dict[str, Any]) -> dict[str, str]:
            folder = tmp_path / given["metadata"]["name"]
            folder.mkdir()
            made = environment(plane, given, folder, proofs[given["spec"]["serviceAccountName"]])
            return asyncio.run_coroutine_threadsafe(made, loop).result(30)

        try:
            await asyncio.to_thread(_serve_and_call, host, put, environ)
        finally:
            await plane.stop()


def _serve_and_call(host: str, put: Any, environ: Any) -> None:
    witness = Witness()

    with uvicorn_server(witness, address=host, http=witness.http) as url:
        port = int(url.rpartition(":")[2])
        served = pod("reviews", port, host)
        put(served, endpoint_slice(host, port, ready=False))
        with (
            Mesh(Settings.from_environment(environ(served))) as reviews,
            Mesh(Settings.from_environment(environ(pod("web", None)))) as web,
            web.Client(timeout=30) as client,
        ):
            witness.mesh = reviews
            reviews.serve()

            def status() -> int:
                with contextlib.suppress(httpx.HTTPError):
                    return client.get("http://reviews:9080/").status_code
                return 0

            eventually(lambda: status() == 503, "nobody serves reviews: its probe fails")
            assert witness.seen == []
            put(endpoint_slice(host, port, ready=True))
            eventually(lambda: status() == 200, "reviews is called")
            assert set(witness.seen) == {"spiffe://cluster.local/ns/shop/sa/web"}
