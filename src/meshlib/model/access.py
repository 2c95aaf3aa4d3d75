"""Who may call this workload, and how must they come? The rules for calls that come in, as Envoy's RBAC, JWT and
ext_authz filters name them."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Literal

from meshlib.model.rate_limit import Quota, RateLimit
from meshlib.model.reporting import Reporting
from meshlib.model.route import HeaderMatch, StringMatch
from meshlib.model.values import dataclass

_WILD = {"{*}": "[^/]+", "{**}": ".*"}
INBOUND_PREFIX = "xds.istio.io/grpc/lds/inbound/"
"""Before `address:port`: the name by which a server asks for its listener (Istio's form, for gRPC's servers too)."""
SERVER_PREFIX = "grpc/server?xds.resource.listening_address="
"""The same in the form that gRPC's own examples use (gRFC A36)."""


class TlsMode(StrEnum):
    """How a port takes connections. PERMISSIVE: TLS and plaintext, told apart by the first bytes."""

    STRICT = "STRICT"
    PERMISSIVE = "PERMISSIVE"
    DISABLE = "DISABLE"


class Action(StrEnum):
    """AUDIT only logs. The others are asked in the order CUSTOM, DENY, ALLOW."""

    CUSTOM = "CUSTOM"
    DENY = "DENY"
    ALLOW = "ALLOW"
    AUDIT = "AUDIT"


# Conditions. HeaderMatch is one too; `:method` and `:authority` are headers.


@dataclass(frozen=True, slots=True)
class And:
    """Of nothing: always."""

    parts: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class Or:
    """Of nothing: never."""

    parts: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class Not:
    part: Condition


@dataclass(frozen=True, slots=True)
class PathIs:
    """The path without its query, normalised."""

    match: StringMatch


@dataclass(frozen=True, slots=True)
class PathTemplate:
    """Istio's and Envoy's: `{*}` is one segment that is not empty, `{**}` any number of them (uri_template_matcher)."""

    template: str

    @property
    def regex(self) -> str:
        """The same as a regular expression of the whole path. Raises ValueError for what is no template."""
        pieces: list[str] = []
        for piece in re.split(r"(\{\*\*?\})", self.template):
            if piece in _WILD:
                pieces.append(_WILD[piece])
            elif "{" in piece or "}" in piece or "*" in piece:
                raise ValueError(f"no path template: {self.template!r}")
            else:
                pieces.append(re.escape(piece))
        return "".join(pieces)


@dataclass(frozen=True, slots=True)
class PortIs:
    """The port that the workload accepted the connection on; `last` with it ends a range."""

    port: int
    last: int = 0


@dataclass(frozen=True, slots=True)
class AddressIs:
    """of: `peer`, who holds the connection; `remote`, whom trusted proxies name; `destination`. cidr: `10.0.0.0/8`."""

    of: Literal["peer", "remote", "destination"]
    cidr: str


@dataclass(frozen=True, slots=True)
class PrincipalIs:
    """The peer's verified identity, as a URI (`spiffe://cluster.local/ns/default/sa/reviews`). None: any over TLS with
    a client certificate."""

    match: StringMatch | None = None


@dataclass(frozen=True, slots=True)
class ServerNameIs:
    match: StringMatch


@dataclass(frozen=True, slots=True)
class ClaimIs:
    """A claim of the verified token, by its path; where it is a list, any of its items."""

    path: tuple[str, ...]
    match: StringMatch


Condition = (
    And | Or | Not | HeaderMatch | PathIs | PathTemplate | PortIs | AddressIs | PrincipalIs | ServerNameIs | ClaimIs
)
ALWAYS, NEVER = And(), Or()


