"""What does the mesh measure of each call and request? Meter: the Observer that fills the recorder."""

from __future__ import annotations

from meshlib.model import HeaderOperations, Node, Reporting, Told
from meshlib.policy.observer import Attempt, Call, Served
from meshlib.policy.propagation import Carried
from meshlib.telemetry.label_sets import Labels, of_some, with_new, without
from meshlib.telemetry.labels import (
    METADATA,
    METADATA_GRPC,
    METADATA_ID,
    described,
    is_grpc,
    metadata_in,
    metadata_of,
    of_call,
    of_served,
    protocol_of,
)
from meshlib.telemetry.made_labels import MadeLabels, made_labels
from meshlib.telemetry.recorder import Recorder


class Meter:
    """An Observer. strict: write what Istio writes where it knows less (connection_security_policy of a source)."""

    def __init__(self, recorder: Recorder, node: Node, strict: bool = False) -> None:
        self._recorder, self._strict = recorder, strict
        self._client = self._server = Told()
        self._client_made: MadeLabels | None = None
        self._server_made: MadeLabels | None = None
        self._here = described(node)
        workload = node.workload
        self._principal = f"spiffe://{node.trust_domain}/ns/{workload.namespace}/sa/{workload.service_account}"
        name = workload.service or self._here.service
        self._service = (f"{name}.{workload.namespace}.svc.cluster.local", name)
        told, who = metadata_of(node), (METADATA_ID, node.id)
        self._introduction = HeaderOperations(set=((METADATA, told), who))
        self._grpc_introduction = HeaderOperations(set=((METADATA, told), (METADATA_GRPC, told), who))

    def follow(self, rules: Reporting) -> None:
        """What the configuration leaves out, and adds. May be called at any time; what was counted stays."""
        self._client, self._server = rules.client, rules.server
        self._client_made, self._server_made = made_labels(rules.client), made_labels(rules.server)
        self._recorder.forget_keys()

    def _of_call(self, call: Call) -> Labels:
        return _less(of_call(call, self._here, self._principal, self._strict), self._client)

    def _of_served(self, served: Served) -> Labels:
        return _less(of_served(served, self._here, self._principal, self._service), self._server)

    def call_began(self, call: Call) -> None:
        pass

    def attempt_began(self, call: Call, attempt: Attempt) -> HeaderOperations | None:
        # Those outside of the mesh are told nothing of it: who is inside, the control plane names.
        if not attempt.endpoint.peer:
            return None
        return self._grpc_introduction if call.is_grpc else self._introduction

    def attempt_ended(self, call: Call, attempt: Attempt) -> None:
        if attempt.number > 1:
            self._recorder.count("meshlib_retries_total", (("cluster", attempt.cluster.name),))
        messages, outcome = call.messages, attempt.outcome
        if messages is not None and messages.is_stream and outcome is not None and outcome.status == 200:
            endpoint = attempt.endpoint
            self._recorder.follow(
                ("source", attempt.cluster.name, endpoint.workload, endpoint.peer),
                lambda: self._of_call(call),
                messages,
            )

    def call_ended(self, call: Call) -> None:
        request = call.request
        if request is None or call.decision is None:
            return
        cluster, endpoint = call.cluster, None if call.last is None else call.last.endpoint
        made = () if self._client_made is None else self._client_made.of_call(call)
        key = (
            None if cluster is None else cluster.name,
            cluster is None or cluster.cluster.tls is None,
            None if endpoint is None else endpoint.workload,
            None if endpoint is None else endpoint.peer,
            call.status,
            call.flags,
            call.grpc_status,
            protocol_of(call),
            made,
        )
        series = self._recorder.find(key)
        if series is None:
            series = self._recorder.begin(key, with_new(self._of_call(call), made))
        there, back = call.wire_sizes
        exemplar = None if call.mark is None else call.mark[:2]
        self._recorder.add(series, call.ended - call.began, there, back, exemplar, call.messages)

    def serving(self, served: Served) -> Carried | None:
        if served.messages is not None and served.messages.is_stream:
            self._recorder.follow(
                ("destination", metadata_in(served.headers), served.peer.identity),
                lambda: self._of_served(served),
                served.messages,
            )
        return None

    def served(self, served: Served) -> None:
        headers = served.headers
        made = () if self._server_made is None else self._server_made.of_served(served)
        key = (
            made,
            metadata_in(headers),
            served.peer.identity,
            served.status,
            served.flags,
            served.grpc_status,
            is_grpc(headers.get("content-type")),
        )
        self._recorder.request(
            key,
            lambda: with_new(self._of_served(served), made),
            served.ended - served.began,
            served.request_bytes,
            served.response_bytes,
            None if served.mark is None else served.mark[:2],
            served.messages,
        )

    def __repr__(self) -> str:
        return f"<Meter {self._here.workload} {self._recorder!r}>"


def _less(labels: Labels, told: Told) -> Labels:
    """Without those that the configuration removes, of all metrics or of some."""
    return without(labels, told.no_labels, tuple(of_some(each.name, each.metrics) for each in told.removed_labels))
