"""Which configuration does each client have, and what did it refuse? envoy.service.status.v3
ClientStatusDiscoveryService, as the control plane sees its clients.

Each type of a client begins with an entry without a name: the version that was accepted last, SYNCED, STALE, NOT_SENT
or ERROR, and the reason of the refusal that stands. Then comes each resource with its own version. A refusal is one of
a whole answer, so that all resources of this answer are NACKED.

Who may look is the admin API's business: viewers of a namespace see its clients, and its operators what they were
sent, as in `/v1/config`. Certificates and keys are nobody's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from meshlib.controlplane.access_rules import EVERYTHING, Powers, Role
from meshlib.controlplane.administrators import Administrators
from meshlib.controlplane.ads import Connection
from meshlib.controlplane.authentication import NotAuthenticated, TooManyFailures, bearer
from meshlib.controlplane.subscriptions import ABSENT, Subscription
from meshlib.xds import messages as m
from meshlib.xds.encode import encode_node
from meshlib.xds.resource_types import SECRET

logger = logging.getLogger("meshlib.controlplane.access")

MAX_MATCHERS = 100
MAX_BYTES = 64 * 1024 * 1024
"""Of one answer. A thousand clients with thousands of resources each are more than anybody reads at once."""
_STATUS = {"SYNCED": m.SYNCED, "STALE": m.STALE, "NACKED": m.ERROR, "NOT SENT": m.NOT_SENT}


class ClientStatusService:
    """Belongs to one event loop. clients: each client's open streams. is_secure: whether other machines reach this
    port; then nobody is answered unless the access file says who may."""

    def __init__(
        self,
        clients: Callable[[], Iterable[Sequence[Connection]]],
        administrators: Administrators,
        *,
        is_secure: bool,
    ) -> None:
        self._clients, self._administrators, self._is_secure = clients, administrators, is_secure

    def add_to(self, server: grpc.aio.Server) -> None:
        fetch: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(self._fetch, None, None)
        stream: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(self._stream, None, None)
        methods = {"FetchClientStatus": fetch, "StreamClientStatus": stream}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(m.CSDS_SERVICE, methods),))

    async def _fetch(self, data: bytes, context: Any) -> bytes:
        powers = await self._powers(context)
        return await self._answer(data, powers(), context)

    async def _stream(self, requests: Any, context: Any) -> None:
        """One answer for each request, by what the caller may do by then."""
        powers = await self._powers(context)
        while (data := await context.read()) is not grpc.aio.EOF:
            await context.write(await self._answer(data, powers(), context))

    async def _powers(self, context: Any) -> Callable[[], Powers]:
        administrators = self._administrators
        if administrators.is_open:
            if self._is_secure:
                await context.abort(
                    grpc.StatusCode.PERMISSION_DENIED,
                    "nobody has said who may look at clients: start the control plane with --access FILE",
                )
            return lambda: EVERYTHING
        headers = [str(value) for key, value in context.invocation_metadata() or () if key == "authorization"]
        if len(headers) != 1:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "show one token of an administrator (authorization)")
        try:
            who = await administrators.of_token(bearer(headers[0]), context.peer())
        except TooManyFailures:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "refused too often; wait a minute")
        except NotAuthenticated:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not good here, or not any more")
        if not administrators.powers(who).grants:
            logger.warning("%s from %s is refused: no role", who.name, context.peer())
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{who.name} has no role here")
        return lambda: administrators.powers(who)

    async def _answer(self, data: bytes, powers: Powers, context: Any) -> bytes:
        try:
            request = m.ClientStatusRequest.FromString(data)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this is no ClientStatusRequest")
        if problem := _problem(request):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        answer, size = m.ClientStatusResponse(), 0
        for streams in list(self._clients()):
            node = streams[0].node
            if not powers.sees(node.workload.namespace) or not _is_meant(request, node.id):
                continue
            may_read = powers.has(Role.OPERATOR, node.workload.namespace)
            config = _config(streams, with_contents=may_read and not request.exclude_resource_contents)
            size += config.ByteSize()
            if size > MAX_BYTES:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"more than {MAX_BYTES} bytes: name fewer clients, or set exclude_resource_contents",
                )
            answer.config.append(config)
            await asyncio.sleep(0)  # the streams of all clients are served by this loop
        return m.serialize(answer)

    def __repr__(self) -> str:
        return f"<ClientStatusService {self._administrators!r}>"


def _problem(request: Any) -> str:
    """What of a request can't be carried out. What is not understood must not look like "nobody fits"."""
    if len(request.node_matchers) > MAX_MATCHERS:
        return f"more than {MAX_MATCHERS} node_matchers"
    for position, matcher in enumerate(request.node_matchers):
        if matcher.node_metadatas:
            return f"node_matchers[{position}].node_metadatas: clients are chosen by node_id only"
        if matcher.node_id.WhichOneof("match_pattern") not in _PATTERNS:
            return f"node_matchers[{position}].node_id: one of {', '.join(_PATTERNS)}"
    return ""


_PATTERNS: dict[str, Callable[[str, str], bool]] = {
    "exact": str.__eq__,
    "prefix": str.startswith,
    "suffix": str.endswith,
    "contains": str.__contains__,
}


def _is_meant(request: Any, identity: str) -> bool:
    return not request.node_matchers or any(_fits(each.node_id, identity) for each in request.node_matchers)


def _fits(matcher: Any, identity: str) -> bool:
    kind = matcher.WhichOneof("match_pattern")
    wanted = getattr(matcher, kind)
    if matcher.ignore_case:
        wanted, identity = wanted.lower(), identity.lower()
    return _PATTERNS[kind](identity, wanted)


def _config(streams: Sequence[Connection], *, with_contents: bool) -> Any:
    config = m.ClientConfig(node=encode_node(streams[0].node))
    for connection in streams:
        for type_url, subscription in connection.state.subscriptions.items():
            config.generic_xds_configs.append(_summary(type_url, subscription))
            config.generic_xds_configs.extend(
                _resources(connection, subscription, with_contents=with_contents and type_url != SECRET)
            )
    return config


def _summary(type_url: str, subscription: Subscription) -> Any:
    entry = m.GenericXdsConfig(
        type_url=type_url, version_info=subscription.accepted, config_status=_STATUS[subscription.status]
    )
    if subscription.error:
        entry.client_status = m.RESOURCE_NACKED
        _set_error(entry, subscription, subscription.version)
    return entry


def _resources(connection: Connection, subscription: Subscription, *, with_contents: bool) -> Iterator[Any]:
    status, view = _STATUS[subscription.status], connection.seen
    latest = frozenset(subscription.latest)
    for name in sorted(subscription.sent.keys() | subscription.names):
        version = subscription.sent.get(name, ABSENT)
        entry = m.GenericXdsConfig(
            type_url=subscription.type_url, name=name, version_info=version, config_status=status
        )
        if subscription.error and name in latest:
            entry.client_status = m.RESOURCE_NACKED
            _set_error(entry, subscription, version)
        elif subscription.in_flight and name in latest:
            entry.client_status = m.RESOURCE_REQUESTED
        else:
            entry.client_status = m.RESOURCE_ACKED if version != ABSENT else m.RESOURCE_DOES_NOT_EXIST
        if with_contents and version != ABSENT and view is not None:
            found = view.find(subscription.type_url, name, has_catch_all=connection.state.has_catch_all)
            if found is not None and found.version == version:
                entry.xds_config.type_url, entry.xds_config.value = found.type_url, found.data
        yield entry


def _set_error(entry: Any, subscription: Subscription, version: str) -> None:
    entry.error_state.details, entry.error_state.version_info = subscription.error, version
