"""A member of a mesh that serves gRPC, or calls it without a pause: `python grpc_member.py serve|call sync|aio PERIOD`.

Who it is comes from MESHLIB_*. Its certificate is renewed after PERIOD seconds. It says `ready`, and with each
certificate `shows ISSUER trusts NUMBER`. When its standard input ends, a caller says as JSON what came of its calls.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
from cryptography import x509

import meshlib
from meshlib.identity import ca_client
from meshlib.identity.credentials import Credentials

ROLE, KIND, PERIOD = sys.argv[1], sys.argv[2], float(sys.argv[3])
METHOD, FORBIDDEN, CALLERS, PAUSE = "/echo.Echo/Say", "/echo.Echo/Other", 3, 0.02
TARGETS = os.environ.get("TARGETS", "").split(",")
saying = threading.Lock()
done, failures, denials = Counter[str](), list[str](), list[str]()


def tell(*words: object) -> None:
    with saying:
        print(*words, flush=True)


def shown(credentials: Credentials) -> None:
    leaf = x509.load_pem_x509_certificate(credentials.certificate_chain)
    roots = x509.load_pem_x509_certificates(dict(credentials.trust_bundles)[credentials.identity.trust_domain])
    tell("shows", leaf.issuer.rfc4514_string().replace(" ", ""), "trusts", len(roots))


def handlers(kind: str) -> grpc.GenericRpcHandler:
    def who(request: bytes, context: Any) -> bytes:
        return f"{kind} {context.meshlib_peer.identity}".encode()

    async def who_aio(request: bytes, context: Any) -> bytes:
        return who(request, context)

    method = grpc.unary_unary_rpc_method_handler(who if kind == "sync" else who_aio)
    return grpc.method_handlers_generic_handler("echo.Echo", {"Say": method, "Other": method})


def serve_sync(mesh: meshlib.Mesh) -> None:
    server = grpc.server(ThreadPoolExecutor(8), interceptors=mesh.grpc_server_interceptors())
    server.add_generic_rpc_handlers((handlers("sync"),))
    server.add_secure_port(mesh.settings.address, mesh.grpc_server_credentials())
    server.start()
    mesh.serve()
    tell("ready")
    sys.stdin.read()
    server.stop(1).wait(10)


async def serve_aio(mesh: meshlib.Mesh) -> None:
    credentials = await asyncio.to_thread(mesh.grpc_server_credentials)
    server = grpc.aio.server(interceptors=mesh.grpc_aio_server_interceptors())
    server.add_generic_rpc_handlers((handlers("aio"),))
    server.add_secure_port(mesh.settings.address, credentials)
    await server.start()
    mesh.serve()
    tell("ready")
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(1)


def is_well(answer: bytes) -> bool:
    return answer.endswith(b"/sa/caller")


def call_sync(mesh: meshlib.Mesh) -> None:
    channels = [mesh.grpc_channel(target) for target in TARGETS]
    methods = [each.unary_unary(METHOD) for each in channels]
    for method in methods:
        patiently(lambda method=method: is_well(method(b"", timeout=20)))
    for each in channels:
        try:
            each.unary_unary(FORBIDDEN)(b"", timeout=20)
        except grpc.RpcError as error:
            denials.append(error.code().name)
    tell("ready")
    over = threading.Event()

    def call(number: int) -> None:
        while not over.wait(PAUSE):
            number += 1
            try:
                done[methods[number % len(methods)](b"", timeout=20).decode()] += 1
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")

    callers = [threading.Thread(target=call, args=(number,)) for number in range(CALLERS)]
    for each in callers:
        each.start()
    sys.stdin.read()
    over.set()
    for each in callers:
        each.join(30)
    for each in channels:
        each.close()


def patiently(is_well: Any) -> None:
    """Until the mesh knows the service, and that it serves mutual TLS."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if is_well():
                return
        except grpc.RpcError:
            pass
        time.sleep(0.05)
    raise SystemExit("the mesh has not come up")


async def call_aio(mesh: meshlib.Mesh) -> None:
    channels = [mesh.grpc_aio_channel(target) for target in TARGETS]
    methods = [each.unary_unary(METHOD) for each in channels]
    async with asyncio.timeout(60):
        for method in methods:
            while True:
                try:
                    if is_well(await method(b"", timeout=20)):
                        break
                except grpc.RpcError:
                    pass
                await asyncio.sleep(0.05)
    for each in channels:
        try:
            await each.unary_unary(FORBIDDEN)(b"", timeout=20)
        except grpc.RpcError as error:
            denials.append(error.code().name)
    tell("ready")
    over = asyncio.Event()

    async def call(number: int) -> None:
        while not over.is_set():
            number += 1
            try:
                done[(await methods[number % len(methods)](b"", timeout=20)).decode()] += 1
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(PAUSE)

    callers = [asyncio.create_task(call(number)) for number in range(CALLERS)]
    await asyncio.to_thread(sys.stdin.read)
    over.set()
    await asyncio.gather(*callers)
    for each in channels:
        await each.close()


if __name__ == "__main__":
    ca_client.renew_after = lambda remaining, rng: PERIOD  # type: ignore[assignment]
    with meshlib.connect() as mesh:
        mesh.on_rotation(shown)
        run = {"serve sync": serve_sync, "serve aio": serve_aio, "call sync": call_sync, "call aio": call_aio}[
            f"{ROLE} {KIND}"
        ]
        if KIND == "sync":
            run(mesh)
        else:
            asyncio.run(run(mesh))  # type: ignore[arg-type]
    if ROLE == "call":
        tell(json.dumps({"done": done, "failures": failures, "denials": denials}))
