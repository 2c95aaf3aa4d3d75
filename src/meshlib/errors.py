"""Every exception that a user can catch, with what a caller on the other side of a wire would have seen instead.

Beside each class stand the HTTP status, the gRPC status and Envoy's response flag: one ladder from cause to status.
What a client library's adapter raises is one of these and the library's own exception at once (outbound/raising.py).
"""

from __future__ import annotations

from typing import Any


class MeshError(Exception):
    """Root of the tree.

    status: the HTTP status a sidecar would have answered. grpc_status: the gRPC code's number.
    flag: Envoy's response flags (`UF`, `UF,URX`), "" where Envoy has none. reason: one sentence.
    endpoint: the address of the last attempt (`10.0.0.1:9080`), "" when there was none.
    """

    status: int = 503
    grpc_status: int = 14
    flag: str = ""
    reason: str = ""
    endpoint: str = ""


class NoHealthyEndpoint(MeshError):
    """The cluster has no endpoint that may be called."""

    flag = "UH"


class NoRoute(MeshError):
    """No route matches the request."""

    status, grpc_status, flag = 404, 12, "NR"


class NoCluster(MeshError):
    """The route names a cluster that is not configured, mostly a subset that no DestinationRule defines."""

    flag = "NC"


class NotConfigured(MeshError):
    """Nobody has said yet where calls to this host go, and it would have been sent in plaintext."""

    flag = "NC"


class NotInRegistry(MeshError):
    """The host is unknown and outboundTrafficPolicy is REGISTRY_ONLY."""

    status = 502


class Overflow(MeshError):
    """A limit of the destination's connection pool is reached."""

    flag = "UO"


class CircuitOpen(MeshError):
    """The destination's breaker is open: too many calls have failed, so none is sent for a while."""

    flag = "UO"


class RateLimited(MeshError):
    """A rate limit says no, for now."""

    status, grpc_status, flag = 429, 8, "RL"


class RateLimitUnanswered(MeshError):
    """Who counts a quota for all processes did not answer, and the quota's `failureModeDeny` says no then."""

    status, grpc_status, flag = 500, 2, "RLSE"


class FaultInjected(MeshError):
    """A fault of the route's configuration aborted the call. `status` is the fault's."""

    flag = "FI"


class AnsweredByRoute(MeshError):
    """The route answers by itself (a redirect, a direct response), and the caller can't be given a response."""


class UpstreamConnectionFailure(MeshError):
    """No connection to the endpoint could be made."""

    flag = "UF"


class UpstreamReset(MeshError):
    """The connection ended before the response was complete."""

    flag = "UC"


class UpstreamTimeout(MeshError):
    """No complete response in time: the route's timeout passed, or one that the application set on its client."""

    status, grpc_status, flag = 504, 4, "UT"


class UpstreamFailure(MeshError):
    """A function under `mesh.outbound` failed, the last time it was tried, with an exception of its own."""


class RequestRefused(MeshError):
    """The client library did not send the request: something in it can't be sent."""

    status, grpc_status = 400, 3


class SettingsError(MeshError, ValueError):
    """A setting (argument or environment variable) can't be used. The message names it."""

    status, grpc_status = 500, 13


class MeshClosed(MeshError, RuntimeError):
    """The Mesh was closed."""

    status, grpc_status = 500, 13


class ConfigurationError(MeshError, ValueError):
    """An object of the user's YAML can't be used.

    source: file and line (`networking/reviews.yaml:12`), or where else it came from.
    object: `VirtualService default/reviews`. field: `spec.http[0].route[0].weight`. reason: one sentence.
    """

    status, grpc_status = 400, 3

    def __init__(self, source: str, object: str, field: str, reason: str) -> None:
        super().__init__(source, object, field, reason)
        self.source, self.object, self.field, self.reason = source, object, field, reason

    def __eq__(self, other: Any) -> bool:
        """Two that say the same are the same: what has not changed is not reported again."""
        return type(other) is type(self) and other.args == self.args

    def __hash__(self) -> int:
        return hash(self.args)

    def __str__(self) -> str:
        return ": ".join(part for part in (self.source, self.object, self.field, self.reason) if part)


class InvalidResource(MeshError, ValueError):
    """An xDS resource can't be used; the message becomes the NACK's detail.

    type_url, name: which resource. field: `virtual_hosts[0].routes[1].route.cluster`. reason: one sentence.
    """

    def __init__(self, type_url: str, name: str, field: str, reason: str) -> None:
        super().__init__(type_url, name, field, reason)
        self.type_url, self.name, self.field, self.reason = type_url, name, field, reason

    def __str__(self) -> str:
        kind = self.type_url.rpartition(".")[2]
        return ": ".join(part for part in (f"{kind} {self.name!r}", self.field, self.reason) if part)
