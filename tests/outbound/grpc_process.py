"""A gRPC server in a process of its own: `python grpc_process.py NAME sync|aio`, with the code generated of echo.proto
on its path. Prints its port; then a line for each call that began and for each that was cancelled. SIGTERM lets calls
end.

A Note's text is a command: `hold` waits until the call ends, `slow` takes two seconds, `left` answers with the seconds
that are left; else it comes back. Tell answers `count N` with N notes, 10 ms apart, any other text with three.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import echo_pb2
import echo_pb2_grpc
import grpc
import grpc.aio

NAME = sys.argv[1] if len(sys.argv) > 1 else "server"
OPTIONS = [("grpc.max_receive_message_length", 8 << 20), ("grpc.max_metadata_size", 32 << 10)]
_saying = threading.Lock()


def tell(*words: object) -> None:
    with _saying:
        print(*words, flush=True)


def met(request: Any, context: Any) -> None:
    metadata = dict(context.invocation_metadata())
    host = getattr(getattr(getattr(context, "_rpc_event", None), "call_details", None), "host", b"").decode()
    tell("began", request.text or "-", metadata.get("end-user", "-"), host or "-")


def answer(request: Any, context: Any) -> Any:
    text = request.text
    if text == "left":
        text = f"{context.time_remaining():.3f}"
    return echo_pb2.Note(text=text, server=NAME, load=request.load)


def notes(request: Any) -> int:
    return int(request.text[6:]) if request.text.startswith("count ") else 3


class Sync(echo_pb2_grpc.EchoServicer):  # type: ignore[misc]
    def _over(self, context: Any) -> threading.Event:
        """Set once the call is cancelled, which is told."""
        over = threading.Event()

        def end() -> None:
            tell("cancelled")
            over.set()

        if not context.add_callback(end):
            end()
        return over

    def Say(self, request: Any, context: Any) -> Any:
        met(request, context)
        if request.text == "hold":
            self._over(context).wait(60)
        if request.text == "slow":
            time.sleep(2)
        return answer(request, context)

    def Tell(self, request: Any, context: Any) -> Iterator[Any]:
        met(request, context)
        if request.text == "hold":
            over = self._over(context)  # before the answer: a call cancelled by then does not come back here
            yield answer(request, context)
            over.wait(60)
        for _ in range(notes(request)):
            yield answer(request, context)
            time.sleep(0.01)

    def Collect(self, requests: Iterator[Any], context: Any) -> Any:
        found = list(requests)
        met(found[0], context)
        return echo_pb2.Note(text=",".join(each.text for each in found), server=NAME)

    def Talk(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for number, request in enumerate(requests):
            if not number:
                met(request, context)
            yield answer(request, context)


class Aio(echo_pb2_grpc.EchoServicer):  # type: ignore[misc]
    async def Say(self, request: Any, context: Any) -> Any:
        met(request, context)
        await self._hold(request)
        if request.text == "slow":
            await asyncio.sleep(2)
        return answer(request, context)

    async def Tell(self, request: Any, context: Any) -> AsyncIterator[Any]:
        met(request, context)
        if request.text == "hold":
            try:  # around the answer: a call that is cancelled by then does not come back here
                yield answer(request, context)
                await asyncio.sleep(60)
            finally:
                tell("cancelled")
        for _ in range(notes(request)):
            yield answer(request, context)
            await asyncio.sleep(0.01)

    async def Collect(self, requests: AsyncIterator[Any], context: Any) -> Any:
        found = [each async for each in requests]
        met(found[0], context)
        return echo_pb2.Note(text=",".join(each.text for each in found), server=NAME)

    async def Talk(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        number = 0
        async for request in requests:
            if not number:
                met(request, context)
            number += 1
            yield answer(request, context)

    async def _hold(self, request: Any) -> None:
        if request.text == "hold":
            try:
                await asyncio.sleep(60)
            finally:
                tell("cancelled")


def serve_sync() -> None:
    server = grpc.server(ThreadPoolExecutor(32), options=OPTIONS)
    echo_pb2_grpc.add_EchoServicer_to_server(Sync(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    server.start()
    tell(port)
    stop.wait()
    server.stop(10).wait()


async def serve_aio() -> None:
    server = grpc.aio.server(options=OPTIONS)
    echo_pb2_grpc.add_EchoServicer_to_server(Aio(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await server.start()
    tell(port)
    await stop.wait()
    await server.stop(10)


if __name__ == "__main__":
    if sys.argv[2] == "sync":
        serve_sync()
    else:
        asyncio.run(serve_aio())
