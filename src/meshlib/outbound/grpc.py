"""How does a gRPC call go through the mesh? A `grpc.Channel` whose calls go over sub-channels, one for each endpoint.
(asyncio: grpc_aio; interceptors, for whoever keeps a channel of his own: grpc_interceptors.)

A blocking call of one response is driven on the caller's thread, over gRPC's blocking calls, its cheapest. What must
not block is in grpc_pending.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Self

import grpc

from meshlib.errors import MeshError
from meshlib.model import Endpoint, Outcome
from meshlib.outbound.drive import drive
from meshlib.outbound.grpc_methods import Arities, Method
from meshlib.outbound.grpc_pending import Pending
from meshlib.outbound.grpc_replay import Replay, is_replayable, sendable
from meshlib.outbound.grpc_subchannels import Open, SubChannel, SubChannels
from meshlib.outbound.grpc_terms import (
    OK,
    Call,
    Home,
    Metadata,
    MetadataView,
    Terms,
    answer,
    applied,
    as_told,
    compressed,
    late,
    pauses,
    refusal,
    reports_load,
    waits,
)
from meshlib.outbound.mirrors import ThreadMirrors
from meshlib.policy.retry import CONNECT_FAILURE
from meshlib.policy.steps import Deliver, Flow, Reply, Send

# Blocking calls


class _Blocking:
    """A call of one response on the caller's thread (outbound/drive.Exchange). Gives (response, call)."""

    __slots__ = ("_call", "_endpoint", "_error", "_failure", "_got", "_method", "_request")

    def __init__(self, method: Method, request: Any, call: Call) -> None:
        self._method, self._request, self._call = method, request, call
        self._endpoint: Endpoint | None = None
        self._error: Any = None
        self._failure = ""
        self._got: Any = None

    def send(self, step: Send) -> Outcome:
        call, began = self._call, time.monotonic()
        self._endpoint, self._error, self._got = step.endpoint, None, None
        try:
            native, ended = self._method.native(step)
        except OSError as error:
            return self._unconnected(error)
        terms = call.terms
        try:
            timeout, metadata = call.timeout(step, False), call.sent(step)
            self._got = native.with_call(
                sendable(self._request), timeout, metadata, terms.credentials, None, terms.compression
            )
        except grpc.RpcError as error:
            self._error = error
            outcome = call.outcome(error, step, began, is_replayable(self._request))
            self._failure = outcome.failure
            return outcome
        finally:
            ended()
        if reports_load(step):
            return Outcome(200, MetadataView(self._got[1].trailing_metadata()))
        return OK

    def _unconnected(self, error: OSError) -> Outcome:
        self._failure, self._error = CONNECT_FAILURE, refusal(str(error))
        return Outcome(None, None, CONNECT_FAILURE, is_replayable(self._request))

    def release(self) -> None: ...

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def resolve(self, authority: str) -> None:
        self._call.home.resolve(authority)

    def mirror(self, flow: Flow) -> bool:
        return bool(self._method.channel.mirror(flow, self._method, self._request, self._call))

    def another(self) -> Self | None:
        if isinstance(self._request, Replay):
            return None
        return type(self)(self._method, self._request, self._call)

    def reply(self, step: Reply) -> Any:
        raise answer(step)

    def deliver(self, step: Deliver, flow: Flow) -> Any:
        if self._error is None:
            self._call.messages.responses = 1
        flow.close()
        if self._error is not None:
            raise as_told(self._error, self._failure, step, self._endpoint)
        response, call = self._got
        if step.headers:
            call = Amended(call, applied(step.headers, call.initial_metadata()))
        return response, call


class Amended(grpc.Call):
    """A finished call whose initial metadata the route has changed."""

    def __init__(self, call: Any, metadata: Metadata) -> None:
        self._call, self._metadata = call, metadata

    def initial_metadata(self) -> Any:
        return self._metadata

    def trailing_metadata(self) -> Any:
        return self._call.trailing_metadata()

    def code(self) -> Any:
        return self._call.code()

    def details(self) -> Any:
        return self._call.details()

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> Any:
        return self._call.time_remaining()

    def cancel(self) -> Any:
        return self._call.cancel()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return False


