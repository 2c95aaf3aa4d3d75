"""Claims about meshlib.instrument() in the process itself: what comes onto the mesh, what does not, the undoing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import httpx
import pytest
import requests
import urllib3

import meshlib
from meshlib.outbound.grpc import MeshChannel
from meshlib.outbound.grpc_aio import MeshAioChannel
from peers import Answer, Peer, Received

WORLD = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: reviews, namespace: default}}
spec:
  hosts: [reviews]
  resolution: STATIC
  ports: [{{number: 9080, name: http, protocol: HTTP}}]
  endpoints: [{{address: 127.0.0.1, ports: {{http: {port}}}}}]
"""
URL = "http://reviews:9080/"


def answer(received: Received) -> Answer:
    return Answer(body=received.target.encode())


@pytest.fixture
def reviews() -> Iterator[Peer]:
    with Peer(answer) as peer:
        yield peer


@pytest.fixture(autouse=True)
def instrumented(tmp_path: Path, reviews: Peer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is instrumented, with a mesh in which only `reviews` is."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "world.yaml").write_text(WORLD.format(port=reviews.port))
    with meshlib.connect(tmp_path) as mesh:
        meshlib.instrument(mesh)
        meshlib.instrument(mesh)
        try:
            yield
        finally:
            meshlib.uninstrument()


def test_clients_made_as_ever_call_on_the_mesh() -> None:
    """Libraries that were imported before, too."""
    with httpx.Client() as client, requests.Session() as session, urllib3.PoolManager() as manager:
        assert client.get(URL).text == "/"
        assert session.get(URL).text == "/"
        assert manager.request("GET", URL).data == b"/"


async def test_async_clients_made_as_ever_call_on_the_mesh() -> None:
    """Those of httpx and aiohttp."""
    async with httpx.AsyncClient() as client, aiohttp.ClientSession() as session:
        assert (await client.get(URL)).text == "/"
        async with session.get(URL) as response:
            assert await response.text() == "/"


def test_hosts_outside_the_mesh_are_reached_as_before(reviews: Peer) -> None:
    """By their address here, of which the mesh knows nothing."""
    outside = f"http://127.0.0.1:{reviews.port}/outside"
    with httpx.Client() as client, requests.Session() as session, urllib3.PoolManager() as manager:
        assert client.get(outside).text == "/outside"
        assert session.get(outside).text == "/outside"
        assert manager.request("GET", outside).data == b"/outside"


def test_own_transports_and_adapters_stay() -> None:
    """What the application chose by itself."""

    class Own(requests.adapters.HTTPAdapter):
        pass

    class OwnSession(requests.Session):
        def __init__(self) -> None:
            super().__init__()
            self.mount(URL, Own())

    with httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, text="own"))) as client:
        assert client.get(URL).text == "own"
    with OwnSession() as session:
        assert type(session.get_adapter(URL)) is Own


def test_a_proxy_is_still_the_way_out(reviews: Peer) -> None:
    """A proxy is sent the whole URL, which the peer answers with."""
    proxy, elsewhere = f"http://127.0.0.1:{reviews.port}", "http://elsewhere.example/"
    with httpx.Client(proxy=proxy) as client, requests.Session() as session, urllib3.ProxyManager(proxy) as manager:
        session.proxies = {"http": proxy}
        assert client.get(elsewhere).text == elsewhere
        assert session.get(elsewhere).text == elsewhere
        assert manager.request("GET", elsewhere).data == elsewhere.encode()


@pytest.mark.parametrize(
    "target",
    ["unix:/tmp/a", "unix-abstract:a", "xds:///reviews:9080", "ipv4:127.0.0.1:1,127.0.0.2:1", "dns://8.8.8.8/a:1", ""],
)
def test_grpc_targets_that_say_where_they_lead_stay(target: str) -> None:
    """Socket files, other resolvers, several addresses, a name server of one's own."""
    with grpc.insecure_channel(target) as channel:
        assert not isinstance(channel, MeshChannel)


def test_grpc_channels_and_servers_made_as_ever_are_on_the_mesh() -> None:
    """With the name's port, or gRPC's default; the user's credentials and interceptors stay in force."""
    for target, authority in (("reviews:9080", "reviews:9080"), ("dns:///a.example", "a.example:443")):
        with grpc.insecure_channel(target) as channel, grpc.secure_channel(
            target, grpc.ssl_channel_credentials()
        ) as secured:  # fmt: skip
            assert isinstance(channel, MeshChannel) and channel.authority == authority
            assert isinstance(secured, MeshChannel) and secured.subchannels._own is not None
    with grpc.insecure_channel("reviews:9080", options=[("meshlib.mesh", 0)]) as channel:
        assert not isinstance(channel, MeshChannel)


async def test_grpc_channels_of_asyncio_are_on_the_mesh() -> None:
    """With the interceptors that they are given."""

    class Own(grpc.aio.UnaryUnaryClientInterceptor):
        async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
            return await continuation(client_call_details, request)

    async with grpc.aio.insecure_channel("reviews:9080") as channel:
        assert isinstance(channel, MeshAioChannel)
    own = Own()
    async with grpc.aio.insecure_channel("reviews:9080", interceptors=[own]) as channel:
        assert isinstance(channel, MeshAioChannel) and channel.interceptors["unary_unary"] == [own]


def test_after_uninstrument_nothing_is_left() -> None:
    """Clients made from now on are the libraries' own."""
    meshlib.uninstrument()
    with httpx.Client() as client, requests.Session() as session:
        assert type(client._transport) is httpx.HTTPTransport
        assert type(session.get_adapter(URL)) is requests.adapters.HTTPAdapter
    for owner, name in [
        (urllib3.PoolManager, "_new_pool"),
        (aiohttp.ClientSession, "_request"),
        (httpx.AsyncClient, "_init_transport"),
        *((grpc, name) for name in ("insecure_channel", "secure_channel", "server")),
        *((grpc.aio, name) for name in ("insecure_channel", "secure_channel", "server")),
    ]:
        assert not hasattr(getattr(owner, name), "__wrapped__")
