"""May this call come in? meshctl authz check: the decision of the workload's own rules, and the rule that made it."""

from __future__ import annotations

import ipaddress
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshlib.cli import yaml_files
from meshlib.cli.admin_client import AdminClient
from meshlib.cli.failure import CommandFailed
from meshlib.cli.options import ControlPlaneUrl
from meshlib.cli.tables import table
from meshlib.model import Inbound, Node, Peer, SpiffeId, Workload

if TYPE_CHECKING:
    from meshlib.istio.resources import Object
    from meshlib.policy.access_explanation import AccessExplanation, Judged
    from meshlib.policy.admission import Question


class Action(StrEnum):
    CHECK = "check"


def authz(
    action: Annotated[Action, typer.Argument(help="check.")],
    workload: Annotated[
        str, typer.Argument(help="Who is called: a process, or a workload (reviews-v1, or with .NAMESPACE).")
    ],
    caller: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="WHO",
            help="A principal (cluster.local/ns/foo/sa/sleep), NAMESPACE/ACCOUNT, NAMESPACE, or an IP address; an "
            "address besides one of the others. Without any identity: plaintext.",
        ),
    ] = None,
    method: Annotated[str, typer.Option("--method", "-X", help="The request's method.")] = "GET",
    path: Annotated[str, typer.Option(help="Path and query.")] = "/",
    host: Annotated[str, typer.Option(help="The Host header; without it, the workload's name.")] = "",
    port: Annotated[int, typer.Option(help="The workload's port; without it, the one it has registered.")] = 0,
    header: Annotated[list[str] | None, typer.Option("--header", "-H", help="x-version: v1. Repeatable.")] = None,
    jwt: Annotated[str, typer.Option(metavar="TOKEN|@FILE|-", help="As Authorization: Bearer; - reads it.")] = "",
    files: Annotated[
        list[str] | None,
        typer.Option("--filename", "-f", metavar="FILE|DIR", help="By these objects, without a control plane."),
    ] = None,
    labels: Annotated[
        str, typer.Option(help="The workload's, app=reviews,version=v1, where no process or manifest tells.")
    ] = "",
    output: Annotated[str, typer.Option("--output", "-o", help="json.")] = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """Would this call be let in, and by which rule? Exit code 1 when it is turned away.

    It is decided by the guard that the workload itself asks, with the rules that the control plane has sent it, or by
    the objects of files. External authorizers are not asked; keys of issuers are fetched.
    """
    from meshlib.model import Headers, Request
    from meshlib.policy.access_explanation import explain_access

    if output not in ("", "json"):
        raise CommandFailed(f"-o {output}: there is json")
    pairs = [_header(text) for text in header or ()]
    if jwt:
        pairs.append((b"authorization", f"Bearer {_token(jwt)}".encode("latin-1", "replace")))
    name, _, namespace = workload.partition(".")
    if files or labels:
        who = Workload(name, namespace or "default", labels=_labels(labels))
        inbound = _of_objects(who, files or [], control_plane)
    else:
        inbound, port = _of_the_process(workload, port, control_plane)
    peer = _peer(caller or [], port)
    request = Request(method.upper(), "http", (host or name).lower(), path, Headers(tuple(pairs)))
    found = explain_access(inbound, request, peer, time.time(), _answer)
    asked = f"{request.method} {path} from {_told(peer)} to {workload}"
    _show_json(asked, found) if output else _show(asked, found)
    if not found.is_allowed:
        raise typer.Exit(1)


def _of_the_process(workload: str, port: int, control_plane: str) -> tuple[Inbound, int]:
    """What it was sent, in the very bytes, and its port."""
    from meshlib.cli.config import ask

    found, held = ask(control_plane, workload, "sent")
    if not held.inbound:
        raise CommandFailed(
            f"{found.name} has asked for no rules: it serves nothing by the mesh (mesh.asgi, mesh.wsgi or meshctl run)"
        )
    if not port:
        with AdminClient(control_plane) as client:
            address = next((each.address for each in client.clients() if each.name == found.name), "")
        port = int(address.rpartition(":")[2]) if address else 0
    fitting = [each for each in held.inbound if each.port == port]
    return (fitting or list(held.inbound))[0], port


def _of_objects(workload: Workload, files: Sequence[str], control_plane: str) -> Inbound:
    from dataclasses import replace

    from meshlib.istio.translate import translate

    objects = _read(files) if files else _in_force(control_plane)
    if not workload.labels:
        workload = replace(workload, labels=_labels_of(workload, objects))
    node_id = f"sidecar~0.0.0.0~{workload.name}.{workload.namespace}~{workload.namespace}.svc.cluster.local"
    return translate(tuple(objects), (), Node(node_id, workload)).snapshot.inbound[0]


def _read(files: Sequence[str]) -> list[Object]:
    from meshlib.istio.parse import parse_text

    found: list[Object] = []
    for source, text in yaml_files.read(files):
        parsed = parse_text(text, yaml_files.shown(source))
        if parsed.problems:
            raise CommandFailed(f"{parsed.problems[0]}\nmend it first: what is refused would not be in force")
        found += parsed.objects
    return found


