"""Do a stock gRPC server and its stock clients get the mesh's security from the control plane? mTLS and RBAC, from
Istio's YAML and `meshctl bootstrap` alone; C-core is the judge of what it is sent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from stock_grpc import Village

from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: {mode: STRICT}}
---
"""
FRIEND_MAY_SAY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: echo, namespace: default}
spec:
  selector: {matchLabels: {app: echo}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/default/sa/friend]}}]
    to: [{operation: {paths: [/echo.Echo/Say]}}]
"""
FRIEND = "spiffe://cluster.local/ns/default/sa/friend"


@pytest.fixture
async def village(tmp_path: Path) -> AsyncIterator[Village]:
    plane = ControlPlane(ControlPlaneSettings(xds=("127.0.0.1", 0), admin=("127.0.0.1", 0)))
    await plane.start()
    async with AsyncExitStack() as stack:
        yield Village(plane, tmp_path, stack)
    await plane.stop()


async def test_a_stock_server_serves_mtls_and_obeys_an_authorization_policy(village: Village) -> None:
    """Who may call what, who must prove it, and a policy that changes while they talk; nothing is refused."""
    await village.admin.apply(STRICT + FRIEND_MAY_SAY)
    await village.server()
    friend = await village.client("friend")
    assert await friend.call() == FRIEND
    assert (await friend.call("/echo.Echo/Other")).startswith("PERMISSION_DENIED")
    foe = await village.client("foe")
    assert (await foe.call()).startswith("PERMISSION_DENIED")
    nobody = await village.client("nobody", certificates=False)
    assert (await nobody.call()).startswith("UNAVAILABLE")
    await village.admin.assert_accepted()
    await village.admin.apply(FRIEND_MAY_SAY.replace("sa/friend", "sa/foe"))
    await foe.until("spiffe://cluster.local/ns/default/sa/foe")
    await friend.until("PERMISSION_DENIED")
    await village.admin.assert_accepted()


async def test_strict_without_a_certificate_denies_every_call(village: Village) -> None:
    """xDS credentials fall back to plaintext where they are sent no TLS: then the server has to turn away by itself."""
    await village.server(certificates=False)
    nobody = await village.client("nobody", certificates=False)
    assert await nobody.call() == "nobody"  # PERMISSIVE, the default
    await village.admin.apply(STRICT)
    await nobody.until("PERMISSION_DENIED")
    await village.admin.assert_accepted()


async def test_what_grpc_can_not_judge_is_denied(village: Village) -> None:
    """Tokens, external authorizers: Istio's own output for gRPC would let these pass."""
    await village.server()
    friend = await village.client("friend")
    assert await friend.call() == FRIEND
    policy = FRIEND_MAY_SAY.partition("spec:")[0] + "spec:\n  selector: {matchLabels: {app: echo}}\n  "
    await village.admin.apply(policy + "action: DENY\n  rules: [{from: [{source: {requestPrincipals: ['*']}}]}]")
    await friend.until("PERMISSION_DENIED")
    await village.admin.apply(policy + "rules: [{to: [{operation: {methods: [POST]}}]}]")
    await friend.until(FRIEND)
    await village.admin.apply(policy + "action: CUSTOM\n  provider: {name: opa}\n  rules: [{}]")
    await friend.until("PERMISSION_DENIED")
    await village.admin.apply(policy + "rules: []")  # allows nobody
    await friend.until("PERMISSION_DENIED")
    await village.admin.assert_accepted()


async def test_a_demand_for_mtls_is_not_met_with_plaintext(village: Village) -> None:
    """A client without a certificate has no cluster to call; one with some calls the endpoint that its rule names."""
    await village.server()
    port = village.address.rpartition(":")[2]
    await village.admin.apply(
        f"""
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: echo, namespace: default}}
spec:
  host: echo
  trafficPolicy:
    portLevelSettings:
    - {{port: {{number: {port}}}, tls: {{mode: ISTIO_MUTUAL, subjectAltNames: ["spiffe://cluster.local/ns/x/sa/y"]}}}}
"""
    )
    friend, nobody = await village.client("friend"), await village.client("nobody", certificates=False)
    assert (await friend.call()).startswith("UNAVAILABLE")  # the server is somebody else
    assert (await nobody.call()).startswith("UNAVAILABLE")
    await village.admin.assert_accepted()
