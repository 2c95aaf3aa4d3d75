"""Does who belongs get in, and nobody else? A control plane with TLS, the CA's service, the data plane's own client."""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from joserfc import jwt
from joserfc.jwk import KeySet, OctKey, RSAKey

import meshlib
from certificates import TestCA
from joining import join_token
from meshlib.controlplane.authentication import Authenticator, Issuer, NotAuthenticated, TokenReview
from meshlib.controlplane.ca import DAY, BadRequest, CertificateAuthority, RotationRefused
from meshlib.controlplane.join_tokens import JoinTokens, Refused
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.controlplane.sources import StateError
from meshlib.controlplane.token_shelf import FileShelf
from meshlib.identity.access import NoAccess, pinned_root
from meshlib.identity.credentials import Credentials
from meshlib.identity.proof import prove
from meshlib.model import Node, SpiffeId, Workload
from meshlib.xds import messages as m
from meshlib.xds.encode import encode_node
from meshlib.xds.resource_types import CLUSTER

REVIEWS = SpiffeId.of("cluster.local", "default", "reviews")
ISSUER = "https://issuer.example"


def csr_of(key: Any, *names: x509.GeneralName) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(form.Encoding.PEM)


async def until(is_so: Callable[[], bool]) -> None:
    """The control plane tells nobody who has come, so it is asked."""
    async with asyncio.timeout(60):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def names_of(leaf: bytes) -> x509.SubjectAlternativeName:
    certificate = x509.load_pem_x509_certificate(leaf)
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    found = ControlPlane(
        ControlPlaneSettings(state=tmp_path / "state", xds=("127.0.0.1", 0), admin=("127.0.0.1", 0), tls=True)
    )
    await found.start()
    yield found
    await found.stop()


def token_for(plane: ControlPlane, identity: SpiffeId = REVIEWS) -> str:
    return join_token(plane, identity)


def call(plane: ControlPlane, token: str, csr: bytes, **fields: Any) -> Any:
    assert plane.authority is not None
    with grpc.secure_channel(plane.xds_address, grpc.ssl_channel_credentials(plane.authority.bundle)) as channel:
        request = m.serialize(m.CertificateRequest(csr=csr.decode(), **fields))
        method: Any = channel.unary_unary(m.CREATE_CERTIFICATE)
        answer = method(request, timeout=30, metadata=(("authorization", f"Bearer {token}"),))
    return m.CertificateResponse.FromString(answer).cert_chain


def first_answer(plane: ControlPlane, node: Node, token: str) -> bytes:
    """To an xDS client that calls itself `node`."""
    assert plane.authority is not None
    with grpc.secure_channel(plane.xds_address, grpc.ssl_channel_credentials(plane.authority.bundle)) as channel:
        request = m.DeltaDiscoveryRequest(type_url=CLUSTER, node=encode_node(node))
        method: Any = channel.stream_stream(m.ADS_DELTA)
        stream = method(
            iter([m.serialize(request)]), timeout=30, metadata=(("authorization", f"Bearer {token}"),) if token else ()
        )
        return next(stream, b"")


