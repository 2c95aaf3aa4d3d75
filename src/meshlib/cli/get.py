"""What does the mesh hold? meshctl get, with kubectl's tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any

import msgspec
import typer
import yaml

from meshlib.cli import status
from meshlib.cli.admin_client import AdminClient
from meshlib.cli.failure import CommandFailed
from meshlib.cli.options import ControlPlaneUrl
from meshlib.cli.tables import age, table
from meshlib.controlplane import admin_api as api
from meshlib.controlplane.kinds import find_kind

Column = tuple[str, Callable[[Mapping[str, Any]], Any]]


def _at(*path: str) -> Callable[[Mapping[str, Any]], Any]:
    def look(object_: Mapping[str, Any]) -> Any:
        found: Any = object_
        for step in path:
            found = found.get(step) if isinstance(found, dict) else None
        return found

    return look


def _ports(service: Mapping[str, Any]) -> str:
    ports = _at("spec", "ports")(service) or ()
    return ",".join(f"{port.get('port')}/{port.get('protocol', 'TCP')}" for port in ports if isinstance(port, dict))


COLUMNS: dict[str, tuple[Column, ...]] = {
    # Istio's additionalPrinterColumns; AGE comes after them.
    "VirtualService": (("GATEWAYS", _at("spec", "gateways")), ("HOSTS", _at("spec", "hosts"))),
    "DestinationRule": (("HOST", _at("spec", "host")),),
    "ServiceEntry": (
        ("HOSTS", _at("spec", "hosts")),
        ("LOCATION", _at("spec", "location")),
        ("RESOLUTION", _at("spec", "resolution")),
    ),
    "WorkloadEntry": (("ADDRESS", _at("spec", "address")),),
    "PeerAuthentication": (("MODE", _at("spec", "mtls", "mode")),),
    "AuthorizationPolicy": (("ACTION", _at("spec", "action")),),
    "HTTPRoute": (("HOSTNAMES", _at("spec", "hostnames")),),
    "Service": (("TYPE", _at("spec", "type")), ("CLUSTER-IP", _at("spec", "clusterIP")), ("PORT(S)", _ports)),
}


def get(
    kind: Annotated[
        str, typer.Argument(help="vs, dr, gw, se, svc, ...; endpoints; clients. Without it: all objects.")
    ] = "",
    name: Annotated[str, typer.Argument(help="One of them.")] = "",
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Kubernetes namespace.")] = "default",
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Objects of all namespaces.")] = False,
    output: Annotated[str, typer.Option("--output", "-o", help="yaml, json or wide.")] = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """Show objects, and where the form that is in force comes from: a file, or meshctl apply."""
    if output not in ("", "yaml", "json", "wide"):
        raise CommandFailed(f"-o {output}: there are yaml, json and wide")
    if "/" in kind and not name:
        kind, _, name = kind.partition("/")
    namespace = "" if all_namespaces else namespace
    if kind == "clients":
        status.proxy_status(output=output, control_plane=control_plane)
        return
    known = find_kind(kind) if kind else None
    with AdminClient(control_plane) as client:
        if known is not None and known.kind == "Endpoints":
            _show_endpoints(client.endpoints(namespace, name), output)
            return
        objects = client.objects("" if kind == "all" else kind, namespace, name)
    if name and not objects:
        resource = known.plural_resource if known else kind
        where = f" in namespace {namespace}" if namespace else ""
        raise CommandFailed(f'{resource} "{name}" not found{where}: meshctl get {kind} -A shows what there is')
    if output in ("yaml", "json"):
        _show_whole(objects, output, single=bool(name) and len(objects) == 1)
    elif not objects:
        typer.echo(f"No resources found{f' in {namespace} namespace' if namespace else ''}.", err=True)
    else:
        _show_tables(objects, with_namespace=all_namespaces, with_resource=not kind or kind == "all", output=output)


def _show_whole(objects: Sequence[api.StoredObject], output: str, *, single: bool) -> None:
    if single and output == "yaml":
        typer.echo(objects[0].yaml.rstrip("\n"))
        return
    items = [yaml.safe_load(stored.yaml) for stored in objects]
    whole = items[0] if single else {"apiVersion": "v1", "items": items, "kind": "List"}
    if output == "json":
        typer.echo(json.dumps(whole, indent=4, default=str))
    else:
        typer.echo(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True).rstrip("\n"))


def _show_tables(
    objects: Iterable[api.StoredObject], *, with_namespace: bool, with_resource: bool, output: str
) -> None:
    by_kind: dict[str, list[api.StoredObject]] = {}
    for stored in objects:
        by_kind.setdefault(stored.kind, []).append(stored)
    now = time.time()
    shown: list[str] = []
    for kind, members in by_kind.items():
        columns = COLUMNS.get(kind, ())
        rows = []
        for stored in members:
            whole = yaml.safe_load(stored.yaml)
            rows.append(
                [
                    *([stored.namespace] if with_namespace else []),
                    f"{stored.resource}/{stored.name}" if with_resource else stored.name,
                    *(_cell(look(whole)) for _, look in columns),
                    age(now - stored.created),
                    _origin(stored, wide=output == "wide"),
                ]
            )
        headers = [
            *(["NAMESPACE"] if with_namespace else []),
            "NAME",
            *(header for header, _ in columns),
            "AGE",
            "FROM",
        ]
        shown.append(table(headers, rows))
    typer.echo("\n\n".join(shown))


def _origin(stored: api.StoredObject, *, wide: bool) -> str:
    if not wide and stored.origin == "applied":
        return "applied"
    where = stored.source if wide else PurePath(stored.source).name
    return f"applied from {where}" if stored.origin == "applied" else where


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return json.dumps(value, separators=(",", ":"))
    return str(value)


def _show_endpoints(services: Sequence[api.ServiceEndpoints], output: str) -> None:
    if output == "json":
        typer.echo(json.dumps(msgspec.to_builtins(api.Endpoints(tuple(services))), indent=2))
        return
    if output == "yaml":
        builtins = msgspec.to_builtins(api.Endpoints(tuple(services)))
        typer.echo(yaml.safe_dump(builtins, sort_keys=False).rstrip("\n"))
        return
    rows = []
    for service in services:
        for endpoint in service.endpoints:
            labels = ",".join(f"{key}={value}" for key, value in sorted(endpoint.labels.items()))
            rows.append(
                [service.name, endpoint.address, endpoint.workload, endpoint.health]
                + ([service.namespace, endpoint.locality, labels] if output == "wide" else [])
            )
        if not service.endpoints:
            rows.append([service.name, "<none>", "", ""] + ([service.namespace, "", ""] if output == "wide" else []))
    if not rows:
        typer.echo("No resources found.", err=True)
        return
    wide = ["NAMESPACE", "LOCALITY", "LABELS"] if output == "wide" else []
    typer.echo(table(["SERVICE", "ENDPOINT", "WORKLOAD", "HEALTH", *wide], rows))
