"""What does CSDS tell of clients, and whom? Asked by the stub of Envoy's published protos."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from access import TOKENS, running, settings_of
from ads_server import Serving, mesh
from envoy.admin.v3.config_dump_shared_pb2 import ClientResourceStatus
from envoy.config.cluster.v3.cluster_pb2 import Cluster as StockCluster
from envoy.service.status.v3.csds_pb2 import ClientStatusRequest, ConfigStatus
from envoy.service.status.v3.csds_pb2_grpc import ClientStatusDiscoveryServiceStub
from google.protobuf.json_format import ParseDict
from xds_client import Stream, node, type_url

from meshlib.controlplane import client_status
from meshlib.controlplane.administrators import Administrators
from meshlib.controlplane.client_status import ClientStatusService
from meshlib.model import Cluster

BOTH = pytest.mark.parametrize("delta", [True, False], ids=["delta", "sotw"])
OTHER = "sidecar~127.0.0.1~other.dev~dev.svc.cluster.local"
TIMEOUT = 10


@pytest.fixture
async def serving() -> AsyncIterator[Serving]:
    found = Serving()
    ClientStatusService(found.ads.by_client, Administrators(), is_secure=False).add_to(found.server)
    await found.server.start()
    yield found
    await found.close()


async def fetch(address: str, token: str = "", **request: Any) -> Any:
    """token: of the administrator with this name."""
    metadata = (("authorization", f"Bearer {TOKENS.get(token, token)}"),) if token else ()
    async with grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        stub: Any = ClientStatusDiscoveryServiceStub(channel)
        asked = ParseDict(request, ClientStatusRequest())
        return await stub.FetchClientStatus(asked, metadata=metadata, timeout=TIMEOUT)


def told(config: Any) -> list[tuple[str, str, str, str]]:
    """(type, name, the type's status, the resource's) of each entry."""
    return [
        (
            each.type_url.rpartition(".")[2],
            each.name,
            ConfigStatus.Name(each.config_status),
            ClientResourceStatus.Name(each.client_status),
        )
        for each in config.generic_xds_configs
    ]


@BOTH
async def test_each_type_and_each_resource_is_told_with_its_version(serving: Serving, delta: bool) -> None:
    """What was asked for and does not exist, too."""
    client = await serving.connect(delta=delta)
    await client.ask("CDS", "a", "nowhere")
    await client.take("CDS")
    await client.ask("EDS", "a")
    await client.next()
    (config,) = (await fetch(serving.address)).config
    assert config.node.id == "sidecar~127.0.0.1~client.default~default.svc.cluster.local"
    assert told(config) == [
        ("Cluster", "", "SYNCED", "UNKNOWN"),
        ("Cluster", "a", "SYNCED", "ACKED"),
        ("Cluster", "nowhere", "SYNCED", "DOES_NOT_EXIST"),
        ("ClusterLoadAssignment", "", "STALE", "UNKNOWN"),
        ("ClusterLoadAssignment", "a", "STALE", "REQUESTED"),
    ]
    clusters, cluster = config.generic_xds_configs[:2]
    assert clusters.version_info == serving.ads.clients()[0].versions["CDS"]
    found = StockCluster()
    assert cluster.xds_config.Unpack(found)
    assert (found.name, bool(cluster.version_info)) == ("a", True)


@BOTH
async def test_a_refusal_is_told_with_its_reason(serving: Serving, delta: bool) -> None:
    """Beside the version that stays in force."""
    await serving.publish(mesh("a", "b"))
    client = await serving.connect(delta=delta)
    await client.ask("CDS", "a", "b")
    await client.take("CDS")
    await client.ask("EDS", "a")
    await client.take("EDS")  # so what was said before it has been read
    accepted = serving.ads.clients()[0].versions["CDS"]
    await serving.publish(replace(mesh("a", "b"), clusters=(Cluster("a", connect_timeout=1.0), Cluster("b"))))
    await client.next()
    await client.nack("CDS", "too short")
    await client.ask("EDS", "b")
    await client.take("EDS")
    (config,) = (await fetch(serving.address)).config
    clusters, a, b = config.generic_xds_configs[:3]
    assert told(config)[:2] == [("Cluster", "", "ERROR", "NACKED"), ("Cluster", "a", "ERROR", "NACKED")]
    assert (clusters.error_state.details, clusters.version_info) == ("too short", accepted)
    assert a.error_state.details == "too short"
    # Of the state of the world all clusters were in the answer that was refused; of delta, what has changed.
    assert b.client_status == (ClientResourceStatus.ACKED if delta else ClientResourceStatus.NACKED)


async def test_clients_are_chosen_by_their_id_and_contents_left_out(serving: Serving) -> None:
    """By each kind of match but the ones that are refused."""
    for who in (node(), node(OTHER)):
        client = await serving.connect(who=who)
        await client.ask("CDS", "a")
        await client.take("CDS")
    everybody = await fetch(serving.address, exclude_resource_contents=True)
    assert len(everybody.config) == 2
    assert not any(each.HasField("xds_config") for config in everybody.config for each in config.generic_xds_configs)
    for match in ({"exact": OTHER}, {"contains": "~other."}, {"suffix": "DEV.svc.cluster.local", "ignore_case": True}):
        found = await fetch(serving.address, node_matchers=[{"node_id": match}])
        assert [each.node.id for each in found.config] == [OTHER]
    for matcher, says in (
        ({"node_id": {"safe_regex": {"regex": ".*"}}}, "node_matchers[0].node_id: one of exact"),
        ({"node_metadatas": [{"path": [{"key": "x"}], "value": {"present_match": True}}]}, "by node_id only"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="node_matchers") as refused:
            await fetch(serving.address, node_matchers=[matcher])
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert says in str(refused.value.details())


async def test_a_stream_answers_each_request_with_what_is_so_by_then(serving: Serving) -> None:
    """And ends when its client ends it."""
    async with grpc.aio.insecure_channel(serving.address) as channel:
        stub: Any = ClientStatusDiscoveryServiceStub(channel)
        call = stub.StreamClientStatus(timeout=60)
        await call.write(ClientStatusRequest())
        assert len((await call.read()).config) == 0
        client = await serving.connect()
        await client.ask("CDS", "a")
        await client.take("CDS")
        await call.write(ClientStatusRequest())
        assert len((await call.read()).config) == 1
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_an_answer_is_bounded_and_bad_requests_are_refused(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By a status, and without a traceback of ours."""
    client = await serving.connect()
    await client.ask("CDS", "a")
    await client.take("CDS")
    monkeypatch.setattr(client_status, "MAX_BYTES", 10)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await fetch(serving.address)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await fetch(serving.address, node_matchers=[{"node_id": {"exact": "x"}}] * 101)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    async with grpc.aio.insecure_channel(serving.address) as channel:
        call = channel.unary_unary("/envoy.service.status.v3.ClientStatusDiscoveryService/FetchClientStatus")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"\xff\xff\xff", timeout=TIMEOUT)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not [record for record in caplog.records if record.exc_info]


