"""Where do the microseconds of a call's policy go? Each item by itself, in this thread's CPU time, best of many.

Section `items`, and `python -m benchmarks.policy_items`. What is measured by itself has its code and data at hand, so
the items add up to less than the whole, and their shares say more than their sums.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

from benchmarks.effort import FULL, Effort
from benchmarks.policy import HEAD, INBOUND, Instant, snapshot
from meshlib.mesh import Mesh
from meshlib.model import Headers, Outcome, Request
from meshlib.outbound.drive import drive
from meshlib.policy.call import CallContext, outbound_call
from meshlib.policy.observer import Attempt, Call, attempted, delivered, ended
from meshlib.policy.steps import Deliver, Flow, Send
from meshlib.settings import Settings
from meshlib.telemetry.meter import Meter
from meshlib.telemetry.recorder import Recorder

POLICY, METRICS = "policy", "policy and metrics"


def best(once: Callable[[], object], effort: Effort) -> float:
    """Microseconds of one run."""
    found = []
    for _ in range(3 * effort.batches):
        began = time.thread_time()
        for _ in itertools.repeat(None, effort.size):
            once()
        found.append(time.thread_time() - began)
    return min(found) / effort.size * 1e6


def items(mesh: Mesh) -> dict[str, Callable[[], object]]:
    """What a GET that is answered at its first try goes through, in the order of its life; then the whole."""
    request = Request("GET", "http", "reviews:9080", "/reviews/0", Headers(INBOUND[:3]))
    answered = Outcome(200, Headers(HEAD))
    given = mesh.call_context()
    now, router = time.monotonic(), given.live().router
    decision = router.match(request)
    cluster = given.live().cluster("reviews-v1")
    assert decision is not None and decision.retrying is not None and cluster is not None
    target = cluster.pick(now, (), 0)
    assert target is not None and cluster.breaker is not None
    retrying, breaker = decision.retrying, cluster.breaker
    send, deliver, exchange = Send(cluster, target.endpoint, None, None, (), None), Deliver(), Instant(answered)
    meter = Meter(Recorder(time.time), mesh.node)

    def observed() -> CallContext:
        return CallContext(given.live, given.clock, given.rng, None, "", False, False, "", meter, Call(), given.quotas)

    context = observed()
    drive(outbound_call(request, context), exchange)
    call = context.call
    assert call is not None and call.last is not None
    attempt: Attempt = call.last

    def nothing_decided() -> Flow:
        yield send
        yield deliver

    def lets_through() -> None:
        permit = breaker.acquire(now)
        assert permit is not None
        permit.success(0.001, now)
        permit.cancel()

    def counts_in_and_out() -> None:
        cluster.admit(now)
        cluster.leave()

    def begins_and_ends() -> None:
        cluster.begin(target)
        cluster.end(target)

    def is_observed() -> None:
        attempted(Call(), send, meter, now)
        ended(call, attempt, answered, meter, now)
        delivered(call, deliver)

    return {
        "the driver, and a flow that decides nothing": lambda: drive(nothing_decided(), exchange),
        "its context": mesh.call_context,
        "route": lambda: router.match(request),
        "destination": lambda: given.live().cluster(decision.choose(given.rng).cluster),
        "breaker": lets_through,
        "limits, budget": counts_in_and_out,
        "pick": lambda: cluster.pick(now, (), 0),
        "in flight": begins_and_ends,
        "outlier detection": lambda: cluster.judge(target, answered, 0.001, now),
        "retry?": lambda: retrying.is_retriable(answered),
        "records of the call and its attempt": is_observed,
        "metrics": lambda: meter.call_ended(call),
        POLICY: lambda: drive(outbound_call(request, mesh.call_context()), exchange),
        METRICS: lambda: drive(outbound_call(request, observed()), exchange),
    }


def measure(effort: Effort) -> dict[str, Any]:
    with Mesh(Settings()) as mesh:
        mesh.start()
        mesh._feed.publish(snapshot())
        nothing = best(lambda: None, effort)
        rows = [{"what": what, "microseconds": [best(once, effort) - nothing]} for what, once in items(mesh).items()]
    return {"rows": rows}


def main() -> None:
    for row in measure(FULL)["rows"]:
        print(f"{row['what']:45} {row['microseconds'][0]:6.2f} us")


if __name__ == "__main__":
    main()
