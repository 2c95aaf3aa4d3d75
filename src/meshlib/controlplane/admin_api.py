"""What do the admin API's answers look like? One struct for each JSON shape, shared by the server and meshctl.

Fields may be added; none is renamed or removed within /v1. Times are seconds since 1970 (UTC).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

YAML = "application/yaml"
"""The content type that requests which change something must carry: no browser form can send it, and a script of
another origin would need a preflight, which nobody answers."""


class Problem(msgspec.Struct, frozen=True):
    """source: `networking/reviews.yaml:12`. object: `VirtualService default/reviews`. field: `spec.http[0]`.

    level: `error`, this is not in force; `warning`, it is, and has less effect than it seems.
    """

    source: str
    object: str
    field: str
    reason: str
    level: str = "error"

    def __str__(self) -> str:
        return ": ".join(part for part in (self.source, self.object, self.field, self.reason) if part)


class Problems(msgspec.Struct, frozen=True):
    problems: tuple[Problem, ...] = ()


class StoredObject(msgspec.Struct, frozen=True):
    """One object in force. resource: `virtualservice.networking.istio.io`. origin: `folder`, `kubernetes` or `applied`.

    source: the folder's file and line, or what the applier named (a file of theirs). created: when this control plane
    first had it; changed: when this form came into force. yaml: the object itself.
    """

    kind: str
    resource: str
    namespace: str
    name: str
    origin: str
    source: str
    created: float
    changed: float
    yaml: str


class Objects(msgspec.Struct, frozen=True):
    objects: tuple[StoredObject, ...] = ()


class Result(msgspec.Struct, frozen=True):
    """What became of one object. outcome: created, configured, unchanged, deleted, not found.

    note: what the user should know besides.
    """

    kind: str
    resource: str
    namespace: str
    name: str
    outcome: str
    note: str = ""


class Results(msgspec.Struct, frozen=True):
    """Objects are taken one by one, as kubectl does: a bad one hinders no good one.

    problems: one for each object that was refused. warnings: about those that were taken.
    """

    results: tuple[Result, ...] = ()
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()


class Client(msgspec.Struct, frozen=True):
    """One xDS client. name: `reviews-v1-4711.default`. types: `CDS`, `LDS`, `EDS`, `RDS` -> SYNCED (the last push was
    accepted), STALE (it is not answered yet), NACKED (refused), NOT SENT (it asked for nothing that exists).

    versions: of what was accepted last; equal versions are equal content, on whatever control plane.
    errors: the reasons of the refusals that stand. ready: it is registered as an endpoint.
    metrics: where Prometheus may scrape it (`10.0.0.1:15090`); "" is nowhere.
    """

    name: str
    id: str
    namespace: str = ""
    workload: str = ""
    service: str = ""
    kind: str = ""
    user_agent: str = ""
    address: str = ""
    ready: bool = False
    connected: float = 0.0
    types: dict[str, str] = {}
    versions: dict[str, str] = {}
    errors: tuple[str, ...] = ()
    metrics: str = ""


class Clients(msgspec.Struct, frozen=True):
    clients: tuple[Client, ...] = ()


class Load(msgspec.Struct, frozen=True):
    """What clients of `namespace` have reported of their calls to one locality of a cluster, in sums since the control
    plane began; in_progress: now, of the clients that are connected. dropped: calls that their own limits have ended
    before a locality was chosen; they stand at locality "". reported: when the last report came."""

    cluster: str
    service: str
    namespace: str
    locality: str
    priority: int
    succeeded: int
    failed: int
    issued: int
    dropped: int
    in_progress: int
    reported: float


class Loads(msgspec.Struct, frozen=True):
    loads: tuple[Load, ...] = ()


class ServiceEndpoint(msgspec.Struct, frozen=True):
    """address: `10.0.0.1:9080`. health: HEALTHY, UNHEALTHY, DRAINING."""

    address: str
    workload: str = ""
    labels: dict[str, str] = {}
    locality: str = ""
    health: str = "HEALTHY"
    port: str = ""


class ServiceEndpoints(msgspec.Struct, frozen=True):
    """The endpoints of one service. host: `reviews.default.svc.cluster.local`."""

    name: str
    namespace: str
    host: str
    ports: tuple[int, ...] = ()
    endpoints: tuple[ServiceEndpoint, ...] = ()


class Endpoints(msgspec.Struct, frozen=True):
    services: tuple[ServiceEndpoints, ...] = ()


class MeshRequest(msgspec.Struct, frozen=True):
    """The head of one request, as one end of it saw it; nothing of its body, and no header but what is named here.

    at: when it began. duration: seconds until its end. direction: `in`, told by who served it; `out`, by who called.
    workload, namespace: who tells. peer: who is at the other end, `reviews-v1.default`, or its address. path: with its
    query, credentials in it redacted. status: 0 without an answer. grpc_status: `OK`; "" for HTTP. flags: Envoy's, "-"
    for none. attempts: how often it was sent; 0 where that is not known. mtls: whether both ends have proven who they
    are.
    """

    at: float
    duration: float
    direction: str
    workload: str
    namespace: str
    peer: str
    method: str
    authority: str
    path: str
    status: int = 0
    grpc_status: str = ""
    flags: str = "-"
    route: str = ""
    attempts: int = 0
    mtls: bool = False
    failed: bool = False
    trace_id: str = ""
    span_id: str = ""


class MeshRequests(msgspec.Struct, frozen=True):
    requests: tuple[MeshRequest, ...] = ()


class LogLine(msgspec.Struct, frozen=True):
    """One line of a process's log. Credentials in it are redacted by whoever wrote it, and again by who keeps it.

    at: when it was written. instance: which process. kind: `access`, of a request; `mesh`, of the library itself.
    level: `INFO`, `WARNING`, ... direction: `in` or `out`, of a request. text: as written. fields: a request's, by
    Istio's names of its access log (`response_code`, `path`, ...)."""

    at: float
    workload: str
    namespace: str
    instance: str
    kind: str
    level: str
    logger: str
    text: str
    direction: str = ""
    fields: dict[str, str] = {}
    trace_id: str = ""
    span_id: str = ""