async def test_join_token_to_certificate_to_configuration(
    plane: ControlPlane, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A process with nothing but a join token pins the root, gets a certificate, and xDS by that; nothing leaks."""
    caplog.set_level(logging.DEBUG)
    token = token_for(plane)
    (tmp_path / "token").write_text(token + "\n")
    settings = {"service_account": "reviews", "cache_dir": "-", "identity": "control-plane"}
    mesh = meshlib.connect(plane.xds_address, token_file=str(tmp_path / "token"), **settings)
    try:
        found = await asyncio.to_thread(mesh.wait_for_credentials, 60)
        assert found is not None
        assert found.identity == REVIEWS
        await until(lambda: bool(plane.clients()))
        assert plane.clients()[0].id == mesh.node.id
        secrets = [token.split(".")[1], *found.private_key.decode().splitlines()[1:-1]]
        async with httpx.AsyncClient() as client:
            told = "".join([(await client.get(plane.admin_url + path)).text for path in ("/v1/clients", "/v1/objects")])
        shown = caplog.text + told + repr((mesh, found, plane, plane.tokens, plane.authority, mesh._identity))
        assert not [secret for secret in secrets if secret in shown]
    finally:
        await asyncio.to_thread(mesh.close)


async def test_a_join_token_is_good_once(plane: ControlPlane, caplog: pytest.LogCaptureFixture) -> None:
    """A second use is refused and logged, and a bad request does not use it up."""
    token = token_for(plane)
    with pytest.raises(grpc.RpcError) as bad:
        await asyncio.to_thread(call, plane, token, b"nonsense")
    assert bad.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    chain = await asyncio.to_thread(call, plane, token, csr_of(p256()))
    assert names_of(chain[0].encode()).get_values_for_type(x509.UniformResourceIdentifier) == [REVIEWS.uri]
    assert chain[-1].encode() == plane.authority.roots[0]  # type: ignore[union-attr]
    with pytest.raises(grpc.RpcError) as replayed:
        await asyncio.to_thread(call, plane, token, csr_of(p256()))
    assert replayed.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
    assert "was used already" in caplog.text


async def test_a_stolen_node_id_is_refused(plane: ControlPlane, caplog: pytest.LogCaptureFixture) -> None:
    """With reviews' certificate nobody is ratings, nor reviews of another namespace; without one, nobody at all."""
    assert plane.authority is not None
    key = p256()
    chain = plane.authority.sign(csr_of(key), REVIEWS)
    pem = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    mine = Credentials(REVIEWS, b"".join(chain[:-1]), pem, (("cluster.local", chain[-1]),), 0.0, 1e12)
    own = Node("sidecar~10.0.0.1~reviews.default~default.svc.cluster.local", Workload("r", service_account="reviews"))
    assert await asyncio.to_thread(first_answer, plane, own, prove(mine, time.time()))
    for stolen in (
        Node("sidecar~10.0.0.1~ratings.default~default.svc.cluster.local", Workload("r", service_account="ratings")),
        Node("sidecar~10.0.0.1~reviews.prod~prod.svc.cluster.local", Workload("r", service_account="reviews")),
        Node("x", Workload("r", namespace="prod", service_account="reviews")),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            await asyncio.to_thread(first_answer, plane, stolen, prove(mine, time.time()))
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED  # type: ignore[attr-defined]
    assert "is not the caller's to be" in caplog.text
    foreign = prove(TestCA().credentials("reviews"), time.time())
    for token in ("", "nonsense", foreign, token_for(plane), "x" * 7000):
        with pytest.raises(grpc.RpcError) as refused:
            await asyncio.to_thread(first_answer, plane, own, token)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


async def test_a_root_is_replaced_without_a_break(plane: ControlPlane, tmp_path: Path) -> None:
    """The client trusts both before the new one signs; the switch waits for its word."""
    assert plane.authority is not None and plane._certificates is not None
    authority, late = plane.authority, plane._certificates.late
    (tmp_path / "token").write_text(token_for(plane))
    heard: queue.Queue[Credentials] = queue.Queue()
    mesh = meshlib.connect(
        plane.xds_address,
        token_file=str(tmp_path / "token"),
        service_account="reviews",
        cache_dir="-",
        identity="control-plane",
    )
    mesh.on_rotation(heard.put)
    try:
        assert await asyncio.to_thread(mesh.wait_for_credentials, 60)
        await until(lambda: bool(plane._certificates._watchers) and not late())
        with pytest.raises(RotationRefused):
            authority.rotate("switch")
        authority.rotate("begin")
        with pytest.raises(RotationRefused, match="reached everybody"):
            authority.rotate("switch", late)
        await until(lambda: not late())
        assert mesh.credentials is not None
        assert dict(mesh.credentials.trust_bundles)["cluster.local"] == authority.bundle
        authority.rotate("switch", late)
        with pytest.raises(RotationRefused, match="may be valid until"):
            authority.rotate("finish")
        assert authority.sign(csr_of(p256()), REVIEWS)[-1] == authority.roots[0]
        authority.rotate("finish", force=True)
        assert len(authority.roots) == 1
    finally:
        await asyncio.to_thread(mesh.close)


def test_names_come_from_the_caller_alone() -> None:
    """What is smuggled into a request is not in the certificate."""
    authority = CertificateAuthority("cluster.local")
    smuggled = x509.UniformResourceIdentifier("spiffe://cluster.local/ns/prod/sa/bank"), x509.DNSName("bank.example")
    names = names_of(authority.sign(csr_of(p256(), *smuggled), REVIEWS)[0])
    assert list(names) == [
        x509.UniformResourceIdentifier(REVIEWS.uri),
        x509.DNSName("reviews.default.sa.cluster.local"),
    ]


def test_keys_and_lifetimes() -> None:
    """EC, RSA and Ed25519, strong ones; 24 hours unless asked, 90 days at most."""
    authority = CertificateAuthority("cluster.local")
    for key in (p256(), rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate()):
        leaf = x509.load_pem_x509_certificate(authority.sign(csr_of(key), REVIEWS)[0])
        assert DAY - 60 < leaf.not_valid_after_utc.timestamp() - time.time() <= DAY
    for asked, given in ((-1.0, DAY), (60.0, 60.0), (1000 * DAY, 90 * DAY)):
        leaf = x509.load_pem_x509_certificate(authority.sign(csr_of(p256()), REVIEWS, asked)[0])
        assert abs(leaf.not_valid_after_utc.timestamp() - time.time() - given) < 30
    with pytest.raises(BadRequest, match="2048"):
        authority.sign(csr_of(rsa.generate_private_key(65537, 1024)), REVIEWS)
    good = x509.load_pem_x509_csr(csr_of(p256())).public_bytes(form.Encoding.DER)
    broken = x509.load_der_x509_csr(good[:-4] + bytes(4)).public_bytes(form.Encoding.PEM)
    with pytest.raises(BadRequest):
        authority.sign(broken, REVIEWS)


def test_what_others_can_read_is_refused(tmp_path: Path) -> None:
    """The root's key is the mesh; it is written for its owner alone."""
    first = CertificateAuthority("cluster.local", tmp_path / "ca")
    file = tmp_path / "ca" / "ca.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert CertificateAuthority("cluster.local", tmp_path / "ca").bundle == first.bundle
    file.chmod(0o640)
    with pytest.raises(StateError, match="read by others"):
        CertificateAuthority("cluster.local", tmp_path / "ca")


async def test_join_tokens_expire_and_are_kept_hashed(tmp_path: Path) -> None:
    """What is on disk can't be used to join."""
    now = [1000.0]
    file = tmp_path / "ca" / "tokens.json"
    tokens = JoinTokens(FileShelf(file), lambda: now[0])
    text, token = await tokens.create(REVIEWS, 60.0, "00")
    assert text.split(".")[1] not in file.read_text()
    assert (await JoinTokens(FileShelf(file), lambda: now[0]).check(text)).id == token.id
    with pytest.raises(Refused, match="no such"):
        await tokens.check(text.replace(text.split(".")[1], "guess"))
    now[0] += 60.0
    with pytest.raises(Refused, match="expired"):
        await tokens.check(text)
    await tokens.revoke(token.id)
    with pytest.raises(Refused, match="no such"):
        await tokens.check(text)


def authenticator(tmp_path: Path, key: RSAKey, **options: Any) -> Authenticator:
    import json

    (tmp_path / "jwks.json").write_text(json.dumps(KeySet([key]).as_dict(private=False)))
    issuer = Issuer(ISSUER, "meshlib", str(tmp_path / "jwks.json"))
    return Authenticator("cluster.local", lambda: b"", JoinTokens(), issuers=(issuer,), **options)


async def test_attacks_on_an_issuers_tokens(tmp_path: Path) -> None:
    """`none`, HMAC with the public key, another audience or issuer, too old, unsigned, huge: none gets in."""
    key, other = (RSAKey.generate_key(2048, {"kid": "one"}) for _ in range(2))
    judge = authenticator(tmp_path, key)
    now = int(time.time())
    good = {
        "iss": ISSUER,
        "aud": "meshlib",
        "sub": "system:serviceaccount:default:reviews",
        "exp": now + 600,
        "iat": now,
    }
    head = {"alg": "RS256", "kid": "one"}
    assert (await judge.authenticate(jwt.encode(head, good, key), "peer:1")).identity == REVIEWS
    none = jwt.encode(head, good, key).split(".")
    none[0] = "eyJhbGciOiJub25lIn0"
    hmac_key = OctKey.import_key(b"secret " * 8)
    bad = {
        "none": ".".join([*none[:2], ""]),
        "HMAC": jwt.encode({"alg": "HS256", "kid": "one"}, good, hmac_key),
        "audience": jwt.encode(head, {**good, "aud": "bank"}, key),
        "issuer": jwt.encode(head, {**good, "iss": "https://evil.example"}, key),
        "expired": jwt.encode(head, {**good, "exp": now - 3600}, key),
        "no end": jwt.encode(head, {name: each for name, each in good.items() if name != "exp"}, key),
        "key": jwt.encode(head, good, other),
        "kid": jwt.encode({**head, "kid": "../../etc/passwd"}, good, other),
        "account": jwt.encode(head, {**good, "sub": "system:serviceaccount:default:a/../b"}, key),
        "huge": "x" * 20_000,
        "empty": "",
    }
    for name, token in bad.items():
        with pytest.raises(NotAuthenticated):
            await judge.authenticate(token, f"{name}:1")


async def test_guessing_is_stopped(tmp_path: Path) -> None:
    """An address that was refused often is not heard, whatever it says next."""
    now = [1000.0]
    judge = Authenticator("cluster.local", lambda: b"", JoinTokens(clock=lambda: now[0]), clock=lambda: now[0])
    token, _ = await judge.tokens.create(REVIEWS, 3600.0, "00")
    for _ in range(30):
        with pytest.raises(NotAuthenticated):
            await judge.authenticate("mjt_x.guess.00", "ipv4:10.0.0.1:1", may_join=True)
    with pytest.raises(NotAuthenticated, match="times"):
        await judge.authenticate(token, "ipv4:10.0.0.1:2", may_join=True)
    assert await judge.authenticate(token, "ipv4:10.0.0.2:1", may_join=True)
    now[0] += 61
    assert await judge.authenticate(token, "ipv4:10.0.0.1:2", may_join=True)


async def test_kubernetes_is_asked_for_its_tokens(tmp_path: Path) -> None:
    """For our audience; a token for another, or of a person, is refused."""
    key = RSAKey.generate_key(2048)
    status: dict[str, Any] = {}
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(201, json={"status": status})

    (tmp_path / "own").write_text("mine\n")
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        review = TokenReview("https://kubernetes", tmp_path / "own")
        judge = authenticator(tmp_path, key, kubernetes=review, http=client)
        token = jwt.encode({"alg": "RS256"}, {"iss": "kubernetes"}, key)
        user = {"username": "system:serviceaccount:default:reviews"}
        status.update(authenticated=True, audiences=["istio-ca"], user=user)
        assert (await judge.authenticate(token, "peer:1")).identity == REVIEWS
        assert asked[0].headers["authorization"] == "Bearer mine"
        for wrong in ({"audiences": ["vault"]}, {"authenticated": False}, {"user": {"username": "jason"}}):
            kept = dict(status)
            status.update(wrong)
            with pytest.raises(NotAuthenticated):
                await judge.authenticate(token, "peer:1")
            status.update(kept)


async def test_a_proof_is_good_once_and_for_a_minute() -> None:
    """Whoever overhears one can't use it."""
    authority = TestCA()
    judge = Authenticator("cluster.local", lambda: authority.root, JoinTokens())
    proof = prove(authority.credentials("reviews"), time.time())
    assert (await judge.authenticate(proof, "peer:1")).identity == REVIEWS
    bad = (
        proof,
        prove(authority.credentials("reviews"), time.time() - 200),
        prove(authority.expired("reviews"), time.time()),
        prove(TestCA().credentials("reviews"), time.time()),
        prove(authority.credentials("reviews", uris=[REVIEWS.uri, "spiffe://a/b"]), time.time()),
    )
    for each in bad:
        with pytest.raises(NotAuthenticated):
            await judge.authenticate(each, "peer:1")


async def test_a_pin_of_another_root_is_refused(plane: ControlPlane) -> None:
    """A join token is never shown to a server that does not have its root."""
    with pytest.raises(NoAccess, match="root is another"):
        await asyncio.to_thread(pinned_root, plane.xds_address, "00" * 32)


async def test_plaintext_is_for_loopback_only() -> None:
    """Asked for elsewhere, nothing is served."""
    plane = ControlPlane(ControlPlaneSettings(xds=("0.0.0.0", 0), admin=("127.0.0.1", 0), tls=False))
    with pytest.raises(OSError, match="loopback only"):
        await plane.start()
    await plane.stop()
