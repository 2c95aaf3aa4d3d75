"""What goes over the wire comes back as it was; what can't be understood is refused by name."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import values
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from hypothesis import given
from hypothesis import strategies as st

from meshlib.errors import InvalidResource
from meshlib.model import (
    Cluster,
    Cors,
    FilterChain,
    Listener,
    Locality,
    Node,
    NodeKind,
    Redirect,
    Route,
    RouteConfiguration,
    RouteMatch,
    StringMatch,
    VirtualHost,
    Workload,
)
from meshlib.xds import messages as m
from meshlib.xds.cors import CORS_FILTER
from meshlib.xds.decode import decode_node, decode_resource
from meshlib.xds.encode import encode_node, encode_resource
from meshlib.xds.reader import Dialect, Reader
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, PUSH_ORDER, ROUTE

KINDS = {
    LISTENER: values.listeners,
    ROUTE: values.route_configurations,
    CLUSTER: values.clusters(),
    ENDPOINT: values.assignments,
}


@pytest.mark.parametrize("type_url", PUSH_ORDER)
@given(data=st.data())
def test_every_value_of_the_model_survives_the_wire(type_url: str, data: st.DataObject) -> None:
    """decode(encode(x)) == x, and equal values have equal bytes."""
    value = data.draw(KINDS[type_url])
    encoded = encode_resource(type_url, value)
    assert decode_resource(type_url, encoded) == value
    assert encode_resource(type_url, decode_resource(type_url, encoded)) == encoded


@given(values.cors)
def test_an_envoy_is_told_of_other_origins_in_its_own_words(cors: Cors) -> None:
    """By its filter and what a route says to that; gRPC, which refuses a filter that it does not know, gets neither."""
    route = Route(RouteMatch(), Redirect(), cors=cors)
    routes = RouteConfiguration("r", (VirtualHost("h", ("h",), (route,)),))
    door = Listener("l", "", "127.0.0.1", 80, (FilterChain("r"),))
    for dialect in Dialect:
        reader = Reader(dialect)
        spoken = m.RouteConfiguration.FromString(encode_resource(ROUTE, routes, reader))
        given_words = spoken.virtual_hosts[0].routes[0].typed_per_filter_config
        assert (CORS_FILTER in given_words) is (dialect is Dialect.ENVOY)
        assert decode_resource(ROUTE, encode_resource(ROUTE, routes, reader)) == routes
        listener = encode_resource(LISTENER, door, reader)
        assert (CORS_FILTER.encode() in listener) is (dialect is Dialect.ENVOY)
        assert decode_resource(LISTENER, listener) == door


def test_another_control_planes_cors_is_understood_or_refused() -> None:
    """Switched off it is none; what is no number of seconds is refused by name."""
    message = m.RouteConfiguration(name="r")
    route = message.virtual_hosts.add(name="h", domains=["h"]).routes.add()
    route.match.prefix, route.direct_response.status = "/", 200
    policy = m.CorsPolicy(allow_methods="GET")
    policy.allow_origin_string_match.add(suffix=".com")
    policy.filter_enabled.default_value.numerator = 100

    def told() -> Cors | None:
        route.typed_per_filter_config[CORS_FILTER].CopyFrom(m.pack(policy))
        found = decode_resource(ROUTE, m.serialize(message))
        assert isinstance(found, RouteConfiguration)
        return found.virtual_hosts[0].routes[0].cors

    assert told() == Cors((StringMatch("suffix", ".com"),), "GET")
    policy.filter_enabled.default_value.numerator = 0
    assert told() is None
    policy.ClearField("filter_enabled")
    policy.max_age = "a day"
    with pytest.raises(InvalidResource, match="max_age"):
        told()


@pytest.mark.parametrize("type_url", PUSH_ORDER)
@given(data=st.data())
def test_any_bytes_are_understood_or_refused(type_url: str, data: st.DataObject) -> None:
    """No other exception leaves the decoder, whatever a peer sends: noise, and damaged resources."""
    good = encode_resource(type_url, data.draw(KINDS[type_url]))
    place = data.draw(st.integers(0, max(0, len(good) - 1)))
    damaged = good[:place] + data.draw(st.binary(max_size=3)) + good[place + data.draw(st.integers(0, 3)) :]
    for given_bytes in (data.draw(st.binary(max_size=60)), damaged):
        try:
            decode_resource(type_url, given_bytes)
        except InvalidResource as error:
            assert error.reason


@given(
    st.builds(
        Node,
        values.names,
        st.builds(
            Workload,
            values.names,
            values.names,
            values.names,
            values.names,
            st.dictionaries(values.names, values.texts).map(lambda found: tuple(sorted(found.items()))),
            st.sampled_from(["", "10.0.0.1"]),
            st.integers(0, 65535),
            st.just(()) | st.just((("grpc", 7070), ("http", 80))),
            values.localities,
        ),
        user_agent=st.just("meshlib/1.0"),
        trust_domain=values.names,
        cluster_id=values.names,
        ready=st.booleans(),
    )
)
def test_a_node_survives_the_wire(node: Node) -> None:
    """Who asks, and whether it serves."""
    message = m.Node.FromString(encode_node(node).SerializeToString())
    assert decode_node(message) == node


def test_an_envoy_that_says_little_is_taken_for_a_gateway() -> None:
    """An id of its own, user agent envoy; metadata where it has any."""
    message = m.Node(id="edge-1", user_agent_name="envoy")
    message.metadata.update({"NAMESPACE": "istio-system", "LABELS": {"istio": "ingressgateway"}})
    node = decode_node(message)
    assert (node.kind, node.workload.namespace, node.workload.labels) == (
        NodeKind.ROUTER,
        "istio-system",
        (("istio", "ingressgateway"),),
    )
    sidecar = decode_node(m.Node(id="sidecar~10.0.0.9~pod-1.shop~shop.svc.cluster.local"))
    assert (sidecar.kind, sidecar.workload.namespace, sidecar.workload.name) == (NodeKind.SIDECAR, "shop", "pod-1")
    with pytest.raises(InvalidResource, match="id"):
        decode_node(m.Node())


@pytest.mark.parametrize(
    "metadata",
    [
        {"MESHLIB_INBOUND": {"http": "127.0.0.1:80"}},
        {"MESHLIB_INBOUND": {"9080": "127.0.0.1"}},
        {"MESHLIB_INBOUND": {"9080": "shop:80"}},
        {"MESHLIB_OUTBOUND": "127.0.0.1:http"},
        {"MESHLIB_OUTBOUND": "15001"},
    ],
)
def test_an_envoy_says_where_it_listens_by_address_and_port(metadata: dict[str, Any]) -> None:
    """It is told to bind, or to call, just that: what is none is refused by name, and no defect of the server's."""
    message = m.Node(id="edge-1", user_agent_name="envoy")
    message.metadata.update(metadata)
    with pytest.raises(InvalidResource) as caught:
        decode_node(message)
    assert next(iter(metadata)) in caught.value.field
    message.metadata.update({"MESHLIB_INBOUND": {"9080": "127.0.0.1:80"}, "MESHLIB_OUTBOUND": "[::1]:15001"})
    assert (decode_node(message).inbound, decode_node(message).outbound) == (((9080, "127.0.0.1:80"),), "[::1]:15001")


