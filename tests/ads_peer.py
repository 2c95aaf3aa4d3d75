"""A real gRPC server on loopback that speaks ADS as a test tells it: by hand, or by itself from a set of resources.

Its envelopes are those of xds-protos, not meshlib's own: what they say is understood by someone else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Self

import grpc
from envoy.service.discovery.v3 import discovery_pb2

from meshlib.model import Cluster, Listener, LoadAssignment, RouteConfiguration, Snapshot
from meshlib.xds.encode import encode_resource
from meshlib.xds.messages import ADS_SERVICE
from meshlib.xds.resource_types import PUSH_ORDER
from meshlib.xds.session import name_of
from snapshots import resources_of

Value = Listener | RouteConfiguration | Cluster | LoadAssignment
TIMEOUT = 30.0


@dataclass
class PeerStream:
    """One stream that a client opened. `next` is what the client said; `send` answers."""

    is_delta: bool
    _requests: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    _responses: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    _count: int = 0
    subscribed: dict[str, dict[str, str]] = field(default_factory=dict)
    """By type: name -> version sent last. Kept in automatic mode."""
    early: list[Any] = field(default_factory=list)
    """What was asked before there was anything to serve; answered by the first `serve`."""

    def next(self) -> Any:
        """The client's next request. Fails where none comes, or the client leaves."""
        try:
            request = self._requests.get(timeout=TIMEOUT)
        except Empty:
            raise AssertionError("the client said nothing more") from None
        assert request is not None, "the client left"
        return request

    def next_of(self, type_url: str) -> Any:
        """The next request of a type; others are skipped."""
        while (request := self.next()).type_url != type_url:
            pass
        return request

    def wait_closed(self) -> None:
        while self._requests.get(timeout=TIMEOUT) is not None:
            pass

    def send(
        self,
        type_url: str,
        *values: Value,
        removed: tuple[str, ...] = (),
        version: str = "1",
        raw: Mapping[str, bytes] | None = None,
    ) -> str:
        """Push resources; returns the response's nonce. raw: resources as bytes, by name."""
        self._count += 1
        nonce = f"n{self._count}"
        data = {name_of(value): encode_resource(type_url, value) for value in values} | dict(raw or {})
        if self.is_delta:
            message = discovery_pb2.DeltaDiscoveryResponse(
                type_url=type_url, nonce=nonce, system_version_info=version, removed_resources=removed
            )
            for name, value in data.items():
                added = message.resources.add(name=name, version=version)
                added.resource.type_url, added.resource.value = type_url, value
        else:
            message = discovery_pb2.DiscoveryResponse(type_url=type_url, nonce=nonce, version_info=version)
            for value in data.values():
                message.resources.add(type_url=type_url, value=value)
        self._responses.put(message)
        return nonce

    def send_bytes(self, data: bytes) -> None:
        self._responses.put(data)

    def close(self) -> None:
        """End the stream, as a server does that wants its clients to spread."""
        self._responses.put(None)


