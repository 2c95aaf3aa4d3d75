"""Claims about a MeshConfig whose trustDomain is not the CA's: nobody could be called, and nobody would know why."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.controlplane.trust_domain import trust_domain_warnings
from meshlib.istio.parse import parse_text


def mesh_config(text: str) -> str:
    head = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\n"
    return f"{head}data: {{mesh: '{text}'}}\n"


@pytest.mark.parametrize(
    ("config", "domain", "is_told"),
    [
        ("trustDomain: old.example", "cluster.local", True),
        ("trustDomain: old.example", "old.example", False),
        ('{trustDomain: new.example, trustDomainAliases: ["old.example"]}', "old.example", False),
        ("{}", "cluster.local", False),
        ("{}", "old.example", True),
        ("", "old.example", True),
    ],
)
def test_it_is_told_where_callers_would_refuse_what_the_ca_signs(config: str, domain: str, is_told: bool) -> None:
    """An alias is taken as well; without a MeshConfig, cluster.local is."""
    objects = parse_text(mesh_config(config), "mesh.yaml").objects if config else ()
    assert bool([*trust_domain_warnings(objects, domain)]) is is_told


async def test_problems_and_log_name_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a person looks first."""
    (tmp_path / "mesh.yaml").write_text(mesh_config("trustDomain: old.example"))
    plane = ControlPlane(ControlPlaneSettings(folders=(tmp_path,), xds=("127.0.0.1", 0), admin=("127.0.0.1", 0)))
    await plane.start()
    try:
        async with httpx.AsyncClient(base_url=plane.admin_url, trust_env=False, timeout=20) as admin:
            (told,) = (await admin.get("/v1/problems")).json()["problems"]
    finally:
        await plane.stop()
    assert (told["field"], told["level"]) == ("data.mesh.trustDomain", "warning")
    assert told["reason"].startswith("is old.example, and the CA signs for cluster.local")
    assert "ConfigMap istio-system/istio: data.mesh.trustDomain: is old.example" in caplog.text
