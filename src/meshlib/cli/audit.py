"""Who changed what? meshctl audit: the control plane's audit log, the last entries."""

from __future__ import annotations

import difflib
import json
import time
from typing import Annotated

import msgspec
import typer

from meshlib.cli.admin_client import AdminClient
from meshlib.cli.failure import CommandFailed
from meshlib.cli.options import ControlPlaneUrl
from meshlib.cli.tables import table
from meshlib.controlplane.audit import Entries, Entry
from meshlib.istio.decoding import parse_duration


def audit(
    object: Annotated[str, typer.Argument(metavar="[OBJECT]", help="Only objects that this is a part of.")] = "",
    who: Annotated[str, typer.Option(help="Only changes by this name.")] = "",
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Only this namespace.")] = "",
    since: Annotated[str, typer.Option(metavar="DURATION", help="How far to look back: 10m, 24h.")] = "",
    limit: Annotated[int, typer.Option(help="How many, the last ones.", min=1, max=2000)] = 50,
    diff: Annotated[bool, typer.Option("--diff", help="With what each has changed.")] = False,
    output: Annotated[str, typer.Option("--output", "-o", help="json: one entry a line, before and after in it.")] = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """Who changed what, when, and from where? The last entries of the audit log, the newest at the end."""
    if output not in ("", "json"):
        raise CommandFailed(f"-o {output}: there is json")
    start = ""
    if since:
        try:
            start = f"{time.time() - parse_duration(since).seconds:.3f}"
        except ValueError as error:
            raise CommandFailed(f"--since {since!r}: {error}") from None
    query = {"since": start, "limit": str(limit), "who": who, "object": object, "namespace": namespace}
    with AdminClient(control_plane) as client:
        found = client.get("/v1/audit", query, Entries).entries
    if output:
        for each in found:
            typer.echo(json.dumps(msgspec.to_builtins(each), ensure_ascii=False))
    elif not found:
        typer.echo("nothing was changed", err=True)
    elif diff:
        for each in found:
            typer.echo(" ".join(part for part in _row(each) if part))
            typer.echo("".join(_difference(each)), nl=False)
    else:
        typer.echo(table(["TIME", "WHO", "ACTION", "OBJECT", "OUTCOME", "NOTE"], map(_row, found)))


def _row(each: Entry) -> list[str]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.at))
    note = each.note or each.source
    who = each.who if each.method != "open" else f"{each.who}, {each.agent}"
    return [_line(part) for part in (when, who, each.action, each.object, each.outcome, note)]


def _line(text: str) -> str:
    """What others have written is one line of a terminal, and no more."""
    return "".join(each if each.isprintable() else " " for each in text)


def _difference(each: Entry) -> list[str]:
    before, after = each.before.splitlines(keepends=True), each.after.splitlines(keepends=True)
    return [f"    {line}" for line in list(difflib.unified_diff(before, after, n=1))[2:]]
