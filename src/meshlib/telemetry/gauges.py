"""What is the state of the mesh in this process? Our own counters and gauges, read when somebody collects them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from meshlib.model import ProcessState, RateLimit
from meshlib.telemetry.recorder import Recorder, Value

if TYPE_CHECKING:
    from meshlib.policy.live import Live

HELP: Mapping[str, str] = {
    "istio_requests_total": "Requests, by who called whom and what came of it.",
    "istio_request_duration_milliseconds": "Duration of requests.",
    "istio_request_bytes": "Size of requests.",
    "istio_response_bytes": "Size of responses.",
    "istio_request_messages_total": "gRPC messages sent by clients.",
    "istio_response_messages_total": "gRPC messages sent by servers.",
    "istio_build": "Version of the mesh library.",
    "meshlib_retries_total": "Attempts after the first.",
    "meshlib_retries_refused_total": "Retries that the retry budget did not admit.",
    "meshlib_overflows_total": "Calls turned away by a limit of the destination.",
    "meshlib_mirrors_dropped_total": "Mirrored calls that were not sent.",
    "meshlib_ejections_total": "Ejections of endpoints by outlier detection.",
    "meshlib_ejections_refused_total": "Ejections that max_ejection_percent forbade.",
    "meshlib_requests_in_flight": "Calls that are not finished.",
    "meshlib_retries_in_flight": "Retries that are not finished.",
    "meshlib_endpoint_ejected": "1 for each endpoint that outlier detection has ejected.",
    "meshlib_endpoints_ejected": "Endpoints that outlier detection has ejected.",
    "meshlib_breaker_open": "1 while the destination's breaker is open, 0.5 half-open, 0 closed.",
    "meshlib_breaker_changes_total": "How often the destination's breaker has opened, half opened or closed.",
    "meshlib_rate_limit_allowed_total": "Calls that a rate limit let pass.",
    "meshlib_rate_limit_limited_total": "Calls that a rate limit turned away, or in shadow mode would have.",
    "meshlib_quota_allowed_total": "Calls that fitted into a quota that all processes share.",
    "meshlib_quota_limited_total": "Calls that a shared quota turned away, or in shadow mode would have.",
    "meshlib_quota_unanswered_total": "Calls about which whoever counts a shared quota did not answer.",
    "meshlib_certificate_expiry_timestamp_seconds": "When this process's certificate expires, Unix time.",
    "meshlib_certificate_info": "1 for each certificate that this process goes by: its own and the roots.",
    "meshlib_certificate_rotations_total": "Certificates that took the place of another.",
    "meshlib_xds_connected": "1 while the control plane answers, else 0.",
    "meshlib_xds_connections_total": "Streams on which the control plane has answered.",
    "meshlib_xds_updates_total": "Answers of the control plane, accepted or refused.",
    "meshlib_xds_last_update_timestamp_seconds": "When an answer was last accepted, Unix time.",
    "meshlib_telemetry_series_overflow_total": "Series beyond the limit, counted under __overflow__.",
    "meshlib_telemetry_dropped_total": "Spans and lines of logs that were dropped.",
}
LEAST = frozenset(
    {
        "meshlib_certificate_expiry_timestamp_seconds",
        "meshlib_certificate_info",
        "meshlib_xds_connected",
        "meshlib_xds_last_update_timestamp_seconds",
    }
)
"""Of which the smallest counts where several processes are told of as one: a sum of dates is none, and one worker that
is cut off must be seen beside three that are not; and what is 1 stays that."""
_BREAKER = {"closed": 0.0, "half-open": 0.5, "open": 1.0}


def values(
    recorder: Recorder,
    live: Live,
    version: str,
    process: ProcessState = ProcessState(),  # noqa: B008 -- frozen
) -> Iterator[Value]:
    """Counters are cumulative. Clusters of which there is nothing to say are left out."""
    yield from _of_process(process)
    yield Value("istio_build", (("component", "proxy"), ("tag", version)), 1, False)
    for (name, labels), amount in recorder.counts().items():
        yield Value(name, labels, amount, True)
    for limiter in live.limiters:
        for use in limiter.uses():
            said = (("limit", use.limit.name), ("shadow", str(use.limit.shadow).lower()))
            kind = "rate_limit" if isinstance(use.limit, RateLimit) else "quota"
            yield Value(f"meshlib_{kind}_allowed_total", said, use.allowed, True)
            yield Value(f"meshlib_{kind}_limited_total", said, use.limited, True)
            if kind == "quota":
                yield Value("meshlib_quota_unanswered_total", said, use.failed, True)
    for cluster in live.clusters.values():
        told, state = (("cluster", cluster.name),), cluster.state
        for name, amount, is_counter in (
            ("meshlib_requests_in_flight", state.requests, False),
            ("meshlib_retries_in_flight", state.retries, False),
            ("meshlib_endpoints_ejected", state.ejected, False),
            ("meshlib_retries_refused_total", state.retries_refused, True),
            ("meshlib_overflows_total", state.overflows, True),
            ("meshlib_mirrors_dropped_total", state.mirrors_dropped, True),
            ("meshlib_ejections_total", state.ejections, True),
            ("meshlib_ejections_refused_total", state.ejections_refused, True),
        ):
            if amount or (name == "meshlib_endpoints_ejected" and cluster.cluster.outlier_detection is not None):
                yield Value(name, told, amount, is_counter)
        if state.ejected:
            for target in cluster.everyone:
                if target.state.is_ejected:
                    yield Value("meshlib_endpoint_ejected", (*told, ("endpoint", target.endpoint.authority)), 1, False)
        if cluster.breaker is not None:
            yield Value("meshlib_breaker_open", told, _BREAKER.get(cluster.breaker.current_state, 0.0), False)
            yield Value("meshlib_breaker_changes_total", told, cluster.breaker.generation, True)


def _of_process(state: ProcessState) -> Iterator[Value]:
    if state.expires is not None:
        yield Value("meshlib_certificate_expiry_timestamp_seconds", (), state.expires, False)
        yield Value("meshlib_certificate_rotations_total", (), state.rotations, True)
    for each in state.certificates:
        said = (
            ("resource", each.name),
            ("serial", each.serial),
            ("not_before", str(each.not_before)),
            ("not_after", str(each.not_after)),
        )
        yield Value("meshlib_certificate_info", said, 1, False)
    if (feed := state.feed) is None:
        return
    yield Value("meshlib_xds_connected", (), float(feed.is_connected), False)
    yield Value("meshlib_xds_connections_total", (), feed.connections, True)
    for result, counts in (("accepted", feed.accepted), ("refused", feed.refused)):
        for name, number in counts:
            yield Value("meshlib_xds_updates_total", (("result", result), ("type", name)), number, True)
    if feed.updated:
        yield Value("meshlib_xds_last_update_timestamp_seconds", (), feed.updated, False)
