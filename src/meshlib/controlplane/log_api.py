"""How does somebody read the logs of the mesh's processes? What is kept of them, and a stream of what comes.

What is kept is what they push by themselves: what the library has to say, and lines of the access log where that is
on. While the stream is read, the workload's processes tell of every request, so it is asked for as a tap is: by
operators of the namespace, and it is in the audit log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.admin import check_yaml, query_of
from meshlib.controlplane.gate import JSON, admission_of
from meshlib.controlplane.log_store import LogStore
from meshlib.controlplane.tap_api import MOST, TapStream, Watching, events, number
from meshlib.controlplane.taps import Workloads, workloads_of

KINDS = ("access", "mesh")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_FILTERS = ("namespace", "name", "kind", "level", "method", "path", "status", "failed", "text")


@dataclass(frozen=True, slots=True)
class WantedLines:
    """Of a workload's, or a service's, log. "" is any.

    kind: KINDS. level: at least this. status: `503`, or `5xx`. path: how it begins. failed: only requests without an
    answer or with one of 500 and more, and warnings. text: what the line has in it, whatever its case.
    """

    namespace: str
    name: str
    kind: str = ""
    level: str = ""
    method: str = ""
    path: str = ""
    status: str = ""
    failed: bool = False
    text: str = ""

    def workloads(self, services: Iterable[api.ServiceEndpoints]) -> Workloads:
        return workloads_of(self.namespace, self.name, services)

    def fits(self, line: api.LogLine) -> bool:
        level = logging.getLevelNamesMapping().get(line.level, 0)
        if self.kind not in ("", line.kind) or (self.level and level < logging.getLevelNamesMapping()[self.level]):
            return False
        if self.text and self.text.lower() not in line.text.lower():
            return False
        status = line.fields.get("response_code", "")
        if self.failed:
            has_failed = status == "0" or status[:1] == "5" if line.kind == "access" else level >= logging.WARNING
            if not has_failed:
                return False
        return self._is_of_request(line, status)

    def _is_of_request(self, line: api.LogLine, status: str) -> bool:
        if not (self.method or self.path or self.status):
            return True
        whole, begin = self.status.lower(), self.status.lower().removesuffix("xx")
        return (
            line.kind == "access"
            and self.method.upper() in ("", line.fields.get("method", ""))
            and line.fields.get("path", "").startswith(self.path)
            and (whole in ("", status) or (whole != begin and status.startswith(begin)))
        )


class LogRoutes(Watching[LogStore]):
    """Of log lines."""

    def routes(self) -> list[Route]:
        return [Route("/v1/logs", self._logs), Route("/v1/logs/follow", self._follow, methods=["POST"])]

    async def _logs(self, request: Request) -> Response:
        query = query_of(request, *_FILTERS, "seconds", "limit")
        seconds = number(query["seconds"] or "600", 86400, "seconds")
        limit = round(number(query["limit"] or "100", MOST, "limit"))
        wanted, sees = _wanted(query), admission_of(request).powers.sees
        if wanted.name and not wanted.namespace:
            wanted = replace(wanted, namespace="default")
        workloads = wanted.workloads(self._view.endpoints())

        def fits(line: api.LogLine) -> bool:
            is_named = (line.namespace, line.workload) in workloads if wanted.name else True
            is_there = wanted.namespace in ("", line.namespace)
            return is_named and is_there and sees(line.namespace) and wanted.fits(line)

        return JSON(api.LogLines(tuple(self._store.lines(self._clock() - seconds, fits, limit))))

    async def _follow(self, request: Request) -> Response:
        check_yaml(request)
        query = query_of(request, *_FILTERS, "rate", "seconds", "limit")
        wanted, admission = _wanted({**query, "namespace": query["namespace"] or "default"}), admission_of(request)
        seconds = number(query["seconds"] or "600", 86400, "seconds")
        limit = round(number(query["limit"], MOST, "limit")) if query["limit"] not in ("", "0") else 0
        tap, began, workloads = self._opened(wanted, admission, "logs", query["rate"])

        def fits(line: api.LogLine) -> bool:
            return (line.namespace, line.workload) in workloads and wanted.fits(line)

        # In the same breath as the tap was opened: no line is missed between the two, and none comes twice.
        before = self._store.lines(self._clock() - seconds, fits, limit)
        return TapStream(self._taps, tap, events(tap, began, "line", admission, wanted.namespace, before))


def _wanted(query: Any) -> WantedLines:
    if query["failed"] not in ("", "true", "false"):
        raise HTTPException(400, f"failed must be true or false, not {query['failed']!r}")
    if query["kind"] not in ("", *KINDS):
        raise HTTPException(400, f"kind must be one of {', '.join(KINDS)}, not {query['kind']!r}")
    if query["level"] not in ("", *LEVELS):
        raise HTTPException(400, f"level must be one of {', '.join(LEVELS)}, not {query['level']!r}")
    return WantedLines(
        **{name: query[name] for name in _FILTERS if name != "failed"},
        failed=query["failed"] == "true",
    )
