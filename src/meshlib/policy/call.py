"""What happens to an outbound call? Read `outbound_call` from top to bottom: route, fault, limit, pick, send, judge,
perhaps again.

A generator: it yields steps (policy/steps.py) and is sent their outcomes, does no I/O and touches no context
variable. Its life is the call's life: cancellation and the end of the body arrive as close(), and one `finally`
cleans up, whatever happened.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from meshlib.balancing import Target
from meshlib.model import (
    ClusterType,
    DirectResponse,
    Endpoint,
    Forward,
    HeaderOperations,
    Outcome,
    Redirect,
    Request,
    Rewrite,
    WeightedCluster,
)
from meshlib.policy.cluster import LiveCluster
from meshlib.policy.live import Live
from meshlib.policy.retry import CLIENT_TIMEOUT, CONNECT_FAILURE, LOCAL, TIMEOUT
from meshlib.policy.router import NO_ROUTE, Decision, redirected, rewritten_path, with_port
from meshlib.policy.steps import Deliver, Flow, Mirror, Reply, Resolve, Send, Wait
from meshlib.state import EndpointState

_MILLION = 1_000_000


class CallContext(NamedTuple):
    """What a call needs besides its request.

    live: reads the current Live; called again for each attempt. clock: monotonic seconds.
    deadline: monotonic seconds by which the caller's own caller has given up; None is none.
    route_configuration: match in this one (a gateway's) instead of by the request's authority.
    may_resend: the caller vouches that the request may reach the server twice.
    """

    live: Callable[[], Live]
    clock: Callable[[], float]
    rng: random.Random
    deadline: float | None = None
    route_configuration: str = ""
    may_resend: bool = False


def outbound_call(request: Request, context: CallContext) -> Flow:
    """One outbound call. The last step is Reply or Deliver; after Deliver it stays suspended until it is closed."""
    clock, rng = context.clock, context.rng
    started = clock()
    decision = _match(context.live(), request, context.route_configuration)
    if decision is None:
        yield Resolve(with_port(request.authority, request.scheme))
        router = context.live().router
        decision = router.match(request) or router.unknown(request)
        started = clock()

    if decision.fault is not None:
        if (delay := decision.fault.delay) is not None and rng.random() * _MILLION < delay.per_million:
            yield Wait(delay.seconds)
            started = clock()  # an injected delay does not count against the route's timeout (Envoy's filter order)
        if (abort := decision.fault.abort) is not None and rng.random() * _MILLION < abort.per_million:
            yield _aborted(abort.status, abort.grpc_status)
            return

    action = decision.action
    if not isinstance(action, Forward):
        yield _answered(decision, request, action)
        return

    chosen = decision.choose(rng)
    cluster = context.live().cluster(chosen.cluster)
    if cluster is None:
        yield Reply(
            503,
            flag="NC",
            reason=f"{request.authority}: {decision!r} names cluster {chosen.cluster!r}, which is not configured",
        )
        return
    if not cluster.admit():
        yield Reply(
            503,
            (("x-envoy-overloaded", "true"),),
            b"upstream connect error or disconnect/reset before headers. reset reason: overflow",
            "UO",
            f"{cluster.name}: limit of {cluster.max_requests} concurrent requests reached",
        )
        return
    retried = False
    try:
        for mirror in action.mirrors:
            if rng.random() * _MILLION < mirror.per_million and (copy := context.live().cluster(mirror.cluster)):
                suffix = "-shadow" if mirror.add_shadow_suffix else ""
                yield Mirror(_mirror(request, copy, decision, suffix, context))

        deadline = context.deadline
        if decision.timeout is not None and (deadline is None or started + decision.timeout < deadline):
            deadline = started + decision.timeout
        authority_on_wire, path, headers = _on_the_wire(request, decision, chosen)
        retrying = decision.retrying
        tries = None
        tried: tuple[Endpoint, ...] = ()
        while True:
            now = clock()
            if deadline is not None and now >= deadline:
                yield _timed_out(request, decision)
                return
            current = context.live().cluster(chosen.cluster) or cluster  # a retry sees today's endpoints
            if current.cluster.type is ClusterType.ORIGINAL_DST:
                target: Target | None = _original_destination(request)
            else:
                reselect = retrying.policy.host_selection_attempts if tried and retrying else 0
                target = current.pick(now, tried, reselect)
            if target is None:
                # An attempt that failed says more than "no healthy upstream", but Envoy's answer is this one.
                yield Reply(503, (), b"no healthy upstream", "UH", f"{current.name}: no endpoint can be called")
                return

            timeout = None if deadline is None else deadline - now
            if retrying is not None and retrying.policy.per_try_timeout is not None:
                per_try = retrying.policy.per_try_timeout
                timeout = per_try if timeout is None else min(per_try, timeout)
            current.begin(target)
            try:
                outcome = yield Send(current, target.endpoint, authority_on_wire, path, headers, timeout)
                if outcome is None:
                    raise RuntimeError("the edge answered Send without an Outcome")
                finished = clock()
                # 4xx is the caller's fault, and what never left this process is nobody's.
                if outcome.failure not in (CLIENT_TIMEOUT, LOCAL):
                    current.judge(target, 504 if outcome.failure == TIMEOUT else outcome.status, finished)
                pause: float | None = None
                if (
                    retrying is not None
                    and retrying.is_retriable(outcome)
                    and (deadline is None or finished < deadline)
                ):
                    tries = tries or retrying.begin()
                    pause = retrying.again(tries, outcome, request.method, context.may_resend)
                    if pause is not None and deadline is not None and finished + pause >= deadline:
                        pause = None
                    if pause is not None and not retried:
                        retried = cluster.admit_retry()
                        pause = pause if retried else None
                if pause is None:
                    if outcome.failure == TIMEOUT:
                        yield _timed_out(request, decision)
                        return
                    yield Deliver(
                        _response_operations(decision, chosen),
                        deadline,
                        _flag(outcome, retried),
                        "" if outcome.status else f"{request.authority} at {target.endpoint} ({current.name})",
                    )
                    return
            finally:
                current.end(target)
            tried = (*tried, target.endpoint)
            yield Wait(pause)
    finally:
        if retried:
            cluster.leave_retry()
        cluster.leave()


def _match(live: Live, request: Request, route_configuration: str) -> Decision | None:
    if not route_configuration:
        return live.router.match(request)
    table = live.router.tables.get(route_configuration)
    return NO_ROUTE if table is None else table.match(request) or NO_ROUTE


def _on_the_wire(
    request: Request, decision: Decision, chosen: WeightedCluster
) -> tuple[str | None, str | None, tuple[HeaderOperations, ...]]:
    """Authority, path and header operations of every attempt; None where the caller's own stand."""
    action = decision.action
    rewrite: Rewrite | None = action.rewrite if isinstance(action, Forward) else None
    authority, path = chosen.authority, None
    if rewrite is not None:
        # A destination's Host loses to the route's (Istio, route.go processDestination).
        authority = rewrite.authority or authority
        path = rewritten_path(rewrite, decision.route.match, request.path)
    if decision.request_headers or chosen.request_headers:
        # Envoy: the more specific first, so that the less specific has the last word.
        return authority, path, (chosen.request_headers, decision.request_headers)
    return authority, path, ()


def _response_operations(decision: Decision, chosen: WeightedCluster) -> tuple[HeaderOperations, ...]:
    if decision.response_headers or chosen.response_headers:
        return (chosen.response_headers, decision.response_headers)
    return ()


def _original_destination(request: Request) -> Target:
    """The very address that the caller named; a name is resolved by the operating system when connecting."""
    authority, default = request.authority, 443 if request.scheme in ("https", "wss") else 80
    host, _, port = authority.rpartition(":")
    if not host or port.endswith("]"):
        host, port = authority, str(default)
    return Target(Endpoint(host.strip("[]"), int(port) if port.isdigit() else default), EndpointState())


def _mirror(request: Request, cluster: LiveCluster, decision: Decision, suffix: str, context: CallContext) -> Flow:
    """One copy of the request to one endpoint; the answer is thrown away."""
    target = cluster.pick(context.clock(), (), 0)
    if target is None or not cluster.admit():
        return
    host, port_mark, port = request.authority.partition(":")
    _, path, headers = _on_the_wire(request, decision, WeightedCluster(cluster.name))
    cluster.begin(target)
    try:
        authority = f"{host}{suffix}{port_mark}{port}" if suffix else None
        yield Send(cluster, target.endpoint, authority, path, headers, decision.timeout)
        yield Deliver()
    finally:
        cluster.end(target)
        cluster.leave()


def _answered(decision: Decision, request: Request, action: Redirect | DirectResponse) -> Reply:
    headers = (*decision.response_headers.set, *decision.response_headers.add)
    if isinstance(action, Redirect):
        location = redirected(action, decision.route.match, request)
        return Reply(action.status, (("location", location), *headers))
    if decision is NO_ROUTE:
        return Reply(404, (), b"", "NR", f"{request.authority}: no route for {request.method} {request.path}")
    body_headers = (("content-type", "text/plain"),) if action.body else ()
    return Reply(action.status, (*body_headers, *headers), action.body)


def _aborted(status: int, grpc_status: int | None) -> Reply:
    body = b"fault filter abort"
    if grpc_status is not None:
        headers = (
            ("content-type", "application/grpc"),
            ("grpc-status", str(grpc_status)),
            ("grpc-message", body.decode()),
        )
        return Reply(200, headers, b"", "FI", "abort injected")
    return Reply(status, (("content-type", "text/plain"),), body, "FI", "abort injected")


def _timed_out(request: Request, decision: Decision) -> Reply:
    return Reply(
        504,
        (("content-type", "text/plain"),),
        b"upstream request timeout",
        "UT",
        f"{request.authority}: no answer within the timeout of {decision!r}",
    )


def _flag(outcome: Outcome, retried: bool) -> str:
    if outcome.status is not None:
        return "URX" if retried and outcome.status >= 500 else ""
    flag = "UF" if outcome.failure == CONNECT_FAILURE else "UC"
    return f"{flag},URX" if retried else flag
