"""The mesh's mTLS on the wire: in Istio's forms, and nothing that asks for a check is passed over."""

from __future__ import annotations

from typing import Any

import pytest

from meshlib import model as md
from meshlib.errors import InvalidResource
from meshlib.xds import messages as m
from meshlib.xds.decode import decode_resource
from meshlib.xds.encode import encode_resource
from meshlib.xds.resource_types import CLUSTER, ENDPOINT

NAME = "outbound|80||reviews.default.svc.cluster.local"
IDENTITY = "spiffe://cluster.local/ns/default/sa/reviews"


def cluster(*, auto: bool = False, names: tuple[str, ...] = (IDENTITY,), http2: bool = False) -> md.Cluster:
    tls = md.UpstreamTls("ISTIO_MUTUAL", "outbound_.80_._.reviews.default.svc.cluster.local", names, auto=auto)
    return md.Cluster(NAME, tls=tls, http2=http2)


def message_of(value: md.Cluster) -> Any:
    return m.Cluster.FromString(encode_resource(CLUSTER, value))


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("names", [(), (IDENTITY,), (IDENTITY, "spiffe://cluster.local/ns/b/sa/c", "reviews.example")])
@pytest.mark.parametrize("http2", [False, True])
def test_what_is_sent_arrives(auto: bool, names: tuple[str, ...], http2: bool) -> None:
    """Mode, SNI, identities, and whether only those who serve it get it."""
    sent = cluster(auto=auto, names=names, http2=http2)
    assert decode_resource(CLUSTER, encode_resource(CLUSTER, sent)) == sent


@pytest.mark.parametrize("is_meshed", [False, True])
def test_an_endpoint_says_whether_it_serves_mtls(is_meshed: bool) -> None:
    """By the metadata that Envoy's matches look at."""
    sent = md.LoadAssignment(NAME, (md.Endpoint("10.0.0.1", 80, is_meshed=is_meshed),))
    data = encode_resource(ENDPOINT, sent)
    assert decode_resource(ENDPOINT, data) == sent
    metadata = m.ClusterLoadAssignment.FromString(data).endpoints[0].lb_endpoints[0].metadata.filter_metadata
    assert ("envoy.transport_socket_match" in metadata) is is_meshed


def test_the_forms_are_istios() -> None:
    """A sidecar takes the connection for the mesh's by these."""
    message = message_of(cluster(auto=True))
    (match,) = message.transport_socket_matches
    assert (match.name, dict(match.match.fields.items())["tlsMode"].string_value) == ("tlsMode-istio", "istio")
    assert not message.HasField("transport_socket")
    context = m.UpstreamTlsContext.FromString(match.transport_socket.typed_config.value)
    assert list(context.common_tls_context.alpn_protocols) == ["istio-http/1.1", "istio", "http/1.1"]
    assert context.common_tls_context.tls_certificate_sds_secret_configs[0].name == "default"


def _other_roots(context: Any) -> None:
    context.common_tls_context.combined_validation_context.validation_context_sds_secret_config.name = "mine"


def _no_roots(context: Any) -> None:
    context.common_tls_context.ClearField("combined_validation_context")


def _a_prefix(context: Any) -> None:
    validation = context.common_tls_context.combined_validation_context.default_validation_context
    validation.match_typed_subject_alt_names[0].matcher.prefix = "spiffe://"


def _another_certificate(context: Any) -> None:
    context.common_tls_context.tls_certificate_sds_secret_configs[0].name = "mine"


@pytest.mark.parametrize("change", [_other_roots, _no_roots, _a_prefix, _another_certificate])
def test_what_can_not_be_checked_is_refused(change: Any) -> None:
    """Whoever asks for other roots, another certificate or another comparison gets an error, not less security."""
    message = message_of(cluster())
    context = m.UpstreamTlsContext.FromString(message.transport_socket.typed_config.value)
    change(context)
    message.transport_socket.typed_config.CopyFrom(m.pack(context))
    with pytest.raises(InvalidResource):
        decode_resource(CLUSTER, m.serialize(message))


def test_a_match_of_something_else_is_refused() -> None:
    """Its endpoints would get plaintext where its author wanted TLS."""
    message = message_of(cluster(auto=True))
    message.transport_socket_matches[0].match.fields["zone"].string_value = "a"
    with pytest.raises(InvalidResource):
        decode_resource(CLUSTER, m.serialize(message))
