"""How does a gRPC call of asyncio go through the mesh? A `grpc.aio.Channel`, as outbound/grpc is a `grpc.Channel`.
(How its calls run: grpc_aio_calls.)"""

from __future__ import annotations

import asyncio
import importlib
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
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

_KINDS: dict[str, tuple[Any, str]] = {
    "unary_unary": (aio.UnaryUnaryClientInterceptor, "InterceptedUnaryUnaryCall"),
    "unary_stream": (aio.UnaryStreamClientInterceptor, "InterceptedUnaryStreamCall"),
    "stream_unary": (aio.StreamUnaryClientInterceptor, "InterceptedStreamUnaryCall"),
    "stream_stream": (aio.StreamStreamClientInterceptor, "InterceptedStreamStreamCall"),
}
"""The interceptors of each kind of call, and what gRPC runs them in: there is no public way to that."""


class _Last:
    """Behind the user's interceptors: the call itself, made of what they have made of it."""

    def __init__(self, call: Callable[[Any, Any, Any, Any, Any], Any]) -> None:
        self._call = call

    async def _goes_out(self, continuation: Any, details: Any, request: Any) -> Any:
        return self._call(request, details.timeout, details.metadata, details.credentials, details.wait_for_ready)

    intercept_unary_unary = intercept_unary_stream = _goes_out
    intercept_stream_unary = intercept_stream_stream = _goes_out


class _MultiCallable:
    """One method of a stub, whatever its arity. interceptors: the user's, of this arity."""

    def __init__(self, method: Method, interceptors: Sequence[Any]) -> None:
        self._method, self._made, self._interceptors = method, CALLS[method.kind], interceptors

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
        if not self._interceptors:
            return self._call(request, timeout, metadata, credentials, wait_for_ready, compression)

        def last(request: Any, timeout: Any, metadata: Any, credentials: Any, wait_for_ready: Any) -> Any:
            return self._call(request, timeout, metadata, credentials, wait_for_ready, compression)

        method = self._method
        intercepted = getattr(importlib.import_module("grpc.aio._interceptor"), _KINDS[method.kind][1])
        return intercepted(
            [*self._interceptors, _Last(last)],
            request,
            timeout,
            aio.Metadata(*(metadata or ())),
            credentials,
            wait_for_ready,
            None,  # their channel, which only their own last step would need
            method.path.encode(),
            method.serializer,
            method.deserializer,
            asyncio.get_running_loop(),
        )

    def _call(
        self,
        request: Any,
        timeout: float | None,
        metadata: Any,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
    ) -> Any:
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
        interceptors: Sequence[Any] = (),
    ) -> None:
        """Raises ValueError, as grpc.aio's, for what is no interceptor."""
        self.home, self.authority = home, authority
        self.interceptors: dict[str, list[Any]] = {kind: [] for kind in _KINDS}
        for each in interceptors:
            # As grpc.aio: one that is of several kinds is of the first.
            kind = next((kind for kind, (one, _) in _KINDS.items() if isinstance(each, one)), None)
            if kind is None:
                raise ValueError(f"{each!r} is none of grpc.aio's client interceptors")
            self.interceptors[kind].append(each)
        self.subchannels = SubChannels(_opener(compression), tuple(options), home.tls, credentials)
        self.mirrors = AsyncMirrors()
        self._closing: set[asyncio.Task[Any]] = set()

    def callable(self, method: Method) -> Any:
        return _MultiCallable(method, self.interceptors[method.kind])

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
        natives = self.subchannels.close()
        await asyncio.gather(*(native.close(grace) for native in natives), *self._closing)
        _natives.difference_update(natives)

    async def __aenter__(self) -> MeshAioChannel:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<MeshAioChannel {self.authority} {self.subchannels!r}>"


# Forks

_natives: weakref.WeakSet[aio.Channel] = weakref.WeakSet()
"""Those that are open in this process."""
_is_lost = False
"""The thread by which grpc.aio learns of everything is the parent's, and nobody starts another in this process."""


def _in_child() -> None:
    global _is_lost
    _is_lost = _is_lost or len(_natives) > 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _opener(compression: grpc.Compression | None) -> Open:
    def open_channel(target: str, options: Any, credentials: grpc.ChannelCredentials | None) -> aio.Channel:
        if _is_lost:
            raise RuntimeError(
                "a channel of grpc.aio was open when this process was forked, and in the child calls of grpc.aio would "
                "wait for ever: make calls of asyncio after the fork, or close the channel before it"
            )
        if credentials is None:
            native = aio.insecure_channel(target, options, compression)
        else:
            native = aio.secure_channel(target, credentials, options, compression)
        _natives.add(native)
        return native

    return open_channel


__all__ = ["MeshAioChannel"]
