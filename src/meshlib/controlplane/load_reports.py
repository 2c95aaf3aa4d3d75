"""How much do clients send where? envoy.service.load_stats.v3.LoadReportingService: what gRPC's clients and Envoys
report of their calls, by cluster and locality, in sums that the admin API shows.

- A report counts what happened since the last one, so that the sums are of all clients since the control plane began.
  Calls in progress are those of the latest report of each stream that is open.
- A client may say what it likes of any cluster. Its word is kept under its own namespace, which a certificate proves
  where the port is served by TLS, and nothing is decided by it.
- What is kept is bounded: what was reported longest ago is forgotten first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.admin import query_of
from meshlib.controlplane.ads import not_allowed
from meshlib.controlplane.gate import JSON, admission_of
from meshlib.errors import InvalidResource
from meshlib.model import Locality, Node, SpiffeId
from meshlib.xds import messages as m
from meshlib.xds.decode import decode_node

logger = logging.getLogger("meshlib.controlplane")

INTERVAL = 10
"""Seconds between two reports of a client; the protocol leaves it to the server."""
MAX_ENTRIES = 20_000
"""Pairs of cluster and locality that are kept, of all clients together: their sums, and again what is in progress."""
MAX_REPORTED = 2_000
"""Of one report; the rest of it is left out."""
MAX_NAME = 500
"""Characters of a cluster's or a locality's name; entries with longer ones are left out."""
MAX_COUNT = 2**53
"""Where sums stop: the largest whole number that JSON's readers agree on."""
ALL_CLUSTERS = "envoy.lrs.supports_send_all_clusters"
"""The feature of clients that can be told to report all clusters instead of a list."""


class Key(NamedTuple):
    """namespace: whose client it was. locality: "" where the client knows none."""

    namespace: str
    cluster: str
    service: str
    locality: str
    priority: int


@dataclass(slots=True)
class Sums:
    succeeded: int = 0
    failed: int = 0
    issued: int = 0
    dropped: int = 0
    reported: float = 0.0


