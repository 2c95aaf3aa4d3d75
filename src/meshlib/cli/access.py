"""How does an administrator get a token? meshctl access: a token is told once, its hash goes into the tokens' file."""

from __future__ import annotations

import re
import secrets
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from meshlib.cli.failure import CommandFailed


class Action(StrEnum):
    TOKEN = "token"
    CHECK = "check"


def access(
    action: Annotated[Action, typer.Argument(help="`token` makes one, `check` reads an access file.")],
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="Whose token it is; the file to check.")],
    tokens: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Add the hash to this tokens' file.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the token to this file (mode 0600), not to the terminal."),
    ] = None,
    expires: Annotated[str, typer.Option(metavar="DATE", help="Until when it is good: 2027-01-31.")] = "",
) -> None:
    """Access to the control plane: make an administrator's token, or check the file that says who may do what.

    `token` prints the token, which nobody can be told again, and the entry for the tokens' file, or adds it there.
    """
    from meshlib.controlplane.access_rules import TOKEN_PREFIX, read_rules, read_tokens, token_hash
    from meshlib.controlplane.private_files import StateError, write_private

    if action is Action.CHECK:
        try:
            rules = read_rules(Path(name))
        except StateError as error:
            raise CommandFailed(str(error)) from None
        typer.echo(f"{name}: {len(rules.grants)} grants, {len(rules.tokens)} tokens, {len(rules.issuers)} issuers")
        return
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}", name):
        raise CommandFailed(f"{name!r} is no name for a token: letters, digits and ._@-")
    if expires and not re.fullmatch(r"\d{4}-\d\d-\d\d", expires):
        raise CommandFailed(f"--expires {expires!r}: a date is written 2027-01-31")
    text = f"{TOKEN_PREFIX}{secrets.token_urlsafe(32)}"
    entry = f"- name: {name}\n  sha256: {token_hash(text)}\n" + (f"  expires: {expires}\n" if expires else "")
    if tokens is not None:
        try:
            known = tokens.read_text("utf-8") if tokens.exists() else "tokens:\n"
            if any(each.name == name for each in (read_tokens(tokens) if tokens.exists() else ())):
                raise CommandFailed(f"{tokens} has a token {name} already: take it out first, or choose another name")
            tokens.parent.mkdir(parents=True, exist_ok=True)
            write_private(tokens, f"{known.rstrip()}\n{entry}".encode())
            read_tokens(tokens)
        except (StateError, OSError) as error:
            raise CommandFailed(str(error)) from None
    else:
        typer.echo(entry, nl=False, err=True)
    if output is None:
        typer.echo(text)
        return
    output.touch(mode=0o600)
    output.chmod(0o600)
    output.write_text(text + "\n")
