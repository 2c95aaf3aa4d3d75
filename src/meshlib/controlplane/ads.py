"""How does configuration get to everybody? envoy.service.discovery.v3.AggregatedDiscoveryService, on grpc.aio, and
for clients that want one type, or a stream for each, the service of that type. An order there is only on one stream.

A stream is one coroutine that reads and writes, and one that waits for the next request; what to say is decided in
subscriptions.py. A stream that is not read by its client waits in `write`, and what changes meanwhile is sent together:
nothing is queued for it, and nobody else waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import grpc.aio
import msgspec
from google.protobuf.message import DecodeError

from meshlib.controlplane import admin_api as api
from meshlib.controlplane import inspection
from meshlib.controlplane.authentication import Authenticator
from meshlib.controlplane.ca import CertificateAuthority
from meshlib.controlplane.ca_service import caller_of
from meshlib.controlplane.cache import Cache
from meshlib.controlplane.name_sets import names_of
from meshlib.controlplane.own_metrics import OwnMetrics, scraped_at
from meshlib.controlplane.registry import Registry
from meshlib.controlplane.secrets import SecretsOf, WithSecrets
from meshlib.controlplane.sight import Seen
from meshlib.controlplane.subscriptions import ABSENT, Answer, DeltaStream, Request, SotwStream
from meshlib.errors import InvalidResource
from meshlib.model import INBOUND_PREFIX, SERVER_PREFIX, Node, SpiffeId
from meshlib.version import __version__
from meshlib.xds import messages as m
from meshlib.xds.decode import decode_node
from meshlib.xds.reader import Dialect, Reader, reader_of
from meshlib.xds.resource_types import LISTENER, PUSH_ORDER, SECRET, SERVICES, SHORT_NAMES

logger = logging.getLogger("meshlib.controlplane")

CLOSE_TIMEOUT = 1.0
"""Seconds."""
MAX_WAITING = 1000
MAX_WAITING_BYTES = 16 * 1024 * 1024
"""Requests of one stream that are read but not looked at yet; a client that sends more waits."""
MAX_NAMES = 200_000
"""What one stream may ask for, all types together; each counts up to three times. A client that asks for millions
would hold up all others, and fill the memory. Our own client asks for 2,000 hosts at most."""


class Connection:
    """One open stream of a client that has said who it is."""

    def __init__(
        self, node: Node, state: DeltaStream | SotwStream, peer: str, identity: SpiffeId | None = None, only: str = ""
    ) -> None:
        """only: the one type that the stream has; "" for all."""
        self.node, self.state, self.peer, self.identity, self.only = node, state, peer, identity, only
        self.opened = time.time()
        self.seen: Seen | None = None
        self.behind_since: float | None = None
        """Monotonic seconds: when the change began that the client has not accepted yet."""
        self.secrets = SecretsOf(None, None)
        self.registered: Node | None = None
        """As the registry knows it."""

    @property
    def reader(self) -> Reader:
        return reader_of(
            self.node,
            is_known=self.identity is not None,
            has_ads=not self.only,
            is_delta=isinstance(self.state, DeltaStream),
        )

    @property
    def serving(self) -> Node:
        """The node as others may know it. A client that is not ours can't say when its port accepts calls: it does from
        when it has accepted the listener for it."""
        if not self.node.ready or self.reader.dialect not in (Dialect.GRPC, Dialect.ENVOY):
            return self.node
        listeners = self.state.subscriptions.get(LISTENER)
        is_server = listeners is not None and (listeners.is_wildcard or any(map(is_inbound, listeners.names)))
        if is_server and listeners is not None and listeners.accepted:
            return self.node
        return replace(self.node, ready=False)

    def with_secrets(self, seen: Seen) -> Seen:
        """What an Envoy sees, with its secrets: the same object until something of it has changed."""
        if self.reader.dialect is not Dialect.ENVOY or SECRET not in self.state.subscriptions:
            return seen
        secrets = self.secrets.now(self.node.certificates)
        before = self.seen
        if isinstance(before, WithSecrets) and before.seen is seen and before.secrets is secrets:
            return before
        return WithSecrets(seen, secrets)

    def received(self, request: Request) -> None:
        if request.error is not None:
            name = SHORT_NAMES.get(request.type_url, request.type_url)
            logger.warning("%s refuses %s", self.node.id, _printable(f"{name} {request.nonce}: {request.error}"))
        self.state.received(request)

    def client(self) -> api.Client:
        """As the admin API shows it."""
        node, workload = self.node, self.node.workload
        parts = node.id.split("~")
        address = f"[{workload.address}]" if ":" in workload.address else workload.address
        return api.Client(
            name=parts[2] if len(parts) == 4 else node.id,
            id=node.id,
            namespace=workload.namespace,
            workload=workload.name,
            service=workload.service,
            kind=node.kind.value,
            user_agent=node.user_agent,
            address=f"{address}:{workload.port}" if workload.port else "",
            ready=node.ready,
            connected=self.opened,
            types={
                SHORT_NAMES.get(type_url, type_url.rpartition(".")[2]): subscription.status
                for type_url, subscription in self.state.subscriptions.items()
            },
            metrics=scraped_at(workload.address, node.metrics_port, self.peer),
            versions={
                SHORT_NAMES.get(type_url, type_url.rpartition(".")[2]): subscription.accepted
                for type_url, subscription in self.state.subscriptions.items()
                if subscription.accepted
            },
            errors=tuple(
                f"{SHORT_NAMES.get(type_url, type_url)}: {subscription.error}"
                for type_url, subscription in self.state.subscriptions.items()
                if subscription.error
            ),
        )

    def inspected(self) -> inspection.Client | None:
        """As `meshctl config` looks into it; None before it was sent anything."""
        if self.seen is None:
            return None
        view, catches_all = self.seen, self.state.has_catch_all
        found = [
            (type_url, view.find(type_url, name, has_catch_all=catches_all))
            for type_url, subscription in self.state.subscriptions.items()
            for name, version in subscription.sent.items()
            if version != ABSENT and type_url in PUSH_ORDER  # and no secrets
        ]
        shown, workload = self.client(), self.node.workload
        sent = tuple((type_url, each.data) for type_url, each in found if each is not None)
        return inspection.Client(
            shown.name,
            shown.id,
            workload.name,
            workload.namespace,
            view.snapshot.version,
            sent,
            lambda: _everything(view),
        )


def _everything(view: Seen) -> tuple[tuple[str, bytes], ...]:
    return tuple((type_url, each.data) for type_url in PUSH_ORDER for each in view.resources[type_url].values())


def _as_one(streams: Sequence[api.Client]) -> api.Client:
    """The same client on each of its streams."""
    return msgspec.structs.replace(
        streams[0],
        ready=any(each.ready for each in streams),
        connected=min(each.connected for each in streams),
        types={name: status for each in streams for name, status in each.types.items()},
        versions={name: version for each in streams for name, version in each.versions.items()},
        errors=tuple(error for each in streams for error in each.errors),
    )


class AggregatedDiscoveryService:
    """Serves views from `cache`, and tells `registry` who is connected. Belongs to one event loop."""

    def __init__(
        self,
        cache: Cache,
        registry: Registry,
        metrics: OwnMetrics | None = None,
        *,
        ttls: Mapping[str, float] = {},
    ) -> None:
        """ttls: for how many seconds resources of a type are good, where a client heeds it."""
        self._ttls = ttls
        self._cache, self._registry, self._metrics = cache, registry, metrics
        self._numbers = itertools.count(1)
        self._connections: dict[int, Connection] = {}
        self._tasks: dict[asyncio.Event, asyncio.Task[Any] | None] = {}
        """One for each open stream, by what wakes it."""
        self._is_closing = False
        self._authenticator: Authenticator | None = None
        self._is_identity_required = False
        self._authority: CertificateAuthority | None = None

    def authenticate_by(self, authenticator: Authenticator, *, is_required: bool) -> None:
        """Callers who show a token are held to it; who shows none is served unless it is required."""
        self._authenticator, self._is_identity_required = authenticator, is_required

    def issue_by(self, authority: CertificateAuthority) -> None:
        """Envoys that prove who they are get their certificates over SDS."""
        self._authority = authority
        authority.on_change(self._wake)

    def _wake(self) -> None:
        for news in self._tasks:
            news.set()

    def add_to(self, server: grpc.aio.Server) -> None:
        services = {m.ADS_SERVICE: self._methods("AggregatedResources")}
        for type_url, (service, plural) in SERVICES.items():
            services[service] = self._methods(plural, type_url)
        server.add_generic_rpc_handlers(
            tuple(grpc.method_handlers_generic_handler(service, methods) for service, methods in services.items())
        )

    def _methods(self, plural: str, only: str = "") -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Bytes both ways. gRPC would answer requests that it can't parse with UNKNOWN, and a traceback of ours;
        responses are joined from what is shared."""
        both = {"Stream": self._state_of_the_world, "Delta": self._delta}
        return {
            f"{variant}{plural}": grpc.stream_stream_rpc_method_handler(partial(serve, only=only), None, None)
            for variant, serve in both.items()
        }

    def clients(self) -> Collection[api.Client]:
        """All whose streams are open and who have said who they are."""
        return [_as_one([each.client() for each in streams]) for streams in self.by_client()]

    def inspected(self) -> list[inspection.Client]:
        """All clients that were sent something."""
        found = ([known for known in (each.inspected() for each in streams) if known] for streams in self.by_client())
        return [parts[0]._replace(sent=tuple(each for part in parts for each in part.sent)) for parts in found if parts]

    def by_client(self) -> Iterable[list[Connection]]:
        """The streams that are open, of each client: one, or one for each type."""
        found: dict[Hashable, list[Connection]] = {}
        for number, each in self._connections.items():
            found.setdefault(each.node.id if each.only else number, []).append(each)
        return found.values()

    async def close(self) -> None:
        """End all streams, before the server is stopped: that does not wait for what it cancels, nor tell clients why.

        A stream whose client does not read is left to the server.
        """
        self._is_closing = True
        self._wake()
        tasks = [task for task in self._tasks.values() if task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT)

    async def _state_of_the_world(self, requests: Any, context: Any, only: str = "") -> None:
        await self._serve(context, SotwStream, m.DiscoveryRequest, _sotw_request, sotw_response, only)

    async def _delta(self, requests: Any, context: Any, only: str = "") -> None:
        await self._serve(context, DeltaStream, m.DeltaDiscoveryRequest, _delta_request, delta_response, only)

    async def _serve(
        self,
        context: Any,
        make_state: Callable[..., DeltaStream | SotwStream],
        message_class: Any,
        read: Callable[[Any], Request],
        write: Callable[[Answer], bytes],
        only: str,
    ) -> None:
        """only: the one type that is served; "" for all of them."""
        identity = await self.identity_of(context)
        number = next(self._numbers)
        connection: Connection | None = None
        waiting: deque[bytes] = deque()
        size = 0
        news, room = asyncio.Event(), asyncio.Event()
        is_over = False

        async def receive() -> None:
            nonlocal is_over, size
            while (data := await context.read()) is not grpc.aio.EOF:
                waiting.append(data)
                size += len(data)
                news.set()
                while len(waiting) >= MAX_WAITING or size >= MAX_WAITING_BYTES:
                    room.clear()
                    await room.wait()
            is_over = True
            news.set()

        receiving = asyncio.create_task(receive(), name=f"ads-{number}")
        # A read that fails (the connection is lost) ends the stream like its end does.
        receiving.add_done_callback(lambda _: news.set())
        self._tasks[news] = asyncio.current_task()

        def look() -> None:
            """At a change: most are for others, who are not to be waited for."""
            if connection is None or not self._is_for_others(connection):
                news.set()

        forget = self._cache.on_change(look)
        try:
            while True:
                if self._is_closing:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the control plane stops")
                was_asked = bool(waiting)
                while waiting:
                    data = waiting.popleft()
                    size -= len(data)
                    message = _parse(message_class, data, only)
                    room.set()
                    said = _node(message)
                    if said is not None and identity is not None and (wrong := not_allowed(said, identity)):
                        logger.warning("%s from %s is refused: %s", identity, context.peer(), _printable(wrong))
                        await context.abort(grpc.StatusCode.PERMISSION_DENIED, wrong)
                    if connection is None:
                        # What a client may ask for depends on who it is.
                        if said is None:
                            raise BadRequest("the first request must say who asks: node is missing")
                        is_ours = said.user_agent.startswith("meshlib")
                        state = make_state(has_catch_all=is_ours, ttls=self._ttls if said.takes_ttl else {})
                        connection = self._connections[number] = Connection(said, state, context.peer(), identity, only)
                        connection.secrets = SecretsOf(self._authority, identity)
                        logger.debug("%s connected from %s", said.id, connection.peer)
                    elif said is not None:
                        connection.node = said
                    request = read(message)
                    if request.error is not None and self._metrics is not None:
                        self._metrics.rejected(_short(request.type_url))
                    connection.received(request)
                    if (serving := connection.serving) != connection.registered:
                        connection.registered = serving
                        self._registry.attach(number, serving)
                    if connection.state.size > MAX_NAMES:
                        logger.warning("%s is sent away: it asks for too many names", connection.node.id)
                        await context.abort(
                            grpc.StatusCode.RESOURCE_EXHAUSTED, f"a stream may ask for {MAX_NAMES} names, no more"
                        )
                if is_over or receiving.done():
                    return
                if connection is not None:
                    seen = connection.with_secrets(await self._cache.seen(connection.node, connection.reader))
                    is_due = (connection.state.renew_at or math.inf) <= time.monotonic()
                    if was_asked or is_due or seen is not connection.seen:  # else the change was for others
                        if connection.seen is not None and connection.seen is not seen:
                            connection.behind_since = connection.behind_since or self._cache.changed_at
                        connection.seen = seen
                        for answer in connection.state.due(seen, time.monotonic()):
                            await context.write(write(answer))
                            if self._metrics is not None:
                                self._metrics.pushed(_short(answer.type_url))
                        if connection.behind_since is not None and connection.state.is_answered:
                            if self._metrics is not None:
                                self._metrics.converged(connection.behind_since)
                            connection.behind_since = None
                waking = _wake_for(connection, news)
                try:
                    await news.wait()
                finally:
                    for timer in waking:
                        timer.cancel()
                news.clear()
        except BadRequest as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            forget()
            del self._tasks[news]
            if connection is not None:
                del self._connections[number]
                self._registry.detach(number)
                logger.debug("%s disconnected", connection.node.id)
            receiving.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.RpcError, Exception):
                await receiving

    def _is_for_others(self, connection: Connection) -> bool:
        """Whether nothing of what has changed is this stream's; then it is brought up to date with that."""
        seen = self._cache.known(connection.node, connection.reader)
        if seen is None or connection.seen is None:
            return False
        seen = connection.with_secrets(seen)
        if seen is connection.seen:
            return True
        if connection.state.is_concerned(seen):
            return False
        connection.seen = seen
        return True

    async def identity_of(self, context: Any) -> SpiffeId | None:
        """Who asks, as its token proves it; None for a caller without one, where that is allowed."""
        has_token = any(key == "authorization" for key, _ in context.invocation_metadata() or ())
        if self._authenticator is None or not (has_token or self._is_identity_required):
            return None
        caller = await caller_of(context, self._authenticator)
        if caller.identity is None:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "configuration is for workloads")
        return caller.identity

    def __repr__(self) -> str:
        return f"<AggregatedDiscoveryService {len(self._connections)} streams>"