class LoadReports:
    """What was reported, in bounds. Belongs to one event loop. clock: seconds since 1970."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._sums: OrderedDict[Key, Sums] = OrderedDict()
        """The one that was reported longest ago first."""
        self._in_progress: dict[int, dict[Key, int]] = {}
        """By stream."""
        self._size = 0
        """How many counts there are in it."""

    def take(self, stream: int, namespace: str, report: Any) -> None:
        """report: a LoadStatsRequest."""
        progress: dict[Key, int] = {}
        left = MAX_REPORTED
        for cluster in report.cluster_stats:
            name, service = cluster.cluster_name, cluster.cluster_service_name
            # Dropped calls were for no locality.
            parts = [Key(namespace, name, service, "", 0)] if cluster.total_dropped_requests else []
            counts: list[Any] = [None for _ in parts]
            for each in cluster.upstream_locality_stats:
                where = Locality(each.locality.region, each.locality.zone, each.locality.sub_zone)
                parts.append(Key(namespace, name, service, str(where), each.priority))
                counts.append(each)
            for key, count in zip(parts, counts, strict=True):
                if left <= 0:
                    break
                left -= 1
                if not name or max(map(len, (name, service, key.locality))) > MAX_NAME:
                    continue
                sums = self._of(key)
                if count is None:
                    sums.dropped = _sum(sums.dropped, cluster.total_dropped_requests)
                    continue
                sums.succeeded = _sum(sums.succeeded, count.total_successful_requests)
                sums.failed = _sum(sums.failed, count.total_error_requests)
                sums.issued = _sum(sums.issued, count.total_issued_requests)
                if count.total_requests_in_progress:
                    progress[key] = _sum(progress.get(key, 0), count.total_requests_in_progress)
        self.end(stream)
        if self._size + len(progress) <= MAX_ENTRIES:
            self._in_progress[stream] = progress
            self._size += len(progress)

    def end(self, stream: int) -> None:
        self._size -= len(self._in_progress.pop(stream, ()))

    def _of(self, key: Key) -> Sums:
        sums = self._sums.setdefault(key, Sums())
        sums.reported = self._clock()
        self._sums.move_to_end(key)
        if len(self._sums) > MAX_ENTRIES:
            self._sums.popitem(last=False)
        return sums

    def shown(self) -> list[api.Load]:
        """Sorted by cluster."""
        progress: dict[Key, int] = {}
        for counts in self._in_progress.values():
            for key, count in counts.items():
                progress[key] = _sum(progress.get(key, 0), count)
        return [
            api.Load(
                cluster=key.cluster,
                service=key.service,
                namespace=key.namespace,
                locality=key.locality,
                priority=key.priority,
                succeeded=sums.succeeded,
                failed=sums.failed,
                issued=sums.issued,
                dropped=sums.dropped,
                in_progress=progress.get(key, 0),
                reported=sums.reported,
            )
            for key, sums in sorted(self._sums.items(), key=lambda item: item[0][1:] + item[0][:1])
        ]

    def routes(self) -> list[Route]:
        return [Route("/v1/load", self._show)]

    async def _show(self, request: Request) -> Response:
        query, powers = query_of(request, "cluster"), admission_of(request).powers
        return JSON(
            api.Loads(
                tuple(
                    each
                    for each in self.shown()
                    if query["cluster"] in ("", each.cluster) and powers.sees(each.namespace)
                )
            )
        )

    def __repr__(self) -> str:
        return f"<LoadReports {len(self._sums)} sums, {len(self._in_progress)} streams>"


def _sum(one: int, two: int) -> int:
    return min(one + two, MAX_COUNT)


class LoadReportingService:
    """Belongs to one event loop.

    identity_of: who calls, or the end of the call. clusters: the names of those that a node sees.
    """

    def __init__(
        self,
        reports: LoadReports,
        identity_of: Callable[[Any], Awaitable[SpiffeId | None]],
        clusters: Callable[[Node], Awaitable[list[str]]],
    ) -> None:
        self._reports, self._identity_of, self._clusters = reports, identity_of, clusters
        self._count = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        stream: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(self._stream, None, None)
        methods = {"StreamLoadStats": stream}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(m.LRS_SERVICE, methods),))

    async def _stream(self, requests: Any, context: Any) -> None:
        identity = await self._identity_of(context)
        self._count += 1
        number, node = self._count, None
        try:
            while (data := await context.read()) is not grpc.aio.EOF:
                try:
                    report = m.LoadStatsRequest.FromString(data)
                    said = decode_node(report.node) if report.HasField("node") else None
                except DecodeError:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this is no LoadStatsRequest")
                except InvalidResource as error:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"node: {error.field} {error.reason}")
                if node is None and said is None:
                    await context.abort(
                        grpc.StatusCode.INVALID_ARGUMENT, "the first request must say who reports: node is missing"
                    )
                if said is not None and identity is not None and (wrong := not_allowed(said, identity)):
                    logger.warning("load reports of %s from %s are refused", identity, context.peer())
                    await context.abort(grpc.StatusCode.PERMISSION_DENIED, wrong)
                is_first, node = node is None, said or node
                assert node is not None
                self._reports.take(number, node.workload.namespace, report)
                if is_first:
                    await context.write(await self._wanted(report, node))
                await asyncio.sleep(0)  # who reports without a pause lets others have their turn
        finally:
            self._reports.end(number)

    async def _wanted(self, report: Any, node: Node) -> bytes:
        answer = m.LoadStatsResponse()
        answer.load_reporting_interval.seconds = INTERVAL
        if ALL_CLUSTERS in report.node.client_features:
            answer.send_all_clusters = True
        else:
            answer.clusters.extend(await self._clusters(node))
        return m.serialize(answer)

    def __repr__(self) -> str:
        return f"<LoadReportingService {self._reports!r}>"
