"""An istiod as a proxyless client meets it: TLS, tokens of service accounts, the certificate service, and ADS with what
its generator for gRPC writes (pilot/pkg/networking/grpcgen). A stand-in that starts in no time; e2e/test_real_istiod.py
holds the same with the real one.

Its messages are those of xds-protos, not meshlib's own.
"""

from __future__ import annotations

import datetime
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Self

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as form
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.config.rbac.v3 import rbac_pb2
from envoy.config.route.v3 import route_pb2
from envoy.extensions.filters.http.fault.v3 import fault_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as rbac_filter_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from envoy.extensions.transport_sockets.tls.v3 import tls_pb2
from envoy.service.discovery.v3 import discovery_pb2
from joserfc import jwt
from joserfc.jwk import OctKey

from certificates import TestCA, now
from meshlib.model import SpiffeId
from meshlib.xds import messages as m
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE

INBOUND = "xds.istio.io/grpc/lds/inbound/"
AUDIENCE = "istio-ca"
DOMAIN = "svc.cluster.local"
_PUSH_ORDER = (CLUSTER, ENDPOINT, LISTENER, ROUTE)
Policies = Mapping[str, rbac_pb2.Policy]


@dataclass
class Service:
    """endpoints: (address, port) pairs. takes_mtls: of the pods' label security.istio.io/tlsMode. istio_mutual: what a
    DestinationRule says; sans: the service accounts behind it."""

    name: str
    namespace: str = "default"
    port: int = 9080
    endpoints: list[tuple[str, int]] = field(default_factory=list)
    takes_mtls: bool = False
    istio_mutual: bool = False
    sans: Sequence[str] = ()

    @property
    def host(self) -> str:
        return f"{self.name}.{self.namespace}.{DOMAIN}"


@dataclass
class Rules:
    """Of the workload that serves at one address. raw: a listener in the place of what would be written."""

    strict: bool = True
    deny: Policies = field(default_factory=dict)
    allow: Policies = field(default_factory=dict)
    raw: Any = None


@dataclass
class _Stream:
    node: Any
    responses: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    names: dict[str, list[str]] = field(default_factory=dict)
    nonces: dict[str, str] = field(default_factory=dict)


