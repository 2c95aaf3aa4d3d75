"""Does Prometheus find the processes by the control plane, and istiod's figures in it?"""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from dashboard.pictured_town import Town
from discovery.feed import Feed, feed, node
from meshlib.controlplane import admin_api as api
from meshlib.controlplane.own_metrics import scraped_at, targets
from meshlib.mesh import Mesh
from meshlib.settings import Settings
from peers import unused_port
from telemetry.test_real_prometheus import PROMETHEUS, prometheus_of

SERVICE = """apiVersion: v1
kind: Service
metadata: {name: %s}
spec: {selector: {app: b}, ports: [{name: http, port: 80}]}
"""


@pytest.mark.processes
@pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed (Debian package prometheus)")
def test_prometheus_finds_processes_and_scrapes_the_control_plane(tmp_path: Path) -> None:
    """By HTTP service discovery, without a list of addresses; an edit shows as a push that all have accepted."""
    mesh_folder = tmp_path / "mesh"
    mesh_folder.mkdir()
    (mesh_folder / "b.yaml").write_text(SERVICE % "b")
    with Town(mesh_folder) as town:
        address = town.url.removeprefix("http://")
        (tmp_path / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s}\n"
            "scrape_configs:\n"
            f"- job_name: control-plane\n  static_configs: [{{targets: ['{address}']}}]\n"
            "- job_name: mesh\n  honor_labels: true\n"
            f"  http_sd_configs: [{{url: '{town.url}/sd/prometheus', refresh_interval: 1s}}]\n"
        )
        settings = Settings(
            control_plane=town.target, service="a", telemetry="off", prometheus=f"127.0.0.1:{unused_port()}"
        )
        with Mesh(settings) as process, prometheus_of(tmp_path) as asked:
            process.start()
            asked.until("pilot_xds", 1)
            asked.until('count(istio_build{component="proxy",workload="a",namespace="default"})', 1)
            assert asked.value("pilot_services") == 1
            process.resolve("b:80")
            asked.until('pilot_xds_pushes{type="eds"}', 1)
            before = asked.value("pilot_proxy_convergence_time_count")
            (mesh_folder / "c.yaml").write_text(
                "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: b}\n"
                "spec: {hosts: [b], http: [{timeout: 3s, route: [{destination: {host: b}}]}]}\n"
            )
            asked.until("pilot_virt_services", 1)
            asked.until("pilot_proxy_convergence_time_count > bool " + str(before), 1)
            assert 0 <= asked.value("pilot_proxy_convergence_time_sum") < 60
            assert asked.value("process_resident_memory_bytes") > 0


def test_what_is_refused_is_counted(tmp_path: Path) -> None:
    """By type; and the root certificate says until when it is good."""
    (tmp_path / "b.yaml").write_text(SERVICE % "b")

    def refuses(running: Feed) -> None:
        session = running.source._session
        decode = session._decode
        session._decode = lambda type_url, data: decode(type_url, b"\xff" if type_url.endswith("Cluster") else data)

    with Town(tmp_path) as town:
        running = feed(town.target, of=node())
        refuses(running)
        with running:
            running.source.want("b:80")
            while 'pilot_total_xds_rejects{type="cds"} 1.0' not in (
                told := httpx.get(f"{town.url}/metrics", trust_env=False, timeout=20).text
            ):
                assert "pilot_xds" in told
        assert "citadel_server_root_cert_expiry_timestamp" in told
        assert 'pilot_xds{version="' in told


def test_workers_that_share_a_port_are_one_target() -> None:
    """And who is not scraped is none."""
    clients = [
        api.Client("b-2.dev", "2", "dev", "b", metrics="10.0.0.2:15090"),
        api.Client("a-1.default", "1", "default", "a", metrics="10.0.0.1:15090"),
        api.Client("a-2.default", "1", "default", "a", metrics="10.0.0.1:15090"),
        api.Client("c-1.default", "3", "default", "c"),
    ]
    assert [each["targets"] for each in targets(clients)] == [["10.0.0.1:15090"], ["10.0.0.2:15090"]]
    assert targets(clients)[0]["labels"]["workload"] == "a"


@pytest.mark.parametrize(
    ("address", "port", "peer", "told"),
    [
        ("10.0.0.1", 15090, "ipv4:127.0.0.1:9", "10.0.0.1:15090"),
        ("", 15090, "ipv4:10.0.0.2:4711", "10.0.0.2:15090"),
        ("", 15090, "ipv6:%5B::1%5D:4711", "[::1]:15090"),
        ("", 15090, "unix:/run/mesh", ""),
        ("example.com", 15090, "ipv4:10.0.0.2:4711", ""),
        ("10.0.0.1", 0, "ipv4:10.0.0.2:4711", ""),
    ],
)
def test_only_addresses_are_targets(address: str, port: int, peer: str, told: str) -> None:
    """A name would be looked up by Prometheus, wherever that leads."""
    assert scraped_at(address, port, peer) == told
