"""What does mTLS cost a call? `python -m benchmarks.mtls`: kept-alive GETs by httpx.Client, in microseconds, with and
without, bare and through the mesh; and what a new connection costs. The server is a process of its own; contestants
take turns round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec

import meshlib
from benchmarks.server import Answering
from meshlib.controlplane.ca import CertificateAuthority
from meshlib.identity.credentials import Credentials
from meshlib.identity.pem import credentials_of
from meshlib.identity.tls import TlsContexts
from meshlib.model import SpiffeId, UpstreamTls

MESH = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}}}
spec:
  hosts: [{name}.example]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: {port}}}]
  endpoints: [{{address: 127.0.0.1, serviceAccount: server}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: {name}}}
spec: {{host: {name}.example, trafficPolicy: {{tls: {{mode: {mode}}}}}}}
---
"""


def write_identity(authority: CertificateAuthority, folder: Path, account: str) -> Credentials:
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    chain = authority.sign(request.public_bytes(form.Encoding.PEM), SpiffeId.of("cluster.local", "default", account))
    folder.mkdir()
    parts = {
        "tls.crt": b"".join(chain[:-1]),
        "tls.key": key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()),
        "ca.crt": authority.bundle,
    }
    for name, text in parts.items():
        (folder / name).write_bytes(text)
    return read_identity(folder)


def read_identity(folder: Path) -> Credentials:
    chain, key, roots = ((folder / name).read_bytes() for name in ("tls.crt", "tls.key", "ca.crt"))
    return credentials_of(chain, key, roots)


async def _serve(folder: Path) -> None:
    credentials = read_identity(folder)
    loop = asyncio.get_running_loop()
    plain = await loop.create_server(Answering, "127.0.0.1", 0)
    secured = await loop.create_server(Answering, "127.0.0.1", 0, ssl=TlsContexts(lambda: credentials).server())
    print(plain.sockets[0].getsockname()[1], secured.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    plain.close()
    secured.close()


def measure(folder: Path, calls: int, rounds: int) -> dict[str, float]:
    """Microseconds a call, the median of the rounds."""
    authority = CertificateAuthority("cluster.local")
    write_identity(authority, folder / "server", "server")
    mine = write_identity(authority, folder / "client", "client")
    command = [sys.executable, "-m", "benchmarks.mtls", "--serve", str(folder / "server")]
    with ExitStack() as open_ones:
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        open_ones.callback(lambda: server.communicate())
        assert server.stdout is not None
        plain, secured = map(int, server.stdout.readline().split())
        (folder / "mesh").mkdir()
        (folder / "mesh" / "mesh.yaml").write_text(
            MESH.format(name="plain", port=plain, mode="DISABLE")
            + MESH.format(name="secured", port=secured, mode="ISTIO_MUTUAL")
        )
        mesh = open_ones.enter_context(meshlib.connect(folder / "mesh", identity=f"files:{folder / 'client'}"))
        rules = UpstreamTls("ISTIO_MUTUAL", subject_alt_names=("spiffe://cluster.local/ns/default/sa/server",))
        context = TlsContexts(lambda: mine).client(rules)
        bare = open_ones.enter_context(httpx.Client(verify=context, trust_env=False))
        meshed = open_ones.enter_context(mesh.Client())

        def anew() -> None:
            with httpx.Client(verify=context, trust_env=False) as client:
                client.get(f"https://127.0.0.1:{secured}/")

        def plain_anew() -> None:
            with httpx.Client(verify=context, trust_env=False) as client:
                client.get(f"http://127.0.0.1:{plain}/")

        contestants: dict[str, tuple[Callable[[], object], int]] = {
            "httpx": (lambda: bare.get(f"http://127.0.0.1:{plain}/"), calls),
            "httpx, mTLS": (lambda: bare.get(f"https://127.0.0.1:{secured}/"), calls),
            "meshed": (lambda: meshed.get("http://plain.example/"), calls),
            "meshed, mTLS": (lambda: meshed.get("http://secured.example/"), calls),
            "httpx, new connection": (plain_anew, max(1, calls // 10)),
            "httpx, mTLS, new connection": (anew, max(1, calls // 10)),
        }
        took: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(rounds + 1):  # the first warms up
            for name, (call, times) in contestants.items():
                started = time.perf_counter()
                for _ in range(times):
                    call()
                if number:
                    took[name].append((time.perf_counter() - started) / times * 1e6)
    return {name: statistics.median(found) for name, found in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only to see that it runs")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(_serve(options.serve))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), *((5, 1) if options.quick else (300, 9)))
    for name, microseconds in found.items():
        print(f"{name:30} {microseconds:8.0f} us   {microseconds / found['httpx']:5.2f} x httpx")


if __name__ == "__main__":
    main()
