"""Are probes and Prometheus answered on a port of their own, from before the cluster was read until the end?"""

from __future__ import annotations

import asyncio

import httpx
import pytest

from kube.api_server import ApiServer, crd
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.kube.settings import KubeSettings
from peers import unused_port

PATIENCE = 30.0


async def until_ready(client: httpx.AsyncClient, url: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while (await client.get(url)).status_code != 200:  # noqa: ASYNC110 -- nobody is told when it is
            await asyncio.sleep(0.02)


async def test_it_lives_before_it_is_ready_and_says_when_it_is() -> None:
    """A right that is missing keeps it from serving: not ready, and no reason to be killed. Its figures are there from
    the first moment, and nothing of the configuration is."""
    async with ApiServer() as api, httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as client:
        api.put(crd("AuthorizationPolicy", "authorizationpolicies", "security.istio.io", "v1"))
        api.forbidden.add("authorizationpolicies")
        port = unused_port()
        settings = ControlPlaneSettings(
            xds=("127.0.0.1", 0), admin=("127.0.0.1", 0), metrics=("127.0.0.1", port), cluster=KubeSettings(api.url)
        )
        plane, home = ControlPlane(settings), f"http://127.0.0.1:{port}"
        starting = asyncio.create_task(plane.start())
        try:
            async with asyncio.timeout(PATIENCE):
                await api.watched("services")
            assert (await client.get(f"{home}/healthz")).status_code == 200
            ready = await client.get(f"{home}/readyz")
            assert (ready.status_code, "not ready" in ready.text) == (503, True)
            assert "pilot_info" in (await client.get(f"{home}/metrics")).text
            api.forbidden.clear()
            await until_ready(client, f"{home}/readyz")
            await asyncio.wait_for(starting, PATIENCE)
            assert plane.metrics_url == f"{home}/metrics"
            for path in ("/v1/objects", "/v1/apply", "/dashboard/", "/sd/prometheus", "/"):
                assert (await client.get(home + path)).status_code == 404
            assert (await client.post(f"{home}/metrics")).status_code == 405
        finally:
            starting.cancel()
            await plane.stop()
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{home}/healthz")


async def test_what_is_the_clusters_is_not_applied_here() -> None:
    """A second replica would not know it, nor would this one after a restart."""
    settings = ControlPlaneSettings(xds=("127.0.0.1", 0), admin=("127.0.0.1", 0), is_read_only=True)
    plane = ControlPlane(settings)
    await plane.start()
    try:
        async with httpx.AsyncClient(base_url=plane.admin_url, trust_env=False, timeout=PATIENCE) as client:
            for path in ("/v1/apply", "/v1/delete"):
                answer = await client.post(path, content="{}", headers={"content-type": "application/yaml"})
                assert (answer.status_code, "kubectl" in answer.json()["error"]) == (409, True)
            may = (await client.get("/v1/whoami")).json()["may"]
            assert [may[name]["namespaces"] for name in ("view", "steer", "apply")] == [["*"], [], []]
            assert "kubectl" in may["apply"]["reason"]
    finally:
        await plane.stop()


async def test_an_address_that_is_taken_is_named() -> None:
    """Before anything else was begun."""
    port = unused_port()
    here = {"xds": ("127.0.0.1", 0), "admin": ("127.0.0.1", 0), "metrics": ("127.0.0.1", port)}
    one, other = ControlPlane(ControlPlaneSettings(**here)), ControlPlane(ControlPlaneSettings(**here))  # type: ignore[arg-type]
    try:
        await one.start()
        with pytest.raises(OSError, match=f"metrics can't be served on 127.0.0.1:{port}"):
            await other.start()
    finally:
        await other.stop()
        await one.stop()
