"""gRPC's own xDS in Go, as client and server, in processes of their own: tests/go/grpc, which make builds."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEER = Path(__file__).parents[2] / ".venv" / "go" / "bin" / "grpc-peer"
MISSING = "make test-go-grpc builds grpc-go's peers"


@dataclass(frozen=True)
class Outcome:
    """Of one call. server, caller: who answered, and whom it saw. deadline: seconds that the server was left; 0 is
    without one. seconds: how long the call took."""

    code: str
    message: str
    seconds: float
    server: str
    caller: str
    attempts: str
    deadline: float


class GoClient:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def calls(self, count: int, *, at_once: int = 1, **order: Any) -> list[Outcome]:
        """method, metadata and timeout (seconds) are the order's."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order |= {"count": count, "at_once": at_once}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        return [Outcome(**each) for each in json.loads(await self._process.stdout.readline())]

    async def call(self, **order: Any) -> Outcome:
        return (await self.calls(1, **order))[0]

    async def until(self, holds: Callable[[Outcome], bool], **order: Any) -> Outcome:
        """A call is the only way to ask whether a rule has come."""
        async with asyncio.timeout(60):
            while not holds(found := await self.call(**order)):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            return found


@asynccontextmanager
async def go_client(target: str, bootstrap: Path) -> AsyncIterator[GoClient]:
    async with _peer("call", target, bootstrap=bootstrap) as process:
        yield GoClient(process)


@asynccontextmanager
async def go_server(address: str, name: str, bootstrap: Path | None) -> AsyncIterator[str]:
    """Yields where it serves. Without a bootstrap it is a server that knows nothing of xDS."""
    words = ("serve", address, name) if bootstrap is not None else ("serve", address, name, "--plain")
    async with _peer(*words, bootstrap=bootstrap) as process:
        assert process.stdout is not None
        yield (await process.stdout.readline()).decode().strip()


@asynccontextmanager
async def _peer(*words: str, bootstrap: Path | None) -> AsyncIterator[asyncio.subprocess.Process]:
    """Its input's end ends it."""
    told = {"GRPC_XDS_BOOTSTRAP": str(bootstrap)} if bootstrap is not None else {}
    process = await asyncio.create_subprocess_exec(
        *(PEER, *words),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **told},
        limit=2**22,  # bytes of a line: a thousand outcomes
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 20)
        except TimeoutError:
            process.kill()
            await process.wait()
