"""A gRPC server that does as its requests say, and every gRPC adapter behind one face."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Self

import grpc

from meshlib.mesh import Mesh

SERVICE = "test.Echo"


class GrpcPeer:
    """Echoes. A request is a command: `fail N` fails N times with UNAVAILABLE (then answers), `pushback MS`, `status
    NAME`, `hold` (until `released`), `die` (the server stops after one message), `large N` (N bytes of metadata, before
    and behind the response). Responses that are streams have three messages; `stall` waits after the first of them.
    """

    def __init__(
        self,
        name: str = "peer",
        credentials: grpc.ServerCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        self.name = name.encode()
        self.metadata: list[dict[str, Any]] = []
        self.requests: list[bytes] = []
        self.ended = threading.Semaphore(0)
        """Released once for each call that has ended, however it did."""
        self.released = threading.Event()
        self._pool = ThreadPoolExecutor(16)
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0), *options])
        handlers = {
            "UnaryUnary": grpc.unary_unary_rpc_method_handler(self._unary),
            "UnaryStream": grpc.unary_stream_rpc_method_handler(self._stream),
            "StreamUnary": grpc.stream_unary_rpc_method_handler(self._collect),
            "StreamStream": grpc.stream_stream_rpc_method_handler(self._echo),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        if credentials is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials)

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.released.set()
        self._server.stop(0).wait(10)
        self._pool.shutdown()

    def stop(self) -> None:
        self._server.stop(0)

    def _met(self, request: bytes, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        context.add_callback(self.ended.release)
        command, _, argument = request[:40].decode("latin-1").partition(" ")
        large = (("x-large", "v" * int(argument)),) if command == "large" else ()
        context.send_initial_metadata((("x-peer", self.name.decode()), *large))
        context.set_trailing_metadata(large)
        if command == "fail" and self.requests.count(request) <= int(argument):
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        if command == "pushback" and self.requests.count(request) == 1:
            context.set_trailing_metadata((("grpc-retry-pushback-ms", argument),))
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        if command == "status":
            context.set_trailing_metadata((("x-reason", "asked for"), ("x-raw-bin", b"\x00\xff")))
            context.abort(grpc.StatusCode[argument], "as asked")
        if command == "hold":
            self.released.wait(20)

    def _unary(self, request: bytes, context: Any) -> bytes:
        self._met(request, context)
        return self.name + b":" + request

    def _stream(self, request: bytes, context: Any) -> Iterator[bytes]:
        self._met(request, context)
        yield b"0"
        if request == b"die":
            self._server.stop(0)
            self.released.wait(20)
        if request == b"stall":
            self.released.wait(20)
        yield b"1"
        yield b"2"

    def _collect(self, requests: Iterator[bytes], context: Any) -> bytes:
        found = [next(requests, b"")]
        self._met(found[0], context)
        found += requests
        return self.name + b":" + b",".join(found)

    def _echo(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        first = next(requests, b"")
        self._met(first, context)
        yield first
        if first == b"stall":
            self.released.wait(20)
        yield from requests


class Wire:
    """A cable to a peer, that can be cut: what its clients see of a machine that is gone. Counts what goes up."""

    def __init__(self, peer: GrpcPeer) -> None:
        self._to = peer.address
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listening.getsockname()
        self.bytes = 0
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listening.accept()[0]
                far = socket.create_connection(self._to)
                self._ends += near, far
                for one, other, is_up in ((near, far, True), (far, near, False)):
                    self._threads.append(threading.Thread(target=self._carry, args=(one, other, is_up), daemon=True))
                    self._threads[-1].start()

    def _carry(self, one: socket.socket, other: socket.socket, is_up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                if is_up:
                    self.bytes += len(data)
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """With a reset, as by the kernel of a process that is killed."""
        ends, self._ends = self._ends, []
        for each in ends:
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RD)
            each.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut()
        for each in self._threads:
            each.join(10)


class Face:
    """All four arities of a channel, by blocking calls. Each gives what came; raises grpc.RpcError."""

    def unary(self, request: bytes, **terms: Any) -> bytes:
        raise NotImplementedError

    def stream(self, request: bytes, **terms: Any) -> list[bytes]:
        raise NotImplementedError

    def collect(self, requests: list[bytes], **terms: Any) -> bytes:
        raise NotImplementedError

    def echo(self, requests: list[bytes], **terms: Any) -> list[bytes]:
        raise NotImplementedError

    def first_of(self, request: bytes, then: Callable[[], object], **terms: Any) -> list[bytes]:
        """The first message of a stream, then `then`, then the rest."""
        raise NotImplementedError

    def metadata(self, request: bytes, **terms: Any) -> dict[str, Any]:
        """The initial metadata of a unary call."""
        raise NotImplementedError

    def cancelled(self, request: bytes, when: Callable[[], object]) -> grpc.StatusCode:
        """The status of a unary call that is cancelled after `when`."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def every(self, request: bytes, **terms: Any) -> list[bytes]:
        """The first message of each arity's response."""
        return [
            self.unary(request, **terms),
            self.stream(request, **terms)[0],
            self.collect([request], **terms),
            self.echo([request], **terms)[0],
        ]