def messages_of(descriptor: Any) -> list[Descriptor]:
    found = []
    for message in descriptor.message_types_by_name.values() if hasattr(descriptor, "message_types_by_name") else []:
        found += [message, *nested(message)]
    return found


def nested(message: Descriptor) -> list[Descriptor]:
    return [each for inner in message.nested_types for each in (inner, *nested(inner))]


def published_files() -> list[FileDescriptor]:
    """Of PUBLISHED and what those import. Not all of protobuf's pool: what is in that depends on who came before."""
    found: dict[str, FileDescriptor] = {}
    waiting = [import_module(each).DESCRIPTOR for each in PUBLISHED]
    while waiting:
        file = waiting.pop()
        if file.name not in found:
            found[file.name] = file
            waiting += file.dependencies
    return list(found.values())


def test_every_field_has_the_specifications_number_and_type() -> None:
    """Compared, field by field, with the protos that Envoy publishes."""
    published = {message.full_name: message for file in published_files() for message in messages_of(file)}
    compared = 0
    for file in m._SET.file:
        # Envoy publishes neither Istio's certificate service nor what is our own.
        if file.package == "google.protobuf" or file.package.startswith(("istio.", "meshlib.")):
            continue
        for message in messages_of(m._POOL.FindFileByName(file.name)):
            theirs = published[message.full_name]
            for field in message.fields:
                other = theirs.fields_by_name[field.name]
                assert (field.number, field.type, field.is_repeated) == (
                    other.number,
                    other.type,
                    other.is_repeated,
                ), field.full_name
                assert (field.containing_oneof is None) == (
                    other.containing_oneof is None or other.containing_oneof.name.startswith("_")
                ), field.full_name
                if field.type == FieldDescriptor.TYPE_ENUM:
                    for value in field.enum_type.values:
                        assert other.enum_type.values_by_name[value.name].number == value.number
                compared += 1
    assert compared > 200