@dataclass(frozen=True, slots=True)
class AccessRule:
    """One rule of an AuthorizationPolicy: it applies where both conditions hold.

    name: Istio's, `ns[default]-policy[reviews]-rule[0]`. permission: of what is asked; principal: of who asks.
    dry_run: decides and is logged, but is not carried out. provider: whom CUSTOM asks. origin: the object with file
    and line (`AuthorizationPolicy default/reviews (security.yaml:12)`).
    """

    name: str
    action: Action
    permission: Condition = ALWAYS
    principal: Condition = ALWAYS
    dry_run: bool = False
    provider: str = ""
    origin: str = ""


@dataclass(frozen=True, slots=True)
class JwtProvider:
    """One jwtRule of a RequestAuthentication.

    jwks: the key set itself, as JSON; "" where `jwks_uri` names it. from_headers: (name, prefix) pairs. With no place
    given at all, `Authorization: Bearer` and the parameter `access_token`. timeout: of fetching keys, seconds.
    claim_headers: (header, claim) pairs. payload_header: gets the payload, base64url. forward: the application sees
    the token. space_delimited: claims besides `scope` and `permission` that are lists in one text.
    """

    name: str
    issuer: str
    audiences: tuple[str, ...] = ()
    jwks: str = ""
    jwks_uri: str = ""
    from_headers: tuple[tuple[str, str], ...] = ()
    from_params: tuple[str, ...] = ()
    from_cookies: tuple[str, ...] = ()
    claim_headers: tuple[tuple[str, str], ...] = ()
    payload_header: str = ""
    forward: bool = False
    space_delimited: tuple[str, ...] = ()
    timeout: float = 5.0
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Authorizer:
    """An external authorizer (Istio's extensionProviders envoyExtAuthzHttp and envoyExtAuthzGrpc).

    host, port: a name of the mesh or of DNS. path_prefix, *_headers: of HTTP ones only; matched without regard to
    case, a `*` at an end is any text. fail_open: without an answer the call goes on. status_on_error: of the refusal
    without an answer. max_body: bytes of the request's body that are sent along; 0 sends none. partial_body: a longer
    body is cut for the check; otherwise it is refused (413).
    """

    name: str
    kind: Literal["http", "grpc"]
    host: str
    port: int
    timeout: float = 600.0
    fail_open: bool = False
    status_on_error: int = 403
    path_prefix: str = ""
    request_headers: tuple[str, ...] = ()
    added_headers: tuple[tuple[str, str], ...] = ()
    upstream_headers: tuple[str, ...] = ()
    downstream_headers: tuple[str, ...] = ()
    allowed_downstream_headers: tuple[str, ...] = ()
    max_body: int = 0
    partial_body: bool = False
    raw_body: bool = False


@dataclass(frozen=True, slots=True)
class Access:
    """Everything that decides on one call once its connection stands.

    rules: an ALLOW rule that never holds stands for a policy without rules. trusted_hops: proxies in front of the
    one that wrote the last entry of x-forwarded-for (Envoy xff_num_trusted_hops). normalization: of paths, Istio's
    pathNormalization. rate_limits, quotas: asked last.
    """

    rules: tuple[AccessRule, ...] = ()
    jwt: tuple[JwtProvider, ...] = ()
    authorizers: tuple[Authorizer, ...] = ()
    trusted_hops: int = 0
    normalization: str = "BASE"
    rate_limits: tuple[RateLimit, ...] = ()
    quotas: tuple[Quota, ...] = ()


NO_ACCESS_RULES = Access()


@dataclass(frozen=True, slots=True)
class Inbound:
    """How one workload is called (xDS: a server's Listener).

    port: 0 is every port that no other Inbound is for. tls: of the ports that `port_tls` does not name.
    reporting: what is told of its calls; None is as the process is set.
    """

    name: str
    address: str = ""
    port: int = 0
    tls: TlsMode = TlsMode.PERMISSIVE
    port_tls: tuple[tuple[int, TlsMode], ...] = ()
    access: Access = NO_ACCESS_RULES
    reporting: Reporting | None = None

    def tls_mode(self, port: int) -> TlsMode:
        return next((mode for number, mode in self.port_tls if number == port), self.tls)