def _wake_for(connection: Connection | None, news: asyncio.Event) -> list[asyncio.TimerHandle]:
    """When secrets or times to live have to be renewed."""
    if connection is None:
        return []
    waits = []
    if connection.secrets.renew_at:
        waits.append(connection.secrets.renew_at - time.time())
    if (renew_at := connection.state.renew_at) is not None:
        waits.append(renew_at - time.monotonic())
    return [asyncio.get_running_loop().call_later(max(0.0, wait), news.set) for wait in waits]


class BadRequest(Exception):
    """What a client sent can't be understood. The message is for its author."""


def _short(type_url: str) -> str:
    """`CDS`; one name for all types that there is no name for, whatever a client asks for."""
    return SHORT_NAMES.get(type_url, "other")


def _parse(message_class: Any, data: bytes, only: str) -> Any:
    try:
        message = message_class.FromString(data)
    except DecodeError:
        raise BadRequest(f"this is no {message_class.DESCRIPTOR.name}") from None
    if only and message.type_url not in ("", only):
        raise BadRequest(f"type_url {message.type_url}: this service has {only}")
    message.type_url = message.type_url or only
    if not message.type_url:
        raise BadRequest("type_url is missing; an aggregated stream needs it in each request")
    return message


def _node(message: Any) -> Node | None:
    """Who asks, if the request says it. A client need not say it again, and does so when something has changed."""
    if not message.HasField("node"):
        return None
    try:
        return decode_node(message.node)
    except InvalidResource as error:
        raise BadRequest(f"node: {error.field} {error.reason}") from None


