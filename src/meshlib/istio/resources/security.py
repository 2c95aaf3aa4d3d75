"""What do PeerAuthentication, AuthorizationPolicy and RequestAuthentication hold?

Source: istio.io/api, security/v1.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from meshlib.istio.resources.base import Duration, IstioStruct
from meshlib.istio.resources.networking import WorkloadSelector


class TargetRef(IstioStruct, frozen=True):
    kind: str
    name: str
    group: str = ""
    namespace: str = ""


class MutualTls(IstioStruct, frozen=True):
    mode: Literal["UNSET", "DISABLE", "PERMISSIVE", "STRICT"] = "UNSET"


class PeerAuthentication(IstioStruct, frozen=True):
    selector: WorkloadSelector | None = None
    mtls: MutualTls | None = None
    port_level_mtls: Annotated[dict[str, MutualTls], msgspec.Meta(min_length=1)] = {}


class Source(IstioStruct, frozen=True):
    principals: list[str] = []
    not_principals: list[str] = []
    request_principals: list[str] = []
    not_request_principals: list[str] = []
    namespaces: list[str] = []
    not_namespaces: list[str] = []
    service_accounts: list[str] = []
    not_service_accounts: list[str] = []
    trust_domains: list[str] = []
    not_trust_domains: list[str] = []
    ip_blocks: list[str] = []
    not_ip_blocks: list[str] = []
    remote_ip_blocks: list[str] = []
    not_remote_ip_blocks: list[str] = []


class Operation(IstioStruct, frozen=True):
    hosts: list[str] = []
    not_hosts: list[str] = []
    ports: list[str] = []
    not_ports: list[str] = []
    methods: list[str] = []
    not_methods: list[str] = []
    paths: list[str] = []
    not_paths: list[str] = []


class From(IstioStruct, frozen=True):
    source: Source | None = None


class To(IstioStruct, frozen=True):
    operation: Operation | None = None


class When(IstioStruct, frozen=True):
    key: str
    values: list[str] = []
    not_values: list[str] = []


class AccessRule(IstioStruct, frozen=True):
    from_: list[From] | None = msgspec.field(name="from", default=None)
    to: list[To] | None = None
    when: list[When] = []


class Provider(IstioStruct, frozen=True):
    name: str


class AuthorizationPolicy(IstioStruct, frozen=True):
    selector: WorkloadSelector | None = None
    target_ref: TargetRef | None = None
    target_refs: list[TargetRef] = []
    rules: list[AccessRule] = []
    action: Literal["ALLOW", "DENY", "AUDIT", "CUSTOM"] = "ALLOW"
    provider: Provider | None = None


class JwtHeader(IstioStruct, frozen=True):
    name: str
    prefix: str = ""


class ClaimToHeader(IstioStruct, frozen=True):
    header: str
    claim: str


class JwtRule(IstioStruct, frozen=True):
    issuer: str
    audiences: list[str] = []
    jwks_uri: str = ""
    jwks: str = ""
    from_headers: list[JwtHeader] = []
    from_params: list[str] = []
    from_cookies: list[str] = []
    output_payload_to_header: str = ""
    output_claim_to_headers: list[ClaimToHeader] = []
    forward_original_token: bool = False
    space_delimited_claims: list[str] = []
    timeout: Duration | None = None


class RequestAuthentication(IstioStruct, frozen=True):
    selector: WorkloadSelector | None = None
    target_ref: TargetRef | None = None
    target_refs: list[TargetRef] = []
    jwt_rules: list[JwtRule] = []
