"""Is an endpoint well although nobody has called it? Active health checks, made from this process in the background.

As Envoy's (arch_overview/upstream/health_checking): the first result decides at once, later ones after as many in a row
as the thresholds say, and an HTTP status that was not expected decides at once, too. Other than in Envoy an endpoint is
called until its first check has failed: a process that has just started would have nobody to call.

One thread with an event loop of its own, whatever the number of checks; a check never outlives its timeout.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from meshlib.identity.tls import TlsContexts
from meshlib.model import Cluster, ClusterType, Endpoint, HealthCheck, UpstreamTls

if TYPE_CHECKING:
    from meshlib.policy.live import Live

_log = logging.getLogger("meshlib.health")
AT_ONCE = 64
"""Checks under way at a time."""
_JITTER = 0.1
"""Of the interval: processes that start together do not check together for ever."""
_SERVING = 1  # grpc.health.v1.HealthCheckResponse.ServingStatus


class _Unexpected(Exception):
    """It answered, and said that it is ill."""


class _Subject(NamedTuple):
    """What is checked: one endpoint of one cluster in one way. Equal subjects go on being checked over an update."""

    cluster: str
    endpoint: str
    address: str
    port: int
    check: HealthCheck
    host: str
    tls: UpstreamTls | None


class HealthChecker:
    """Checks what `update` was told of until `stop`.

    live: where results go. clock: monotonic seconds. tls: secures the checks of clusters with TLS.
    """

    def __init__(
        self,
        live: Callable[[], Live],
        clock: Callable[[], float],
        tls: TlsContexts,
    ) -> None:
        self._live, self._clock, self._tls = live, clock, tls
        self._running: dict[_Subject, asyncio.Task[None]] = {}
        self._well: dict[tuple[str, str], dict[HealthCheck, bool]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="meshlib-health", daemon=True)
        self._thread.start()

    def update(self, live: Live) -> None:
        """New configuration: checks that are no longer wanted end, new ones begin at once. Thread-safe, returns at
        once."""
        wanted = frozenset(_subjects(live, self._tls.has_identity))
        self._loop.call_soon_threadsafe(self._apply, wanted)

    def stop(self) -> None:
        """Ends all checks. Idempotent."""
        if self._loop.is_closed():
            return
        try:
            self._loop.call_soon_threadsafe(self._loop.stop)
        except RuntimeError:  # it has just closed
            return
        self._thread.join(5.0)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._gate = asyncio.Semaphore(AT_ONCE)
        try:
            self._loop.run_forever()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            left = asyncio.all_tasks(self._loop)
            if left:
                self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()

    def _apply(self, wanted: frozenset[_Subject]) -> None:
        for subject in [each for each in self._running if each not in wanted]:
            self._running.pop(subject).cancel()
            self._well.get((subject.cluster, subject.endpoint), {}).pop(subject.check, None)
        for subject in wanted:
            if subject not in self._running:
                self._running[subject] = self._loop.create_task(self._watch(subject))

    async def _watch(self, subject: _Subject) -> None:
        check = subject.check
        good = bad = 0
        is_well: bool | None = None
        while True:
            at_once = is_well is None
            try:
                async with self._gate, asyncio.timeout(check.timeout):
                    await self._probe(subject)
                good, bad = good + 1, 0
                reason = ""
            except _Unexpected as error:
                good, bad, at_once = 0, bad + 1, True
                reason = str(error)
            except (OSError, EOFError, ValueError, TimeoutError) as error:
                good, bad = 0, bad + 1
                reason = str(error) or type(error).__name__
            if good and is_well is not True and (at_once or good >= check.healthy_threshold):
                is_well = True
                self._tell(subject, True, reason)
            elif bad and is_well is not False and (at_once or bad >= check.unhealthy_threshold):
                is_well = False
                self._tell(subject, False, reason)
            await asyncio.sleep(check.interval * random.uniform(1 - _JITTER, 1 + _JITTER))

    def _tell(self, subject: _Subject, is_well: bool, reason: str) -> None:
        verdicts = self._well.setdefault((subject.cluster, subject.endpoint), {})
        was = verdicts.get(subject.check)
        verdicts[subject.check] = is_well
        cluster = self._live().cluster(subject.cluster)
        if cluster is not None:
            cluster.set_health(subject.endpoint, all(verdicts.values()), self._clock())
        if not is_well:
            _log.warning("%s of %s is unhealthy: %s", subject.endpoint, subject.cluster, reason)
        elif was is False:
            _log.info("%s of %s is healthy again", subject.endpoint, subject.cluster)

    def _probe(self, subject: _Subject) -> Awaitable[None]:
        return {"http": self._probe_http, "grpc": self._probe_grpc, "tcp": self._probe_tcp}[subject.check.kind](subject)

    def _context(self, subject: _Subject) -> ssl.SSLContext | None:
        return None if subject.tls is None else self._tls.client(subject.tls)

    async def _connect(self, subject: _Subject) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = self._context(subject)
        name = None if subject.tls is None else subject.tls.sni or subject.host
        return await asyncio.open_connection(subject.address, subject.port, ssl=context, server_hostname=name)

    async def _probe_tcp(self, subject: _Subject) -> None:
        _, writer = await self._connect(subject)
        writer.close()

    async def _probe_http(self, subject: _Subject) -> None:
        reader, writer = await self._connect(subject)
        try:
            head = (
                f"GET {subject.check.path} HTTP/1.1\r\nHost: {subject.host}\r\n"
                "User-Agent: meshlib-health\r\nAccept: */*\r\nConnection: close\r\n\r\n"
            )
            writer.write(head.encode("ascii"))
            line = await reader.readuntil(b"\n")
        finally:
            writer.close()
        version, _, rest = line.partition(b" ")
        if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
            raise ValueError(f"no HTTP answer but {line[:40]!r}")
        status = int(rest[:3])
        if not any(low <= status <= high for low, high in subject.check.expected_statuses):
            raise _Unexpected(f"GET {subject.check.path} answered {status}")

    async def _probe_grpc(self, subject: _Subject) -> None:
        status = await asyncio.get_running_loop().run_in_executor(None, self._ask_grpc, subject)
        if status != _SERVING:
            raise _Unexpected(f"grpc.health.v1 of {subject.check.service or 'the server'} says {status}")

    def _ask_grpc(self, subject: _Subject) -> int:
        """The serving status. The two messages have one field each, so that they need no generated code."""
        import grpc

        address = f"[{subject.address}]" if ":" in subject.address else subject.address
        target = f"{address}:{subject.port}"
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.default_authority", subject.host)]
        if subject.tls is None:
            channel = grpc.insecure_channel(target, options)
        else:
            name = subject.tls.sni or subject.host
            roots = Path(subject.tls.ca_file).read_bytes() if subject.tls.ca_file else None
            credentials = grpc.ssl_channel_credentials(roots)
            channel = grpc.secure_channel(target, credentials, [*options, ("grpc.ssl_target_name_override", name)])
        service = subject.check.service.encode()
        if len(service) > 127:
            raise ValueError("a gRPC service's name is 127 bytes at most")
        request = b"\x0a" + bytes([len(service)]) + service if service else b""
        with channel:
            call = channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)
            try:
                answer: bytes = call(request, timeout=subject.check.timeout)
            except grpc.RpcError as error:
                if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED):
                    raise _Unexpected(f"grpc.health.v1: {error.code().name}") from None
                raise OSError(f"grpc.health.v1: {error.code().name}: {error.details()}") from None
        return answer[1] if len(answer) >= 2 and answer[0] == 0x08 else 0

    def __repr__(self) -> str:
        return f"<HealthChecker {len(self._running)} checks>"


def _subjects(live: Live, has_identity: bool) -> Iterator[_Subject]:
    for name, live_cluster in live.clusters.items():
        cluster: Cluster = live_cluster.cluster
        if not cluster.health_checks or cluster.type is ClusterType.ORIGINAL_DST:
            continue
        for target in live_cluster.targets:
            for check in cluster.health_checks:
                yield _subject(name, cluster, target.endpoint, check, has_identity)


def _subject(name: str, cluster: Cluster, endpoint: Endpoint, check: HealthCheck, has_identity: bool) -> _Subject:
    host = check.host or (cluster.service.host if cluster.service is not None else endpoint.authority)
    tls = cluster.tls
    if tls is not None and tls.auto and not (endpoint.is_meshed and has_identity):
        tls = None
    return _Subject(name, endpoint.authority, endpoint.address, check.port or endpoint.port, check, host, tls)
