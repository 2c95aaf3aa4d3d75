"""What does one process go by? meshctl config, in istioctl proxy-config's tables, and meshctl explain."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import msgspec
import typer
import yaml

from meshlib.cli.admin_client import AdminClient, CommandFailed
from meshlib.cli.options import ControlPlaneUrl
from meshlib.cli.tables import table
from meshlib.controlplane.inspection import Configuration, Explained

Rows = Callable[[Configuration], Iterable[list[str]]]

KINDS: dict[str, tuple[list[str], Rows]] = {
    "listeners": (
        ["NAME", "DIRECTION", "DESTINATION"],
        lambda found: ([each.name, each.direction, each.destination] for each in found.listeners),
    ),
    "routes": (
        ["NAME", "VIRTUAL HOST", "DOMAINS", "ROUTE", "MATCH", "ACTION", "FROM"],
        lambda found: (
            [
                each.name,
                each.virtual_host,
                _domains(each.domains),
                each.route or "-",
                each.match,
                each.action,
                each.origin or "-",
            ]
            for each in found.routes
        ),
    ),
    "clusters": (
        ["SERVICE FQDN", "PORT", "SUBSET", "DIRECTION", "TYPE", "LOAD BALANCING", "ENDPOINTS", "FROM"],
        lambda found: (
            [
                each.service,
                str(each.port or "-"),
                each.subset or "-",
                each.direction,
                each.type,
                each.load_balancing,
                str(each.endpoints),
                each.origin or "-",
            ]
            for each in found.clusters
        ),
    ),
    "endpoints": (
        ["ENDPOINT", "STATUS", "LOCALITY", "WEIGHT", "PRIORITY", "MTLS", "WORKLOAD", "CLUSTER"],
        lambda found: (
            [
                each.endpoint,
                each.health,
                each.locality or "-",
                str(each.weight),
                str(each.priority),
                "√" if each.mtls else "-",
                each.workload or "-",
                each.cluster,
            ]
            for each in found.endpoints
        ),
    ),
}
_WHOLE = {
    "listeners": ("listeners", "inbound"),
    "routes": ("route_configurations",),
    "clusters": ("clusters",),
    "endpoints": ("assignments",),
}


def config(
    kind: Annotated[str, typer.Argument(help="listeners, routes, clusters or endpoints.", metavar="KIND")],
    workload: Annotated[
        str, typer.Argument(help="A process as meshctl proxy-status names it, or a workload: productpage-v1.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="json or yaml, with every field.")] = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """What configuration does a process hold? It asks for the hosts that it calls, and is told of no others."""
    known = next((each for each in KINDS if each == kind or each.removesuffix("s") == kind), None)
    if known is None:
        raise CommandFailed(f"{kind}: there are {', '.join(KINDS)}")
    if output not in ("", "json", "yaml"):
        raise CommandFailed(f"-o {output}: there are json and yaml")
    with AdminClient(control_plane) as client:
        found = client.get("/v1/config", {"of": workload, "whole": "true" if output else ""}, Configuration)
    if found.alike > 1:
        typer.echo(f"{found.name}, one of {found.alike} processes of {workload}:", err=True)
    if output:
        whole = {name: (found.whole or {}).get(name, []) for name in _WHOLE[known]}
        _tell(whole, output)
        return
    headers, rows = KINDS[known]
    shown = list(rows(found))
    if not shown:
        raise CommandFailed(f"{found.name} holds no {known}: it has called nobody yet")
    typer.echo(table(headers, shown))


def explain(
    url: Annotated[str, typer.Argument(help="http://reviews:9080/reviews/0")],
    workload: Annotated[str, typer.Option("--from", help="Who sends it: a process, or a workload.")],
    method: Annotated[str, typer.Option("--method", "-X", help="The request's method.")] = "GET",
    header: Annotated[list[str] | None, typer.Option("--header", "-H", help="end-user: jason")] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="json.")] = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """Where would a request go, and why? As mesh.explain() answers in that process, but for its own counters."""
    if output not in ("", "json"):
        raise CommandFailed(f"-o {output}: there is json")
    query = [("of", workload), ("method", method), ("url", url), *(("header", each) for each in header or ())]
    with AdminClient(control_plane) as client:
        found = client.get("/v1/config/explain", query, Explained)
    if output:
        _tell(found.explanation, output)
        return
    typer.echo(f"From {found.name}:\n{found.text}")
    typer.echo("Calls in flight, ejections and breakers are the process's own; mesh.explain() shows them.", err=True)


def _domains(domains: tuple[str, ...]) -> str:
    """As istioctl: the first, and how many more."""
    if not domains:
        return "-"
    return domains[0] if len(domains) == 1 else f"{domains[0]} + {len(domains) - 1} more..."


def _tell(value: Any, output: str) -> None:
    built = msgspec.to_builtins(value)
    if output == "json":
        typer.echo(json.dumps(built, indent=2))
    else:
        typer.echo(yaml.safe_dump(built, sort_keys=False, allow_unicode=True).rstrip("\n"))