# The channel


class _MultiCallable:
    """One method of a stub. What the four arities share."""

    def __init__(self, method: Method) -> None:
        self._method = method

    def _made(self, request: Any, terms: Terms) -> tuple[Call, Any]:
        """The call, and its request as attempts send it."""
        call = self._method.call(terms)
        if self._method.takes_stream:
            return call, Replay(request, call.messages)
        call.messages.requests = 1
        return call, request

    def _blocking(self, request: Any, terms: Terms) -> Any:
        method = self._method
        call, request = self._made(request, terms)
        try:
            exchange = _Blocking(method, request, call)
            return drive(call.flow(), exchange)
        except MeshError as error:
            if not waits(error, call):
                raise
            refused: Any = error
        for pause in pauses(call):
            time.sleep(pause)
            if not waits(refused, call):
                raise late(call) from refused
            try:
                exchange = _Blocking(method, request, call)
                return drive(call.flow(), exchange)
            except MeshError as error:
                if not waits(error, call):
                    raise
                refused = error
        raise AssertionError("the pauses never end")

    def _pending(self, request: Any, terms: Terms, is_stream: bool) -> Pending:
        method = self._method
        call, request = self._made(request, terms)

        def start(step: Send, request: Any) -> tuple[Any, Callable[[], None]]:
            native, ended = method.native(step)
            try:
                begin = native if is_stream else native.future
                timeout = call.timeout(step, is_stream)
                metadata, compression = compressed(method.kind, call.sent(step), terms.compression)
                return begin(sendable(request), timeout, metadata, terms.credentials, None, compression), ended
            except BaseException:
                ended()
                raise

        def mirror(flow: Flow) -> bool:
            return bool(method.channel.mirror(flow, method, request, call))

        return Pending(call, request, is_stream, start, mirror)


