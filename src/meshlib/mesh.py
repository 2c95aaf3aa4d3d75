"""What does an application hold of the mesh? Mesh: reads the settings, starts the feeds, publishes `live`, stops all.

The composition root of the data plane: everything below is handed what it needs; only this file knows it all.
"""

from __future__ import annotations

import atexit
import os
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from meshlib.calls_out import CallsOut
from meshlib.errors import MeshClosed, SettingsError
from meshlib.feed import Feed
from meshlib.identity.holder import IdentityHolder
from meshlib.identity.tls import TlsContexts
from meshlib.model import (
    INBOUND_PREFIX,
    TLS_MODE,
    Endpoint,
    FeedState,
    Headers,
    NodeKind,
    ProcessState,
    QuotaService,
    Request,
    Snapshot,
    UpstreamTls,
)
from meshlib.policy import propagation
from meshlib.policy.call import CallContext
from meshlib.policy.live import Live
from meshlib.policy.observer import Call, Observer
from meshlib.policy.router import with_port
from meshlib.quota.edge import QuotaEdge
from meshlib.settings import DNS, ISTIO, Settings
from meshlib.sources import source_of

if TYPE_CHECKING:
    import grpc
    import grpc.aio

    from meshlib.discovery import Source
    from meshlib.identity.access import Access
    from meshlib.identity.credentials import Credentials, CredentialsSource
    from meshlib.inbound.admit import Reception
    from meshlib.inbound.grpc import Porch
    from meshlib.inbound.serve import Listening
    from meshlib.policy.explain import Explanation
    from meshlib.policy.guard import Guard
    from meshlib.state.breaker import Breaker
    from meshlib.telemetry.pipeline import Telemetry

F = TypeVar("F", bound=Callable[..., Any])

PROBES = 3
"""How often our own port may take five seconds for a handshake, before it is one for plaintext."""