class SyncFace(Face):
    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self._unary = channel.unary_unary(f"/{SERVICE}/UnaryUnary")
        self._stream = channel.unary_stream(f"/{SERVICE}/UnaryStream")
        self._collect = channel.stream_unary(f"/{SERVICE}/StreamUnary")
        self._echo = channel.stream_stream(f"/{SERVICE}/StreamStream")

    def unary(self, request: bytes, **terms: Any) -> bytes:
        return bytes(self._unary(request, **terms))

    def stream(self, request: bytes, **terms: Any) -> list[bytes]:
        return list(self._stream(request, **terms))

    def collect(self, requests: list[bytes], **terms: Any) -> bytes:
        return bytes(self._collect(iter(requests), **terms))

    def echo(self, requests: list[bytes], **terms: Any) -> list[bytes]:
        return list(self._echo(iter(requests), **terms))

    def first_of(self, request: bytes, then: Callable[[], object], **terms: Any) -> list[bytes]:
        call = self._stream(request, **terms)
        found = [next(call)]
        then()
        return found + list(call)

    def metadata(self, request: bytes, **terms: Any) -> dict[str, Any]:
        return dict(self._unary.with_call(request, **terms)[1].initial_metadata())

    def cancelled(self, request: bytes, when: Callable[[], object]) -> grpc.StatusCode:
        call = self._unary.future(request)
        when()
        assert call.cancel()
        assert call.cancelled()
        return call.code()

    def close(self) -> None:
        self.channel.close()


class FuturesFace(SyncFace):
    """The same, with unary responses by futures."""

    def unary(self, request: bytes, **terms: Any) -> bytes:
        return bytes(self._unary.future(request, **terms).result(20))

    def collect(self, requests: list[bytes], **terms: Any) -> bytes:
        return bytes(self._collect.future(iter(requests), **terms).result(20))

    def metadata(self, request: bytes, **terms: Any) -> dict[str, Any]:
        return dict(self._unary.future(request, **terms).initial_metadata())


class AioFace(Face):
    """A channel of asyncio, with a loop of its own that is entered for each call."""

    def __init__(self, open_channel: Callable[[], Any]) -> None:
        self.runner = asyncio.Runner()

        async def opened() -> Any:
            return open_channel()

        self.channel = channel = self.runner.run(opened())
        self._unary = channel.unary_unary(f"/{SERVICE}/UnaryUnary")
        self._stream = channel.unary_stream(f"/{SERVICE}/UnaryStream")
        self._collect = channel.stream_unary(f"/{SERVICE}/StreamUnary")
        self._echo = channel.stream_stream(f"/{SERVICE}/StreamStream")

    def _run(self, work: Any) -> Any:
        return self.runner.run(work, context=copy_context())

    def unary(self, request: bytes, **terms: Any) -> bytes:
        async def call() -> bytes:
            return bytes(await self._unary(request, **terms))

        return self._run(call())  # type: ignore[no-any-return]

    def stream(self, request: bytes, **terms: Any) -> list[bytes]:
        return self.first_of(request, lambda: None, **terms)

    def collect(self, requests: list[bytes], **terms: Any) -> bytes:
        async def call() -> bytes:
            return bytes(await self._collect(iter(requests), **terms))

        return self._run(call())  # type: ignore[no-any-return]

    def echo(self, requests: list[bytes], **terms: Any) -> list[bytes]:
        async def call() -> list[bytes]:
            return [message async for message in self._echo(iter(requests), **terms)]

        return self._run(call())  # type: ignore[no-any-return]

    def first_of(self, request: bytes, then: Callable[[], object], **terms: Any) -> list[bytes]:
        async def call() -> list[bytes]:
            made = self._stream(request, **terms)
            found = [await made.read()]
            # `then` may call through this face, so it gets a thread with a loop of its own.
            await asyncio.to_thread(then)
            return found + [message async for message in made]

        return self._run(call())  # type: ignore[no-any-return]

    def metadata(self, request: bytes, **terms: Any) -> dict[str, Any]:
        async def call() -> dict[str, Any]:
            return dict(tuple(await self._unary(request, **terms).initial_metadata()))

        return self._run(call())  # type: ignore[no-any-return]

    def cancelled(self, request: bytes, when: Callable[[], object]) -> grpc.StatusCode:
        async def call() -> Any:
            made = self._unary(request)
            await asyncio.to_thread(when)
            assert made.cancel()
            code = await made.code()
            assert made.cancelled()
            return code

        return self._run(call())  # type: ignore[no-any-return]

    def close(self) -> None:
        self.runner.run(self.channel.close())
        self.runner.close()


FACES = ("channel", "channel-futures", "aio-channel", "interceptors", "interceptors-futures", "aio-interceptors")


def face(name: str, mesh: Mesh, target: str, peer: GrpcPeer, **options: Any) -> Face:
    """peer: where the channel of one's own leads to, for interceptors."""
    if name == "aio-channel":
        return AioFace(lambda: mesh.grpc_aio_channel(target, **options))
    address = "{}:{}".format(*peer.address)
    if name == "aio-interceptors":
        made = mesh.grpc_aio_client_interceptors(target)
        return AioFace(lambda: grpc.aio.insecure_channel(address, interceptors=made, **options))
    if name.startswith("channel"):
        channel = mesh.grpc_channel(target, **options)
    else:
        plain = grpc.insecure_channel(address, **options)
        channel = grpc.intercept_channel(plain, *mesh.grpc_client_interceptors(target))
    return FuturesFace(channel) if name.endswith("futures") else SyncFace(channel)
