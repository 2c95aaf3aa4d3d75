"""What happens to an outbound call? Read `outbound_call` from top to bottom: route, fault, limit, pick, send, judge,
perhaps again.

A generator: it yields steps (policy/steps.py) and is sent their outcomes, does no I/O and touches no context
variable. Its life is the call's life: cancellation and the end of the body arrive as close(), and one `finally`
cleans up, whatever happened.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Generator
from typing import TYPE_CHECKING, NamedTuple

from meshlib import errors
from meshlib.balancing import Target
from meshlib.model import (
    ClusterType,
    DirectResponse,
    Endpoint,
    Forward,
    HeaderOperations,
    HedgePolicy,
    Outcome,
    Redirect,
    Request,
    WeightedCluster,
)
from meshlib.policy.cluster import LiveCluster
from meshlib.policy.hash_key import hash_key
from meshlib.policy.live import Live
from meshlib.policy.observer import Attempt, Call, Observer, attempted, delivered, ended, replied
from meshlib.policy.quota import Answer, Quotas
from meshlib.policy.rate_limit import Limited, Limiter, Taken
from meshlib.policy.retry import CLIENT_TIMEOUT, CONNECT_FAILURE, IDEMPOTENT, LOCAL, TIMEOUT, Retrying, asked_for
from meshlib.policy.router import (
    NO_ROUTE,
    UNANSWERED,
    Decision,
    Destination,
    redirected,
    rewritten_path,
    with_port,
)
from meshlib.policy.steps import (
    Ask,
    Deliver,
    Finished,
    Flow,
    Mirror,
    Queue,
    Race,
    Reply,
    Resolve,
    Send,
    Step,
    Told,
    Wait,
    Win,
)
from meshlib.state import EndpointState
from meshlib.state.limits import Ticket

if TYPE_CHECKING:
    from meshlib.state.breaker import Permit

_MILLION = 1_000_000
_ORIGINAL_DST = ClusterType.ORIGINAL_DST
_PRIORITIES_UPDATE = 2
"""Of how many tries the priorities are tried before they are avoided (Istio's previous_priorities.update_frequency)."""
_RESELECT = 5
"""Istio's hostSelectionRetryMaxAttempts, for hedges on routes without a retry policy."""
_OVERLOADED = (("x-envoy-overloaded", "true"),)
_MIRROR_TIMEOUT = 15.0
"""Seconds for a mirrored call whose route has no timeout (Envoy's own default; Istio's is none): nobody waits for a
copy, so nobody else would end one that hangs, and its place would never be free again."""


class CallContext(NamedTuple):
    """What a call needs besides its request.

    live: reads the current Live; called again for each attempt. clock: monotonic seconds.
    deadline: monotonic seconds by which the caller's own caller has given up; None is none.
    route_configuration: match in this one (a gateway's) instead of by the request's authority.
    may_resend: the caller vouches that the request may reach the server twice.
    finds_its_way: the caller connects by itself, so no endpoint is picked, none is judged and nothing is mirrored.
    is_secured: the caller's own TLS is on its connections, whatever the scheme says.
    source: the address of who asks, for hash policies; "" is this process.
    observer, call: who is told what comes of it, and the record to be filled in; None is nobody.
    quotas: who is asked about limits that others count; None asks nobody: the call is such a question itself.
    """

    live: Callable[[], Live]
    clock: Callable[[], float]
    rng: random.Random
    deadline: float | None = None
    route_configuration: str = ""
    may_resend: bool = False
    finds_its_way: bool = False
    source: str = ""
    observer: Observer | None = None
    call: Call | None = None
    quotas: Quotas | None = None
    is_secured: bool = False


def outbound_call(request: Request, context: CallContext) -> Flow:
    """One outbound call. The last step is Reply or Deliver; after Deliver it stays suspended until it is closed."""
    call, observer = context.call, context.observer
    if call is None or observer is None:
        reply = yield from _call(request, context)
        if reply is not None:
            yield reply
        return
    call.request, call.began = request, context.clock()
    observer.call_began(call)
    try:
        reply = yield from _call(request, context)
        if reply is not None:
            replied(call, reply)
            yield reply
    finally:
        call.ended = context.clock()
        for attempt in call.racing:
            if attempt.outcome is None:
                ended(call, attempt, None, observer, call.ended)
        last = call.last
        if last is not None and last.outcome is None and last not in call.racing:
            ended(call, last, None, observer, call.ended)
        if call.status == 0 and not call.flags:
            call.flags = "DC"  # the caller went away before there was an answer: cancelled, or its process is ending
        observer.call_ended(call)


def _call(request: Request, context: CallContext) -> Generator[Step, Told, Reply | None]:
    """Returns what the mesh answers in the server's place; None after Deliver."""
    live, clock, rng, callers_deadline, table, may_resend, finds_its_way, source, observer, call, _, own_tls = context
    started = clock()
    if callers_deadline is not None and started >= callers_deadline:
        return _too_late(request)
    decision = _match_in(table, live(), request) if table else live().router.match(request)
    if decision is None:
        yield Resolve(with_port(request.authority, request.scheme))
        router = live().router
        decision = router.match(request)
        if decision is None:
            is_ours = not (finds_its_way or own_tls)
            decision = router.unanswered(request) if is_ours else router.unknown(request)
        started = clock()

    if call is not None:
        call.decision = decision

    # Envoy's filter order: fault, then the router, which has the timeout, the retries and the mirrors.
    delayed = False
    if decision.fault is not None:
        if (delay := decision.fault.delay) is not None and rng.random() * _MILLION < delay.per_million:
            delayed = True
            if call is not None:
                call.fault = "delay"
            yield Wait(delay.seconds if callers_deadline is None else min(delay.seconds, callers_deadline - started))
            started = clock()  # an injected delay does not count against the route's timeout
            if callers_deadline is not None and started >= callers_deadline:
                _aim(decision, context)
                return _too_late(request)
        if (abort := decision.fault.abort) is not None and rng.random() * _MILLION < abort.per_million:
            _aim(decision, context)
            return _aborted(abort.status, abort.grpc_status)

    action = decision.action
    if not isinstance(action, Forward):
        limiting = live().cluster(decision.route.limited_by) if decision.route.limited_by else None
        reply = _answered(decision, request, action)
        if limiting is not None and limiting.limiter is not None:
            allowed = yield from _within(limiting, limiting.limiter, request, context, started)
            if isinstance(allowed, Reply):
                reply = allowed
            elif allowed is not None:
                reply = reply._replace(headers=(*reply.headers, *allowed.headers))
        return reply

    chosen = decision.choose(rng)
    cluster = live().cluster(chosen.cluster)
    if call is not None:
        call.cluster = cluster
    if cluster is None:
        return Reply(
            action.missing_status,
            flag="NC",
            reason=f"{request.authority}: {decision!r} names cluster {chosen.cluster!r}, which is not configured",
        )
    current = cluster  # a call that has waited, for a quota, its turn or its next try, sees today's endpoints
    quota: Taken | None = None  # what is said about rate limits
    if cluster.limiter is not None:
        allowed = yield from _within(cluster, cluster.limiter, request, context, started)
        if isinstance(allowed, Reply):
            return allowed
        quota = allowed
        if cluster.limiter.asks:
            started = clock()
            current = live().cluster(chosen.cluster) or cluster
    permit: Permit | None = None
    if cluster.breaker is not None:
        permit = cluster.breaker.acquire(started)
        if permit is None:
            return Reply(
                503,
                _OVERLOADED,
                b"circuit breaker open",
                "UO",
                f"{cluster.name}: {cluster.breaker!r}",
                errors.CircuitOpen,
            )
    admitted = cluster.admit(started)
    if admitted is False:
        if permit is not None:
            permit.cancel()
        return Reply(
            503,
            _OVERLOADED,
            b"upstream connect error or disconnect/reset before headers. reset reason: overflow",
            "UO",
            f"{cluster.name}: {cluster.cluster.limits.told}",
        )
    if admitted is not True:
        if not (yield from _waited(admitted, cluster, decision, context, started, permit)):
            return _timed_out(request, decision)
        current = live().cluster(chosen.cluster) or cluster
    holds_retry = False  # a place in the retry budget, from before the pause until its try has ended
    try:
        if action.mirrors and not finds_its_way:
            for mirror in action.mirrors:
                if rng.random() * _MILLION < mirror.per_million and (copy := live().cluster(mirror.cluster)):
                    suffix = "-shadow" if mirror.add_shadow_suffix else ""
                    yield Mirror(_mirror(request, copy, decision, suffix, context), copy)

        deadline = callers_deadline
        if decision.timeout is not None and (deadline is None or started + decision.timeout < deadline):
            deadline = started + decision.timeout
        path = None if action.rewrite is None else rewritten_path(action.rewrite, decision.route.match, request.path)
        headers = chosen.request_headers
        if quota is not None and quota.request_headers:
            headers = (*headers, HeaderOperations(set=quota.request_headers))
        key, set_cookie = hash_key(action.hash_policies, request, source, rng) if action.hash_policies else (None, "")
        retrying = decision.retrying
        tries = None
        retried = False
        tried: tuple[Endpoint, ...] = ()
        while True:
            now = clock()
            if deadline is not None and now >= deadline:
                if permit is not None and tried:
                    permit.failure(now - started, now)
                return _timed_out(request, decision)
            if tried or finds_its_way or current.cluster.type is _ORIGINAL_DST:
                target = _pick(current, request, context, now, tried, key, retrying)
            else:
                target = current.pick(now, (), 0, key)
            if target is None:
                # An attempt that failed says more than "no healthy upstream", but Envoy's answer is this one.
                return Reply(503, (), b"no healthy upstream", "UH", f"{current.name}: no endpoint can be called")

            timeout = None if deadline is None else deadline - now
            if retrying is not None and (per_try := retrying.policy.per_try_timeout) is not None:
                timeout = per_try if timeout is None else min(per_try, timeout)
            send = Send(current, target.endpoint, chosen.authority, path, headers, timeout, deadline)
            attempt: Attempt | None = None
            began = False
            try:
                if action.hedge is not None and not tried and _may_hedge(action.hedge, request, context, retrying):
                    raced = yield from _race(
                        request, context, decision, action.hedge, cluster, send, target, deadline, key
                    )
                    if raced is None:
                        if call is not None:
                            call.last = None
                        if permit is not None:
                            finished = clock()
                            permit.failure(finished - started, finished)
                        return _timed_out(request, decision)
                    current, target, tried, outcome, holds_retry = raced
                    began = True
                    retried = holds_retry
                    finished = clock()
                else:
                    if call is not None and observer is not None:
                        attempt, send = attempted(call, send, observer, now)
                    current.begin(target)
                    began = True
                    answer = yield send
                    if not isinstance(answer, Outcome):
                        raise RuntimeError("the edge answered Send without an Outcome")
                    outcome, tried = answer, (*tried, target.endpoint)
                    finished = clock()
                    if attempt is not None and call is not None and observer is not None:
                        ended(call, attempt, outcome, observer, finished)
                    if not finds_its_way:
                        current.judge(target, outcome, finished - now, finished)
                if outcome.status is None or outcome.status >= 400:
                    retrying = asked_for(request.headers, retrying, rng) if tries is None else retrying
                pause: float | None = None
                if (
                    retrying is not None
                    and retrying.is_retriable(outcome)
                    and (deadline is None or finished < deadline)
                ):
                    tries = tries or retrying.begin()
                    pause = retrying.again(tries, outcome, request.method, may_resend)
                    if pause is not None and deadline is not None and finished + pause >= deadline:
                        pause = None
                    if pause is not None:
                        if holds_retry:
                            holds_retry = False
                            cluster.leave_retry()
                        holds_retry = cluster.admit_retry(finished)
                        if holds_retry:
                            retried = True
                        else:
                            pause = None
                if pause is None:
                    if permit is not None:
                        _record(permit, outcome, finished - started, finished)
                    if outcome.failure == TIMEOUT:
                        return _timed_out(request, decision)
                    operations = chosen.response_headers
                    if set_cookie or quota is not None:
                        operations += _told_besides(set_cookie, quota)
                    deliver = Deliver(
                        operations,
                        deadline,
                        _flag(outcome, retried, delayed),
                        "" if outcome.status else f"{request.authority} at {target.endpoint} ({current.name})",
                        action.idle_timeout,
                    )
                    if call is not None and observer is not None:
                        delivered(call, deliver)
                    yield deliver
                    return None
            finally:
                if began:
                    current.end(target)
            yield Wait(pause)
            current = live().cluster(chosen.cluster) or cluster
    finally:
        if holds_retry:
            cluster.leave_retry()
        cluster.leave()
        if permit is not None:
            permit.cancel()  # means nothing once it was told how the call ended


def _match_in(route_configuration: str, live: Live, request: Request) -> Decision:
    table = live.router.tables.get(route_configuration)
    return NO_ROUTE if table is None else table.match(request) or NO_ROUTE


def _within(
    cluster: LiveCluster, limiter: Limiter, request: Request, context: CallContext, now: float
) -> Generator[Step, Told, Reply | Taken | None]:
    """Whether the cluster's limits let one more call pass: the answer in its place where they don't."""
    if not limiter.asks or context.quotas is None:
        found = limiter.take(request, None, now)
    else:
        asking = limiter.asking(request, None, now)
        try:
            question = next(asking)
            while True:
                answer = yield Ask(context.quotas, question)
                question = asking.send(answer if isinstance(answer, Answer) else None)
        except StopIteration as end:
            found = end.value
    if not isinstance(found, Limited):
        return found
    error = errors.RateLimited if found.flag == "RL" else errors.RateLimitUnanswered
    return Reply(found.status, found.headers, found.body, found.flag, f"{cluster.name}: {found.reason}", error)


def _waited(
    ticket: Ticket,
    cluster: LiveCluster,
    decision: Decision,
    context: CallContext,
    started: float,
    permit: Permit | None,
) -> Generator[Step, Told, bool]:
    """Whether a call's turn for a connection came before its time was over. The route's timeout holds for it, too."""
    ends = [context.deadline] if context.deadline is not None else []
    if decision.timeout is not None:
        ends.append(started + decision.timeout)
    came = False
    try:
        yield Queue(ticket, max(0.0, min(ends) - context.clock()) if ends else None)
        came = ticket.is_granted
    finally:
        if not came:
            cluster.give_up(ticket)
            if permit is not None:
                permit.cancel()
    return came


def _pick(
    cluster: LiveCluster,
    request: Request,
    context: CallContext,
    now: float,
    tried: tuple[Endpoint, ...],
    key: int | None,
    retrying: Retrying | None,
) -> Target | None:
    """For a retry, a hedge, or a call that goes where its caller says."""
    if context.finds_its_way or cluster.cluster.type is _ORIGINAL_DST:
        return _original_destination(request)
    if retrying is None:
        return cluster.pick(now, tried, _RESELECT, key)
    avoid: Collection[int] = ()
    if retrying.policy.retry_remote_localities:
        avoid = {endpoint.priority for endpoint in tried[: len(tried) - len(tried) % _PRIORITIES_UPDATE]}
    return cluster.pick(now, tried, retrying.policy.host_selection_attempts, key, avoid)


# Hedging


class _Raced(NamedTuple):
    """How a race ended: the attempt whose outcome counts, and all endpoints that were tried."""

    cluster: LiveCluster
    target: Target
    tried: tuple[Endpoint, ...]
    outcome: Outcome
    holds_retry: bool


class _Racer(NamedTuple):
    cluster: LiveCluster
    target: Target
    began: float
    budget: LiveCluster | None

    def ended(self) -> None:
        self.cluster.end(self.target)
        if self.budget is not None:
            self.budget.leave_retry()


def _may_hedge(hedge: HedgePolicy, request: Request, context: CallContext, retrying: Retrying | None) -> bool:
    """Two copies of a request reach two servers, so it must be one that may be carried out twice."""
    if context.finds_its_way or hedge.max_attempts < 2:
        return False
    vouched = context.may_resend or (retrying is not None and retrying.policy.resend_unsafe)
    return vouched or request.method in IDEMPOTENT


def _race(
    request: Request,
    context: CallContext,
    decision: Decision,
    hedge: HedgePolicy,
    cluster: LiveCluster,
    first: Send,
    target: Target,
    deadline: float | None,
    key: int | None,
) -> Generator[Step, Told, _Raced | None]:
    """The first try of a hedged call: the first good answer wins. None when the deadline passed without one.

    Hedges start by the clock alone, each inside the retry budget. A bad answer starts none and wins only when no other
    attempt is out: what follows it is the retry policy's word, with its pauses. Who has lost is counted out by the
    edge, when it is really over, and is not judged: being slower once is no failure.
    cluster: whose budget it is.
    """
    clock, retrying, call, observer = context.clock, decision.retrying, context.call, context.observer
    racers: list[_Racer] = []
    tried: tuple[Endpoint, ...] = ()
    out, limit, due = 0, hedge.max_attempts, clock()
    last: tuple[int, Outcome] | None = None
    while True:
        now = clock()
        if deadline is not None and now >= deadline:
            return None
        starts: _Racer | None = None
        send = first
        if now >= due and len(racers) < limit:
            if not racers:
                starts = _Racer(first.cluster, target, now, None)
            else:
                current = context.live().cluster(cluster.name) or cluster
                another = _pick(current, request, context, now, tried, key, retrying)
                if another is not None and cluster.admit_retry(now):
                    starts = _Racer(current, another, now, cluster)
                    left = None if deadline is None else deadline - now
                    if retrying is not None and (per_try := retrying.policy.per_try_timeout) is not None:
                        left = per_try if left is None else min(left, per_try)
                    send = first._replace(cluster=current, endpoint=another.endpoint, timeout=left)
                else:
                    limit = len(racers)  # asking again in a moment would be a loop
            due = now + hedge.delay
        until = due if len(racers) + (starts is not None) < limit else None
        if deadline is not None:
            until = deadline if until is None else min(until, deadline)
        seconds = None if until is None else max(0.0, until - now)
        if starts is None:
            answer = yield Race(None, None, seconds)
        else:
            racers.append(starts)
            tried = (*tried, starts.target.endpoint)
            out += 1
            if call is not None and observer is not None:
                attempt, send = attempted(call, send, observer, now)
                call.racing.append(attempt)
            starts.cluster.begin(starts.target)
            answer = yield Race(send, starts.ended, seconds)
        if answer is None:
            continue
        if not isinstance(answer, Finished):
            raise RuntimeError("the edge answered Race with neither Finished nor None")
        number, outcome = answer
        out -= 1
        limit = len(racers)
        won = racers[number]
        finished = clock()
        if call is not None and observer is not None:
            ended(call, call.racing[number], outcome, observer, finished)
        if number and outcome.failure == LOCAL:
            pass  # it could not be sent beside the first one
        else:
            won.cluster.judge(won.target, outcome, finished - won.began, finished)
            last = number, outcome
        is_good = outcome.status is not None and outcome.status < 500
        if is_good and (retrying is None or not retrying.is_retriable(outcome)):
            out = 0
        elif number == 0 and outcome.failure in (CLIENT_TIMEOUT, LOCAL):
            out = 0  # the application's word, or the request's fault: another attempt would end the same
        if not out:
            assert last is not None
            number, outcome = last
            won = racers[number]
            if call is not None and observer is not None:
                call.last = call.racing[number]
            yield Win(number)
            return _Raced(won.cluster, won.target, tried, outcome, won.budget is not None)


# What goes on the wire


def _told_besides(set_cookie: str, quota: Taken | None) -> tuple[HeaderOperations, ...]:
    """On the response: the cookie of a hash policy, and what is left of a rate limit."""
    operations: tuple[HeaderOperations, ...] = ()
    if set_cookie:
        operations = (HeaderOperations(add=(("set-cookie", set_cookie),)),)
    if quota is not None and quota.headers:
        operations = (*operations, HeaderOperations(add=quota.headers))
    return operations


def _original_destination(request: Request) -> Target:
    """The very address that the caller named; a name is resolved by the operating system when connecting."""
    authority, default = request.authority, 443 if request.scheme in ("https", "wss") else 80
    host, _, port = authority.rpartition(":")
    if not host or port.endswith("]"):
        host, port = authority, str(default)
    return Target(Endpoint(host.strip("[]"), int(port) if port.isdigit() else default), EndpointState())


def _mirror(request: Request, cluster: LiveCluster, decision: Decision, suffix: str, context: CallContext) -> Flow:
    """One copy of the request to one endpoint; the answer is thrown away."""
    started = context.clock()
    target = cluster.pick(started, (), 0)
    if target is None:
        cluster.dropped_mirror()
        return
    admitted = cluster.admit(started)
    if admitted is not True:  # a copy that nobody misses does not queue
        if admitted is not False:
            cluster.give_up(admitted)
        cluster.dropped_mirror()
        return
    host, port_mark, port = request.authority.partition(":")
    rewrite = decision.action.rewrite if isinstance(decision.action, Forward) else None
    path = None if rewrite is None else rewritten_path(rewrite, decision.route.match, request.path)
    headers = Destination(WeightedCluster(cluster.name), decision.route).request_headers
    cluster.begin(target)
    try:
        authority = f"{host}{suffix}{port_mark}{port}" if suffix else None
        seconds = _MIRROR_TIMEOUT if decision.timeout is None else decision.timeout
        deadline = started + seconds
        yield Send(cluster, target.endpoint, authority, path, headers, seconds, deadline)
        yield Deliver((), deadline)
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
    if decision is UNANSWERED:
        reason = (
            f"{request.authority}: not sent in plaintext, since nobody has said yet where it goes: the control plane"
            " was not reached, or has not answered for this host; see that it can be reached (MESHLIB_CONTROL_PLANE),"
            " or send such calls by DNS with MESHLIB_OUTBOUND_FAILURE_POLICY=allow"
        )
        return Reply(503, (), b"no configuration", "NC", reason, errors.NotConfigured)
    body_headers = (("content-type", "text/plain"),) if action.body else ()
    return Reply(action.status, (*body_headers, *headers), action.body)


def _aim(decision: Decision, context: CallContext) -> None:
    """A call that a fault ends is told of as one of the service that it was for: Envoy chooses the cluster with the
    route, before its filters run."""
    if context.call is not None and isinstance(decision.action, Forward):
        context.call.cluster = context.live().cluster(decision.choose(context.rng).cluster)


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


def _too_late(request: Request) -> Reply:
    return Reply(
        504,
        (("content-type", "text/plain"),),
        b"upstream request timeout",
        "UT",
        f"{request.authority}: not called, the deadline of the request being served has passed",
    )


def _record(permit: Permit, outcome: Outcome, seconds: float, now: float) -> None:
    """What a breaker learns of a call. A client that gives up waiting says as much as a timeout of the route; what the
    client library would not send says nothing."""
    if outcome.failure == LOCAL:
        permit.cancel()
    elif outcome.status is None or outcome.status >= 500:
        permit.failure(seconds, now)
    else:
        permit.success(seconds, now)


def _flag(outcome: Outcome, retried: bool, delayed: bool) -> str:
    if outcome.status is None:
        flag = "UF" if outcome.failure == CONNECT_FAILURE else "DC" if outcome.failure == CLIENT_TIMEOUT else "UC"
        if retried:
            flag += ",URX"
    else:
        flag = "URX" if retried and outcome.status >= 500 else ""
    if delayed:
        return f"DI,{flag}" if flag else "DI"
    return flag
