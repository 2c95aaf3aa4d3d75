"""Who may join the mesh where no platform vouches for processes? meshctl token: join tokens, for one identity each."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from meshlib.cli.admin_client import AdminClient
from meshlib.cli.failure import CommandFailed
from meshlib.cli.options import ControlPlaneUrl
from meshlib.cli.tables import age, table
from meshlib.controlplane.admin_api import Token, Tokens
from meshlib.istio.decoding import parse_duration


class Action(StrEnum):
    CREATE = "create"
    LIST = "list"
    REVOKE = "revoke"


def token(
    action: Annotated[Action, typer.Argument(help="What to do.")],
    id: Annotated[str, typer.Argument(metavar="[ID]", help="Which one, for revoke.")] = "",
    service_account: Annotated[str, typer.Option(help="Whose identity the token is good for.")] = "default",
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Its namespace.")] = "default",
    ttl: Annotated[str, typer.Option(help="How long it is good for, a week at most.")] = "1h",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the token to this file (mode 0600), not to the terminal."),
    ] = None,
    control_plane: ControlPlaneUrl = "",
) -> None:
    """Join tokens: `create` prints one, good once, for one identity; `list` shows them without their secrets; `revoke`.

    Give it to a process in a file: MESHLIB_TOKEN_FILE, with MESHLIB_IDENTITY=control-plane. It says whom to trust, too.
    """
    with AdminClient(control_plane) as client:
        if action is Action.CREATE:
            try:
                seconds = parse_duration(ttl).seconds
            except ValueError as error:
                raise CommandFailed(f"--ttl {ttl!r}: {error}") from None
            query = {"namespace": namespace, "service_account": service_account, "ttl": f"{seconds:g}"}
            made = client.post("/v1/tokens", query, Token)
            if output is None:
                typer.echo(made.text)
                return
            output.touch(mode=0o600)
            output.chmod(0o600)
            output.write_text(made.text + "\n")
            typer.echo(f"{output}: good once, for {made.identity}, until {_when(made.expires)}", err=True)
        elif action is Action.REVOKE:
            if not id:
                raise CommandFailed("which one? meshctl token revoke ID (meshctl token list shows them)")
            typer.echo(f"{client.post('/v1/tokens/revoke', {'id': id}, Token).id} revoked")
        else:
            found = client.get("/v1/tokens", {}, Tokens).tokens
            if not found:
                typer.echo("no tokens", err=True)
                return
            now = time.time()
            rows = (
                [each.id, each.identity, each.state, age(now - each.created), _when(each.expires)] for each in found
            )
            typer.echo(table(["ID", "IDENTITY", "STATE", "AGE", "EXPIRES"], rows))


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
