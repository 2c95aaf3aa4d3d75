"""How does a request get its verdict? Runs the guard's questions, sync and async, and says what a denial looks like."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from meshlib.model import Peer, Request
from meshlib.policy.admission import ALLOW, PROBE, Allow, Deny, FetchKeys, Question, RawPairs, ReadBody, Verdict
from meshlib.policy.guard import Guard
from meshlib.policy.propagation import is_grpc
from meshlib.policy.quota import Question as AskQuota
from meshlib.policy.quota import Quotas

_log = logging.getLogger("meshlib.guard")

CLIENT_CERT = b"x-forwarded-client-cert"

WAITING = 64
"""Requests of one event loop's process that may wait for an answer at once; others wait for their turn."""
Take = Callable[[int], bytes]
AsyncTake = Callable[[int], Awaitable[bytes]]

UNREACHED = Deny(
    503,
    b"no configuration yet",
    ((b"content-type", b"text/plain"),),
    14,
    "",
    "no_configuration",
    reason="the control plane was never reached (failure_policy)",
)


class Rules(Protocol):
    """Where the guard comes from (Mesh)."""

    def inbound_guard(self) -> Guard:
        """The guard in force; starts the feeds. One that is not configured where nothing has said so yet."""

    def await_inbound(self) -> Guard:
        """The same, waiting (bounded) for the first word of the control plane."""

    async def await_inbound_async(self) -> Guard:
        """`await_inbound`, without blocking the loop."""

    def admits_unconfigured(self) -> bool:
        """Whether a call comes in while no rules are known."""

    @property
    def quotas(self) -> Quotas:
        """Who is asked about limits that others count."""


class Edge(Protocol):
    """Does the I/O that guards ask for.

    ready: the answer, if it is at hand; raises LookupError when it takes I/O. answer: blocks, bounded; never raises.
    """

    def ready(self, question: FetchKeys) -> Any: ...
    def answer(self, question: Question) -> Any: ...


class _AwaitRules(NamedTuple):
    """The first word of the control plane is worth waiting for: expects a Guard."""


