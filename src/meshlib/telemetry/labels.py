"""Which labels does a request count under? Istio's, exactly: no label is empty, `unknown`, `latest` and `-` stand in.

Kiali drops a series that lacks a label, and Prometheus takes an empty label for an absent one; only
grpc_response_status may be empty.

What a peer says of itself in a header (Istio's x-envoy-peer-metadata) names it in labels, and nowhere else: principals
come from certificates only, and a namespace that a certificate gives has the last word.
"""

from __future__ import annotations

import base64
import binascii
from functools import lru_cache
from typing import NamedTuple

from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct

from meshlib.model import PASSTHROUGH, Endpoint, HeaderView, Node, canonical_revision, canonical_service
from meshlib.policy.observer import Call, Served

METADATA = "x-envoy-peer-metadata"
METADATA_ID = "x-envoy-peer-metadata-id"
METADATA_GRPC = "x-meshlib-peer-metadata"
"""The same, in gRPC calls: gRPC's core keeps Istio's name to itself, and no server in Python sees it."""
UNKNOWN = "unknown"
_LONGEST_METADATA = 8192
_LONGEST_VALUE = 253


class Described(NamedTuple):
    """One end of a request, as labels say it."""

    workload: str = UNKNOWN
    namespace: str = UNKNOWN
    app: str = UNKNOWN
    version: str = UNKNOWN
    service: str = UNKNOWN
    revision: str = "latest"
    cluster: str = UNKNOWN


NOBODY = Described()


def described(node: Node) -> Described:
    """This process."""
    workload = node.workload
    labels = dict(workload.labels)
    return Described(
        workload.name or UNKNOWN,
        workload.namespace,
        labels.get("app") or UNKNOWN,
        labels.get("version") or UNKNOWN,
        canonical_service(labels, workload.name) or UNKNOWN,
        canonical_revision(labels),
        node.cluster_id or "Kubernetes",
    )


def names_of(node: Node) -> tuple[tuple[str, object], ...]:
    """Attributes of a span that say whose it is: Istio's (pilot/pkg/networking/core/tracing.go, buildServiceTags), and
    Envoy's node_id, by which Kiali finds the spans of a workload."""
    here = described(node)
    return (
        ("istio.canonical_revision", here.revision),
        ("istio.canonical_service", here.service),
        ("istio.cluster_id", here.cluster),
        ("istio.mesh_id", node.trust_domain),
        ("istio.namespace", here.namespace),
        ("node_id", node.id),
    )


def metadata_of(node: Node) -> str:
    """This process, as Istio's sidecars tell each other who they are: a base64 Struct."""
    told = Struct()
    workload = node.workload
    told.update(
        {
            "NAME": node.id.split("~")[2].rpartition(".")[0] if node.id.count("~") == 3 else workload.name,
            "NAMESPACE": workload.namespace,
            "WORKLOAD_NAME": workload.name,
            "CLUSTER_ID": node.cluster_id,
            "LABELS": dict(workload.labels),
        }
    )
    return base64.b64encode(told.SerializeToString(deterministic=True)).decode("ascii")


def metadata_in(headers: HeaderView) -> str | None:
    """As the peer has written it."""
    return headers.get(METADATA) or headers.get(METADATA_GRPC)


@lru_cache(maxsize=1024)
def read_metadata(value: str) -> Described:
    """What a peer says of itself; NOBODY for what can't be read. Never raises."""
    told = Struct()
    try:
        if len(value) > _LONGEST_METADATA:
            return NOBODY
        told.ParseFromString(base64.b64decode(value, validate=True))
    except (ValueError, binascii.Error, DecodeError):
        return NOBODY
    fields = told.fields
    labels = {name: each.string_value[:_LONGEST_VALUE] for name, each in fields["LABELS"].struct_value.fields.items()}
    workload = fields["WORKLOAD_NAME"].string_value[:_LONGEST_VALUE]
    return Described(
        workload or UNKNOWN,
        fields["NAMESPACE"].string_value[:_LONGEST_VALUE] or UNKNOWN,
        labels.get("app") or UNKNOWN,
        labels.get("version") or UNKNOWN,
        canonical_service(labels, workload) or UNKNOWN,
        canonical_revision(labels),
        fields["CLUSTER_ID"].string_value[:_LONGEST_VALUE] or UNKNOWN,
    )


