"""Does the whole control plane do what its parts promise? Real sockets, real files, one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from kube.api_server import ApiServer
from meshlib.controlplane import admin_api as api
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.controlplane.sources import StateError
from meshlib.kube.settings import KubeSettings
from meshlib.model import Node, RouteConfiguration, Workload
from meshlib.xds import messages as m
from meshlib.xds.decode import decode_resource
from meshlib.xds.encode import encode_node
from meshlib.xds.resource_types import ENDPOINT, LISTENER, ROUTE
from promises import within

REVIEWS = "outbound|9080||reviews.default.svc.cluster.local"
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec:
  selector: {app: reviews}
  ports: [{name: http, port: 9080}]
"""
TIMEOUT = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http:
  - timeout: %ds
    route:
    - destination: {host: reviews}
"""


def workload(name: str = "reviews-v1", port: int = 9082) -> Workload:
    return Workload(
        name, service="reviews", labels=(("app", "reviews"),), address="127.0.0.1", port=port if name else 0
    )


class Client:
    """One delta stream that accepts everything and knows the latest of each resource."""

    def __init__(self, address: str, node: Node) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        method = self._channel.stream_stream(
            m.ADS_DELTA, m.DeltaDiscoveryRequest.SerializeToString, m.DeltaDiscoveryResponse.FromString
        )
        self._call = method()
        self._node: Node | None = node
        self._changed = asyncio.Condition()
        self.has: dict[str, Any] = {}
        self.removed: set[str] = set()
        self.responses = 0
        self._reading = asyncio.create_task(self._read())

    async def ask(self, type_url: str, *names: str) -> None:
        request = m.DeltaDiscoveryRequest(type_url=type_url, resource_names_subscribe=names)
        if self._node is not None:
            request.node.CopyFrom(encode_node(self._node))
            self._node = None
        await self._call.write(request)

    async def _read(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            async for response in self._call:
                async with self._changed:
                    self.responses += 1
                    for each in response.resources:
                        self.has[each.name] = decode_resource(response.type_url, each.resource.value)
                        self.removed.discard(each.name)
                    for name in response.removed_resources:
                        self.has.pop(name, None)
                        self.removed.add(name)
                    self._changed.notify_all()
                await self._call.write(
                    m.DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
                )

    async def until(self, condition: Callable[[], bool], timeout: float = 5.0) -> float:
        """Seconds until it holds."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(condition)
        return loop.time() - began

    def timeout_of_reviews(self) -> float | None:
        """Of the first route; None while it is not there, 0 for none."""
        found = self.has.get(REVIEWS)
        if not isinstance(found, RouteConfiguration):
            return None
        return getattr(found.virtual_hosts[0].routes[0].action, "timeout", None) or 0

    def endpoints(self) -> list[str]:
        found = self.has.get(REVIEWS)
        return [endpoint.authority for endpoint in getattr(found, "endpoints", ())]

    async def close(self) -> None:
        self._call.cancel()
        self._reading.cancel()
        await asyncio.wait({self._reading})
        await self._channel.close()


class Running:
    """A control plane with its clients."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.http = httpx.AsyncClient(base_url=plane.admin_url, trust_env=False, timeout=20)
        self._clients: list[Client] = []

    def client(self, served: Workload | None = None, instance: str = "a", ready: bool = True) -> Client:
        node = Node(f"sidecar~127.0.0.1~{instance}.default~default.svc.cluster.local", served or Workload("caller"),
                    user_agent="meshlib/test", ready=ready)  # fmt: skip
        client = Client(self.plane.xds_address, node)
        self._clients.append(client)
        return client

    async def apply(self, text: str) -> list[str]:
        response = await self.http.post("/v1/apply", content=text, headers={"content-type": api.YAML})
        return [result["outcome"] for result in response.json()["results"]]

    async def stop(self) -> None:
        for client in self._clients:
            await client.close()
        await self.http.aclose()
        await self.plane.stop()


Start = Callable[..., Awaitable[Running]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a control plane that watches `config` and keeps its state in `state`, on free ports."""
    (tmp_path / "config").mkdir()
    started: list[Running] = []

    async def start(**more: Any) -> Running:
        here = {"folders": (tmp_path / "config",), "state": tmp_path / "state"}
        settings = ControlPlaneSettings(**{**here, "xds": ("127.0.0.1", 0), "admin": ("127.0.0.1", 0), **more})
        plane = ControlPlane(settings)
        await plane.start()
        started.append(Running(plane))
        return started[-1]

    yield start
    for running in started:
        await running.stop()


