"""Is any key, token or cookie to be found where others look? Logs, errors, answers, audit log, reprs, files."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import stat
import time
import traceback
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey

import meshlib
from controlplane.access import TOKENS, YAML, client_of, running, settings_of, workload
from meshlib.controlplane.audit import redacted
from meshlib.controlplane.gate import COOKIE
from meshlib.identity.proof import prove
from meshlib.model import SpiffeId

REVIEWS = SpiffeId.of("cluster.local", "default", "reviews")
HEADER_SECRET = "S3CRET-of-a-header"
RULE = f"""
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: reviews}}
spec:
  hosts: [reviews]
  http:
  - headers: {{request: {{set: {{authorization: "Bearer {HEADER_SECRET}"}}}}}}
    route: [{{destination: {{host: reviews}}}}]
"""
SERVICE = """---
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec: {ports: [{name: http, port: 9080}]}
"""
READS = (
    "/v1/services/default/reviews", "/v1/config?of=vm", "/metrics", "/sd/prometheus",
    "/version", "/v1/objects", "/v1/problems", "/v1/clients", "/v1/endpoints", "/v1/graph", "/v1/traces", "/v1/changes",
    "/v1/audit", "/v1/tokens", "/v1/ca", "/v1/whoami", "/healthz", "/readyz",
)  # fmt: skip


async def test_nothing_that_proves_anything_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A control plane lives its life: processes join, administrators come by every way, the root is rotated, and much
    of it goes wrong. Then everything that it has said is searched."""
    caplog.set_level(logging.DEBUG)
    for noisy in ("httpcore", "httpx", "asyncio"):  # the tests' own client
        logging.getLogger(noisy).setLevel(logging.WARNING)
    more = "- {role: viewer, to: ['spiffe://cluster.local/ns/default/sa/reviews'], namespaces: [default]}\n"
    said: list[str] = []
    secrets: dict[str, str] = dict(TOKENS)
    async with running(settings_of(tmp_path, more, tls=True)) as plane:
        assert plane.tokens is not None and plane.authority is not None
        async with client_of(plane, "alice") as alice, client_of(plane) as page:
            made = await alice.post(
                "/v1/tokens", params={"namespace": "default", "service_account": "reviews", "ttl": "600"}, headers=YAML
            )
            join = made.json()["text"]
            secrets["join token"] = join.split(".")[1]
            (tmp_path / "token").write_text(join)
            mesh = meshlib.connect(
                plane.xds_address,
                token_file=str(tmp_path / "token"),
                service_account="reviews",
                identity="control-plane",
                telemetry_interval=0.1,
                cache_dir=str(tmp_path / "cache"),
            )
            try:
                credentials = await asyncio.to_thread(mesh.wait_for_credentials, 60)
                assert credentials is not None
                secrets |= lines_of("process", credentials.private_key)
                said.append(repr((mesh, credentials, mesh._identity, mesh.telemetry)))
                login = await page.post("/v1/login", json={"token": TOKENS["olaf"]})
                secrets["cookie"], secrets["csrf"] = page.cookies[COOKIE], login.json()["csrf"]
                said.append(login.text.replace(secrets["csrf"], ""))
                proof = prove(workload(plane, REVIEWS), time.time())
                guest = jwt.encode({"alg": "RS256"}, {"iss": "nobody", "sub": "x"}, RSAKey.generate_key(2048))
                secrets |= {"proof": proof.rpartition(".")[2], "guest": guest.rpartition(".")[2]}
                for token in (proof, proof, guest, join, join, TOKENS["alice"][:-1], "x" * 20_000):
                    answer = await page.get("/v1/objects", headers={"authorization": f"Bearer {token}"})
                    said.append(answer.text)
                    said.append(await asyncio.to_thread(refused, plane, token))
                for text in (RULE + SERVICE, RULE.replace("hosts", "hots"), "{", f"token: {HEADER_SECRET}\x00"):
                    await alice.post("/v1/apply", content=text, headers=YAML)
                for step in ("begin", "switch", "finish"):
                    said.append((await alice.post(f"/v1/ca/rotate?step={step}&force=true", headers=YAML)).text)
                    secrets |= {f"{step} {name}": each for name, each in keys_of(plane).items()}
                async with client_of(plane, "alice") as again, client_of(plane, "vera") as vera:
                    answers = [await client.get(path) for client in (again, vera) for path in READS]
                    assert (await vera.get("/v1/services/default/reviews")).status_code == 200
                said += [each.text for each in answers]
                viewed = [each for each in answers if each.request.headers["authorization"].endswith(TOKENS["vera"])]
                assert not [each.url.path for each in viewed if HEADER_SECRET in each.text]
            finally:
                await asyncio.to_thread(mesh.close)
        said += map(repr, ours())
        said.append((tmp_path / "state" / "audit.jsonl").read_text())
        assert HEADER_SECRET not in said[-1]
    said.append(caplog.text)
    whole = "\n".join(said)
    assert len(whole) > 10_000
    assert [name for name, secret in secrets.items() if secret in whole] == []
    assert "PRIVATE KEY" not in whole
    kept = "".join(each.read_text() for each in (tmp_path / "cache").rglob("*") if each.is_file())
    assert [name for name, secret in secrets.items() if secret in kept] == []
    wide = [path for path in (tmp_path / "state").rglob("*") if stat.S_IMODE(path.stat().st_mode) & 0o077]
    assert wide == []