# Who may look


async def test_roles_decide_whose_clients_are_told_and_what_of_them(tmp_path: Path) -> None:
    """Viewers of a namespace see its clients, operators what these were sent."""
    async with (
        running(settings_of(tmp_path, admin=("127.0.0.1", 0))) as plane,
        Stream(plane.xds_address, who=node(NAMESPACE="default")) as here,
        Stream(plane.xds_address, who=node(OTHER, NAMESPACE="dev")) as there,
    ):
        for client in (here, there):
            await client.ask("LDS")
            await client.take("LDS")
        assert len((await fetch(plane.xds_address, "alice")).config) == 2
        for name, has_contents in (("olaf", True), ("vera", False)):
            (config,) = (await fetch(plane.xds_address, name)).config
            assert config.node.id == node().id
            assert any(each.HasField("xds_config") for each in config.generic_xds_configs) is has_contents
        (config,) = (await fetch(plane.xds_address, "dora")).config
        assert config.node.id == OTHER
        for token, code in (
            ("", grpc.StatusCode.UNAUTHENTICATED),
            ("mat_guessed", grpc.StatusCode.UNAUTHENTICATED),
            ("nemo", grpc.StatusCode.PERMISSION_DENIED),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await fetch(plane.xds_address, token)
            assert refused.value.code() is code


async def test_with_tls_and_without_access_control_nobody_is_told(tmp_path: Path) -> None:
    """Other machines reach the port, and nobody has said who may look."""
    async with running(settings_of(tmp_path, admin=("127.0.0.1", 0), access=None, tls=True)) as plane:
        credentials = grpc.ssl_channel_credentials(plane.roots.encode())
        async with grpc.aio.secure_channel(plane.xds_address, credentials) as channel:
            stub: Any = ClientStatusDiscoveryServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.FetchClientStatus(ClientStatusRequest(), timeout=TIMEOUT)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "--access FILE" in str(refused.value.details())


async def test_a_client_with_a_stream_for_each_type_is_told_as_one(serving: Serving) -> None:
    """With all of its types."""
    for kind in ("CDS", "EDS"):
        client = await serving.connect(only=kind)
        await client.ask(kind, "a")
        await client.take(kind)
    (config,) = (await fetch(serving.address)).config
    assert {each.type_url for each in config.generic_xds_configs} == {type_url("CDS"), type_url("EDS")}