async def test_an_edit_of_a_file_is_live_within_a_second(start: Start, tmp_path: Path) -> None:
    """And so is an apply; a broken edit leaves what was in force, and is listed."""
    file = tmp_path / "config" / "reviews.yaml"
    file.write_text(f"{SERVICE}---{TIMEOUT % 1}")
    running = await start()
    client = running.client()
    await client.ask(ROUTE, REVIEWS)
    await client.until(lambda: client.timeout_of_reviews() == 1)
    file.write_text(f"{SERVICE}---{TIMEOUT % 2}")
    assert await client.until(lambda: client.timeout_of_reviews() == 2) < within(1)
    assert await running.apply(TIMEOUT % 3) == ["configured"]
    assert await client.until(lambda: client.timeout_of_reviews() == 3) < within(1)
    deleted = await running.http.post(
        "/v1/delete", params={"kind": "vs", "name": "reviews"}, headers={"content-type": api.YAML}
    )
    assert "in force again" in deleted.json()["results"][0]["note"]
    await client.until(lambda: client.timeout_of_reviews() == 2)
    file.write_text(f"{SERVICE}---{TIMEOUT.replace('timeout', 'tmeout') % 4}")
    (tmp_path / "config" / "second.yaml").write_text("- no object")
    async with asyncio.timeout(within(5)):
        while len(found := (await running.http.get("/v1/problems")).json()["problems"]) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert [problem["field"] for problem in found] == ["spec.http[0].tmeout", ""]
    assert client.timeout_of_reviews() == 2


async def test_a_cluster_is_followed(start: Start) -> None:
    """Nobody is served before it was read; a new pod is told within a second, and an API server that is away takes
    nothing with it."""
    slice_ = """
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: reviews-a, labels: {kubernetes.io/service-name: reviews}}
addressType: IPv4
ports: [{name: http, port: 9080}]
endpoints: [%s]
"""
    async with ApiServer() as cluster:
        cluster.put_all(f"{SERVICE}---{slice_ % '{addresses: [10.0.0.1]}'}")
        cluster.list_gate.clear()
        starting = asyncio.create_task(start(cluster=KubeSettings(cluster.url)))
        async with asyncio.timeout(30):
            await cluster.asked(1)
        assert not starting.done()
        cluster.list_gate.set()
        running = await starting
        client = running.client()
        await client.ask(ENDPOINT, REVIEWS)
        await client.until(lambda: client.endpoints() == ["10.0.0.1:9080"], 30)
        async with asyncio.timeout(30):
            await cluster.watched("endpointslices")
        cluster.put_all(slice_ % "{addresses: [10.0.0.1]}, {addresses: [10.0.0.2]}")
        await client.until(lambda: client.endpoints() == ["10.0.0.1:9080", "10.0.0.2:9080"], 30)
        await cluster.stop()
        objects = (await running.http.get("/v1/objects")).json()["objects"]
        assert {each["origin"] for each in objects} == {"kubernetes"}
        async with asyncio.timeout(30):
            while not (told := (await running.http.get("/v1/problems")).json()["problems"]):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert told[0]["reason"].startswith("what was last known of it stays")
        assert client.endpoints() == ["10.0.0.1:9080", "10.0.0.2:9080"]


async def test_a_workload_is_an_endpoint_while_it_is_connected_and_ready(start: Start, tmp_path: Path) -> None:
    """Others hear of it at once, and of its end."""
    (tmp_path / "config" / "reviews.yaml").write_text(SERVICE)
    running = await start()
    caller = running.client()
    await caller.ask(ENDPOINT, REVIEWS)
    await caller.until(lambda: REVIEWS in caller.has)
    assert caller.endpoints() == []
    served = running.client(workload(), "reviews-v1-1")
    await served.ask(LISTENER, "nothing:80")
    assert await caller.until(lambda: caller.endpoints() == ["127.0.0.1:9082"]) < within(1)
    (reviews,) = (await running.http.get("/v1/endpoints", params={"name": "reviews"})).json()["services"]
    assert [(each["address"], each["workload"]) for each in reviews["endpoints"]] == [("127.0.0.1:9082", "reviews-v1")]
    clients = (await running.http.get("/v1/clients")).json()["clients"]
    assert {(each["name"], each["ready"]) for each in clients} == {("a.default", True), ("reviews-v1-1.default", True)}
    await served.close()
    assert await caller.until(lambda: caller.endpoints() == []) < within(1)