class Istiod:
    """The server. `services` and `rules` (by `address:port`) are what it knows; `push` sends them to everybody."""

    def __init__(self) -> None:
        self.ca = TestCA()
        self.key = OctKey.generate_key(256)
        self.services: list[Service] = []
        self.rules: dict[str, Rules] = {}
        self.nodes: list[Any] = []
        self.nacks: SimpleQueue[Any] = SimpleQueue()
        self.tokens: list[tuple[str, str]] = []
        """(method, token) of every call that was let in."""
        self._streams: list[_Stream] = []
        self._lock = threading.Lock()
        self._serial = 0
        self._nonces = itertools.count(1)
        self._server: Any = None
        self.port = 0

    @property
    def target(self) -> str:
        return f"localhost:{self.port}"

    def token(self, namespace: str, account: str, audience: str = AUDIENCE, number: int = 1) -> str:
        """As a projected service account token is."""
        claims = {"aud": [audience], "sub": f"system:serviceaccount:{namespace}:{account}", "jti": str(number)}
        return str(jwt.encode({"alg": "HS256"}, claims, self.key))

    def push(self) -> None:
        with self._lock:
            self._serial += 1
            for stream in self._streams:
                for type_url in _PUSH_ORDER:
                    if stream.names.get(type_url):
                        self._answer(stream, type_url)

    def drop_streams(self) -> None:
        """As its maximum age ends a connection."""
        for stream in list(self._streams):
            stream.responses.put(None)

    def __enter__(self) -> Self:
        chain, key = self.ca.issue(dns=("istiod.istio-system.svc", "localhost"))
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        ads = {
            "StreamAggregatedResources": grpc.stream_stream_rpc_method_handler(
                self._ads, discovery_pb2.DiscoveryRequest.FromString, lambda message: message.SerializeToString()
            )
        }
        authority = {
            "CreateCertificate": grpc.unary_unary_rpc_method_handler(
                self._sign, m.CertificateRequest.FromString, lambda message: message.SerializeToString()
            )
        }
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(m.ADS_SERVICE, ads),
                grpc.method_handlers_generic_handler(m.CA_SERVICE, authority),
            )
        )
        credentials = grpc.ssl_server_credentials([(key, chain + self.ca.root)])
        self.port = self._server.add_secure_port("localhost:0", credentials)
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.drop_streams()
        self._server.stop(0).wait()

    # Who calls

    def _caller(self, method: str, context: Any) -> SpiffeId:
        told = dict(context.invocation_metadata())
        token = told.get("authorization", "").removeprefix("Bearer ")
        if told.get("clusterid") != "Kubernetes":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such cluster")
        try:
            claims = jwt.decode(token, self.key).claims
        except Exception:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token of a service account")
        if AUDIENCE not in claims["aud"]:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "a token for someone else")
        self.tokens.append((method, token))
        _, _, namespace, account = claims["sub"].split(":")
        return SpiffeId.of("cluster.local", namespace, account)

    def _sign(self, request: Any, context: Any) -> Any:
        identity = self._caller("CreateCertificate", context)
        csr = x509.load_pem_x509_csr(request.csr.encode())
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.ca.name)
            .public_key(csr.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() - datetime.timedelta(minutes=2))
            .not_valid_after(now() + datetime.timedelta(hours=24))
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)]), True)
            .sign(self.ca.key, hashes.SHA256())
        )
        return m.CertificateResponse(cert_chain=[leaf.public_bytes(form.Encoding.PEM).decode(), self.ca.root.decode()])

    # What it says

    def _ads(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        identity = self._caller("StreamAggregatedResources", context)
        first = next(requests)
        metadata = first.node.metadata
        if metadata["NAMESPACE"] != identity.namespace or metadata["SERVICE_ACCOUNT"] != identity.service_account:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "the node is not the caller's")
        assert metadata["GENERATOR"] == "grpc"
        stream = _Stream(first.node)
        self.nodes.append(first.node)
        with self._lock:
            self._streams.append(stream)
            self._heard(stream, first)
        threading.Thread(target=self._listen, args=(stream, requests), daemon=True).start()
        context.add_callback(lambda: stream.responses.put(None))
        try:
            while (response := stream.responses.get()) is not None:
                yield response
        finally:
            with self._lock:
                self._streams.remove(stream)

    def _listen(self, stream: _Stream, requests: Iterator[Any]) -> None:
        try:
            for request in requests:
                with self._lock:
                    self._heard(stream, request)
        except Exception:  # grpcio raises a bare Exception when the client has gone
            pass

    def _heard(self, stream: _Stream, request: Any) -> None:
        """As pilot/pkg/xds answers: a NACK and a stale nonce are no requests, and an ACK with nothing new is none."""
        kind, names = request.type_url, list(request.resource_names)
        if request.HasField("error_detail"):
            self.nacks.put(request)
            return
        if request.response_nonce and request.response_nonce != stream.nonces.get(kind):
            return
        added = set(names) - set(stream.names.get(kind, ()))
        stream.names[kind] = names
        if added or (not request.response_nonce and names):
            self._answer(stream, kind)

    def _answer(self, stream: _Stream, kind: str) -> None:
        nonce = f"{kind.rpartition('.')[2]}-{next(self._nonces)}"
        stream.nonces[kind] = nonce
        response = discovery_pb2.DiscoveryResponse(type_url=kind, nonce=nonce, version_info=str(self._serial))
        write = {LISTENER: self._listener, ROUTE: self._routes, CLUSTER: self._cluster, ENDPOINT: self._endpoints}[kind]
        for name in stream.names[kind]:
            message = write(name, stream.node)
            if message is not None:
                response.resources.add().Pack(message)
        stream.responses.put(response)

    def _of_key(self, name: str) -> Service | None:
        host = name.rpartition("|")[2]
        return next((each for each in self.services if each.host == host), None)

    def _listener(self, name: str, node: Any) -> Any:
        if name.startswith(INBOUND):
            rules = self.rules.get(name.removeprefix(INBOUND))
            return rules and (rules.raw or inbound_listener(name, rules))
        host, _, port = name.rpartition(":")
        of_node = f"{host}.{node.id.split('~')[3]}"
        for each in self.services:
            if each.host in (host, of_node, f"{host}.{DOMAIN}") and str(each.port) == port:
                return outbound_listener(name, f"outbound|{port}||{each.host}")
        return None

    def _routes(self, name: str, _: Any) -> Any:
        service = self._of_key(name)
        if service is None:
            return None
        message = route_pb2.RouteConfiguration(name=name)
        domains = [service.host, service.name, f"{service.name}.{service.namespace}"]
        host = message.virtual_hosts.add(name=f"{service.host}:{service.port}", domains=domains)
        route = host.routes.add(name="default")
        route.match.prefix = "/"
        route.decorator.operation = f"{service.host}:{service.port}/*"
        route.route.cluster = name
        route.route.max_stream_duration.max_stream_duration.seconds = 0
        retry = route.route.retry_policy
        retry.retry_on = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes"
        retry.num_retries.value, retry.host_selection_retry_max_attempts = 2, 5
        retry.retry_host_predicate.add(name="envoy.retry_host_predicates.previous_hosts")
        retry.retriable_status_codes.append(503)
        return message

    def _cluster(self, name: str, _: Any) -> Any:
        service = self._of_key(name)
        if service is None:
            return None
        message = cluster_pb2.Cluster(name=name, type=cluster_pb2.Cluster.EDS)
        message.eds_cluster_config.service_name = name
        message.eds_cluster_config.eds_config.ads.SetInParent()
        if service.istio_mutual:
            context = tls_pb2.UpstreamTlsContext()
            _write_tls(context.common_tls_context, service.sans)
            message.transport_socket.name = "envoy.transport_sockets.tls"
            message.transport_socket.typed_config.Pack(context)
        return message

    def _endpoints(self, name: str, _: Any) -> Any:
        service = self._of_key(name)
        if service is None:
            return None
        message = endpoint_pb2.ClusterLoadAssignment(cluster_name=name)
        group = message.endpoints.add()
        group.locality.region = "here"
        group.load_balancing_weight.value = len(service.endpoints)
        for address, port in service.endpoints:
            each = group.lb_endpoints.add(health_status=1)
            each.load_balancing_weight.value = 1
            each.endpoint.address.socket_address.address = address
            each.endpoint.address.socket_address.port_value = port
            noted = each.metadata.filter_metadata
            noted["istio"].update({"workload": f"{service.name}-v1;{service.namespace};{service.name};v1;Kubernetes"})
            if service.takes_mtls:
                noted["envoy.transport_socket_match"].update({"tlsMode": "istio"})
        return message


