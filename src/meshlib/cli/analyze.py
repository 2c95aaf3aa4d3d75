"""What would Istio say of this configuration? meshctl analyze: files, a cluster, or files as if applied to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from meshlib.cli import yaml_files
from meshlib.cli.failure import CommandFailed
from meshlib.cli.kubernetes import cluster_of

if TYPE_CHECKING:
    from meshlib.errors import ConfigurationError
    from meshlib.istio.analyze import Message
    from meshlib.istio.resources import Object

ISSUES, UNREADABLE = 79, 65
"""Exit codes, as istioctl has them: messages of the threshold's level; texts that are no YAML."""


class Output(StrEnum):
    LOG, JSON, YAML = "log", "json", "yaml"


class Threshold(StrEnum):
    INFO, WARNING, ERROR = "Info", "Warning", "Error"


def analyze(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE|FOLDER|-]...", help="YAML; a folder's files, - for stdin.")
    ] = None,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="The cluster's objects; with FILEs, as if these were applied to it.")
    ] = False,
    context: Annotated[str, typer.Option(metavar="NAME", help="The kubeconfig's context to use.")] = "",
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", help="Tell only of this one. Files' objects that name none are in it.")
    ] = "",
    recursive: Annotated[bool, typer.Option("--recursive", "-R", help="Folders with all folders below them.")] = False,
    suppress: Annotated[
        list[str] | None,
        typer.Option("--suppress", "-S", metavar="CODE=OBJECT", help="As in 'IST0102=Namespace frod'. Repeatable."),
    ] = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="How messages are shown.")] = Output.LOG,
    failure_threshold: Annotated[
        Threshold, typer.Option(help="From which level on the exit code is 79.")
    ] = Threshold.ERROR,
    output_threshold: Annotated[
        Threshold, typer.Option(help="From which level on messages are shown.")
    ] = Threshold.INFO,
) -> None:
    """Find references that lead nowhere, rules that nobody reaches, and contradictions: istioctl's messages."""
    from meshlib.istio.analyze import Level, Suppression
    from meshlib.istio.analyze import analyze as look

    if not files and not kubernetes and not context:
        raise CommandFailed("what is to be analyzed? Name files, or --kubernetes")
    try:
        suppressions = [Suppression.parse(each) for each in suppress or ()]
    except ValueError as error:
        raise CommandFailed(str(error)) from None
    _warn_of_unknown(suppressions)
    objects, problems, unreadable = _read(files or [], namespace, recursive)
    if kubernetes or context:
        cluster, more = asyncio.run(_cluster(context))
        objects = _over(cluster, objects)
        problems += more
    messages = look(objects, problems, is_whole=kubernetes or bool(context), suppressions=suppressions)
    if namespace:
        messages = tuple(each for each in messages if _is_about(each, namespace))
    shown = [each for each in messages if each.level >= Level[output_threshold.name]]
    _show(shown, output)
    target = ", ".join(files or ()) or (f"namespace: {namespace}" if namespace else "all namespaces")
    for text in unreadable:
        typer.echo(f"Error(s) adding files: {text}", err=True)
    if not shown and not unreadable:
        typer.echo(f"\N{HEAVY CHECK MARK} No validation issues found when analyzing {target}.", err=True)
    if any(each.level >= Level[failure_threshold.name] for each in messages):
        if output is Output.LOG:
            typer.echo(f"Error: Analyzers found issues when analyzing {target}.", err=True)
            typer.echo("See https://istio.io/latest/docs/reference/config/analysis for more information.", err=True)
        raise typer.Exit(ISSUES)
    if unreadable:
        raise typer.Exit(UNREADABLE)


def _read(
    files: Sequence[str], namespace: str, recursive: bool
) -> tuple[list[Object], list[ConfigurationError], list[str]]:
    """The objects, what is wrong with some, and what is no YAML at all."""
    from meshlib.istio.parse import parse_text

    objects: list[Object] = []
    problems: list[ConfigurationError] = []
    for source, text in yaml_files.read(files, recursive=recursive):
        parsed = parse_text(text, source, namespace=namespace or "default")
        objects += parsed.objects
        problems += (*parsed.problems, *parsed.warnings)
    unreadable = [f"{yaml_files.shown(each.source)}: {each.reason}" for each in problems if not each.object]
    return objects, [each for each in problems if each.object], unreadable


async def _cluster(context: str) -> tuple[list[Object], list[ConfigurationError]]:
    """All that a control plane would read there. Raises CommandFailed: half a cluster would look full of mistakes."""
    from meshlib.controlplane.kubernetes import read_cluster
    from meshlib.kube.client import KubeClient
    from meshlib.kube.errors import KubernetesError

    try:
        async with KubeClient(cluster_of(context)) as client:
            contents = await read_cluster(client)
    except KubernetesError as error:
        raise CommandFailed(str(error)) from None
    return list(contents.objects), [*contents.problems, *contents.warnings]


def _over(cluster: Iterable[Object], files: Iterable[Object]) -> list[Object]:
    """The files' form of an object counts."""
    found = {(each.api_version.rpartition("/")[0], *each.key): each for each in (*cluster, *files)}
    return list(found.values())


def _is_about(message: Message, namespace: str) -> bool:
    name = message.origin.partition(" ")[2]
    owner, slash, _ = name.rpartition("/")
    return owner == namespace if slash else name == namespace


def _warn_of_unknown(suppressions: Iterable[Any]) -> None:
    from meshlib.istio.analyze.messages import KINDS

    known = {each.code for each in KINDS}
    for each in suppressions:
        if each.code not in known:
            told = f"Supplied message code '{each.code}' is an unknown message code and will not have any effect."
            typer.echo(f"Warning: {told}", err=True)


def _show(messages: Sequence[Message], output: Output) -> None:
    if output is Output.LOG:
        for each in messages:
            typer.echo(each.line(_reference(each)))
        return
    found = [each.shown(_reference(each)) for each in messages]
    if output is Output.JSON:
        typer.echo(json.dumps(found, indent="\t", ensure_ascii=False))
    else:
        typer.echo(yaml.safe_dump(found, sort_keys=True, allow_unicode=True), nl=False)


def _reference(message: Message) -> str:
    from meshlib.controlplane.kubernetes import SOURCE

    return "" if message.reference == SOURCE else yaml_files.shown(message.reference)
