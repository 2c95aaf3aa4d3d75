"""How does configuration get to everybody? envoy.service.discovery.v3.AggregatedDiscoveryService, on grpc.aio.

A stream is one coroutine that reads and writes, and one that waits for the next request; what to say is decided in
subscriptions.py. A stream that is not read by its client waits in `write`, and what changes meanwhile is sent together.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import grpc
import grpc.aio

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.cache import Cache, View
from meshlib.controlplane.registry import Registry
from meshlib.controlplane.subscriptions import Answer, DeltaStream, Request, SotwStream
from meshlib.errors import InvalidResource
from meshlib.model import Node
from meshlib.version import __version__
from meshlib.xds import messages as m
from meshlib.xds.decode import decode_node
from meshlib.xds.resource_types import SHORT_NAMES

logger = logging.getLogger("meshlib.controlplane")

MAX_WAITING = 1000
"""Requests of one stream that are read but not looked at yet; a client that sends more waits."""


class Connection:
    """One open stream, as the admin API shows it."""

    def __init__(self, number: int, state: DeltaStream | SotwStream, peer: str) -> None:
        self.number, self.state, self.peer = number, state, peer
        self.opened = time.time()
        self.node: Node | None = None
        self.view: View | None = None

    def client(self, node: Node) -> api.Client:
        workload = node.workload
        parts = node.id.split("~")
        address = f"[{workload.address}]" if ":" in workload.address else workload.address
        return api.Client(
            name=parts[2] if len(parts) == 4 else node.id,
            id=node.id,
            namespace=workload.namespace,
            workload=workload.name,
            service=workload.service,
            kind=node.kind.value,
            user_agent=node.user_agent,
            address=f"{address}:{workload.port}" if workload.port else "",
            ready=node.ready,
            connected=self.opened,
            types={
                SHORT_NAMES.get(type_url, type_url.rpartition(".")[2]): subscription.status
                for type_url, subscription in self.state.subscriptions.items()
            },
            errors=tuple(
                f"{SHORT_NAMES.get(type_url, type_url)}: {subscription.error}"
                for type_url, subscription in self.state.subscriptions.items()
                if subscription.error
            ),
        )


class AggregatedDiscoveryService:
    """Serves views from `cache`, and tells `registry` who is connected. Belongs to one event loop."""

    def __init__(self, cache: Cache, registry: Registry) -> None:
        self._cache, self._registry = cache, registry
        self._numbers = itertools.count(1)
        self._connections: dict[int, Connection] = {}

    def add_to(self, server: grpc.aio.Server) -> None:
        handlers = {
            m.ADS_STREAM.rpartition("/")[2]: grpc.stream_stream_rpc_method_handler(
                self._state_of_the_world, m.DiscoveryRequest.FromString, m.DiscoveryResponse.SerializeToString
            ),
            m.ADS_DELTA.rpartition("/")[2]: grpc.stream_stream_rpc_method_handler(
                self._delta, m.DeltaDiscoveryRequest.FromString, m.DeltaDiscoveryResponse.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(m.ADS_SERVICE, handlers),))

    def clients(self) -> Collection[api.Client]:
        """All open streams whose clients have said who they are."""
        return [each.client(each.node) for each in self._connections.values() if each.node is not None]

    async def _state_of_the_world(self, requests: Any, context: Any) -> None:
        await self._serve(context, SotwStream, _sotw_request, _sotw_response)

    async def _delta(self, requests: Any, context: Any) -> None:
        await self._serve(context, DeltaStream, _delta_request, _delta_response)

    async def _serve(
        self,
        context: Any,
        make_state: Callable[..., DeltaStream | SotwStream],
        read: Callable[[Any], Request],
        write: Callable[[Answer], Any],
    ) -> None:
        # What the node may ask for is known with the first request, which says who it is.
        first = await context.read()
        if first is grpc.aio.EOF:
            return
        node = await self._node(first, context)
        if node is None:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "the first request must say who asks: node is missing"
            )
            return
        state = make_state(has_catch_all=node.user_agent.startswith("meshlib"))
        connection = Connection(next(self._numbers), state, context.peer())
        waiting: deque[Any] = deque([first])
        news, room = asyncio.Event(), asyncio.Event()
        news.set()
        is_over = False

        async def receive() -> None:
            nonlocal is_over
            while (message := await context.read()) is not grpc.aio.EOF:
                waiting.append(message)
                news.set()
                while len(waiting) >= MAX_WAITING:
                    room.clear()
                    await room.wait()
            is_over = True
            news.set()

        receiving = asyncio.create_task(receive(), name=f"ads-{connection.number}")
        # A read that fails (the connection is lost) ends the stream like its end does.
        receiving.add_done_callback(lambda _: news.set())
        forget = self._cache.on_change(news.set)
        self._connections[connection.number] = connection
        logger.debug("%s connected from %s", node.id, connection.peer)
        try:
            while True:
                await news.wait()
                news.clear()
                while waiting:
                    message = waiting.popleft()
                    room.set()
                    said = await self._node(message, context)
                    if said is not None and said != connection.node:
                        connection.node = said
                        self._registry.attach(connection.number, said)
                    state.received(read(message))
                if is_over or receiving.done():
                    return
                assert connection.node is not None
                connection.view = await self._cache.view(connection.node)
                for answer in state.due(connection.view):
                    await context.write(write(answer))
        finally:
            forget()
            receiving.cancel()
            del self._connections[connection.number]
            self._registry.detach(connection.number)
            logger.debug("%s disconnected", node.id)
            with contextlib.suppress(asyncio.CancelledError, grpc.RpcError, Exception):
                await receiving

    async def _node(self, message: Any, context: Any) -> Node | None:
        if not message.HasField("node"):
            return None
        try:
            return decode_node(message.node)
        except InvalidResource as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"node: {error.field} {error.reason}")
            raise AssertionError("abort() raises") from None

    def __repr__(self) -> str:
        return f"<AggregatedDiscoveryService {len(self._connections)} streams>"


def _error(message: Any) -> str | None:
    if not message.HasField("error_detail"):
        return None
    return message.error_detail.message or f"refused with code {message.error_detail.code}, and no reason"


def _sotw_request(message: Any) -> Request:
    return Request(message.type_url, tuple(message.resource_names), nonce=message.response_nonce, error=_error(message))


def _delta_request(message: Any) -> Request:
    return Request(
        message.type_url,
        tuple(message.resource_names_subscribe),
        tuple(message.resource_names_unsubscribe),
        dict(message.initial_resource_versions),
        message.response_nonce,
        _error(message),
    )


def _sotw_response(answer: Answer) -> Any:
    message = m.DiscoveryResponse(version_info=answer.version, type_url=answer.type_url, nonce=answer.nonce)
    message.control_plane.identifier = IDENTIFIER
    for resource in answer.resources:
        message.resources.add(type_url=answer.type_url, value=resource.data)
    return message


def _delta_response(answer: Answer) -> Any:
    message = m.DeltaDiscoveryResponse(system_version_info=answer.version, type_url=answer.type_url, nonce=answer.nonce)
    message.control_plane.identifier = IDENTIFIER
    for resource in answer.resources:
        entry = message.resources.add(name=resource.name, version=resource.version)
        entry.resource.type_url = answer.type_url
        entry.resource.value = resource.data
    message.removed_resources.extend(answer.removed)
    return message


IDENTIFIER = f"meshlib {__version__}"
