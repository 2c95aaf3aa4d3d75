"""How is the mesh's root replaced? meshctl ca: its state, and a rotation in which nobody is left behind."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from meshlib.cli.admin_client import AdminClient
from meshlib.cli.failure import CommandFailed
from meshlib.cli.options import ControlPlaneUrl
from meshlib.cli.tables import table
from meshlib.controlplane.admin_api import Authority

LOOK_AGAIN = 0.5


class Action(StrEnum):
    STATUS = "status"
    ROTATE = "rotate"
    BUNDLE = "bundle"


def ca(
    action: Annotated[Action, typer.Argument(help="What to do.")],
    step: Annotated[
        str, typer.Option(metavar="STEP", help="Only this step of the rotation: begin, switch or finish.")
    ] = "",
    wait: Annotated[float, typer.Option(help="Seconds to wait until everybody trusts the new root.", min=0)] = 300,
    force: Annotated[bool, typer.Option("--force", help="Go on without those who are late; they fail.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the bundle to this file.")] = None,
    control_plane: ControlPlaneUrl = "",
) -> None:
    """The mesh's certificate authority: `status`, `bundle` prints the roots, `rotate` replaces the root.

    A rotation adds a new root to everybody's bundle, waits until all who listen have said that they trust it, and signs
    with it from then on. The old root goes by a second `rotate`, once nothing that it signed is valid any more.
    """
    with AdminClient(control_plane) as client:
        if action is Action.ROTATE:
            _rotate(client, step, wait, force)
            return
        found = client.get("/v1/ca", {}, Authority)
        if action is Action.STATUS:
            _show(found)
            return
        bundle = "".join(root.pem for root in found.roots)
        if output is None:
            typer.echo(bundle, nl=False)
        else:
            output.write_text(bundle)


def _rotate(client: AdminClient, step: str, wait: float, force: bool) -> None:
    if step:
        if step not in ("begin", "switch", "finish"):
            raise CommandFailed(f"--step {step!r}: there are begin, switch and finish")
        _tell(_take(client, step, force))
        return
    found = client.get("/v1/ca", {}, Authority)
    if found.stage == "switched":
        if found.old_until > time.time() and not force:
            raise CommandFailed(
                f"certificates of the old root may be valid until {_when(found.old_until)}: wait, or --force"
            )
        _tell(_take(client, "finish", force))
        return
    if found.stage == "idle":
        found = _take(client, "begin", force)
        _tell(found)
    deadline = time.monotonic() + wait
    while found.late and not force and time.monotonic() < deadline:
        time.sleep(LOOK_AGAIN)  # the admin API tells nobody; each look is one small answer
        found = client.get("/v1/ca", {}, Authority)
    if found.late and not force:
        late = ", ".join(found.late[:5]) + (f" and {len(found.late) - 5} more" if len(found.late) > 5 else "")
        raise CommandFailed(f"the new root has not reached {late}: run it again, or --force leaves them behind")
    _tell(_take(client, "switch", force))


def _take(client: AdminClient, step: str, force: bool) -> Authority:
    return client.post("/v1/ca/rotate", {"step": step, "force": "true" if force else ""}, Authority)


def _tell(found: Authority) -> None:
    signing = found.roots[0].fingerprint[:16]
    match found.stage:
        case "begun":
            typer.echo(f"begun: root {found.roots[-1].fingerprint[:16]} is trusted besides {signing}")
        case "switched":
            typer.echo(f"switched: root {signing} signs; the old one is trusted until {_when(found.old_until)}")
            typer.echo("meshctl ca rotate takes it out then")
        case _:
            typer.echo(f"finished: root {signing} is the only one")


def _show(found: Authority) -> None:
    plugged = ", plugged in" if found.is_plugged else ""
    typer.echo(f"CA of {found.trust_domain}{plugged}; rotation: {found.stage}")
    rows = [[root.fingerprint[:16], root.state, _when(root.ends), root.subject] for root in found.roots]
    typer.echo(table(["ROOT", "STATE", "UNTIL", "SUBJECT"], rows))
    for who in found.late:
        typer.echo(f"late: {who} does not trust all of them yet", err=True)


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
