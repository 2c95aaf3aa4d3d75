"""What does a call cost between its two ends? Traces -> for each hop, the caller's time beyond the server's. Pure.

That is what the mesh does at both ends and the network between them. Only durations are compared, never clocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import quantiles
from typing import NamedTuple

import msgspec

from meshlib.controlplane.telemetry_store import Span, Trace


class Hop(NamedTuple):
    """One try of one call that both ends have told of. source, service, target: ids of nodes of the graph
    (`workload:default/reviews-v1`, `service:default/reviews`). seconds: what it took beyond the server's own time."""

    source: str
    service: str
    target: str
    seconds: float


class Overhead(msgspec.Struct, frozen=True):
    """calls: traced tries that both ends have told of. p50, p95: milliseconds; null without one."""

    calls: int = 0
    p50: float | None = None
    p95: float | None = None


def hops(traces: Iterable[Trace]) -> Iterator[Hop]:
    """A server's span belongs to the client's that is its parent: the call's, or the try's where there were several."""
    for trace in traces:
        for server in trace.spans.values():
            client = trace.spans.get(server.parent_id)
            if server.kind != "server" or client is None or client.kind != "client":
                continue
            beyond = (client.ended - client.began) - (server.ended - server.began)
            # A server may have things to do after its answer has arrived.
            yield Hop(_workload(client), _service(client), _workload(server), max(0.0, beyond))


def overhead(found: Iterable[Hop]) -> Overhead:
    taken = sorted(hop.seconds * 1000 for hop in found)
    if not taken:
        return Overhead()
    cuts = quantiles(taken, n=100, method="inclusive") if len(taken) > 1 else [taken[0]] * 99
    return Overhead(len(taken), cuts[49], cuts[94])


def _workload(span: Span) -> str:
    told = dict(span.attributes)
    return f"workload:{told.get('service.namespace', '')}/{told.get('istio.workload', span.service)}"


def _service(client: Span) -> str:
    """`outbound|9080|v1|reviews.default.svc.cluster.local` -> `service:default/reviews`; "" for a host outside."""
    host = dict(client.attributes).get("mesh.cluster", "").rpartition("|")[2]
    name, _, rest = host.partition(".")
    namespace, _, ending = rest.partition(".")
    return f"service:{namespace}/{name}" if ending.startswith("svc") else ""