PUBLISHED = [
    "envoy.service.auth.v3.external_auth_pb2",
    "envoy.service.status.v3.csds_pb2",
    "envoy.service.load_stats.v3.lrs_pb2",
    "envoy.service.ratelimit.v3.rls_pb2",
    "envoy.config.ratelimit.v3.rls_pb2",
    "envoy.extensions.filters.http.local_ratelimit.v3.local_rate_limit_pb2",
    "envoy.extensions.filters.http.ratelimit.v3.rate_limit_pb2",
    "envoy.extensions.common.ratelimit.v3.ratelimit_pb2",
    "envoy.service.discovery.v3.ads_pb2",
    "envoy.service.discovery.v3.discovery_pb2",
    "envoy.config.listener.v3.listener_pb2",
    "envoy.config.route.v3.route_pb2",
    "envoy.config.cluster.v3.cluster_pb2",
    "envoy.config.endpoint.v3.endpoint_pb2",
    "envoy.extensions.filters.network.http_connection_manager.v3.http_connection_manager_pb2",
    "envoy.extensions.filters.http.cors.v3.cors_pb2",
    "envoy.extensions.filters.http.fault.v3.fault_pb2",
    "envoy.extensions.filters.http.router.v3.router_pb2",
    "envoy.extensions.filters.listener.tls_inspector.v3.tls_inspector_pb2",
    "envoy.config.rbac.v3.rbac_pb2",
    "envoy.extensions.path.match.uri_template.v3.uri_template_match_pb2",
    "envoy.extensions.filters.http.rbac.v3.rbac_pb2",
    "envoy.extensions.filters.http.jwt_authn.v3.config_pb2",
    "envoy.extensions.filters.http.ext_authz.v3.ext_authz_pb2",
    "envoy.extensions.transport_sockets.tls.v3.tls_pb2",
    "envoy.extensions.upstreams.http.v3.http_protocol_options_pb2",
    "envoy.extensions.load_balancing_policies.least_request.v3.least_request_pb2",
    "envoy.extensions.load_balancing_policies.round_robin.v3.round_robin_pb2",
    "envoy.extensions.load_balancing_policies.random.v3.random_pb2",
    "envoy.extensions.load_balancing_policies.ring_hash.v3.ring_hash_pb2",
    "envoy.extensions.load_balancing_policies.maglev.v3.maglev_pb2",
    "envoy.extensions.load_balancing_policies.client_side_weighted_round_robin.v3.client_side_weighted_round_robin_pb2",
    "envoy.extensions.load_balancing_policies.wrr_locality.v3.wrr_locality_pb2",
    "envoy.extensions.retry.host.previous_hosts.v3.previous_hosts_pb2",
    "envoy.extensions.retry.priority.previous_priorities.v3.previous_priorities_config_pb2",
]


