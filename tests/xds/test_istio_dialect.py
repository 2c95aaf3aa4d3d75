"""Does an istiod hear what it wants to hear, and is what it leaves unsaid understood?"""

from __future__ import annotations

from typing import Any

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_pb2
from envoy.extensions.filters.http.stateful_session.v3 import stateful_session_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2

from istiod import outbound_listener
from meshlib.model import Cluster, Listener, RouteConfiguration, ServiceName, UpstreamTls
from meshlib.settings import Settings
from meshlib.xds.decode import decode_resource
from meshlib.xds.istio import decode_istio_resource, encode_istio_node
from meshlib.xds.resource_types import CLUSTER, LISTENER, ROUTE

KEY = "outbound|9080|v1|reviews.shop.svc.cluster.local"


def test_the_node_is_what_istios_agent_writes_for_grpc() -> None:
    """By another reader of Envoy's messages: Istio's names and none of ours."""
    settings = Settings(
        dialect="istio", namespace="shop", service_account="reviews", labels=(("app", "reviews"),),
        address="10.0.0.7:9080", service="reviews",
    )  # fmt: skip
    node = base_pb2.Node.FromString(encode_istio_node(settings.node()).SerializeToString())
    kind, address, pod, domain = node.id.split("~")
    assert (kind, address, domain) == ("sidecar", "10.0.0.7", "shop.svc.cluster.local")
    told: dict[str, Any] = {name: node.metadata[name] for name in node.metadata}
    assert dict(told.pop("LABELS")) == {"app": "reviews"}
    assert told == {
        "GENERATOR": "grpc",
        "NAMESPACE": "shop",
        "SERVICE_ACCOUNT": "reviews",
        "WORKLOAD_NAME": "reviews",
        "CLUSTER_ID": "Kubernetes",
        "MESH_ID": "cluster.local",
        "INSTANCE_IPS": "10.0.0.7",
        "NAME": pod.removesuffix(".shop"),
    }


def cluster(**fields: Any) -> cluster_pb2.Cluster:
    message = cluster_pb2.Cluster(name=KEY, type=cluster_pb2.Cluster.EDS, **fields)
    message.eds_cluster_config.eds_config.ads.SetInParent()
    return message


def test_a_cluster_without_a_rule_gets_auto_mtls() -> None:
    """With the server name that Istio's clients ask for, and the service that its key names; other dialects don't."""
    data = cluster().SerializeToString()
    found = decode_istio_resource(CLUSTER, data)
    assert isinstance(found, Cluster)
    server_name = "outbound_.9080_.v1_.reviews.shop.svc.cluster.local"
    assert found.tls == UpstreamTls("ISTIO_MUTUAL", server_name, auto=True)
    assert found.service == ServiceName("reviews.shop.svc.cluster.local", "reviews", "shop")
    assert found.subset == "v1"
    plain = decode_resource(CLUSTER, data)
    assert isinstance(plain, Cluster)
    assert plain.tls is None


def test_domains_are_found_with_their_port_and_without() -> None:
    """Versions of Istio differ in which they write; none is there twice."""
    message = route_pb2.RouteConfiguration(name="outbound|9080||reviews.shop.svc.cluster.local")
    message.virtual_hosts.add(name="a", domains=["reviews", "reviews:9080", "reviews.shop", "*.reviews"])
    found = decode_istio_resource(ROUTE, message.SerializeToString())
    assert isinstance(found, RouteConfiguration)
    assert found.virtual_hosts[0].domains == (
        "reviews", "reviews:9080", "reviews.shop", "*.reviews", "reviews.shop:9080",
    )  # fmt: skip


def test_a_sticky_service_is_called_without_sticking() -> None:
    """Its filter chooses among endpoints, and turns nobody away."""
    message = outbound_listener("reviews:9080", "routes")
    manager = http_connection_manager_pb2.HttpConnectionManager()
    message.api_listener.api_listener.Unpack(manager)
    manager.http_filters.add(name="sticky").typed_config.Pack(stateful_session_pb2.StatefulSession())
    message.api_listener.api_listener.Pack(manager)
    assert decode_resource(LISTENER, message.SerializeToString()) == Listener("reviews:9080", "routes")
