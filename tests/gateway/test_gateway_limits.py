"""Limits at the doors of a gateway, from a folder of YAML: its own, and those that a service of the mesh counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from gateways import url

from meshlib.gateway.server import Gateway
from meshlib.mesh import Mesh
from meshlib.model import NodeKind
from meshlib.policy.live import Live
from meshlib.settings import Settings
from peers import Peer
from quota.quota_servers import rate_limit_server

DOOR = """
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: door, namespace: shop}}
spec:
  selector: {{istio: ingressgateway}}
  servers: [{{port: {{number: 8080, name: http, protocol: HTTP}}, hosts: ["*"]}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: shop, namespace: shop}}
spec:
  hosts: ["*"]
  gateways: [door]
  http: [{{route: [{{destination: {{host: catalogue.shop.svc.cluster.local, port: {{number: 8000}}}}}}]}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: catalogue, namespace: shop}}
spec:
  hosts: [catalogue.shop.svc.cluster.local]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{{number: 8000, name: http, protocol: HTTP, targetPort: {port}}}]
  endpoints: [{{address: 127.0.0.1}}]
"""
COUNTS = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: ratelimit, namespace: shop}}
spec:
  hosts: [ratelimit.shop.svc.cluster.local]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{{number: 8081, name: grpc, protocol: GRPC, targetPort: {port}}}]
  endpoints: [{{address: 127.0.0.1}}]
"""
LIMITED = """
apiVersion: meshlib.io/v1alpha1
kind: RateLimit
metadata: {name: door, namespace: istio-system}
spec:
  selector: {matchLabels: {istio: ingressgateway}}
  quotas:
  - service: ratelimit.shop.svc.cluster.local:8081
    domain: shop
    descriptors: [[{key: PATH, from: "header::path"}]]
    timeout: 10s
    failureModeDeny: true
    answers: true
"""


@asynccontextmanager
async def running(folder: Path, *texts: str) -> AsyncIterator[Gateway]:
    for number, text in enumerate(texts):
        (folder / f"{number}.yaml").write_text(text)
    settings = Settings(
        control_plane=str(folder),
        namespace="istio-system",
        workload="istio-ingressgateway",
        labels=(("istio", "ingressgateway"),),
    )
    with Mesh(settings, kind=NodeKind.ROUTER) as mesh:
        async with Gateway(mesh, ports={8080: 0}) as made:
            async with asyncio.timeout(20):
                while not made.addresses:  # noqa: ASYNC110 -- the feed is a thread
                    await asyncio.sleep(0.01)
            yield made


async def test_a_service_of_the_mesh_counts_for_a_gateway(tmp_path: Path) -> None:
    """Found by its name in the mesh, which DNS does not know; whom it turns away is not sent on."""
    with rate_limit_server({"shop": {"PATH_/limited": 1}}) as counting, Peer() as peer:
        door, counts = DOOR.format(port=peer.port), COUNTS.format(port=counting.rpartition(":")[2])
        async with running(tmp_path, door, counts, LIMITED) as made, httpx.AsyncClient(timeout=30) as client:
            answers = [await client.get(url(made, path)) for path in ("/limited", "/free", "/limited", "/limited?x")]
        assert [each.status_code for each in answers] == [200, 200, 429, 200]
        assert (answers[0].headers["x-ratelimit-remaining"], answers[2].headers["retry-after"]) == ("0", "1234")
        assert answers[2].headers["x-envoy-ratelimited"] == "true"
        assert [each.target for each in peer.received] == ["/limited", "/free", "/limited?x"]


async def test_a_gateway_without_an_answer_denies_where_it_is_told_to(tmp_path: Path) -> None:
    """500, as Envoy with failure_mode_deny."""
    with Peer() as peer:
        door, limited = DOOR.format(port=peer.port), LIMITED.replace("10s", "500ms")
        async with running(tmp_path, door, COUNTS.format(port=1), limited) as made, httpx.AsyncClient() as client:
            assert (await client.get(url(made), timeout=30)).status_code == 500
        assert peer.received == []


