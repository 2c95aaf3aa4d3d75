"""Replicas have their join tokens in common: a Secret of the cluster, on the stand-in and on a real API server."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator

import grpc
import pytest

from joining import certificate
from kube.api_server import ApiServer
from kube.real_api import RealApi
from meshlib.controlplane.join_tokens import JoinTokens, Refused
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.controlplane.sources import StateError
from meshlib.controlplane.token_shelf import KEY, SecretShelf
from meshlib.kube.client import KubeClient
from meshlib.kube.settings import KubeSettings
from meshlib.model import SpiffeId

PATIENCE = 60.0
HOME, NAME = "istio-system", "meshlib-join-tokens"
REVIEWS = SpiffeId.of("cluster.local", "default", "reviews")


@pytest.fixture
async def api(any_api: ApiServer | RealApi) -> AsyncIterator[ApiServer | RealApi]:
    async with any_api as api:
        api.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": HOME}})
        yield api


@pytest.fixture
async def replicas(api: ApiServer | RealApi) -> AsyncIterator[list[JoinTokens]]:
    """Three, each with a client of its own."""
    clients = [KubeClient(KubeSettings(api.url)) for _ in range(3)]
    yield [JoinTokens(SecretShelf(each, HOME, NAME)) for each in clients]
    for each in clients:
        await each.close()


async def test_what_one_replica_makes_the_others_know(replicas: list[JoinTokens]) -> None:
    """The Secret is made with the first token; what is revoked or spent at one is so at all."""
    one, two, three = replicas
    text, token = await one.create(REVIEWS, 60.0, "00")
    other, _ = await two.create(REVIEWS, 60.0, "00")
    assert await three.check(text) == token
    assert [each.id for each in await three.all()] == [token.id, (await one.check(other)).id]
    await two.spend(token)
    with pytest.raises(Refused, match="used already"):
        await one.check(text)
    with pytest.raises(Refused, match="used already"):
        await three.spend(token)
    assert await three.revoke((await one.check(other)).id) is not None
    with pytest.raises(Refused, match="no such"):
        await one.check(other)


async def test_a_token_buys_one_certificate_of_all_replicas_together(replicas: list[JoinTokens]) -> None:
    """Shown to all of them at the same moment; tokens that are made meanwhile are lost by none of them."""
    text, _ = await replicas[0].create(REVIEWS, 60.0, "00")
    found = [await each.check(text) for each in replicas]
    told = await asyncio.gather(
        *(each.spend(token) for each, token in zip(replicas, found, strict=True)),
        *(each.create(REVIEWS, 60.0, "00") for each in replicas),
        return_exceptions=True,
    )
    assert sum(each is None for each in told) == 1
    assert sum(isinstance(each, Refused) for each in told) == 2
    assert len(await replicas[0].all()) == 4


async def test_only_hashes_are_in_the_secret(api: ApiServer | RealApi, replicas: list[JoinTokens]) -> None:
    """And an empty one, as an installation makes it, is none that is broken."""
    api.put({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": NAME, "namespace": HOME}})
    text, token = await replicas[0].create(REVIEWS, 60.0, "00")
    found = api.find("secrets", NAME, HOME)
    assert found is not None
    kept = base64.b64decode(found["data"][KEY]).decode()
    assert token.id in kept
    assert text.split(".")[1] not in kept


async def test_without_an_answer_nobody_is_let_in_and_no_token_is_lost(
    api: ApiServer | RealApi, replicas: list[JoinTokens]
) -> None:
    """A right that is missing is named; what is no list of tokens is left alone."""
    text, token = await replicas[0].create(REVIEWS, 60.0, "00")
    api.forbidden = {"secrets"}
    with pytest.raises(StateError, match=rf"{HOME}/{NAME} can't be read; `get` and `patch` of it are needed.*403"):
        await replicas[1].check(text)
    with pytest.raises(StateError):
        await replicas[1].spend(token)
    api.forbidden = set()
    assert await replicas[1].check(text) == token
    broken = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": NAME, "namespace": HOME}}
    api.put({**broken, "data": {KEY: base64.b64encode(b"{").decode()}})
    with pytest.raises(StateError, match=rf"{HOME}/{NAME}: {KEY}: "):
        await replicas[1].create(REVIEWS, 60.0, "00")


async def test_a_token_of_one_control_plane_joins_at_the_other(api: ApiServer | RealApi) -> None:
    """Two whole ones: a certificate for it at the second, and none for it again at the first. While the API server does
    not say, the caller is told to come again."""
    settings = ControlPlaneSettings(
        xds=("127.0.0.1", 0),
        admin=("127.0.0.1", 0),
        cluster=KubeSettings(api.url),
        ca_secret=(HOME, "ca"),
        token_secret=(HOME, NAME),
        tls=True,
    )
    planes = [ControlPlane(settings) for _ in range(2)]
    try:
        await asyncio.wait_for(asyncio.gather(*(each.start() for each in planes)), PATIENCE)
        first, second = planes
        assert first.tokens is not None and first.authority is not None
        token, _ = await first.tokens.create(REVIEWS, 60.0, first.authority.signing)
        api.forbidden = {"secrets"}
        assert await certificate(second.xds_address, second.roots, token) is grpc.StatusCode.UNAVAILABLE
        api.forbidden = set()
        assert await certificate(second.xds_address, second.roots, token) is grpc.StatusCode.OK
        assert await certificate(first.xds_address, first.roots, token) is grpc.StatusCode.UNAUTHENTICATED
    finally:
        await asyncio.gather(*(each.stop() for each in planes))
