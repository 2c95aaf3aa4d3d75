"""Claims about an identity that SPIRE gives: the Workload API, of a process of its own behind a Unix socket."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization as form
from spiffe._proto.workload_pb2 import X509SVID, X509SVIDResponse

import meshlib
from certificates import TestCA
from inbound.inbound_servers import uvicorn_server
from meshlib.errors import SettingsError
from meshlib.identity.credentials import Credentials
from meshlib.identity.tls import TlsContexts
from meshlib.inbound.peer import of_scope
from meshlib.model import UpstreamTls

pytestmark = pytest.mark.processes
CA, PARTNER = TestCA(), TestCA("partner.example")


class Agent:
    """SPIRE's, as far as a workload sees it."""

    def __init__(self, socket: Path) -> None:
        server = Path(__file__).parent / "workload_api_server.py"
        self._process = subprocess.Popen(
            [sys.executable, str(server), str(socket)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == b"serving\n"

    def give(self, *credentials: Credentials) -> None:
        response = X509SVIDResponse(
            svids=[
                X509SVID(
                    spiffe_id=each.identity.uri,
                    x509_svid=_der(each.certificate_chain),
                    x509_svid_key=form.load_pem_private_key(each.private_key, None).private_bytes(
                        form.Encoding.DER, form.PrivateFormat.PKCS8, form.NoEncryption()
                    ),
                    bundle=_der(dict(each.trust_bundles)[each.identity.trust_domain]),
                )
                for each in credentials
            ],
            federated_bundles={"spiffe://partner.example": _der(PARTNER.root)},
        )
        assert self._process.stdin is not None
        self._process.stdin.write(response.SerializeToString().hex().encode() + b"\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def _der(pem: bytes) -> bytes:
    return b"".join(each.public_bytes(form.Encoding.DER) for each in x509.load_pem_x509_certificates(pem))


def test_spire_gives_the_identity_and_each_renewal(tmp_path: Path) -> None:
    """From before the agent is there, over its death, to the next certificate; of several the first, and partners'
    roots for partners alone."""
    socket = tmp_path / "agent.sock"
    told: SimpleQueue[Credentials] = SimpleQueue()
    with meshlib.connect("", identity=f"spiffe:unix://{socket}") as mesh:
        mesh.on_rotation(told.put)
        assert mesh.wait_for_credentials(0.3) is None  # nobody is there
        agent = Agent(socket)
        try:
            first, other = CA.credentials("reviews"), CA.credentials("other")
            agent.give(first, other)
            found = told.get(timeout=60)
            assert (found.identity, found.certificate_chain) == (first.identity, first.certificate_chain)
            assert {domain: pem.strip() for domain, pem in found.trust_bundles} == {
                "cluster.local": CA.root.strip(),
                "partner.example": PARTNER.root.strip(),
            }
            agent.give(second := CA.credentials("reviews"))
            assert told.get(timeout=60).certificate_chain == second.certificate_chain
        finally:
            agent.kill()
        assert mesh.credentials is not None and mesh.credentials.certificate_chain == second.certificate_chain
        agent = Agent(socket)
        try:
            agent.give(third := CA.credentials("reviews"))
            assert told.get(timeout=60).certificate_chain == third.certificate_chain
            _serve_and_call(mesh, third)
        finally:
            agent.kill()


def _serve_and_call(mesh: meshlib.Mesh, shown: Credentials) -> None:
    """mTLS with what came from there."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": str(of_scope(scope).identity).encode()})
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    rules = UpstreamTls("ISTIO_MUTUAL", subject_alt_names=(shown.identity.uri,))
    with uvicorn_server(app, http=mesh.listening.uvicorn) as url:
        for caller in (CA.credentials("ratings", trusts=[PARTNER]), PARTNER.credentials("buyer", trusts=[CA])):
            context = TlsContexts(lambda caller=caller: caller, has_identity=True).client(rules)  # type: ignore[misc]
            with httpx.Client(verify=context, trust_env=False, timeout=20) as client:
                assert client.get(f"https://{url[7:]}/").text == caller.identity.uri


def test_where_there_can_be_no_workload_api_it_is_said() -> None:
    """Before anything is started."""
    with pytest.raises(SettingsError, match="unix:///PATH"):
        meshlib.connect("", identity="spiffe:/run/agent.sock")
