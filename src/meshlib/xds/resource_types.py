"""Which kinds of resources travel over xDS, and in which order are they pushed?"""

from __future__ import annotations

PREFIX = "type.googleapis.com/"
LISTENER = PREFIX + "envoy.config.listener.v3.Listener"
ROUTE = PREFIX + "envoy.config.route.v3.RouteConfiguration"
CLUSTER = PREFIX + "envoy.config.cluster.v3.Cluster"
ENDPOINT = PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment"
SECRET = PREFIX + "envoy.extensions.transport_sockets.tls.v3.Secret"

PUSH_ORDER = (CLUSTER, ENDPOINT, LISTENER, ROUTE)
"""Make before break: whoever is named comes before whoever names it (xDS protocol, "eventual consistency")."""
SHORT_NAMES = {LISTENER: "LDS", ROUTE: "RDS", CLUSTER: "CDS", ENDPOINT: "EDS", SECRET: "SDS"}
SERVICES = {
    LISTENER: ("envoy.service.listener.v3.ListenerDiscoveryService", "Listeners"),
    ROUTE: ("envoy.service.route.v3.RouteDiscoveryService", "Routes"),
    CLUSTER: ("envoy.service.cluster.v3.ClusterDiscoveryService", "Clusters"),
    ENDPOINT: ("envoy.service.endpoint.v3.EndpointDiscoveryService", "Endpoints"),
    SECRET: ("envoy.service.secret.v3.SecretDiscoveryService", "Secrets"),
}
"""The service that has this type alone, and what its methods stream: `StreamListeners`, `DeltaListeners`."""