class Mesh(CallsOut):
    """This process's place in the mesh. Make one and share it: it is thread-safe, and it survives a fork.

    Nothing is started before the first call or the first wrapped application. Also a context manager.
    """

    def __init__(self, settings: Settings, *, kind: NodeKind = NodeKind.SIDECAR) -> None:
        settings.check(kind)
        self.settings = settings
        self.node = settings.node(kind)
        self._rng = random.Random()
        self._has_reception = False
        self._listening: Listening | None = None
        self.tls = TlsContexts(lambda: self.credentials, has_identity=bool(settings.identity))
        """What connections are secured with."""
        workload = self.node.workload
        self._feed = Feed(
            settings,
            self._rng,
            self.tls,
            f"{workload.namespace}/{workload.name}",
            before_first=self._await_first_credentials,
            on_live=self._follow,
        )
        self._read_live = self._feed.read
        self._identity = IdentityHolder(self._make_credentials_source) if settings.identity else None
        self._forget_threads()
        self._transports: weakref.WeakSet[Any] = weakref.WeakSet()
        self.telemetry: Telemetry | None = None
        self._observer: Observer | None = None
        setup = settings.telemetry_setup()
        if setup.is_on:
            from meshlib.telemetry.pipeline import Telemetry

            to_control_plane = setup.target and setup.target == settings.control_plane
            access = self._access(setup.target) if to_control_plane else None
            self.telemetry = Telemetry(
                setup,
                self.node,
                self._read_live,
                access.channel if access is not None else None,
                (lambda: access.metadata(often=True)) if access is not None else tuple,
                self._process_state,
            )
            self._observer = self.telemetry.observer
        _instances.add(self)

    def _forget_threads(self) -> None:
        """The state of a Mesh that was never started; also what a forked child begins with."""
        self._lock = threading.Lock()
        self._is_started = False
        self._credentials_due = 0.0
        self._quotas = QuotaEdge(self._quota_channel)
        self._ready_thread: threading.Thread | None = None

    # Configuration in

    @property
    def live(self) -> Live:
        """What calls read now. One attribute read; replaced whole by the feed."""
        return self._feed.live

    def start(self) -> None:
        """Start the feeds, if they are not running. Called by the first call; call it to warm up before that.

        Raises MeshClosed after close(), SettingsError when the control plane's address can't be used.
        """
        with self._lock:
            if self._feed.closing.is_set():
                raise MeshClosed("this Mesh was closed: make another with meshlib.connect()")
            if self._is_started:
                return
            if self._identity is not None:
                self._credentials_due = time.monotonic() + self.settings.identity_timeout
                self._identity.start()
            if self.telemetry is not None:
                self.telemetry.start()
            if self.settings.control_plane:
                source = self._make_source()
                if self._has_reception:
                    self._want_inbound(source)
                self._feed.follow(source)
            else:
                self._feed.follow_nobody()
            self._is_started = True  # last: who reads it without the lock goes on with all that is above

    def _make_source(self) -> Source:
        return source_of(self.settings, self.node, lambda target: self._connect_feed(self._access(target)))

    # Who this process is

    @property
    def credentials(self) -> Credentials | None:
        """What proves who this process is, now; None before the first, and without `settings.identity`."""
        return self._identity.credentials if self._identity is not None else None

    def _process_state(self) -> ProcessState:
        """For metrics."""
        identity, feed = self._identity, self._feed_state
        if identity is None or identity.credentials is None:
            return ProcessState(feed)
        from meshlib.identity.held import held

        credentials = identity.credentials
        return ProcessState(feed, credentials.not_after, identity.rotations, held(credentials))

    def wait_for_credentials(self, timeout: float | None = None) -> Credentials | None:
        """`credentials`, waited for at most so many seconds (default `settings.identity_timeout`) where there are none
        yet. Starts the feeds. Raises MeshClosed after close()."""
        if self._identity is None:
            return None
        self.start()
        return self._identity.wait(self.settings.identity_timeout if timeout is None else timeout)

    def _await_first_credentials(self) -> None:
        """On the feed's thread, before the first configuration. It may have waited already, to connect: all waiting
        together ends `settings.identity_timeout` after the start. Where the configuration is from disk, since the
        control plane is away, no certificate will come from there: what needs none can be called at once."""
        feed = self._feed_state
        is_away = self.settings.identity == "control-plane" and feed is not None and not feed.is_connected
        if self._identity is not None and not is_away:
            self._identity.wait(max(0.0, self._credentials_due - time.monotonic()))

    @property
    def _feed_state(self) -> FeedState | None:
        """None where the configuration does not come from a control plane."""
        state: FeedState | None = getattr(self._feed.source, "state", None)
        return state

    def on_rotation(self, tell: Callable[[Credentials], None]) -> None:
        """`tell` is called with each new Credentials, the first too, on a thread of the mesh; it must not block. It
        outlives a fork."""
        if self._identity is not None:
            self._identity.on_rotation(tell)

    def _make_credentials_source(self, present: Credentials | None) -> CredentialsSource:
        from meshlib.identity.choice import credentials_source

        return credentials_source(self.settings.identity, self._access, self.settings.control_plane)

    def _access(self, target: str) -> Access:
        from meshlib.identity.choice import access_to

        settings = self.settings
        # An istiod has the token reviewed by the Kubernetes of this cluster.
        headers = (("clusterid", settings.cluster_id),) if settings.dialect == ISTIO else ()
        return access_to(target, settings.ca_roots, settings.token_file, lambda: self.credentials, headers)

    def _connect_feed(self, access: Access) -> Callable[[Any], tuple[Any, Any]]:
        def connect(options: Any) -> tuple[Any, Any]:
            channel = access.channel(options)
            if access.is_secure and not access.metadata() and self._identity is not None:
                # On the feed's thread. Whoever has nothing to show would be sent away.
                self._identity.wait(self.settings.identity_timeout)
            return channel, access.metadata()

        return connect

    def _follow(self, live: Live, snapshot: Snapshot) -> None:
        """This is in force now. On the feed's thread."""
        if self.telemetry is not None:
            self._observer = self.telemetry.follow(snapshot.reporting)
        self._quotas.prepare(service for limiter in live.limiters for service in limiter.services)

    # Calls out

    def call_context(self, deadline: float | None = None, may_resend: bool = False) -> CallContext:
        """What one outbound call needs (meshlib.policy.call)."""
        if not self._is_started:
            self.start()
        observer = self._observer
        quotas = self._quotas
        if observer is None:
            return CallContext(
                self._read_live, time.monotonic, self._rng, deadline, "", may_resend, False, "", None, None, quotas
            )
        call = Call(propagation.current.get())
        return CallContext(
            self._read_live, time.monotonic, self._rng, deadline, "", may_resend, False, "", observer, call, quotas
        )

    @property
    def quotas(self) -> QuotaEdge:
        """Who is asked about limits that others count."""
        return self._quotas

    def _quota_channel(self, service: QuotaService) -> grpc.Channel:
        from meshlib.outbound.function import authority
        from meshlib.outbound.grpc import MeshChannel

        return MeshChannel(_Unasked(self, service.route_configuration), authority(service.address), (), None)

    def _who_observes(self) -> Observer | None:
        return self._observer

    def resolve(self, authority: str) -> None:
        """Wait until the feed has said whether it knows `authority` (host:port), at most `resolve_timeout` seconds.

        A host that was not answered for once is not waited for again until the feed has any news.
        """
        self._feed.resolve(authority)

    async def resolve_async(self, authority: str) -> None:
        """`resolve`, without blocking the loop."""
        await self._feed.resolve_async(authority)

    async def next_live(self, seen: Live) -> Live:
        """What calls read, once it is no longer `seen`: for those who follow the configuration itself (a gateway).
        Raises MeshClosed when the Mesh is closed before that."""
        return await self._feed.next_live(seen)

    def explain(self, method: str, url: str, headers: Mapping[str, str] | None = None) -> Explanation:
        """What would happen to this request now, and why: routes, endpoints, policies and where they come from.
        `print` it. Sends nothing and counts nothing.

        Waits for the feed's answer about a host that was not asked for before, as a call would.
        """
        from meshlib.policy.explain import explain, request_of

        request = request_of(method, url, (headers or {}).items())
        self.start()
        if self._feed.live.router.match(request) is None:
            self.resolve(with_port(request.authority, request.scheme))
        return explain(self._feed.live, request)

    def breaker(self, host: str, subset: str = "") -> Breaker | None:
        """The circuit breaker of a destination, a pybreaker.CircuitBreaker: to add listeners, to look at it, to open or
        close it by hand. None when the configuration gives it none.

        host: `reviews:9080`, as in a URL. Waits for the feed's answer about a host that was not asked for before. Stays
        the same object as long as the destination has a breaker.
        """
        self.start()
        authority = with_port(host.lower(), "http")
        self.resolve(authority)
        live = self._feed.live
        _, decisions = live.router.looked_at(Request("GET", "http", authority, "/", Headers()))
        for decision in decisions:
            for chosen in getattr(decision.action, "clusters", ()):
                cluster = live.cluster(chosen.cluster)
                if cluster is not None and cluster.cluster.subset == subset and cluster.breaker is not None:
                    return cluster.breaker
        return None

    # Calls in

    def asgi(self, app: Any) -> Any:
        """An ASGI application around `app`: what a request brings (trace context, deadline, the forwarded headers)
        is handed to the outbound calls made while it is served. Registers this process once it serves."""
        from meshlib.inbound.asgi import MeshASGI

        _ = self.listening  # servers that make their own workers find it
        return MeshASGI(
            app,
            forward_headers=self.settings.forward_headers,
            on_serving=self.serve,
            reception=self.reception(),
            observer=self._who_observes,
        )

    def wsgi(self, app: Any) -> Any:
        """`asgi`, for a WSGI application."""
        from meshlib.inbound.wsgi import MeshWSGI

        _ = self.listening
        return MeshWSGI(
            app,
            forward_headers=self.settings.forward_headers,
            on_serving=self.serve,
            reception=self.reception(),
            observer=self._who_observes,
        )

    def grpc_server_interceptors(self, port: int = 0) -> list[Any]:
        """Interceptors for `grpc.server(pool, interceptors=[...])`, before any others: who may call, what a request
        brings, and what is measured, as `asgi` does it for HTTP. Registers this process once it serves.

        port: the one that the server listens on, which gRPC does not tell; default that of `settings.address`.
        """
        from meshlib.inbound.grpc import MeshServerInterceptor

        return [MeshServerInterceptor(self._porch(port))]

    def grpc_aio_server_interceptors(self, port: int = 0) -> list[Any]:
        """`grpc_server_interceptors`, for `grpc.aio.server(interceptors=[...])`."""
        from meshlib.inbound.grpc import MeshAioServerInterceptor

        return [MeshAioServerInterceptor(self._porch(port))]

    def grpc_server_credentials(self) -> grpc.ServerCredentials:
        """For `server.add_secure_port(address, ...)`, sync and aio: mutual TLS with this process's identity. Each
        handshake shows the present certificate; clients have to prove an identity of our trust domain.

        Waits at most `settings.identity_timeout` for the first certificate. Raises NoCredentials (an OSError) where
        there is none by then.
        """
        from meshlib.inbound.grpc import server_credentials

        self.wait_for_credentials()
        return server_credentials(self.tls)

    def _porch(self, port: int) -> Porch:
        from meshlib.inbound.grpc import Porch

        self.serve()  # no hook of gRPC's tells that a server has started; our own port is asked
        return Porch(
            self.reception(), self._who_observes, port or self.node.workload.port, self.settings.forward_headers
        )

    def metrics(self, accept: str = "") -> tuple[str, bytes]:
        """Content type and body for Prometheus, to be served by a route of the application's own; what all workers of
        this server have counted where `settings.prometheus` is set, and this process otherwise.

        accept: the scrape's Accept header; OpenMetrics, with exemplars, is answered where it is asked for. Raises
        SettingsError where telemetry is off.
        """
        if self.telemetry is None:
            raise SettingsError("telemetry is off: set MESHLIB_TELEMETRY or MESHLIB_PROMETHEUS")
        return self.telemetry.exposition(accept)

    @property
    def listening(self) -> Listening:
        """How connections are taken: mTLS, plaintext or both on one port, as PeerAuthentication says; for servers
        (`uvicorn.run(app, http=mesh.listening.uvicorn)`)."""
        if self._listening is None:
            from meshlib.inbound.serve import Listening, register

            self._listening = Listening(
                self.tls,
                lambda port: self.inbound_guard().tls_mode(port),
                # Which path it asks for is known only when it has been read: the middleware denies the others.
                takes_plaintext=bool(self.settings.probe_paths),
                await_certificate=lambda timeout: self._identity and self._identity.wait(timeout),
            )
            register(self._listening)
        return self._listening

    def reception(self) -> Reception:
        """Who may call this process: asked by the middleware with each request."""
        from meshlib.inbound.admit import Reception
        from meshlib.inbound.authorize import AuthorizationEdge

        self._has_reception = True
        source = self._feed.source
        if source is not None:
            self._want_inbound(source)
        edge = AuthorizationEdge(self.transport, self.grpc_channel)
        return Reception(self, edge, probe_paths=self.settings.probe_paths)

    def _want_inbound(self, source: Source) -> None:
        want = getattr(source, "want_inbound", None)  # only a control plane has to be asked
        if want is not None:
            workload = self.node.workload
            want(INBOUND_PREFIX + Endpoint(workload.address or "0.0.0.0", workload.port).authority)

    def inbound_guard(self) -> Guard:
        """The rules in force for calls that come in."""
        if not self._is_started:
            try:
                self.start()
            except MeshClosed:
                pass
        return self._feed.live.guard

    def await_inbound(self) -> Guard:
        """The rules, waiting at most `resolve_timeout` seconds for the first."""
        return self._feed.await_guard()

    async def await_inbound_async(self) -> Guard:
        """`await_inbound`, without blocking the loop."""
        return await self._feed.await_guard_async()

    def admits_unconfigured(self) -> bool:
        """Whether requests come in while no rules are known. A gateway's doors open with the first configuration; where
        that has no rules, it is another control plane's."""
        control_plane = self.settings.control_plane
        has_rules = bool(control_plane) and not control_plane.startswith(DNS) and self.node.kind is not NodeKind.ROUTER
        return not has_rules or self.settings.failure_policy == "allow"

    def serve(self) -> None:
        """Join the mesh as an endpoint of `settings.service`, as soon as `settings.address` accepts connections.

        Called by the middleware. Returns at once; does nothing without an address.
        """
        if not self.settings.address or self._feed.closing.is_set():
            return
        with self._lock:
            if self._ready_thread is not None:
                return
            self._ready_thread = threading.Thread(target=self._await_ready, name="meshlib-ready", daemon=True)
            self._ready_thread.start()

    def _await_ready(self) -> None:
        """Register when the port accepts. No server tells a library that it listens, so it is asked."""
        pause = 0.01
        while not self._feed.closing.is_set():
            try:
                with socket.create_connection((self.node.workload.address, self.node.workload.port), timeout=1.0):
                    pass
                break
            except OSError:
                self._feed.closing.wait(pause)
                pause = min(pause * 1.5, 0.5)
        if self._feed.closing.is_set():
            return
        try:
            self.start()
        except MeshClosed:
            return
        self.node = replace(self.node, ready=True)
        credentials = self.wait_for_credentials()
        self._announce(self._serves_mtls(credentials))
        # Without a certificate it is an endpoint for plaintext: where its port is STRICT, for nobody. One that comes
        # late, since the control plane could not be reached in time, is told of then.
        while credentials is None and self._identity is not None and not self._feed.closing.is_set():
            credentials = self._identity.wait(max(1.0, self.settings.identity_timeout))
            if credentials is not None:
                self._announce(self._serves_mtls(credentials))

    def _announce(self, serves_mtls: bool) -> None:
        """To the control plane: this endpoint may be called, and how."""
        if serves_mtls:
            labels = dict(self.node.workload.labels) | {TLS_MODE: "istio"}
            workload = replace(self.node.workload, labels=tuple(sorted(labels.items())))
            self.node = replace(self.node, workload=workload)
        set_ready = getattr(self._feed.source, "set_ready", None)
        if set_ready is not None:
            set_ready(self.node.workload)

    def _serves_mtls(self, credentials: Credentials | None) -> bool:
        """Whether the server at our own port shows our own certificate: seen by a handshake, as a caller would."""
        if credentials is None:
            return False
        rules = UpstreamTls("ISTIO_MUTUAL", subject_alt_names=(credentials.identity.uri,))
        address = (self.node.workload.address, self.node.workload.port)
        for _ in range(PROBES):
            try:
                with (
                    socket.create_connection(address, timeout=5.0) as plain,
                    self.tls.client(rules).wrap_socket(plain, server_hostname="meshlib"),
                ):
                    return True
            except TimeoutError:  # says nothing of a server whose machine is busy
                continue
            except OSError:
                break
        return False

    def _restart_after_fork(self) -> None:
        """In a forked child (gunicorn with preload, multiprocessing): threads and streams stayed in the parent. The
        child reads its copy of `live` and gets feeds, a node id and a registration of its own."""
        was_started, was_serving, was_closed = self._is_started, self._ready_thread is not None, self._closed
        self.node = self.settings.node(self.node.kind)
        if self._identity is not None:
            self._identity = self._identity.restarted()
        if self.telemetry is not None:
            self._observer = self.telemetry.restart_after_fork(self.node)
        _orphans.append(self._quotas)  # with connections of the parent's
        _orphans.extend(self._feed.forget_threads())
        self._forget_threads()
        if was_closed:
            self._feed.closing.set()
        elif was_started and (self.settings.control_plane or self.settings.identity or self.telemetry is not None):
            self.start()
        else:
            self._is_started = was_started
        if was_serving:
            self.serve()

    # The end

    @property
    def _closed(self) -> bool:
        return self._feed.closing.is_set()

    def close(self) -> None:
        """Leave the mesh: registration ends, feeds stop, sync connections close. Idempotent. Calls after it raise
        MeshClosed if the feeds were never started, and otherwise go on with the last configuration."""
        with self._lock:
            if self._feed.closing.is_set():
                return
            self._feed.closing.set()
            ready = self._ready_thread
        self._feed.close()
        if self._identity is not None:
            self._identity.stop()
        self._feed.join()
        if ready is not None and ready is not threading.current_thread():
            ready.join(5.0)
        if self.telemetry is not None:
            self.telemetry.stop()
        self._quotas.close()
        for transport in list(self._transports):
            transport.close()
        _instances.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # What holds a Mesh (a requests.Session) can be sent to another process, where there is one of its own.
        return _mesh_here, (self.settings, self.node.kind)

    def __repr__(self) -> str:
        return (
            f"<Mesh {self.node.workload.name} {self.settings.control_plane or 'no control plane'} {self._feed.live!r}>"
        )


