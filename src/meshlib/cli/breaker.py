"""How does an operator open or close a service's circuit? meshctl breaker: a BackendTrafficPolicy, written for him."""

from __future__ import annotations

from typing import Annotated

import typer

from meshlib.cli.admin_client import AdminClient
from meshlib.cli.apply import report
from meshlib.cli.failure import CommandFailed
from meshlib.cli.options import ControlPlaneUrl
from meshlib.cli.tables import table
from meshlib.controlplane.breakers import KIND, BreakerDetail
from meshlib.controlplane.picture import ServiceDetail

_WORDS = ("show", "open", "close", "release")


def breaker(
    what: Annotated[str, typer.Argument(metavar="show|open|close|release", help="release lets it decide again.")],
    service: Annotated[str, typer.Argument(metavar="SERVICE", help="The service that is called.")],
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="The service's.")] = "default",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be applied, and change nothing.")
    ] = False,
    control_plane: ControlPlaneUrl = "",
) -> None:
    """Open or close the circuit of a service in all of its callers, or let it decide by itself again."""
    if what not in _WORDS:
        raise CommandFailed(f"{what}: there are {', '.join(_WORDS)}")
    with AdminClient(control_plane) as client:
        found = client.get(f"/v1/services/{namespace}/{service}", {}, ServiceDetail).breaker
        if found is None:
            raise CommandFailed(f"the control plane knows nothing of breakers of {namespace}/{service}: is it older?")
        if what == "show":
            typer.echo(_shown(found))
            return
        text = {"open": found.open, "close": found.close, "release": found.release}[what]
        if what == "release" and not found.forced:
            raise CommandFailed(f"no operator holds the circuit of {namespace}/{service}: there is nothing to release")
        if dry_run:
            typer.echo(text.rstrip("\n") or f"# {KIND} {namespace}/{found.name} would be deleted")
            return
        results = (
            client.apply(text, "meshctl breaker", namespace)
            if text
            else client.delete_named(KIND, namespace, found.name)
        )
        if report(results):
            raise typer.Exit(1)


def _shown(found: BreakerDetail) -> str:
    counts = (str(found.states.get(state, 0)) for state in ("closed", "half-open", "open"))
    return table(["FORCED", "CLOSED", "HALF-OPEN", "OPEN"], [[found.forced or "-", *counts]])
