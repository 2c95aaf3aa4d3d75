"""What makes up a control plane? Folders and applied objects, the registry, the translation, xDS and the admin API.

The composition root: everything else here is handed what it needs. A change of objects or workloads wakes one task,
which waits for quiet, has all views made anew on another thread, and then every stream takes what differs.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import secrets
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import grpc
import grpc.aio
import httpx
from cryptography import x509
from starlette.routing import Route

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.access_rules import AccessFile
from meshlib.controlplane.admin import AdminServer, admin_app
from meshlib.controlplane.admin_tls import admin_context
from meshlib.controlplane.administrators import Administrators
from meshlib.controlplane.admission import Injection, admission_app
from meshlib.controlplane.ads import AggregatedDiscoveryService
from meshlib.controlplane.audit import AuditLog
from meshlib.controlplane.audit_api import AuditRoutes
from meshlib.controlplane.authentication import Authenticator, Issuer, TokenReview
from meshlib.controlplane.ca import CertificateAuthority, PemAuthority, PluggedAuthority
from meshlib.controlplane.ca_api import AuthorityRoutes
from meshlib.controlplane.ca_secret import shared_authority
from meshlib.controlplane.ca_service import CertificateService
from meshlib.controlplane.cache import Cache
from meshlib.controlplane.claims import Claims
from meshlib.controlplane.client_status import ClientStatusService
from meshlib.controlplane.gathered import Update
from meshlib.controlplane.history import History
from meshlib.controlplane.inspection import Inspection
from meshlib.controlplane.join_tokens import JoinTokens
from meshlib.controlplane.kubernetes import KubernetesSource
from meshlib.controlplane.load_reports import LoadReportingService, LoadReports
from meshlib.controlplane.log_api import LogRoutes
from meshlib.controlplane.log_store import LogStore
from meshlib.controlplane.monitoring import monitoring_app
from meshlib.controlplane.own_identity import OwnIdentity
from meshlib.controlplane.own_metrics import OwnMetrics, State
from meshlib.controlplane.picture import Picture, badges_of
from meshlib.controlplane.registry import GRACE, Registry
from meshlib.controlplane.series import Remembered, Scraped
from meshlib.controlplane.sources import ObjectStore, problem_of
from meshlib.controlplane.statuses import StatusWriter
from meshlib.controlplane.tap_api import TapRoutes
from meshlib.controlplane.taps import Taps
from meshlib.controlplane.telemetry_store import TelemetryStore
from meshlib.controlplane.token_api import TokenRoutes
from meshlib.controlplane.token_shelf import FileShelf, SecretShelf, Shelf
from meshlib.controlplane.trust_domain import trust_domain_warnings
from meshlib.controlplane.what_if import WhatIfRoutes
from meshlib.errors import ConfigurationError
from meshlib.istio.analyze.scene import Workload as Running
from meshlib.istio.analyze.selectors import idle
from meshlib.istio.folder import Folder
from meshlib.istio.mesh_settings import mesh_settings
from meshlib.istio.problems import ConfigurationWarning
from meshlib.istio.resources import Object
from meshlib.istio.services import Service, joined_hosts
from meshlib.istio.translate import parts_of, world_of
from meshlib.kube.client import KubeClient
from meshlib.kube.settings import KubeSettings
from meshlib.model import Node, Workload, is_loopback
from meshlib.xds.resource_types import CLUSTER

logger = logging.getLogger("meshlib.controlplane")

QUIET, LONGEST = 0.05, 0.5
"""Seconds. A change waits for others to come, but not for ever (Istio: 100 ms and 10 s, for clusters of thousands)."""


_ANYBODY = Node("anybody", Workload("anybody"))
"""Its view is always made: problems are found, and most nodes see the same."""


@dataclass(frozen=True, slots=True)
class ControlPlaneSettings:
    """folders: files and folders of YAML, watched. state: where what is applied is kept; None keeps it in memory.

    xds, admin: (host, port); port 0 takes a free one. grace: seconds for which the workloads that were known count on
    after a start.
    tls: whether xDS and the CA are served by TLS, and callers must prove who they are; None: unless `xds` is loopback.
      Plaintext is for loopback only. names: DNS names and addresses by which it is called, besides its own.
    plugged_ca: a CA made by somebody else, or a folder as Istio's `cacerts` secret; None: a root of its own.
    ca_secret: (namespace, name) of the Secret in `cluster` that holds the CA of all replicas; made where there is none.
    token_secret: the same for the join tokens; without it each control plane has its own.
    issuers, kubernetes: whose tokens are believed.
    access: the file that says who may do what through the admin API (access_rules.py); None lets everybody, and is for
      loopback only. Off loopback the admin API is served by TLS, with the same names.
    audit: where every change is written, besides memory; None: `audit.jsonl` in `state`.
    metrics: (host, port) of `/metrics`, `/healthz` and `/readyz`, by plain HTTP and for everybody; None serves them on
      the admin API alone.
    is_read_only: whether nothing can be applied or deleted through the admin API: what is in force is the folders' and
      the cluster's, the same on all replicas.
    prometheus_url: of the Prometheus that the graph's figures are asked of; "" takes what processes push.
    cluster: the Kubernetes cluster whose objects are in force too; None is none. writes_status: whether what is wrong
      with its objects is written to their status. webhook: (host, port) of the admission webhooks, by TLS; injection:
      what they add to pods, None for nothing.
    ttls: by type URL, for how many seconds a resource is good without being renewed; a missing type is for good.
    """

    folders: tuple[Path, ...] = ()
    state: Path | None = None
    xds: tuple[str, int] = ("127.0.0.1", 15010)
    admin: tuple[str, int] = ("127.0.0.1", 15014)
    grace: float = GRACE
    trust_domain: str = "cluster.local"
    tls: bool | None = None
    names: tuple[str, ...] = ()
    plugged_ca: PluggedAuthority | Path | None = None
    ca_secret: tuple[str, str] | None = None
    token_secret: tuple[str, str] | None = None
    issuers: tuple[Issuer, ...] = ()
    kubernetes: TokenReview | None = None
    cluster: KubeSettings | None = None
    writes_status: bool = False
    webhook: tuple[str, int] | None = None
    injection: Injection | None = None
    access: Path | None = None
    audit: Path | None = None
    prometheus_url: str = ""
    metrics: tuple[str, int] | None = None
    is_read_only: bool = False
    ttls: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_admin_local(self) -> bool:
        return is_loopback(f"{self.admin[0]}:0")

    @property
    def is_secure(self) -> bool:
        return not is_loopback(f"{self.xds[0]}:0") if self.tls is None else self.tls


class ControlPlane:
    """Everything that configuration needs, in one process. Started once."""

    def __init__(self, settings: ControlPlaneSettings) -> None:
        self.settings = settings
        self.xds_port = 0
        self._store: ObjectStore | None = None
        self._cache = Cache()
        self._registry = Registry(settings.state / "workloads.json" if settings.state is not None else None)
        self._metrics = OwnMetrics(self._state)
        self._ads = AggregatedDiscoveryService(self._cache, self._registry, self._metrics, ttls=settings.ttls)
        self._loads = LoadReports()
        self._admin: AdminServer | None = None
        self._server: grpc.aio.Server | None = None
        self._changed = asyncio.Event()
        self._stop_watching = threading.Event()
        self._watcher: threading.Thread | None = None
        self._updates: asyncio.Task[None] | None = None
        self._forget: asyncio.TimerHandle | None = None
        self.authority: CertificateAuthority | None = None
        self._trust_domain: tuple[ConfigurationError, ...] = ()
        self.tokens: JoinTokens | None = None
        self._certificates: CertificateService | None = None
        self._kube: KubeClient | None = None
        self._token_client: KubeClient | None = None
        self._kubernetes: KubernetesSource | None = None
        self._following: asyncio.Task[None] | None = None
        self._statuses: StatusWriter | None = None
        self._writing: asyncio.Task[None] | None = None
        self._webhook: AdminServer | None = None
        self._monitoring: AdminServer | None = None
        self._claims = Claims()
        self._administrators: Administrators | None = None
        self._audit: AuditLog | None = None
        self._http: httpx.AsyncClient | None = None
        self._is_ready = False
        self._endpoints: tuple[api.ServiceEndpoints, ...] = ()
        self._listed: Mapping[int, _Listed] = {}
        self._workloads: tuple[Workload, ...] = ()
        """Whose word counts of where they are."""
        self._badges: dict[str, tuple[str, ...]] = {}
        self._badged: tuple[Object, ...] | None = None
        """The rules that they, and what is said of the trust domain, are of."""
        self._history = History()
        self._telemetry = TelemetryStore()
        self._taps = Taps(self._changed.set)
        self._telemetry.on_spans(self._taps.receive)
        self._logs = LogStore()
        self._logs.on_lines(self._taps.receive_lines)
        self._scraped = Scraped(settings.prometheus_url) if settings.prometheus_url else None
        self._picture = Picture(self._telemetry, self._history, self, series=self._scraped, logs=self._logs)
        self._what_if = WhatIfRoutes(self, self._scraped or Remembered(self._telemetry))

    async def start(self) -> None:
        """Returns when xDS and the admin API are served and the folders and the cluster were read. That waits for the
        cluster for as long as it takes, and the log says for what; `/healthz` and `/metrics` are served meanwhile.

        Raises OSError when an address can't be used, or must not be without access control; StateError when the state
        folder can't; call stop() then too.
        """
        loop = asyncio.get_running_loop()
        if not self.settings.is_secure and not is_loopback(f"{self.settings.xds[0]}:0"):
            raise OSError(errno.EPERM, f"xDS on {self.settings.xds[0]} without TLS: plaintext is for loopback only")
        if not self.settings.is_admin_local and self.settings.access is None:
            raise OSError(
                errno.EPERM,
                f"--admin {self.settings.admin[0]} without --access FILE: whoever reaches it could change the mesh; "
                "say who may do what, or give it 127.0.0.1 or [::1]",
            )
        if self.settings.metrics is not None:
            await self._serve_metrics(*self.settings.metrics)
        await asyncio.to_thread(self._open_authority, await self._plugged())
        store = self._store = await asyncio.to_thread(self._open_store)
        self._registry.load()
        store.on_change(lambda: self._wake(loop))
        self._registry.on_change(self._changed.set)
        has_read = asyncio.Event()
        if self.settings.folders:
            self._watcher = threading.Thread(
                target=self._watch, args=(store, loop, has_read), name="meshlib-folders", daemon=True
            )
            self._watcher.start()
            await has_read.wait()
        if self.settings.cluster is not None:
            await self._follow(self.settings.cluster, store)
            if self.settings.writes_status:
                self._write_status(self.settings.cluster, store)
        # Before anybody is served: a client must not be told that nothing exists.
        await self._update(store)
        self._updates = loop.create_task(self._keep_updating(store), name="control plane updates")
        await self._serve_xds()
        self._is_ready = True
        self._admin = self._make_admin(store)
        try:
            await self._admin.start()
        except OSError as error:
            host, port = self.settings.admin
            raise OSError(error.errno, f"the admin API can't be served on {host}:{port}: {error.strerror}") from None
        if self.settings.webhook is not None:
            await self._serve_webhook(*self.settings.webhook)
        if self._registry.workloads:
            self._forget = loop.call_later(self.settings.grace, self._registry.forget)

    async def stop(self) -> None:
        """Stop serving; clients go on with what they have. Idempotent; nothing is left running."""
        self._is_ready = False
        self._registry.freeze()
        self._stop_watching.set()
        for task in (self._writing, self._following):
            if task is not None:
                task.cancel()
                await asyncio.wait((task,))
        self._writing = self._following = None
        if self._kube is not None:
            await self._kube.close()
            self._kube = None
        if self._forget is not None:
            self._forget.cancel()
        if self._webhook is not None:
            await self._webhook.stop()
            self._webhook = None
        if self._admin is not None:
            await self._admin.stop()
            self._admin = None
        if self._server is not None:
            if self._certificates is not None:
                self._certificates.close()
            await self._ads.close()
            await self._server.stop(None)
            self._server = None
        if self._token_client is not None:
            await self._token_client.close()
            self._token_client = None
        if self._http is not None:
            await self._http.aclose()
            self._http = None
        if self._scraped is not None:
            await self._scraped.close()
        if self._updates is not None:
            self._updates.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._updates
            self._updates = None
        if self._watcher is not None:
            await asyncio.to_thread(self._watcher.join)
            self._watcher = None
        if self._monitoring is not None:
            await self._monitoring.stop()
            self._monitoring = None
        if self._store is not None:
            self._registry.save()
            self._store.close()
            self._store = None

    @property
    def xds_address(self) -> str:
        return f"{_authority(self.settings.xds[0])}:{self.xds_port}"

    @property
    def admin_url(self) -> str:
        assert self._admin is not None
        return self._admin.url

    @property
    def webhook_url(self) -> str:
        assert self._webhook is not None
        return self._webhook.url

    @property
    def metrics_url(self) -> str:
        assert self._monitoring is not None
        return f"{self._monitoring.url}/metrics"

    @property
    def local_admin_url(self) -> str:
        """As this machine reaches it."""
        assert self._admin is not None
        return self._admin.url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")

    @property
    def roots(self) -> str:
        """PEM of the roots that vouch for this control plane."""
        return self.authority.bundle.decode("ascii") if self.authority is not None else ""

    # Changes

    def _watch(self, store: ObjectStore, loop: asyncio.AbstractEventLoop, has_read: asyncio.Event) -> None:
        """On a thread of its own."""
        told: frozenset[str] = frozenset()
        try:
            for contents in Folder(self.settings.folders).watch(self._stop_watching):
                store.set_folder(contents.objects, contents.problems, contents.warnings)
                found = frozenset(map(str, contents.problems))
                for problem in sorted(found - told):
                    logger.warning("%s", problem)
                told = found
                with contextlib.suppress(RuntimeError):  # the loop ended while we were reading
                    loop.call_soon_threadsafe(has_read.set)
        except Exception:
            logger.exception("the folders are no longer watched")
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(has_read.set)

    async def _follow(self, cluster: KubeSettings, store: ObjectStore) -> None:
        """Returns when all was listed once."""
        has_read = asyncio.Event()
        told: set[str] = set()

        def take(update: Update) -> None:
            store.update_kubernetes(update)
            found = set(map(str, update.problems))
            for problem in sorted(found - told):
                logger.warning("%s", problem)
            told.clear()
            told.update(found)
            has_read.set()
            if self._statuses is not None:
                self._statuses.wake()

        self._kube = KubeClient(cluster)
        self._kubernetes = KubernetesSource(self._kube, take)
        self._following = asyncio.create_task(self._kubernetes.run(), name="kubernetes")
        reading = asyncio.create_task(has_read.wait())
        await asyncio.wait((self._following, reading), return_when=asyncio.FIRST_COMPLETED)
        reading.cancel()
        if self._following.done():
            self._following.result()
        self._following.add_done_callback(_log_end)

    def _write_status(self, cluster: KubeSettings, store: ObjectStore) -> None:
        assert self._kube is not None and self._kubernetes is not None
        identity = f"{socket.gethostname()}_{secrets.token_hex(4)}"
        self._statuses = StatusWriter(
            self._kube,
            self._kubernetes,
            lambda: (store.objects(), store.problems()),
            namespace=cluster.namespace,
            identity=identity,
            joined=lambda: joined_hosts(self._workloads),
        )
        self._writing = asyncio.create_task(self._statuses.run(), name="status writer")
        self._writing.add_done_callback(_log_end)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """From any thread."""
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._changed.set)

    async def _keep_updating(self, store: ObjectStore) -> None:
        while True:
            await self._changed.wait()
            deadline = time.monotonic() + LONGEST
            while self._changed.is_set() and time.monotonic() < deadline:
                self._changed.clear()
                await asyncio.sleep(QUIET)
            self._changed.clear()
            try:
                await self._update(store)
            except Exception:
                # A defect of ours: everybody keeps what they have, and the next change gets its chance.
                logger.exception("the change can't be used")

    async def _update(self, store: ObjectStore) -> None:
        began = time.monotonic()
        objects, workloads = store.objects(), self._registry.workloads
        if self.settings.is_secure:  # else nobody has proven whose service account it has
            workloads = await asyncio.to_thread(self._claims.admitted, objects, workloads)
        self._listed = await asyncio.to_thread(_endpoints, objects, workloads, self._listed)
        endpoints = tuple(each.endpoints for each in self._listed.values())
        self._workloads = workloads
        self._taps.follow(endpoints)
        await self._cache.update(objects, workloads, self.callers(), self._taps.workloads)
        self._endpoints = endpoints
        if (rules := parts_of(objects).rules) is not self._badged:
            self._check_trust_domain(rules)
            self._badged, self._badges = rules, await asyncio.to_thread(badges_of, rules)
        await asyncio.to_thread(self._registry.save, workloads)
        took = (time.monotonic() - began) * 1000
        logger.info("%d objects, %d workloads; made in %.0f ms", len(objects), len(workloads), took)

    def _check_trust_domain(self, objects: Sequence[Object]) -> None:
        found = tuple(trust_domain_warnings(objects, self.settings.trust_domain))
        for each in found:
            if each not in self._trust_domain:
                logger.warning("%s", each)
        self._trust_domain = found

    def _open_store(self) -> ObjectStore:
        settings = self.settings
        file = settings.audit or (settings.state / "audit.jsonl" if settings.state is not None else None)
        self._audit = AuditLog(file)
        self._audit.on_entries(self._history.add)
        return ObjectStore(settings.state, audit=self._audit)

    def _make_admin(self, store: ObjectStore) -> AdminServer:
        settings, authority = self.settings, self.authority
        assert authority is not None and self._administrators is not None and self._audit is not None
        own = OwnIdentity(authority, (settings.admin[0], *settings.names))
        access = self._administrators.access
        app = admin_app(
            store,
            self,
            allowed_hosts=own.names,
            routes=self._admin_routes(self._audit),
            administrators=self._administrators,
            audit=self._audit,
            is_loopback=settings.is_admin_local,
            is_read_only=settings.is_read_only,
        )
        tls = None
        if not settings.is_admin_local:
            tls = admin_context(
                own,
                lambda: authority.bundle + (access.rules().roots if access is not None else b""),
                authority.on_change,
            )
        return AdminServer(app, *settings.admin, tls)

    def _admin_routes(self, audit: AuditLog) -> list[Route]:
        settings, routes = self.settings, self._picture.routes() + self._what_if.routes()
        assert self.tokens is not None and self.authority is not None and self._certificates is not None
        may_make = settings.is_admin_local or settings.access is not None
        routes += TokenRoutes(self.tokens, self.authority, may_make, audit).routes()
        routes += AuthorityRoutes(self.authority, self._certificates.late, audit).routes()
        routes += (
            Inspection(self._ads.inspected, lambda: self._telemetry.gauges(time.time())).routes()
            + self._metrics.routes()
            + self._loads.routes()
        )
        routes += TapRoutes(self._taps, self._telemetry, self, audit).routes()
        routes += LogRoutes(self._taps, self._logs, self, audit).routes()
        return routes + AuditRoutes(audit).routes()

    def _token_shelf(self, folder: Path | None) -> Shelf:
        settings = self.settings
        if settings.token_secret is None or settings.cluster is None:
            return FileShelf(folder / "tokens.json" if folder is not None else None)
        self._token_client = KubeClient(settings.cluster)
        return SecretShelf(self._token_client, *settings.token_secret)

    async def _plugged(self) -> PluggedAuthority | PemAuthority | Path | None:
        settings = self.settings
        if settings.ca_secret is None or settings.cluster is None:
            return settings.plugged_ca
        async with KubeClient(settings.cluster) as client:
            return await shared_authority(client, *settings.ca_secret, settings.trust_domain)

    def _open_authority(self, plugged: PluggedAuthority | PemAuthority | Path | None) -> None:
        settings = self.settings
        folder = settings.state / "ca" if settings.state is not None else None
        authority = self.authority = CertificateAuthority(settings.trust_domain, folder, plugged)
        self.tokens = JoinTokens(self._token_shelf(folder))
        kubernetes = settings.kubernetes
        access = AccessFile(settings.access) if settings.access is not None else None
        if kubernetes is not None or settings.issuers or access is not None:
            ca_file = kubernetes.ca_file if kubernetes is not None else None
            verify = ssl.create_default_context(cafile=ca_file)
            self._http = httpx.AsyncClient(verify=verify, trust_env=False)
        authenticator = Authenticator(
            settings.trust_domain,
            lambda: authority.bundle,
            self.tokens,
            issuers=settings.issuers,
            kubernetes=kubernetes,
            http=self._http,
        )
        self._administrators = Administrators(
            access,
            trust_domain=settings.trust_domain,
            roots=lambda: authority.roots,
            kubernetes=kubernetes,
            http=self._http,
            replays=authenticator.replays,
        )
        self._certificates = CertificateService(authority, authenticator, self._metrics)
        self._ads.authenticate_by(authenticator, is_required=settings.is_secure)
        self._ads.issue_by(authority)
        self._picture.receiver.authenticate_by(
            authenticator, self._registry.accounts, grpc=settings.is_secure, http=access is not None
        )

    async def _serve_metrics(self, host: str, port: int) -> None:
        self._monitoring = AdminServer(monitoring_app(self.is_ready, self._metrics), host, port)
        try:
            await self._monitoring.start()
        except OSError as error:
            raise OSError(error.errno, f"metrics can't be served on {host}:{port}: {error.strerror}") from None

    async def _serve_webhook(self, host: str, port: int) -> None:
        authority = self.authority
        assert authority is not None
        own = OwnIdentity(authority, (host, *self.settings.names))
        app = admission_app(self.settings.injection, lambda: authority.bundle.decode("ascii"))
        self._webhook = AdminServer(app, host, port, admin_context(own, lambda: authority.bundle, authority.on_change))
        try:
            await self._webhook.start()
        except OSError as error:
            raise OSError(error.errno, f"webhooks can't be served on {host}:{port}: {error.strerror}") from None

    async def _serve_xds(self) -> None:
        server = self._server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 0),  # else a second control plane would take half of the clients, silently
                ("grpc.max_receive_message_length", 16 * 1024 * 1024),
                # A client whose machine is gone says nothing; without pings it would stay an endpoint for hours.
                ("grpc.keepalive_time_ms", 10_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
            )
        )
        assert self.authority is not None and self._certificates is not None and self._administrators is not None
        self._ads.add_to(server)
        ClientStatusService(self._ads.by_client, self._administrators, is_secure=self.settings.is_secure).add_to(server)
        LoadReportingService(self._loads, self._ads.identity_of, self._clusters_of).add_to(server)
        self._certificates.add_to(server)
        self._picture.receiver.add_to(server)
        host, port = self.settings.xds
        try:
            if self.settings.is_secure:
                own = OwnIdentity(self.authority, (host, *self.settings.names))
                self.xds_port = server.add_secure_port(f"{_authority(host)}:{port}", own.server_credentials())
            else:
                self.xds_port = server.add_insecure_port(f"{_authority(host)}:{port}")
        except RuntimeError as error:  # gRPC tells the reason on stderr only
            raise OSError(
                errno.EADDRINUSE, f"xDS can't be served on {_authority(host)}:{port}: is it taken?"
            ) from error
        await server.start()

    async def _clusters_of(self, node: Node) -> list[str]:
        return sorted((await self._cache.view(node)).resources[CLUSTER])

    # What the admin API asks

    def _state(self) -> State:
        store, authority = self._store, self.authority
        problems = (*(store.problems() if store is not None else ()), *self._cache.problems(), *self._trust_domain)
        roots = x509.load_pem_x509_certificates(authority.bundle) if authority is not None else ()
        return State(
            self.clients(),
            len(self._endpoints),
            Counter(each.kind for each in self.objects()),
            Counter(problem_of(each).level for each in problems),
            min((each.not_valid_after_utc.timestamp() for each in roots), default=0.0),
        )

    def is_ready(self) -> bool:
        return self._is_ready

    def objects(self) -> Sequence[Object]:
        return self._store.objects() if self._store is not None else ()

    def workloads(self) -> Sequence[Workload]:
        return self._registry.workloads

    def callers(self) -> Sequence[Node]:
        return [*self._registry.nodes, _ANYBODY]

    def badges(self) -> Mapping[str, tuple[str, ...]]:
        return self._badges

    def clients(self) -> list[api.Client]:
        return list(self._ads.clients())

    def endpoints(self) -> Sequence[api.ServiceEndpoints]:
        return self._endpoints

    def problems(self) -> Sequence[api.Problem]:
        """Of the translations: references that lead nowhere, conflicts. They are in force, as far as they can be."""
        troubles = self._kubernetes.troubles() if self._kubernetes is not None else ()
        found = (*self._cache.problems(), *self._trust_domain, *troubles, *self._claims.refused, *self._idle())
        return [problem_of(problem) for problem in found]

    def _idle(self) -> Iterator[ConfigurationWarning]:
        """What selects nobody: a policy of access may be meant to close what it leaves open."""
        objects = self.objects()
        known = {(each.namespace, each.name, each.labels) for each in self._registry.workloads}
        known |= {(each.workload.namespace, each.workload.name, each.workload.labels) for each in self._registry.nodes}
        running = [Running(namespace, name, dict(labels)) for namespace, name, labels in known]
        return idle(objects, running, mesh_settings(objects).root_namespace)

    def __repr__(self) -> str:
        return f"<ControlPlane xDS {self.xds_address} {self._cache!r} {self._registry!r}>"


def _log_end(task: asyncio.Task[None]) -> None:
    """A defect of ours: what is known stays in force, and somebody should hear of it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s has ended", task.get_name(), exc_info=error)