def of_endpoint(endpoint: Endpoint) -> Described:
    if not endpoint.workload:
        return NOBODY
    # Istio's own control plane says four things behind the name, ours adds app and version.
    told = [*endpoint.peer.split(";"), "", "", "", "", "", ""][:6]
    namespace, service, revision, cluster, app, version = told
    return Described(
        endpoint.workload,
        namespace or UNKNOWN,
        app or service or UNKNOWN,
        version or revision or UNKNOWN,
        service or endpoint.workload,
        revision or "latest",
        cluster or "Kubernetes",
    )


def of_call(call: Call, here: Described, principal: str, strict: bool) -> tuple[str, ...]:
    """recorder.LABELS of an outbound call. strict: Istio's `unknown` for what its clients do not know."""
    cluster = None if call.cluster is None else call.cluster.cluster
    there = NOBODY if call.last is None else of_endpoint(call.last.endpoint)
    tls = None if cluster is None else cluster.tls
    is_mutual = tls is not None and tls.mode != "SIMPLE"
    theirs = tls.subject_alt_names[0] if tls is not None and is_mutual and len(tls.subject_alt_names) == 1 else ""
    host, name, namespace = _service(call)
    security = UNKNOWN if strict or call.last is None else "mutual_tls" if is_mutual else "none"
    return (
        "source",
        here.workload,
        here.service,
        here.revision,
        here.namespace,
        principal if is_mutual and principal else UNKNOWN,
        here.app,
        here.version,
        here.cluster,
        there.workload,
        there.namespace,
        theirs if theirs.startswith("spiffe://") else UNKNOWN,
        there.app,
        there.version,
        host,
        there.service,
        there.revision,
        name,
        namespace if namespace != UNKNOWN else there.namespace,
        there.cluster,
        protocol_of(call),
        str(call.status),
        call.grpc_status,
        call.flags or "-",
        security,
    )


def _service(call: Call) -> tuple[str, str, str]:
    """Host, short name and namespace of what was called. The Host header is no fallback: anyone can write anything
    there, and each would be a series of its own."""
    if call.cluster is None:
        return UNKNOWN, "BlackHoleCluster", UNKNOWN
    if call.cluster.name == PASSTHROUGH:
        return UNKNOWN, PASSTHROUGH, UNKNOWN
    service = call.cluster.cluster.service
    if service is None:
        return UNKNOWN, call.cluster.name, UNKNOWN
    return service.host, service.name or service.host.partition(".")[0], service.namespace or UNKNOWN


def protocol_of(call: Call) -> str:
    """`grpc` or `http`. A client of HTTP's may speak gRPC, too, whose requests are all POST."""
    request = call.request
    if call.is_grpc or (
        request is not None and request.method == "POST" and is_grpc(request.headers.get("content-type"))
    ):
        return "grpc"
    return "http"


def is_grpc(content_type: str | None) -> bool:
    return content_type is not None and content_type.startswith("application/grpc") and content_type[16:17] != "-"


def peer_of(served: Served) -> Described:
    """Who calls, as they say; the namespace as their certificate says."""
    metadata = metadata_in(served.headers)
    source = NOBODY if metadata is None else read_metadata(metadata)
    identity = served.peer.identity
    if identity is not None and identity.namespace:
        source = source._replace(namespace=identity.namespace)
    return source


def of_served(served: Served, here: Described, principal: str, service: tuple[str, str]) -> tuple[str, ...]:
    """recorder.LABELS of an inbound request. service: host and name of the one that this process serves."""
    source, identity = peer_of(served), served.peer.identity
    is_mutual = identity is not None and bool(principal)
    grpc = bool(served.grpc_status) or is_grpc(served.headers.get("content-type"))
    return (
        "destination",
        source.workload,
        source.service,
        source.revision,
        source.namespace,
        UNKNOWN if identity is None else identity.uri,
        source.app,
        source.version,
        source.cluster,
        here.workload,
        here.namespace,
        principal if is_mutual else UNKNOWN,
        here.app,
        here.version,
        service[0],
        here.service,
        here.revision,
        service[1],
        here.namespace,
        here.cluster,
        "grpc" if grpc else "http",
        str(served.status),
        served.grpc_status,
        served.flags or "-",
        "mutual_tls" if is_mutual else "none",
    )
