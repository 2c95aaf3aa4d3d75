"""Is what a call takes between its ends counted once for each hop, by durations alone?"""

from __future__ import annotations

import pytest

from meshlib.controlplane.hops import Hop, Overhead, hops, overhead
from meshlib.controlplane.telemetry_store import Span, Trace

CLUSTER = "outbound|9080|v1|reviews.default.svc.cluster.local"


def span(name: str, parent: str, kind: str, began: float, seconds: float, **told: str) -> Span:
    attributes = {"service.namespace": "default", **{key.replace("_", "."): value for key, value in told.items()}}
    return Span("t", name, parent, "s", "GET", kind, began, began + seconds, False, tuple(attributes.items()))


def trace(*spans: Span) -> Trace:
    made = Trace("t")
    made.spans = {each.span_id: each for each in spans}
    return made


def test_a_hop_is_a_clients_span_with_its_servers() -> None:
    """The server's clock is an hour ahead; a client without a server, or the reverse, is no hop."""
    caller = {"istio_workload": "productpage-v1", "mesh_cluster": CLUSTER}
    found = trace(
        span("a", "", "client", 0.0, 0.5, **caller),
        span("b", "a", "server", 3600.0, 0.375, istio_workload="reviews-v1"),
        span("c", "b", "client", 3600.0, 0.25, istio_workload="reviews-v1"),
        span("d", "unknown", "server", 0.0, 1.0),
    )
    ends = "workload:default/productpage-v1", "service:default/reviews", "workload:default/reviews-v1"
    assert list(hops([found])) == [Hop(*ends, 0.125)]


def test_a_server_that_goes_on_after_its_answer_took_nothing_on_the_way() -> None:
    """A background task: never less than nothing; and a host outside the mesh is no service."""
    found = trace(
        span("a", "", "client", 0.0, 0.5, mesh_cluster="outbound|443||www.example.com"),
        span("b", "a", "server", 0.0, 2.0),
    )
    [hop] = hops([found])
    assert (hop.seconds, hop.service) == (0.0, "")


def test_quantiles_are_in_milliseconds() -> None:
    """Of none, one, and a hundred and one."""
    assert overhead([]) == Overhead()
    assert overhead([Hop("a", "b", "c", 0.002)]) == Overhead(1, 2.0, 2.0)
    many = overhead(Hop("a", "b", "c", number / 1000) for number in range(101))
    assert (many.calls, many.p50, many.p95) == (101, pytest.approx(50), pytest.approx(95))
