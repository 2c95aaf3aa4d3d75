"""What does it cost to be called? A uvicorn server bare, with its own mTLS, and on the mesh: with mTLS, and with mTLS
and 100 policies, of which the last allows the call.

Each server is a process of its own, with one application that answers at once; the client is raw.py, which does as
little as can be. Decisions alone, without a wire, are measured by authorization.py, whose rows are here, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvicorn

from benchmarks import authorization
from benchmarks.effort import Effort
from benchmarks.identities import CLIENT, SERVER, stock_context, write_identities
from benchmarks.processes import module
from benchmarks.raw import RawClient
from benchmarks.rounds import Row, play_async

BARE, TLS, MESHED, POLICIES = "uvicorn", "uvicorn with its own mTLS", "meshed, mTLS", "meshed, mTLS and 100 policies"
KINDS = {BARE: "bare", TLS: "tls", MESHED: "meshed", POLICIES: "policies"}
STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: {mode: STRICT}}
---
"""
_BODY = b'{"id": 0}'
_HEAD = [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())]


async def _application(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": _HEAD})
    await send({"type": "http.response.body", "body": _BODY})


class _Server(uvicorn.Server):
    """Prints its port, and ends with its stdin."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets
        print(sockets[0].getsockname()[1], flush=True)
        asyncio.get_running_loop().add_reader(sys.stdin, self._end)

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(sys.stdin)
        self.should_exit = True


def _serve(kind: str, folder: Path) -> None:
    logging.disable()
    own = folder / SERVER
    options: dict[str, Any] = {
        "log_level": "critical",
        "lifespan": "off",
        "access_log": False,
        "timeout_keep_alive": 3600,
    }
    with ExitStack() as stack:
        # With its protocol named, as uvicorn's own socket has it: asyncio sets TCP_NODELAY on no other.
        listening = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP))
        listening.bind(("127.0.0.1", 0))
        listening.listen(1024)
        app: Any = _application
        if kind == "tls":
            files = {"ssl_certfile": own / "tls.crt", "ssl_keyfile": own / "tls.key", "ssl_ca_certs": own / "ca.crt"}
            options |= {**{name: str(file) for name, file in files.items()}, "ssl_cert_reqs": ssl.CERT_REQUIRED}
        elif kind != "bare":
            import meshlib

            configuration = folder / kind
            configuration.mkdir()
            count = authorization.policies(100) if kind == "policies" else ""
            (configuration / "mesh.yaml").write_text(STRICT + count, encoding="utf-8")
            address = f"127.0.0.1:{listening.getsockname()[1]}"
            mesh = stack.enter_context(
                meshlib.connect(configuration, service=SERVER, address=address, identity=f"files:{own}", cache_dir="-")
            )
            mesh.start()
            app, options["http"] = mesh.asgi(app), mesh.listening.uvicorn
        _Server(uvicorn.Config(app, **options)).run([listening])


async def _play(
    ports: dict[str, int], processes: tuple[int, ...], context: ssl.SSLContext, concurrency: int, effort: Effort
) -> list[Row]:
    clients = {name: RawClient(port, f"{SERVER}:80", None if name == BARE else context) for name, port in ports.items()}
    try:
        calls = {name: client.get for name, client in clients.items()}
        return await play_async("raw", calls, concurrency, effort.rounds, effort.length(concurrency), processes)
    finally:
        for client in clients.values():
            client.close()


def measure(effort: Effort) -> dict[str, Any]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_identities(folder)
        started = {
            name: stack.enter_context(module("benchmarks.inbound", kind, str(folder))) for name, kind in KINDS.items()
        }
        ports = {name: server.ports[0] for name, server in started.items()}
        processes = tuple(server.process for server in started.values())
        context = stock_context(folder / CLIENT)
        for concurrency in (each for each in effort.concurrency if each <= 32):
            rows += asyncio.run(_play(ports, processes, context, concurrency, effort))
    rounds, seconds = (2, 0.005) if effort.name == "smoke" else (effort.batches, effort.seconds / 5)
    decisions = [
        {"what": what, "microseconds": microseconds} for what, microseconds in authorization.rows(rounds, seconds)
    ]
    return {"rows": [row._asdict() for row in rows], "decisions": decisions}


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))