def not_allowed(node: Node, identity: SpiffeId) -> str:
    """Why this identity may not be this node, "" if it may: the id's namespace, too, is what others know it by."""
    workload = node.workload
    parts = node.id.split("~")
    named = parts[2].rpartition(".")[2] if len(parts) == 4 else identity.namespace
    said = (node.trust_domain, workload.namespace, workload.service_account)
    if said != (identity.trust_domain, identity.namespace, identity.service_account) or named != identity.namespace:
        return f"node {node.id} of {workload.namespace}/{workload.service_account} is not the caller's to be"
    return ""


def is_inbound(name: str) -> bool:
    """Whether a listener's name is that of a gRPC server's."""
    return name.startswith((INBOUND_PREFIX, SERVER_PREFIX))


def _printable(text: str) -> str:
    """On one line of a log, whoever wrote it; the admin API shows all of it."""
    return "".join(character if character.isprintable() else " " for character in text[:2000])


def _error(message: Any) -> str | None:
    if not message.HasField("error_detail"):
        return None
    return message.error_detail.message or f"refused with code {message.error_detail.code}, and no reason"


def _sotw_request(message: Any) -> Request:
    kind, nonce, error = message.type_url, message.response_nonce, _error(message)
    return Request(kind, names_of(message, "resource_names"), nonce=nonce, error=error)