def lines_of(name: str, pem: bytes) -> dict[str, str]:
    """A key by the lines of its PEM, since any of them would be too much."""
    return {f"{name} {number}": line for number, line in enumerate(pem.decode().splitlines()[1:-1])}


def keys_of(plane: Any) -> dict[str, str]:
    state = plane.authority._state
    found: dict[str, str] = {}
    for number, each in enumerate((*state.signers, *([state.next] if state.next else []))):
        found |= lines_of(f"CA {number}", each.key)
    return found


def refused(plane: Any, token: str) -> str:
    """What xDS answers, as a caller's log would have it."""
    with grpc.secure_channel(plane.xds_address, grpc.ssl_channel_credentials(plane.roots.encode())) as channel:
        method: Any = channel.stream_stream(
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
        )
        try:
            next(method(iter([b""]), timeout=30, metadata=(("authorization", f"Bearer {token}"),)), None)
        except grpc.RpcError as error:
            return "".join(traceback.format_exception(error))
    return ""


def ours() -> list[object]:
    """Every living object of ours, which a debugger or an error's text might show."""
    found = []
    for each in gc.get_objects():
        module = getattr(type(each), "__module__", "")
        if isinstance(module, str) and module.startswith("meshlib.") and module != "meshlib.controlplane.admin_api":
            found.append(each)
    return found


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("kind: Secret\ndata: {tls.key: UzNDUkVU}\nstringData: {password: S3CRET}\n", "tls.key: '[redacted]'"),
        ("kind: Secret\nmetadata: {annotations: {kubectl.kubernetes.io/last-applied-configuration: S3CRET}}\n", "kind"),
        ("kind: VirtualService\nspec: {set: {Authorization: Bearer S3CRET, x-version: v1}}\n", "x-version: v1"),
        ("kind: VirtualService\nspec: {headers: {authorization: {exact: Bearer S3CRET}}}\n", "exact"),
        ("kind: EnvoyFilter\nspec: {value: {inline: '-----BEGIN PRIVATE KEY-----S3CRET'}}\n", "inline"),
        ('kind: RequestAuthentication\nspec: {jwks: \'{"keys": [{"kty": "RSA", "d": "S3CRET"}]}\'}\n', "jwks"),
        ("kind: VirtualService\nspec: [S3CRET", "[redacted]"),
    ],
)
def test_the_audit_log_leaves_secrets_out(text: str, left: str) -> None:
    """By kind, by the name of a header or field, and by what private keys look like; the rest stays."""
    found = redacted(text)
    assert "S3CRET" not in found
    assert "UzNDUkVU" not in found
    assert left in found


def test_what_holds_no_secret_is_as_it_was() -> None:
    """Byte for byte."""
    text = "kind: VirtualService\nspec:\n  hosts: [reviews]  # a comment\n"
    assert redacted(text) == text


def test_the_lock_is_its_owners_too(tmp_path: Path) -> None:
    """Whatever the umask."""
    from meshlib.controlplane.sources import ObjectStore

    before = os.umask(0)
    try:
        ObjectStore(tmp_path / "state").close()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").iterdir()}
    assert modes == {"lock": 0o600}


async def test_an_error_of_ours_says_nothing_of_it(tmp_path: Path) -> None:
    """500s have no traceback for the caller."""
    async with running(settings_of(tmp_path)) as plane, client_of(plane, "alice") as client:
        assert plane._store is not None
        plane._store.stored = None  # type: ignore[assignment]
        with pytest.raises(httpx.HTTPStatusError) as error:
            (await client.get("/v1/objects")).raise_for_status()
        assert error.value.response.status_code == 500
        assert "Traceback" not in error.value.response.text
