"""What does one process go by? meshctl config, in istioctl proxy-config's tables, and meshctl explain."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import typer
import yaml

from meshlib.cli.admin_client import AdminClient
from meshlib.cli.failure import CommandFailed
from meshlib.cli.options import ControlPlaneUrl
from meshlib.cli.tables import table
from meshlib.controlplane.inspection import Configuration, Secrets
from meshlib.errors import InvalidResource
from meshlib.identity.held import ROOT
from meshlib.model import (
    Cluster,
    DirectResponse,
    Endpoint,
    Inbound,
    Listener,
    LoadAssignment,
    Redirect,
    Route,
    RouteConfiguration,
    Snapshot,
)
from meshlib.policy import explain as policy
from meshlib.policy.explain import conditions, request_of
from meshlib.policy.live import compile_live
from meshlib.xds.decode import decode_resource

Rows = Callable[[Snapshot], Iterator[list[str]]]
N = TypeVar("N", Listener, Inbound, RouteConfiguration, Cluster)


def _listeners(held: Snapshot) -> Iterator[list[str]]:
    for listener in held.listeners:
        yield [listener.name, "outbound", ", ".join(listener.route_configurations) or "-"]
    for inbound in held.inbound:
        yield [inbound.name, "inbound", "this process"]


def _routes(held: Snapshot) -> Iterator[list[str]]:
    for configuration in held.route_configurations:
        for host in configuration.virtual_hosts:
            for route in host.routes:
                yield [
                    configuration.name,
                    host.name,
                    _domains(host.domains),
                    route.name or "-",
                    conditions(route.match),
                    _action(route),
                    route.origin or "-",
                ]


def _action(route: Route) -> str:
    action = route.action
    if isinstance(action, Redirect):
        return f"redirect {action.status}"
    if isinstance(action, DirectResponse):
        return f"answer {action.status}"
    if len(action.clusters) == 1:
        return action.clusters[0].cluster
    total = sum(each.weight for each in action.clusters)
    return ", ".join(f"{each.cluster} {100 * each.weight / total:.3g}%" for each in action.clusters if each.weight)


def _clusters(held: Snapshot) -> Iterator[list[str]]:
    endpoints = _endpoints_of(held)
    for cluster in held.clusters:
        parts = cluster.name.split("|")  # Istio's outbound|9080|v1|reviews.default.svc.cluster.local
        direction, port, _, host = parts if len(parts) == 4 else ("-", "-", "", cluster.name)
        yield [
            host,
            port,
            cluster.subset or "-",
            direction,
            cluster.type.value,
            cluster.load_balancing.value,
            str(len(endpoints.get(cluster.name, ()))),
            cluster.origin or "-",
        ]


def _endpoints(held: Snapshot) -> Iterator[list[str]]:
    for cluster, endpoints in sorted(_endpoints_of(held).items()):
        for each in endpoints:
            yield [
                str(each),
                each.health.value,
                str(each.locality) or "-",
                str(each.weight),
                str(each.priority),
                "√" if each.is_meshed else "-",
                each.workload or "-",
                cluster,
            ]


def _endpoints_of(held: Snapshot) -> dict[str, tuple[Endpoint, ...]]:
    return {each.cluster: each.endpoints for each in held.assignments} | {
        each.name: each.endpoints for each in held.clusters if each.endpoints
    }


def _domains(domains: tuple[str, ...]) -> str:
    """As istioctl: the first, and how many more."""
    if not domains:
        return "-"
    return domains[0] if len(domains) == 1 else f"{domains[0]} + {len(domains) - 1} more..."


class Kind(NamedTuple):
    """fields: of the Snapshot that hold them."""

    headers: tuple[str, ...]
    rows: Rows
    fields: tuple[str, ...]


KINDS = {
    "listeners": Kind(("NAME", "DIRECTION", "DESTINATION"), _listeners, ("listeners", "inbound")),
    "routes": Kind(
        ("NAME", "VIRTUAL HOST", "DOMAINS", "ROUTE", "MATCH", "ACTION", "FROM"), _routes, ("route_configurations",)
    ),
    "clusters": Kind(
        ("SERVICE FQDN", "PORT", "SUBSET", "DIRECTION", "TYPE", "LOAD BALANCING", "ENDPOINTS", "FROM"),
        _clusters,
        ("clusters",),
    ),
    "endpoints": Kind(
        ("ENDPOINT", "STATUS", "LOCALITY", "WEIGHT", "PRIORITY", "MTLS", "WORKLOAD", "CLUSTER"),
        _endpoints,
        ("assignments",),
    ),
}


SECRETS = "secrets"
_OF_SECRETS = ("RESOURCE NAME", "TYPE", "STATUS", "VALID CERT", "SERIAL NUMBER", "NOT AFTER", "NOT BEFORE")


def config(
    kind: Annotated[str, typer.Argument(help="listeners, routes, clusters, endpoints or secrets.", metavar="KIND")],
    workload: Annotated[
        str, typer.Argument(help="A process as meshctl proxy-status names it, or a workload: productpage-v1.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="json or yaml, with every field.")] = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """What configuration does a process hold? It asks for the hosts that it calls, and is told of no others."""
    known = next((each for each in (*KINDS, SECRETS) if each == kind or each.removesuffix("s") == kind), None)
    if known is None:
        raise CommandFailed(f"{kind}: there are {', '.join(KINDS)}, {SECRETS}")
    if output not in ("", "json", "yaml"):
        raise CommandFailed(f"-o {output}: there are json and yaml")
    if known == SECRETS:
        _secrets(control_plane, workload, output)
        return
    found, held = ask(control_plane, workload, "sent")
    if found.alike > 1:
        typer.echo(f"{found.name}, one of {found.alike} processes of {workload}:", err=True)
    headers, rows, fields = KINDS[known]
    if output:
        _tell({name: getattr(held, name) for name in fields}, output)
        return
    shown = list(rows(held))
    if not shown:
        raise CommandFailed(f"{found.name} holds no {known}: it has called nobody yet")
    typer.echo(table(headers, shown))


def _secrets(control_plane: str, workload: str, output: str) -> None:
    """As the process tells of them, every few seconds; keys never leave it."""
    with AdminClient(control_plane) as client:
        found = client.get("/v1/secrets", {"of": workload}, Secrets)
    if found.alike > 1:
        typer.echo(f"{found.name}, one of {found.alike} processes of {workload}:", err=True)
    if output:
        _tell({SECRETS: found.secrets}, output)
        return
    if not found.secrets:
        raise CommandFailed(f"{found.name} tells of no certificate: it has no identity, or sends no metrics here (yet)")
    now = time.time()
    rows = [
        [
            each.name,
            "CA" if each.name == ROOT else "Cert Chain",
            "ACTIVE",
            str(each.not_before <= now < each.not_after).lower(),
            each.serial,
            _date(each.not_after),
            _date(each.not_before),
        ]
        for each in found.secrets
    ]
    typer.echo(table(_OF_SECRETS, rows))


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def explain(
    url: Annotated[str, typer.Argument(help="http://reviews:9080/reviews/0")],
    workload: Annotated[str, typer.Option("--from", help="Who sends it: a process, or a workload.")],
    method: Annotated[str, typer.Option("--method", "-X", help="The request's method.")] = "GET",
    header: Annotated[list[str] | None, typer.Option("--header", "-H", help="end-user: jason")] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="json.")] = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """Where would a request go, and why? As mesh.explain() answers in that process, but for its own counters."""
    if output not in ("", "json"):
        raise CommandFailed(f"-o {output}: there is json")
    try:
        request = request_of(method, url, map(_header, header or ()))
    except ValueError as error:
        raise CommandFailed(str(error)) from None
    found, visible = ask(control_plane, workload, "visible")
    explanation = policy.explain(compile_live(visible, None, random.Random(0)), request)
    if output:
        _tell(explanation, output)
        return
    typer.echo(f"From {found.name}:\n{explanation}")
    own = "Calls in flight, ejections, breakers and the use of limits"
    typer.echo(f"{own} are the process's own; mesh.explain() shows them.", err=True)


def ask(control_plane: str, workload: str, scope: str) -> tuple[Configuration, Snapshot]:
    """One process's configuration, as it was sent and as a process reads it."""
    with AdminClient(control_plane) as client:
        found = client.get("/v1/config", {"of": workload, "scope": scope}, Configuration)
    try:
        values = [decode_resource(type_url, data) for type_url, data in found.resources]
    except InvalidResource as error:
        raise CommandFailed(f"{found.name} holds what this meshctl can't read: {error}") from None
    return found, Snapshot(
        found.version,
        _named(each for each in values if isinstance(each, Listener)),
        _named(each for each in values if isinstance(each, RouteConfiguration)),
        _named(each for each in values if isinstance(each, Cluster)),
        tuple(sorted((each for each in values if isinstance(each, LoadAssignment)), key=lambda each: each.cluster)),
        inbound=_named(each for each in values if isinstance(each, Inbound)),
    )


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise ValueError(f"a header is NAME: VALUE; found {text!r}")
    return name.strip(), value.strip()


def _named(values: Iterable[N]) -> tuple[N, ...]:
    return tuple(sorted(values, key=lambda each: each.name))


def _tell(value: Any, output: str) -> None:
    built = msgspec.to_builtins(value)
    if output == "json":
        typer.echo(json.dumps(built, indent=2))
    else:
        typer.echo(yaml.safe_dump(built, sort_keys=False, allow_unicode=True).rstrip("\n"))