async def test_after_a_restart_nobody_vanishes_while_all_reconnect(start: Start, tmp_path: Path) -> None:
    """Applied objects and workloads are there at once; who does not come back is gone after the grace."""
    running = await start()
    await running.apply(f"{SERVICE}---{TIMEOUT % 7}")
    caller = running.client()
    for number in (1, 2):
        served = running.client(workload(port=9080 + number), f"reviews-{number}")
        await served.ask(LISTENER, "nothing:80")
    await caller.ask(ENDPOINT, REVIEWS)
    both = ["127.0.0.1:9081", "127.0.0.1:9082"]
    await caller.until(lambda: caller.endpoints() == both)
    await running.plane.stop()

    running = await start(grace=1.0)
    caller = running.client()
    await caller.ask(ENDPOINT, REVIEWS)
    await caller.until(lambda: REVIEWS in caller.has)
    assert caller.endpoints() == both
    back = running.client(workload(port=9081), "reviews-1")
    await back.ask(LISTENER, "nothing:80")
    await caller.until(lambda: caller.endpoints() == ["127.0.0.1:9081"])
    objects = (await running.http.get("/v1/objects")).json()["objects"]
    assert [each["kind"] for each in objects] == ["VirtualService", "Service"]


async def test_a_burst_of_changes_is_few_pushes(start: Start) -> None:
    """Debounced: thirty applies at once are not thirty translations for everybody."""
    running = await start(state=None)
    await running.apply(SERVICE)
    client = running.client()
    await client.ask(ROUTE, REVIEWS)
    await client.until(lambda: REVIEWS in client.has)
    before = client.responses
    await asyncio.gather(*(running.apply(TIMEOUT % seconds) for seconds in range(1, 31)))
    await running.apply(TIMEOUT % 31)
    await client.until(lambda: client.timeout_of_reviews() == 31)
    assert client.responses - before <= 10


async def test_stop_leaves_nothing_running(start: Start) -> None:
    """No task, no thread, no listener; with clients connected, and a second time."""
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    running = await start()
    client = running.client(workload())
    await client.ask(LISTENER, "nothing:80")
    await client.until(lambda: "nothing:80" in client.has or "nothing:80" in client.removed)
    ports = [running.plane.xds_port, int(running.plane.admin_url.rpartition(":")[2])]
    async with asyncio.timeout(within(5)):
        await running.plane.stop()
    await running.plane.stop()
    await client.close()
    clients = {each for each in asyncio.all_tasks() - tasks if "_AioCall" in repr(each)}  # gRPC's, and the client's own
    if clients:
        await asyncio.wait(clients, timeout=10)
    assert asyncio.all_tasks() <= tasks
    assert {thread for thread in set(threading.enumerate()) - threads if thread.name.startswith("meshlib")} == set()
    for port in ports:
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)


async def test_a_taken_port_is_an_error_that_names_it(start: Start, tmp_path: Path) -> None:
    """A second control plane on the same port must not take half of the clients; nor one on the same state."""
    running = await start()
    address = ("127.0.0.1", running.plane.xds_port)
    second = ControlPlane(ControlPlaneSettings(xds=address, admin=("127.0.0.1", 0)))
    with pytest.raises(OSError, match=f"xDS can't be served on 127.0.0.1:{address[1]}"):
        await second.start()
    await second.stop()
    admin = ("127.0.0.1", int(running.plane.admin_url.rpartition(":")[2]))
    third = ControlPlane(ControlPlaneSettings(xds=("127.0.0.1", 0), admin=admin))
    with pytest.raises(OSError, match=f"the admin API can't be served on 127.0.0.1:{admin[1]}"):
        await third.start()
    await third.stop()
    fourth = ControlPlane(ControlPlaneSettings(state=tmp_path / "state", xds=("127.0.0.1", 0), admin=("127.0.0.1", 0)))
    with pytest.raises(StateError, match="in use"):
        await fourth.start()
    await fourth.stop()


async def test_references_that_lead_nowhere_are_problems(start: Start, tmp_path: Path) -> None:
    """Found by the translation, before anybody connects."""
    (tmp_path / "config" / "reviews.yaml").write_text(
        f"{SERVICE}---{TIMEOUT.replace('host: reviews', 'host: reviews, subset: v9') % 1}"
    )
    running = await start()
    (problem,) = (await running.http.get("/v1/problems")).json()["problems"]
    assert problem["object"] == "VirtualService default/reviews"
    assert "v9" in problem["reason"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
async def test_an_open_admin_api_is_for_this_machine_only(host: str) -> None:
    """Whoever reached it could change the mesh: refused before anything is bound, with the option's name."""
    plane = ControlPlane(ControlPlaneSettings(xds=("127.0.0.1", 0), admin=(host, 0)))
    with pytest.raises(OSError, match="--admin"):
        await plane.start()
    await plane.stop()
