"""Which labels does the configuration make for metrics of requests, and with what value? Istio's tagOverrides."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from meshlib.model import NewLabel, Told
from meshlib.policy.observer import Call, Served
from meshlib.telemetry.cel import NotUsable, attributes, compiled, evaluated
from meshlib.telemetry.labels import UNKNOWN

_log = logging.getLogger("meshlib.telemetry")
LONGEST = 100
"""Characters of a value."""
Made = tuple[tuple[str, str], ...]


def made_labels(told: Told) -> MadeLabels | None:
    """None where there are none."""
    return MadeLabels(told.new_labels) if told.new_labels else None


class MadeLabels:
    """Of one direction. A value that can't be told is `unknown`, as Istio has it; the reason is logged once."""

    def __init__(self, wanted: Iterable[NewLabel]) -> None:
        self._programs: list[tuple[str, Any]] = []
        self._told: set[str] = set()
        for each in wanted:
            program = None
            try:
                program = compiled(each.expression)
            except NotUsable as error:
                self._tell(each.name, error)
            self._programs.append((each.name, program))

    def of_call(self, call: Call) -> Made:
        request = call.request
        assert request is not None
        there, back = call.body_sizes
        fields = {
            "method": request.method,
            "path": request.path,
            "authority": request.authority,
            "user_agent": request.headers.get("user-agent"),
            "request_id": request.headers.get("x-request-id"),
            "bytes_received": there,
            "duration": int((call.ended - call.began) * 1000),
            "protocol": None,
            "response_code": call.status,
            "response_flags": call.flags or "-",
            "response_code_details": "via_upstream" if call.response_headers is not None else None,
            "bytes_sent": back,
            "upstream_cluster": None if call.cluster is None else call.cluster.name,
            "route_name": None if call.decision is None else call.decision.route.name or "default",
        }
        return self._made(attributes(fields, request.headers, call.response_headers))

    def of_served(self, served: Served) -> Made:
        fields = {
            "method": served.method,
            "path": served.path,
            "authority": served.authority,
            "user_agent": served.headers.get("user-agent"),
            "request_id": served.headers.get("x-request-id"),
            "bytes_received": served.request_bytes,
            "duration": int((served.ended - served.began) * 1000),
            "protocol": served.protocol,
            "response_code": served.status,
            "response_flags": served.flags or "-",
            "response_code_details": served.reason or None,
            "bytes_sent": served.response_bytes,
            "upstream_cluster": f"inbound|{served.peer.local_port or ''}||",
            "route_name": served.route or "default",
        }
        return self._made(attributes(fields, served.headers, None))

    def _made(self, told: Mapping[str, Any]) -> Made:
        return tuple((name, self._value(name, program, told)) for name, program in self._programs)

    def _value(self, name: str, program: Any, told: Mapping[str, Any]) -> str:
        if program is None:
            return UNKNOWN
        try:
            found = evaluated(program, told)
        except NotUsable as error:
            self._tell(name, error)
            return UNKNOWN
        if isinstance(found, bool):
            return str(found).lower()
        return str(found)[:LONGEST] if isinstance(found, str | int | float) and found != "" else UNKNOWN

    def _tell(self, name: str, error: Exception) -> None:
        if name not in self._told:
            self._told.add(name)
            _log.warning("the label %s of metrics is %r: %s", name, UNKNOWN, error)
