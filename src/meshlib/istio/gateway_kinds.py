"""What do the Gateway API's kinds hold? Its own field names: gateway-api.sigs.k8s.io/reference/spec.

Fields that are not known have no effect, and `unknown` tells them for a warning, but for filters: a rule with a filter
that nobody applies must not be used without it, so a filter keeps its type whatever that is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

GROUP = "gateway.networking.k8s.io"
VERSIONS = ("v1beta1", "v1")
CONTROLLER = "meshlib.io/gateway-controller"
Port = Annotated[int, Meta(ge=1, le=65535)]


class _Kind(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    pass


class ParentReference(_Kind, frozen=True):
    name: str
    group: str = GROUP
    kind: str = "Gateway"
    namespace: str = ""
    section_name: str = ""
    port: Port | None = None


class BackendObjectReference(_Kind, frozen=True):
    name: str
    group: str = ""
    kind: str = "Service"
    namespace: str = ""
    port: Port | None = None


class HeaderValue(_Kind, frozen=True):
    name: str
    value: str


class HeaderFilter(_Kind, frozen=True):
    set: list[HeaderValue] = []
    add: list[HeaderValue] = []
    remove: list[str] = []


class PathModifier(_Kind, frozen=True):
    type: str
    replace_full_path: str | None = None
    replace_prefix_match: str | None = None


class RedirectFilter(_Kind, frozen=True):
    scheme: str = ""
    hostname: str = ""
    path: PathModifier | None = None
    port: Port | None = None
    status_code: int = 302


class RewriteFilter(_Kind, frozen=True):
    hostname: str = ""
    path: PathModifier | None = None


class Fraction(_Kind, frozen=True):
    numerator: Annotated[int, Meta(ge=0)]
    denominator: Annotated[int, Meta(ge=1)] = 100


class MirrorFilter(_Kind, frozen=True):
    backend_ref: BackendObjectReference
    percent: Annotated[int, Meta(ge=0, le=100)] | None = None
    fraction: Fraction | None = None


class CorsFilter(_Kind, frozen=True):
    """max_age: seconds."""

    allow_origins: list[str] = []
    allow_credentials: bool = False
    allow_methods: list[str] = []
    allow_headers: list[str] = []
    expose_headers: list[str] = []
    max_age: Annotated[int, Meta(ge=1)] = 5


class Filter(_Kind, frozen=True):
    type: str
    request_header_modifier: HeaderFilter | None = None
    response_header_modifier: HeaderFilter | None = None
    request_redirect: RedirectFilter | None = None
    url_rewrite: RewriteFilter | None = msgspec.field(name="urlRewrite", default=None)
    request_mirror: MirrorFilter | None = None
    cors: CorsFilter | None = None


class BackendRef(BackendObjectReference, frozen=True):
    weight: Annotated[int, Meta(ge=0, le=1_000_000)] = 1
    filters: list[Filter] = []


class PathMatch(_Kind, frozen=True):
    type: str = "PathPrefix"
    value: str = "/"


class ValueMatch(_Kind, frozen=True):
    name: str
    value: str
    type: str = "Exact"


class HTTPMatch(_Kind, frozen=True):
    path: PathMatch = PathMatch()
    headers: list[ValueMatch] = []
    query_params: list[ValueMatch] = []
    method: str = ""


class MethodMatch(_Kind, frozen=True):
    type: str = "Exact"
    service: str = ""
    method: str = ""


class GRPCMatch(_Kind, frozen=True):
    method: MethodMatch = MethodMatch()
    headers: list[ValueMatch] = []


class Timeouts(_Kind, frozen=True):
    """Durations as `10s`, `1m30s`; `0s` is none."""

    request: str = ""
    backend_request: str = ""


class Retry(_Kind, frozen=True):
    codes: list[Annotated[int, Meta(ge=100, le=599)]] = []
    attempts: Annotated[int, Meta(ge=0)] | None = None
    backoff: str = ""


class HTTPRule(_Kind, frozen=True):
    name: str = ""
    matches: list[HTTPMatch] = []
    filters: list[Filter] = []
    backend_refs: list[BackendRef] = []
    timeouts: Timeouts = Timeouts()
    retry: Retry | None = None


class GRPCRule(_Kind, frozen=True):
    name: str = ""
    matches: list[GRPCMatch] = []
    filters: list[Filter] = []
    backend_refs: list[BackendRef] = []


class HTTPRoute(_Kind, frozen=True):
    parent_refs: list[ParentReference] = []
    hostnames: list[str] = []
    rules: list[HTTPRule] = msgspec.field(default_factory=lambda: [HTTPRule()])


class GRPCRoute(_Kind, frozen=True):
    parent_refs: list[ParentReference] = []
    hostnames: list[str] = []
    rules: list[GRPCRule] = msgspec.field(default_factory=lambda: [GRPCRule()])


class RouteNamespaces(_Kind, frozen=True):
    from_: str = msgspec.field(name="from", default="Same")
    selector: dict[str, Any] = {}


class RouteKind(_Kind, frozen=True):
    kind: str
    group: str = GROUP


class AllowedRoutes(_Kind, frozen=True):
    namespaces: RouteNamespaces = RouteNamespaces()
    kinds: list[RouteKind] = []


class SecretReference(_Kind, frozen=True):
    name: str
    group: str = ""
    kind: str = "Secret"
    namespace: str = ""


class ListenerTls(_Kind, frozen=True):
    """frontend_validation: clients have to show certificates."""

    mode: str = "Terminate"
    certificate_refs: list[SecretReference] = []
    frontend_validation: dict[str, Any] | None = None


class GatewayListener(_Kind, frozen=True):
    name: str
    port: Port
    protocol: str
    hostname: str = ""
    tls: ListenerTls | None = None
    allowed_routes: AllowedRoutes = AllowedRoutes()


class GatewayTls(_Kind, frozen=True):
    """frontend: what clients have to show, at all HTTPS listeners."""

    frontend: dict[str, Any] | None = None


class Gateway(_Kind, frozen=True):
    gateway_class_name: str
    listeners: list[GatewayListener] = []
    tls: GatewayTls | None = None


class GatewayClass(_Kind, frozen=True):
    controller_name: str
    description: str = ""


class ReferenceFrom(_Kind, frozen=True):
    kind: str
    namespace: str
    group: str = ""


class ReferenceTo(_Kind, frozen=True):
    kind: str
    group: str = ""
    name: str = ""


class ReferenceGrant(_Kind, frozen=True):
    from_: list[ReferenceFrom] = msgspec.field(name="from", default=[])
    to: list[ReferenceTo] = []


KINDS: Mapping[str, type[msgspec.Struct]] = {
    "HTTPRoute": HTTPRoute,
    "GRPCRoute": GRPCRoute,
    "Gateway": Gateway,
    "GatewayClass": GatewayClass,
    "ReferenceGrant": ReferenceGrant,
}


def unknown(value: Any, raw: Any, at: str = "spec") -> Iterator[str]:
    """The fields of `raw` that `value`, which was read from it, has no place for."""
    if isinstance(value, msgspec.Struct) and isinstance(raw, Mapping):
        names = dict(zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True))
        for name, given in raw.items():
            if name in names:
                yield from unknown(getattr(value, names[name]), given, f"{at}.{name}")
            elif given is not None:
                yield f"{at}.{name}"
    elif isinstance(value, list) and isinstance(raw, list):
        for index, (each, given) in enumerate(zip(value, raw, strict=False)):
            yield from unknown(each, given, f"{at}[{index}]")