# How its generator writes


def outbound_listener(name: str, routes: str) -> Any:
    message = listener_pb2.Listener(name=name)
    message.address.socket_address.address, message.address.socket_address.port_value = "10.96.0.1", 9080
    manager = http_connection_manager_pb2.HttpConnectionManager()
    manager.rds.config_source.ads.SetInParent()
    manager.rds.route_config_name = routes
    manager.http_filters.add(name="envoy.filters.http.fault").typed_config.Pack(fault_pb2.HTTPFault())
    manager.http_filters.add(name="envoy.filters.http.router").typed_config.Pack(router_pb2.Router())
    message.api_listener.api_listener.Pack(manager)
    return message


def inbound_listener(name: str, rules: Rules) -> Any:
    host, _, port = name.removeprefix(INBOUND).rpartition(":")
    message = listener_pb2.Listener(name=name)
    message.address.socket_address.address, message.address.socket_address.port_value = host, int(port)
    suffix = "mtls" if rules.strict else "plaintext"
    manager = http_connection_manager_pb2.HttpConnectionManager()
    route = manager.route_config.virtual_hosts.add(domains=["*"]).routes.add()
    manager.route_config.name = "inbound"
    route.match.prefix = "/"
    route.non_forwarding_action.SetInParent()
    for policies, action, filter_name in (
        (rules.deny, rbac_pb2.RBAC.DENY, "envoy.filters.http.rbac.DENY"),
        (rules.allow, rbac_pb2.RBAC.ALLOW, "envoy.filters.http.rbac"),
    ):
        if policies:
            config = rbac_filter_pb2.RBAC(rules=rbac_pb2.RBAC(action=action, policies=policies))
            manager.http_filters.add(name=filter_name).typed_config.Pack(config)
    manager.http_filters.add(name="envoy.filters.http.router").typed_config.Pack(router_pb2.Router())
    chain = message.filter_chains.add(name=f"inbound-{suffix}")
    chain.filters.add(name=f"inbound-hcm{suffix}").typed_config.Pack(manager)
    if rules.strict:
        context = tls_pb2.DownstreamTlsContext()
        _write_tls(context.common_tls_context)
        context.require_client_certificate.value = True
        chain.transport_socket.name = "envoy.transport_sockets.tls"
        chain.transport_socket.typed_config.Pack(context)
    return message


def _write_tls(common: Any, sans: Sequence[str] = ()) -> None:
    shown = common.tls_certificate_certificate_provider_instance
    shown.instance_name, shown.certificate_name = "default", "default"
    trusted = common.combined_validation_context.validation_context_certificate_provider_instance
    trusted.instance_name, trusted.certificate_name = "default", "ROOTCA"
    common.combined_validation_context.default_validation_context.SetInParent()
    for each in sans:
        common.combined_validation_context.default_validation_context.match_subject_alt_names.add(exact=each)


def policy(*, path: str = "", principal: str = "", namespace: str = "") -> rbac_pb2.Policy:
    """One rule of an AuthorizationPolicy, as pilot/pkg/security/authz/model generates it."""
    found = rbac_pb2.Policy()
    permission, identifier = found.permissions.add(), found.principals.add()
    if path:
        permission.and_rules.rules.add().or_rules.rules.add().url_path.path.exact = path
    else:
        permission.and_rules.rules.add().any = True
    if principal:
        one = identifier.and_ids.ids.add().or_ids.ids.add()
        one.authenticated.principal_name.exact = f"spiffe://{principal}"
    elif namespace:
        one = identifier.and_ids.ids.add().or_ids.ids.add()
        one.authenticated.principal_name.safe_regex.regex = f".*/ns/{namespace}/.*"
    else:
        identifier.and_ids.ids.add().any = True
    return found
