"""Who asks by `xdstp://` gets the resource of the plain name in it, by that name; gRPC's own client is the judge."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from ads_server import Serving, mesh
from xds_client import type_url

AUTHORITY = "mesh.example"
BOTH = pytest.mark.parametrize("delta", [True, False], ids=["delta", "sotw"])
# In a process of its own: C-core reads the bootstrap once. `xds://AUTHORITY/...` asks by AUTHORITY's template.
CLIENT = f"""
import grpc
channel = grpc.insecure_channel("xds://{AUTHORITY}/web:80", options=[("grpc.enable_http_proxy", 0)])
say = channel.unary_unary("/echo.Echo/Say", lambda data: data, lambda data: data)
print(say(b"", timeout=20).decode())
"""


def uri(kind: str, name: str, authority: str = AUTHORITY) -> str:
    return f"xdstp://{authority}/{type_url(kind).removeprefix('type.googleapis.com/')}/{name}"


@pytest.fixture
async def serving() -> AsyncIterator[Serving]:
    found = Serving()
    await found.server.start()
    yield found
    await found.close()


@BOTH
@pytest.mark.parametrize(("kind", "name"), [("LDS", "web:80"), ("RDS", "r"), ("CDS", "a"), ("EDS", "a")])
async def test_a_resource_is_found_by_its_uri(serving: Serving, delta: bool, kind: str, name: str) -> None:
    """And bears it; beside its plain name, and whoever's authority it is."""
    client = await serving.connect(delta=delta)
    wanted = {name, uri(kind, name), uri(kind, name, "")}
    await client.ask(kind, *wanted)
    found = await client.take(kind)
    assert found.keys() == wanted
    if kind == "CDS":
        assert found[uri(kind, name)].eds_cluster_config.service_name == "a"


@BOTH
async def test_a_change_is_told_by_the_uri(serving: Serving, delta: bool) -> None:
    """What is born, has changed and is gone; and no more than that."""
    await serving.publish(mesh("b"))
    client = await serving.connect(delta=delta)
    named, other = uri("EDS", "a"), uri("EDS", "b")
    await client.ask("EDS", named, other)
    first = await client.take("EDS")
    assert len(first[other].endpoints) == 1 and (delta or not first[named].endpoints)
    await serving.publish(mesh("a", "b"))
    assert list(await client.take("EDS")) == [named]
    await serving.publish(mesh("b", endpoints=2))
    assert list(await client.take("EDS")) == [other]
    kind, found, removed = await client.next()  # what is gone goes last
    assert (kind, list(found), removed) == ("EDS", [] if delta else [named], (named,) if delta else ())


@BOTH
@pytest.mark.parametrize(
    "name", [uri("CDS", "web:80"), uri("LDS", "web:80") + "?a=1", uri("LDS", "nobody:80"), "xdstp://a/b"]
)
async def test_what_no_resource_has_is_not_there(serving: Serving, delta: bool, name: str) -> None:
    """Another type, another context, another id, and what is no name."""
    client = await serving.connect(delta=delta)
    await client.ask("LDS", name)
    kind, found, removed = await client.next()
    assert (kind, found, removed) == ("LDS", {}, (name,) if delta else ())


async def test_grpcs_own_client_follows_an_authority(serving: Serving) -> None:
    """Its listener by the template of the bootstrap's authority, what that leads to by plain names."""

    async def say(request: bytes, context: Any) -> bytes:
        return b"hello"

    echo = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(say, lambda data: data, lambda data: data)
    echo.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", {"Say": handler}),))
    port = echo.add_insecure_port("127.0.0.1:0")
    await echo.start()
    await serving.publish(mesh("a", port=port))
    server = {"server_uri": serving.address, "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}
    template = uri("LDS", "%s")
    bootstrap = {
        "xds_servers": [server],
        "authorities": {AUTHORITY: {"client_listener_resource_name_template": template, "xds_servers": [server]}},
        "node": {"id": "sidecar~127.0.0.1~judge.default~default.svc.cluster.local"},
    }
    environment = {**os.environ, "GRPC_XDS_BOOTSTRAP_CONFIG": json.dumps(bootstrap)}
    environment["GRPC_EXPERIMENTAL_XDS_FEDERATION"] = "true"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60):
            out, errors = await process.communicate()
        assert out.decode().strip() == "hello", errors.decode()
    finally:
        if process.returncode is None:
            process.kill()
        await echo.stop(None)
