"""Who asked for what, and what did they get? Istio's access log, a line for each request that came in and each call
that went out, through standard logging (`meshlib.access`, INFO).

What is logged and where to is the logging configuration's word. Each record has its fields by Istio's JSON names in
`record.mesh`, so that a logging.Filter can choose. Nothing is made while the logger is off.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Self

import msgspec

from meshlib.model import HeaderOperations, HeaderView, Reporting, Told
from meshlib.policy.observer import Attempt, Call, Observer, Served
from meshlib.policy.propagation import Carried
from meshlib.telemetry.cel import NotUsable, attributes, compiled, evaluated
from meshlib.telemetry.lines import ACCESS, LONGEST, Line, Lines
from meshlib.telemetry.scrub import scrubbed

LOGGER = logging.getLogger(ACCESS)

TEXT = (
    '[{start_time}] "{method} {path} {protocol}" {response_code} {response_flags} {response_code_details}'
    ' {connection_termination_details} "{upstream_transport_failure_reason}" {bytes_received} {bytes_sent} {duration}'
    ' {upstream_service_time} "{x_forwarded_for}" "{user_agent}" "{request_id}" "{authority}" "{upstream_host}"'
    " {upstream_cluster} {upstream_local_address} {downstream_local_address} {downstream_remote_address}"
    " {requested_server_name} {route_name}"
)
"""Istio's default (pilot/pkg/model/telemetry_logging.go)."""
_FIELDS = (
    *("start_time", "route_name", "method", "path", "protocol", "response_code", "response_flags"),
    *("response_code_details", "connection_termination_details", "bytes_received", "bytes_sent", "duration"),
    *("upstream_service_time", "x_forwarded_for", "user_agent", "request_id", "authority", "upstream_host"),
    *("upstream_cluster", "upstream_local_address", "downstream_local_address", "downstream_remote_address"),
    *("requested_server_name", "upstream_transport_failure_reason"),
)
_NOTHING: Mapping[str, object] = dict.fromkeys(_FIELDS)
# A caller's value must neither end a line nor a quotation.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), 34, 92, 127)}


class _Chosen:
    """Which requests of one direction get a line. expression: CEL, "" takes all; one that can't be compiled or answers
    with no boolean takes all too, and says so once: a line too many is better than one too few. is_watched: somebody
    looks at the lines as they come, of every request, so they are kept for him."""

    __slots__ = ("_expression", "_program", "is_on", "is_watched")

    def __init__(self, is_on: bool, expression: str = "", is_watched: bool = False) -> None:
        self.is_on, self._expression, self.is_watched = is_on, expression, is_watched
        self._program: Any = None
        if is_on and expression:
            try:
                self._program = compiled(expression)
            except NotUsable as error:
                LOGGER.warning("the filter %r takes everything: %s", expression, error)

    @classmethod
    def by(cls, told: Told, is_set: bool) -> Self:
        return cls(is_set if told.access_log is None else told.access_log, told.log_filter, told.all_traces)

    def takes(self, fields: Mapping[str, Any], request: HeaderView, response: HeaderView | None) -> bool:
        program = self._program
        if program is None:
            return True
        found: object
        try:
            found = evaluated(program, attributes(fields, request, response))
        except NotUsable as error:  # a line must not cost a request
            found = error
        if isinstance(found, bool):
            return found
        self._program = None
        LOGGER.warning("the filter %r takes everything from now on: it answers %s", self._expression, found)
        return True


