"""Envoy's messages, as far as meshlib speaks them, in a descriptor pool of their own.

The library does not depend on a package of Envoy's protos: those register in protobuf's one default pool, where two
copies of a file collide. Here the descriptor set compiled from protos/*.proto (our own text; names and numbers are the
specification's) is loaded in a private pool, so any other Envoy protos may live in the same process.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

_POOL = descriptor_pool.DescriptorPool()
# pkgutil, since importlib.resources loads zipfile and what that needs, at the start of every process.
_SET = descriptor_pb2.FileDescriptorSet.FromString(pkgutil.get_data(__name__, "descriptors.binpb") or b"")
for _file in _SET.file:
    _POOL.AddSerializedFile(_file.SerializeToString())

ADS_SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
ADS_STREAM = f"/{ADS_SERVICE}/StreamAggregatedResources"
ADS_DELTA = f"/{ADS_SERVICE}/DeltaAggregatedResources"

TTL_FEATURE = "xds.config.supports-resource-ttl"
"""By which a client says that it heeds Resource.ttl (Envoy's "client features")."""

CSDS_SERVICE = "envoy.service.status.v3.ClientStatusDiscoveryService"
LRS_SERVICE = "envoy.service.load_stats.v3.LoadReportingService"
LRS_STREAM = f"/{LRS_SERVICE}/StreamLoadStats"

CA_SERVICE = "istio.v1.auth.IstioCertificateService"
CREATE_CERTIFICATE = f"/{CA_SERVICE}/CreateCertificate"
SHOULD_RATE_LIMIT = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"
TRUST_SERVICE = "meshlib.identity.v1.TrustBundleService"
WATCH_TRUST = f"/{TRUST_SERVICE}/Watch"

AUTHORIZATION_CHECK = "/envoy.service.auth.v3.Authorization/Check"


def message_class(full_name: str) -> Any:
    """The class of a message. Raises KeyError for one that meshlib does not speak."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(full_name))


def enum_value(full_name: str, name: str) -> int:
    found: int = _POOL.FindEnumTypeByName(full_name).values_by_name[name].number
    return found


Any_ = message_class("google.protobuf.Any")
Struct = message_class("google.protobuf.Struct")
Duration = message_class("google.protobuf.Duration")
Status = message_class("google.rpc.Status")

_CORE = "envoy.config.core.v3."
Node = message_class(_CORE + "Node")

_DISCOVERY = "envoy.service.discovery.v3."
DiscoveryRequest = message_class(_DISCOVERY + "DiscoveryRequest")
DiscoveryResponse = message_class(_DISCOVERY + "DiscoveryResponse")
DeltaDiscoveryRequest = message_class(_DISCOVERY + "DeltaDiscoveryRequest")
DeltaDiscoveryResponse = message_class(_DISCOVERY + "DeltaDiscoveryResponse")
Resource = message_class(_DISCOVERY + "Resource")

Listener = message_class("envoy.config.listener.v3.Listener")
RouteConfiguration = message_class("envoy.config.route.v3.RouteConfiguration")
Cluster = message_class("envoy.config.cluster.v3.Cluster")
ClusterLoadAssignment = message_class("envoy.config.endpoint.v3.ClusterLoadAssignment")

HttpConnectionManager = message_class(
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
)
Router = message_class("envoy.extensions.filters.http.router.v3.Router")
TlsInspector = message_class("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector")
HTTPFault = message_class("envoy.extensions.filters.http.fault.v3.HTTPFault")
CorsFilter = message_class("envoy.extensions.filters.http.cors.v3.Cors")
CorsPolicy = message_class("envoy.extensions.filters.http.cors.v3.CorsPolicy")
Rbac = message_class("envoy.config.rbac.v3.RBAC")
UriTemplate = message_class("envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig")
RbacFilter = message_class("envoy.extensions.filters.http.rbac.v3.RBAC")
LocalRateLimit = message_class("envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit")
RateLimitFilter = message_class("envoy.extensions.filters.http.ratelimit.v3.RateLimit")
JwtAuthentication = message_class("envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication")
ExtAuthz = message_class("envoy.extensions.filters.http.ext_authz.v3.ExtAuthz")
Secret = message_class("envoy.extensions.transport_sockets.tls.v3.Secret")
UpstreamTlsContext = message_class("envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext")
DownstreamTlsContext = message_class("envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext")
HttpProtocolOptions = message_class("envoy.extensions.upstreams.http.v3.HttpProtocolOptions")
_BALANCING = "envoy.extensions.load_balancing_policies."
LeastRequest = message_class(_BALANCING + "least_request.v3.LeastRequest")
RoundRobin = message_class(_BALANCING + "round_robin.v3.RoundRobin")
RingHash = message_class(_BALANCING + "ring_hash.v3.RingHash")
Maglev = message_class(_BALANCING + "maglev.v3.Maglev")
ClientSideWeightedRoundRobin = message_class(
    _BALANCING + "client_side_weighted_round_robin.v3.ClientSideWeightedRoundRobin"
)
Random = message_class(_BALANCING + "random.v3.Random")
WrrLocality = message_class(_BALANCING + "wrr_locality.v3.WrrLocality")
PreviousHostsPredicate = message_class("envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate")
PreviousPrioritiesConfig = message_class(
    "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig"
)

RateLimitRequest = message_class("envoy.service.ratelimit.v3.RateLimitRequest")
RateLimitResponse = message_class("envoy.service.ratelimit.v3.RateLimitResponse")

CertificateRequest = message_class("istio.v1.auth.IstioCertificateRequest")
CertificateResponse = message_class("istio.v1.auth.IstioCertificateResponse")
TrustBundleRequest = message_class("meshlib.identity.v1.TrustBundleRequest")
TrustBundle = message_class("meshlib.identity.v1.TrustBundle")

CheckRequest = message_class("envoy.service.auth.v3.CheckRequest")
CheckResponse = message_class("envoy.service.auth.v3.CheckResponse")


ClientStatusRequest = message_class("envoy.service.status.v3.ClientStatusRequest")
ClientStatusResponse = message_class("envoy.service.status.v3.ClientStatusResponse")
ClientConfig = message_class("envoy.service.status.v3.ClientConfig")
GenericXdsConfig = message_class("envoy.service.status.v3.ClientConfig.GenericXdsConfig")
SYNCED, NOT_SENT, STALE, ERROR = (
    enum_value("envoy.service.status.v3.ConfigStatus", name) for name in ("SYNCED", "NOT_SENT", "STALE", "ERROR")
)
RESOURCE_REQUESTED, RESOURCE_DOES_NOT_EXIST, RESOURCE_ACKED, RESOURCE_NACKED = (
    enum_value("envoy.admin.v3.ClientResourceStatus", name)
    for name in ("REQUESTED", "DOES_NOT_EXIST", "ACKED", "NACKED")
)

LoadStatsRequest = message_class("envoy.service.load_stats.v3.LoadStatsRequest")
LoadStatsResponse = message_class("envoy.service.load_stats.v3.LoadStatsResponse")


def type_url(message: Message | type[Message]) -> str:
    return f"type.googleapis.com/{message.DESCRIPTOR.full_name}"


def pack(message: Any) -> Any:
    """An Any around `message`, with the same bytes for equal messages."""
    return Any_(type_url=type_url(message), value=serialize(message))


def pack_into(any_message: Any, message: Any) -> None:
    """The same in an Any that is there."""
    any_message.type_url, any_message.value = type_url(message), serialize(message)


def serialize(message: Any) -> bytes:
    """Bytes that are equal for equal messages (map entries in order)."""
    found: bytes = message.SerializeToString(deterministic=True)
    return found
