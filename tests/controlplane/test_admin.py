"""Does the admin API answer people, and refuse web pages? Over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.admin import BODY_LIMIT, AdminServer, admin_app
from meshlib.controlplane.sources import ObjectStore
from promises import within

YAML = {"content-type": api.YAML}
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec:
  ports: [{name: http, port: 9080}]
"""


class View:
    """A mesh in which one process is connected."""

    ready = True

    def is_ready(self) -> bool:
        return self.ready

    def clients(self) -> list[api.Client]:
        return [api.Client("reviews-v1-1.default", "sidecar~127.0.0.1~reviews-v1-1.default~x", types={"CDS": "SYNCED"})]

    def endpoints(self) -> list[api.ServiceEndpoints]:
        reviews = api.ServiceEndpoints("reviews", "default", "reviews.default.svc.cluster.local", (9080,))
        return [reviews, msgspec.structs.replace(reviews, name="ratings")]

    def problems(self) -> list[api.Problem]:
        return [api.Problem("a.yaml:1", "VirtualService default/reviews", "spec.http[0]", "leads nowhere")]


@pytest.fixture
def view() -> View:
    return View()


@pytest.fixture
async def client(view: View) -> AsyncIterator[httpx.AsyncClient]:
    server = AdminServer(admin_app(ObjectStore(), view), "127.0.0.1", 0)
    await server.start()
    try:
        async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=20) as client:
            yield client
    finally:
        await server.stop()


async def test_what_is_applied_can_be_read_and_deleted(client: httpx.AsyncClient) -> None:
    """The whole life of one object."""
    applied = await client.post("/v1/apply", params={"source": "mine.yaml"}, content=SERVICE, headers=YAML)
    assert applied.status_code == 200
    assert applied.json()["results"] == [
        {
            "kind": "Service",
            "resource": "service",
            "namespace": "default",
            "name": "reviews",
            "outcome": "created",
            "note": "",
        }
    ]
    (stored,) = (await client.get("/v1/objects", params={"kind": "svc"})).json()["objects"]
    assert (stored["name"], stored["origin"], stored["source"]) == ("reviews", "applied", "mine.yaml:2")
    assert "port: 9080" in stored["yaml"]
    deleted = await client.post("/v1/delete", params={"kind": "svc", "name": "reviews"}, headers=YAML)
    assert [result["outcome"] for result in deleted.json()["results"]] == ["deleted"]
    assert (await client.get("/v1/objects")).json() == {"objects": []}


async def test_a_refused_object_is_a_422_with_the_reason(client: httpx.AsyncClient) -> None:
    """File, object, field and reason, each by itself."""
    response = await client.post(
        "/v1/apply", params={"source": "bad.yaml"}, content=SERVICE.replace("9080", "port"), headers=YAML
    )
    assert response.status_code == 422
    (problem,) = response.json()["problems"]
    assert problem["source"] == "bad.yaml:6"
    assert problem["object"] == "Service default/reviews"
    assert problem["field"] == "spec.ports[0].port"
    assert problem["level"] == "error"


async def test_clients_endpoints_problems_and_health_come_from_the_view(client: httpx.AsyncClient, view: View) -> None:
    """What the control plane knows besides objects."""
    assert (await client.get("/v1/clients")).json()["clients"][0]["types"] == {"CDS": "SYNCED"}
    endpoints = (await client.get("/v1/endpoints", params={"name": "ratings"})).json()["services"]
    assert [service["name"] for service in endpoints] == ["ratings"]
    assert (await client.get("/v1/problems")).json()["problems"][0]["reason"] == "leads nowhere"
    assert (await client.get("/healthz")).status_code == 200
    assert (await client.get("/readyz")).status_code == 200
    view.ready = False
    assert (await client.get("/readyz")).status_code == 503


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:15014", 200),
        ("127.0.0.1", 200),
        ("[::1]:15014", 200),
        ("127.9.9.9", 200),
        ("evil.example", 421),
        ("localhost.evil.example:15014", 421),
        ("127.0.0.1.evil.example", 421),
        ("2130706433", 421),
        ("", 421),
    ],
)
async def test_only_requests_for_this_machine_are_served(client: httpx.AsyncClient, host: str, status: int) -> None:
    """A page whose name was rebound to 127.0.0.1 sends its own name."""
    assert (await client.get("/v1/objects", headers={"host": host})).status_code == status


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
@pytest.mark.parametrize("path", ["/v1/apply", "/v1/delete"])
async def test_what_a_form_can_send_changes_nothing(client: httpx.AsyncClient, path: str, content_type: str) -> None:
    """These content types need no preflight, so a page of any origin can send them."""
    response = await client.post(path, content=SERVICE, headers={"content-type": content_type})
    assert response.status_code == 415
    assert (await client.get("/v1/objects")).json() == {"objects": []}


async def test_a_body_beyond_the_limit_is_refused_before_it_is_read_whole(client: httpx.AsyncClient) -> None:
    """Chunked, so no content-length tells."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 65536
            yield b"#" * 65536

    try:
        async with asyncio.timeout(20):
            status = (await client.post("/v1/apply", content=endless(), headers=YAML)).status_code
    except httpx.TransportError:
        status = 413  # closed while we were sending: the answer may be lost with the connection
    assert status == 413
    assert sent < 4 * BODY_LIMIT


@pytest.mark.parametrize(
    ("method", "path", "status", "told"),
    [
        ("GET", "/v1/objects?kind=teapot", 404, 'there is no resource type "teapot"'),
        ("GET", "/v1/objects?knd=vs", 400, "unknown parameter knd"),
        ("GET", "/v1/nothing", 404, "Not Found"),
        ("GET", "/v1/apply", 405, "Method Not Allowed"),
        ("POST", "/v1/delete?kind=vs", 400, "either kind and name"),
    ],
)
async def test_every_failure_says_what_is_wrong(
    client: httpx.AsyncClient, method: str, path: str, status: int, told: str
) -> None:
    """As JSON, in `error`."""
    response = await client.request(method, path, headers=YAML)
    assert response.status_code == status
    assert told in response.json()["error"]


async def test_bytes_that_are_no_text_are_refused(client: httpx.AsyncClient) -> None:
    """YAML is UTF-8 here."""
    assert (await client.post("/v1/apply", content=b"\xff\xfe", headers=YAML)).status_code == 400


async def test_a_full_disk_is_an_answer_and_changes_nothing(
    tmp_path: Path, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    """507, and the object is not in force."""
    store = ObjectStore(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    transport = httpx.ASGITransport(admin_app(store, view))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        response = await client.post("/v1/apply", content=SERVICE, headers=YAML)
    store.close()
    assert response.status_code == 507
    assert "No space left on device" in response.json()["error"]
    assert store.objects() == ()


async def test_a_taken_port_is_an_error_at_start(view: View) -> None:
    """Not a server that nobody can reach."""
    taken = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    server = AdminServer(admin_app(ObjectStore(), view), "127.0.0.1", port)
    with pytest.raises(OSError, match="Address already in use"):
        await server.start()
    await server.stop()
    taken.close()
    await taken.wait_closed()


async def test_stop_leaves_no_task_and_no_listener(view: View) -> None:
    """An idle keep-alive connection does not hold it up."""
    before = asyncio.all_tasks()
    server = AdminServer(admin_app(ObjectStore(), view), "127.0.0.1", 0)
    await server.start()
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=20) as client:
        assert (await client.get("/healthz")).text == "ok\n"
        async with asyncio.timeout(within(5)):
            await server.stop()
        with pytest.raises(httpx.ConnectError):
            await client.get("/healthz")
    assert asyncio.all_tasks() == before