class AccessLog:
    """An Observer around `inner`, which is told the same. kind: `text` or `json`; "" is text, where the configuration
    asks for a log. epoch: Unix seconds at monotonic zero. lines: where they are kept, besides; also those of requests
    that are looked at though nobody logs them."""

    def __init__(self, inner: Observer, kind: str, epoch: float, lines: Lines | None = None) -> None:
        self._inner, self._kind, self._epoch, self._lines = inner, kind, epoch, lines
        self._client, self._server = _Chosen(bool(kind)), _Chosen(bool(kind))

    def follow(self, rules: Reporting) -> None:
        """What the configuration says; it has the last word. May be called at any time."""
        is_set = bool(self._kind)
        self._client, self._server = _Chosen.by(rules.client, is_set), _Chosen.by(rules.server, is_set)

    def call_began(self, call: Call) -> None:
        self._inner.call_began(call)

    def attempt_began(self, call: Call, attempt: Attempt) -> HeaderOperations | None:
        return self._inner.attempt_began(call, attempt)

    def attempt_ended(self, call: Call, attempt: Attempt) -> None:
        self._inner.attempt_ended(call, attempt)

    def serving(self, served: Served) -> Carried | None:
        return self._inner.serving(served)

    def call_ended(self, call: Call) -> None:
        self._inner.call_ended(call)
        request, chosen = call.request, self._client
        if request is None or not self._wants(chosen):
            return
        fields = self._fields(call.began, call.ended, request.headers, call.carried)
        fields["method"], fields["path"], fields["authority"] = (
            request.method,
            scrubbed(request.path),
            request.authority,
        )
        fields["response_code"], fields["response_flags"] = call.status, call.flags or "-"
        fields["response_code_details"] = "via_upstream" if call.response_headers is not None else None
        fields["upstream_transport_failure_reason"] = call.reason or None
        fields["bytes_received"], fields["bytes_sent"] = call.body_sizes
        if call.last is not None:
            fields["upstream_host"] = call.last.endpoint.authority
            fields["upstream_service_time"] = int((call.last.ended - call.last.began) * 1000)
        if call.cluster is not None:
            fields["upstream_cluster"] = call.cluster.name
        if call.decision is not None:
            fields["route_name"] = call.decision.route.name or "default"
        is_chosen = chosen.is_on and chosen.takes(fields, request.headers, call.response_headers)
        self._tell(fields, chosen, is_chosen, "out", self._epoch + call.ended, call.mark)

    def served(self, served: Served) -> None:
        self._inner.served(served)
        chosen = self._server
        if not self._wants(chosen):
            return
        fields = self._fields(served.began, served.ended, served.headers, served.carried)
        fields["method"], fields["path"], fields["protocol"] = served.method, scrubbed(served.path), served.protocol
        fields["authority"] = served.authority or None
        fields["response_code"], fields["response_flags"] = served.status, served.flags or "-"
        fields["response_code_details"] = served.reason or ("via_upstream" if served.status else None)
        fields["bytes_received"], fields["bytes_sent"] = served.request_bytes, served.response_bytes
        fields["downstream_remote_address"] = served.client or None
        fields["requested_server_name"] = served.peer.sni or None
        fields["upstream_cluster"] = f"inbound|{served.peer.local_port or ''}||"
        fields["route_name"] = served.route or "default"
        is_chosen = chosen.is_on and chosen.takes(fields, served.headers, None)
        self._tell(fields, chosen, is_chosen, "in", self._epoch + served.ended, served.mark)

    def _wants(self, chosen: _Chosen) -> bool:
        if self._lines is None:
            return chosen.is_on and LOGGER.isEnabledFor(logging.INFO)
        return chosen.is_on or chosen.is_watched

    def _fields(self, began: float, ended: float, headers: HeaderView, carried: Carried | None) -> dict[str, object]:
        """The id of a request that came without one is that which was made for it."""
        start = datetime.fromtimestamp(self._epoch + began, UTC)
        return {
            **_NOTHING,
            "start_time": f"{start:%Y-%m-%dT%H:%M:%S}.{start.microsecond // 1000:03d}Z",
            "duration": int((ended - began) * 1000),
            "x_forwarded_for": headers.get("x-forwarded-for"),
            "user_agent": headers.get("user-agent"),
            "request_id": headers.get("x-request-id") or (carried and carried.get("x-request-id")),
        }

    def _tell(
        self, fields: dict[str, object], chosen: _Chosen, is_chosen: bool, direction: str, at: float, mark: Any
    ) -> None:
        """mark: the tracer's, where the request is sampled."""
        if is_chosen and LOGGER.isEnabledFor(logging.INFO):
            line = msgspec.json.encode(fields).decode() if self._kind == "json" else _text(fields)
            LOGGER.info("%s", line, extra={"mesh": fields})
        if self._lines is not None and (is_chosen or chosen.is_watched):
            trace_id, span_id = ("", "") if mark is None else mark[:2]
            kept = tuple((name, value) for name, value in fields.items() if value is not None)
            text = _text(fields)[:LONGEST]
            self._lines.put(Line(at, logging.INFO, ACCESS, text, direction, kept, trace_id, span_id))


def _text(fields: Mapping[str, object]) -> str:
    shown = {
        name: value.translate(_ESCAPES) if isinstance(value, str) else "-" if value is None else value
        for name, value in fields.items()
    }
    return TEXT.format_map(shown)
