"""Settings come from the environment, or from connect(); what can't be used is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import meshlib
from meshlib.errors import SettingsError
from meshlib.mesh import Mesh
from meshlib.model import Locality, NodeKind
from meshlib.settings import Settings


def test_every_setting_is_read_from_its_variable() -> None:
    """MESHLIB_<FIELD>, trimmed; what is not set has its default."""
    found = Settings.from_environment(
        {
            "MESHLIB_CONTROL_PLANE": " cp.example:15010 ",
            "MESHLIB_SERVICE": "reviews",
            "MESHLIB_NAMESPACE": "shop",
            "MESHLIB_LABELS": "version=v2, app=reviews",
            "MESHLIB_LOCALITY": "eu/eu-1",
            "MESHLIB_ADDRESS": "[::1]:9080",
            "MESHLIB_FORWARD_HEADERS": "End-User, tenant",
            "MESHLIB_RESOLVE_TIMEOUT": "0.5",
        }
    )
    assert found.control_plane == "cp.example:15010"
    assert found.labels == (("app", "reviews"), ("version", "v2"))
    assert found.locality == Locality("eu", "eu-1")
    assert found.forward_headers == ("end-user", "tenant")
    assert found.resolve_timeout == 0.5
    node = found.node()
    assert (node.workload.name, node.workload.address, node.workload.port) == ("reviews-v2", "::1", 9080)
    assert Settings.from_environment({}) == Settings()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("MESHLIB_LABELS", "app", "key=value"),
        ("MESHLIB_LOCALITY", "a/b/c/d", "region/zone/subzone"),
        ("MESHLIB_ADDRESS", "localhost", "host:port"),
        ("MESHLIB_ADDRESS", "localhost:99999", "host:port"),
        ("MESHLIB_DIALECT", "envoy", "there is istio"),
        ("MESHLIB_RESOLVE_TIMEOUT", "soon", "a number of seconds is wanted"),
    ],
)
def test_a_bad_value_is_refused_with_its_variable_and_reason(variable: str, value: str, reason: str) -> None:
    """Nothing falls back to a default in silence."""
    with pytest.raises(SettingsError, match=reason) as caught:
        Settings.from_environment({variable: value})
    assert variable in str(caught.value)


def test_connect_takes_overrides_and_refuses_unknown_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Over the environment; labels may be a mapping; nothing is started."""
    monkeypatch.setenv("MESHLIB_SERVICE", "from-environment")
    with meshlib.connect(tmp_path, namespace="shop", labels={"version": "v1"}) as mesh:
        assert mesh.settings.control_plane == os.fspath(tmp_path)
        assert (mesh.settings.service, mesh.settings.namespace) == ("from-environment", "shop")
        assert mesh.settings.labels == (("version", "v1"),)
    with pytest.raises(SettingsError, match="'namspace'"):
        meshlib.connect("cp:1", namspace="shop")


def test_the_dialect_of_an_istiod_is_for_services() -> None:
    """It has no word for a gateway, and none for telemetry, which is not pushed to it."""
    with pytest.raises(SettingsError, match="no listeners that a gateway"):
        Mesh(Settings("istiod:15012", dialect="istio"), kind=NodeKind.ROUTER)
    with pytest.raises(SettingsError, match="there is istio"):
        meshlib.connect("istiod:15012", dialect="envoy")
    assert not Settings("istiod:15012", dialect="istio").telemetry_setup().target


def test_a_control_plane_that_is_neither_folder_nor_address_is_refused_at_the_start() -> None:
    """With what it was."""
    with meshlib.connect("no-such-folder") as mesh, pytest.raises(SettingsError, match="'no-such-folder'"):
        mesh.start()


def test_node_ids_are_istios_and_name_one_process() -> None:
    """type~ip~instance.namespace~domain; two of one process differ."""
    settings = Settings(service="reviews", namespace="shop")
    kind, ip, instance, domain = settings.node(NodeKind.ROUTER).id.split("~")
    assert (kind, ip, domain) == ("router", "127.0.0.1", "shop.svc.cluster.local")
    assert instance.startswith("reviews-")
    assert instance.endswith(".shop")
    assert settings.node().id != settings.node().id


def test_others_are_told_an_ip_address() -> None:
    """`localhost` is looked up here; 0.0.0.0 is nobody's address."""
    node = Settings(address="localhost:9080").node()
    assert (node.workload.address, node.workload.port) == ("127.0.0.1", 9080)
    for address in ("0.0.0.0:9080", "[::]:9080", "no-such-host.invalid:9080"):
        with pytest.raises(SettingsError, match=address.rpartition(":")[0].strip("[]")):
            Settings(address=address).node()