FILTERS = """
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: filter-ratelimit, namespace: istio-system}
spec:
  workloadSelector: {labels: {istio: ingressgateway}}
  configPatches:
  - applyTo: HTTP_FILTER
    match:
      context: GATEWAY
      listener:
        filterChain:
          filter:
            name: envoy.filters.network.http_connection_manager
            subFilter: {name: envoy.filters.http.router}
    patch:
      operation: INSERT_BEFORE
      value:
        name: envoy.filters.http.ratelimit
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.http.ratelimit.v3.RateLimit
          domain: shop
          failure_mode_deny: true
          timeout: 10s
          rate_limit_service:
            grpc_service:
              envoy_grpc:
                cluster_name: outbound|8081||ratelimit.shop.svc.cluster.local
                authority: ratelimit.shop.svc.cluster.local
            transport_api_version: V3
---
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: filter-ratelimit-svc, namespace: istio-system}
spec:
  workloadSelector: {labels: {istio: ingressgateway}}
  configPatches:
  - applyTo: VIRTUAL_HOST
    match:
      context: GATEWAY
      routeConfiguration: {vhost: {name: "", route: {action: ANY}}}
    patch:
      operation: MERGE
      value:
        rate_limits:
        - actions: [{request_headers: {header_name: ":path", descriptor_key: PATH}}]
"""


async def test_istios_global_rate_limit_sample_holds_at_a_gateway(tmp_path: Path) -> None:
    """As it stands in Istio's task: two EnvoyFilters, and nothing of ours."""
    with rate_limit_server({"shop": {"PATH_/productpage": 1}}) as counting, Peer() as peer:
        door, counts = DOOR.format(port=peer.port), COUNTS.format(port=counting.rpartition(":")[2])
        async with running(tmp_path, door, counts, FILTERS) as made, httpx.AsyncClient(timeout=30) as client:
            answers = [await client.get(url(made, path)) for path in ("/productpage", "/other", "/productpage")]
        assert [each.status_code for each in answers] == [200, 200, 429]
        assert answers[2].headers["x-envoy-ratelimited"] == "true"


LOCAL = """
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: local, namespace: istio-system}
spec:
  workloadSelector: {labels: {istio: ingressgateway}}
  configPatches:
  - applyTo: HTTP_FILTER
    match: {context: GATEWAY}
    patch:
      operation: INSERT_BEFORE
      value:
        name: envoy.filters.http.local_ratelimit
        typed_config:
          "@type": type.googleapis.com/udpa.type.v1.TypedStruct
          type_url: type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit
          value:
            stat_prefix: http_local_rate_limiter
            token_bucket: {max_tokens: 2, tokens_per_fill: 2, fill_interval: 3600s}
            filter_enabled: {default_value: {numerator: 100, denominator: HUNDRED}}
            filter_enforced: {default_value: {numerator: 100, denominator: HUNDRED}}
            response_headers_to_add: [{append: false, header: {key: x-local-rate-limit, value: "true"}}]
"""


async def test_istios_local_rate_limit_holds_at_a_gateway_and_survives_another_file(tmp_path: Path) -> None:
    """The bucket is the limit's, not the file's: what was taken stays taken when the file gets another name."""
    with Peer() as peer:
        async with running(tmp_path, DOOR.format(port=peer.port), LOCAL) as made, httpx.AsyncClient() as client:
            assert [(await client.get(url(made))).status_code for _ in range(2)] == [200, 200]
            before = made.mesh.live
            (tmp_path / "moved.yaml").write_text(LOCAL)
            (tmp_path / "1.yaml").unlink()
            async with asyncio.timeout(20):
                while not (origin := _origin(made, before)).endswith("(moved.yaml) configPatches[0]"):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            refused = await client.get(url(made))
        assert (refused.status_code, refused.headers["x-local-rate-limit"]) == (429, "true"), origin


def _origin(made: Gateway, before: Live) -> str:
    (limiter,) = made.mesh.live.guard.limiters
    return limiter.uses()[0].limit.origin if made.mesh.live is not before else ""