class Reception:
    """Admits the requests of one process. Thread-safe.

    probe_paths: a GET or HEAD in plaintext for one of these, exactly, is admitted whatever the rules: a kubelet has no
    certificate (Istio's agent takes its probes in the application's place). Its verdict is PROBE.
    """

    __slots__ = ("_clock", "_edge", "_probe_paths", "_rules", "_threads")

    def __init__(
        self,
        rules: Rules,
        edge: Edge,
        clock: Callable[[], float] = time.time,
        probe_paths: Iterable[str] = (),
    ) -> None:
        self._rules, self._edge, self._clock = rules, edge, clock
        self._probe_paths = frozenset(probe_paths)
        self._threads: tuple[int, ThreadPoolExecutor] | None = None

    def _is_probe(self, request: Request, peer: Peer) -> bool:
        return (
            not peer.is_tls
            and request.method in ("GET", "HEAD")
            and request.path.partition("?")[0] in self._probe_paths
        )

    @property
    def is_enforced(self) -> bool:
        return self._rules.inbound_guard().is_configured

    def admit(self, request: Request, peer: Peer, take: Take | None = None) -> Verdict:
        """take: reads from the beginning of the body (ReadBody); None where that can't be done."""
        verdict = self._at_once(request, peer)
        if verdict is not None:
            return verdict
        flow = self._asking(request, peer)
        try:
            step = next(flow)
            while True:
                if isinstance(step, ReadBody):
                    step = flow.send(take(step.limit) if take is not None else None)
                else:
                    step = flow.send(self._do(step))
        except StopIteration as end:
            return self._told(end.value, request, peer)
        finally:
            flow.close()

    async def admit_async(self, request: Request, peer: Peer, take: AsyncTake | None = None) -> Verdict:
        """`admit`, without blocking the loop."""
        verdict = self._at_once(request, peer)
        if verdict is not None:
            return verdict
        flow = self._asking(request, peer)
        try:
            step = next(flow)
            while True:
                if isinstance(step, ReadBody):
                    step = flow.send(await take(step.limit) if take is not None else None)
                else:
                    step = flow.send(await self._do_async(step))
        except StopIteration as end:
            return self._told(end.value, request, peer)
        finally:
            flow.close()

    def _at_once(self, request: Request, peer: Peer) -> Verdict | None:
        """The verdict on nearly every request; None where something has to be waited for."""
        if self._probe_paths and self._is_probe(request, peer):
            return PROBE
        guard = self._rules.inbound_guard()
        if not guard.is_configured:
            return ALLOW if self._rules.admits_unconfigured() else None
        if guard.asks(peer.local_port):
            return None
        return self._told(guard.admit(request, peer, self._clock(), time.monotonic()), request, peer)

    def _asking(self, request: Request, peer: Peer) -> Generator[Question | _AwaitRules, Any, Verdict]:
        guard = self._rules.inbound_guard()
        if not guard.is_configured:
            guard = yield _AwaitRules()
            if not guard.is_configured:
                return UNREACHED
        return (yield from guard.admission(request, peer, self._clock(), time.monotonic()))

    def _do(self, step: Question | _AwaitRules) -> Any:
        if isinstance(step, AskQuota):
            return self._rules.quotas.ask(step)
        return self._rules.await_inbound() if isinstance(step, _AwaitRules) else self._edge.answer(step)

    async def _do_async(self, step: Question | _AwaitRules) -> Any:
        if isinstance(step, AskQuota):
            return await self._rules.quotas.ask_async(step)
        if isinstance(step, _AwaitRules):
            return await self._rules.await_inbound_async()
        if isinstance(step, FetchKeys):
            try:
                return self._edge.ready(step)
            except LookupError:
                pass
        # Not the loop's own executor: it is small, and an authorizer that is slow would hold up the application's work.
        return await asyncio.get_running_loop().run_in_executor(self._pool(), self._do, step)

    def _pool(self) -> ThreadPoolExecutor:
        pid = os.getpid()
        if self._threads is None or self._threads[0] != pid:  # a forked child has none of the parent's threads
            self._threads = pid, ThreadPoolExecutor(WAITING, "meshlib-admission")
        return self._threads[1]

    def _told(self, verdict: Verdict, request: Request, peer: Peer) -> Verdict:
        if verdict is ALLOW:
            return verdict
        for note in verdict.notes:
            _log.info("%s %r from %s: %s", request.method, _shown(request), _caller(peer), note)
        if isinstance(verdict, Deny):
            _log.info(
                "%s %r from %s: %d %s: %s %s",
                request.method,
                _shown(request),
                _caller(peer),
                verdict.status,
                verdict.details,
                verdict.reason,
                verdict.origin,
            )
        return verdict


def _shown(request: Request) -> str:
    """Without the query, which may hold secrets."""
    return request.path.partition("?")[0][:200]


def _caller(peer: Peer) -> str:
    return str(peer.identity or peer.address or "an unknown peer")


def seen_by_application(headers: list[tuple[bytes, bytes]], verdict: Allow, peer: Peer) -> list[tuple[bytes, bytes]]:
    """The request's headers without what only the mesh may say, and with what it says."""
    gone = {CLIENT_CERT} | verdict.remove | {name for name, _ in verdict.add}
    # To a WSGI application `x_user` is `x-user`.
    kept = [pair for pair in headers if (name := pair[0].lower()) not in gone and name.replace(b"_", b"-") not in gone]
    kept += verdict.add
    if peer.identity is not None:
        kept.append((CLIENT_CERT, b"URI=" + peer.identity.uri.encode("ascii")))
    return kept


def without_params(query: bytes, verdict: Allow) -> bytes:
    if not verdict.remove_params:
        return query
    names = {name.encode("latin-1") for name in verdict.remove_params}
    return b"&".join(part for part in query.split(b"&") if part.partition(b"=")[0] not in names)


def answer_of(denied: Deny, content_type: bytes) -> tuple[int, RawPairs, bytes]:
    """Status, headers and body; a gRPC client reads its status from a head without a body."""
    if is_grpc(content_type):
        message = denied.body.replace(b"%", b"%25") or b"denied"
        grpc_head = (
            (b"content-type", b"application/grpc"),
            (b"grpc-status", b"%d" % denied.grpc_status),
            (b"grpc-message", message),
        )
        return 200, (*grpc_head, *denied.told), b""
    length = (b"content-length", b"%d" % len(denied.body))
    return denied.status, (*(pair for pair in denied.headers if pair[0] != b"content-length"), length), denied.body
