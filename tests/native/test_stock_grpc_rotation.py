"""Does gRPC's own xDS follow certificates that are replaced in the folder that its bootstrap names?"""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from stock_grpc import Stock, Village, stock

from certificates import TestCA
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.identity.credentials import Credentials
from meshlib.identity.folder import write_credentials

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]
STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: {mode: STRICT}}
"""
# Says which certificate the caller has shown; connections do not live long, so that new ones are made.
SERVER = """
import grpc, hashlib, ssl, sys
from concurrent import futures
def who(request, context):
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(context.auth_context()["x509_pem_cert"][0].decode())).digest()
options = [("grpc.max_connection_age_ms", 200), ("grpc.max_connection_age_grace_ms", 20_000)]
server = grpc.server(futures.ThreadPoolExecutor(4), xds=True, options=options)
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
    "echo.Echo", {"Say": grpc.unary_unary_rpc_method_handler(who)}),))
server.add_secure_port(sys.argv[1], grpc.xds_server_credentials(grpc.insecure_server_credentials()))
server.start()
sys.stdin.read()
server.stop(None)
"""
# Calls all the time; a line for each certificate that the server has seen, and for each call that failed.
CLIENT = """
import grpc, grpc.experimental, sys, threading
fallback = grpc.experimental.insecure_channel_credentials()
channel = grpc.secure_channel(
    f"xds:///{sys.argv[1]}", grpc.xds_channel_credentials(fallback), options=[("grpc.enable_http_proxy", 0)]
)
say, last, over = channel.unary_unary("/echo.Echo/Say"), "", threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
while not over.wait(0.02):
    try:
        told = say(b"", timeout=20).hex()
    except grpc.RpcError as error:
        told = f"failed {error.code().name} {error.details()}"
    if told != last or told.startswith("failed"):
        print(told, flush=True)
        last = told
"""


def fingerprint(of: Credentials) -> str:
    leaf = x509.load_pem_x509_certificate(of.certificate_chain)
    return hashlib.sha256(leaf.public_bytes(Encoding.DER)).hexdigest()


@pytest.fixture
async def village(tmp_path: Path) -> AsyncIterator[Village]:
    plane = ControlPlane(ControlPlaneSettings(xds=("127.0.0.1", 0), admin=("127.0.0.1", 0)))
    await plane.start()
    async with AsyncExitStack() as stack:
        found = Village(plane, tmp_path, stack)
        await found.admin.apply(STRICT)
        yield found
    await plane.stop()


def bootstrap(village: Village, name: str, **environment: str) -> Path:
    """With files that are looked at each second."""
    file = village.bootstrap(name, **environment)
    read = json.loads(file.read_text())
    read["certificate_providers"]["default"]["config"]["refresh_interval"] = "1s"
    file.write_text(json.dumps(read))
    return file


async def shown_by(address: str, caller: Credentials, folder: Path) -> str:
    """The certificate that a server has today."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    (folder / "probe.pem").write_bytes(caller.private_key + caller.certificate_chain)
    context.load_cert_chain(folder / "probe.pem")
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return hashlib.sha256(found).hexdigest()


async def told(client: Stock, wanted: str) -> None:
    """Until the server has seen that certificate of the client's; no call may have failed."""
    assert client._process.stdout is not None
    async with asyncio.timeout(60):
        while (line := (await client._process.stdout.readline()).decode().strip()) != wanted:
            assert not line.startswith("failed"), line


async def test_files_are_replaced_under_calls_and_then_the_root(village: Village, tmp_path: Path) -> None:
    """Both leaves, both roots, leaves of the new root, the new root alone: no call of a stock client on a stock server
    fails."""
    old, new = TestCA(), TestCA()
    steps = [(old, ()), (old, (new,)), (new, (old,)), (new, ())]
    for account in ("echo", "friend"):
        write_credentials(tmp_path / account, old.credentials(account))
    serving = {"MESHLIB_SERVICE": "echo", "MESHLIB_LABELS": "app=echo", "MESHLIB_ADDRESS": village.address}
    async with stock(SERVER, village.address, bootstrap=bootstrap(village, "echo", **serving)):
        await village.admin.until_serving(village.address)
        async with stock(CLIENT, village.target, bootstrap=bootstrap(village, "friend")) as client:
            for ca, others in steps:
                for account in ("echo", "friend"):  # each has what it is given before the other gets it
                    given = ca.credentials(account, trusts=others)
                    write_credentials(tmp_path / account, given)
                    if account == "friend":
                        await told(client, fingerprint(given))
                        continue
                    async with asyncio.timeout(60):
                        while await shown_by(village.address, given, tmp_path) != fingerprint(given):  # noqa: ASYNC110
                            await asyncio.sleep(0.1)
    await village.admin.assert_accepted()
