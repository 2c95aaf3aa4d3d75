"""A join token for a test, made at the control plane itself, and what it buys."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from meshlib.controlplane.ca import fingerprint
from meshlib.controlplane.server import ControlPlane
from meshlib.model import SpiffeId
from meshlib.xds import messages as m

T = TypeVar("T")


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """What waits for nothing, as tokens in memory or in a file do, needs no loop."""
    try:
        work.send(None)
    except StopIteration as done:
        found: T = done.value
        return found
    raise AssertionError(f"{work} waits")


def join_token(plane: ControlPlane, identity: SpiffeId) -> str:
    """Good for an hour, of a control plane that keeps its tokens by itself."""
    assert plane.tokens is not None and plane.authority is not None
    return at_once(plane.tokens.create(identity, 3600.0, fingerprint(plane.authority.roots[0])))[0]


async def certificate(address: str, roots: str, token: str) -> grpc.StatusCode:
    """What the CA at this address says to whoever shows this token."""
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    request = m.serialize(m.CertificateRequest(csr=csr.public_bytes(serialization.Encoding.PEM).decode()))
    trusted = grpc.ssl_channel_credentials(roots.encode())
    async with grpc.aio.secure_channel(address, trusted) as channel:
        call = channel.unary_unary(m.CREATE_CERTIFICATE)
        try:
            await call(request, timeout=60.0, metadata=(("authorization", f"Bearer {token}"),))
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK
