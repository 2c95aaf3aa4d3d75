"""Claims about credentialName where the gateway asks Kubernetes for it: an API server on a socket, real handshakes."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trustme

from gateway.gateways import configured, gateway, hosts, listener, raw, secured
from kube.api_server import ApiServer
from meshlib.gateway import tls
from meshlib.gateway.server import Gateway
from meshlib.kube.settings import KubeSettings
from meshlib.model import DirectResponse
from snapshots import route

NAMESPACE = "istio-system"
DEADLINE = 30.0


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(autouse=True)
def _looked_at_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "RECHECK", 0.0)


def secret(name: str, authority: trustme.CA, namespace: str = NAMESPACE, **more: bytes) -> dict[str, Any]:
    issued = authority.issue_cert(f"{name}.example")
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    held = {"tls.crt": chain, "tls.key": issued.private_key_pem.bytes(), **more}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": {"name": name, "namespace": namespace},
        "data": {key: base64.b64encode(value).decode() for key, value in held.items()},
    }


@asynccontextmanager
async def serving(api: ApiServer, *names: str, mutual: str = "") -> AsyncIterator[Gateway]:
    chains = [
        secured(f"https.{name}", "", "", f"{name}.example", credential=name, mutual=name == mutual) for name in names
    ]
    said = [hosts(f"https.{each}", {"*": [route(DirectResponse(200, each.encode()))]}) for each in names]
    async with gateway(configured([listener(443, *chains)], said, {}), credentials=KubeSettings(api.url)) as made:
        yield made


async def serial(made: Gateway, name: str, trusting: ssl.SSLContext) -> str:
    """Of the certificate that is shown; "" where the handshake is refused."""
    try:
        async with raw(made, 443, trusting, f"{name}.example") as client:
            return str(client.writer.get_extra_info("peercert")["serialNumber"])
    except OSError:
        return ""


async def until(made: Gateway, name: str, trusting: ssl.SSLContext, wanted: Any) -> str:
    async with asyncio.timeout(DEADLINE):
        while not wanted(found := await serial(made, name, trusting)):  # noqa: ASYNC110 -- only a handshake can tell
            await asyncio.sleep(0.02)
    return found


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    authority.issue_cert("client").configure_cert(context)
    return context


async def test_a_secret_is_watched_by_its_name_and_renewed_live(
    any_api: ApiServer, authority: trustme.CA, trusting: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """One that becomes bad or is deleted keeps the last good one; nothing but the named is ever asked for."""
    async with any_api as api:
        api.put(secret("shop", authority))
        api.put(secret("other", authority))
        api.put(secret("foreign", authority, "elsewhere"))
        async with serving(api, "shop", "foreign") as made:
            first = await until(made, "shop", trusting, bool)
            assert await serial(made, "foreign", trusting) == ""
            api.put(secret("shop", authority))
            second = await until(made, "shop", trusting, lambda found: found not in ("", first))
            bad = secret("shop", authority)
            bad["data"]["tls.key"] = base64.b64encode(b"no key").decode()
            api.put(bad)
            await until(made, "shop", trusting, lambda _: "the one before stays in force" in caplog.text)
            assert await serial(made, "shop", trusting) == second
            api.remove("secrets", "shop", NAMESPACE)
            await until(made, "shop", trusting, lambda _: "stays in force: there is no such secret" in caplog.text)
            assert await serial(made, "shop", trusting) == second
            api.put(secret("shop", authority))
            await until(made, "shop", trusting, lambda found: found not in ("", second))
        asked = {path.split("?")[0] for _, path in api.requests}
        assert asked == {f"/api/v1/namespaces/{NAMESPACE}/secrets"}
        assert all("metadata.name%3Dshop" in path or "metadata.name%3Dforeign" in path for _, path in api.requests), (
            api.requests
        )


async def test_a_secret_that_comes_later_is_served(
    any_api: ApiServer, authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    """And one that may not be read yet; the doors of others are open meanwhile."""
    async with any_api as api:
        api.forbidden.add("secrets")
        async with serving(api, "shop") as made:
            async with asyncio.timeout(DEADLINE):
                await api.asked(1)
            assert await serial(made, "shop", trusting) == ""
            assert made.problems == ("https.shop: certificate secret shop can't be used",)
            api.forbidden.clear()
            api.put(secret("shop", authority))
            await until(made, "shop", trusting, bool)
            assert not made.problems


async def test_the_ca_may_stand_beside(any_api: ApiServer, authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    """In NAME-cacert, as with Istio: asked for only where clients are checked."""
    async with any_api as api:
        api.put(secret("partners", authority))
        beside = secret("partners-cacert", authority)
        beside["type"] = "Opaque"  # one of kubernetes.io/tls has a key
        beside["data"] = {"ca.crt": base64.b64encode(authority.cert_pem.bytes()).decode()}
        api.put(beside)
        async with serving(api, "partners", mutual="partners") as made:
            await until(made, "partners", trusting, bool)
            await api.stop()
            assert await serial(made, "partners", trusting)