class _UnaryResponse(_MultiCallable):
    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        terms = Terms(timeout, metadata, credentials, wait_for_ready, compression)
        return self._blocking(request, terms)[0]

    def with_call(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        terms = Terms(timeout, metadata, credentials, wait_for_ready, compression)
        return self._blocking(request, terms)

    def future(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        terms = Terms(timeout, metadata, credentials, wait_for_ready, compression)
        return self._pending(request, terms, False)


class _UnaryUnary(_UnaryResponse, grpc.UnaryUnaryMultiCallable):  # type: ignore[type-arg]
    pass


class _StreamUnary(_UnaryResponse, grpc.StreamUnaryMultiCallable):  # type: ignore[type-arg]
    pass


class _StreamResponse(_MultiCallable):
    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        terms = Terms(timeout, metadata, credentials, wait_for_ready, compression)
        return self._pending(request, terms, True)


class _UnaryStream(_StreamResponse, grpc.UnaryStreamMultiCallable):  # type: ignore[type-arg]
    pass


class _StreamStream(_StreamResponse, grpc.StreamStreamMultiCallable):  # type: ignore[type-arg]
    pass


_CALLABLES: dict[str, Callable[[Method], Any]] = {
    "unary_unary": _UnaryUnary,
    "unary_stream": _UnaryStream,
    "stream_unary": _StreamUnary,
    "stream_stream": _StreamStream,
}


class MeshChannel(Arities, grpc.Channel):
    """A channel to a service of the mesh. Made by Mesh.grpc_channel."""

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
        self._mirrors = ThreadMirrors()
        self._watchers: list[Callable[[grpc.ChannelConnectivity], None]] = []
        self._connectivity = grpc.ChannelConnectivity.IDLE

    def callable(self, method: Method) -> Any:
        return _CALLABLES[method.kind](method)

    def subscribe(
        self, callback: Callable[[grpc.ChannelConnectivity], None], try_to_connect: bool | None = False
    ) -> None:
        """As grpc's. A channel of the mesh is READY once one endpoint of its service can be called."""
        self._watchers.append(callback)
        callback(self._connectivity)
        if try_to_connect and self._connectivity is grpc.ChannelConnectivity.IDLE:
            threading.Thread(target=self._connect, name="meshlib-grpc", daemon=True).start()

    def subchannel(self, step: Send) -> SubChannel:
        """Where an attempt goes; to be given back."""
        one, drained = self.subchannels.take(step, self.authority, self.home.live)
        for each in drained:
            each.close()
        return one

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        self._watchers = [each for each in self._watchers if each != callback]

    def _connect(self) -> None:
        """Until an endpoint takes connections, whatever it says of the method."""
        self._become(grpc.ChannelConnectivity.CONNECTING)
        probe = Call(self.home, self.authority, "/", Terms(wait_for_ready=True))
        for pause in pauses(probe):
            if self.subchannels.is_closed or self._reaches_an_endpoint(probe):
                break
            time.sleep(pause)
        if not self.subchannels.is_closed:
            self._become(grpc.ChannelConnectivity.READY)

    def _reaches_an_endpoint(self, probe: Call) -> bool:
        flow = probe.flow()
        try:
            return bool(drive(flow, _Connecting(self, probe)))
        except Exception:
            return False
        finally:
            flow.close()

    def _become(self, connectivity: grpc.ChannelConnectivity) -> None:
        self._connectivity = connectivity
        for callback in list(self._watchers):
            callback(connectivity)

    def mirror(self, flow: Flow, method: Method, request: Any, call: Call) -> bool:
        """Send a copy beside the call; what comes of it matters to no one. False when it is not sent."""
        if isinstance(request, Replay):
            return False
        copy = Call(self.home, self.authority, method.path, call.terms._replace(wait_for_ready=None))

        def run() -> None:
            drive(flow, _Mirroring(method, request, copy))

        return self._mirrors.start(method.path, run)

    def close(self) -> None:
        """End all calls in flight with CANCELLED. Idempotent."""
        for native in self.subchannels.close():
            native.close()
        if self._connectivity is not grpc.ChannelConnectivity.SHUTDOWN:
            self._become(grpc.ChannelConnectivity.SHUTDOWN)

    def __enter__(self) -> MeshChannel:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<MeshChannel {self.authority} {self.subchannels!r}>"


class _Mirroring(_Blocking):
    """A mirrored call. Its response, if it is a stream, is read to its end and thrown away."""

    def send(self, step: Send) -> Outcome:
        if self._method.kind == "unary_unary":
            return super().send(step)
        native, ended = self._method.native(step)
        call = self._call
        try:
            for _ in native(self._request, call.timeout(step, False), call.sent(step), call.terms.credentials):
                pass
        except grpc.RpcError:
            pass
        finally:
            ended()
        self._got = (None, None)
        return OK

    def deliver(self, step: Deliver, flow: Flow) -> Any:
        flow.close()
        return None, None


class _Connecting(_Blocking):
    """Only connects to the endpoint that a call would go to."""

    def __init__(self, channel: MeshChannel, call: Call) -> None:
        super().__init__(Method(channel, "unary_unary", "/", None, None, False), None, call)

    def send(self, step: Send) -> Outcome:
        channel = self._method.channel
        one = channel.subchannel(step)
        ready = grpc.channel_ready_future(one.channel)
        try:
            ready.result(timeout=step.cluster.cluster.connect_timeout)
            return OK
        except grpc.FutureTimeoutError:
            return Outcome(None, None, CONNECT_FAILURE)
        finally:
            ready.cancel()
            channel.subchannels.give_back(one)

    def reply(self, step: Reply) -> Any:
        return False

    def deliver(self, step: Deliver, flow: Flow) -> Any:
        flow.close()
        return not step.flag


def _opener(compression: grpc.Compression | None) -> Open:
    def open_channel(target: str, options: Any, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
        if credentials is None:
            return grpc.insecure_channel(target, options, compression)
        return grpc.secure_channel(target, credentials, options, compression)

    return open_channel


__all__ = ["MeshChannel"]
