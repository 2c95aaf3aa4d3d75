"""How does configuration get into the mesh? meshctl apply, delete and validate, with kubectl's words."""

from __future__ import annotations

from typing import Annotated

import typer

from meshlib.cli import yaml_files
from meshlib.cli.admin_client import AdminClient
from meshlib.cli.failure import CommandFailed
from meshlib.cli.options import ControlPlaneUrl, Files, Namespace, Recursive
from meshlib.controlplane import admin_api as api
from meshlib.controlplane.kinds import find_kind


def apply(
    files: Files, recursive: Recursive = False, namespace: Namespace = "", control_plane: ControlPlaneUrl = ""
) -> None:
    """Put the objects of these files into force.

    Objects are taken one by one: the good ones are applied, the bad ones are refused with all their problems, and then
    the exit code is 1.
    """
    refused, count = False, 0
    with AdminClient(control_plane) as client:
        for source, text in yaml_files.read(files, recursive=recursive):
            results = client.apply(text, source, namespace)
            count += len(results.results) + len(results.problems)
            refused |= report(results)
    if not count:
        raise CommandFailed("no objects passed to apply: the files that -f names are empty")
    if refused:
        raise typer.Exit(1)


def delete(
    named: Annotated[
        list[str] | None, typer.Argument(metavar="[KIND NAME...]", help="What to delete, by name.")
    ] = None,
    files: Annotated[
        list[str] | None, typer.Option("--filename", "-f", metavar="FILE|DIR|-", help="The objects named in these.")
    ] = None,
    recursive: Recursive = False,
    namespace: Namespace = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """Take objects out of force: those in files, or by kind and name (KIND/NAME works too).

    An object that was applied over a file's form: the file's form is in force again. One that only a file in the
    control plane's folders defines: it is out of force until that file changes.
    """
    if bool(named) == bool(files):
        raise CommandFailed("what is to be deleted? Give -f FILE, or KIND NAME, and not both")
    missing = False
    with AdminClient(control_plane) as client:
        if files:
            for source, text in yaml_files.read(files, recursive=recursive):
                missing |= report(client.delete(text, source, namespace))
        for kind, name in _kinds_and_names(named or []):
            missing |= report(client.delete_named(kind, namespace, name))
    if missing:
        raise typer.Exit(1)


def validate(files: Files, recursive: Recursive = False) -> None:
    """Check files without a control plane: every problem of every object, with file and line. Exit code 1 if any."""
    from meshlib.istio.parse import parse_text

    good, bad = 0, 0
    for source, text in yaml_files.read(files, recursive=recursive):
        parsed = parse_text(text, source)
        good += len(parsed.objects)
        bad += len(parsed.problems)
        for warning in parsed.warnings:
            complain(api.Problem(warning.source, warning.object, warning.field, warning.reason, "warning"))
        for problem in parsed.problems:
            complain(api.Problem(problem.source, problem.object, problem.field, problem.reason))
    if bad:
        raise typer.Exit(1)
    if not good:
        raise CommandFailed("no objects in these files: nothing was checked")
    typer.echo(f"{good} object{'s' if good != 1 else ''} valid")


def _kinds_and_names(words: list[str]) -> list[tuple[str, str]]:
    """`vs reviews ratings`, `vs/reviews dr/reviews` -> [("vs", "reviews"), ...]"""
    if all("/" in word for word in words):
        pairs = [word.split("/", 1) for word in words]
        return [(kind, name) for kind, name in pairs]
    kind, *names = words
    if not names:
        raise CommandFailed(f"which {kind}? name one: meshctl delete {kind} NAME")
    if any("/" in word for word in words):
        raise CommandFailed("either KIND NAME... or KIND/NAME..., not a mix of both")
    return [(kind, name) for name in names]


def report(results: api.Results) -> bool:
    """Print what became of each object; whether anything was refused or not found."""
    failed = bool(results.problems)
    for result in results.results:
        note = f" ({result.note})" if result.note else ""
        match result.outcome:
            case "not found":
                failed = True
                known = find_kind(result.resource)
                resource = known.plural_resource if known else result.resource
                typer.echo(f'Error from server (NotFound): {resource} "{result.name}" not found{note}', err=True)
            case "deleted":
                typer.echo(f'{result.resource} "{result.name}" deleted{note}')
            case outcome:
                typer.echo(f"{result.resource}/{result.name} {outcome}{note}")
    for problem in (*results.warnings, *results.problems):
        complain(problem)
    return failed


def complain(problem: api.Problem) -> None:
    source = yaml_files.shown(problem.source)
    told = api.Problem(source, problem.object, problem.field, problem.reason)
    typer.echo(f"{problem.level.capitalize()}: {told}", err=True)
