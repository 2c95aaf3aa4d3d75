"""Authors see in their object's status what is wrong with it, and nobody else's words are lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from kube.api_server import ApiServer, crd
from meshlib.controlplane.gathered import Update
from meshlib.controlplane.kubernetes import KubernetesSource
from meshlib.controlplane.sources import ObjectStore
from meshlib.controlplane.statuses import StatusWriter
from meshlib.kube.client import KubeClient
from meshlib.kube.settings import KubeSettings

PATIENCE = 30.0
GONE = [
    {
        "type": {"code": "IST0101"},
        "level": "ERROR",
        "documentationUrl": "https://istio.io/latest/docs/reference/config/analysis/ist0101/",
    }
]


def virtual_service(name: str, host: str) -> dict[str, Any]:
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": name},
        "spec": {"hosts": [name], "http": [{"route": [{"destination": {"host": host}}]}]},
    }


@pytest.fixture
async def api(any_api: ApiServer) -> AsyncIterator[ApiServer]:
    async with any_api as server:
        server.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "mesh"}})
        server.put(crd("VirtualService", "virtualservices", "networking.istio.io", "v1"))
        server.put(
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": 80}]}}
        )
        yield server


@contextlib.asynccontextmanager
async def replica(api: ApiServer, identity: str = "one") -> AsyncIterator[StatusWriter]:
    async with KubeClient(KubeSettings(api.url)) as client:
        store = ObjectStore()
        writer: StatusWriter | None = None

        def take(update: Update) -> None:
            store.update_kubernetes(update)
            if writer is not None:
                writer.wake()

        source = KubernetesSource(client, take, first_pause=0.01, absent=PATIENCE)
        writer = StatusWriter(
            client,
            source,
            lambda: (store.objects(), store.problems()),
            namespace="mesh",
            identity=identity,
            quiet=0.01,
        )
        tasks = [asyncio.create_task(each.run()) for each in (source, writer)]
        try:
            yield writer
        finally:
            for task in reversed(tasks):
                task.cancel()
                await asyncio.wait((task,))


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not is_so():  # noqa: ASYNC110 -- the server's contents tell nobody when they change
            await asyncio.sleep(0.02)


def status(api: ApiServer, name: str) -> dict[str, Any]:
    found = api.find("virtualservices", name)
    assert found is not None
    return dict(found.get("status") or {})


def writes(api: ApiServer) -> list[str]:
    return [path for method, path in api.requests if method == "PATCH"]


async def test_a_message_comes_and_goes_with_its_reason(api: ApiServer) -> None:
    """As istiod writes it. An object that is well is not touched, and what others wrote stays."""
    api.put(virtual_service("a", "a"))
    broken = virtual_service("b", "gone")
    api.put({**broken, "status": {"conditions": [{"type": "Other", "status": "True"}]}})
    async with replica(api):
        await until(lambda: status(api, "b").get("validationMessages") == GONE)
        assert status(api, "b")["observedGeneration"] == "1"
        assert status(api, "b")["conditions"] == [{"type": "Other", "status": "True"}]
        assert status(api, "a") == {}
        async with asyncio.timeout(PATIENCE):
            await api.watched("virtualservices")
        mended = api.find("virtualservices", "b")
        assert mended is not None
        api.put({**mended, "spec": virtual_service("b", "a")["spec"]})
        await until(lambda: "validationMessages" not in status(api, "b"))
        assert status(api, "b")["conditions"] == [{"type": "Other", "status": "True"}]
        assert len(writes(api)) == 2  # its own writes come back by the watch, and wake nobody


async def test_an_object_that_is_refused_says_so(api: ApiServer) -> None:
    """kubectl took it; its last good form is in force, or none."""
    api.put({**virtual_service("b", "a"), "spec": {"hosts": ["b"], "htp": []}})
    async with replica(api):
        await until(lambda: bool(status(api, "b").get("validationMessages")))
        assert [each["type"]["code"] for each in status(api, "b")["validationMessages"]] == ["IST0106"]


async def test_one_replica_writes_and_another_takes_over(api: ApiServer) -> None:
    """Two that write at once would undo each other's words."""
    async with replica(api, "one") as one:
        await until(lambda: one.election.is_leader)
        async with replica(api, "two") as two:
            api.put(virtual_service("b", "gone"))
            await until(lambda: status(api, "b").get("validationMessages") == GONE)
            assert not two.election.is_leader
            assert len(writes(api)) == 1
    async with replica(api, "two") as two:
        await until(lambda: two.election.is_leader)
        api.put(virtual_service("c", "gone"))
        await until(lambda: status(api, "c").get("validationMessages") == GONE)


async def test_what_may_not_be_written_is_logged_once(api: ApiServer, caplog: pytest.LogCaptureFixture) -> None:
    """The mesh works without it."""
    api.put(virtual_service("b", "gone"))
    async with replica(api) as writer:
        await until(lambda: status(api, "b").get("validationMessages") == GONE)
        api.forbidden.add("virtualservices")
        found = api.find("virtualservices", "b")
        assert found is not None
        api.put({**found, "status": {}})
        for _ in range(2):
            before = len(writes(api))
            writer.wake()
            await until(lambda before=before: len(writes(api)) > before)
        told = [each for each in caplog.records if each.name == "meshlib.controlplane" and "403" in each.getMessage()]
        assert len(told) == 1


