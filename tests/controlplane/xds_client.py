"""An xDS client that is not meshlib's: Envoy's published protos and gRPC's own stub, driven by hand from a test."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import grpc.aio
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.core.v3.base_pb2 import Node
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.service.cluster.v3.cds_pb2_grpc import ClusterDiscoveryServiceStub
from envoy.service.discovery.v3.ads_pb2_grpc import AggregatedDiscoveryServiceStub
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DiscoveryRequest
from envoy.service.endpoint.v3.eds_pb2_grpc import EndpointDiscoveryServiceStub
from envoy.service.listener.v3.lds_pb2_grpc import ListenerDiscoveryServiceStub
from envoy.service.route.v3.rds_pb2_grpc import RouteDiscoveryServiceStub
from google.protobuf.json_format import ParseDict
from google.rpc.status_pb2 import Status

TYPES = {"LDS": Listener, "RDS": RouteConfiguration, "CDS": Cluster, "EDS": ClusterLoadAssignment}
SERVICES: Mapping[str, tuple[Any, str]] = {
    "LDS": (ListenerDiscoveryServiceStub, "Listeners"),
    "RDS": (RouteDiscoveryServiceStub, "Routes"),
    "CDS": (ClusterDiscoveryServiceStub, "Clusters"),
    "EDS": (EndpointDiscoveryServiceStub, "Endpoints"),
}
TIMEOUT = 30.0


def type_url(kind: str) -> str:
    return f"type.googleapis.com/{TYPES[kind].DESCRIPTOR.full_name}" if kind in TYPES else kind


def node(
    identity: str = "sidecar~127.0.0.1~client.default~default.svc.cluster.local",
    *,
    user_agent: str = "other",
    locality: Mapping[str, str] | None = None,
    features: tuple[str, ...] = (),
    **metadata: Any,
) -> Node:
    found = {"id": identity, "user_agent_name": user_agent, "metadata": metadata, "locality": locality or {}}
    return ParseDict({**found, "client_features": features}, Node())


def workload(service: str, port: int, version: str = "v1", *, ready: bool = True) -> Node:
    """The node of a process that serves."""
    return node(
        f"sidecar~127.0.0.1~{service}-{version}-{port}.default~default.svc.cluster.local",
        NAMESPACE="default",
        WORKLOAD_NAME=f"{service}-{version}",
        LABELS={"app": service, "version": version},
        INSTANCE_IPS="127.0.0.1",
        MESHLIB_SERVICE=service,
        MESHLIB_PORT=port,
        MESHLIB_READY=ready,
    )


class Stream:
    """One ADS stream, or one of a single type's service. Nothing is acknowledged but by `ack`, `nack` or `take`.

    only: the service of this type, which need not be named in its requests.
    """

    def __init__(self, address: str, *, delta: bool = True, who: Node | None = None, only: str = "") -> None:
        self._channel = grpc.aio.insecure_channel(
            address, options=(("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
        )
        stub_class, plural = SERVICES[only] if only else (AggregatedDiscoveryServiceStub, "AggregatedResources")
        self.delta = delta
        self._call: Any = getattr(stub_class(self._channel), f"{'Delta' if delta else 'Stream'}{plural}")()
        self._node = who
        self.names: dict[str, tuple[str, ...]] = {}
        self.last: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.cancel()
        await self._channel.close()

    # Saying

    async def ask(
        self, kind: str, *names: str, drop: Iterable[str] = (), initial: Mapping[str, str] | None = None
    ) -> None:
        """Subscribe. SotW: `names` are the whole set from now on. The node goes with the first request."""
        last = self.last.get(kind)
        if self.delta:
            request: Any = DeltaDiscoveryRequest(
                type_url=type_url(kind),
                resource_names_subscribe=names,
                resource_names_unsubscribe=drop,
                initial_resource_versions=initial,
            )
        else:
            self.names[kind] = names
            request = DiscoveryRequest(type_url=type_url(kind), resource_names=names)
            if last is not None:
                request.response_nonce, request.version_info = last.nonce, last.version_info
        await self.send(request)

    async def say(self, who: Node) -> None:
        """Who we are, anew, with the next request."""
        self._node = who

    async def ack(self, kind: str, error: str = "") -> None:
        last = self.last[kind]
        if self.delta:
            request: Any = DeltaDiscoveryRequest(type_url=last.type_url, response_nonce=last.nonce)
        else:
            request = DiscoveryRequest(
                type_url=last.type_url, response_nonce=last.nonce, resource_names=self.names.get(kind, ())
            )
            if not error:
                request.version_info = last.version_info
        if error:
            request.error_detail.CopyFrom(Status(code=3, message=error))
        await self.send(request)

    async def nack(self, kind: str, error: str) -> None:
        await self.ack(kind, error)

    async def send(self, request: Any) -> None:
        if self._node is not None:
            request.node.CopyFrom(self._node)
            self._node = None
        async with asyncio.timeout(TIMEOUT):
            await self._call.write(request)

    async def end(self) -> None:
        """Half-close: nothing more comes from us."""
        await self._call.done_writing()

    # Hearing

    async def next(self, timeout: float = TIMEOUT) -> tuple[str, dict[str, Any], tuple[str, ...]]:
        """The next response: its kind, its resources by name, and what it removes. It is not acknowledged.

        Raises grpc.aio.AioRpcError where the stream fails, EOFError where it ends.
        """
        async with asyncio.timeout(timeout):
            response = await self._call.read()
        if response is grpc.aio.EOF:
            code = await self._call.code()
            if code is not grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(
                    code,
                    await self._call.initial_metadata(),
                    await self._call.trailing_metadata(),
                    await self._call.details(),
                )
            raise EOFError("the server has ended the stream")
        kind = next(kind for kind in TYPES if type_url(kind) == response.type_url)
        self.last[kind] = response
        if self.delta:
            found = {each.name: _unpack(each.resource, kind) for each in response.resources}
            for name, resource in found.items():
                assert name == _name(resource)
            return kind, found, tuple(response.removed_resources)
        resources = [_unpack(each, kind) for each in response.resources]
        return kind, {_name(each): each for each in resources}, ()

    async def take(self, *expected: str) -> dict[str, Any]:
        """Hear and accept one response of each kind, in this order; returns the last one's resources."""
        found: dict[str, Any] = {}
        for wanted in expected:
            kind, found, _ = await self.next()
            assert kind == wanted, f"{kind} came where {wanted} was expected"
            await self.ack(kind)
        return found

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """How the stream has ended."""
        async with asyncio.timeout(TIMEOUT):
            return await self._call.code(), await self._call.details()


def _unpack(packed: Any, kind: str) -> Any:
    message = TYPES[kind]()
    assert packed.Unpack(message), f"{packed.type_url} came where {kind} was expected"
    return message


def _name(resource: Any) -> str:
    return str(resource.cluster_name if isinstance(resource, ClusterLoadAssignment) else resource.name)


def ports(assignment: Any) -> list[int]:
    """Where a cluster's endpoints serve."""
    return sorted(
        each.endpoint.address.socket_address.port_value
        for locality in assignment.endpoints
        for each in locality.lb_endpoints
    )