def _delta_request(message: Any) -> Request:
    rest = (
        tuple(message.resource_names_unsubscribe),
        dict(message.initial_resource_versions),
        message.response_nonce,
        _error(message),
    )
    type_url = message.type_url
    return Request(type_url, names_of(message, "resource_names_subscribe"), *rest)


def sotw_response(answer: Answer) -> bytes:
    head = m.DiscoveryResponse(version_info=answer.version, type_url=answer.type_url, nonce=answer.nonce)
    head.control_plane.identifier = IDENTIFIER
    if answer.ttl:
        return b"".join((m.serialize(head), *_timed(answer, is_sotw=True)))
    return b"".join((m.serialize(head), *(each.in_sotw_response for each in answer.resources)))


def delta_response(answer: Answer) -> bytes:
    head = m.DeltaDiscoveryResponse(system_version_info=answer.version, type_url=answer.type_url, nonce=answer.nonce)
    head.control_plane.identifier = IDENTIFIER
    head.removed_resources.extend(answer.removed)
    if answer.ttl:
        return b"".join((m.serialize(head), *_timed(answer, is_sotw=False)))
    return b"".join((m.serialize(head), *(each.in_delta_response for each in answer.resources)))


def _timed(answer: Answer, *, is_sotw: bool) -> Iterable[bytes]:
    return (each.timed(answer.ttl, is_sotw=is_sotw, is_heartbeat=answer.is_heartbeat) for each in answer.resources)


IDENTIFIER = f"meshlib {__version__}"
