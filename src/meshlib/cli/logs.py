"""What do the processes say? meshctl logs: their access log and what the library tells, through the control plane."""

from __future__ import annotations

import re
import sys
import time
from typing import Annotated

import msgspec
import typer

from meshlib.cli.admin_client import AdminClient
from meshlib.cli.failure import CommandFailed
from meshlib.cli.options import ControlPlaneUrl
from meshlib.controlplane import admin_api as api

_UNITS = {"s": 1, "m": 60, "h": 3600}


def logs(
    name: Annotated[str, typer.Argument(metavar="[WORKLOAD|SERVICE]", help="Whose lines; all without it.")] = "",
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Only this namespace.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, of every request.")] = False,
    since: Annotated[str, typer.Option(help="How far back: 30s, 10m, 2h.")] = "10m",
    tail: Annotated[int, typer.Option(help="At most so many of those that are there.", min=0, max=5000)] = 100,
    kind: Annotated[str, typer.Option(help="access, lines of requests; mesh, what the library tells.")] = "",
    level: Annotated[str, typer.Option(help="At least this: info, warning, error.")] = "",
    method: Annotated[str, typer.Option(help="Only requests by this method.")] = "",
    path: Annotated[str, typer.Option(help="Only paths that begin with this.")] = "",
    status: Annotated[str, typer.Option(help="Only answers with this status: 503, or 5xx.")] = "",
    failed: Annotated[bool, typer.Option("--failed", help="Only requests that failed, and warnings.")] = False,
    grep: Annotated[str, typer.Option(help="Only lines that have this in them, whatever its case.")] = "",
    rate: Annotated[int, typer.Option(help="With -f, at most so many a second.", min=1, max=1000)] = 100,
    output: Annotated[str, typer.Option("--output", "-o", help="json, one a line.")] = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """Show what processes have logged lately: lines of the access log where that is on, and the library's own.

    With -f the processes of the workload tell of every request until Ctrl-C, whether its access log is on or not.
    """
    if output not in ("", "json"):
        raise CommandFailed(f"-o {output}: there is json")
    query = {
        "namespace": namespace or ("default" if name else ""),
        "name": name,
        "kind": kind,
        "level": level.upper(),
        "method": method,
        "path": path,
        "status": status,
        "failed": "true" if failed else "",
        "text": grep,
        "seconds": str(_seconds(since)),
        "limit": str(tail),
    }
    with AdminClient(control_plane) as client:
        if follow:
            if not name:
                raise CommandFailed("-f wants a name: of a workload or a service")
            _follow(client, {**query, "rate": str(rate)}, output)
            return
        found = client.get("/v1/logs", query, api.LogLines).lines if tail else ()
    for line in found:
        typer.echo(_shown(line, output))
    if not found:
        hint = "is the access log on (Telemetry, or MESHLIB_ACCESS_LOG)? -f tells of every request"
        if kind == "mesh":
            hint = "the library had nothing to tell, or the level of the loggers meshlib.* did not let it through"
        raise CommandFailed(f"no such line of the last {since} is known: {hint}")


def _follow(client: AdminClient, query: dict[str, str], output: str) -> None:
    try:
        for event, data in client.events("/v1/logs/follow", query):
            if event == "tapped":
                told = msgspec.json.decode(data, type=api.Tapped)
                typer.echo(f"following {', '.join(told.workloads)}: {told.connected} processes", err=True)
            elif event == "left":
                left = msgspec.json.decode(data, type=api.Left)
                typer.echo(f"{left.requests} more in this second: see --rate, or filter", err=True)
            else:
                typer.echo(_shown(msgspec.json.decode(data, type=api.LogLine), output))
                sys.stdout.flush()
    except KeyboardInterrupt:
        return
    raise CommandFailed(
        "the control plane has ended the stream: it stops, or you may not read this any more; run it again"
    )


def _shown(line: api.LogLine, output: str) -> str:
    if output:
        return msgspec.json.encode(line).decode()
    # What a process wrote must not move the reader's cursor.
    text = "".join(each if each.isprintable() else " " for each in line.text)
    if line.kind == "access":
        return f"{line.workload}.{line.namespace} {line.direction or '-'} {text}"
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(line.at))
    return f"{line.workload}.{line.namespace} {line.level} [{at}.{int(line.at % 1 * 1000):03d}Z] {line.logger}: {text}"


def _seconds(text: str) -> int:
    found = re.fullmatch(r"(\d{1,6})([smh])", text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 1 <= seconds <= 86400:
        raise CommandFailed(f"--since {text}: write 30s, 10m or 2h, up to 24h")
    return seconds