class AdsPeer:
    """The server. `accept` returns the streams in the order in which clients open them.

    With `serve(snapshot)` it answers by itself, delta as well as state of the world: with what of the snapshot is asked
    for, at once and after each further `serve`. A context manager; `stop` and `start` are a control plane's death and
    its return on the same port.
    """

    def __init__(self) -> None:
        self.port = 0
        self._server: grpc.Server | None = None
        self._accepted: SimpleQueue[PeerStream] = SimpleQueue()
        self._lock = threading.Lock()
        self._world: Mapping[str, Mapping[str, bytes]] | None = None
        self._serial = 0
        self._open: list[PeerStream] = []
        self.nodes: list[Any] = []
        """Every node that was sent, in order."""
        self.nacks: SimpleQueue[Any] = SimpleQueue()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        handlers = {
            "StreamAggregatedResources": grpc.stream_stream_rpc_method_handler(
                lambda requests, context: self._handle(False, requests, context),
                discovery_pb2.DiscoveryRequest.FromString,
                _serialize,
            ),
            "DeltaAggregatedResources": grpc.stream_stream_rpc_method_handler(
                lambda requests, context: self._handle(True, requests, context),
                discovery_pb2.DeltaDiscoveryRequest.FromString,
                _serialize,
            ),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(ADS_SERVICE, handlers),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            for stream in list(self._open):
                stream.close()
            self._server.stop(0).wait()
            self._server = None

    def accept(self) -> PeerStream:
        try:
            return self._accepted.get(timeout=TIMEOUT)
        except Empty:
            raise AssertionError("no client opened a stream") from None

    def serve(self, snapshot: Snapshot) -> None:
        """Serve this from now on, and push what differs to whoever is there."""
        with self._lock:
            self._world = resources_of(snapshot)
            self._serial += 1
            for stream in self._open:
                while stream.early:
                    self._answer(stream, stream.early.pop(0))
                for type_url in PUSH_ORDER:
                    if type_url in stream.subscribed:
                        self._push(stream, type_url, force=False)

    def _handle(self, is_delta: bool, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        stream = PeerStream(is_delta)
        self._open.append(stream)
        self._accepted.put(stream)
        thread = threading.Thread(target=self._read, args=(stream, requests), daemon=True)
        thread.start()
        context.add_callback(lambda: stream._responses.put(None))
        try:
            while (response := stream._responses.get()) is not None:
                yield response
        finally:
            self._open.remove(stream)

    def _read(self, stream: PeerStream, requests: Iterator[Any]) -> None:
        try:
            for request in requests:
                if request.HasField("node"):
                    self.nodes.append(request.node)
                if request.HasField("error_detail"):
                    self.nacks.put(request)
                stream._requests.put(request)
                with self._lock:
                    if self._world is None:
                        stream.early.append(request)
                    else:
                        self._answer(stream, request)
        except grpc.RpcError:
            pass
        except Exception:  # grpcio raises a bare Exception when the client has gone
            pass
        stream._requests.put(None)

    def _answer(self, stream: PeerStream, request: Any) -> None:
        if stream.is_delta:
            known = stream.subscribed.setdefault(request.type_url, {})
            for name in request.resource_names_unsubscribe:
                known.pop(name, None)
            for name in request.resource_names_subscribe:
                known[name] = request.initial_resource_versions.get(name, "")
            is_first = not request.response_nonce and not request.resource_names_unsubscribe
            if request.resource_names_subscribe or (is_first and self._is_wildcard(request)):
                if self._is_wildcard(request):
                    known.update({"*": ""}, **dict(request.initial_resource_versions))
                self._push(stream, request.type_url, force=True, only=frozenset(request.resource_names_subscribe))
            return
        before = stream.subscribed.get(request.type_url)
        names = dict.fromkeys(request.resource_names, "")
        if not request.resource_names and self._is_wildcard(request) and (before is None or "*" in before):
            names = {"*": ""}
        if before is None or set(names) != set(before):
            stream.subscribed[request.type_url] = names
            self._push(stream, request.type_url, force=True)

    def _is_wildcard(self, request: Any) -> bool:
        names = request.resource_names_subscribe if hasattr(request, "resource_names_subscribe") else None
        names = request.resource_names if names is None else names
        return "*" in names or (not names and request.type_url.endswith(("Listener", "Cluster")))

    def _push(self, stream: PeerStream, type_url: str, *, force: bool, only: frozenset[str] = frozenset()) -> None:
        assert self._world is not None
        there, known = self._world[type_url], stream.subscribed[type_url]
        names = set(known) - {"*"} | (set(there) if "*" in known else set())
        if not stream.is_delta:
            stream.send(type_url, version=str(self._serial), raw={n: there[n] for n in sorted(names) if n in there})
            return
        changed, removed = {}, []
        for name in sorted(names):
            version = str(hash(there[name])) if name in there else "none"
            if known.get(name) == version and name not in only:
                continue
            known[name] = version
            if name in there:
                changed[name] = there[name]
            else:
                removed.append(name)
        if changed or removed or force:
            stream.send(type_url, version=str(self._serial), raw=changed, removed=tuple(removed))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _serialize(message: Any) -> bytes:
    data: bytes = message if isinstance(message, bytes) else message.SerializeToString()
    return data
