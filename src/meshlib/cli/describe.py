"""What is this workload, or service, and what concerns it? meshctl describe, in prose as istioctl's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec
import typer
import yaml

from meshlib.cli import yaml_files
from meshlib.cli.admin_client import AdminClient
from meshlib.cli.failure import CommandFailed
from meshlib.cli.options import ControlPlaneUrl
from meshlib.cli.stored import objects_of
from meshlib.controlplane import admin_api as api
from meshlib.controlplane.concerns import Concerned
from meshlib.istio import resources as r
from meshlib.istio.mesh_settings import mesh_settings


class Rule(msgspec.Struct, frozen=True):
    """One object that has a say. source: file and line, or who applied it. says: a sentence for each part."""

    kind: str
    namespace: str
    name: str
    source: str
    says: tuple[str, ...] = ()


class Description(msgspec.Struct, frozen=True):
    """kind: `service` or `workload`. services: itself, or those that the workload stands behind. endpoints: of the
    services; of a workload, its own. clients: its connected processes. rules: in the order of the mesh's kinds."""

    kind: str
    namespace: str
    name: str
    services: tuple[api.ServiceEndpoints, ...]
    endpoints: tuple[api.ServiceEndpoint, ...]
    clients: tuple[api.Client, ...]
    rules: tuple[Rule, ...]
    warnings: tuple[str, ...]