class LogLines(msgspec.Struct, frozen=True):
    """The oldest first."""

    lines: tuple[LogLine, ...] = ()


class Tapped(msgspec.Struct, frozen=True):
    """What a tap tells at its beginning. workloads: whose requests it shows, `reviews-v1.default`. connected: how many
    of their processes are."""

    workloads: tuple[str, ...]
    connected: int


class Left(msgspec.Struct, frozen=True):
    """requests: how many more there were in the last second than the tap's rate."""

    requests: int


class Root(msgspec.Struct, frozen=True):
    """fingerprint: SHA-256, hexadecimal. state: `signing`; `next`, trusted and not used yet; `old`, trusted still.
    begins, ends: seconds since 1970. pem: the certificate."""

    fingerprint: str
    subject: str
    state: str
    begins: float
    ends: float
    pem: str


class Authority(msgspec.Struct, frozen=True):
    """stage: `idle`; `begun`: a new root is trusted; `switched`: it signs, and the old one is trusted still.

    is_plugged: the CA is somebody else's, who rotates it. late: who listens for roots and does not trust all of today's
    yet. old_until: when the last certificate of the old root may end, seconds since 1970; 0 where there is none."""

    trust_domain: str
    stage: str
    is_plugged: bool
    roots: tuple[Root, ...]
    late: tuple[str, ...] = ()
    old_until: float = 0.0


class Token(msgspec.Struct, frozen=True):
    """state: unused, used, expired. text: only in the answer that made it; nobody is told it again."""

    id: str
    identity: str
    created: float
    expires: float
    state: str
    text: str = ""


class Tokens(msgspec.Struct, frozen=True):
    tokens: tuple[Token, ...] = ()


class Held(msgspec.Struct, frozen=True):
    role: str
    namespaces: tuple[str, ...]


class Ability(msgspec.Struct, frozen=True):
    """namespaces: where it may be done; `*` is everywhere. reason: why not elsewhere, for people."""

    namespaces: tuple[str, ...]
    reason: str = ""


class WhoAmI(msgspec.Struct, frozen=True):
    """access: `open`, nobody is asked; `controlled`. until: when what was shown ends, seconds since 1970; 0 is never.
    may: by what is to be done: view, steer (objects that steer traffic), apply (every object), tokens, audit, rotate.
    csrf: what the page's changes have to repeat."""

    name: str
    method: str
    access: str
    until: float
    roles: tuple[Held, ...]
    may: dict[str, Ability]
    csrf: str = ""


class Version(msgspec.Struct, frozen=True):
    version: str


class Failure(msgspec.Struct, frozen=True):
    """Every answer with a status of 400 or more."""

    error: str


class MeshView(Protocol):
    """What the admin API asks the control plane. Called on the control plane's event loop; must not block."""

    def is_ready(self) -> bool:
        """Whether the configuration was read and xDS is served."""

    def clients(self) -> Sequence[Client]:
        """All connected xDS clients."""

    def endpoints(self) -> Sequence[ServiceEndpoints]:
        """All services, those without endpoints too."""

    def problems(self) -> Sequence[Problem]:
        """What only the translation found: references that lead nowhere, conflicts."""
