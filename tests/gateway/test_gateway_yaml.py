"""From a folder of Istio's YAML to what a client sees: the gateway as users run it, without a control plane."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trustme
from gateways import raw, url

from meshlib.gateway.server import Gateway
from meshlib.mesh import Mesh
from meshlib.model import NodeKind
from meshlib.settings import Settings
from peers import Peer

GATEWAY = """
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: door, namespace: shop}}
spec:
  selector: {{istio: ingressgateway}}
  servers:
  - port: {{number: 80, name: http, protocol: HTTP}}
    hosts: [shop.example]
    tls: {{httpsRedirect: {redirect}}}
  - port: {{number: 80, name: open, protocol: HTTP}}
    hosts: ["*.open.example"]
  - port: {{number: 443, name: https, protocol: HTTPS}}
    hosts: [shop.example]
    tls: {{mode: SIMPLE, serverCertificate: {folder}/tls.crt, privateKey: {folder}/tls.key}}
"""
OTHERS = """
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: inner, namespace: shop}
spec:
  selector: {istio: eastwest}
  servers:
  - port: {number: 9999, name: http, protocol: HTTP}
    hosts: ["*"]
"""
RULES = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: shop, namespace: shop}}
spec:
  hosts: [shop.example, "*.open.example"]
  gateways: [door]
  http:
  - match: [{{uri: {{prefix: {prefix}}}}}]
    rewrite: {{uri: /}}
    route: [{{destination: {{host: catalogue.shop.svc.cluster.local, port: {{number: 8000}}}}}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: catalogue, namespace: shop}}
spec:
  hosts: [catalogue.shop.svc.cluster.local]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{{number: 8000, name: http, protocol: HTTP, targetPort: {port}}}]
  endpoints: [{{address: 127.0.0.1}}]
"""


@asynccontextmanager
async def running(folder: Path, *listeners: str) -> AsyncIterator[Gateway]:
    settings = Settings(
        control_plane=str(folder),
        namespace="istio-system",
        workload="istio-ingressgateway",
        labels=(("istio", "ingressgateway"),),
    )
    with Mesh(settings, kind=NodeKind.ROUTER) as mesh:
        async with Gateway(mesh, ports={80: 0, 443: 0, 9999: 0}) as made:
            async with asyncio.timeout(20):
                while set(made.addresses) != set(listeners):  # noqa: ASYNC110 -- the feed is a thread
                    await asyncio.sleep(0.01)
            yield made


async def until(client: httpx.AsyncClient, target: str, host: str, status: int) -> httpx.Response:
    async with asyncio.timeout(20):
        while (response := await client.get(target, headers={"host": host})).status_code != status:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return response


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


async def test_istios_yaml_is_served(tmp_path: Path, authority: trustme.CA) -> None:
    """Hosts, ports, TLS SIMPLE and httpsRedirect from Gateway, routes from VirtualService; an edit is live."""
    issued = authority.issue_cert("shop.example")
    issued.private_key_pem.write_to_path(str(tmp_path / "tls.key"))
    (tmp_path / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    door, rules = tmp_path / "gateway.yaml", tmp_path / "rules.yaml"
    (tmp_path / "others.yaml").write_text(OTHERS)
    door.write_text(GATEWAY.format(folder=tmp_path, redirect="true"))
    with Peer() as peer:
        rules.write_text(RULES.format(port=peer.port, prefix="/shop/"))
        async with running(tmp_path, "0.0.0.0_80", "0.0.0.0_443") as made, httpx.AsyncClient(timeout=20) as client:
            response = await client.get(url(made, "/shop/a", 80), headers={"host": "shop.example"})
            assert (response.status_code, response.headers["location"]) == (301, "https://shop.example/shop/a")
            response = await client.get(url(made, "/shop/a", 80), headers={"host": "x.open.example"})
            assert (response.status_code, peer.received[-1].target) == (200, "/a")
            for host, path in (("other.example", "/shop/a"), ("x.open.example", "/a")):
                assert (await client.get(url(made, path, 80), headers={"host": host})).status_code == 404
            async with raw(made, 443, trusting, "shop.example") as secure:
                await secure.send("GET /shop/b HTTP/1.1", "Host: shop.example")
                assert (await secure.response())[2] == b"ok"
                assert peer.received[-1].header("x-forwarded-proto") == "https"
                await secure.send("GET /shop/b HTTP/1.1", "Host: x.open.example")
                assert (await secure.response())[0] == 404

            door.write_text(GATEWAY.format(folder=tmp_path, redirect="false"))
            await until(client, url(made, "/shop/a", 80), "shop.example", 200)
            rules.write_text(RULES.format(port=peer.port, prefix="/new/"))
            await until(client, url(made, "/new/a", 80), "shop.example", 200)
            assert (await client.get(url(made, "/shop/a", 80), headers={"host": "shop.example"})).status_code == 404
            assert made.problems == ()