def describe(
    name: Annotated[str, typer.Argument(metavar="WORKLOAD|SERVICE", help="What to describe.")],
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Its namespace.")] = "default",
    output: Annotated[str, typer.Option("--output", "-o", help="json or yaml, with every field.")] = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """Say what a workload or service is, which objects concern it, where they stand, and what is wrong."""
    if output not in ("", "json", "yaml"):
        raise CommandFailed(f"-o {output}: there are json and yaml")
    with AdminClient(control_plane) as client:
        found = described(name, namespace, client.endpoints(), client.clients(), objects_of(client), client.problems())
    built = msgspec.to_builtins(found)
    if output == "json":
        typer.echo(msgspec.json.format(msgspec.json.encode(built)).decode())
    elif output == "yaml":
        typer.echo(yaml.safe_dump(built, sort_keys=False, allow_unicode=True).rstrip("\n"))
    else:
        typer.echo("\n".join(prose(found)))


def described(
    name: str,
    namespace: str,
    services: Sequence[api.ServiceEndpoints],
    clients: Sequence[api.Client],
    objects: Sequence[r.Object],
    problems: Iterable[api.Problem],
) -> Description:
    """Raises CommandFailed where there is neither a service nor a workload of that name."""
    service = next((each for each in services if (each.namespace, each.name) == (namespace, name)), None)
    if service is not None:
        own: tuple[api.ServiceEndpoints, ...] = (service,)
        endpoints = service.endpoints
        workloads = {each.workload for each in endpoints}
    else:
        near = [each for each in services if each.namespace == namespace]
        own = tuple(each for each in near if any(one.workload == name for one in each.endpoints))
        endpoints = tuple({one.address: one for each in own for one in each.endpoints if one.workload == name}.values())
        workloads = {name}
    processes = tuple(each for each in clients if each.namespace == namespace and each.workload in workloads)
    if service is None and not own and not processes:
        raise CommandFailed(
            f"there is no service or workload {namespace}/{name}: meshctl status and meshctl get endpoints show what "
            "there is, and -n names another namespace"
        )
    concerned = Concerned(
        namespace,
        frozenset(each.host for each in own),
        frozenset(each.name for each in own),
        tuple(each.labels for each in endpoints),
        mesh_settings(objects).root_namespace,
    )
    fitting = [each for each in objects if concerned.by(each)]
    order = list(_SAYS)
    fitting.sort(key=lambda each: (order.index(each.kind) if each.kind in order else len(order), *each.key))
    titles = {each.title for each in fitting}
    return Description(
        "service" if service is not None else "workload",
        namespace,
        name,
        own,
        endpoints,
        processes,
        tuple(_rule(each) for each in fitting),
        tuple(_warnings(own, endpoints, processes, [each for each in problems if each.object in titles])),
    )


def _rule(given: r.Object) -> Rule:
    says = _SAYS.get(given.kind)
    return Rule(
        given.kind,
        given.namespace,
        given.name,
        given.source,
        tuple(says(given.spec)) if says is not None and given.spec is not None else (),
    )


def _virtual_service(spec: Any) -> Iterator[str]:
    for number, rule in enumerate(spec.http):
        name = f'Route "{rule.name}"' if rule.name else f"Route {number + 1}"
        parts = [f"{len(rule.match)} match{'es' if len(rule.match) > 1 else ''}"] if rule.match else []
        for to in rule.route:
            subset = f" subset {to.destination.subset}" if to.destination.subset else ""
            weight = f" with weight {to.weight}%" if len(rule.route) > 1 else ""
            parts.append(f'to host "{to.destination.host}"{subset}{weight}')
        does = {
            "redirect": rule.redirect is not None,
            "direct response": rule.direct_response is not None,
            "timeout": rule.timeout is not None,
            "retries": rule.retries is not None,
            "fault": rule.fault is not None,
            "mirror": rule.mirror is not None or bool(rule.mirrors),
        }
        yield f"{name}: {', '.join([*parts, *(told for told, is_so in does.items() if is_so)])}"


def _destination_rule(spec: Any) -> Iterator[str]:
    if spec.subsets:
        yield f"Subsets: {', '.join(each.name for each in spec.subsets)}"
    policy = spec.traffic_policy
    if policy is not None:
        does = {
            "load balancer": policy.load_balancer is not None,
            "connection pool": policy.connection_pool is not None,
            "outlier detection": policy.outlier_detection is not None,
            "TLS": policy.tls is not None,
        }
        if told := [name for name, is_so in does.items() if is_so]:
            yield f"Traffic policy: {', '.join(told)}"


def _authorization(spec: Any) -> Iterator[str]:
    count = len(spec.rules)
    meaning = {("ALLOW", True): ": lets nobody in", ("DENY", True): ": denies nobody"}.get((spec.action, not count), "")
    yield f"{spec.action}, {count} rule{'s' if count != 1 else ''}{meaning}"


def _peer_authentication(spec: Any) -> Iterator[str]:
    yield f"mTLS {spec.mtls.mode if spec.mtls is not None else 'UNSET'}"
    for port, mode in sorted(spec.port_level_mtls.items()):
        yield f"mTLS {mode.mode} on port {port}"


def _request_authentication(spec: Any) -> Iterator[str]:
    for rule in spec.jwt_rules:
        yield f'Tokens of "{rule.issuer}"'


def _rate_limit(spec: Any) -> Iterator[str]:
    yield from (f"Limit {each.name}: {each.requests} requests".replace(" :", ":") for each in spec.limits)


def _nothing(spec: Any) -> Iterator[str]:
    return iter(())


_SAYS: Mapping[str, Callable[[Any], Iterator[str]]] = {
    "Service": _nothing,
    "ServiceEntry": _nothing,
    "VirtualService": _virtual_service,
    "HTTPRoute": _nothing,
    "GRPCRoute": _nothing,
    "DestinationRule": _destination_rule,
    "BackendTrafficPolicy": _nothing,
    "PeerAuthentication": _peer_authentication,
    "RequestAuthentication": _request_authentication,
    "AuthorizationPolicy": _authorization,
    "RateLimit": _rate_limit,
    "Telemetry": _nothing,
    "Sidecar": _nothing,
}
"""The kinds that may concern a workload or service, in the order in which they are told, and what each says."""


def _warnings(
    services: Sequence[api.ServiceEndpoints],
    endpoints: Sequence[api.ServiceEndpoint],
    clients: Sequence[api.Client],
    problems: Iterable[api.Problem],
) -> Iterator[str]:
    if not services:
        yield "no service selects this workload: nobody can call it by a name of the mesh"
    elif not endpoints:
        yield "there is no endpoint: calls get 503 UH"
    elif all(each.health != "HEALTHY" for each in endpoints):
        yield "no endpoint is healthy: calls get 503 UH"
    for client in clients:
        for error in client.errors:
            yield f"{client.name} has refused configuration: {error}"
        if stale := [kind for kind, state in client.types.items() if state == "STALE"]:
            yield f"{client.name} has not answered the last push of {', '.join(sorted(stale))}"
    for problem in problems:
        yield str(api.Problem(yaml_files.shown(problem.source), problem.object, problem.field, problem.reason))


def prose(found: Description) -> Iterator[str]:
    """Lines, as `istioctl experimental describe` words them."""
    if found.kind == "workload":
        yield f"Workload: {found.name}.{found.namespace}"
    for service in found.services:
        yield f"Service: {service.name}.{service.namespace}"
        yield f"   Host: {service.host}"
        for port in service.ports:
            yield f"   Port: {port}"
    if found.endpoints:
        yield "Endpoints:"
        for each in found.endpoints:
            labels = ",".join(f"{key}={value}" for key, value in sorted(each.labels.items()))
            yield f"   {each.address} {each.health} {each.workload or '-'} {labels}".rstrip()
    if found.clients:
        yield "Processes:"
        for client in found.clients:
            states = ", ".join(f"{kind} {state}" for kind, state in sorted(client.types.items())) or "nothing asked for"
            yield f"   {client.name}: {states}"
    for rule in found.rules:
        if rule.kind == "Service":
            continue
        yield f"{rule.kind}: {rule.name}.{rule.namespace} ({yaml_files.shown(rule.source)})"
        for said in rule.says:
            yield f"   {said}"
    for warning in found.warnings:
        yield f"WARNING: {warning}"
