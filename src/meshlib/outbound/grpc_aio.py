"""How does a gRPC call of asyncio go through the mesh? A `grpc.aio.Channel`, as outbound/grpc is a `grpc.Channel`.
(How its calls run: grpc_aio_calls.)"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
from grpc import aio

from meshlib.outbound.drive import drive_async
from meshlib.outbound.grpc_aio_calls import CALLS, Exchange, never
from meshlib.outbound.grpc_methods import Arities, Method
from meshlib.outbound.grpc_subchannels import Open, SubChannel, SubChannels
from meshlib.outbound.grpc_terms import Call, Home, Terms
from meshlib.outbound.mirrors import AsyncMirrors
from meshlib.policy.steps import Flow, Send


class _MultiCallable:
    """One method of a stub, whatever its arity."""

    def __init__(self, method: Method) -> None:
        self._method, self._made = method, CALLS[method.kind]

    def __call__(
        self,
        request: Any = None,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
        *,
        request_iterator: Any = None,
    ) -> Any:
        if request is None:
            request = request_iterator
        call = self._method.call(Terms(timeout, metadata, credentials, wait_for_ready, compression))

        async def start(step: Send, sent: Any) -> Any:
            return self._begin(call, step, sent)

        def mirror(flow: Flow) -> bool:
            return self._mirror(flow, call, request)

        return self._made(call, request, start, mirror)

    def _begin(self, call: Call, step: Send, sent: Any) -> Any:
        method, terms = self._method, call.terms
        native, ended = method.native(step)
        try:
            started = native(
                sent,
                timeout=call.timeout(step, method.is_stream),
                metadata=call.sent(step),
                credentials=terms.credentials,
                compression=terms.compression,
            )
        except BaseException:
            ended()
            raise
        is_over = False

        def once(_: object) -> None:
            # Where grpc.aio tells of a call's end twice (grpc_aio_calls._Ending), some versions call back twice.
            nonlocal is_over
            if not is_over:
                is_over = True
                ended()

        started.add_done_callback(once)
        return started

    def _mirror(self, flow: Flow, call: Call, request: Any) -> bool:
        """Send a copy beside the call. Its response, if it is a stream, is read to its end and thrown away. False when
        it is not sent."""
        method = self._method
        copy = method.call(call.terms)

        async def start(step: Send, sent: Any) -> Any:
            return self._begin(copy, step, sent)

        async def run() -> None:
            mirrored = await drive_async(flow, Exchange(copy, request, method.is_stream, start, never))
            if method.is_stream:
                while await mirrored.read() is not aio.EOF:
                    pass

        channel: Any = method.channel
        return bool(channel.mirrors.start(method.path, run))


class MeshAioChannel(Arities, aio.Channel):
    """A channel to a service of the mesh, for asyncio. Made by Mesh.grpc_aio_channel; belongs to one event loop."""

    def __init__(
        self,
        home: Home,
        authority: str,
        options: Iterable[tuple[str, Any]] = (),
        compression: grpc.Compression | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.home, self.authority = home, authority
        self.subchannels = SubChannels(_opener(compression), tuple(options), home.tls, credentials)
        self.mirrors = AsyncMirrors()
        self._closing: set[asyncio.Task[Any]] = set()

    def callable(self, method: Method) -> Any:
        return _MultiCallable(method)

    def subchannel(self, step: Send) -> SubChannel:
        """Where an attempt goes; to be given back."""
        one, drained = self.subchannels.take(step, self.authority, self.home.live)
        for each in drained:
            task = asyncio.ensure_future(each.close(None))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        return one

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """READY once it has connections; connections are made by calls."""
        if self.subchannels.is_closed:
            return grpc.ChannelConnectivity.SHUTDOWN
        return grpc.ChannelConnectivity.READY if len(self.subchannels) else grpc.ChannelConnectivity.IDLE

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        raise NotImplementedError("a channel of the mesh has no one state: use wait_for_ready on a call")

    async def channel_ready(self) -> None:
        """Until the mesh knows the service."""
        await self.home.resolve_async(self.authority)

    async def close(self, grace: float | None = None) -> None:
        """As grpc.aio's: calls in flight have `grace` seconds. Idempotent."""
        await self.mirrors.aclose()
        await asyncio.gather(*(native.close(grace) for native in self.subchannels.close()), *self._closing)

    async def __aenter__(self) -> MeshAioChannel:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<MeshAioChannel {self.authority} {self.subchannels!r}>"


def _opener(compression: grpc.Compression | None) -> Open:
    def open_channel(target: str, options: Any, credentials: grpc.ChannelCredentials | None) -> aio.Channel:
        if credentials is None:
            return aio.insecure_channel(target, options, compression)
        return aio.secure_channel(target, credentials, options, compression)

    return open_channel


__all__ = ["MeshAioChannel"]
