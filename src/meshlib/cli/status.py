"""Is the mesh in the state that was asked for? meshctl proxy-status, problems (analyze) and version."""

from __future__ import annotations

import json
import time
from typing import Annotated

import msgspec
import typer

from meshlib.cli import running, yaml_files
from meshlib.cli.admin_client import AdminClient
from meshlib.cli.failure import CommandFailed
from meshlib.cli.options import ControlPlaneUrl
from meshlib.cli.tables import age, table
from meshlib.controlplane import admin_api as api
from meshlib.version import __version__

TYPES = ("CDS", "LDS", "EDS", "RDS")


def proxy_status(
    output: Annotated[str, typer.Option("--output", "-o", help="json, or wide with addresses.")] = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """Which processes get configuration, and have they accepted it?

    SYNCED: the last push was accepted. STALE: it was not answered yet. NACKED: it was refused, the reason follows; the
    process goes on with what it had. NOT SENT: the process did not ask for that type.
    """
    with AdminClient(control_plane) as client:
        clients = client.clients()
    if output == "json":
        typer.echo(json.dumps(msgspec.to_builtins(api.Clients(clients)), indent=2))
        return
    if output not in ("", "wide"):
        raise CommandFailed(f"-o {output}: there are json and wide")
    if not clients:
        typer.echo("no process is connected: start one with MESHLIB_CONTROL_PLANE set to the xDS address", err=True)
        return
    now = time.time()
    headers = ["NAME", "TYPE", *TYPES, "READY", "AGE"] + (["ADDRESS", "USER AGENT"] if output == "wide" else [])
    typer.echo(
        table(
            headers,
            (
                [
                    client.name,
                    client.kind,
                    *(client.types.get(type_, "NOT SENT") for type_ in TYPES),
                    ready(client),
                    age(now - client.connected) if client.connected else "",
                    *([client.address, client.user_agent] if output == "wide" else []),
                ]
                for client in sorted(clients, key=lambda client: client.name)
            ),
        )
    )
    for known in clients:
        for error in known.errors:
            typer.echo(f"{known.name}: {error}", err=True)


def ready(client: api.Client) -> str:
    """A process that serves nothing is neither ready nor not."""
    if not client.address:
        return "-"
    return "yes" if client.ready else "no"


def problems(
    output: Annotated[str, typer.Option("--output", "-o", help="json.")] = "", control_plane: ControlPlaneUrl = ""
) -> None:
    """What is wrong with the configuration? Exit code 1 if anything is not in force; warnings alone are none."""
    with AdminClient(control_plane) as client:
        found = client.problems()
    if output == "json":
        typer.echo(json.dumps(msgspec.to_builtins(api.Problems(found)), indent=2))
    elif output:
        raise CommandFailed(f"-o {output}: there is json")
    else:
        for problem in found:
            source = yaml_files.shown(problem.source)
            told = api.Problem(source, problem.object, problem.field, problem.reason)
            typer.echo(f"{problem.level.capitalize()}: {told}")
        if not found:
            typer.echo("no problems found", err=True)
    if any(problem.level == "error" for problem in found):
        raise typer.Exit(1)


def version(control_plane: ControlPlaneUrl = "") -> None:
    """meshctl's version, and that of the control plane if one runs."""
    typer.echo(f"client version: {__version__}")
    if control_plane or running.find():
        with AdminClient(control_plane) as client:
            typer.echo(f"control plane version: {client.version().version}")
