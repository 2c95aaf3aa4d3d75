"""Which labels does the configuration make for metrics of requests, and with what value? Istio's tagOverrides."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from meshlib.model import NewLabel, Told
from meshlib.policy.observer import Call, Served
from meshlib.telemetry.cel import NotUsable, attributes, compiled, evaluated, fields_of_call, fields_of_served
from meshlib.telemetry.label_sets import of_some
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
                self._tell(of_some(each.name, each.metrics), error)
            self._programs.append((of_some(each.name, each.metrics), program))

    def of_call(self, call: Call) -> Made:
        assert call.request is not None
        return self._made(attributes(fields_of_call(call), call.request.headers, call.response_headers))

    def of_served(self, served: Served) -> Made:
        return self._made(attributes(fields_of_served(served), served.headers, None))

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
            _log.warning("the label %s of metrics is %r: %s", name.rpartition("|")[2], UNKNOWN, error)
