"""A control plane with access control, and administrators with tokens, for tests."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec

from certificates import pem_of
from meshlib.controlplane.access_rules import token_hash
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.identity.credentials import Credentials
from meshlib.identity.pem import credentials_of
from meshlib.model import SpiffeId

YAML = {"content-type": "application/yaml"}
TOKENS = {name: f"mat_{name}-0123456789abcdef0123456789abcdef" for name in ("alice", "olaf", "vera", "dora", "nemo")}
"""Admin of all; operator and viewer of `default`; admin of `dev`; with no grant at all."""
GRANTS = """
grants:
- {role: admin, to: ["token:alice"], namespaces: ["*"]}
- {role: operator, to: ["token:olaf"], namespaces: [default]}
- {role: viewer, to: ["token:vera"], namespaces: [default]}
- {role: admin, to: ["token:dora"], namespaces: [dev]}
"""
VIRTUAL_SERVICE = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: NAMESPACE}
spec:
  hosts: [reviews]
  http: [{timeout: 2s, route: [{destination: {host: reviews}}]}]
"""
POLICY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-all, namespace: NAMESPACE}
spec: {}
"""


def write_access(folder: Path, more: str = "", names: Iterable[str] = TOKENS) -> Path:
    """The two files; returns the one that names the other."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.yaml").write_text(
        "tokens:\n" + "".join(f"- {{name: {name}, sha256: {token_hash(TOKENS[name])}}}\n" for name in names)
    )
    file = folder / "access.yaml"
    file.write_text(f"tokens: tokens.yaml\n{GRANTS}{more}")
    return file


def settings_of(folder: Path, more: str = "", **settings: Any) -> ControlPlaneSettings:
    defaults: dict[str, Any] = {
        "state": folder / "state",
        "xds": ("127.0.0.1", 0),
        "admin": ("0.0.0.0", 0),
        "access": write_access(folder / "access", more),
    }
    return ControlPlaneSettings(**{**defaults, **settings})


@contextlib.asynccontextmanager
async def running(settings: ControlPlaneSettings) -> AsyncIterator[ControlPlane]:
    plane = ControlPlane(settings)
    try:
        await plane.start()
        yield plane
    finally:
        await plane.stop()


def client_of(plane: ControlPlane, name: str = "", certificate: tuple[Path, Path] | None = None) -> httpx.AsyncClient:
    """Of the administrator with this token; "" shows none."""
    verify: Any = True
    if plane.admin_url.startswith("https"):
        verify = ssl.create_default_context(cadata=plane.roots)
        if certificate is not None:
            verify.load_cert_chain(*certificate)
    headers = {"authorization": f"Bearer {TOKENS[name]}"} if name else {}
    return httpx.AsyncClient(
        base_url=plane.local_admin_url, verify=verify, headers=headers, trust_env=False, timeout=30
    )


def workload(plane: ControlPlane, identity: SpiffeId) -> Credentials:
    """What a process of this identity would have, of the control plane's own CA."""
    assert plane.authority is not None
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    chain = plane.authority.sign(csr.public_bytes(form.Encoding.PEM), identity)
    return credentials_of(b"".join(chain), pem_of(key), chain[-1])
