"""Who gets a certificate over SDS, and which? Asked by Envoy's published protos."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from cryptography import x509
from envoy.config.core.v3.base_pb2 import Node
from envoy.extensions.transport_sockets.tls.v3.secret_pb2 import Secret
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest
from envoy.service.secret.v3.sds_pb2_grpc import SecretDiscoveryServiceStub
from google.protobuf.json_format import ParseDict

from meshlib.controlplane.ca import CertificateAuthority
from meshlib.controlplane.secrets import SecretsOf
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.identity.pem import credentials_of, identity_of
from meshlib.identity.proof import prove
from meshlib.model import SpiffeId
from meshlib.xds.resource_types import CLUSTER, SECRET

SHOP = SpiffeId.of("cluster.local", "default", "shop")


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    found = ControlPlane(ControlPlaneSettings(xds=("127.0.0.1", 0), admin=("127.0.0.1", 0)))
    await found.start()
    yield found
    await found.stop()


async def asked(plane: ControlPlane, *, proof: bool, type_url: str = SECRET, **metadata: Any) -> list[Secret]:
    """The secrets of the first answer; [] where none comes."""
    assert plane.authority is not None
    chain, key = plane.authority.issue(SHOP)
    token = prove(credentials_of(b"".join(chain[:-1]), key, chain[-1]), time.time())
    node = ParseDict(
        {
            "id": "sidecar~127.0.0.1~shop-1.default~default.svc.cluster.local",
            "user_agent_name": "envoy",
            "metadata": {"SERVICE_ACCOUNT": "shop", **metadata},
        },
        Node(),
    )
    async with grpc.aio.insecure_channel(plane.xds_address) as channel:
        call = SecretDiscoveryServiceStub(channel).StreamSecrets(
            metadata=(("authorization", f"Bearer {token}"),) if proof else ()
        )
        request = DiscoveryRequest(type_url=type_url, node=node, resource_names=["default", "ROOTCA"])
        await call.write(request)
        try:
            answer = await asyncio.wait_for(call.read(), 10 if proof or metadata else 1.0)
        except TimeoutError:
            return []
        finally:
            call.cancel()
        return [Secret.FromString(each.value) for each in answer.resources]


async def test_who_has_proved_its_identity_is_given_its_certificate(plane: ControlPlane) -> None:
    """And the roots."""
    roots, certificate = await asked(plane, proof=True)
    assert [roots.name, certificate.name] == ["ROOTCA", "default"]
    shown = x509.load_pem_x509_certificate(certificate.tls_certificate.certificate_chain.inline_bytes)
    assert identity_of(shown) == SHOP
    assert certificate.tls_certificate.private_key.inline_bytes
    assert plane.authority is not None
    assert roots.validation_context.trusted_ca.inline_bytes == plane.authority.bundle


async def test_who_has_proved_nothing_gets_no_certificate(plane: ControlPlane) -> None:
    """Whatever it says of itself."""
    assert await asked(plane, proof=False) == []


async def test_who_has_its_own_files_is_told_their_names(plane: ControlPlane) -> None:
    """The key stays where it is; nothing is issued, so nothing has to be proved."""
    roots, certificate = await asked(plane, proof=False, MESHLIB_CERTIFICATES="/run/mesh")
    assert certificate.tls_certificate.private_key.filename == "/run/mesh/tls.key"
    assert certificate.tls_certificate.watched_directory.path == "/run/mesh"
    assert roots.validation_context.trusted_ca.filename == "/run/mesh/ca.crt"


async def test_the_service_has_secrets_and_nothing_else(plane: ControlPlane) -> None:
    """Everything else comes aggregated."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asked(plane, proof=True, type_url=CLUSTER)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_certificate_is_renewed_at_half_its_life_and_after_a_rotation() -> None:
    """Until then it is the very same."""
    now = [time.time()]
    authority = CertificateAuthority("cluster.local", clock=lambda: now[0])
    secrets = SecretsOf(authority, SHOP)
    first = secrets.now("", lambda: now[0])
    assert secrets.now("", lambda: now[0]) is first
    assert 0.4 * 86400 < secrets.renew_at - now[0] < 0.6 * 86400
    now[0] = secrets.renew_at
    second = secrets.now("", lambda: now[0])
    assert second["default"].version != first["default"].version
    assert second["ROOTCA"] == first["ROOTCA"]
    authority.rotate("begin")
    assert secrets.now("", lambda: now[0])["ROOTCA"].version != first["ROOTCA"].version
    assert SecretsOf(authority, None).now("") == {}