def _endpoints(
    objects: tuple[Object, ...], workloads: tuple[Workload, ...], before: Mapping[int, _Listed]
) -> dict[int, _Listed]:
    """Every service with the addresses behind it, in order, by the service's id. before: of the last time, since most
    services are the very same after a change."""
    found: dict[int, _Listed] = {}
    services = world_of(objects, workloads).registry.services.values()
    for service in sorted(services, key=lambda each: (each.namespace, each.host)):
        known = before.get(id(service))
        if known is None or known.service is not service:
            known = _Listed(service, _listed(service))
        found[id(service)] = known
    return found


class _Listed(NamedTuple):
    """With the service itself, so that its id is nobody else's."""

    service: Service
    endpoints: api.ServiceEndpoints


def _listed(service: Service) -> api.ServiceEndpoints:
    """One that serves several ports of a service is there once for each."""
    endpoints = {
        instance.endpoint.authority: api.ServiceEndpoint(
            address=instance.endpoint.authority,
            workload=instance.endpoint.workload,
            labels=dict(instance.labels),
            locality=str(instance.endpoint.locality),
            health=instance.endpoint.health.value,
            port=port.name,
        )
        for port in service.ports
        for instance in service.instances.get(port.number, ())
    }
    ports = tuple(port.number for port in service.ports)
    listed = tuple(endpoints[key] for key in sorted(endpoints))
    return api.ServiceEndpoints(service.short or service.host, service.namespace, service.host, ports, listed)


def _authority(host: str) -> str:
    return f"[{host}]" if ":" in host else host
