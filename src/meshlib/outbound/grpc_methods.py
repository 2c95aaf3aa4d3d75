"""What is one method of a service, to a channel of the mesh? How stubs ask for it, and how an attempt of it begins;
for sync and aio alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from meshlib.outbound.grpc_subchannels import SubChannel, SubChannels
from meshlib.outbound.grpc_terms import Call, Home, Terms
from meshlib.policy.steps import Send


class Method:
    """kind: `unary_unary`, ... as grpc.Channel's methods are named."""

    __slots__ = ("channel", "deserializer", "is_registered", "kind", "path", "serializer")

    def __init__(
        self, channel: Arities, kind: str, path: str, serializer: Any, deserializer: Any, is_registered: bool | None
    ) -> None:
        self.channel: Any = channel
        self.kind, self.path = kind, path
        self.serializer, self.deserializer, self.is_registered = serializer, deserializer, bool(is_registered)

    @property
    def is_stream(self) -> bool:
        """Whether the response is one."""
        return self.kind.endswith("stream")

    @property
    def takes_stream(self) -> bool:
        """Whether the request is one."""
        return self.kind.startswith("stream")

    def call(self, terms: Terms) -> Call:
        channel = self.channel
        call = Call(channel.home, channel.authority, self.path, terms, channel.subchannels.is_secured)
        call.messages.is_stream = self.kind != "unary_unary"
        return call

    def native(self, step: Send) -> tuple[Any, Callable[[], None]]:
        """gRPC's own multi-callable for an attempt, and what to call, once, when the attempt has ended."""
        channel = self.channel
        one = channel.subchannel(step)
        native = one.callable(self.kind, step.path or self.path, self.serializer, self.deserializer, self.is_registered)
        return native, functools.partial(channel.subchannels.give_back, one)


class Arities:
    """A channel of the mesh: the four ways in which a stub asks it for a method, each of which gives what `callable`
    makes of it. subchannel: where an attempt goes; to be given back."""

    home: Home
    authority: str
    subchannels: SubChannels

    def callable(self, method: Method) -> Any:
        raise NotImplementedError

    def subchannel(self, step: Send) -> SubChannel:
        raise NotImplementedError

    def _made(self, kind: str, path: str, serializer: Any, deserializer: Any, is_registered: bool | None) -> Any:
        return self.callable(Method(self, kind, path, serializer, deserializer, is_registered))

    def unary_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self._made("unary_unary", method, request_serializer, response_deserializer, _registered_method)

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self._made("unary_stream", method, request_serializer, response_deserializer, _registered_method)

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self._made("stream_unary", method, request_serializer, response_deserializer, _registered_method)

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self._made("stream_stream", method, request_serializer, response_deserializer, _registered_method)
