"""Which requests are made right now? meshctl tap, and top, which counts them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Annotated

import msgspec
import typer

from meshlib.cli.admin_client import AdminClient
from meshlib.cli.failure import CommandFailed
from meshlib.cli.live import again, show
from meshlib.cli.options import ControlPlaneUrl
from meshlib.cli.tables import table
from meshlib.controlplane import admin_api as api

Namespace = Annotated[str, typer.Option("--namespace", "-n", help="The workload's or service's.")]
Method = Annotated[str, typer.Option(help="Only requests by this method.")]
Path = Annotated[str, typer.Option(help="Only paths that begin with this.")]
From = Annotated[str, typer.Option("--from", help="Only requests of this workload: reviews, or reviews-v1.default.")]
To = Annotated[str, typer.Option(help="Only requests to this workload or host.")]
Failed = Annotated[bool, typer.Option("--failed", help="Only requests that failed.")]


def tap(
    name: Annotated[str, typer.Argument(metavar="WORKLOAD|SERVICE", help="Whose requests.")],
    namespace: Namespace = "default",
    method: Method = "",
    path: Path = "",
    from_: From = "",
    to: To = "",
    failed: Failed = False,
    rate: Annotated[int, typer.Option(help="At most so many a second.", min=1, max=1000)] = 100,
    limit: Annotated[int, typer.Option(help="End after so many requests; 0 is at Ctrl-C.", min=0)] = 0,
    output: Annotated[str, typer.Option("--output", "-o", help="json, one a line; or wide.")] = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """Show requests as they happen: their heads only, credentials in queries redacted.

    While it runs, the workload's processes leave a span for every call, and so does whoever they call; then sampling is
    what it was.
    """
    if output not in ("", "json", "wide"):
        raise CommandFailed(f"-o {output}: there are json and wide")
    query = {**_filters(name, namespace, method, path, from_, to, failed), "rate": str(rate)}
    shown = 0
    with AdminClient(control_plane) as client:
        try:
            for event, data in client.events("/v1/tap", query):
                if event == "tapped":
                    told = msgspec.json.decode(data, type=api.Tapped)
                    typer.echo(f"tapping {', '.join(told.workloads)}: {told.connected} processes", err=True)
                elif event == "left":
                    left = msgspec.json.decode(data, type=api.Left)
                    typer.echo(f"{left.requests} more in this second: see --rate, or filter", err=True)
                else:
                    request = msgspec.json.decode(data, type=api.MeshRequest)
                    shown += 1
                    typer.echo(data if output == "json" else "\n".join(lines(request, shown, wide=output == "wide")))
                    sys.stdout.flush()
                    if limit and shown >= limit:
                        return
        except KeyboardInterrupt:
            if not shown:
                typer.echo("no request was seen: do its processes push telemetry to this control plane?", err=True)
            return
    raise CommandFailed("the control plane has ended the tap: it stops, or you may not look any more; run it again")


def lines(request: api.MeshRequest, number: int, *, wide: bool) -> Iterator[str]:
    """As linkerd's tap writes them. The answer's line tells of its end: a span is told when it is over."""
    own = f"{request.workload}.{request.namespace}"
    source, target = (own, request.peer) if request.direction == "out" else (request.peer, own)
    ends = f"id={number} proxy={request.direction} src={source} dst={target} tls={str(request.mtls).lower()}"
    yield f"req {ends} :method={request.method} :authority={request.authority} :path={request.path}"
    told = f"rsp {ends} :status={request.status}"
    if request.grpc_status:
        told += f" grpc-status={request.grpc_status}"
    if request.flags != "-":
        told += f" flags={request.flags}"
    told += f" duration={request.duration * 1e6:.0f}µs"
    if wide:
        told += f" route={request.route or '-'} attempts={request.attempts or '-'} trace={request.trace_id}"
    yield told


def top(
    name: Annotated[str, typer.Argument(metavar="[WORKLOAD|SERVICE]", help="Whose requests; all without it.")] = "",
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Only this namespace.")] = "",
    method: Method = "",
    path: Path = "",
    from_: From = "",
    to: To = "",
    failed: Failed = False,
    window: Annotated[float, typer.Option("--window", "-w", help="Seconds to look back.", min=1, max=86400)] = 60,
    once: Annotated[bool, typer.Option("--once", help="Show it once, and end.")] = False,
    limit: Annotated[int, typer.Option(help="How many lines.", min=1)] = 30,
    output: Annotated[str, typer.Option("--output", "-o", help="json; implies --once.")] = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """Which paths are asked for most, how fast, how well? Of the requests that were sampled; `meshctl tap` beside it
    makes that all of a workload's."""
    if output not in ("", "json"):
        raise CommandFailed(f"-o {output}: there is json")
    where = namespace or ("default" if name else "")
    query = {**_filters(name, where, method, path, from_, to, failed), "seconds": str(window)}
    with AdminClient(control_plane) as client:
        for _ in again(not once and not output):
            rows = counted(client.get("/v1/requests", query, api.MeshRequests).requests)[:limit]
            if output:
                typer.echo(msgspec.json.format(msgspec.json.encode(rows)).decode())
            elif rows or not once:
                show(_table(rows) if rows else f"no request was sampled in the last {window:.0f} s", not once)
            else:
                raise CommandFailed(
                    f"no request was sampled in the last {window:.0f} s: sample more (Telemetry), or run meshctl tap "
                    "beside this"
                )


class TopRow(msgspec.Struct, frozen=True):
    """best, worst, last: milliseconds. success: the share, 0 to 1."""

    source: str
    destination: str
    method: str
    path: str
    route: str
    count: int
    best: float
    worst: float
    last: float
    success: float


def counted(requests: Iterable[api.MeshRequest]) -> list[TopRow]:
    """Most asked for first. A request of which both ends tell counts once: as its caller has seen it, retries and
    all."""
    known = list(requests)
    heard = {(each.trace_id, each.method, each.path.partition("?")[0]) for each in known if each.direction == "out"}
    groups: dict[tuple[str, str, str, str, str], list[api.MeshRequest]] = {}
    for each in known:
        path = each.path.partition("?")[0]
        if each.direction == "in" and (each.trace_id, each.method, path) in heard:
            continue
        own = f"{each.workload}.{each.namespace}"
        source, target = (own, each.peer) if each.direction == "out" else (each.peer, own)
        groups.setdefault((source, target, each.method, path, each.route), []).append(each)
    rows = []
    for key, found in groups.items():
        took = [each.duration * 1000 for each in found]
        good = sum(not each.failed for each in found) / len(found)
        rows.append(TopRow(*key, len(found), min(took), max(took), took[-1], good))
    return sorted(rows, key=lambda row: (-row.count, row.path, row.source, row.destination))


def _table(rows: Iterable[TopRow]) -> str:
    return table(
        ["SOURCE", "DESTINATION", "METHOD", "PATH", "ROUTE", "COUNT", "BEST", "WORST", "LAST", "SUCCESS_RATE"],
        (
            [
                row.source,
                row.destination,
                row.method,
                row.path,
                row.route or "-",
                str(row.count),
                *(f"{value:.0f}ms" for value in (row.best, row.worst, row.last)),
                f"{row.success:.2%}",
            ]
            for row in rows
        ),
    )


def _filters(name: str, namespace: str, method: str, path: str, from_: str, to: str, failed: bool) -> dict[str, str]:
    return {
        "name": name,
        "namespace": namespace,
        "method": method,
        "path": path,
        "from": from_,
        "to": to,
        "failed": "true" if failed else "",
    }
