"""Claims about gunicorn's workers with the mesh's mTLS: real processes, by the line that the documentation gives."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from certificates import TestCA
from meshlib.identity.tls import TlsContexts
from meshlib.model import UpstreamTls

APP = """
import meshlib

def app(environ, start_response):
    peer = environ.get("meshlib.peer")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{peer.identity if peer else 'nobody'} {environ['wsgi.url_scheme']}".encode()]

app = meshlib.connect().wsgi(app)
"""
ASGI_APP = """
import meshlib

async def app(scope, receive, send):
    if scope["type"] == "http":
        peer = scope["state"].get("meshlib.peer")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        body = f"{peer.identity if peer else 'nobody'} {scope['scheme']}".encode()
        await send({"type": "http.response.body", "body": body})

app = meshlib.connect().asgi(app)
"""
STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: {mode: STRICT}}
"""


PROBES = {"MESHLIB_PROBE_PATHS": "/healthz"}


@pytest.mark.parametrize(
    ("worker", "settings"),
    [
        ("gunicorn.Sync", {}),
        ("gunicorn.Threads", {}),
        ("gunicorn.Threads", PROBES),
        ("gunicorn_uvicorn.Uvicorn", PROBES),
    ],
)
def test_gunicorn_serves_mtls(tmp_path: Path, worker: str, settings: dict[str, str]) -> None:
    """The peer is identified, kept-alive connections go on, and plaintext to a STRICT port gets no answer; or only the
    probe's path does."""
    authority = TestCA()
    mine, theirs = authority.credentials("reviews"), authority.credentials("ratings")
    identity, mesh = tmp_path / "identity", tmp_path / "mesh"
    identity.mkdir()
    mesh.mkdir()
    (identity / "tls.crt").write_bytes(mine.certificate_chain)
    (identity / "tls.key").write_bytes(mine.private_key)
    (identity / "ca.crt").write_bytes(authority.root)
    (mesh / "strict.yaml").write_text(STRICT)
    (tmp_path / "served.py").write_text(ASGI_APP if "uvicorn" in worker else APP)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MESHLIB_CONTROL_PLANE": str(mesh),
        "MESHLIB_IDENTITY": f"files:{identity}",
        "MESHLIB_FAILURE_POLICY": "deny",
        **settings,
    }
    command = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{port}", "-k", f"meshlib.inbound.{worker}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--threads", "4", "served:app"], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    context = TlsContexts(lambda: theirs, has_identity=True).client(
        UpstreamTls("ISTIO_MUTUAL", subject_alt_names=(mine.identity.uri,))
    )
    try:
        with httpx.Client(verify=context, trust_env=False, timeout=20) as client:
            response = _patiently(client, f"https://127.0.0.1:{port}/")
            assert response.text == f"{theirs.identity} http", (tmp_path / "log").read_text()
            assert client.get(f"https://127.0.0.1:{port}/").status_code == 200
        plain = f"http://127.0.0.1:{port}"
        if settings:
            paths = ("/healthz", "/healthz?x=1", "/", "//healthz", "/healthz/", "/healthz/..", "/Healthz")
            asked = [httpx.get(plain + path, trust_env=False, timeout=20).status_code for path in paths]
            assert asked == [200, 200, 403, 403, 403, 403, 403]
            assert httpx.post(f"{plain}/healthz", trust_env=False, timeout=20).status_code == 403
        else:
            with pytest.raises(httpx.TransportError):
                httpx.get(plain, trust_env=False, timeout=20)
    finally:
        process.terminate()
        process.wait(20)
    if not settings:
        assert f"to port {port} refused" in (tmp_path / "log").read_text()


def _patiently(client: httpx.Client, url: str) -> httpx.Response:
    """Its answer, once it listens and has its certificate and rules."""
    until = time.monotonic() + 30
    while True:
        try:
            return client.get(url)
        except (httpx.TransportError, ssl.SSLError):
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