async def test_a_gateway_and_its_class_are_told_what_became_of_them(api: ApiServer) -> None:
    """Its address is the load balancer's, once there is one. Nothing is written that is there already."""
    group = "gateway.networking.k8s.io"
    api.put(crd("Gateway", "gateways", group, "v1"))
    of_cluster = crd("GatewayClass", "gatewayclasses", group, "v1")
    api.put({**of_cluster, "spec": {**of_cluster["spec"], "scope": "Cluster"}})
    api.put(
        {
            "apiVersion": f"{group}/v1",
            "kind": "GatewayClass",
            "metadata": {"name": "ours"},
            "spec": {"controllerName": "meshlib.io/gateway-controller"},
            "status": {"conditions": [{"type": "Other", "status": "True"}]},
        }
    )
    listener = {"name": "http", "port": 80, "protocol": "HTTP"}
    pending = [{"type": "Accepted", "status": "Unknown", "reason": "Pending"}, {"type": "Other", "status": "True"}]
    for name, of in (("gw", "ours"), ("theirs", "other")):
        api.put(
            {
                "apiVersion": f"{group}/v1",
                "kind": "Gateway",
                "metadata": {"name": name},
                "spec": {"gatewayClassName": of, "listeners": [listener]},
                "status": {"conditions": pending},
            }
        )
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "way-in"},
        "spec": {"type": "LoadBalancer", "selector": {f"{group}/gateway-name": "gw"}, "ports": [{"port": 80}]},
    }

    def told() -> dict[str, Any]:
        return dict((api.find("gateways", "gw") or {}).get("status") or {})

    def reasons() -> dict[str, str]:
        return {each["type"]: each.get("reason", "") for each in told().get("conditions", ())}

    async with replica(api):
        await until(lambda: reasons().get("Programmed") == "AddressNotAssigned")
        assert reasons()["Other"] == ""
        async with asyncio.timeout(PATIENCE):
            await api.watched("services")
        api.put(service)
        await until(lambda: reasons().get("Programmed") == "Programmed")
        assert told()["addresses"] == [{"type": "Hostname", "value": "way-in.default.svc.cluster.local"}]
        (one,) = told()["listeners"]
        assert {each["type"]: each["status"] for each in one["conditions"]} == {
            "Accepted": "True",
            "Conflicted": "False",
            "ResolvedRefs": "True",
            "Programmed": "True",
        }
        assert (one["attachedRoutes"], one["conditions"][0]["observedGeneration"]) == (0, 1)
        found = api.find("services", "way-in")
        assert found is not None
        api.put({**found, "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.7"}]}}})
        await until(lambda: told()["addresses"] == [{"type": "IPAddress", "value": "192.0.2.7"}])
        known = (api.find("gatewayclasses", "ours") or {})["status"]["conditions"]
        assert [(each["type"], each["status"]) for each in known] == [("Other", "True"), ("Accepted", "True")]
        assert (api.find("gateways", "theirs") or {})["status"] == {"conditions": pending}
        assert len(writes(api)) == 4  # the class, and the Gateway thrice


async def test_routes_are_told_whether_they_are_accepted(api: ApiServer) -> None:
    """By parent, beside what other controllers say of theirs; a condition's time is that of its last change."""
    group = "gateway.networking.k8s.io"
    api.put(crd("HTTPRoute", "httproutes", group, "v1"))
    theirs = {"parentRef": {"name": "other"}, "controllerName": "example.com/other", "conditions": []}

    def route(backend: str) -> dict[str, Any]:
        parent = {"group": "", "kind": "Service", "name": "a"}
        rules = [{"backendRefs": [{"name": backend, "port": 80}]}]
        return {
            "apiVersion": f"{group}/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": "r"},
            "spec": {"parentRefs": [parent, {"name": "other"}], "rules": rules},
        }

    def told() -> dict[str, str]:
        found = api.find("httproutes", "r")
        parents = ((found or {}).get("status") or {}).get("parents") or []
        ours = [each for each in parents if each["controllerName"] == "meshlib.io/gateway-controller"]
        assert theirs in parents
        return {each["type"]: each["reason"] for parent in ours for each in parent["conditions"]}

    api.put({**route("gone"), "status": {"parents": [theirs]}})
    async with replica(api):
        await until(lambda: told() == {"Accepted": "Accepted", "ResolvedRefs": "BackendNotFound"})
        async with asyncio.timeout(PATIENCE):
            await api.watched("httproutes")
        found = api.find("httproutes", "r")
        assert found is not None
        api.put({**found, "spec": route("a")["spec"]})
        await until(lambda: told() == {"Accepted": "Accepted", "ResolvedRefs": "ResolvedRefs"})
        assert len(writes(api)) == 2


async def test_a_status_says_the_generation_that_it_speaks_of(api: ApiServer) -> None:
    """While a newer form can't be used, what is said is of the older one, and says so."""
    group = "gateway.networking.k8s.io"
    api.put(crd("HTTPRoute", "httproutes", group, "v1"))
    parent = {"group": "", "kind": "Service", "name": "a"}
    good = {"parentRefs": [parent], "rules": [{"backendRefs": [{"name": "a", "port": 80}]}]}

    def put(name: str, spec: dict[str, Any]) -> None:
        found = api.find("httproutes", name) or {"metadata": {"name": name}}
        api.put({**found, "apiVersion": f"{group}/v1", "kind": "HTTPRoute", "spec": spec})

    def told(name: str) -> set[tuple[int, str]]:
        parents = ((api.find("httproutes", name) or {}).get("status") or {}).get("parents") or []
        return {(each["observedGeneration"], each["type"]) for one in parents for each in one["conditions"]}

    put("r", good)
    async with replica(api):
        await until(lambda: told("r") == {(1, "Accepted"), (1, "ResolvedRefs")})
        put("r", {"parentRefs": "none"})
        put("next", good)
        await until(lambda: bool(told("next")))
        assert told("r") == {(1, "Accepted"), (1, "ResolvedRefs")}
        put("r", {**good, "hostnames": ["a.com"]})
        await until(lambda: told("r") == {(3, "Accepted"), (3, "ResolvedRefs")})