def _in_force(control_plane: str) -> list[Object]:
    from meshlib.cli.stored import objects_of

    with AdminClient(control_plane) as client:
        return objects_of(client)


def _labels_of(workload: Workload, objects: Iterable[Object]) -> tuple[tuple[str, str], ...]:
    """Those that the manifest of this name gives its pods; else what the Service of this name selects by."""
    by_service: Mapping[str, Any] = {}
    for each in objects:
        if (each.namespace, each.name) != (workload.namespace, workload.name):
            continue
        spec: Any = each.raw.get("spec") or {}
        if isinstance(spec.get("template"), Mapping):
            return _sorted((spec["template"].get("metadata") or {}).get("labels") or {})
        if each.kind == "Pod":
            return _sorted((each.raw.get("metadata") or {}).get("labels") or {})
        if each.kind == "Service":
            by_service = spec.get("selector") or {}
    if not by_service:
        raise CommandFailed(
            f"nothing tells the labels of {workload.name} in namespace {workload.namespace}, by which policies select "
            "it: give --labels app=reviews,version=v1"
        )
    return _sorted(by_service)


def _sorted(labels: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((str(key), str(value)) for key, value in labels.items()))


def _labels(text: str) -> tuple[tuple[str, str], ...]:
    found = {}
    for pair in filter(None, text.split(",")):
        key, mark, value = pair.partition("=")
        if not mark or not key.strip():
            raise CommandFailed(f"--labels {text!r}: is written app=reviews,version=v1")
        found[key.strip()] = value.strip()
    return _sorted(found)


def _peer(caller: Sequence[str], port: int) -> Peer:
    identity: SpiffeId | None = None
    address = ""
    for who in caller:
        try:
            address = str(ipaddress.ip_address(who))
            continue
        except ValueError:
            pass
        if identity is not None:
            raise CommandFailed("--from: a caller has one identity, and an address besides")
        identity = _identity(who)
    return Peer(identity, identity is not None, address, port)


def _identity(who: str) -> SpiffeId:
    parts = who.split("/")
    if who.startswith("spiffe://"):
        text = who
    elif "/ns/" in who:
        text = f"spiffe://{who}"
    elif len(parts) <= 2:
        text = SpiffeId.of("cluster.local", parts[0], parts[1] if len(parts) == 2 else "default").uri
    else:
        text = ""
    try:
        return SpiffeId.parse(text)
    except ValueError:
        raise CommandFailed(
            f"--from {who!r}: is no principal (cluster.local/ns/foo/sa/sleep), NAMESPACE/ACCOUNT, NAMESPACE or address"
        ) from None


def _header(text: str) -> tuple[bytes, bytes]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise CommandFailed(f"--header {text!r}: is written NAME: VALUE")
    return name.strip().lower().encode("latin-1", "replace"), value.strip().encode("latin-1", "replace")


def _token(given: str) -> str:
    if given == "-":
        return sys.stdin.read().strip()
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandFailed(f"--jwt {given}: {getattr(error, 'strerror', None) or 'is no text'}") from None


def _answer(question: Question) -> Any:
    """Keys are fetched, as the workload would; nobody else is asked."""
    import httpx

    from meshlib.policy.admission import FetchKeys
    from meshlib.policy.jwt import Keys

    if not isinstance(question, FetchKeys):
        return None
    uri = question.provider.jwks_uri
    try:
        response = httpx.get(uri, timeout=question.provider.timeout, follow_redirects=False)
        return Keys.read(response.raise_for_status().text)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        typer.echo(f"the keys of {question.provider.issuer} ({uri}): {str(error) or type(error).__name__}", err=True)
        return None


def _told(peer: Peer) -> str:
    who = peer.identity.uri if peer.identity is not None else "somebody in plaintext"
    return f"{who} at {peer.address}" if peer.address else who


def _show(asked: str, found: AccessExplanation) -> None:
    typer.echo(f"{'ALLOWED' if found.is_allowed else 'DENIED'}: {asked}")
    typer.echo(f"  {found.reason}")
    for rule in found.decided:
        typer.echo(f"  by {rule.name}: {rule.origin or 'of unknown origin'}")
    for name in found.asked:
        typer.echo(f"  the external authorizer {name} would be asked first; it was not")
    for note in found.verdict.notes:
        typer.echo(f"  {note}")
    if found.rules:
        typer.echo(table(["", "ACTION", "RULE", "FROM"], map(_row, found.rules)))


def _row(each: Judged) -> list[str]:
    action = f"{each.rule.action}{' (dry run)' if each.rule.dry_run else ''}"
    return ["->" if each.holds else "no", action, each.rule.name, each.rule.origin or "-"]


def _show_json(asked: str, found: AccessExplanation) -> None:
    told = {
        "call": asked,
        "allowed": found.is_allowed,
        "reason": found.reason,
        "by": [{"rule": each.name, "from": each.origin} for each in found.decided],
        "asked": list(found.asked),
        "notes": list(found.verdict.notes),
        "rules": [
            {
                "action": str(each.rule.action),
                "rule": each.rule.name,
                "from": each.rule.origin,
                "dry_run": each.rule.dry_run,
                "applies": each.holds,
            }
            for each in found.rules
        ],
    }
    typer.echo(json.dumps(told, indent=2))
