"""Does the control plane say of a policy that it is in force for nobody? Nothing fails by it, and all stays open."""

from __future__ import annotations

from pathlib import Path

import httpx

from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings

POLICY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: %s, namespace: %s}
spec: {selector: {matchLabels: {app: %s}}, action: DENY, rules: [{}]}
"""
POD = """
apiVersion: v1
kind: Pod
metadata: {name: reviews-1, namespace: shop, labels: {app: reviews}}
status: {podIP: 192.0.2.1}
"""


async def test_a_policy_that_selects_nobody_is_a_warning(tmp_path: Path) -> None:
    """One that fits is none, nor one of a namespace in which nobody is known yet."""
    policies = (
        POLICY % each for each in (("typo", "shop", "review"), ("good", "shop", "reviews"), ("early", "x", "y"))
    )
    (tmp_path / "mesh.yaml").write_text("---".join((POD, *policies)))
    plane = ControlPlane(ControlPlaneSettings(folders=(tmp_path,), xds=("127.0.0.1", 0), admin=("127.0.0.1", 0)))
    await plane.start()
    try:
        async with httpx.AsyncClient(base_url=plane.admin_url, trust_env=False, timeout=20) as admin:
            (told,) = (await admin.get("/v1/problems")).json()["problems"]
    finally:
        await plane.stop()
    assert (told["object"], told["field"], told["level"]) == (
        "AuthorizationPolicy shop/typo",
        "spec.selector",
        "warning",
    )
    assert "app=review" in told["reason"]