class _Unasked:
    """A Mesh to those who ask about quotas: their own calls ask nobody, or the question would never end."""

    def __init__(self, mesh: Mesh, route_configuration: str) -> None:
        self._mesh, self._routes = mesh, route_configuration

    def call_context(self, deadline: float | None = None, may_resend: bool = False) -> CallContext:
        return self._mesh.call_context(deadline, may_resend)._replace(quotas=None, route_configuration=self._routes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mesh, name)


def connect(control_plane: str | os.PathLike[str] | None = None, **overrides: Any) -> Mesh:
    """A Mesh, with settings from the environment.

    control_plane: `host:port` of a control plane, a folder of YAML, `dns:` or `kubernetes:`; default
      MESHLIB_CONTROL_PLANE.
    overrides: any field of Settings. Starts nothing yet. Raises SettingsError for a setting that can't be used.
    """
    settings = Settings.from_environment()
    if control_plane is not None:
        overrides["control_plane"] = os.fspath(control_plane)
    if "labels" in overrides and isinstance(overrides["labels"], Mapping):
        overrides["labels"] = tuple(sorted(overrides["labels"].items()))
    if unknown := sorted(set(overrides) - set(Settings.__dataclass_fields__)):
        raise SettingsError(f"unknown setting {unknown[0]!r}; there are {', '.join(Settings.__dataclass_fields__)}")
    return Mesh(replace(settings, **overrides))


_instances: weakref.WeakSet[Mesh] = weakref.WeakSet()
_orphans: list[object] = []


def _mesh_here(settings: Settings, kind: NodeKind) -> Mesh:
    """The Mesh with these settings in this process, made if there is none."""
    for mesh in list(_instances):
        if mesh.settings == settings and mesh.node.kind is kind and not mesh._closed:
            return mesh
    return Mesh(settings, kind=kind)


def _after_fork_in_child() -> None:
    for mesh in list(_instances):
        mesh._restart_after_fork()


def _at_exit() -> None:
    """A program that just ends leaves the mesh as one that closes does: its endpoint goes at once, and no socket is
    left for the interpreter to complain about."""
    for mesh in list(_instances):
        mesh.close()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