def test_the_shipped_descriptors_are_what_the_protos_compile_to(tmp_path: Path) -> None:
    """Whoever edits a .proto runs scripts/compile_protos.py."""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, root / "scripts" / "compile_protos.py", tmp_path], check=True)
    from google.protobuf import descriptor_pb2

    made = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "descriptors.binpb").read_bytes())
    shipped = {file.name: file for file in m._SET.file}
    assert {file.name for file in made.file} == set(shipped)
    for file in made.file:
        if not file.name.startswith("google/"):
            assert file == shipped[file.name]
    ratings = root / "examples" / "bookinfo" / "services" / "ratings.binpb"
    assert ratings.read_bytes() == (tmp_path / ratings.name).read_bytes()


OWN = "import meshlib.xds.decode, meshlib.xds.messages as m; m.Cluster(name='x')"
THEIRS = "from envoy.config.cluster.v3 import cluster_pb2; cluster_pb2.Cluster(name='x')"


@pytest.mark.parametrize("order", [(OWN, THEIRS), (THEIRS, OWN)], ids=["ours first", "theirs first"])
def test_other_envoy_protos_live_beside_ours_in_one_process(order: tuple[str, str]) -> None:
    """protobuf's default pool is not touched, whoever comes first."""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", ";".join(order)], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize(
    ("type_url", "message", "field"),
    [
        (LISTENER, m.Listener(name="l"), "api_listener"),
        (CLUSTER, m.Cluster(name="c", type=3), "eds_cluster_config.eds_config"),
        (CLUSTER, m.Cluster(), "name"),
        (ROUTE, m.RouteConfiguration(name="r", virtual_hosts=[{"name": "v"}]), "virtual_hosts[0].domains"),
        (
            ROUTE,
            m.RouteConfiguration(name="r", virtual_hosts=[{"domains": ["*"], "routes": [{"match": {"prefix": "/"}}]}]),
            "virtual_hosts[0].routes[0]",
        ),
        (
            ROUTE,
            m.RouteConfiguration(
                name="r",
                virtual_hosts=[
                    {
                        "domains": ["*"],
                        "routes": [{"match": {"safe_regex": {"regex": "("}}, "direct_response": {"status": 200}}],
                    }
                ],
            ),
            "virtual_hosts[0].routes[0].match.safe_regex.regex",
        ),
        (
            ENDPOINT,
            m.ClusterLoadAssignment(cluster_name="c", endpoints=[{"lb_endpoints": [{}]}]),
            "endpoints[0].lb_endpoints[0].endpoint.address",
        ),
    ],
)
def test_what_is_wrong_is_named(type_url: str, message: Any, field: str) -> None:
    """The NACK's text: type, name, field, reason."""
    with pytest.raises(InvalidResource) as caught:
        decode_resource(type_url, message.SerializeToString())
    assert caught.value.field == field


def test_defaults_of_other_control_planes_are_understood() -> None:
    """A cluster without thresholds has no limits; a route without a timeout has none (gRPC; Istio always says)."""
    cluster = m.Cluster(name="c", type=3)
    cluster.eds_cluster_config.eds_config.ads.SetInParent()
    decoded = decode_resource(CLUSTER, cluster.SerializeToString())
    assert isinstance(decoded, Cluster)
    assert decoded.limits.max_requests is None
    assert decoded.connect_timeout == 5.0
    assert isinstance(decode_resource(LISTENER, encode_resource(LISTENER, Listener("a:80", "r"))), Listener)
    assert Locality("a").zone == ""
