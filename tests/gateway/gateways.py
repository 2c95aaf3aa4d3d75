"""Gateways in one line, and clients that write bytes: what the tests of the gateway are made of."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

from meshlib.gateway.limits import Limits
from meshlib.gateway.server import Gateway
from meshlib.mesh import Mesh
from meshlib.model import (
    Cluster,
    FilterChain,
    Listener,
    ListenerTls,
    LoadAssignment,
    NodeKind,
    Route,
    RouteConfiguration,
    Snapshot,
    VirtualHost,
)
from meshlib.settings import Settings
from snapshots import Addresses, endpoints, forward, publish, route

PORT = 8080
NAME = f"0.0.0.0_{PORT}"


def listener(port: int = PORT, *chains: FilterChain) -> Listener:
    return Listener(f"0.0.0.0_{port}", "", "0.0.0.0", port, chains or (FilterChain(f"http.{port}"),))


def secured(name: str, certificate: str, key: str, *server_names: str, **fields: Any) -> FilterChain:
    return FilterChain(name, server_names, ListenerTls(certificate, key, **fields))


def hosts(name: str, virtual_hosts: Mapping[str, Iterable[Route]], require_tls: bool = False) -> RouteConfiguration:
    """A route configuration as translate makes it: a host and the same with any port."""
    found = [
        VirtualHost(f"{host}:x", ("*",) if host == "*" else (host, f"{host}:*"), tuple(routes), require_tls=require_tls)
        for host, routes in sorted(virtual_hosts.items())
    ]
    return RouteConfiguration(name, tuple(found))


def configured(
    listeners: Iterable[Listener],
    routes: Iterable[RouteConfiguration],
    clusters: Mapping[str, Addresses | tuple[Cluster, Addresses]],
    version: str = "1",
) -> Snapshot:
    found, assignments = [], []
    for name, given in sorted(clusters.items()):
        cluster, addresses = (Cluster(name), given)
        if isinstance(given, tuple) and given and isinstance(given[0], Cluster):
            cluster, addresses = given
        found.append(cluster)
        assignments.append(LoadAssignment(name, endpoints(addresses)))  # type: ignore[arg-type]
    return Snapshot(
        version,
        tuple(sorted(listeners, key=lambda each: each.name)),
        tuple(sorted(routes, key=lambda each: each.name)),
        tuple(found),
        tuple(assignments),
        complete=True,
    )


def everything_to(
    *addresses: tuple[str, int], port: int = PORT, cluster: Cluster | None = None, **fields: Any
) -> Snapshot:
    """One plain listener whose every request goes to one cluster."""
    used = cluster or Cluster("app")
    return configured(
        [listener(port)],
        [hosts(f"http.{port}", {"*": [route(forward(used.name, **fields))]})],
        {used.name: (used, addresses)},
    )


@asynccontextmanager
async def gateway(
    given: Snapshot,
    *,
    ports: Mapping[int, int] | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> AsyncIterator[Gateway]:
    """A running gateway on `given`; every listener on a port that is free."""
    wanted_settings = Settings(namespace="istio-system", workload="istio-ingressgateway", **settings)
    with Mesh(wanted_settings, kind=NodeKind.ROUTER) as mesh:
        mesh.start()
        publish(mesh, given)
        wanted = {each.port: 0 for each in given.listeners} if ports is None else ports
        options.setdefault("limits", Limits(drain=2.0))
        async with Gateway(mesh, ports=wanted, **options) as made:
            yield made


async def reconfigure(made: Gateway, given: Snapshot) -> None:
    publish(made.mesh, given)
    await made.until(given)


def address(made: Gateway, port: int = PORT) -> tuple[str, int]:
    return made.addresses[f"0.0.0.0_{port}"]


def url(made: Gateway, path: str = "/", port: int = PORT) -> str:
    host, at = address(made, port)
    return f"http://{host}:{at}{path}"


class Raw:
    """A client that sends what it is told, byte for byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *lines: str, body: bytes = b"") -> None:
        self.writer.write("".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1") + body)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        async with asyncio.timeout(10):
            text = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status, *lines = text.strip().split("\r\n")
        pairs = [line.partition(":") for line in lines]
        return int(status.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def response(self) -> tuple[int, dict[str, str], bytes]:
        status, headers = await self.head()
        body = b""
        async with asyncio.timeout(10):
            if headers.get("transfer-encoding") == "chunked":
                while size := int((await self.reader.readuntil(b"\r\n")).strip(), 16):
                    body += await self.reader.readexactly(size)
                    await self.reader.readexactly(2)
                await self.reader.readexactly(2)
            else:
                body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return status, headers, body

    async def rest(self) -> bytes:
        """All there is until the gateway closes."""
        async with asyncio.timeout(10):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""


@asynccontextmanager
async def raw(made: Gateway, port: int = PORT, tls: ssl.SSLContext | None = None, sni: str = "") -> AsyncIterator[Raw]:
    host, at = address(made, port)
    reader, writer = await asyncio.open_connection(host, at, ssl=tls, server_hostname=sni if tls else None)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except OSError:
            pass
